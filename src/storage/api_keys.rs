//! API keys.

use chrono::{DateTime, Utc};
use sqlx::types::Json;
use uuid::Uuid;

use crate::{
    domain::{
        caller::{Actor, ActorKind, Identity, KeyVerifier, NewApiKey, Role},
        grants::{Grants, GrantsDocument},
        invalid::Invalid,
        listing::{ApiKeyState, ListRequest, Listed, NamePart},
        network::{Networks, parse_source_network},
    },
    storage::{
        PgConnection, StorageError, corrupt,
        lists::{self, Checked, Key, Source, Sql},
        on_name_taken,
    },
};

const TABLE: &str = "api_keys";

/// Row of a key for authentication.
#[derive(Debug)]
pub struct StoredKey {
    /// Caller that the key authenticates.
    pub identity: Identity,
    /// Verifiers of the key's secret.
    pub verifier: KeyVerifier,
    /// Whether the key is revoked.
    pub is_revoked: bool,
    /// Seconds until the expiry, by the database's clock. Negative for an expired key, `None`
    /// without an expiry.
    pub expires_in_seconds: Option<f64>,
}

/// Parses the role and grants of a row.
fn parse_rights(id: Uuid, role: &str, grants: GrantsDocument) -> Result<(Role, Grants), StorageError> {
    let role = role.parse().map_err(corrupt(TABLE, id, "role"))?;
    let grants = Grants::parse(role, grants).map_err(|errors| corrupt(TABLE, id, "grants")(errors.into()))?;
    Ok((role, grants))
}

/// Parses the networks of a row. NULL means any network.
fn parse_networks(id: Uuid, source_cidrs: Option<&[String]>) -> Result<Networks, StorageError> {
    let networks = source_cidrs.unwrap_or_default().iter().map(|text| parse_source_network(text));
    networks.collect::<Result<_, _>>().map_err(corrupt(TABLE, id, "source_cidrs"))
}

/// Id of a found key, with its row or the reason why the row does not parse.
pub type FoundKey = (Uuid, Result<StoredKey, StorageError>);

/// Finds keys by id for authentication. Unknown ids are omitted.
#[tracing::instrument(level = "debug", name = "db.api_keys.find_many", skip_all, fields(keys = ids.len()))]
pub async fn find_many(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<FoundKey>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT id, name, role, grants, mac, pepper_id, hash, source_cidrs,
                  nullif(expires_at, 'infinity') AS expires_at,
               revoked_at IS NOT NULL AS "is_revoked!",
               extract(epoch FROM nullif(expires_at, 'infinity') - now())::float8 AS expires_in_seconds
           FROM api_keys WHERE id = ANY($1)"#,
        ids,
    )
    .fetch_all(conn)
    .await?;
    let found = rows.into_iter().map(|row| {
        // Parsed row by row, so that a row of a newer version does not affect other keys.
        let grants = serde_json::from_value(row.grants);
        let grants = grants.map_err(|error| corrupt(TABLE, row.id, "grants")(Invalid::new(error.to_string())));
        let rights = grants.and_then(|grants| parse_rights(row.id, &row.role, grants));
        let source_networks = parse_networks(row.id, row.source_cidrs.as_deref());
        let stored = rights.and_then(|(role, grants)| {
            Ok(StoredKey {
                identity: Identity {
                    actor: Actor { kind: ActorKind::ApiKey, id: Some(row.id), name: row.name },
                    role,
                    grants,
                    source_networks: source_networks?,
                    expires_at: row.expires_at,
                },
                verifier: KeyVerifier { mac: row.mac, pepper_id: row.pepper_id, hash: row.hash },
                is_revoked: row.is_revoked,
                expires_in_seconds: row.expires_in_seconds,
            })
        });
        (row.id, stored)
    });
    Ok(found.collect())
}

/// API key without its secret.
#[derive(Debug)]
pub struct ApiKey {
    /// Id, also contained in the text of the key.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// Role.
    pub role: Role,
    /// Resources that the key can access.
    pub grants: Grants,
    /// Networks that the key may be used from. Empty for any.
    pub source_networks: Networks,
    /// Creation time.
    pub created_at: DateTime<Utc>,
    /// Expiry; `None` for a key that never expires.
    pub expires_at: Option<DateTime<Utc>>,
    /// Revocation time.
    pub revoked_at: Option<DateTime<Utc>>,
}

