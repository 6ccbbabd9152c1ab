//! Prometheus metrics. The registry is a value, not a global, so that tests do not share counts.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::{
    clients::cluster::ClusterMetrics,
    crypto::{api_key::KeyChecker, certificate::ServerCertificate},
    service::{
        audit::metrics::AuditMetrics, clusters::CredentialMetrics, coverage::CoverageMetrics, keys::Keys,
        mints::MintMetrics, progress::Streams, reconcile, row_cache::RowCache, tokens,
        verification::VerificationMetrics,
    },
    storage::PgPool,
};

/// Buckets from 0.5 ms, a read, to 16 s, a cluster that hangs.
const SECONDS: [f64; 11] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 8.0, 16.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: String,
}

/// Metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabels, Histogram, fn() -> Histogram>,
    /// Existing series, found without allocating labels.
    routes: RwLock<HashMap<String, RouteSeries>>,
}

/// Series of a route. Requests are counted by method and status.
#[derive(Debug)]
struct RouteSeries {
    durations: Histogram,
    requests: HashMap<(&'static str, u16), Counter>,
}

impl Metrics {
    /// Creates the metrics. Sources are read at each scrape.
    #[must_use]
    pub fn new(sources: Sources) -> Self {
        let mut registry = Registry::with_prefix("regcred");
        let build = [("version", env!("CARGO_PKG_VERSION")), ("role", sources.role)];
        registry.register("build", "Version and role of this process", Info::new(build.to_vec()));
        let requests = Family::default();
        registry.register("http_requests", "Requests by method, route and status code", requests.clone());
        let durations = Family::new_with_constructor((|| Histogram::new(SECONDS)) as fn() -> Histogram);
        registry.register_with_unit(
            "http_request_duration",
            "Duration from request head to response head",
            Unit::Seconds,
            durations.clone(),
        );
        registry.register(
            "cluster_calls",
            "Calls to API servers by cluster, verb and code: the status code, timeout, tls, unreachable or other",
            sources.cluster_calls.calls.clone(),
        );
        registry.register(
            "cluster_watch_restarts",
            "Watches of clusters that were interrupted or failed to start",
            sources.cluster_calls.watch_restarts.clone(),
        );
        registry.register_with_unit(
            "pull_secret_sync_duration",
            "Duration from a change until its target was synced, for targets synced by this process",
            Unit::Seconds,
            sources.pull_secrets.sync_durations.clone(),
        );
        registry.register_with_unit(
            "mint_duration",
            "Duration of mints of logins by this process",
            Unit::Seconds,
            sources.mints.durations.clone(),
        );
        registry.register_collector(Box::new(sources));
        Self { registry, requests, durations, routes: RwLock::default() }
    }

    /// Counts a request. `route` is the pattern of the matched route.
    pub fn count_request(&self, method: &str, route: Option<&str>, status: u16, took: Duration) {
        let (route, kind) = (route.unwrap_or("none"), (known_method(method), status));
        let known = self.routes.read();
        if let Some(series) = known.get(route)
            && let Some(requests) = series.requests.get(&kind)
        {
            series.durations.observe(took.as_secs_f64());
            requests.inc();
            return;
        }
        drop(known);
        let mut known = self.routes.write();
        let series = known.entry(route.to_owned()).or_insert_with(|| RouteSeries {
            durations: self.durations.get_or_create_owned(&RouteLabels { route: route.to_owned() }),
            requests: HashMap::new(),
        });
        series.durations.observe(took.as_secs_f64());
        let requests = series.requests.entry(kind).or_insert_with(|| {
            let (method, status) = kind;
            self.requests.get_or_create_owned(&RequestLabels { method, route: route.to_owned(), status })
        });
        requests.inc();
    }

