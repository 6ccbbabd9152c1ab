//! Where the secrets and logins of sources may go, and who may say so.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    ALLOW,
    token_service::{PATH, TokenService},
};
use crate::{
    support::{app::TestApp, client::Client, listener::listen},
    verify::listening::{Requests, answer, serve},
};

const ECR: &str = "123456789012.dkr.ecr.eu-central-1.amazonaws.com";

/// A host of a caller, which regcred must not call.
fn foreign_host() -> (String, Requests) {
    let (address, requests) = serve(|_| answer("200 OK", &[], "{}"));
    (format!("http://{address}"), requests)
}

async fn spawn(pool: PgPool) -> TestApp {
    let variables = [("REGCRED_MINT_ALLOW", "127.0.0.1"), ("REGCRED_MINT_AMBIENT", "aws,gcp,azure")];
    TestApp::configured(pool, &variables).await
}

/// An operator with all grants except for some accounts.
async fn narrow(app: &TestApp) -> Client {
    let grants = json!({"accounts": ["team-*"], "clusters": ["*"], "namespaces": ["*"]});
    app.caller("narrow", "operator", Some(grants)).await
}

fn account(registry: &str, source: &Value) -> Value {
    json!({"name": "team-a", "registry": registry, "source": source})
}

fn ecr(members: &Value) -> Value {
    let identity = json!({"type": "accessKey", "accessKeyId": "AKIA1", "secretAccessKey": "canary"});
    merged(json!({"type": "ecr", "region": "eu-central-1", "identity": identity}), members)
}

