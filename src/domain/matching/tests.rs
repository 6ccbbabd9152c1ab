use proptest::{prelude::*, sample::subsequence};
use rstest::rstest;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};

use super::*;
use crate::domain::{
    docker_config::{Credential, RenderedConfig, ScopedAccount, WarningCode, parse::Config, render},
    registry::RegistryScope,
};

fn image(written: &str) -> ImageName {
    ImageName::parse(written).unwrap()
}

fn finds(consumer: Consumer, key: &str, written: &str) -> bool {
    !look_up(consumer, &[key], Form::DockerConfigJson, &image(written)).order.is_empty()
}

/// Consumers that find Docker Hub under a key, for `docker.io/library/nginx`: kubelet, k8schain,
/// podman, docker CLI.
#[rstest]
#[case("https://index.docker.io/v1/", "YYYY")]
#[case("index.docker.io", "YYY-")]
#[case("docker.io", "Y-Y-")]
#[case("https://docker.io", "Y-Y-")]
#[case("https://index.docker.io/v2/", "YYY-")]
#[case("https://index.docker.io/v1", "--Y-")]
#[case("index.docker.io/v1", "----")]
#[case("registry-1.docker.io", "--Y-")]
#[case("hub.docker.com", "----")]
#[case("registry.hub.docker.com", "----")]
#[case("docker.io/library", "Y-Y-")]
#[case("https://index.docker.io/v1/library", "-YY-")]
fn consumers_find_docker_hub_under_different_keys(#[case] key: &str, #[case] expected: &str) {
    let consumers = [Consumer::Kubernetes, Consumer::K8schain, Consumer::Podman, Consumer::Docker];
    let found: String =
        consumers.map(|consumer| if finds(consumer, key, "nginx") { 'Y' } else { '-' }).into_iter().collect();
    assert_eq!(found, expected);
}

fn explain(accounts: &[(&str, &str)], written: &str) -> Explanation {
    let scopes: Vec<_> = accounts.iter().map(|(name, scope)| (*name, RegistryScope::parse(scope).unwrap())).collect();
    let accounts: Vec<_> = scopes.iter().map(|(name, scope)| ScopedAccount { name, scope }).collect();
    explain_accounts(&accounts, &image(written))
}

fn explain_document(document: &Value, written: &str) -> Explanation {
    let config = Config::parse(document.to_string().as_bytes()).unwrap();
    explain_config(&config, &image(written))
}

/// Mismatches of the nearest entries, in the order of [`Consumer::ALL`].
fn nearest_to(key: &str, written: &str) -> [Option<Mismatch>; 5] {
    let explanation = explain_document(&json!({"auths": {key: {"auth": "dTpw"}}}), written);
    Consumer::ALL.map(|consumer| {
        let look_up = explanation.consumers.get(consumer);
        assert_eq!(look_up.nearest.is_empty(), !look_up.keys.is_empty(), "{consumer}: {look_up:?}");
        look_up.nearest.first().map(|nearest| nearest.mismatch)
    })
}

#[test]
fn two_ports_of_one_host_are_two_accounts() {
    let accounts = [("martin-5000", "registry.example.com:5000"), ("martin-6000", "registry.example.com:6000")];
    let explanation = explain(&accounts, "registry.example.com:5000/os/alpine:3");
    assert_eq!(explanation.image, "registry.example.com:5000/os/alpine");
    assert_eq!(explanation.warnings, []);
    for consumer in Consumer::ALL {
        let look_up = explanation.consumers.get(consumer);
        assert_eq!(look_up.keys, ["registry.example.com:5000"], "{consumer}");
        assert_eq!(look_up.accounts, ["martin-5000"], "{consumer}");
    }
}

