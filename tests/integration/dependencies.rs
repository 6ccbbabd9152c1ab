//! Missing dependencies: Postgres, clusters, configuration. Each is reported in time and recovered
//! from without a restart.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use regcred::storage::{StorageError, pool};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, Connection, PgPool};

use crate::support::{
    PATIENCE,
    app::TestApp,
    client::{Answer, Client},
    eventually, given, kubernetes,
    listener::{Gate, refusing_server},
    pg_proxy::{PgProxy, Wire},
    postgres::{self, Postgres},
    process::{Installation, Service},
};

// ---- Postgres ----

/// Returns the URL of an unreachable Postgres.
fn absent_postgres() -> String {
    refusing_server().replace("http://", &format!("postgres://regcred:{}@", postgres::PASSWORD)) + "/regcred"
}

#[tokio::test]
async fn startup_without_postgres_retries_until_its_timeout() {
    let url = absent_postgres();
    let server = url.rsplit_once('@').expect("a URL").1.trim_end_matches("/regcred").to_owned();
    let installation = Installation::new(&url).with("REGCRED_DATABASE_START_TIMEOUT_SECONDS", "3");
    let start = Instant::now();

    let exit = installation.run(&["serve"]).await;

    assert_eq!(exit.code, Some(69), "{exit:?}");
    let message = format!("Postgres at {server} did not answer within 3 s");
    assert!(exit.stderr.contains(&message) && exit.stderr.contains("REGCRED_DATABASE_URL"), "{exit:?}");
    let retries = exit.stderr.lines().filter(|line| line.contains("postgres unavailable")).count();
    assert!(retries >= 2, "{retries} retries: {exit:?}");
    assert!(!exit.stderr.contains(postgres::PASSWORD) && exit.stdout.is_empty(), "{exit:?}");
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
}

#[tokio::test]
async fn every_command_reports_an_unreachable_postgres() {
    let installation = Installation::new(&absent_postgres()).with("REGCRED_DATABASE_START_TIMEOUT_SECONDS", "1");
    for arguments in [
        &["migrate"][..],
        &["api-key", "list"],
        &["api-key", "create", "--name", "x", "--role", "admin"],
        &["master-key", "list"],
        &["master-key", "rotate"],
    ] {
        let exit = installation.run(arguments).await;
        assert_eq!(exit.code, Some(69), "{arguments:?}: {exit:?}");
        assert!(exit.stderr.contains("Postgres at 127.0.0.1:"), "{arguments:?}: {exit:?}");
        assert!(!exit.stderr.contains(postgres::PASSWORD) && exit.stdout.is_empty(), "{arguments:?}: {exit:?}");
    }
}

#[tokio::test]
async fn startup_waits_for_postgres() {
    let mut postgres = Postgres::prepare();
    let installation = Installation::new(&postgres.url());
    let process = installation.spawn(&["serve", "--migrate"]);
    eventually("startup waits", async || process.stderr().contains("postgres unavailable").then_some(())).await;

    postgres.start().await;

    let service = Service::of(process).await;
    assert_eq!(service.anonymous().get("/readyz").await.expect(200)["ready"], true);
}

#[tokio::test]
async fn signal_aborts_a_startup_that_waits_for_postgres() {
    let installation = Installation::new(&absent_postgres());
    let process = installation.spawn(&["serve"]);
    eventually("startup waits", async || process.stderr().contains("postgres unavailable").then_some(())).await;

    process.signal("TERM");

    let exit = process.wait().await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
}

