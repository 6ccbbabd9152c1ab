//! `HEAD`, and headers that were sent twice.

use serde_json::json;
use sqlx::PgPool;

use super::{answers, statuses};
use crate::{
    pull_secrets::settled,
    support::{app::TestApp, client::Client, kubernetes},
};

/// Paths of the API that support `GET`, with existing names.
fn readable_paths(key_id: &str, namespace: &str) -> Vec<String> {
    let document = serde_json::to_value(regcred::http::document()).expect("JSON");
    let paths = document["paths"].as_object().expect("paths").iter();
    let readable = paths.filter(|(_, item)| item.get("get").is_some());
    let names = [("{name}", "a"), ("{id}", key_id), ("{cluster}", "reached"), ("{namespace}", namespace)];
    readable.map(|(path, _)| names.iter().fold(path.clone(), |path, (key, name)| path.replace(key, name))).collect()
}

/// Compares the responses to `HEAD` and to `GET`.
async fn compare(client: &Client, path: &str) {
    let [head, get] = [client.send(client.request("HEAD", path)).await, client.send(client.request("GET", path)).await];
    assert_eq!((head.status, head.body.as_str()), (get.status, ""), "{path}: {head:?}");
    assert!(get.status < 400, "{path}: {get:?}");
    let headers = |answer: &crate::support::client::Answer| {
        // The summary has ages, which grow.
        let differing = if path == "/v1/summary" { 3 } else { 2 };
        let own = &["date", "x-request-id", "content-length"][..differing];
        let headers = answer.headers.iter().filter(|(name, _)| !own.contains(&name.as_str()));
        let mut headers: Vec<_> = headers.map(|(name, value)| (name.clone(), value.clone())).collect();
        headers.sort_by_key(|(name, _)| name.to_string());
        headers
    };
    assert_eq!(headers(&head), headers(&get), "{path}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn head_is_served_wherever_get_is(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    app.register_account("a", "ghcr.io", "robot", "x").await;
    let auth = json!({"type": "token", "token": "x"});
    let cluster = json!({"name": "a", "server": "https://kubernetes.example", "auth": auth});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
    let provider = json!({
        "name": "a", "type": "oidc", "issuer": "https://issuer.example", "audience": "regcred",
        "rules": [{"claims": {"sub": "x"}, "role": "viewer"}],
    });
    app.admin().post("/v1/identity-providers", &provider).await.expect(201);
    let declaration = json!({
        "accounts": ["a"], "secret": {"name": "pull"}, "targets": [{"cluster": "a", "namespaces": ["default"]}],
    });
    let declared = app.admin().send(app.admin().request("PUT", "/v1/pull-secrets/a").json(&declaration)).await;
    declared.expect(201);
    // The worker has tried, and tries again tomorrow: nothing changes between the two requests.
    settled(&app.admin(), "a").await;
    let later = "UPDATE pull_secret_targets SET next_attempt_at = now() + interval '1 day'";
    sqlx::query(later).execute(&pool).await.expect("postponed");
    let me = app.admin().get("/v1/me").await.expect(200);
    // Lists and reads are compared, so that nothing changes between the two requests.
    let viewer = app.caller("viewer", "viewer", None).await;

    app.register_cluster("reached").await;
    let namespace = kubernetes::new_namespace().await;
    let paths = readable_paths(me["id"].as_str().expect("an id"), &namespace);
    assert!(paths.len() >= 16, "{paths:?}");
    for probe in ["/healthz", "/readyz"] {
        assert!(paths.iter().any(|path| path == probe), "{probe}");
    }
    for path in paths.iter().map(String::as_str).chain(["/", "/docs/", "/docs/swagger-ui.css", "/openapi.json"]) {
        let is_of_admins = path.starts_with("/v1/api-keys") || path.contains("/coverage") || path.ends_with("/pods");
        let client = if is_of_admins { app.admin() } else { viewer.clone() };
        compare(&client, path).await;
    }
    let metrics = app.operations();
    assert_eq!(metrics.send(metrics.request("HEAD", "/metrics")).await.status, 200);

    // Errors are those of GET too.
    let refused = app.anonymous().send(app.anonymous().request("HEAD", "/v1/me")).await;
    assert_eq!((refused.status, refused.body.as_str()), (401, ""));
    assert_eq!(app.admin().send(app.admin().request("HEAD", "/v1/docker-configs")).await.status, 405);
    assert_eq!(app.admin().send(app.admin().request("HEAD", "/nowhere")).await.status, 404);
    let counted = app.operations().get("/metrics").await.body;
    let line = r#"regcred_http_requests_total{method="HEAD",route="/healthz",status="200"} 1"#;
    assert!(counted.lines().any(|written| written == line), "{counted}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_repeated_header_that_decides_is_refused(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_HTTP_CORS_ORIGINS", "https://console.example")]).await;
    let key = app.new_key("one", None).await;
    for (name, value) in [
        ("Authorization", format!("Bearer {key}")),
        ("Content-Type", "application/json".to_owned()),
        ("Accept", "application/json".to_owned()),
        ("If-Match", "\"1\"".to_owned()),
        ("If-None-Match", "\"1\"".to_owned()),
        ("Origin", "https://console.example".to_owned()),
        ("Access-Control-Request-Method", "POST".to_owned()),
        ("Idempotency-Key", "a".to_owned()),
        ("Last-Event-ID", "1".to_owned()),
    ] {
        let answer = |lines: usize, name: &str| {
            let headers = format!("{name}: {value}\r\n").repeat(lines);
            let key = if name.eq_ignore_ascii_case("authorization") {
                String::new()
            } else {
                format!("Authorization: Bearer {key}\r\n")
            };
            let request = format!("GET /v1/me HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{key}{headers}\r\n");
            answers(app.address, request.as_bytes())
        };
        assert_eq!(statuses(&answer(1, name)), ["200"], "{name}");
        for name in [name.to_owned(), name.to_lowercase()] {
            let refused = answer(2, &name);
            assert_eq!(statuses(&refused), ["400"], "{name}: {refused}");
            assert!(refused.contains("/problems/bad-request"), "{refused}");
            assert!(refused.contains(&format!(r#""field":"{}""#, name.to_lowercase())), "{refused}");
            assert!(!refused.contains(&key) && !refused.contains("access-control-allow-origin"), "{refused}");
        }
    }
    // Health too, and no preflight.
    let twice = "Origin: https://console.example\r\n".repeat(2);
    for request in ["GET /healthz", "OPTIONS /v1/me"] {
        let head = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
        let refused =
            answers(app.address, format!("{head}Access-Control-Request-Method: GET\r\n{twice}\r\n").as_bytes());
        assert_eq!(statuses(&refused), ["400"], "{refused}");
    }
    // Lists may be sent in several lines.
    let answer = answers(
        app.address,
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Forwarded-For: ::1\r\nX-Forwarded-For: ::2\r\nPrefer: a\r\nPrefer: b\r\n\r\n",
    );
    assert_eq!(statuses(&answer), ["200"], "{answer}");
}