#[test]
fn explanation_serializes_as_in_the_api() {
    let answer = serde_json::to_value(explain(
        &[("martin-5000", "registry.example.com:5000")],
        "registry.example.com:5000/os/alpine:3",
    ))
    .unwrap();
    assert_eq!(answer["consumers"]["kubernetes"]["keys"], json!(["registry.example.com:5000"]));
    assert_eq!(answer["consumers"]["docker"]["accounts"], json!(["martin-5000"]));
    assert_eq!(answer["consumers"]["podman"]["nearest"], json!([]));
    assert_eq!(answer["consumers"]["dockerAuthConfig"]["ambiguous"], json!(false));
    assert_eq!(answer["warnings"], json!([]));

    let answer = serde_json::to_value(explain(
        &[("martin-6000", "registry.example.com:6000")],
        "registry.example.com:5000/os/alpine",
    ))
    .unwrap();
    assert_eq!(
        answer["consumers"]["podman"],
        json!({"verdict": {
            "sentence": "podman uses no entry for `registry.example.com:5000/os/alpine`; the nearest is \
                         `registry.example.com:6000`: the entry has port 6000, the image has port 5000",
            "usable": false,
            "key": null,
            "account": null,
        }, "keys": [], "accounts": [], "ambiguous": false, "helper": null, "problem": null, "nearest": [{
            "key": "registry.example.com:6000",
            "account": "martin-6000",
            "mismatch": "portDiffers",
            "detail": "the entry has port 6000, the image has port 5000",
        }]})
    );
}

#[test]
fn kubelet_tries_all_paths_and_podman_only_the_longest() {
    let explanation =
        explain(&[("all", "reg.io"), ("team", "reg.io/team"), ("app", "reg.io/team/app")], "reg.io/team/app");
    assert_eq!(explanation.consumers.kubernetes.accounts, ["app", "team", "all"]);
    assert_eq!(explanation.consumers.k8schain.accounts, ["app"]);
    assert_eq!(explanation.consumers.podman.accounts, ["app"]);
    let problem = explanation.consumers.docker.problem.as_deref().unwrap();
    assert!(problem.contains("matches only hosts"), "{problem}");
}

#[test]
fn password_for_unintended_images_gives_a_warning() {
    let warned = |written| explain(&[("foo", "reg.io/foo")], written).warnings;
    assert_eq!(warned("reg.io/foo/x"), []);
    let same_prefix = warned("reg.io/foobar/x");
    let codes: Vec<_> =
        same_prefix.iter().map(|warning| (warning.code, warning.key.as_deref(), warning.account.as_deref())).collect();
    let expected = |key| (WarningCode::MatchesMore, Some(key), Some("foo"));
    assert_eq!(codes, [expected("reg.io/foo"), expected("reg.io")]);
    assert!(same_prefix[0].detail.contains("the kubelet"), "{same_prefix:?}");
    assert!(same_prefix[1].detail.contains("the docker CLI"), "{same_prefix:?}");
}

/// Columns in the order of [`Consumer::ALL`]: kubelet, k8schain, docker CLI, `DOCKER_AUTH_CONFIG`,
/// podman. `-` if the entry is used, else the mismatch: Case, Spelling, Port, `/` path, `1` label,
/// `*` unsupported, Host.
#[rstest]
#[case::port("reg.io:6000", "reg.io:5000/app", "PPPPP")]
#[case::no_port("reg.io", "reg.io:443/app", "PPPPP")]
#[case::case_of_letters("Reg.io", "reg.io/app", "CCCCC")]
#[case::path("reg.io/foo", "reg.io/bar/app", "//-//")]
#[case::labels("*.reg.io", "a.b.reg.io/app", "11***")]
#[case::no_label("*.reg.io", "reg.io/app", "11***")]
#[case::wildcard("*.reg.io", "a.reg.io/app", "--***")]
#[case::wildcard_and_port("*.reg.io:80", "a.reg.io/app", "PP***")]
#[case::hub("registry.hub.docker.com", "nginx", "SSSSS")]
#[case::hub_by_its_name("docker.io", "nginx", "-SSS-")]
#[case::hub_and_path("registry.hub.docker.com/acme", "nginx", "/////")]
#[case::slash("reg.io/foo/", "reg.io/foo/app", "---SS")]
#[case::ipv6("[::1]", "[::1]/app", "SS---")]
#[case::sibling("mirror.reg.io", "images.reg.io/app", "HHHHH")]
fn nearest_entry_has_its_mismatch(#[case] key: &str, #[case] written: &str, #[case] expected: &str) {
    let letters = nearest_to(key, written).map(|mismatch| match mismatch {
        None => '-',
        Some(Mismatch::CaseDiffers) => 'C',
        Some(Mismatch::SpellingUnknown) => 'S',
        Some(Mismatch::PortDiffers) => 'P',
        Some(Mismatch::PathNotPrefix) => '/',
        Some(Mismatch::GlobOneLabel) => '1',
        Some(Mismatch::NoWildcards) => '*',
        Some(Mismatch::HostDiffers) => 'H',
    });
    assert_eq!(letters.into_iter().collect::<String>(), expected);
}

