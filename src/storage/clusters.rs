//! Clusters and their sealed credentials.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    domain::{
        cluster::{AuthType, CaCertificate, ClusterConnection, ServerUrl, ServiceAccountRef},
        grants::{Grants, Ranges},
        listing::{ListRequest, Listed, NamePart, Order, SortKey},
        names::{Name, NamespaceName, ServiceAccountName},
        sealed::{Ca, ClusterDestination, Sealed, Slot},
    },
    storage::{
        PgConnection, StorageError, corrupt,
        lists::{self, Checked, Key, Source, Sql},
        on_name_taken,
        sealed::SealedColumn,
    },
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
    /// End of the credential, if known.
    pub expires_at: Option<DateTime<Utc>>,
    /// Renewal of the token, for [`AuthType::ServiceAccount`].
    pub renewal: Option<Renewal>,
    /// Number of renewals of credentials of this cluster.
    pub renewals: i64,
    /// Whether an `http://` URL is allowed.
    pub allow_plain_http: bool,
    /// Version, incremented by every change.
    pub version: i64,
    /// Creation time, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// Time of the last change, by the database's clock.
    pub updated_at: DateTime<Utc>,
}

/// Renewal of a token.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// `ServiceAccount` whose tokens replace the credential.
    pub account: ServiceAccountRef,
    /// Time of the next attempt.
    pub next_at: Option<DateTime<Utc>>,
    /// Failed attempts since the last renewal.
    pub failures: i32,
    /// Reason of the last failure.
    pub error: Option<String>,
}

impl StoredCluster {
    /// Number that every change of the connection or the credential increments, unlike `version`,
    /// which callers see.
    #[must_use]
    pub const fn revision(&self) -> i64 {
        self.version + self.renewals
    }

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
    credential_version: Option<i64>,
    credential_expires_at: Option<DateTime<Utc>>,
    service_account_namespace: Option<String>,
    service_account_name: Option<String>,
    credential_renewals: i64,
    next_renewal_at: Option<DateTime<Utc>>,
    renewal_failures: i32,
    renewal_error: Option<String>,
}

impl ClusterRow {
    /// Whether the columns about the credential describe the current one. An earlier release leaves
    /// them at an older version.
    fn is_described(&self) -> bool {
        self.credential_version == Some(self.version)
    }

    fn renewal(&self) -> Result<Option<Renewal>, StorageError> {
        let (Some(namespace), Some(name), true) =
            (&self.service_account_namespace, &self.service_account_name, self.is_described())
        else {
            return Ok(None);
        };
        let namespace = NamespaceName::parse(namespace);
        let name = ServiceAccountName::parse(name);
        let account = ServiceAccountRef {
            namespace: namespace.map_err(corrupt(TABLE, self.id, "service_account_namespace"))?,
            name: name.map_err(corrupt(TABLE, self.id, "service_account_name"))?,
        };
        let (next_at, failures, error) = (self.next_renewal_at, self.renewal_failures, self.renewal_error.clone());
        Ok(Some(Renewal { account, next_at, failures, error }))
    }
}

impl TryFrom<ClusterRow> for StoredCluster {
    type Error = StorageError;

