//! Events in groups: whoever waits for one to be durable waits for the group that is written next, and a group is what
//! came while the one before was being written. So this costs latency, and hardly any throughput.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::{Connection, PgConnection, PgPool, postgres::PgConnectOptions};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    crypto::audit::AuditKey,
    domain::audit::{Event, Head, LinkedEvent, NewEvent, Outcome},
    service::audit::{
        AuditError, log_break, open_chain,
        refusals::{Refusal, Refusals},
        stamp,
    },
    storage::{self, StorageError},
};

/// The most events that wait.
const QUEUE: usize = 10_000;
/// The most events that are written at a time.
const GROUP: usize = 1_000;
/// How long somebody waits for his event.
const WAIT: Duration = Duration::from_secs(5);
/// How long a group may take to be written, tries included.
const WRITE: Duration = Duration::from_secs(4);
/// How long until the second next try.
const RETRY: Duration = Duration::from_millis(100);
/// How often it is looked for what was refused.
const LOOK: Duration = Duration::from_secs(1);

/// What was counted, for the metrics.
#[derive(Debug, Default)]
pub struct AuditMetrics {
    written: AtomicU64,
    failed: AtomicU64,
    groups: AtomicU64,
    breaks: AtomicU64,
}

impl AuditMetrics {
    /// How many events were written in groups, and how many were not.
    pub fn events(&self) -> [(&'static str, u64); 2] {
        [("written", self.written.load(Ordering::Relaxed)), ("failed", self.failed.load(Ordering::Relaxed))]
    }

    /// How many groups were written.
    pub fn groups(&self) -> u64 {
        self.groups.load(Ordering::Relaxed)
    }

    /// How often a chain was not as this process had left it.
    pub fn breaks(&self) -> u64 {
        self.breaks.load(Ordering::Relaxed)
    }

    pub(super) fn count_break(&self) {
        self.breaks.fetch_add(1, Ordering::Relaxed);
    }
}

struct Entry {
    event: Event,
    written: Option<oneshot::Sender<()>>,
}

impl Entry {
    /// Nobody waits any more for what he was to be told before he does it: he did not do it.
    fn is_given_up(&self) -> bool {
        self.written.as_ref().is_some_and(oneshot::Sender::is_closed)
    }
}

/// Takes events, and says when they are durable.
#[derive(Debug, Clone)]
pub struct AuditWriter {
    queue: mpsc::Sender<Entry>,
    refusals: Arc<Refusals>,
    metrics: Arc<AuditMetrics>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").finish_non_exhaustive()
    }
}

impl AuditWriter {
    /// Opens a chain for this process. The returned future writes events until `stop`, then those that wait.
    ///
    /// # Errors
    ///
    /// [`AuditError::Storage`] if no chain can be opened.
    pub async fn start(
        pool: &PgPool,
        key: Arc<AuditKey>,
        stop: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + use<>), AuditError> {
        let options = (*pool.connect_options()).clone();
        let mut writer = Writer {
            options,
            key,
            conn: None,
            chain_id: Uuid::nil(),
            head: Head { sequence: 0, hash: Vec::new() },
            is_certain: true,
            perhaps: Vec::new(),
            group: 0,
            metrics: Arc::default(),
        };
        writer.open(None).await?;
        let (queue, entries) = mpsc::channel(QUEUE);
        let audit_writer = Self { queue, refusals: Arc::default(), metrics: Arc::clone(&writer.metrics) };
        let run = writer.run(entries, Arc::clone(&audit_writer.refusals), stop);
        Ok((audit_writer, run))
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> Arc<AuditMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Writes an event, and returns when it is durable.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if it is not; what it is about must not be done then.
    pub async fn record(&self, event: NewEvent) -> Result<(), AuditError> {
        let (written, wait) = oneshot::channel();
        let entry = Entry { event: stamp(event), written: Some(written) };
        self.queue.try_send(entry).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => AuditError::Full,
            mpsc::error::TrySendError::Closed(_) => AuditError::NotWritten,
        })?;
        match timeout(WAIT, wait).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(AuditError::NotWritten),
        }
    }

    /// Writes that something was not done because a sealed value did not open. That is answered as it is, written or not.
    pub async fn note_damage(&self, event: NewEvent) {
        let details = event.details.clone().reason("does-not-open");
        let event: NewEvent = event.details(details).outcome(Outcome::Failure);
        if let Err(error) = self.record(event).await {
            tracing::error!(%error, "that a sealed value did not open is not in the audit record");
        }
    }

    /// Counts something that was refused. It is written soon, together with others like it, and nobody waits for that.
    pub fn refuse(&self, refusal: Refusal) {
        self.refusals.count(refusal);
    }
}

/// Whether a group of events was added.
enum Added {
    Yes,
    /// The chain is not where it was thought to be.
    NotThere,
}

/// The only one that writes its chain, so that it knows where that is.
struct Writer {
    options: PgConnectOptions,
    key: Arc<AuditKey>,
    /// One of its own: requests that take all of the pool do not hold up the events that other requests wait for.
    conn: Option<PgConnection>,
    chain_id: Uuid,
    /// Where the chain was last seen for certain.
    head: Head,
    /// It is still there. After a failure it may be at one of `perhaps` instead: a group that was sent may have been
    /// written, or may yet be.
    is_certain: bool,
    perhaps: Vec<(u64, Head)>,
    /// The number of the group that is being written.
    group: u64,
    metrics: Arc<AuditMetrics>,
}

