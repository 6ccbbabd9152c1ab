//! Faults: killed replicas, unreachable and overloaded clusters, a restart of Postgres.

use std::{
    io::Write,
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::{Broker, declaration, find_secret, password, put, settled};
use crate::support::{
    app::TestApp,
    client::{Client, assert_holds},
    eventually, kubernetes,
    listener::{listen, read_request},
    postgres::Postgres,
    process::{Installation, Service},
};

async fn namespaces(count: usize) -> Vec<String> {
    stream::iter(0..count).map(|_| kubernetes::new_namespace()).buffer_unordered(16).collect().await
}

pub async fn prepare(client: &Client, broker: &Broker) {
    let cluster = json!({
        "name": "dev", "server": kubernetes::server(), "caCertificate": kubernetes::file("ca.crt"), "auth": broker.auth(),
    });
    client.post("/v1/clusters", &cluster).await.expect(201);
    let account =
        json!({"name": "dev-user", "registry": "registry.example.com:5000", "username": "dev-user", "password": "one"});
    client.post("/v1/registry-accounts", &account).await.expect(201);
}

fn declared(namespaces: &[String]) -> Value {
    let names: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    declaration(&["dev-user"], "dev", &names)
}

async fn all_have(namespaces: &[String], expected: &str) {
    let passwords: Vec<String> = stream::iter(namespaces)
        .map(async |namespace| password(&kubernetes::secret(namespace, "team-a-pull").await))
        .buffer_unordered(16)
        .collect()
        .await;
    assert!(passwords.iter().all(|password| password == expected), "{passwords:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn killed_replica_in_a_fan_out_loses_no_target(pool: PgPool) {
    const COUNT: usize = 200;
    const LEASE: Duration = Duration::from_secs(5);
    let url = pool.connect_options().to_url_lossy().to_string();
    let installation = Installation::new(&url).with("REGCRED_PULL_SECRETS_LEASE_SECONDS", "5");
    let key = installation.new_key("admin").await;
    let mut replicas: Vec<Service> = vec![installation.serve().await, installation.serve().await];
    let (broker, namespaces) = (Broker::new().await, namespaces(COUNT).await);
    let client = replicas[0].client(&key);
    prepare(&client, &broker).await;
    let shown = put(&client, "team-a", &declared(&namespaces)).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": COUNT, "synced": COUNT}));

    for (round, password) in ["two", "three", "four"].into_iter().enumerate() {
        let client = replicas[0].client(&key);
        client.patch("/v1/registry-accounts/dev-user", &json!({"password": password})).await.expect(200);
        // During the fan-out, at a different point each round.
        let threshold = i64::try_from(round * 60 + 5).expect("small");
        eventually("some targets are synced", async || {
            let done = sqlx::query_scalar(
                "SELECT count(*) FROM pull_secret_targets WHERE applied_generation = generation AND state = 'synced'",
            );
            let done: i64 = done.fetch_one(&pool).await.expect("a count");
            (done >= threshold).then_some(())
        })
        .await;
        let killed = replicas.pop().expect("a replica");
        killed.process.signal("KILL");
        let begin = Instant::now();
        killed.process.wait().await;
        let client = replicas[0].client(&key);
        let shown = settled(&client, "team-a").await;
        assert_holds(&shown["status"], &json!({"desired": COUNT, "synced": COUNT}));
        assert!(begin.elapsed() < LEASE + Duration::from_secs(5), "the other replica took {:?}", begin.elapsed());
        all_have(&namespaces, password).await;
        let leased = sqlx::query_scalar("SELECT count(*) FROM pull_secret_targets WHERE lease_until IS NOT NULL");
        let leased: i64 = leased.fetch_one(&pool).await.expect("a count");
        assert_eq!(leased, 0);
        replicas.push(installation.serve().await);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn replica_without_a_worker_leaves_targets_pending(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_ref());
    let key = installation.new_key("admin").await;
    let serves = Service::of(installation.spawn(&["serve", "--no-worker"])).await;
    let (client, broker, namespaces) = (serves.client(&key), Broker::new().await, namespaces(3).await);
    prepare(&client, &broker).await;
    let request = client.request("PUT", "/v1/pull-secrets/team-a").header("prefer", "wait=3");
    let shown = client.send(request.json(&declared(&namespaces))).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 3, "pending": 3}));
    let _works = installation.serve().await;
    assert_holds(&settled(&client, "team-a").await["status"], &json!({"desired": 3, "synced": 3}));
    all_have(&namespaces, "one").await;
    serves.process.signal("TERM");
    assert_eq!(serves.process.wait().await.code, Some(0));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn separate_api_and_worker_processes_work_together(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_ref());
    let key = installation.new_key("admin").await;
    let api = Service::of(installation.spawn(&["serve", "--no-worker"])).await;
    let worker = Service::of(installation.spawn(&["worker"])).await;
    let (client, broker, namespaces) = (api.client(&key), Broker::new().await, namespaces(3).await);
    prepare(&client, &broker).await;

    let shown = put(&client, "team-a", &declared(&namespaces)).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 3, "synced": 3}));
    all_have(&namespaces, "one").await;
    client.patch("/v1/registry-accounts/dev-user", &json!({"password": "two"})).await.expect(200);
    assert_holds(&settled(&client, "team-a").await["status"], &json!({"desired": 3, "synced": 3}));
    all_have(&namespaces, "two").await;
    // The API process logs requests, the worker logs targets.
    let (by_api, by_worker) = (api.process.stderr(), worker.process.stderr());
    assert!(by_worker.contains("target reconciled") && by_api.contains("request completed"));
    assert!(!by_api.contains("target reconciled"), "{by_api}");

    // A worker serves only health and metrics.
    let caller = worker.client(&key);
    assert_eq!(caller.get("/healthz").await.body, "ok\n");
    assert_eq!(caller.get("/readyz").await.expect(200)["ready"], true);
    caller.get("/metrics").await.problem(404, "not-found");
    assert!(worker.operations().get("/metrics").await.body.contains("regcred_http_requests_total"));
    assert_eq!(installation.run(&["healthcheck", &format!("http://{}/healthz", worker.address)]).await.code, Some(0));
    caller.post("/healthz", &json!({})).await.problem(405, "method-not-allowed");
    for path in ["/v1/me", "/v1/pull-secrets/team-a", "/openapi.json", "/docs", "/docs/", "/"] {
        caller.get(path).await.problem(404, "not-found");
    }

    worker.process.signal("TERM");
    let ended = worker.process.wait().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("shutdown started") && ended.stderr.contains("shutdown finished"), "{ended:?}");
    // Without a worker a rotation waits for the next one.
    client.patch("/v1/registry-accounts/dev-user", &json!({"password": "three"})).await.expect(200);
    let _worker = Service::of(installation.spawn(&["worker"])).await;
    assert_holds(&settled(&client, "team-a").await["status"], &json!({"desired": 3, "synced": 3}));
    all_have(&namespaces, "three").await;
}

