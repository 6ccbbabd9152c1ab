//! The web console: static files below `/console/`, as `make console` builds them.
//!
//! Release builds contain the files; debug builds read them from `console/dist` at each request. The
//! pages use the public API alone, so nothing here knows a caller.

use actix_web::{
    HttpRequest, HttpResponse, get,
    http::header::{self, HeaderValue},
    web::{Path, ServiceConfig, redirect},
};
use rust_embed::RustEmbed;

use crate::http::problem::ApiError;

#[derive(RustEmbed)]
#[folder = "console/dist"]
#[allow_missing = true]
struct Files;

/// Path of the first page.
pub const PATH: &str = "/console/";
/// Prefix of files whose names contain a hash of their content.
const HASHED: &str = "assets/";
const FIRST_PAGE: &str = "index.html";
const IMMUTABLE: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");
const HTML: &str = "text/html; charset=utf-8";
/// Encodings that files are stored in, preferred first, with the endings of their names.
const ENCODINGS: [(&str, &str); 2] = [("br", ".br"), ("gzip", ".gz")];
const NOT_BUILT: &str = "<!doctype html><html lang=\"en\"><title>regcred</title><h1>regcred</h1>\
    <p>This build has no web console. Run <code>make console</code>, which brings its own Node.js. Then load this \
    page again, or build a release again.</p><p><a href=\"/docs/\">Documentation of the API</a></p></html>\n";

/// Registers the routes, which are not part of the API document.
pub fn routes(config: &mut ServiceConfig) {
    config.service(redirect("/console", PATH)).service(get_file);
}

/// Sends a browser to the first page.
pub fn first_page() -> HttpResponse {
    HttpResponse::SeeOther().insert_header((header::LOCATION, PATH)).insert_header((header::VARY, "Accept")).finish()
}

/// Serves a file, or the first page: the pages' addresses are resolved in the browser.
#[get("/console/{path:.*}")]
async fn get_file(path: Path<String>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let is_hashed = path.starts_with(HASHED);
    let name = if is_hashed { path.as_str() } else { FIRST_PAGE };
    // An encoded file is served under the name of the plain one.
    let is_encoded = ENCODINGS.iter().any(|(_, ending)| name.ends_with(ending));
    let plain = if is_encoded { None } else { Files::get(name) };
    let Some(plain) = plain else {
        let not_built = || HttpResponse::Ok().content_type(HTML).body(NOT_BUILT);
        return if is_hashed { Err(ApiError::NoRoute) } else { Ok(not_built()) };
    };
    let mut response = HttpResponse::Ok();
    response.content_type(media_type(name)).insert_header((header::VARY, "Accept-Encoding"));
    if is_hashed {
        response.insert_header((header::CACHE_CONTROL, IMMUTABLE));
    }
    for (encoding, ending) in ENCODINGS {
        if accepts(&request, encoding)
            && let Some(encoded) = Files::get(&format!("{name}{ending}"))
        {
            response.insert_header((header::CONTENT_ENCODING, encoding));
            return Ok(response.body(encoded.data.into_owned()));
        }
    }
    Ok(response.body(plain.data.into_owned()))
}

/// Whether the client accepts an encoding.
fn accepts(request: &HttpRequest, encoding: &str) -> bool {
    let lines = request.headers().get_all(header::ACCEPT_ENCODING).filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|item| {
        let mut parts = item.split(';').map(str::trim);
        let is_named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(encoding));
        let is_refused = parts.any(|part| part.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0)));
        is_named && !is_refused
    })
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("html") => HTML,
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("gzip, deflate, br", true)]
    #[case("BR", true)]
    #[case("br;q=0.5", true)]
    #[case("br;q=0", false)]
    #[case("gzip, br; q=0.0", false)]
    #[case("gzip", false)]
    #[case("brotli", false)]
    #[case("", false)]
    fn encoding_is_negotiated(#[case] accept: &str, #[case] expected: bool) {
        let request = TestRequest::default().insert_header(("Accept-Encoding", accept)).to_http_request();
        assert_eq!(accepts(&request, "br"), expected);
    }
}