fn merged(mut object: Value, members: &Value) -> Value {
    object.as_object_mut().expect("an object").extend(members.as_object().expect("an object").clone());
    object
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn hosts_and_identities_of_regcred_require_all_grants(pool: PgPool) {
    let app = spawn(pool).await;
    let (caller, (host, requests)) = (narrow(&app).await, foreign_host());
    let ambient = json!({"type": "ambient"});
    let client = json!({"type": "clientSecret", "clientId": "regcred", "clientSecret": "canary"});
    let google = json!({"type": "googleArtifactRegistry", "identity": ambient});
    let azure = json!({"type": "azureContainerRegistry", "identity": ambient});
    for (registry, source) in [
        (ECR, ecr(&json!({"endpoint": host}))),
        (ECR, ecr(&json!({"stsEndpoint": host}))),
        (ECR, ecr(&json!({"identity": ambient}))),
        ("europe-docker.pkg.dev", google.clone()),
        ("europe-docker.pkg.dev", merged(google, &json!({"endpoint": host}))),
        ("team.azurecr.io", azure.clone()),
        ("team.azurecr.io", merged(azure, &json!({"tenantId": "t", "authority": host, "identity": client}))),
    ] {
        let refused = caller.post("/v1/registry-accounts", &account(registry, &source)).await;
        refused.problem(403, "forbidden");
        assert!(!refused.body.contains("canary"), "{refused:?}");
    }
    assert_eq!((requests.count(), app.rows().await[0]), (0, 0));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn ambient_identity_is_shown_to_its_provider_only(pool: PgPool) {
    let app = spawn(pool).await;
    let (host, requests) = foreign_host();
    let ambient = json!({"type": "ambient"});
    let google = json!({"type": "googleArtifactRegistry", "identity": ambient, "endpoint": host});
    let azure = json!({"type": "azureContainerRegistry", "identity": ambient, "authority": host});
    for (source, field) in [
        (ecr(&json!({"identity": ambient, "endpoint": host})), "source.endpoint"),
        (ecr(&json!({"identity": ambient, "stsEndpoint": host})), "source.stsEndpoint"),
        (google, "source.endpoint"),
        (azure, "source.authority"),
    ] {
        let registry = if field == "source.stsEndpoint" { ECR } else { "registry.example.com" };
        let refused = app.admin().post("/v1/registry-accounts", &account(registry, &source)).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field]);
    }
    assert_eq!((requests.count(), app.rows().await[0]), (0, 0));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn login_of_a_cloud_goes_to_its_registries_over_tls(pool: PgPool) {
    let app = spawn(pool).await;
    let caller = narrow(&app).await;
    for registry in [
        "registry.example.com",
        "123456789012.dkr.ecr.eu-west-1.amazonaws.com",
        "123456789012.dkr.ecr.eu-central-1.amazonaws.com.example.com",
        "123456789012.dkr.ecr.eu-central-1.amazonaws.com:8443",
    ] {
        let refused = caller.post("/v1/registry-accounts", &account(registry, &ecr(&json!({})))).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["registry"], "{registry}");
    }
    let plain = merged(account(ECR, &ecr(&json!({}))), &json!({"plainHttp": true}));
    assert_eq!(caller.post("/v1/registry-accounts", &plain).await.fields(), ["plainHttp"]);
    assert_eq!(app.rows().await[0], 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn login_is_not_verified_at_a_registry_of_another_provider(pool: PgPool) {
    let (app, provider) = (TestApp::configured(pool, ALLOW).await, TokenService::start());
    let (registry, requests) = serve(|_| answer("200 OK", &[], "{}"));
    let mut account = provider.account();
    account["registry"] = json!(registry.to_string());
    app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    let verify = async || app.admin().post(&format!("{PATH}/verify"), &json!({})).await;
    verify().await.expect(200);
    let called = requests.count();
    assert!(called > 0);
    // As an edit of the database, or a release with other registries, leaves it. The password is not
    // bound to the source, so it opens.
    let source = r#"{"type":"ecr","region":"eu-central-1","identity":{"type":"accessKey","accessKeyId":"AKIA1"}}"#;
    sqlx::query("UPDATE account_mints SET source = $1").bind(source).execute(&app.pool).await.expect("an edit");

    let changed = app.admin().patch(&format!("{PATH}?verify=true"), &json!({"email": "a@example.com"})).await;
    for refused in [verify().await, changed] {
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["registry"]);
    }
    assert_eq!(requests.count(), called);
}

/// How a host in an ambiguous spelling is refused.
#[derive(Debug, Clone, Copy)]
enum Refusal {
    /// As an invalid field.
    Field,
    /// By the guard, which knows the address that the spelling means.
    Guard,
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn ambiguous_spelling_of_an_inner_host_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    let inner = listen(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    for (host, refusal) in [
        ("127.0.0.1", Refusal::Guard),
        ("2130706433", Refusal::Guard),
        ("0177.0.0.1", Refusal::Guard),
        ("0x7f.0.0.1", Refusal::Guard),
        ("0x7f000001", Refusal::Guard),
        ("127.1", Refusal::Guard),
        ("127.0.0.1.", Refusal::Guard),
        ("%31%32%37.0.0.1", Refusal::Guard),
        ("[::ffff:127.0.0.1]", Refusal::Guard),
        ("login.microsoftonline.com@127.0.0.1", Refusal::Field),
        ("login.microsoftonline.com%40127.0.0.1", Refusal::Field),
        ("login.microsoftonline.com\\@127.0.0.1", Refusal::Field),
        ("127.0.0.1\t", Refusal::Field),
        ("127.0.0.256", Refusal::Field),
    ] {
        let source = json!({
            "type": "oauth2", "tokenUrl": format!("http://{host}:{}/token", inner.port()), "username": "robot",
            "identity": {"type": "clientSecret", "clientId": "regcred", "clientSecret": "canary"},
        });
        let account = merged(account("registry.example.com", &source), &json!({"plainHttp": true}));
        let refused = app.admin().post("/v1/registry-accounts", &account).await;
        match refusal {
            Refusal::Field => {
                refused.problem(422, "invalid-request");
                assert_eq!(refused.fields(), ["source.tokenUrl"], "{host}");
            }
            Refusal::Guard => {
                let detail = refused.problem(502, "mint-failed")["detail"].to_string();
                assert!(
                    detail.contains("(misconfigured)") && detail.contains("REGCRED_MINT_ALLOW"),
                    "{host}: {detail}"
                );
            }
        }
    }
    assert_eq!((connections.load(Ordering::SeqCst), app.rows().await[0]), (0, 0));
}
