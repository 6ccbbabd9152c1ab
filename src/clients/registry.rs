//! Client that checks whether a registry accepts a login (OCI distribution specification;
//! `distribution`, `docs/spec/auth/token.md`).
//!
//! Every check ends within [`RegistryClientConfig::timeout`] and goes through the [outbound
//! client](super::outbound). The login is sent to the registry and to the token service that it
//! names, over TLS unless the account has `plainHttp`.

mod challenge;
mod check;
mod endpoint;
mod token;
mod token_service;

use std::{hash::RandomState, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

#[cfg(fuzzing)]
pub use self::challenge::{Challenge, parse as parse_challenge};
use self::{check::LoginCheck, endpoint::Purpose};
use crate::{
    clients::outbound::{Guard, HostLimits, OutboundClient, OutboundClientConfig, OutboundProxy, TlsHints},
    domain::{
        account::ends_with_whitespace,
        cluster::CaCertificate,
        diagnosis::PullReport,
        matching::ImageReference,
        registry::{RegistryScope, RepositoryName},
        verification::{VerificationReport, VerificationResult},
    },
};

/// Addition to the explanation of a rejected login.
const WHITE_SPACE: &str = "; the likely cause is the white space at the end of the password, such as the newline that \
    `echo` adds: store it without (`printf %s`)";

/// Configuration of a [`RegistryClient`].
#[derive(Debug, Clone)]
pub struct RegistryClientConfig {
    /// Time limit for a check.
    pub timeout: Duration,
    /// Part of `timeout` in which a connection must be established, TLS included.
    pub connect_timeout: Duration,
    /// Maximum number of concurrent checks of one host.
    pub checks_per_host: usize,
    /// Proxy for registries and token services at public addresses.
    pub proxy: Option<OutboundProxy>,
}

impl Default for RegistryClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            checks_per_host: 4,
            proxy: None,
        }
    }
}

/// Login to check.
#[derive(Debug, Clone, Copy)]
pub struct Login<'a> {
    /// Registry that the login is for.
    pub registry: &'a RegistryScope,
    /// Whether the registry is called without TLS.
    pub plain_http: bool,
    /// Authorities that may sign the registry's certificate, in addition to those that this host
    /// trusts.
    pub ca_certificate: Option<&'a CaCertificate>,
    /// User name.
    pub username: &'a str,
    /// Password or token.
    pub password: &'a SecretString,
}

/// Image to pull, with a login or without.
#[derive(Debug, Clone, Copy)]
pub struct PullQuestion<'a> {
    /// The image. It names the registry.
    pub image: &'a ImageReference,
    /// User name and password.
    pub login: Option<(&'a str, &'a SecretString)>,
    /// Whether to read the platforms of a manifest list, which counts as a pull at Docker Hub.
    pub wants_platforms: bool,
}

/// Checks logins. It remembers which hosts asked for a pause, so a process has one.
#[derive(Debug)]
pub struct RegistryClient {
    outbound: OutboundClient,
    timeout: Duration,
    /// Limits of verifications.
    limits: HostLimits,
    /// Limits of pulls, by host, and by host and user.
    pull_limits: HostLimits,
    hasher: RandomState,
    trusts_image_registries: bool,
    is_on_node: bool,
}

impl RegistryClient {
    /// Creates a client. Nothing is sent.
    #[must_use]
    pub fn new(
        guard: Guard,
        RegistryClientConfig { timeout, connect_timeout, checks_per_host, proxy }: RegistryClientConfig,
    ) -> Self {
        let outbound = OutboundClientConfig {
            timeout,
            connect_timeout,
            allow_variable: "REGCRED_OUTBOUND_ALLOW",
            hints: TlsHints { wrong_name: "", not_tls: ": to call it without TLS, set plainHttp" },
            proxy,
        };
        Self {
            outbound: OutboundClient::new(guard, outbound),
            timeout,
            limits: HostLimits::new(checks_per_host, Duration::ZERO),
            pull_limits: HostLimits::new(checks_per_host, Duration::ZERO),
            hasher: RandomState::new(),
            trusts_image_registries: false,
            is_on_node: false,
        }
    }

