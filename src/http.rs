//! The HTTP API, one module per resource. A handler parses the request, calls one use case and
//! builds the response.

use actix_web::web::Data;
use utoipa_actix_web::{scope, service_config::ServiceConfig};

use crate::{
    domain::names::Name,
    http::problem::ApiError,
    metrics::Metrics,
    service::{
        ServiceError,
        accounts::Accounts,
        api_keys::{ApiKeyAuthenticator, ApiKeys},
        audit::{AuditEvents, writer::AuditWriter},
        clusters::Clusters,
        docker_configs::DockerConfigs,
        identity_providers::IdentityProviders,
        imports::Imports,
        progress::Streams,
        pull_secrets::PullSecrets,
        reconcile::Reconciler,
        secrets::Secrets,
        tokens::TokenAuthenticator,
    },
};

mod accounts;
mod api_keys;
mod audit;
mod auth;
mod body;
mod clusters;
mod conditional;
mod connection;
mod cors;
mod docker_configs;
mod edge;
mod identity_providers;
mod imports;
mod me;
mod merge_patch;
mod openapi;
mod operation;
mod paging;
mod prefer;
mod problem;
mod pull_secrets;
mod query;
mod rate_limit;
mod refusals;
mod request_meta;
mod root_span;
mod secrets;
mod security_headers;
pub mod server;
mod verification;

pub use audit::json_line;
pub use openapi::document;

/// What the handlers work with.
#[derive(Clone)]
pub struct State {
    /// Who is at the door.
    pub authenticator: Data<ApiKeyAuthenticator>,
    /// Who is at the door with a token.
    pub token_authenticator: Data<TokenAuthenticator>,
    /// API keys.
    pub api_keys: Data<ApiKeys>,
    /// Identity providers.
    pub identity_providers: Data<IdentityProviders>,
    /// Registry accounts.
    pub accounts: Data<Accounts>,
    /// Imports of docker configs.
    pub imports: Data<Imports>,
    /// Docker configs.
    pub docker_configs: Data<DockerConfigs>,
    /// Clusters.
    pub clusters: Data<Clusters>,
    /// Pull secrets.
    pub pull_secrets: Data<PullSecrets>,
    /// How pull secrets get on.
    pub streams: Data<Streams>,
    /// What would become of a pull secret.
    pub previews: Data<Reconciler>,
    /// The direct road to a Secret.
    pub secrets: Data<Secrets>,
    /// The audit record.
    pub audit_events: Data<AuditEvents>,
    /// What is refused is recorded here.
    pub audit_writer: Data<AuditWriter>,
    /// Postgres, for readiness alone.
    pub pool: Data<sqlx::PgPool>,
    /// What is counted.
    pub metrics: Data<Metrics>,
}

/// Parses the name of a resource in a path. An invalid name is a resource that does not exist.
fn path_name(kind: &'static str, name: &str) -> Result<Name, ApiError> {
    Name::parse(name).map_err(|_| ServiceError::NotFound { kind, name: name.chars().take(100).collect() }.into())
}

/// What a process serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serves {
    /// The API and its documents, health and metrics.
    Everything,
    /// Health and metrics alone.
    Operation,
}

impl Serves {
    fn routes(self) -> fn(&mut ServiceConfig) {
        match self {
            Self::Everything => routes,
            Self::Operation => operation_routes,
        }
    }
}

/// The routes for whoever runs regcred.
fn operation_routes(config: &mut ServiceConfig) {
    config.service(operation::get_health).service(operation::get_readiness).service(operation::get_metrics);
}

/// All routes, with their place in the OpenAPI document.
fn routes(config: &mut ServiceConfig) {
    config
        .service(
            scope::scope("/v1")
                .wrap(actix_web::middleware::from_fn(auth::authenticate))
                // First what is asked for most: a request is compared with one pattern after the
                // other.
                .service(docker_configs::create_docker_config)
                .service(me::get_me)
                .service(accounts::create_account)
                .service(accounts::list_accounts)
                .service(accounts::get_account)
                .service(accounts::update_account)
                .service(accounts::delete_account)
                .service(verification::verify_account)
                .service(imports::import_accounts)
                .service(docker_configs::explain_docker_config)
                .service(clusters::create_cluster)
                .service(clusters::list_clusters)
                .service(clusters::get_cluster)
                .service(clusters::update_cluster)
                .service(clusters::delete_cluster)
                .service(clusters::check_cluster)
                .service(secrets::create_secret)
                .service(pull_secrets::put_pull_secret)
                .service(pull_secrets::list_pull_secrets)
                .service(pull_secrets::get_pull_secret)
                .service(pull_secrets::delete_pull_secret)
                .service(pull_secrets::list_pull_secret_targets)
                .service(pull_secrets::events::get_pull_secret_events)
                .service(pull_secrets::sync_pull_secret)
                .service(api_keys::create_api_key)
                .service(api_keys::list_api_keys)
                .service(api_keys::get_api_key)
                .service(api_keys::revoke_api_key)
                .service(identity_providers::create_identity_provider)
                .service(identity_providers::list_identity_providers)
                .service(identity_providers::get_identity_provider)
                .service(identity_providers::update_identity_provider)
                .service(identity_providers::delete_identity_provider)
                .service(audit::list_audit_events),
        )
        .service(operation::get_health)
        .service(operation::get_readiness)
        .service(operation::get_metrics);
}
