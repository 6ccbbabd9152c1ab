//! HTTP calls to addresses that a user, or a server named by a user, has chosen.
//!
//! [`OutboundClient`] is the only way to make such a call. What it guarantees:
//!
//! - The [`Guard`] resolves the host once and admits it only if every address is public or allowed
//!   by the configuration. The connection goes to these addresses, so a second DNS answer changes
//!   nothing. Look-ups are bounded in number ([`SystemResolver`]).
//! - No redirect is followed, no request repeated. No proxy is used, except that calls to public
//!   addresses go through the [`OutboundProxy`] of the configuration, to the admitted addresses.
//! - Every step ends at the deadline, and every body has a maximum length.
//! - Errors are classified by their types ([`Cause`]). Nothing that a peer sent reaches a log or an
//!   error text.

mod address;
mod allow_list;
mod cause;
mod guard;
mod host_limits;
mod proxy;
mod resolver;
mod url;

use std::{io, net::SocketAddr, sync::OnceLock, time::Duration};

use ::url::Url;
use reqwest::{
    Client, RequestBuilder, Response,
    dns::{Name, Resolve as ResolveName, Resolving},
    redirect,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName},
};
use tokio::time::{Instant, timeout_at};

pub(super) use self::host_limits::{HostLimits, Unavailable, exhausted_pull_limit, retry_after};
use self::proxy::{Tunnel, TunnelError};
pub use self::{
    allow_list::AllowList,
    cause::{Cause, Peer, TlsHints, Trust},
    guard::{Guard, GuardError},
    proxy::OutboundProxy,
    resolver::{Resolve, SystemResolver},
    url::{Schemes, parse_url},
};
use crate::domain::cluster::CaCertificate;

/// Maximum number of headers in a response.
const HEADERS_MAX: usize = 64;
const USER_AGENT: &str = concat!("regcred/", env!("CARGO_PKG_VERSION"));

/// Configuration of an [`OutboundClient`].
#[derive(Debug, Clone)]
pub struct OutboundClientConfig {
    /// Time limit for one request.
    pub timeout: Duration,
    /// Part of `timeout` in which the connection must be established, TLS included.
    pub connect_timeout: Duration,
    /// Environment variable of the guard's allow list, named in refusals.
    pub allow_variable: &'static str,
    /// Advice in texts about TLS failures.
    pub hints: TlsHints,
    /// Proxy for calls to public addresses.
    pub proxy: Option<OutboundProxy>,
}

/// Kind of an [`OutboundError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutboundErrorKind {
    /// The guard forbids the call.
    Refused,
    /// No response, or not a complete one in time.
    Unreachable,
    /// The TLS handshake failed.
    Tls,
    /// The response body exceeds its limit.
    TooLarge,
}

/// Failed call; its text contains nothing that the peer sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct OutboundError {
    /// Kind of failure.
    pub kind: OutboundErrorKind,
    /// Sentence for a person.
    pub detail: String,
}

impl OutboundError {
    fn new(kind: OutboundErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    fn unreachable(detail: impl Into<String>) -> Self {
        Self::new(OutboundErrorKind::Unreachable, detail)
    }
}

/// Guarded HTTP client. Create one for each purpose: it reads the host's trust store once.
#[derive(Debug)]
pub struct OutboundClient {
    guard: Guard,
    config: OutboundClientConfig,
    host_roots: OnceLock<RootCertStore>,
}

impl OutboundClient {
    /// Creates a client. Nothing is sent.
    #[must_use]
    pub const fn new(guard: Guard, config: OutboundClientConfig) -> Self {
        Self { guard, config, host_roots: OnceLock::new() }
    }

    /// Admits the host of `url` and prepares calls to it. Nothing is sent, except to the resolver.
    ///
    /// `label` names the host in error texts, so it must not come from a server. Certificates in
    /// `ca_certificate` are trusted in addition to the host's trust store.
    ///
    /// # Errors
    ///
    /// [`OutboundErrorKind::Refused`] if the guard forbids the host,
    /// [`OutboundErrorKind::Unreachable`] if its name has no address.
    pub async fn endpoint(
        &self,
        url: &Url,
        label: String,
        ca_certificate: Option<&CaCertificate>,
        deadline: Instant,
    ) -> Result<Endpoint, OutboundError> {
        let (host, port) = place(url);
        let admitted = timeout_at(deadline, self.guard.admit(host, port)).await;
        self.prepare(url, label, ca_certificate, deadline, admitted.unwrap_or(Err(GuardError::NotResolved))).await
    }

