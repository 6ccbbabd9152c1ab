//! Check of one login against a registry.

mod pull;

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderValue, StatusCode, header};
use reqwest::{Method, RequestBuilder};
use secrecy::ExposeSecret;
use tokio::time::Instant;
use url::Url;

use super::{
    Login, RegistryClient,
    challenge::{self, Challenge},
    endpoint::{Purpose, RegistryEndpoint, RegistryResponse},
    token::{Recognition, Token},
    token_service::{TokenResponse, TokenService},
};
use crate::{
    clients::outbound::{Schemes, parse_url},
    domain::{
        registry::RepositoryName,
        verification::{VerificationReport, VerificationResult as Found},
    },
};

/// Host of Docker Hub's registry API, which differs from the host in image references.
const DOCKER_HUB_API: &str = "registry-1.docker.io";
/// Manifest types that a registry may answer with.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Registries whose token service issues no token for a wrong login, not even where anonymous
/// clients get one. Its tokens are opaque, so they do not tell how a client was identified.
///
/// For ghcr.io: an expired login is refused for public images, `denied: denied`
/// (<https://github.com/dexidp/dex/issues/2672>, <https://github.com/termoshtt/ocipkg/issues/115>).
const REFUSE_WRONG_LOGINS: [&str; 1] = ["ghcr.io"];

const ANONYMOUS_TOKEN: &str = "the token service gives this login the same token as anonymous clients, so the password \
     is unverified: name a repository that is not public";
const TAKEN_FOR_ANONYMOUS: &str = "the token service treats this login as anonymous: it is wrong, expired or revoked";

/// A value, or the finding that ends the check early.
pub(super) type Step<T> = Result<T, VerificationReport>;

pub(super) fn end<T>(result: Found, detail: impl Into<String>) -> Step<T> {
    Err(VerificationReport::new(result, detail))
}

/// Authorization of a request.
enum Auth<'a> {
    None,
    Basic,
    Bearer(&'a Token),
}

/// Access to a repository, as the registry's own routes answer.
enum Access {
    /// The repository may be read.
    Granted,
    /// 401 or 403, with its challenge.
    Denied(Option<Challenge>),
    /// 404: the repository is absent or hidden.
    Missing,
}

/// Check of one login.
pub(super) struct LoginCheck<'a> {
    pub(super) registries: &'a RegistryClient,
    pub(super) login: &'a Login<'a>,
    pub(super) repository: Option<&'a RepositoryName>,
    pub(super) purpose: Purpose<'a>,
    pub(super) deadline: Instant,
}

impl<'a> LoginCheck<'a> {
    /// Runs the check. An early finding is returned as an error.
    pub(super) async fn run(&self) -> Step<VerificationReport> {
        let registry = self.registry().await?;
        let root = self.get_root(&registry, &Auth::None).await?;
        match root.status.as_u16() {
            200 => {
                self.require_registry(&registry, root).await?;
                self.check_open(&registry).await
            }
            401 => match challenge::parse(root.challenges()) {
                Some(challenge) => self.check_challenge(&registry, challenge).await,
                None => end(
                    Found::NotARegistry,
                    format!("{} requests an authentication scheme that registries do not use", registry.label()),
                ),
            },
            403 => end(
                Found::NoAccess,
                format!("{} refuses this host before any login (403): check for a firewall", registry.label()),
            ),
            400 if self.login.plain_http => self.explain_bad_request(&registry, root).await,
            status => not_a_registry(&registry, status),
        }
    }

