//! `/v1/clusters`

use actix_web::{
    HttpRequest, HttpResponse, delete, get,
    http::header::LOCATION,
    patch, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use url::form_urlencoded;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    clients::cluster::Check,
    domain::{
        cluster::{AuthType, ClusterAuth, ClusterConnection},
        invalid::{FieldError, FieldErrors},
        names::{Name, NamespaceName},
    },
    http::{
        auth::{
            Caller,
            permission::{ReadClusters, WriteClusters},
        },
        body::{Json, MergePatch},
        conditional::{IfMatch, etag},
        merge_patch,
        paging::{Page, PageParams, PageQuery, page},
        path_name,
        problem::ApiError,
    },
    service::clusters::{Clusters, ConnectionInput},
    storage::clusters::StoredCluster,
};

/// How to authenticate to an API server.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterAuthInput {
    /// The kind of authentication.
    #[serde(rename = "type")]
    auth_type: AuthType,
    /// For `token`: the bearer token. Sealed before it is stored; no later call returns it.
    #[schema(value_type = Option<String>, format = Password, write_only)]
    token: Option<SecretString>,
    /// For `clientCertificate`: the certificate and its intermediates, PEM.
    certificate: Option<String>,
    /// For `clientCertificate`: its private key, PEM. Sealed before it is stored; no later call returns it.
    #[schema(value_type = Option<String>, format = Password, write_only)]
    key: Option<SecretString>,
}

impl ClusterAuthInput {
    /// Exactly the fields that the type has: what is missing or too much is named.
    fn parse(self) -> Result<ClusterAuth, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let needed = |field| {
            let takes: &[&str] = match self.auth_type {
                AuthType::Token => &["token"],
                AuthType::ClientCertificate => &["certificate", "key"],
                AuthType::InCluster | AuthType::None => &[],
            };
            takes.contains(&field)
        };
        let given =
            [("token", self.token.is_some()), ("certificate", self.certificate.is_some()), ("key", self.key.is_some())];
        for (field, is_given) in given {
            match (needed(field), is_given) {
                (true, false) => errors.refuse(&format!("auth.{field}"), "is missing for this type"),
                (false, true) => errors.refuse(&format!("auth.{field}"), "does not belong to this type"),
                _ => {}
            }
        }
        errors.finish(|| {
            Some(match self.auth_type {
                AuthType::Token => ClusterAuth::Token { token: self.token? },
                AuthType::ClientCertificate => {
                    ClusterAuth::ClientCertificate { certificate: self.certificate?, key: self.key? }
                }
                AuthType::InCluster => ClusterAuth::InCluster,
                AuthType::None => ClusterAuth::None,
            })
        })
    }
}

/// A cluster to be registered: `auth` and `server`, or a `kubeconfig`.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateCluster {
    /// Unique name, a DNS-1123 label.
    #[schema(example = "dev")]
    name: String,
    /// URL of the API server.
    #[schema(example = "https://127.0.0.1:16443")]
    server: Option<String>,
    /// PEM of the CA that signed the API server's certificate; without it the host's trust store decides.
    ca_certificate: Option<String>,
    /// Name that the API server's certificate bears in place of the host of `server`.
    tls_server_name: Option<String>,
    /// How to authenticate.
    auth: Option<ClusterAuthInput>,
    /// `http://` is wanted. Tokens are refused there all the same, unless the host is loopback.
    allow_plain_http: Option<bool>,
    /// A kubeconfig, self-contained: no `exec`, no auth plugin, no file paths.
    #[schema(value_type = Option<String>, format = Password, write_only)]
    kubeconfig: Option<SecretString>,
    /// Which context of the kubeconfig, if not its current one.
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

/// A change of a cluster, as a JSON merge patch. `auth` is replaced as a whole. Where the credential would go
/// somewhere else (`server`, `caCertificate`, `tlsServerName`), `auth` has to be said again.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdateCluster {
    /// Another URL.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    server: Option<String>,
    /// Another CA; `null` for the host's trust store.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    ca_certificate: Option<Option<String>>,
    /// Another name; `null` for the host of `server`.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    tls_server_name: Option<Option<String>>,
    /// Another way to authenticate.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    auth: Option<ClusterAuthInput>,
    /// `http://` is wanted.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    allow_plain_http: Option<bool>,
    /// A kubeconfig in place of all of the above.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(value_type = Option<String>, nullable = false, format = Password, write_only)]
    kubeconfig: Option<SecretString>,
    /// Which context of the kubeconfig, if not its current one.
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

/// How regcred authenticates; nothing of the credential.
#[derive(Debug, Serialize, ToSchema)]
pub struct ClusterAuthView {
    /// The kind of authentication.
    #[serde(rename = "type")]
    auth_type: AuthType,
}

/// A cluster; its credential is in no answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// Identity that survives everything.
    id: Uuid,
    /// Unique name.
    name: String,
    /// URL of the API server; `null` for `inCluster`.
    server: Option<String>,
    /// PEM of the CA that signed the API server's certificate.
    ca_certificate: Option<String>,
    /// Name that the API server's certificate bears in place of the host.
    tls_server_name: Option<String>,
    /// How regcred authenticates.
    auth: ClusterAuthView,
    /// `http://` is wanted.
    allow_plain_http: bool,
    /// Grows by one with every change.
    version: i64,
    /// When it was registered.
    created_at: DateTime<Utc>,
    /// When it was changed last.
    updated_at: DateTime<Utc>,
}

