//! Writes events in groups. A caller waits until its event is durable; meanwhile the next group
//! gathers. That costs latency and hardly any throughput.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sqlx::postgres::PgConnectOptions;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    domain::audit::{NewEvent, Outcome},
    service::audit::{
        AuditError, TransactionalAudit,
        metrics::AuditMetrics,
        process::{Process, Write, WriteOutcome, outcome_of},
        refusals::{Refusal, Refusals},
    },
    storage::{PgConnection, StorageError},
};

/// Most events that wait.
const QUEUE: usize = 10_000;
/// Most events in a group.
const GROUP: usize = 1_000;
/// Longest wait of a caller.
const WAIT: Duration = Duration::from_secs(5);
/// Longest time to write a group, attempts included.
const WRITE: Duration = Duration::from_secs(4);
/// Pause before the third and every later attempt.
const RETRY: Duration = Duration::from_millis(100);
/// Interval at which counted refusals are written.
const REFUSALS: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Entry {
    event: NewEvent,
    written: Option<oneshot::Sender<()>>,
}

impl Entry {
    /// Whether the waiter timed out. It did not perform the action, so the event is dropped.
    fn is_given_up(&self) -> bool {
        self.written.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    fn not_awaited(event: NewEvent) -> Self {
        Self { event, written: None }
    }
}

/// Queues events and reports when they are durable.
#[derive(Debug, Clone)]
pub struct AuditWriter {
    queue: mpsc::Sender<Entry>,
    refusals: Arc<Refusals>,
    metrics: Arc<AuditMetrics>,
}

impl AuditWriter {
    /// Writes the first batch of this process and seals what waits. The returned future runs the
    /// writer and the sealer until `stop`, and ends once queued events are written and sealed.
    ///
    /// # Errors
    ///
    /// [`AuditError::Storage`] if Postgres refuses batches or seals.
    pub async fn start(
        audit: &TransactionalAudit,
        stop: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + use<>), AuditError> {
        let mut sealer = audit.sealer();
        sealer.cycle().await?;
        let (queue, entries) = mpsc::channel(QUEUE);
        let audit_writer = Self { queue, refusals: Arc::default(), metrics: audit.metrics() };
        let options = audit.pool.connect_options();
        let writer = GroupWriter { process: Arc::clone(&audit.process), options, conn: None };
        let refusals = Arc::clone(&audit_writer.refusals);
        let run = async move {
            let written = CancellationToken::new();
            let writing = async {
                writer.run(entries, refusals, stop).await;
                written.cancel();
            };
            tokio::join!(writing, sealer.run(written.clone()));
        };
        Ok((audit_writer, run))
    }

    /// Returns the statistics of the process.
    #[must_use]
    pub fn metrics(&self) -> Arc<AuditMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Writes an event and waits until it is durable.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if it is not durable. The caller must not perform the action.
    pub async fn record(&self, event: NewEvent) -> Result<(), AuditError> {
        self.metrics.check_sealing()?;
        let (written, wait) = oneshot::channel();
        self.queue.try_send(Entry { event, written: Some(written) }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => AuditError::Full,
            mpsc::error::TrySendError::Closed(_) => AuditError::NotWritten,
        })?;
        match timeout(WAIT, wait).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(AuditError::NotWritten),
        }
    }

    /// Records that a sealed value did not open. The caller is told so even if the event cannot be
    /// written.
    pub async fn note_damage(&self, event: NewEvent) {
        let details = event.details.clone().reason("does-not-open");
        let event = event.details(details).outcome(Outcome::Failure);
        if let Err(error) = self.record(event).await {
            tracing::error!(%error, "damaged sealed value not recorded");
        }
    }

    /// Counts a refusal. Similar refusals are written together, within a minute.
    pub fn refuse(&self, refusal: Refusal) {
        self.refusals.count(refusal);
    }
}

/// Writes groups, one at a time.
struct GroupWriter {
    process: Arc<Process>,
    options: PgConnectOptions,
    /// Own connection: requests that exhaust the pool do not delay the events that other requests
    /// wait for.
    conn: Option<PgConnection>,
}

impl GroupWriter {
    async fn run(mut self, mut entries: mpsc::Receiver<Entry>, refusals: Arc<Refusals>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(REFUSALS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut group = Vec::with_capacity(GROUP);
        loop {
            let is_over = tokio::select! {
                received = entries.recv_many(&mut group, GROUP) => received == 0,
                _ = ticks.tick() => {
                    group.extend(refusals.take(std::time::Instant::now()).into_iter().map(Entry::not_awaited));
                    false
                }
                () = stop.cancelled(), if !entries.is_closed() => {
                    entries.close();
                    false
                }
            };
            if is_over {
                break;
            }
            self.write(&mut group).await;
        }
        group.extend(refusals.take_all().into_iter().map(Entry::not_awaited));
        self.write(&mut group).await;
    }

    /// Writes a group and notifies its waiters. Dropping the sender tells a waiter that its event
    /// was not written.
    async fn write(&mut self, entries: &mut Vec<Entry>) {
        entries.retain(|entry| !entry.is_given_up());
        if entries.is_empty() {
            return;
        }
        let count = entries.len() as u64;
        let (events, waiting): (Vec<NewEvent>, Vec<_>) =
            entries.drain(..).map(|entry| (entry.event, entry.written)).unzip();
        let write = self.process.prepare(events);
        let result = self.insert(&write).await;
        write.end(match &result {
            // An altered write was committed. Its number stays settled, so that what is missing is
            // found.
            Ok(()) | Err(AuditError::Altered) => WriteOutcome::Committed,
            Err(AuditError::Storage(error)) => outcome_of(error),
            Err(_) => WriteOutcome::Unknown,
        });
        let metrics = &self.process.metrics;
        match result {
            Ok(()) => {
                metrics.written.fetch_add(count, Ordering::Relaxed);
                metrics.groups.fetch_add(1, Ordering::Relaxed);
                for written in waiting.into_iter().flatten() {
                    // The waiter may have timed out.
                    let _ = written.send(());
                }
            }
            Err(error) => {
                metrics.failed.fetch_add(count, Ordering::Relaxed);
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(events = count, %error, cause, "audit events not written, their actions refused");
            }
        }
    }

    /// Repeats the insert while Postgres is unavailable. The ids stay the same, so an event is
    /// stored once.
    async fn insert(&mut self, write: &Write) -> Result<(), AuditError> {
        let deadline = Instant::now() + WRITE;
        let mut pause = Duration::ZERO;
        loop {
            let result = timeout_at(deadline, self.insert_once(write)).await.unwrap_or(Err(AuditError::TimedOut));
            let is_unavailable = matches!(result, Err(AuditError::Storage(StorageError::Unavailable(_))));
            if is_unavailable || matches!(result, Err(AuditError::TimedOut)) {
                self.conn = None;
            }
            if !is_unavailable || Instant::now() + pause >= deadline {
                return result;
            }
            // The first retry follows at once: an idle connection may be broken although Postgres
            // is available.
            tokio::time::sleep(pause).await;
            pause = RETRY;
        }
    }

    async fn insert_once(&mut self, write: &Write) -> Result<(), AuditError> {
        if self.conn.is_none() {
            self.conn = Some(PgConnection::connect_with(&self.options, WRITE).await.map_err(StorageError::from)?);
        }
        let conn = self.conn.as_mut().ok_or(AuditError::NotWritten)?;
        write.insert(conn).await
    }
}
