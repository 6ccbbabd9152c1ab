//! One mint: its requests, within the limits of their hosts.

use std::{collections::HashSet, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use http::{HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use reqwest::{Client, RequestBuilder};
use secrecy::{ExposeSecret, SecretString};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use url::{Url, form_urlencoded};

use super::{MintClient, MintOrder, MintTrigger, Peers, SCHEDULED_WAIT, answer::Answer};
use crate::{
    clients::outbound::{OutboundError, OutboundErrorKind, Schemes, Unavailable, parse_url, retry_after},
    domain::{
        cluster::ServerUrl,
        invalid::Invalid,
        mint::{MintError, MintReason, schedule},
    },
};

/// Maximum length of a body, in bytes.
const BODY_MAX: usize = 64 * 1024;
/// Difference of clocks from which a refused request is repeated with the provider's time.
const SKEW: TimeDelta = TimeDelta::seconds(5);
/// Longest pause of a host after a throttled request. The request's own account waits as long as the
/// provider says; others may have other limits.
const PAUSE_MAX: Duration = Duration::from_mins(1);

/// One mint.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    pub(super) client: &'a MintClient,
    pub(super) order: &'a MintOrder<'a>,
    trigger: MintTrigger,
    deadline: Instant,
    /// Hosts that the mint has called or waited for.
    hosts: Mutex<HashSet<String>>,
}

/// How a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HostKind {
    /// A provider's own host: through the guard, with the host's trust store.
    Provider,
    /// A host from a field of the account: also with the account's CA.
    Configured,
    /// A metadata service, by the client for these.
    Metadata,
}

/// URL to call.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) url: Url,
    label: &'static str,
    kind: HostKind,
}

impl Target {
    /// URL of a metadata service.
    pub(super) fn metadata(url: &str, label: &'static str) -> Result<Self, MintError> {
        Self::parse(url, Schemes::HttpAndHttps, label, HostKind::Metadata)
    }

    fn parse(url: &str, schemes: Schemes, label: &'static str, kind: HostKind) -> Result<Self, MintError> {
        let url = parse_url(url, schemes)
            .map_err(|reason| MintError::new(MintReason::Misconfigured, format!("the URL of {label} {reason}")))?;
        Ok(Self { url, label, kind })
    }

    /// `host:port`, the key of the host's limits and clock.
    pub(super) fn host(&self) -> String {
        let port = self.url.port_or_known_default().unwrap_or_default();
        format!("{}:{port}", self.url.host_str().unwrap_or_default())
    }

    /// Value of the header `Host`.
    pub(super) fn host_header(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        self.url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }
}

impl<'a> Attempt<'a> {
    pub(super) fn new(
        client: &'a MintClient,
        order: &'a MintOrder<'a>,
        trigger: MintTrigger,
        deadline: Instant,
    ) -> Self {
        Self { client, order, trigger, deadline, hosts: Mutex::default() }
    }

    /// URL of a provider: at its own server, or at the one that the source sets instead.
    pub(super) fn provider_target(
        &self,
        own: &str,
        replacement: Option<&ServerUrl>,
        path: &str,
        label: &'static str,
    ) -> Result<Target, MintError> {
        match replacement {
            Some(server) => self.configured_target(&format!("{server}{path}"), label),
            None => Target::parse(&format!("{own}{path}"), Schemes::Https, label, HostKind::Provider),
        }
    }

    /// Token of the source's `ServiceAccount`.
    pub(super) fn web_identity_token(&self) -> Result<&SecretString, MintError> {
        let missing = || MintError::new(MintReason::Misconfigured, "there is no token of the ServiceAccount");
        self.order.web_identity.ok_or_else(missing)
    }

    /// URL from a field of the account.
    pub(super) fn configured_target(&self, url: &str, label: &'static str) -> Result<Target, MintError> {
        let schemes = if self.order.plain_http { Schemes::HttpAndHttps } else { Schemes::Https };
        Target::parse(url, schemes, label, HostKind::Configured)
    }

