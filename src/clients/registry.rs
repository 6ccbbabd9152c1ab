//! A registry, asked whether a login works (OCI distribution specification; `distribution`, `docs/spec/auth/token.md`).
//!
//! What holds for every check: it ends within [`RegistryClientConfig::timeout`]; only hosts that the [`Guard`] admits are called, at the
//! addresses that it saw; the login goes to the registry and to the token service that it names, over TLS unless the account
//! has `plainHttp`; no redirect is followed; and nothing that came over the wire reaches a log, an error or a result.

mod challenge;
mod limits;
mod peer;
mod token;

use std::{sync::OnceLock, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderValue, StatusCode, header};
use reqwest::{Method, RequestBuilder};
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;
use url::{Url, form_urlencoded};

pub(super) use self::peer::NoResolver;
use self::{
    challenge::Challenge,
    limits::Hosts,
    peer::{Answer, Peer},
    token::{Recognition, Token},
};
use crate::{
    clients::guard::{Guard, Schemes, parse_url},
    domain::{
        cluster::CaCertificate,
        registry::{RegistryScope, RepositoryName},
        verification::{LoginCheck, VerificationResult as Found},
    },
};

/// Where Docker Hub's registry is; its name in image references leads elsewhere.
const DOCKER_HUB_API: &str = "registry-1.docker.io";
/// Who asks, as token services want to know.
const CLIENT_ID: &str = "regcred";
/// The user name under which docker keeps a token that is to be exchanged for others.
const IDENTITY_TOKEN_USER: &str = "<token>";
/// What a registry can say of an image without being asked for it.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// How registries are called.
#[derive(Debug, Clone)]
pub struct RegistryClientConfig {
    /// The time after which a check is over, whatever it is waiting for.
    pub timeout: Duration,
    /// The part of it in which a connection must have come about, TLS included.
    pub connect_timeout: Duration,
    /// How many checks of one host run at a time.
    pub checks_per_host: usize,
}

impl Default for RegistryClientConfig {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), connect_timeout: Duration::from_secs(5), checks_per_host: 4 }
    }
}

/// A login to be checked.
#[derive(Debug, Clone, Copy)]
pub struct Login<'a> {
    /// What it is for.
    pub registry: &'a RegistryScope,
    /// Whether the registry is spoken to without TLS.
    pub plain_http: bool,
    /// Who signs the registry's certificate, beside the authorities that this host trusts.
    pub ca_certificate: Option<&'a CaCertificate>,
    /// Who logs in.
    pub username: &'a str,
    /// With what.
    pub password: &'a SecretString,
}

/// Checks logins. It knows which hosts want to be left alone, so there is one for the process.
#[derive(Debug)]
pub struct Registries {
    guard: Guard,
    config: RegistryClientConfig,
    hosts: Hosts,
    /// The host's trust store, read once.
    roots: OnceLock<RootCertStore>,
}

impl Registries {
    /// Gets ready; nothing is called yet.
    #[must_use]
    pub fn new(guard: Guard, config: RegistryClientConfig) -> Self {
        Self { guard, hosts: Hosts::new(config.checks_per_host), config, roots: OnceLock::new() }
    }

    /// Finds out whether a login works and, where a repository is named, whether it may be pulled.
    #[tracing::instrument(name = "registry.verify", skip_all, fields(registry = login.registry.authority()))]
    pub async fn verify(&self, login: &Login<'_>, repository: Option<&RepositoryName>) -> LoginCheck {
        let begin = Instant::now();
        let check = Check { registries: self, login, repository, deadline: begin + self.config.timeout };
        let finding = check.run().await.unwrap_or_else(|end| end);
        let duration_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::debug!(result = %finding.result, duration_ms, "a login was checked");
        finding
    }

