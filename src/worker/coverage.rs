//! Carries out requested runs of coverage.

use std::{collections::HashMap, time::Duration};

use tokio::{
    task::{Id, JoinSet},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::{EXPIRY_INTERVAL, report};
use crate::{
    service::{ServiceError, coverage::Coverages},
    storage::coverage::runs::ClaimedRun,
};

/// Interval of polls for requested runs.
const POLL: Duration = Duration::from_secs(1);
/// Runs of different clusters that a process carries out at the same time.
const IN_FLIGHT: usize = 2;

/// Runs until `stop` is cancelled, which interrupts the runs in flight: another replica carries them
/// out.
pub async fn run(coverages: Coverages, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported: Option<Instant> = None;
    let mut in_flight = InFlight::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {
                if reported.is_none_or(|at| at.elapsed() >= EXPIRY_INTERVAL) {
                    reported = Some(Instant::now());
                    report(coverages.report_status().await);
                }
                report(in_flight.start(&coverages).await);
            }
        }
    }
    in_flight.release(&coverages).await;
}

/// Runs in flight. Tasks of their own: claims go on.
#[derive(Default)]
struct InFlight {
    tasks: JoinSet<Result<(), ServiceError>>,
    runs: HashMap<Id, ClaimedRun>,
}

impl InFlight {
    /// Drops the runs that ended, and starts requested ones.
    async fn start(&mut self, coverages: &Coverages) -> Result<(), ServiceError> {
        while let Some(ended) = self.tasks.try_join_next_with_id() {
            match ended {
                Ok((id, result)) => {
                    self.runs.remove(&id);
                    report(result);
                }
                Err(error) => {
                    self.runs.remove(&error.id());
                    tracing::error!(%error, "coverage panicked");
                }
            }
        }
        while self.tasks.len() < IN_FLIGHT {
            let Some(claimed) = coverages.claim().await? else { return Ok(()) };
            let (coverages, run) = (coverages.clone(), claimed.clone());
            let task = self.tasks.spawn(async move { coverages.perform(&run).await });
            self.runs.insert(task.id(), claimed);
        }
        Ok(())
    }

    async fn release(&mut self, coverages: &Coverages) {
        self.tasks.shutdown().await;
        for run in self.runs.values() {
            // A run that has ended is left as it is.
            report(coverages.release(run).await);
        }
    }
}
