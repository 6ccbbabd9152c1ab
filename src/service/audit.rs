//! The audit record: events of changes in the transaction of the change ([`Trail`]), all others in groups
//! ([`Recorder`](recorder::Recorder)), and how they are read and checked.
//!
//! Every process writes chains of its own: one for what is written in groups, and a few for changes. A change keeps its
//! chain from its event to its commit, and so never makes a reveal wait, and rarely another change.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use chrono::Utc;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    crypto::audit::AuditKey,
    domain::{
        audit::{Action, Chain, Event, EventFilter, Head, LinkedEvent, NewEvent, Opening, Resource},
        caller::Call,
    },
    service::{ServiceError, audit::recorder::Recorder},
    storage::{self, StorageError},
};

pub mod recorder;
pub mod refusals;
pub mod verify;

/// Events that are read at a time for an export.
const EXPORT_PAGE: i64 = 500;

/// Why an event was not written; what it is about was not done then.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// Postgres refused it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Somebody removed the chain of this process.
    #[error("the audit chain {0} is gone from the database")]
    ChainGone(Uuid),
    /// More events wait than are kept waiting.
    #[error("too many audit events wait to be written")]
    Full,
    /// It was not written in time, or could not be; the log says why.
    #[error("the audit event was not written")]
    NotWritten,
}

impl From<AuditError> for ServiceError {
    fn from(error: AuditError) -> Self {
        match error {
            // No word about the record: nothing works without Postgres.
            AuditError::Storage(unavailable @ StorageError::Unavailable(_)) => Self::Storage(unavailable),
            other => Self::Audit(other),
        }
    }
}

/// Writes the events of changes, each in the transaction of its change: neither is ever there without the other.
#[derive(Debug, Clone)]
pub struct Trail {
    key: Arc<AuditKey>,
    /// Taken in turn. Each is one row that one transaction at a time has: with one alone, Postgres could not make the
    /// commits of several changes durable together.
    chains: Arc<[Uuid]>,
    turn: Arc<AtomicUsize>,
}

impl Trail {
    /// Opens so many chains for this process.
    ///
    /// # Errors
    ///
    /// [`AuditError::Storage`] if they cannot be opened.
    pub async fn open(pool: &PgPool, key: Arc<AuditKey>, chains: usize) -> Result<Self, AuditError> {
        let mut tx = pool.begin().await.map_err(StorageError::from)?;
        let mut ids = Vec::with_capacity(chains);
        for _ in 0..chains.max(1) {
            ids.push(open_chain(&mut tx, &key, None).await?.opening.id);
        }
        tx.commit().await.map_err(StorageError::from)?;
        Ok(Self { key, chains: ids.into(), turn: Arc::default() })
    }

    fn next_chain(&self) -> Uuid {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.chains.get(turn % self.chains.len().max(1)).copied().unwrap_or_default()
    }

    /// Writes events in a transaction. Other changes of this process wait from here to its commit, so this is the last
    /// statement before that.
    ///
    /// # Errors
    ///
    /// [`AuditError`]; the transaction must not be committed then, and cannot be.
    pub async fn record(
        &self,
        conn: &mut PgConnection,
        events: impl IntoIterator<Item = NewEvent>,
    ) -> Result<(), AuditError> {
        let events: Vec<Event> = events.into_iter().map(stamp).collect();
        if events.is_empty() {
            return Ok(());
        }
        let chain_id = self.next_chain();
        let head = storage::audit::lock_head(&mut *conn, chain_id).await?;
        let before = head.ok_or(AuditError::ChainGone(chain_id))?;
        let mut head = before.clone();
        let linked: Vec<LinkedEvent> =
            events.into_iter().map(|event| self.key.link(chain_id, &mut head, event)).collect();
        let seal = self.key.seal(chain_id, &head);
        let is_added = storage::audit::append(conn, chain_id, before.sequence, &head, &seal, &linked).await?;
        if is_added { Ok(()) } else { Err(AuditError::ChainGone(chain_id)) }
    }

    /// Writes one event in a transaction of its own.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if it was not written.
    pub async fn record_alone(&self, pool: &PgPool, event: NewEvent) -> Result<(), AuditError> {
        let mut tx = pool.begin().await.map_err(StorageError::from)?;
        self.record(&mut tx, [event]).await?;
        Ok(tx.commit().await.map_err(StorageError::from)?)
    }
}

fn stamp(event: NewEvent) -> Event {
    event.stamp(Uuid::now_v7())
}

/// Opens a chain. Each opening is linked to the one before, so that a chain that is gone leaves a gap.
async fn open_chain(
    conn: &mut PgConnection,
    key: &AuditKey,
    continues: Option<(Uuid, i64)>,
) -> Result<Chain, AuditError> {
    let last = storage::audit::lock_last_chain(&mut *conn).await?;
    let (number, before) = last.map_or((0, Vec::new()), |last| (last.opening.number, last.opening_hash));
    let opening = Opening { id: Uuid::now_v7(), number: number + 1, opened_at: Utc::now(), continues };
    let opening_hash = key.open(&opening, &before);
    let head = Head { sequence: 0, hash: opening_hash.clone() };
    let seal = key.seal(opening.id, &head);
    let chain = Chain { opening, opening_hash, key_id: key.id().to_owned(), head, seal };
    storage::audit::insert_chain(conn, &chain).await?;
    Ok(chain)
}

/// The audit record, for callers. Who may read it reads all of it.
#[derive(Clone)]
pub struct AuditEvents {
    pool: PgPool,
    recorder: Recorder,
}

impl AuditEvents {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, recorder: Recorder) -> Self {
        Self { pool, recorder }
    }

    /// Lists events that `filter` lets through, the newest first: at most `limit` before the one with the id `before`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn list(
        &self,
        _caller: &Call,
        filter: &EventFilter,
        before: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<LinkedEvent>, ServiceError> {
        list(&self.pool, filter, before, limit).await
    }

    /// Begins to read all events that `filter` lets through. That somebody does so is an event too.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Audit`] if that event was not written.
    pub async fn export(&self, caller: &Call, filter: EventFilter) -> Result<Export, ServiceError> {
        let event = NewEvent::of(caller, Action::AuditExport, Resource::audit_events());
        self.recorder.record(event).await?;
        Ok(Export::new(self.pool.clone(), filter))
    }
}

async fn list(
    pool: &PgPool,
    filter: &EventFilter,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<LinkedEvent>, ServiceError> {
    let mut tx = pool.begin().await?;
    let found = storage::audit::list(&mut tx, filter, before, limit).await?;
    tx.commit().await?;
    Ok(found)
}

/// Events page by page, the newest first. Between two pages nothing is held, so a slow reader costs nothing.
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

    /// The next page; nothing after the last one.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn next(&mut self) -> Result<Option<Vec<LinkedEvent>>, ServiceError> {
        if self.is_over {
            return Ok(None);
        }
        let page = list(&self.pool, &self.filter, self.before, EXPORT_PAGE).await?;
        self.before = page.last().map(|last| last.event.id);
        self.is_over = i64::try_from(page.len()).unwrap_or_default() < EXPORT_PAGE;
        Ok(Some(page))
    }
}
