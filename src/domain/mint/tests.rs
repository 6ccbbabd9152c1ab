use rstest::rstest;
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::*;
use crate::domain::{invalid::FieldError, registry::RegistryScope};

fn parse(source: Value) -> Result<NewSource, Vec<FieldError>> {
    Source::parse(serde_json::from_value(source).expect("a document"))
}

/// Fields that are refused, in order.
fn refused(source: Value) -> Vec<String> {
    parse(source).expect_err("a refusal").into_iter().map(|error| error.field).collect()
}

fn access_key() -> Value {
    json!({"type": "accessKey", "accessKeyId": "AKIAIOSFODNN7EXAMPLE", "secretAccessKey": "canary"})
}

fn web_identity() -> Value {
    json!({"type": "webIdentity", "cluster": "dev", "namespace": "regcred", "serviceAccount": "pull"})
}

fn ecr() -> Value {
    json!({"type": "ecr", "region": "eu-central-1", "identity": access_key()})
}

fn azure() -> Value {
    let identity = json!({"type": "clientSecret", "clientId": "c", "clientSecret": "canary"});
    json!({"type": "azureContainerRegistry", "tenantId": "t", "identity": identity})
}

fn oauth2() -> Value {
    let identity = json!({"type": "clientSecret", "clientId": "c", "clientSecret": "canary"});
    let url = "https://auth.example.com/token";
    json!({"type": "oauth2", "tokenUrl": url, "username": "robot", "identity": identity})
}

fn google() -> Value {
    let file = json!({
        "type": "service_account", "client_email": "pull@p.iam.gserviceaccount.com", "private_key_id": "k1",
        "private_key": "canary", "token_uri": "https://evil.example/token",
    });
    let identity = json!({"type": "serviceAccountKey", "keyFile": file.to_string()});
    json!({"type": "googleArtifactRegistry", "identity": identity})
}

/// Sets a member by its path.
fn with(mut source: Value, path: &str, value: Value) -> Value {
    let (parent, name) = path.rsplit_once('/').expect("a path");
    source.pointer_mut(parent).expect("an object")[name] = value;
    source
}

fn google_identity() -> Value {
    let provider = "projects/1/locations/global/workloadIdentityPools/p/providers/x";
    with(web_identity(), "/workloadIdentityProvider", json!(provider))
}

#[rstest]
#[case::ecr(ecr())]
#[case::ecr_role(with(ecr(), "/assumeRole", json!({"roleArn": "arn:aws:iam::123456789012:role/a/b", "externalId": "x1"})))]
#[case::ecr_fips(with(ecr(), "/fips", json!(true)))]
#[case::ecr_public(json!({"type": "ecrPublic", "identity": access_key()}))]
#[case::ecr_web(json!({"type": "ecr", "region": "eu-central-1", "identity": web_identity(),
    "assumeRole": {"roleArn": "arn:aws-cn:iam::123456789012:role/r"}}))]
#[case::ecr_ambient(json!({"type": "ecr", "region": "eu-central-1", "identity": {"type": "ambient"}}))]
#[case::google(google())]
#[case::google_web(json!({"type": "googleArtifactRegistry", "identity": google_identity(),
    "impersonate": "pull@p.iam.gserviceaccount.com"}))]
#[case::azure(azure())]
#[case::azure_scoped(with(azure(), "/repositories", json!(["os/alpine", "app"])))]
#[case::azure_web(json!({"type": "azureContainerRegistry", "tenantId": "t",
    "identity": with(web_identity(), "/clientId", json!("c"))}))]
#[case::azure_ambient(json!({"type": "azureContainerRegistry", "identity": {"type": "ambient"}}))]
#[case::oauth2(oauth2())]
#[case::oauth2_lifetime(with(with(oauth2(), "/lifetimeSeconds", json!(3600)), "/authentication", json!("body")))]
fn valid_source_is_stored_without_its_secret(#[case] source: Value) {
    let NewSource { source, secret } = parse(source).unwrap();
    assert!(secret.expose_secret().is_empty() || secret.expose_secret() == "canary");
    let text = source.as_text();
    assert!(!text.contains("canary") && !text.contains("evil"), "{text}");
    assert!(!format!("{source:?} {secret:?}").contains("canary"));
    let stored = Source::from_stored(text).unwrap();
    assert_eq!(stored.as_text(), text);
    assert_eq!(stored, source);
}

#[rstest]
#[case::no_region(json!({"type": "ecr", "identity": access_key()}), &["source.region"])]
#[case::bad_region(with(ecr(), "/region", json!("eu/../x-1")), &["source.region"])]
#[case::no_secret(json!({"type": "ecr", "region": "eu-central-1", "identity": {"type": "accessKey", "accessKeyId": "A"}}),
    &["source.identity.secretAccessKey"])]
