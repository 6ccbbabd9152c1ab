//! Sessions of the web console.
//!
//! A session lives for 8 hours, and ends after 30 minutes without a request. Every statement
//! ignores ended ones.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// A session, without the secret of its token.
#[derive(Debug, Clone)]
pub struct Session {
    /// Id.
    pub id: Uuid,
    /// API key that it acts for.
    pub api_key_id: Uuid,
    /// HMAC of its token.
    pub mac: Vec<u8>,
    /// Creation time.
    pub created_at: DateTime<Utc>,
    /// Time of the last request, up to a minute late.
    pub last_used_at: DateTime<Utc>,
    /// Time at which it ends, even if it is in use.
    pub expires_at: DateTime<Utc>,
    /// Address that it was created from.
    pub source_ip: Option<String>,
    /// Whether `last_used_at` is more than a minute old.
    pub is_stale: bool,
}

/// Inserts a session and deletes the oldest ones of its key beyond `kept`.
#[tracing::instrument(level = "debug", name = "db.sessions.insert", skip_all, fields(session.id = %id))]
pub async fn insert(
    conn: &mut PgConnection,
    id: Uuid,
    api_key_id: Uuid,
    mac: &[u8],
    source_ip: Option<&str>,
    kept: i64,
) -> Result<Session, StorageError> {
    // The row of the key is locked first, so that concurrent sign-ins cannot deadlock.
    Ok(sqlx::query_as!(
        Session,
        r#"WITH key AS MATERIALIZED (
               SELECT id FROM api_keys WHERE id = $2 FOR NO KEY UPDATE
           ), excess AS (
               DELETE FROM sessions WHERE id IN (
                   SELECT old.id FROM key JOIN sessions AS old ON old.api_key_id = key.id
                   ORDER BY old.created_at DESC, old.id DESC OFFSET $5
               )
           )
           INSERT INTO sessions (id, api_key_id, mac, source_ip)
           SELECT $1, key.id, $3, $4 FROM key
           RETURNING id, api_key_id, mac, created_at, last_used_at, created_at + interval '8 hours' AS "expires_at!",
               source_ip, false AS "is_stale!""#,
        id,
        api_key_id,
        mac,
        source_ip,
        kept - 1,
    )
    .fetch_one(conn)
    .await?)
}

/// Finds a session that has not ended.
#[tracing::instrument(level = "debug", name = "db.sessions.find", skip_all)]
pub async fn find(conn: &mut PgConnection, id: Uuid) -> Result<Option<Session>, StorageError> {
    Ok(sqlx::query_as!(
        Session,
        r#"SELECT id, api_key_id, mac, created_at, last_used_at, created_at + interval '8 hours' AS "expires_at!",
               source_ip, last_used_at < now() - interval '1 minute' AS "is_stale!"
           FROM sessions
           WHERE id = $1 AND created_at > now() - interval '8 hours' AND last_used_at > now() - interval '30 minutes'"#,
        id,
    )
    .fetch_optional(conn)
    .await?)
}

/// Lists the sessions of a key that have not ended, newest first.
#[tracing::instrument(level = "debug", name = "db.sessions.list", skip_all)]
pub async fn list(conn: &mut PgConnection, api_key_id: Uuid, limit: i64) -> Result<Vec<Session>, StorageError> {
    Ok(sqlx::query_as!(
        Session,
        r#"SELECT id, api_key_id, mac, created_at, last_used_at, created_at + interval '8 hours' AS "expires_at!",
               source_ip, last_used_at < now() - interval '1 minute' AS "is_stale!"
           FROM sessions
           WHERE api_key_id = $1 AND created_at > now() - interval '8 hours'
               AND last_used_at > now() - interval '30 minutes'
           ORDER BY created_at DESC, id DESC LIMIT $2"#,
        api_key_id,
        limit,
    )
    .fetch_all(conn)
    .await?)
}

/// Notes a request of a session.
#[tracing::instrument(level = "debug", name = "db.sessions.touch", skip_all, fields(session.id = %id))]
pub async fn touch(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    // Again only if it is stale: of concurrent requests, one writes.
    sqlx::query!(
        "UPDATE sessions SET last_used_at = now() WHERE id = $1 AND last_used_at < now() - interval '1 minute'",
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Deletes a session of a key. Returns `false` if there is none.
#[tracing::instrument(level = "debug", name = "db.sessions.delete", skip_all, fields(session.id = %id))]
pub async fn delete(conn: &mut PgConnection, id: Uuid, api_key_id: Uuid) -> Result<bool, StorageError> {
    let deleted =
        sqlx::query!("DELETE FROM sessions WHERE id = $1 AND api_key_id = $2", id, api_key_id).execute(conn).await?;
    Ok(deleted.rows_affected() > 0)
}

/// Deletes at most `limit` sessions that have ended by their age. Skips locked ones.
#[tracing::instrument(level = "debug", name = "db.sessions.delete_ended", skip_all)]
pub async fn delete_ended(conn: &mut PgConnection, limit: i64) -> Result<(), StorageError> {
    sqlx::query!(
        "DELETE FROM sessions WHERE id IN (
             SELECT id FROM sessions WHERE created_at <= now() - interval '8 hours'
             ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED
         )",
        limit,
    )
    .execute(conn)
    .await?;
    Ok(())
}
