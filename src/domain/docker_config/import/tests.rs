use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::prelude::*;
use rstest::rstest;
use secrecy::ExposeSecret;
use serde_json::json;

use super::*;
use crate::domain::docker_config::{Credential, Profile, render};

fn import(document: &str) -> Import {
    Import::of(&Config::parse(document.as_bytes()).unwrap())
}

/// Outcome of each item: the account as `scope user password`, or the reason.
fn outcomes(document: &str) -> Vec<(String, String)> {
    let shown = |item: ImportItem| match item.outcome {
        ImportOutcome::Found(found) => {
            let scheme = if found.plain_http { "http://" } else { "" };
            (item.key, format!("{scheme}{} {} {}", found.scope, found.username, found.password.expose_secret()))
        }
        ImportOutcome::Skipped { reason, .. } => (item.key, json!(reason).as_str().unwrap().to_owned()),
    };
    import(document).items.into_iter().map(shown).collect()
}

fn auths(entries: &str) -> Vec<(String, String)> {
    outcomes(&format!("{{\"auths\":{{{entries}}}}}"))
}

fn pair(key: &str, outcome: &str) -> (String, String) {
    (key.to_owned(), outcome.to_owned())
}

#[test]
fn every_entry_is_imported_and_headers_are_reported() {
    let document = r#"{"auths":{"daocloud.io":{"auth":"bWFydGluOnB3MQ=="},"https://index.docker.io/v1/":{"auth":"bWFydGluOnB3Mg=="},
        "registry.example.com:5000":{"auth":"bWFydGluOnB3Mw=="}},"HttpHeaders":{"User-Agent":"Docker-Client/17.09.0-ce (linux)"}}"#;
    assert_eq!(
        outcomes(document),
        [
            pair("daocloud.io", "daocloud.io martin pw1"),
            pair("https://index.docker.io/v1/", "docker.io martin pw2"),
            pair("registry.example.com:5000", "registry.example.com:5000 martin pw3"),
            pair("HttpHeaders", "HttpHeaders"),
        ]
    );
}

#[rstest]
#[case::auth_wins(r#"{"username":"x","password":"y","auth":"dTpw"}"#, "reg.io u p")]
#[case::user_and_password(r#"{"username":"u","password":"p","email":"e"}"#, "reg.io u p")]
#[case::unpadded(r#"{"auth":"dXU6cA"}"#, "reg.io uu p")]
#[case::first_colon(r#"{"auth":"dTpwOnA="}"#, "reg.io u p:p")]
#[case::nul_stripped(r#"{"auth":"dTpwAAA="}"#, "reg.io u p")]
#[case::nul_in_the_password(r#"{"password":"p\u0000\u0000","auth":"dTpwAAA="}"#, "reg.io u p\0\0")]
#[case::auth_beside_a_token(r#"{"auth":"dTpw","identitytoken":"t"}"#, "reg.io u p")]
#[case::identity_token(r#"{"identitytoken":"t"}"#, "identitytoken")]
#[case::identity_token_with_its_user(r#"{"auth":"dTo=","identitytoken":"t"}"#, "identitytoken")]
#[case::registry_token(r#"{"registrytoken":"t"}"#, "registrytoken")]
#[case::empty("{}", "empty")]
#[case::null("null", "empty")]
#[case::no_user(r#"{"auth":"OnA="}"#, "empty")]
#[case::no_password(r#"{"username":"u"}"#, "empty")]
#[case::colon_in_the_user(r#"{"username":"u:v","password":"p"}"#, "invalidEntry")]
#[case::no_colon(r#"{"auth":"dXNlcg=="}"#, "invalidEntry")]
#[case::no_base64(r#"{"auth":"!"}"#, "invalidEntry")]
#[case::no_utf8(r#"{"auth":"dTr/"}"#, "invalidEntry")]
#[case::no_text(r#"{"auth":1}"#, "invalidEntry")]
#[case::no_object("\"dTpw\"", "invalidEntry")]
fn entry_is_read_as_consumers_do(#[case] entry: &str, #[case] expected: &str) {
    assert_eq!(auths(&format!("\"reg.io\":{entry}")), [pair("reg.io", expected)]);
}

#[rstest]
#[case("https://reg.io/v2/", "https://reg.io/v2/", "reg.io u p")]
#[case("http://reg.io:5000", "http://reg.io:5000", "http://reg.io:5000 u p")]
#[case("reg.io/team/", "reg.io/team/", "reg.io/team u p")]
#[case("registry.hub.docker.com", "registry.hub.docker.com", "docker.io u p")]
#[case("*.reg.io", "*.reg.io", "invalidRegistry")]
#[case("https://me:secret@reg.io", "…@reg.io", "invalidRegistry")]
#[case("", "", "invalidRegistry")]
fn key_becomes_a_scope(#[case] key: &str, #[case] shown: &str, #[case] expected: &str) {
    assert_eq!(auths(&format!("\"{key}\":{{\"auth\":\"dTpw\"}}")), [pair(shown, expected)]);
}

