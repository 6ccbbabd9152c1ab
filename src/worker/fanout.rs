//! Keeps pull secrets right: a lane for each cluster that has targets that are due. A cluster that hangs or fails holds up its own
//! lane alone.
//!
//! A wake comes by NOTIFY, and a poll finds what no wake told of.

use std::{
    collections::HashMap,
    fmt,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, timeout_at},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::breaker::{Allowance, Breaker, Place};
use crate::{
    clients::cluster::{ClusterClient, ClusterError},
    service::{
        ServiceError,
        reconcile::{Job, Outcome, Reconciler, Try},
    },
};

/// How long to wait before Postgres is asked again that could not be.
const DATABASE_PAUSE: Duration = Duration::from_secs(1);
/// How long what is under way may take to end when the worker is told to stop; what does not is taken by others once its
/// lease is over.
const STOPPING: Duration = Duration::from_secs(5);
/// How long it is listened for one wake; then for the next.
const LISTENING: Duration = Duration::from_mins(1);
/// How often it is looked how all targets are doing, for the metrics.
const SURVEYS: Duration = Duration::from_secs(15);
/// Clusters whose namespaces are compared at a time.
const COMPARISONS: usize = 64;
/// A claim is for so many rounds: few enough to be through well within a lease, and enough that claiming costs little.
const ROUNDS: i64 = 4;
/// Rounds of claimed targets that wait for the next claim.
const CLAIMED_AHEAD: usize = 2;
/// The most results that are stored at a time.
const GROUP: usize = 64;
/// How long results are gathered for a group at most, while calls are under way.
const GATHERED: Duration = Duration::from_millis(100);
/// How often a lane for which nothing is due looks whether its last calls are over.
const LANE_LOOKS: Duration = Duration::from_millis(100);
/// How often a group of results is tried to be stored.
const SETTLE_TRIES: u32 = 5;

/// How much is done at a time.
#[derive(Debug, Clone, Copy)]
pub struct FanoutConfig {
    /// How often it is looked for what is due, whatever was notified.
    pub poll: Duration,
    /// Targets of one cluster that are worked on at a time.
    pub concurrency: usize,
}

/// Works until it is told to stop.
pub async fn run(reconciler: Reconciler, config: FanoutConfig, stop: CancellationToken) {
    let wakes = Arc::new(WakeUps::default());
    let mut tasks: JoinSet<Option<Uuid>> = JoinSet::new();
    let spawn_others = |tasks: &mut JoinSet<Option<Uuid>>| {
        tasks.spawn(until_stopped(listen(reconciler.clone(), Arc::clone(&wakes)), stop.clone()));
        tasks.spawn(until_stopped(compare(reconciler.clone(), Arc::clone(&wakes), config.poll), stop.clone()));
        let watching = watch(reconciler.clone(), config.poll, stop.clone());
        tasks.spawn(async move {
            watching.await;
            None
        });
        tasks.spawn(until_stopped(survey(reconciler.clone()), stop.clone()));
        tasks.spawn(until_stopped(announce(reconciler.clone()), stop.clone()));
    };
    spawn_others(&mut tasks);
    // A cluster that was changed is another one.
    let mut breakers: HashMap<Uuid, (i64, Arc<Breaker>)> = HashMap::new();
    let mut running: Vec<Uuid> = Vec::new();
    let mut ticks = tokio::time::interval(config.poll);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = wakes.lanes.notified() => {}
            _ = ticks.tick() => {}
            Some(ended) = tasks.join_next() => {
                match ended {
                    Ok(Some(cluster)) => running.retain(|one| *one != cluster),
                    Ok(None) => {}
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => {
                        tracing::error!(%error, "a task of the worker panicked; all of them begin again");
                        tasks.abort_all();
                        running.clear();
                        spawn_others(&mut tasks);
                    }
                }
            }
        }
        let due = match reconciler.due_clusters().await {
            Ok(due) => due,
            Err(error) => {
                tracing::warn!(%error, "the worker could not look for what is due; it tries again");
                tokio::time::sleep(DATABASE_PAUSE).await;
                continue;
            }
        };
        for (cluster, version) in due {
            let known = breakers.entry(cluster).or_default();
            if known.0 != version {
                *known = (version, Arc::default());
            }
            let breaker = Arc::clone(&known.1);
            if !running.contains(&cluster) && breaker.allowance(Instant::now()) != Allowance::Nothing {
                running.push(cluster);
                let lane = Lane {
                    reconciler: reconciler.clone(),
                    cluster,
                    breaker,
                    config,
                    stop: stop.clone(),
                    under_way: AtomicUsize::default(),
                    left: Mutex::default(),
                    gave_up: Mutex::default(),
                };
                tasks.spawn(async move {
                    // What goes wrong with one cluster is nothing to the others. Its targets are taken again when their leases are over.
                    if AssertUnwindSafe(lane.run()).catch_unwind().await.is_err() {
                        tracing::error!(cluster.id = %cluster, "the work on a cluster panicked; it begins again");
                    }
                    Some(cluster)
                });
            }
        }
    }
    // Lanes take nothing new by now.
    let ended = tokio::time::timeout(STOPPING, async { while tasks.join_next().await.is_some() {} }).await;
    if ended.is_err() {
        tracing::warn!(
            "targets were still worked on when the worker stopped; they are taken again when their leases are over"
        );
    }
}

