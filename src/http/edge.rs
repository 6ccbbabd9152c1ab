//! Middleware for every request: timeouts, request id, security headers and metrics.
//!
//! It is a single middleware because each further one costs as much as the work it does.

use std::{rc::Rc, sync::Arc, time::Instant};

use actix_web::{
    Error, HttpMessage,
    body::MessageBody,
    dev::{ServiceRequest, ServiceResponse},
    http::{
        ConnectionType,
        header::{HeaderMap, HeaderValue},
    },
    middleware::Next,
    web::Data,
};

use crate::{
    domain::proxies::Proxies,
    http::{
        body::BodyRead,
        connection::Clock,
        idempotency::{self, IDEMPOTENCY_REPLAYED},
        request_head,
        request_meta::{RequestMeta, X_CLIENT_REQUEST_ID, X_REQUEST_ID},
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
/// - closes the connection after a response to a request whose body was not read;
/// - adds the request ids, the mark of a repeated request and the security headers to the response;
/// - records metrics by the route's pattern, because clients could create new series with paths.
pub async fn pass(
    edge: Rc<Edge>,
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let start = Instant::now();
    let clock = Clock::of(request.request());
    if let Some(clock) = &clock {
        clock.request_received();
    }
    request_head::detach(&mut request);
    let meta = RequestMeta::new(request.request(), &edge.proxies);
    request.extensions_mut().insert(meta);
    // Read here: later, `HEAD` is `GET`.
    let method = request.method().clone();
    let request_closes = request.head().connection_type() == ConnectionType::Close;

    let mut response = next.call(request).await;

    let mut closes = false;
    match &mut response {
        Ok(response) => {
            let route = response.request().match_pattern();
            let status = response.status().as_u16();
            edge.metrics.count_request(method.as_str(), route.as_deref(), status, start.elapsed());
            let is_unread = clock.as_ref().is_some_and(|clock| clock.has_body())
                && !response.request().extensions().contains::<BodyRead>();
            if is_unread {
                response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
            }
            if idempotency::is_replayed(response.request()) {
                response.headers_mut().insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
            }
            closes = response.response().head().connection_type() == ConnectionType::Close;
            add_request_ids(response.headers_mut(), &meta);
            security_headers::add(response, edge.speaks_tls);
        }
        Err(error) => {
            let status = error.as_response_error().status_code();
            edge.metrics.count_request("other", None, status.as_u16(), start.elapsed());
        }
    }
    if let Some(clock) = &clock {
        clock.response_ready(closes, request_closes);
    }
    response
}

fn add_request_ids(headers: &mut HeaderMap, meta: &RequestMeta) {
    for (name, id) in [(X_REQUEST_ID, Some(meta.id)), (X_CLIENT_REQUEST_ID, meta.client_id)] {
        if let Some(Ok(id)) = id.map(|id| id.with_text(HeaderValue::from_str)) {
            headers.insert(name, id);
        }
    }
}
