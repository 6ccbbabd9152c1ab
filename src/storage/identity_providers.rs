//! Identity providers.

use chrono::{DateTime, Utc};
use sqlx::types::Json;
use uuid::Uuid;

use crate::{
    domain::{
        cluster::CaCertificate,
        identity_provider::{AuthMethod, ClientId, Issuer, ProviderConfig, ProviderDocument, RuleDocument},
        listing::{ListRequest, Listed, NamePart},
        names::Name,
        sealed::{Ca, LoginDestination, Sealed, Slot},
    },
    storage::{
        PgConnection, StorageError, corrupt,
        lists::{self, Checked, Key, Source, Sql},
        on_name_taken,
        sealed::SealedColumn,
    },
};

pub(super) const TABLE: &str = "identity_providers";

/// Stored identity provider.
#[derive(Debug, Clone)]
pub struct StoredProvider {
    /// Immutable identifier.
    pub id: Uuid,
    /// Unique name.
    pub name: String,
    /// Configuration.
    pub config: ProviderConfig,
    /// Cluster that reviews the tokens; `None` for `oidc`.
    pub cluster: Option<ReviewingCluster>,
    /// Version, incremented by every change.
    pub version: i64,
    /// Creation time, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// Time of the last change, by the database's clock.
    pub updated_at: DateTime<Utc>,
}

/// Cluster that reviews a provider's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReviewingCluster {
    /// Id of the cluster.
    pub id: Uuid,
    /// Version of the cluster.
    pub version: i64,
}

