//! Chains of events, as releases before seals wrote them.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::EventRow;
use crate::{
    domain::audit::{
        StoredEvent,
        legacy::{Chain, Head, Opening},
    },
    storage::{PgConnection, StorageError},
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

/// Lists all chains, in the order of their numbers.
pub async fn list_chains(conn: &mut PgConnection) -> Result<Vec<Chain>, StorageError> {
    let rows = sqlx::query_as!(
        ChainRow,
        "SELECT id, number, opened_at, continues_id, continues_sequence, opening, key_id, sequence, hash, seal
         FROM audit_chains ORDER BY number"
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(Chain::from).collect())
}

/// Lists events of chains in their order, at most `limit` after a place.
pub async fn list_links(
    conn: &mut PgConnection,
    (chain_id, sequence): (Uuid, i64),
    limit: i64,
) -> Result<Vec<StoredEvent>, StorageError> {
    let rows = sqlx::query_as!(
        EventRow,
        r#"SELECT chain_id, sequence, id, at, actor_type, actor_id, actor_name, action, resource, related, outcome,
               request_id, source_ip, details::text AS "details!", previous_hash, hash, key_id
           FROM audit_events WHERE (chain_id, sequence) > ($1, $2) AND key_id IS NULL
           ORDER BY chain_id, sequence LIMIT $3"#,
        chain_id,
        sequence,
        limit,
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(StoredEvent::from).collect())
}

/// Waits until no other adoption runs, and keeps others waiting until the transaction ends.
pub async fn lock_adoption(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_advisory_xact_lock(20261129000003)").execute(conn).await?;
    Ok(())
}