    async fn registry(&self) -> Step<RegistryEndpoint<'a>> {
        let url = parse_url(&format!("{}/", self.origin()), Schemes::HttpAndHttps)
            .map_err(|reason| VerificationReport::new(Found::Refused, format!("the registry's address {reason}")))?;
        let is_image_registry = matches!(self.purpose, Purpose::Pull(_));
        self.endpoint(&url, self.login.registry.authority().to_owned(), is_image_registry).await
    }

    async fn endpoint(&self, url: &Url, label: String, is_image_registry: bool) -> Step<RegistryEndpoint<'a>> {
        let (ca_certificate, usage) = (self.login.ca_certificate, (self.purpose, is_image_registry));
        RegistryEndpoint::admit(self.registries, url, label, ca_certificate, usage, self.deadline).await
    }

    /// Scheme and authority of the registry. Its parts are parsed, so they need no escaping.
    fn origin(&self) -> String {
        let scope = self.login.registry;
        let scheme = if self.login.plain_http { "http" } else { "https" };
        let authority = if scope.is_docker_hub() { DOCKER_HUB_API } else { scope.authority() };
        format!("{scheme}://{authority}")
    }

    fn url(&self, path: &str) -> String {
        format!("{}/v2/{path}", self.origin())
    }

    fn request(&self, endpoint: &RegistryEndpoint<'_>, method: Method, path: &str, auth: &Auth<'_>) -> RequestBuilder {
        let request = endpoint.http().request(method, self.url(path));
        match auth {
            Auth::None => request,
            Auth::Basic => self.with_basic(request),
            Auth::Bearer(token) => with_authorization(request, &format!("Bearer {}", token.secret.expose_secret())),
        }
    }

    pub(super) fn with_basic(&self, request: RequestBuilder) -> RequestBuilder {
        let Login { username, password, .. } = self.login;
        let pair = BASE64_STANDARD.encode(format!("{username}:{}", password.expose_secret()));
        with_authorization(request, &format!("Basic {pair}"))
    }

    async fn get_root(&self, registry: &RegistryEndpoint<'_>, auth: &Auth<'_>) -> Step<RegistryResponse> {
        registry.send(self.request(registry, Method::GET, "", auth)).await
    }

    /// Requires the header of a registry, a JSON object or no body: web sites answer 200 for any
    /// path.
    async fn require_registry(&self, registry: &RegistryEndpoint<'_>, response: RegistryResponse) -> Step<()> {
        if response.header("docker-distribution-api-version").contains("registry/2") {
            return Ok(());
        }
        let body = registry.read_body(response).await?;
        match serde_json::from_slice(&body) {
            Ok(serde_json::Value::Object(_)) => Ok(()),
            _ if body.is_empty() => Ok(()),
            _ => end(
                Found::NotARegistry,
                format!("{} answers like a web site, not a registry: check its name and port", registry.label()),
            ),
        }
    }

    /// Recognizes how web servers answer plain HTTP on their TLS port. The text is compared, not
    /// passed on.
    async fn explain_bad_request(
        &self,
        registry: &RegistryEndpoint<'_>,
        response: RegistryResponse,
    ) -> Step<VerificationReport> {
        let body = registry.read_body(response).await.unwrap_or_default();
        let text = String::from_utf8_lossy(&body).to_ascii_lowercase();
        if text.contains("http request to an https server") || text.contains("plain http request was sent to https") {
            let label = registry.label();
            return end(Found::TlsError, format!("{label} speaks TLS: set the account's plainHttp to false"));
        }
        not_a_registry(registry, 400)
    }

    /// Checks a registry whose root admits anonymous clients.
    async fn check_open(&self, registry: &RegistryEndpoint<'_>) -> Step<VerificationReport> {
        let root = self.get_root(registry, &Auth::Basic).await?;
        match (root.status.as_u16(), challenge::parse(root.challenges())) {
            (200, _) => {}
            (401, Some(challenge @ Challenge::Bearer { .. })) => {
                return self.check_challenge(registry, challenge).await;
            }
            _ => return end(Found::Invalid, "the registry admits anonymous clients, but refuses this login"),
        }
        let open = "the registry admits anonymous clients, so the password is unverified";
        let Some(repository) = self.repository else {
            return end(Found::Anonymous, format!("{open}: name a repository that is not public"));
        };
        match self.access(registry, &Auth::None, repository).await? {
            Access::Granted => end(Found::Anonymous, format!("{open}, and {repository} is public")),
            Access::Denied(Some(challenge)) => self.check_challenge(registry, challenge).await,
            Access::Denied(None) => end(Found::NoAccess, format!("the registry lets no client read {repository}")),
            Access::Missing => end(Found::NoAccess, missing(repository)),
        }
    }

    async fn check_challenge(&self, registry: &RegistryEndpoint<'_>, challenge: Challenge) -> Step<VerificationReport> {
        match challenge {
            Challenge::Basic => self.check_basic(registry).await,
            Challenge::Bearer { realm, service } => self.check_bearer(registry, &realm, service.as_deref()).await,
        }
    }

    async fn check_basic(&self, registry: &RegistryEndpoint<'_>) -> Step<VerificationReport> {
        let root = self.get_root(registry, &Auth::Basic).await?;
        match root.status.as_u16() {
            200 => self.require_registry(registry, root).await?,
            401 => {
                return end(Found::Invalid, "the registry refuses this login (401): it is wrong, expired or revoked");
            }
            // Without the login the status was 401, so the login makes the difference. ECR answers
            // expired logins so.
            400 => return end(Found::Invalid, "the registry refuses this login (400): it has probably expired"),
            403 if self.says_expired(registry, root).await => {
                return end(Found::Invalid, "the registry reports that this login has expired (403)");
            }
            403 => return end(Found::NoAccess, "the registry accepts this login but grants it nothing (403)"),
            status => return not_a_registry(registry, status),
        }
        let Some(repository) = self.repository else { return Ok(valid()) };
        match self.access(registry, &Auth::Basic, repository).await? {
            Access::Granted => Ok(may_read(repository)),
            Access::Denied(_) => end(Found::NoAccess, denied(repository)),
            Access::Missing => end(Found::NoAccess, missing(repository)),
        }
    }

    async fn says_expired(&self, registry: &RegistryEndpoint<'_>, response: RegistryResponse) -> bool {
        let body = registry.read_body(response).await.unwrap_or_default();
        String::from_utf8_lossy(&body).to_ascii_lowercase().contains("expired")
    }

    async fn check_bearer(
        &self,
        registry: &RegistryEndpoint<'_>,
        realm: &str,
        service: Option<&str>,
    ) -> Step<VerificationReport> {
        let realm = self.parse_realm(realm)?;
        let other = self.token_endpoint(registry, &realm).await?;
        let endpoint = other.as_ref().unwrap_or(registry);
        let tokens = TokenService { check: self, endpoint, realm, service };
        let scope = self.repository.map(|repository| format!("repository:{repository}:pull"));
        let token = match tokens.token_for_login(scope.as_deref()).await? {
            TokenResponse::Token(token) => token,
            TokenResponse::Refused(status) => return self.token_refused(&tokens, status).await,
            TokenResponse::MethodNotSupported => {
                return end(Found::NotARegistry, "the registry names a token service that does not exist (404)");
            }
        };
        let anonymous = match tokens.anonymous_token(scope.as_deref()).await {
            Ok(TokenResponse::Token(token)) => Some(token),
            Ok(TokenResponse::Refused(_) | TokenResponse::MethodNotSupported) => None,
            // A login page or an empty body instead of a token.
            Err(finding) if finding.result == Found::NotARegistry => None,
            Err(finding) => return Err(finding),
        };
        let recognition = if self.refuses_wrong_logins(&tokens.realm) {
            Recognition::Login
        } else {
            token.recognition(anonymous.as_ref())
        };
        match self.repository {
            Some(repository) => self.check_pull(registry, repository, &token, recognition, anonymous.as_ref()).await,
            None => self.check_token(registry, &token, recognition, anonymous.as_ref()).await,
        }
    }

    /// Parses the URL of the token service that the registry names.
    fn parse_realm(&self, realm: &str) -> Step<Url> {
        let schemes = if self.login.plain_http { Schemes::HttpAndHttps } else { Schemes::Https };
        parse_url(realm, schemes).map_err(|reason| {
            VerificationReport::new(
                Found::Refused,
                format!("the URL of the token service that the registry names {reason}"),
            )
        })
    }

    /// Admits the token service, unless the registry itself is it: a second endpoint of the same
    /// host would need a second permit.
    async fn token_endpoint(&self, registry: &RegistryEndpoint<'_>, realm: &Url) -> Step<Option<RegistryEndpoint<'a>>> {
        if Url::parse(&self.url("")).is_ok_and(|url| url.origin() == realm.origin()) {
            return Ok(None);
        }
        self.endpoint(realm, format!("the token service of {}", registry.label()), false).await.map(Some)
    }

    /// Whether this token service of the registry issues no token for a wrong login.
    fn refuses_wrong_logins(&self, realm: &Url) -> bool {
        let host = self.login.registry.host();
        REFUSE_WRONG_LOGINS.contains(&host) && realm.host_str() == Some(host)
    }

    /// Finds out whether the token service refused the login, the repository or the kind of
    /// request.
    async fn token_refused(&self, tokens: &TokenService<'_, '_>, status: StatusCode) -> Step<VerificationReport> {
        let status = status.as_u16();
        if let Some(repository) = self.repository
            && status != 401
            && let TokenResponse::Token(_) = tokens.token_for_login(None).await?
        {
            return end(
                Found::NoAccess,
                format!("the token service accepts this login, but not for {repository} ({status})"),
            );
        }
        // If anonymous clients get the same 400, it is not about the login.
        if status == 400
            && matches!(tokens.anonymous_token(None).await?, TokenResponse::Refused(other) if other == status)
        {
            return end(Found::NotARegistry, "the token service of the registry answers every request with 400");
        }
        let reason = if status == 400 { "it has probably expired" } else { "it is wrong, expired or revoked" };
        end(Found::Invalid, format!("the token service refuses this login ({status}): {reason}"))
    }

    /// Without a repository: the registry must accept the token, and it must differ from an
    /// anonymous one.
    async fn check_token(
        &self,
        registry: &RegistryEndpoint<'_>,
        token: &Token,
        recognition: Recognition,
        anonymous: Option<&Token>,
    ) -> Step<VerificationReport> {
        let root = self.get_root(registry, &Auth::Bearer(token)).await?;
        match (root.status.as_u16(), recognition, anonymous) {
            (200, Recognition::Login, _) => Ok(valid()),
            (200, Recognition::Unknown, Some(anonymous)) => {
                match self.get_root(registry, &Auth::Bearer(anonymous)).await?.status.as_u16() {
                    200 => end(Found::Anonymous, ANONYMOUS_TOKEN),
                    _ => Ok(valid()),
                }
            }
            (200, ..) => end(Found::Anonymous, ANONYMOUS_TOKEN),
            (401 | 403, Recognition::Anonymous, _) => end(Found::Invalid, TAKEN_FOR_ANONYMOUS),
            (401, ..) => {
                end(Found::Invalid, "the registry refuses the token that its token service issues for this login")
            }
            (403, ..) => end(Found::NoAccess, "the registry accepts this login but grants it nothing (403)"),
            (status, ..) => not_a_registry(registry, status),
        }
    }

    /// With a repository: the registry's answer decides, compared with its answer to an anonymous
    /// client.
    async fn check_pull(
        &self,
        registry: &RegistryEndpoint<'_>,
        repository: &RepositoryName,
        token: &Token,
        recognition: Recognition,
        anonymous: Option<&Token>,
    ) -> Step<VerificationReport> {
        match (self.access(registry, &Auth::Bearer(token), repository).await?, recognition) {
            (Access::Granted, Recognition::Login) => Ok(may_read(repository)),
            (Access::Granted, Recognition::Anonymous | Recognition::Unknown) => {
                let auth = anonymous.map_or(Auth::None, Auth::Bearer);
                match self.access(registry, &auth, repository).await? {
                    Access::Granted => {
                        end(Found::Anonymous, format!("{repository} is public, so the password is unverified"))
                    }
                    Access::Denied(_) | Access::Missing => Ok(may_read(repository)),
                }
            }
            (Access::Denied(_) | Access::Missing, Recognition::Anonymous) => end(Found::Invalid, TAKEN_FOR_ANONYMOUS),
            (Access::Denied(_), _) if token.grants_nothing(repository.as_str()) => end(
                Found::NoAccess,
                format!(
                    "the token service accepts this login but grants it no access to {repository}; Harbor answers \
                     expired robot accounts in the same way"
                ),
            ),
            (Access::Denied(_), _) => end(Found::NoAccess, denied(repository)),
            (Access::Missing, _) => end(Found::NoAccess, missing(repository)),
        }
    }

    /// Requests a manifest of the repository, then its tags: an absent manifest alone proves
    /// nothing.
    async fn access(
        &self,
        registry: &RegistryEndpoint<'_>,
        auth: &Auth<'_>,
        repository: &RepositoryName,
    ) -> Step<Access> {
        let head = self.request(registry, Method::HEAD, &format!("{repository}/manifests/latest"), auth);
        let head = registry.send(head.header(header::ACCEPT, MANIFEST_TYPES)).await?;
        match access_of(&head) {
            Some(Access::Missing) | None => {}
            Some(access) => return Ok(access),
        }
        let tags = self.request(registry, Method::GET, &format!("{repository}/tags/list?n=1"), auth);
        let tags = registry.send(tags).await?;
        let access = access_of(&tags);
        access.map_or_else(|| end(Found::NotARegistry, "the registry does not answer for repositories"), Ok)
    }
}