#[tokio::test]
async fn requests_fail_with_503_while_postgres_is_down() {
    let mut postgres = Postgres::prepare();
    postgres.start().await;
    let installation = Installation::new(&postgres.url()).with("REGCRED_DATABASE_ACQUIRE_TIMEOUT_SECONDS", "1");
    let mut service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "canary-password"});
    client.post("/v1/registry-accounts", &account).await.expect(201);

    // Twice, in case the first outage exhausts a resource.
    for round in 1..=2 {
        postgres.stop().await;
        // Cached rows are used until the process notices the outage.
        eventually("row cache inactive", async || {
            let metrics = service.operations().get("/metrics").await.body;
            metrics.contains("\nregcred_row_cache_active 0\n").then_some(())
        })
        .await;
        let render = json!({"accounts": ["a"]});
        let requests = (0..16).map(async |number| match number % 4 {
            0 => client.get("/v1/registry-accounts").await,
            1 => client.post("/v1/docker-configs", &render).await,
            2 => client.patch("/v1/registry-accounts/a", &json!({"email": "lost@example.com"})).await,
            _ => client.get("/v1/me").await,
        });
        for refused in join_all(requests).await {
            refused.problem(503, "database-unavailable");
            let seconds: u64 = refused.header("retry-after").parse().expect("seconds");
            assert!((1..=60).contains(&seconds), "{refused:?}");
            assert!(!refused.body.contains(postgres::PASSWORD), "{refused:?}");
        }
        // A result is remembered for a second.
        let not_ready = eventually("not ready", async || {
            let answer = service.anonymous().get("/readyz").await;
            (answer.status != 200).then_some(answer)
        })
        .await
        .expect(503);
        assert_eq!((&not_ready["ready"], &not_ready["database"]), (&json!(false), &json!(false)));
        assert_eq!(service.anonymous().get("/healthz").await.status, 200);
        assert_eq!(service.operations().get("/metrics").await.status, 200);

        postgres.start().await;
        eventually("ready again", async || (service.anonymous().get("/readyz").await.status == 200).then_some(()))
            .await;
        // Failed changes were not stored; earlier ones are intact.
        assert_eq!(client.get("/v1/registry-accounts/a").await.expect(200)["email"], Value::Null);
        let rendered = client.post("/v1/docker-configs", &render).await.expect(200);
        assert_eq!(rendered["config"]["auths"]["ghcr.io"]["password"], "canary-password", "round {round}");
        assert!(service.process.ended().is_none());
    }
    assert!(!service.process.stderr().contains(postgres::PASSWORD));
}

#[tokio::test]
async fn service_recovers_from_a_frozen_postgres() {
    let mut postgres = Postgres::prepare();
    postgres.start().await;
    let installation = Installation::new(&postgres.url()).with("REGCRED_DATABASE_ACQUIRE_TIMEOUT_SECONDS", "1");
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    client.get("/v1/me").await.expect(200);

    // Connections stay open without traffic, as in a network partition. More requests than
    // connections.
    postgres.freeze();
    let requests = join_all((0..32).map(|_| client.get("/v1/me")));
    let meanwhile = async {
        let alive = service.anonymous().get("/healthz").await.status;
        let ready = service.anonymous().request("GET", "/readyz").timeout(Duration::from_secs(3));
        let ready = service.anonymous().try_send(ready).await;
        postgres.thaw();
        (alive, ready)
    };
    let (answers, (alive, ready)) = tokio::join!(requests, meanwhile);

    assert_eq!(alive, 200);
    match ready {
        Ok(answer) => assert_eq!(answer.status, 503, "{answer:?}"),
        Err(error) => assert!(error.is_timeout(), "{error:?}"),
    }
    for answer in answers {
        assert!(answer.status == 200 || answer.slug() == "database-unavailable", "{answer:?}");
    }
    eventually("ready again", async || (service.anonymous().get("/readyz").await.status == 200).then_some(())).await;
    for answer in join_all((0..32).map(|_| client.get("/v1/me"))).await {
        answer.expect(200);
    }
}

/// Requests of all kinds: reads, a change, a reveal.
async fn ask_all(client: &Client, count: usize) -> Vec<Answer> {
    let render = json!({"accounts": ["a"]});
    let requests = (0..count).map(async |number| match number % 4 {
        0 => client.get("/v1/registry-accounts").await,
        1 => client.post("/v1/docker-configs", &render).await,
        2 => client.patch("/v1/registry-accounts/a", &json!({"email": format!("{number}@example.com")})).await,
        _ => client.get("/v1/pull-secrets").await,
    });
    join_all(requests).await
}

