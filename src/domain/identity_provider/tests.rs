use std::collections::BTreeMap;

use rstest::rstest;

use super::*;
use crate::domain::token::Claims;

fn rule(claims: &[(&str, &str)], role: &str) -> RuleDocument {
    let claims = claims.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    RuleDocument { claims, role: role.to_owned(), grants: None }
}

fn oidc(issuer: &str, rules: Vec<RuleDocument>) -> ProviderDocument {
    ProviderDocument {
        provider_type: ProviderType::Oidc,
        issuer: Some(issuer.to_owned()),
        ca_certificate: None,
        cluster: None,
        audience: "regcred".to_owned(),
        allow_multiple_audiences: false,
        token_types: Vec::new(),
        rules,
        login: None,
    }
}

fn reviewed(rules: Vec<RuleDocument>) -> ProviderDocument {
    ProviderDocument {
        provider_type: ProviderType::TokenReview,
        issuer: None,
        cluster: Some("dev".to_owned()),
        ..oidc("", rules)
    }
}

fn refused(document: ProviderDocument) -> Vec<String> {
    let errors = ProviderConfig::parse(document).err().unwrap_or_default();
    errors.into_iter().map(|error| error.field).collect()
}

const OWN: &str = "https://issuer.example.com";

#[rstest]
#[case("https://gitlab.example.com", true)]
#[case("https://token.actions.githubusercontent.com", true)]
#[case("https://kubernetes.default.svc.cluster.local", true)]
#[case("https://login.example.com/tenant/v2.0", true)]
#[case("https://tenant.example.com/", true)]
#[case("https://10.0.0.1:8443", true)]
#[case("http://127.0.0.1:8080", true)]
#[case("http://[::1]:8080", true)]
#[case("http://localhost", true)]
#[case("http://issuer.example.com", false)]
#[case("http://127.0.0.1.example.com", false)]
#[case("https://Issuer.example.com", false)]
#[case("https://issuer.example.com:443", false)]
#[case("https://issuer.example.com/a/../b", false)]
#[case("https://user@issuer.example.com", false)]
#[case("https://issuer.example.com?x=1", false)]
#[case("https://issuer.example.com#x", false)]
#[case("https://2130706433", false)]
#[case("https:issuer.example.com", false)]
#[case("ftp://issuer.example.com", false)]
#[case("issuer.example.com", false)]
#[case("", false)]
fn issuer_must_be_an_https_url_in_normal_form(#[case] issuer: &str, #[case] good: bool) {
    assert_eq!(Issuer::parse(issuer).is_ok(), good);
}

#[test]
fn discovery_document_is_below_the_issuer() {
    for issuer in ["https://a.example.com/t", "https://a.example.com/t/"] {
        let url = Issuer::parse(issuer).unwrap().discovery_url();
        assert_eq!(url, "https://a.example.com/t/.well-known/openid-configuration");
    }
}

#[test]
fn fields_must_fit_the_provider_type() {
    let rules = || vec![rule(&[("sub", "a")], "viewer")];
    assert_eq!(refused(oidc(OWN, rules())), [""; 0]);
    assert_eq!(refused(ProviderDocument { cluster: Some("dev".to_owned()), ..oidc(OWN, rules()) }), ["cluster"]);
    assert_eq!(refused(ProviderDocument { issuer: None, ..oidc(OWN, rules()) }), ["issuer"]);
    assert_eq!(refused(ProviderDocument { audience: String::new(), ..oidc(OWN, rules()) }), ["audience"]);
    let of_account = || vec![rule(&[("namespace", "a"), ("serviceAccount", "ci")], "deliverer")];
    assert_eq!(refused(reviewed(of_account())), [""; 0]);
    assert_eq!(refused(ProviderDocument { cluster: None, ..reviewed(of_account()) }), ["cluster"]);
    let mixed = ProviderDocument { issuer: Some(OWN.to_owned()), ..reviewed(of_account()) };
    assert_eq!(refused(mixed), ["issuer"]);
}

