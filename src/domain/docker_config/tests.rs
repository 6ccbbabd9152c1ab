use proptest::prelude::*;
use rstest::rstest;
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::*;

/// Name, scope, user and password of an account.
type Account = (&'static str, &'static str, &'static str, &'static str);

fn try_render(profile: Profile, accounts: &[Account]) -> Result<RenderedConfig, RenderError> {
    let opened: Vec<_> = accounts
        .iter()
        .map(|(name, scope, username, password)| {
            let scope = RegistryScope::parse(scope).unwrap();
            (*name, scope, *username, SecretString::from(*password))
        })
        .collect();
    let credentials: Vec<_> = opened
        .iter()
        .map(|(account, scope, username, password)| Credential { account, scope, username, password, email: None })
        .collect();
    render(profile, &credentials)
}

fn document(profile: Profile, accounts: &[Account]) -> Value {
    let rendered = try_render(profile, accounts).unwrap();
    serde_json::from_str(rendered.document.expose_secret()).unwrap()
}

const MARTIN_5000: Account = ("martin-5000", "registry.example.com:5000", "martin", "xxx1");
const MARTIN_6000: Account = ("martin-6000", "registry.example.com:6000", "martin", "xxx2");
const HUB: Account = ("hub", "docker.io", "bot", "pw");
const TEAM_A: Account = ("team-a", "reg.io/a", "a", "pw-a");
const TEAM_B: Account = ("team-b", "reg.io/b", "b", "pw-b");

#[test]
fn kubernetes_document_equals_kubectls_byte_for_byte() {
    let scope = RegistryScope::parse("registry.example.com:5000").unwrap();
    let password = SecretString::from("xxx1");
    let rendered = render(
        Profile::Kubernetes,
        &[Credential {
            account: "martin-5000",
            scope: &scope,
            username: "martin",
            password: &password,
            email: Some("dev@example.com"),
        }],
    )
    .unwrap();
    assert_eq!(
        rendered.document.expose_secret(),
        r#"{"auths":{"registry.example.com:5000":{"username":"martin","password":"xxx1","email":"dev@example.com","auth":"bWFydGluOnh4eDE="}}}"#
    );
    assert_eq!(rendered.keys, ["registry.example.com:5000"]);
    assert_eq!(rendered.warnings, []);
}

#[test]
fn document_is_sorted_by_key_in_any_order_of_accounts() {
    let forwards = try_render(Profile::Kubernetes, &[HUB, MARTIN_5000, MARTIN_6000]).unwrap();
    let backwards = try_render(Profile::Kubernetes, &[MARTIN_6000, MARTIN_5000, HUB]).unwrap();
    assert_eq!(
        forwards.keys,
        ["https://index.docker.io/v1/", "registry.example.com:5000", "registry.example.com:6000"]
    );
    assert_eq!(forwards.document.expose_secret(), backwards.document.expose_secret());
}

#[rstest]
#[case(Profile::Kubernetes, json!({"auths": {"reg.io/a": {"username": "a", "password": "pw-a", "auth": "YTpwdy1h"}}}))]
#[case(Profile::Dockercfg, json!({"reg.io/a": {"username": "a", "password": "pw-a", "auth": "YTpwdy1h"}}))]
#[case(Profile::Podman, json!({"auths": {"reg.io/a": {"auth": "YTpwdy1h"}}}))]
#[case(Profile::Docker, json!({"auths": {"reg.io": {"auth": "YTpwdy1h"}}}))]
#[case(Profile::DockerAuthConfig, json!({"auths": {"reg.io": {"auth": "YTpwdy1h"}}}))]
fn each_profile_has_the_key_and_fields_of_its_consumer(#[case] profile: Profile, #[case] expected: Value) {
    assert_eq!(document(profile, &[TEAM_A]), expected);
}

#[rstest]
#[case(Profile::Kubernetes, r#"{"auths":{}}"#)]
#[case(Profile::Dockercfg, "{}")]
#[case(Profile::Podman, r#"{"auths":{}}"#)]
fn no_account_renders_an_empty_document(#[case] profile: Profile, #[case] expected: &str) {
    let rendered = try_render(profile, &[]).unwrap();
    assert_eq!(rendered.document.expose_secret(), expected);
}

