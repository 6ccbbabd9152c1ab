//! The HTTP API, one module per resource. A handler parses the request, calls one use case and
//! builds the response.

use utoipa_actix_web::{scope, service_config::ServiceConfig};

use crate::{domain::names::Name, http::problem::ApiError, service::ServiceError};

mod accounts;
mod api_keys;
mod audit;
mod auth;
mod body;
mod clusters;
mod conditional;
mod connection;
#[cfg(feature = "console")]
mod console;
mod cors;
mod coverage;
mod diagnosis;
mod docker_configs;
mod edge;
mod event_stream;
mod events;
mod framing;
#[cfg(fuzzing)]
pub mod fuzzing;
mod idempotency;
mod identity_providers;
mod imports;
mod logins;
mod me;
mod merge_patch;
mod mints;
mod normalize;
mod openapi;
mod operation;
mod paging;
mod pods;
mod prefer;
mod problem;
mod pull_secrets;
mod query;
mod rate_limit;
mod refusals;
mod request_head;
mod request_meta;
mod root_span;
mod secrets;
mod security_headers;
pub mod server;
mod session_cookie;
mod sessions;
mod summary;
mod verification;

pub use audit::json_line;
pub use openapi::{document, document_3_0};

/// Parses a resource name from a path. An invalid name is reported as an unknown resource.
fn path_name(kind: &'static str, name: &str) -> Result<Name, ApiError> {
    Name::parse(name).map_err(|_| ServiceError::NotFound { kind, name: name.chars().take(100).collect() }.into())
}

/// Routes of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteSet {
    /// The API with its documentation, and health.
    Api,
    /// Health only.
    Health,
    /// Health and metrics.
    Operations,
}

impl RouteSet {
    fn routes(self) -> fn(&mut ServiceConfig) {
        match self {
            Self::Api => api_routes,
            Self::Health => health_routes,
            Self::Operations => operations_routes,
        }
    }
}

fn health_routes(config: &mut ServiceConfig) {
    config.service(operation::get_health).service(operation::get_readiness);
}

fn operations_routes(config: &mut ServiceConfig) {
    health_routes(config);
    config.service(operation::get_metrics);
}

/// Registers the routes of the API, which also defines the OpenAPI document.
fn api_routes(config: &mut ServiceConfig) {
    config.service(
        scope::scope("/v1")
            .wrap(actix_web::middleware::from_fn(auth::authenticate))
            // Most frequent first: patterns are tried in order.
            .service(docker_configs::create_docker_config)
            .service(docker_configs::create_secret_manifest)
            .service(me::get_me)
            .service(accounts::create_account)
            .service(accounts::list_accounts)
            .service(accounts::get_account)
            .service(accounts::update_account)
            .service(accounts::delete_account)
            .service(verification::verify_account)
            .service(mints::mint_account)
            .service(imports::import_accounts)
            .service(docker_configs::explain_docker_config)
            .service(clusters::create_cluster)
            .service(clusters::list_clusters)
            .service(clusters::get_cluster)
            .service(clusters::update_cluster)
            .service(clusters::delete_cluster)
            .service(clusters::check_cluster)
            .service(secrets::create_secret)
            .service(secrets::list_secrets)
            .configure(diagnosis_routes)
            .service(pull_secrets::put_pull_secret)
            .service(pull_secrets::patch::update_pull_secret)
            .service(pull_secrets::lists::list_pull_secrets)
            .service(pull_secrets::get_pull_secret)
            .service(pull_secrets::delete_pull_secret)
            .service(pull_secrets::lists::list_pull_secret_targets)
            .service(pull_secrets::lists::list_targets)
            .service(summary::get_summary)
            .service(pull_secrets::events::get_pull_secret_events)
            .service(pull_secrets::sync_pull_secret)
            .service(events::get_events)
            .service(sessions::create_session)
            .service(sessions::list_sessions)
            .service(sessions::end_session)
            .service(sessions::end_sessions)
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
    );
    login_routes(config);
    health_routes(config);
}

/// What uses images in the clusters, and why they are not pulled.
fn diagnosis_routes(config: &mut ServiceConfig) {
    config
        .service(pods::list_pods)
        .service(diagnosis::diagnose_pod)
        .service(diagnosis::diagnose_workload)
        .service(diagnosis::diagnose_spec)
        .service(coverage::run_coverage)
        .service(coverage::get_coverage)
        .service(coverage::lists::list_coverage_groups)
        .service(coverage::lists::list_coverage_secrets)
        .service(coverage::lists::list_coverage_accounts);
}

/// Routes without authentication, for a person who signs in.
fn login_routes(config: &mut ServiceConfig) {
    config.service(logins::list_login_providers).service(logins::start_login).service(logins::complete_login);
}
