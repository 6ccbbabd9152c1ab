//! Clients of the providers that issue registry logins.
//!
//! Guarantees:
//!
//! - A mint ends at its deadline, which includes the wait for the limits of a host: 4 requests at a
//!   time and 5 a second, for each host and process.
//! - A scheduled mint does not wait for a busy or hanging host, and mints of requests leave it a
//!   share of each host.
//! - Every request goes through the [outbound client](super::outbound). Metadata services are reached
//!   by a client of their own, which knows only their fixed addresses.
//! - A redirect is an error, and an answer has at most 64 KiB.
//! - Nothing that a provider sent reaches a log, an error or a row. Error codes are compared with a
//!   fixed list.
//! - The clock of this host does not matter: a request that a provider refuses is repeated once with
//!   the provider's time if the two differ, and expiry times are relative to the answer's `Date`.

mod ambient;
mod answer;
mod attempt;
mod azure;
mod clocks;
mod codes;
mod ecr;
mod google;
mod oauth2;
mod sts;
#[cfg(test)]
mod tests;
mod xml;

use std::{fmt, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use secrecy::SecretString;
use tokio::time::Instant;

pub use self::ambient::{AmbientConfig, AwsEnvironment, AzureEnvironment, MetadataConfig};
use self::{attempt::Attempt, clocks::Clocks};
use crate::{
    clients::outbound::{Guard, HostLimits, OutboundClient, OutboundClientConfig, OutboundProxy, TlsHints},
    domain::{
        cluster::CaCertificate,
        mint::{MintError, MintReason, Minted, Provider, Source},
        registry::RegistryScope,
    },
};

/// Concurrent requests to a host.
const REQUESTS_PER_HOST: usize = 4;
/// Maximum number of these for mints of requests. Scheduled mints wait for a permit shortly only, so
/// they need one that waiting requests cannot take.
const REQUESTS_PER_HOST_ON_REQUEST: usize = REQUESTS_PER_HOST - 1;
/// Minimum time between the starts of two requests to a host.
const INTERVAL: Duration = Duration::from_millis(200);
/// Time for which a scheduled mint waits for the limits of a host.
const SCHEDULED_WAIT: Duration = Duration::from_secs(1);

/// Configuration of a [`MintClient`].
#[derive(Clone)]
pub struct MintClientConfig {
    /// Time limit for a mint.
    pub timeout: Duration,
    /// Part of `timeout` in which a connection must be established, TLS included.
    pub connect_timeout: Duration,
    /// Ambient identities that sources may use.
    pub ambient: AmbientConfig,
    /// Addresses of metadata services.
    pub metadata: MetadataConfig,
    /// Proxy for calls to public addresses.
    pub proxy: Option<OutboundProxy>,
    /// Wall clock, which tests set wrong.
    pub now: fn() -> DateTime<Utc>,
}

impl Default for MintClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
            ambient: AmbientConfig::default(),
            metadata: MetadataConfig::default(),
            proxy: None,
            now: crate::clock::now,
        }
    }
}

impl fmt::Debug for MintClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MintClientConfig")
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("ambient", &self.ambient)
            .finish_non_exhaustive()
    }
}

/// Trigger of a mint, which decides how long it waits for the limits of its hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MintTrigger {
    /// A request: until the deadline.
    Request,
    /// The schedule: a second for each host. Then the mint is a [deferral](MintError::is_deferral), so
    /// that mints at other hosts can start in its place.
    Schedule,
}

/// Source, secret and registry of a login to mint.
#[derive(Debug, Clone, Copy)]
pub struct MintOrder<'a> {
    /// Source of the login.
    pub source: &'a Source,
    /// Secret of the source; empty for an identity without one.
    pub secret: &'a SecretString,
    /// Token of the source's `ServiceAccount`, for a web identity.
    pub web_identity: Option<&'a SecretString>,
    /// Registry that the login is for.
    pub registry: &'a RegistryScope,
    /// Whether the registry, and hosts in place of the provider's, may be called without TLS.
    pub plain_http: bool,
    /// Authorities that may sign the certificates of these hosts, in addition to those that this
    /// host trusts. The provider's own hosts are not among them.
    pub ca_certificate: Option<&'a CaCertificate>,
}

/// Mints logins. It remembers the limits and clocks of hosts, so a process has one.
#[derive(Debug)]
pub struct MintClient {
    providers: Peers,
    configured: Peers,
    metadata: Peers,
    clocks: Clocks,
    config: MintClientConfig,
}

/// Hosts of one kind, with look-ups and limits of their own: a caller that names many slow hosts does
/// not delay mints at the hosts of providers.
#[derive(Debug)]
struct Peers {
    outbound: OutboundClient,
    limits: HostLimits,
    limits_on_request: HostLimits,
}

impl MintClient {
    /// Creates a client, with a guard for each kind of host. Nothing is sent.
    #[must_use]
    pub fn new(guard: impl Fn() -> Guard, config: MintClientConfig) -> Self {
        let peers = |guard, proxy| {
            let outbound = OutboundClientConfig {
                timeout: config.timeout,
                connect_timeout: config.connect_timeout,
                allow_variable: "REGCRED_MINT_ALLOW",
                hints: TlsHints { wrong_name: "", not_tls: "" },
                proxy,
            };
            Peers {
                outbound: OutboundClient::new(guard, outbound),
                limits: HostLimits::new(REQUESTS_PER_HOST, INTERVAL),
                limits_on_request: HostLimits::new(REQUESTS_PER_HOST_ON_REQUEST, Duration::ZERO),
            }
        };
        Self {
            providers: peers(guard(), config.proxy.clone()),
            configured: peers(guard(), config.proxy.clone()),
            metadata: peers(Guard::new(config.metadata.allowed.clone()), None),
            clocks: Clocks::new(config.now),
            config,
        }
    }

    /// Mints a login, until a deadline.
    ///
    /// # Errors
    ///
    /// [`MintError`] with its reason. Nothing is sent if the registry does not fit the source.
    #[tracing::instrument(name = "provider.mint", skip_all, fields(source = %order.source.source_type()))]
    pub async fn mint_until(
        &self,
        order: &MintOrder<'_>,
        trigger: MintTrigger,
        deadline: Instant,
    ) -> Result<Minted, MintError> {
        if let Err(invalid) = order.source.check_registry(order.registry) {
            let detail = format!("the source does not serve the account's registry, which {invalid}");
            return Err(MintError::new(MintReason::RegistryMismatch, detail));
        }
        let attempt = Attempt::new(self, order, trigger, deadline);
        match &order.source.provider {
            Provider::Ecr(source) => attempt.ecr(source).await,
            Provider::Google(source) => attempt.google(source).await,
            Provider::Azure(source) => attempt.azure(source).await,
            Provider::OAuth2(source) => attempt.oauth2(source).await,
        }
    }

    /// Returns the largest difference between the clock of this host and that of a provider, as the
    /// answers of the last day showed it.
    pub fn clock_offset_max(&self) -> TimeDelta {
        self.clocks.offset_max(Instant::now())
    }
}
