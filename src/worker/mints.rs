//! Mints logins before they expire.

use std::{collections::HashMap, future, iter, time::Duration};

use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, MissedTickBehavior, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{EXPIRY_INTERVAL, report};
use crate::{
    service::{
        ServiceError,
        mints::{MintAttempt, Mints},
    },
    storage::mints::MintLease,
};

/// Interval of polls for due mints.
const POLL: Duration = Duration::from_secs(1);
/// Mints in flight, each claimed as it starts: as many as the limits of one host let end within the
/// time limit of a mint.
const IN_FLIGHT: usize = 64;
/// Attempts to store a result, and the pause between them.
const ATTEMPTS: usize = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// Grace period for mints in flight when the worker stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs until `stop` is cancelled. Mints in flight get some time to end; the leases of the others are
/// released, so that another replica mints at once.
pub async fn run(mints: Mints, stop: CancellationToken) {
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
                    report(mints.report_status().await);
                }
                report(in_flight.start_due(&mints).await);
            }
            group = in_flight.ended() => store(&mints, &group).await,
        }
    }
    in_flight.drain(&mints).await;
}

/// Mints in flight. Tasks of their own: mints go on while claims are made and results are stored.
#[derive(Default)]
struct InFlight {
    tasks: JoinSet<MintAttempt>,
    leases: HashMap<Id, MintLease>,
}

impl InFlight {
    /// Claims as many due mints as may start at once, and starts them.
    async fn start_due(&mut self, mints: &Mints) -> Result<(), ServiceError> {
        let free = IN_FLIGHT.saturating_sub(self.tasks.len());
        if free == 0 {
            return Ok(());
        }
        for claimed in mints.claim(i64::try_from(free).unwrap_or_default()).await? {
            let (mints, lease) = (mints.clone(), claimed.lease());
            let task = self.tasks.spawn(async move { mints.attempt(claimed).await });
            self.leases.insert(task.id(), lease);
        }
        Ok(())
    }

    /// Waits for a mint to end, and returns the results of all that have. Pending without any in flight.
    async fn ended(&mut self) -> Vec<MintAttempt> {
        let Some(first) = self.tasks.join_next_with_id().await else { return future::pending().await };
        let others = iter::from_fn(|| self.tasks.try_join_next_with_id());
        let ended: Vec<_> = iter::once(first).chain(others).collect();
        ended.into_iter().filter_map(|ended| self.finished(ended)).collect()
    }

    /// Returns the result of a mint. One that panicked has none: its account is claimed again.
    fn finished(&mut self, ended: Result<(Id, MintAttempt), JoinError>) -> Option<MintAttempt> {
        match ended {
            Ok((id, attempt)) => {
                self.leases.remove(&id);
                Some(attempt)
            }
            Err(error) => {
                self.leases.remove(&error.id());
                tracing::error!(%error, "mint panicked");
                None
            }
        }
    }

    async fn drain(&mut self, mints: &Mints) {
        let deadline = Instant::now() + STOP_TIMEOUT;
        while !self.tasks.is_empty()
            && let Ok(group) = timeout_at(deadline, self.ended()).await
        {
            store(mints, &group).await;
        }
        self.tasks.abort_all();
        let left: Vec<_> = self.leases.drain().map(|(_, lease)| (lease, Duration::ZERO)).collect();
        report(mints.release(&left).await);
    }
}

/// Stores the results that ended while others were stored, together. If that fails, each is stored
/// alone: one of them could be the cause, or rows that another transaction locks in another order.
async fn store(mints: &Mints, group: &[MintAttempt]) {
    let mut pending: Vec<&[MintAttempt]> = if group.is_empty() { Vec::new() } else { vec![group] };
    for attempt in 1..=ATTEMPTS {
        let mut failed = Vec::new();
        for results in pending {
            if let Err(error) = mints.record(results).await {
                report(Err(error));
                failed.extend(results.chunks(1));
            }
        }
        if failed.is_empty() || attempt == ATTEMPTS {
            return;
        }
        pending = failed;
        tokio::time::sleep(PAUSE).await;
    }
}
