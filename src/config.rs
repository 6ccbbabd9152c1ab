//! Configuration from environment variables.
//!
//! `docs/CONFIGURATION.md` lists the variables. Secrets can also come from files. All problems are
//! reported at once. Only `cli` and `app` read the configuration; other modules receive values.

mod reader;
mod traces;

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use chrono::TimeDelta;
use secrecy::SecretString;
use sqlx::postgres::PgConnectOptions;

use crate::{
    clients::{
        cluster, mint, oidc,
        outbound::{AllowList, Guard, OutboundProxy},
        registry,
    },
    crypto::{
        certificate::ServerCertificate,
        pepper::{PepperRing, Peppers},
        ring::Ring as _,
        sealer::KeyRing,
    },
    domain::{origin::Origins, proxies::Proxies},
    storage::pool,
    telemetry::{self, LogConfig},
};

pub use self::reader::{ConfigError, ExposedFile, Reader, variable};

/// Default address of the HTTP server.
pub const LISTEN_DEFAULT: &str = "127.0.0.1:8080";
/// Default address of the operations listener.
const OPERATIONS_LISTEN_DEFAULT: &str = "127.0.0.1:8081";

/// Variable with the path of the listener's TLS certificate.
pub const TLS_CERTIFICATE_FILE: &str = "REGCRED_HTTP_TLS_CERTIFICATE_FILE";
const TLS_KEY_FILE: &str = "REGCRED_HTTP_TLS_KEY_FILE";

/// Default rate limit: far above normal use, far below the capacity of one process.
const REQUESTS_PER_SECOND_DEFAULT: u32 = 1000;

/// Default networks of clusters: loopback, private and carrier-grade NAT addresses.
const CLUSTER_ALLOW_DEFAULT: &str =
    "127.0.0.0/8,::1/128,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7";

/// `REGCRED_HTTP_…` and `REGCRED_OPERATIONS_LISTEN`
#[derive(Debug)]
pub struct HttpConfig {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// Address of the listener for metrics and health, if it is on.
    pub operations_listen: Option<SocketAddr>,
    /// Number of worker threads.
    pub workers: usize,
    /// Time for requests in flight during a shutdown.
    pub shutdown_grace: Duration,
    /// Sustained request rate of one caller; 0 disables the limit.
    pub requests_per_second: u32,
    /// Burst size of one caller.
    pub request_burst: u32,
    /// Proxies that are trusted to report the client address.
    pub proxies: Proxies,
    /// Origins of web pages that may call the API.
    pub origins: Origins,
    /// Certificate of the listener; plain HTTP if absent.
    pub certificate: Option<ServerCertificate>,
}

/// `REGCRED_DATABASE_…`
pub struct DatabaseConfig {
    /// Connection options, including the password.
    pub options: PgConnectOptions,
    /// Maximum number of pooled connections of this process.
    pub max_connections: u32,
    /// Time that a request waits for a connection.
    pub acquire_timeout: Duration,
    /// Time that startup waits for Postgres.
    pub start_timeout: Duration,
}

// The `Debug` implementation of the options shows the password.
impl fmt::Debug for DatabaseConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseConfig")
            .field("host", &self.options.get_host())
            .field("port", &self.options.get_port())
            .finish_non_exhaustive()
    }
}

/// `REGCRED_MASTER_KEYS` or its file, and `REGCRED_REQUIRE_BOUND_VALUES`.
#[derive(Debug)]
pub struct MasterKeysConfig {
    /// Key ring.
    pub ring: KeyRing,
    /// File of the ring, which is reloaded while the service runs.
    pub file: Option<PathBuf>,
    /// Whether values that are not bound to their destination are refused, whatever the database
    /// says.
    pub requires_bound: bool,
}

/// `REGCRED_VERIFY_…` and `REGCRED_OUTBOUND_ALLOW`
#[derive(Debug)]
pub struct VerifyConfig {
    /// Allowed addresses in addition to public ones.
    pub allowed: AllowList,
    /// Client of registries.
    pub registries: registry::RegistryClientConfig,
    /// Whether this process verifies due accounts in the background.
    pub background: bool,
    /// Interval between two searches for due accounts.
    pub poll: Duration,
}

