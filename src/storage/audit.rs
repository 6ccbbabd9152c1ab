//! The audit log: events and seals are insert-only, batches wait in `audit_unsealed` until a sealer
//! takes them.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    domain::audit::{
        Action, Event, EventFilter, Outcome, StoredEvent, first_id_at,
        seal::{Batch, BatchEntry, Seal, SealHead},
    },
    storage::{PgConnection, PgPool, StorageError, Transaction},
};

pub mod legacy;
pub mod prune;

struct EventRow {
    chain_id: Uuid,
    sequence: i64,
    id: Uuid,
    at: DateTime<Utc>,
    actor_type: String,
    actor_id: Option<Uuid>,
    actor_name: Option<String>,
    action: String,
    resource: Option<String>,
    related: Option<Vec<String>>,
    outcome: String,
    request_id: Option<Uuid>,
    source_ip: Option<String>,
    details: String,
    previous_hash: Vec<u8>,
    hash: Vec<u8>,
    key_id: Option<String>,
}

impl From<EventRow> for StoredEvent {
    fn from(row: EventRow) -> Self {
        Self {
            event: Event {
                id: row.id,
                at: row.at,
                actor_type: row.actor_type,
                actor_id: row.actor_id,
                actor_name: row.actor_name,
                action: row.action,
                resource: row.resource,
                related: row.related.unwrap_or_default(),
                outcome: row.outcome,
                request_id: row.request_id,
                source_ip: row.source_ip,
                details: row.details,
            },
            key_id: row.key_id,
            chain_id: row.chain_id,
            sequence: row.sequence,
            previous_hash: row.previous_hash,
            hash: row.hash,
        }
    }
}

impl StoredEvent {
    /// Joins the related resources, which have no spaces.
    fn related_text(&self) -> Option<String> {
        Some(&self.event.related).filter(|related| !related.is_empty()).map(|related| related.join(" "))
    }
}

struct BatchRow {
    id: Uuid,
    key_id: String,
    process_id: Uuid,
    sequence: i64,
    settled_through: i64,
    event_ids: Vec<Uuid>,
    hashes: Vec<Vec<u8>>,
    mac: Vec<u8>,
}

impl From<BatchRow> for Batch {
    fn from(row: BatchRow) -> Self {
        let events = i32::try_from(row.event_ids.len()).unwrap_or(i32::MAX);
        let (process_id, sequence, settled_through) = (row.process_id, row.sequence, row.settled_through);
        Self {
            id: row.id,
            key_id: row.key_id,
            entry: BatchEntry { process_id, sequence, settled_through, events },
            event_ids: row.event_ids,
            hashes: row.hashes,
            mac: row.mac,
        }
    }
}

struct SealRow {
    number: i64,
    sealed_at: DateTime<Utc>,
    key_id: String,
    process_ids: Vec<Uuid>,
    sequences: Vec<i64>,
    settled_through: Vec<i64>,
    event_counts: Vec<i32>,
    event_ids: Vec<Uuid>,
    events: i64,
    digest: Vec<u8>,
    previous_hash: Vec<u8>,
    seen_number: Option<i64>,
    seen_hash: Option<Vec<u8>>,
    pruned_through: Option<i64>,
    hash: Vec<u8>,
}

/// Arrays of different lengths, which no seal has, lose entries here. The HMAC of the seal is wrong
/// then.
fn entries(process_ids: &[Uuid], sequences: &[i64], settled: &[i64], counts: &[i32]) -> Vec<BatchEntry> {
    let numbers = sequences.iter().zip(settled).zip(counts);
    let entries = process_ids.iter().zip(numbers).map(|(&process_id, ((&sequence, &settled_through), &events))| {
        BatchEntry { process_id, sequence, settled_through, events }
    });
    entries.collect()
}

impl From<SealRow> for Seal {
    fn from(row: SealRow) -> Self {
        let seen = row.seen_number.zip(row.seen_hash).map(|(number, hash)| SealHead { number, hash });
        Self {
            head: SealHead { number: row.number, hash: row.hash },
            sealed_at: row.sealed_at,
            key_id: row.key_id,
            batches: entries(&row.process_ids, &row.sequences, &row.settled_through, &row.event_counts),
            event_ids: row.event_ids,
            events: row.events,
            digest: row.digest,
            previous_hash: row.previous_hash,
            seen,
            pruned_through: row.pruned_through,
        }
    }
}

