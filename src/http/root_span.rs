//! The span of a request: what every log line of it carries.

use std::sync::Arc;

use actix_web::{
    Error, HttpMessage,
    body::MessageBody,
    dev::{ServiceRequest, ServiceResponse},
};
use tracing::Span;
use tracing_actix_web::RootSpanBuilder;

use crate::{
    domain::caller::Identity,
    http::{request_id::RequestId, source},
};

/// Records the path without its query and no header at all: both may hold what does not belong in a log.
///
/// What is known only later, caller and status, stands in the last line alone: a field that is added to a span
/// costs a new reading and writing of all that it has.
pub struct RootSpan;

impl RootSpanBuilder for RootSpan {
    fn on_request_start(request: &ServiceRequest) -> Span {
        let request_id = request.extensions().get::<RequestId>().map(ToString::to_string);
        tracing::info_span!(
            "request",
            request_id = request_id.as_deref(),
            method = %request.method(),
            path = request.path(),
            route = request.match_pattern(),
            peer = source::address(request.request()).map(|address| address.to_string()),
        )
    }

    fn on_request_end<B: MessageBody>(span: Span, outcome: &Result<ServiceResponse<B>, Error>) {
        let (status, extensions) = match outcome {
            Ok(response) => (response.status(), Some(response.request().extensions())),
            Err(error) => (error.as_response_error().status_code(), None),
        };
        let identity = extensions.as_ref().and_then(|extensions| extensions.get::<Arc<Identity>>());
        let caller = identity.map(|identity| identity.actor.name.as_str());
        span.in_scope(|| tracing::info!(status = status.as_u16(), caller, "request done"));
    }
}
