//! The engine against real registries: htpasswd, token services, certificates.

use regcred::domain::verification::VerificationResult::{self, *};
use rstest::rstest;

use super::{
    certificates::{Ca, self_signed},
    listening::{answer, bearer, serve},
    registries::{Attempt, LATEST, Setup, TAGGED, TestRegistry, engine},
    token_service::{
        Habits,
        Quirk::{self, CallsItAccessToken, NamesNobody, RefusesAnybody, RefusesScopes},
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
#[case::wrong_user("nobody", "xxx1", None, Invalid)]
#[case::wrong_with_repository("martin", "xxx2", Some(TAGGED), Invalid)]
#[case::no_such_repository("martin", "xxx1", Some("os/nothing"), NoAccess)]
#[tokio::test]
async fn a_registry_with_htpasswd_tells_right_from_wrong(
    #[case] username: &str,
    #[case] password: &str,
    #[case] repository: Option<&str>,
    #[case] result: VerificationResult,
) {
    let registry = TestRegistry::start(Setup { users: &[("martin", "xxx1")], ..Setup::default() }).await;
    let found = Attempt::plain(&registry.address, username, password).verify(&engine(), repository).await;
    assert_eq!(found.result, result, "{found:?}\n{}", registry.log());
}

#[tokio::test]
async fn a_registry_without_logins_says_nothing_of_the_password() {
    let registry = TestRegistry::start(Setup::default()).await;
    let attempt = Attempt::plain(&registry.address, "martin", PASSWORD);
    for repository in [None, Some(TAGGED), Some(LATEST)] {
        let found = attempt.verify(&engine(), repository).await;
        assert_eq!(found.result, Anonymous, "{found:?}");
    }
    assert_eq!(attempt.verify(&engine(), Some("os/nothing")).await.result, NoAccess);
}

/// A real registry that takes the tokens of a service with these habits.
async fn with_tokens(habits: Habits) -> (TestRegistry, TokenService, TempDir) {
    let service = TokenService::start(habits);
    let folder = TempDir::new();
    let certificate = service.write_certificate(folder.path());
    let setup = Setup { token_service: Some((service.realm(), certificate)), ..Setup::default() };
    (TestRegistry::start(setup).await, service, folder)
}

const USUAL: Habits = Habits { get_is: None, post_is: None, quirk: None };

/// The usual habits but one.
fn with(quirk: Quirk) -> Habits {
    Habits { quirk: Some(quirk), ..USUAL }
}

#[rstest]
#[case::right(USUAL, "martin", None, Valid)]
#[case::right_tagged(USUAL, "martin", Some(TAGGED), Valid)]
#[case::right_public(USUAL, "martin", Some(LATEST), Valid)]
#[case::no_right(USUAL, "lena", Some(TAGGED), NoAccess)]
#[case::no_right_but_a_login(USUAL, "lena", None, Valid)]
#[case::no_right_said_by_the_service(with(RefusesScopes), "lena", Some(TAGGED), NoAccess)]
#[case::wrong_where_scopes_are_refused(with(RefusesScopes), "wrong", Some(TAGGED), Invalid)]
#[case::wrong(USUAL, "wrong", None, Invalid)]
#[case::wrong_with_repository(USUAL, "wrong", Some(TAGGED), Invalid)]
#[case::expired_says_400(USUAL, "old", None, Invalid)]
#[case::expired_says_400_with_repository(USUAL, "old", Some(TAGGED), Invalid)]
#[case::expired_gets_an_empty_token(USUAL, "harbor", Some(TAGGED), Invalid)]
#[case::expired_gets_anybodys_token(USUAL, "harbor", None, Anonymous)]
#[case::expired_is_not_anybody(with(RefusesAnybody), "harbor", Some(TAGGED), Invalid)]
#[case::expired_reads_what_is_public(USUAL, "harbor", Some(LATEST), Anonymous)]
#[case::anybody_is_refused(with(RefusesAnybody), "martin", None, Valid)]
#[case::tokens_tell_nothing(with(NamesNobody), "martin", Some(TAGGED), Valid)]
#[case::tokens_tell_nothing_of_a_login(with(NamesNobody), "martin", None, Anonymous)]
#[case::tokens_tell_nothing_in_public(with(NamesNobody), "lena", Some(LATEST), Anonymous)]
#[case::tokens_tell_nothing_and_grant_nothing(with(NamesNobody), "lena", Some(TAGGED), NoAccess)]
#[case::other_name_of_the_token(with(CallsItAccessToken), "martin", Some(TAGGED), Valid)]
#[case::only_post(Habits { get_is: Some("405 Method Not Allowed"), ..USUAL }, "martin", Some(TAGGED), Valid)]
#[case::only_post_404(Habits { get_is: Some("404 Not Found"), ..USUAL }, "martin", None, Valid)]
#[case::only_post_wrong(Habits { get_is: Some("405 Method Not Allowed"), ..USUAL }, "wrong", None, Invalid)]
#[case::neither(Habits { get_is: Some("404 Not Found"), post_is: Some("404 Not Found"), ..USUAL }, "martin", None, NotARegistry)]
#[case::identity_token(USUAL, "<token>", Some(TAGGED), Valid)]
#[case::identity_token_without_post(Habits { post_is: Some("404 Not Found"), ..USUAL }, "<token>", Some(TAGGED), Valid)]
#[case::identity_token_without_either(Habits { post_is: Some("405 Method Not Allowed"), get_is: Some("405 Method Not Allowed"), ..USUAL }, "<token>", None, NotARegistry)]
#[case::a_service_that_is_ill(Habits { get_is: Some("503 Service Unavailable"), ..USUAL }, "martin", None, Unreachable)]
#[case::a_service_that_answers_400_to_all(Habits { get_is: Some("400 Bad Request"), ..USUAL }, "martin", None, NotARegistry)]
#[case::a_service_that_redirects(Habits { get_is: Some("302 Found"), ..USUAL }, "martin", None, NotARegistry)]
#[case::a_service_without_tokens(Habits { get_is: Some("200 OK"), ..USUAL }, "martin", None, NotARegistry)]
#[case::a_busy_service(Habits { get_is: Some("429 Too Many Requests"), ..USUAL }, "martin", None, RateLimited)]
#[tokio::test]
async fn a_registry_with_a_token_service_tells_right_from_wrong(
    #[case] habits: Habits,
    #[case] username: &str,
    #[case] repository: Option<&str>,
    #[case] result: VerificationResult,
) {
    let (registry, service, _folder) = with_tokens(habits).await;
    let password = if username == "<token>" { "canary-identity" } else { PASSWORD };
    let found = Attempt::plain(&registry.address, username, password).verify(&engine(), repository).await;
    let log = registry.log();
    assert_eq!(found.result, result, "{found:?}\n{}\n{log}", service.requests.text());
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[tokio::test]
async fn a_login_goes_to_the_token_service_and_not_to_the_registry() {
    let (registry, service, _folder) = with_tokens(Habits::default()).await;
    let (front, seen) = serve(move |request| {
        assert!(!request.contains("authorization: Basic"), "{request}");
        if request.contains("authorization: Bearer") { answer("200 OK", &[], "{}") } else { bearer(&service.realm()) }
    });
    let found = Attempt::plain(&front, "martin", PASSWORD).verify(&engine(), None).await;
    assert_eq!(found.result, Valid, "{found:?} {}", registry.log());
    assert!(!seen.text().contains(PASSWORD) && seen.count() == 2);
}

#[tokio::test]
async fn a_private_ca_is_trusted_where_the_account_says_so() {
    let ca = Ca::new();
    let users: &[(&str, &str)] = &[("martin", "xxx1")];
    let registry = TestRegistry::start(Setup { users, tls: Some(&ca.certify()), ..Setup::default() }).await;
    for (ca, result, words) in [
        (Some(ca.pem.as_str()), Valid, "takes this login"),
        (None, TlsError, "give its caCertificate"),
        (Some(Ca::new().pem.as_str()), TlsError, "signed neither by caCertificate"),
    ] {
        let found = Attempt::tls(&registry.address, ca, "martin", "xxx1").verify(&engine(), Some(TAGGED)).await;
        assert!(found.result == result && found.detail.contains(words), "{found:?}");
    }
    assert_eq!(
        Attempt::tls(&registry.address, Some(&ca.pem), "martin", "no").verify(&engine(), None).await.result,
        Invalid
    );
}

#[tokio::test]
async fn certificates_that_do_not_verify_are_explained() {
    let ca = Ca::new();
    let (alone, alone_as_ca) = (self_signed(false), self_signed(true));
    for (certificate, trusted, result, words) in [
        (ca.certify_expired(), Some(ca.pem.clone()), TlsError, "has expired"),
        (ca.certify_future(), Some(ca.pem.clone()), TlsError, "not valid yet"),
        (ca.certify_other(), Some(ca.pem.clone()), TlsError, "not made out to its host name"),
        (self_signed(false), None, TlsError, "give its caCertificate"),
        (self_signed(true), None, TlsError, "certificate"),
        (alone_as_ca, None, TlsError, "certificate"),
    ] {
        let registry = TestRegistry::start(Setup { tls: Some(&certificate), ..Setup::default() }).await;
        let attempt = Attempt::tls(&registry.address, trusted.as_deref(), "martin", PASSWORD);
        let found = attempt.verify(&engine(), None).await;
        assert!(found.result == result && found.detail.contains(words), "{found:?}");
    }
    // A certificate that vouches for itself is trusted by being given.
    let registry = TestRegistry::start(Setup { tls: Some(&alone), ..Setup::default() }).await;
    let found = Attempt::tls(&registry.address, Some(&alone.certificate), "a", "b").verify(&engine(), None).await;
    assert_eq!(found.result, Anonymous, "{found:?}");
}

#[tokio::test]
async fn plain_http_and_tls_are_not_mixed_up() {
    let ca = Ca::new();
    let tls = TestRegistry::start(Setup { tls: Some(&ca.certify()), ..Setup::default() }).await;
    let found = Attempt::plain(&tls.address, "martin", PASSWORD).verify(&engine(), None).await;
    assert!(found.result == TlsError && found.detail.contains("plainHttp should be false"), "{found:?}");

    let plain = TestRegistry::start(Setup::default()).await;
    let found = Attempt::tls(&plain.address, Some(&ca.pem), "martin", PASSWORD).verify(&engine(), None).await;
    assert!(found.result == TlsError && found.detail.contains("set plainHttp"), "{found:?}");
}

#[tokio::test]
async fn a_registry_with_tls_cannot_have_the_login_sent_in_the_clear() {
    let (ca, service) = (Ca::new(), TokenService::start(Habits::default()));
    let folder = TempDir::new();
    let certificate = service.write_certificate(folder.path());
    let setup = Setup { token_service: Some((service.realm(), certificate)), tls: Some(&ca.certify()), users: &[] };
    let registry = TestRegistry::start(setup).await;
    let found = Attempt::tls(&registry.address, Some(&ca.pem), "martin", PASSWORD).verify(&engine(), None).await;
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
async fn what_is_no_registry_is_told_apart(#[case] says: Vec<u8>, #[case] result: VerificationResult) {
    let (address, _) = serve(move |_| says.clone());
    let found = Attempt::plain(&address, "martin", PASSWORD).verify(&engine(), None).await;
    assert_eq!(found.result, result, "{found:?}");
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[rstest]
#[case::expired_by_400("400 Bad Request", "canary-upstream", Invalid)]
#[case::expired_by_403("403 Forbidden", "Your authorization token has expired: canary-upstream", Invalid)]
#[case::no_rights("403 Forbidden", "canary-upstream", NoAccess)]
#[tokio::test]
async fn a_login_may_be_refused_in_other_words(
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
    let found = Attempt::plain(&address, "martin", PASSWORD).verify(&engine(), None).await;
    assert_eq!(found.result, result, "{found:?}");
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[tokio::test]
async fn a_host_that_asks_for_it_is_left_alone() {
    let (address, requests) = serve(|_| answer("429 Too Many Requests", &[("Retry-After", "120")], "canary-upstream"));
    let (engine, attempt) = (engine(), Attempt::plain(&address, "martin", PASSWORD));
    for _ in 0..3 {
        let found = attempt.verify(&engine, None).await;
        assert_eq!(found.result, RateLimited, "{found:?}");
        assert!(found.retry_after.is_some_and(|wait| (60..=120).contains(&wait.as_secs())), "{found:?}");
    }
    assert_eq!(requests.count(), 1);
}

#[tokio::test]
async fn a_budget_of_pulls_that_is_spent_is_not_overdrawn() {
    let (address, requests) = serve(|request| {
        let is_asked = request.starts_with("HEAD");
        match (request.contains("authorization: Basic"), is_asked) {
            (true, true) => {
                answer("200 OK", &[("ratelimit-limit", "100;w=21600"), ("RateLimit-Remaining", "0;w=21600")], "")
            }
            (true, false) => answer("200 OK", &[], "{}"),
            _ => answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], ""),
        }
    });
    let (engine, attempt) = (engine(), Attempt::plain(&address, "martin", PASSWORD));
    assert_eq!(attempt.verify(&engine, Some(TAGGED)).await.result, Valid);
    let asked = requests.count();
    assert_eq!(attempt.verify(&engine, Some(TAGGED)).await.result, RateLimited);
    assert_eq!(requests.count(), asked);
}
