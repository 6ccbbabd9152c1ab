//! Cookie of a session, and the requests that it is accepted for.
//!
//! Browsers attach cookies by themselves, so a request counts only if the browser states that a page
//! of regcred itself made it (`Sec-Fetch-Site`), and if its body is JSON, which no form can send.

use actix_web::{
    HttpRequest,
    http::header::{self, HeaderMap, HeaderName, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

use crate::http::problem::ApiError;

/// Cookie over TLS. Browsers accept the prefix only with `Secure`, and from this host itself.
const SECURE: &str = "__Host-regcred";
/// Cookie over plain HTTP to a loopback address, where not every browser accepts `Secure`.
const LOOPBACK: &str = "regcred";
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const JSON: [&str; 2] = ["application/json", "application/merge-patch+json"];

/// Finds the token of a session. Two cookies of one name are none: the other one was set by another
/// host or path.
pub fn token(headers: &HeaderMap) -> Option<&str> {
    let named = |wanted: &str| {
        let lines = headers.get_all(header::COOKIE).filter_map(|line| line.to_str().ok());
        let pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
        let mut values = pairs.filter(|(name, _)| *name == wanted).map(|(_, value)| value);
        values.next().filter(|_| values.next().is_none())
    };
    named(SECURE).or_else(|| named(LOOPBACK).filter(|_| is_loopback_host(headers)))
}

fn is_loopback_host(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    host.and_then(|host| Url::parse(&format!("http://{host}/")).ok()).is_some_and(|url| is_loopback(&url))
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Refuses a request that a page of regcred cannot have made.
///
/// # Errors
///
/// [`ApiError::SessionRefused`].
pub fn require_own_page(request: &HttpRequest) -> Result<(), ApiError> {
    let headers = request.headers();
    if headers.get(SEC_FETCH_SITE).is_none_or(|site| site != "same-origin") {
        return Err(ApiError::SessionRefused(
            "a session is accepted only from pages of regcred itself; programs use an API key",
        ));
    }
    let is_json = |value: &HeaderValue| {
        let essence = value.to_str().ok().and_then(|value| value.split(';').next());
        essence.is_some_and(|essence| JSON.iter().any(|json| essence.trim().eq_ignore_ascii_case(json)))
    };
    if headers.get(header::CONTENT_TYPE).is_some_and(|value| !is_json(value)) {
        return Err(ApiError::SessionRefused("a request with a session has its body as JSON"));
    }
    Ok(())
}

/// Attributes of the cookie, as the page that signs in was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// HTTPS, or unknown.
    Secure,
    /// Plain HTTP to a loopback address.
    Loopback,
}

impl Transport {
    /// Reads the origin of the page.
    ///
    /// # Errors
    ///
    /// [`ApiError::SessionRefused`] for plain HTTP to another host: the cookie would travel in the
    /// clear.
    pub fn of(request: &HttpRequest) -> Result<Self, ApiError> {
        let origin = request.headers().get(header::ORIGIN).and_then(|origin| origin.to_str().ok());
        match origin.and_then(|origin| Url::parse(origin).ok()) {
            Some(url) if url.scheme() == "http" && is_loopback(&url) => Ok(Self::Loopback),
            Some(url) if url.scheme() == "http" => Err(ApiError::SessionRefused(
                "sign in over HTTPS: over plain HTTP, sessions exist only on a loopback address such as 127.0.0.1",
            )),
            _ => Ok(Self::Secure),
        }
    }

    /// Builds the header that sets the cookie.
    pub fn set(self, token: &SecretString) -> String {
        self.header(token.expose_secret(), "")
    }

    /// Builds the header that removes the cookie.
    pub fn remove(self) -> String {
        self.header("", "; Max-Age=0")
    }

    fn header(self, value: &str, more: &str) -> String {
        match self {
            Self::Secure => format!("{SECURE}={value}; Path=/; HttpOnly; Secure; SameSite=Strict{more}"),
            Self::Loopback => format!("{LOOPBACK}={value}; Path=/; HttpOnly; SameSite=Strict{more}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::secure("a.example.com", "__Host-regcred=one; other=x", Some("one"))]
    #[case::secure_precedes("127.0.0.1:8080", "regcred=two; __Host-regcred=one", Some("one"))]
    #[case::loopback("127.0.0.1:8080", "regcred=two", Some("two"))]
    #[case::loopback_name("localhost:8080", "regcred=two", Some("two"))]
    #[case::loopback_v6("[::1]:8080", "regcred=two", Some("two"))]
    #[case::plain_cookie_elsewhere("a.example.com", "regcred=two", None)]
    #[case::twice("a.example.com", "__Host-regcred=one; __Host-regcred=two", None)]
    #[case::part_of_a_name("127.0.0.1", "xregcred=two", None)]
    fn cookie_is_found(#[case] host: &str, #[case] cookie: &str, #[case] expected: Option<&str>) {
        let request =
            TestRequest::default().insert_header(("Host", host)).insert_header(("Cookie", cookie)).to_http_request();
        assert_eq!(token(request.headers()), expected);
    }

    #[rstest]
    #[case::own_page("same-origin", None, true)]
    #[case::own_page_with_json("same-origin", Some("application/json; charset=utf-8"), true)]
    #[case::own_page_with_patch("same-origin", Some("application/merge-patch+json"), true)]
    #[case::sibling_domain("same-site", None, false)]
    #[case::other_site("cross-site", None, false)]
    #[case::address_bar("none", None, false)]
    #[case::form("same-origin", Some("text/plain"), false)]
    #[case::yaml("same-origin", Some("application/yaml"), false)]
    fn only_requests_of_own_pages_are_accepted(
        #[case] site: &str,
        #[case] media: Option<&str>,
        #[case] accepted: bool,
    ) {
        let mut request = TestRequest::default().insert_header(("Sec-Fetch-Site", site));
        if let Some(media) = media {
            request = request.insert_header(("Content-Type", media));
        }
        assert_eq!(require_own_page(&request.to_http_request()).is_ok(), accepted);
    }

    #[test]
    fn request_without_fetch_metadata_is_refused() {
        assert!(require_own_page(&TestRequest::default().to_http_request()).is_err());
    }

    #[rstest]
    #[case("https://regcred.example.com", Some(Transport::Secure))]
    #[case("http://127.0.0.1:8080", Some(Transport::Loopback))]
    #[case("http://localhost:8080", Some(Transport::Loopback))]
    #[case("http://[::1]:8080", Some(Transport::Loopback))]
    #[case("http://regcred.example.com", None)]
    #[case("http://127.0.0.1.example.com", None)]
    #[case("null", Some(Transport::Secure))]
    fn origin_decides_about_the_cookie(#[case] origin: &str, #[case] expected: Option<Transport>) {
        let request = TestRequest::default().insert_header(("Origin", origin)).to_http_request();
        assert_eq!(Transport::of(&request).ok(), expected);
    }
}