async fn until_stopped(work: impl Future<Output = ()>, stop: CancellationToken) -> Option<Uuid> {
    stop.run_until_cancelled(work).await;
    None
}

/// One for each that waits: a wake that only one of them hears would be lost to the other.
#[derive(Default)]
struct WakeUps {
    lanes: Notify,
    comparisons: Notify,
}

impl WakeUps {
    fn wake(&self) {
        self.lanes.notify_one();
        self.comparisons.notify_one();
    }
}

fn report_deaf(error: &impl fmt::Display) {
    tracing::warn!(%error, "the worker hears of no changes and polls for them; it tries again");
}

/// Wakes the worker whenever somebody notifies.
async fn listen(reconciler: Reconciler, wakes: Arc<WakeUps>) {
    loop {
        match reconciler.listen().await {
            Ok(mut listener) => {
                // Nobody heard what came before.
                wakes.wake();
                loop {
                    match listener.next(LISTENING).await {
                        Ok(true) => wakes.wake(),
                        Ok(false) => {}
                        Err(error) => break report_deaf(&error),
                    }
                }
            }
            Err(error) => report_deaf(&error),
        }
        tokio::time::sleep(DATABASE_PAUSE).await;
    }
}

/// Compares namespaces with selectors. Each cluster has a task of its own, so that one that hangs holds up no other.
async fn compare(reconciler: Reconciler, wakes: Arc<WakeUps>, poll: Duration) {
    let mut comparisons: JoinSet<()> = JoinSet::new();
    loop {
        while comparisons.try_join_next().is_some() {}
        if comparisons.len() < COMPARISONS {
            match reconciler.claim_comparison().await {
                Ok(Some(claimed)) => {
                    let reconciler = reconciler.clone();
                    comparisons.spawn(async move { report(reconciler.compare(claimed).await) });
                    continue;
                }
                Ok(None) => {}
                Err(error) => report(Err(error)),
            }
        }
        // A wake that came during the look is kept.
        let _ = tokio::time::timeout(poll, wakes.comparisons.notified()).await;
    }
}

