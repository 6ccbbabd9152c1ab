//! Metrics of mints.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::metrics::histogram::Histogram;

use crate::{
    clients::mint::MintClient,
    domain::mint::{MintReason, MintState, SourceType},
    storage::mints::MintCounts,
};

/// Buckets in seconds, from one request to the time limit.
const SECONDS: [f64; 9] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0];
/// Number of results: a success, and each reason of a failure.
const RESULTS: usize = MintReason::ALL.len() + 1;

/// Metrics of mints.
pub struct MintMetrics {
    /// Duration of mints.
    pub durations: Histogram,
    results: [[AtomicU64; RESULTS]; SourceType::ALL.len()],
    counts: Mutex<Option<MintCounts>>,
    client: Arc<MintClient>,
}

impl fmt::Debug for MintMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MintMetrics").field("counts", &*self.counts.lock()).finish_non_exhaustive()
    }
}

impl MintMetrics {
    pub(super) fn new(client: Arc<MintClient>) -> Self {
        Self { durations: Histogram::new(SECONDS), results: Default::default(), counts: Mutex::default(), client }
    }

    pub(super) fn count(&self, source: SourceType, failure: Option<MintReason>, duration: Duration) {
        let result = failure.map_or(0, |reason| reason as usize + 1);
        self.results[source as usize][result].fetch_add(1, Ordering::Relaxed);
        self.durations.observe(duration.as_secs_f64());
    }

    pub(super) fn set_counts(&self, counts: MintCounts) {
        *self.counts.lock() = Some(counts);
    }

    /// Number of mints by this process, per source and result.
    pub fn mints(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let names = std::iter::once("success").chain(MintReason::ALL.map(MintReason::as_str));
        let names: Vec<&'static str> = names.collect();
        SourceType::ALL.into_iter().flat_map(move |source| {
            let counts = &self.results[source as usize];
            let counted = names.clone().into_iter().zip(counts);
            counted.map(move |(result, count)| (source.as_str(), result, count.load(Ordering::Relaxed)))
        })
    }

    /// Number of minted accounts by state, as of the last report.
    pub fn accounts(&self) -> Option<[(&'static str, i64); MintState::ALL.len()]> {
        let MintCounts { valid, failing, expired, .. } = (*self.counts.lock())?;
        Some([
            (MintState::Valid.as_str(), valid),
            (MintState::Failing.as_str(), failing),
            (MintState::Expired.as_str(), expired),
        ])
    }

    /// Shortest validity of a login, in seconds, as of the last report.
    pub fn least_validity_seconds(&self) -> Option<f64> {
        (*self.counts.lock())?.least_validity_seconds
    }

    /// Largest difference between the clock of this host and that of a provider, in seconds.
    pub fn clock_offset_seconds(&self) -> f64 {
        self.client.clock_offset_max().as_seconds_f64()
    }
}