struct ProviderRow {
    id: Uuid,
    name: String,
    provider_type: String,
    issuer: Option<String>,
    ca_certificate: Option<String>,
    cluster_id: Option<Uuid>,
    cluster_name: Option<String>,
    cluster_version: Option<i64>,
    audience: String,
    allow_multiple_audiences: bool,
    token_types: Vec<String>,
    rules: Json<Vec<RuleDocument>>,
    login_client_id: Option<String>,
    version: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl TryFrom<ProviderRow> for StoredProvider {
    type Error = StorageError;

    fn try_from(row: ProviderRow) -> Result<Self, StorageError> {
        let document = ProviderDocument {
            provider_type: row.provider_type.parse().map_err(corrupt(TABLE, row.id, "type"))?,
            issuer: row.issuer,
            ca_certificate: row.ca_certificate,
            cluster: row.cluster_name,
            audience: row.audience,
            allow_multiple_audiences: row.allow_multiple_audiences,
            token_types: row.token_types,
            rules: row.rules.0,
            login: row.login_client_id,
        };
        let config = ProviderConfig::parse_stored(document)
            .map_err(|errors| corrupt(TABLE, row.id, "settings")(errors.into()))?;
        let cluster = row.cluster_id.zip(row.cluster_version).map(|(id, version)| ReviewingCluster { id, version });
        Ok(Self {
            id: row.id,
            name: row.name,
            config,
            cluster,
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }
}

pub(super) fn issuer(config: &ProviderConfig) -> Option<&str> {
    match &config.auth_method {
        AuthMethod::Oidc { issuer, .. } => Some(Issuer::as_str(issuer)),
        AuthMethod::TokenReview { .. } => None,
    }
}

pub(super) fn ca_certificate(config: &ProviderConfig) -> Option<&str> {
    match &config.auth_method {
        AuthMethod::Oidc { ca_certificate, .. } => ca_certificate.as_ref().map(CaCertificate::as_pem),
        AuthMethod::TokenReview { .. } => None,
    }
}

fn rules(config: &ProviderConfig) -> Json<Vec<RuleDocument>> {
    Json(config.rules.iter().map(RuleDocument::from).collect())
}

/// Returns the slot of the secret of a provider's client; `None` if people do not sign in through it.
#[must_use]
pub fn login_slot(id: Uuid, config: &ProviderConfig) -> Option<Slot> {
    let destination = LoginDestination {
        issuer: issuer(config)?,
        ca: ca_certificate(config).map(Ca::Pem),
        client_id: config.login.as_ref()?.as_str(),
    };
    Some(SealedColumn::login_secret(id, &destination))
}

/// Maps the unique constraints: a name is unique, and so is the provider that accepts a token.
fn on_taken(error: sqlx::Error) -> StorageError {
    let constraint = error.as_database_error().and_then(sqlx::error::DatabaseError::constraint);
    match constraint {
        Some("identity_providers_issuer_audience_key" | "identity_providers_audience_key") => {
            StorageError::AudienceTaken
        }
        _ => on_name_taken("identity_providers_name_key")(error),
    }
}

/// Inserts a provider. `cluster_id` is the cluster that reviews its tokens.
///
/// # Errors
///
/// - [`StorageError::NameTaken`] if the name is in use.
/// - [`StorageError::AudienceTaken`] if another provider would accept the same tokens.
#[tracing::instrument(level = "debug", name = "db.identity_providers.insert", skip_all, fields(provider.id = %id))]
pub async fn insert(
    conn: &mut PgConnection,
    id: Uuid,
    name: &Name,
    config: &ProviderConfig,
    cluster_id: Option<Uuid>,
) -> Result<(), StorageError> {
    sqlx::query!(
        "INSERT INTO identity_providers
             (id, name, type, issuer, ca_certificate, cluster_id, audience, rules, allow_multiple_audiences, token_types)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        id,
        name.as_str(),
        config.auth_method.provider_type().as_str(),
        issuer(config),
        ca_certificate(config),
        cluster_id,
        config.audience.as_str(),
        rules(config) as _,
        config.allow_multiple_audiences,
        &config.token_types,
    )
    .execute(conn)
    .await
    .map_err(on_taken)?;
    Ok(())
}

/// Finds a provider by name.
#[tracing::instrument(level = "debug", name = "db.identity_providers.find", skip_all)]
pub async fn find(conn: &mut PgConnection, name: &Name) -> Result<Option<StoredProvider>, StorageError> {
    sqlx::query_as!(
        ProviderRow,
        r#"SELECT p.id, p.name, p.type AS provider_type, p.issuer, p.ca_certificate, p.cluster_id,
               c.name AS "cluster_name?", c.version AS "cluster_version?", p.audience,
               p.allow_multiple_audiences, p.token_types, p.rules AS "rules: _", p.login_client_id, p.version, p.created_at,
               p.updated_at
           FROM identity_providers p LEFT JOIN clusters c ON c.id = p.cluster_id
           WHERE p.name = $1"#,
        name.as_str(),
    )
    .fetch_optional(conn)
    .await?
    .map(StoredProvider::try_from)
    .transpose()
}

/// Finds a provider by name and keeps others from changing it until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.identity_providers.lock", skip_all)]
pub async fn lock(conn: &mut PgConnection, name: &Name) -> Result<Option<StoredProvider>, StorageError> {
    sqlx::query_as!(
        ProviderRow,
        r#"SELECT p.id, p.name, p.type AS provider_type, p.issuer, p.ca_certificate, p.cluster_id,
               c.name AS "cluster_name?", c.version AS "cluster_version?", p.audience,
               p.allow_multiple_audiences, p.token_types, p.rules AS "rules: _", p.login_client_id, p.version, p.created_at,
               p.updated_at
           FROM identity_providers p LEFT JOIN clusters c ON c.id = p.cluster_id
           WHERE p.name = $1 FOR UPDATE OF p"#,
        name.as_str(),
    )
    .fetch_optional(conn)
    .await?
    .map(StoredProvider::try_from)
    .transpose()
}

/// Lists the providers whose name contains a part.
pub async fn list(
    conn: &mut PgConnection,
    request: &ListRequest,
    name_part: Option<&NamePart>,
) -> Result<Listed<StoredProvider>, StorageError> {
    let checks = |sql: &mut Sql| {
        if let Some(part) = name_part {
            lists::push_name_part(sql, part.as_str());
        }
    };
    let checked = name_part.is_some().then_some(Checked { conditions: &checks, rows: lists::SEARCHED_MAX });
    let source = Source { table: TABLE, key: Key::Name, indexed: &|_| (), checked };
    let page = lists::page(conn, &source, request).await?;
    let providers = find_many(conn, &page.items).await?;
    Ok(lists::arrange(page, providers, |provider| provider.name.clone()))
}

/// Finds providers by name. Unknown names are omitted.
#[tracing::instrument(level = "debug", name = "db.identity_providers.find_many", skip_all)]
async fn find_many(conn: &mut PgConnection, names: &[String]) -> Result<Vec<StoredProvider>, StorageError> {
    sqlx::query_as!(
        ProviderRow,
        r#"SELECT p.id AS "id!", p.name AS "name!", p.type AS "provider_type!", p.issuer, p.ca_certificate, p.cluster_id,
               c.name AS "cluster_name?", c.version AS "cluster_version?", p.audience AS "audience!",
               p.allow_multiple_audiences AS "allow_multiple_audiences!", p.token_types AS "token_types!",
               p.rules AS "rules!: _", p.login_client_id, p.version AS "version!", p.created_at AS "created_at!",
               p.updated_at AS "updated_at!"
           FROM identity_providers p LEFT JOIN clusters c ON c.id = p.cluster_id
           WHERE p.name = ANY($1)"#,
        names,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(StoredProvider::try_from)
    .collect()
}

/// Finds the providers for the issuer and audiences that a token claims, by name.
///
/// An `oidc` provider must match both, a `tokenReview` provider only the audience. Each audience
/// matches at most one provider per type. Rows that do not parse are logged and omitted, so that
/// they do not affect other providers.
#[tracing::instrument(level = "debug", name = "db.identity_providers.find_for_token", skip_all)]
pub async fn find_for_token(
    conn: &mut PgConnection,
    issuer: Option<&str>,
    audiences: &[String],
) -> Result<Vec<StoredProvider>, StorageError> {
    let found = sqlx::query_as!(
        ProviderRow,
        r#"SELECT p.id, p.name, p.type AS provider_type, p.issuer, p.ca_certificate, p.cluster_id,
               c.name AS "cluster_name?", c.version AS "cluster_version?", p.audience,
               p.allow_multiple_audiences, p.token_types, p.rules AS "rules: _", p.login_client_id, p.version, p.created_at,
               p.updated_at
           FROM identity_providers p LEFT JOIN clusters c ON c.id = p.cluster_id
           WHERE (p.type = 'oidc' AND p.issuer = $1 AND p.audience = ANY ($2))
               OR (p.type = 'tokenReview' AND p.audience = ANY ($2))
           ORDER BY p.name"#,
        issuer,
        audiences,
    )
    .fetch_all(conn)
    .await?;
    let log = |error: &StorageError| tracing::error!(%error, "identity provider ignored");
    Ok(found.into_iter().filter_map(|row| StoredProvider::try_from(row).inspect_err(log).ok()).collect())
}

/// Lists the names of the providers whose tokens a cluster reviews.
#[tracing::instrument(level = "debug", name = "db.identity_providers.names_by_cluster", skip_all)]
pub async fn names_by_cluster(conn: &mut PgConnection, cluster_id: Uuid) -> Result<Vec<String>, StorageError> {
    let names =
        sqlx::query_scalar!("SELECT name FROM identity_providers WHERE cluster_id = $1 ORDER BY name", cluster_id);
    Ok(names.fetch_all(conn).await?)
}

/// Whether the tokens of a provider have this audience.
#[tracing::instrument(level = "debug", name = "db.identity_providers.have_audience", skip_all)]
pub async fn have_audience(conn: &mut PgConnection, audience: &str) -> Result<bool, StorageError> {
    let found = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM identity_providers WHERE audience = $1) AS "found!""#,
        audience
    );
    Ok(found.fetch_one(conn).await?)
}

/// Stores the changed configuration of a provider and increments its version.
///
/// # Errors
///
/// [`StorageError::AudienceTaken`] if another provider would accept the same tokens.
#[tracing::instrument(level = "debug", name = "db.identity_providers.update", skip_all, fields(provider.id = %id))]
pub async fn update(
    conn: &mut PgConnection,
    id: Uuid,
    config: &ProviderConfig,
    cluster_id: Option<Uuid>,
) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE identity_providers
         SET issuer = $2, ca_certificate = $3, cluster_id = $4, audience = $5, rules = $6,
             allow_multiple_audiences = $7, token_types = $8,
             version = version + 1, updated_at = now()
         WHERE id = $1",
        id,
        issuer(config),
        ca_certificate(config),
        cluster_id,
        config.audience.as_str(),
        rules(config) as _,
        config.allow_multiple_audiences,
        &config.token_types,
    )
    .execute(conn)
    .await
    .map_err(on_taken)?;
    Ok(())
}

