//! What is counted, in a registry that is a value: nothing global, so that tests do not share counts.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};
use sqlx::PgPool;

use crate::{
    clients::cluster::Calls,
    crypto::{api_key::KeyChecker, certificate::ServerCertificate},
    service::{
        audit::metrics::AuditMetrics, progress::Streams, reconcile, row_cache::RowCache, tokens,
        verification::VerificationMetrics,
    },
};

/// From half a millisecond, as a read takes, to 16 s, as a cluster that hangs does.
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

/// The metrics of one process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabels, Histogram, fn() -> Histogram>,
    /// The series that there are, to be found without making labels.
    routes: RwLock<HashMap<String, RouteSeries>>,
}

/// The series of a route: its requests by method and status.
#[derive(Debug)]
struct RouteSeries {
    durations: Histogram,
    requests: HashMap<(&'static str, u16), Counter>,
}

impl Metrics {
    /// Makes the metrics; the sources are looked at whenever the metrics are.
    #[must_use]
    pub fn new(sources: Sources) -> Self {
        let mut registry = Registry::with_prefix("regcred");
        let requests = Family::default();
        registry.register("http_requests", "Requests by method, route and status", requests.clone());
        let durations = Family::new_with_constructor((|| Histogram::new(SECONDS)) as fn() -> Histogram);
        registry.register_with_unit(
            "http_request_duration",
            "Time from the head of a request to the head of its response",
            Unit::Seconds,
            durations.clone(),
        );
        registry.register(
            "cluster_calls",
            "Calls to API servers by cluster, verb and code: the status, or timeout, tls or unreachable",
            sources.cluster_calls.counts.clone(),
        );
        registry.register(
            "cluster_watch_restarts",
            "Watches of clusters that broke off or could not be begun",
            sources.cluster_calls.watch_restarts.clone(),
        );
        registry.register_with_unit(
            "pull_secret_sync_duration",
            "Time from a change to its being in order, for each target that this process brought in order",
            Unit::Seconds,
            sources.pull_secrets.sync_durations.clone(),
        );
        registry.register_collector(Box::new(sources));
        Self { registry, requests, durations, routes: RwLock::default() }
    }

    /// Counts one request. `route` is the pattern of the route that took it.
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

    /// Writes all metrics in the OpenMetrics text format.
    ///
    /// # Errors
    ///
    /// [`fmt::Error`] if a metric cannot be written.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// A caller may send any word as a method; he does not get a series for it.
fn known_method(method: &str) -> &'static str {
    ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other")
}

/// Who keeps values that are read when somebody asks.
#[derive(Debug)]
pub struct Sources {
    /// Connections to Postgres.
    pub pool: PgPool,
    /// Whether rows are remembered.
    pub row_cache: Arc<RowCache>,
    /// How often argon2 has run.
    pub checker: Arc<KeyChecker>,
    /// What checks of logins found.
    pub verifications: Arc<VerificationMetrics>,
    /// What became of audit events.
    pub audit: Arc<AuditMetrics>,
    /// What became of tokens.
    pub tokens: Arc<tokens::TokenMetrics>,
    /// What the worker does to pull secrets.
    pub pull_secrets: reconcile::ReconcileMetrics,
    /// Calls to clusters.
    pub cluster_calls: Calls,
    /// Streams of events.
    pub streams: Arc<Streams>,
    /// What the listener shows, where it speaks TLS.
    pub certificate: Option<Arc<ServerCertificate>>,
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let runs = ConstCounter::new(self.checker.argon2_runs());
        let help = "Times that an API key had to be verified with argon2id";
        runs.encode(encoder.encode_descriptor("api_key_argon2_runs", help, None, runs.metric_type())?)?;
        let open = ConstGauge::new(i64::from(self.pool.size()));
        let help = "Open connections to Postgres";
        open.encode(encoder.encode_descriptor("database_connections", help, None, open.metric_type())?)?;
        let idle = ConstGauge::new(i64::try_from(self.pool.num_idle()).unwrap_or(i64::MAX));
        let help = "Open connections to Postgres that nobody uses";
        idle.encode(encoder.encode_descriptor("database_connections_idle", help, None, idle.metric_type())?)?;
        if let Some(certificate) = &self.certificate {
            let end = ConstGauge::new(certificate.not_after().timestamp());
            let help = "When the certificate ends that is shown to callers, in seconds since 1970";
            let unit = Some(&Unit::Seconds);
            end.encode(encoder.encode_descriptor("tls_certificate_not_after", help, unit, end.metric_type())?)?;
        }
        let trusted = ConstGauge::new(i64::from(self.row_cache.is_trusted()));
        let help = "1 where changes of rows are heard, so that rows are remembered; 0 where each request asks Postgres";
        trusted.encode(encoder.encode_descriptor("rows_remembered", help, None, trusted.metric_type())?)?;
        let streams = ConstGauge::new(i64::try_from(self.streams.open()).unwrap_or(i64::MAX));
        let help = "Streams of events that are open";
        streams.encode(encoder.encode_descriptor("event_streams", help, None, streams.metric_type())?)?;
        self.encode_audit(&mut encoder)?;
        self.encode_tokens(&mut encoder)?;
        self.encode_pull_secrets(&mut encoder)?;
        self.encode_verifications(&mut encoder)
    }
}

