//! `/v1/docker-configs`

use std::collections::BTreeMap;

use actix_web::{
    HttpRequest, HttpResponse,
    http::header::{ACCEPT, CACHE_CONTROL, VARY, WARNING},
    post,
    web::Data,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::{
    ToSchema,
    openapi::{ObjectBuilder, OneOfBuilder, Schema, Type},
};

use crate::{
    domain::{
        cluster::ServiceAccountRef,
        docker_config::{Profile, Warning},
        invalid::FieldErrors,
        matching::{Explanation, ImageName, MatchTarget},
        names::{Labels, Name, NamespaceName, SecretName, ServiceAccountName},
        registry::RegistryScope,
        secret::{SecretContent, SecretManifest, SecretType},
        selector::{AccountSelection, LabelSelectorDocument},
        unique::UniqueMap,
    },
    http::{
        auth::{
            self, Caller,
            permission::{ReadAccounts, RevealCredentials},
        },
        body::{DOCUMENT_MAX_BYTES, Json},
        problem::ApiError,
    },
    service::docker_configs::{Assembled, Choice, DockerConfigs, Subject},
};

/// Docker config to render.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateDockerConfig {
    /// Names of the accounts to include.
    #[schema(min_items = 1, max_items = 1000, example = json!(["team-a", "team-b"]))]
    accounts: Option<Vec<String>>,
    /// Selects the accounts by label, instead of `accounts`.
    account_selector: Option<LabelSelectorDocument>,
    /// Selects the accounts that the reader uses for an image or a registry, instead of `accounts`.
    #[serde(rename = "match")]
    #[schema(value_type = Option<AccountMatch>)]
    matching: Option<AccountMatchInput>,
    /// Program that reads the document. The default is `kubernetes`, or the profile of the Secret's
    /// type.
    profile: Option<Profile>,
    /// Returns the manifest of this Secret. Use `POST /v1/docker-configs/manifest` instead.
    #[schema(deprecated)]
    secret: Option<SecretManifestInput>,
    /// Format of the response, instead of `Accept`.
    format: Option<Format>,
}

/// Format of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Format {
    /// JSON (`application/json`): the document with its base64 and warnings.
    Json,
    /// The manifest as YAML (`application/yaml`). Requires `secret`.
    Yaml,
    /// Environment variable `DOCKER_AUTH_CONFIG=…` (`text/plain`). Requires the profile
    /// `dockerAuthConfig`.
    Env,
    /// The document alone (`text/plain`), as the reader's file.
    Document,
    /// The document in base64, on one line (`text/plain`).
    Base64,
}

/// Manifest to render.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateSecretManifest {
    /// Names of the accounts to include.
    #[schema(min_items = 1, max_items = 1000, example = json!(["team-a", "team-b"]))]
    accounts: Option<Vec<String>>,
    /// Selects the accounts by label, instead of `accounts`.
    account_selector: Option<LabelSelectorDocument>,
    /// Selects the accounts that the kubelet uses for an image or a registry, instead of
    /// `accounts`.
    #[serde(rename = "match")]
    #[schema(value_type = Option<AccountMatch>)]
    matching: Option<AccountMatchInput>,
    /// The Secret.
    secret: SecretManifestInput,
}

impl From<CreateSecretManifest> for CreateDockerConfig {
    fn from(body: CreateSecretManifest) -> Self {
        let CreateSecretManifest { accounts, account_selector, matching, secret } = body;
        Self { accounts, account_selector, matching, profile: None, secret: Some(secret), format: None }
    }
}

/// What accounts are wanted for: an image, or every image of a registry.
///
/// Of the granted accounts, the document has those that the reader uses: all of them for the
/// kubelet, which tries each, and one for other readers. Without any, it is empty.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
#[serde(untagged)]
enum AccountMatch {
    Image(ImageMatch),
    Registry(RegistryMatch),
}

/// Accounts for one image.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
#[serde(deny_unknown_fields)]
struct ImageMatch {
    /// Image as in a pod spec. Tag and digest are ignored.
    #[schema(example = "registry.example.com:5000/os/alpine:3")]
    image: String,
}

/// Accounts for every image of a registry, or of a part of one.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
#[serde(deny_unknown_fields)]
struct RegistryMatch {
    /// Registry scope, `host[:port][/path]`.
    #[schema(example = "registry.example.com:5000")]
    registry: String,
}

/// An [`AccountMatch`] before it is parsed, so that errors name its fields.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountMatchInput {
    image: Option<String>,
    registry: Option<String>,
}

