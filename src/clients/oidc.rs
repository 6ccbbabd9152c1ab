//! An OIDC issuer, asked for the keys that it signs tokens with (`OpenID` Connect Discovery 1.0).
//!
//! What holds for every fetch: it ends within [`IssuerClientConfig::timeout`]; only hosts that the [`Guard`] admits are called, at the addresses
//! that it saw; no redirect is followed; what comes is read within bounds; the document has to name the very issuer that was
//! asked for; and nothing that came over the wire reaches a log or an error. A fetch lives on its own, so whoever waits for it
//! may go away, and all who need the keys of one issuer wait for the same one.

mod fetch;
mod kept;

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer};
use serde::Deserialize;
use tokio::{runtime::Handle, time::Instant};

use self::kept::{Kept, Step, Times};
use crate::{
    clients::{
        guard::{Guard, Schemes, parse_url},
        registry::host_roots,
    },
    domain::{cluster::CaCertificate, identity_provider::Issuer, jwk::KeySet},
};

/// Issuers whose keys are kept.
const ISSUERS_KEPT: usize = 256;
/// The longest discovery document, in bytes. Those of large issuers have 2 to 3 KiB.
const DISCOVERY_MAX: usize = 64 * 1024;
/// The longest set of keys, in bytes. A key with its certificates has 2 to 4 KiB.
const KEYS_MAX: usize = 256 * 1024;

/// How issuers are called.
#[derive(Debug, Clone)]
pub struct IssuerClientConfig {
    /// The time after which a fetch of keys is over, both documents together.
    pub timeout: Duration,
    /// How long keys are used without a look whether they are still the issuer's.
    pub keys_lifetime: Duration,
    /// The least time between two fetches from one issuer, whatever tokens come.
    pub refresh_interval: Duration,
    /// How long keys are used of an issuer that does not answer, since they were fetched.
    pub stale_lifetime: Duration,
    /// The runtime that fetches live on; without it, the runtime of whoever asks.
    pub runtime: Option<Handle>,
}

impl Default for IssuerClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            keys_lifetime: Duration::from_mins(10),
            refresh_interval: Duration::from_secs(10),
            stale_lifetime: Duration::from_hours(1),
            runtime: None,
        }
    }
}

/// Why there are no keys of an issuer. The texts are for the log of whoever runs this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssuerError {
    /// The guard forbids the call.
    #[error("{0}")]
    Refused(String),
    /// No answer, or one that says that the issuer is not well.
    #[error("{0}")]
    Unreachable(String),
    /// An answer that is not an issuer's, or not this one's.
    #[error("{0}")]
    Invalid(String),
}

/// What fetches of keys came to.
#[derive(Debug, Default)]
pub struct Fetches {
    ok: AtomicU64,
    refused: AtomicU64,
    unreachable: AtomicU64,
    invalid: AtomicU64,
}

