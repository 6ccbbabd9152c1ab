//! Security headers of every response.

use actix_web::{
    dev::ServiceResponse,
    http::header::{self, HeaderName, HeaderValue},
};

/// Headers of every response.
const ALWAYS: [(HeaderName, HeaderValue); 3] = [
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::CROSS_ORIGIN_RESOURCE_POLICY, HeaderValue::from_static("same-origin")),
];
/// Pages of the console state themselves to regcred, and to no other server: a cookie over plain HTTP
/// counts only for some of them.
const CONSOLE_REFERRER: HeaderValue = HeaderValue::from_static("same-origin");
const REFERRER: HeaderValue = HeaderValue::from_static("no-referrer");
/// Policy for API responses: a browser that displays one loads and runs nothing.
const API_POLICY: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
/// Policy for `/docs`: scripts and requests only to regcred itself. Swagger UI sets inline styles.
const DOCS_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);
/// Policy for the web console: nothing from elsewhere, no inline script or style, and no text that
/// becomes markup.
const CONSOLE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; \
     form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'",
);
/// Sent only if the listener uses TLS. Behind a proxy, the proxy decides.
const STRICT: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// Adds the headers to a response. `speaks_tls` tells whether the listener uses TLS.
pub fn add<B>(response: &mut ServiceResponse<B>, speaks_tls: bool) {
    let path = response.request().path();
    let is_docs = path.starts_with("/docs");
    let (policy, referrer) = match path {
        path if path.starts_with("/console") => (CONSOLE_POLICY, CONSOLE_REFERRER),
        _ if is_docs => (DOCS_POLICY, REFERRER),
        _ => (API_POLICY, REFERRER),
    };
    let is_public = is_docs || path == "/openapi.json";
    let headers = response.headers_mut();
    for (name, value) in ALWAYS {
        headers.insert(name, value);
    }
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    headers.insert(header::REFERRER_POLICY, referrer);
    // Files of the console state their own.
    if !is_public && !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if speaks_tls {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, STRICT);
    }
}