#[test]
fn unrelated_entries_are_not_near() {
    let explanation = explain(&[("x", "quay.io"), ("y", "example.com"), ("z", "localhost")], "reg.io/app");
    let LookUp { keys, nearest, .. } = explanation.consumers.kubernetes;
    assert_eq!((keys, nearest), (Vec::new(), Vec::new()));
}

#[test]
fn nearest_entries_are_sorted_and_limited() {
    let accounts = [
        ("a", "reg.io:1"),
        ("b", "reg.io:2"),
        ("c", "reg.io/x"),
        ("d", "reg.io:3"),
        ("e", "quay.io"),
        ("f", "reg.io/app/s"),
    ];
    let nearest = explain(&accounts, "reg.io/app").consumers.podman.nearest;
    let names: Vec<_> = nearest.iter().map(|nearest| nearest.account.as_deref().unwrap()).collect();
    assert_eq!(names, ["a", "b", "d"]);
}

#[rstest]
#[case("nginx", "https://index.docker.io/v1/")]
#[case("acme/app", "docker.io/acme")]
fn detail_names_the_correct_key(#[case] written: &str, #[case] key: &str) {
    let wrong = if written == "nginx" { "hub.docker.com" } else { "hub.docker.com/acme" };
    let explanation = explain_document(&json!({"auths": {wrong: {"auth": "dTpw"}}}), written);
    let detail = &explanation.consumers.kubernetes.nearest[0].detail;
    assert!(detail.contains(&format!("write `{key}`")), "{detail}");
}

#[test]
fn helper_takes_precedence_over_entries() {
    let document = json!({
        "auths": {"reg.io": {"auth": "dTpw"}, "https://index.docker.io/v1/": {}},
        "credHelpers": {"reg.io": "regtool"},
        "credsStore": "desktop",
    });
    let explanation = explain_document(&document, "reg.io/app");
    assert_eq!(explanation.consumers.kubernetes.keys, ["reg.io"]);
    assert_eq!(explanation.consumers.docker.helper.as_deref(), Some("regtool"));
    assert_eq!(explanation.consumers.podman.helper.as_deref(), Some("regtool"));
    let problem = explanation.consumers.docker_auth_config.problem.as_deref().unwrap();
    assert!(problem.contains("`credHelpers`"), "{problem}");
    assert_eq!(explanation.warnings[0].code, WarningCode::HelperFirst);

    let explanation = explain_document(&document, "nginx");
    assert_eq!(explanation.consumers.docker.helper.as_deref(), Some("desktop"));
    assert_eq!(explanation.consumers.podman.helper, None);
    let problem = explanation.consumers.podman.problem.as_deref().unwrap();
    assert!(problem.contains("it is empty"), "{problem}");
}