fn access_of(response: &RegistryResponse) -> Option<Access> {
    match response.status.as_u16() {
        // A redirect to the storage of the data follows authorization.
        200..=399 => Some(Access::Granted),
        401 | 403 => Some(Access::Denied(challenge::parse(response.challenges()))),
        404 => Some(Access::Missing),
        _ => None,
    }
}

fn not_a_registry<T>(registry: &RegistryEndpoint<'_>, status: u16) -> Step<T> {
    let label = registry.label();
    let detail = match status {
        300..=399 => {
            format!("{label} redirects ({status}), which is not followed: use the name of the registry it leads to")
        }
        404 => format!("{label} has no registry (404 at /v2/): check its name and port"),
        _ => format!("{label} answers {status} at /v2/, which no registry does"),
    };
    end(Found::NotARegistry, detail)
}

fn valid() -> VerificationReport {
    VerificationReport::new(Found::Valid, "the registry accepts this login")
}

fn may_read(repository: &RepositoryName) -> VerificationReport {
    VerificationReport::new(Found::Valid, format!("the registry accepts this login, and it may read {repository}"))
}

fn denied(repository: &RepositoryName) -> String {
    format!("the registry accepts this login, but it may not read {repository}")
}

fn missing(repository: &RepositoryName) -> String {
    format!("the repository {repository} does not exist, or this login may not see it (404)")
}

/// Adds an `Authorization` header that `Debug` does not print.
fn with_authorization(request: RequestBuilder, value: &str) -> RequestBuilder {
    let Ok(mut value) = HeaderValue::from_str(value) else { return request };
    value.set_sensitive(true);
    request.header(header::AUTHORIZATION, value)
}
