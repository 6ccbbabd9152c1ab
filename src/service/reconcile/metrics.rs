//! Metrics of the reconciler.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::metrics::histogram::Histogram;

use crate::storage::{targets::status::Survey, unmatched::UnmatchedCounts};

/// Buckets in seconds, from one Secret to a cluster that is down for an hour.
const SECONDS: [f64; 12] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];

/// Metrics of the reconciler.
#[derive(Clone)]
pub struct ReconcileMetrics {
    /// Seconds from a change to the sync of a target.
    pub sync_durations: Histogram,
    survey: Arc<Mutex<Option<(Survey, UnmatchedCounts)>>>,
}

impl Default for ReconcileMetrics {
    fn default() -> Self {
        Self { sync_durations: Histogram::new(SECONDS), survey: Arc::default() }
    }
}

impl fmt::Debug for ReconcileMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReconcileMetrics").field("survey", &self.survey()).finish_non_exhaustive()
    }
}

impl ReconcileMetrics {
    /// Last count of all targets, and of pull secrets with a selector that matches nothing; none
    /// without a worker or after an error.
    #[must_use]
    pub fn survey(&self) -> Option<(Survey, UnmatchedCounts)> {
        *self.survey.lock()
    }

    pub(super) fn set_survey(&self, survey: Option<(Survey, UnmatchedCounts)>) {
        *self.survey.lock() = survey;
    }
}