/// What [`insert_batch`] inserted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inserted {
    /// Number of events.
    pub events: i64,
    /// Number of batches.
    pub batches: i64,
}

/// Inserts events and their batch in one statement. Inserts nothing if the events are stored
/// already, so that a write whose outcome is unknown can be repeated, even after its batch was
/// sealed.
#[tracing::instrument(level = "debug", name = "db.audit_events.insert", skip_all, fields(events = events.len()))]
pub async fn insert_batch(
    conn: &mut PgConnection,
    batch: &Batch,
    events: &[StoredEvent],
) -> Result<Inserted, StorageError> {
    macro_rules! column {
        ($($field:tt)+) => {
            events.iter().map(|stored| stored.$($field)+).collect::<Vec<_>>()
        };
    }
    let inserted = sqlx::query_as!(
        Inserted,
        r#"WITH events AS (
               INSERT INTO audit_events
                   (chain_id, sequence, previous_hash, hash, key_id, id, at, actor_type, actor_id, actor_name, action,
                    resource, related, outcome, request_id, source_ip, details)
               SELECT $3, new.sequence, '', new.hash, $2, new.id, new.at, new.actor_type, new.actor_id,
                   new.actor_name, new.action, new.resource,
                   -- No resource has a space in it.
                   string_to_array(new.related, ' '), new.outcome, new.request_id, new.source_ip, new.details::json
               FROM unnest($7::bytea[], $8::bigint[], $9::uuid[], $10::timestamptz[], $11::text[], $12::uuid[],
                   $13::text[], $14::text[], $15::text[], $16::text[], $17::text[], $18::uuid[], $19::text[],
                   $20::text[])
                   AS new (hash, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related,
                       outcome, request_id, source_ip, details)
               ON CONFLICT (id) DO NOTHING
               RETURNING id
           ), batch AS (
               INSERT INTO audit_unsealed
                   (id, key_id, process_id, sequence, settled_through, event_ids, hashes, mac)
               SELECT $1, $2, $3, $4, $5, $9, $7, $6
               WHERE cardinality($9) = 0 OR EXISTS (SELECT FROM events)
               RETURNING id
           )
           SELECT (SELECT count(*) FROM events) AS "events!", (SELECT count(*) FROM batch) AS "batches!""#,
        batch.id,
        batch.key_id,
        batch.entry.process_id,
        batch.entry.sequence,
        batch.entry.settled_through,
        batch.mac,
        &column!(hash.as_slice()) as &[&[u8]],
        &column!(sequence),
        &column!(event.id),
        &column!(event.at),
        &column!(event.actor_type.as_str()) as &[&str],
        &column!(event.actor_id) as &[Option<Uuid>],
        &column!(event.actor_name.as_deref()) as &[Option<&str>],
        &column!(event.action.as_str()) as &[&str],
        &column!(event.resource.as_deref()) as &[Option<&str>],
        &column!(related_text()) as &[Option<String>],
        &column!(event.outcome.as_str()) as &[&str],
        &column!(event.request_id) as &[Option<Uuid>],
        &column!(event.source_ip.as_deref()) as &[Option<&str>],
        &column!(event.details.as_str()) as &[&str],
    );
    Ok(inserted.fetch_one(conn).await?)
}

