//! The composition root: configuration becomes pool, services and server, and they run until they are told to stop.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use actix_web::{dev::Server, web::Data};
use chrono::{TimeDelta, Utc};
use sqlx::PgPool;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    clients::{guard::Guard, oidc::Issuers, registry::Registries},
    config::{DatabaseConfig, HttpConfig, MasterKeysConfig, ServeConfig},
    crypto::{
        api_key::{KeyChecker, Pepper},
        audit::AuditKey,
        certificate::ServerCertificate,
        sealer::Sealer,
    },
    http::{self, Serves, State, server::Rate},
    metrics::{Metrics, Sources},
    service::{
        ServiceError,
        accounts::Accounts,
        api_keys::{ApiKeyAuthenticator, ApiKeys},
        audit::{AuditError, AuditEvents, TransactionalAudit, writer::AuditWriter},
        clusters::Clusters,
        docker_configs::DockerConfigs,
        health,
        identity_providers::IdentityProviders,
        imports::Imports,
        master_keys,
        progress::Streams,
        pull_secrets::PullSecrets,
        reconcile::{self, Reconciler},
        row_cache::RowCache,
        secrets::Secrets,
        tokens::TokenAuthenticator,
        verification::Verifications,
    },
    shutdown::Signals,
    storage::{pool, schema},
    worker::{self, FanoutConfig},
};

/// How often the master key ring is looked at again, so that every replica seals under a new key soon.
const RING_INTERVAL: Duration = Duration::from_secs(5);
/// How often the files of the listener's certificate are looked at again.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(5);
/// How long before its end a certificate is warned of, and how often.
const CERTIFICATE_WARNING: TimeDelta = TimeDelta::days(7);
const CERTIFICATE_WARNING_INTERVAL: Duration = Duration::from_hours(12);
/// How long to wait between two tries to reach Postgres at the start.
const START_INTERVAL: Duration = Duration::from_secs(1);

/// Why the service did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The configuration is of the right form, and yet nothing can be done with it.
    #[error("{0}")]
    Config(String),
    /// Something that the service needs is not there.
    #[error("{0}")]
    Dependency(String),
    /// Anything else.
    #[error("{0}")]
    Internal(String),
}

/// A service that is ready to run.
pub struct App {
    server: Server,
    sealer: Arc<Sealer>,
    row_cache: Arc<RowCache>,
    certificate: Option<Arc<ServerCertificate>>,
    services: worker::Services,
    worker: worker::WorkerConfig,
    works: bool,
    audit_writer: JoinHandle<()>,
    stop_audit_writer: CancellationToken,
    streams: Arc<Streams>,
    grace: Duration,
    /// Where it listens, also where port 0 was asked for.
    pub address: SocketAddr,
}

impl App {
    /// Puts the service together on a listener that is bound already. Postgres must be there and its schema up
    /// to date; with `migrate` it is brought up to date first.
    ///
    /// # Errors
    ///
    /// [`AppError::Dependency`] if Postgres does not answer in time, [`AppError::Config`] if its schema is behind
    /// or the master keys are not the ones that sealed what is stored.
    pub async fn build(config: ServeConfig, listener: TcpListener, migrate: bool) -> Result<Self, AppError> {
        Self::put_together(config, listener, migrate, Serves::Everything).await
    }

    /// Puts a worker together: it does what [`App::without_worker`] leaves, and serves health and metrics alone.
    ///
    /// # Errors
    ///
    /// As [`App::build`].
    pub async fn build_worker(config: ServeConfig, listener: TcpListener) -> Result<Self, AppError> {
        Self::put_together(config, listener, false, Serves::Operation).await
    }