#[rstest]
#[case(&[], "viewer", &["rules[0].claims"])]
#[case(&[("sub", "")], "viewer", &["rules[0].claims.sub"])]
#[case(&[("aud", "regcred")], "viewer", &["rules[0].claims.aud"])]
#[case(&[("iss", OWN)], "viewer", &["rules[0].claims.iss"])]
#[case(&[("", "x")], "viewer", &["rules[0].claims."])]
#[case(&[("sub", "a")], "admin", &["rules[0].role"])]
#[case(&[("sub", "a")], "root", &["rules[0].role"])]
fn rule_must_identify_the_bearer_and_cannot_grant_admin(
    #[case] claims: &[(&str, &str)],
    #[case] role: &str,
    #[case] fields: &[&str],
) {
    assert_eq!(refused(oidc(OWN, vec![rule(claims, role)])), fields);
}

#[test]
fn every_invalid_field_is_reported_with_its_path() {
    let grants = GrantsFixture::with_bad_names();
    let bad = RuleDocument { grants: Some(grants), ..rule(&[("sub", "a")], "deliverer") };
    let rules = vec![rule(&[("sub", "a")], "viewer"), bad, rule(&[], "admin")];
    assert_eq!(
        refused(oidc("x", rules)),
        ["issuer", "rules[1].grants.accounts[0]", "rules[1].grants.namespaces[1]", "rules[2].claims", "rules[2].role"]
    );
    assert_eq!(refused(oidc(OWN, Vec::new())), ["rules"]);
    assert_eq!(refused(oidc(OWN, vec![rule(&[("sub", "a")], "viewer"); 101])), ["rules"]);
}

struct GrantsFixture;

impl GrantsFixture {
    fn with_bad_names() -> crate::domain::grants::GrantsDocument {
        serde_json::from_value(serde_json::json!({"accounts": ["A"], "namespaces": ["a-*", "*-a"]})).unwrap()
    }
}

#[rstest]
#[case("https://token.actions.githubusercontent.com", &[("environment", "prod")], false)]
#[case("https://token.actions.githubusercontent.com", &[("job_workflow_ref", "acme/ci/.github/workflows/x.yml@v1")], false)]
#[case("https://token.actions.githubusercontent.com", &[("environment", "prod"), ("repository_id", "7")], true)]
#[case("https://token.actions.githubusercontent.com/acme", &[("ref", "refs/heads/main")], false)]
#[case("https://gitlab.com", &[("ref_protected", "true")], false)]
#[case("https://gitlab.com", &[("ref_protected", "true"), ("project_id", "42")], true)]
#[case("https://gitlab.example.com", &[("ref_protected", "true")], true)]
fn rule_for_public_issuer_must_identify_the_owner(
    #[case] issuer: &str,
    #[case] claims: &[(&str, &str)],
    #[case] good: bool,
) {
    let expected: &[&str] = if good { &[] } else { &["rules[0].claims"] };
    assert_eq!(refused(oidc(issuer, vec![rule(claims, "viewer")])), expected);
}

#[rstest]
#[case("repo:acme/app:environment:prod", true)]
#[case("repo:acme/app", true)]
#[case("repo:acme@1/app@2:ref:refs/heads/main", true)]
#[case("repository:acme/app:ref:refs/heads/main", true)]
#[case("repository_id:42:environment:prod", true)]
#[case("repository_owner_id:7", true)]
#[case("repository_owner:acme:environment:prod", true)]
#[case("environment:prod", false)]
#[case("environment:prod:repo:acme/app", false)]
#[case("ref:refs/heads/repo:acme/app", false)]
#[case("job_workflow_ref:acme/ci/.github/workflows/x.yml@v1", false)]
#[case("repository_visibility:private", false)]
#[case("repository_id::environment:prod", false)]
#[case("repository_owner::environment:prod", false)]
#[case("repo:", false)]
#[case("repo:acme", false)]
#[case("", false)]
fn subject_on_github_must_begin_with_the_owner(#[case] subject: &str, #[case] good: bool) {
    const GITHUB: &str = "https://token.actions.githubusercontent.com";
    let weak = [("sub", subject), ("environment", "prod")];
    let expected: &[&str] = if good { &[] } else { &["rules[0].claims.sub"] };
    assert_eq!(refused(oidc(GITHUB, vec![rule(&weak, "viewer")])), expected);
    if !subject.is_empty() {
        let named = [("sub", subject), ("repository_id", "42")];
        assert_eq!(refused(oidc(GITHUB, vec![rule(&named, "viewer")])), [""; 0]);
        assert_eq!(refused(oidc(OWN, vec![rule(&weak, "viewer")])), [""; 0]);
    }
}

