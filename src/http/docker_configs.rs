//! `/v1/docker-configs`

use std::collections::BTreeMap;

use actix_web::{
    HttpRequest, HttpResponse,
    http::header::{ACCEPT, CACHE_CONTROL, VARY, WARNING},
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
        matching::{Explanation, ImageName},
        names::{Labels, NamespaceName, SecretName},
        secret::{SecretContent, SecretManifest, SecretType},
        unique::UniqueMap,
    },
    http::{
        auth::{
            Caller,
            permission::{ReadAccounts, RevealCredentials},
        },
        body::{DOCUMENT_MAX_BYTES, Json},
        problem::ApiError,
        selection::{LabelSelectorInput, choice},
    },
    service::docker_configs::{AccountChoice, DockerConfigs, Subject},
};

/// Which accounts, for which reader, in which form.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateDockerConfig {
    /// Names of the accounts.
    #[schema(min_items = 1, max_items = 1000, example = json!(["martin-5000", "martin-6000"]))]
    accounts: Option<Vec<String>>,
    /// All accounts with such labels, in place of `accounts`.
    account_selector: Option<LabelSelectorInput>,
    /// Which program will read it: `kubernetes` if not said or, with `secret`, the one that fits the Secret's type.
    profile: Option<Profile>,
    /// Answer with the manifest of this Secret.
    secret: Option<SecretManifestInput>,
    /// The form of the answer, in place of `Accept`.
    format: Option<Format>,
}

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Format {
    /// The document with its base64 and warnings, or the manifest, as JSON (`application/json`).
    Json,
    /// The manifest as YAML (`application/yaml`); needs `secret`.
    Yaml,
    /// The line for a CI job's environment, `DOCKER_AUTH_CONFIG=…` (`text/plain`); needs the profile `dockerAuthConfig`.
    Env,
    /// The bare document, ready to be the reader's file.
    Document,
    /// The document's base64 alone, on one line.
    Base64,
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
    #[schema(value_type = BTreeMap<String, String>)]
    labels: UniqueMap<String>,
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

/// A request, parsed.
struct Order {
    choice: AccountChoice,
    profile: Profile,
    secret: Option<Target>,
    format: Format,
}

/// What a manifest is made of, parsed.
struct Target {
    name: SecretName,
    namespace: Option<NamespaceName>,
    secret_type: SecretType,
    labels: Labels,
}

impl CreateDockerConfig {
    fn parse(self, request: &HttpRequest) -> Result<Order, ApiError> {
        let mut errors = FieldErrors::default();
        let choice = choice(&mut errors, self.accounts, self.account_selector);
        let is_manifest = self.secret.is_some();
        let secret = self.secret.and_then(|secret| secret.parse(&mut errors));
        let fitting = secret.as_ref().map_or(Profile::Kubernetes, |secret| secret.secret_type.profile());
        let profile = self.profile.unwrap_or(fitting);
        if secret.is_some() && profile != fitting {
            errors.refuse("profile", "does not fit the type of the Secret; leave it out");
        }
        match self.format {
            Some(Format::Yaml) if !is_manifest => {
                errors.refuse("format", "can be yaml only with `secret`: it is a form of the manifest");
            }
            Some(Format::Env) if profile != Profile::DockerAuthConfig || is_manifest => {
                errors.refuse("format", "can be env only with the profile dockerAuthConfig and without `secret`");
            }
            Some(Format::Document | Format::Base64) if is_manifest => {
                errors.refuse("format", "must be json or yaml for a manifest");
            }
            _ => {}
        }
        let (choice, format) = errors.finish(|| choice.map(|choice| (choice, self.format)))?;
        let format = match format {
            Some(format) => format,
            None => accepted(request, is_manifest, profile)?,
        };
        Ok(Order { choice, profile, secret, format })
    }
}

impl SecretManifestInput {
    fn parse(self, errors: &mut FieldErrors) -> Option<Target> {
        let name = errors.take("secret.name", SecretName::parse(&self.name));
        let namespace = self.namespace.as_deref().map(NamespaceName::parse).transpose();
        let namespace = errors.take("secret.namespace", namespace);
        let secret_type = self.secret_type.as_deref().map_or(Ok(SecretType::default()), str::parse);
        let secret_type = errors.take("secret.type", secret_type);
        let labels = errors.take("secret.labels", Labels::parse(self.labels.0));
        Some(Target { name: name?, namespace: namespace?, secret_type: secret_type?, labels: labels? })
    }
}

/// What the caller wants of what can be had: YAML only of a manifest, the environment's line only for its profile.
fn accepted(request: &HttpRequest, is_manifest: bool, profile: Profile) -> Result<Format, ApiError> {
    let has_line = profile == Profile::DockerAuthConfig && !is_manifest;
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or("*/*");
    for media_type in preferred(accept) {
        match media_type {
            "" | "*/*" | "application/*" | "application/json" => return Ok(Format::Json),
            "application/yaml" | "application/x-yaml" | "text/yaml" if is_manifest => return Ok(Format::Yaml),
            "text/plain" | "text/*" if has_line => return Ok(Format::Env),
            _ => {}
        }
    }
    Err(ApiError::NotAcceptable(match (is_manifest, has_line) {
        (true, _) => "application/json or application/yaml",
        (false, true) => "application/json or text/plain",
        (false, false) => "application/json (application/yaml needs `secret`, text/plain the profile dockerAuthConfig)",
    }))
}

/// The media ranges of an `Accept`, the most wanted first; those that are not wanted (`q=0`) are left out.
fn preferred(accept: &str) -> impl Iterator<Item = &str> {
    let weighed = accept.split(',').map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0));
        (media_type, weight)
    });
    let mut wanted: Vec<_> = weighed.filter(|(_, weight)| *weight > 0.0).collect();
    wanted.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    wanted.into_iter().map(|(media_type, _)| media_type)
}