#[sqlx::test(migrations = false)]
async fn worker_reports_why_it_does_not_start(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_ref());
    let behind = installation.run(&["worker"]).await;
    assert!(behind.code == Some(64) && behind.stderr.contains("run `regcred migrate`"), "{behind:?}");
    let nowhere = installation.with("REGCRED_MASTER_KEYS_FILE", "").with("REGCRED_LOG_FORMAT", "prose");
    let nowhere = nowhere.run(&["worker"]).await;
    assert!(nowhere.code == Some(64) && nowhere.stderr.contains("REGCRED_LOG_FORMAT"), "{nowhere:?}");
    assert!(nowhere.stderr.contains("REGCRED_MASTER_KEYS or REGCRED_MASTER_KEYS_FILE"), "{nowhere:?}");
}

#[tokio::test]
async fn postgres_restart_in_a_fan_out_loses_no_target() {
    let mut postgres = Postgres::prepare();
    postgres.start().await;
    let installation = Installation::new(&postgres.url()).with("REGCRED_PULL_SECRETS_LEASE_SECONDS", "5");
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let (broker, namespaces) = (Broker::new().await, namespaces(100).await);
    prepare(&client, &broker).await;
    let request = client.request("PUT", "/v1/pull-secrets/team-a").json(&declared(&namespaces));
    client.send(request).await.expect(201);
    eventually("the first Secret exists", async || {
        let mut found = stream::iter(&namespaces).map(|one| find_secret(one, "team-a-pull")).buffer_unordered(16);
        while let Some(secret) = found.next().await {
            if secret.is_some() {
                return Some(());
            }
        }
        None
    })
    .await;
    postgres.stop().await;
    postgres.start().await;
    eventually("all Secrets exist", async || {
        let answer = client.get("/v1/pull-secrets/team-a").await;
        (answer.status == 200 && answer.json()["status"]["synced"] == 100).then_some(())
    })
    .await;
    all_have(&namespaces, "one").await;
}

