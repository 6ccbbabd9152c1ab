//! ECR Public, and the variants of STS: regcred and botocore call the same fake.

use std::sync::Arc;

use chrono::Utc;
use regcred::{
    clients::mint::{AmbientConfig, AwsEnvironment, MetadataConfig, MintClientConfig},
    domain::mint::{MintError, MintReason, Minted},
};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    ALLOW, assert_mint_refused, created_login, direct_mint,
    fakes::{
        self,
        aws::{Aws, CONTAINER_TOKEN, DENIED, EXTERNAL_ID, FEDERATED_ROLE, INSTANCE_ROLE, Key, LIFETIME, ROLE, USER},
        jwt::{ClientKey, TrustedIssuer},
    },
    peers::{assert_vendor_refused, vendor_calls},
};
use crate::{
    identity_providers::cluster::{add_account, new_account, server_key, token},
    support::{app::TestApp, files::TempDir},
};

const REGISTRY: &str = "public.ecr.aws";

fn source(endpoint: &str, identity: &Value) -> Value {
    json!({"type": "ecrPublic", "endpoint": endpoint, "stsEndpoint": endpoint, "identity": identity})
}

fn account(source: &Value) -> Value {
    json!({"name": "minted", "registry": REGISTRY, "plainHttp": true, "source": source})
}

fn access_key(key: Key<'_>) -> Value {
    json!({"type": "accessKey", "accessKeyId": key.id, "secretAccessKey": key.secret})
}

fn botocore_key(key: Key<'_>) -> Value {
    json!({"aws_access_key_id": key.id, "aws_secret_access_key": key.secret})
}

/// Asserts that botocore got a login as regcred's: for the same principal and until the same time.
#[track_caller]
fn assert_alike(aws: &Aws, password: &str, principal: &str, vendor: &Value) {
    let token = vendor["token"].as_str().unwrap_or_else(|| panic!("no login: {vendor}"));
    assert_eq!(vendor["user"], "AWS");
    let (own, other) = (aws.login(password), aws.login(token));
    assert_eq!((own.principal.as_str(), own.service.as_str()), (principal, "ecr-public"));
    assert_eq!((other.principal.as_str(), other.service.as_str()), (principal, "ecr-public"));
    assert_until_the_end(vendor["expiresAt"].as_f64().expect("an expiry"));
}

