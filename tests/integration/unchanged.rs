//! A change without a difference: 200 with the same `ETag`, no event, no delivery.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    pull_secrets::{declaration, put, settled},
    support::{app::TestApp, client::Client, given, kubernetes},
};

/// Number of successful changes by callers.
async fn changes(app: &TestApp) -> i64 {
    let sql = "SELECT count(*) FROM audit_events WHERE actor_type = 'apiKey' AND outcome = 'success'";
    sqlx::query_scalar(sql).fetch_one(&app.pool).await.expect("a number")
}

async fn assert_unchanged(app: &TestApp, path: &str, change: &Value) {
    let admin = app.admin();
    let (before, events) = (admin.get(path).await, changes(app).await);
    let answer = admin.patch(path, change).await;
    assert_eq!(answer.expect(200), before.expect(200), "{path} {change}");
    assert_eq!(answer.header("etag"), before.header("etag"), "{path} {change}");
    assert_eq!(changes(app).await, events, "{path} {change}");
    // The precondition is checked nevertheless.
    let stale = admin.request("PATCH", path).header("If-Match", "\"77\"").json(change);
    admin.send(stale).await.problem(412, "stale-version");
}

async fn generation(client: &Client) -> Value {
    client.get("/v1/pull-secrets/team-a").await.expect(200)["generation"].clone()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_without_a_difference_is_not_changed(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (admin, namespace) = (app.admin(), kubernetes::new_namespace().await);
    app.register_cluster("dev").await;
    let created = json!({"name": "a", "registry": "registry.example.com", "username": "dev", "password": "one",
        "labels": {"team": "a"}, "email": "a@example.com", "expiresAt": "2030-01-01T00:00:00.123456789Z"});
    admin.post("/v1/registry-accounts", &created).await.expect(201);
    let declared = declaration(&["a"], "dev", &[&namespace]);
    put(&admin, "team-a", &declared).await.expect(201);
    let before = generation(&admin).await;
    let written = kubernetes::secret(&namespace, "team-a-pull").await.metadata.resource_version;
    let path = "/v1/registry-accounts/a";

    for patch in [
        json!({}),
        json!({"username": "dev"}),
        json!({"password": "one"}),
        json!({"password": "one", "username": "dev", "email": "a@example.com", "labels": {"team": "a"}}),
        json!({"labels": {"other": null}, "expiresAt": "2030-01-01T00:00:00.123456Z"}),
        json!({"registry": "https://registry.example.com", "plainHttp": false, "caCertificate": null}),
    ] {
        assert_unchanged(&app, path, &patch).await;
    }
    assert_eq!(generation(&admin).await, before);
    assert_eq!(put(&admin, "team-a", &declared).await.header("etag"), "\"1\"");

    // A difference beside the same password is no rotation.
    admin.patch(path, &json!({"password": "one", "labels": {"team": "b"}})).await.expect(200);
    let event = admin.get("/v1/audit-events?limit=1").await.expect(200)["items"][0].clone();
    assert_eq!((&event["action"], &event["details"]["fields"]), (&json!("registryAccount.update"), &json!(["labels"])));
    assert_eq!(generation(&admin).await, before);
    settled(&admin, "team-a").await;
    assert_eq!(kubernetes::secret(&namespace, "team-a-pull").await.metadata.resource_version, written);
    admin.patch(path, &json!({"password": "two"})).await.expect(200);
    assert_ne!(generation(&admin).await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn password_replaces_one_that_does_not_open(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "registry.example.com", "dev", "one").await;
    let damage = "UPDATE registry_accounts SET password = set_byte(password, 20, get_byte(password, 20) # 1)";
    sqlx::query(damage).execute(&app.pool).await.expect("damaged");
    let changed = app.admin().patch("/v1/registry-accounts/a", &json!({"password": "one"})).await.expect(200);
    assert_eq!(changed["version"], 2);
    app.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cluster_and_provider_without_a_difference_are_not_changed(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let token = given("REGCRED_TEST_KUBE_ADMIN_TOKEN");
    let shown = app.register_cluster("dev").await;
    for patch in [
        json!({}),
        json!({"allowPlainHttp": false}),
        json!({"server": shown["server"], "caCertificate": shown["caCertificate"], "tlsServerName": null}),
        json!({"auth": {"type": "token", "token": token}}),
    ] {
        assert_unchanged(&app, "/v1/clusters/dev", &patch).await;
    }
    let other = json!({"auth": {"type": "token", "token": "other"}});
    assert_eq!(admin.patch("/v1/clusters/dev", &other).await.expect(200)["version"], 2);

    let rules = json!([{"claims": {"sub": "ci"}, "role": "viewer"}]);
    let provider = json!({"name": "p", "type": "oidc", "issuer": "https://issuer.example.com", "audience": "regcred",
        "rules": rules});
    admin.post("/v1/identity-providers", &provider).await.expect(201);
    for patch in [json!({}), json!({"audience": "regcred"}), json!({"rules": rules, "tokenTypes": []})] {
        assert_unchanged(&app, "/v1/identity-providers/p", &patch).await;
    }
    let changed = admin.patch("/v1/identity-providers/p", &json!({"audience": "other"})).await.expect(200);
    assert_eq!(changed["version"], 2);
}
