//! The registry client against real registries: htpasswd, token services, certificates.

use std::net::SocketAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use regcred::domain::verification::VerificationResult::{self, *};
use rstest::rstest;

use super::{
    attacks,
    certificates::{Ca, self_signed},
    listening::{answer, bearer, serve},
    registries::{Attempt, LATEST, Setup, TAGGED, TestRegistry, registry_client},
    token_service::{
        Deviations,
        Quirk::{self, OmitsSubject, RefusesAnonymous, RefusesScopes, UsesAccessToken},
        TokenService,
    },
};
use crate::support::files::TempDir;

const PASSWORD: &str = "canary-password";

#[rstest]
#[case::right("martin", "xxx1", None, Valid)]
#[case::right_tagged("martin", "xxx1", Some(TAGGED), Valid)]
#[case::right_latest("martin", "xxx1", Some(LATEST), Valid)]
#[case::wrong_password("martin", "xxx2", None, Invalid)]
#[case::wrong_user("unknown", "xxx1", None, Invalid)]
#[case::wrong_with_repository("martin", "xxx2", Some(TAGGED), Invalid)]
#[case::no_such_repository("martin", "xxx1", Some("os/nothing"), NoAccess)]
#[tokio::test]
async fn htpasswd_registry_tells_valid_from_invalid_logins(
    #[case] username: &str,
    #[case] password: &str,
    #[case] repository: Option<&str>,
    #[case] result: VerificationResult,
) {
    let registry = TestRegistry::start(Setup { users: &[("martin", "xxx1")], ..Setup::default() }).await;
    let found = Attempt::plain(&registry.address, username, password).verify(&registry_client(), repository).await;
    assert_eq!(found.result, result, "{found:?}\n{}", registry.log());
}

#[tokio::test]
async fn open_registry_leaves_the_password_unverified() {
    let registry = TestRegistry::start(Setup::default()).await;
    let attempt = Attempt::plain(&registry.address, "martin", PASSWORD);
    for repository in [None, Some(TAGGED), Some(LATEST)] {
        let found = attempt.verify(&registry_client(), repository).await;
        assert_eq!(found.result, Anonymous, "{found:?}");
    }
    assert_eq!(attempt.verify(&registry_client(), Some("os/nothing")).await.result, NoAccess);
}

/// Starts a real registry and a token service with these deviations.
async fn with_tokens(deviations: Deviations) -> (TestRegistry, TokenService, TempDir) {
    let service = TokenService::start(deviations);
    let folder = TempDir::new();
    let certificate = service.write_certificate(folder.path());
    let setup = Setup { token_service: Some((service.realm(), certificate)), ..Setup::default() };
    (TestRegistry::start(setup).await, service, folder)
}

const STANDARD: Deviations = Deviations { get_is: None, post_is: None, quirk: None };

/// One deviation.
fn with(quirk: Quirk) -> Deviations {
    Deviations { quirk: Some(quirk), ..STANDARD }
}

