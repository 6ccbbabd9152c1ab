//! Middleware for every request: timeouts, request id, security headers and metrics.
//!
//! It is a single middleware because each further one costs as much as the work it does.

use std::{rc::Rc, sync::Arc, time::Instant};

use actix_web::{
    Error, HttpMessage,
    body::MessageBody,
    dev::{ServiceRequest, ServiceResponse},
    http::{ConnectionType, header::HeaderValue},
    middleware::Next,
    web::Data,
};

use crate::{
    domain::proxies::Proxies,
    http::{
        connection::Clock,
        request_meta::{RequestMeta, X_REQUEST_ID},
        security_headers,
    },
    metrics::Metrics,
};

/// Configuration of the middleware.
#[derive(Debug, Clone)]
pub struct Edge {
    /// Metrics that count requests.
    pub metrics: Data<Metrics>,
    /// Trusted proxies.
    pub proxies: Arc<Proxies>,
    /// Whether the listener uses TLS.
    pub speaks_tls: bool,
}

/// Middleware that
///
/// - stops the connection's [`Clock`] during the request and restarts it with the response;
/// - stores the [`RequestMeta`];
/// - adds the request id and the security headers to the response;
/// - records metrics by the route's pattern, because clients could create new series with paths.
pub async fn pass(
    edge: Rc<Edge>,
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let start = Instant::now();
    let clock = Clock::of(request.request());
    if let Some(clock) = &clock {
        clock.request_received();
    }
    let meta = RequestMeta::new(request.request(), &edge.proxies);
    request.extensions_mut().insert(meta);

    let mut response = next.call(request).await;

    let mut closes = false;
    match &mut response {
        Ok(response) => {
            let route = response.request().match_pattern();
            let method = response.request().method().as_str();
            edge.metrics.count_request(method, route.as_deref(), response.status().as_u16(), start.elapsed());
            closes = response.response().head().connection_type() == ConnectionType::Close;
            if let Ok(id) = meta.id.with_text(HeaderValue::from_str) {
                response.headers_mut().insert(X_REQUEST_ID, id);
            }
            security_headers::add(response, edge.speaks_tls);
        }
        Err(error) => {
            let status = error.as_response_error().status_code();
            edge.metrics.count_request("other", None, status.as_u16(), start.elapsed());
        }
    }
    if let Some(clock) = &clock {
        clock.response_ready(closes);
    }
    response
}