/// Inserts a batch of events that are stored already.
#[tracing::instrument(level = "debug", name = "db.audit_unsealed.insert", skip_all)]
pub async fn insert_batch_alone(conn: &mut PgConnection, batch: &Batch) -> Result<(), StorageError> {
    sqlx::query!(
        "INSERT INTO audit_unsealed (id, key_id, process_id, sequence, settled_through, event_ids, hashes, mac)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        batch.id,
        batch.key_id,
        batch.entry.process_id,
        batch.entry.sequence,
        batch.entry.settled_through,
        &batch.event_ids,
        &batch.hashes,
        batch.mac,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Counts the events with these ids.
#[tracing::instrument(level = "debug", name = "db.audit_events.count", skip_all)]
pub async fn count_events(conn: &mut PgConnection, ids: &[Uuid]) -> Result<usize, StorageError> {
    let count = sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM audit_events WHERE id = ANY ($1)"#, ids);
    Ok(usize::try_from(count.fetch_one(conn).await?).unwrap_or_default())
}

/// Tries to take the lock of sealers until the end of the transaction. Returns whether it was free.
#[tracing::instrument(level = "debug", name = "db.audit_seals.try_lock", skip_all)]
pub async fn try_lock_sealing(conn: &mut PgConnection) -> Result<bool, StorageError> {
    // An arbitrary number. No other lock of regcred or of sqlx's migrations uses it.
    let is_free = sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock(20261129000002) AS "is_free!""#);
    Ok(is_free.fetch_one(conn).await?)
}

/// Last seal, as far as the next one depends on it.
#[derive(Debug)]
pub struct LastSeal {
    /// Number and hash.
    pub head: SealHead,
    /// Number of events in all seals.
    pub events: i64,
    /// Events of the seals up to this number may be gone.
    pub pruned_through: Option<i64>,
}

/// Finds the last seal.
#[tracing::instrument(level = "debug", name = "db.audit_seals.find_last", skip_all)]
pub async fn find_last_seal(conn: &mut PgConnection) -> Result<Option<LastSeal>, StorageError> {
    let row = sqlx::query!("SELECT number, hash, events, pruned_through FROM audit_seals ORDER BY number DESC LIMIT 1")
        .fetch_optional(conn)
        .await?;
    Ok(row.map(|row| LastSeal {
        head: SealHead { number: row.number, hash: row.hash },
        events: row.events,
        pruned_through: row.pruned_through,
    }))
}

/// Lists heads and batches of seals from `number` on, at most `limit`.
#[tracing::instrument(level = "debug", name = "db.audit_seals.list_heads", skip_all)]
pub async fn list_seal_heads(
    conn: &mut PgConnection,
    number: i64,
    limit: i64,
) -> Result<Vec<(SealHead, Vec<BatchEntry>)>, StorageError> {
    let rows = sqlx::query!(
        "SELECT number, hash, process_ids, sequences, settled_through, event_counts
         FROM audit_seals WHERE number >= $1 ORDER BY number LIMIT $2",
        number,
        limit,
    )
    .fetch_all(conn)
    .await?;
    let seals = rows.into_iter().map(|row| {
        let entries = entries(&row.process_ids, &row.sequences, &row.settled_through, &row.event_counts);
        (SealHead { number: row.number, hash: row.hash }, entries)
    });
    Ok(seals.collect())
}

/// Removes at most `limit` batches with ids from `from` on, signed with one of `keys`. Skips locked
/// batches.
#[tracing::instrument(level = "debug", name = "db.audit_unsealed.take", skip_all)]
pub async fn take_batches(
    conn: &mut PgConnection,
    keys: &[String],
    from: Uuid,
    limit: i64,
) -> Result<Vec<Batch>, StorageError> {
    let rows = sqlx::query_as!(
        BatchRow,
        "DELETE FROM audit_unsealed WHERE id = ANY (ARRAY(
             SELECT id FROM audit_unsealed WHERE key_id = ANY ($1) AND id >= $2
             ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED
         ))
         RETURNING id, key_id, process_id, sequence, settled_through, event_ids, hashes, mac",
        keys,
        from,
        limit,
    );
    let mut batches: Vec<Batch> = rows.fetch_all(conn).await?.into_iter().map(Batch::from).collect();
    batches.sort_by_key(|batch| batch.id);
    Ok(batches)
}