impl Fetches {
    fn count(&self, fetched: &Result<KeySet, IssuerError>) {
        let counter = match fetched {
            Ok(_) => &self.ok,
            Err(IssuerError::Refused(_)) => &self.refused,
            Err(IssuerError::Unreachable(_)) => &self.unreachable,
            Err(IssuerError::Invalid(_)) => &self.invalid,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// How many had each result.
    pub fn by_result(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = [
            ("ok", &self.ok),
            ("refused", &self.refused),
            ("unreachable", &self.unreachable),
            ("invalid", &self.invalid),
        ];
        all.map(|(result, count)| (result, count.load(Ordering::Relaxed))).into_iter()
    }
}

/// An issuer, and whom to believe that it is.
type Asked = (Issuer, Option<String>);

/// Fetches the keys of issuers and keeps them for a while. There is one for the process.
#[derive(Debug)]
pub struct Issuers {
    guard: Guard,
    config: IssuerClientConfig,
    kept: Mutex<HashMap<Asked, Arc<Mutex<Kept>>>>,
    fetches: Fetches,
    /// The host's trust store, read once.
    roots: OnceLock<RootCertStore>,
}

impl Issuers {
    /// Gets ready; nothing is called yet.
    #[must_use]
    pub fn new(guard: Guard, config: IssuerClientConfig) -> Self {
        Self { guard, config, kept: Mutex::default(), fetches: Fetches::default(), roots: OnceLock::new() }
    }

    /// What fetches came to.
    #[must_use]
    pub const fn fetches(&self) -> &Fetches {
        &self.fetches
    }

    /// The least time between two fetches from one issuer: when it is worth to ask again.
    #[must_use]
    pub const fn refresh_interval(&self) -> Duration {
        self.config.refresh_interval
    }

    /// The keys of an issuer. They are fetched if there are none, if they have not been looked at for long, or if `key_id` is
    /// none of them; but never more often than the settings allow, so they may lack it all the same.
    ///
    /// # Errors
    ///
    /// [`IssuerError`] if there are none that may be used: the issuer does not answer, or not well.
    pub async fn keys(
        self: &Arc<Self>,
        issuer: &Issuer,
        ca_certificate: Option<&CaCertificate>,
        key_id: Option<&str>,
    ) -> Result<Arc<KeySet>, IssuerError> {
        let times = self.times();
        let kept = self.kept(issuer, ca_certificate);
        let flight = {
            let mut kept_now = lock(&kept);
            match kept_now.step(key_id, Instant::now(), &times) {
                Step::Use(keys) => return Ok(keys),
                Step::Fail(error) => return Err(error),
                Step::Wait(flight) => flight,
                Step::Fetch => {
                    let flight = self.start(Arc::clone(&kept), issuer.clone(), ca_certificate.cloned()).shared();
                    kept_now.take_off(flight.clone());
                    flight
                }
            }
        };
        flight.await;
        lock(&kept).settle(key_id, Instant::now(), &times)
    }

    fn times(&self) -> Times {
        let IssuerClientConfig { keys_lifetime, refresh_interval, stale_lifetime, .. } = self.config;
        Times { keys_lifetime, refresh_interval: refresh_interval.min(keys_lifetime), stale_lifetime }
    }

    fn kept(&self, issuer: &Issuer, ca_certificate: Option<&CaCertificate>) -> Arc<Mutex<Kept>> {
        let asked = (issuer.clone(), ca_certificate.map(|ca| ca.as_pem().to_owned()));
        let mut all = self.kept.lock();
        if all.len() >= ISSUERS_KEPT
            && !all.contains_key(&asked)
            && let Some(oldest) =
                all.iter().min_by_key(|(_, kept)| lock(kept).fetched_at()).map(|(asked, _)| asked.clone())
        {
            all.remove(&oldest);
        }
        Arc::clone(all.entry(asked).or_default())
    }

    /// Starts a fetch that goes on whoever waits for it, and ends by itself.
    fn start(
        self: &Arc<Self>,
        kept: Arc<Mutex<Kept>>,
        issuer: Issuer,
        ca_certificate: Option<CaCertificate>,
    ) -> BoxFuture<'static, ()> {
        let issuers = Arc::clone(self);
        let task = async move {
            let deadline = Instant::now() + issuers.config.timeout;
            let fetched = issuers.fetch(&issuer, ca_certificate.as_ref(), deadline).await;
            issuers.fetches.count(&fetched);
            match &fetched {
                Ok(_) => tracing::debug!(%issuer, "the keys of an issuer were fetched"),
                Err(error) => tracing::warn!(%issuer, %error, "the keys of an issuer could not be fetched"),
            }
            lock(&kept).land(fetched, Instant::now());
        };
        let handle = self.config.runtime.clone().unwrap_or_else(Handle::current);
        handle.spawn(task).map(drop).boxed()
    }

    async fn fetch(
        &self,
        issuer: &Issuer,
        ca_certificate: Option<&CaCertificate>,
        deadline: Instant,
    ) -> Result<KeySet, IssuerError> {
        #[derive(Deserialize)]
        struct Discovery {
            issuer: String,
            jwks_uri: String,
        }
        let invalid = |detail: &str| IssuerError::Invalid(detail.to_owned());
        let schemes = if issuer.is_https() { Schemes::Https } else { Schemes::HttpAndHttps };
        let url =
            parse_url(&issuer.discovery_url(), schemes).map_err(|_| invalid("the issuer's URL cannot be used"))?;
        let document = self.get(&url, "the discovery document", ca_certificate, DISCOVERY_MAX, deadline).await?;
        let discovery: Discovery = serde_json::from_slice(&document)
            .map_err(|_| invalid("the discovery document is none: it names no issuer and jwks_uri"))?;
        if discovery.issuer != issuer.as_str() {
            return Err(invalid("the discovery document is another issuer's"));
        }
        let keys_url = parse_url(&discovery.jwks_uri, schemes)
            .map_err(|reason| IssuerError::Invalid(format!("the jwks_uri of the discovery document {reason}")))?;
        // A sandbox's issuer names its own keys; anybody else's over http:// could be everybody's.
        if keys_url.scheme() != "https" && keys_url.origin() != url.origin() {
            return Err(invalid("the jwks_uri of the discovery document is http://"));
        }
        let keys = self.get(&keys_url, "the key document", ca_certificate, KEYS_MAX, deadline).await?;
        KeySet::parse(&keys).map_err(|refused| IssuerError::Invalid(refused.to_string()))
    }

    fn tls(&self, ca_certificate: Option<&CaCertificate>) -> ClientConfig {
        let mut roots = self.roots.get_or_init(host_roots).clone();
        let own = ca_certificate.into_iter().flat_map(CaCertificate::as_der);
        roots.add_parsable_certificates(own.map(|der| CertificateDer::from(der.to_vec())));
        ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
    }
}

fn lock(kept: &Mutex<Kept>) -> parking_lot::MutexGuard<'_, Kept> {
    // Nothing in there can panic halfway through a change.
    kept.lock()
}