#[rstest]
#[case::right(STANDARD, "martin", None, Valid)]
#[case::right_tagged(STANDARD, "martin", Some(TAGGED), Valid)]
#[case::right_public(STANDARD, "martin", Some(LATEST), Valid)]
#[case::no_right(STANDARD, "lena", Some(TAGGED), NoAccess)]
#[case::no_right_but_a_login(STANDARD, "lena", None, Valid)]
#[case::no_right_reported_by_the_service(with(RefusesScopes), "lena", Some(TAGGED), NoAccess)]
#[case::wrong_where_scopes_are_refused(with(RefusesScopes), "wrong", Some(TAGGED), Invalid)]
#[case::wrong(STANDARD, "wrong", None, Invalid)]
#[case::wrong_with_repository(STANDARD, "wrong", Some(TAGGED), Invalid)]
#[case::expired_says_400(STANDARD, "old", None, Invalid)]
#[case::expired_says_400_with_repository(STANDARD, "old", Some(TAGGED), Invalid)]
#[case::expired_gets_an_empty_token(STANDARD, "harbor", Some(TAGGED), Invalid)]
#[case::expired_gets_an_anonymous_token(STANDARD, "harbor", None, Anonymous)]
#[case::expired_where_anonymous_is_refused(with(RefusesAnonymous), "harbor", Some(TAGGED), Invalid)]
#[case::expired_reads_a_public_repository(STANDARD, "harbor", Some(LATEST), Anonymous)]
#[case::anonymous_is_refused(with(RefusesAnonymous), "martin", None, Valid)]
#[case::tokens_without_subject(with(OmitsSubject), "martin", Some(TAGGED), Valid)]
#[case::tokens_without_subject_for_a_login(with(OmitsSubject), "martin", None, Anonymous)]
#[case::tokens_without_subject_in_public(with(OmitsSubject), "lena", Some(LATEST), Anonymous)]
#[case::tokens_without_subject_or_grant(with(OmitsSubject), "lena", Some(TAGGED), NoAccess)]
#[case::token_in_another_field(with(UsesAccessToken), "martin", Some(TAGGED), Valid)]
#[case::only_post(Deviations { get_is: Some("405 Method Not Allowed"), ..STANDARD }, "martin", Some(TAGGED), Valid)]
#[case::only_post_404(Deviations { get_is: Some("404 Not Found"), ..STANDARD }, "martin", None, Valid)]
#[case::only_post_wrong(Deviations { get_is: Some("405 Method Not Allowed"), ..STANDARD }, "wrong", None, Invalid)]
#[case::neither(Deviations { get_is: Some("404 Not Found"), post_is: Some("404 Not Found"), ..STANDARD }, "martin", None, NotARegistry)]
#[case::identity_token(STANDARD, "<token>", Some(TAGGED), Valid)]
#[case::identity_token_without_post(Deviations { post_is: Some("404 Not Found"), ..STANDARD }, "<token>", Some(TAGGED), Valid)]
#[case::identity_token_without_either(Deviations { post_is: Some("405 Method Not Allowed"), get_is: Some("405 Method Not Allowed"), ..STANDARD }, "<token>", None, NotARegistry)]
#[case::unavailable_service(Deviations { get_is: Some("503 Service Unavailable"), ..STANDARD }, "martin", None, Unreachable)]
#[case::service_answers_400_to_every_request(Deviations { get_is: Some("400 Bad Request"), ..STANDARD }, "martin", None, NotARegistry)]
#[case::redirecting_service(Deviations { get_is: Some("302 Found"), ..STANDARD }, "martin", None, NotARegistry)]
#[case::service_without_tokens(Deviations { get_is: Some("200 OK"), ..STANDARD }, "martin", None, NotARegistry)]
#[case::rate_limiting_service(Deviations { get_is: Some("429 Too Many Requests"), ..STANDARD }, "martin", None, RateLimited)]
#[tokio::test]
async fn token_service_tells_valid_from_invalid_logins(
    #[case] deviations: Deviations,
    #[case] username: &str,
    #[case] repository: Option<&str>,
    #[case] result: VerificationResult,
) {
    let (registry, service, _folder) = with_tokens(deviations).await;
    let password = if username == "<token>" { "canary-identity" } else { PASSWORD };
    let found = Attempt::plain(&registry.address, username, password).verify(&registry_client(), repository).await;
    let log = registry.log();
    assert_eq!(found.result, result, "{found:?}\n{}\n{log}", service.requests.text());
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[tokio::test]
async fn login_is_sent_to_the_token_service_not_to_the_registry() {
    let (registry, service, _folder) = with_tokens(Deviations::default()).await;
    let (front, seen) = serve(move |request| {
        assert!(!request.contains("authorization: Basic"), "{request}");
        if request.contains("authorization: Bearer") { answer("200 OK", &[], "{}") } else { bearer(&service.realm()) }
    });
    let found = Attempt::plain(&front, "martin", PASSWORD).verify(&registry_client(), None).await;
    assert_eq!(found.result, Valid, "{found:?} {}", registry.log());
    assert!(!seen.text().contains(PASSWORD) && seen.count() == 2);
}

#[tokio::test]
async fn private_ca_of_the_account_is_trusted() {
    let ca = Ca::new();
    let users: &[(&str, &str)] = &[("martin", "xxx1")];
    let registry = TestRegistry::start(Setup { users, tls: Some(&ca.certify()), ..Setup::default() }).await;
    for (ca, result, words) in [
        (Some(ca.pem.as_str()), Valid, "accepts this login"),
        (None, TlsError, "set caCertificate"),
        (Some(Ca::new().pem.as_str()), TlsError, "signed neither by caCertificate"),
    ] {
        let found =
            Attempt::tls(&registry.address, ca, "martin", "xxx1").verify(&registry_client(), Some(TAGGED)).await;
        assert!(found.result == result && found.detail.contains(words), "{found:?}");
    }
    assert_eq!(
        Attempt::tls(&registry.address, Some(&ca.pem), "martin", "no").verify(&registry_client(), None).await.result,
        Invalid
    );
}

#[tokio::test]
async fn certificate_failure_is_explained() {
    let ca = Ca::new();
    let (alone, alone_as_ca) = (self_signed(false), self_signed(true));
    for (certificate, trusted, result, words) in [
        (ca.certify_expired(), Some(ca.pem.clone()), TlsError, "has expired"),
        (ca.certify_future(), Some(ca.pem.clone()), TlsError, "not valid yet"),
        (ca.certify_other(), Some(ca.pem.clone()), TlsError, "is not valid for its host name"),
        (self_signed(false), None, TlsError, "set caCertificate"),
        (self_signed(true), None, TlsError, "certificate"),
        (alone_as_ca, None, TlsError, "certificate"),
    ] {
        let registry = TestRegistry::start(Setup { tls: Some(&certificate), ..Setup::default() }).await;
        let attempt = Attempt::tls(&registry.address, trusted.as_deref(), "martin", PASSWORD);
        let found = attempt.verify(&registry_client(), None).await;
        assert!(found.result == result && found.detail.contains(words), "{found:?}");
    }
    // A self-signed certificate is trusted if it is given as CA.
    let registry = TestRegistry::start(Setup { tls: Some(&alone), ..Setup::default() }).await;
    let found =
        Attempt::tls(&registry.address, Some(&alone.certificate), "a", "b").verify(&registry_client(), None).await;
    assert_eq!(found.result, Anonymous, "{found:?}");
}

#[tokio::test]
async fn mixing_up_plain_http_and_tls_is_reported() {
    let ca = Ca::new();
    let tls = TestRegistry::start(Setup { tls: Some(&ca.certify()), ..Setup::default() }).await;
    let found = Attempt::plain(&tls.address, "martin", PASSWORD).verify(&registry_client(), None).await;
    assert!(found.result == TlsError && found.detail.contains("set the account's plainHttp to false"), "{found:?}");

    let plain = TestRegistry::start(Setup::default()).await;
    let found = Attempt::tls(&plain.address, Some(&ca.pem), "martin", PASSWORD).verify(&registry_client(), None).await;
    assert!(found.result == TlsError && found.detail.contains("set plainHttp"), "{found:?}");
}

#[tokio::test]
async fn registry_with_tls_cannot_redirect_the_login_to_plain_http() {
    let (ca, service) = (Ca::new(), TokenService::start(Deviations::default()));
    let folder = TempDir::new();
    let certificate = service.write_certificate(folder.path());
    let setup = Setup { token_service: Some((service.realm(), certificate)), tls: Some(&ca.certify()), users: &[] };
    let registry = TestRegistry::start(setup).await;
    let found =
        Attempt::tls(&registry.address, Some(&ca.pem), "martin", PASSWORD).verify(&registry_client(), None).await;
    assert!(found.result == Refused && found.detail.contains("plainHttp"), "{found:?}");
    assert_eq!(service.requests.count(), 0);
}

#[rstest]
#[case::web_site(answer("200 OK", &[("Content-Type", "text/html")], "<html>canary-upstream</html>"), NotARegistry)]
#[case::no_v2(answer("404 Not Found", &[], "canary-upstream"), NotARegistry)]
#[case::teapot(answer("418 I'm a teapot", &[], "canary-upstream"), NotARegistry)]
#[case::firewall(answer("403 Forbidden", &[], "canary-upstream"), NoAccess)]
#[case::broken(answer("500 Internal Server Error", &[], "canary-upstream"), Unreachable)]
#[case::no_challenge(answer("401 Unauthorized", &[], "canary-upstream"), NotARegistry)]
#[case::other_challenge(answer("401 Unauthorized", &[("WWW-Authenticate", "Negotiate")], ""), NotARegistry)]
#[case::basic_for_all(answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=\"canary-upstream\"")], ""), Invalid)]
#[case::not_http(b"SSH-2.0-canary-upstream\r\n".to_vec(), Unreachable)]
#[case::nothing(Vec::new(), Unreachable)]
#[case::bad_request(answer("400 Bad Request", &[], "canary-upstream"), NotARegistry)]
#[tokio::test]
async fn server_that_is_not_a_registry_is_recognized(#[case] response: Vec<u8>, #[case] result: VerificationResult) {
    let (address, _) = serve(move |_| response.clone());
    let found = Attempt::plain(&address, "martin", PASSWORD).verify(&registry_client(), None).await;
    assert_eq!(found.result, result, "{found:?}");
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[rstest]
#[case::expired_by_400("400 Bad Request", "canary-upstream", Invalid)]
#[case::expired_by_403("403 Forbidden", "Your authorization token has expired: canary-upstream", Invalid)]
#[case::no_rights("403 Forbidden", "canary-upstream", NoAccess)]
#[tokio::test]
async fn unusual_refusals_of_a_login_are_recognized(
    #[case] status: &'static str,
    #[case] body: &'static str,
    #[case] result: VerificationResult,
) {
    let (address, _) = serve(move |request| {
        if request.contains("authorization: Basic") {
            answer(status, &[], body)
        } else {
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "")
        }
    });
    let found = Attempt::plain(&address, "martin", PASSWORD).verify(&registry_client(), None).await;
    assert_eq!(found.result, result, "{found:?}");
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[tokio::test]
async fn rate_limited_host_is_not_called_again() {
    let (address, requests) = serve(|_| answer("429 Too Many Requests", &[("Retry-After", "120")], "canary-upstream"));
    let (client, attempt) = (registry_client(), Attempt::plain(&address, "martin", PASSWORD));
    for _ in 0..3 {
        let found = attempt.verify(&client, None).await;
        assert_eq!(found.result, RateLimited, "{found:?}");
        assert!(found.retry_after.is_some_and(|wait| (60..=120).contains(&wait.as_secs())), "{found:?}");
    }
    assert_eq!(requests.count(), 1);
}

#[tokio::test]
async fn exhausted_pull_limit_stops_further_checks() {
    let (address, requests) = serve(|request| {
        let is_head = request.starts_with("HEAD");
        match (request.contains("authorization: Basic"), is_head) {
            (true, true) => {
                answer("200 OK", &[("ratelimit-limit", "100;w=21600"), ("RateLimit-Remaining", "0;w=21600")], "")
            }
            (true, false) => answer("200 OK", &[], "{}"),
            _ => answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], ""),
        }
    });
    let (client, attempt) = (registry_client(), Attempt::plain(&address, "martin", PASSWORD));
    assert_eq!(attempt.verify(&client, Some(TAGGED)).await.result, Valid);
    let sent = requests.count();
    assert_eq!(attempt.verify(&client, Some(TAGGED)).await.result, RateLimited);
    assert_eq!(requests.count(), sent);
}