impl From<StoredCluster> for Cluster {
    fn from(stored: StoredCluster) -> Self {
        Self {
            id: stored.id,
            name: stored.name,
            server: stored.server,
            ca_certificate: stored.ca_certificate,
            tls_server_name: stored.tls_server_name,
            auth: ClusterAuthView { auth_type: stored.auth_type },
            allow_plain_http: stored.allow_plain_http,
            version: stored.version,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

/// Register a cluster.
///
/// The credential is sealed before it is stored. Nothing is sent to the cluster: `check` does that.
#[utoipa::path(
    tag = "clusters",
    request_body = CreateCluster,
    responses((status = CREATED, body = Cluster, headers(
        ("Location" = String, description = "Path of the cluster"),
        ("ETag" = String, description = "Version of the cluster"),
    ))),
)]
#[post("/clusters")]
pub async fn create_cluster(
    caller: Caller<WriteClusters>,
    clusters: Data<Clusters>,
    body: Json<CreateCluster>,
) -> Result<HttpResponse, ApiError> {
    let (name, connection) = body.0.parse()?;
    let cluster = clusters.register(&caller.identity, &name, &connection).await?;
    Ok(HttpResponse::Created()
        .insert_header((LOCATION, format!("/v1/clusters/{name}")))
        .insert_header(etag(cluster.version))
        .json(Cluster::from(cluster)))
}

/// List clusters by name.
#[utoipa::path(
    tag = "clusters",
    params(PageParams),
    responses((status = OK, body = Page<Cluster>)),
)]
#[get("/clusters")]
pub async fn list_clusters(
    caller: Caller<ReadClusters>,
    clusters: Data<Clusters>,
    query: PageQuery,
) -> Result<HttpResponse, ApiError> {
    let found = clusters.list(&caller.identity, &query.0).await?;
    let page: Page<Cluster> = page(found, &query.0, |cluster| &cluster.name);
    Ok(HttpResponse::Ok().json(page))
}

/// Show a cluster.
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
    Ok(HttpResponse::Ok().insert_header(etag(cluster.version)).json(Cluster::from(cluster)))
}

/// Change a cluster.
#[utoipa::path(
    tag = "clusters",
    params(
        ("name" = String, Path, description = "Name of the cluster"),
        ("If-Match" = Option<String>, Header, description = "Change only this version (its ETag)"),
    ),
    request_body(content(
        (UpdateCluster = "application/merge-patch+json"),
        (UpdateCluster = "application/json"),
    )),
    responses((status = OK, body = Cluster, headers(("ETag" = String, description = "Version of the cluster")))),
)]
#[patch("/clusters/{name}")]
pub async fn update_cluster(
    caller: Caller<WriteClusters>,
    clusters: Data<Clusters>,
    path: Path<String>,
    expected: IfMatch,
    body: MergePatch<UpdateCluster>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("cluster", &path)?;
    let cluster = clusters.change(&caller.identity, &name, body.0.try_into()?, expected.0).await?;
    Ok(HttpResponse::Ok().insert_header(etag(cluster.version)).json(Cluster::from(cluster)))
}

/// Delete a cluster and its credential. Secrets in the cluster stay.
#[utoipa::path(
    tag = "clusters",
    params(
        ("name" = String, Path, description = "Name of the cluster"),
        ("If-Match" = Option<String>, Header, description = "Delete only this version (its ETag)"),
    ),
    responses((status = NO_CONTENT)),
)]
#[delete("/clusters/{name}")]
pub async fn delete_cluster(
    caller: Caller<WriteClusters>,
    clusters: Data<Clusters>,
    path: Path<String>,
    expected: IfMatch,
) -> Result<HttpResponse, ApiError> {
    clusters.remove(&caller.identity, &path_name("cluster", &path)?, expected.0).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Check a cluster: does it answer, which version is it, what may regcred do there, and which pull secrets need more.
///
/// A cluster that does not answer is what was found, not an error.
#[utoipa::path(
    tag = "clusters",
    params(
        ("name" = String, Path, description = "Name of the cluster"),
        ("namespace" = Option<Vec<String>>, Query, description = "Ask for rights in this namespace in place of all of them; may be given several times"),
    ),
    responses((status = OK, body = Check)),
)]
#[post("/clusters/{name}/check")]
pub async fn check_cluster(
    caller: Caller<ReadClusters>,
    clusters: Data<Clusters>,
    path: Path<String>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let namespaces = namespaces(request.query_string())?;
    let namespaces: Vec<&str> = namespaces.iter().map(NamespaceName::as_str).collect();
    let check = clusters.check(&caller.identity, &path_name("cluster", &path)?, &namespaces).await?;
    Ok(HttpResponse::Ok().json(check))
}

fn namespaces(query: &str) -> Result<Vec<NamespaceName>, ApiError> {
    let mut errors = FieldErrors::default();
    let mut namespaces = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "namespace" => namespaces.extend(errors.take("namespace", NamespaceName::parse(&value))),
            other => errors.refuse(&other.chars().take(50).collect::<String>(), "is not a known query parameter"),
        }
    }
    if namespaces.len() > 20 {
        errors.refuse("namespace", "may be given at most 20 times");
    }
    Ok(errors.finish(|| Some(namespaces))?)
}