    async fn put_together(
        mut config: ServeConfig,
        listener: TcpListener,
        migrate: bool,
        routes: Serves,
    ) -> Result<Self, AppError> {
        let pool = open_database(&config.database, migrate).await?;
        let sealer = Arc::new(open_ring(&pool, config.master_keys).await?);
        let audit_key = Arc::new(AuditKey::of(&config.pepper));
        let audit = TransactionalAudit::open(&pool, audit_key);
        let stop_audit_writer = CancellationToken::new();
        let audit_writer = AuditWriter::start(&audit, stop_audit_writer.clone()).await;
        let (audit_writer, audit_writer_task) = audit_writer.map_err(audit_unavailable)?;
        let content_key = config.pepper.content_key();
        let checker = Arc::new(key_checker(config.pepper));
        let mut settings = config.clusters;
        settings.runtime = Some(tokio::runtime::Handle::current());
        let cluster_calls = settings.calls.clone();
        let row_cache = Arc::new(RowCache::new(pool.clone()));
        let docker_configs =
            DockerConfigs::new(pool.clone(), Arc::clone(&row_cache), Arc::clone(&sealer), audit_writer.clone());
        let clusters = Clusters::new(pool.clone(), Arc::clone(&sealer), settings, audit.clone());
        let accounts = Accounts::new(pool.clone(), Arc::clone(&row_cache), Arc::clone(&sealer), audit.clone());
        let (verify, pull_secrets) = (config.verify, config.pull_secrets);
        let worker = worker::WorkerConfig {
            verifies: verify.background,
            poll: verify.poll,
            check_timeout: verify.registries.timeout,
            fanout: FanoutConfig { poll: pull_secrets.poll, concurrency: pull_secrets.concurrency },
        };
        let reconciler = Reconciler::new(
            pool.clone(),
            clusters.clone(),
            docker_configs.clone(),
            content_key,
            audit.clone(),
            reconcile::ReconcileConfig {
                lease: pull_secrets.lease,
                resync: pull_secrets.resync,
                compare: pull_secrets.compare,
            },
        );
        let registries = Registries::new(Guard::new(verify.allowed), verify.registries);
        let certificate = config.http.certificate.take().map(Arc::new);
        let seal = Arc::clone(&sealer);
        let verifications = Verifications::new(pool.clone(), seal, accounts.clone(), registries, audit_writer.clone());
        let mut identity = config.identity;
        identity.issuers.runtime = Some(tokio::runtime::Handle::current());
        let issuers = Arc::new(Issuers::new(Guard::new(identity.allowed), identity.issuers));
        let token_authenticator =
            TokenAuthenticator::new(pool.clone(), issuers, clusters.clone(), identity.review_remembered)
                .map_err(|error| AppError::Internal(error.to_string()))?;
        let pull_secrets = PullSecrets::new(pool.clone(), audit.clone());
        let streams = Arc::new(Streams::new(pool.clone(), pull_secrets.clone()));
        let metrics = Metrics::new(Sources {
            pool: pool.clone(),
            row_cache: Arc::clone(&row_cache),
            checker: Arc::clone(&checker),
            verifications: verifications.metrics(),
            audit: audit_writer.metrics(),
            tokens: token_authenticator.metrics(),
            pull_secrets: reconciler.metrics(),
            cluster_calls,
            streams: Arc::clone(&streams),
            certificate: certificate.clone(),
        });
        let state = State {
            authenticator: Data::new(ApiKeyAuthenticator::new(Arc::clone(&row_cache), Arc::clone(&checker))),
            token_authenticator: Data::new(token_authenticator),
            identity_providers: Data::new(IdentityProviders::new(pool.clone(), audit.clone())),
            api_keys: Data::new(ApiKeys::new(pool.clone(), Arc::clone(&row_cache), checker, audit.clone())),
            imports: Data::new(Imports::new(pool.clone(), Arc::clone(&row_cache), Arc::clone(&sealer), audit.clone())),
            accounts: Data::new(accounts),
            verifications: Data::new(verifications.clone()),
            pull_secrets: Data::new(pull_secrets),
            streams: Data::from(Arc::clone(&streams)),
            previews: Data::new(reconciler.clone()),
            secrets: Data::new(Secrets::new(clusters.clone(), docker_configs.clone(), audit_writer.clone())),
            docker_configs: Data::new(docker_configs),
            clusters: Data::new(clusters),
            metrics: Data::new(metrics),
            audit_events: Data::new(AuditEvents::new(pool.clone(), audit_writer.clone())),
            audit_writer: Data::new(audit_writer),
            pool: Data::new(pool),
        };
        let internal = |error: std::io::Error| AppError::Internal(format!("the listener cannot be used: {error}"));
        let address = listener.local_addr().map_err(internal)?;
        let grace = config.http.shutdown_grace;
        let server =
            http::server::start(listener, state, edge(config.http, routes, certificate.clone())?).map_err(internal)?;
        Ok(Self {
            server,
            sealer,
            row_cache,
            certificate,
            services: worker::Services { verifications, reconciler },
            worker,
            works: true,
            audit_writer: audit_writer_task,
            stop_audit_writer,
            streams,
            grace,
            address,
        })
    }

