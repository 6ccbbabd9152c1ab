//! Client for OIDC issuers: their signing keys (`OpenID` Connect Discovery 1.0), and the exchange of
//! codes with which people sign in (`OpenID` Connect Core 1.0, section 3.1).
//!
//! Every fetch ends within [`IssuerClientConfig::timeout`] and goes through the [outbound
//! client](super::outbound). A fetch runs in a task of its own: callers that need keys of the same
//! issuer share it, and none of them can cancel it.

mod discovery;
mod exchange;
mod key_cache;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use tokio::{runtime::Handle, time::Instant};
use url::Url;

pub use self::exchange::{CodeExchange, ExchangeError};
use self::key_cache::{KeyCache, Lifetimes, Lookup};
use crate::{
    clients::outbound::{Guard, OutboundClient, OutboundClientConfig, OutboundProxy, TlsHints},
    domain::{cluster::CaCertificate, identity_provider::Issuer, jwk::KeySet},
};

/// What an issuer publishes.
#[derive(Debug)]
pub struct Publication {
    /// Keys that sign its tokens.
    pub keys: KeySet,
    /// Where people sign in; `None` if the discovery document does not say it, or names addresses
    /// that may not be used.
    pub login: Option<LoginEndpoints>,
}

/// Addresses and habits of an issuer for signing in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginEndpoints {
    /// Page where people sign in.
    pub authorization: Url,
    /// Address where codes are redeemed.
    pub token: Url,
    /// Whether the secret of a client is sent in the form instead of a header.
    pub posts_secret: bool,
    /// Whether the issuer names itself when a person returns (RFC 9207).
    pub names_issuer: bool,
}

/// Maximum number of issuers with cached keys.
const ISSUERS_MAX: usize = 256;

/// Configuration of an [`IssuerClient`].
#[derive(Debug, Clone)]
pub struct IssuerClientConfig {
    /// Time limit for a fetch of keys, discovery included.
    pub timeout: Duration,
    /// Time after which cached keys are fetched again.
    pub keys_lifetime: Duration,
    /// Minimum time between two fetches from one issuer, whatever tokens arrive.
    pub refresh_interval: Duration,
    /// Time since the last successful fetch during which keys of an unavailable issuer stay in use.
    pub stale_lifetime: Duration,
    /// Runtime of the fetches; the caller's runtime if absent.
    pub runtime: Option<Handle>,
    /// Proxy for issuers at public addresses.
    pub proxy: Option<OutboundProxy>,
}

impl Default for IssuerClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            keys_lifetime: Duration::from_mins(10),
            refresh_interval: Duration::from_secs(10),
            stale_lifetime: Duration::from_hours(1),
            runtime: None,
            proxy: None,
        }
    }
}

/// Why an issuer's keys are unavailable. The texts are for the operator's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssuerError {
    /// The guard forbids the call.
    #[error("{0}")]
    Refused(String),
    /// No response, or a temporary failure.
    #[error("{0}")]
    Unreachable(String),
    /// The response is not an issuer's, or not this issuer's.
    #[error("{0}")]
    Invalid(String),
}

/// Statistics of an [`IssuerClient`].
#[derive(Debug, Default)]
pub struct IssuerMetrics {
    ok: AtomicU64,
    refused: AtomicU64,
    unreachable: AtomicU64,
    invalid: AtomicU64,
}