/// Asserts that a time is the end of a login that was issued just now.
#[track_caller]
fn assert_until_the_end(unix_time: f64) {
    #[expect(clippy::cast_precision_loss, reason = "the value is below 2^53")]
    let end = (Utc::now() + LIFETIME).timestamp() as f64;
    assert!((end - 60.0..=end + 10.0).contains(&unix_time), "{unix_time}");
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn ecr_public_issues_logins_to_signed_requests(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    let aws = Arc::new(Aws::new(None));
    let endpoint = fakes::serve(&aws);
    let wrong = Key { secret: "canary-wrong", ..USER };
    let unknown = Key { id: "AKIAUNKNOWN", ..USER };
    let call = |key: Key<'_>| json!({"call": "aws_login", "endpoint": endpoint, "key": botocore_key(key)});
    let vendor = vendor_calls(&json!([call(USER), call(wrong), call(unknown), call(DENIED)]));
    let post = async |key: Key<'_>| {
        app.admin().post("/v1/registry-accounts", &account(&source(&endpoint, &access_key(key)))).await
    };

    for (key, result, code) in [
        (wrong, &vendor[1], "InvalidSignatureException"),
        (unknown, &vendor[2], "UnrecognizedClientException"),
        (DENIED, &vendor[3], "AccessDeniedException"),
    ] {
        assert_mint_refused(&post(key).await, code);
        assert_vendor_refused(result, code);
    }
    *aws.throttles.lock() = true;
    let throttled = vendor_calls(&json!([call(USER)]));
    assert_vendor_refused(&throttled[0], "ThrottlingException");
    let problem = post(USER).await.problem(503, "mint-throttled");
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("ThrottlingException")), "{problem}");
    *aws.throttles.lock() = false;

    let body = account(&source(&endpoint, &access_key(USER)));
    let (username, password, valid_until) = created_login(&app, &body).await;
    assert_eq!(username, "AWS");
    assert_until_the_end(valid_until);
    assert_alike(&aws, &password, USER.id, &vendor[0]);
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn sts_assumes_a_role_with_its_external_id(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    let aws = Arc::new(Aws::new(None));
    let endpoint = fakes::serve(&aws);
    let call = |key: Key<'_>, external_id: &str| {
        json!({
            "call": "aws_login", "endpoint": endpoint, "key": botocore_key(key),
            "assume_role": {"RoleArn": ROLE, "ExternalId": external_id},
        })
    };
    let wrong = Key { secret: "canary-wrong", ..USER };
    let vendor = vendor_calls(&json!([call(USER, EXTERNAL_ID), call(USER, "external-2"), call(wrong, EXTERNAL_ID)]));
    let body = |key: Key<'_>, external_id: &str| {
        let mut source = source(&endpoint, &access_key(key));
        source["assumeRole"] = json!({"roleArn": ROLE, "externalId": external_id});
        account(&source)
    };

    let refused = app.admin().post("/v1/registry-accounts", &body(USER, "external-2")).await;
    assert_mint_refused(&refused, "AccessDenied");
    assert_vendor_refused(&vendor[1], "AccessDenied");
    let refused = app.admin().post("/v1/registry-accounts", &body(wrong, EXTERNAL_ID)).await;
    assert_mint_refused(&refused, "SignatureDoesNotMatch");
    assert_vendor_refused(&vendor[2], "SignatureDoesNotMatch");
    let (_, password, _) = created_login(&app, &body(USER, EXTERNAL_ID)).await;
    assert_alike(&aws, &password, ROLE, &vendor[0]);
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn sts_trusts_a_service_account_of_a_cluster(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    app.register_cluster("dev").await;
    let namespace = new_account("pull").await;
    add_account(&namespace, "other").await;
    let issuer = TrustedIssuer {
        issuer: "https://kubernetes.default.svc",
        key: server_key().public_der(),
        subject: format!("system:serviceaccount:{namespace}:pull"),
    };
    let aws = Arc::new(Aws::new(Some(issuer)));
    let endpoint = fakes::serve(&aws);
    let call = async |name: &str, audience: &str| {
        let token = token(&namespace, name, audience, 3_600).await;
        json!({
            "call": "aws_login", "endpoint": endpoint,
            "web_identity": {"RoleArn": FEDERATED_ROLE, "WebIdentityToken": token},
        })
    };
    let audience = "sts.amazonaws.com";
    let calls = json!([call("pull", audience).await, call("other", audience).await, call("pull", "vault").await]);
    let vendor = vendor_calls(&calls);
    let body = |name: &str, audience: Option<&str>| {
        let identity = json!({
            "type": "webIdentity", "cluster": "dev", "namespace": namespace, "serviceAccount": name,
            "audience": audience,
        });
        let mut source = source(&endpoint, &identity);
        source["assumeRole"] = json!({"roleArn": FEDERATED_ROLE});
        account(&source)
    };

    let refused = app.admin().post("/v1/registry-accounts", &body("other", None)).await;
    assert_mint_refused(&refused, "AccessDenied");
    assert_vendor_refused(&vendor[1], "AccessDenied");
    let refused = app.admin().post("/v1/registry-accounts", &body("pull", Some("vault"))).await;
    assert_mint_refused(&refused, "InvalidIdentityToken");
    assert_vendor_refused(&vendor[2], "InvalidIdentityToken");
    *aws.issuer_is_away.lock() = true;
    let refused = app.admin().post("/v1/registry-accounts", &body("pull", None)).await;
    assert_mint_refused(&refused, "IDPCommunicationError");
    *aws.issuer_is_away.lock() = false;
    let (_, password, _) = created_login(&app, &body("pull", None)).await;
    assert_alike(&aws, &password, FEDERATED_ROLE, &vendor[0]);
}

