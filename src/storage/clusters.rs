//! Clusters and their sealed credentials.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    domain::{
        cluster::{AuthType, CaCertificate, ClusterConnection, ServerUrl},
        grants::{Grants, Ranges},
        names::Name,
        sealed::{Ca, ClusterDestination, Sealed, Slot},
    },
    storage::{PageRequest, PgConnection, StorageError, corrupt, on_name_taken, sealed::SealedColumn},
};

/// Name of the table, part of the associated data of sealed credentials.
pub const TABLE: &str = "clusters";

/// Stored cluster with its sealed credential.
#[derive(Debug, Clone)]
pub struct StoredCluster {
    /// Immutable identifier, to which the ciphertext is bound.
    pub id: Uuid,
    /// Unique name.
    pub name: String,
    /// URL of the API server; `None` for `inCluster`.
    pub server: Option<String>,
    /// PEM of the CA that signed the API server's certificate.
    pub ca_certificate: Option<String>,
    /// Name in the API server's certificate, if not the host.
    pub tls_server_name: Option<String>,
    /// Authentication to the API server.
    pub auth_type: AuthType,
    /// PEM of the client certificate.
    pub client_certificate: Option<String>,
    /// Sealed token or private key, if the authentication has one.
    pub credential: Option<Sealed>,
    /// Whether an `http://` URL is allowed.
    pub allow_plain_http: bool,
    /// Version, incremented by every change.
    pub version: i64,
    /// Creation time, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// Time of the last change, by the database's clock.
    pub updated_at: DateTime<Utc>,
}

impl StoredCluster {
    /// Returns the slot of the credential.
    #[must_use]
    pub fn slot(&self) -> Slot {
        let destination = ClusterDestination {
            server: self.server.as_deref(),
            ca: self.ca_certificate.as_deref().map(Ca::Pem),
            tls_server_name: self.tls_server_name.as_deref(),
        };
        SealedColumn::cluster_credential(self.id, &destination)
    }
}

