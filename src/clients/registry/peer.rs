//! One host of a check: admitted by the guard, called at the addresses that the guard saw, within bounds.

use std::{error::Error, io, net::SocketAddr};

use http::{HeaderMap, StatusCode, header};
use reqwest::{
    Client, RequestBuilder, Response,
    dns::{Name, Resolve, Resolving},
    redirect,
};
use rustls::{CertificateError, ClientConfig};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout_at},
};
use url::Url;

use super::{
    Registries,
    limits::{self, Busy},
};
use crate::{
    clients::guard::NotAdmitted,
    domain::verification::{LoginCheck, VerificationResult as Found},
};

/// No answer that is read has more headers than this.
const HEADERS_MAX: usize = 64;
/// No answer that is read is longer than this, in bytes.
const BODY_MAX: usize = 256 * 1024;
const USER_AGENT: &str = concat!("regcred/", env!("CARGO_PKG_VERSION"));

/// A host that may be called.
pub(super) struct Peer<'a> {
    registries: &'a Registries,
    client: Client,
    /// `host:port`, for limits.
    host: String,
    addresses: Vec<SocketAddr>,
    /// What the host is called in texts: the registry's name, or what it is to the registry. Never a name that a
    /// registry gave.
    label: String,
    has_own_ca: bool,
    deadline: Instant,
    _place: OwnedSemaphorePermit,
}

/// The head of an answer, and the body for whoever wants it.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    response: Response,
}

impl<'a> Peer<'a> {
    /// Admits the host of `url` and gets ready to call it. Nothing is sent yet.
    pub(super) async fn admit(
        registries: &'a Registries,
        url: &Url,
        label: String,
        tls: ClientConfig,
        has_own_ca: bool,
        deadline: Instant,
    ) -> Result<Self, LoginCheck> {
        let name = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or_default();
        let host = format!("{name}:{port}");
        let place = registries.hosts.enter(&host, deadline).await.map_err(|busy| is_busy(&label, &busy))?;
        let admitted = timeout_at(deadline, registries.guard.admit(name, port)).await;
        let addresses = admitted.unwrap_or(Err(NotAdmitted::Unresolved)).map_err(|error| match error {
            NotAdmitted::Refused(kind) => LoginCheck::new(
                Found::Refused,
                format!("{label} {kind}, which regcred does not call unless REGCRED_OUTBOUND_ALLOW allows it"),
            ),
            NotAdmitted::Unresolved => LoginCheck::new(Found::Unreachable, format!("{label} {error}")),
        })?;
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .resolve_to_addrs(name, &addresses)
            .dns_resolver(NoResolver)
            .no_proxy()
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .http1_only()
            .http1_max_headers(HEADERS_MAX)
            .connect_timeout(registries.config.connect_timeout)
            .timeout(registries.config.timeout)
            .user_agent(USER_AGENT)
            .build()
            .map_err(|_| LoginCheck::new(Found::Unreachable, "the HTTP client cannot be set up on this host"))?;
        Ok(Self { registries, client, host, addresses, label, has_own_ca, deadline, _place: place })
    }

    /// What the host is called in texts.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// The client, to begin a request with.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Sends a request. What says that the host is not well, or wants to be left alone, is an end of the check;
    /// every other status is the caller's to judge.
    pub(super) async fn send(&self, request: RequestBuilder) -> Result<Answer, LoginCheck> {
        self.registries.hosts.look(&self.host).map_err(|busy| is_busy(&self.label, &busy))?;
        let sent = timeout_at(self.deadline, request.send()).await.map_err(|_| self.too_slow())?;
        let response = sent.map_err(|error| self.explain(&error))?;
        // The client had nowhere else to go; this is the proof.
        if !response.remote_addr().is_some_and(|peer| self.addresses.contains(&peer)) {
            return Err(LoginCheck::new(Found::Refused, format!("{} was not at its address", self.label)));
        }
        let (status, headers) = (response.status(), response.headers().clone());
        let asked = limits::retry_after(&headers, crate::clock::now());
        if status == StatusCode::TOO_MANY_REQUESTS {
            let pause = self.registries.hosts.pause(&self.host, asked);
            return Err(is_busy(&self.label, &Busy::Paused(pause)));
        }
        if status.is_server_error() {
            if asked.is_some() {
                self.registries.hosts.pause(&self.host, asked);
            }
            let detail = format!("{} is not well: it answered {}", self.label, status.as_u16());
            return Err(LoginCheck::new(Found::Unreachable, detail));
        }
        if let Some(window) = limits::budget_is_spent(&headers) {
            self.registries.hosts.pause(&self.host, Some(window));
        }
        Ok(Answer { status, headers, response })
    }

