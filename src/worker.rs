//! Background work: reconciles pull secrets, verifies accounts, renews tokens of clusters, carries
//! out runs of coverage, and warns of expiring credentials.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::service::{
    ServiceError, clusters::Clusters, coverage::Coverages, mints::Mints, reconcile::Reconciler,
    verification::Verifications,
};

mod breaker;
mod coverage;
mod credentials;
mod fanout;
mod lane;
mod mints;

pub use fanout::FanoutConfig;

/// Concurrent verifications.
const CONCURRENCY: usize = 8;
/// Accounts per claim.
const BATCH: i64 = 16;
/// Interval of expiry checks.
const EXPIRY_INTERVAL: Duration = Duration::from_mins(1);

/// Configuration of the worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Whether accounts with a verification interval are verified.
    pub verifies: bool,
    /// Interval of polls for due verifications.
    pub poll: Duration,
    /// Time limit of one verification.
    pub check_timeout: Duration,
    /// Configuration of the fan-out.
    pub fanout: FanoutConfig,
}

/// Services that the worker uses.
#[derive(Debug, Clone)]
pub struct Services {
    /// Verifies accounts.
    pub verifications: Verifications,
    /// Mints logins.
    pub mints: Mints,
    /// Reconciles pull secrets.
    pub reconciler: Reconciler,
    /// Renews tokens of clusters.
    pub clusters: Clusters,
    /// Carries out runs of coverage.
    pub coverages: Coverages,
}

/// Runs the worker until `stop` is cancelled.
pub async fn run(services: Services, config: WorkerConfig, stop: CancellationToken) {
    let Services { verifications, mints, reconciler, clusters, coverages } = services;
    tokio::join!(
        fanout::run(reconciler, config.fanout, stop.clone()),
        verify(verifications, config, stop.clone()),
        mints::run(mints, stop.clone()),
        credentials::run(clusters, stop.clone()),
        coverage::run(coverages, stop.clone())
    );
}

/// Verifies accounts until `stop` is cancelled, which also aborts the verifications in flight.
/// Their accounts are claimed again when the lease expires.
async fn verify(verifications: Verifications, config: WorkerConfig, stop: CancellationToken) {
    let working = async {
        let mut ticks = tokio::time::interval(config.poll);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut expiries_checked: Option<Instant> = None;
        loop {
            ticks.tick().await;
            if expiries_checked.is_none_or(|at| at.elapsed() >= EXPIRY_INTERVAL) {
                expiries_checked = Some(Instant::now());
                report(verifications.report_status().await);
            }
            if config.verifies {
                report(verify_due(&verifications, config.check_timeout).await);
            }
        }
    };
    stop.run_until_cancelled(working).await;
}

/// Verifies all due accounts in batches.
async fn verify_due(verifications: &Verifications, check_timeout: Duration) -> Result<(), ServiceError> {
    // A batch takes two rounds of CONCURRENCY verifications.
    let lease = check_timeout * 4 + Duration::from_secs(30);
    let lease_seconds = i32::try_from(lease.as_secs()).unwrap_or(i32::MAX);
    loop {
        let names = verifications.claim(BATCH, lease_seconds).await?;
        let is_last = names.len() < usize::try_from(BATCH).unwrap_or_default();
        stream::iter(names)
            .for_each_concurrent(CONCURRENCY, |name| async move {
                match verifications.verify_due(&name).await {
                    // Deleted or changed since the claim.
                    Err(ServiceError::NotFound { .. }) => {}
                    result => report(result),
                }
            })
            .await;
        if is_last {
            return Ok(());
        }
    }
}

/// Logs an error. The work is repeated.
fn report(result: Result<(), ServiceError>) {
    if let Err(error) = result {
        tracing::warn!(%error, "worker step failed");
    }
}