impl AccountMatchInput {
    fn parse(self, errors: &mut FieldErrors) -> Option<MatchTarget> {
        match (self.image, self.registry) {
            (Some(image), None) => errors.take("match.image", ImageName::parse(&image)).map(MatchTarget::Image),
            (None, Some(registry)) => {
                errors.take("match.registry", RegistryScope::parse(&registry)).map(MatchTarget::Registry)
            }
            _ => {
                errors.refuse("match", "must have either `image` or `registry`");
                None
            }
        }
    }
}

/// Parses the fields `accounts`, `accountSelector` and `match`, exactly one of which must be set.
fn parse_choice(
    errors: &mut FieldErrors,
    accounts: Option<Vec<String>>,
    selector: Option<LabelSelectorDocument>,
    matching: Option<AccountMatchInput>,
) -> Option<Choice> {
    match matching {
        Some(_) if accounts.is_some() || selector.is_some() => {
            errors.refuse("match", "cannot be combined with `accounts` or `accountSelector`; remove one of them");
            None
        }
        Some(matching) => matching.parse(errors).map(Choice::Match),
        None if accounts.is_none() && selector.is_none() => {
            errors.refuse("accounts", "is missing; name accounts, or give an `accountSelector` or a `match`");
            None
        }
        None => AccountSelection::parse(errors, accounts, selector).map(Choice::Selection),
    }
}

/// Secret of a manifest.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretManifestInput {
    /// Name of the Secret, a DNS-1123 subdomain.
    #[schema(example = "team-a-pull")]
    name: String,
    /// Namespace. Without it, `kubectl apply` decides.
    namespace: Option<String>,
    /// Type: `kubernetes.io/dockerconfigjson` or the legacy `kubernetes.io/dockercfg`. The default
    /// is the type for the `profile`.
    #[serde(rename = "type")]
    secret_type: Option<String>,
    /// Labels of the Secret.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    labels: UniqueMap<String>,
}

/// Rendered docker config. It contains passwords.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DockerConfig<'a> {
    /// Program that reads the document.
    profile: Profile,
    /// Document.
    #[schema(value_type = Object)]
    config: &'a RawValue,
    /// Document in base64, on one line, as in the `data` of a Secret.
    base64: String,
    /// Names of the accounts in the document. For a `match` of the kubelet, in the order in which it
    /// tries them.
    accounts: Vec<String>,
    /// Earliest end of a minted login in the document; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    valid_until: Option<DateTime<Utc>>,
    /// Differences between the accounts and the behaviour of the reader, and minted logins that end.
    warnings: Vec<Warning>,
}

/// A parsed [`CreateDockerConfig`].
struct RenderRequest {
    accounts: Choice,
    profile: Profile,
    secret: Option<ManifestRequest>,
    format: Format,
}

/// A parsed [`SecretManifestInput`].
struct ManifestRequest {
    name: SecretName,
    namespace: Option<NamespaceName>,
    secret_type: SecretType,
    labels: Labels,
}

impl CreateDockerConfig {
    fn parse(self, request: &HttpRequest) -> Result<RenderRequest, ApiError> {
        let mut errors = FieldErrors::default();
        let accounts = parse_choice(&mut errors, self.accounts, self.account_selector, self.matching);
        let is_manifest = self.secret.is_some();
        let secret = self.secret.and_then(|secret| secret.parse(&mut errors, self.profile));
        let fitting = secret.as_ref().map_or(Profile::Kubernetes, |secret| secret.secret_type.profile());
        let profile = self.profile.unwrap_or(fitting);
        if secret.is_some() && profile != fitting {
            errors.refuse("profile", "does not match the type of the Secret; omit it");
        }
        match self.format {
            Some(Format::Yaml) if !is_manifest => {
                errors.refuse("format", "can be yaml only for a manifest; add `secret`");
            }
            Some(Format::Env) if profile != Profile::DockerAuthConfig || is_manifest => {
                errors.refuse("format", "can be env only with the profile dockerAuthConfig and without `secret`");
            }
            Some(Format::Document | Format::Base64) if is_manifest => {
                errors.refuse("format", "must be json or yaml for a manifest");
            }
            _ => {}
        }
        let accounts = errors.finish(|| accounts)?;
        let format = match self.format {
            Some(format) => format,
            None => accepted(request, is_manifest, profile)?,
        };
        Ok(RenderRequest { accounts, profile, secret, format })
    }
}

