//! What regcred does without being asked: it keeps pull secrets right, verifies logins that are due, and warns of those that
//! end soon.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::service::{ServiceError, reconcile::Reconciler, verification::Verifications};

mod breaker;
mod fanout;

pub use fanout::FanoutConfig;

/// Checks that run at a time.
const CONCURRENCY: usize = 8;
/// Accounts that are taken at a time.
const BATCH: i64 = 16;
/// How often expiries are looked at.
const LOOK_AROUND: Duration = Duration::from_mins(1);

/// How the worker works.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Whether logins are verified; only those of accounts that have an interval ever are.
    pub verifies: bool,
    /// How often it is looked for logins that are due.
    pub poll: Duration,
    /// How long a check may take.
    pub check_timeout: Duration,
    /// How pull secrets are kept right.
    pub fanout: FanoutConfig,
}

/// What the worker works with.
#[derive(Debug, Clone)]
pub struct Services {
    /// Checks of logins.
    pub verifications: Verifications,
    /// Pull secrets.
    pub reconciler: Reconciler,
}

/// Works until it is told to stop.
pub async fn run(services: Services, config: WorkerConfig, stop: CancellationToken) {
    let Services { verifications, reconciler } = services;
    tokio::join!(fanout::run(reconciler, config.fanout, stop.clone()), verify(verifications, config, stop.clone()),);
}

/// Verifies until it is told to stop. A check that is under way then is given up: its account is taken again by
/// another replica, or at the next start, when the lease is over.
async fn verify(verifications: Verifications, config: WorkerConfig, stop: CancellationToken) {
    let working = async {
        let mut ticks = tokio::time::interval(config.poll);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked: Option<Instant> = None;
        loop {
            ticks.tick().await;
            if looked.is_none_or(|at| at.elapsed() >= LOOK_AROUND) {
                looked = Some(Instant::now());
                report(verifications.report_status().await);
            }
            if config.verifies {
                report(verify_due(&verifications, config.check_timeout).await);
            }
        }
    };
    stop.run_until_cancelled(working).await;
}

/// Verifies all that is due, batch by batch.
async fn verify_due(verifications: &Verifications, check_timeout: Duration) -> Result<(), ServiceError> {
    // A batch goes through in a few rounds of checks.
    let lease = check_timeout * 4 + Duration::from_secs(30);
    let lease_seconds = i32::try_from(lease.as_secs()).unwrap_or(i32::MAX);
    loop {
        let names = verifications.claim(BATCH, lease_seconds).await?;
        let is_last = names.len() < usize::try_from(BATCH).unwrap_or_default();
        stream::iter(names)
            .for_each_concurrent(CONCURRENCY, |name| async move {
                match verifications.verify_due(&name).await {
                    // Deleted or changed meanwhile: there is nothing to do, or it is due again.
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

fn report(result: Result<(), ServiceError>) {
    if let Err(error) = result {
        tracing::warn!(%error, "the worker could not do its work; it tries again");
    }
}
