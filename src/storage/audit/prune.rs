//! Deletion of old events. The seals stay.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// Whether the role of the connection may delete events.
#[tracing::instrument(level = "debug", name = "db.audit_events.may_prune", skip_all)]
pub async fn may_prune(conn: &mut PgConnection) -> Result<bool, StorageError> {
    let may = sqlx::query_scalar!(
        r#"SELECT pg_has_role(current_user, relowner, 'USAGE') AS "may!"
           FROM pg_catalog.pg_class WHERE oid = 'audit_events'::regclass"#
    );
    Ok(may.fetch_one(conn).await?)
}

/// Finds the last seal before the first one that was made at `before` or later; 0 if there is none.
#[tracing::instrument(level = "debug", name = "db.audit_seals.find_last_before", skip_all)]
pub async fn find_last_seal_before(conn: &mut PgConnection, before: DateTime<Utc>) -> Result<i64, StorageError> {
    let number = sqlx::query_scalar!(
        r#"SELECT coalesce(
               (SELECT min(number) - 1 FROM audit_seals WHERE sealed_at >= $1), (SELECT max(number) FROM audit_seals), 0
           ) AS "number!""#,
        before,
    );
    Ok(number.fetch_one(conn).await?)
}

/// Lists the seals whose `pruned_through` differs from that of the seal before.
#[tracing::instrument(level = "debug", name = "db.audit_seals.list_prunes", skip_all)]
pub async fn list_prunes(conn: &mut PgConnection) -> Result<Vec<i64>, StorageError> {
    let numbers = sqlx::query_scalar!(
        "SELECT number FROM (
             SELECT number, pruned_through, lag(pruned_through) OVER (ORDER BY number) AS before FROM audit_seals
         ) AS seals
         WHERE pruned_through IS DISTINCT FROM before ORDER BY number"
    );
    Ok(numbers.fetch_all(conn).await?)
}

/// Counts events of the seals up to a number: those that are gone, and those that a prune deletes.
#[tracing::instrument(level = "debug", name = "db.audit_events.count_pruned", skip_all)]
pub async fn count_pruned(conn: &mut PgConnection, through: i64) -> Result<(i64, i64), StorageError> {
    let counts = sqlx::query!(
        r#"SELECT count(*) FILTER (WHERE e.id IS NULL) AS "gone!",
               count(*) FILTER (WHERE e.key_id IS NOT NULL AND e.action <> 'audit.prune') AS "left!"
           FROM (SELECT unnest(event_ids) AS id FROM audit_seals WHERE number <= $1) AS sealed
           LEFT JOIN audit_events AS e ON e.id = sealed.id"#,
        through,
    )
    .fetch_one(conn)
    .await?;
    Ok((counts.gone, counts.left))
}

/// Deletes events and returns their number. Events of prunes stay, and so do events of chains, which
/// `verify` compares with the heads of these.
#[tracing::instrument(level = "debug", name = "db.audit_events.delete", skip_all)]
pub async fn delete_events(conn: &mut PgConnection, ids: &[Uuid]) -> Result<u64, StorageError> {
    sqlx::query!("SET LOCAL regcred.audit_prune = 'on'").execute(&mut *conn).await?;
    let deleted = sqlx::query!(
        "DELETE FROM audit_events WHERE id = ANY ($1) AND key_id IS NOT NULL AND action <> 'audit.prune'",
        ids,
    );
    Ok(deleted.execute(conn).await?.rows_affected())
}