    /// Reads a body whole, within the bounds of size and time.
    pub(super) async fn body(&self, answer: Answer) -> Result<Vec<u8>, LoginCheck> {
        let mut response = answer.response;
        let mut body = Vec::new();
        loop {
            let chunk = timeout_at(self.deadline, response.chunk()).await.map_err(|_| self.too_slow())?;
            let Some(chunk) = chunk.map_err(|error| self.explain(&error))? else { return Ok(body) };
            if body.len() + chunk.len() > BODY_MAX {
                let detail = format!("{} answered with more than {BODY_MAX} bytes, which no registry does", self.label);
                return Err(LoginCheck::new(Found::NotARegistry, detail));
            }
            body.extend_from_slice(&chunk);
        }
    }

    fn too_slow(&self) -> LoginCheck {
        let seconds = self.registries.config.timeout.as_secs_f32();
        LoginCheck::new(Found::Unreachable, format!("{} gave no whole answer within {seconds} s", self.label))
    }

    /// Puts into words why no answer came, by types alone: the texts of errors may hold what came over the wire.
    fn explain(&self, error: &reqwest::Error) -> LoginCheck {
        let unreachable = |what: &str| LoginCheck::new(Found::Unreachable, format!("{} {what}", self.label));
        let mut current: Option<&(dyn Error + 'static)> = Some(error);
        let mut kind = None;
        // Error chains are short; a bound keeps a cyclic one from hanging us.
        for _ in 0..16 {
            let Some(cause) = current else { break };
            if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
                return LoginCheck::new(Found::TlsError, self.explain_tls(tls));
            }
            current = match cause.downcast_ref::<io::Error>() {
                Some(io) => {
                    kind.get_or_insert(io.kind());
                    // An io::Error hides the error inside it from `source`.
                    io.get_ref().map(|inner| inner as &(dyn Error + 'static))
                }
                None => cause.source(),
            };
        }
        match kind {
            _ if error.is_timeout() && error.is_connect() => unreachable("did not take the connection in time"),
            _ if error.is_timeout() => self.too_slow(),
            Some(io::ErrorKind::ConnectionRefused) => unreachable("refused the connection: nothing listens there"),
            Some(io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => {
                unreachable("cannot be reached from here: no route")
            }
            Some(_) => unreachable("broke off the connection"),
            None => unreachable("broke off its answer, or it is none that a registry gives"),
        }
    }

    fn explain_tls(&self, error: &rustls::Error) -> String {
        let label = &self.label;
        let certificate = format!("the certificate of {label}");
        match error {
            rustls::Error::InvalidCertificate(problem) => match problem {
                CertificateError::UnknownIssuer | CertificateError::BadSignature if self.has_own_ca => {
                    format!(
                        "{certificate} is signed neither by caCertificate nor by an authority that this host trusts"
                    )
                }
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    format!("{certificate} is not signed by an authority that this host trusts: give its caCertificate")
                }
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    format!("{certificate} has expired")
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    format!("{certificate} is not valid yet: compare the clocks")
                }
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    format!("{certificate} is not made out to its host name")
                }
                CertificateError::Revoked => format!("{certificate} has been revoked"),
                CertificateError::Other(_) => format!(
                    "{certificate} does not verify: one that is its own CA must not be a CA's (`basicConstraints=CA:FALSE`)"
                ),
                _ => format!("{certificate} does not verify"),
            },
            rustls::Error::InvalidMessage(_) => {
                format!("{label} does not speak TLS: if it is to be spoken to in the clear, set plainHttp")
            }
            rustls::Error::PeerIncompatible(_) => format!("{label} speaks neither TLS 1.3 nor TLS 1.2 as regcred does"),
            rustls::Error::AlertReceived(alert) => format!("{label} ended the TLS handshake ({alert:?})"),
            _ => format!("the TLS handshake with {label} failed"),
        }
    }
}

impl Answer {
    /// A header as text; empty where it is missing or odd.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The values of `WWW-Authenticate`.
    pub(super) fn challenges(&self) -> impl Iterator<Item = &[u8]> {
        self.headers.get_all(header::WWW_AUTHENTICATE).iter().map(http::HeaderValue::as_bytes)
    }
}

fn is_busy(label: &str, busy: &Busy) -> LoginCheck {
    match busy {
        Busy::Paused(left) => {
            let seconds = left.as_secs().max(1);
            let detail =
                format!("{label} asks to be left alone (429, or its pulls are used up): try again in {seconds} s");
            LoginCheck { retry_after: Some(*left), ..LoginCheck::new(Found::RateLimited, detail) }
        }
        Busy::Crowded => {
            LoginCheck::new(Found::RateLimited, format!("too many checks of {label} are under way: try again later"))
        }
    }
}

/// Resolves nothing: the guard did so, and the client has its addresses.
pub(in crate::clients) struct NoResolver;

impl Resolve for NoResolver {
    fn resolve(&self, _: Name) -> Resolving {
        Box::pin(async { Err(io::Error::other("resolved by the guard alone").into()) })
    }
}