    fn try_from(row: ClusterRow) -> Result<Self, StorageError> {
        let renewal = row.renewal()?;
        let auth_type = row.auth_type.parse().map_err(corrupt(TABLE, row.id, "auth_type"))?;
        Ok(Self {
            auth_type: if renewal.is_some() { AuthType::ServiceAccount } else { auth_type },
            expires_at: row.credential_expires_at.filter(|_| row.is_described()),
            renewals: row.credential_renewals,
            renewal,
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

/// Authentication as the column has it. A renewed token is a token to an earlier release.
const fn stored_type(auth_type: AuthType) -> &'static str {
    match auth_type {
        AuthType::Token | AuthType::ServiceAccount => AuthType::Token.as_str(),
        AuthType::ClientCertificate | AuthType::InCluster | AuthType::None => auth_type.as_str(),
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
    let account = connection.auth.service_account();
    sqlx::query_as!(
        ClusterRow,
        "INSERT INTO clusters
             (id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate,
              credential, credential_key_id, allow_plain_http, credential_version, credential_expires_at,
              service_account_namespace, service_account_name, next_renewal_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 1, $11, $12, $13,
             CASE WHEN $12::text IS NOT NULL THEN now() END)
         RETURNING id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at, credential_version,
             credential_expires_at, service_account_namespace, service_account_name, credential_renewals, next_renewal_at,
             renewal_failures, renewal_error",
        id,
        name.as_str(),
        connection.server.as_ref().map(ServerUrl::as_str),
        connection.ca_certificate.as_ref().map(CaCertificate::as_pem),
        connection.tls_server_name,
        stored_type(connection.auth.auth_type()),
        connection.auth.certificate(),
        credential.map(|sealed| sealed.bytes.as_slice()),
        credential.map(|sealed| sealed.key_id.as_str()),
        connection.allow_plain_http,
        connection.auth.expires_at(),
        account.map(|account| account.namespace.as_str()),
        account.map(|account| account.name.as_str()),
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
             credential_key_id, allow_plain_http, version, created_at, updated_at, credential_version,
             credential_expires_at, service_account_namespace, service_account_name, credential_renewals, next_renewal_at,
             renewal_failures, renewal_error
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
             credential_key_id, allow_plain_http, version, created_at, updated_at, credential_version,
             credential_expires_at, service_account_namespace, service_account_name, credential_renewals, next_renewal_at,
             renewal_failures, renewal_error
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
             credential_key_id, allow_plain_http, version, created_at, updated_at, credential_version,
             credential_expires_at, service_account_namespace, service_account_name, credential_renewals, next_renewal_at,
             renewal_failures, renewal_error
         FROM clusters WHERE name = $1 FOR UPDATE",
        name.as_str()
    )
    .fetch_optional(conn)
    .await?
    .map(StoredCluster::try_from)
    .transpose()
}

/// Keeps a cluster from being removed until the transaction ends. Returns whether there is one.
#[tracing::instrument(level = "debug", name = "db.clusters.lock_existing", skip_all, fields(cluster.id = %id))]
pub async fn lock_existing(conn: &mut PgConnection, id: Uuid) -> Result<bool, StorageError> {
    let found = sqlx::query_scalar!("SELECT id FROM clusters WHERE id = $1 FOR KEY SHARE", id);
    Ok(found.fetch_optional(conn).await?.is_some())
}

/// Lists the granted clusters whose name contains a part.
///
/// By name and without a part, a page is full whatever the grants are. Otherwise it reads a bounded
/// number of clusters that are hidden from the caller.
pub async fn list(
    conn: &mut PgConnection,
    grants: &Grants,
    request: &ListRequest,
    name_part: Option<&NamePart>,
) -> Result<Listed<StoredCluster>, StorageError> {
    let by_name = Order { key: SortKey::Name, descending: false };
    let includes_all = grants.include_all_clusters();
    if !includes_all && request.order == by_name && name_part.is_none() {
        return list_by_grants(conn, grants, request).await;
    }
    let checks = |sql: &mut Sql| {
        if let Some(part) = name_part {
            lists::push_name_part(sql, part.as_str());
        }
        if !includes_all {
            let Ranges { low, high } = grants.cluster_ranges();
            sql.push(" AND EXISTS (SELECT FROM unnest(").push_bind(low).push("::text[], ").push_bind(high);
            sql.push(r#"::text[]) AS granted (low, high) WHERE name >= low COLLATE "C" AND name < high COLLATE "C")"#);
        }
    };
    let rows = if includes_all { lists::SEARCHED_MAX } else { lists::HIDDEN_MAX };
    let checked = (!includes_all || name_part.is_some()).then_some(Checked { conditions: &checks, rows });
    let source = Source { table: TABLE, key: Key::Name, indexed: &|_| (), checked };
    let page = lists::page(conn, &source, request).await?;
    let clusters = find_many(conn, &page.items).await?;
    Ok(lists::arrange(page, clusters, |cluster| cluster.name.clone()))
}

/// Finds clusters by name. Unknown names are omitted.
#[tracing::instrument(level = "debug", name = "db.clusters.find_many", skip_all)]
async fn find_many(conn: &mut PgConnection, names: &[String]) -> Result<Vec<StoredCluster>, StorageError> {
    sqlx::query_as!(
        ClusterRow,
        "SELECT id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at, credential_version,
             credential_expires_at, service_account_namespace, service_account_name, credential_renewals, next_renewal_at,
             renewal_failures, renewal_error
         FROM clusters WHERE name = ANY($1)",
        names,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(StoredCluster::try_from)
    .collect()
}

/// Lists the granted clusters by name.
#[tracing::instrument(level = "debug", name = "db.clusters.list_by_grants", skip_all)]
async fn list_by_grants(
    conn: &mut PgConnection,
    grants: &Grants,
    request: &ListRequest,
) -> Result<Listed<StoredCluster>, StorageError> {
    let after = request.after.as_ref().map(|after| after.key.as_str());
    let Ranges { low, high } = grants.cluster_ranges().after(after);
    // Takes the first rows of each grant by the index, as the list of accounts does.
    let rows = sqlx::query_as!(
        ClusterRow,
        r#"SELECT id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
               credential_key_id, allow_plain_http, version, created_at, updated_at, credential_version,
               credential_expires_at, service_account_namespace, service_account_name, credential_renewals,
               next_renewal_at, renewal_failures, renewal_error
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
        lists::wanted(request),
        &low,
        &high,
    )
    .fetch_all(conn)
    .await?;
    let clusters = rows.into_iter().map(StoredCluster::try_from).collect::<Result<_, _>>()?;
    Ok(lists::cut(clusters, request, |cluster: &StoredCluster| cluster.name.clone()))
}

/// Stores the changed connection of a cluster and increments its version.
#[tracing::instrument(level = "debug", name = "db.clusters.update", skip_all, fields(cluster.id = %id))]
pub async fn update(
    conn: &mut PgConnection,
    id: Uuid,
    connection: &ClusterConnection,
    credential: Option<&Sealed>,
) -> Result<StoredCluster, StorageError> {
    let account = connection.auth.service_account();
    sqlx::query_as!(
        ClusterRow,
        "UPDATE clusters
         SET server = $2, ca_certificate = $3, tls_server_name = $4, auth_type = $5,
             client_certificate = $6, credential = $7, credential_key_id = $8, allow_plain_http = $9,
             version = version + 1, updated_at = now(), credential_version = version + 1, credential_expires_at = $10,
             expiry_warned_days = CASE
                 WHEN credential_version = version AND credential_expires_at = $10 THEN expiry_warned_days
             END,
             service_account_namespace = $11, service_account_name = $12,
             next_renewal_at = CASE WHEN $11::text IS NOT NULL THEN now() END,
             renewal_failures = 0, renewal_error = NULL
         WHERE id = $1
         RETURNING id, name, server, ca_certificate, tls_server_name, auth_type, client_certificate, credential,
             credential_key_id, allow_plain_http, version, created_at, updated_at, credential_version,
             credential_expires_at, service_account_namespace, service_account_name, credential_renewals, next_renewal_at,
             renewal_failures, renewal_error",
        id,
        connection.server.as_ref().map(ServerUrl::as_str),
        connection.ca_certificate.as_ref().map(CaCertificate::as_pem),
        connection.tls_server_name,
        stored_type(connection.auth.auth_type()),
        connection.auth.certificate(),
        credential.map(|sealed| sealed.bytes.as_slice()),
        credential.map(|sealed| sealed.key_id.as_str()),
        connection.allow_plain_http,
        connection.auth.expires_at(),
        account.map(|account| account.namespace.as_str()),
        account.map(|account| account.name.as_str()),
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
