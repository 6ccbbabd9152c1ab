//! Request rate limits, and the source address of a request.

use serde_json::Value;
use sqlx::{ConnectOptions, PgPool};

use crate::support::{app::TestApp, client::Client, eventually, process::Installation};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_rate_limited_caller_does_not_affect_others(pool: PgPool) {
    let limits = [("REGCRED_HTTP_REQUESTS_PER_SECOND", "1"), ("REGCRED_HTTP_REQUEST_BURST", "10")];
    let app = TestApp::configured(pool, &limits).await;
    let one = app.admin().with_key(&app.new_key("one", None).await);
    let other = app.admin().with_key(&app.new_key("other", None).await);

    one.get("/v1/me").await.expect(200);
    let mut refused = 0;
    // On a very slow machine, requests that take a second each do not exceed the limit.
    for _ in 0..40 {
        let answer = one.get("/v1/me").await;
        if answer.status == 429 {
            refused += 1;
            answer.problem(429, "too-many-requests");
            let seconds: u64 = answer.header("retry-after").parse().expect("seconds");
            assert!((1..=2).contains(&seconds), "{answer:?}");
        } else {
            answer.expect(200);
        }
    }
    for _ in 0..5 {
        other.get("/v1/me").await.expect(200);
    }

    assert!(refused >= 10, "{refused}");
    // Unauthenticated requests are not counted.
    app.anonymous().get("/v1/me").await.problem(401, "unauthenticated");
    app.anonymous().get("/healthz").await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_rate_of_zero_disables_the_limit(pool: PgPool) {
    let limits = [("REGCRED_HTTP_REQUESTS_PER_SECOND", "0"), ("REGCRED_HTTP_REQUEST_BURST", "1")];
    let app = TestApp::configured(pool, &limits).await;
    for _ in 0..50 {
        app.admin().get("/v1/me").await.expect(200);
    }
}

/// Sends a request with these headers and returns its logged address.
async fn logged_address(installation: &Installation, headers: &[(&str, &str)]) -> String {
    let service = installation.serve().await;
    let id = uuid::Uuid::now_v7().to_string();
    let client: Client = service.anonymous();
    let request = client.request("GET", "/v1/me").header("X-Request-Id", &id);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    client.send(request).await.problem(401, "unauthenticated");
    let line = eventually("the request is in the log", async || {
        let stderr = service.process.stderr();
        let mut lines = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|line| line["span"]["client_request_id"] == id.as_str() && line["message"] == "request completed")
    });
    line.await["span"]["peer"].as_str().expect("an address").to_owned()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn only_the_configured_header_of_a_trusted_proxy_is_used(pool: PgPool) {
    let installation = || Installation::new(pool.connect_options().to_url_lossy().as_str());
    let trusting = |proxies: &str, header: &str| {
        installation().with("REGCRED_HTTP_TRUSTED_PROXIES", proxies).with("REGCRED_HTTP_PROXY_HEADER", header)
    };
    let both = [("X-Forwarded-For", "198.51.100.1, 203.0.113.7"), ("Forwarded", "for=\"[2001:db8::7]:80\"")];

    assert_eq!(logged_address(&installation(), &both).await, "127.0.0.1");
    assert_eq!(logged_address(&trusting("10.0.0.0/8", ""), &both).await, "127.0.0.1");
    assert_eq!(logged_address(&trusting("127.0.0.0/8", ""), &both).await, "203.0.113.7");
    assert_eq!(logged_address(&trusting("127.0.0.0/8", "Forwarded"), &both).await, "2001:db8::7");
    assert_eq!(logged_address(&trusting("127.0.0.0/8,203.0.113.0/24", ""), &both).await, "198.51.100.1");
    let malformed = [("X-Forwarded-For", "203.0.113.7, not-an-address")];
    assert_eq!(logged_address(&trusting("127.0.0.1", ""), &malformed).await, "127.0.0.1");
}