/// `REGCRED_ISSUER_…` and `REGCRED_TOKEN_REVIEW_SECONDS`
#[derive(Debug)]
pub struct IdentityConfig {
    /// Allowed addresses of issuers in addition to public ones.
    pub allowed: AllowList,
    /// Client of issuers.
    pub issuers: oidc::IssuerClientConfig,
    /// Time for which a cluster's review of a token is cached.
    pub review_cache_ttl: Duration,
}

/// `REGCRED_MINT_…`
#[derive(Debug)]
pub struct MintConfig {
    /// Allowed addresses of providers in addition to public ones.
    pub allowed: AllowList,
    /// Client of providers.
    pub client: mint::MintClientConfig,
}

/// `REGCRED_PULL_SECRETS_…`
#[derive(Debug)]
pub struct PullSecretsConfig {
    /// Duration of the lease on a claimed target.
    pub lease: Duration,
    /// Interval at which synced targets are reconciled again.
    pub resync: Duration,
    /// Interval at which the namespaces of a cluster are matched against selectors.
    pub compare: Duration,
    /// Interval between two searches for due targets; notifications shorten it.
    pub poll: Duration,
    /// Number of targets of one cluster that are reconciled concurrently.
    pub concurrency: usize,
}

/// Configuration of `serve` and `worker`.
#[derive(Debug)]
pub struct ServeConfig {
    /// HTTP server.
    pub http: HttpConfig,
    /// Postgres.
    pub database: DatabaseConfig,
    /// Keys that seal stored secrets.
    pub master_keys: MasterKeysConfig,
    /// Keys of the HMAC over API keys.
    pub peppers: Peppers,
    /// Maximum lifetime of a new API key; unlimited if absent.
    pub api_key_lifetime_max: Option<TimeDelta>,
    /// Clients of clusters.
    pub clusters: cluster::ClusterClientConfig,
    /// Verification of logins.
    pub verify: VerifyConfig,
    /// Reconciliation of pull secrets.
    pub pull_secrets: PullSecretsConfig,
    /// Verification of identity provider tokens.
    pub identity: IdentityConfig,
    /// Minting of logins.
    pub mint: MintConfig,
    /// Secret files that other users can read.
    pub exposed_files: Vec<ExposedFile>,
}

