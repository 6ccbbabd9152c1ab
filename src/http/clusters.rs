//! `/v1/clusters`

use actix_web::{
    HttpResponse, delete, get, patch, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    clients::cluster::Check,
    domain::{
        caller::Call,
        cluster::{AuthType, ClusterAuth, ClusterConnection, ServiceAccountRef},
        docker_config::Warning,
        invalid::{FieldError, FieldErrors},
        listing::ResourceSort,
        names::{Name, NamespaceName, ServiceAccountName},
    },
    http::{
        auth::{
            Caller,
            permission::{ReadClusters, WriteClusters},
        },
        body::{Json, MergePatch},
        conditional::{self, IfMatch},
        idempotency::{Idempotency, IdempotencyKeyHeader},
        merge_patch,
        paging::{ListQuery, NameQuery, Page},
        path_name,
        problem::ApiError,
        query::{DryRunQuery, FromQuery, Query},
    },
    service::{
        CursorKey,
        clusters::{Clusters, ConnectionInput, credential_warnings},
    },
    storage::clusters::{Renewal, StoredCluster},
};

/// Authentication to an API server.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterAuthInput {
    /// Type of authentication.
    #[serde(rename = "type")]
    auth_type: AuthType,
    /// Bearer token, for `token` and `serviceAccount`. It is sealed before it is stored, and no
    /// response returns it. For `serviceAccount` it must be allowed to create tokens of that
    /// `ServiceAccount`, and is replaced by one at once.
    #[schema(value_type = Option<String>, format = Password)]
    token: Option<SecretString>,
    /// Namespace of the `ServiceAccount`, for `serviceAccount`.
    #[schema(example = "regcred")]
    namespace: Option<String>,
    /// Name of the `ServiceAccount`, for `serviceAccount`.
    #[schema(example = "regcred")]
    name: Option<String>,
    /// Certificate and intermediates (PEM), for `clientCertificate`.
    certificate: Option<String>,
    /// Private key (PEM), for `clientCertificate`. It is sealed before it is stored, and no
    /// response returns it.
    #[schema(value_type = Option<String>, format = Password)]
    key: Option<SecretString>,
}

impl ClusterAuthInput {
    /// Accepts exactly the fields of the type.
    fn parse(self) -> Result<ClusterAuth, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let needed = |field| {
            let takes: &[&str] = match self.auth_type {
                AuthType::Token => &["token"],
                AuthType::ServiceAccount => &["token", "namespace", "name"],
                AuthType::ClientCertificate => &["certificate", "key"],
                AuthType::InCluster | AuthType::None => &[],
            };
            takes.contains(&field)
        };
        let given = [
            ("token", self.token.is_some()),
            ("namespace", self.namespace.is_some()),
            ("name", self.name.is_some()),
            ("certificate", self.certificate.is_some()),
            ("key", self.key.is_some()),
        ];
        for (field, is_given) in given {
            match (needed(field), is_given) {
                (true, false) => errors.refuse(&format!("auth.{field}"), "is required for this type"),
                (false, true) => errors.refuse(&format!("auth.{field}"), "is not allowed for this type"),
                _ => {}
            }
        }
        let namespace = self.namespace.as_deref().map(NamespaceName::parse).transpose();
        let namespace = errors.take("auth.namespace", namespace).flatten();
        let name = errors.take("auth.name", self.name.as_deref().map(ServiceAccountName::parse).transpose()).flatten();
        errors.finish(|| {
            Some(match self.auth_type {
                AuthType::Token => ClusterAuth::Token { token: self.token? },
                AuthType::ServiceAccount => ClusterAuth::ServiceAccount {
                    token: self.token?,
                    account: ServiceAccountRef { namespace: namespace?, name: name? },
                },
                AuthType::ClientCertificate => {
                    ClusterAuth::ClientCertificate { certificate: self.certificate?, key: self.key? }
                }
                AuthType::InCluster => ClusterAuth::InCluster,
                AuthType::None => ClusterAuth::None,
            })
        })
    }
}