#[case::empty_secret(with(ecr(), "/identity/secretAccessKey", json!("")), &["source.identity.secretAccessKey"])]
#[case::other_secret(with(ecr(), "/identity/clientSecret", json!("canary")), &["source.identity.clientSecret"])]
#[case::two_errors(with(with(ecr(), "/identity/keyFile", json!("{}")), "/tenantId", json!("t")),
    &["source.identity.keyFile", "source.tenantId"])]
#[case::role(with(ecr(), "/assumeRole", json!({"roleArn": "arn:aws:iam::1:role/r"})), &["source.assumeRole.roleArn"])]
#[case::user_arn(with(ecr(), "/assumeRole", json!({"roleArn": "arn:aws:iam::123456789012:user/r"})),
    &["source.assumeRole.roleArn"])]
#[case::external_id(with(ecr(), "/assumeRole", json!({"roleArn": "arn:aws:iam::123456789012:role/r", "externalId": "a b"})),
    &["source.assumeRole.externalId"])]
#[case::web_without_role(json!({"type": "ecr", "region": "eu-central-1", "identity": web_identity()}),
    &["source.assumeRole"])]
#[case::api_server(json!({"type": "azureContainerRegistry", "tenantId": "t",
    "identity": with(with(web_identity(), "/clientId", json!("c")), "/audience", json!("https://kubernetes.default.svc"))}),
    &["source.identity.audience"])]
#[case::wrong_identity(json!({"type": "oauth2", "tokenUrl": "https://a.example", "username": "u", "identity": access_key()}),
    &["source.identity.type"])]
#[case::endpoint(with(ecr(), "/endpoint", json!("https://user@a.example")), &["source.endpoint"])]
#[case::endpoint_path(with(ecr(), "/stsEndpoint", json!("https://a.example/b")), &["source.stsEndpoint"])]
#[case::region_of_public(with(json!({"type": "ecrPublic", "identity": access_key()}), "/region", json!("eu-central-1")),
    &["source.region"])]
#[case::fips_of_public(with(json!({"type": "ecrPublic", "identity": access_key()}), "/fips", json!(true)),
    &["source.fips"])]
#[case::key_file(with(google(), "/identity/keyFile", json!("canary")), &["source.identity.keyFile"])]
#[case::external_account(with(google(), "/identity/keyFile", json!(json!({"type": "external_account",
    "client_email": "a@b.c", "private_key": "canary"}).to_string())), &["source.identity.keyFile"])]
#[case::read_only(with(google(), "/identity/clientEmail", json!("a@b.c")), &["source.identity.clientEmail"])]
#[case::impersonate(with(google(), "/impersonate", json!("a@b.c/../../x")), &["source.impersonate"])]
#[case::provider(json!({"type": "googleArtifactRegistry", "identity": with(google_identity(), "/workloadIdentityProvider",
    json!("projects/1"))}), &["source.identity.workloadIdentityProvider"])]
#[case::tenant(with(azure(), "/tenantId", json!("../common")), &["source.tenantId"])]
#[case::repository(with(azure(), "/repositories", json!(["a", "B c"])), &["source.repositories[1]"])]
#[case::certificate(json!({"type": "azureContainerRegistry", "tenantId": "t", "identity": {"type": "clientCertificate",
    "clientId": "c", "certificate": "x", "privateKey": "canary"}}), &["source.identity.certificate"])]
#[case::lifetime(with(oauth2(), "/lifetimeSeconds", json!(299)), &["source.lifetimeSeconds"])]
#[case::username(with(oauth2(), "/username", json!("a:b")), &["source.username"])]
fn invalid_field_is_named(#[case] source: Value, #[case] fields: &[&str]) {
    assert_eq!(refused(source), fields);
}

#[test]
fn refusal_repeats_no_secret() {
    let refusal = format!("{:?}", parse(with(google(), "/identity/keyFile", json!("{\"canary"))).unwrap_err());
    assert!(!refusal.contains("canary"), "{refusal}");
}

#[test]
fn unknown_field_and_type_are_refused() {
    for source in [with(ecr(), "/identity/token", json!("x")), with(ecr(), "/type", json!("harbor"))] {
        assert!(serde_json::from_value::<SourceDocument>(source).is_err());
    }
}