#[test]
fn credentials_of_helpers_are_reported() {
    let document = r#"{"auths":{"https://index.docker.io/v1/":{},"gcr.io":{},"reg.io":{"auth":"dTpw"}},
        "credsStore":"desktop","credHelpers":{"gcr.io":"gcloud","ghcr.io":"gh"},"currentContext":"x"}"#;
    assert_eq!(
        outcomes(document),
        [
            pair("https://index.docker.io/v1/", "credsStore"),
            pair("gcr.io", "credHelpers"),
            pair("reg.io", "reg.io u p"),
            pair("gcr.io", "credHelpers"),
            pair("ghcr.io", "credHelpers"),
            pair("credsStore", "credsStore"),
            pair("currentContext", "notACredential"),
        ]
    );
}

#[test]
fn two_keys_of_one_registry_are_reported() {
    assert_eq!(
        auths(
            r#""docker.io":{"auth":"dTpw"},"https://index.docker.io/v1/":{"auth":"dTpx"},"index.docker.io":{"auth":"dTpx"}"#
        ),
        [
            pair("docker.io", "conflict"),
            pair("https://index.docker.io/v1/", "docker.io u q"),
            pair("index.docker.io", "duplicate")
        ]
    );
    assert_eq!(
        auths(
            r#""docker.io":{"auth":"dTpw"},"index.docker.io":{"auth":"dTpw"},"https://index.docker.io/v1/":{"auth":"dTpx"}"#
        ),
        [
            pair("docker.io", "conflict"),
            pair("index.docker.io", "conflict"),
            pair("https://index.docker.io/v1/", "docker.io u q")
        ]
    );
    assert_eq!(
        auths(r#""https://reg.io":{"auth":"dTpw"},"http://reg.io":{"auth":"dTpw"}"#),
        [pair("https://reg.io", "reg.io u p"), pair("http://reg.io", "conflict")]
    );
}

#[test]
fn ignored_fields_of_an_entry_are_reported() {
    let document =
        r#"{"auths":{"reg.io":{"auth":"dTpw","identitytoken":"t","registrytoken":"","serveraddress":"reg.io"}}}"#;
    let item = import(document).items.remove(0);
    let ImportOutcome::Found(found) = item.outcome else { panic!("{item:?}") };
    assert_eq!(found.left_out, ["identitytoken", "serveraddress"]);
}

#[test]
fn debug_omits_passwords() {
    let shown = format!("{:?}", import(r#"{"auths":{"reg.io":{"auth":"dTpzZWNyZXQ="}}}"#));
    assert!(!shown.contains("secret") && !shown.contains("dTpz"), "{shown}");
}

proptest! {
    #[test]
    fn import_reverses_render(
        username in "[^:]+",
        password in any::<String>().prop_filter("not empty", |p| !p.is_empty()),
        email in proptest::option::of("[^@]+@[a-z]+"),
        as_base64 in any::<bool>(),
    ) {
        let scopes = ["reg.io:5000/team", "docker.io", "docker.io/acme", "reg.io"];
        let scopes = scopes.map(|scope| RegistryScope::parse(scope).unwrap());
        let secret = SecretString::from(password.as_str());
        for profile in Profile::ALL {
            for scope in &scopes {
                let email = email.as_deref();
                let credential = Credential { account: "x", scope, username: &username, password: &secret, email };
                let Ok(rendered) = render(profile, &[credential]) else { continue };
                let document = rendered.document.expose_secret();
                let given = if as_base64 { STANDARD.encode(document) } else { document.to_owned() };
                let mut import = import(&given);
                let item = import.items.remove(0);
                let ImportOutcome::Found(found) = item.outcome else { panic!("{item:?}") };
                prop_assert!(import.items.is_empty());
                prop_assert_eq!(&found.username, &username);
                prop_assert_eq!(found.password.expose_secret(), &password);
                let is_full = matches!(profile, Profile::Kubernetes | Profile::Dockercfg);
                prop_assert_eq!(found.email.as_deref(), email.filter(|_| is_full));
                prop_assert_eq!(found.scope.authority(), scope.authority());
            }
        }
    }

    #[test]
    fn arbitrary_documents_are_imported(
        key in ".*",
        username in proptest::option::of(".*"),
        auth in proptest::option::of("[A-Za-z0-9+/]*={0,2}"),
        store in ".*",
    ) {
        let document = json!({"auths": {key: {"username": username, "auth": auth}}, "credsStore": store});
        let _ = import(&document.to_string());
    }
}
