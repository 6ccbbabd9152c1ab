//! `/healthz`, `/readyz` and `/metrics`: for whoever runs regcred, without a key.

use actix_web::{HttpResponse, get, web::Data};
use serde::Serialize;
use sqlx::PgPool;
use utoipa::ToSchema;

use crate::{http::problem::ApiError, metrics::Metrics, service::health::readiness};

/// Whether regcred can serve.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ready {
    /// Whether all of it is there.
    ready: bool,
    /// Postgres answers.
    database: bool,
    /// Postgres has every migration of this binary.
    migrations: bool,
}

/// Say that the process lives.
#[utoipa::path(tag = "operation", responses((status = OK, description = "It lives", body = String)))]
#[get("/healthz")]
pub async fn get_health() -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain").body("ok\n")
}

/// Say whether requests can be served.
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

/// Show the metrics, in the OpenMetrics text format.
#[utoipa::path(tag = "operation", responses(
    (status = OK, content_type = "application/openmetrics-text", body = String),
))]
#[get("/metrics")]
pub async fn get_metrics(metrics: Data<Metrics>) -> Result<HttpResponse, ApiError> {
    let text = metrics.encode().map_err(|error| ApiError::Internal(error.into()))?;
    Ok(HttpResponse::Ok().content_type("application/openmetrics-text; version=1.0.0; charset=utf-8").body(text))
}