/// Cluster to register: `auth` and `server`, or a `kubeconfig`.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateCluster {
    /// Unique name, a DNS-1123 label.
    #[schema(example = "dev")]
    name: String,
    /// URL of the API server.
    #[schema(example = "https://127.0.0.1:16443")]
    server: Option<String>,
    /// CA certificates (PEM) of the API server; without them, those of regcred's host are trusted.
    ca_certificate: Option<String>,
    /// Server name in the API server's certificate, if it differs from the host of `server`.
    tls_server_name: Option<String>,
    /// Authentication.
    auth: Option<ClusterAuthInput>,
    /// Allows `http://`. Tokens are refused nevertheless, except for loopback.
    allow_plain_http: Option<bool>,
    /// Self-contained kubeconfig: without `exec`, auth plugins and file paths.
    #[schema(value_type = Option<String>, format = Password)]
    kubeconfig: Option<SecretString>,
    /// Context of the kubeconfig; its current context by default.
    context: Option<String>,
}

impl CreateCluster {
    fn parse(self) -> Result<(Name, ClusterConnection), Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let name = errors.take("name", Name::parse(&self.name));
        let auth = errors.take_all(self.auth.map(ClusterAuthInput::parse).transpose());
        let input = auth.map(|auth| ConnectionInput {
            server: self.server,
            ca_certificate: self.ca_certificate.map(Some),
            tls_server_name: self.tls_server_name.map(Some),
            auth,
            allow_plain_http: self.allow_plain_http,
            kubeconfig: self.kubeconfig,
            context: self.context,
        });
        let connection = input.and_then(|input| errors.take_all(input.into_connection()));
        errors.finish(|| name.zip(connection))
    }
}

/// Change of a cluster, as a JSON merge patch. `auth` is replaced completely.
///
/// A change of `server`, `caCertificate` or `tlsServerName` requires `auth`: a stored credential is
/// only sent to the server that it was given for.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdateCluster {
    /// New URL of the API server.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    server: Option<String>,
    /// New CA certificates (PEM); `null` to trust those of regcred's host.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    ca_certificate: Option<Option<String>>,
    /// New server name; `null` for the host of `server`.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    tls_server_name: Option<Option<String>>,
    /// New authentication.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    auth: Option<ClusterAuthInput>,
    /// Allows `http://`.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    allow_plain_http: Option<bool>,
    /// Kubeconfig that replaces all of the above.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(value_type = Option<String>, nullable = false, format = Password)]
    kubeconfig: Option<SecretString>,
    /// Context of the kubeconfig; its current context by default.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    context: Option<String>,
}

impl TryFrom<UpdateCluster> for ConnectionInput {
    type Error = Vec<FieldError>;

    fn try_from(body: UpdateCluster) -> Result<Self, Vec<FieldError>> {
        Ok(Self {
            server: body.server,
            ca_certificate: body.ca_certificate,
            tls_server_name: body.tls_server_name,
            auth: body.auth.map(ClusterAuthInput::parse).transpose()?,
            allow_plain_http: body.allow_plain_http,
            kubeconfig: body.kubeconfig,
            context: body.context,
        })
    }
}

/// Authentication to an API server, without the credential.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterAuthView {
    /// Type of authentication.
    #[serde(rename = "type")]
    auth_type: AuthType,
    /// End of the credential, as it states it: `exp` of a JWT, `notAfter` of a client certificate.
    /// `null` if it has no end or does not state it.
    expires_at: Option<DateTime<Utc>>,
    /// Namespace of the `ServiceAccount`, for `serviceAccount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    namespace: Option<String>,
    /// Name of the `ServiceAccount`, for `serviceAccount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    name: Option<String>,
    /// Renewal of the token, for `serviceAccount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    renewal: Option<TokenRenewal>,
}