#[test]
fn invalid_entry_breaks_all_consumers_but_podman() {
    let document = json!({"auths": {"reg.io": {"auth": "dTpw"}, "quay.io": {"auth": "!"}}});
    let explanation = explain_document(&document, "reg.io/app");
    for consumer in [Consumer::Kubernetes, Consumer::K8schain, Consumer::Docker, Consumer::DockerAuthConfig] {
        let look_up = explanation.consumers.get(consumer);
        let problem = look_up.problem.as_deref().unwrap();
        assert!(look_up.keys.is_empty() && problem.contains("because of the entry `quay.io`"), "{look_up:?}");
    }
    assert_eq!(explanation.consumers.podman.keys, ["reg.io"]);
    assert_eq!(explanation.consumers.podman.problem, None);
}

#[test]
fn k8schain_fails_on_a_key_that_the_kubelet_skips() {
    let explanation =
        explain_document(&json!({"auths": {"reg.io": {"auth": "dTpw"}, "qu ay.io": {"auth": "dTpw"}}}), "reg.io/app");
    assert_eq!(explanation.consumers.kubernetes.keys, ["reg.io"]);
    let problem = explanation.consumers.k8schain.problem.as_deref().unwrap();
    assert!(problem.contains("its key is not a URL"), "{problem}");
}

#[test]
fn entry_without_usable_credential_is_still_found() {
    let explanation = explain_document(&json!({"auths": {"reg.io": {"username": "u", "password": "p"}}}), "reg.io/app");
    assert_eq!(explanation.consumers.podman.keys, ["reg.io"]);
    let problem = explanation.consumers.podman.problem.as_deref().unwrap();
    assert!(problem.contains("reads `auth` only"), "{problem}");
    assert_eq!(explanation.consumers.docker.problem, None);
}

#[test]
fn docker_cli_does_not_read_the_legacy_format() {
    let explanation = explain_document(&json!({"reg.io": {"auth": "dTpw"}}), "reg.io/app");
    assert_eq!(explanation.consumers.kubernetes.keys, ["reg.io"]);
    assert_eq!(explanation.consumers.podman.keys, ["reg.io"]);
    let problem = explanation.consumers.docker.problem.as_deref().unwrap();
    assert!(problem.contains("legacy format"), "{problem}");
}

#[test]
fn random_choice_is_reported_as_ambiguous() {
    let document = json!({"auths": {"reg.io/a": {"auth": "YTpw"}, "reg.io/b": {"auth": "Yjpw"}}});
    let docker = explain_document(&document, "reg.io/c/app").consumers.docker;
    assert_eq!((docker.keys, docker.ambiguous), (vec!["reg.io/a".to_owned(), "reg.io/b".to_owned()], true));
}

#[test]
fn random_order_of_the_kubelet_is_reported_as_ambiguous() {
    for (keys, image) in
        [(["index.docker.io/", "http://index.docker.io/v2/"], "acme/app"), (["reg.io", "https://reg.io"], "reg.io/app")]
    {
        let auths: serde_json::Map<_, _> =
            keys.iter().map(|key| ((*key).to_owned(), json!({"auth": "YTpw"}))).collect();
        let kubernetes = explain_document(&json!({"auths": auths}), image).consumers.kubernetes;
        assert_eq!((kubernetes.keys.len(), kubernetes.ambiguous), (2, true), "{keys:?}");
    }
}

#[test]
fn host_without_dot_is_an_organization_of_docker_hub() {
    for (written, is_mistaken) in
        [("harbor/app", true), ("harbor/team/app", true), ("other/app", false), ("reg.io/harbor/app", false)]
    {
        let of_account = explain(&[("mine", "harbor")], written);
        let of_document = explain_document(&json!({"auths": {"harbor": {"auth": "YTpw"}}}), written);
        for (explanation, account) in [(of_account, Some("mine".to_owned())), (of_document, None)] {
            let warnings: Vec<_> = explanation.warnings.into_iter().map(|one| (one.code, one.account)).collect();
            let expected = if is_mistaken { vec![(WarningCode::NeverMatches, account)] } else { Vec::new() };
            assert_eq!(warnings, expected, "{written}");
            assert_eq!(explanation.consumers.kubernetes.keys, [""; 0]);
        }
    }
}

