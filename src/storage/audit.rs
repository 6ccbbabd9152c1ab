//! The audit record: events, which are only ever added, and the heads of their chains.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use uuid::Uuid;

use crate::{
    domain::audit::{Action, Chain, Event, EventFilter, Head, Link, LinkedEvent, Opening, Outcome, first_id_at},
    storage::StorageError,
};

struct ChainRow {
    id: Uuid,
    number: i64,
    opened_at: DateTime<Utc>,
    continues_id: Option<Uuid>,
    continues_sequence: Option<i64>,
    opening: Vec<u8>,
    key_id: String,
    sequence: i64,
    hash: Vec<u8>,
    seal: Vec<u8>,
}

impl From<ChainRow> for Chain {
    fn from(row: ChainRow) -> Self {
        Self {
            opening: Opening {
                id: row.id,
                number: row.number,
                opened_at: row.opened_at,
                continues: row.continues_id.zip(row.continues_sequence),
            },
            opening_hash: row.opening,
            key_id: row.key_id,
            head: Head { sequence: row.sequence, hash: row.hash },
            seal: row.seal,
        }
    }
}

/// A transaction of Postgres, by the number that it has there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionId(String);

impl From<String> for TransactionId {
    fn from(number: String) -> Self {
        Self(number)
    }
}

/// A chain that nobody else goes on with.
#[derive(Debug)]
pub struct LockedChain {
    /// The chain as it is stored.
    pub chain: Chain,
    /// The transaction that others wait for.
    pub transaction: TransactionId,
    /// The transaction, or the part of one, that wrote the row. To put back what stood in it before is another one.
    pub written_by: TransactionId,
}

struct LockedChainRow {
    id: Uuid,
    number: i64,
    opened_at: DateTime<Utc>,
    continues_id: Option<Uuid>,
    continues_sequence: Option<i64>,
    opening: Vec<u8>,
    key_id: String,
    sequence: i64,
    hash: Vec<u8>,
    seal: Vec<u8>,
    transaction: String,
    written_by: String,
}

impl From<LockedChainRow> for LockedChain {
    fn from(row: LockedChainRow) -> Self {
        let chain = ChainRow {
            id: row.id,
            number: row.number,
            opened_at: row.opened_at,
            continues_id: row.continues_id,
            continues_sequence: row.continues_sequence,
            opening: row.opening,
            key_id: row.key_id,
            sequence: row.sequence,
            hash: row.hash,
            seal: row.seal,
        };
        Self { chain: chain.into(), transaction: row.transaction.into(), written_by: row.written_by.into() }
    }
}

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
}

impl From<EventRow> for LinkedEvent {
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
            link: Link {
                chain_id: row.chain_id,
                sequence: row.sequence,
                previous_hash: row.previous_hash,
                hash: row.hash,
            },
        }
    }
}

/// Keeps others from opening a chain until the transaction ends, and finds the last one that was opened.
#[tracing::instrument(level = "debug", name = "db.audit_chains.lock_last", skip_all)]
pub async fn lock_last_chain(conn: &mut PgConnection) -> Result<Option<Chain>, StorageError> {
    // A number that nobody else takes, sqlx's migrations included.
    sqlx::query!("SELECT pg_advisory_xact_lock(20261124000005)").execute(&mut *conn).await?;
    let row = sqlx::query_as!(
        ChainRow,
        "SELECT id, number, opened_at, continues_id, continues_sequence, opening, key_id, sequence, hash, seal
         FROM audit_chains ORDER BY number DESC LIMIT 1"
    );
    Ok(row.fetch_optional(conn).await?.map(Chain::from))
}