/// Renewal of the token of a cluster.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenRenewal {
    /// Time of the next attempt.
    next_at: Option<DateTime<Utc>>,
    /// Failed attempts since the last renewal. The token stays in use.
    failures: i32,
    /// Reason of the last failure; `null` after a renewal.
    last_error: Option<String>,
}

impl ClusterAuthView {
    fn of(stored: &StoredCluster) -> Self {
        let account = stored.renewal.as_ref().map(|renewal| &renewal.account);
        let renewal = stored.renewal.as_ref().map(|Renewal { next_at, failures, error, .. }| TokenRenewal {
            next_at: *next_at,
            failures: *failures,
            last_error: error.clone(),
        });
        Self {
            auth_type: stored.auth_type,
            expires_at: stored.expires_at,
            namespace: account.map(|account| account.namespace.to_string()),
            name: account.map(|account| account.name.to_string()),
            renewal,
        }
    }
}

/// Cluster, without its credential.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// Immutable identifier.
    id: Uuid,
    /// Unique name.
    name: String,
    /// URL of the API server; `null` for `inCluster`.
    server: Option<String>,
    /// CA certificates (PEM) of the API server.
    ca_certificate: Option<String>,
    /// Server name in the API server's certificate, if it differs from the host.
    tls_server_name: Option<String>,
    /// Authentication.
    auth: ClusterAuthView,
    /// Allows `http://`.
    allow_plain_http: bool,
    /// Warnings about the end of the credential.
    warnings: Vec<Warning>,
    /// Version, incremented by every change. A renewal of the token is none.
    version: i64,
    /// Time of registration.
    created_at: DateTime<Utc>,
    /// Time of the last change.
    updated_at: DateTime<Utc>,
}

impl From<StoredCluster> for Cluster {
    fn from(stored: StoredCluster) -> Self {
        Self {
            auth: ClusterAuthView::of(&stored),
            warnings: credential_warnings(&stored, crate::clock::now()),
            id: stored.id,
            name: stored.name,
            server: stored.server,
            ca_certificate: stored.ca_certificate,
            tls_server_name: stored.tls_server_name,
            allow_plain_http: stored.allow_plain_http,
            version: stored.version,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

/// Register a cluster.
///
/// The credential is sealed before it is stored. The cluster is not called; use `check` for that.
#[utoipa::path(
    tag = "clusters",
    params(DryRunQuery, IdempotencyKeyHeader),
    request_body = CreateCluster,
    responses((status = CREATED, body = Cluster, headers(
        ("Location" = String, description = "Path of the cluster"),
        ("ETag" = String, description = "Version of the cluster"),
    ))),
)]
#[post("/clusters")]
pub async fn create_cluster(
    caller: Caller<WriteClusters, DryRunQuery>,
    clusters: Data<Clusters>,
    idempotency: Idempotency,
    body: Json<CreateCluster>,
) -> Result<HttpResponse, ApiError> {
    let (name, connection) = body.0.parse()?;
    let register = async |call: &Call| clusters.register(call, &name, &connection).await;
    let current = async |call: &Call| clusters.find(call, &name).await;
    let cluster = idempotency.once(&caller.identity, register, current).await?;
    let path = format!("/v1/clusters/{name}");
    Ok(conditional::created(&caller.identity, path, cluster.version, Cluster::from(cluster)))
}

/// List clusters, by default ordered by name.
///
/// A page may have fewer items than `limit`, or none, although `next` is set: with `q` or another
/// order it reads at most 1,000 clusters that are hidden from the caller.
#[utoipa::path(
    tag = "clusters",
    params(ListQuery<ResourceSort>, NameQuery),
    responses((status = OK, body = Page<Cluster>)),
)]
#[get("/clusters")]
pub async fn list_clusters(
    caller: Caller<ReadClusters, (ListQuery<ResourceSort>, NameQuery)>,
    clusters: Data<Clusters>,
    cursor_key: Data<CursorKey>,
) -> Result<HttpResponse, ApiError> {
    let (list_query, NameQuery { q }) = caller.query;
    let request = list_query.request(&cursor_key)?;
    let found = clusters.list(&caller.identity, &request, q.as_ref()).await?;
    let page: Page<Cluster> = Page::listed(found, &list_query, &cursor_key)?;
    Ok(HttpResponse::Ok().json(page))
}