    /// Leaves the work in the background to other replicas.
    #[must_use]
    pub fn without_worker(self) -> Self {
        Self { works: false, ..self }
    }

    /// Serves until a signal comes, then stops to accept, lets what is under way end, and ends. A second signal
    /// ends at once.
    ///
    /// # Errors
    ///
    /// [`AppError::Internal`] if the server ends uninvited.
    pub async fn run(self, mut signals: Signals) -> Result<(), AppError> {
        let handle = self.server.handle();
        let mut server = tokio::spawn(self.server);
        let ring = tokio::spawn(watch_ring(self.sealer));
        let row_cache = Arc::clone(&self.row_cache);
        let changes = tokio::spawn(async move { row_cache.follow_changes().await });
        let row_cache = self.row_cache;
        let mut keys = tokio::spawn(async move { row_cache.read_keys().await });
        let certificate = tokio::spawn(watch_certificate(self.certificate));
        let streams = Arc::clone(&self.streams);
        let progress = tokio::spawn(async move { streams.follow().await });
        let stop = CancellationToken::new();
        let (works, stopped) = (self.works, stop.clone());
        let work = Box::pin(worker::run(self.services, self.worker, stop.clone()));
        let mut worker = tokio::spawn(async move { if works { work.await } else { stopped.cancelled().await } });
        let mut audit_writer = self.audit_writer;
        let uninvited = tokio::select! {
            ended = &mut server => Some(format!("the HTTP server ended by itself: {ended:?}")),
            ended = &mut worker => Some(format!("the worker ended by itself: {ended:?}")),
            ended = &mut keys => Some(format!("the reader of API keys ended by itself: {ended:?}")),
            ended = &mut audit_writer => Some(format!("the audit writer ended by itself: {ended:?}")),
            signal = signals.next() => {
                tracing::info!(signal, grace_seconds = self.grace.as_secs(), "stopping: no new connections, draining");
                None
            }
        };
        ring.abort();
        changes.abort();
        certificate.abort();
        progress.abort();
        stop.cancel();
        self.streams.stop();
        if let Some(ended) = uninvited {
            return Err(AppError::Internal(ended));
        }
        // What was refused in the last requests is to be written, too.
        let drained = async {
            let _ = tokio::join!(handle.stop(true), worker);
            self.stop_audit_writer.cancel();
            let _ = audit_writer.await;
        };
        tokio::select! {
            () = drained => tracing::info!("stopped"),
            signal = signals.next() => tracing::warn!(signal, "stopped at once by a second signal"),
        }
        // Not before: requests that were under way may have asked for one.
        keys.abort();
        Ok(())
    }
}

/// The master keys, once they have opened a sample of what is stored.
async fn open_ring(pool: &PgPool, config: MasterKeysConfig) -> Result<Sealer, AppError> {
    let sealer = Sealer::new(config.ring, config.file);
    master_keys::try_ring(pool, &sealer).await.map_err(|error| match error {
        ServiceError::Storage(error) => AppError::Dependency(format!("Postgres stopped to answer: {error}")),
        error => AppError::Config(format!("REGCRED_MASTER_KEYS do not open what is stored: {error}")),
    })?;
    Ok(sealer)
}

/// Checks keys on half of the cores, so that verifying some never starves what is verified already.
fn key_checker(pepper: Pepper) -> KeyChecker {
    let permits = std::thread::available_parallelism().map_or(1, |cores| cores.get() / 2);
    KeyChecker::new(pepper, permits)
}

/// How the server meets its clients.
fn edge(
    config: HttpConfig,
    routes: Serves,
    certificate: Option<Arc<ServerCertificate>>,
) -> Result<http::server::ServerConfig, AppError> {
    let tls = certificate.map(ServerCertificate::server_config).transpose();
    Ok(http::server::ServerConfig {
        serves: routes,
        workers: config.workers,
        grace: config.shutdown_grace,
        requests: Duration::from_secs(1)
            .checked_div(config.requests_per_second)
            .map(|interval| Rate { burst: config.request_burst, interval }),
        proxies: config.proxies,
        origins: config.origins,
        tls: tls.map_err(|error| AppError::Internal(format!("TLS cannot be spoken: {error}")))?,
    })
}

