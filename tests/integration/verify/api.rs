//! Verification through the API: on demand, and before an account is stored.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    certificates::Ca,
    listening::{answer, bearer, serve},
    registries::{Setup, TAGGED, TestRegistry},
    token_service::{Deviations, TokenService},
};
use crate::support::{app::TestApp, client::Answer, registry};

const LOOPBACK: &[(&str, &str)] = &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")];

async fn spawn(pool: PgPool) -> TestApp {
    TestApp::configured(pool, LOOPBACK).await
}

fn account(name: &str, registry: &(impl ToString + ?Sized), username: &str, password: &str) -> Value {
    json!({
        "name": name, "registry": registry.to_string(), "username": username, "password": password, "plainHttp": true,
    })
}

async fn create(app: &TestApp, query: &str, body: &Value) -> Answer {
    app.admin().post(&format!("/v1/registry-accounts{query}"), body).await
}

async fn verify(app: &TestApp, name: &str, body: Option<Value>) -> Answer {
    let request = app.admin().request("POST", &format!("/v1/registry-accounts/{name}/verify"));
    app.admin()
        .send(match body {
            Some(body) => request.json(&body),
            None => request,
        })
        .await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn login_is_verified_on_demand_and_the_result_is_stored(pool: PgPool) {
    let app = spawn(pool).await;
    let there = registry::a();
    create(&app, "", &account("right", &there.address, &there.username, &there.password)).await.expect(201);
    create(&app, "", &account("wrong", &there.address, &there.username, "canary-password")).await.expect(201);
    let path = "/v1/registry-accounts/right";
    let before = app.admin().get(path).await.expect(200);
    assert_eq!((&before["lastVerifiedAt"], &before["lastVerificationResult"]), (&Value::Null, &Value::Null));

    for body in [None, Some(json!({})), Some(json!({"repository": TAGGED})), Some(json!({"repository": null}))] {
        let found = verify(&app, "right", body).await.expect(200);
        assert_eq!(found["result"], "valid", "{found}");
        let after = app.admin().get(path).await.expect(200);
        assert_eq!(after["lastVerificationResult"], "valid");
        assert_eq!(after["lastVerificationDetail"], found["detail"]);
        assert!(after["lastVerifiedAt"].is_string() && found["checkedAt"].is_string());
        // A verification does not change the ETag.
        assert_eq!((&after["version"], &after["updatedAt"]), (&before["version"], &before["updatedAt"]));
    }
    let healthy = app.admin().get(path).await.expect(200)["lastVerificationDetail"].clone();
    let found = verify(&app, "right", Some(json!({"repository": "os/nothing"}))).await.expect(200);
    assert_eq!(found["result"], "noAccess", "{found}");
    // The login works all the same, so the health of the account is unchanged.
    let after = app.admin().get(path).await.expect(200);
    assert_eq!((&after["lastVerificationResult"], &after["lastVerificationDetail"]), (&json!("valid"), &healthy));
    let events = app.admin().get("/v1/audit-events?action=registryAccount.verify").await.expect(200);
    assert_eq!(events["items"].as_array().map(Vec::len), Some(5), "every verification is audited");

    // A 401 of the registry is a result, not an error.
    let found = verify(&app, "wrong", None).await;
    assert_eq!(found.expect(200)["result"], "invalid");
    assert_eq!(app.admin().get("/v1/registry-accounts/wrong").await.expect(200)["lastVerificationResult"], "invalid");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn invalid_verification_request_is_refused(pool: PgPool) {
    let app = spawn(pool).await;
    let there = registry::a();
    let scoped = format!("{}/os", there.address);
    create(&app, "", &account("scoped", &scoped, &there.username, &there.password)).await.expect(201);
    for (body, field) in [
        (json!({"repository": "other/app"}), "repository"),
        (json!({"repository": "os/alpine:3"}), "repository"),
        (json!({"repository": "os/../../_catalog"}), "repository"),
        (json!({"repository": 7}), "repository"),
        (json!({"password": "canary-password"}), "password"),
    ] {
        let refused = verify(&app, "scoped", Some(body)).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field], "{refused:?}");
    }
    assert_eq!(verify(&app, "scoped", Some(json!({"repository": "os/alpine"}))).await.expect(200)["result"], "valid");
    verify(&app, "unknown", None).await.problem(404, "not-found");
    let text = app.admin().request("POST", "/v1/registry-accounts/scoped/verify").body("os/alpine");
    app.admin().send(text).await.problem(415, "unsupported-media-type");
    app.anonymous().post("/v1/registry-accounts/scoped/verify", &json!({})).await.problem(401, "unauthenticated");
    for query in ["?verify=yes", "?verified=true", "?repository=os/alpine"] {
        create(&app, query, &account("a", &scoped, "a", "b")).await.problem(422, "invalid-request");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_with_verify_is_stored_only_if_its_login_works(pool: PgPool) {
    let app = spawn(pool).await;
    let there = registry::a();
    let refused = create(&app, "?verify=true", &account("a", &there.address, &there.username, "canary-password")).await;
    let problem = refused.problem(422, "verification-failed");
    assert_eq!(refused.fields(), ["password"]);
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("(invalid)")), "{problem}");
    assert!(!refused.body.contains("canary"), "{refused:?}");
    assert_eq!(app.rows().await[0], 0);

    let good = account("a", &there.address, &there.username, &there.password);
    let refused = create(&app, "?verify=true&repository=os/nothing", &good).await;
    assert!(refused.problem(422, "verification-failed")["detail"].as_str().unwrap().contains("(noAccess)"));
    assert_eq!(app.rows().await[0], 0);

    let created = create(&app, "?verify=true&repository=os/alpine", &good).await.expect(201);
    assert_eq!(created["lastVerificationResult"], "valid");
    assert_eq!(app.admin().get("/v1/registry-accounts/a").await.expect(200), created);

    // Every other failure refuses the request, too.
    for (registry, result) in [("127.0.0.1:1", "unreachable"), ("10.0.0.1:5000", "refused")] {
        let refused = create(&app, "?verify=true", &account("b", &registry, "a", "canary-password")).await;
        let problem = refused.problem(422, "verification-failed");
        assert!(problem["detail"].as_str().unwrap().contains(&format!("({result})")), "{problem}");
        assert_eq!(refused.fields(), ["registry"]);
    }
    let (busy, _) = serve(|_| answer("429 Too Many Requests", &[("Retry-After", "30")], ""));
    let refused = create(&app, "?verify=true", &account("b", &busy, "a", "b")).await;
    refused.problem(422, "verification-failed");
    assert!(
        refused.header("retry-after").parse::<u64>().is_ok_and(|seconds| (1..=30).contains(&seconds)),
        "{refused:?}"
    );
    assert_eq!(app.rows().await[0], 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rotation_that_fails_verification_changes_nothing(pool: PgPool) {
    let app = spawn(pool).await;
    let there = registry::a();
    let good = account("a", &there.address, &there.username, &there.password);
    let before = create(&app, "?verify=true", &good).await.expect(201);
    let path = "/v1/registry-accounts/a";

    let rotation = json!({"password": "canary-password", "labels": {"a": "b"}});
    let refused = app.admin().patch(&format!("{path}?verify=true"), &rotation).await;
    refused.problem(422, "verification-failed");
    assert_eq!((refused.fields(), refused.body.contains("canary")), (vec!["password".to_owned()], false));
    assert_eq!(app.admin().get(path).await.expect(200), before);
    assert_eq!(verify(&app, "a", None).await.expect(200)["result"], "valid");

    // Without `verify` the rotation is stored, and the result for the old password is cleared.
    let rotated = app.admin().patch(path, &rotation).await.expect(200);
    assert_eq!((&rotated["version"], &rotated["lastVerificationResult"]), (&json!(2), &Value::Null));
    let back = json!({"password": there.password});
    let rotated = app.admin().patch(&format!("{path}?verify=true&repository=os/alpine"), &back).await.expect(200);
    assert_eq!((&rotated["version"], &rotated["lastVerificationResult"]), (&json!(3), &json!("valid")));
    // Another change keeps the result, and can be verified, too.
    let labelled = app.admin().patch(path, &json!({"labels": {"c": "d"}})).await.expect(200);
    assert_eq!(labelled["lastVerificationResult"], "valid");
    app.admin().patch(&format!("{path}?verify=true"), &json!({"email": "a@example.com"})).await.expect(200);
    let stale = app.admin().request("PATCH", &format!("{path}?verify=true")).header("If-Match", "\"1\"").json(&back);
    app.admin().send(stale).await.problem(412, "stale-version");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stored_password_is_not_sent_to_another_host(pool: PgPool) {
    let app = spawn(pool).await;
    let there = registry::a();
    create(&app, "", &account("a", &there.address, &there.username, &there.password)).await.expect(201);
    let (thief, requests) = serve(|_| answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], ""));
    let path = "/v1/registry-accounts/a";
    let moved = json!({"registry": thief.to_string()});

    // Refused with `verify`, which would send the password at once, and without it.
    for query in ["?verify=true", ""] {
        let refused = app.admin().patch(&format!("{path}{query}"), &moved).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["registry"]);
    }
    assert_eq!(verify(&app, "a", None).await.expect(200)["result"], "valid");
    assert_eq!(requests.count(), 0);

    let with_password = json!({"registry": there.address, "password": there.password});
    app.admin().patch(path, &with_password).await.expect(200);
    assert_eq!(verify(&app, "a", None).await.expect(200)["result"], "valid");
    // Another path of the same host is the same host.
    app.admin().patch(path, &json!({"registry": format!("{}/os", there.address)})).await.expect(200);
    assert_eq!(verify(&app, "a", None).await.expect(200)["result"], "valid");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn private_ca_is_trusted_for_its_account_only(pool: PgPool) {
    let app = spawn(pool).await;
    let ca = Ca::new();
    let registry =
        TestRegistry::start(Setup { users: &[("martin", "xxx1")], tls: Some(&ca.certify()), ..Setup::default() }).await;
    let mut body = account("a", &registry.address, "martin", "xxx1");
    body["plainHttp"] = json!(false);
    create(&app, "", &body).await.expect(201);
    assert_eq!(verify(&app, "a", None).await.expect(200)["result"], "tlsError");

    let path = "/v1/registry-accounts/a";
    let trust = json!({"caCertificate": ca.pem, "password": "xxx1"});
    let trusting = app.admin().patch(&format!("{path}?verify=true"), &trust).await.expect(200);
    assert_eq!(trusting["lastVerificationResult"], "valid");
    let shown = app.admin().get(path).await.expect(200);
    let pem = |text: &Value| text.as_str().unwrap().replace(['\r', '\n'], "");
    assert_eq!(pem(&shown["caCertificate"]), pem(&json!(ca.pem)));
    assert_eq!(
        app.admin().patch(path, &json!({"caCertificate": null})).await.expect(200)["caCertificate"],
        Value::Null
    );
    assert_eq!(verify(&app, "a", None).await.expect(200)["result"], "tlsError");
    for bad in ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let refused = app.admin().patch(path, &json!({"caCertificate": bad})).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["caCertificate"]);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn internal_addresses_are_refused_by_default(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let there = registry::a();
    create(&app, "", &account("a", &there.address, &there.username, &there.password)).await.expect(201);
    let found = verify(&app, "a", None).await.expect(200);
    assert_eq!(found["result"], "refused", "{found}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn no_response_contains_text_of_the_registry_or_a_login(pool: PgPool) {
    let app = spawn(pool).await;
    let service = TokenService::start(Deviations::default());
    let realm = service.realm();
    let (echo, _) = serve(move |request| {
        // Repeats the login in all parts of its response.
        let login = request.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap_or("canary-upstream");
        if login.starts_with("Bearer") {
            answer("418 Canary", &[("X-Canary", login), ("WWW-Authenticate", login)], login)
        } else {
            bearer(&realm)
        }
    });
    let (odd, _) = serve(|request| answer("200 canary-upstream", &[("X-Canary", "canary-upstream")], request));
    for (name, registry, user) in [("echo", echo, "martin"), ("odd", odd, "martin"), ("old", echo, "old")] {
        create(&app, "", &account(name, &registry, user, "canary-password")).await.expect(201);
        let found = verify(&app, name, None).await;
        found.expect(200);
        let shown = app.admin().get(&format!("/v1/registry-accounts/{name}")).await;
        let metrics = app.operations().get("/metrics").await;
        for text in [&found.body, &shown.body, &metrics.body] {
            assert!(!text.contains("canary") && !text.contains("Y2FuYXJ5"), "{text}");
            assert!(!text.contains("eyJ"), "a token: {text}");
        }
    }
    let metrics = app.operations().get("/metrics").await.body;
    assert!(metrics.contains(r#"regcred_verifications_total{trigger="request",result="invalid"} 1"#), "{metrics}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn nothing_is_sent_for_an_account_that_is_not_granted(pool: PgPool) {
    let app = spawn(pool).await;
    let (there, requests) = serve(|_| answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], ""));
    create(&app, "", &account("out-a", &there, "martin", "canary-password")).await.expect(201);
    let operator =
        app.caller("operator", "operator", Some(json!({"accounts": ["in-*"], "clusters": [], "namespaces": []}))).await;
    let body = account("out-b", &there, "martin", "canary-password");
    operator.post("/v1/registry-accounts?verify=true", &body).await.problem(403, "forbidden");
    operator
        .patch("/v1/registry-accounts/out-a?verify=true", &json!({"password": "x"}))
        .await
        .problem(404, "not-found");
    operator.post("/v1/registry-accounts/out-a/verify", &json!({})).await.problem(404, "not-found");
    assert_eq!(requests.count(), 0);

    let body = account("in-a", &there, "martin", "canary-password");
    operator.post("/v1/registry-accounts?verify=true", &body).await.problem(422, "verification-failed");
    assert_eq!(requests.count(), 2);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rejected_password_with_white_space_names_the_likely_cause(pool: PgPool) {
    let app = spawn(pool).await;
    let there = registry::a();
    for (name, suffix, is_named) in [("newline", "\n", true), ("space", " ", true), ("wrong", "x", false)] {
        let password = format!("{}{suffix}", there.password);
        create(&app, "", &account(name, &there.address, &there.username, &password)).await.expect(201);
        let found = verify(&app, name, None).await.expect(200);
        let detail = found["detail"].as_str().expect("a text");
        assert_eq!(
            (&found["result"], detail.contains("white space at the end")),
            (&json!("invalid"), is_named),
            "{found}"
        );
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn mistyped_repository_does_not_replace_the_health_of_an_account(pool: PgPool) {
    let app = spawn(pool).await;
    let there = registry::a();
    create(&app, "", &account("right", &there.address, &there.username, &there.password)).await.expect(201);
    create(&app, "", &account("wrong", &there.address, &there.username, "canary-password")).await.expect(201);
    let stored = async |name: &str| {
        let account = app.admin().get(&format!("/v1/registry-accounts/{name}")).await.expect(200);
        account["lastVerificationResult"].clone()
    };
    for (name, result) in [("right", "noAccess"), ("wrong", "invalid")] {
        let found = verify(&app, name, Some(json!({"repository": "os/nothing"}))).await.expect(200);
        assert_eq!((&found["result"], stored(name).await), (&json!(result), Value::Null), "{found}");
        assert!(found["checkedAt"].is_string(), "{found}");
    }
    let health = "SELECT count(*) FROM registry_accounts WHERE last_verification_result IS NOT NULL";
    assert_eq!(sqlx::query_scalar::<_, i64>(health).fetch_one(&app.pool).await.expect("a count"), 0);
    // `valid` proves the login.
    verify(&app, "right", Some(json!({"repository": "os/alpine"}))).await.expect(200);
    assert_eq!(stored("right").await, "valid");
}