#[test]
fn password_in_a_key_is_redacted() {
    let document = json!({"auths": {"https://me:CANARY@reg.io": {"auth": "!"}, "https://me:CANARY@reg.io:80": {}}});
    for written in ["reg.io/app", "reg.io:90/app"] {
        let explanation = explain_document(&document, written);
        let config = Config::parse(document.to_string().as_bytes()).unwrap();
        let shown = format!("{} {explanation:?} {:?}", json!(explanation), lint::lint_config(&config));
        assert!(!shown.contains("CANARY"), "{shown}");
    }
}

/// Independent, simple model of the consumers, for rendered documents.
mod model {
    use super::*;

    /// Passwords that a consumer sends for `name`, in order.
    pub(super) fn passwords(consumer: Consumer, document: &str, name: &str) -> Vec<String> {
        let document: Value = serde_json::from_str(document).unwrap();
        let auths = document["auths"].as_object().unwrap();
        let keys: Vec<&str> = auths.keys().map(String::as_str).collect();
        let found = match consumer {
            Consumer::Kubernetes => kubelet(&keys, name),
            Consumer::K8schain => {
                let hub = name.strip_prefix("docker.io/").map(|rest| format!("index.docker.io/{rest}"));
                prefixes(&keys, &hub.unwrap_or(name.to_owned())).into_iter().take(1).collect()
            }
            Consumer::Docker | Consumer::DockerAuthConfig => docker(&keys, name),
            Consumer::Podman => podman(&keys, name),
        };
        found.iter().map(|key| password(&auths[*key])).collect()
    }

    fn password(entry: &Value) -> String {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let decoded = STANDARD.decode(entry["auth"].as_str().unwrap()).unwrap();
        String::from_utf8(decoded).unwrap().split_once(':').unwrap().1.to_owned()
    }

    fn host(name: &str) -> &str {
        name.split_once('/').unwrap().0
    }

    fn kubelet<'a>(keys: &[&'a str], name: &str) -> Vec<&'a str> {
        let mut found = prefixes(keys, name);
        if found.is_empty() && !host(name).replace("docker.io", "").contains(['.', ':']) {
            found = keys.iter().copied().filter(|key| *key == "https://index.docker.io/v1/").collect();
        }
        found
    }

    /// Rendered keys have no wildcards and one slot each, so hosts must be equal and paths are
    /// plain prefixes.
    fn prefixes<'a>(keys: &[&'a str], name: &str) -> Vec<&'a str> {
        let slot = |key: &str| {
            if key == "https://index.docker.io/v1/" { "index.docker.io".to_owned() } else { key.to_owned() }
        };
        let mut found: Vec<_> = keys
            .iter()
            .copied()
            .filter(|key| name.starts_with(&slot(key)) && host(&(slot(key) + "/")) == host(name))
            .collect();
        found.sort_by_key(|key| std::cmp::Reverse(slot(key)));
        found
    }

    fn docker<'a>(keys: &[&'a str], name: &str) -> Vec<&'a str> {
        let server = if host(name) == "docker.io" { "https://index.docker.io/v1/" } else { host(name) };
        keys.iter().copied().filter(|key| *key == server).collect()
    }

    fn podman<'a>(keys: &[&'a str], name: &str) -> Vec<&'a str> {
        let mut parents: Vec<_> = name.match_indices('/').map(|(at, _)| &name[..at]).chain([name]).rev().collect();
        if host(name) == "docker.io" {
            parents.push("https://index.docker.io/v1/");
        }
        parents.iter().find_map(|parent| keys.iter().copied().find(|key| key == parent)).into_iter().collect()
    }
}

fn any_scopes() -> impl Strategy<Value = Vec<&'static str>> {
    subsequence(SCOPES.to_vec(), 0..=SCOPES.len())
}

