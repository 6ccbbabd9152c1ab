//! `/healthz`, `/readyz` and `/metrics`: unauthenticated routes for operators.
//!
//! They ignore query strings, which some load balancers and scrapers append to their probes.

use actix_web::{HttpResponse, get, web::Data};
use serde::Serialize;
use sqlx::PgPool;
use utoipa::ToSchema;

use crate::{http::problem::ApiError, metrics::Metrics, service::health::readiness};

/// Readiness of this process.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ready {
    /// Whether all conditions hold.
    ready: bool,
    /// Whether Postgres is reachable.
    database: bool,
    /// Whether every migration of this binary is applied.
    migrations: bool,
}

/// Check liveness.
///
/// Query parameters are ignored.
#[utoipa::path(tag = "operation", responses((status = OK, description = "The process is alive", body = String)))]
#[get("/healthz")]
pub async fn get_health() -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain").body("ok\n")
}

/// Check readiness.
///
/// Query parameters are ignored.
#[utoipa::path(tag = "operation", responses(
    (status = OK, description = "Ready", body = Ready),
    (status = SERVICE_UNAVAILABLE, description = "Not ready", body = Ready),
))]
#[get("/readyz")]
pub async fn get_readiness(pool: Data<PgPool>) -> HttpResponse {
    let readiness = readiness(&pool).await;
    let mut response = if readiness.is_ready() { HttpResponse::Ok() } else { HttpResponse::ServiceUnavailable() };
    response.json(Ready { ready: readiness.is_ready(), database: readiness.database, migrations: readiness.migrations })
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