#[track_caller]
fn assert_unavailable(answer: &Answer) {
    // The audit log is in the same database.
    assert!(answer.status == 503, "{answer:?}");
    let slug = answer.slug();
    assert!(slug == "database-unavailable" || slug == "audit-unavailable", "{answer:?}");
}

/// Without an own limit, the requests would end only when the server goes on.
#[tokio::test]
async fn requests_end_while_postgres_is_suspended() {
    let mut postgres = Postgres::prepare();
    postgres.start().await;
    let installation = Installation::new(&postgres.url());
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "canary-password"});
    client.post("/v1/registry-accounts", &account).await.expect(201);
    // Connections that were used just now are not tested before the next use.
    ask_all(&client, 16).await;

    postgres.freeze();
    for round in 0..2 {
        for answer in ask_all(&client, 32).await {
            // Rows may still be cached in the first round, and reveals need the audit log.
            assert!(answer.status == 503 || round == 0, "{answer:?}");
            assert!(answer.status == 503 || answer.status == 200, "{answer:?}");
        }
        assert_eq!(service.anonymous().get("/healthz").await.status, 200);
        service.anonymous().get("/readyz").await.expect(503);
    }
    postgres.thaw();

    eventually("ready again", async || (service.anonymous().get("/readyz").await.status == 200).then_some(())).await;
    eventually("served again", async || {
        let answers = ask_all(&client, 32).await;
        answers.iter().all(|answer| answer.status == 200).then_some(())
    })
    .await;
}