const SCOPES: [&str; 14] = [
    "docker.io",
    "docker.io/a",
    "docker.io/a/b",
    "docker.io/library",
    "reg.io",
    "reg.io/a",
    "reg.io/a/b",
    "reg.io/ab",
    "reg.io/a-b",
    "reg.io:5000",
    "reg.io:5000/a",
    "localhost",
    "localhost:5000",
    "10.0.0.1",
];

fn rendered(consumer: Consumer, accounts: &[(&str, RegistryScope)]) -> Option<RenderedConfig> {
    let passwords: Vec<_> = accounts.iter().map(|(name, _)| SecretString::from(format!("pw of {name}"))).collect();
    let credentials: Vec<_> = accounts
        .iter()
        .zip(&passwords)
        .map(|((account, scope), password)| Credential { account, scope, username: "u", password, email: None })
        .collect();
    render(consumer.profile(), &credentials).ok()
}

fn any_image() -> impl Strategy<Value = String> {
    let registry = prop_oneof![
        Just(""),
        Just("docker.io/"),
        Just("reg.io/"),
        Just("reg.io:5000/"),
        Just("localhost/"),
        Just("localhost:5000/"),
        Just("10.0.0.1/")
    ];
    (registry, "(a|b|ab|a-b|library)(/(a|b|ab|c)){0,3}(:[a-z]{1,3})?")
        .prop_map(|(registry, rest)| format!("{registry}{rest}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn explain_agrees_with_the_model_on_rendered_documents(chosen in any_scopes(), written in any_image()) {
        let accounts: Vec<_> = chosen.iter().map(|scope| (*scope, RegistryScope::parse(scope).unwrap())).collect();
        let explanation = explain(&chosen.iter().map(|scope| (*scope, *scope)).collect::<Vec<_>>(), &written);
        for consumer in Consumer::ALL {
            let explained = explanation.consumers.get(consumer);
            let Some(rendered) = rendered(consumer, &accounts) else {
                prop_assert!(explained.problem.is_some());
                continue;
            };
            let expected: Vec<_> = explained.accounts.iter().map(|name| format!("pw of {name}")).collect();
            let sent = model::passwords(consumer, rendered.document.expose_secret(), &explanation.image);
            prop_assert_eq!(sent, expected, "{} of {}", consumer, explanation.image);
        }
    }

    #[test]
    fn account_is_used_for_images_that_it_covers(chosen in any_scopes(), written in any_image()) {
        let explanation = explain(&chosen.iter().map(|scope| (*scope, *scope)).collect::<Vec<_>>(), &written);
        let covering: Vec<_> = chosen.iter().copied().filter(|scope| {
            explanation.image == *scope || explanation.image.starts_with(&format!("{scope}/"))
        }).collect();
        let narrowest = covering.iter().max_by_key(|scope| scope.len());
        let podman = &explanation.consumers.podman.accounts;
        prop_assert_eq!(podman.first().map(String::as_str), narrowest.copied());
        let kubelet = &explanation.consumers.kubernetes.accounts;
        prop_assert!(covering.iter().all(|scope| kubelet.iter().any(|name| name == scope)));
    }

    #[test]
    fn arbitrary_documents_and_images_are_explained(
        keys in proptest::collection::vec(".{0,40}|[a-zA-Z0-9*:/.@%\\[\\]#?-]{0,20}", 0..8),
        auth in "[A-Za-z0-9+/=]*",
        written in ".*|[a-zA-Z0-9:/.@\\[\\]-]{1,30}",
    ) {
        let entries: serde_json::Map<_, _> = keys.into_iter().map(|key| (key, json!({"auth": auth}))).collect();
        let config = Config::parse(json!({"auths": entries}).to_string().as_bytes()).unwrap();
        let _ = lint::lint_config(&config);
        for written in [written.as_str(), "reg.io/app", "nginx"] {
            if let Ok(image) = ImageName::parse(written) {
                let _ = explain_config(&config, &image);
            }
        }
    }
}
