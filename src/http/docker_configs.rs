//! `/v1/docker-configs`

use std::collections::BTreeMap;

use actix_web::{
    HttpRequest, HttpResponse,
    http::header::{ACCEPT, CACHE_CONTROL},
    post,
    web::Data,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::{
    domain::{
        docker_config::{Profile, RenderedConfig, Warning},
        invalid::FieldErrors,
        names::{Labels, NamespaceName, SecretName},
        secret::{Manifest, SecretType},
    },
    http::{
        auth::{Caller, permission::RevealCredentials},
        body::Json,
        problem::ApiError,
    },
    service::docker_configs::DockerConfigs,
};

const JSON: &str = "application/json";
const YAML: &str = "application/yaml";

/// Which accounts, for which reader, in which form.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateDockerConfig {
    /// Names of the accounts.
    #[schema(min_items = 1, max_items = 1000, example = json!(["martin-5000", "martin-6000"]))]
    accounts: Vec<String>,
    /// Which program will read it; with `secret`, the one that fits the Secret's type if not said.
    profile: Option<Profile>,
    /// Answer with the manifest of this Secret.
    secret: Option<SecretManifestInput>,
}

/// The Secret that a manifest is made for.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretManifestInput {
    /// Name of the Secret, a DNS-1123 subdomain.
    #[schema(example = "registrykey-m262-4")]
    name: String,
    /// Its namespace; without it, whoever applies the manifest decides.
    namespace: Option<String>,
    /// `kubernetes.io/dockerconfigjson`, or the legacy `kubernetes.io/dockercfg`.
    #[serde(rename = "type")]
    secret_type: Option<String>,
    /// Labels of the Secret.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// A rendered docker config. It holds passwords.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DockerConfig<'a> {
    /// The reader that it is for.
    profile: Profile,
    /// The document.
    #[schema(value_type = Object)]
    config: &'a RawValue,
    /// The document's bytes in base64, on one line: the value for a Secret's `data`.
    base64: String,
    /// What the reader will do otherwise than the accounts say.
    warnings: Vec<Warning>,
}

/// What the manifest is made of, parsed.
struct Target {
    name: SecretName,
    namespace: Option<NamespaceName>,
    secret_type: SecretType,
    labels: Labels,
}

impl SecretManifestInput {
    fn parse(self, profile: Option<Profile>) -> Result<Target, ApiError> {
        let mut errors = FieldErrors::default();
        let name = errors.take("secret.name", SecretName::parse(&self.name));
        let namespace =
            errors.take("secret.namespace", self.namespace.as_deref().map(NamespaceName::parse).transpose());
        let secret_type =
            errors.take("secret.type", self.secret_type.as_deref().map_or(Ok(SecretType::default()), str::parse));
        let labels = errors.take("secret.labels", Labels::parse(self.labels));
        if let (Some(profile), Some(secret_type)) = (profile, secret_type)
            && profile != secret_type.profile()
        {
            errors.refuse("profile", "does not fit the type of the Secret; leave it out");
        }
        Ok(errors.finish(|| {
            Some(Target { name: name?, namespace: namespace?, secret_type: secret_type?, labels: labels? })
        })?)
    }
}

/// Render accounts as a docker config, or as the manifest of a Secret.
///
/// With `secret` the answer is the Secret's manifest, as JSON or, for `Accept: application/yaml`, as YAML,
/// ready for `kubectl apply -f -`. The answer holds passwords.
#[utoipa::path(
    tag = "docker-configs",
    request_body = CreateDockerConfig,
    responses((status = OK, description = "The docker config, or the Secret's manifest", content(
        (DockerConfig = "application/json"),
        (String = "application/yaml"),
    ))),
)]
#[post("/docker-configs")]
pub async fn create_docker_config(
    _caller: Caller<RevealCredentials>,
    docker_configs: Data<DockerConfigs>,
    request: HttpRequest,
    body: Json<CreateDockerConfig>,
) -> Result<HttpResponse, ApiError> {
    let CreateDockerConfig { accounts, profile, secret } = body.0;
    let media_type = choose(&request, secret.is_some())?;
    let Some(secret) = secret else {
        let profile = profile.unwrap_or(Profile::Kubernetes);
        let rendered = docker_configs.assemble(profile, &accounts).await?;
        return document(profile, rendered);
    };
    let target = secret.parse(profile)?;
    let rendered = docker_configs.assemble(target.secret_type.profile(), &accounts).await?;
    manifest(&target, &rendered.document, media_type)
}

/// What the caller wants of what can be had: YAML only of a manifest.
fn choose(request: &HttpRequest, is_manifest: bool) -> Result<&'static str, ApiError> {
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or("*/*");
    for media_type in accept.split(',').map(|range| range.split(';').next().unwrap_or_default().trim()) {
        match media_type {
            "" | "*/*" | "application/*" | JSON => return Ok(JSON),
            YAML | "application/x-yaml" | "text/yaml" if is_manifest => return Ok(YAML),
            _ => {}
        }
    }
    Err(ApiError::NotAcceptable(if is_manifest { "application/json, application/yaml" } else { JSON }))
}

fn document(profile: Profile, rendered: RenderedConfig) -> Result<HttpResponse, ApiError> {
    let text = rendered.document.expose_secret();
    let config: &RawValue = serde_json::from_str(text).map_err(|error| ApiError::Internal(error.into()))?;
    Ok(HttpResponse::Ok().insert_header((CACHE_CONTROL, "no-store")).json(DockerConfig {
        profile,
        config,
        base64: BASE64_STANDARD.encode(text),
        warnings: rendered.warnings,
    }))
}

fn manifest(target: &Target, document: &SecretString, media_type: &'static str) -> Result<HttpResponse, ApiError> {
    let manifest = Manifest {
        name: &target.name,
        namespace: target.namespace.as_ref(),
        secret_type: target.secret_type,
        labels: &target.labels,
        document,
    };
    let written = if media_type == YAML { manifest.to_yaml() } else { manifest.to_json() };
    let body = written.map_err(|error| ApiError::Internal(error.into()))?;
    Ok(HttpResponse::Ok()
        .insert_header((CACHE_CONTROL, "no-store"))
        .content_type(media_type)
        .body(body.expose_secret().to_owned()))
}