impl SecretManifestInput {
    /// Without a type, the one for the profile applies.
    fn parse(self, errors: &mut FieldErrors, profile: Option<Profile>) -> Option<ManifestRequest> {
        let name = errors.take("secret.name", SecretName::parse(&self.name));
        let namespace = self.namespace.as_deref().map(NamespaceName::parse).transpose();
        let namespace = errors.take("secret.namespace", namespace);
        let default_type = profile.and_then(SecretType::of_profile).unwrap_or_default();
        let secret_type = self.secret_type.as_deref().map_or(Ok(default_type), str::parse);
        let secret_type = errors.take("secret.type", secret_type);
        let labels = errors.take("secret.labels", Labels::parse(self.labels.0));
        Some(ManifestRequest { name: name?, namespace: namespace?, secret_type: secret_type?, labels: labels? })
    }
}

/// Negotiates the format. YAML requires a manifest, and the environment variable its profile.
fn accepted(request: &HttpRequest, is_manifest: bool, profile: Profile) -> Result<Format, ApiError> {
    let has_variable = profile == Profile::DockerAuthConfig && !is_manifest;
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or("*/*");
    for media_type in preferred(accept) {
        match media_type {
            "" | "*/*" | "application/*" | "application/json" => return Ok(Format::Json),
            "application/yaml" | "application/x-yaml" | "text/yaml" if is_manifest => return Ok(Format::Yaml),
            "text/plain" | "text/*" if has_variable => return Ok(Format::Env),
            _ => {}
        }
    }
    Err(ApiError::NotAcceptable(match (is_manifest, has_variable) {
        (true, _) => "application/json or application/yaml",
        (false, true) => "application/json or text/plain",
        (false, false) => {
            "application/json (application/yaml requires `secret`, text/plain the profile dockerAuthConfig)"
        }
    }))
}

/// Media ranges of an `Accept` header in order of preference, without those of weight 0.
fn preferred(accept: &str) -> impl Iterator<Item = &str> {
    let weighed = accept.split(',').map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0));
        (media_type, weight)
    });
    let mut accepted: Vec<_> = weighed.filter(|(_, weight)| *weight > 0.0).collect();
    accepted.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    accepted.into_iter().map(|(media_type, _)| media_type)
}

/// Render accounts as a docker config.
///
/// With the profile `dockerAuthConfig` and `Accept: text/plain`, the response is the environment
/// variable `DOCKER_AUTH_CONFIG=…`. The response contains passwords. Formats without a field for
/// warnings return them in `Warning` headers, like a Kubernetes API server.
#[utoipa::path(
    tag = "docker-configs",
    request_body = CreateDockerConfig,
    responses((status = OK, description = "Docker config", content(
        (DockerConfig = "application/json"),
        (String = "text/plain"),
    ), headers(("Warning" = String, description = "Warnings of formats without a field for them")))),
)]
#[post("/docker-configs")]
pub async fn create_docker_config(
    caller: Caller<RevealCredentials>,
    docker_configs: Data<DockerConfigs>,
    request: HttpRequest,
    body: Json<CreateDockerConfig>,
) -> Result<HttpResponse, ApiError> {
    reveal(&caller, &docker_configs, &request, body.0).await
}

/// Render the manifest of a Secret that contains accounts, for `kubectl apply -f -`.
///
/// The response is JSON, or YAML for `Accept: application/yaml`. It contains passwords. Warnings are
/// in `Warning` headers, like those of a Kubernetes API server.
#[utoipa::path(
    tag = "docker-configs",
    request_body = CreateSecretManifest,
    responses((status = OK, description = "Manifest of the Secret", content(
        (Object = "application/json"),
        (String = "application/yaml"),
    ), headers(("Warning" = String, description = "Differences between the accounts and the behaviour of the reader")))),
)]
#[post("/docker-configs/manifest")]
pub async fn create_secret_manifest(
    caller: Caller<RevealCredentials>,
    docker_configs: Data<DockerConfigs>,
    request: HttpRequest,
    body: Json<CreateSecretManifest>,
) -> Result<HttpResponse, ApiError> {
    reveal(&caller, &docker_configs, &request, body.0.into()).await
}

async fn reveal(
    caller: &Caller<RevealCredentials>,
    docker_configs: &DockerConfigs,
    request: &HttpRequest,
    body: CreateDockerConfig,
) -> Result<HttpResponse, ApiError> {
    let parsed = body.parse(request)?;
    let assembled = docker_configs.reveal(&caller.identity, parsed.profile, &parsed.accounts).await?;
    parsed.respond(assembled)
}