    fn tls(&self, ca_certificate: Option<&CaCertificate>) -> ClientConfig {
        let mut roots = self.roots.get_or_init(host_roots).clone();
        let own = ca_certificate.into_iter().flat_map(CaCertificate::as_der);
        roots.add_parsable_certificates(own.map(|der| CertificateDer::from(der.to_vec())));
        ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
    }
}

/// A host without a trust store trusts nobody, which is for the result to say.
pub(super) fn host_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// A result, or the reason why there is none, which ends the check.
type Step<T> = Result<T, LoginCheck>;

fn end<T>(result: Found, detail: impl Into<String>) -> Step<T> {
    Err(LoginCheck::new(result, detail))
}

fn valid() -> LoginCheck {
    LoginCheck::new(Found::Valid, "the registry takes this login")
}

/// How a request shows who asks.
enum Show<'a> {
    Nothing,
    Login,
    Token(&'a Token),
}

/// What a repository's own routes say.
enum Access {
    /// It may be read.
    Granted,
    /// 401 or 403, with its challenge.
    Denied(Option<Challenge>),
    /// 404: it is not there, or hidden.
    Missing,
}

/// What a token service gave.
enum Given {
    Token(Token),
    /// It refused, with this status.
    Refused(StatusCode),
    /// It does not know this way of asking.
    OtherWay,
}

/// One check.
struct Check<'a> {
    registries: &'a Registries,
    login: &'a Login<'a>,
    repository: Option<&'a RepositoryName>,
    deadline: Instant,
}

impl<'a> Check<'a> {
    async fn run(&self) -> Step<LoginCheck> {
        let registry = self.registry().await?;
        let hello = self.get_root(&registry, &Show::Nothing).await?;
        match hello.status.as_u16() {
            200 => {
                self.require_registry(&registry, hello).await?;
                self.check_open(&registry).await
            }
            401 => match challenge::parse(hello.challenges()) {
                Some(challenge) => self.check_challenge(&registry, challenge).await,
                None => end(
                    Found::NotARegistry,
                    format!("{} asks for a kind of login that no registry asks for", registry.label()),
                ),
            },
            403 => end(
                Found::NoAccess,
                format!("{} refuses this host before any login (403): is a firewall in front of it?", registry.label()),
            ),
            400 if self.login.plain_http => self.explain_bad_request(&registry, hello).await,
            status => no_registry(&registry, status),
        }
    }

