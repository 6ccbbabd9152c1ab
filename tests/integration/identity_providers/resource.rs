//! `/v1/identity-providers`: requests, validation, and references between resources.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::app::TestApp;

const PATH: &str = "/v1/identity-providers";

fn gitlab() -> Value {
    json!({
        "name": "gitlab", "type": "oidc", "issuer": "https://gitlab.example.com", "audience": "regcred",
        "rules": [{"claims": {"project_id": "42", "ref_protected": "true"}, "role": "deliverer",
            "grants": {"accounts": ["team-a-*"], "clusters": ["dev"], "namespaces": ["a-*"]}}],
    })
}

fn pods() -> Value {
    json!({
        "name": "dev-pods", "type": "tokenReview", "cluster": "dev", "audience": "regcred",
        "rules": [{"claims": {"namespace": "a-dev", "serviceAccount": "ci"}, "role": "deliverer"}],
    })
}

fn with(mut body: Value, members: Value) -> Value {
    let Value::Object(members) = members else { panic!("an object") };
    body.as_object_mut().expect("an object").extend(members);
    body
}

fn cluster(name: &str) -> Value {
    json!({"name": name, "server": "https://127.0.0.1:1", "auth": {"type": "none"}})
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn provider_can_be_created_changed_listed_and_deleted(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();

    let created = admin.post(PATH, &gitlab()).await;
    let view = created.expect(201);
    assert_eq!((created.header("location"), created.header("etag")), ("/v1/identity-providers/gitlab", "\"1\""));
    for field in ["name", "type", "issuer", "audience", "rules"] {
        assert_eq!(view[field], gitlab()[field], "{field}");
    }
    assert_eq!((&view["cluster"], &view["caCertificate"], &view["version"]), (&Value::Null, &Value::Null, &json!(1)));
    assert_eq!(admin.get("/v1/identity-providers/gitlab").await.expect(200), view);

    let stale = admin.request("PATCH", "/v1/identity-providers/gitlab").header("If-Match", "\"7\"");
    admin.send(stale.json(&json!({"audience": "x"}))).await.problem(412, "stale-version");
    let fresh = admin.request("PATCH", "/v1/identity-providers/gitlab").header("If-Match", "\"1\"");
    let changed = admin.send(fresh.json(&json!({"audience": "x", "issuer": "https://gitlab.example.org"}))).await;
    assert_eq!(changed.header("etag"), "\"2\"");
    let changed = changed.expect(200);
    assert_eq!((&changed["audience"], &changed["issuer"]), (&json!("x"), &json!("https://gitlab.example.org")));
    assert_eq!(changed["rules"], view["rules"]);

    admin.post(PATH, &with(gitlab(), json!({"name": "another"}))).await.expect(201);
    let page = admin.get("/v1/identity-providers?limit=1").await.expect(200);
    assert_eq!(page["items"][0]["name"], "another");
    let next = format!("/v1/identity-providers?limit=1&cursor={}", page["next"].as_str().expect("a cursor"));
    assert_eq!(admin.get(&next).await.expect(200)["items"][0]["name"], "gitlab");

    let stale = admin.request("DELETE", "/v1/identity-providers/gitlab").header("If-Match", "\"1\"");
    admin.send(stale).await.problem(412, "stale-version");
    assert_eq!(admin.delete("/v1/identity-providers/gitlab").await.status, 204);
    admin.get("/v1/identity-providers/gitlab").await.problem(404, "not-found");
    admin.delete("/v1/identity-providers/gitlab").await.problem(404, "not-found");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn invalid_fields_are_reported_by_name(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.admin().post("/v1/clusters", &cluster("dev")).await.expect(201);
    let rule = |claims: Value, role: &str| json!({"rules": [{"claims": claims, "role": role}]});
    let github = json!({"issuer": "https://token.actions.githubusercontent.com"});
    for (body, fields) in [
        (with(gitlab(), json!({"name": "Git"})), vec!["name"]),
        (with(gitlab(), json!({"audience": ""})), vec!["audience"]),
        (with(gitlab(), json!({"issuer": "http://gitlab.example.com"})), vec!["issuer"]),
        (with(gitlab(), json!({"issuer": null, "cluster": "dev"})), vec!["issuer", "cluster"]),
        (with(gitlab(), json!({"caCertificate": "x"})), vec!["caCertificate"]),
        (with(gitlab(), json!({"rules": []})), vec!["rules"]),
        (with(gitlab(), rule(json!({}), "viewer")), vec!["rules[0].claims"]),
        (with(gitlab(), rule(json!({"sub": "a"}), "admin")), vec!["rules[0].role"]),
        (with(gitlab(), rule(json!({"sub": 7}), "viewer")), vec!["rules[0].claims.sub"]),
        (with(gitlab(), json!({"type": "saml"})), vec!["type"]),
        (with(gitlab(), json!({"secret": "x"})), vec!["secret"]),
        (with(gitlab(), github.clone()), vec!["rules[0].claims"]),
        (
            with(with(gitlab(), github), rule(json!({"sub": "environment:production"}), "viewer")),
            vec!["rules[0].claims.sub"],
        ),
        (with(gitlab(), json!({"tokenTypes": ["JWT"]})), vec!["tokenTypes"]),
        (with(pods(), json!({"audience": "https://kubernetes.default.svc"})), vec!["audience"]),
        (with(pods(), json!({"cluster": "prod"})), vec!["cluster"]),
        (with(pods(), rule(json!({"serviceAccount": "default"}), "viewer")), vec!["rules[0].claims"]),
    ] {
        let answer = app.admin().post(PATH, &body).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), fields, "{body}");
    }
    let missing = json!({"name": "x", "type": "oidc", "issuer": "https://a.example.com", "rules": []});
    assert_eq!(app.admin().post(PATH, &missing).await.fields(), ["audience"]);

    app.admin().post(PATH, &gitlab()).await.expect(201);
    for (change, fields) in [
        (json!({"type": "tokenReview"}), vec!["type"]),
        (json!({"cluster": "dev"}), vec!["cluster"]),
        (json!({"audience": null}), vec!["audience"]),
        (json!({"rules": []}), vec!["rules"]),
        (
            json!({"issuer": "https://gitlab.com", "rules": [{"claims": {"ref_protected": "true"}, "role": "viewer"}]}),
            vec!["rules[0].claims"],
        ),
    ] {
        let answer = app.admin().patch("/v1/identity-providers/gitlab", &change).await;
        assert_eq!(
            (answer.status, answer.fields()),
            (422, fields.into_iter().map(str::to_owned).collect()),
            "{change}"
        );
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn providers_that_accept_the_same_tokens_conflict(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    for name in ["dev", "prod"] {
        admin.post("/v1/clusters", &cluster(name)).await.expect(201);
    }
    admin.post(PATH, &gitlab()).await.expect(201);
    admin.post(PATH, &pods()).await.expect(201);

    admin.post(PATH, &gitlab()).await.problem(409, "name-taken");
    admin.post(PATH, &with(gitlab(), json!({"name": "again"}))).await.problem(409, "audience-taken");
    let other_cluster = with(pods(), json!({"name": "prod-pods", "cluster": "prod"}));
    admin.post(PATH, &other_cluster).await.problem(409, "audience-taken");
    admin.post(PATH, &with(other_cluster, json!({"audience": "regcred-prod"}))).await.expect(201);
    admin
        .patch("/v1/identity-providers/prod-pods", &json!({"audience": "regcred"}))
        .await
        .problem(409, "audience-taken");
    // Another issuer issues other tokens.
    admin.post(PATH, &with(gitlab(), json!({"name": "b", "issuer": "https://b.example.com"}))).await.expect(201);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cluster_that_reviews_tokens_cannot_be_deleted(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    admin.post("/v1/clusters", &cluster("dev")).await.expect(201);
    admin.post(PATH, &pods()).await.expect(201);

    let refused = admin.delete("/v1/clusters/dev").await.problem(409, "in-use");
    assert_eq!(
        refused["detail"],
        "the cluster `dev` is used by `identity-providers/dev-pods`: change or delete it first"
    );
    admin.get("/v1/clusters/dev").await.expect(200);

    admin.post("/v1/clusters", &cluster("prod")).await.expect(201);
    let moved = admin.patch("/v1/identity-providers/dev-pods", &json!({"cluster": "prod"})).await.expect(200);
    assert_eq!(moved["cluster"], "prod");
    assert_eq!(admin.delete("/v1/clusters/dev").await.status, 204);
    admin.delete("/v1/clusters/prod").await.problem(409, "in-use");
    assert_eq!(admin.delete("/v1/identity-providers/dev-pods").await.status, 204);
    assert_eq!(admin.delete("/v1/clusters/prod").await.status, 204);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn operator_cannot_replace_the_server_that_reviews_tokens(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.admin().post("/v1/clusters", &cluster("dev")).await.expect(201);
    let operator = app.caller("operator", "operator", None).await;
    let elsewhere = json!({"server": "https://127.0.0.1:2"});
    operator.patch("/v1/clusters/dev", &elsewhere).await.expect(200);
    app.admin().post(PATH, &pods()).await.expect(201);

    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:3"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    });
    for change in [
        json!({"server": "https://127.0.0.1:3"}),
        json!({"tlsServerName": "mine.example.com"}),
        json!({"auth": {"type": "token", "token": "t"}, "server": "https://127.0.0.1:3"}),
        json!({"auth": {"type": "inCluster"}}),
        json!({"kubeconfig": kubeconfig.to_string()}),
    ] {
        let problem = operator.patch("/v1/clusters/dev", &change).await.problem(403, "forbidden");
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("identity-providers/dev-pods")));
    }
    operator.delete("/v1/clusters/dev").await.problem(409, "in-use");
    // The operator may change the credential for the same server.
    operator.patch("/v1/clusters/dev", &json!({"auth": {"type": "token", "token": "t"}})).await.expect(200);
    let moved = json!({"server": "https://127.0.0.1:3", "auth": {"type": "token", "token": "t"}});
    app.admin().patch("/v1/clusters/dev", &moved).await.expect(200);
}