impl IssuerMetrics {
    fn count(&self, fetched: &Result<Publication, IssuerError>) {
        let counter = match fetched {
            Ok(_) => &self.ok,
            Err(IssuerError::Refused(_)) => &self.refused,
            Err(IssuerError::Unreachable(_)) => &self.unreachable,
            Err(IssuerError::Invalid(_)) => &self.invalid,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of fetches by result.
    pub fn fetches(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = [
            ("ok", &self.ok),
            ("refused", &self.refused),
            ("unreachable", &self.unreachable),
            ("invalid", &self.invalid),
        ];
        all.map(|(result, count)| (result, count.load(Ordering::Relaxed))).into_iter()
    }
}

/// Key of the cache: an issuer, and the CA certificates that it is verified with.
type CacheKey = (Issuer, Option<String>);

/// Fetches and caches the keys of issuers. A process has one.
#[derive(Debug)]
pub struct IssuerClient {
    outbound: OutboundClient,
    config: IssuerClientConfig,
    caches: Mutex<HashMap<CacheKey, Arc<Mutex<KeyCache>>>>,
    metrics: IssuerMetrics,
}

impl IssuerClient {
    /// Creates a client. Nothing is sent.
    #[must_use]
    pub fn new(guard: Guard, config: IssuerClientConfig) -> Self {
        let outbound = OutboundClientConfig {
            timeout: config.timeout,
            connect_timeout: config.timeout,
            allow_variable: "REGCRED_ISSUER_ALLOW",
            hints: TlsHints::default(),
            proxy: config.proxy.clone(),
        };
        Self {
            outbound: OutboundClient::new(guard, outbound),
            config,
            caches: Mutex::default(),
            metrics: IssuerMetrics::default(),
        }
    }

    /// Statistics.
    #[must_use]
    pub const fn metrics(&self) -> &IssuerMetrics {
        &self.metrics
    }

    /// Minimum time between two fetches from one issuer, after which a retry makes sense.
    #[must_use]
    pub const fn refresh_interval(&self) -> Duration {
        self.config.refresh_interval
    }

    /// Returns what an issuer publishes.
    ///
    /// Fetches it if no keys are cached, if they are too old, or if `key_id` is unknown, but never
    /// more often than [`IssuerClientConfig::refresh_interval`] allows. So the result may lack
    /// `key_id`.
    ///
    /// # Errors
    ///
    /// [`IssuerError`] if no usable keys are cached and the issuer does not provide any.
    pub async fn publication(
        self: &Arc<Self>,
        issuer: &Issuer,
        ca_certificate: Option<&CaCertificate>,
        key_id: Option<&str>,
    ) -> Result<Arc<Publication>, IssuerError> {
        let lifetimes = self.lifetimes();
        let cache = self.cache(issuer, ca_certificate);
        let fetch = {
            let mut locked = cache.lock();
            match locked.look_up(key_id, Instant::now(), &lifetimes) {
                Lookup::Found(found) => return Ok(found),
                Lookup::Failed(error) => return Err(error),
                Lookup::Wait(fetch) => fetch,
                Lookup::Fetch => {
                    let fetch = self.spawn_fetch(Arc::clone(&cache), issuer.clone(), ca_certificate.cloned()).shared();
                    locked.start_fetch(fetch.clone());
                    fetch
                }
            }
        };
        fetch.await;
        cache.lock().current(key_id, Instant::now(), &lifetimes)
    }

    fn lifetimes(&self) -> Lifetimes {
        let IssuerClientConfig { keys_lifetime, refresh_interval, stale_lifetime, .. } = self.config;
        Lifetimes { keys_lifetime, refresh_interval: refresh_interval.min(keys_lifetime), stale_lifetime }
    }

    fn cache(&self, issuer: &Issuer, ca_certificate: Option<&CaCertificate>) -> Arc<Mutex<KeyCache>> {
        let key = (issuer.clone(), ca_certificate.map(|ca| ca.as_pem().to_owned()));
        let mut caches = self.caches.lock();
        if caches.len() >= ISSUERS_MAX
            && !caches.contains_key(&key)
            && let Some(oldest) =
                caches.iter().min_by_key(|(_, cache)| cache.lock().fetched_at()).map(|(key, _)| key.clone())
        {
            caches.remove(&oldest);
        }
        Arc::clone(caches.entry(key).or_default())
    }

    /// Starts a fetch that no caller can cancel. It ends by its own deadline.
    fn spawn_fetch(
        self: &Arc<Self>,
        cache: Arc<Mutex<KeyCache>>,
        issuer: Issuer,
        ca_certificate: Option<CaCertificate>,
    ) -> BoxFuture<'static, ()> {
        let client = Arc::clone(self);
        let task = async move {
            let deadline = Instant::now() + client.config.timeout;
            let fetched = discovery::fetch(&client.outbound, &issuer, ca_certificate.as_ref(), deadline).await;
            client.metrics.count(&fetched);
            match &fetched {
                Ok(_) => tracing::debug!(%issuer, "issuer keys fetched"),
                Err(error) => tracing::warn!(%issuer, %error, "issuer keys not fetched"),
            }
            cache.lock().finish_fetch(fetched, Instant::now());
        };
        let handle = self.config.runtime.clone().unwrap_or_else(Handle::current);
        handle.spawn(task).map(drop).boxed()
    }
}