    async fn registry(&self) -> Step<Peer<'a>> {
        let scope = self.login.registry;
        let scheme = if self.login.plain_http { "http" } else { "https" };
        let authority = if scope.is_docker_hub() { DOCKER_HUB_API } else { scope.authority() };
        let url = parse_url(&format!("{scheme}://{authority}/"), Schemes::HttpAndHttps)
            .map_err(|reason| LoginCheck::new(Found::Refused, format!("the registry's address {reason}")))?;
        self.peer(&url, scope.authority().to_owned()).await
    }

    async fn peer(&self, url: &Url, label: String) -> Step<Peer<'a>> {
        let ca = self.login.ca_certificate;
        Peer::admit(self.registries, url, label, self.registries.tls(ca), ca.is_some(), self.deadline).await
    }

    /// A URL of the registry. Its parts were checked: there is nothing in them to escape.
    fn url(&self, path: &str) -> String {
        let scope = self.login.registry;
        let scheme = if self.login.plain_http { "http" } else { "https" };
        let authority = if scope.is_docker_hub() { DOCKER_HUB_API } else { scope.authority() };
        format!("{scheme}://{authority}/v2/{path}")
    }

    fn request(&self, peer: &Peer<'_>, method: Method, path: &str, show: &Show<'_>) -> RequestBuilder {
        let request = peer.client().request(method, self.url(path));
        match show {
            Show::Nothing => request,
            Show::Login => self.with_basic(request),
            Show::Token(token) => with_authorization(request, &format!("Bearer {}", token.secret.expose_secret())),
        }
    }

    fn with_basic(&self, request: RequestBuilder) -> RequestBuilder {
        let Login { username, password, .. } = self.login;
        let pair = BASE64_STANDARD.encode(format!("{username}:{}", password.expose_secret()));
        with_authorization(request, &format!("Basic {pair}"))
    }

    async fn get_root(&self, registry: &Peer<'_>, show: &Show<'_>) -> Step<Answer> {
        registry.send(self.request(registry, Method::GET, "", show)).await
    }

    /// A 200 is a registry's only with its header or a JSON object: any web server has a 200 for any path.
    async fn require_registry(&self, registry: &Peer<'_>, answer: Answer) -> Step<()> {
        if answer.header("docker-distribution-api-version").contains("registry/2") {
            return Ok(());
        }
        let body = registry.body(answer).await?;
        match serde_json::from_slice(&body) {
            Ok(serde_json::Value::Object(_)) => Ok(()),
            _ if body.is_empty() => Ok(()),
            _ => end(
                Found::NotARegistry,
                format!("{} answers as a web site, not as a registry: check its name and port", registry.label()),
            ),
        }
    }

    /// What web servers say to plain HTTP on their TLS port. The text is compared, and not passed on.
    async fn explain_bad_request(&self, registry: &Peer<'_>, answer: Answer) -> Step<LoginCheck> {
        let body = registry.body(answer).await.unwrap_or_default();
        let text = String::from_utf8_lossy(&body).to_ascii_lowercase();
        if text.contains("http request to an https server") || text.contains("plain http request was sent to https") {
            let label = registry.label();
            return end(Found::TlsError, format!("{label} speaks TLS: the account's plainHttp should be false"));
        }
        no_registry(registry, 400)
    }

    /// A registry that lets anybody in, at its door at least.
    async fn check_open(&self, registry: &Peer<'_>) -> Step<LoginCheck> {
        let answer = self.get_root(registry, &Show::Login).await?;
        match (answer.status.as_u16(), challenge::parse(answer.challenges())) {
            (200, _) => {}
            (401, Some(challenge @ Challenge::Bearer { .. })) => {
                return self.check_challenge(registry, challenge).await;
            }
            _ => return end(Found::Invalid, "the registry takes anybody, but not this login"),
        }
        let open = "the registry takes anybody, so nothing is known of this password";
        let Some(repository) = self.repository else {
            return end(Found::Anonymous, format!("{open}: name a repository that is not public to find out"));
        };
        match self.access(registry, &Show::Nothing, repository).await? {
            Access::Granted => end(Found::Anonymous, format!("{open}; and anybody may read {repository}")),
            Access::Denied(Some(challenge)) => self.check_challenge(registry, challenge).await,
            Access::Denied(None) => end(Found::NoAccess, format!("nobody may read {repository}")),
            Access::Missing => end(Found::NoAccess, missing(repository)),
        }
    }

    async fn check_challenge(&self, registry: &Peer<'_>, challenge: Challenge) -> Step<LoginCheck> {
        match challenge {
            Challenge::Basic => self.check_basic(registry).await,
            Challenge::Bearer { realm, service } => self.check_bearer(registry, &realm, service.as_deref()).await,
        }
    }

    async fn check_basic(&self, registry: &Peer<'_>) -> Step<LoginCheck> {
        let answer = self.get_root(registry, &Show::Login).await?;
        match answer.status.as_u16() {
            200 => self.require_registry(registry, answer).await?,
            401 => {
                return end(
                    Found::Invalid,
                    "the registry does not take this login (401): it is wrong, expired or revoked",
                );
            }
            // It asked for a login with 401 before: the login makes the difference. So answers ECR to an old one.
            400 => return end(Found::Invalid, "the registry does not take this login (400): it has probably expired"),
            403 if self.says_expired(registry, answer).await => {
                return end(Found::Invalid, "the registry says that this login has expired (403)");
            }
            403 => return end(Found::NoAccess, "the registry knows this login and lets it do nothing (403)"),
            status => return no_registry(registry, status),
        }
        let Some(repository) = self.repository else { return Ok(valid()) };
        match self.access(registry, &Show::Login, repository).await? {
            Access::Granted => Ok(may_read(repository)),
            Access::Denied(_) => end(Found::NoAccess, denied(repository)),
            Access::Missing => end(Found::NoAccess, missing(repository)),
        }
    }

    async fn says_expired(&self, registry: &Peer<'_>, answer: Answer) -> bool {
        let body = registry.body(answer).await.unwrap_or_default();
        String::from_utf8_lossy(&body).to_ascii_lowercase().contains("expired")
    }

    async fn check_bearer(&self, registry: &Peer<'_>, realm: &str, service: Option<&str>) -> Step<LoginCheck> {
        let schemes = if self.login.plain_http { Schemes::HttpAndHttps } else { Schemes::Https };
        let realm = parse_url(realm, schemes).map_err(|reason| {
            LoginCheck::new(Found::Refused, format!("the URL of the token service that the registry names {reason}"))
        })?;
        // Two places at one host would be one too many.
        let is_same_host = Url::parse(&self.url("")).is_ok_and(|url| url.origin() == realm.origin());
        let other;
        let tokens = if is_same_host {
            registry
        } else {
            other = self.peer(&realm, format!("the token service of {}", registry.label())).await?;
            &other
        };
        let tokens = TokenService { check: self, peer: tokens, realm, service };
        let scope = self.repository.map(|repository| format!("repository:{repository}:pull"));
        let token = match tokens.for_login(scope.as_deref()).await? {
            Given::Token(token) => token,
            Given::Refused(status) => return self.token_refused(&tokens, status).await,
            Given::OtherWay => {
                return end(Found::NotARegistry, "the registry names a token service that is none (404)");
            }
        };
        let anybody = match tokens.for_anybody(scope.as_deref()).await {
            Ok(Given::Token(anybody)) => Some(anybody),
            Ok(Given::Refused(_) | Given::OtherWay) => None,
            // A page to log in at, or an empty answer: nothing that could be used.
            Err(finding) if finding.result == Found::NotARegistry => None,
            Err(finding) => return Err(finding),
        };
        match self.repository {
            Some(repository) => self.check_pull(registry, repository, &token, anybody.as_ref()).await,
            None => self.check_token(registry, &token, anybody.as_ref()).await,
        }
    }

    /// The token service gave nothing: is it the login, the repository, or the way of asking?
    async fn token_refused(&self, tokens: &TokenService<'_, '_>, status: StatusCode) -> Step<LoginCheck> {
        let status = status.as_u16();
        if let Some(repository) = self.repository
            && status != 401
            && let Given::Token(_) = tokens.for_login(None).await?
        {
            return end(
                Found::NoAccess,
                format!("the token service takes this login, but not for {repository} ({status})"),
            );
        }
        // A bad request that everybody makes says nothing of the login.
        if status == 400 && matches!(tokens.for_anybody(None).await?, Given::Refused(other) if other == status) {
            return end(Found::NotARegistry, "the token service of the registry answers 400 whoever asks");
        }
        let reason = if status == 400 { "it has probably expired" } else { "it is wrong, expired or revoked" };
        end(Found::Invalid, format!("the token service does not take this login ({status}): {reason}"))
    }

    /// Without a repository: does the registry take the token, and is it more than anybody gets?
    async fn check_token(&self, registry: &Peer<'_>, token: &Token, anybody: Option<&Token>) -> Step<LoginCheck> {
        let answer = self.get_root(registry, &Show::Token(token)).await?;
        let recognition = token.recognition(anybody);
        match (answer.status.as_u16(), recognition, anybody) {
            (200, Recognition::Somebody, _) => Ok(valid()),
            (200, Recognition::Unknown, Some(anybody)) => {
                match self.get_root(registry, &Show::Token(anybody)).await?.status.as_u16() {
                    200 => end(Found::Anonymous, ANYBODYS_TOKEN),
                    _ => Ok(valid()),
                }
            }
            (200, ..) => end(Found::Anonymous, ANYBODYS_TOKEN),
            (401 | 403, Recognition::Anybody, _) => end(Found::Invalid, TAKEN_FOR_ANYBODY),
            (401, ..) => {
                end(Found::Invalid, "the registry does not take the token that its token service gives for this login")
            }
            (403, ..) => end(Found::NoAccess, "the registry knows this login and lets it do nothing (403)"),
            (status, ..) => no_registry(registry, status),
        }
    }

    /// With a repository: only what it says itself counts, for the login and for anybody.
    async fn check_pull(
        &self,
        registry: &Peer<'_>,
        repository: &RepositoryName,
        token: &Token,
        anybody: Option<&Token>,
    ) -> Step<LoginCheck> {
        let recognition = token.recognition(anybody);
        match (self.access(registry, &Show::Token(token), repository).await?, recognition) {
            (Access::Granted, Recognition::Somebody) => Ok(may_read(repository)),
            (Access::Granted, Recognition::Anybody | Recognition::Unknown) => {
                let show = anybody.map_or(Show::Nothing, Show::Token);
                match self.access(registry, &show, repository).await? {
                    Access::Granted => end(
                        Found::Anonymous,
                        format!("anybody may read {repository}, so nothing is known of this password"),
                    ),
                    Access::Denied(_) | Access::Missing => Ok(may_read(repository)),
                }
            }
            (Access::Denied(_) | Access::Missing, Recognition::Anybody) => end(Found::Invalid, TAKEN_FOR_ANYBODY),
            (Access::Denied(_), _) if token.grants_nothing(repository.as_str()) => end(
                Found::NoAccess,
                format!(
                    "the token service takes this login and grants it nothing in {repository}: so Harbor does for robots that have expired, too"
                ),
            ),
            (Access::Denied(_), _) => end(Found::NoAccess, denied(repository)),
            (Access::Missing, _) => end(Found::NoAccess, missing(repository)),
        }
    }

    /// Asks a repository itself: for a manifest, whose absence alone says nothing, then for its tags.
    async fn access(&self, registry: &Peer<'_>, show: &Show<'_>, repository: &RepositoryName) -> Step<Access> {
        let head = self.request(registry, Method::HEAD, &format!("{repository}/manifests/latest"), show);
        let head = registry.send(head.header(header::ACCEPT, MANIFEST_TYPES)).await?;
        match access(&head) {
            Some(Access::Missing) | None => {}
            Some(access) => return Ok(access),
        }
        let tags = self.request(registry, Method::GET, &format!("{repository}/tags/list?n=1"), show);
        let tags = registry.send(tags).await?;
        access(&tags).map_or_else(|| end(Found::NotARegistry, "the registry does not answer for repositories"), Ok)
    }
}