/// Finds a provider by id.
#[tracing::instrument(level = "debug", name = "db.identity_providers.find_by_id", skip_all)]
pub async fn find_by_id(conn: &mut PgConnection, id: Uuid) -> Result<Option<StoredProvider>, StorageError> {
    sqlx::query_as!(
        ProviderRow,
        r#"SELECT p.id, p.name, p.type AS provider_type, p.issuer, p.ca_certificate, p.cluster_id,
               c.name AS "cluster_name?", c.version AS "cluster_version?", p.audience,
               p.allow_multiple_audiences, p.token_types, p.rules AS "rules: _", p.login_client_id, p.version, p.created_at,
               p.updated_at
           FROM identity_providers p LEFT JOIN clusters c ON c.id = p.cluster_id
           WHERE p.id = $1"#,
        id,
    )
    .fetch_optional(conn)
    .await?
    .map(StoredProvider::try_from)
    .transpose()
}

/// Lists the names of the first `limit` providers through which people sign in.
#[tracing::instrument(level = "debug", name = "db.identity_providers.names_for_login", skip_all)]
pub async fn names_for_login(conn: &mut PgConnection, limit: i64) -> Result<Vec<String>, StorageError> {
    let names = sqlx::query_scalar!(
        "SELECT name FROM identity_providers WHERE login_client_id IS NOT NULL ORDER BY name LIMIT $1",
        limit,
    );
    Ok(names.fetch_all(conn).await?)
}

