//! Prunes the audit log: deletes old events, and keeps the seals, which prove what was there.
//!
//! A prune is declared before it deletes anything. The declaration is a seal with `pruned_through`
//! and, in the same seal, the event of the prune: who, when, and up to which seal. `verify` accepts
//! missing events up to there only. A command that dies in between is run again and deletes the
//! rest.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    crypto::pepper::Peppers,
    domain::{
        audit::{Action, Details, NewEvent, Resource, StoredEvent},
        caller::Actor,
    },
    service::{
        ServiceError,
        audit::{process::Process, sealer::Sealer},
        connection,
    },
    storage::{self, PgConnection, PgPool, audit::prune},
};

/// Seals that are read at a time.
const SEALS: i64 = 50;
/// Events that a transaction deletes, and that are read at a time.
const EVENTS: usize = 1_000;

/// What a prune would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Time before which the events were sealed.
    pub before: DateTime<Utc>,
    /// Last seal whose events are deleted; 0 for none.
    pub through: i64,
    /// Last seal that an earlier prune declared; 0 for none.
    pub declared: i64,
    /// Events that an earlier prune declared and did not delete.
    pub pending: i64,
    /// All events to delete, these included.
    pub events: i64,
}

impl Plan {
    /// Whether events are to be deleted that no earlier prune declared.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.through > self.declared && self.events > self.pending
    }
}

/// Whether the role of the pool may delete events.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable.
pub async fn may_prune(pool: &PgPool) -> Result<bool, ServiceError> {
    Ok(prune::may_prune(&mut connection(pool).await?).await?)
}

/// Plans the deletion of the events that were sealed before a time. The log must have been verified.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable.
pub async fn plan(pool: &PgPool, before: DateTime<Utc>) -> Result<Plan, ServiceError> {
    let mut conn = connection(pool).await?;
    let last = storage::audit::find_last_seal(&mut conn).await?;
    let declared = last.and_then(|last| last.pruned_through).unwrap_or_default();
    let through = prune::find_last_seal_before(&mut conn, before).await?.max(declared);
    let (_, pending) = prune::count_pruned(&mut conn, declared).await?;
    let (_, events) = prune::count_pruned(&mut conn, through).await?;
    Ok(Plan { before, through, declared, pending, events })
}

/// Passes the events that a plan deletes and no earlier prune declared to `take`, in the order of
/// the seals. Returns their number.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable; an error of `take`.
pub async fn export<E: From<ServiceError>>(
    pool: &PgPool,
    plan: &Plan,
    mut take: impl FnMut(StoredEvent) -> Result<(), E>,
) -> Result<i64, E> {
    let mut conn = connection(pool).await.map_err(ServiceError::from)?;
    let mut exported = 0;
    let mut after = plan.declared;
    while let Some((last, ids)) = next_ids(&mut conn, after, plan.through).await? {
        after = last;
        for ids in ids.chunks(EVENTS) {
            let mut events = storage::audit::find_events(&mut conn, ids).await.map_err(ServiceError::from)?;
            events.retain(|stored| stored.key_id.is_some() && stored.event.action != Action::AuditPrune.as_str());
            events.sort_by_key(|stored| stored.event.id);
            for event in events {
                exported += 1;
                take(event)?;
            }
        }
    }
    Ok(exported)
}

/// Declares a plan, if it is new, and deletes its events. Returns the number of deleted events.
///
/// # Errors
///
/// [`ServiceError::Audit`] if Postgres refuses the declaration. Nothing is deleted then.
pub async fn prune(pool: &PgPool, peppers: Arc<Peppers>, actor: &Actor, plan: &Plan) -> Result<u64, ServiceError> {
    if plan.is_new() {
        let details = Details::default()
            .prune(plan.before, plan.through)
            .count(u64::try_from(plan.events - plan.pending).unwrap_or_default());
        let event = NewEvent { details, ..NewEvent::by(actor, Action::AuditPrune, Resource::audit_events()) };
        let mut sealer = Sealer::new(Arc::new(Process::new(peppers, Arc::default())), pool.connect_options());
        let declared = sealer.declare_prune(plan.through, &event).await;
        if let Err(error) = sealer.close().await {
            tracing::warn!(%error, "audit numbering not closed");
        }
        declared?;
    }
    delete(pool, plan).await
}

async fn delete(pool: &PgPool, plan: &Plan) -> Result<u64, ServiceError> {
    let through = if plan.is_new() { plan.through } else { plan.declared };
    // Events of earlier prunes are gone, unless one was interrupted.
    let mut after = if plan.pending > 0 { 0 } else { plan.declared };
    let mut deleted = 0;
    let mut conn = connection(pool).await?;
    while let Some((last, ids)) = next_ids(&mut conn, after, through).await? {
        after = last;
        for ids in ids.chunks(EVENTS) {
            let mut tx = pool.begin().await?;
            deleted += prune::delete_events(&mut tx, ids).await?;
            tx.commit().await?;
        }
    }
    Ok(deleted)
}

/// Returns the ids of the events of some seals after a number, and the number of the last one.
async fn next_ids(conn: &mut PgConnection, after: i64, through: i64) -> Result<Option<(i64, Vec<Uuid>)>, ServiceError> {
    let mut seals = storage::audit::list_seals(conn, after, SEALS).await?;
    seals.retain(|seal| seal.head.number <= through);
    let Some(last) = seals.last().map(|seal| seal.head.number) else { return Ok(None) };
    Ok(Some((last, seals.into_iter().flat_map(|seal| seal.event_ids).collect())))
}
