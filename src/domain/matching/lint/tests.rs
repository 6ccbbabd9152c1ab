use rstest::rstest;
use serde_json::json;

use super::*;
use crate::domain::{
    docker_config::{WarningCode, parse::Config},
    registry::RegistryScope,
};

fn lint(document: &str) -> Vec<(WarningCode, Option<String>)> {
    let config = Config::parse(document.as_bytes()).unwrap();
    lint_config(&config).into_iter().map(|warning| (warning.code, warning.key)).collect()
}

fn of_key(key: &str) -> Vec<Warning> {
    let config = Config::parse(json!({"auths": {key: {"auth": "dTpw"}}}).to_string().as_bytes()).unwrap();
    lint_config(&config)
}

#[rstest]
#[case("reg.io")]
#[case("reg.io:5000")]
#[case("https://reg.io")]
#[case("https://reg.io/v2/")]
#[case("https://index.docker.io/v1/")]
fn valid_key_gives_no_warning(#[case] key: &str) {
    assert_eq!(of_key(key), []);
}

#[rstest]
#[case("registry.hub.docker.com", WarningCode::NeverMatches, "write `https://index.docker.io/v1/`")]
#[case("hub.docker.com", WarningCode::NeverMatches, "write `https://index.docker.io/v1/`")]
#[case("index.docker.io/v1", WarningCode::NeverMatches, "write `https://index.docker.io/v1/`")]
#[case("Reg.io", WarningCode::NeverMatches, "write `reg.io`")]
#[case("docker.io", WarningCode::MissedBySome, "not used by k8schain and the docker CLI:")]
#[case("registry-1.docker.io", WarningCode::MissedBySome, "not used by the kubelet, k8schain and the docker CLI:")]
#[case(
    "*.reg.io",
    WarningCode::MissedBySome,
    "not used by the docker CLI and podman: the docker CLI supports `*` only in its newest releases"
)]
#[case("[::1]", WarningCode::MissedBySome, "an IPv6 address only with its port")]
#[case("reg.io/v2", WarningCode::MissedBySome, "not used by the kubelet, k8schain and podman:")]
#[case("reg.io:http", WarningCode::InvalidKey, "a number between 1 and 65535")]
#[case("reg .io", WarningCode::InvalidKey, "white space")]
#[case("", WarningCode::InvalidKey, "a registry is required")]
fn key_that_is_not_found_gives_a_warning(#[case] key: &str, #[case] code: WarningCode, #[case] reason: &str) {
    let warnings = of_key(key);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0].code, code, "{warnings:?}");
    assert!(warnings[0].detail.contains(reason), "{warnings:?}");
}

#[rstest]
#[case(
    "reg.io/foo",
    "used by the kubelet and k8schain also for names with the same prefix, such as `reg.io/foox/app`; used by the docker CLI for every image of `reg.io`"
)]
#[case(
    "https://reg.io/foo",
    "used by the kubelet and k8schain also for names with the same prefix, such as `reg.io/foox/app`; used by the docker CLI and podman for every image of `reg.io`"
)]
#[case("reg.io/foo/", "used by the docker CLI for every image of `reg.io`")]
fn key_that_matches_more_gives_a_warning(#[case] key: &str, #[case] detail: &str) {
    let warnings = of_key(key);
    let more = warnings.iter().find(|warning| warning.code == WarningCode::MatchesMore).unwrap();
    assert_eq!(more.detail, detail);
}

#[rstest]
#[case::bad_auth(r#"{"auths":{"reg.io":{"auth":"!"}}}"#, WarningCode::Refused)]
#[case::empty(r#"{"auths":{"reg.io":{}}}"#, WarningCode::HoldsNothing)]
#[case::no_auth(r#"{"auths":{"reg.io":{"username":"u","password":"p"}}}"#, WarningCode::HoldsNothing)]
#[case::stale(r#"{"auths":{"reg.io":{"username":"u","password":"old","auth":"dTpw"}}}"#, WarningCode::AuthWins)]
#[case::one_slot(r#"{"auths":{"reg.io":{"auth":"dTpw"},"https://reg.io":{"auth":"dTpx"}}}"#, WarningCode::Ambiguous)]
fn entry_gives_a_warning(#[case] document: &str, #[case] code: WarningCode) {
    let warnings = lint(document);
    assert!(warnings.iter().any(|(found, key)| *found == code && key.is_some()), "{warnings:?}");
}

#[rstest]
#[case::store(r#"{"auths":{},"credsStore":"desktop"}"#, WarningCode::HelperFirst)]
#[case::helpers(r#"{"auths":{},"credHelpers":{"reg.io":"x"}}"#, WarningCode::HelperFirst)]
#[case::opaque("kind: Secret\ntype: Opaque\ndata:\n  .dockerconfigjson: e30=\n", WarningCode::WrongSecretType)]
fn document_gives_a_warning(#[case] document: &str, #[case] code: WarningCode) {
    assert_eq!(lint(document), [(code, None)]);
}

#[rstest]
#[case::docker(r#"{"reg.io/a":{"auth":"dTpw"},"reg.io/b":{"auth":"dTpw"}}"#, "the docker CLI")]
#[case::podman(r#"{"http://reg.io/a":{"auth":"dTpw"},"https://reg.io/b":{"auth":"dTpw"}}"#, "podman")]
#[case::podman_hub(
    r#"{"registry-1.docker.io":{"auth":"dTpw"},"https://index.docker.io/v1/":{"auth":"dTpw"}}"#,
    "podman"
)]
#[case::k8schain(r#"{"docker.io":{"auth":"dTpw"},"https://docker.io":{"auth":"dTpw"}}"#, "k8schain")]
fn random_choice_gives_a_warning(#[case] auths: &str, #[case] consumer: &str) {
    let config = Config::parse(format!("{{\"auths\":{auths}}}").as_bytes()).unwrap();
    let warnings = lint_config(&config);
    let ambiguous = |warning: &Warning| warning.code == WarningCode::Ambiguous && warning.detail.starts_with(consumer);
    assert!(warnings.iter().any(ambiguous), "{warnings:?}");
}

#[test]
fn exact_key_is_not_ambiguous() {
    let warnings =
        lint(r#"{"auths":{"reg.io":{"auth":"dTpw"},"reg.io/a":{"auth":"dTpw"},"reg.io/b":{"auth":"dTpw"}}}"#);
    assert!(warnings.iter().all(|(code, _)| *code != WarningCode::Ambiguous), "{warnings:?}");
}

#[rstest]
#[case("reg.io", &[])]
#[case("docker.io", &[])]
#[case("reg.io/team", &[WarningCode::MatchesMore])]
#[case("docker.io/acme", &[WarningCode::MissedBySome, WarningCode::MatchesMore])]
#[case("[::1]", &[WarningCode::MissedBySome])]
#[case("harbor", &[WarningCode::NeverMatches])]
#[case("harbor/team", &[WarningCode::NeverMatches])]
#[case("harbor:5000", &[])]
#[case("harbor.local", &[])]
#[case("localhost", &[])]
fn new_account_gives_warnings(#[case] scope: &str, #[case] expected: &[WarningCode]) {
    let scope = RegistryScope::parse(scope).unwrap();
    let warnings = lint_account(ScopedAccount { name: "x", scope: &scope });
    assert!(warnings.iter().all(|warning| warning.account.as_deref() == Some("x")));
    assert_eq!(warnings.iter().map(|warning| warning.code).collect::<Vec<_>>(), expected);
}