fn no_registry(registry: &Peer<'_>, status: u16) -> Step<LoginCheck> {
    let label = registry.label();
    let detail = match status {
        300..=399 => {
            format!("{label} redirects ({status}), which is not followed: name the registry that it leads to")
        }
        404 => format!("{label} has no registry (404 at /v2/): check its name and port"),
        _ => format!("{label} answers {status} at /v2/, which no registry does"),
    };
    end(Found::NotARegistry, detail)
}

const ANYBODYS_TOKEN: &str = "the token service gives this login what it gives anybody, so nothing is known of this \
     password: name a repository that is not public to find out";
const TAKEN_FOR_ANYBODY: &str =
    "the token service takes this login for anybody without one: it is wrong, expired or revoked";

fn access(answer: &Answer) -> Option<Access> {
    match answer.status.as_u16() {
        // A redirect to where the data is comes after the question who asks.
        200..=399 => Some(Access::Granted),
        401 | 403 => Some(Access::Denied(challenge::parse(answer.challenges()))),
        404 => Some(Access::Missing),
        _ => None,
    }
}

fn may_read(repository: &RepositoryName) -> LoginCheck {
    LoginCheck::new(Found::Valid, format!("the registry takes this login, and it may read {repository}"))
}

fn denied(repository: &RepositoryName) -> String {
    format!("the registry takes this login, but it may not read {repository}")
}

