//! Reconciles the due targets of one cluster.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    breaker::{Allowance, Breaker, TargetKey},
    fanout::FanoutConfig,
    report,
};
use crate::{
    clients::cluster::ClusterClient,
    domain::reconcile::{ClusterHealth, ReconcileOutcome, TargetError},
    service::{
        ServiceError,
        reconcile::{Attempt, Job, Reconciler, target_error},
    },
};

/// Targets per claim, in multiples of the concurrency: few enough to finish well within a lease,
/// and enough to make claims cheap.
const CLAIM_ROUNDS: i64 = 4;
/// Capacity of the queue of claimed targets, in multiples of the concurrency. The next claim starts
/// when it has room.
const QUEUE_ROUNDS: usize = 2;
/// Maximum results per batch.
const BATCH_MAX: usize = 64;
/// Longest wait for further results of a batch while attempts are in flight.
const BATCH_WINDOW: Duration = Duration::from_millis(100);
/// Interval at which an idle lane checks whether its last attempts have ended.
const IDLE_INTERVAL: Duration = Duration::from_millis(100);
/// Database attempts to record a batch or release jobs.
const RECORD_ATTEMPTS: u32 = 5;

/// Reconciles the due targets of one cluster.
///
/// Three stages run concurrently, with bounded queues between them: claim, reconcile, record.
/// Recording a result does not occupy a slot of the reconcile stage. A call starts only if the
/// queue of results has room, so a slow Postgres slows the calls down.
pub(super) struct Lane {
    reconciler: Reconciler,
    cluster: Uuid,
    name: String,
    breaker: Arc<Breaker>,
    config: FanoutConfig,
    stop: CancellationToken,
    /// Claimed jobs that have not ended.
    in_flight: AtomicUsize,
    /// Claimed jobs to release.
    unstarted: Mutex<Vec<Job>>,
    /// Error that opened the breaker, if any.
    opened: Mutex<Option<TargetError>>,
}

/// Name of the cluster and a client for it.
type Connection = (String, ClusterClient);

impl Lane {
    pub(super) fn new(
        reconciler: Reconciler,
        (cluster, name): (Uuid, String),
        breaker: Arc<Breaker>,
        config: FanoutConfig,
        stop: CancellationToken,
    ) -> Self {
        Self {
            reconciler,
            cluster,
            name,
            breaker,
            config,
            stop,
            in_flight: AtomicUsize::default(),
            unstarted: Mutex::default(),
            opened: Mutex::default(),
        }
    }

    /// Runs until no target is due or the breaker opens.
    pub(super) async fn run(&self) {
        if self.breaker.allowance(Instant::now()) == Allowance::Probe && !self.probe().await {
            return;
        }
        let concurrency = self.config.concurrency;
        let (job_sender, jobs) = mpsc::channel(concurrency.saturating_mul(QUEUE_ROUNDS));
        let (attempt_sender, attempts) = mpsc::channel(concurrency.saturating_add(BATCH_MAX));
        tokio::join!(self.claim_jobs(job_sender), self.reconcile_jobs(jobs, attempt_sender), self.record(attempts));
        let unstarted = std::mem::take(&mut *self.unstarted.lock());
        retry(|| self.reconciler.release(&unstarted, Duration::ZERO)).await;
        // Also marks released jobs: they were under lease when the breaker opened.
        let opened = self.opened.lock().take();
        if let Some(error) = opened {
            report(self.reconciler.mark_unreachable(self.cluster, &error).await);
        }
    }

    /// Reconciles a single target. Returns whether the breaker closed.
    async fn probe(&self) -> bool {
        let Some((connection, jobs)) = self.claim(1).await else { return false };
        for job in jobs {
            match self.reconcile(&connection, &job).await {
                Some(outcome) => {
                    let attempts = [(job, outcome)];
                    retry(|| self.reconciler.record_results(&connection.0, &attempts)).await;
                }
                None => retry(|| self.reconciler.release(std::slice::from_ref(&job), Duration::ZERO)).await,
            }
        }
        self.breaker.allowance(Instant::now()) == Allowance::All
    }

    fn return_unstarted(&self, job: Job) {
        self.unstarted.lock().push(job);
    }

    fn may_continue(&self) -> bool {
        !self.stop.is_cancelled() && self.breaker.allowance(Instant::now()) == Allowance::All
    }

    /// Stage 1: claims until no target is due and none is in flight. Targets that become due while
    /// a call hangs are claimed as well.
    async fn claim_jobs(&self, jobs: mpsc::Sender<(Arc<Connection>, Job)>) {
        let limit = i64::try_from(self.config.concurrency).unwrap_or(i64::MAX).saturating_mul(CLAIM_ROUNDS);
        while self.may_continue() {
            let Some((connection, claimed)) = self.claim(limit).await else {
                let next_claim = Instant::now() + self.config.poll;
                while Instant::now() < next_claim {
                    if self.in_flight.load(Ordering::SeqCst) == 0 {
                        return;
                    }
                    tokio::time::sleep(IDLE_INTERVAL).await;
                }
                continue;
            };
            self.in_flight.fetch_add(claimed.len(), Ordering::SeqCst);
            for job in claimed {
                if let Err(unsent) = jobs.send((Arc::clone(&connection), job)).await {
                    self.return_unstarted(unsent.0.1);
                }
            }
        }
    }

