//! Credentials of accounts, with their sealed passwords.

use std::{collections::BTreeMap, time::Instant};

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::types::Json;
use uuid::Uuid;

use super::TABLE;
use crate::{
    domain::{
        grants::{Grants, Ranges},
        registry::RegistryScope,
        sealed::{Ca, RegistryDestination, Sealed, Slot},
        selector::LabelSelector,
    },
    storage::{PgConnection, StorageError, corrupt, sealed::SealedColumn},
};

struct CredentialRow {
    id: Uuid,
    name: String,
    registry: String,
    username: String,
    email: Option<String>,
    labels: Json<BTreeMap<String, String>>,
    password: Vec<u8>,
    password_key_id: String,
    plain_http: bool,
    password_ends_with_whitespace: bool,
    ca_digest: Option<Vec<u8>>,
    valid_until: Option<DateTime<Utc>>,
    read_at: DateTime<Utc>,
}

impl TryFrom<CredentialRow> for SealedCredential {
    type Error = StorageError;

    fn try_from(row: CredentialRow) -> Result<Self, StorageError> {
        let remaining = |until: DateTime<Utc>| (until - row.read_at).to_std().unwrap_or_default();
        Ok(Self {
            expires_at: row.valid_until.map(|until| Instant::now() + remaining(until)),
            id: row.id,
            registry: RegistryScope::parse(&row.registry).map_err(corrupt(TABLE, row.id, "registry"))?,
            name: row.name,
            username: row.username,
            email: row.email,
            labels: row.labels.0,
            password: Sealed { key_id: row.password_key_id, bytes: row.password },
            plain_http: row.plain_http,
            password_ends_with_whitespace: row.password_ends_with_whitespace,
            ca_digest: row.ca_digest.and_then(|digest| digest.try_into().ok()),
            valid_until: row.valid_until,
        })
    }
}

/// Credential of an account with its sealed password.
#[derive(Debug)]
pub struct SealedCredential {
    /// Id of the account, to which the ciphertext is bound.
    pub id: Uuid,
    /// Name of the account.
    pub name: String,
    /// Registry, and optionally the path in it, that the credential is valid for.
    pub registry: RegistryScope,
    /// User name of the login.
    pub username: String,
    /// E-mail address.
    pub email: Option<String>,
    /// Labels of the account.
    pub labels: BTreeMap<String, String>,
    /// Sealed password.
    pub password: Sealed,
    /// Whether the password ends with white space.
    pub password_ends_with_whitespace: bool,
    /// End of a minted login; none for a login that a caller set.
    pub valid_until: Option<DateTime<Utc>>,
    /// The same moment by the process' monotonic clock, since its wall clock may be wrong.
    expires_at: Option<Instant>,
    plain_http: bool,
    ca_digest: Option<[u8; 32]>,
}

impl SealedCredential {
    /// Whether the login is a minted one that has expired.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.expires_at.is_some_and(|end| end <= Instant::now())
    }

    /// Returns the slot of the password.
    #[must_use]
    pub fn slot(&self) -> Slot {
        let ca = self.ca_digest.map(Ca::Digest);
        let destination = RegistryDestination { authority: self.registry.authority(), plain_http: self.plain_http, ca };
        SealedColumn::account_password(self.id, &destination)
    }
}

/// Finds the credentials of accounts by name, in any order. Unknown names are omitted.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.find_credentials", skip_all)]
pub async fn find_credentials(conn: &mut PgConnection, names: &[&str]) -> Result<Vec<SealedCredential>, StorageError> {
    let rows = match names {
        // Separate statement for the most common case: Postgres caches its plan, and replans the
        // one for arrays each time.
        [name] => {
            sqlx::query_as!(
                CredentialRow,
                r#"SELECT id, name, registry, username, email, labels AS "labels: _", password, password_key_id,
                       plain_http, password_ends_with_whitespace, sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest,
                   (SELECT valid_until FROM account_mints WHERE account_id = registry_accounts.id) AS valid_until, now() AS "read_at!"
                   FROM registry_accounts WHERE name = $1"#,
                name,
            )
            .fetch_all(conn)
            .await?
        }
        names => {
            sqlx::query_as!(
                CredentialRow,
                r#"SELECT id, name, registry, username, email, labels AS "labels: _", password, password_key_id,
                       plain_http, password_ends_with_whitespace, sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest,
                   (SELECT valid_until FROM account_mints WHERE account_id = registry_accounts.id) AS valid_until, now() AS "read_at!"
                   FROM registry_accounts WHERE name = ANY($1::text[])"#,
                names as _,
            )
            .fetch_all(conn)
            .await?
        }
    };
    rows.into_iter().map(SealedCredential::try_from).collect()
}

