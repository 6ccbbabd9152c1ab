//! Master key rotation and usage.

use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    crypto::sealer::{OpenError, Sealer},
    domain::{
        audit::{Action, Details, NewEvent, Outcome, Resource},
        caller::Actor,
    },
    service::{ServiceError, audit::TransactionalAudit, connection},
    storage::sealed::{self, KeyUse, SealedColumn},
};

/// Rows per transaction, which locks them for a few milliseconds.
const BATCH: i64 = 500;

/// Result of [`rotate`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// Number of values re-sealed with the first key of the ring.
    pub resealed: u64,
    /// Number of values skipped because they did not open.
    pub unreadable: u64,
}

/// Re-seals every value with the first key of the ring, in batches.
///
/// Safe to interrupt and to repeat: each value is sealed with one key or the other, and both open.
/// Calls `progress` after each batch. A value that does not open is logged, counted and skipped.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable; committed batches remain.
pub async fn rotate(
    pool: &PgPool,
    sealer: &Sealer,
    mut progress: impl FnMut(&Rotation),
) -> Result<Rotation, ServiceError> {
    let key_id = sealer.sealing_key_id();
    let mut rotation = Rotation::default();
    for column in SealedColumn::ALL {
        let mut after = Uuid::nil();
        while let Some(last) = reseal_batch(pool, sealer, column, &key_id, after, &mut rotation).await? {
            after = last;
            progress(&rotation);
        }
    }
    Ok(rotation)
}

/// Runs [`rotate`] with an audit event before it and another one with its result.
///
/// # Errors
///
/// [`ServiceError::Audit`] if the first event cannot be recorded; nothing is re-sealed then.
pub async fn rotate_audited(
    pool: &PgPool,
    sealer: &Sealer,
    audit: &TransactionalAudit,
    actor: &Actor,
    progress: impl FnMut(&Rotation),
) -> Result<Rotation, ServiceError> {
    let event = NewEvent::by(actor, Action::MasterKeyRotate, Resource::master_keys());
    audit.record_alone(pool, event.clone().outcome(Outcome::Attempt)).await?;
    let rotation = rotate(pool, sealer, progress).await;
    let (outcome, count) = match &rotation {
        Ok(rotation) if rotation.unreadable == 0 => (Outcome::Success, rotation.resealed),
        Ok(rotation) => (Outcome::Failure, rotation.resealed),
        Err(_) => (Outcome::Failure, 0),
    };
    let recorded = audit.record_alone(pool, event.outcome(outcome).details(Details::default().count(count))).await;
    let rotation = rotation?;
    recorded?;
    Ok(rotation)
}

/// Re-seals the next batch. Returns the id of its last row, or `None` at the end.
async fn reseal_batch(
    pool: &PgPool,
    sealer: &Sealer,
    column: SealedColumn,
    key_id: &str,
    after: Uuid,
    rotation: &mut Rotation,
) -> Result<Option<Uuid>, ServiceError> {
    let mut tx = pool.begin().await?;
    let rows = sealed::lock_sealed_by_other_keys(&mut tx, column, key_id, after, BATCH).await?;
    let mut ids = Vec::with_capacity(rows.len());
    let mut values = Vec::with_capacity(rows.len());
    for row in &rows {
        match sealer.open(column.slot(row.id), &row.sealed) {
            Ok(secret) => {
                ids.push(row.id);
                values.push(sealer.seal(column.slot(row.id), &secret)?.bytes);
            }
            Err(error) => {
                tracing::error!(%column, row.id = %row.id, %error, "sealed value not opened, row skipped");
                rotation.unreadable += 1;
            }
        }
    }
    sealed::replace(&mut tx, column, key_id, &ids, &values).await?;
    tx.commit().await?;
    rotation.resealed += ids.len() as u64;
    Ok(rows.last().map(|row| row.id))
}

/// Returns the use of each master key by column.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable.
pub async fn uses(pool: &PgPool) -> Result<Vec<KeyUse>, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(sealed::key_uses(&mut conn).await?)
}

/// Opens one value of each master key in use, so that a process with the wrong ring does not start.
///
/// # Errors
///
/// [`ServiceError::Open`] for the first key that is missing or does not open its value.
pub async fn verify_ring(pool: &PgPool, sealer: &Sealer) -> Result<(), ServiceError> {
    for in_use in uses(pool).await? {
        let opened = sealer.open(in_use.column.slot(in_use.sample.id), &in_use.sample.sealed);
        opened.map(drop).map_err(|error: OpenError| ServiceError::Open(error))?;
    }
    Ok(())
}