    /// Encodes all metrics in the OpenMetrics text format.
    ///
    /// # Errors
    ///
    /// [`fmt::Error`] if a metric cannot be encoded.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Maps unknown methods to one label value, so that callers cannot create series.
fn known_method(method: &str) -> &'static str {
    ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other")
}

/// Components whose values are read at each scrape.
#[derive(Debug)]
pub struct Sources {
    /// Parts of the service that the process runs: `all`, `api` or `worker`.
    pub role: &'static str,
    /// Postgres connections.
    pub pool: PgPool,
    /// Cached rows.
    pub row_cache: Arc<RowCache>,
    /// API key verification.
    pub checker: Arc<KeyChecker>,
    /// Master keys and peppers.
    pub keys: Arc<Keys>,
    /// Login verification.
    pub verifications: Arc<VerificationMetrics>,
    /// Minting of logins.
    pub mints: Arc<MintMetrics>,
    /// Audit log.
    pub audit: Arc<AuditMetrics>,
    /// Tokens of identity providers.
    pub tokens: Arc<tokens::TokenMetrics>,
    /// Reconciliation of pull secrets.
    pub pull_secrets: reconcile::ReconcileMetrics,
    /// Calls to clusters.
    pub cluster_calls: ClusterMetrics,
    /// Credentials of clusters.
    pub cluster_credentials: Arc<CredentialMetrics>,
    /// Newest snapshots of the coverage of clusters.
    pub coverage: Arc<CoverageMetrics>,
    /// Event streams.
    pub streams: Arc<Streams>,
    /// TLS certificate of the listener.
    pub certificate: Option<Arc<ServerCertificate>>,
}

impl Collector for Sources {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Output(encoder);
        self.encode_process(&mut out)?;
        self.encode_keys(&mut out)?;
        self.encode_audit(&mut out)?;
        self.encode_tokens(&mut out)?;
        self.encode_pull_secrets(&mut out)?;
        self.encode_verifications(&mut out)?;
        self.encode_cluster_credentials(&mut out)?;
        self.encode_mints(&mut out)?;
        self.encode_coverage(&mut out)
    }
}

impl Sources {
    fn encode_process(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        out.counter("api_key_argon2_runs", "Verifications of API keys with argon2id", self.checker.argon2_runs())?;
        out.gauge("database_connections", "Open connections to Postgres", i64::from(self.pool.sqlx().size()))?;
        let idle = saturating(self.pool.sqlx().num_idle());
        out.gauge("database_connections_idle", "Open connections to Postgres that are idle", idle)?;
        if let Some(certificate) = &self.certificate {
            let help = "Expiry of the TLS certificate of the listener, in seconds since 1970";
            out.gauge_seconds("tls_certificate_not_after", help, certificate.not_after().timestamp())?;
        }
        let help = "1 if rows are cached; 0 if each request reads from Postgres, because changes are not received";
        out.gauge("row_cache_active", help, i64::from(self.row_cache.is_trusted()))?;
        out.gauge("event_streams", "Open event streams", saturating(self.streams.open()))
    }

    /// Encodes nothing until this process has counted.
    fn encode_keys(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let Some(counts) = self.keys.counts() else { return Ok(()) };
        let help = "Sealed values that are not bound to their destination; equal in all processes";
        out.gauge("sealed_values_unbound", help, counts.unbound_values)?;
        let help = "Active API keys whose HMAC is under an older pepper than the first one";
        out.gauge("api_keys_of_older_peppers", help, counts.keys_of_older_peppers)
    }

    fn encode_audit(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let help = "Audit events other than those of changes, by result; the action of a failed event was refused";
        let mut events = out.0.encode_descriptor("audit_events", help, None, MetricType::Counter)?;
        for (result, count) in self.audit.events() {
            ConstCounter::new(count).encode(events.encode_family(&[("result", result)])?)?;
        }
        out.counter("audit_groups", "Groups in which these audit events were written", self.audit.groups())?;
        out.counter("audit_seals", "Audit seals written by this process", self.audit.seals())?;
        let help = "Age of the oldest audit batch without a seal; above 60, changes and reveals are refused";
        out.gauge_seconds("audit_oldest_unsealed", help, self.audit.oldest_unsealed().as_secs_f64())?;
        let help = "Changes of the audit log that no process of regcred made";
        let mut tampering = out.0.encode_descriptor("audit_tampering", help, None, MetricType::Counter)?;
        for (kind, count) in self.audit.tampering() {
            ConstCounter::new(count).encode(tampering.encode_family(&[("kind", kind)])?)?;
        }
        Ok(())
    }

