//! Renews tokens of clusters, and warns of the end of credentials.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{EXPIRY_INTERVAL, report};
use crate::service::{ServiceError, clusters::Clusters};

/// Interval of polls for due renewals.
const POLL: Duration = Duration::from_secs(5);
/// Duration of a claim: longer than two calls to a cluster.
const LEASE_SECONDS: i32 = 120;
/// Renewals per claim.
const BATCH: i64 = 16;
/// Concurrent renewals.
const CONCURRENCY: usize = 8;

/// Runs until `stop` is cancelled, which also aborts the renewals in flight. Their clusters are
/// claimed again when the lease expires.
pub async fn run(clusters: Clusters, stop: CancellationToken) {
    let working = async {
        let mut ticks = tokio::time::interval(POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reported: Option<Instant> = None;
        loop {
            ticks.tick().await;
            if reported.is_none_or(|at| at.elapsed() >= EXPIRY_INTERVAL) {
                reported = Some(Instant::now());
                report(clusters.report_credentials().await);
            }
            report(renew_due(&clusters).await);
        }
    };
    stop.run_until_cancelled(working).await;
}

async fn renew_due(clusters: &Clusters) -> Result<(), ServiceError> {
    let claimed = clusters.claim_renewals(BATCH, LEASE_SECONDS).await?;
    stream::iter(claimed)
        .for_each_concurrent(CONCURRENCY, |id| async move {
            match clusters.renew_token(id).await {
                // Deleted since the claim.
                Err(ServiceError::NotFound { .. }) => {}
                result => report(result),
            }
        })
        .await;
    Ok(())
}
