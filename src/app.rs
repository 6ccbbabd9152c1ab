//! Composition root: turns configuration into a running process, and runs it until a signal.

mod database;
mod services;
mod tasks;
mod watchers;

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use actix_web::{dev::Server, web::Data};
use tokio_util::sync::CancellationToken;

use self::{
    services::{Foundation, Services, ServicesConfig},
    tasks::Tasks,
    watchers::{report_repeated_warnings, watch_certificate, watch_keys},
};
use crate::{
    config::{HttpConfig, MasterKeysConfig, PullSecretsConfig, ServeConfig, VerifyConfig},
    crypto::{certificate::ServerCertificate, pepper::Peppers, sealer::Sealer},
    domain::{origin::Origins, proxies::Proxies},
    http::{
        RouteSet,
        server::{self, Rate, ServerConfig},
    },
    metrics::Metrics,
    service::{
        ServiceError,
        audit::{AuditError, TransactionalAudit, writer::AuditWriter},
        master_keys,
        progress::Streams,
        reconcile::ReconcileConfig,
    },
    shutdown::Signals,
    storage::PgPool,
    worker::{self, FanoutConfig, WorkerConfig},
};

pub use self::database::{connect, grant, migrate};

/// Reason why the process did not start, or failed.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The configuration is well-formed but does not fit the environment.
    #[error("{0}")]
    Config(String),
    /// A dependency, such as Postgres, is unavailable.
    #[error("{0}")]
    Dependency(String),
    /// Any other failure.
    #[error("{0}")]
    Internal(String),
}

/// Parts of the service that a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// API and worker.
    All,
    /// API without worker.
    Api,
    /// Worker, with the routes for health and metrics.
    Worker,
}

impl Role {
    /// Returns the name that metrics have.
    const fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Api => "api",
            Self::Worker => "worker",
        }
    }
}

/// Listeners of the process.
#[derive(Debug)]
pub struct Listeners {
    /// Listener of the API.
    pub api: TcpListener,
    /// Listener of metrics and health, if it is on.
    pub operations: Option<TcpListener>,
}

/// A process that is ready to run.
pub struct App {
    tasks: Tasks,
    grace: Duration,
    /// Address of the API, with the actual port if port 0 was configured.
    pub address: SocketAddr,
    /// The same of the operations listener.
    pub operations_address: Option<SocketAddr>,
}

impl App {
    /// Builds all parts of the process and starts them on bound listeners.
    ///
    /// # Errors
    ///
    /// [`AppError::Dependency`] if Postgres does not answer in time, [`AppError::Config`] if its
    /// schema is behind or the master keys do not open the stored values.
    pub async fn build(config: ServeConfig, listeners: Listeners, role: Role) -> Result<Self, AppError> {
        let ServeConfig {
            mut http,
            database,
            master_keys,
            peppers,
            clusters,
            verify,
            pull_secrets,
            identity,
            mint,
            api_key_lifetime_max,
            ..
        } = config;
        let Listeners { api, operations } = listeners;
        let address = api.local_addr().map_err(listener_failed)?;
        let operations_address = operations.as_ref().map(TcpListener::local_addr).transpose();
        let operations_address = operations_address.map_err(listener_failed)?;
        let peppers = Arc::new(peppers);
        let grace = http.shutdown_grace;
        let (reconcile, worker) = (reconcile_config(&pull_secrets), worker_config(&verify, &pull_secrets));
        let certificate = http.certificate.take().map(Arc::new);
        let tasks = Tasks::new();

        let pool = database::open(&database).await?;
        let sealer = Arc::new(open_master_keys(&pool, master_keys).await?);
        let (audit, audit_writer) = open_audit_log(&pool, &peppers, &tasks).await?;
        let foundation = Foundation { pool, sealer, peppers, audit, audit_writer };
        let services = ServicesConfig { clusters, verify, reconcile, identity, mint, api_key_lifetime_max };
        let services = Services::build(foundation, services)?;
        let metrics = Data::new(services.metrics(role.as_str(), certificate.clone()));
        let operations = operations.map(|listener| build_operations_server(listener, grace, &metrics, &services));
        let server = build_server(api, http, role, certificate.clone(), metrics, &services)?;

        let row_cache = services.row_cache.clone();
        tasks.spawn_background("API key reader", async move { row_cache.read_keys().await });
        let row_cache = services.row_cache.clone();
        tasks.spawn_background("change follower", async move { Box::pin(row_cache.follow_changes()).await });
        let streams = services.streams.clone().into_inner();
        tasks.spawn_background("progress listener", async move { streams.follow().await });
        let event_feed = services.event_feed.clone().into_inner();
        tasks.spawn_background("event feed", async move { event_feed.follow().await });
        let idempotency_keys = services.idempotency_keys.clone().into_inner();
        tasks.spawn_background("idempotency key pruner", async move { idempotency_keys.prune().await });
        let keys = services.keys.clone();
        tasks.spawn_background("repeated warnings", report_repeated_warnings());
        tasks.spawn_background("key watcher", watch_keys(keys));
        tasks.spawn_background("certificate watcher", watch_certificate(certificate));
        if role != Role::Api {
            tasks.spawn_work("worker", worker::run(services.for_worker(), worker, tasks.draining()));
        }
        if let Some(server) = operations.transpose()? {
            tasks.spawn_work("operations server", serve(server, None, tasks.draining()));
        }
        tasks.spawn_work("HTTP server", serve(server, Some(services.streams.into_inner()), tasks.draining()));
        Ok(Self { tasks, grace, address, operations_address })
    }

