//! Cookie of a session, and the requests that it is accepted for.
//!
//! Browsers attach cookies by themselves, so a request counts only if the browser states that a page
//! of regcred itself made it (`Sec-Fetch-Site`), and if its body is JSON, which no form can send.
//!
//! An attempt to sign in through an identity provider has a cookie of its own, which is `Lax`: the
//! browser must keep it when the provider sends it back.

use actix_web::{
    HttpRequest,
    http::header::{self, HeaderMap, HeaderName, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

use crate::http::{problem::ApiError, request_meta::RequestMeta};

/// Cookie over TLS. Browsers accept the prefix only with `Secure`, and from this host itself.
const SECURE: &str = "__Host-regcred";
/// Cookie over plain HTTP to a loopback address, where not every browser accepts `Secure`.
const LOOPBACK: &str = "regcred";
/// The same for an attempt to sign in.
const SECURE_LOGIN: &str = "__Host-regcred-login";
const LOOPBACK_LOGIN: &str = "regcred-login";
/// Time for a person to sign in at a provider, in seconds.
const LOGIN_SECONDS: u32 = 600;
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const JSON: [&str; 2] = ["application/json", "application/merge-patch+json"];

/// Finds the token of a session.
pub fn token(request: &HttpRequest) -> Option<&str> {
    let headers = request.headers();
    find(headers, SECURE).or_else(|| find(headers, LOOPBACK).filter(|_| is_loopback_request(request)))
}

/// Finds the cookie of an attempt to sign in, as the page that completes it was loaded.
pub fn login_token(request: &HttpRequest, transport: Transport) -> Option<&str> {
    match transport {
        Transport::Secure => find(request.headers(), SECURE_LOGIN),
        Transport::Loopback => find(request.headers(), LOOPBACK_LOGIN).filter(|_| is_loopback_request(request)),
    }
}

/// Finds a cookie. Two cookies of one name are none: the other one was set by another host or path.
fn find<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    let lines = headers.get_all(header::COOKIE).filter_map(|line| line.to_str().ok());
    let pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let mut values = pairs.filter(|(name, _)| *name == wanted).map(|(_, value)| value);
    values.next().filter(|_| values.next().is_none())
}

/// Whether a browser made the request to a loopback address over plain HTTP. A cookie without a prefix
/// counts only then: elsewhere, sibling hosts could set it. `Host` does not tell, since a proxy may
/// rewrite it. A browser states its page: as `Origin` in each request that changes something, and as
/// `Referer` in others, since the console has the policy `same-origin`.
fn is_loopback_request(request: &HttpRequest) -> bool {
    let headers = request.headers();
    let is_direct = RequestMeta::of(request).is_some_and(|meta| meta.is_direct);
    let stated = if headers.contains_key(header::ORIGIN) { header::ORIGIN } else { header::REFERER };
    is_direct && url_in(headers, &stated).is_some_and(|page| is_plain_loopback(&page)) && is_loopback_host(headers)
}

/// Returns the origin of the page that made a request, as the browser states it.
///
/// # Errors
///
/// [`ApiError::SessionRefused`] if it states none.
pub fn own_origin(request: &HttpRequest) -> Result<String, ApiError> {
    let origin = page(request).map(|url| url.origin()).filter(url::Origin::is_tuple);
    let missing = ApiError::SessionRefused("the browser does not state the page that made the request");
    origin.map(|origin| origin.ascii_serialization()).ok_or(missing)
}

/// Address of the page that made a request, without a path.
fn page(request: &HttpRequest) -> Option<Url> {
    url_in(request.headers(), &header::ORIGIN)
}

fn url_in(headers: &HeaderMap, name: &HeaderName) -> Option<Url> {
    headers.get(name).and_then(|url| url.to_str().ok()).and_then(|url| Url::parse(url).ok())
}

fn is_plain_loopback(url: &Url) -> bool {
    url.scheme() == "http" && is_loopback(url)
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
    /// [`ApiError::SessionRefused`] for plain HTTP to another host, where the cookie would travel in the
    /// clear, or through a proxy, where it would not be accepted.
    pub fn of(request: &HttpRequest) -> Result<Self, ApiError> {
        match page(request) {
            Some(url) if is_plain_loopback(&url) && is_loopback_request(request) => Ok(Self::Loopback),
            Some(url) if url.scheme() == "http" => Err(ApiError::SessionRefused(
                "sign in over HTTPS: over plain HTTP, sessions exist only on a loopback address such as 127.0.0.1, and without a proxy",
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

    /// Builds the header that sets the cookie of an attempt to sign in.
    pub fn set_login(self, attempt: &SecretString) -> String {
        let attributes = format!("Path=/; HttpOnly; SameSite=Lax; Max-Age={LOGIN_SECONDS}");
        match self {
            Self::Secure => format!("{SECURE_LOGIN}={}; Secure; {attributes}", attempt.expose_secret()),
            Self::Loopback => format!("{LOOPBACK_LOGIN}={}; {attributes}", attempt.expose_secret()),
        }
    }

    /// Builds the header that removes the cookie of an attempt to sign in.
    pub const fn remove_login(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Secure => "__Host-regcred-login=; Secure; Path=/; HttpOnly; SameSite=Lax; Max-Age=0",
            Self::Loopback => "regcred-login=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0",
        })
    }
}

#[cfg(test)]
mod tests {
    use actix_web::{HttpMessage, test::TestRequest};
    use rstest::rstest;

    use super::*;
    use crate::domain::proxies::Proxies;

    /// A page of the console that was loaded directly.
    const PAGE: (&str, &str) = ("Referer", "http://127.0.0.1:8080/console/");

    /// A request, as the edge passes it on.
    fn request(peer: &str, proxies: &str, headers: &[(&'static str, &str)]) -> HttpRequest {
        let request = TestRequest::default().peer_addr(format!("{peer}:4711").parse().unwrap());
        let request = headers.iter().fold(request, |request, &header| request.insert_header(header)).to_http_request();
        let proxies = Proxies { trusted: proxies.parse().unwrap(), ..Proxies::default() };
        let meta = RequestMeta::new(&request, &proxies);
        request.extensions_mut().insert(meta);
        request
    }

    #[rstest]
    #[case::direct("127.0.0.1", "", &[PAGE], true)]
    #[case::port_that_docker_publishes("172.17.0.1", "", &[PAGE], true)]
    #[case::own_page("127.0.0.1", "", &[("Origin", "http://127.0.0.1:8080")], true)]
    #[case::no_page("127.0.0.1", "", &[], false)]
    #[case::silent_proxy("172.17.0.1", "", &[("Referer", "https://regcred.example.com/console/")], false)]
    #[case::silent_proxy_on_this_host("127.0.0.1", "", &[("Referer", "https://regcred.example.com/console/")], false)]
    #[case::origin_precedes("127.0.0.1", "", &[PAGE, ("Origin", "https://regcred.example.com")], false)]
    #[case::page_behind_a_proxy("127.0.0.1", "", &[("Origin", "https://regcred.example.com")], false)]
    #[case::page_without_origin("127.0.0.1", "", &[("Origin", "null")], false)]
    #[case::plain_page_elsewhere("127.0.0.1", "", &[("Origin", "http://regcred.example.com")], false)]
    #[case::configured_proxy("127.0.0.1", "10.0.0.1", &[PAGE], false)]
    #[case::forwarded("127.0.0.1", "", &[PAGE, ("X-Forwarded-For", "203.0.113.7")], false)]
    #[case::forwarded_by_the_standard("127.0.0.1", "", &[PAGE, ("Forwarded", "for=203.0.113.7")], false)]
    #[case::via("127.0.0.1", "", &[PAGE, ("Via", "1.1 proxy")], false)]
    #[case::public_peer("203.0.113.7", "", &[PAGE], false)]
    fn cookie_without_prefix_needs_a_direct_request(
        #[case] peer: &str,
        #[case] proxies: &str,
        #[case] more: &[(&'static str, &str)],
        #[case] accepted: bool,
    ) {
        let cookies = "regcred=one; regcred-login=two";
        let own = [("Host", "127.0.0.1:8080"), ("Cookie", cookies)];
        let request = request(peer, proxies, &[&own[..], more].concat());
        assert_eq!(token(&request), accepted.then_some("one"));
        assert_eq!(login_token(&request, Transport::Loopback), accepted.then_some("two"));
    }

    #[rstest]
    #[case(Transport::Secure, Some("one"))]
    #[case(Transport::Loopback, Some("two"))]
    fn cookie_of_an_attempt_is_that_of_the_page(#[case] transport: Transport, #[case] expected: Option<&str>) {
        let cookies = [("Cookie", "__Host-regcred-login=one; regcred-login=two"), ("Host", "127.0.0.1:8080"), PAGE];
        let request = request("127.0.0.1", "", &cookies);
        assert_eq!(login_token(&request, transport), expected);
        let without_prefix = self::request("127.0.0.1", "", &[("Cookie", "regcred-login=two"), cookies[1], PAGE]);
        assert_eq!(login_token(&without_prefix, Transport::Secure), None);
    }

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
        let request = request("127.0.0.1", "", &[("Host", host), ("Cookie", cookie), PAGE]);
        assert_eq!(token(&request), expected);
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
    fn cookie_of_an_attempt_is_lax_and_ends_soon() {
        let attempt = SecretString::from("one");
        assert_eq!(
            Transport::Secure.set_login(&attempt),
            "__Host-regcred-login=one; Secure; Path=/; HttpOnly; SameSite=Lax; Max-Age=600"
        );
        assert_eq!(
            Transport::Loopback.set_login(&attempt),
            "regcred-login=one; Path=/; HttpOnly; SameSite=Lax; Max-Age=600"
        );
        for transport in [Transport::Secure, Transport::Loopback] {
            let (set, removed) = (transport.set_login(&attempt), transport.remove_login());
            let name = set.split('=').next().unwrap();
            assert!(removed.to_str().unwrap().starts_with(&format!("{name}=;")));
        }
    }

    #[rstest]
    #[case(Some("https://regcred.example.com"), Some("https://regcred.example.com"))]
    #[case(Some("http://127.0.0.1:8080"), Some("http://127.0.0.1:8080"))]
    #[case(Some("null"), None)]
    #[case(None, None)]
    fn origin_is_stated_by_the_browser(#[case] origin: Option<&str>, #[case] expected: Option<&str>) {
        let mut request = TestRequest::default();
        if let Some(origin) = origin {
            request = request.insert_header(("Origin", origin));
        }
        assert_eq!(own_origin(&request.to_http_request()).ok().as_deref(), expected);
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
        let headers = [("Host", "127.0.0.1:8080"), ("Origin", origin)];
        assert_eq!(Transport::of(&request("127.0.0.1", "", &headers)).ok(), expected);
        let behind_a_proxy = Transport::of(&request("127.0.0.1", "10.0.0.1", &headers)).ok();
        assert_eq!(behind_a_proxy, expected.filter(|transport| *transport == Transport::Secure));
    }
}