    fn encode_tokens(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let help = "Tokens of identity providers by result";
        let mut tokens = out.0.encode_descriptor("tokens", help, None, MetricType::Counter)?;
        for (result, count) in self.tokens.tokens() {
            ConstCounter::new(count).encode(tokens.encode_family(&[("result", result)])?)?;
        }
        let help = "Fetches of issuer keys by result";
        let mut fetches = out.0.encode_descriptor("issuer_key_fetches", help, None, MetricType::Counter)?;
        for (result, count) in self.tokens.fetches() {
            ConstCounter::new(count).encode(fetches.encode_family(&[("result", result)])?)?;
        }
        Ok(())
    }

    /// Encodes nothing until the worker of this process has counted targets.
    fn encode_pull_secrets(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let Some((survey, unmatched)) = self.pull_secrets.survey() else { return Ok(()) };
        let help = "Targets of all pull secrets by state; equal in all processes with a worker";
        let mut targets = out.0.encode_descriptor("pull_secret_targets", help, None, MetricType::Gauge)?;
        for (state, count) in [
            ("synced", survey.synced),
            ("pending", survey.pending),
            ("failed", survey.failed),
            ("conflict", survey.conflict),
            ("removing", survey.removing),
        ] {
            ConstGauge::new(count).encode(targets.encode_family(&[("state", state)])?)?;
        }
        let help = "Pull secrets with a selector that matches nothing, by what it selects";
        let mut selectors = out.0.encode_descriptor("pull_secrets_unmatched", help, None, MetricType::Gauge)?;
        for (selects, count) in [("accounts", unmatched.accounts), ("namespaces", unmatched.namespaces)] {
            ConstGauge::new(count).encode(selectors.encode_family(&[("selects", selects)])?)?;
        }
        out.gauge("pull_secret_targets_due", "Due targets that no process has claimed", survey.due)?;
        out.gauge("pull_secret_targets_claimed", "Targets that a process has claimed", survey.claimed)?;
        let help = "Age of the oldest change that is not yet synced; 0 if there is none";
        out.gauge_seconds("pull_secret_targets_oldest_pending", help, survey.oldest_pending_seconds)
    }

    fn encode_verifications(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let help = "Verifications of logins by trigger and result";
        let mut checks = out.0.encode_descriptor("verifications", help, None, MetricType::Counter)?;
        for (trigger, result, count) in self.verifications.checks() {
            let labels = [("trigger", trigger), ("result", result)];
            ConstCounter::new(count).encode(checks.encode_family(&labels)?)?;
        }
        let help = "Registry accounts by result of their last verification";
        let mut accounts = out.0.encode_descriptor("registry_accounts_verified", help, None, MetricType::Gauge)?;
        for (result, count) in self.verifications.last_results() {
            ConstGauge::new(count).encode(accounts.encode_family(&[("result", result)])?)?;
        }
        let help = "Registry accounts that expire within the given number of days, or have expired";
        let mut expiring = out.0.encode_descriptor("registry_accounts_expiring", help, None, MetricType::Gauge)?;
        for (days, count) in self.verifications.expiring() {
            let days = days.to_string();
            ConstGauge::new(count).encode(expiring.encode_family(&[("within_days", days.as_str())])?)?;
        }
        Ok(())
    }

