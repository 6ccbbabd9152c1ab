//! Master keys: re-sealing under a new one while the service runs, and what is sealed under which.

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

/// Rows re-sealed in one transaction: their rows are locked for a few milliseconds.
const BATCH: i64 = 500;

/// What [`rotate`] did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// Values that are now under the first key of the ring.
    pub resealed: u64,
    /// Values that did not open and were left as they are.
    pub unreadable: u64,
}

/// Re-seals every value under the first key of the ring, in batches. It can be interrupted and run again at any
/// time: every value is under one key or the other, and both open.
///
/// `progress` is called after each batch. A value that does not open is left as it is, logged, and counted.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres cannot be asked; what was committed stays.
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

/// As [`rotate`], on record before it begins, and again with how it went.
///
/// # Errors
///
/// [`ServiceError::Audit`] if it cannot be recorded; nothing is re-sealed then.
pub async fn rotate_on_record(
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

/// Re-seals the next batch; the id of its last row, or `None` after the end.
async fn reseal_batch(
    pool: &PgPool,
    sealer: &Sealer,
    column: SealedColumn,
    key_id: &str,
    after: Uuid,
    rotation: &mut Rotation,
) -> Result<Option<Uuid>, ServiceError> {
    let mut tx = pool.begin().await?;
    let rows = sealed::lock_sealed_by_others(&mut tx, column, key_id, after, BATCH).await?;
    let mut ids = Vec::with_capacity(rows.len());
    let mut values = Vec::with_capacity(rows.len());
    for row in &rows {
        match sealer.open(column.slot(row.id), &row.sealed) {
            Ok(secret) => {
                ids.push(row.id);
                values.push(sealer.seal(column.slot(row.id), &secret)?.bytes);
            }
            Err(error) => {
                tracing::error!(%column, row.id = %row.id, %error, "a sealed value does not open and was left as it is");
                rotation.unreadable += 1;
            }
        }
    }
    sealed::replace(&mut tx, column, key_id, &ids, &values).await?;
    tx.commit().await?;
    rotation.resealed += ids.len() as u64;
    Ok(rows.last().map(|row| row.id))
}

/// Which master keys are in use, and where.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres cannot be asked.
pub async fn uses(pool: &PgPool) -> Result<Vec<KeyUse>, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(sealed::key_uses(&mut conn).await?)
}

/// Tries each master key in use on one value, so that a service with the wrong ring does not start.
///
/// # Errors
///
/// [`ServiceError::Open`] for the first key that is missing or does not open its sample.
pub async fn try_ring(pool: &PgPool, sealer: &Sealer) -> Result<(), ServiceError> {
    for in_use in uses(pool).await? {
        let opened = sealer.open(in_use.column.slot(in_use.sample.id), &in_use.sample.sealed);
        opened.map(drop).map_err(|error: OpenError| ServiceError::Open(error))?;
    }
    Ok(())
}