/// Inserts a seal. Returns whether its number was free.
#[tracing::instrument(level = "debug", name = "db.audit_seals.insert", skip_all)]
pub async fn insert_seal(conn: &mut PgConnection, seal: &Seal) -> Result<bool, StorageError> {
    macro_rules! column {
        ($field:ident) => {
            seal.batches.iter().map(|entry| entry.$field).collect::<Vec<_>>()
        };
    }
    let (seen_number, seen_hash) = seal.seen.as_ref().map(|seen| (seen.number, seen.hash.as_slice())).unzip();
    let inserted = sqlx::query!(
        "INSERT INTO audit_seals
             (number, sealed_at, key_id, process_ids, sequences, settled_through, event_counts, event_ids, events,
              digest, previous_hash, seen_number, seen_hash, pruned_through, hash)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
         ON CONFLICT (number) DO NOTHING",
        seal.head.number,
        seal.sealed_at,
        seal.key_id,
        &column!(process_id),
        &column!(sequence),
        &column!(settled_through),
        &column!(events),
        &seal.event_ids,
        seal.events,
        seal.digest,
        seal.previous_hash,
        seen_number,
        seen_hash,
        seal.pruned_through,
        seal.head.hash,
    )
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// Returns the age of the oldest unsealed batch that is signed with one of `keys`.
#[tracing::instrument(level = "debug", name = "db.audit_unsealed.find_oldest_age", skip_all)]
pub async fn find_oldest_unsealed_age(conn: &mut PgConnection, keys: &[String]) -> Result<f64, StorageError> {
    let age = sqlx::query_scalar!(
        r#"SELECT coalesce(extract(epoch FROM clock_timestamp() - min(written_at)), 0)::float8 AS "age!"
           FROM audit_unsealed WHERE key_id = ANY ($1)"#,
        keys,
    );
    Ok(age.fetch_one(conn).await?)
}

/// Lists the numbers of unsealed batches of a process.
#[tracing::instrument(level = "debug", name = "db.audit_unsealed.list_sequences", skip_all)]
pub async fn list_unsealed_sequences(conn: &mut PgConnection, process_id: Uuid) -> Result<Vec<i64>, StorageError> {
    let sequences = sqlx::query_scalar!("SELECT sequence FROM audit_unsealed WHERE process_id = $1", process_id);
    Ok(sequences.fetch_all(conn).await?)
}

/// Plans the statements of this transaction for their values: a generic plan for all filters uses
/// no index.
async fn plan_for_values(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SET LOCAL plan_cache_mode = force_custom_plan").execute(conn).await?;
    Ok(())
}

/// Returns the ids from the first to before the second one.
fn id_range(filter: &EventFilter, before: Option<Uuid>) -> (Uuid, Uuid) {
    let end = filter.to.map_or(Uuid::max(), first_id_at).min(before.unwrap_or(Uuid::max()));
    (filter.from.map_or(Uuid::nil(), first_id_at), end)
}

/// Lists events that match `filter`, newest first: at most `limit` before the id `before`. Must run
/// in a transaction.
#[tracing::instrument(level = "debug", name = "db.audit_events.list", skip_all)]
pub async fn list(
    conn: &mut PgConnection,
    filter: &EventFilter,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<StoredEvent>, StorageError> {
    plan_for_values(&mut *conn).await?;
    let (from, to) = id_range(filter, before);
    let rows = if let Some(resource) = &filter.resource {
        sqlx::query_as!(
            EventRow,
            r#"SELECT chain_id, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related, outcome,
                   request_id, source_ip, details::text AS "details!", previous_hash, hash, key_id
               FROM audit_events
               WHERE id = ANY (ARRAY(
                   SELECT one.id FROM (
                       (SELECT id FROM audit_events
                        WHERE resource = $7 AND id >= $1 AND id < $2 AND ($3::text IS NULL OR actor_name = $3)
                            AND ($4::text IS NULL OR action = $4) AND ($5::text IS NULL OR outcome = $5)
                        ORDER BY id DESC LIMIT $6)
                       UNION
                       (SELECT id FROM audit_events
                        WHERE related @> ARRAY[$7] AND related IS NOT NULL
                            AND id >= $1 AND id < $2 AND ($3::text IS NULL OR actor_name = $3)
                            AND ($4::text IS NULL OR action = $4) AND ($5::text IS NULL OR outcome = $5)
                        ORDER BY id DESC LIMIT $6)
                   ) AS one
                   ORDER BY one.id DESC LIMIT $6
               ))
               ORDER BY id DESC"#,
            from,
            to,
            filter.actor.as_deref(),
            filter.action.map(Action::as_str),
            filter.outcome.map(Outcome::as_str),
            limit,
            resource.as_str(),
        )
        .fetch_all(conn)
        .await?
    } else {
        sqlx::query_as!(
            EventRow,
            r#"SELECT chain_id, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related, outcome,
                   request_id, source_ip, details::text AS "details!", previous_hash, hash, key_id
               FROM audit_events
               WHERE id >= $1 AND id < $2 AND ($3::text IS NULL OR actor_name = $3)
                   AND ($4::text IS NULL OR action = $4) AND ($5::text IS NULL OR outcome = $5)
               ORDER BY id DESC LIMIT $6"#,
            from,
            to,
            filter.actor.as_deref(),
            filter.action.map(Action::as_str),
            filter.outcome.map(Outcome::as_str),
            limit,
        )
        .fetch_all(conn)
        .await?
    };
    Ok(rows.into_iter().map(StoredEvent::from).collect())
}

/// Begins a transaction that reads the log as it is at one moment.
pub async fn snapshot(pool: &PgPool) -> Result<Transaction, StorageError> {
    Ok(pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?)
}

/// Lists seals after a number, at most `limit`.
pub async fn list_seals(conn: &mut PgConnection, after: i64, limit: i64) -> Result<Vec<Seal>, StorageError> {
    let rows = sqlx::query_as!(
        SealRow,
        "SELECT number, sealed_at, key_id, process_ids, sequences, settled_through, event_counts, event_ids, events,
             digest, previous_hash, seen_number, seen_hash, pruned_through, hash
         FROM audit_seals WHERE number > $1 ORDER BY number LIMIT $2",
        after,
        limit,
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(Seal::from).collect())
}

/// Lists the numbers of seals whose process had seen a seal that is not stored before them.
pub async fn list_contradicted_seals(conn: &mut PgConnection) -> Result<Vec<(i64, i64)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT number, seen_number AS "seen_number!" FROM audit_seals AS later
           WHERE seen_number IS NOT NULL AND NOT EXISTS (
               SELECT FROM audit_seals AS seen
               WHERE seen.number = later.seen_number AND seen.hash = later.seen_hash AND seen.number < later.number
           )
           ORDER BY number"#
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(|row| (row.number, row.seen_number)).collect())
}

