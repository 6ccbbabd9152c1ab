//! `Idempotency-Key`: a retry does not repeat a change, whatever happened to the first attempt.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use regcred::http;
use reqwest::{RequestBuilder, header::HeaderValue};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::{
    mints::token_service::TokenService,
    support::{
        PATIENCE,
        app::TestApp,
        client::{Answer, Client},
        eventually, kubernetes,
        postgres::superuser,
        process::Installation,
    },
};

const HEADER: &str = "Idempotency-Key";

fn account(name: &str) -> Value {
    json!({"name": name, "registry": format!("{name}.example.com"), "username": "dev", "password": "first"})
}

fn cluster(name: &str) -> Value {
    json!({"name": name, "server": "https://127.0.0.1:1", "auth": {"type": "none"}})
}

fn provider(name: &str) -> Value {
    let rules = json!([{"claims": {"sub": "ci"}, "role": "viewer"}]);
    json!({"name": name, "type": "oidc", "issuer": "https://issuer.example.com", "audience": name, "rules": rules})
}

/// A request with an idempotency key; `null` for no body.
fn keyed(client: &Client, method: &str, path: &str, key: &str, body: &Value) -> RequestBuilder {
    let request = client.request(method, path).header(HEADER, key);
    if body.is_null() { request } else { request.json(body) }
}

fn is_replayed(answer: &Answer) -> bool {
    answer.header("idempotency-replayed") == "true"
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("a number")
}

/// Changes by callers. The replay of an import is a dry run, which is recorded too.
const CHANGES: &str = "SELECT count(*) FROM audit_events
    WHERE actor_type = 'apiKey' AND action <> 'registryAccount.import'
        AND (outcome = 'success' OR action = 'cluster.coverage' AND outcome = 'attempt')";
const KEYS: &str = "SELECT count(*) FROM idempotency_keys";

/// Operations that document the header.
fn documented_operations() -> BTreeSet<String> {
    let document = serde_json::to_value(http::document()).expect("JSON");
    let paths = document["paths"].as_object().expect("paths").values();
    let operations = paths.flat_map(|item| item.as_object().expect("operations").values());
    let is_keyed = |operation: &&Value| {
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        parameters.into_iter().any(|parameter| parameter["$ref"] == "#/components/parameters/IdempotencyKey")
    };
    operations.filter(is_keyed).map(|one| one["operationId"].as_str().expect("a name").to_owned()).collect()
}

/// Operation, method, path, body and status.
fn changes() -> Vec<(&'static str, &'static str, &'static str, Value, u16)> {
    let auths = json!({"auths": {"imported.example.com": {"username": "dev", "password": "first"}}});
    vec![
        ("create_registry_account", "POST", "/v1/registry-accounts", account("new"), 201),
        ("update_registry_account", "PATCH", "/v1/registry-accounts/a", json!({"password": "second"}), 200),
        ("mint_registry_account", "POST", "/v1/registry-accounts/minted/mint", Value::Null, 200),
        ("import_registry_accounts", "POST", "/v1/registry-accounts:import", auths, 200),
        ("create_cluster", "POST", "/v1/clusters", cluster("new"), 201),
        ("update_cluster", "PATCH", "/v1/clusters/dev", json!({"server": "https://127.0.0.1:2"}), 200),
        ("run_coverage", "POST", "/v1/clusters/dev/coverage", Value::Null, 202),
        ("update_pull_secret", "PATCH", "/v1/pull-secrets/p", json!({"adopt": true}), 200),
        ("sync_pull_secret", "POST", "/v1/pull-secrets/p/sync", Value::Null, 202),
        ("create_api_key", "POST", "/v1/api-keys", json!({"name": "new", "role": "viewer"}), 201),
        ("create_identity_provider", "POST", "/v1/identity-providers", provider("new"), 201),
        ("update_identity_provider", "PATCH", "/v1/identity-providers/i", json!({"audience": "other"}), 200),
    ]
}

