//! `/v1/clusters/{cluster}/namespaces/{namespace}/secrets`

use actix_web::{
    HttpResponse, get, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    domain::{
        caller::Call,
        docker_config::Warning,
        invalid::FieldErrors,
        names::{Labels, NamespaceName, SecretName},
        secret::{IfExists, SecretType, is_reserved},
        selector::{AccountSelection, LabelSelectorDocument},
        unique::UniqueMap,
    },
    http::{
        auth::{
            Caller,
            permission::{DeliverSecrets, ReadClusters},
        },
        body::Json,
        paging::{Page, PageQuery},
        path_name,
        problem::ApiError,
        query::DryRunQuery,
    },
    service::secrets::{Delivery, ListedDelivery, Secrets},
};

/// Secret to create.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateSecret {
    /// Name of the Secret, a DNS-1123 subdomain.
    #[schema(example = "team-a-pull")]
    name: String,
    /// Names of the accounts to include.
    #[schema(min_items = 1, max_items = 1000, example = json!(["team-a", "team-b"]))]
    accounts: Option<Vec<String>>,
    /// Selects the accounts by label, instead of `accounts`.
    account_selector: Option<LabelSelectorDocument>,
    /// Type: `kubernetes.io/dockerconfigjson` (default) or the legacy `kubernetes.io/dockercfg`.
    #[serde(rename = "type")]
    secret_type: Option<String>,
    /// Additional labels of the Secret. `app.kubernetes.io/managed-by` and `regcred.dev/…` are
    /// reserved.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    labels: UniqueMap<String>,
    /// Handling of an existing Secret of this name.
    #[serde(default)]
    if_exists: IfExists,
    /// Dry run. Use the query parameter `dryRun` instead.
    #[serde(default)]
    #[schema(deprecated)]
    dry_run: bool,
}

/// Created Secret, without its value.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Secret {
    /// Name of the cluster.
    cluster: String,
    /// Namespace.
    namespace: String,
    /// Name of the Secret.
    name: String,
    /// Type of the Secret.
    #[serde(rename = "type")]
    secret_type: &'static str,
    /// UID of the Secret.
    uid: Option<String>,
    /// Resource version of the Secret; `null` for a dry run.
    resource_version: Option<String>,
    /// Time of creation, by the cluster's clock.
    creation_timestamp: Option<DateTime<Utc>>,
    /// Whether an existing Secret was replaced.
    replaced: bool,
    /// Whether this was a dry run.
    dry_run: bool,
    /// Keys of the docker config.
    keys: Vec<String>,
    /// Value for `imagePullSecrets` of a pod or ServiceAccount.
    image_pull_secrets: Vec<SecretReference>,
    /// Earliest end of a minted login in the Secret; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    valid_until: Option<DateTime<Utc>>,
    /// Differences between the accounts and the behaviour of the reader, and minted logins that end.
    warnings: Vec<Warning>,
}

/// Reference to a Secret, as in `imagePullSecrets`.
#[derive(Debug, Serialize, ToSchema)]
pub struct SecretReference {
    /// Name of the Secret.
    name: String,
}

/// Create a Secret in a namespace of a cluster (direct delivery).
///
/// regcred sends one POST to the API server and never retries it. An existing Secret is not
/// changed: a retry gets 409 `secret-exists` if the first attempt arrived. With
/// `"ifExists": "replace"`, a Secret that was made by direct delivery is replaced, at the version
/// that was read; one of a pull secret, or of another program, never is. An `Idempotency-Key` is
/// ignored.
///
/// The Secret does not follow a later change of its accounts, nor the refresh of a minted login:
/// `validUntil` is the end of its content. In a dry run, the API server
/// validates the Secret without storing it.
#[utoipa::path(
    tag = "secrets",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
        DryRunQuery,
    ),
    request_body = CreateSecret,
    responses(
        (status = CREATED, description = "Created", body = Secret),
        (status = OK, description = "Replaced, or in a dry run: the Secret is valid", body = Secret),
    ),
)]
#[post("/clusters/{cluster}/namespaces/{namespace}/secrets")]
pub async fn create_secret(
    caller: Caller<DeliverSecrets, DryRunQuery>,
    secrets: Data<Secrets>,
    path: Path<(String, String)>,
    body: Json<CreateSecret>,
) -> Result<HttpResponse, ApiError> {
    let (cluster, namespace) = path.into_inner();
    let dry_run = body.0.dry_run || caller.identity.dry_run;
    let call = Call { dry_run, ..caller.identity };
    let delivery = body.0.parse(&cluster, &namespace)?;
    let (name, secret_type) = (delivery.name.to_string(), delivery.secret_type.as_str());
    let delivered = secrets.deliver(&call, delivery).await?;
    let mut response = if dry_run || delivered.replaced { HttpResponse::Ok() } else { HttpResponse::Created() };
    Ok(response.json(Secret {
        cluster,
        namespace,
        image_pull_secrets: vec![SecretReference { name: name.clone() }],
        name,
        secret_type,
        uid: delivered.metadata.uid,
        resource_version: delivered.metadata.resource_version,
        creation_timestamp: delivered.metadata.creation_timestamp,
        replaced: delivered.replaced,
        dry_run,
        keys: delivered.keys,
        valid_until: delivered.valid_until,
        warnings: delivered.warnings,
    }))
}

