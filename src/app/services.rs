//! All services of the process: built once, registered with the HTTP server here.
//!
//! A new service needs a field, a line in [`Services::build`] and a line in
//! [`Services::register`].

use std::sync::Arc;

use actix_web::web::{Data, ServiceConfig};
use chrono::TimeDelta;
use tokio::runtime::Handle;

use super::AppError;
use crate::{
    clients::{
        cluster::{ClusterClientConfig, ClusterMetrics},
        mint::MintClient,
        oidc::IssuerClient,
        outbound::Guard,
        registry::RegistryClient,
    },
    config::{IdentityConfig, MintConfig, VerifyConfig},
    crypto::{
        api_key::KeyChecker, certificate::ServerCertificate, cursor::CursorKey, login::LoginAttempts, pepper::Peppers,
        sealer::Sealer, session::SessionTokens,
    },
    metrics::{Metrics, Sources},
    service::{
        accounts::Accounts,
        api_keys::{ApiKeyAuthenticator, ApiKeys},
        audit::{AuditEvents, TransactionalAudit, writer::AuditWriter},
        clusters::Clusters,
        coverage::Coverages,
        diagnosis::{Diagnoses, Remedies},
        docker_configs::DockerConfigs,
        health::Health,
        idempotency::IdempotencyKeys,
        identity_providers::IdentityProviders,
        imports::Imports,
        keys::Keys,
        logins::Logins,
        mints::Mints,
        progress::Streams,
        pull_secrets::PullSecrets,
        reconcile::{ReconcileConfig, Reconciler},
        resource_events::EventFeed,
        row_cache::RowCache,
        secrets::Secrets,
        sessions::Sessions,
        summary::Summaries,
        tokens::TokenAuthenticator,
        verification::Verifications,
    },
    storage::PgPool,
    worker,
};

/// What the services share.
pub struct Foundation {
    pub pool: PgPool,
    pub sealer: Arc<Sealer>,
    pub peppers: Arc<Peppers>,
    pub audit: TransactionalAudit,
    pub audit_writer: AuditWriter,
}

/// Configuration of the services.
pub struct ServicesConfig {
    pub clusters: ClusterClientConfig,
    pub verify: VerifyConfig,
    pub reconcile: ReconcileConfig,
    pub identity: IdentityConfig,
    pub mint: MintConfig,
    pub api_key_lifetime_max: Option<TimeDelta>,
}

/// The services, as handlers extract them.
#[derive(Clone)]
pub struct Services {
    api_key_authenticator: Data<ApiKeyAuthenticator>,
    token_authenticator: Data<TokenAuthenticator>,
    sessions: Data<Sessions>,
    logins: Data<Logins>,
    api_keys: Data<ApiKeys>,
    pub idempotency_keys: Data<IdempotencyKeys>,
    identity_providers: Data<IdentityProviders>,
    accounts: Data<Accounts>,
    mints: Mints,
    verifications: Data<Verifications>,
    imports: Data<Imports>,
    docker_configs: Data<DockerConfigs>,
    clusters: Data<Clusters>,
    secrets: Data<Secrets>,
    diagnoses: Data<Diagnoses>,
    remedies: Data<Remedies>,
    coverages: Data<Coverages>,
    pull_secrets: Data<PullSecrets>,
    summary: Data<Summaries>,
    cursor_key: Data<CursorKey>,
    reconciler: Data<Reconciler>,
    audit_events: Data<AuditEvents>,
    audit_writer: Data<AuditWriter>,
    health: Data<Health>,
    pool: PgPool,
    pub streams: Data<Streams>,
    pub event_feed: Data<EventFeed>,
    pub row_cache: Arc<RowCache>,
    checker: Arc<KeyChecker>,
    cluster_calls: ClusterMetrics,
    pub keys: Arc<Keys>,
}

impl Foundation {
    /// Builds the services that verify and mint the logins of accounts, and the one for accounts.
    fn accounts(
        &self,
        row_cache: &Arc<RowCache>,
        clusters: &Clusters,
        registries: &Arc<RegistryClient>,
        mint: MintConfig,
    ) -> (Verifications, Mints, Accounts) {
        let Self { pool, sealer, audit, audit_writer, .. } = self;
        let verifications = Verifications::new(pool.clone(), sealer.clone(), registries.clone(), audit_writer.clone());
        let providers = MintClient::new(|| Guard::new(mint.allowed.clone()), mint.client);
        let mints =
            Mints::new(pool.clone(), row_cache.clone(), sealer.clone(), audit.clone(), clusters.clone(), providers);
        let accounts = Accounts::new(
            pool.clone(),
            row_cache.clone(),
            sealer.clone(),
            audit.clone(),
            verifications.clone(),
            mints.clone(),
        );
        (verifications, mints, accounts)
    }