/// Render accounts as a docker config, or as the manifest of a Secret.
///
/// With `secret` the answer is the Secret's manifest, as JSON or, for `Accept: application/yaml`, as YAML, ready for
/// `kubectl apply -f -`. With the profile `dockerAuthConfig` and `Accept: text/plain` it is the line
/// `DOCKER_AUTH_CONFIG=…` for a CI job. The answer holds passwords. Where its form has no place for warnings, they are in
/// `Warning` headers, as those of a Kubernetes API server.
#[utoipa::path(
    tag = "docker-configs",
    request_body = CreateDockerConfig,
    responses((status = OK, description = "The docker config, or the Secret's manifest", content(
        (DockerConfig = "application/json"),
        (String = "application/yaml"),
        (String = "text/plain"),
    ))),
)]
#[post("/docker-configs")]
pub async fn create_docker_config(
    caller: Caller<RevealCredentials>,
    docker_configs: Data<DockerConfigs>,
    request: HttpRequest,
    body: Json<CreateDockerConfig>,
) -> Result<HttpResponse, ApiError> {
    let order = body.0.parse(&request)?;
    let rendered = docker_configs.reveal(&caller.identity, order.profile, &order.choice).await?;
    order.shape(rendered)
}

impl Order {
    fn shape(self, rendered: RenderedConfig) -> Result<HttpResponse, ApiError> {
        let mut response = HttpResponse::Ok();
        response.insert_header((CACHE_CONTROL, "no-store")).insert_header((VARY, "Accept"));
        if self.secret.is_some() || self.format != Format::Json {
            for warning in warning_headers(&rendered.warnings) {
                response.append_header((WARNING, warning));
            }
        }
        let document = rendered.document.expose_secret();
        if let Some(target) = &self.secret {
            let manifest = SecretManifest {
                name: &target.name,
                namespace: target.namespace.as_ref(),
                labels: target.labels.as_map(),
                annotations: &BTreeMap::new(),
                resource_version: None,
                content: &SecretContent::new(target.secret_type, &rendered.document),
            };
            let (media_type, written) = match self.format {
                Format::Yaml => ("application/yaml", manifest.to_yaml()),
                _ => ("application/json", manifest.to_json()),
            };
            let text = written.map_err(|error| ApiError::Internal(error.into()))?;
            return Ok(response.content_type(media_type).body(text.expose_secret().to_owned()));
        }
        Ok(match self.format {
            Format::Document => response.content_type("application/json").body(document.to_owned()),
            Format::Base64 => response.content_type("text/plain").body(BASE64_STANDARD.encode(document) + "\n"),
            Format::Env => response.content_type("text/plain").body(format!("DOCKER_AUTH_CONFIG={document}\n")),
            Format::Json | Format::Yaml => response.json(DockerConfig {
                profile: self.profile,
                config: serde_json::from_str(document).map_err(|error| ApiError::Internal(error.into()))?,
                base64: BASE64_STANDARD.encode(document),
                warnings: rendered.warnings,
            }),
        })
    }
}

