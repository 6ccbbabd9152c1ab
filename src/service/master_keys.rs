//! Master key rotation and usage, and the binding of sealed values to their destinations.

use uuid::Uuid;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        audit::{Action, Details, NewEvent, Outcome, Resource},
        caller::Actor,
        sealed::{SealForm, Sealed},
    },
    service::{ServiceError, audit::TransactionalAudit, connection},
    storage::{
        PgConnection, PgPool, Transaction,
        sealed::{self, Binding, KeyUse, SealedColumn, SealedRow},
    },
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

/// Returns the form in which this transaction seals. Must precede its other statements.
///
/// Asks the database until the process knows of the mark. Until the transaction ends, no other
/// process can mark the database, so a value that is sealed unbound is committed before the values
/// are bound.
///
/// # Errors
///
/// [`ServiceError::Storage`].
pub(super) async fn seal_form(conn: &mut PgConnection, sealer: &Sealer) -> Result<SealForm, ServiceError> {
    if !sealer.seals_bound() && sealed::lock_mark(conn).await? {
        sealer.set_seals_bound();
    }
    Ok(if sealer.seals_bound() { SealForm::Bound } else { SealForm::Unbound })
}

/// Prepares the sealer of a process: tests the ring, and follows the mark in the database unless
/// the configuration `requires_bound` values.
///
/// # Errors
///
/// As [`verify_ring`].
pub async fn start(pool: &PgPool, sealer: &Sealer, requires_bound: bool) -> Result<(), ServiceError> {
    verify_ring(pool, sealer).await?;
    if requires_bound {
        return require_bound(&mut connection(pool).await?, sealer).await;
    }
    follow_binding(pool, sealer).await
}

/// Follows the mark in the database: seals bound values once it is set, and refuses unbound ones
/// once all values have been bound for a while.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable.
pub async fn follow_binding(pool: &PgPool, sealer: &Sealer) -> Result<(), ServiceError> {
    if sealer.requires_bound() {
        return Ok(());
    }
    let mut conn = connection(pool).await?;
    match sealed::find_binding(&mut conn).await? {
        Binding::Unmarked => {}
        Binding::Marked | Binding::Complete => sealer.set_seals_bound(),
        Binding::Settled => require_bound(&mut conn, sealer).await?,
    }
    Ok(())
}

/// Refuses unbound values from now on, and logs how many there are.
async fn require_bound(conn: &mut PgConnection, sealer: &Sealer) -> Result<(), ServiceError> {
    sealer.require_bound();
    let values = sealed::count_unbound(conn).await?;
    if values == 0 {
        tracing::info!("unbound sealed values refused");
    } else {
        tracing::error!(values, "unbound sealed values refused");
    }
    Ok(())
}

/// Marks the database, so that every process seals bound values, binds all values, and notes that
/// all are bound. Values that do not open keep it from being complete.
///
/// Safe to interrupt and to repeat. Once it was complete, an unbound value is one that did not come
/// from regcred: it does not open, and so is not bound.
///
/// # Errors
///
/// As [`rotate`].
async fn bind(pool: &PgPool, sealer: &Sealer, progress: impl FnMut(&Rotation)) -> Result<Rotation, ServiceError> {
    let mut tx = pool.begin().await?;
    sealed::mark_bound(&mut tx).await?;
    tx.commit().await?;
    let rotation = rotate(pool, sealer, progress).await?;
    let mut conn = connection(pool).await?;
    if rotation.unreadable == 0 && sealed::count_unbound(&mut conn).await? == 0 {
        sealed::complete_binding(&mut conn).await?;
    }
    Ok(rotation)
}

/// Re-seals every value that was not sealed with the first key of the ring and in the form of the
/// database, in batches. While one is written, the next one is read and sealed.
///
/// Safe to interrupt and to repeat: each value is sealed in one way or the other, and both open.
/// Calls `progress` after each batch. A value that does not open is logged, counted and skipped.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable; committed batches remain.
async fn rotate(pool: &PgPool, sealer: &Sealer, mut progress: impl FnMut(&Rotation)) -> Result<Rotation, ServiceError> {
    let mut conn = connection(pool).await?;
    if sealed::find_binding(&mut conn).await? >= Binding::Complete {
        sealer.require_bound();
    }
    drop(conn);
    let mut rotation = Rotation::default();
    for column in SealedColumn::ALL {
        let mut next = Batch::seal(pool, sealer, column, Uuid::nil()).await?;
        while let Some(batch) = next {
            let following = Batch::seal(pool, sealer, column, batch.last);
            let write = async {
                let written = batch.write(column).await?;
                rotation.resealed += written.resealed;
                rotation.unreadable += written.unreadable;
                progress(&rotation);
                Ok(())
            };
            ((), next) = tokio::try_join!(write, following)?;
        }
    }
    Ok(rotation)
}