impl Reader<'_> {
    /// Reads `REGCRED_HTTP_…` and `REGCRED_OPERATIONS_LISTEN`.
    pub fn http(&mut self) -> Option<HttpConfig> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let listen = self.parsed("REGCRED_HTTP_LISTEN", LISTEN_DEFAULT, "an address such as 127.0.0.1:8080");
        let operations_listen = self.operations_listen();
        let workers = self.number("REGCRED_HTTP_WORKERS", cores, 1..=1024);
        let grace = self.seconds("REGCRED_HTTP_SHUTDOWN_SECONDS", 20);
        let per_second = self.number("REGCRED_HTTP_REQUESTS_PER_SECOND", REQUESTS_PER_SECOND_DEFAULT, 0..=1_000_000);
        let burst = per_second.unwrap_or(REQUESTS_PER_SECOND_DEFAULT).saturating_mul(2).max(1);
        let burst = self.number("REGCRED_HTTP_REQUEST_BURST", burst, 1..=2_000_000);
        let trusted = self.get("REGCRED_HTTP_TRUSTED_PROXIES").unwrap_or_default();
        let trusted = self.keep("REGCRED_HTTP_TRUSTED_PROXIES", trusted.parse());
        let header = self.get("REGCRED_HTTP_PROXY_HEADER").unwrap_or_else(|| "X-Forwarded-For".to_owned());
        let header = self.keep("REGCRED_HTTP_PROXY_HEADER", header.parse());
        let origins = self.get("REGCRED_HTTP_CORS_ORIGINS").unwrap_or_default();
        let origins = self.keep("REGCRED_HTTP_CORS_ORIGINS", origins.parse());
        let certificate = self.certificate();
        Some(HttpConfig {
            listen: listen?,
            operations_listen: operations_listen?,
            workers: workers?,
            shutdown_grace: grace?,
            requests_per_second: per_second?,
            request_burst: burst?,
            proxies: Proxies { trusted: trusted?, header: header? },
            origins: origins?,
            certificate: certificate?,
        })
    }

    /// Reads `REGCRED_OPERATIONS_LISTEN`; `off` disables the listener.
    fn operations_listen(&mut self) -> Option<Option<SocketAddr>> {
        let name = "REGCRED_OPERATIONS_LISTEN";
        if self.get(name).is_some_and(|value| value == "off") {
            return Some(None);
        }
        self.parsed(name, OPERATIONS_LISTEN_DEFAULT, "an address such as 127.0.0.1:8081, or off").map(Some)
    }

    /// Reads the files that `REGCRED_HTTP_TLS_…` name: both or neither.
    fn certificate(&mut self) -> Option<Option<ServerCertificate>> {
        let files = [TLS_CERTIFICATE_FILE, TLS_KEY_FILE].map(|name| self.get(name).map(PathBuf::from));
        match files {
            [None, None] => Some(None),
            [Some(certificate), Some(key)] => {
                self.note_exposed(TLS_KEY_FILE, &key);
                let loaded = ServerCertificate::load(certificate, key);
                self.keep("REGCRED_HTTP_TLS_…", loaded).map(Some)
            }
            [given, _] => {
                let missing = if given.is_some() { TLS_KEY_FILE } else { TLS_CERTIFICATE_FILE };
                self.refuse(format!("{missing} must be set too: set both variables or neither"))
            }
        }
    }

    /// Reads `REGCRED_DATABASE_…`.
    pub fn database(&mut self) -> Option<DatabaseConfig> {
        let options = self.secret("REGCRED_DATABASE_URL").and_then(|(url, _)| {
            let parsed = pool::parse_url(&url);
            self.keep("REGCRED_DATABASE_URL", parsed)
        });
        let max_connections = self.number("REGCRED_DATABASE_MAX_CONNECTIONS", 32, 1..=10_000);
        let acquire_timeout = self.seconds("REGCRED_DATABASE_ACQUIRE_TIMEOUT_SECONDS", 3);
        let start_timeout = self.seconds("REGCRED_DATABASE_START_TIMEOUT_SECONDS", 30);
        Some(DatabaseConfig {
            options: options?,
            max_connections: max_connections?,
            acquire_timeout: acquire_timeout?,
            start_timeout: start_timeout?,
        })
    }

    /// Reads `REGCRED_MASTER_KEYS` or its file, and `REGCRED_REQUIRE_BOUND_VALUES`.
    pub fn master_keys(&mut self) -> Option<MasterKeysConfig> {
        let secret = self.secret("REGCRED_MASTER_KEYS");
        let requires_bound = self.parsed("REGCRED_REQUIRE_BOUND_VALUES", "false", "true or false");
        let (text, file) = secret?;
        let ring = self.keep("REGCRED_MASTER_KEYS", KeyRing::parse(&text))?;
        Some(MasterKeysConfig { ring, file, requires_bound: requires_bound? })
    }

    /// Reads `REGCRED_API_KEY_PEPPER` or its file.
    pub fn peppers(&mut self) -> Option<Peppers> {
        let (text, file) = self.secret("REGCRED_API_KEY_PEPPER")?;
        let ring = self.keep("REGCRED_API_KEY_PEPPER", PepperRing::parse(&text))?;
        Some(Peppers::new(ring, file))
    }

    /// Reads `REGCRED_API_KEY_MAX_LIFETIME_DAYS`.
    pub fn api_key_lifetime_max(&mut self) -> Option<Option<TimeDelta>> {
        const VARIABLE: &str = "REGCRED_API_KEY_MAX_LIFETIME_DAYS";
        if self.get(VARIABLE).is_none() {
            return Some(None);
        }
        self.number(VARIABLE, 1, 1..=36_500).map(|days| Some(TimeDelta::days(days)))
    }

    /// Reads `REGCRED_CLUSTER_…`, and the address of the API server of the pod's own cluster.
    pub fn clusters(&mut self) -> Option<cluster::ClusterClientConfig> {
        let default = cluster::ClusterClientConfig::default();
        let timeout = self.seconds("REGCRED_CLUSTER_TIMEOUT_SECONDS", default.timeout.as_secs());
        let connect = self.seconds("REGCRED_CLUSTER_CONNECT_TIMEOUT_SECONDS", default.connect_timeout.as_secs());
        let directory = self.get("REGCRED_CLUSTER_SERVICE_ACCOUNT_DIR").map(PathBuf::from);
        let allowed = self.get("REGCRED_CLUSTER_ALLOW").unwrap_or_else(|| CLUSTER_ALLOW_DEFAULT.to_owned());
        let allowed = self.keep("REGCRED_CLUSTER_ALLOW", allowed.parse::<AllowList>());
        Some(cluster::ClusterClientConfig {
            timeout: timeout?,
            connect_timeout: connect?,
            service_account_dir: directory.unwrap_or(default.service_account_dir),
            service_host: self.get("KUBERNETES_SERVICE_HOST"),
            service_port: self.get("KUBERNETES_SERVICE_PORT"),
            runtime: None,
            guard: Some(Guard::new(allowed?)),
            metrics: default.metrics,
        })
    }

    /// Reads `REGCRED_OUTBOUND_PROXY` or its file.
    pub fn outbound_proxy(&mut self) -> Option<Option<OutboundProxy>> {
        const VARIABLE: &str = "REGCRED_OUTBOUND_PROXY";
        if self.get(VARIABLE).is_none() && self.get(&format!("{VARIABLE}_FILE")).is_none() {
            return Some(None);
        }
        let (url, _) = self.secret(VARIABLE)?;
        self.keep(VARIABLE, OutboundProxy::parse(&url)).map(Some)
    }

    /// Reads `REGCRED_URL`, unless it is given, and `REGCRED_TOKEN`, for commands that call a running
    /// service.
    pub fn service(&mut self, url: Option<String>) -> Option<(String, SecretString)> {
        let url = url.or_else(|| self.get("REGCRED_URL"));
        let url = url.or_else(|| self.refuse("REGCRED_URL must be set, or the URL passed with --url".to_owned()));
        let token = self.secret("REGCRED_TOKEN");
        Some((url?, token?.0))
    }

    /// Reads `REGCRED_VERIFY_…` and `REGCRED_OUTBOUND_ALLOW`.
    pub fn verify(&mut self, proxy: Option<OutboundProxy>) -> Option<VerifyConfig> {
        let default = registry::RegistryClientConfig::default();
        let allowed = self.get("REGCRED_OUTBOUND_ALLOW").unwrap_or_default();
        let allowed = self.keep("REGCRED_OUTBOUND_ALLOW", allowed.parse());
        let timeout = self.number("REGCRED_VERIFY_TIMEOUT_SECONDS", default.timeout.as_secs(), 1..=60);
        let connect = self.number("REGCRED_VERIFY_CONNECT_TIMEOUT_SECONDS", default.connect_timeout.as_secs(), 1..=60);
        let per_host = self.number("REGCRED_VERIFY_CHECKS_PER_HOST", default.checks_per_host, 1..=64);
        let background = self.parsed("REGCRED_VERIFY_BACKGROUND", "true", "true or false");
        let poll = self.seconds("REGCRED_VERIFY_POLL_SECONDS", 5);
        let registries = registry::RegistryClientConfig {
            timeout: Duration::from_secs(timeout?),
            connect_timeout: Duration::from_secs(connect?),
            checks_per_host: per_host?,
            proxy,
        };
        Some(VerifyConfig { allowed: allowed?, registries, background: background?, poll: poll? })
    }

    /// Reads `REGCRED_ISSUER_…` and `REGCRED_TOKEN_REVIEW_SECONDS`.
    pub fn identity(&mut self, proxy: Option<OutboundProxy>) -> Option<IdentityConfig> {
        let default = oidc::IssuerClientConfig::default();
        let allowed = self.get("REGCRED_ISSUER_ALLOW").unwrap_or_default();
        let allowed = self.keep("REGCRED_ISSUER_ALLOW", allowed.parse());
        let timeout = self.number("REGCRED_ISSUER_TIMEOUT_SECONDS", default.timeout.as_secs(), 1..=60);
        let keys = self.seconds("REGCRED_ISSUER_KEYS_SECONDS", default.keys_lifetime.as_secs());
        let refresh = self.seconds("REGCRED_ISSUER_REFRESH_SECONDS", default.refresh_interval.as_secs());
        let stale = self.number("REGCRED_ISSUER_STALE_SECONDS", default.stale_lifetime.as_secs(), 0..=86_400);
        let review = self.number("REGCRED_TOKEN_REVIEW_SECONDS", 30, 0..=cluster::REVIEW_REMEMBERED_MAX);
        let issuers = oidc::IssuerClientConfig {
            timeout: Duration::from_secs(timeout?),
            keys_lifetime: keys?,
            refresh_interval: refresh?,
            stale_lifetime: Duration::from_secs(stale?),
            runtime: None,
            proxy,
        };
        Some(IdentityConfig { allowed: allowed?, issuers, review_cache_ttl: Duration::from_secs(review?) })
    }

    /// Reads `REGCRED_MINT_…`, and what the allowed clouds set in pods.
    pub fn mint(&mut self, proxy: Option<OutboundProxy>) -> Option<MintConfig> {
        let allowed = self.get("REGCRED_MINT_ALLOW").unwrap_or_default();
        let allowed = self.keep("REGCRED_MINT_ALLOW", allowed.parse());
        let ambient = self.mint_ambient();
        let client = mint::MintClientConfig { ambient: ambient?, proxy, ..mint::MintClientConfig::default() };
        Some(MintConfig { allowed: allowed?, client })
    }

    fn mint_ambient(&mut self) -> Option<mint::AmbientConfig> {
        const VARIABLE: &str = "REGCRED_MINT_AMBIENT";
        let clouds = self.get(VARIABLE).unwrap_or_default();
        let clouds: Vec<&str> = clouds.split(',').map(str::trim).filter(|cloud| !cloud.is_empty()).collect();
        if !clouds.iter().all(|cloud| ["aws", "gcp", "azure"].contains(cloud)) {
            return self.refuse(format!("{VARIABLE}: must be a list of aws, gcp and azure"));
        }
        let path = |name: &str| self.get(name).map(PathBuf::from);
        let mut ambient = mint::AmbientConfig { gcp: clouds.contains(&"gcp"), ..mint::AmbientConfig::default() };
        if clouds.contains(&"aws") {
            ambient.aws = Some(mint::AwsEnvironment {
                role_arn: self.get("AWS_ROLE_ARN"),
                web_identity_token_file: path("AWS_WEB_IDENTITY_TOKEN_FILE"),
                credentials_full_uri: self.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"),
                credentials_relative_uri: self.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
                authorization_token_file: path("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
            });
        }
        if clouds.contains(&"azure") {
            ambient.azure = Some(mint::AzureEnvironment {
                client_id: self.get("AZURE_CLIENT_ID"),
                tenant_id: self.get("AZURE_TENANT_ID"),
                federated_token_file: path("AZURE_FEDERATED_TOKEN_FILE"),
                authority_host: self.get("AZURE_AUTHORITY_HOST"),
            });
        }
        Some(ambient)
    }

    /// Reads `REGCRED_PULL_SECRETS_…`.
    pub fn pull_secrets(&mut self) -> Option<PullSecretsConfig> {
        let lease = self.number("REGCRED_PULL_SECRETS_LEASE_SECONDS", 30, 3..=3600);
        let resync = self.number("REGCRED_PULL_SECRETS_RESYNC_SECONDS", 600, 1..=86_400);
        let compare = self.number("REGCRED_PULL_SECRETS_COMPARE_SECONDS", 15, 1..=86_400);
        let poll = self.seconds("REGCRED_PULL_SECRETS_POLL_SECONDS", 1);
        let concurrency = self.number("REGCRED_PULL_SECRETS_CONCURRENCY", 16, 1..=256);
        Some(PullSecretsConfig {
            lease: Duration::from_secs(lease?),
            resync: Duration::from_secs(resync?),
            compare: Duration::from_secs(compare?),
            poll: poll?,
            concurrency: concurrency?,
        })
    }

    /// Reads `REGCRED_LOG_…`.
    pub fn log(&mut self) -> Option<LogConfig> {
        let format = self.get("REGCRED_LOG_FORMAT").unwrap_or_else(|| "auto".to_owned());
        let format = self.keep("REGCRED_LOG_FORMAT", format.parse());
        let filter = self.get("REGCRED_LOG_FILTER").unwrap_or_else(|| telemetry::FILTER_DEFAULT.to_owned());
        let filter = self.keep("REGCRED_LOG_FILTER", telemetry::check_filter(&filter).map(|()| filter));
        Some(LogConfig { format: format?, filter: filter? })
    }

    /// Reads the configuration of `serve` and `worker`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] lists all problems.
    pub fn serve(mut self) -> Result<ServeConfig, ConfigError> {
        let (http, database, master_keys) = (self.http(), self.database(), self.master_keys());
        let (peppers, clusters, proxy) = (self.peppers(), self.clusters(), self.outbound_proxy());
        let verify = self.verify(proxy.clone().flatten());
        let pull_secrets = self.pull_secrets();
        let identity = self.identity(proxy.clone().flatten());
        let mint = self.mint(proxy.flatten());
        let api_key_lifetime_max = self.api_key_lifetime_max();
        self.note_traces_file();
        let exposed_files = std::mem::take(&mut self.exposed_files);
        self.finish(|| {
            Some(ServeConfig {
                http: http?,
                database: database?,
                master_keys: master_keys?,
                peppers: peppers?,
                api_key_lifetime_max: api_key_lifetime_max?,
                clusters: clusters?,
                verify: verify?,
                pull_secrets: pull_secrets?,
                identity: identity?,
                mint: mint?,
                exposed_files,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn serve(variables: &[(&str, &str)]) -> Result<ServeConfig, ConfigError> {
        let variables: HashMap<String, String> =
            variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Reader::new(&|name| variables.get(name).cloned()).serve()
    }

    const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

    #[test]
    fn defaults_complete_a_minimal_environment() {
        let ring = format!("k1:{KEY}");
        let config = serve(&[
            ("REGCRED_DATABASE_URL", "postgres://regcred:canary@127.0.0.1/regcred"),
            ("REGCRED_MASTER_KEYS", &ring),
            ("REGCRED_API_KEY_PEPPER", KEY),
        ])
        .unwrap();
        assert_eq!(config.http.listen.to_string(), LISTEN_DEFAULT);
        assert_eq!(config.api_key_lifetime_max, None);
        let operations = config.http.operations_listen.expect("the listener is on");
        assert_eq!(operations.to_string(), OPERATIONS_LISTEN_DEFAULT);
        assert!(operations.ip().is_loopback());
        let debug = format!("{config:?}");
        assert!(!debug.contains("canary") && !debug.contains(KEY), "{debug}");
    }

    #[test]
    fn operations_listener_can_be_off() {
        let read = |value: &str| {
            let lookup = |name: &str| (name == "REGCRED_OPERATIONS_LISTEN").then(|| value.to_owned());
            Reader::new(&lookup).operations_listen()
        };
        assert_eq!(read("off"), Some(None));
        assert_eq!(read("[::1]:0"), Some(Some("[::1]:0".parse().unwrap())));
        assert_eq!(read("OFF"), None);
    }

    #[test]
    fn all_problems_are_reported_without_secrets() {
        let refused = serve(&[
            ("REGCRED_HTTP_LISTEN", "nowhere"),
            ("REGCRED_HTTP_WORKERS", "0"),
            ("REGCRED_OPERATIONS_LISTEN", "on"),
            ("REGCRED_DATABASE_URL", "canary"),
            ("REGCRED_MASTER_KEYS", "canary"),
            ("REGCRED_API_KEY_PEPPER", "canary"),
            ("REGCRED_API_KEY_PEPPER_FILE", "/nowhere"),
            ("REGCRED_API_KEY_MAX_LIFETIME_DAYS", "0"),
            ("REGCRED_CLUSTER_TIMEOUT_SECONDS", "-1"),
            ("REGCRED_OUTBOUND_PROXY", "https://dev:canary@proxy.example"),
            ("REGCRED_OUTBOUND_ALLOW", "10.0.0.0/8,http://reg.io"),
            ("REGCRED_VERIFY_TIMEOUT_SECONDS", "0"),
            ("REGCRED_VERIFY_BACKGROUND", "perhaps"),
            ("REGCRED_REQUIRE_BOUND_VALUES", "perhaps"),
            ("REGCRED_PULL_SECRETS_LEASE_SECONDS", "0"),
            ("REGCRED_ISSUER_ALLOW", "https://issuer.example"),
            ("REGCRED_ISSUER_KEYS_SECONDS", "0"),
            ("REGCRED_TOKEN_REVIEW_SECONDS", "61"),
            ("REGCRED_HTTP_REQUESTS_PER_SECOND", "many"),
            ("REGCRED_HTTP_TRUSTED_PROXIES", "*"),
            ("REGCRED_HTTP_PROXY_HEADER", "X-Real-IP"),
            ("REGCRED_HTTP_CORS_ORIGINS", "https://console.example,*"),
            ("REGCRED_HTTP_TLS_CERTIFICATE_FILE", "/nowhere/tls.crt"),
        ])
        .unwrap_err()
        .to_string();
        for name in [
            "REGCRED_HTTP_LISTEN",
            "REGCRED_HTTP_WORKERS",
            "REGCRED_OPERATIONS_LISTEN",
            "REGCRED_DATABASE_URL",
            "REGCRED_MASTER_KEYS",
            "REGCRED_API_KEY_PEPPER_FILE",
            "REGCRED_API_KEY_MAX_LIFETIME_DAYS",
            "REGCRED_CLUSTER_TIMEOUT_SECONDS",
            "REGCRED_OUTBOUND_PROXY",
            "REGCRED_OUTBOUND_ALLOW",
            "REGCRED_VERIFY_TIMEOUT_SECONDS",
            "REGCRED_VERIFY_BACKGROUND",
            "REGCRED_REQUIRE_BOUND_VALUES",
            "REGCRED_PULL_SECRETS_LEASE_SECONDS",
            "REGCRED_ISSUER_ALLOW",
            "REGCRED_ISSUER_KEYS_SECONDS",
            "REGCRED_TOKEN_REVIEW_SECONDS",
            "REGCRED_HTTP_REQUESTS_PER_SECOND",
            "REGCRED_HTTP_TRUSTED_PROXIES",
            "REGCRED_HTTP_PROXY_HEADER",
            "REGCRED_HTTP_CORS_ORIGINS",
            "REGCRED_HTTP_TLS_KEY_FILE must be set too",
        ] {
            assert!(refused.contains(name), "{name} is missing in {refused}");
        }
        assert!(!refused.contains("canary"), "{refused}");
    }

    #[test]
    fn missing_file_and_missing_variable_are_named() {
        let refused = serve(&[("REGCRED_MASTER_KEYS_FILE", "/nowhere/keys")]).unwrap_err().to_string();
        assert!(refused.contains("/nowhere/keys"), "{refused}");
        assert!(refused.contains("REGCRED_DATABASE_URL or REGCRED_DATABASE_URL_FILE"), "{refused}");
    }
}