/// A network that drops the packets of open connections, such as after a failover. TCP would give
/// up after a quarter of an hour.
#[tokio::test]
async fn connections_that_lost_their_peer_are_replaced() {
    let mut postgres = Postgres::prepare();
    postgres.start().await;
    let proxy = PgProxy::before(postgres.port(), Wire::Whole);
    let installation = Installation::new(&proxy.url(&postgres.url()));
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "canary-password"});
    client.post("/v1/registry-accounts", &account).await.expect(201);
    ask_all(&client, 32).await;

    // In use and idle. The pool has 8 places.
    let cut = async {
        proxy.becomes(Wire::Cut);
        // Requests now wait for their statements.
        tokio::time::sleep(Duration::from_millis(500)).await;
        proxy.cut_open_connections();
    };
    let (answers, ()) = tokio::join!(ask_all(&client, 32), cut);
    for answer in &answers {
        if answer.status != 200 {
            assert_unavailable(answer);
        }
    }

    eventually("served again", async || {
        let answers = ask_all(&client, 32).await;
        answers.iter().all(|answer| answer.status == 200).then_some(())
    })
    .await;
    let all_places = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'regcred'";
    let mut sql = sqlx::PgConnection::connect(&postgres.url()).await.expect("a connection");
    let open: i64 = sqlx::query_scalar(all_places).fetch_one(&mut sql).await.expect("a count");
    assert!(open > 1, "{open}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn readiness_checks_share_one_connection_outside_the_pool(pool: PgPool) {
    let app = TestApp::configured(pool.clone(), &[("REGCRED_DATABASE_MAX_CONNECTIONS", "1")]).await;
    app.anonymous().get("/readyz").await.expect(200);
    let mut superuser = postgres::superuser(&pool).await;
    let mut lock = pool.begin().await.expect("a transaction");
    sqlx::query("LOCK TABLE _sqlx_migrations").execute(&mut *lock).await.expect("locked");
    // The result of the first check is remembered for a second.
    tokio::time::sleep(Duration::from_millis(1_100)).await;

    let checks = join_all((0..100).map(async |_| app.anonymous().get("/readyz").await));
    let meanwhile = async {
        let waiting =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("a check waits for the lock", async || {
            let count: i64 = sqlx::query_scalar(waiting).fetch_one(&mut superuser).await.expect("a count");
            assert!(count <= 1, "{count} checks at a time");
            (count == 1).then_some(())
        })
        .await;
        // The only connection of the pool is free.
        app.admin().get("/v1/registry-accounts").await.expect(200);
    };
    let (answers, ()) = tokio::join!(checks, meanwhile);
    for answer in answers {
        assert!(answer.status == 200 || answer.status == 503, "{answer:?}");
    }
    let names = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'regcred health'";
    let connections: i64 = sqlx::query_scalar(names).fetch_one(&mut superuser).await.expect("a count");
    assert!(connections <= 1, "{connections}");

    lock.rollback().await.expect("unlocked");
    eventually("ready again", async || (app.anonymous().get("/readyz").await.status == 200).then_some(())).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dropped_transaction_is_rolled_back_and_its_connection_is_used_again(pool: PgPool) {
    let service = pool::of_service((*pool.connect_options()).clone(), 1, PATIENCE);
    let insert = "INSERT INTO pull_secrets (id, name, declaration) VALUES (gen_random_uuid(), 'team-a', '{}')";
    let backend = async || -> (i32, i64) {
        let query = "SELECT pg_backend_pid(), (SELECT count(*) FROM pull_secrets)";
        let mut conn = service.acquire().await.expect("a connection");
        sqlx::query_as(query).fetch_one(&mut conn).await.expect("a row")
    };
    let (pid, _) = backend().await;
    for _ in 0..3 {
        let mut tx = service.begin().await.expect("a transaction");
        sqlx::query(insert).execute(&mut *tx).await.expect("inserted");
        drop(tx);
        assert_eq!(backend().await, (pid, 0));
    }
    // A failed statement, and a statement that was not awaited to its end.
    let mut tx = service.begin().await.expect("a transaction");
    sqlx::query(insert).execute(&mut *tx).await.expect("inserted");
    sqlx::query(insert).execute(&mut *tx).await.expect_err("the name is in use");
    drop(tx);
    assert_eq!(backend().await, (pid, 0));
    let mut tx = service.begin().await.expect("a transaction");
    let slow = sqlx::query("SELECT pg_sleep(0.5)").execute(&mut *tx);
    assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err());
    drop(tx);
    assert_eq!(backend().await, (pid, 0));

    let mut tx = service.begin().await.expect("a transaction");
    sqlx::query(insert).execute(&mut *tx).await.expect("inserted");
    tx.commit().await.expect("committed");
    assert_eq!(backend().await, (pid, 1));
}

/// The server ends a long statement itself, and the connection stays in use.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn long_statement_is_ended_by_postgres(pool: PgPool) {
    let service = pool::of_service((*pool.connect_options()).clone(), 1, PATIENCE);
    let mut conn = service.acquire().await.expect("a connection");
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut conn).await.expect("a pid");
    let error = sqlx::query("SELECT pg_sleep(60)").execute(&mut conn).await.expect_err("ended");
    assert!(error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("57014")), "{error:?}");
    assert!(matches!(StorageError::from(error), StorageError::Unavailable(_)));
    let again: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut conn).await.expect("a pid");
    assert_eq!(pid, again);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn idle_transaction_is_ended_so_that_its_locks_are_released(pool: PgPool) {
    let service = pool::of_service((*pool.connect_options()).clone(), 2, PATIENCE);
    let mut idle = service.begin().await.expect("a transaction");
    let service = service.sqlx();
    let lock = "UPDATE pull_secrets SET version = version + 1";
    sqlx::query("INSERT INTO pull_secrets (id, name, declaration) VALUES (gen_random_uuid(), 'team-a', '{}')")
        .execute(&pool)
        .await
        .expect("a pull secret");
    sqlx::query(lock).execute(&mut *idle).await.expect("locked");

    let start = Instant::now();
    sqlx::query(lock).execute(service).await.expect("lock released");

    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    let lost = sqlx::query("SELECT 1").execute(&mut *idle).await.expect_err("transaction ended");
    assert!(matches!(StorageError::from(lost), StorageError::Unavailable(_)));
    let longest: String = sqlx::query_scalar("SHOW statement_timeout").fetch_one(service).await.expect("a setting");
    assert_eq!(longest, "10s");
}