/// Lists all unsealed batches.
pub async fn list_unsealed(conn: &mut PgConnection) -> Result<Vec<Batch>, StorageError> {
    let rows = sqlx::query_as!(
        BatchRow,
        "SELECT id, key_id, process_id, sequence, settled_through, event_ids, hashes, mac
         FROM audit_unsealed ORDER BY id"
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(Batch::from).collect())
}

/// Finds events by id, in no order.
pub async fn find_events(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<StoredEvent>, StorageError> {
    let rows = sqlx::query_as!(
        EventRow,
        r#"SELECT chain_id, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related, outcome,
               request_id, source_ip, details::text AS "details!", previous_hash, hash, key_id
           FROM audit_events WHERE id = ANY ($1)"#,
        ids,
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(StoredEvent::from).collect())
}

/// Counts all events.
pub async fn count_all_events(conn: &mut PgConnection) -> Result<i64, StorageError> {
    let count = sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM audit_events"#);
    Ok(count.fetch_one(conn).await?)
}

/// Event that is in no seal and in no batch, or that is in several.
#[derive(Debug)]
pub struct MiscountedEvent {
    /// Identifier.
    pub id: Uuid,
    /// Key of its HMAC.
    pub key_id: Option<String>,
    /// HMAC.
    pub hash: Vec<u8>,
    /// Number of seals and batches that contain the event.
    pub bindings: i64,
}

/// Lists events that are not bound exactly once.
pub async fn list_miscounted_events(conn: &mut PgConnection) -> Result<Vec<MiscountedEvent>, StorageError> {
    let rows = sqlx::query_as!(
        MiscountedEvent,
        r#"SELECT e.id, e.key_id, e.hash, coalesce(bound.bindings, 0) AS "bindings!"
           FROM audit_events AS e LEFT JOIN (
               SELECT every.id, count(*) AS bindings FROM (
                   SELECT unnest(event_ids) AS id FROM audit_seals
                   UNION ALL SELECT unnest(event_ids) FROM audit_unsealed
               ) AS every GROUP BY every.id
           ) AS bound ON bound.id = e.id
           WHERE bound.bindings IS DISTINCT FROM 1 ORDER BY e.id"#
    );
    Ok(rows.fetch_all(conn).await?)
}