/// Finds the credentials of the granted accounts that match a selector, by name, at most `limit`.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.select_credentials", skip_all)]
pub async fn select_credentials(
    conn: &mut PgConnection,
    grants: &Grants,
    selector: &LabelSelector,
    limit: usize,
) -> Result<Vec<SealedCredential>, StorageError> {
    let Ranges { low, high } = grants.account_ranges();
    // SQL evaluates grants and `matchLabels`. `LabelSelector` evaluates the other expressions, row
    // by row.
    let mut rows = sqlx::query_as!(
        CredentialRow,
        r#"SELECT id, name, registry, username, email, labels AS "labels: _", password, password_key_id,
               plain_http, password_ends_with_whitespace, sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest,
                   (SELECT valid_until FROM account_mints WHERE account_id = registry_accounts.id) AS valid_until, now() AS "read_at!"
           FROM registry_accounts
           WHERE labels @> $1 AND (
               EXISTS (
                   SELECT FROM unnest($2::text[], $3::text[]) AS granted (low, high)
                   WHERE name >= granted.low COLLATE "C" AND name < granted.high COLLATE "C"
               )
               OR labels @> ANY($4::jsonb[])
           )
           ORDER BY name"#,
        Json(selector.match_labels().as_map()) as _,
        &low,
        &high,
        &label_grants(grants) as _,
    )
    .fetch(conn);
    let mut selected = Vec::new();
    while selected.len() < limit
        && let Some(row) = rows.try_next().await?
    {
        if selector.matches(&row.labels.0) {
            selected.push(SealedCredential::try_from(row)?);
        }
    }
    Ok(selected)
}

/// Finds the credentials of the granted accounts that have one of these registry scopes, in any
/// order, at most `limit`.
///
/// Reads at most `limit` rows per scope and rule of the grants, by an index of registries and names.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.match_credentials", skip_all)]
pub async fn match_credentials(
    conn: &mut PgConnection,
    grants: &Grants,
    scopes: &[String],
    limit: i64,
) -> Result<Vec<SealedCredential>, StorageError> {
    let Ranges { low, high } = grants.account_ranges();
    sqlx::query_as!(
        CredentialRow,
        r#"SELECT id, name, registry, username, email, labels AS "labels: _", password, password_key_id,
               plain_http, password_ends_with_whitespace, sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest,
                   (SELECT valid_until FROM account_mints WHERE account_id = registry_accounts.id) AS valid_until, now() AS "read_at!"
           FROM registry_accounts
           WHERE id = ANY (ARRAY(
               SELECT one.id
               FROM unnest($1::text[]) AS scope (registry)
               CROSS JOIN unnest($2::text[], $3::text[]) AS granted (low, high)
               CROSS JOIN LATERAL (
                   SELECT id FROM registry_accounts
                   WHERE registry = scope.registry
                       AND name >= granted.low COLLATE "C" AND name < granted.high COLLATE "C"
                   ORDER BY name LIMIT $5
               ) AS one
               UNION
               SELECT one.id
               FROM unnest($1::text[]) AS scope (registry)
               CROSS JOIN unnest($4::jsonb[]) AS granted (labels)
               CROSS JOIN LATERAL (
                   SELECT id FROM registry_accounts
                   WHERE registry = scope.registry AND labels @> granted.labels
                   ORDER BY name LIMIT $5
               ) AS one
               LIMIT $5
           ))"#,
        scopes,
        &low,
        &high,
        &label_grants(grants) as _,
        limit,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(SealedCredential::try_from)
    .collect()
}

/// Returns the granted labels, one JSON object per rule.
pub(super) fn label_grants(grants: &Grants) -> Vec<Json<&BTreeMap<String, String>>> {
    grants.account_labels().into_iter().map(Json).collect()
}