/// An app with the resources that [`changes`] change.
async fn prepared(pool: PgPool) -> TestApp {
    let app = TestApp::configured(pool, &[("REGCRED_MINT_ALLOW", "127.0.0.1")]).await;
    let admin = app.admin();
    admin.post("/v1/registry-accounts", &account("a")).await.expect(201);
    admin.post("/v1/clusters", &cluster("dev")).await.expect(201);
    admin.post("/v1/identity-providers", &provider("i")).await.expect(201);
    let declaration = json!({
        "accounts": ["a"], "secret": {"name": "pull"}, "targets": [{"cluster": "dev", "namespaces": ["default"]}],
    });
    admin.send(admin.request("PUT", "/v1/pull-secrets/p").json(&declaration)).await.expect(201);
    app
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_change_is_performed_once_per_key(pool: PgPool) {
    let app = prepared(pool).await;
    app.admin().post("/v1/registry-accounts", &TokenService::start().account()).await.expect(201);
    let changes = changes();
    let tested: BTreeSet<String> = changes.iter().map(|(operation, ..)| (*operation).to_owned()).collect();
    assert_eq!(tested, documented_operations(), "every operation with the header must be tested");
    for (operation, method, path, body, status) in &changes {
        let send = async || app.admin().send(keyed(&app.admin(), method, path, operation, body)).await;
        let before = number(&app.pool, CHANGES).await;

        let first = send().await;
        let after = number(&app.pool, CHANGES).await;
        let second = send().await;

        let shown = first.expect(*status);
        assert!(!is_replayed(&first), "{operation}: {first:?}");
        assert!(is_replayed(&second), "{operation}: {second:?}");
        assert!(after > before, "{operation} is recorded");
        assert_eq!(number(&app.pool, CHANGES).await, after, "{operation} was repeated");
        match *operation {
            "create_api_key" => {
                second.problem(409, "idempotency-key-replayed");
                assert!(!second.body.contains("rgc_"), "{second:?}");
            }
            "import_registry_accounts" => {
                assert_eq!(shown["items"][0]["outcome"], "created");
                assert_eq!(second.expect(200)["items"][0]["outcome"], "unchanged");
            }
            // The worker changes the status meanwhile.
            "sync_pull_secret" | "update_pull_secret" => assert_eq!(second.expect(*status)["id"], shown["id"]),
            "run_coverage" => assert_eq!(second.expect(*status)["run"]["id"], shown["run"]["id"]),
            _ => {
                assert_eq!(second.expect(*status), shown, "{operation}");
                assert_eq!(second.header("etag"), first.header("etag"), "{operation}");
                assert_eq!(second.header("location"), first.header("location"), "{operation}");
            }
        }
    }
    assert_eq!(number(&app.pool, KEYS).await, i64::try_from(changes.len()).expect("a number"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn retry_answers_the_current_resource(pool: PgPool) {
    let app = prepared(pool).await;
    let admin = app.admin();
    let rotate = || keyed(&admin, "PATCH", "/v1/registry-accounts/a", "k", &json!({"password": "second"}));
    admin.send(rotate().header("If-Match", "\"1\"")).await.expect(200);
    admin.patch("/v1/registry-accounts/a", &json!({"username": "ops"})).await.expect(200);

    // The version of the first attempt is gone; its precondition held then.
    let retried = admin.send(rotate().header("If-Match", "\"1\"")).await;
    let current = admin.get("/v1/registry-accounts/a").await;
    assert_eq!((retried.expect(200), retried.header("etag")), (current.expect(200), current.header("etag")));
    assert_eq!((retried.json()["version"].clone(), is_replayed(&retried)), (json!(3), true));

    // Nothing is left to answer with. The change is not repeated.
    let create = || keyed(&admin, "POST", "/v1/registry-accounts", "c", &account("short-lived"));
    admin.send(create()).await.expect(201);
    assert_eq!(admin.delete("/v1/registry-accounts/short-lived").await.status, 204);
    let retried = admin.send(create()).await;
    retried.problem(404, "not-found");
    assert!(is_replayed(&retried));
    admin.get("/v1/registry-accounts/short-lived").await.problem(404, "not-found");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn retry_shows_only_what_the_caller_may_see_now(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let grants = json!({"accounts": [{"matchLabels": {"team": "a"}}], "clusters": [], "namespaces": []});
    let operator = app.caller("team-a", "operator", Some(grants)).await;
    let mut body = account("own");
    body["labels"] = json!({"team": "a"});
    let create = || keyed(&operator, "POST", "/v1/registry-accounts", "k", &body);
    operator.send(create()).await.expect(201);
    app.admin().patch("/v1/registry-accounts/own", &json!({"labels": {"team": "b"}})).await.expect(200);

    let retried = operator.send(create()).await;

    let missing = operator.get("/v1/registry-accounts/own").await;
    retried.problem(404, "not-found");
    assert_eq!(retried.json()["detail"], missing.json()["detail"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn retry_is_answered_before_the_login_is_verified_again(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let (a, _) = app.register_registries().await;
    let admin = app.admin();
    let plain = json!({"plainHttp": true, "password": a.password});
    admin.patch("/v1/registry-accounts/a", &plain).await.expect(200);
    let path = "/v1/registry-accounts/a?verify=true";
    let change = || keyed(&admin, "PATCH", path, "k", &json!({"email": "dev@example.com"})).header("If-Match", "\"2\"");
    let first = admin.send(change()).await.expect(200);
    assert_eq!(first["lastVerificationResult"], "valid");
    // The login does not work any more, and the version is another one.
    admin.patch("/v1/registry-accounts/a", &json!({"password": "wrong"})).await.expect(200);

    let retried = admin.send(change()).await;

    assert_eq!((retried.expect(200)["version"].clone(), is_replayed(&retried)), (json!(4), true));
    let verify = keyed(&admin, "PATCH", path, "other", &json!({"email": "x@example.com"}));
    admin.send(verify).await.problem(422, "verification-failed");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_of_another_request_is_refused(pool: PgPool) {
    let app = prepared(pool).await;
    app.admin().post("/v1/registry-accounts", &account("b")).await.expect(201);
    let admin = app.admin();
    let body = json!({"username": "ops"});
    admin.send(keyed(&admin, "PATCH", "/v1/registry-accounts/a", "k", &body)).await.expect(200);
    for (method, path, body) in [
        ("PATCH", "/v1/registry-accounts/a", json!({"username": "other"})),
        ("PATCH", "/v1/registry-accounts/b", body.clone()),
        ("PATCH", "/v1/registry-accounts/a?verify=false", body.clone()),
        ("PATCH", "/v1/clusters/dev", json!({"server": "https://127.0.0.1:2"})),
        ("POST", "/v1/registry-accounts", account("new")),
        ("POST", "/v1/pull-secrets/p/sync", Value::Null),
    ] {
        let answer = admin.send(keyed(&admin, method, path, "k", &body)).await;
        let problem = answer.problem(422, "idempotency-key-reused");
        assert!(problem["detail"].as_str().expect("a detail").contains("use a new one"), "{problem}");
    }
    assert_eq!(admin.get("/v1/registry-accounts/a").await.expect(200)["version"], 2);

    // Another caller's key of the same text is another key.
    let other = app.caller("other", "admin", None).await;
    let answer = other.send(keyed(&other, "PATCH", "/v1/registry-accounts/b", "k", &body)).await;
    assert_eq!((answer.expect(200)["version"].clone(), is_replayed(&answer)), (json!(2), false));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn request_in_flight_is_reported_at_once(pool: PgPool) {
    let app = prepared(pool).await;
    let admin = app.admin();
    let rotate = |key: &str| keyed(&admin, "PATCH", "/v1/registry-accounts/a", key, &json!({"password": "second"}));
    let mut watcher = superuser(&app.pool).await;
    // The rotation waits for this lock.
    let mut holder = app.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM registry_accounts WHERE name = 'a' FOR UPDATE")
        .execute(&mut *holder)
        .await
        .expect("locked");
    let first = tokio::spawn({
        let (client, request) = (admin.clone(), rotate("k"));
        async move { client.send(request).await }
    });
    eventually("the rotation waits", async || {
        let count =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        let waiting: i64 = sqlx::query_scalar(count).fetch_one(&mut watcher).await.expect("a number");
        (waiting == 1).then_some(())
    })
    .await;

    let second = admin.send(rotate("k")).await;
    second.problem(409, "idempotency-key-in-use");
    assert_eq!(second.header("retry-after"), "1");

    holder.rollback().await.expect("released");
    let first = first.await.expect("joined");
    assert_eq!((first.expect(200)["version"].clone(), is_replayed(&first)), (json!(2), false));
    let third = admin.send(rotate("k")).await;
    assert_eq!((third.expect(200)["version"].clone(), is_replayed(&third)), (json!(2), true));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn simultaneous_attempts_perform_one_change(pool: PgPool) {
    let app = prepared(pool).await;
    let second = TestApp::beside(&app).await;
    for round in 0..5 {
        let key = format!("round-{round}");
        let body = json!({"password": key});
        let attempts = join_all((0..12).map(async |number| {
            let client = if number % 2 == 0 { app.admin() } else { second.admin() };
            client.send(keyed(&client, "PATCH", "/v1/registry-accounts/a", &key, &body)).await
        }));
        let attempts = attempts.await;
        let performed = attempts.iter().filter(|answer| answer.status == 200 && !is_replayed(answer)).count();
        assert_eq!(performed, 1, "{attempts:?}");
        for refused in attempts.iter().filter(|answer| answer.status != 200) {
            refused.problem(409, "idempotency-key-in-use");
        }
        assert_eq!(app.admin().get("/v1/registry-accounts/a").await.expect(200)["version"], round + 2);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn failed_request_does_not_use_up_its_key(pool: PgPool) {
    let app = prepared(pool).await;
    let admin = app.admin();
    let rotate = |name: &str| {
        let path = format!("/v1/registry-accounts/{name}");
        keyed(&admin, "PATCH", &path, "k", &json!({"password": "second"}))
    };
    admin.send(rotate("later")).await.problem(404, "not-found");
    admin.send(rotate("a").header("If-Match", "\"7\"")).await.problem(412, "stale-version");
    admin.send(keyed(&admin, "POST", "/v1/registry-accounts", "k", &account("a"))).await.problem(409, "name-taken");
    admin.send(keyed(&admin, "POST", "/v1/registry-accounts", "k", &json!({}))).await.problem(422, "invalid-request");
    assert_eq!(number(&app.pool, KEYS).await, 0);

    admin.post("/v1/registry-accounts", &account("later")).await.expect(201);
    let retried = admin.send(rotate("later")).await;
    assert_eq!((retried.expect(200)["version"].clone(), is_replayed(&retried)), (json!(2), false));
    // A dry run changes nothing, so it can be followed by the import.
    let auths = json!({"auths": {"imported.example.com": {"username": "dev", "password": "first"}}});
    let import = |query: &str| keyed(&admin, "POST", &format!("/v1/registry-accounts:import{query}"), "i", &auths);
    admin.send(import("?dryRun=true")).await.expect(200);
    let imported = admin.send(import("")).await;
    assert_eq!(
        (imported.expect(200)["items"][0]["outcome"].clone(), is_replayed(&imported)),
        (json!("created"), false)
    );
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn invalid_key_is_refused_and_named(pool: PgPool) {
    let app = prepared(pool).await;
    let admin = app.admin();
    let long = "x".repeat(256);
    let values: [&[u8]; 6] = [b"", b"a b", b"a\tb", b"\xe4", "schl\u{fc}ssel".as_bytes(), long.as_bytes()];
    for value in values {
        let request = admin.request("PATCH", "/v1/registry-accounts/a").json(&json!({"username": "ops"}));
        let answer = admin.send(request.header(HEADER, HeaderValue::from_bytes(value).expect("a header"))).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), [HEADER], "{answer:?}");
    }
    assert_eq!(admin.get("/v1/registry-accounts/a").await.expect(200)["version"], 1);
    // The permission is checked first.
    let viewer = app.caller("viewer", "viewer", None).await;
    let request = viewer.request("PATCH", "/v1/registry-accounts/a").header(HEADER, "a b").json(&json!({}));
    viewer.send(request).await.problem(403, "forbidden");
    let longest = keyed(&admin, "PATCH", "/v1/registry-accounts/a", &long[1..], &json!({"username": "ops"}));
    admin.send(longest).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn routes_that_reveal_or_only_read_ignore_the_header(pool: PgPool) {
    let app = prepared(pool).await;
    let admin = app.admin();
    let explain = json!({"accounts": ["a"], "image": "a.example.com/x"});
    for (method, path, body, status) in [
        ("POST", "/v1/docker-configs", json!({"accounts": ["a"]}), 200),
        ("POST", "/v1/docker-configs", json!({"accounts": ["a"], "profile": "docker"}), 200),
        ("POST", "/v1/docker-configs/explain", explain, 200),
        ("POST", "/v1/clusters/dev/check", Value::Null, 200),
        ("POST", "/v1/registry-accounts/a/verify", Value::Null, 200),
        ("GET", "/v1/registry-accounts/a", Value::Null, 200),
    ] {
        for key in ["k", "not valid"] {
            let answer = admin.send(keyed(&admin, method, path, key, &body)).await;
            answer.expect(status);
            assert!(!is_replayed(&answer), "{method} {path}");
        }
    }
    assert_eq!(number(&app.pool, KEYS).await, 0);
}

/// No transaction covers the API server. The name of the Secret identifies the delivery.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn retried_delivery_never_creates_a_second_secret(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.admin().post("/v1/registry-accounts", &account("a")).await.expect(201);
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    let deliver = || keyed(&app.admin(), "POST", &path, "k", &json!({"name": "pull", "accounts": ["a"]}));
    app.admin().send(deliver()).await.expect(201);
    let before = kubernetes::secret(&namespace, "pull").await;

    let retried = app.admin().send(deliver()).await;

    retried.problem(409, "secret-exists");
    assert!(!is_replayed(&retried));
    assert_eq!(kubernetes::secret(&namespace, "pull").await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn request_without_the_header_reads_no_keys(pool: PgPool) {
    let app = prepared(pool).await;
    sqlx::query("ALTER TABLE idempotency_keys RENAME TO elsewhere").execute(&app.pool).await.expect("renamed");
    let change = json!({"username": "ops"});
    app.admin().patch("/v1/registry-accounts/a", &change).await.expect(200);
    app.admin().post("/v1/clusters", &cluster("new")).await.expect(201);
    let keyed = keyed(&app.admin(), "PATCH", "/v1/registry-accounts/a", "k", &change);
    app.admin().send(keyed).await.problem(500, "internal");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_expires_after_a_day(pool: PgPool) {
    let app = prepared(pool).await;
    let admin = app.admin();
    let rotate = || keyed(&admin, "PATCH", "/v1/registry-accounts/a", "k", &json!({"password": "second"}));
    let age = async |age: &str| {
        let update = "UPDATE idempotency_keys SET created_at = now() - $1::interval";
        sqlx::query(update).bind(age).execute(&app.pool).await.expect("aged");
    };
    admin.send(rotate()).await.expect(200);
    age("23 hours 59 minutes").await;
    assert!(is_replayed(&admin.send(rotate()).await));
    age("24 hours").await;
    let again = admin.send(rotate()).await;
    // Performed again, without a difference.
    assert_eq!((again.expect(200)["version"].clone(), is_replayed(&again)), (json!(2), false));
    assert!(is_replayed(&admin.send(rotate()).await));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn expired_keys_are_deleted_in_the_background(pool: PgPool) {
    let rows = "INSERT INTO idempotency_keys (principal, key, request_digest, created_at)
                SELECT 'apiKey x', n::text, '\\x00', now() - CASE WHEN n <= 1200 THEN interval '25 hours' ELSE '23 hours' END
                FROM generate_series(1, 1210) AS n";
    sqlx::query(rows).execute(&pool).await.expect("inserted");
    let app = TestApp::spawn(pool).await;
    eventually("expired keys are deleted", async || (number(&app.pool, KEYS).await == 10).then_some(())).await;
}

/// F2: the process dies at any point of a rotation, and the client retries.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn killed_rotation_is_performed_exactly_once(pool: PgPool) {
    const ROUNDS: i64 = 15;
    const PATH: &str = "/v1/registry-accounts/a";
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let mut service = installation.serve().await;
    let key = installation.new_key("admin").await;
    service.client(&key).post("/v1/registry-accounts", &account("a")).await.expect(201);
    let version = "SELECT version FROM registry_accounts WHERE name = 'a'";
    for round in 1..=ROUNDS {
        let request = |client: &Client| {
            let body = json!({"password": format!("password-{round}")});
            keyed(client, "PATCH", PATH, &format!("round-{round}"), &body)
        };
        let client = service.client(&key);
        let sending = tokio::spawn({
            let (client, request) = (client.clone(), request(&client));
            async move { client.try_send(request).await }
        });
        // In some rounds at the commit, so that the answer is lost. In the others at various points
        // of the request.
        let is_committed = round % 3 == 0;
        if is_committed {
            let deadline = Instant::now() + PATIENCE;
            while number(&pool, version).await == round {
                assert!(Instant::now() < deadline, "the rotation was not committed");
            }
        } else {
            tokio::time::sleep(Duration::from_millis(round.unsigned_abs())).await;
        }
        // Sends SIGKILL.
        drop(service);
        // Whatever it was, the client acts as if it never arrived.
        let _ = sending.await.expect("joined");

        service = installation.serve().await;
        let client = service.client(&key);
        let retried = client.send(request(&client)).await;

        assert_eq!(retried.expect(200)["version"], round + 1, "round {round}");
        assert!(is_replayed(&retried) || !is_committed, "round {round}: {retried:?}");
    }
    let rotations = "SELECT count(*) FROM audit_events WHERE action = 'registryAccount.rotate'";
    assert_eq!(number(&pool, rotations).await, ROUNDS);
    let revealed = service.client(&key).post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    assert_eq!(revealed["config"]["auths"]["a.example.com"]["password"], format!("password-{ROUNDS}"));
}
