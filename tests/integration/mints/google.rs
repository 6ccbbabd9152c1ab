//! Google: regcred and google-auth call the same fake.

use std::sync::Arc;

use chrono::Utc;
use regcred::clients::mint::{AmbientConfig, MetadataConfig, MintClientConfig};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    ALLOW, assert_mint_refused, created_login, direct_mint,
    fakes::{
        self,
        google::{ACCOUNT, Google, IMPERSONATED, INSTANCE, KEY_ID, POOL_PROVIDER, READ_ONLY},
        jwt::{ClientKey, TrustedIssuer},
    },
    peers::{assert_vendor_refused, vendor_calls},
    post_form,
};
use crate::{
    identity_providers::cluster::{add_account, new_account, server_key, token},
    support::{app::TestApp, files::TempDir},
};

const REGISTRY: &str = "europe-docker.pkg.dev";
const USERNAME: &str = "oauth2accesstoken";

fn key_file(key: &ClientKey) -> String {
    let file = json!({
        "type": "service_account", "client_email": ACCOUNT, "private_key_id": KEY_ID, "private_key": key.pem(),
        "token_uri": "https://foreign.example.com/token",
    });
    file.to_string()
}

fn account(endpoint: &str, identity: &Value) -> Value {
    json!({
        "name": "minted", "registry": REGISTRY, "plainHttp": true,
        "source": {"type": "googleArtifactRegistry", "endpoint": endpoint, "identity": identity},
    })
}