#[rstest]
#[case(ecr(), "123456789012.dkr.ecr.eu-central-1.amazonaws.com", true)]
#[case(ecr(), "123456789012.dkr.ecr.eu-central-1.amazonaws.com/team", true)]
#[case(ecr(), "123456789012.dkr.ecr.eu-west-1.amazonaws.com", false)]
#[case(ecr(), "123456789012.dkr.ecr.eu-central-1.amazonaws.com:8443", false)]
#[case(ecr(), "public.ecr.aws", false)]
#[case(json!({"type": "ecrPublic", "identity": access_key()}), "public.ecr.aws/acme", true)]
#[case(json!({"type": "ecrPublic", "identity": access_key()}), "ecr-public.aws.com", true)]
#[case(json!({"type": "ecrPublic", "identity": access_key()}), "public.ecr.aws.evil.example", false)]
#[case(google(), "europe-west3-docker.pkg.dev/p/r", true)]
#[case(google(), "gcr.io", true)]
#[case(google(), "eu.gcr.io", true)]
#[case(google(), "evil-gcr.io", false)]
#[case(google(), "a.b.gcr.io", false)]
#[case(google(), "x-docker.pkg.dev.evil.example", false)]
#[case(google(), "europe-west3-npm.pkg.dev", false)]
#[case(azure(), "acme.azurecr.io", true)]
#[case(azure(), "acme.azurecr.cn", true)]
#[case(azure(), "azurecr.io", false)]
#[case(azure(), "acme.azurecr.io.evil.example", false)]
#[case(azure(), "evil.acme.azurecr.io", false)]
#[case(azure(), "acmeazurecr.io", false)]
#[case(azure(), "docker.io", false)]
#[case(oauth2(), "registry.example.com", true)]
#[case(with(ecr(), "/endpoint", json!("http://127.0.0.1:4566")), "127.0.0.1:5000", true)]
#[case(with(ecr(), "/stsEndpoint", json!("https://sts.example.com")), "registry.example.com", false)]
#[case(with(ecr(), "/fips", json!(true)), "registry.example.com", false)]
#[case(with(ecr(), "/fips", json!(true)), "123456789012.dkr.ecr-fips.eu-central-1.amazonaws.com", true)]
#[case(with(azure(), "/authority", json!("https://login.microsoftonline.us")), "docker.io", false)]
#[case(with(azure(), "/authority", json!("https://login.example.com")), "registry.example.com", true)]
fn registry_must_fit_the_source(#[case] source: Value, #[case] registry: &str, #[case] fits: bool) {
    let registry = RegistryScope::parse(registry).unwrap_or_else(|invalid| panic!("{invalid}"));
    assert_eq!(parse(source).unwrap().source.check_registry(&registry).is_ok(), fits);
}

#[rstest]
#[case(ecr(), None)]
#[case(with(ecr(), "/endpoint", json!("https://ecr.example.com")), Some("source.endpoint"))]
#[case(with(ecr(), "/stsEndpoint", json!("https://sts.example.com")), Some("source.stsEndpoint"))]
#[case(with(google(), "/endpoint", json!("https://g.example.com")), Some("source.endpoint"))]
#[case(with(azure(), "/authority", json!("https://login.microsoftonline.com/")), None)]
#[case(with(azure(), "/authority", json!("https://login.microsoftonline.com.evil.example")), Some("source.authority"))]
#[case(with(azure(), "/authority", json!("http://login.microsoftonline.com")), Some("source.authority"))]
#[case(with(azure(), "/authority", json!("https://login.microsoftonline.com:8443")), Some("source.authority"))]
#[case(oauth2(), None)]
fn foreign_host_is_an_override(#[case] source: Value, #[case] field: Option<&str>) {
    assert_eq!(parse(source).unwrap().source.overridden(), field);
}

#[test]
fn audience_depends_on_the_provider() {
    let source = parse(json!({"type": "googleArtifactRegistry", "identity": google_identity()})).unwrap().source;
    let audience = "https://iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/x";
    assert_eq!(source.web_identity().map(|identity| identity.audience.as_str()), Some(audience));
    let identity = with(with(web_identity(), "/clientId", json!("c")), "/audience", json!("own"));
    let source =
        parse(json!({"type": "azureContainerRegistry", "tenantId": "t", "identity": identity})).unwrap().source;
    assert_eq!(source.web_identity().map(|identity| identity.audience.as_str()), Some("own"));
}

#[test]
fn names_are_those_of_the_api() {
    for reason in MintReason::ALL {
        assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        assert_eq!(reason.as_str().parse(), Ok(reason));
    }
    for source_type in SourceType::ALL {
        assert_eq!(serde_json::to_value(source_type).unwrap(), source_type.as_str());
    }
    for state in MintState::ALL {
        assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
    }
}

#[test]
fn source_that_cannot_be_stored_is_refused() {
    let certificate = rcgen::generate_simple_self_signed(["regcred".to_owned()]).expect("a certificate").cert.pem();
    let source = |certificates: usize| {
        let identity = json!({
            "type": "clientCertificate", "clientId": "c", "certificate": certificate.repeat(certificates),
            "privateKey": "canary",
        });
        with(azure(), "/identity", identity)
    };
    assert!(parse(source(1)).is_ok());
    assert_eq!(refused(source(1 + 64 * 1024 / certificate.len())), ["source"]);
}

#[test]
fn slash_at_the_end_of_a_token_url_is_kept() {
    for url in ["https://auth.example.com/o/token/", "https://auth.example.com/o/token"] {
        let source = with(oauth2(), "/tokenUrl", json!(url));
        let parsed = parse(source).expect("a source");
        let Provider::OAuth2(source) = parsed.source.provider else { panic!("another provider") };
        assert_eq!(source.token_url, url);
    }
}