impl Sources {
    fn encode_audit(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Audit events outside of changes by result; the action of a failed one was refused";
        let mut events = encoder.encode_descriptor("audit_events", help, None, MetricType::Counter)?;
        for (result, count) in self.audit.events() {
            ConstCounter::new(count).encode(events.encode_family(&[("result", result)])?)?;
        }
        let groups = ConstCounter::new(self.audit.groups());
        let help = "Groups in which these audit events were written";
        groups.encode(encoder.encode_descriptor("audit_groups", help, None, groups.metric_type())?)?;
        let seals = ConstCounter::new(self.audit.seals());
        let help = "Audit seals made by this process";
        seals.encode(encoder.encode_descriptor("audit_seals", help, None, seals.metric_type())?)?;
        let oldest = ConstGauge::new(self.audit.oldest_unsealed().as_secs_f64());
        let help = "Age of the oldest audit batch without a seal; over 60 changes and reveals are refused";
        let unit = Some(&Unit::Seconds);
        oldest.encode(encoder.encode_descriptor("audit_oldest_unsealed", help, unit, oldest.metric_type())?)?;
        let help = "Changes of the audit log that no process made";
        let mut tampering = encoder.encode_descriptor("audit_tampering", help, None, MetricType::Counter)?;
        for (kind, count) in self.audit.tampering() {
            ConstCounter::new(count).encode(tampering.encode_family(&[("kind", kind)])?)?;
        }
        Ok(())
    }

    fn encode_tokens(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Tokens of identity providers by what became of them";
        let mut tokens = encoder.encode_descriptor("tokens", help, None, MetricType::Counter)?;
        for (result, count) in self.tokens.tokens() {
            ConstCounter::new(count).encode(tokens.encode_family(&[("result", result)])?)?;
        }
        let help = "Fetches of issuers' keys by what they came to";
        let mut fetches = encoder.encode_descriptor("issuer_key_fetches", help, None, MetricType::Counter)?;
        for (result, count) in self.tokens.fetches() {
            ConstCounter::new(count).encode(fetches.encode_family(&[("result", result)])?)?;
        }
        Ok(())
    }

    /// Of a process whose worker has not looked yet, or never does, nothing is said.
    fn encode_pull_secrets(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(survey) = self.pull_secrets.survey() else { return Ok(()) };
        let help = "Targets of all pull secrets by state, the same in every process with a worker";
        let mut targets = encoder.encode_descriptor("pull_secret_targets", help, None, MetricType::Gauge)?;
        for (state, count) in [
            ("synced", survey.synced),
            ("pending", survey.pending),
            ("failed", survey.failed),
            ("conflict", survey.conflict),
            ("removing", survey.removing),
        ] {
            ConstGauge::new(count).encode(targets.encode_family(&[("state", state)])?)?;
        }
        let due = ConstGauge::new(survey.due);
        let help = "Targets that are due and that no process works on";
        due.encode(encoder.encode_descriptor("pull_secret_targets_due", help, None, due.metric_type())?)?;
        let claimed = ConstGauge::new(survey.claimed);
        let help = "Targets that a process works on";
        claimed.encode(encoder.encode_descriptor(
            "pull_secret_targets_claimed",
            help,
            None,
            claimed.metric_type(),
        )?)?;
        let oldest = ConstGauge::new(survey.oldest_pending_seconds);
        let help = "How long the target has waited that waits longest to be in order, 0 where none waits";
        let unit = Some(&Unit::Seconds);
        oldest.encode(encoder.encode_descriptor(
            "pull_secret_targets_oldest_pending",
            help,
            unit,
            oldest.metric_type(),
        )?)
    }

    fn encode_verifications(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (counters, gauges) = (MetricType::Counter, MetricType::Gauge);
        let help = "Checks of logins by who wanted them and what they found";
        let mut checks = encoder.encode_descriptor("verifications", help, None, counters)?;
        for (trigger, result, count) in self.verifications.checks() {
            let labels = [("trigger", trigger), ("result", result)];
            ConstCounter::new(count).encode(checks.encode_family(&labels)?)?;
        }
        let help = "Registry accounts by what the last check of their login found";
        let mut accounts = encoder.encode_descriptor("registry_accounts_verified", help, None, gauges)?;
        for (result, count) in self.verifications.last_results() {
            ConstGauge::new(count).encode(accounts.encode_family(&[("result", result)])?)?;
        }
        let help = "Registry accounts whose expiresAt is at most so many days away, or past";
        let mut expiring = encoder.encode_descriptor("registry_accounts_expiring", help, None, gauges)?;
        for (days, count) in self.verifications.expiring() {
            let days = days.to_string();
            ConstGauge::new(count).encode(expiring.encode_family(&[("within_days", days.as_str())])?)?;
        }
        Ok(())
    }
}
