//! API keys that may be used from some networks only, and the maximum lifetime of new keys.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::support::{
    app::TestApp,
    client::{Answer, Client},
    eventually,
    process::Installation,
};

const PROXY: (&str, &str) = ("REGCRED_HTTP_TRUSTED_PROXIES", "127.0.0.1");
const LIFETIME: &str = "REGCRED_API_KEY_MAX_LIFETIME_DAYS";

/// Creates a key with these networks and returns its client.
async fn restricted(app: &TestApp, name: &str, source_cidrs: Value) -> Client {
    let body = json!({"name": name, "role": "viewer", "sourceCidrs": source_cidrs});
    let made = app.admin().post("/v1/api-keys", &body).await.expect(201);
    app.anonymous().with_key(made["key"].as_str().expect("a key"))
}

/// Calls through the trusted proxy, which reports these addresses.
async fn call_from(client: &Client, addresses: &str) -> Answer {
    client.send(client.request("GET", "/v1/me").header("X-Forwarded-For", addresses)).await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_is_accepted_from_its_networks_only(pool: PgPool) {
    let app = TestApp::configured(pool, &[PROXY]).await;
    let client = restricted(&app, "ci", json!(["203.0.113.7/24", "2001:db8::/32", "192.0.2.1"])).await;
    // Twice, so that the second one may find the key cached.
    for _ in 0..2 {
        for inside in ["203.0.113.200", "2001:db8::1", "[2001:db8::1]:4711", "192.0.2.1", "::ffff:203.0.113.1"] {
            let me = call_from(&client, inside).await.expect(200);
            assert_eq!(me["sourceCidrs"], json!(["203.0.113.0/24", "2001:db8::/32", "192.0.2.1/32"]), "{inside}");
        }
        for outside in [
            "203.0.114.1",
            "2001:db9::1",
            "192.0.2.2",
            "198.51.100.1",
            // The client chose the first address.
            "203.0.113.200, 198.51.100.1",
            "203.0.113.200,203.0.114.1,127.0.0.1",
            // Unreadable: the address of the proxy counts.
            "203.0.113.200, unknown",
        ] {
            call_from(&client, outside).await.problem(403, "source-network-refused");
        }
    }
    // No proxy reports an address.
    client.get("/v1/me").await.problem(403, "source-network-refused");
    client.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.problem(403, "source-network-refused");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn address_counts_only_if_a_trusted_proxy_reports_it(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let inside = restricted(&app, "inside", json!(["127.0.0.0/8"])).await;
    let outside = restricted(&app, "outside", json!(["203.0.113.0/24"])).await;
    inside.get("/v1/me").await.expect(200);
    call_from(&inside, "198.51.100.1").await.expect(200);
    call_from(&outside, "203.0.113.1").await.problem(403, "source-network-refused");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_without_networks_is_accepted_from_everywhere(pool: PgPool) {
    let app = TestApp::configured(pool, &[PROXY]).await;
    for (name, source_cidrs) in [("absent", Value::Null), ("empty", json!([]))] {
        let client = restricted(&app, name, source_cidrs).await;
        let me = call_from(&client, "198.51.100.1").await.expect(200);
        assert_eq!(me["sourceCidrs"], json!([]));
    }
    let restricted = "SELECT count(*) FROM api_keys WHERE source_cidrs IS NOT NULL";
    let count: i64 = sqlx::query_scalar(restricted).fetch_one(&app.pool).await.expect("a number");
    assert_eq!(count, 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn invalid_networks_are_refused_and_named(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (source_cidrs, field) in [
        (json!(["10.0.0.0/8", "10.0.0.0/33"]), "sourceCidrs[1]"),
        (json!(["canary"]), "sourceCidrs[0]"),
        (json!([""]), "sourceCidrs[0]"),
        (json!(["::ffff:10.0.0.0/104"]), "sourceCidrs[0]"),
        (json!(vec!["10.0.0.0/8"; 101]), "sourceCidrs"),
        (json!("10.0.0.0/8"), "sourceCidrs"),
        (json!([8]), "sourceCidrs[0]"),
    ] {
        let body = json!({"name": "ci", "role": "viewer", "sourceCidrs": source_cidrs});
        let answer = app.admin().post("/v1/api-keys", &body).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), [field], "{answer:?}");
        assert!(!answer.body.contains("canary"), "{answer:?}");
    }
    assert_eq!(app.rows().await[2], 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn networks_are_shown_and_recorded(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let body = json!({"name": "ci", "role": "viewer", "sourceCidrs": ["10.1.2.3/8"]});
    let made = app.admin().post("/v1/api-keys", &body).await.expect(201);
    assert_eq!(made["sourceCidrs"], json!(["10.0.0.0/8"]));
    let path = format!("/v1/api-keys/{}", made["id"].as_str().expect("an id"));
    assert_eq!(app.admin().get(&path).await.expect(200)["sourceCidrs"], json!(["10.0.0.0/8"]));
    let listed = app.admin().get("/v1/api-keys").await.expect(200);
    assert_eq!(listed["items"][1]["sourceCidrs"], json!(["10.0.0.0/8"]));
    let created = app.admin().get("/v1/audit-events?action=apiKey.create").await.expect(200);
    let changes = created["items"][0]["details"]["changes"].as_array().expect("changes").clone();
    let expected = json!({"field": "sourceCidrs", "old": null, "new": ["10.0.0.0/8"]});
    assert!(changes.contains(&expected), "{changes:?}");

    // The refusal names the owner: the key is genuine.
    let client = app.anonymous().with_key(made["key"].as_str().expect("a key"));
    client.get("/v1/me").await.problem(403, "source-network-refused");
    let refused = eventually("the refusal is recorded", async || {
        let events = app.admin().get("/v1/audit-events?action=caller.authenticate").await.expect(200);
        events["items"].get(0).cloned()
    })
    .await;
    assert_eq!((&refused["outcome"], &refused["actor"]["name"]), (&json!("denied"), &json!("ci")));
    assert_eq!((&refused["details"]["reason"], &refused["sourceIp"]), (&json!("source-network"), &json!("127.0.0.1")));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn refused_attempts_do_not_consume_the_request_rate_of_the_owner(pool: PgPool) {
    let limits = [PROXY, ("REGCRED_HTTP_REQUESTS_PER_SECOND", "1"), ("REGCRED_HTTP_REQUEST_BURST", "2")];
    let app = TestApp::configured(pool, &limits).await;
    let body = json!({"name": "ci", "role": "viewer", "sourceCidrs": ["203.0.113.0/24"]});
    let made = app.admin().post("/v1/api-keys", &body).await.expect(201);
    let client = app.anonymous().with_key(made["key"].as_str().expect("a key"));
    let mut statuses = BTreeMap::<u16, u32>::new();
    for _ in 0..40 {
        *statuses.entry(call_from(&client, "198.51.100.1").await.status).or_default() += 1;
    }
    // Failed attempts of one address are limited, and those of others are not.
    assert!(statuses[&403] >= 30 && statuses.keys().all(|status| [403, 429].contains(status)), "{statuses:?}");
    call_from(&client, "198.51.100.2").await.problem(403, "source-network-refused");
    call_from(&client, "203.0.113.1").await.expect(200);
}

// ---- Lifetime ----

fn in_days(days: i64) -> DateTime<Utc> {
    Utc::now() + TimeDelta::days(days)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn new_keys_expire_within_the_maximum_lifetime(pool: PgPool) {
    let app = TestApp::configured(pool, &[(LIFETIME, "30")]).await;
    let create = async |name: &str, expires_at: Option<DateTime<Utc>>| {
        let body = json!({"name": name, "role": "admin", "expiresAt": expires_at});
        app.admin().post("/v1/api-keys", &body).await
    };
    for expires_at in [None, Some(in_days(31)), Some(in_days(40_000))] {
        let answer = create("long", expires_at).await;
        let problem = answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), ["expiresAt"]);
        assert!(problem["detail"].as_str().expect("a detail").contains("30 days"), "{problem}");
    }
    let made = create("short", Some(in_days(29))).await.expect(201);
    let client = app.anonymous().with_key(made["key"].as_str().expect("a key"));
    let me = client.get("/v1/me").await.expect(200);
    assert_eq!(me["expiresAt"], made["expiresAt"]);
    assert!(me["expiresAt"].is_string());

    // An existing key keeps its meaning.
    assert_eq!(app.admin().get("/v1/me").await.expect(200)["expiresAt"], Value::Null);
    // It can be revoked: no new key could be without an expiry.
    let id = app.admin().get("/v1/me").await.expect(200)["id"].as_str().expect("an id").to_owned();
    assert_eq!(client.delete(&format!("/v1/api-keys/{id}")).await.status, 204);
    let own = format!("/v1/api-keys/{}", made["id"].as_str().expect("an id"));
    client.delete(&own).await.problem(409, "last-admin");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn command_line_obeys_networks_and_lifetime(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str()).with(LIFETIME, "30");
    let create = ["api-key", "create", "--name", "ci", "--role", "admin"];
    let refused = installation.run(&create).await;
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("--expires-at is required: keys live for at most 30 days"), "{refused:?}");
    let expires_at = in_days(29).to_rfc3339();
    let create = [&create[..], &["--expires-at", &expires_at]].concat();
    let refused = installation.run(&[&create[..], &["--source-cidr", "10.0.0.0/33"]].concat()).await;
    assert!(refused.stderr.contains("--source-cidr must be a network"), "{refused:?}");

    let networks = ["--source-cidr", "10.1.2.3/8,fd00::/8"];
    let made = installation.run(&[&create[..], &networks].concat()).await;
    assert_eq!(made.code, Some(0), "{made:?}");
    assert!(made.stderr.contains("admin, from 10.0.0.0/8,fd00::/8"), "{made:?}");
    assert!(installation.must_run(&["api-key", "list"]).await.contains("admin, from 10.0.0.0/8,fd00::/8"));

    let service = installation.serve().await;
    service.client(made.stdout.trim()).get("/v1/me").await.problem(403, "source-network-refused");
    // The last admin key.
    assert_eq!(installation.run(&["api-key", "revoke", "--name", "ci"]).await.code, Some(1));
    let create = ["api-key", "create", "--name", "other", "--role", "admin", "--expires-at", &expires_at];
    installation.must_run(&create).await;
    installation.must_run(&["api-key", "revoke", "--name", "ci"]).await;
}
