//! Security headers and CORS.

use serde_json::json;
use sqlx::PgPool;

use crate::support::{app::TestApp, client::Answer};

const LISTED: &str = "https://console.example";

fn assert_has(answer: &Answer, name: &str, value: &str) {
    assert_eq!(answer.header(name), value, "{name} of {answer:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_response_has_security_headers(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (admin, anonymous) = (app.admin(), app.anonymous());
    app.register_account("broken", "ghcr.io", "dev", "correct-horse").await;
    sqlx::query("UPDATE registry_accounts SET password = '\\x00'").execute(&app.pool).await.expect("broken");
    let answers = [
        (200, admin.get("/v1/me").await),
        (200, admin.get("/healthz").await),
        (200, admin.get("/readyz").await),
        (200, app.operations().get("/metrics").await),
        (204, admin.delete("/v1/registry-accounts/none").await),
        (
            400,
            admin
                .send(admin.request("POST", "/v1/clusters").header("content-type", "application/json").body("{"))
                .await,
        ),
        (401, anonymous.get("/v1/me").await),
        (404, admin.get("/nowhere").await),
        (404, admin.get("/v1/registry-accounts/none").await),
        (405, admin.delete("/v1/me").await),
        (413, admin.send(admin.request("POST", "/v1/clusters").json(&"x".repeat(1024 * 1024))).await),
        (415, admin.send(admin.request("POST", "/v1/clusters").body("x")).await),
        (422, admin.post("/v1/clusters", &json!({})).await),
        (500, admin.post("/v1/docker-configs", &json!({"accounts": ["broken"]})).await),
    ];
    for (status, answer) in &answers {
        // The account to delete does not exist.
        assert!(answer.status == *status || (*status, answer.status) == (204, 404), "{status}: {answer:?}");
        assert_has(answer, "x-content-type-options", "nosniff");
        assert_has(answer, "x-frame-options", "DENY");
        assert_has(answer, "referrer-policy", "no-referrer");
        assert_has(answer, "cross-origin-resource-policy", "same-origin");
        assert_has(answer, "content-security-policy", "default-src 'none'; frame-ancestors 'none'");
        assert_has(answer, "cache-control", "no-store");
        // Sent by the TLS listener or a proxy.
        assert_has(answer, "strict-transport-security", "");
        assert_has(answer, "access-control-allow-origin", "");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn documentation_runs_only_scripts_of_regcred(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for path in ["/docs/", "/docs/swagger-ui-bundle.js"] {
        let answer = app.anonymous().get(path).await;
        let policy = answer.header("content-security-policy");
        assert_eq!(answer.status, 200);
        assert!(policy.contains("script-src 'self';") && policy.contains("frame-ancestors 'none'"), "{policy}");
        assert!(policy.contains("connect-src 'self'") && !policy.contains("script-src 'self' 'unsafe"), "{policy}");
    }
    // The page has no inline scripts, which the policy would block.
    let page = app.anonymous().get("/docs/").await.body;
    assert!(page.contains("<script src=") && !page.contains("<script>"), "{page}");
}

fn preflight(app: &TestApp, origin: &str) -> reqwest::RequestBuilder {
    let request = app.anonymous().request("OPTIONS", "/v1/registry-accounts").header("Origin", origin);
    request.header("Access-Control-Request-Method", "POST").header("Access-Control-Request-Headers", "authorization")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn without_configured_origins_no_page_is_allowed(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let asked = app.anonymous().send(preflight(&app, LISTED)).await;
    let called = app.admin().send(app.admin().request("GET", "/v1/me").header("Origin", LISTED)).await;
    asked.problem(401, "unauthenticated");
    called.expect(200);
    for answer in [asked, called] {
        assert!(answer.headers.keys().all(|name| !name.as_str().starts_with("access-control")), "{answer:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn only_pages_of_configured_origins_are_allowed(pool: PgPool) {
    let listed = format!("http://localhost:3000, {LISTED}");
    let app = TestApp::configured(pool, &[("REGCRED_HTTP_CORS_ORIGINS", &listed)]).await;

    let asked = app.anonymous().send(preflight(&app, LISTED)).await;
    assert_eq!((asked.status, asked.body.as_str()), (204, ""), "{asked:?}");
    assert_has(&asked, "access-control-allow-origin", LISTED);
    for name in ["Authorization", "Idempotency-Key", "If-Match", "Last-Event-ID", "Prefer"] {
        assert!(asked.header("access-control-allow-headers").contains(name), "{name}: {asked:?}");
    }
    assert!(asked.header("access-control-allow-methods").contains("PATCH"), "{asked:?}");
    assert_has(&asked, "access-control-allow-credentials", "");
    assert!(!asked.header("x-request-id").is_empty(), "{asked:?}");

    // The page can read both success and problem responses.
    for (status, client) in [(200, app.admin()), (401, app.anonymous())] {
        let answer = client.send(client.request("GET", "/v1/me").header("Origin", LISTED)).await;
        assert_eq!(answer.status, status);
        assert_has(&answer, "access-control-allow-origin", LISTED);
        assert_has(&answer, "vary", "Origin");
        for name in ["ETag", "Idempotency-Replayed", "Preference-Applied", "Retry-After", "Warning", "X-Request-Id"] {
            assert!(answer.header("access-control-expose-headers").contains(name), "{name}: {answer:?}");
        }
    }

    for other in ["https://evil.example", "https://console.example.evil.example", "null", "http://console.example"] {
        let asked = app.anonymous().send(preflight(&app, other)).await;
        let called = app.admin().send(app.admin().request("GET", "/v1/me").header("Origin", other)).await;
        asked.problem(401, "unauthenticated");
        called.expect(200);
        for answer in [asked, called] {
            assert_has(&answer, "access-control-allow-origin", "");
            assert_has(&answer, "vary", "Origin");
        }
    }
}
