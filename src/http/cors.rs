//! Pages of browsers: which may call, where the configuration lists any. Without a list nothing here runs, and browsers keep
//! all pages out.

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
const REQUEST_HEADERS: HeaderValue =
    HeaderValue::from_static("Accept, Authorization, Content-Type, Idempotency-Key, If-Match, X-Request-Id");
const RESPONSE_HEADERS: HeaderValue = HeaderValue::from_static("ETag, Location, Retry-After, X-Request-Id");
/// How long a browser may remember what it was told, in seconds.
const REMEMBERED_FOR: HeaderValue = HeaderValue::from_static("600");

/// Middleware that tells browsers that pages of the listed origins may call, and answers their question before a call, which
/// comes without a key. Cookies and the like are never allowed: a key is sent as `Authorization`.
pub async fn admit_pages(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<EitherBody<impl MessageBody>>, Error> {
    let origin = listed_origin(&request);
    let is_question = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
        && origin.is_some();
    let mut response = if is_question {
        let mut answer = HttpResponse::NoContent();
        answer
            .insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, METHODS))
            .insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS))
            .insert_header((header::ACCESS_CONTROL_MAX_AGE, REMEMBERED_FOR));
        request.into_response(answer.finish()).map_into_right_body()
    } else {
        next.call(request).await?.map_into_left_body()
    };
    let headers = response.headers_mut();
    // Also for those who are not listed: a cache must not give one's answer to another.
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, RESPONSE_HEADERS);
    }
    Ok(response)
}

fn listed_origin(request: &ServiceRequest) -> Option<HeaderValue> {
    let origin = request.headers().get(header::ORIGIN)?;
    let origins = request.app_data::<Data<Origins>>()?;
    origins.contain(origin.as_bytes()).then(|| origin.clone())
}
