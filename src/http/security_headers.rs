//! What every answer tells a browser: neither guess its type, nor frame it, nor keep it, nor tell others where it was.

use actix_web::{
    Error,
    body::MessageBody,
    dev::{ServiceRequest, ServiceResponse},
    http::header::{self, HeaderName, HeaderValue},
    middleware::Next,
    web::Data,
};

/// On every answer.
const ALWAYS: [(HeaderName, HeaderValue); 4] = [
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (header::CROSS_ORIGIN_RESOURCE_POLICY, HeaderValue::from_static("same-origin")),
];
/// An answer of the API is data: a browser that shows it as a page loads and runs nothing.
const OF_DATA: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
/// The pages of `/docs` run what regcred serves, and call regcred alone. Their program sets styles in line.
const OF_DOCS: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);
/// Only over TLS of our own: elsewhere the proxy knows whether it always speaks TLS.
const STRICT: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// Whether regcred's own listener speaks TLS.
#[derive(Debug, Clone, Copy)]
pub struct OwnTls(pub bool);

/// Middleware that adds the headers.
pub async fn add(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let is_docs = request.path().starts_with("/docs");
    let is_public = is_docs || request.path() == "/openapi.json";
    let is_secure = request.app_data::<Data<OwnTls>>().is_some_and(|tls| tls.0);
    let mut response = next.call(request).await?;
    let headers = response.headers_mut();
    for (name, value) in ALWAYS {
        headers.insert(name, value);
    }
    headers.insert(header::CONTENT_SECURITY_POLICY, if is_docs { OF_DOCS } else { OF_DATA });
    if !is_public {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if is_secure {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, STRICT);
    }
    Ok(response)
}