fn missing(repository: &RepositoryName) -> String {
    format!("there is no repository {repository}, or this login may not see it (404)")
}

/// A request with a header that no `Debug` shows.
fn with_authorization(request: RequestBuilder, value: &str) -> RequestBuilder {
    let Ok(mut value) = HeaderValue::from_str(value) else { return request };
    value.set_sensitive(true);
    request.header(header::AUTHORIZATION, value)
}

/// The token service that a registry named, admitted by the guard.
struct TokenService<'a, 'p> {
    check: &'a Check<'a>,
    peer: &'a Peer<'p>,
    realm: Url,
    service: Option<&'a str>,
}

impl TokenService<'_, '_> {
    /// Asks for the login's token: by GET, as every service can be asked, or by POST where that is not taken; a login
    /// that is a token itself by POST first.
    async fn for_login(&self, scope: Option<&str>) -> Step<Given> {
        let is_identity_token = self.check.login.username == IDENTITY_TOKEN_USER;
        if is_identity_token {
            return match self.post(scope, true).await? {
                Given::OtherWay => self.get(scope, true).await,
                given => Ok(given),
            };
        }
        match self.get(scope, true).await? {
            Given::OtherWay => self.post(scope, false).await,
            given => Ok(given),
        }
    }

    /// Asks for what anybody gets.
    async fn for_anybody(&self, scope: Option<&str>) -> Step<Given> {
        self.get(scope, false).await
    }