impl RenderRequest {
    fn respond(self, Assembled { rendered, accounts, valid_until }: Assembled) -> Result<HttpResponse, ApiError> {
        let mut response = HttpResponse::Ok();
        response.insert_header((CACHE_CONTROL, "no-store")).insert_header((VARY, "Accept"));
        if self.secret.is_some() || self.format != Format::Json {
            for warning in warning_headers(&rendered.warnings) {
                response.append_header((WARNING, warning));
            }
        }
        let document = rendered.document.expose_secret();
        if let Some(secret) = &self.secret {
            let manifest = SecretManifest {
                name: &secret.name,
                namespace: secret.namespace.as_ref(),
                labels: secret.labels.as_map(),
                annotations: &BTreeMap::new(),
                resource_version: None,
                content: &SecretContent::new(secret.secret_type, &rendered.document),
            };
            let (media_type, written) = match self.format {
                Format::Yaml => ("application/yaml", manifest.to_yaml()),
                _ => ("application/json", manifest.to_json()),
            };
            let text = written.map_err(|error| ApiError::Internal(error.into()))?;
            return Ok(response.content_type(media_type).body(text.expose_secret().to_owned()));
        }
        Ok(match self.format {
            Format::Document => response.content_type("text/plain").body(document.to_owned()),
            Format::Base64 => response.content_type("text/plain").body(BASE64_STANDARD.encode(document) + "\n"),
            Format::Env => response.content_type("text/plain").body(format!("DOCKER_AUTH_CONFIG={document}\n")),
            Format::Json | Format::Yaml => response.json(DockerConfig {
                profile: self.profile,
                config: serde_json::from_str(document).map_err(|error| ApiError::Internal(error.into()))?,
                base64: BASE64_STANDARD.encode(document),
                accounts: accounts.iter().map(Name::to_string).collect(),
                valid_until,
                warnings: rendered.warnings,
            }),
        })
    }
}

/// Maximum number of `Warning` headers. Clients limit the number of headers.
const WARNING_HEADERS_MAX: usize = 10;

/// Formats warnings as `299 AGENT "TEXT"` (RFC 7234, section 5.5), in ASCII.
fn warning_headers(warnings: &[Warning]) -> Vec<String> {
    let header = |text: &str| {
        let plain = text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect::<String>();
        format!("299 regcred \"{}\"", plain.replace('\\', "\\\\").replace('"', "\\\""))
    };
    let shown = warnings.iter().take(WARNING_HEADERS_MAX);
    let mut headers: Vec<_> = shown
        .map(|warning| match (&warning.account, &warning.key) {
            (Some(account), _) => header(&format!("{account}: {}", warning.detail)),
            (None, Some(key)) => header(&format!("{key}: {}", warning.detail)),
            (None, None) => header(&warning.detail),
        })
        .collect();
    if let Some(more) = warnings.len().checked_sub(WARNING_HEADERS_MAX).filter(|more| *more > 0) {
        headers.push(header(&format!("{more} more warnings; request the format json to read them")));
    }
    headers
}

/// Image, and the entries to explain.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExplainDockerConfig {
    /// Image as in a pod spec, with or without host, tag and digest.
    #[schema(example = "registry.example.com:5000/os/alpine:3")]
    image: String,
    /// Names of the accounts.
    accounts: Option<Vec<String>>,
    /// Selects the accounts by label, instead of `accounts`.
    account_selector: Option<LabelSelectorDocument>,
    /// Docker config to explain, instead of accounts: the document, or a string with its text, its
    /// base64, or the manifest of a Secret that contains it. It is not stored.
    #[schema(schema_with = document_or_text)]
    config: Option<Box<RawValue>>,
    /// Name of a pull secret whose accounts to explain, instead of `accounts`. Requires the
    /// permission to read pull secrets.
    pull_secret: Option<String>,
    /// `ServiceAccount` whose pull secrets to explain, instead of `accounts`: those that are declared
    /// to be attached to it. The cluster is not asked. Requires the permissions to read pull secrets
    /// and clusters.
    service_account: Option<ServiceAccountInput>,
}

/// A `ServiceAccount` of a cluster.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountInput {
    /// Name of the cluster.
    #[schema(example = "dev")]
    cluster: String,
    /// Namespace.
    #[schema(example = "default")]
    namespace: String,
    /// Name of the `ServiceAccount`.
    #[schema(example = "default")]
    name: String,
}

/// Explain which entry each reader uses for an image, and why others do not match.
///
/// Explains accounts, a docker config in the request, a pull secret, or the pull secrets of a
/// `ServiceAccount`. The response contains no passwords.
#[utoipa::path(
    tag = "docker-configs",
    request_body = ExplainDockerConfig,
    responses((status = OK, body = Explanation)),
)]
#[post("/docker-configs/explain")]
pub async fn explain_docker_config(
    caller: Caller<ReadAccounts>,
    docker_configs: Data<DockerConfigs>,
    body: Json<ExplainDockerConfig, DOCUMENT_MAX_BYTES>,
) -> Result<HttpResponse, ApiError> {
    let (subject, image) = body.0.parse()?;
    for permission in subject.permissions() {
        auth::require(&caller.identity, *permission)?;
    }
    Ok(HttpResponse::Ok().json(docker_configs.explain(&caller.identity, subject, image).await?))
}