/// Inserts a new chain.
#[tracing::instrument(level = "debug", name = "db.audit_chains.insert", skip_all)]
pub async fn insert_chain(conn: &mut PgConnection, chain: &Chain) -> Result<(), StorageError> {
    let (continues_id, continues_sequence) = chain.opening.continues.unzip();
    sqlx::query!(
        "INSERT INTO audit_chains
             (id, number, opened_at, continues_id, continues_sequence, opening, key_id, sequence, hash, seal)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        chain.opening.id,
        chain.opening.number,
        chain.opening.opened_at,
        continues_id,
        continues_sequence,
        chain.opening_hash,
        chain.key_id,
        chain.head.sequence,
        chain.head.hash,
        chain.seal,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Finds a chain, and keeps others from going on with it until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.audit_chains.lock", skip_all)]
pub async fn lock_chain(conn: &mut PgConnection, chain_id: Uuid) -> Result<Option<LockedChain>, StorageError> {
    let row = sqlx::query_as!(
        LockedChainRow,
        r#"SELECT id, number, opened_at, continues_id, continues_sequence, opening, key_id, sequence, hash, seal,
               pg_current_xact_id()::text AS "transaction!", xmin::text AS "written_by!"
           FROM audit_chains WHERE id = $1 FOR UPDATE"#,
        chain_id,
    );
    Ok(row.fetch_optional(conn).await?.map(LockedChain::from))
}

/// Finds where a chain is.
#[tracing::instrument(level = "debug", name = "db.audit_chains.find_head", skip_all)]
pub async fn find_head(conn: &mut PgConnection, chain_id: Uuid) -> Result<Option<Head>, StorageError> {
    let head = sqlx::query_as!(Head, "SELECT sequence, hash FROM audit_chains WHERE id = $1", chain_id);
    Ok(head.fetch_optional(conn).await?)
}

/// Adds events to a chain that has `sequence` events, in one statement: all of them and its new head, or nothing where
/// it is not there any more, which is `false`.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or refuses.
#[tracing::instrument(level = "debug", name = "db.audit_events.append", skip_all, fields(events = events.len()))]
pub async fn append(
    conn: &mut PgConnection,
    chain_id: Uuid,
    sequence: i64,
    head: &Head,
    seal: &[u8],
    events: &[LinkedEvent],
) -> Result<bool, StorageError> {
    macro_rules! column {
        ($($field:tt)+) => {
            events.iter().map(|one| one.$($field)+).collect::<Vec<_>>()
        };
    }
    let related: Vec<Option<String>> = events
        .iter()
        .map(|one| Some(&one.event.related).filter(|related| !related.is_empty()).map(|related| related.join(" ")))
        .collect();
    let added = sqlx::query!(
        "WITH head AS (
             UPDATE audit_chains SET sequence = $3, hash = $4, seal = $5 WHERE id = $1 AND sequence = $2 RETURNING id
         )
         INSERT INTO audit_events
             (chain_id, sequence, previous_hash, hash, id, at, actor_type, actor_id, actor_name, action, resource,
              related, outcome, request_id, source_ip, details)
         SELECT head.id, new.sequence, new.previous_hash, new.hash, new.id, new.at, new.actor_type, new.actor_id,
             new.actor_name, new.action, new.resource,
             -- No resource has a space in it.
             string_to_array(new.related, ' '), new.outcome, new.request_id, new.source_ip, new.details::json
         FROM head, unnest($6::bigint[], $7::bytea[], $8::bytea[], $9::uuid[], $10::timestamptz[], $11::text[],
             $12::uuid[], $13::text[], $14::text[], $15::text[], $16::text[], $17::text[], $18::uuid[], $19::text[],
             $20::text[])
             AS new (sequence, previous_hash, hash, id, at, actor_type, actor_id, actor_name, action, resource,
                 related, outcome, request_id, source_ip, details)",
        chain_id,
        sequence,
        head.sequence,
        head.hash,
        seal,
        &column!(link.sequence),
        &column!(link.previous_hash.as_slice()) as &[&[u8]],
        &column!(link.hash.as_slice()) as &[&[u8]],
        &column!(event.id),
        &column!(event.at),
        &column!(event.actor_type.as_str()) as &[&str],
        &column!(event.actor_id) as &[Option<Uuid>],
        &column!(event.actor_name.as_deref()) as &[Option<&str>],
        &column!(event.action.as_str()) as &[&str],
        &column!(event.resource.as_deref()) as &[Option<&str>],
        &related as &[Option<String>],
        &column!(event.outcome.as_str()) as &[&str],
        &column!(event.request_id) as &[Option<Uuid>],
        &column!(event.source_ip.as_deref()) as &[Option<&str>],
        &column!(event.details.as_str()) as &[&str],
    )
    .execute(conn)
    .await?;
    Ok(added.rows_affected() == events.len() as u64)
}

/// Plans the statements of this transaction anew for their values: a plan for any filter would use no index.
async fn plan_for_values(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SET LOCAL plan_cache_mode = force_custom_plan").execute(conn).await?;
    Ok(())
}

/// Lists events that `filter` lets through, the newest first: at most `limit` before the one with the id `before`. To be
/// called in a transaction.
#[tracing::instrument(level = "debug", name = "db.audit_events.list", skip_all)]
pub async fn list(
    conn: &mut PgConnection,
    filter: &EventFilter,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<LinkedEvent>, StorageError> {
    plan_for_values(&mut *conn).await?;
    let from = filter.from.map_or(Uuid::nil(), first_id_at);
    let to = filter.to.map_or(Uuid::max(), first_id_at).min(before.unwrap_or(Uuid::max()));
    let (actor, action) = (filter.actor.as_deref(), filter.action.map(Action::as_str));
    let outcome = filter.outcome.map(Outcome::as_str);
    let rows = if let Some(resource) = &filter.resource {
        // The first rows of each index; the page is among them.
        sqlx::query_as!(
            EventRow,
            r#"SELECT chain_id, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related, outcome,
                   request_id, source_ip, details::text AS "details!", previous_hash, hash
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
            actor,
            action,
            outcome,
            limit,
            resource.as_str(),
        )
        .fetch_all(conn)
        .await?
    } else {
        sqlx::query_as!(
            EventRow,
            r#"SELECT chain_id, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related, outcome,
                   request_id, source_ip, details::text AS "details!", previous_hash, hash
               FROM audit_events
               WHERE id >= $1 AND id < $2 AND ($3::text IS NULL OR actor_name = $3)
                   AND ($4::text IS NULL OR action = $4) AND ($5::text IS NULL OR outcome = $5)
               ORDER BY id DESC LIMIT $6"#,
            from,
            to,
            actor,
            action,
            outcome,
            limit,
        )
        .fetch_all(conn)
        .await?
    };
    Ok(rows.into_iter().map(LinkedEvent::from).collect())
}

/// Begins to read everything as it is at one moment, whatever is written meanwhile.
pub async fn snapshot(pool: &PgPool) -> Result<Transaction<'static, Postgres>, StorageError> {
    Ok(pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?)
}

/// Lists all chains, in the order in which they were opened.
pub async fn list_chains(conn: &mut PgConnection) -> Result<Vec<Chain>, StorageError> {
    let rows = sqlx::query_as!(
        ChainRow,
        "SELECT id, number, opened_at, continues_id, continues_sequence, opening, key_id, sequence, hash, seal
         FROM audit_chains ORDER BY number"
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(Chain::from).collect())
}

/// Lists events in the order of their chains: at most `limit` after this place.
pub async fn list_links(
    conn: &mut PgConnection,
    (chain_id, sequence): (Uuid, i64),
    limit: i64,
) -> Result<Vec<LinkedEvent>, StorageError> {
    let rows = sqlx::query_as!(
        EventRow,
        r#"SELECT chain_id, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related, outcome,
               request_id, source_ip, details::text AS "details!", previous_hash, hash
           FROM audit_events WHERE (chain_id, sequence) > ($1, $2) ORDER BY chain_id, sequence LIMIT $3"#,
        chain_id,
        sequence,
        limit,
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(LinkedEvent::from).collect())
}

/// How many events there are by what the chains say of themselves.
pub async fn count(conn: &mut PgConnection) -> Result<i64, StorageError> {
    let sum = sqlx::query_scalar!(r#"SELECT coalesce(sum(sequence), 0)::bigint AS "sum!" FROM audit_chains"#);
    Ok(sum.fetch_one(conn).await?)
}