struct ClusterRow {
    id: Uuid,
    name: String,
    server: Option<String>,
    ca_certificate: Option<String>,
    tls_server_name: Option<String>,
    auth_type: String,
    client_certificate: Option<String>,
    credential: Option<Vec<u8>>,
    credential_key_id: Option<String>,
    allow_plain_http: bool,
    version: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl TryFrom<ClusterRow> for StoredCluster {
    type Error = StorageError;

    fn try_from(row: ClusterRow) -> Result<Self, StorageError> {
        Ok(Self {
            auth_type: row.auth_type.parse().map_err(corrupt(TABLE, row.id, "auth_type"))?,
            credential: row.credential.zip(row.credential_key_id).map(|(bytes, key_id)| Sealed { key_id, bytes }),
            id: row.id,
            name: row.name,
            server: row.server,
            ca_certificate: row.ca_certificate,
            tls_server_name: row.tls_server_name,
            client_certificate: row.client_certificate,
            allow_plain_http: row.allow_plain_http,
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }
}

/// Inserts a cluster with its sealed credential.
///
/// # Errors
///
/// [`StorageError::NameTaken`] if the name is in use.
#[tracing::instrument(level = "debug", name = "db.clusters.insert", skip_all, fields(cluster.id = %id))]
pub async fn insert(
    conn: &mut PgConnection,
    id: Uuid,
    name: &Name,
    connection: &ClusterConnection,
    credential: Option<&Sealed>,
) -> Result<StoredCluster, StorageError> {
    sqlx::query_as!(
        ClusterRow,
        "INSERT INTO clusters
             (id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate,
              credential, credential_key_id, allow_plain_http)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         RETURNING id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at",
        id,
        name.as_str(),
        connection.server.as_ref().map(ServerUrl::as_str),
        connection.ca_certificate.as_ref().map(CaCertificate::as_pem),
        connection.tls_server_name,
        connection.auth.auth_type().as_str(),
        connection.auth.certificate(),
        credential.map(|sealed| sealed.bytes.as_slice()),
        credential.map(|sealed| sealed.key_id.as_str()),
        connection.allow_plain_http,
    )
    .fetch_one(conn)
    .await
    .map_err(on_name_taken("clusters_name_key"))?
    .try_into()
}

/// Finds a cluster by name.
#[tracing::instrument(level = "debug", name = "db.clusters.find", skip_all)]
pub async fn find(conn: &mut PgConnection, name: &Name) -> Result<Option<StoredCluster>, StorageError> {
    sqlx::query_as!(
        ClusterRow,
        "SELECT id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at
         FROM clusters WHERE name = $1",
        name.as_str()
    )
    .fetch_optional(conn)
    .await?
    .map(StoredCluster::try_from)
    .transpose()
}

/// Finds a cluster by id.
#[tracing::instrument(level = "debug", name = "db.clusters.find_by_id", skip_all, fields(cluster.id = %id))]
pub async fn find_by_id(conn: &mut PgConnection, id: Uuid) -> Result<Option<StoredCluster>, StorageError> {
    sqlx::query_as!(
        ClusterRow,
        "SELECT id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at
         FROM clusters WHERE id = $1",
        id
    )
    .fetch_optional(conn)
    .await?
    .map(StoredCluster::try_from)
    .transpose()
}

/// Finds a cluster by name and locks it until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.clusters.lock", skip_all)]
pub async fn lock(conn: &mut PgConnection, name: &Name) -> Result<Option<StoredCluster>, StorageError> {
    sqlx::query_as!(
        ClusterRow,
        "SELECT id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at
         FROM clusters WHERE name = $1 FOR UPDATE",
        name.as_str()
    )
    .fetch_optional(conn)
    .await?
    .map(StoredCluster::try_from)
    .transpose()
}

/// Lists the granted clusters by name.
#[tracing::instrument(level = "debug", name = "db.clusters.list", skip_all)]
pub async fn list(
    conn: &mut PgConnection,
    grants: &Grants,
    page: &PageRequest,
) -> Result<Vec<StoredCluster>, StorageError> {
    let Ranges { low, high } = grants.cluster_ranges().after(page.after.as_deref());
    // Takes the first rows of each grant by the index, as the list of accounts does.
    sqlx::query_as!(
        ClusterRow,
        r#"SELECT id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
               credential_key_id, allow_plain_http, version, created_at, updated_at
           FROM clusters
           WHERE id = ANY (ARRAY(
               SELECT one.id FROM (
                   SELECT DISTINCT one.id, one.name
                   FROM unnest($2::text[], $3::text[]) AS granted (low, high)
                   CROSS JOIN LATERAL (
                       SELECT id, name FROM clusters
                       WHERE name >= granted.low COLLATE "C" AND name < granted.high COLLATE "C"
                       ORDER BY name LIMIT $1
                   ) AS one
               ) AS one
               ORDER BY one.name LIMIT $1
           ))
           ORDER BY name"#,
        page.limit,
        &low,
        &high,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(StoredCluster::try_from)
    .collect()
}

/// Stores the changed connection of a cluster and increments its version.
#[tracing::instrument(level = "debug", name = "db.clusters.update", skip_all, fields(cluster.id = %id))]
pub async fn update(
    conn: &mut PgConnection,
    id: Uuid,
    connection: &ClusterConnection,
    credential: Option<&Sealed>,
) -> Result<StoredCluster, StorageError> {
    sqlx::query_as!(
        ClusterRow,
        "UPDATE clusters
         SET server = $2, ca_certificate = $3, tls_server_name = $4, auth_type = $5,
             client_certificate = $6, credential = $7, credential_key_id = $8, allow_plain_http = $9,
             version = version + 1, updated_at = now()
         WHERE id = $1
         RETURNING id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at",
        id,
        connection.server.as_ref().map(ServerUrl::as_str),
        connection.ca_certificate.as_ref().map(CaCertificate::as_pem),
        connection.tls_server_name,
        connection.auth.auth_type().as_str(),
        connection.auth.certificate(),
        credential.map(|sealed| sealed.bytes.as_slice()),
        credential.map(|sealed| sealed.key_id.as_str()),
        connection.allow_plain_http,
    )
    .fetch_one(conn)
    .await?
    .try_into()
}

/// Deletes a cluster.
#[tracing::instrument(level = "debug", name = "db.clusters.delete", skip_all, fields(cluster.id = %id))]
pub async fn delete(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM clusters WHERE id = $1", id).execute(conn).await?;
    Ok(())
}