#[rstest]
fn docker_hub_has_one_key_in_every_profile(
    #[values(Profile::Kubernetes, Profile::Docker, Profile::DockerAuthConfig, Profile::Podman, Profile::Dockercfg)]
    profile: Profile,
) {
    assert_eq!(try_render(profile, &[HUB]).unwrap().keys, ["https://index.docker.io/v1/"]);
}

#[rstest]
#[case(Profile::Kubernetes, "docker.io/acme")]
#[case(Profile::Dockercfg, "docker.io/acme")]
#[case(Profile::Podman, "docker.io/acme")]
#[case(Profile::Docker, "https://index.docker.io/v1/")]
fn part_of_docker_hub_has_the_key_that_its_consumer_finds(#[case] profile: Profile, #[case] key: &str) {
    let acme = ("acme", "docker.io/acme", "bot", "pw");
    assert_eq!(try_render(profile, &[acme]).unwrap().keys, [key]);
}

#[test]
fn kubelet_gets_a_second_docker_hub_key_beside_a_part() {
    let acme = ("acme", "docker.io/acme", "bot", "pw");
    let keys = |profile| try_render(profile, &[HUB, acme]).unwrap().keys;
    for profile in [Profile::Kubernetes, Profile::Dockercfg] {
        assert_eq!(keys(profile), ["docker.io", "docker.io/acme", "https://index.docker.io/v1/"]);
    }
    assert_eq!(keys(Profile::Podman), ["docker.io/acme", "https://index.docker.io/v1/"]);
}

#[rstest]
fn two_accounts_for_one_key_are_refused_by_name(
    #[values(Profile::Kubernetes, Profile::Docker, Profile::Podman)] profile: Profile,
) {
    let other = ("a-second", "https://registry.example.com:5000/v2/", "other", "pw");
    assert_eq!(
        try_render(profile, &[MARTIN_5000, other]).unwrap_err(),
        RenderError::KeyCollision {
            key: "registry.example.com:5000".to_owned(),
            accounts: ["a-second".to_owned(), "martin-5000".to_owned()],
        }
    );
}

#[rstest]
#[case(TEAM_A, TEAM_B)]
#[case(TEAM_B, ("all", "reg.io", "w", "pw-w"))]
#[case(HUB, ("acme", "docker.io/acme", "bot", "pw"))]
fn docker_profiles_refuse_two_scopes_of_one_host(#[case] one: Account, #[case] other: Account) {
    for profile in [Profile::Docker, Profile::DockerAuthConfig] {
        let refusal = try_render(profile, &[one, other]).unwrap_err();
        let RenderError::Unsupported { accounts, detail } = refusal else { panic!("{refusal:?}") };
        assert_eq!(accounts.len(), 2);
        assert!(detail.contains("matches only hosts"), "{detail}");
    }
    for profile in [Profile::Kubernetes, Profile::Dockercfg, Profile::Podman] {
        try_render(profile, &[one, other]).unwrap();
    }
}

#[rstest]
#[case(Profile::Docker, &[TEAM_A], &[(WarningCode::MatchesMore, "reg.io")])]
#[case(Profile::DockerAuthConfig, &[TEAM_A], &[(WarningCode::MatchesMore, "reg.io")])]
#[case(Profile::Docker, &[MARTIN_5000], &[])]
#[case(Profile::Kubernetes, &[TEAM_A, TEAM_B], &[])]
#[case(Profile::Kubernetes, &[TEAM_A, ("ab", "reg.io/ab", "u", "p")], &[(WarningCode::MatchesMore, "reg.io/a")])]
#[case(Profile::Kubernetes, &[TEAM_A, ("below", "reg.io/a/b", "u", "p")], &[])]
#[case(Profile::Kubernetes, &[("all", "reg.io", "u", "p"), ("other", "reg.iot", "u", "p")], &[])]
#[case(Profile::Kubernetes, &[("v6", "[::1]", "u", "p")], &[(WarningCode::NeverMatches, "[::1]")])]
#[case(Profile::Kubernetes, &[("v6", "[::1]:5000", "u", "p")], &[])]
#[case(Profile::Podman, &[TEAM_A, ("ab", "reg.io/ab", "u", "p"), ("v6", "[::1]", "u", "p")], &[])]
fn deviations_of_a_consumer_give_warnings(
    #[case] profile: Profile,
    #[case] accounts: &[Account],
    #[case] expected: &[(WarningCode, &str)],
) {
    let warnings = try_render(profile, accounts).unwrap().warnings;
    let found: Vec<_> = warnings.iter().map(|warning| (warning.code, warning.key.as_deref().unwrap())).collect();
    assert_eq!(found, expected);
}