    async fn get(&self, scope: Option<&str>, with_login: bool) -> Step<Given> {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            query.extend_pairs(self.service.map(|service| ("service", service)));
            query.extend_pairs(scope.map(|scope| ("scope", scope)));
            query.append_pair("client_id", CLIENT_ID);
            if with_login {
                query.append_pair("account", self.check.login.username);
            }
        }
        let request = self.peer.client().get(url);
        self.send(if with_login { self.check.with_basic(request) } else { request }).await
    }

    async fn post(&self, scope: Option<&str>, is_identity_token: bool) -> Step<Given> {
        let form = self.form(scope, is_identity_token);
        let request = self.peer.client().post(self.realm.clone());
        let request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        self.send(request.body(form)).await
    }

    fn form(&self, scope: Option<&str>, is_identity_token: bool) -> String {
        let Login { username, password, .. } = self.check.login;
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("client_id", CLIENT_ID);
        form.extend_pairs(self.service.map(|service| ("service", service)));
        form.extend_pairs(scope.map(|scope| ("scope", scope)));
        if is_identity_token {
            form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", password.expose_secret());
        } else {
            form.append_pair("grant_type", "password");
            form.append_pair("username", username).append_pair("password", password.expose_secret());
        }
        form.finish()
    }

    async fn send(&self, request: RequestBuilder) -> Step<Given> {
        let answer = self.peer.send(request).await?;
        let status = answer.status;
        match status.as_u16() {
            200 => match Token::parse(&self.peer.body(answer).await?) {
                Some(token) => Ok(Given::Token(token)),
                None => end(Found::NotARegistry, "the token service of the registry answers without a token"),
            },
            404 | 405 => Ok(Given::OtherWay),
            300..=399 => end(
                Found::NotARegistry,
                format!("the token service of the registry redirects ({}), which is not followed", status.as_u16()),
            ),
            _ => Ok(Given::Refused(status)),
        }
    }
}
