//! `/v1/clusters/{cluster}/namespaces/{namespace}/secrets`

use actix_web::{
    HttpResponse, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    domain::{
        docker_config::Warning,
        invalid::FieldErrors,
        names::{Labels, NamespaceName, SecretName},
        secret::{SecretType, is_reserved},
        selector::{AccountSelection, LabelSelectorDocument},
        unique::UniqueMap,
    },
    http::{
        auth::{Caller, permission::DeliverSecrets},
        body::Json,
        path_name,
        problem::ApiError,
    },
    service::secrets::{Delivery, Secrets},
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
    /// Lets the API server validate the Secret without storing it.
    #[serde(default)]
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
    /// Whether this was a dry run.
    dry_run: bool,
    /// Keys of the docker config.
    keys: Vec<String>,
    /// Value for `imagePullSecrets` of a pod or ServiceAccount.
    image_pull_secrets: Vec<SecretReference>,
    /// Differences between the accounts and the behaviour of the reader.
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
/// changed: a retry gets 409 `secret-exists` if the first attempt arrived. An `Idempotency-Key` is
/// therefore ignored.
#[utoipa::path(
    tag = "secrets",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
    ),
    request_body = CreateSecret,
    responses(
        (status = CREATED, description = "Created", body = Secret),
        (status = OK, description = "Dry run: the Secret is valid", body = Secret),
    ),
)]
#[post("/clusters/{cluster}/namespaces/{namespace}/secrets")]
pub async fn create_secret(
    caller: Caller<DeliverSecrets>,
    secrets: Data<Secrets>,
    path: Path<(String, String)>,
    body: Json<CreateSecret>,
) -> Result<HttpResponse, ApiError> {
    let (cluster, namespace) = path.into_inner();
    let delivery = body.0.parse(&cluster, &namespace)?;
    let (name, secret_type, dry_run) = (delivery.name.to_string(), delivery.secret_type.as_str(), delivery.dry_run);
    let delivered = secrets.deliver(&caller.identity, delivery).await?;
    let mut response = if dry_run { HttpResponse::Ok() } else { HttpResponse::Created() };
    Ok(response.json(Secret {
        cluster,
        namespace,
        image_pull_secrets: vec![SecretReference { name: name.clone() }],
        name,
        secret_type,
        uid: delivered.uid,
        resource_version: delivered.resource_version,
        creation_timestamp: delivered.creation_timestamp,
        dry_run,
        keys: delivered.keys,
        warnings: delivered.warnings,
    }))
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
                dry_run: self.dry_run,
            })
        })?)
    }
}