/// Mints with the identity of a host or pod whose metadata services are the fake.
async fn ambient_mint(url: &str, environment: AwsEnvironment) -> Result<(Minted, String), MintError> {
    let metadata = MetadataConfig {
        instance: url.to_owned(),
        containers: vec![url.to_owned()],
        allowed: "127.0.0.1".parse().expect("an address"),
    };
    let ambient = AmbientConfig { aws: Some(environment), ..AmbientConfig::default() };
    let config = MintClientConfig { ambient, metadata, ..MintClientConfig::default() };
    direct_mint(config, &source(url, &json!({"type": "ambient"})), None, REGISTRY, None).await
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn containers_and_instances_get_keys_of_their_roles() {
    let aws = Arc::new(Aws::new(None));
    let url = fakes::serve(&aws);
    let folder = TempDir::new();
    let (right, wrong) = (folder.write("right", CONTAINER_TOKEN), folder.write("wrong", "canary-wrong"));
    let container = |file: &std::path::Path| AwsEnvironment {
        credentials_full_uri: Some(format!("{url}/v1/credentials")),
        authorization_token_file: Some(file.to_owned()),
        ..AwsEnvironment::default()
    };
    let mint = async |environment: AwsEnvironment| ambient_mint(&url, environment).await;
    let call = |variables: Value| json!({"call": "aws_login", "endpoint": url, "variables": variables});
    let in_container = |file: &std::path::Path| {
        let uri = format!("{url}/v1/credentials");
        call(json!({"AWS_CONTAINER_CREDENTIALS_FULL_URI": uri, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": file}))
    };
    let vendor = vendor_calls(&json!([in_container(&right), call(json!({"AWS_EC2_METADATA_SERVICE_ENDPOINT": url})),]));

    let (_, password) = mint(container(&right)).await.expect("a login");
    assert_alike(&aws, &password, "container-role", &vendor[0]);
    let error = mint(container(&wrong)).await.expect_err("a refusal");
    assert_eq!(error.reason, MintReason::InvalidIdentity, "{}", error.detail);
    let (_, password) = mint(AwsEnvironment::default()).await.expect("a login");
    assert_alike(&aws, &password, INSTANCE_ROLE, &vendor[1]);
    // The metadata service requires a session.
    let plain = reqwest::get(format!("{url}/latest/meta-data/iam/security-credentials/")).await;
    assert_eq!(plain.expect("an answer").status(), 401);
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn pods_assume_the_role_of_their_token_file() {
    let (key, issuer) = (ClientKey::new(), "https://issuer.example");
    let subject = "system:serviceaccount:regcred:pull";
    let trusted = TrustedIssuer { issuer, key: key.public(), subject: subject.to_owned() };
    let aws = Arc::new(Aws::new(Some(trusted)));
    let url = fakes::serve(&aws);
    let folder = TempDir::new();
    let write = |subject: &str| {
        let now = Utc::now().timestamp();
        let claims = json!({"iss": issuer, "aud": "sts.amazonaws.com", "sub": subject, "iat": now, "exp": now + 600});
        folder.write("token", key.signer().sign(&json!({"alg": "RS256"}), &claims))
    };
    let file = write(subject);
    let environment = AwsEnvironment {
        role_arn: Some(FEDERATED_ROLE.to_owned()),
        web_identity_token_file: Some(file.clone()),
        ..AwsEnvironment::default()
    };
    let call = || {
        let variables = json!({
            "AWS_ROLE_ARN": FEDERATED_ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": file, "AWS_ENDPOINT_URL_STS": url,
        });
        vendor_calls(&json!([{"call": "aws_login", "endpoint": url, "variables": variables}])).remove(0)
    };

    let (_, password) = ambient_mint(&url, environment.clone()).await.expect("a login");
    assert_alike(&aws, &password, FEDERATED_ROLE, &call());
    // The platform replaces the file: it is read at every mint.
    write("system:serviceaccount:regcred:other");
    let error = ambient_mint(&url, environment).await.expect_err("a refusal");
    assert!(error.detail.contains("AccessDenied"), "{}", error.detail);
    assert_vendor_refused(&call(), "AccessDenied");
}
