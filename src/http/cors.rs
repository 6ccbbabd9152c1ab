//! Cross-origin resource sharing (CORS) for the configured origins.
//!
//! Without configured origins this middleware is not installed, and browsers block all pages.

use actix_web::{
    Error, HttpResponse,
    body::{EitherBody, MessageBody},
    dev::{ServiceRequest, ServiceResponse},
    http::{
        Method,
        header::{self, HeaderValue},
    },
    middleware::Next,
    web::Data,
};

use crate::domain::origin::Origins;

const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE");
/// Also `Last-Event-ID`: a page that sends `Authorization` cannot use `EventSource`, which would send it.
const REQUEST_HEADERS: HeaderValue = HeaderValue::from_static(
    "Accept, Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Last-Event-ID, Prefer, X-Request-Id",
);
const RESPONSE_HEADERS: HeaderValue = HeaderValue::from_static(
    "ETag, Idempotency-Replayed, Location, Preference-Applied, Retry-After, Warning, X-Client-Request-Id, X-Request-Id",
);
/// Time for which a browser may cache a preflight response, in seconds.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");

/// Middleware that allows requests from pages of the configured origins and answers their preflight
/// requests.
///
/// Preflight requests carry no API key. Credentials mode is never allowed: clients send keys as
/// `Authorization`.
pub async fn allow_origins(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<EitherBody<impl MessageBody>>, Error> {
    let origin = listed_origin(&request);
    let is_preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
        && origin.is_some();
    let mut response = if is_preflight {
        let mut preflight = HttpResponse::NoContent();
        preflight
            .insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, METHODS))
            .insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS))
            .insert_header((header::ACCESS_CONTROL_MAX_AGE, MAX_AGE));
        request.into_response(preflight.finish()).map_into_right_body()
    } else {
        next.call(request).await?.map_into_left_body()
    };
    let headers = response.headers_mut();
    // Also for other origins: a cache must not reuse a response for another origin.
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, RESPONSE_HEADERS);
    }
    Ok(response)
}

fn listed_origin(request: &ServiceRequest) -> Option<HeaderValue> {
    let mut given = request.headers().get_all(header::ORIGIN);
    // Two are refused later.
    let (origin, None) = (given.next()?, given.next()) else { return None };
    let origins = request.app_data::<Data<Origins>>()?;
    origins.contain(origin.as_bytes()).then(|| origin.clone())
}