/// A docker config as JSON, or as text.
fn document_or_text() -> Schema {
    let typed = |schema_type| ObjectBuilder::new().schema_type(schema_type);
    let alternatives = OneOfBuilder::new().item(typed(Type::Object)).item(typed(Type::String)).item(typed(Type::Null));
    alternatives.into()
}

impl ExplainDockerConfig {
    fn parse(self) -> Result<(Subject, ImageName), ApiError> {
        let mut errors = FieldErrors::default();
        let image = errors.take("image", ImageName::parse(&self.image));
        let given = [
            ("accounts", self.accounts.is_some() || self.account_selector.is_some()),
            ("config", self.config.is_some()),
            ("pullSecret", self.pull_secret.is_some()),
            ("serviceAccount", self.service_account.is_some()),
        ];
        let given: Vec<_> = given.iter().filter(|(_, is_given)| *is_given).map(|(field, _)| *field).collect();
        let subject = match given[..] {
            [] => {
                let detail = "is missing; name accounts, or give an `accountSelector`, a `config`, a `pullSecret` or a \
                              `serviceAccount`";
                errors.refuse("accounts", detail);
                None
            }
            [_] => self.subject(&mut errors),
            [first, .., last] => {
                errors.refuse(last, format!("cannot be combined with `{first}`; remove one of them"));
                None
            }
        };
        Ok(errors.finish(|| subject.zip(image))?)
    }

    /// Parses the only subject that is given.
    fn subject(self, errors: &mut FieldErrors) -> Option<Subject> {
        if let Some(config) = self.config {
            return Some(Subject::Config(text_of(&config)));
        }
        if let Some(name) = self.pull_secret {
            return errors.take("pullSecret", Name::parse(&name)).map(Subject::PullSecret);
        }
        if let Some(given) = self.service_account {
            let cluster = errors.take("serviceAccount.cluster", Name::parse(&given.cluster));
            let namespace = errors.take("serviceAccount.namespace", NamespaceName::parse(&given.namespace));
            let name = errors.take("serviceAccount.name", ServiceAccountName::parse(&given.name));
            let (cluster, namespace, name) = (cluster?, namespace?, name?);
            return Some(Subject::ServiceAccount { cluster, account: ServiceAccountRef { namespace, name } });
        }
        AccountSelection::parse(errors, self.accounts, self.account_selector).map(Subject::Accounts)
    }
}

/// Text of a document: the value of a JSON string, or the JSON itself.
fn text_of(config: &RawValue) -> SecretString {
    serde_json::from_str::<String>(config.get()).unwrap_or_else(|_| config.get().to_owned()).into()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::domain::docker_config::WarningCode;

    #[rstest]
    #[case("*/*", &["*/*"])]
    #[case("text/plain, application/json", &["text/plain", "application/json"])]
    #[case("application/json;q=0.1, text/plain", &["text/plain", "application/json"])]
    #[case("a/b;v=1;q=0.5,c/d;q=0.9,e/f;q=0", &["c/d", "a/b"])]
    #[case("a/b;q=much", &[])]
    fn media_ranges_are_ordered_by_preference(#[case] accept: &str, #[case] expected: &[&str]) {
        assert_eq!(preferred(accept).collect::<Vec<_>>(), expected);
    }

    fn warning(account: Option<&str>, key: Option<&str>, detail: &str) -> Warning {
        let code = WarningCode::MatchesMore;
        Warning { code, account: account.map(str::to_owned), key: key.map(str::to_owned), detail: detail.to_owned() }
    }

    #[test]
    fn a_warning_is_escaped_in_its_header() {
        let headers = warning_headers(&[
            warning(Some("team-a"), Some("reg.io"), "a `b`"),
            warning(None, Some("…@reg.io"), "a \"b\" \\ c\n"),
            warning(None, None, "all"),
        ]);
        let expected =
            [r#"299 regcred "team-a: a `b`""#, r#"299 regcred "?@reg.io: a \"b\" \\ c?""#, r#"299 regcred "all""#];
        assert_eq!(headers, expected);
    }

    #[test]
    fn further_warnings_are_counted_in_the_last_header() {
        let headers = warning_headers(&vec![warning(None, None, "x"); 12]);
        assert_eq!(headers.len(), 11);
        assert!(headers[10].contains("2 more warnings"), "{headers:?}");
    }
}