    /// Asks the registries of images at any address, for a person who chose the cluster. Token services
    /// that they name are guarded as always. `is_on_node` tells that the pods run on this host.
    #[must_use]
    pub fn trusting_image_registries(self, is_on_node: bool) -> Self {
        Self { trusts_image_registries: true, is_on_node, ..self }
    }

    /// Whether the registry of an image is the node's own host, `localhost` or a loopback address, and
    /// this host is not known to be that node: the configuration allows no such address.
    #[must_use]
    pub fn is_of_node(&self, image: &ImageReference) -> bool {
        let scope = RegistryScope::parse(image.name.registry());
        let is_loopback = scope.is_ok_and(|scope| scope.is_loopback() && !self.outbound.allows_loopback(scope.host()));
        is_loopback && !self.is_on_node
    }

    /// Checks whether a login works and, if a repository is given, whether the login may pull from
    /// it.
    #[tracing::instrument(name = "registry.verify", skip_all, fields(registry = login.registry.authority()))]
    pub async fn verify(&self, login: &Login<'_>, repository: Option<&RepositoryName>) -> VerificationReport {
        let start = Instant::now();
        let (purpose, deadline) = (Purpose::Verification, start + self.timeout);
        let check = LoginCheck { registries: self, login, repository, purpose, deadline };
        let mut finding = check.run().await.unwrap_or_else(|finding| finding);
        if finding.result == VerificationResult::Invalid && ends_with_whitespace(login.password.expose_secret()) {
            finding.detail.push_str(WHITE_SPACE);
        }
        let duration_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::debug!(result = %finding.result, duration_ms, "login checked");
        finding
    }

    /// Requests the manifest of an image as a container runtime does, with one login or without.
    ///
    /// The login goes to the registry that the image names, and to the token service that this
    /// registry names, over TLS with the authorities of this host. Only a registry on loopback that
    /// does not speak TLS is asked without it, as by container runtimes.
    ///
    /// None if too many questions to the host are in progress, or it is [that of the
    /// node](Self::is_of_node).
    #[tracing::instrument(name = "registry.pull", skip_all, fields(registry = question.image.name.registry()))]
    pub async fn pull(&self, question: &PullQuestion<'_>) -> Option<PullReport> {
        if self.is_of_node(question.image) {
            return None;
        }
        let name = &question.image.name;
        let scope = RegistryScope::parse(name.registry());
        let repository = scope.as_ref().map(|scope| RepositoryName::parse(name.repository(), scope));
        let (Ok(scope), Ok(Ok(repository))) = (&scope, &repository) else {
            let detail = "the image names no registry that can be called";
            return Some(VerificationReport::new(VerificationResult::NotARegistry, detail).into());
        };
        let report = self.pull_by(question, scope, repository, false).await?;
        if report.result != VerificationResult::TlsError || !scope.is_loopback() {
            return Some(report);
        }
        // A registry that expects TLS fails before the login is sent.
        match self.pull_by(question, scope, repository, true).await? {
            plain if plain.result == VerificationResult::TlsError => Some(report),
            plain => Some(plain),
        }
    }

    async fn pull_by(
        &self,
        question: &PullQuestion<'_>,
        registry: &RegistryScope,
        repository: &RepositoryName,
        plain_http: bool,
    ) -> Option<PullReport> {
        let empty = SecretString::default();
        let (username, password) = question.login.unwrap_or(("", &empty));
        let login = Login { registry, plain_http, ca_certificate: None, username, password };
        let deadline = Instant::now() + self.timeout;
        let purpose = Purpose::Pull(question.login.map(|(username, _)| username));
        let check = LoginCheck { registries: self, login: &login, repository: Some(repository), purpose, deadline };
        let mut report = match check.pull(repository, question).await {
            Ok(report) => report,
            // A limit of this client, not one of the registry, which says how long it lasts.
            Err(finding) if finding.result == VerificationResult::RateLimited && finding.retry_after.is_none() => {
                return None;
            }
            Err(finding) => finding.into(),
        };
        if report.result == VerificationResult::Invalid && ends_with_whitespace(password.expose_secret()) {
            report.detail.push_str(WHITE_SPACE);
        }
        Some(report)
    }
}