/// What [`rotate_audited`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotationKind {
    /// Re-seals values with the first key of the ring.
    Rotate,
    /// Also binds values to their destinations, from now on.
    Bind,
}

/// Rotates, with an audit event before it and another one with its result.
///
/// Safe to interrupt and to repeat. Calls `progress` after each batch.
///
/// # Errors
///
/// [`ServiceError::Audit`] if the first event cannot be recorded; nothing is re-sealed then.
pub async fn rotate_audited(
    pool: &PgPool,
    sealer: &Sealer,
    audit: &TransactionalAudit,
    actor: &Actor,
    kind: RotationKind,
    progress: impl FnMut(&Rotation),
) -> Result<Rotation, ServiceError> {
    let details = match kind {
        RotationKind::Rotate => Details::default(),
        RotationKind::Bind => Details::default().did("bind"),
    };
    let event = NewEvent::by(actor, Action::MasterKeyRotate, Resource::master_keys()).details(details.clone());
    audit.record_alone(pool, event.clone().outcome(Outcome::Attempt)).await?;
    let rotation = match kind {
        RotationKind::Rotate => rotate(pool, sealer, progress).await,
        RotationKind::Bind => bind(pool, sealer, progress).await,
    };
    let (outcome, count) = match &rotation {
        Ok(rotation) if rotation.unreadable == 0 => (Outcome::Success, rotation.resealed),
        Ok(rotation) => (Outcome::Failure, rotation.resealed),
        Err(_) => (Outcome::Failure, 0),
    };
    let recorded = audit.record_alone(pool, event.outcome(outcome).details(details.count(count))).await;
    let rotation = rotation?;
    recorded?;
    Ok(rotation)
}

/// Rows whose values are sealed again, locked until they are written.
struct Batch {
    tx: Transaction,
    last: Uuid,
    ids: Vec<Uuid>,
    values: Vec<Sealed>,
    unreadable: u64,
}

impl Batch {
    /// Locks the rows after `after` and seals their values. Returns `None` at the end.
    async fn seal(
        pool: &PgPool,
        sealer: &Sealer,
        column: SealedColumn,
        after: Uuid,
    ) -> Result<Option<Self>, ServiceError> {
        let mut tx = pool.begin().await?;
        let form = column.form(seal_form(&mut tx, sealer).await?);
        let key_id = form.stored_key_id(&sealer.sealing_key_id());
        let rows = sealed::lock_sealed_otherwise(&mut tx, column, &key_id, after, BATCH).await?;
        let Some(last) = rows.last().map(|row| row.id) else { return Ok(None) };
        let (ids, values) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
        let mut batch = Self { tx, last, ids, values, unreadable: 0 };
        for row in rows {
            let id = row.id;
            match reseal(sealer, form, row) {
                Ok(value) => {
                    batch.ids.push(id);
                    batch.values.push(value);
                }
                Err(error) => {
                    tracing::error!(%column, row.id = %id, %error, "sealed value not opened, row skipped");
                    batch.unreadable += 1;
                }
            }
        }
        Ok(Some(batch))
    }

    async fn write(mut self, column: SealedColumn) -> Result<Rotation, ServiceError> {
        sealed::replace(&mut self.tx, column, &self.ids, &self.values).await?;
        self.tx.commit().await?;
        Ok(Rotation { resealed: self.ids.len() as u64, unreadable: self.unreadable })
    }
}

fn reseal(sealer: &Sealer, form: SealForm, row: SealedRow) -> Result<Sealed, ServiceError> {
    let slot = row.slot?;
    let secret = sealer.open(&slot, &row.sealed)?;
    Ok(sealer.seal(form, &slot, &secret)?)
}

/// Returns the state of the binding, and the use of each master key and form by column.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable.
pub async fn status(pool: &PgPool) -> Result<(Binding, Vec<KeyUse>), ServiceError> {
    let mut conn = connection(pool).await?;
    Ok((sealed::find_binding(&mut conn).await?, sealed::key_uses(&mut conn).await?))
}

/// Opens a value of each master key in use, so that a process with the wrong ring does not start.
/// Also opens unbound values that requests refuse: they say nothing of the ring.
///
/// # Errors
///
/// [`ServiceError::Open`] for the first key that is missing or opens none of its values.
async fn verify_ring(pool: &PgPool, sealer: &Sealer) -> Result<(), ServiceError> {
    let (_, uses) = status(pool).await?;
    for KeyUse { samples, .. } in uses {
        let opened = samples.into_iter().map(|sample| {
            sealer.ring().open(&sample.slot?, &sample.sealed)?;
            Ok::<_, ServiceError>(())
        });
        opened.reduce(Result::or).unwrap_or(Ok(()))?;
    }
    Ok(())
}
