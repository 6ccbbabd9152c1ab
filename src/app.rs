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
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use self::{
    services::{Foundation, Services, ServicesConfig},
    tasks::Tasks,
    watchers::{watch_certificate, watch_master_keys},
};
use crate::{
    config::{HttpConfig, MasterKeysConfig, PullSecretsConfig, ServeConfig, VerifyConfig},
    crypto::{api_key::Pepper, audit::AuditKey, certificate::ServerCertificate, sealer::Sealer},
    http::{
        RouteSet,
        server::{self, Rate, ServerConfig},
    },
    service::{
        ServiceError,
        audit::{AuditError, TransactionalAudit, writer::AuditWriter},
        master_keys,
        progress::Streams,
        reconcile::ReconcileConfig,
    },
    shutdown::Signals,
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

/// A process that is ready to run.
pub struct App {
    tasks: Tasks,
    grace: Duration,
    /// Address of the listener, with the actual port if port 0 was configured.
    pub address: SocketAddr,
}

impl App {
    /// Builds all parts of the process and starts them on a bound listener.
    ///
    /// # Errors
    ///
    /// [`AppError::Dependency`] if Postgres does not answer in time, [`AppError::Config`] if its
    /// schema is behind or the master keys do not open the stored values.
    pub async fn build(config: ServeConfig, listener: TcpListener, role: Role) -> Result<Self, AppError> {
        let ServeConfig { mut http, database, master_keys, pepper, clusters, verify, pull_secrets, identity } = config;
        let address = listener.local_addr().map_err(listener_failed)?;
        let grace = http.shutdown_grace;
        let (reconcile, worker) = (reconcile_config(&pull_secrets), worker_config(&verify, &pull_secrets));
        let certificate = http.certificate.take().map(Arc::new);
        let tasks = Tasks::new();

        let pool = database::open(&database).await?;
        let sealer = Arc::new(open_master_keys(&pool, master_keys).await?);
        let (audit, audit_writer) = open_audit_log(&pool, &pepper, &tasks).await?;
        let foundation = Foundation { pool, sealer: sealer.clone(), pepper, audit, audit_writer };
        let services = Services::build(foundation, ServicesConfig { clusters, verify, reconcile, identity })?;
        let server = build_server(listener, http, role, certificate.clone(), &services)?;

        let row_cache = services.row_cache.clone();
        tasks.spawn_background("API key reader", async move { row_cache.read_keys().await });
        let row_cache = services.row_cache.clone();
        tasks.spawn_background("change follower", async move { row_cache.follow_changes().await });
        let streams = services.streams.clone().into_inner();
        tasks.spawn_background("progress listener", async move { streams.follow().await });
        tasks.spawn_background("master key watcher", watch_master_keys(sealer));
        tasks.spawn_background("certificate watcher", watch_certificate(certificate));
        if role != Role::Api {
            tasks.spawn_work("worker", worker::run(services.for_worker(), worker, tasks.draining()));
        }
        tasks.spawn_work("HTTP server", serve(server, services.streams.into_inner(), tasks.draining()));
        Ok(Self { tasks, grace, address })
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
    master_keys::verify_ring(pool, &sealer).await.map_err(|error| match error {
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
    pepper: &Pepper,
    tasks: &Tasks,
) -> Result<(TransactionalAudit, AuditWriter), AppError> {
    let audit = TransactionalAudit::open(pool, Arc::new(AuditKey::of(pepper)));
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
    services: &Services,
) -> Result<Server, AppError> {
    let tls = certificate.clone().map(ServerCertificate::server_config).transpose();
    let tls = tls.map_err(|error| AppError::Internal(format!("TLS cannot be configured: {error}")))?;
    let config = ServerConfig {
        routes: if role == Role::Worker { RouteSet::Operational } else { RouteSet::All },
        workers: config.workers,
        grace: config.shutdown_grace,
        requests: Duration::from_secs(1)
            .checked_div(config.requests_per_second)
            .map(|interval| Rate { burst: config.request_burst, interval }),
        proxies: config.proxies,
        origins: config.origins,
        tls,
    };
    let (metrics, services) = (services.metrics(certificate), services.clone());
    server::start(listener, Data::new(metrics), move |app| services.register(app), config).map_err(listener_failed)
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function in `map_err`")]
fn listener_failed(error: std::io::Error) -> AppError {
    AppError::Internal(format!("the listener failed: {error}"))
}

/// Runs the server until `draining`, then until requests in flight have finished.
async fn serve(mut server: Server, streams: Arc<Streams>, draining: CancellationToken) {
    let handle = server.handle();
    let ended = tokio::select! {
        ended = &mut server => ended,
        () = draining.cancelled() => {
            streams.stop();
            tokio::join!(handle.stop(true), server).1
        }
    };
    if let Err(error) = ended {
        tracing::error!(%error, "http server failed");
    }
}
