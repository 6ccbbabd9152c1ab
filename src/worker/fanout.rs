//! Reconciles pull secrets: one lane per cluster with due targets, so that a cluster that hangs or
//! fails delays no other.
//!
//! NOTIFY wakes the worker. A poll finds due targets that no wake-up announced.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    sync::Notify,
    task::{JoinError, JoinSet},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    breaker::{Allowance, Breaker},
    lane::Lane,
    report,
};
use crate::{service::reconcile::Reconciler, storage::targets::queue::DueCluster};

/// Pause after a database error.
const DATABASE_PAUSE: Duration = Duration::from_secs(1);
/// Grace period for attempts in flight when the worker stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest single wait for a wake-up.
const LISTEN_TIMEOUT: Duration = Duration::from_mins(1);
/// Interval of target counts for the metrics.
const SURVEY_INTERVAL: Duration = Duration::from_secs(15);
/// Concurrent resyncs.
const RESYNCS_MAX: usize = 64;

/// Configuration of the fan-out.
#[derive(Debug, Clone, Copy)]
pub struct FanoutConfig {
    /// Interval of polls for due targets.
    pub poll: Duration,
    /// Targets of one cluster reconciled concurrently.
    pub concurrency: usize,
}

/// Runs the fan-out until `stop` is cancelled.
pub async fn run(reconciler: Reconciler, config: FanoutConfig, stop: CancellationToken) {
    let mut fanout = Fanout::new(reconciler, config, stop);
    fanout.spawn_tasks();
    let mut ticks = tokio::time::interval(config.poll);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = fanout.stop.cancelled() => break,
            () = fanout.wake_ups.lanes.notified() => {}
            _ = ticks.tick() => {}
            Some(ended) = fanout.tasks.join_next() => fanout.handle_end(ended),
        }
        fanout.start_lanes().await;
    }
    fanout.drain().await;
}

struct Fanout {
    reconciler: Reconciler,
    config: FanoutConfig,
    stop: CancellationToken,
    wake_ups: Arc<WakeUps>,
    /// Lanes return their cluster, other tasks `None`.
    tasks: JoinSet<Option<Uuid>>,
    /// Clusters with a running lane.
    running: HashSet<Uuid>,
    /// Breakers by cluster, each for one revision of the cluster.
    breakers: HashMap<Uuid, (i64, Arc<Breaker>)>,
}

impl Fanout {
    fn new(reconciler: Reconciler, config: FanoutConfig, stop: CancellationToken) -> Self {
        Self {
            reconciler,
            config,
            stop,
            wake_ups: Arc::default(),
            tasks: JoinSet::new(),
            running: HashSet::new(),
            breakers: HashMap::new(),
        }
    }

    /// Spawns all tasks except lanes.
    fn spawn_tasks(&mut self) {
        let (reconciler, wake_ups, poll) = (&self.reconciler, &self.wake_ups, self.config.poll);
        let stop = || self.stop.clone();
        self.tasks.spawn(until_stopped(listen(reconciler.clone(), Arc::clone(wake_ups)), stop()));
        self.tasks.spawn(until_stopped(resync(reconciler.clone(), Arc::clone(wake_ups), poll), stop()));
        self.tasks.spawn(until_stopped(survey(reconciler.clone()), stop()));
        self.tasks.spawn(until_stopped(publish_progress(reconciler.clone()), stop()));
        // Stops by itself, since it releases its leases.
        let watching = watch(reconciler.clone(), poll, stop());
        self.tasks.spawn(async move {
            watching.await;
            None
        });
    }

    /// Handles the end of a task. A panic restarts all tasks.
    fn handle_end(&mut self, ended: Result<Option<Uuid>, JoinError>) {
        match ended {
            Ok(Some(cluster)) => {
                self.running.remove(&cluster);
            }
            Ok(None) => {}
            Err(error) if error.is_cancelled() => {}
            Err(error) => {
                tracing::error!(%error, "worker task panicked");
                self.tasks.abort_all();
                self.running.clear();
                self.spawn_tasks();
            }
        }
    }

