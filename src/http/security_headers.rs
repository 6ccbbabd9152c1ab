//! What every answer tells a browser: neither guess its type, nor frame it, nor keep it, nor tell others where it was.

use actix_web::{
    dev::ServiceResponse,
    http::header::{self, HeaderName, HeaderValue},
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

/// Adds the headers to an answer; `speaks_tls` says whether regcred's own listener does.
pub fn add<B>(answer: &mut ServiceResponse<B>, speaks_tls: bool) {
    let path = answer.request().path();
    let is_docs = path.starts_with("/docs");
    let is_public = is_docs || path == "/openapi.json";
    let headers = answer.headers_mut();
    for (name, value) in ALWAYS {
        headers.insert(name, value);
    }
    headers.insert(header::CONTENT_SECURITY_POLICY, if is_docs { OF_DOCS } else { OF_DATA });
    if !is_public {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if speaks_tls {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, STRICT);
    }
}