struct ApiKeyRow {
    id: Uuid,
    name: String,
    role: String,
    grants: Json<GrantsDocument>,
    source_cidrs: Option<Vec<String>>,
    created_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    revoked_at: Option<DateTime<Utc>>,
}

impl TryFrom<ApiKeyRow> for ApiKey {
    type Error = StorageError;

    fn try_from(row: ApiKeyRow) -> Result<Self, StorageError> {
        let (role, grants) = parse_rights(row.id, &row.role, row.grants.0)?;
        Ok(Self {
            id: row.id,
            name: row.name,
            role,
            grants,
            source_networks: parse_networks(row.id, row.source_cidrs.as_deref())?,
            created_at: row.created_at,
            expires_at: row.expires_at,
            revoked_at: row.revoked_at,
        })
    }
}

/// Inserts a key.
///
/// # Errors
///
/// [`StorageError::NameTaken`] if a key that is not revoked has the name.
#[tracing::instrument(level = "debug", name = "db.api_keys.insert", skip_all, fields(key.id = %id))]
pub async fn insert(
    conn: &mut PgConnection,
    id: Uuid,
    new: &NewApiKey,
    verifier: &KeyVerifier,
) -> Result<ApiKey, StorageError> {
    sqlx::query_as!(
        ApiKeyRow,
        r#"INSERT INTO api_keys (id, name, role, grants, mac, hash, expires_at, source_cidrs, pepper_id)
           VALUES ($1, $2, $3, $4, $5, $6, $7, nullif($8::text[], '{}'), $9)
           RETURNING id, name, role, grants AS "grants: _", source_cidrs, created_at, expires_at, revoked_at"#,
        id,
        new.name.as_str(),
        new.role.as_str(),
        Json(GrantsDocument::from(&new.grants)) as _,
        verifier.mac,
        verifier.hash,
        new.expires_at,
        &new.source_networks.to_texts(),
        verifier.pepper_id,
    )
    .fetch_one(conn)
    .await
    .map_err(on_name_taken("api_keys_name_key"))?
    .try_into()
}

/// Replaces the HMAC of a key by one under another pepper. Returns `false` if the row has changed
/// since `stored` was read.
#[tracing::instrument(level = "debug", name = "db.api_keys.renew", skip_all, fields(key.id = %id))]
pub async fn renew(
    conn: &mut PgConnection,
    id: Uuid,
    stored: &KeyVerifier,
    renewed: &KeyVerifier,
) -> Result<bool, StorageError> {
    let updated = sqlx::query!(
        "UPDATE api_keys SET mac = $3, pepper_id = $4 WHERE id = $1 AND mac = $2 AND hash = $5",
        id,
        stored.mac,
        renewed.mac,
        renewed.pepper_id,
        stored.hash,
    )
    .execute(conn)
    .await?;
    Ok(updated.rows_affected() > 0)
}

/// Counts the keys that are neither revoked nor expired by pepper.
#[tracing::instrument(level = "debug", name = "db.api_keys.count_by_pepper", skip_all)]
pub async fn count_by_pepper(conn: &mut PgConnection) -> Result<Vec<(Option<String>, i64)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT pepper_id, count(*) AS "count!" FROM api_keys
           WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
           GROUP BY pepper_id ORDER BY pepper_id"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.pepper_id, row.count)).collect())
}

/// Filter of a list of API keys.
#[derive(Debug, Default)]
pub struct ApiKeyFilter {
    /// Part of the name.
    pub name_part: Option<NamePart>,
    /// State.
    pub state: Option<ApiKeyState>,
    /// Maximum number of seconds until the expiry. Includes expired keys.
    pub expires_within_seconds: Option<i64>,
}