    /// Stage 2: reconciles claimed targets concurrently.
    async fn reconcile_jobs(
        &self,
        jobs: mpsc::Receiver<(Arc<Connection>, Job)>,
        attempts: mpsc::Sender<(Arc<Connection>, Attempt)>,
    ) {
        let jobs = stream::unfold(jobs, |mut jobs| async move { jobs.recv().await.map(|job| (job, jobs)) });
        let attempts = &attempts;
        jobs.for_each_concurrent(self.config.concurrency, |(connection, job)| async move {
            self.reconcile_job(connection, job, attempts).await;
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
        })
        .await;
    }

    async fn reconcile_job(
        &self,
        connection: Arc<Connection>,
        job: Job,
        attempts: &mpsc::Sender<(Arc<Connection>, Attempt)>,
    ) {
        // Before the call: the wait for room counts against the lease.
        let Ok(slot) = attempts.reserve().await else { return self.return_unstarted(job) };
        if !self.may_continue() {
            return self.return_unstarted(job);
        }
        match self.reconcile(&connection, &job).await {
            Some(outcome) => slot.send((connection, (job, outcome))),
            None => self.return_unstarted(job),
        }
    }

    /// Stage 3: records results in batches. A batch is whatever arrived while the previous one was
    /// written, plus what arrives within [`BATCH_WINDOW`] while attempts are in flight.
    async fn record(&self, mut attempts: mpsc::Receiver<(Arc<Connection>, Attempt)>) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        while let Some((connection, first)) = attempts.recv().await {
            batch.push(first);
            let until = Instant::now() + BATCH_WINDOW;
            while batch.len() < BATCH_MAX && (!attempts.is_empty() || attempts.capacity() < attempts.max_capacity()) {
                match timeout_at(until, attempts.recv()).await {
                    Ok(Some((_, next))) => batch.push(next),
                    Ok(None) | Err(_) => break,
                }
            }
            // A batch that cannot be recorded is reconciled again when its leases expire, and is
            // unchanged then.
            retry(|| self.reconciler.record_results(&connection.0, &batch)).await;
            batch.clear();
        }
    }

    /// Claims up to `limit` targets. Returns `None` if none is due or the cluster has no usable
    /// connection.
    async fn claim(&self, limit: i64) -> Option<(Arc<Connection>, Vec<Job>)> {
        let connection = match self.reconciler.client(self.cluster).await {
            Ok(connection) => Arc::new(connection),
            Err(error @ ServiceError::Storage(_)) => {
                report(Err(error));
                return None;
            }
            Err(error) => {
                self.record_failure(target_error(&error), None, true, None).await;
                return None;
            }
        };
        match self.reconciler.claim(self.cluster, limit).await {
            Ok(jobs) if jobs.is_empty() => None,
            Ok(jobs) => Some((connection, jobs)),
            Err(error) => {
                report(Err(error));
                None
            }
        }
    }

    /// Reconciles one target and feeds the breaker. Returns `None` if the job is to be released.
    async fn reconcile(&self, connection: &Connection, job: &Job) -> Option<ReconcileOutcome> {
        let outcome = match self.reconciler.reconcile(&connection.1, job).await {
            Ok(outcome) => outcome?,
            Err(error) => {
                report(Err(error));
                return None;
            }
        };
        match outcome.cluster {
            ClusterHealth::Unavailable { is_permanent, retry_after } => {
                if let Some(error) = outcome.error.clone() {
                    self.record_failure(error, Some(job.key()), is_permanent, retry_after).await;
                }
            }
            ClusterHealth::Reachable => {
                if self.breaker.record_success(Instant::now()) {
                    tracing::info!(cluster = self.name, "cluster resumed");
                }
            }
            ClusterHealth::Unknown => {}
        }
        Some(outcome)
    }

    /// Records a failure of the cluster in the breaker. If that opens it, marks the waiting
    /// targets.
    async fn record_failure(
        &self,
        error: TargetError,
        target: Option<TargetKey>,
        is_permanent: bool,
        retry_after: Option<Duration>,
    ) {
        if self.breaker.record_failure(Instant::now(), target, is_permanent, retry_after) {
            let (reason, detail) = (error.error_type.as_str(), error.detail.as_str());
            tracing::warn!(cluster = self.name, reason, detail, "cluster suspended");
            report(self.reconciler.mark_unreachable(self.cluster, &error).await);
            *self.opened.lock() = Some(error);
        }
    }
}

/// Retries a database operation with linear backoff.
async fn retry<F: Future<Output = Result<(), ServiceError>>>(operation: impl Fn() -> F) {
    for attempt in 1..=RECORD_ATTEMPTS {
        match operation().await {
            Ok(()) => return,
            Err(error) if attempt == RECORD_ATTEMPTS => report(Err(error)),
            Err(_) => tokio::time::sleep(Duration::from_millis(100) * attempt).await,
        }
    }
}
