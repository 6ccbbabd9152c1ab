//! Idempotency keys of changes.

use crate::{
    domain::idempotency::IdempotentRequest,
    storage::{PgConnection, StorageError},
};

/// Claims a key in the transaction of its change. Returns `false` if another transaction holds the
/// key, or has committed a change under it.
///
/// Never waits for a request that holds the key: the lock is taken or not.
#[tracing::instrument(level = "debug", name = "db.idempotency_keys.claim", skip_all)]
pub async fn claim(
    conn: &mut PgConnection,
    principal: &str,
    request: &IdempotentRequest,
) -> Result<bool, StorageError> {
    let claimed = sqlx::query!(
        "INSERT INTO idempotency_keys (principal, key, request_digest)
         SELECT $1::text, $2::text, $3::bytea WHERE pg_try_advisory_xact_lock($4)
         ON CONFLICT (principal, key) DO UPDATE
             SET request_digest = excluded.request_digest, created_at = excluded.created_at
             WHERE idempotency_keys.created_at <= now() - interval '24 hours'",
        principal,
        request.key.as_str(),
        request.digest.as_slice(),
        request.lock,
    )
    .execute(conn)
    .await?;
    Ok(claimed.rows_affected() == 1)
}

/// Whether no transaction holds the key of a request.
#[tracing::instrument(level = "debug", name = "db.idempotency_keys.is_released", skip_all)]
pub async fn is_released(conn: &mut PgConnection, request: &IdempotentRequest) -> Result<bool, StorageError> {
    // Outside a transaction: the lock ends with the statement.
    let is_free = sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock($1) AS "is_free!""#, request.lock);
    Ok(is_free.fetch_one(conn).await?)
}

/// Finds the digest of the request that was performed under a key.
#[tracing::instrument(level = "debug", name = "db.idempotency_keys.find", skip_all)]
pub async fn find(
    conn: &mut PgConnection,
    principal: &str,
    request: &IdempotentRequest,
) -> Result<Option<Vec<u8>>, StorageError> {
    let digest = sqlx::query_scalar!(
        "SELECT request_digest FROM idempotency_keys
         WHERE principal = $1 AND key = $2 AND created_at > now() - interval '24 hours'",
        principal,
        request.key.as_str(),
    );
    Ok(digest.fetch_optional(conn).await?)
}

/// Deletes at most `limit` expired keys and returns their number. Skips locked ones.
#[tracing::instrument(level = "debug", name = "db.idempotency_keys.delete_expired", skip_all)]
pub async fn delete_expired(conn: &mut PgConnection, limit: i64) -> Result<u64, StorageError> {
    let deleted = sqlx::query!(
        "DELETE FROM idempotency_keys WHERE (principal, key) IN (
             SELECT principal, key FROM idempotency_keys WHERE created_at <= now() - interval '24 hours'
             ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED
         )",
        limit,
    )
    .execute(conn)
    .await?;
    Ok(deleted.rows_affected())
}