    fn encode_cluster_credentials(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let help = "Clusters whose credential ends within the given number of days, or has ended, and is not renewed";
        let mut expiring = out.0.encode_descriptor("cluster_credentials_expiring", help, None, MetricType::Gauge)?;
        for (days, count) in self.cluster_credentials.expiring() {
            let days = days.to_string();
            ConstGauge::new(count).encode(expiring.encode_family(&[("within_days", days.as_str())])?)?;
        }
        let help = "Renewals of tokens of clusters by result";
        let mut renewals = out.0.encode_descriptor("cluster_token_renewals", help, None, MetricType::Counter)?;
        for (result, count) in self.cluster_credentials.renewals() {
            ConstCounter::new(count).encode(renewals.encode_family(&[("result", result)])?)?;
        }
        let help = "Clusters whose last renewal of the token failed";
        out.gauge("cluster_token_renewals_failing", help, self.cluster_credentials.failing())
    }
}

impl Sources {
    /// Encodes nothing until the worker of this process has read snapshots.
    fn encode_coverage(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let clusters = self.coverage.clusters();
        if clusters.is_empty() {
            return Ok(());
        }
        let help = "Workloads by cluster, kind and worst verdict of their images; equal in all processes with a worker";
        let mut workloads = out.0.encode_descriptor("coverage_workloads", help, None, MetricType::Gauge)?;
        for cluster in &clusters {
            for counted in &cluster.verdicts {
                let (kind, verdict) = (counted.kind.as_str(), counted.verdict.as_str());
                let labels = [("cluster", cluster.cluster.as_str()), ("kind", kind), ("verdict", verdict)];
                ConstGauge::new(i64::from(counted.count)).encode(workloads.encode_family(&labels)?)?;
            }
        }
        let help = "Time of the newest snapshot of the coverage of a cluster, in seconds since 1970";
        let mut times =
            out.0.encode_descriptor("coverage_snapshot_timestamp", help, Some(&Unit::Seconds), MetricType::Gauge)?;
        for cluster in &clusters {
            let labels = [("cluster", cluster.cluster.as_str())];
            ConstGauge::new(cluster.taken_at.timestamp()).encode(times.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// Encodes no accounts until the worker of this process has counted them.
    fn encode_mints(&self, out: &mut Output<'_>) -> Result<(), fmt::Error> {
        let help = "Mints of logins by source and result: success, or the reason of a failure";
        let mut mints = out.0.encode_descriptor("mints", help, None, MetricType::Counter)?;
        for (source, result, count) in self.mints.mints() {
            ConstCounter::new(count).encode(mints.encode_family(&[("source", source), ("result", result)])?)?;
        }
        let help = "Largest difference between the clocks of this host and of a provider";
        out.gauge_seconds("mint_clock_offset", help, self.mints.clock_offset_seconds())?;
        let Some(accounts) = self.mints.accounts() else { return Ok(()) };
        let help = "Minted accounts by state; equal in all processes with a worker";
        let mut states = out.0.encode_descriptor("minted_accounts", help, None, MetricType::Gauge)?;
        for (state, count) in accounts {
            ConstGauge::new(count).encode(states.encode_family(&[("state", state)])?)?;
        }
        let Some(seconds) = self.mints.least_validity_seconds() else { return Ok(()) };
        let help = "Shortest validity of a minted login that is left; negative after an expiry";
        out.gauge_seconds("minted_accounts_least_validity", help, seconds)
    }
}

/// Encoder of metrics without labels.
struct Output<'a>(DescriptorEncoder<'a>);

impl Output<'_> {
    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), fmt::Error> {
        ConstCounter::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn gauge<G: EncodeGaugeValue>(&mut self, name: &str, help: &str, value: G) -> Result<(), fmt::Error> {
        ConstGauge::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn gauge_seconds<G: EncodeGaugeValue>(&mut self, name: &str, help: &str, value: G) -> Result<(), fmt::Error> {
        let descriptor = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Gauge)?;
        ConstGauge::new(value).encode(descriptor)
    }
}

fn saturating(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