/// Secret of direct delivery.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DirectSecret {
    /// Name of the Secret.
    name: String,
    /// UID of the Secret.
    uid: Option<String>,
    /// Resource version of the Secret.
    resource_version: Option<String>,
    /// Time of creation, by the cluster's clock.
    creation_timestamp: Option<DateTime<Utc>>,
    /// Time of the recorded delivery; `null` if there is no record, as for a delivery by an earlier
    /// release.
    delivered_at: Option<DateTime<Utc>>,
    /// Names of the accounts in the delivery that are granted to the caller; `null` without a record.
    accounts: Option<Vec<String>>,
    /// Whether the login of one of these accounts has changed since the delivery; `null` without a
    /// record.
    outdated: Option<bool>,
}

impl From<ListedDelivery> for DirectSecret {
    fn from(ListedDelivery { secret, record }: ListedDelivery) -> Self {
        Self {
            name: secret.name.to_string(),
            uid: secret.metadata.uid,
            resource_version: secret.metadata.resource_version,
            creation_timestamp: secret.metadata.creation_timestamp,
            delivered_at: record.as_ref().map(|record| record.delivered_at),
            outdated: record.as_ref().map(|record| record.is_outdated),
            accounts: record.map(|record| record.accounts),
        }
    }
}

/// List the Secrets of direct delivery in a namespace, ordered by name.
///
/// The API server lists the metadata of the Secrets with regcred's label that belong to no pull
/// secret. That requires the right to list Secrets in the namespace, which also permits reading
/// them; without it the response is 502 `cluster-forbidden`.
#[utoipa::path(
    tag = "secrets",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
        PageQuery<SecretName>,
    ),
    responses((status = OK, body = Page<DirectSecret>)),
)]
#[get("/clusters/{cluster}/namespaces/{namespace}/secrets")]
pub async fn list_secrets(
    caller: Caller<ReadClusters, PageQuery<SecretName>>,
    secrets: Data<Secrets>,
    path: Path<(String, String)>,
) -> Result<HttpResponse, ApiError> {
    let (cluster, namespace) = path.into_inner();
    let cluster = path_name("cluster", &cluster)?;
    let namespace = NamespaceName::parse(&namespace).map_err(|invalid| ApiError::field("namespace", invalid))?;
    let page_query = &caller.query;
    let limit = usize::try_from(page_query.rows()).unwrap_or(usize::MAX);
    let found = secrets.list(&caller.identity, (&cluster, &namespace), page_query.after(), limit).await?;
    let page: Page<DirectSecret> = Page::of(found, page_query, |listed| listed.secret.name.to_string());
    Ok(HttpResponse::Ok().json(page))
}

impl CreateSecret {
    fn parse(self, cluster: &str, namespace: &str) -> Result<Delivery, ApiError> {
        let cluster = path_name("cluster", cluster)?;
        let mut errors = FieldErrors::default();
        let namespace = errors.take("namespace", NamespaceName::parse(namespace));
        let name = errors.take("name", SecretName::parse(&self.name));
        let secret_type =
            errors.take("type", self.secret_type.as_deref().map_or(Ok(SecretType::default()), str::parse));
        let accounts = AccountSelection::parse(&mut errors, self.accounts, self.account_selector);
        let labels = errors.take("labels", Labels::parse(self.labels.0));
        let keys = labels.iter().flat_map(|labels| labels.as_map().keys());
        for key in keys.filter(|key| is_reserved(key)) {
            errors.refuse(&format!("labels.{key}"), "is reserved for regcred: choose another key");
        }
        Ok(errors.finish(|| {
            Some(Delivery {
                cluster,
                namespace: namespace?,
                name: name?,
                secret_type: secret_type?,
                accounts: accounts?,
                labels: labels?,
                if_exists: self.if_exists,
            })
        })?)
    }
}