    /// As [`endpoint`](Self::endpoint), at any address but a cloud's metadata service.
    ///
    /// # Errors
    ///
    /// As for [`endpoint`](Self::endpoint).
    pub async fn endpoint_anywhere(
        &self,
        url: &Url,
        label: String,
        ca_certificate: Option<&CaCertificate>,
        deadline: Instant,
    ) -> Result<Endpoint, OutboundError> {
        let (host, port) = place(url);
        let admitted = timeout_at(deadline, self.guard.admit_anywhere(host, port)).await;
        self.prepare(url, label, ca_certificate, deadline, admitted.unwrap_or(Err(GuardError::NotResolved))).await
    }

    /// Whether the configuration allows `localhost` or a loopback address.
    #[must_use]
    pub fn allows_loopback(&self, host: &str) -> bool {
        self.guard.allows_loopback(host)
    }

    async fn prepare(
        &self,
        url: &Url,
        label: String,
        ca_certificate: Option<&CaCertificate>,
        deadline: Instant,
        admitted: Result<Vec<SocketAddr>, GuardError>,
    ) -> Result<Endpoint, OutboundError> {
        let (host, _) = place(url);
        let addresses = admitted.map_err(|error| {
            let kind = match error {
                GuardError::Forbidden(_) => OutboundErrorKind::Refused,
                GuardError::NotResolved => OutboundErrorKind::Unreachable,
            };
            OutboundError::new(kind, error.describe(&label, self.config.allow_variable))
        })?;
        let tls = self.tls(ca_certificate);
        let tunnel = match &self.config.proxy {
            Some(proxy) if OutboundProxy::leads_to(&addresses) => {
                Some(self.tunnel(proxy, url, &addresses, tls.clone(), deadline).await?)
            }
            _ => None,
        };
        let http = Client::builder()
            .tls_backend_preconfigured(tls)
            .resolve_to_addrs(host, &addresses)
            .dns_resolver(NoResolver)
            .no_proxy()
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .http1_only()
            .http1_max_headers(HEADERS_MAX)
            .connect_timeout(self.config.connect_timeout)
            .timeout(self.config.timeout)
            .user_agent(USER_AGENT)
            .build()
            .map_err(|_| OutboundError::unreachable("the HTTP client cannot be set up on this host"))?;
        let trust = if ca_certificate.is_some() { Trust::HostAndCa } else { Trust::Host };
        let peer = Peer { label, trust, expected_name: None, hints: self.config.hints };
        Ok(Endpoint { http, tunnel, addresses, peer, timeout: self.config.timeout, deadline })
    }

    async fn tunnel(
        &self,
        proxy: &OutboundProxy,
        url: &Url,
        addresses: &[SocketAddr],
        tls: ClientConfig,
        deadline: Instant,
    ) -> Result<Tunnel, OutboundError> {
        let resolved = timeout_at(deadline, self.guard.addresses(proxy.host())).await;
        let resolved = resolved.unwrap_or(Err(GuardError::NotResolved));
        let proxy_addresses = resolved
            .map_err(|_| OutboundError::unreachable("the host name of the outbound proxy cannot be resolved"))?;
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host);
        let name = name.map_err(|_| OutboundError::unreachable("the host name cannot be verified by TLS"))?;
        let tls = (url.scheme() == "https").then_some((tls, name));
        Ok(Tunnel::new(proxy, proxy_addresses, addresses, tls, self.config.connect_timeout))
    }

    fn tls(&self, ca_certificate: Option<&CaCertificate>) -> ClientConfig {
        let mut roots = self.host_roots.get_or_init(host_roots).clone();
        let own = ca_certificate.into_iter().flat_map(CaCertificate::as_der);
        roots.add_parsable_certificates(own.map(|der| CertificateDer::from(der.to_vec())));
        ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
    }
}

