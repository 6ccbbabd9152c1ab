//! Counts and times every request.

use std::time::Instant;

use actix_web::{
    Error,
    body::MessageBody,
    dev::{ServiceRequest, ServiceResponse},
    middleware::Next,
    web::Data,
};

use crate::metrics::Metrics;

/// Middleware that counts a request by method, route and status, and times it. The label is the route's
/// pattern, never the path: callers must not be able to make new series.
pub async fn measure(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let start = Instant::now();
    let metrics = request.app_data::<Data<Metrics>>().cloned();
    let method = request.method().clone();
    let response = next.call(request).await;
    if let Some(metrics) = metrics {
        let (status, route) = match &response {
            Ok(response) => (response.status(), response.request().match_pattern()),
            Err(error) => (error.as_response_error().status_code(), None),
        };
        metrics.count_request(method.as_str(), route, status.as_u16(), start.elapsed());
    }
    response
}
