//! What is done for every request, whatever it asks for. It is one middleware, because a middleware costs as much as what it
//! does.

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

/// What the edge goes by.
#[derive(Debug, Clone)]
pub struct Edge {
    /// Requests are counted here.
    pub metrics: Data<Metrics>,
    /// Whose word about a client's address is believed.
    pub proxies: Arc<Proxies>,
    /// Whether regcred's own listener speaks TLS.
    pub speaks_tls: bool,
}

/// Middleware that
///
/// - tells the connection's clock that it is our turn now, and after the answer that it is the client's;
/// - notes which request this is and where it comes from ([`RequestMeta`]);
/// - gives the answer the request's id, and its headers for browsers;
/// - counts and times the request, by the route's pattern, never the path: callers must not be able to make new series.
pub async fn pass(
    edge: Rc<Edge>,
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let start = Instant::now();
    let clock = Clock::of(request.request());
    if let Some(clock) = &clock {
        clock.ours();
    }
    let meta = RequestMeta::new(request.request(), &edge.proxies);
    request.extensions_mut().insert(meta);

    let mut answer = next.call(request).await;

    let mut closes = false;
    match &mut answer {
        Ok(answer) => {
            let route = answer.request().match_pattern();
            let method = answer.request().method().as_str();
            edge.metrics.count_request(method, route.as_deref(), answer.status().as_u16(), start.elapsed());
            closes = answer.response().head().connection_type() == ConnectionType::Close;
            if let Ok(id) = meta.id.with_text(HeaderValue::from_str) {
                answer.headers_mut().insert(X_REQUEST_ID, id);
            }
            security_headers::add(answer, edge.speaks_tls);
        }
        Err(error) => {
            let status = error.as_response_error().status_code();
            edge.metrics.count_request("other", None, status.as_u16(), start.elapsed());
        }
    }
    if let Some(clock) = &clock {
        clock.answered(closes);
    }
    answer
}