fn place(url: &Url) -> (&str, u16) {
    (url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default())
}

/// Reads the host's trust store. A host without one trusts no authority; the handshake then fails
/// and says so.
fn host_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// Host that the guard admitted, with the addresses that it saw.
#[derive(Debug)]
pub struct Endpoint {
    http: Client,
    /// Way to the host, if it is not called directly.
    tunnel: Option<Tunnel>,
    addresses: Vec<SocketAddr>,
    peer: Peer,
    timeout: Duration,
    deadline: Instant,
}

impl Endpoint {
    /// Client that requests are built with.
    #[must_use]
    pub const fn http(&self) -> &Client {
        &self.http
    }

    /// Name of the host in texts.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.peer.label
    }

    /// Sends a request and returns the head of the response, whatever its status.
    ///
    /// # Errors
    ///
    /// [`OutboundErrorKind::Tls`] or [`OutboundErrorKind::Unreachable`].
    pub async fn send(&self, request: RequestBuilder) -> Result<Response, OutboundError> {
        if let Some(tunnel) = &self.tunnel {
            let request = request.build().map_err(|error| self.failure(&error))?;
            let deadline = self.deadline.min(Instant::now() + self.timeout);
            return tunnel.send(request, deadline).await.map_err(|error| self.tunnel_failure(&error));
        }
        let sent = timeout_at(self.deadline, request.send()).await.map_err(|_| self.timed_out())?;
        let response = sent.map_err(|error| self.failure(&error))?;
        // The client could not connect elsewhere; this verifies it.
        if !response.remote_addr().is_some_and(|address| self.addresses.contains(&address)) {
            let detail = format!("{} answered from an address that was not admitted", self.label());
            return Err(OutboundError::new(OutboundErrorKind::Refused, detail));
        }
        Ok(response)
    }

    /// Reads a body of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// [`OutboundErrorKind::TooLarge`] beyond the limit, [`OutboundErrorKind::Unreachable`] if the
    /// body is incomplete.
    pub async fn read_body(&self, mut response: Response, limit: usize) -> Result<Vec<u8>, OutboundError> {
        let mut body = Vec::new();
        loop {
            let chunk = timeout_at(self.deadline, response.chunk()).await.map_err(|_| self.timed_out())?;
            let Some(chunk) = chunk.map_err(|error| self.failure(&error))? else { return Ok(body) };
            if body.len() + chunk.len() > limit {
                let detail = format!("{} sent more than {limit} bytes", self.label());
                return Err(OutboundError::new(OutboundErrorKind::TooLarge, detail));
            }
            body.extend_from_slice(&chunk);
        }
    }

    fn tunnel_failure(&self, error: &TunnelError) -> OutboundError {
        if let Some(detail) = error.describe(self.label()) {
            return OutboundError::unreachable(detail);
        }
        match error {
            TunnelError::Within(cause) => self.failure_of(cause.clone()),
            _ => self.timed_out(),
        }
    }

    fn failure(&self, error: &reqwest::Error) -> OutboundError {
        self.failure_of(Cause::of_request(error))
    }

    fn failure_of(&self, cause: Cause) -> OutboundError {
        match cause {
            Cause::Timeout => self.timed_out(),
            cause @ Cause::Tls(_) => OutboundError::new(OutboundErrorKind::Tls, self.peer.describe(&cause)),
            cause => OutboundError::unreachable(self.peer.describe(&cause)),
        }
    }

    fn timed_out(&self) -> OutboundError {
        let seconds = self.timeout.as_secs_f32();
        OutboundError::unreachable(format!("{} sent no complete response within {seconds} s", self.label()))
    }
}

/// Resolver that always fails: the guard resolves names, and the client has the addresses.
struct NoResolver;

impl ResolveName for NoResolver {
    fn resolve(&self, _: Name) -> Resolving {
        Box::pin(async { Err(io::Error::other("only the guard resolves names").into()) })
    }
}

#[cfg(test)]
mod tests;