/// Finds the sealed secret of the client for signing in.
#[tracing::instrument(level = "debug", name = "db.identity_providers.find_login_secret", skip_all)]
pub async fn find_login_secret(conn: &mut PgConnection, id: Uuid) -> Result<Option<Sealed>, StorageError> {
    let row = sqlx::query!(
        r#"SELECT login_secret AS "bytes!", login_secret_key_id AS "key_id!"
           FROM identity_providers WHERE id = $1 AND login_secret IS NOT NULL"#,
        id,
    );
    Ok(row.fetch_optional(conn).await?.map(|row| Sealed { key_id: row.key_id, bytes: row.bytes }))
}

/// Stores the client for signing in, or removes it.
#[tracing::instrument(level = "debug", name = "db.identity_providers.set_login", skip_all, fields(provider.id = %id))]
pub async fn set_login(
    conn: &mut PgConnection,
    id: Uuid,
    login: Option<(&ClientId, &Sealed)>,
) -> Result<(), StorageError> {
    let sealed = login.map(|(_, sealed)| sealed);
    sqlx::query!(
        "UPDATE identity_providers SET login_client_id = $2, login_secret = $3, login_secret_key_id = $4 WHERE id = $1",
        id,
        login.map(|(client, _)| client.as_str()),
        sealed.map(|sealed| sealed.bytes.as_slice()),
        sealed.map(|sealed| sealed.key_id.as_str()),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Deletes a provider.
#[tracing::instrument(level = "debug", name = "db.identity_providers.delete", skip_all, fields(provider.id = %id))]
pub async fn delete(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM identity_providers WHERE id = $1", id).execute(conn).await?;
    Ok(())
}