/// Get a cluster.
#[utoipa::path(
    tag = "clusters",
    params(("name" = String, Path, description = "Name of the cluster")),
    responses((status = OK, body = Cluster, headers(("ETag" = String, description = "Version of the cluster")))),
)]
#[get("/clusters/{name}")]
pub async fn get_cluster(
    caller: Caller<ReadClusters>,
    clusters: Data<Clusters>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let cluster = clusters.find(&caller.identity, &path_name("cluster", &path)?).await?;
    Ok(conditional::ok(cluster.version, Cluster::from(cluster)))
}

/// Change a cluster. A request without a difference changes nothing.
#[utoipa::path(
    tag = "clusters",
    params(
        ("name" = String, Path, description = "Name of the cluster"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to change"),
        DryRunQuery,
        IdempotencyKeyHeader,
    ),
    request_body(content(
        (UpdateCluster = "application/merge-patch+json"),
        (UpdateCluster = "application/json"),
    )),
    responses((status = OK, body = Cluster, headers(("ETag" = String, description = "Version of the cluster")))),
)]
#[patch("/clusters/{name}")]
pub async fn update_cluster(
    caller: Caller<WriteClusters, DryRunQuery>,
    clusters: Data<Clusters>,
    path: Path<String>,
    expected: IfMatch,
    idempotency: Idempotency,
    body: MergePatch<UpdateCluster>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("cluster", &path)?;
    let update = ConnectionInput::try_from(body.0)?;
    let change = async |call: &Call| clusters.change(call, &name, update, expected.0).await;
    let current = async |call: &Call| clusters.find(call, &name).await;
    let cluster = idempotency.once(&caller.identity, change, current).await?;
    Ok(conditional::changed(&caller.identity, cluster.version, Cluster::from(cluster)))
}

/// Delete a cluster. Secrets in the cluster are not deleted.
#[utoipa::path(
    tag = "clusters",
    params(
        ("name" = String, Path, description = "Name of the cluster"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to delete"),
        DryRunQuery,
    ),
    responses((status = NO_CONTENT)),
)]
#[delete("/clusters/{name}")]
pub async fn delete_cluster(
    caller: Caller<WriteClusters, DryRunQuery>,
    clusters: Data<Clusters>,
    path: Path<String>,
    expected: IfMatch,
) -> Result<HttpResponse, ApiError> {
    clusters.remove(&caller.identity, &path_name("cluster", &path)?, expected.0).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Scope of a check.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct CheckQuery {
    /// Namespace in which to check permissions, instead of all namespaces. May be repeated, up to
    /// 20 times.
    #[param(value_type = Option<Vec<String>>)]
    namespace: Vec<NamespaceName>,
}

impl FromQuery for CheckQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let namespace = query.all("namespace", str::parse);
        if namespace.len() > 20 {
            query.errors().refuse("namespace", "may be given at most 20 times");
        }
        Self { namespace }
    }
}

/// Check a cluster: its version, the permissions of regcred, and those that pull secrets lack.
///
/// The response is 200 also if the cluster cannot be reached.
#[utoipa::path(
    tag = "clusters",
    params(
        ("name" = String, Path, description = "Name of the cluster"),
        CheckQuery,
    ),
    responses((status = OK, body = Check)),
)]
#[post("/clusters/{name}/check")]
pub async fn check_cluster(
    caller: Caller<ReadClusters, CheckQuery>,
    clusters: Data<Clusters>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let namespaces: Vec<&str> = caller.query.namespace.iter().map(NamespaceName::as_str).collect();
    let check = clusters.check(&caller.identity, &path_name("cluster", &path)?, &namespaces).await?;
    Ok(HttpResponse::Ok().json(check))
}