// ---- Clusters ----

/// Registers a faulty cluster, and an account to deliver there.
async fn register(app: &TestApp, cluster: Value) {
    app.register_account("a", "ghcr.io", "robot", "canary-password").await;
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
}

/// Delivers the account, which must fail. Returns the problem's detail and the cluster check.
async fn try_delivery(app: &TestApp, namespace: &str, status: u16, slug: &str) -> (String, Value) {
    let path = format!("/v1/clusters/ill/namespaces/{namespace}/secrets");
    let answer = app.admin().post(&path, &json!({"name": "pull", "accounts": ["a"]})).await;
    let problem = answer.problem(status, slug);
    let check = app.admin().post("/v1/clusters/ill/check", &json!({})).await.expect(200);
    for text in [answer.body, check.to_string()] {
        assert!(!text.contains("canary"), "{text}");
    }
    (problem["detail"].as_str().expect("text").to_owned(), check)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn refused_connection_is_reported_as_unreachable(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let server = refusing_server();
    let auth = json!({"type": "token", "token": "canary-token"});
    register(&app, json!({"name": "ill", "server": server, "auth": auth, "allowPlainHttp": true})).await;

    let (detail, check) = try_delivery(&app, "default", 502, "cluster-unreachable").await;

    assert!(detail.contains(&server), "{detail}");
    assert_eq!((&check["reachable"], &check["problem"]["type"]), (&json!(false), &json!("cluster-unreachable")));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn hanging_api_server_is_reported_after_the_timeout(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_CLUSTER_TIMEOUT_SECONDS", "2")]).await;
    let (_gate, cluster) = Gate::cluster("ill");
    register(&app, cluster).await;
    let start = Instant::now();

    let (detail, check) = try_delivery(&app, "default", 504, "cluster-timeout").await;

    assert!(detail.contains("2000 ms"), "{detail}");
    assert_eq!((&check["reachable"], &check["problem"]["type"]), (&json!(false), &json!("cluster-timeout")));
    assert!((Duration::from_secs(2)..PATIENCE / 2).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn hanging_api_server_does_not_block_other_clusters(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_CLUSTER_TIMEOUT_SECONDS", "3600")]).await;
    let namespace = kubernetes::new_namespace().await;
    let (gate, cluster) = Gate::cluster("ill");
    register(&app, cluster).await;
    app.register_cluster("well").await;
    let deliver = async |cluster: &str, name: String| {
        let path = format!("/v1/clusters/{cluster}/namespaces/{namespace}/secrets");
        app.admin().post(&path, &json!({"name": name, "accounts": ["a"]})).await
    };

    // More requests than Postgres connections: waiting for a cluster must not hold one.
    let hanging = join_all((0..40).map(|number| deliver("ill", format!("ill-{number}"))));
    let meanwhile = async {
        gate.until_waiting(40).await;
        let healthy = join_all((0..10).map(|number| deliver("well", format!("well-{number}")))).await;
        gate.open();
        healthy
    };
    let (hanging, healthy) = tokio::join!(hanging, meanwhile);

    for answer in hanging.into_iter().chain(healthy) {
        answer.expect(201);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn api_server_with_unverified_certificate_receives_nothing(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let auth = json!({"type": "token", "token": given("REGCRED_TEST_KUBE_ADMIN_TOKEN")});
    // Without the CA of the API server.
    register(&app, json!({"name": "ill", "server": kubernetes::server(), "auth": auth})).await;

    let (detail, check) = try_delivery(&app, "default", 502, "cluster-unreachable").await;

    assert!(detail.contains("certificate") && detail.contains("caCertificate"), "{detail}");
    assert_eq!((&check["reachable"], &check["problem"]["type"]), (&json!(false), &json!("cluster-unreachable")));
    // With the CA.
    let body = json!({"caCertificate": kubernetes::file("ca.crt"), "auth": auth});
    app.admin().patch("/v1/clusters/ill", &body).await.expect(200);
    assert_eq!(app.admin().post("/v1/clusters/ill/check", &json!({})).await.expect(200)["reachable"], true);
    // With a name that the certificate does not contain.
    let body = json!({"tlsServerName": "other.example.com", "auth": auth});
    app.admin().patch("/v1/clusters/ill", &body).await.expect(200);
    let (detail, _) = try_delivery(&app, "default", 502, "cluster-unreachable").await;
    assert!(detail.contains("other.example.com"), "{detail}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rejected_cluster_credential_is_reported_as_502(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_account("a", "ghcr.io", "robot", "canary-password").await;
    app.register_cluster_with("ill", &json!({"type": "token", "token": "canary-token"})).await;

    let (_, check) = try_delivery(&app, &namespace, 502, "cluster-unauthorized").await;

    assert_eq!(check["problem"]["type"], "cluster-unauthorized");
    let stranger = json!({"type": "token", "token": given("REGCRED_TEST_KUBE_STRANGER_TOKEN")});
    app.admin().patch("/v1/clusters/ill", &json!({"auth": stranger})).await.expect(200);
    let (detail, check) = try_delivery(&app, &namespace, 502, "cluster-forbidden").await;
    assert!(detail.contains(&namespace), "{detail}");
    let permissions = check["permissions"].as_array().expect("a list");
    assert!(check["reachable"] == true && permissions.iter().all(|permission| permission["allowed"] == false));
    // A changed credential takes effect immediately.
    let admin = json!({"type": "token", "token": given("REGCRED_TEST_KUBE_ADMIN_TOKEN")});
    app.admin().patch("/v1/clusters/ill", &json!({"auth": admin})).await.expect(200);
    let path = format!("/v1/clusters/ill/namespaces/{namespace}/secrets");
    app.admin().post(&path, &json!({"name": "pull", "accounts": ["a"]})).await.expect(201);
}

// ---- Configuration ----

#[tokio::test]
async fn all_configuration_problems_are_reported_together() {
    let installation = Installation::new("canary-no-url")
        .with("REGCRED_HTTP_LISTEN", "nowhere")
        .with("REGCRED_HTTP_WORKERS", "0")
        .with("REGCRED_HTTP_SHUTDOWN_SECONDS", "soon")
        .with("REGCRED_DATABASE_MAX_CONNECTIONS", "many")
        .with("REGCRED_MASTER_KEYS", "canary:no-key")
        .with("REGCRED_API_KEY_PEPPER_FILE", "/nowhere/pepper")
        .with("REGCRED_CLUSTER_TIMEOUT_SECONDS", "-1");

    let exit = installation.run(&["serve"]).await;

    assert_eq!(exit.code, Some(64), "{exit:?}");
    let reported: BTreeMap<&str, &str> =
        exit.stderr.lines().filter_map(|line| line.trim().strip_prefix("- ")?.split_once(':')).collect();
    for variable in [
        "REGCRED_HTTP_LISTEN",
        "REGCRED_HTTP_WORKERS",
        "REGCRED_HTTP_SHUTDOWN_SECONDS",
        "REGCRED_DATABASE_URL",
        "REGCRED_DATABASE_MAX_CONNECTIONS",
        "REGCRED_MASTER_KEYS and REGCRED_MASTER_KEYS_FILE are both set",
        "REGCRED_API_KEY_PEPPER_FILE",
        "REGCRED_CLUSTER_TIMEOUT_SECONDS",
    ] {
        assert!(reported.contains_key(variable), "{variable} is not in {reported:#?}");
    }
    assert!(!exit.stderr.contains("canary"), "{exit:?}");
}

#[tokio::test]
async fn invalid_log_configuration_is_reported() {
    for (variable, value) in [("REGCRED_LOG_FILTER", "regcred=loud"), ("REGCRED_LOG_FORMAT", "xml")] {
        let installation = Installation::new("postgres://localhost/x").with(variable, value);
        let exit = installation.run(&["migrate"]).await;
        assert!(exit.code == Some(64) && exit.stderr.contains(variable), "{exit:?}");
        // Together with other problems.
        let exit = installation.with("REGCRED_HTTP_WORKERS", "0").run(&["serve"]).await;
        assert!(exit.code == Some(64) && exit.stderr.contains(variable), "{exit:?}");
        assert!(exit.stderr.contains("REGCRED_HTTP_WORKERS"), "{exit:?}");
    }
}

#[tokio::test]
async fn missing_secret_is_reported_with_both_variables() {
    for name in ["REGCRED_DATABASE_URL", "REGCRED_MASTER_KEYS", "REGCRED_API_KEY_PEPPER"] {
        let file = format!("{name}_FILE");
        let exit = Installation::new("postgres://localhost/x").with(&file, "").run(&["serve"]).await;
        assert!(exit.code == Some(64) && exit.stderr.contains(&format!("{name} or {file}")), "{exit:?}");
    }
}

#[sqlx::test(migrations = false)]
async fn outdated_schema_is_reported_with_its_remedy(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());

    let exit = installation.run(&["serve"]).await;

    assert_eq!(exit.code, Some(64), "{exit:?}");
    assert!(exit.stderr.contains("regcred migrate") && exit.stderr.contains("serve --migrate"), "{exit:?}");
    // A refused start changes nothing. The remedy works and can be repeated.
    let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        .fetch_one(&pool)
        .await
        .expect("a count");
    assert_eq!(tables, 0);
    installation.must_run(&["migrate"]).await;
    installation.must_run(&["migrate"]).await;
    let service = Service::of(installation.spawn(&["serve"])).await;
    assert_eq!(service.anonymous().get("/readyz").await.expect(200)["migrations"], true);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn startup_rejects_master_keys_that_do_not_open_stored_values(pool: PgPool) {
    let url = pool.connect_options().to_url_lossy();
    let installation = Installation::new(url.as_str());
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "x"});
    client.post("/v1/registry-accounts", &account).await.expect(201);
    let own = std::fs::read_to_string(installation.variable("REGCRED_MASTER_KEYS_FILE")).expect("the ring");
    let (id, _) = own.split_once(':').expect("a ring");

    // Another key, and another key with the id of the right one.
    let other_ring = Installation::new(url.as_str());
    let same_id = format!("{id}:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=");
    let confused =
        Installation::new(url.as_str()).with("REGCRED_MASTER_KEYS_FILE", "").with("REGCRED_MASTER_KEYS", &same_id);
    for wrong in [other_ring, confused] {
        let exit = wrong.run(&["serve"]).await;
        assert_eq!(exit.code, Some(64), "{exit:?}");
        assert!(exit.stderr.contains("REGCRED_MASTER_KEYS"), "{exit:?}");
        assert!(!exit.stderr.contains("AAAAAAAA"), "{exit:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn address_in_use_is_reported_with_its_variable(pool: PgPool) {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let installation =
        Installation::new(pool.connect_options().to_url_lossy().as_str()).with("REGCRED_HTTP_LISTEN", &address);

    let exit = installation.run(&["serve"]).await;

    assert_eq!(exit.code, Some(69), "{exit:?}");
    assert!(exit.stderr.contains(&address) && exit.stderr.contains("REGCRED_HTTP_LISTEN"), "{exit:?}");
    let installation =
        installation.with("REGCRED_HTTP_LISTEN", "127.0.0.1:0").with("REGCRED_OPERATIONS_LISTEN", &address);
    let exit = installation.run(&["serve"]).await;
    assert_eq!(exit.code, Some(69), "{exit:?}");
    assert!(exit.stderr.contains(&address) && exit.stderr.contains("REGCRED_OPERATIONS_LISTEN"), "{exit:?}");
}
