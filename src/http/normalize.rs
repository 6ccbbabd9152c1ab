//! Middleware that removes ambiguity from requests, before they are routed.

use actix_web::{
    Error,
    body::{BodySize, EitherBody, MessageBody},
    dev::{ServiceRequest, ServiceResponse},
    http::{
        Method,
        header::{self, HeaderMap, HeaderName},
    },
    middleware::Next,
    web::Bytes,
};

use crate::http::problem::ApiError;

/// Headers that decide about a request and have one value. Two lines would be read differently by
/// regcred and by a proxy. The parser refuses two of `Host`, `Content-Length` and
/// `Transfer-Encoding`; forwarding headers are lists ([`Proxies`](crate::domain::proxies::Proxies)).
static SINGLE: [HeaderName; 9] = [
    header::AUTHORIZATION,
    header::CONTENT_TYPE,
    header::ACCEPT,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::ORIGIN,
    header::ACCESS_CONTROL_REQUEST_METHOD,
    HeaderName::from_static("idempotency-key"),
    HeaderName::from_static("last-event-id"),
];

/// Middleware that
///
/// - refuses a repeated header that decides about the request;
/// - serves `HEAD` as `GET`, without the body.
pub async fn normalize(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<EitherBody<impl MessageBody, Bodyless>>, Error> {
    if let Some(name) = repeated(request.headers()) {
        let refused = request.error_response(ApiError::RepeatedHeader(name));
        return Ok(refused.map_body(|_, _| Bodyless(BodySize::Sized(0))).map_into_right_body());
    }
    if request.method() != Method::HEAD {
        return Ok(next.call(request).await?.map_into_left_body());
    }
    request.head_mut().method = Method::GET;
    let response = next.call(request).await?;
    Ok(response.map_body(|_, body| Bodyless(body.size())).map_into_right_body())
}

fn repeated(headers: &HeaderMap) -> Option<&'static HeaderName> {
    if headers.len() == headers.len_keys() {
        return None;
    }
    SINGLE.iter().find(|name| headers.get_all(*name).nth(1).is_some())
}

/// Body of a response to `HEAD`: it has the size of the response to `GET`, and no bytes.
pub struct Bodyless(BodySize);

impl MessageBody for Bodyless {
    type Error = std::convert::Infallible;

    fn size(&self) -> BodySize {
        self.0
    }

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Bytes, Self::Error>>> {
        std::task::Poll::Ready(None)
    }
}