/// Makes a pool and waits until Postgres answers.
///
/// # Errors
///
/// [`AppError::Dependency`] if it does not answer in time.
pub async fn connect(config: &DatabaseConfig) -> Result<PgPool, AppError> {
    let pool = pool::lazy(config.options.clone(), config.max_connections, config.acquire_timeout);
    let deadline = Instant::now() + config.start_timeout;
    loop {
        // Not through the pool: it would wait for its own timeout and hide the cause.
        let error = match pool::probe(&config.options).await {
            Ok(()) => return Ok(pool),
            Err(error) => error,
        };
        let server = format!("{}:{}", config.options.get_host(), config.options.get_port());
        if Instant::now() + START_INTERVAL > deadline {
            return Err(AppError::Dependency(format!(
                "Postgres at {server} did not answer within {} s: {error}. Check REGCRED_DATABASE_URL and that \
                 Postgres runs",
                config.start_timeout.as_secs()
            )));
        }
        tracing::warn!(%server, %error, "Postgres does not answer yet; trying again");
        tokio::time::sleep(START_INTERVAL).await;
    }
}

/// Brings the schema up to date.
///
/// # Errors
///
/// [`AppError::Dependency`] if a migration fails.
pub async fn migrate(pool: &PgPool) -> Result<(), AppError> {
    schema::migrate(pool).await.map_err(|error| AppError::Dependency(format!("the schema cannot be migrated: {error}")))
}

#[expect(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn audit_unavailable(error: AuditError) -> AppError {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    AppError::Dependency(format!(
        "the audit log cannot be written: {error}{cause}. If the service has a role of its own, run \
         `regcred migrate --grant-to ROLE`"
    ))
}

/// Gives a role of the database what a service needs, and no more.
///
/// # Errors
///
/// [`AppError::Config`] if that can be no role, [`AppError::Dependency`] if Postgres refuses.
pub async fn grant(pool: &PgPool, role: &str) -> Result<(), AppError> {
    schema::grant(pool, role).await.map_err(|error| match error {
        schema::GrantError::Role(invalid) => AppError::Config(format!("--grant-to {invalid}")),
        schema::GrantError::Sql(error) => AppError::Dependency(format!("the rights cannot be granted: {error}")),
    })
}

/// The pool of a service, on a database whose schema is up to date, or is brought up to date with `migrate`.
async fn open_database(config: &DatabaseConfig, migrate: bool) -> Result<PgPool, AppError> {
    // A migration may take long. Nothing that a service does may.
    let unbounded = connect(config).await?;
    if migrate {
        self::migrate(&unbounded).await?;
    }
    require_schema(&unbounded).await?;
    unbounded.close().await;
    Ok(pool::lazy(pool::bounded(config.options.clone()), config.max_connections, config.acquire_timeout))
}

async fn require_schema(pool: &PgPool) -> Result<(), AppError> {
    let readiness = health::readiness(pool).await;
    match readiness {
        health::Readiness { database: true, migrations: true } => Ok(()),
        health::Readiness { database: true, migrations: false } => Err(AppError::Config(
            "the database's schema is behind this binary: run `regcred migrate`, or `regcred serve --migrate`"
                .to_owned(),
        )),
        health::Readiness { .. } => Err(AppError::Dependency("Postgres stopped to answer".to_owned())),
    }
}

async fn watch_ring(sealer: Arc<Sealer>) {
    let mut ticks = tokio::time::interval(RING_INTERVAL);
    loop {
        ticks.tick().await;
        if let Err(error) = sealer.reload() {
            tracing::error!(%error, "the master key ring cannot be read; the one in memory stays in use");
        }
    }
}

/// Takes another certificate soon after its files were replaced, and warns before one ends.
async fn watch_certificate(certificate: Option<Arc<ServerCertificate>>) {
    let Some(certificate) = certificate else { return };
    let mut warned: Option<Instant> = None;
    let mut ticks = tokio::time::interval(CERTIFICATE_INTERVAL);
    loop {
        ticks.tick().await;
        match certificate.reload() {
            Ok(true) => {
                tracing::info!(not_after = %certificate.not_after(), "the TLS certificate changed");
                warned = None;
            }
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the TLS certificate cannot be taken; the old one stays in use"),
        }
        let ends_soon = certificate.not_after() - Utc::now() < CERTIFICATE_WARNING;
        if ends_soon && warned.is_none_or(|at| at.elapsed() >= CERTIFICATE_WARNING_INTERVAL) {
            tracing::warn!(not_after = %certificate.not_after(), "the TLS certificate ends soon, or has ended");
            warned = Some(Instant::now());
        }
    }
}
