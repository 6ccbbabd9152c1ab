//! The audit record: events of changes in the transaction of the change ([`TransactionalAudit`]), all others in groups
//! ([`AuditWriter`](recorder::AuditWriter)), and how they are read and checked.
//!
//! Every process writes chains of its own: one for what is written in groups, and a few for changes. A change keeps its
//! chain from its event to its commit, and so never makes a reveal wait, and rarely another change. The process knows where it
//! left each of them; on one that it finds elsewhere it writes nothing more, and opens another that says how long that one was.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sqlx::{Connection, PgConnection, PgPool, Postgres, Transaction};
use tokio::{sync::Mutex, time::timeout};
use uuid::Uuid;

use crate::{
    crypto::audit::AuditKey,
    domain::{
        audit::{Action, Chain, Event, EventFilter, Head, LinkedEvent, NewEvent, Opening, Resource},
        caller::Call,
    },
    service::{
        ServiceError,
        audit::{
            kept::KeptChain,
            writer::{AuditMetrics, AuditWriter},
        },
    },
    storage::{self, StorageError, audit::LockedChain},
};

mod kept;
pub mod refusals;
pub mod verify;
pub mod writer;

/// Events that are read at a time for an export.
const EXPORT_PAGE: i64 = 500;
/// How long it may take to open a chain in place of another. The change waits in its transaction meanwhile, which
/// [`storage::pool::bounded`] gives 5 s.
const REPLACE: Duration = Duration::from_secs(4);
/// How many chains a change tries one after the other, where somebody changes each of them.
const CHAINS_TRIED: usize = 3;

/// Why an event was not written; what it is about was not done then.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// Postgres refused it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Somebody removes or changes the chains of this process faster than it opens others.
    #[error("the audit chain {0} is gone from the database, or was changed there")]
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
pub struct TransactionalAudit {
    pool: PgPool,
    key: Arc<AuditKey>,
    /// Taken in turn. Each is one row that one transaction at a time has: with one alone, Postgres could not make the
    /// commits of several changes durable together.
    chains: Arc<[KeptChain]>,
    turn: Arc<AtomicUsize>,
    metrics: Arc<AuditMetrics>,
    /// Had by whoever opens a chain in place of another.
    replacing: Arc<Mutex<()>>,
}

impl TransactionalAudit {
    /// Opens so many chains for this process.
    ///
    /// # Errors
    ///
    /// [`AuditError::Storage`] if they cannot be opened.
    pub async fn open(pool: &PgPool, key: Arc<AuditKey>, chains: usize) -> Result<Self, AuditError> {
        let mut tx = pool.begin().await.map_err(StorageError::from)?;
        let mut opened = Vec::with_capacity(chains);
        for _ in 0..chains.max(1) {
            opened.push(KeptChain::new(open_chain(&mut tx, &key, None).await?));
        }
        tx.commit().await.map_err(StorageError::from)?;
        Ok(Self {
            pool: pool.clone(),
            key,
            chains: opened.into(),
            turn: Arc::default(),
            metrics: Arc::default(),
            replacing: Arc::default(),
        })
    }

    /// Counts chains that are not as this process left them together with those of somebody else.
    #[must_use]
    pub fn counted_in(self, metrics: Arc<AuditMetrics>) -> Self {
        Self { metrics, ..self }
    }

    fn next_chain(&self) -> Option<&KeptChain> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.chains.get(turn % self.chains.len().max(1))
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
        let kept = self.next_chain().ok_or(AuditError::NotWritten)?;
        let locked = self.lock(&mut *conn, kept).await?;
        let (chain_id, before) = (locked.chain.opening.id, &locked.chain.head);
        let mut head = before.clone();
        let linked: Vec<LinkedEvent> =
            events.into_iter().map(|event| self.key.link(chain_id, &mut head, event)).collect();
        let seal = self.key.seal(chain_id, &head);
        kept.send(&locked, head.clone());
        let is_added = storage::audit::append(conn, chain_id, before.sequence, &head, &seal, &linked).await?;
        if is_added { Ok(()) } else { Err(AuditError::ChainGone(chain_id)) }
    }

    /// Keeps others from a chain that is where this process left it; where it is not, from one that goes on for it.
    async fn lock(&self, conn: &mut PgConnection, kept: &KeptChain) -> Result<LockedChain, AuditError> {
        for _ in 0..CHAINS_TRIED {
            let (chain_id, _) = kept.left_at();
            let locked = storage::audit::lock_chain(&mut *conn, chain_id).await?;
            let found = locked.as_ref().map(|locked| locked.chain.head.sequence);
            if let Some(locked) = locked
                && self.key.is_sealed(&locked.chain)
                && kept.is_where_left(&locked)
            {
                return Ok(locked);
            }
            self.replace(kept, chain_id, found).await?;
        }
        let (chain_id, _) = kept.left_at();
        Err(AuditError::ChainGone(chain_id))
    }

    /// Opens a chain in place of one that is not as this process left it.
    async fn replace(&self, kept: &KeptChain, broken: Uuid, found: Option<i64>) -> Result<(), AuditError> {
        let _alone = self.replacing.lock().await;
        let (chain_id, expected) = kept.left_at();
        if chain_id != broken {
            // Somebody else was faster.
            return Ok(());
        }
        log_break(chain_id, expected, found);
        self.metrics.count_break();
        let opening = timeout(REPLACE, self.open_beside((chain_id, expected))).await;
        kept.replace(opening.map_err(|_| AuditError::NotWritten)??);
        Ok(())
    }

    /// Opens a chain that goes on for another. It stays, whatever becomes of the change that needs it; and not on a connection of the
    /// pool, of which that one has one already: all of them could wait for one more.
    async fn open_beside(&self, continues: (Uuid, i64)) -> Result<Chain, AuditError> {
        let options = self.pool.connect_options();
        let mut conn = PgConnection::connect_with(&options).await.map_err(StorageError::from)?;
        let mut tx = conn.begin().await.map_err(StorageError::from)?;
        let chain = open_chain(&mut tx, &self.key, Some(continues)).await?;
        tx.commit().await.map_err(StorageError::from)?;
        Ok(chain)
    }

    /// Writes events in a transaction and commits it: the change and its events are durable together,
    /// or neither is.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if the events could not be written or the commit failed. After a connection that
    /// broke during the commit, the change may be durable all the same.
    pub async fn commit(
        &self,
        mut tx: Transaction<'_, Postgres>,
        events: impl IntoIterator<Item = NewEvent>,
    ) -> Result<(), AuditError> {
        self.record(&mut tx, events).await?;
        Ok(tx.commit().await.map_err(StorageError::from)?)
    }

    /// Writes one event in a transaction of its own.
    ///
    /// # Errors
    ///
    /// [`AuditError`] if it was not written.
    pub async fn record_alone(&self, pool: &PgPool, event: NewEvent) -> Result<(), AuditError> {
        let tx = pool.begin().await.map_err(StorageError::from)?;
        self.commit(tx, [event]).await
    }
}

fn log_break(chain_id: Uuid, expected: i64, found: Option<i64>) {
    tracing::error!(
        %chain_id, expected, found,
        "the audit chain is not as this process left it: somebody changed it, or the database lost what it had confirmed. Going \
         on with a new chain; run `regcred audit verify`"
    );
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
    let opening = Opening { id: Uuid::now_v7(), number: number + 1, opened_at: crate::clock::now(), continues };
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
    audit_writer: AuditWriter,
}

impl AuditEvents {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, audit_writer: AuditWriter) -> Self {
        Self { pool, audit_writer }
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
        self.audit_writer.record(event).await?;
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