/// Registry with a token service on the same host. `challenge` has the placeholder `REALM`. Opaque
/// tokens are issued to the login `martin`/[`PASSWORD`] and to anonymous clients, and open
/// everything.
fn serve_opaque_tokens(challenge: &'static str) -> SocketAddr {
    let login = format!("authorization: Basic {}", BASE64_STANDARD.encode(format!("martin:{PASSWORD}")));
    let (address, _) = serve(move |request| {
        let host = request.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or_default();
        match () {
            () if request.starts_with("GET /token") && request.contains(&login) => {
                answer("200 OK", &[], r#"{"token":"opaque-of-martin"}"#)
            }
            () if request.starts_with("GET /token") && request.contains("authorization:") => {
                answer("403 Forbidden", &[], r#"{"errors":[{"code":"DENIED","message":"denied"}]}"#)
            }
            () if request.starts_with("GET /token") => answer("200 OK", &[], r#"{"token":"opaque"}"#),
            () if request.contains("authorization: Bearer opaque") => answer("200 OK", &[], "{}"),
            () => {
                let challenge = challenge.replace("REALM", &format!("http://{host}/token"));
                answer("401 Unauthorized", &[("WWW-Authenticate", &challenge)], "")
            }
        }
    });
    address
}

#[rstest]
#[case::right("ghcr.io", PASSWORD, None, Valid)]
#[case::right_for_a_public_repository("ghcr.io", PASSWORD, Some(LATEST), Valid)]
#[case::wrong("ghcr.io", "wrong", None, Invalid)]
#[case::wrong_for_a_public_repository("ghcr.io", "wrong", Some(LATEST), Invalid)]
// Another service might issue an anonymous token for a wrong login.
#[case::right_elsewhere("registry.example", PASSWORD, None, Anonymous)]
#[tokio::test]
async fn service_known_to_refuse_wrong_logins_confirms_right_ones(
    #[case] host: &str,
    #[case] password: &str,
    #[case] repository: Option<&str>,
    #[case] result: VerificationResult,
) {
    let address = serve_opaque_tokens(r#"Bearer realm="REALM",service="s""#);
    let registry = format!("{host}:{}", address.port());
    let found = Attempt::plain(&registry, "martin", password).verify(&attacks::client(), repository).await;
    assert_eq!(found.result, result, "{found:?}");
}

#[tokio::test]
async fn bearer_is_preferred_to_basic() {
    let address = serve_opaque_tokens(r#"Basic realm="x", Bearer realm="REALM",service="s""#);
    for (password, result) in [(PASSWORD, Valid), ("wrong", Invalid)] {
        let registry = format!("ghcr.io:{}", address.port());
        let found = Attempt::plain(&registry, "martin", password).verify(&attacks::client(), None).await;
        assert_eq!(found.result, result, "{found:?}");
    }
}