/// The most `Warning` headers of one answer: clients take only so many.
const WARNING_HEADERS_MAX: usize = 10;

/// `299 AGENT "TEXT"` (RFC 7234, section 5.5), in ASCII.
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
        headers.push(header(&format!("there are {more} more warnings: ask for the format json to see them")));
    }
    headers
}

/// Which image, and among which entries.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExplainDockerConfig {
    /// The image, as it stands in a pod: with or without host, tag and digest.
    #[schema(example = "registry.martin.com:5000/os/alpine:3")]
    image: String,
    /// Names of accounts.
    accounts: Option<Vec<String>>,
    /// All accounts with such labels, in place of `accounts`.
    account_selector: Option<LabelSelectorInput>,
    /// A docker config to look at in place of accounts: the document itself, or as a string its text, its base64 or
    /// the manifest of a Secret that holds it. It is not stored.
    #[schema(value_type = Option<Object>, write_only)]
    config: Option<Box<RawValue>>,
}

/// Say which entry each reader would use for an image, and why not another.
///
/// Works on accounts, or on a docker config that the caller pastes. No password is in the answer.
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
    Ok(HttpResponse::Ok().json(docker_configs.explain(&caller.identity, subject, image).await?))
}

impl ExplainDockerConfig {
    fn parse(self) -> Result<(Subject, ImageName), ApiError> {
        let mut errors = FieldErrors::default();
        let image = errors.take("image", ImageName::parse(&self.image));
        let subject = if let Some(pasted) = self.config {
            if self.accounts.is_some() || self.account_selector.is_some() {
                errors.refuse("config", "must not stand beside `accounts` or `accountSelector`");
            }
            Some(Subject::Config(text_of(&pasted)))
        } else if self.accounts.is_none() && self.account_selector.is_none() {
            errors.refuse("accounts", "is missing; name accounts, or give an `accountSelector` or a `config`");
            None
        } else {
            choice(&mut errors, self.accounts, self.account_selector).map(Subject::Accounts)
        };
        Ok(errors.finish(|| subject.zip(image))?)
    }
}

/// A pasted document: a JSON object as it is, a string as the text that it holds.
fn text_of(pasted: &RawValue) -> SecretString {
    serde_json::from_str::<String>(pasted.get()).unwrap_or_else(|_| pasted.get().to_owned()).into()
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
    fn the_most_wanted_form_comes_first(#[case] accept: &str, #[case] expected: &[&str]) {
        assert_eq!(preferred(accept).collect::<Vec<_>>(), expected);
    }

    fn warning(account: Option<&str>, key: Option<&str>, detail: &str) -> Warning {
        let code = WarningCode::MatchesMore;
        Warning { code, account: account.map(str::to_owned), key: key.map(str::to_owned), detail: detail.to_owned() }
    }

    #[test]
    fn a_warning_fits_into_a_header() {
        let headers = warning_headers(&[
            warning(Some("martin"), Some("reg.io"), "a `b`"),
            warning(None, Some("…@reg.io"), "a \"b\" \\ c\n"),
            warning(None, None, "all"),
        ]);
        let expected =
            [r#"299 regcred "martin: a `b`""#, r#"299 regcred "?@reg.io: a \"b\" \\ c?""#, r#"299 regcred "all""#];
        assert_eq!(headers, expected);
    }

    #[test]
    fn many_warnings_are_counted() {
        let headers = warning_headers(&vec![warning(None, None, "x"); 12]);
        assert_eq!(headers.len(), 11);
        assert!(headers[10].contains("there are 2 more"), "{headers:?}");
    }
}
