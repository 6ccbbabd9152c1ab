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
        secret::SecretType,
        unique::UniqueMap,
    },
    http::{
        auth::{Caller, permission::DeliverSecrets},
        body::Json,
        path_name,
        problem::ApiError,
        selection::{LabelSelectorInput, choice},
    },
    service::secrets::{Delivery, Secrets},
};

/// A Secret to be created, now.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateSecret {
    /// Name of the Secret, a DNS-1123 subdomain.
    #[schema(example = "registrykey-m262-5")]
    name: String,
    /// Names of the accounts that go into it.
    #[schema(min_items = 1, max_items = 1000, example = json!(["martin-5000", "martin-6000"]))]
    accounts: Option<Vec<String>>,
    /// All accounts with such labels, in place of `accounts`.
    account_selector: Option<LabelSelectorInput>,
    /// `kubernetes.io/dockerconfigjson`, or the legacy `kubernetes.io/dockercfg`.
    #[serde(rename = "type")]
    secret_type: Option<String>,
    /// Further labels of the Secret.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    labels: UniqueMap<String>,
    /// The API server checks everything and stores nothing.
    #[serde(default)]
    dry_run: bool,
}

/// A Secret that was created; nothing of its value.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Secret {
    /// The cluster.
    cluster: String,
    /// The namespace.
    namespace: String,
    /// Name of the Secret.
    name: String,
    /// Type of the Secret.
    #[serde(rename = "type")]
    secret_type: &'static str,
    /// Identity of the Secret.
    uid: Option<String>,
    /// Version of the Secret; `null` after a dry run.
    resource_version: Option<String>,
    /// When it was created, by the cluster's clock.
    creation_timestamp: Option<DateTime<Utc>>,
    /// The API server checked everything and stored nothing.
    dry_run: bool,
    /// The keys of the docker config: what it unlocks.
    keys: Vec<String>,
    /// Ready to paste into a pod's or a ServiceAccount's spec.
    image_pull_secrets: Vec<SecretReference>,
    /// What the reader will do otherwise than the accounts say.
    warnings: Vec<Warning>,
}

/// A Secret's name, as `imagePullSecrets` wants it.
#[derive(Debug, Serialize, ToSchema)]
pub struct SecretReference {
    /// Name of the Secret.
    name: String,
}

/// Create one pull secret in a namespace of a cluster, now.
///
/// One POST goes to the API server and is never repeated. A Secret of that name that is there stays as it is.
#[utoipa::path(
    tag = "secrets",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
    ),
    request_body = CreateSecret,
    responses(
        (status = CREATED, description = "Created", body = Secret),
        (status = OK, description = "A dry run: it would be created", body = Secret),
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
        let accounts = choice(&mut errors, self.accounts, self.account_selector);
        let labels = errors.take("labels", Labels::parse(self.labels.0));
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
