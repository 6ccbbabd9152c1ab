//! Host of a login check: an outbound endpoint under the host's limits.

use std::hash::BuildHasher;

use http::{HeaderMap, StatusCode, header};
use reqwest::{Client, RequestBuilder, Response};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use url::Url;

use super::RegistryClient;
use crate::{
    clients::outbound::{
        Endpoint, HostLimits, OutboundError, OutboundErrorKind, Unavailable, exhausted_pull_limit, retry_after,
    },
    domain::{
        cluster::CaCertificate,
        verification::{VerificationReport, VerificationResult},
    },
};

/// Maximum length of a body, in bytes.
const BODY_MAX: usize = 256 * 1024;

/// Host of a login check.
pub(super) struct RegistryEndpoint<'a> {
    endpoint: Endpoint,
    limits: &'a HostLimits,
    /// Key of the host's pause in `limits`.
    key: String,
    _permits: Vec<OwnedSemaphorePermit>,
}

/// Purpose of a call, which decides its limits.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose<'a> {
    /// Verification of a login. A pause is that of the host.
    Verification,
    /// Pull of an image with this user, or without a login. A pause is that of the user at the host: the
    /// limit of one client says nothing about others, nor about verifications.
    Pull(Option<&'a str>),
}

/// Head of a response, and its body unread.
pub(super) struct RegistryResponse {
    pub(super) status: StatusCode,
    headers: HeaderMap,
    response: Response,
}

impl<'a> RegistryEndpoint<'a> {
    /// Waits for a permit of the host and admits it. Nothing is sent.
    ///
    /// `label` names the host in texts: the registry's name, or its role. Never a name that a
    /// registry sent.
    pub(super) async fn admit(
        registries: &'a RegistryClient,
        url: &Url,
        label: String,
        ca_certificate: Option<&CaCertificate>,
        (purpose, is_image_registry): (Purpose<'_>, bool),
        deadline: Instant,
    ) -> Result<Self, VerificationReport> {
        let name = url.host_str().unwrap_or_default();
        let host = format!("{name}:{}", url.port_or_known_default().unwrap_or_default());
        let (limits, key) = match purpose {
            Purpose::Verification => (&registries.limits, host.clone()),
            // A user may be as long as a Secret.
            Purpose::Pull(Some(user)) => {
                (&registries.pull_limits, format!("{host} user {:016x}", registries.hasher.hash_one(user)))
            }
            Purpose::Pull(None) => (&registries.pull_limits, format!("{host} anonymous")),
        };
        let mut permits = Vec::new();
        if key != host {
            permits.push(limits.acquire(&host, deadline).await.map_err(|reason| rate_limited(&label, &reason))?);
        }
        permits.push(limits.acquire(&key, deadline).await.map_err(|reason| rate_limited(&label, &reason))?);
        let endpoint = if is_image_registry && registries.trusts_image_registries {
            registries.outbound.endpoint_anywhere(url, label, ca_certificate, deadline).await?
        } else {
            registries.outbound.endpoint(url, label, ca_certificate, deadline).await?
        };
        Ok(Self { endpoint, limits, key, _permits: permits })
    }

    /// Name of the host in texts.
    pub(super) fn label(&self) -> &str {
        self.endpoint.label()
    }

    /// Client that requests are built with.
    pub(super) const fn http(&self) -> &Client {
        self.endpoint.http()
    }

    /// Sends a request. A 429 or 5xx ends the check; the caller judges every other status.
    pub(super) async fn send(&self, request: RequestBuilder) -> Result<RegistryResponse, VerificationReport> {
        let limits = self.limits;
        limits.check_pause(&self.key).map_err(|reason| rate_limited(self.label(), &reason))?;
        let response = self.endpoint.send(request).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let delay = retry_after(&headers, crate::clock::now());
        if status == StatusCode::TOO_MANY_REQUESTS {
            let pause = limits.pause(&self.key, delay);
            return Err(rate_limited(self.label(), &Unavailable::Paused(pause)));
        }
        if status.is_server_error() {
            if delay.is_some() {
                limits.pause(&self.key, delay);
            }
            let detail = format!("{} failed with status {}", self.label(), status.as_u16());
            return Err(VerificationReport::new(VerificationResult::Unreachable, detail));
        }
        if let Some(window) = exhausted_pull_limit(&headers) {
            limits.pause(&self.key, Some(window));
        }
        Ok(RegistryResponse { status, headers, response })
    }

    /// Reads a body of bounded length.
    pub(super) async fn read_body(&self, response: RegistryResponse) -> Result<Vec<u8>, VerificationReport> {
        Ok(self.endpoint.read_body(response.response, BODY_MAX).await?)
    }
}

impl From<OutboundError> for VerificationReport {
    fn from(error: OutboundError) -> Self {
        let result = match error.kind {
            OutboundErrorKind::Refused => VerificationResult::Refused,
            OutboundErrorKind::Unreachable => VerificationResult::Unreachable,
            OutboundErrorKind::Tls => VerificationResult::TlsError,
            OutboundErrorKind::TooLarge => VerificationResult::NotARegistry,
        };
        Self::new(result, error.detail)
    }
}

impl RegistryResponse {
    /// A header as text; empty if it is absent or not text.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Values of `WWW-Authenticate`.
    pub(super) fn challenges(&self) -> impl Iterator<Item = &[u8]> {
        self.headers.get_all(header::WWW_AUTHENTICATE).iter().map(http::HeaderValue::as_bytes)
    }
}

fn rate_limited(label: &str, reason: &Unavailable) -> VerificationReport {
    match reason {
        Unavailable::Paused(left) => {
            let seconds = left.as_secs().max(1);
            let detail = format!("{label} limits requests or pulls (429): try again in {seconds} s");
            VerificationReport {
                retry_after: Some(*left),
                ..VerificationReport::new(VerificationResult::RateLimited, detail)
            }
        }
        Unavailable::Saturated => {
            let detail = format!("too many checks of {label} are in progress: try again later");
            VerificationReport::new(VerificationResult::RateLimited, detail)
        }
    }
}