#[test]
fn stored_rule_that_lets_others_in_matches_no_token() {
    const GITHUB: &str = "https://token.actions.githubusercontent.com";
    let rules = vec![rule(&[("sub", "environment:prod")], "operator"), rule(&[("repository_id", "42")], "viewer")];
    let config = ProviderConfig::parse_stored(oidc(GITHUB, rules)).unwrap();
    let claims =
        |id: &str| Claims::from([("sub", Some("environment:prod".to_owned())), ("repository_id", Some(id.to_owned()))]);
    assert!(config.matching_rule(&claims("666")).is_none());
    assert_eq!(config.matching_rule(&claims("42")).map(|rule| rule.role.as_str()), Some("viewer"));
}

#[test]
fn audience_of_api_servers_is_refused_for_reviews_only() {
    let rules = || vec![rule(&[("namespace", "a")], "viewer")];
    let own = |document| ProviderDocument { audience: "https://kubernetes.default.svc".to_owned(), ..document };
    assert_eq!(refused(own(reviewed(rules()))), ["audience"]);
    assert_eq!(refused(own(oidc(OWN, vec![rule(&[("sub", "a")], "viewer")]))), [""; 0]);
    assert!(ProviderConfig::parse_stored(own(reviewed(rules()))).unwrap().accepts_every_pod());
}

#[rstest]
#[case(&["logout+jwt", "application/SecEvent+JWT"], true)]
#[case(&["JWT"], false)]
#[case(&["at+jwt"], false)]
#[case(&["+jwt"], false)]
#[case(&["a b+jwt"], false)]
#[case(&["logout"], false)]
fn token_types_are_those_for_other_purposes(#[case] types: &[&str], #[case] good: bool) {
    let token_types: Vec<String> = types.iter().map(|one| (*one).to_owned()).collect();
    let document = ProviderDocument { token_types, ..oidc(OWN, vec![rule(&[("sub", "a")], "viewer")]) };
    let expected: &[&str] = if good { &[] } else { &["tokenTypes"] };
    assert_eq!(refused(document), expected);
}

#[rstest]
#[case(&[("namespace", "a")], &[])]
#[case(&[("serviceAccount", "default")], &["rules[0].claims"])]
#[case(&[("namespace", "a"), ("serviceaccount", "ci")], &["rules[0].claims.serviceaccount"])]
fn rule_for_cluster_requires_namespace_and_known_claims(#[case] claims: &[(&str, &str)], #[case] fields: &[&str]) {
    assert_eq!(refused(reviewed(vec![rule(claims, "viewer")])), fields);
}

#[test]
fn rule_matches_only_if_all_claims_match() {
    let rule = Rule::parse("rules[0]", rule(&[("project_id", "42"), ("ref_protected", "true")], "deliverer")).unwrap();
    let claims = |pairs: [(&str, Option<String>); 2]| Claims::from(pairs);
    let text = |value: &str| Some(value.to_owned());
    assert!(rule.matches(&claims([("project_id", text("42")), ("ref_protected", text("true"))])));
    assert!(!rule.matches(&claims([("project_id", text("42")), ("ref_protected", text("false"))])));
    assert!(!rule.matches(&claims([("project_id", text("42")), ("ref_protected", None)])));
    assert_eq!(
        RuleDocument::from(&rule).claims,
        BTreeMap::from([("project_id".to_owned(), "42".to_owned()), ("ref_protected".to_owned(), "true".to_owned()),])
    );
}

#[test]
fn people_sign_in_through_issuers_only() {
    let rules = || vec![rule(&[("sub", "ci")], "viewer")];
    let login = Some("regcred".to_owned());
    let config = ProviderConfig::parse(ProviderDocument { login: login.clone(), ..oidc(OWN, rules()) }).unwrap();
    assert_eq!(config.login.map(|client| client.to_string()), login);
    let reviewed = reviewed(vec![rule(&[("namespace", "a")], "viewer")]);
    assert_eq!(refused(ProviderDocument { login, ..reviewed }), ["login"]);
    assert_eq!(refused(ProviderDocument { login: Some(String::new()), ..oidc(OWN, rules()) }), ["login.clientId"]);
}
