//! API keys.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    domain::caller::{Identity, KeyVerifier, Role},
    storage::{StorageError, corrupt, on_name_taken},
};

const TABLE: &str = "api_keys";

/// A key's row as the door needs it.
#[derive(Debug)]
pub struct StoredKey {
    /// Whom the key stands for.
    pub identity: Identity,
    /// What a shown key is checked against.
    pub verifier: KeyVerifier,
    /// Neither revoked nor expired, by the database's clock.
    pub is_active: bool,
}

/// Finds a key by id.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or the row is damaged.
#[tracing::instrument(name = "db.api_keys.find", skip_all)]
pub async fn find(conn: &mut PgConnection, id: Uuid) -> Result<Option<StoredKey>, StorageError> {
    let row = sqlx::query!(
        r#"SELECT id, name, role, mac, hash,
               (revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())) AS "is_active!"
           FROM api_keys WHERE id = $1"#,
        id,
    )
    .fetch_optional(conn)
    .await?;
    row.map(|row| {
        Ok(StoredKey {
            identity: Identity {
                key_id: row.id,
                name: row.name,
                role: row.role.parse::<Role>().map_err(corrupt(TABLE, row.id, "role"))?,
            },
            verifier: KeyVerifier { mac: row.mac, hash: row.hash },
            is_active: row.is_active,
        })
    })
    .transpose()
}

/// Inserts a key.
///
/// # Errors
///
/// [`StorageError::NameTaken`] if a key that is not revoked has the name.
#[tracing::instrument(name = "db.api_keys.insert", skip_all, fields(key.id = %id))]
pub async fn insert(
    conn: &mut PgConnection,
    id: Uuid,
    name: &str,
    role: Role,
    verifier: &KeyVerifier,
    expires_at: Option<DateTime<Utc>>,
) -> Result<(), StorageError> {
    sqlx::query!(
        "INSERT INTO api_keys (id, name, role, mac, hash, expires_at) VALUES ($1, $2, $3, $4, $5, $6)",
        id,
        name,
        role.as_str(),
        verifier.mac,
        verifier.hash,
        expires_at,
    )
    .execute(conn)
    .await
    .map_err(on_name_taken("api_keys_name_key"))?;
    Ok(())
}

/// A key as a list shows it.
#[derive(Debug)]
pub struct KeySummary {
    /// Id of the key, also the first part of its text.
    pub id: Uuid,
    /// Name of the key.
    pub name: String,
    /// Role of the key.
    pub role: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it ends, if ever.
    pub expires_at: Option<DateTime<Utc>>,
    /// When it was revoked, if it was.
    pub revoked_at: Option<DateTime<Utc>>,
}

/// Lists all keys, the oldest first.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<KeySummary>, StorageError> {
    Ok(sqlx::query_as!(
        KeySummary,
        "SELECT id, name, role, created_at, expires_at, revoked_at FROM api_keys ORDER BY id",
    )
    .fetch_all(conn)
    .await?)
}

/// Revokes the key of this name; whether there was one.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked.
#[tracing::instrument(name = "db.api_keys.revoke", skip_all)]
pub async fn revoke(conn: &mut PgConnection, name: &str) -> Result<bool, StorageError> {
    let result = sqlx::query!("UPDATE api_keys SET revoked_at = now() WHERE name = $1 AND revoked_at IS NULL", name,)
        .execute(conn)
        .await?;
    Ok(result.rows_affected() > 0)
}