    /// Starts a lane for each cluster with due targets that may be called.
    async fn start_lanes(&mut self) {
        let due = match self.reconciler.due_clusters().await {
            Ok(due) => due,
            Err(error) => {
                report(Err(error));
                tokio::time::sleep(DATABASE_PAUSE).await;
                return;
            }
        };
        for DueCluster { id: cluster, name, revision } in due {
            let breaker = self.breaker(cluster, revision);
            if breaker.allowance(Instant::now()) == Allowance::None || !self.running.insert(cluster) {
                continue;
            }
            let lane =
                Lane::new(self.reconciler.clone(), (cluster, name.clone()), breaker, self.config, self.stop.clone());
            self.tasks.spawn(async move {
                // A panic ends this lane alone. Its targets are claimed again when their leases
                // expire.
                if AssertUnwindSafe(lane.run()).catch_unwind().await.is_err() {
                    tracing::error!(cluster = name, "lane panicked");
                }
                Some(cluster)
            });
        }
    }

    /// Returns the breaker of a cluster. A changed cluster starts with a closed one.
    fn breaker(&mut self, cluster: Uuid, revision: i64) -> Arc<Breaker> {
        let known = self.breakers.entry(cluster).or_default();
        if known.0 != revision {
            *known = (revision, Arc::default());
        }
        Arc::clone(&known.1)
    }

    /// Waits for the tasks to end. Lanes claim nothing any more.
    async fn drain(&mut self) {
        let drained = tokio::time::timeout(STOP_TIMEOUT, async { while self.tasks.join_next().await.is_some() {} });
        if drained.await.is_err() {
            tracing::warn!("worker stopped with attempts in flight");
        }
    }
}

async fn until_stopped(work: impl Future<Output = ()>, stop: CancellationToken) -> Option<Uuid> {
    stop.run_until_cancelled(work).await;
    None
}

/// One permit per waiting task: `notify_one` on a shared one would wake only one of them.
#[derive(Default)]
struct WakeUps {
    lanes: Notify,
    resyncs: Notify,
}

impl WakeUps {
    fn wake(&self) {
        self.lanes.notify_one();
        self.resyncs.notify_one();
    }
}

fn report_interruption(error: &impl fmt::Display) {
    tracing::warn!(%error, "listener interrupted");
}

/// Wakes the worker on every notification, and after each reconnect.
async fn listen(reconciler: Reconciler, wake_ups: Arc<WakeUps>) {
    loop {
        match reconciler.listen().await {
            Ok(mut listener) => {
                wake_ups.wake();
                loop {
                    match listener.next(LISTEN_TIMEOUT).await {
                        Ok(true) => wake_ups.wake(),
                        Ok(false) => {}
                        Err(error) => break report_interruption(&error),
                    }
                }
            }
            Err(error) => report_interruption(&error),
        }
        tokio::time::sleep(DATABASE_PAUSE).await;
    }
}

/// Resyncs clusters, each in its own task, so that one that hangs delays no other.
async fn resync(reconciler: Reconciler, wake_ups: Arc<WakeUps>, poll: Duration) {
    let mut resyncs: JoinSet<()> = JoinSet::new();
    loop {
        while resyncs.try_join_next().is_some() {}
        if resyncs.len() < RESYNCS_MAX {
            match reconciler.claim_resync().await {
                Ok(Some(claimed)) => {
                    let reconciler = reconciler.clone();
                    resyncs.spawn(async move { report(reconciler.resync(claimed).await) });
                    continue;
                }
                Ok(None) => {}
                Err(error) => report(Err(error)),
            }
        }
        // A wake-up that arrived since the claim completes this at once.
        let _ = tokio::time::timeout(poll, wake_ups.resyncs.notified()).await;
    }
}

/// Watches all clusters that no other replica watches, and releases them when `stop` is cancelled.
async fn watch(reconciler: Reconciler, poll: Duration, stop: CancellationToken) {
    let mut watches: JoinSet<()> = JoinSet::new();
    while !stop.is_cancelled() {
        while watches.try_join_next().is_some() {}
        match reconciler.claim_watches().await {
            Ok(claimed) => {
                for one in claimed {
                    let (reconciler, stop) = (reconciler.clone(), stop.clone());
                    watches.spawn(async move {
                        if let Err(error) = reconciler.watch(&one, stop.cancelled()).await {
                            tracing::warn!(cluster = one.cluster_name, %error, "watch interrupted");
                        }
                    });
                }
            }
            Err(error) => report(Err(error)),
        }
        stop.run_until_cancelled(tokio::time::sleep(poll)).await;
    }
    while watches.join_next().await.is_some() {}
}

/// Counts all targets for the metrics.
async fn survey(reconciler: Reconciler) {
    loop {
        report(reconciler.survey().await);
        tokio::time::sleep(SURVEY_INTERVAL).await;
    }
}

/// Publishes the progress of pull secrets.
async fn publish_progress(reconciler: Reconciler) {
    reconciler.publish_progress().await;
}