#[rstest]
#[case("", "pw", "no username")]
#[case("a:b", "pw", "colon")]
#[case("a", "", "no password")]
fn credentials_that_do_not_round_trip_are_refused(
    #[case] username: &'static str,
    #[case] password: &'static str,
    #[case] reason: &str,
) {
    for profile in Profile::ALL {
        let refusal = try_render(profile, &[("x", "reg.io", username, password)]).unwrap_err();
        assert!(refusal.to_string().contains(reason), "{refusal}");
    }
}

#[test]
fn nul_is_refused_for_consumers_that_strip_it() {
    for profile in Profile::ALL {
        let reads_back = matches!(profile, Profile::Kubernetes | Profile::Dockercfg);
        for password in ["\0pw", "pw\0"] {
            let rendered = try_render(profile, &[("x", "reg.io", "u", password)]);
            assert_eq!(rendered.is_ok(), reads_back, "{profile}");
        }
        try_render(profile, &[("x", "reg.io", "u", "p\0w")]).unwrap();
    }
}

#[test]
fn profile_names_are_consistent() {
    for profile in Profile::ALL {
        let name = profile.as_str();
        assert_eq!(serde_json::to_value(profile).unwrap(), json!(name));
        assert_eq!(name.parse::<Profile>().unwrap(), profile);
    }
    "Kubernetes".parse::<Profile>().unwrap_err();
}

#[test]
fn debug_omits_passwords() {
    let shown = format!("{:?}", try_render(Profile::Kubernetes, &[MARTIN_5000]).unwrap());
    assert!(!shown.contains("xxx1") && !shown.contains("bWFydGlu"), "{shown}");
}

proptest! {
    #[test]
    fn fields_round_trip(
        username in "[^:]+",
        password in any::<String>().prop_filter("not empty", |p| !p.is_empty()),
        email in proptest::option::of(any::<String>()),
    ) {
        use base64::{Engine as _, engine::general_purpose::STANDARD};

        let scope = RegistryScope::parse("reg.io").unwrap();
        let secret = SecretString::from(password.as_str());
        let credential = Credential {
            account: "x",
            scope: &scope,
            username: &username,
            password: &secret,
            email: email.as_deref(),
        };
        let rendered = render(Profile::Kubernetes, &[credential]).unwrap();
        let value: Value = serde_json::from_str(rendered.document.expose_secret()).unwrap();
        let entry = &value["auths"]["reg.io"];
        let auth = STANDARD.decode(entry["auth"].as_str().unwrap()).unwrap();
        prop_assert_eq!(&entry["username"], &json!(username));
        prop_assert_eq!(&entry["password"], &json!(password));
        let email = email.as_deref().filter(|email| !email.is_empty());
        prop_assert_eq!(entry.get("email").and_then(Value::as_str), email);
        prop_assert_eq!(auth, format!("{username}:{password}").into_bytes());
    }
}

proptest! {
    #[test]
    fn accounts_without_collisions_render_completely(
        scopes in proptest::collection::vec("(docker\\.io|reg[ab]\\.io)(/[ab])?", 1..12),
    ) {
        let names: Vec<String> = (0..scopes.len()).map(|at| format!("a-{at}")).collect();
        let scopes: Vec<RegistryScope> = scopes.iter().map(|scope| RegistryScope::parse(scope).unwrap()).collect();
        let accounts: Vec<ScopedAccount<'_>> =
            names.iter().zip(&scopes).map(|(name, scope)| ScopedAccount { name, scope }).collect();
        for profile in Profile::ALL {
            let (kept, left_out) = split_collisions(profile, accounts.clone(), |account| account.scope);
            prop_assert_eq!(check_keys(profile, &kept), Ok(()));
            prop_assert_eq!(kept.len() + left_out.len(), accounts.len());
            // Each account that was left out has the key of an earlier one that stays.
            for account in left_out {
                let key = key_for(profile, account.scope);
                let holder = kept.iter().find(|one| key_for(profile, one.scope) == key).unwrap();
                prop_assert!(names.iter().position(|name| name == holder.name) < names.iter().position(|name| name == account.name));
            }
        }
    }
}
