//! The audit log. A change writes its events in its own transaction ([`TransactionalAudit`]); all
//! other events are written in groups ([`AuditWriter`]). A sealer binds committed batches into one
//! chain of seals. docs/AUDIT.md has the guarantees.

use std::{cmp::Reverse, sync::Arc};

use uuid::Uuid;

use crate::{
    crypto::pepper::Peppers,
    domain::{
        audit::{Action, EventFilter, NewEvent, Resource, StoredEvent},
        caller::Call,
    },
    service::{
        ServiceError,
        audit::{
            metrics::AuditMetrics,
            process::{Process, WriteOutcome, outcome_of},
            sealer::Sealer,
            writer::AuditWriter,
        },
    },
    storage::{self, PgPool, StorageError, Transaction},
};

pub mod legacy;
pub mod metrics;
mod process;
pub mod prune;
pub(super) mod recorded;
pub mod refusals;
mod sealer;
pub mod verify;
pub mod writer;

/// Events that an export reads at a time.
const EXPORT_PAGE: i64 = 500;
/// API keys of one name whose events a filter finds, newest first.
const KEYS_OF_NAME_MAX: i64 = 20;

/// Why an event was not written. The action that it records was not performed.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// Postgres refused the event.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The database stored something else than was sent.
    #[error("the database altered the audit event; run `regcred audit verify`")]
    Altered,
    /// Batches have waited too long for a seal.
    #[error("audit events have not been sealed for a minute")]
    SealingStalled,
    /// The queue is full.
    #[error("too many audit events are waiting to be written")]
    Full,
    /// Postgres did not answer in time.
    #[error("the database did not answer in time")]
    TimedOut,
    /// The group of the event was not written; the log has the cause.
    #[error("the audit event was not written")]
    NotWritten,
}

impl From<AuditError> for ServiceError {
    fn from(error: AuditError) -> Self {
        match error {
            // Nothing works without Postgres: the audit log is not the problem.
            AuditError::Storage(unavailable @ StorageError::Unavailable(_)) => Self::Storage(unavailable),
            other => Self::Audit(other),
        }
    }
}

/// Writes the events of changes, each in the transaction of its change: neither exists without the
/// other.
#[derive(Debug, Clone)]
pub struct TransactionalAudit {
    pool: PgPool,
    process: Arc<Process>,
}

impl TransactionalAudit {
    /// Starts the numbering of this process. Writes nothing.
    #[must_use]
    pub fn open(pool: &PgPool, peppers: Arc<Peppers>) -> Self {
        let process = Arc::new(Process::new(peppers, Arc::default()));
        Self { pool: pool.clone(), process }
    }

    /// Returns the statistics of the process.
    #[must_use]
    pub fn metrics(&self) -> Arc<AuditMetrics> {
        Arc::clone(&self.process.metrics)
    }

    /// Writes events in a transaction and commits it. The transaction of a dry run is rolled back,
    /// and its events are dropped.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if the events could not be written or the commit failed. If the connection
    /// broke during the commit, change and events may be durable all the same.
    pub async fn commit(
        &self,
        mut tx: Transaction,
        events: impl IntoIterator<Item = NewEvent>,
    ) -> Result<(), AuditError> {
        let mut events = events.into_iter().peekable();
        if events.peek().is_none() {
            return Ok(tx.commit().await.map_err(StorageError::from)?);
        }
        self.process.metrics.check_sealing()?;
        if tx.is_dry() {
            return Ok(tx.commit().await.map_err(StorageError::from)?);
        }
        let write = self.process.prepare(events);
        if let Err(error) = write.insert(&mut tx).await {
            // Nothing was committed. Should this task be dropped now, the rollback follows.
            write.end(WriteOutcome::RolledBack);
            return Err(error);
        }
        let committed = tx.commit().await.map_err(StorageError::from);
        write.end(committed.as_ref().map_or_else(outcome_of, |()| WriteOutcome::Committed));
        Ok(committed?)
    }