    /// Builds the services for identity providers, for sessions, and for signing in.
    fn people(
        &self,
        row_cache: &Arc<RowCache>,
        clusters: &Clusters,
        tokens: &TokenAuthenticator,
    ) -> (IdentityProviders, Sessions, Logins) {
        let Self { pool, sealer, peppers, audit, .. } = self;
        let providers = IdentityProviders::new(pool.clone(), clusters.clone(), sealer.clone(), audit.clone());
        let session_tokens = SessionTokens::new(peppers.clone());
        let sessions = Sessions::new(pool.clone(), row_cache.clone(), session_tokens, audit.clone());
        let attempts = LoginAttempts::new(peppers.clone());
        let logins = Logins::new(pool.clone(), sealer.clone(), attempts, tokens.clone(), sessions.clone());
        (providers, sessions, logins)
    }
}

impl Services {
    pub fn build(foundation: Foundation, config: ServicesConfig) -> Result<Self, AppError> {
        let ServicesConfig { clusters, verify, reconcile, identity, mint, api_key_lifetime_max } = config;
        let cluster_calls = clusters.metrics.clone();
        let row_cache = Arc::new(RowCache::new(foundation.pool.clone()));
        let clusters = ClusterClientConfig { runtime: Some(Handle::current()), ..clusters };
        let clusters =
            Clusters::new(foundation.pool.clone(), foundation.sealer.clone(), clusters, foundation.audit.clone());
        let registries = Arc::new(RegistryClient::new(Guard::new(verify.allowed), verify.registries));
        let (verifications, mints, accounts) = foundation.accounts(&row_cache, &clusters, &registries, mint);
        let token_authenticator = token_authenticator(foundation.pool.clone(), clusters.clone(), identity)?;
        let (identity_providers, sessions, logins) = foundation.people(&row_cache, &clusters, &token_authenticator);
        let Foundation { pool, sealer, peppers, audit, audit_writer } = foundation;
        let keys = Arc::new(Keys::new(pool.clone(), sealer.clone(), peppers.clone()));
        let idempotency_keys = IdempotencyKeys::new(pool.clone(), peppers.clone());
        let checker = Arc::new(KeyChecker::new(peppers.clone(), argon2_permits()));
        let authenticator = ApiKeyAuthenticator::new(pool.clone(), row_cache.clone(), checker.clone());
        let docker_configs = DockerConfigs::new(pool.clone(), row_cache.clone(), sealer.clone(), audit_writer.clone());
        let pull_secrets = PullSecrets::new(pool.clone(), audit.clone());
        let streams = Data::new(Streams::new(pool.clone(), pull_secrets.clone()));
        let cursor_key = Data::new(CursorKey::of(peppers.clone()));
        let reconciler =
            Reconciler::new(pool.clone(), clusters.clone(), docker_configs.clone(), peppers, audit.clone(), reconcile);
        let secrets = Secrets::new(pool.clone(), clusters.clone(), docker_configs.clone(), audit_writer.clone());
        let (diagnoses, coverages) = doctors((&pool, &clusters, &docker_configs), registries, (&audit, &audit_writer))?;
        let api_keys =
            ApiKeys::new(pool.clone(), row_cache.clone(), checker.clone(), audit.clone(), api_key_lifetime_max);
        Ok(Self {
            api_key_authenticator: Data::new(authenticator),
            token_authenticator: Data::new(token_authenticator),
            sessions: Data::new(sessions),
            logins: Data::new(logins),
            api_keys: Data::new(api_keys),
            idempotency_keys: Data::new(idempotency_keys),
            identity_providers: Data::new(identity_providers),
            summary: Data::new(Summaries::new(pool.clone(), audit.metrics())),
            imports: Data::new(Imports::new(pool.clone(), sealer, audit, accounts.clone())),
            remedies: Data::new(Remedies::new(secrets.clone(), pull_secrets.clone())),
            secrets: Data::new(secrets),
            diagnoses: Data::new(diagnoses),
            coverages: Data::new(coverages),
            audit_events: Data::new(AuditEvents::new(pool.clone(), audit_writer.clone())),
            accounts: Data::new(accounts),
            mints,
            verifications: Data::new(verifications),
            docker_configs: Data::new(docker_configs),
            clusters: Data::new(clusters),
            pull_secrets: Data::new(pull_secrets),
            reconciler: Data::new(reconciler),
            audit_writer: Data::new(audit_writer),
            health: Data::new(Health::new(&pool, row_cache.clone())),
            event_feed: Data::new(EventFeed::new(pool.clone())),
            pool,
            streams,
            cursor_key,
            row_cache,
            checker,
            cluster_calls,
            keys,
        })
    }

