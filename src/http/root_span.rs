//! Tracing span of a request.

use std::sync::Arc;

use actix_web::{
    Error, HttpMessage, HttpRequest,
    body::MessageBody,
    dev::{ServiceRequest, ServiceResponse},
};
use tracing::Span;
use tracing_actix_web::RootSpanBuilder;

use crate::{domain::caller::Identity, http::request_meta::RequestMeta, telemetry::traces};

/// Length of a path in the log, in bytes. The longest path of a route is shorter, and a client could
/// otherwise fill the log with paths of 128 KiB.
const PATH_MAX: usize = 512;

fn clipped(path: &str) -> &str {
    &path[..path.floor_char_boundary(PATH_MAX)]
}

/// Creates the root span of a request.
///
/// The span records the path without the query and no headers: both may contain secrets. Route,
/// caller and status are known only at the end, so the last log line of the request records them.
pub struct RootSpan;

impl RootSpanBuilder for RootSpan {
    fn on_request_start(request: &ServiceRequest) -> Span {
        let meta = RequestMeta::of(request.request());
        let span = tracing::info_span!(
            "request",
            request_id = meta.map(|meta| meta.id).map(tracing::field::display),
            client_request_id = meta.and_then(|meta| meta.client_id).map(tracing::field::display),
            method = request.method().as_str(),
            path = clipped(request.path()),
            peer = meta.and_then(|meta| meta.source).map(tracing::field::display),
        );
        let headers = request.headers();
        traces::continue_trace(&span, &|name| headers.get(name)?.to_str().ok());
        span
    }

    fn on_request_end<B: MessageBody>(span: Span, outcome: &Result<ServiceResponse<B>, Error>) {
        let (status, request) = match outcome {
            Ok(response) => (response.status(), Some(response.request())),
            Err(error) => (error.as_response_error().status_code(), None),
        };
        let route = request.and_then(HttpRequest::match_pattern);
        if let Some(request) = request {
            traces::record_response(&span, request.method().as_str(), route.as_deref(), status.as_u16());
        }
        let extensions = request.map(HttpRequest::extensions);
        let identity = extensions.as_ref().and_then(|extensions| extensions.get::<Arc<Identity>>());
        let caller = identity.map(|identity| identity.actor.name.as_str());
        tracing::info!(status = status.as_u16(), route, caller, "request completed");
    }
}