/// Asserts that the token of a vendor's client was issued as this one, and ends at the same time.
#[track_caller]
fn assert_alike(google: &Google, (password, valid_until): (&str, f64), vendor: &Value) {
    let token = vendor["token"].as_str().unwrap_or_else(|| panic!("no token: {vendor}"));
    assert_eq!(google.issued(password), google.issued(token));
    let difference = valid_until - vendor["expiresAt"].as_f64().expect("an expiry");
    assert!(difference.abs() < 60.0, "{difference}");
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn google_issues_tokens_for_the_key_of_a_service_account(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    let (key, other) = (ClientKey::new(), ClientKey::new());
    let google = Arc::new(Google::new(key.public(), None));
    let endpoint = fakes::serve(&google);
    let identity = |key: &ClientKey| json!({"type": "serviceAccountKey", "keyFile": key_file(key)});

    let call = |key: &ClientKey, scope: &str, impersonate: Option<&str>| {
        json!({
            "call": "google_key", "endpoint": endpoint, "key_file": key_file(key), "scope": scope,
            "impersonate": impersonate,
        })
    };
    let vendor = vendor_calls(&json!([
        call(&key, READ_ONLY, None),
        call(&key, READ_ONLY, Some(IMPERSONATED)),
        call(&other, READ_ONLY, None),
        call(&key, "https://www.googleapis.com/auth/nothing", None),
        call(&key, READ_ONLY, Some("admin@project.iam.gserviceaccount.com")),
    ]));

    let refused = app.admin().post("/v1/registry-accounts", &account(&endpoint, &identity(&other))).await;
    assert_mint_refused(&refused, "invalid_grant");
    assert_vendor_refused(&vendor[2], "invalid_grant");
    let mut body = account(&endpoint, &identity(&key));
    body["source"]["scope"] = json!("https://www.googleapis.com/auth/nothing");
    assert_mint_refused(&app.admin().post("/v1/registry-accounts", &body).await, "invalid_scope");
    assert_vendor_refused(&vendor[3], "invalid_scope");
    let mut body = account(&endpoint, &identity(&key));
    body["source"]["impersonate"] = json!("admin@project.iam.gserviceaccount.com");
    assert_mint_refused(&app.admin().post("/v1/registry-accounts", &body).await, "PERMISSION_DENIED");
    assert_vendor_refused(&vendor[4], "PERMISSION_DENIED");

    let (username, password, valid_until) = created_login(&app, &account(&endpoint, &identity(&key))).await;
    assert_eq!(username, USERNAME);
    assert_eq!(google.issued(&password), (ACCOUNT.to_owned(), vec![READ_ONLY.to_owned()]));
    assert_alike(&google, (&password, valid_until), &vendor[0]);

    let mut body = account(&endpoint, &identity(&key));
    body["name"] = json!("impersonating");
    body["source"]["impersonate"] = json!(IMPERSONATED);
    let (_, password, valid_until) = created_login(&app, &body).await;
    assert_eq!(google.issued(&password), (IMPERSONATED.to_owned(), vec![READ_ONLY.to_owned()]));
    assert_alike(&google, (&password, valid_until), &vendor[1]);
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn google_fake_refuses_what_google_refuses() {
    let key = ClientKey::new();
    let google = Arc::new(Google::new(key.public(), None));
    let endpoint = format!("{}/token", fakes::serve(&google));
    let now = Utc::now().timestamp();
    let good = json!({
        "iss": ACCOUNT, "scope": READ_ONLY, "aud": "https://oauth2.googleapis.com/token", "iat": now,
        "exp": now + 3_600,
    });
    let grant = "urn:ietf:params:oauth:grant-type:jwt-bearer";
    let post = async |grant: &str, algorithm: &str, change: Value| {
        let mut claims = good.clone();
        claims.as_object_mut().expect("claims").extend(change.as_object().expect("claims").clone());
        let assertion = key.signer().sign(&json!({"alg": algorithm, "kid": KEY_ID}), &claims);
        let (status, body) = post_form(&endpoint, &[("grant_type", grant), ("assertion", &assertion)]).await;
        (status, body["error"].as_str().unwrap_or_default().to_owned())
    };

    assert_eq!(post(grant, "RS256", json!({})).await.0, 200);
    for (grant, algorithm, change, error) in [
        ("authorization_code", "RS256", json!({}), "unsupported_grant_type"),
        (grant, "PS256", json!({}), "invalid_grant"),
        (grant, "none", json!({}), "invalid_grant"),
        (grant, "RS256", json!({"iss": INSTANCE}), "invalid_grant"),
        (grant, "RS256", json!({"aud": endpoint}), "invalid_grant"),
        (grant, "RS256", json!({"exp": now + 7_200}), "invalid_grant"),
        (grant, "RS256", json!({"iat": now - 7_200, "exp": now - 3_600}), "invalid_grant"),
        (grant, "RS256", json!({"iat": now + 600}), "invalid_grant"),
        (grant, "RS256", json!({"scope": ""}), "invalid_scope"),
    ] {
        let refused = post(grant, algorithm, change.clone()).await;
        assert_eq!(refused, (400, error.to_owned()), "{grant} {algorithm} {change}");
    }
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn google_exchanges_tokens_of_a_service_account_of_a_cluster(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    app.register_cluster("dev").await;
    let namespace = new_account("pull").await;
    add_account(&namespace, "other").await;
    let subject = format!("system:serviceaccount:{namespace}:pull");
    let issuer = TrustedIssuer {
        issuer: "https://kubernetes.default.svc",
        key: server_key().public_der(),
        subject: subject.clone(),
    };
    let google = Arc::new(Google::new(Vec::new(), Some(issuer)));
    let endpoint = fakes::serve(&google);
    let identity = |name: &str, audience: Option<&str>| {
        json!({
            "type": "webIdentity", "cluster": "dev", "namespace": namespace, "serviceAccount": name,
            "workloadIdentityProvider": POOL_PROVIDER, "audience": audience,
        })
    };

    let folder = TempDir::new();
    let audience = format!("https://iam.googleapis.com/{POOL_PROVIDER}");
    let tokens = [
        token(&namespace, "pull", &audience, 3_600).await,
        token(&namespace, "other", &audience, 3_600).await,
        token(&namespace, "pull", "vault", 3_600).await,
    ];
    let call = |number: usize, impersonate: Option<&str>| {
        json!({
            "call": "google_web_identity", "endpoint": endpoint, "provider": POOL_PROVIDER, "scope": READ_ONLY,
            "token_file": folder.write(&format!("token-{number}"), &tokens[number]), "impersonate": impersonate,
        })
    };
    let vendor = vendor_calls(&json!([call(0, None), call(0, Some(IMPERSONATED)), call(1, None), call(2, None)]));

    let refused = app.admin().post("/v1/registry-accounts", &account(&endpoint, &identity("other", None))).await;
    assert_mint_refused(&refused, "unauthorized_client");
    assert_vendor_refused(&vendor[2], "unauthorized_client");
    let body = account(&endpoint, &identity("pull", Some("vault")));
    assert_mint_refused(&app.admin().post("/v1/registry-accounts", &body).await, "invalid_grant");
    assert_vendor_refused(&vendor[3], "invalid_grant");

    let (username, password, valid_until) = created_login(&app, &account(&endpoint, &identity("pull", None))).await;
    assert_eq!(username, USERNAME);
    assert_eq!(google.issued(&password), (subject, vec![READ_ONLY.to_owned()]));
    assert_alike(&google, (&password, valid_until), &vendor[0]);

    let mut body = account(&endpoint, &identity("pull", None));
    body["name"] = json!("impersonating");
    body["source"]["impersonate"] = json!(IMPERSONATED);
    let (_, password, valid_until) = created_login(&app, &body).await;
    assert_eq!(google.issued(&password).0, IMPERSONATED);
    assert_alike(&google, (&password, valid_until), &vendor[1]);
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn google_security_token_service_fake_refuses_wrong_parameters() {
    let key = ClientKey::new();
    let issuer = TrustedIssuer { issuer: "https://issuer.example", key: key.public(), subject: "ci".to_owned() };
    let google = Arc::new(Google::new(Vec::new(), Some(issuer)));
    let endpoint = format!("{}/v1/token", fakes::serve(&google));
    let now = Utc::now().timestamp();
    let audience = format!("https://iam.googleapis.com/{POOL_PROVIDER}");
    let claims = json!({"iss": "https://issuer.example", "aud": audience, "sub": "ci", "iat": now, "exp": now + 600});
    let subject_token = key.signer().sign(&json!({"alg": "RS256"}), &claims);
    let forged = ClientKey::new().signer().sign(&json!({"alg": "RS256"}), &claims);
    let target = format!("//iam.googleapis.com/{POOL_PROVIDER}");
    let post = async |changed: &str, value: &str| {
        let good = [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("audience", target.as_str()),
            ("scope", READ_ONLY),
            ("requested_token_type", "urn:ietf:params:oauth:token-type:access_token"),
            ("subject_token_type", "urn:ietf:params:oauth:token-type:jwt"),
            ("subject_token", subject_token.as_str()),
        ];
        let form = good.map(|(name, own)| (name, if name == changed { value } else { own }));
        let (status, body) = post_form(&endpoint, &form).await;
        (status, body["error"].as_str().unwrap_or_default().to_owned())
    };

    assert_eq!(post("", "").await.0, 200);
    for (changed, value, error) in [
        ("grant_type", "client_credentials", "unsupported_grant_type"),
        ("audience", "//iam.googleapis.com/projects/2", "invalid_target"),
        ("scope", "", "invalid_scope"),
        ("requested_token_type", "urn:ietf:params:oauth:token-type:jwt", "invalid_request"),
        ("subject_token_type", "urn:ietf:params:oauth:token-type:saml2", "invalid_request"),
        ("subject_token", "e30.e30.e30", "invalid_grant"),
        ("subject_token", forged.as_str(), "invalid_grant"),
    ] {
        assert_eq!(post(changed, value).await, (400, error.to_owned()), "{changed}");
    }
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn google_metadata_server_issues_tokens_of_the_instance() {
    let google = Arc::new(Google::new(Vec::new(), None));
    let url = fakes::serve(&google);
    let metadata = MetadataConfig {
        instance: url.clone(),
        containers: Vec::new(),
        allowed: "127.0.0.1".parse().expect("an address"),
    };
    let ambient = AmbientConfig { gcp: true, ..AmbientConfig::default() };
    let config = MintClientConfig { ambient, metadata, ..MintClientConfig::default() };
    let source = json!({"type": "googleArtifactRegistry", "identity": {"type": "ambient"}});
    let vendor = vendor_calls(&json!([
        {"call": "google_metadata", "scope": READ_ONLY, "variables": {"GCE_METADATA_HOST": url.trim_start_matches("http://")}},
    ]));

    let (minted, password) = direct_mint(config, &source, None, REGISTRY, None).await.expect("a login");
    assert_eq!(google.issued(&password), (INSTANCE.to_owned(), vec![READ_ONLY.to_owned()]));
    #[expect(clippy::cast_precision_loss, reason = "the value is below 2^53")]
    let now = Utc::now().timestamp() as f64;
    assert_alike(&google, (&password, now + minted.validity.lifetime.as_secs_f64()), &vendor[0]);
    // The fake requires the header that keeps browsers and proxies away.
    let plain = reqwest::get(format!("{url}/computeMetadata/v1/instance/service-accounts/default/token")).await;
    assert_eq!(plain.expect("an answer").status(), 403);
}