/// Lists the keys that match `filter`, including revoked and expired ones.
pub async fn list(
    conn: &mut PgConnection,
    request: &ListRequest,
    filter: &ApiKeyFilter,
) -> Result<Listed<ApiKey>, StorageError> {
    let indexed = |sql: &mut Sql| {
        if let Some(seconds) = filter.expires_within_seconds {
            sql.push(" AND ").push(lists::EXPIRY).push(" <= now() + ").push_bind(seconds);
            sql.push(" * interval '1 second'");
        }
    };
    let checks = |sql: &mut Sql| {
        if let Some(part) = &filter.name_part {
            lists::push_name_part(sql, part.as_str());
        }
        sql.push(match filter.state {
            Some(ApiKeyState::Active) => " AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())",
            Some(ApiKeyState::Expired) => " AND revoked_at IS NULL AND expires_at <= now()",
            Some(ApiKeyState::Revoked) => " AND revoked_at IS NOT NULL",
            None => "",
        });
    };
    let is_checked = filter.name_part.is_some() || filter.state.is_some();
    let checked = is_checked.then_some(Checked { conditions: &checks, rows: lists::SEARCHED_MAX });
    let source = Source { table: TABLE, key: Key::Id, indexed: &indexed, checked };
    let page = lists::page(conn, &source, request).await?;
    let keys = find_listed(conn, &page.items).await?;
    Ok(lists::arrange(page, keys, |key| key.id.to_string()))
}

/// Finds keys by the text of their ids. Unknown ids are omitted.
#[tracing::instrument(level = "debug", name = "db.api_keys.find_listed", skip_all)]
async fn find_listed(conn: &mut PgConnection, ids: &[String]) -> Result<Vec<ApiKey>, StorageError> {
    sqlx::query_as!(
        ApiKeyRow,
        r#"SELECT id, name, role, grants AS "grants: _", source_cidrs, created_at,
               nullif(expires_at, 'infinity') AS expires_at, revoked_at
           FROM api_keys WHERE id = ANY($1::text[]::uuid[])"#,
        ids,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(ApiKey::try_from)
    .collect()
}

/// Finds a key by id.
#[tracing::instrument(level = "debug", name = "db.api_keys.find", skip_all)]
pub async fn find(conn: &mut PgConnection, id: Uuid) -> Result<Option<ApiKey>, StorageError> {
    sqlx::query_as!(
        ApiKeyRow,
        r#"SELECT id, name, role, grants AS "grants: _", source_cidrs, created_at, expires_at, revoked_at
           FROM api_keys WHERE id = $1"#,
        id,
    )
    .fetch_optional(conn)
    .await?
    .map(ApiKey::try_from)
    .transpose()
}

/// Finds the id of the key with this name that is not revoked.
#[tracing::instrument(level = "debug", name = "db.api_keys.find_id", skip_all)]
pub async fn find_id(conn: &mut PgConnection, name: &str) -> Result<Option<Uuid>, StorageError> {
    let found = sqlx::query_scalar!("SELECT id FROM api_keys WHERE name = $1 AND revoked_at IS NULL", name);
    Ok(found.fetch_optional(conn).await?)
}

/// Lists the ids of the newest keys that have or had this name.
#[tracing::instrument(level = "debug", name = "db.api_keys.list_ids", skip_all)]
pub async fn list_ids(conn: &mut PgConnection, name: &str, limit: i64) -> Result<Vec<Uuid>, StorageError> {
    let ids = sqlx::query_scalar!("SELECT id FROM api_keys WHERE name = $1 ORDER BY id DESC LIMIT $2", name, limit);
    Ok(ids.fetch_all(conn).await?)
}

/// Admin key that is neither revoked nor expired.
#[derive(Debug, Clone, Copy)]
pub struct AdminKey {
    /// Id.
    pub id: Uuid,
    /// Whether the key has an expiry.
    pub expires: bool,
}

/// Finds all admin keys that are neither revoked nor expired and locks them until the transaction
/// ends.
#[tracing::instrument(level = "debug", name = "db.api_keys.lock_admins", skip_all)]
pub async fn lock_admins(conn: &mut PgConnection) -> Result<Vec<AdminKey>, StorageError> {
    // Ordered by id, so that concurrent revocations cannot deadlock.
    Ok(sqlx::query_as!(
        AdminKey,
        r#"SELECT id, expires_at IS NOT NULL AS "expires!" FROM api_keys
           WHERE role = 'admin' AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
           ORDER BY id FOR UPDATE"#,
    )
    .fetch_all(conn)
    .await?)
}

/// Revokes a key. Returns `false` if it was already revoked.
#[tracing::instrument(level = "debug", name = "db.api_keys.revoke", skip_all, fields(key.id = %id))]
pub async fn revoke(conn: &mut PgConnection, id: Uuid) -> Result<bool, StorageError> {
    let revoked = sqlx::query!("UPDATE api_keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", id)
        .execute(conn)
        .await?;
    Ok(revoked.rows_affected() > 0)
}
