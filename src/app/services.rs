//! All services of the process: built once, registered with the HTTP server here.
//!
//! A new service needs a field, a line in [`Services::build`] and a line in
//! [`Services::register`].

use std::sync::Arc;

use actix_web::web::{Data, ServiceConfig};
use sqlx::PgPool;
use tokio::runtime::Handle;

use super::AppError;
use crate::{
    clients::{
        cluster::{ClusterClientConfig, ClusterMetrics},
        oidc::IssuerClient,
        outbound::Guard,
        registry::RegistryClient,
    },
    config::{IdentityConfig, VerifyConfig},
    crypto::{
        api_key::{KeyChecker, Pepper},
        certificate::ServerCertificate,
        sealer::Sealer,
    },
    metrics::{Metrics, Sources},
    service::{
        accounts::Accounts,
        api_keys::{ApiKeyAuthenticator, ApiKeys},
        audit::{AuditEvents, TransactionalAudit, writer::AuditWriter},
        clusters::Clusters,
        docker_configs::DockerConfigs,
        identity_providers::IdentityProviders,
        imports::Imports,
        progress::Streams,
        pull_secrets::PullSecrets,
        reconcile::{ReconcileConfig, Reconciler},
        row_cache::RowCache,
        secrets::Secrets,
        tokens::TokenAuthenticator,
        verification::Verifications,
    },
    worker,
};

/// What the services share.
pub struct Foundation {
    pub pool: PgPool,
    pub sealer: Arc<Sealer>,
    pub pepper: Pepper,
    pub audit: TransactionalAudit,
    pub audit_writer: AuditWriter,
}

/// Configuration of the services.
pub struct ServicesConfig {
    pub clusters: ClusterClientConfig,
    pub verify: VerifyConfig,
    pub reconcile: ReconcileConfig,
    pub identity: IdentityConfig,
}

/// The services, as handlers extract them.
#[derive(Clone)]
pub struct Services {
    api_key_authenticator: Data<ApiKeyAuthenticator>,
    token_authenticator: Data<TokenAuthenticator>,
    api_keys: Data<ApiKeys>,
    identity_providers: Data<IdentityProviders>,
    accounts: Data<Accounts>,
    verifications: Data<Verifications>,
    imports: Data<Imports>,
    docker_configs: Data<DockerConfigs>,
    clusters: Data<Clusters>,
    secrets: Data<Secrets>,
    pull_secrets: Data<PullSecrets>,
    reconciler: Data<Reconciler>,
    audit_events: Data<AuditEvents>,
    audit_writer: Data<AuditWriter>,
    pool: Data<PgPool>,
    pub streams: Data<Streams>,
    pub row_cache: Arc<RowCache>,
    checker: Arc<KeyChecker>,
    cluster_calls: ClusterMetrics,
}

impl Services {
    pub fn build(foundation: Foundation, config: ServicesConfig) -> Result<Self, AppError> {
        let Foundation { pool, sealer, pepper, audit, audit_writer } = foundation;
        let ServicesConfig { clusters, verify, reconcile, identity } = config;
        let cluster_calls = clusters.metrics.clone();
        let content_key = pepper.content_key();

        let row_cache = Arc::new(RowCache::new(pool.clone()));
        let checker = Arc::new(KeyChecker::new(pepper, argon2_permits()));
        let clusters = ClusterClientConfig { runtime: Some(Handle::current()), ..clusters };
        let clusters = Clusters::new(pool.clone(), sealer.clone(), clusters, audit.clone());
        let registries = RegistryClient::new(Guard::new(verify.allowed), verify.registries);
        let verifications = Verifications::new(pool.clone(), sealer.clone(), registries, audit_writer.clone());
        let accounts =
            Accounts::new(pool.clone(), row_cache.clone(), sealer.clone(), audit.clone(), verifications.clone());
        let docker_configs = DockerConfigs::new(pool.clone(), row_cache.clone(), sealer.clone(), audit_writer.clone());
        let token_authenticator = token_authenticator(pool.clone(), clusters.clone(), identity)?;
        let pull_secrets = PullSecrets::new(pool.clone(), audit.clone());
        let streams = Data::new(Streams::new(pool.clone(), pull_secrets.clone()));
        let reconciler = Reconciler::new(
            pool.clone(),
            clusters.clone(),
            docker_configs.clone(),
            content_key,
            audit.clone(),
            reconcile,
        );
        Ok(Self {
            api_key_authenticator: Data::new(ApiKeyAuthenticator::new(row_cache.clone(), checker.clone())),
            token_authenticator: Data::new(token_authenticator),
            api_keys: Data::new(ApiKeys::new(pool.clone(), row_cache.clone(), checker.clone(), audit.clone())),
            identity_providers: Data::new(IdentityProviders::new(pool.clone(), audit.clone())),
            imports: Data::new(Imports::new(pool.clone(), sealer, audit, accounts.clone())),
            secrets: Data::new(Secrets::new(clusters.clone(), docker_configs.clone(), audit_writer.clone())),
            audit_events: Data::new(AuditEvents::new(pool.clone(), audit_writer.clone())),
            accounts: Data::new(accounts),
            verifications: Data::new(verifications),
            docker_configs: Data::new(docker_configs),
            clusters: Data::new(clusters),
            pull_secrets: Data::new(pull_secrets),
            reconciler: Data::new(reconciler),
            audit_writer: Data::new(audit_writer),
            pool: Data::new(pool),
            streams,
            row_cache,
            checker,
            cluster_calls,
        })
    }

    /// Makes the services available to handlers.
    pub fn register(&self, config: &mut ServiceConfig) {
        config
            .app_data(self.api_key_authenticator.clone())
            .app_data(self.token_authenticator.clone())
            .app_data(self.api_keys.clone())
            .app_data(self.identity_providers.clone())
            .app_data(self.accounts.clone())
            .app_data(self.verifications.clone())
            .app_data(self.imports.clone())
            .app_data(self.docker_configs.clone())
            .app_data(self.clusters.clone())
            .app_data(self.secrets.clone())
            .app_data(self.pull_secrets.clone())
            .app_data(self.streams.clone())
            .app_data(self.reconciler.clone())
            .app_data(self.audit_events.clone())
            .app_data(self.audit_writer.clone())
            .app_data(self.pool.clone());
    }

    /// Creates the metrics of all services and of the listener's certificate.
    pub fn metrics(&self, certificate: Option<Arc<ServerCertificate>>) -> Metrics {
        Metrics::new(Sources {
            pool: self.pool.get_ref().clone(),
            row_cache: self.row_cache.clone(),
            checker: self.checker.clone(),
            verifications: self.verifications.metrics(),
            audit: self.audit_writer.metrics(),
            tokens: self.token_authenticator.metrics(),
            pull_secrets: self.reconciler.metrics(),
            cluster_calls: self.cluster_calls.clone(),
            streams: self.streams.clone().into_inner(),
            certificate,
        })
    }

    /// Returns the services that the worker uses.
    pub fn for_worker(&self) -> worker::Services {
        worker::Services {
            verifications: self.verifications.get_ref().clone(),
            reconciler: self.reconciler.get_ref().clone(),
        }
    }
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