impl Writer {
    async fn run(mut self, mut entries: mpsc::Receiver<Entry>, refusals: Arc<Refusals>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut group = Vec::with_capacity(GROUP);
        loop {
            let is_over = tokio::select! {
                received = entries.recv_many(&mut group, GROUP) => received == 0,
                _ = ticks.tick() => {
                    group.extend(refusals.take(std::time::Instant::now()).into_iter().map(not_waited_for));
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
        group.extend(refusals.take_all().into_iter().map(not_waited_for));
        self.write(&mut group).await;
    }

    /// Writes a group and tells those who wait. Those whose event was not written are told by being forgotten.
    async fn write(&mut self, entries: &mut Vec<Entry>) {
        entries.retain(|entry| !entry.is_given_up());
        if entries.is_empty() {
            return;
        }
        let count = entries.len() as u64;
        let (events, waiting): (Vec<Event>, Vec<_>) =
            entries.drain(..).map(|entry| (entry.event, entry.written)).unzip();
        match self.write_events(&events).await {
            Ok(()) => {
                self.metrics.written.fetch_add(count, Ordering::Relaxed);
                self.metrics.groups.fetch_add(1, Ordering::Relaxed);
                // Who gave up meanwhile does not hear it.
                for written in waiting.into_iter().flatten() {
                    let _ = written.send(());
                }
            }
            Err(error) => {
                self.metrics.failed.fetch_add(count, Ordering::Relaxed);
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(events = count, %error, cause, "audit events were not written; what they are about is refused");
            }
        }
    }

    async fn write_events(&mut self, events: &[Event]) -> Result<(), AuditError> {
        self.group += 1;
        let deadline = Instant::now() + WRITE;
        let mut wait = Duration::ZERO;
        loop {
            let error = match timeout_at(deadline, self.try_to_write(events)).await {
                Ok(Ok(Added::Yes)) => return Ok(()),
                Ok(Ok(Added::NotThere)) => {
                    self.is_certain = false;
                    continue;
                }
                Ok(Err(error)) => error,
                Err(_) => AuditError::NotWritten,
            };
            self.is_certain = false;
            let AuditError::Storage(StorageError::Unavailable(_)) = error else {
                if matches!(error, AuditError::NotWritten) {
                    // It is in the middle of something.
                    self.conn = None;
                }
                return Err(error);
            };
            self.conn = None;
            if Instant::now() + wait >= deadline {
                return Err(error);
            }
            // Once at once: a connection that nobody used for long may be broken though Postgres is well.
            tokio::time::sleep(wait).await;
            wait = RETRY;
        }
    }

    async fn try_to_write(&mut self, events: &[Event]) -> Result<Added, AuditError> {
        if !self.is_certain && self.find_out().await? {
            return Ok(Added::Yes);
        }
        let mut head = self.head.clone();
        let linked: Vec<LinkedEvent> =
            events.iter().map(|event| self.key.link(self.chain_id, &mut head, event.clone())).collect();
        let seal = self.key.seal(self.chain_id, &head);
        let (chain_id, sequence) = (self.chain_id, self.head.sequence);
        self.connected().await?;
        // Before it is sent: nothing after that may come to its end.
        self.perhaps.push((self.group, head.clone()));
        let conn = self.connected().await?;
        match storage::audit::append(conn, chain_id, sequence, &head, &seal, &linked).await {
            Ok(true) => {
                self.settle(head);
                Ok(Added::Yes)
            }
            Ok(false) => Ok(Added::NotThere),
            Err(error) => {
                // What Postgres itself refused was not written.
                if matches!(error, StorageError::Sql(_)) {
                    self.perhaps.pop();
                }
                Err(error.into())
            }
        }
    }

    /// The chain is there. What was sent before and is not part of it cannot come to be: it begins somewhere else.
    fn settle(&mut self, head: Head) {
        self.head = head;
        self.perhaps.clear();
        self.is_certain = true;
    }

    /// Finds out where the chain is, and whether the group that is being written is part of it already.
    async fn find_out(&mut self) -> Result<bool, AuditError> {
        let chain_id = self.chain_id;
        let conn = self.connected().await?;
        let found = storage::audit::find_head(conn, chain_id).await?;
        if found.as_ref() == Some(&self.head) {
            self.is_certain = true;
            return Ok(false);
        }
        let written = self.perhaps.iter().find(|(_, head)| found.as_ref() == Some(head)).cloned();
        if let Some((group, head)) = written {
            let is_this = group == self.group;
            self.settle(head);
            return Ok(is_this);
        }
        log_break(chain_id, self.head.sequence, found.map(|head| head.sequence));
        self.metrics.count_break();
        self.open(Some((chain_id, self.head.sequence))).await?;
        Ok(false)
    }

    async fn open(&mut self, continues: Option<(Uuid, i64)>) -> Result<(), AuditError> {
        let key = Arc::clone(&self.key);
        let mut tx = self.connected().await?.begin().await.map_err(StorageError::from)?;
        let chain = open_chain(&mut tx, &key, continues).await?;
        tx.commit().await.map_err(StorageError::from)?;
        self.chain_id = chain.opening.id;
        self.settle(chain.head);
        Ok(())
    }

    async fn connected(&mut self) -> Result<&mut PgConnection, StorageError> {
        if self.conn.is_none() {
            self.conn = Some(PgConnection::connect_with(&self.options).await?);
        }
        self.conn.as_mut().ok_or(StorageError::Unavailable(sqlx::Error::PoolClosed))
    }
}

fn not_waited_for(event: NewEvent) -> Entry {
    Entry { event: stamp(event), written: None }
}