/// Starts a server that sends the same response to each request. Counts requests other than the
/// lists of watches.
fn scripted(answer: &'static str) -> (String, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let address = listen(move |mut stream: TcpStream| {
        let request = read_request(&stream);
        if !["GET /api/v1/namespaces?", "GET /api/v1/secrets?"].iter().any(|list| request.starts_with(list)) {
            counted.fetch_add(1, Ordering::SeqCst);
        }
        // The client may have disconnected.
        let _ = stream.write_all(answer.as_bytes());
    });
    (format!("http://{address}"), count)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn failing_cluster_delays_no_other_and_recovers(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (admin, broker) = (app.admin(), Broker::new().await);
    prepare(&admin, &broker).await;
    let (server, calls) =
        scripted("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let dead = json!({"name": "dead", "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
    admin.post("/v1/clusters", &dead).await.expect(201);
    let namespaces = namespaces(50).await;
    let names: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    let mut body = declaration(&["dev-user"], "dev", &names);
    let both = json!([{"cluster": "dev", "namespaces": names}, {"cluster": "dead", "namespaces": names}]);
    body["targets"] = both;

    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 100, "synced": 50, "failed": 50}));
    let failed = admin.get("/v1/pull-secrets/team-a/targets?state=failed&limit=100").await.expect(200);
    for target in failed["items"].as_array().expect("items") {
        assert_eq!((&target["cluster"], &target["lastError"]["type"]), (&json!("dead"), &json!("cluster-unreachable")));
    }
    // A rotation reaches the healthy cluster, and the failing one is probed.
    let (before, begin) = (calls.load(Ordering::SeqCst), Instant::now());
    admin.patch("/v1/registry-accounts/dev-user", &json!({"password": "two"})).await.expect(200);
    eventually("the healthy cluster is synced", async || {
        let shown = admin.get("/v1/pull-secrets/team-a").await.expect(200);
        (shown["status"]["synced"] == 50).then_some(())
    })
    .await;
    all_have(&namespaces, "two").await;
    tokio::time::sleep(Duration::from_secs(5).saturating_sub(begin.elapsed())).await;
    let (asked, seconds) = (calls.load(Ordering::SeqCst) - before, begin.elapsed().as_secs_f64());
    // At most once a second.
    assert!(f64::from(u32::try_from(asked).expect("few")) <= seconds + 1.0, "{asked} calls in {seconds} s");

    let back = json!({
        "server": kubernetes::server(), "caCertificate": kubernetes::file("ca.crt"), "auth": broker.auth(),
        "allowPlainHttp": false,
    });
    // Both names refer to one cluster now, so the second pull secret targets one of them.
    let mut only = body.clone();
    only["targets"] = json!([{"cluster": "dead", "namespaces": names}]);
    only["secret"]["name"] = json!("second");
    put(&admin, "team-b", &only).await.expect(201);
    admin.patch("/v1/clusters/dead", &back).await.expect(200);
    eventually("the cluster has recovered", async || {
        let shown = admin.get("/v1/pull-secrets/team-b").await.expect(200);
        (shown["status"]["synced"] == 50).then_some(())
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn retry_after_of_an_overloaded_cluster_is_honoured(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let (server, calls) =
        scripted("HTTP/1.1 429 Too Many Requests\r\nretry-after: 4\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let cluster = json!({"name": "busy", "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
    admin.post("/v1/clusters", &cluster).await.expect(201);
    app.register_account("dev-user", "registry.example.com:5000", "dev-user", "one").await;
    put(&admin, "team-a", &declaration(&["dev-user"], "busy", &["default"])).await.expect(201);
    let targets = admin.get("/v1/pull-secrets/team-a/targets").await.expect(200);
    assert_eq!(targets["items"][0]["state"], "failed", "{targets}");
    // A sync does not override `Retry-After`.
    for _ in 0..10 {
        admin.post("/v1/pull-secrets/team-a/sync", &json!({})).await.expect(202);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    eventually("the cluster is called again", async || (calls.load(Ordering::SeqCst) > 1).then_some(())).await;
}