    /// Sends a request within the limits of its host, and reads the answer.
    pub(super) async fn call(
        &self,
        target: &Target,
        build: impl FnOnce(&Client) -> Result<RequestBuilder, MintError>,
    ) -> Result<Answer, MintError> {
        let (label, host) = (target.label, target.host());
        let (peers, ca) = match target.kind {
            HostKind::Provider => (&self.client.providers, None),
            HostKind::Configured => (&self.client.configured, self.order.ca_certificate),
            HostKind::Metadata => (&self.client.metadata, None),
        };
        let _permits = self.permits(peers, &host).await.map_err(|unavailable| throttled(label, &unavailable))?;
        let endpoint = peers.outbound.endpoint(&target.url, label.to_owned(), ca, self.deadline).await?;
        let response = endpoint.send(build(endpoint.http())?).await?;
        let (status, headers) = (response.status(), response.headers());
        let date = headers.get(header::DATE).and_then(date_of);
        if let Some(date) = date {
            self.client.clocks.observe(&host, date);
        }
        let now = date.unwrap_or_else(|| self.client.clocks.local());
        let delay = retry_after(headers, now).map(|delay| delay.min(schedule::RETRY_AFTER_MAX));
        if delay.is_some() && matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            peers.limits.pause(&host, delay.map(|delay| delay.min(PAUSE_MAX)));
        }
        if status.is_redirection() {
            let detail = format!("{label} redirects ({}), which is not followed", status.as_u16());
            return Err(MintError::new(MintReason::BadAnswer, detail));
        }
        let body = match endpoint.read_body(response, BODY_MAX).await {
            // The status of a refusal suffices.
            Err(error) if error.kind == OutboundErrorKind::TooLarge && !status.is_success() => Vec::new(),
            body => body?,
        };
        Ok(Answer { label, status, date, retry_after: delay, body })
    }

    /// Waits for the limits of a host. A scheduled mint that has called the host before waits until the
    /// deadline: deferred there, it would repeat its requests.
    async fn permits(&self, peers: &Peers, host: &str) -> Result<[Option<OwnedSemaphorePermit>; 2], Unavailable> {
        let Peers { limits, limits_on_request, .. } = peers;
        let (on_request, until) = match self.trigger {
            MintTrigger::Request => (Some(limits_on_request.acquire(host, self.deadline).await?), self.deadline),
            MintTrigger::Schedule if self.hosts.lock().insert(host.to_owned()) => {
                (None, self.deadline.min(Instant::now() + SCHEDULED_WAIT))
            }
            MintTrigger::Schedule => (None, self.deadline),
        };
        Ok([on_request, Some(limits.acquire(host, until).await?)])
    }

    /// Posts a form within the limits of its host, and reads the answer.
    pub(super) async fn post_form(&self, target: &Target, pairs: &[(&str, &str)]) -> Result<Answer, MintError> {
        let body = form(pairs);
        self.call(target, |http| Ok(http.post(target.url.clone()).header(header::CONTENT_TYPE, FORM).body(body))).await
    }

    /// Sends a request that states its time. If the provider refuses it and its clock differs, the
    /// request is sent once more with the provider's time.
    pub(super) async fn call_timed(
        &self,
        target: &Target,
        build: impl Fn(&Client, DateTime<Utc>) -> Result<RequestBuilder, MintError>,
    ) -> Result<Answer, MintError> {
        let host = target.host();
        let stated = self.client.clocks.at(&host);
        let answer = self.call(target, |http| build(http, stated)).await?;
        let differing = answer.date.filter(|date| (*date - stated).abs() > SKEW);
        let Some(date) = differing.filter(|_| answer.status.is_client_error()) else { return Ok(answer) };
        let answer = self.call(target, |http| build(http, date)).await?;
        if answer.status.is_success() {
            tracing::warn!(host, offset_s = (date - stated).num_seconds(), "provider clock adopted");
            self.client.clocks.adopt(&host);
        }
        Ok(answer)
    }
}

/// Media type of a [`form`].
pub(super) const FORM: &str = "application/x-www-form-urlencoded";

/// Encodes a form.
pub(super) fn form(pairs: &[(&str, &str)]) -> String {
    form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish()
}

/// Parses a time in a header. `None` before 1970 and after 9999: calculations with it could overflow.
fn date_of(date: &HeaderValue) -> Option<DateTime<Utc>> {
    const END: i64 = 253_402_300_799;
    let date = DateTime::parse_from_rfc2822(date.to_str().ok()?).ok()?.to_utc();
    (0..=END).contains(&date.timestamp()).then_some(date)
}

/// Describes a private key that does not parse or sign.
pub(super) fn unusable_key(invalid: &Invalid) -> MintError {
    MintError::new(MintReason::InvalidIdentity, format!("the private key {invalid}"))
}

/// Header with a secret.
///
/// # Errors
///
/// [`MintReason::BadAnswer`] if it contains characters that a header may not contain.
pub(super) fn secret_header(value: &SecretString) -> Result<HeaderValue, MintError> {
    let header = HeaderValue::from_str(value.expose_secret());
    let mut header = header.map_err(|_| {
        MintError::new(MintReason::BadAnswer, "a token contains characters that a header may not contain")
    })?;
    header.set_sensitive(true);
    Ok(header)
}

impl From<OutboundError> for MintError {
    fn from(error: OutboundError) -> Self {
        let reason = match error.kind {
            OutboundErrorKind::Refused => MintReason::Misconfigured,
            OutboundErrorKind::Unreachable | OutboundErrorKind::Tls => MintReason::Unreachable,
            OutboundErrorKind::TooLarge => MintReason::BadAnswer,
        };
        Self::new(reason, error.detail)
    }
}

fn throttled(label: &str, unavailable: &Unavailable) -> MintError {
    match unavailable {
        Unavailable::Paused(left) => {
            let detail = format!("{label} limits requests: regcred waits {} s", left.as_secs().max(1));
            let error = MintError::new(MintReason::Throttled, detail);
            MintError { retry_after: Some(*left), is_deferral: true, ..error }
        }
        Unavailable::Saturated => {
            let detail = format!("too many mints at {label} are in progress: regcred retries");
            MintError { is_deferral: true, ..MintError::new(MintReason::Throttled, detail) }
        }
    }
}