/// Watches the clusters that nobody else watches, and gives them back when it is told to stop.
async fn watch(reconciler: Reconciler, poll: Duration, stop: CancellationToken) {
    let mut watches: JoinSet<()> = JoinSet::new();
    while !stop.is_cancelled() {
        while watches.try_join_next().is_some() {}
        match reconciler.claim_watches().await {
            Ok(claimed) => {
                for one in claimed {
                    let (reconciler, stop) = (reconciler.clone(), stop.clone());
                    watches.spawn(async move {
                        if let Err(error) = reconciler.watch(one, stop.cancelled()).await {
                            tracing::info!(cluster.id = %one.cluster_id, %error, "a cluster is not watched for now");
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

/// Looks how all targets are doing.
async fn survey(reconciler: Reconciler) {
    loop {
        report(reconciler.survey().await);
        tokio::time::sleep(SURVEYS).await;
    }
}

/// Tells how pull secrets get on.
async fn announce(reconciler: Reconciler) {
    reconciler.announce().await;
}

/// The work on one cluster.
///
/// Three parts run beside each other. One claims targets, a few ahead of the calls. One calls the cluster, for so many targets at a
/// time as are allowed: no place of these is held while something is stored. One stores results, in groups. Between them are queues
/// with a bound, and no call begins before there is a place for its result: a Postgres that is slow slows the calls.
struct Lane {
    reconciler: Reconciler,
    cluster: Uuid,
    breaker: Arc<Breaker>,
    config: FanoutConfig,
    stop: CancellationToken,
    /// How many targets were claimed and not finished.
    under_way: AtomicUsize,
    /// What was claimed and not worked on.
    left: Mutex<Vec<Job>>,
    /// Why the cluster is left alone, where it is since this lane runs.
    gave_up: Mutex<Option<ServiceError>>,
}

/// A cluster that can be called, by its name.
type Called = (String, ClusterClient);

impl Lane {
    /// Works until nothing is due any more, or the cluster is to be left alone.
    async fn run(&self) {
        if self.breaker.allowance(Instant::now()) == Allowance::One && !self.probe().await {
            return;
        }
        let concurrency = self.config.concurrency;
        let (claimed, jobs) = mpsc::channel(concurrency.saturating_mul(CLAIMED_AHEAD));
        let (done, tries) = mpsc::channel(concurrency.saturating_add(GROUP));
        tokio::join!(self.claim_ahead(claimed), self.call(jobs, done), self.settle(tries));
        let left = std::mem::take(&mut *self.left.lock());
        insist(|| self.reconciler.release(&left, Duration::ZERO)).await;
        // Those that were left were in nobody's sight when it was said of the others.
        let gave_up = self.gave_up.lock().take();
        if let Some(error) = gave_up {
            report(self.reconciler.mark_waiting(self.cluster, &error).await);
        }
    }

    /// Tries one target, and nothing else meanwhile; whether the cluster is back.
    async fn probe(&self) -> bool {
        let Some((called, jobs)) = self.claim(1).await else { return false };
        for job in jobs {
            match self.work(&called, &job).await {
                Some(outcome) => {
                    let tried = [Try { job, outcome }];
                    insist(|| self.reconciler.settle(&called.0, &tried)).await;
                }
                None => insist(|| self.reconciler.release(std::slice::from_ref(&job), Duration::ZERO)).await,
            }
        }
        self.breaker.allowance(Instant::now()) == Allowance::All
    }

    fn leave(&self, job: Job) {
        self.left.lock().push(job);
    }

    fn may_go_on(&self) -> bool {
        !self.stop.is_cancelled() && self.breaker.allowance(Instant::now()) == Allowance::All
    }

    /// Claims until nothing is due any more and nothing is under way: a call that hangs keeps no target waiting that becomes due
    /// meanwhile. The next claim begins while there is still something to do.
    async fn claim_ahead(&self, claimed: mpsc::Sender<(Arc<Called>, Job)>) {
        let limit = i64::try_from(self.config.concurrency).unwrap_or(i64::MAX).saturating_mul(ROUNDS);
        while self.may_go_on() {
            let Some((called, jobs)) = self.claim(limit).await else {
                let again_at = Instant::now() + self.config.poll;
                while Instant::now() < again_at {
                    if self.under_way.load(Ordering::SeqCst) == 0 {
                        return;
                    }
                    tokio::time::sleep(LANE_LOOKS).await;
                }
                continue;
            };
            self.under_way.fetch_add(jobs.len(), Ordering::SeqCst);
            for job in jobs {
                if let Err(unsent) = claimed.send((Arc::clone(&called), job)).await {
                    self.leave(unsent.0.1);
                }
            }
        }
    }

    /// Works on what was claimed, so many targets at a time.
    async fn call(&self, jobs: mpsc::Receiver<(Arc<Called>, Job)>, done: mpsc::Sender<(Arc<Called>, Try)>) {
        let jobs = stream::unfold(jobs, |mut jobs| async move { jobs.recv().await.map(|job| (job, jobs)) });
        let done = &done;
        jobs.for_each_concurrent(self.config.concurrency, |(called, job)| async move {
            self.call_one(called, job, done).await;
            self.under_way.fetch_sub(1, Ordering::SeqCst);
        })
        .await;
    }

    async fn call_one(&self, called: Arc<Called>, job: Job, done: &mpsc::Sender<(Arc<Called>, Try)>) {
        // First, so that the wait for it counts as part of the lease.
        let Ok(place) = done.reserve().await else { return self.leave(job) };
        if !self.may_go_on() {
            return self.leave(job);
        }
        match self.work(&called, &job).await {
            Some(outcome) => place.send((called, Try { job, outcome })),
            None => self.leave(job),
        }
    }

    /// Stores results. A group is what came while the one before was stored, and a little more as long as some are under way: each
    /// costs a transaction.
    async fn settle(&self, mut tries: mpsc::Receiver<(Arc<Called>, Try)>) {
        let mut group = Vec::with_capacity(GROUP);
        while let Some((called, first)) = tries.recv().await {
            group.push(first);
            let until = Instant::now() + GATHERED;
            while group.len() < GROUP && (!tries.is_empty() || tries.capacity() < tries.max_capacity()) {
                match timeout_at(until, tries.recv()).await {
                    Ok(Some((_, next))) => group.push(next),
                    Ok(None) | Err(_) => break,
                }
            }
            // Postgres may be away for a moment. What cannot be stored is done again once the lease is over, and finds nothing
            // left to do.
            insist(|| self.reconciler.settle(&called.0, &group)).await;
            group.clear();
        }
    }

    /// The next targets, so many at most; none if there is nothing to do now.
    async fn claim(&self, limit: i64) -> Option<(Arc<Called>, Vec<Job>)> {
        let called = match self.reconciler.client(self.cluster).await {
            Ok(called) => Arc::new(called),
            Err(error @ ServiceError::Storage(_)) => {
                report(Err(error));
                return None;
            }
            Err(error) => {
                self.give_up(error, None, None).await;
                return None;
            }
        };
        match self.reconciler.claim(self.cluster, limit).await {
            Ok(jobs) if jobs.is_empty() => None,
            Ok(jobs) => Some((called, jobs)),
            Err(error) => {
                report(Err(error));
                None
            }
        }
    }

    /// Works on one target; nothing where there was no time for it.
    async fn work(&self, called: &Called, job: &Job) -> Option<Outcome> {
        let outcome = match self.reconciler.work(&called.1, job).await {
            Ok(outcome) => outcome?,
            // Postgres had no answer: somebody shall take it up without waiting for the lease to be over.
            Err(error) => {
                report(Err(error));
                return None;
            }
        };
        match &outcome.ill {
            Some(error) => self.give_up(ServiceError::Cluster(error.clone()), Some(job.place()), Some(error)).await,
            None if outcome.reached => self.breaker.succeeded(Instant::now()),
            None => {}
        }
        Some(outcome)
    }

    async fn give_up(&self, error: ServiceError, at: Option<Place>, ill: Option<&ClusterError>) {
        let asked = match ill {
            Some(ClusterError::Overloaded { retry_after }) => retry_after.or(Some(Duration::from_secs(1))),
            _ => None,
        };
        // A credential or a connection that is no good does not get better by itself.
        let is_certain = !matches!(
            ill,
            Some(ClusterError::Unreachable { .. } | ClusterError::Timeout { .. } | ClusterError::Overloaded { .. })
        );
        if self.breaker.failed(Instant::now(), at, is_certain, asked) {
            tracing::warn!(cluster.id = %self.cluster, %error, "a cluster is left alone for a while");
            report(self.reconciler.mark_waiting(self.cluster, &error).await);
            *self.gave_up.lock() = Some(error);
        }
    }
}

/// Stores something with a Postgres that may be away for a moment.
async fn insist<F: Future<Output = Result<(), ServiceError>>>(store: impl Fn() -> F) {
    for attempt in 1..=SETTLE_TRIES {
        match store().await {
            Ok(()) => return,
            Err(error) if attempt == SETTLE_TRIES => report(Err(error)),
            Err(_) => tokio::time::sleep(Duration::from_millis(100) * attempt).await,
        }
    }
}

fn report(result: Result<(), ServiceError>) {
    if let Err(error) = result {
        tracing::warn!(%error, "the worker could not do its work; it tries again");
    }
}