    /// Runs until a signal, then drains: new connections are refused, requests in flight finish.
    /// A second signal aborts.
    ///
    /// # Errors
    ///
    /// [`AppError::Internal`] if a task ends without a signal.
    pub async fn run(mut self, mut signals: Signals) -> Result<(), AppError> {
        tokio::select! {
            name = self.tasks.ended_early() => {
                return Err(AppError::Internal(format!("the {name} ended unexpectedly: see the log for the cause")));
            }
            signal = signals.next() => {
                tracing::info!(signal, grace_seconds = self.grace.as_secs(), "shutdown started");
            }
        }
        tokio::select! {
            () = self.tasks.drain() => tracing::info!("shutdown finished"),
            signal = signals.next() => tracing::warn!(signal, "shutdown aborted by second signal"),
        }
        Ok(())
    }
}

/// Opens the key ring and tries each key in use on a stored value.
async fn open_master_keys(pool: &PgPool, config: MasterKeysConfig) -> Result<Sealer, AppError> {
    let sealer = Sealer::new(config.ring, config.file);
    let started = master_keys::start(pool, &sealer, config.requires_bound).await;
    started.map_err(|error| match error {
        ServiceError::Storage(error) => AppError::Dependency(format!(
            "Postgres stopped answering during startup: {error}. Check that it is running"
        )),
        error => AppError::Config(format!("REGCRED_MASTER_KEYS do not open stored values: {error}")),
    })?;
    Ok(sealer)
}

/// Opens the audit log and starts its writer.
async fn open_audit_log(
    pool: &PgPool,
    peppers: &Arc<Peppers>,
    tasks: &Tasks,
) -> Result<(TransactionalAudit, AuditWriter), AppError> {
    let audit = TransactionalAudit::open(pool, peppers.clone());
    let (writer, run) = AuditWriter::start(&audit, tasks.finishing()).await.map_err(audit_unavailable)?;
    // The task outlives the requests: the last ones still record refusals. It also seals.
    tasks.spawn_support("audit writer", run);
    Ok((audit, writer))
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function in `map_err`")]
fn audit_unavailable(error: AuditError) -> AppError {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    AppError::Dependency(format!(
        "the audit log is not writable: {error}{cause}. If the service has its own role, run `regcred migrate --grant-to \
         ROLE`"
    ))
}

fn reconcile_config(config: &PullSecretsConfig) -> ReconcileConfig {
    ReconcileConfig { lease: config.lease, recheck_interval: config.resync, resync_interval: config.compare }
}

fn worker_config(verify: &VerifyConfig, pull_secrets: &PullSecretsConfig) -> WorkerConfig {
    WorkerConfig {
        verifies: verify.background,
        poll: verify.poll,
        check_timeout: verify.registries.timeout,
        fanout: FanoutConfig { poll: pull_secrets.poll, concurrency: pull_secrets.concurrency },
    }
}

/// Builds the HTTP server; it accepts connections once it is polled.
fn build_server(
    listener: TcpListener,
    config: HttpConfig,
    role: Role,
    certificate: Option<Arc<ServerCertificate>>,
    metrics: Data<Metrics>,
    services: &Services,
) -> Result<Server, AppError> {
    let tls = certificate.map(ServerCertificate::server_config).transpose();
    let tls = tls.map_err(|error| AppError::Internal(format!("TLS cannot be configured: {error}")))?;
    let config = ServerConfig {
        routes: if role == Role::Worker { RouteSet::Health } else { RouteSet::Api },
        workers: config.workers,
        grace: config.shutdown_grace,
        requests: Duration::from_secs(1)
            .checked_div(config.requests_per_second)
            .map(|interval| Rate { burst: config.request_burst, interval }),
        proxies: config.proxies,
        origins: config.origins,
        tls,
    };
    let services = services.clone();
    server::start(listener, metrics, move |app| services.register(app), config).map_err(listener_failed)
}

/// Builds the server for metrics and health. It has its own thread, and speaks plain HTTP.
fn build_operations_server(
    listener: TcpListener,
    grace: Duration,
    metrics: &Data<Metrics>,
    services: &Services,
) -> Result<Server, AppError> {
    let config = ServerConfig {
        routes: RouteSet::Operations,
        workers: 1,
        grace,
        requests: None,
        proxies: Proxies::default(),
        origins: Origins::default(),
        tls: None,
    };
    let services = services.clone();
    server::start(listener, metrics.clone(), move |app| services.register(app), config).map_err(listener_failed)
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function in `map_err`")]
fn listener_failed(error: std::io::Error) -> AppError {
    AppError::Internal(format!("the listener failed: {error}"))
}

/// Runs the server until `draining`, then until requests in flight have finished.
async fn serve(mut server: Server, streams: Option<Arc<Streams>>, draining: CancellationToken) {
    let handle = server.handle();
    let ended = tokio::select! {
        ended = &mut server => ended,
        () = draining.cancelled() => {
            if let Some(streams) = streams {
                streams.stop();
            }
            tokio::join!(handle.stop(true), server).1
        }
    };
    if let Err(error) = ended {
        tracing::error!(%error, "http server failed");
    }
}