    /// Checks that events can be written, for work whose result must not be lost.
    ///
    /// # Errors
    ///
    /// [`AuditError`] while changes are refused, because written events are not sealed.
    pub fn check(&self) -> Result<(), AuditError> {
        self.process.metrics.check_sealing()
    }

    /// Writes one event in a transaction of its own.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if the event was not written.
    pub async fn record_alone(&self, pool: &PgPool, event: NewEvent) -> Result<(), AuditError> {
        let tx = pool.begin().await.map_err(StorageError::from)?;
        self.commit(tx, [event]).await
    }

    /// Seals the events of a process without a sealer, such as a command, and closes its numbering.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if that was not possible. The events are durable, and another process seals
    /// them.
    pub async fn close(&self) -> Result<(), AuditError> {
        self.sealer().close().await
    }

    fn sealer(&self) -> Sealer {
        Sealer::new(Arc::clone(&self.process), self.pool.connect_options())
    }
}

/// Reads the audit log. A caller that may read it may read all of it.
#[derive(Clone)]
pub struct AuditEvents {
    pool: PgPool,
    audit_writer: AuditWriter,
}

impl AuditEvents {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, audit_writer: AuditWriter) -> Self {
        Self { pool, audit_writer }
    }

    /// Lists events that match `filter`, newest first: at most `limit` before the id `before`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres is unavailable.
    pub async fn list(
        &self,
        _caller: &Call,
        filter: &EventFilter,
        before: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<StoredEvent>, ServiceError> {
        list(&self.pool, filter, before, limit).await
    }

    /// Starts an export of all events that match `filter`. The export itself is recorded.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Audit`] if the export could not be recorded.
    pub async fn export(&self, caller: &Call, filter: EventFilter) -> Result<Export, ServiceError> {
        let event = NewEvent::of(caller, Action::AuditExport, Resource::audit_events());
        self.audit_writer.record(event).await?;
        Ok(Export::new(self.pool.clone(), filter))
    }
}

/// Lists events. Those of an API key name its id, so a filter by name looks up the ids of all keys
/// that have or had the name.
async fn list(
    pool: &PgPool,
    filter: &EventFilter,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<StoredEvent>, ServiceError> {
    let mut tx = pool.begin().await?;
    let key = filter.resource.as_ref().and_then(Resource::as_api_key);
    let ids = match key {
        Some(name) => storage::api_keys::list_ids(&mut tx, name, KEYS_OF_NAME_MAX).await?,
        None => Vec::new(),
    };
    let mut found = storage::audit::list(&mut tx, filter, before, limit).await?;
    for id in ids {
        let of_key = EventFilter { resource: Some(Resource::api_key(id)), ..filter.clone() };
        found.extend(storage::audit::list(&mut tx, &of_key, before, limit).await?);
    }
    tx.commit().await?;
    if key.is_some() {
        found.sort_unstable_by_key(|stored| Reverse(stored.event.id));
        found.dedup_by_key(|stored| stored.event.id);
        found.truncate(usize::try_from(limit).unwrap_or_default());
    }
    Ok(found)
}

/// Reads events page by page, newest first. Holds nothing between two pages, so a slow reader costs
/// nothing.
pub struct Export {
    pool: PgPool,
    filter: EventFilter,
    before: Option<Uuid>,
    is_over: bool,
}

impl Export {
    /// Starts with the newest event.
    #[must_use]
    pub fn new(pool: PgPool, filter: EventFilter) -> Self {
        Self { pool, filter, before: None, is_over: false }
    }

    /// Returns the next page, or `None` after the last one.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres is unavailable.
    pub async fn next(&mut self) -> Result<Option<Vec<StoredEvent>>, ServiceError> {
        if self.is_over {
            return Ok(None);
        }
        let page = list(&self.pool, &self.filter, self.before, EXPORT_PAGE).await?;
        self.before = page.last().map(|last| last.event.id);
        self.is_over = i64::try_from(page.len()).unwrap_or_default() < EXPORT_PAGE;
        Ok(Some(page))
    }
}
