//! `/healthz`, `/readyz` and `/metrics`: unauthenticated routes for operators. `/metrics` is served on
//! the operations listener only.
//!
//! They ignore query strings, which some load balancers and scrapers append to their probes.

use actix_web::{HttpResponse, get, web::Data};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{http::problem::ApiError, metrics::Metrics, service::health::Health};

/// Readiness of this process.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Ready {
    /// Whether the process can serve requests.
    ready: bool,
    /// Whether Postgres is reachable.
    database: bool,
    /// Whether every migration of this binary is applied.
    migrations: bool,
    /// `off` if change notifications do not arrive. Every request then reads from Postgres.
    row_cache: Switch,
}

/// State of a component.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Switch {
    /// In use.
    On,
    /// Not in use.
    Off,
}

/// Check liveness.
///
/// Query parameters are ignored.
#[utoipa::path(tag = "operation", responses((status = OK, description = "The process is alive", body = String)))]
#[get("/healthz")]
pub async fn get_health() -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain").body("ok\n")
}

/// Check readiness, at most once a second.
///
/// Query parameters are ignored.
#[utoipa::path(tag = "operation", responses(
    (status = OK, description = "Ready", body = Ready),
    (status = SERVICE_UNAVAILABLE, description = "Not ready", body = Ready),
))]
#[get("/readyz")]
pub async fn get_readiness(health: Data<Health>) -> HttpResponse {
    let readiness = health.readiness().await;
    let mut response = if readiness.is_ready() { HttpResponse::Ok() } else { HttpResponse::ServiceUnavailable() };
    response.json(Ready {
        ready: readiness.is_ready(),
        database: readiness.database,
        migrations: readiness.migrations,
        row_cache: if health.row_cache_is_on() { Switch::On } else { Switch::Off },
    })
}

/// Get metrics in the OpenMetrics text format.
///
/// Query parameters are ignored.
#[utoipa::path(tag = "operation", responses(
    (status = OK, content_type = "application/openmetrics-text", body = String),
))]
#[get("/metrics")]
pub async fn get_metrics(metrics: Data<Metrics>) -> Result<HttpResponse, ApiError> {
    let text = metrics.encode().map_err(|error| ApiError::Internal(error.into()))?;
    Ok(HttpResponse::Ok().content_type("application/openmetrics-text; version=1.0.0; charset=utf-8").body(text))
}
