//! Rules: which one applies, and the role and grants of its bearers.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{bearer, issuer::TestIssuer, keys::TestKey, me, spawn, trust_with};
use crate::support::{app::TestApp, kubernetes};

async fn role(app: &TestApp, issuer: &TestIssuer, key: &TestKey, claims: Value) -> Value {
    me(app, &issuer.token(key, claims)).await.expect(200)["role"].clone()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn first_rule_with_all_claims_matching_applies(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    let rules = json!([
        {"claims": {"project_id": "42", "ref_protected": "true", "environment": "prod"}, "role": "operator"},
        {"claims": {"project_id": "42", "ref_protected": "true"}, "role": "deliverer"},
        {"claims": {"project_id": "42"}, "role": "viewer"},
        {"claims": {"groups": "release"}, "role": "renderer"},
        {"claims": {"project_id": "43", "ref_protected": "true"}, "role": "operator"},
    ]);
    trust_with(&app, "gitlab", &issuer, rules).await;

    let prod = json!({"project_id": "42", "ref_protected": "true", "environment": "prod"});
    assert_eq!(role(&app, &issuer, &key, prod).await, "operator");
    let protected = json!({"project_id": 42, "ref_protected": true});
    assert_eq!(role(&app, &issuer, &key, protected).await, "deliverer");
    let open = json!({"project_id": "42", "ref_protected": "false", "environment": "prod"});
    assert_eq!(role(&app, &issuer, &key, open).await, "viewer");
    let grouped = json!({"project_id": "7", "groups": ["dev", "release"]});
    assert_eq!(role(&app, &issuer, &key, grouped).await, "renderer");

    for claims in
        [json!({}), json!({"project_id": "43"}), json!({"project_id": "420"}), json!({"project": {"id": "42"}})]
    {
        let answer = me(&app, &issuer.token(&key, claims)).await;
        answer.problem(403, "no-matching-rule");
        assert_eq!(answer.header("www-authenticate"), "");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn change_of_a_provider_applies_immediately(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    trust_with(&app, "ci", &issuer, json!([{"claims": {"sub": "ci"}, "role": "viewer"}])).await;
    let token = issuer.token(&key, json!({}));
    assert_eq!(me(&app, &token).await.expect(200)["role"], "viewer");

    let rules = json!({"rules": [{"claims": {"sub": "ci"}, "role": "renderer", "grants": {"accounts": ["a-*"]}}]});
    app.admin().patch("/v1/identity-providers/ci", &rules).await.expect(200);
    let changed = me(&app, &token).await.expect(200);
    assert_eq!((&changed["role"], &changed["grants"]["accounts"]), (&json!("renderer"), &json!(["a-*"])));
    app.admin().patch("/v1/identity-providers/ci", &json!({"audience": "regcred-2"})).await.expect(200);
    me(&app, &token).await.problem(401, "invalid-token");
    me(&app, &issuer.token(&key, json!({"aud": "regcred-2"}))).await.expect(200);

    assert_eq!(app.admin().delete("/v1/identity-providers/ci").await.status, 204);
    me(&app, &issuer.token(&key, json!({"aud": "regcred-2"}))).await.problem(401, "invalid-token");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn one_issuer_can_have_two_audiences(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    for (name, audience, role) in [("deploy", "regcred-deploy", "deliverer"), ("read", "regcred-read", "viewer")] {
        let body = json!({
            "name": name, "type": "oidc", "issuer": issuer.url(), "audience": audience,
            "rules": [{"claims": {"sub": "ci"}, "role": role}], "allowMultipleAudiences": true,
        });
        app.admin().post("/v1/identity-providers", &body).await.expect(201);
    }
    assert_eq!(role(&app, &issuer, &key, json!({"aud": "regcred-deploy"})).await, "deliverer");
    assert_eq!(role(&app, &issuer, &key, json!({"aud": "regcred-read"})).await, "viewer");
    // A token for both uses the first provider by name.
    assert_eq!(role(&app, &issuer, &key, json!({"aud": ["regcred-read", "regcred-deploy"]})).await, "deliverer");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_can_access_what_its_rule_grants(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    app.register_cluster("dev").await;
    app.register_account("a-one", "a.example.com", "martin", "canary-a").await;
    app.register_account("b-one", "b.example.com", "martin", "canary-b").await;
    let (mine, other) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    let rules = json!([
        {"claims": {"sub": "render"}, "role": "renderer", "grants": {"accounts": ["a-*"]}},
        {"claims": {"sub": "deliver"}, "role": "deliverer",
         "grants": {"accounts": ["a-*"], "clusters": ["dev"], "namespaces": [mine]}},
    ]);
    trust_with(&app, "ci", &issuer, rules).await;
    let renderer = bearer(&app, &issuer.token(&key, json!({"sub": "render"})));
    let deliverer = bearer(&app, &issuer.token(&key, json!({"sub": "deliver"})));
    let order = |account: &str| json!({"accounts": [account]});
    let secret = |account: &str| json!({"name": "pull", "accounts": [account]});
    let secrets = |namespace: &str| format!("/v1/clusters/dev/namespaces/{namespace}/secrets");

    let config = renderer.post("/v1/docker-configs", &order("a-one")).await.expect(200);
    assert_eq!(config["config"]["auths"]["a.example.com"]["password"], "canary-a");
    renderer.post("/v1/docker-configs", &order("b-one")).await.problem(422, "invalid-request");
    renderer.post(&secrets(&mine), &secret("a-one")).await.problem(403, "forbidden");

    deliverer.post(&secrets(&mine), &secret("a-one")).await.expect(201);
    deliverer.post(&secrets(&mine), &secret("b-one")).await.problem(422, "invalid-request");
    deliverer.post(&secrets(&other), &secret("a-one")).await.problem(404, "namespace-not-found");
    deliverer.post("/v1/docker-configs", &order("a-one")).await.problem(403, "forbidden");
    deliverer.get("/v1/identity-providers").await.problem(403, "forbidden");
    assert_eq!(kubernetes::secret_names(&mine).await, ["pull"]);
    assert_eq!(kubernetes::secret_names(&other).await, [""; 0]);
}