    /// Makes the services available to handlers.
    pub fn register(&self, config: &mut ServiceConfig) {
        config
            .app_data(self.api_key_authenticator.clone())
            .app_data(self.token_authenticator.clone())
            .app_data(self.sessions.clone())
            .app_data(self.logins.clone())
            .app_data(self.api_keys.clone())
            .app_data(self.idempotency_keys.clone())
            .app_data(self.identity_providers.clone())
            .app_data(self.accounts.clone())
            .app_data(self.verifications.clone())
            .app_data(self.imports.clone())
            .app_data(self.docker_configs.clone())
            .app_data(self.clusters.clone())
            .app_data(self.secrets.clone())
            .app_data(self.diagnoses.clone())
            .app_data(self.remedies.clone())
            .app_data(self.coverages.clone())
            .app_data(self.pull_secrets.clone())
            .app_data(self.summary.clone())
            .app_data(self.cursor_key.clone())
            .app_data(self.streams.clone())
            .app_data(self.event_feed.clone())
            .app_data(self.reconciler.clone())
            .app_data(self.audit_events.clone())
            .app_data(self.audit_writer.clone())
            .app_data(self.health.clone());
    }

    /// Creates the metrics of all services and of the listener's certificate.
    pub fn metrics(&self, role: &'static str, certificate: Option<Arc<ServerCertificate>>) -> Metrics {
        Metrics::new(Sources {
            role,
            pool: self.pool.clone(),
            row_cache: self.row_cache.clone(),
            checker: self.checker.clone(),
            keys: self.keys.clone(),
            verifications: self.verifications.metrics(),
            mints: self.mints.metrics(),
            audit: self.audit_writer.metrics(),
            tokens: self.token_authenticator.metrics(),
            pull_secrets: self.reconciler.metrics(),
            cluster_calls: self.cluster_calls.clone(),
            cluster_credentials: self.clusters.credential_metrics(),
            coverage: self.coverages.metrics(),
            streams: self.streams.clone().into_inner(),
            certificate,
        })
    }

    /// Returns the services that the worker uses.
    pub fn for_worker(&self) -> worker::Services {
        worker::Services {
            verifications: self.verifications.get_ref().clone(),
            mints: self.mints.clone(),
            reconciler: self.reconciler.get_ref().clone(),
            clusters: self.clusters.get_ref().clone(),
            coverages: self.coverages.get_ref().clone(),
        }
    }
}

/// Builds the services that examine image pulls.
fn doctors(
    (pool, clusters, docker_configs): (&PgPool, &Clusters, &DockerConfigs),
    registries: Arc<RegistryClient>,
    (audit, audit_writer): (&TransactionalAudit, &AuditWriter),
) -> Result<(Diagnoses, Coverages), AppError> {
    let (pool, clusters, docker_configs) = (pool.clone(), clusters.clone(), docker_configs.clone());
    let diagnoses = Diagnoses::new(
        pool.clone(),
        clusters.clone(),
        docker_configs.clone(),
        registries.clone(),
        audit_writer.clone(),
    );
    let audits = (audit.clone(), audit_writer.clone());
    let coverages = Coverages::new(pool, clusters, docker_configs, registries, audits);
    Ok((diagnoses, coverages.map_err(|error| AppError::Internal(error.to_string()))?))
}

fn token_authenticator(
    pool: PgPool,
    clusters: Clusters,
    mut identity: IdentityConfig,
) -> Result<TokenAuthenticator, AppError> {
    identity.issuers.runtime = Some(Handle::current());
    let issuers = Arc::new(IssuerClient::new(Guard::new(identity.allowed), identity.issuers));
    TokenAuthenticator::new(pool, issuers, clusters, identity.review_cache_ttl)
        .map_err(|error| AppError::Internal(error.to_string()))
}

/// Half of the cores, so that verifying new keys never starves requests with known ones.
fn argon2_permits() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() / 2)
}
