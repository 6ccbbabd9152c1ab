//! Startup, shutdown, health and master key rotation of the compiled binary.

use std::{
    fs,
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use chrono::{TimeDelta, Utc};
use futures_util::future::join_all;
use regcred::{
    crypto::{
        ring::Ring as _,
        sealer::{KeyRing, Sealer},
    },
    domain::sealed::{RegistryDestination, SealForm},
    storage::sealed::SealedColumn,
};
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};
use uuid::Uuid;

use crate::support::{
    PATIENCE,
    app::TestApp,
    client::{Answer, Client},
    eventually,
    listener::Gate,
    process::{Installation, Service},
};

fn installation(pool: &PgPool) -> Installation {
    Installation::new(pool.connect_options().to_url_lossy().as_str())
}

// ---- Start ----

#[sqlx::test(migrations = false)]
async fn replicas_start_concurrently_on_an_empty_database(pool: PgPool) {
    let installation = installation(&pool);
    let processes: Vec<_> = (0..5).map(|_| installation.spawn(&["serve", "--migrate"])).collect();

    let replicas = join_all(processes.into_iter().map(Service::of)).await;

    let key = installation.new_key("admin").await;
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "x"});
    replicas[0].client(&key).post("/v1/registry-accounts", &account).await.expect(201);
    for replica in &replicas {
        assert_eq!(replica.anonymous().get("/readyz").await.expect(200)["ready"], true);
        assert_eq!(replica.client(&key).get("/v1/registry-accounts/a").await.expect(200)["version"], 1);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn healthcheck_exit_code_reports_whether_the_service_answers(pool: PgPool) {
    let installation = installation(&pool);
    let service = installation.serve().await;
    let url = |path: &str| format!("http://{}{path}", service.address);
    let listening = Installation::new("").with("REGCRED_HTTP_LISTEN", &service.address.to_string());
    let not_listening = Installation::new("").with("REGCRED_HTTP_LISTEN", "127.0.0.1:1");

    assert_eq!(installation.run(&["healthcheck", &url("/healthz")]).await.code, Some(0));
    assert_eq!(installation.run(&["healthcheck", &url("/readyz")]).await.code, Some(0));
    assert_eq!(listening.run(&["healthcheck"]).await.code, Some(0));
    for (installation, arguments) in
        [(&installation, &["healthcheck", &url("/nowhere")][..]), (&not_listening, &["healthcheck"])]
    {
        let exit = installation.run(arguments).await;
        assert_eq!(exit.code, Some(1), "{exit:?}");
        assert!(exit.stderr.contains("http://127.0.0.1:"), "{exit:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn request_log_line_names_caller_and_status(pool: PgPool) {
    let installation = installation(&pool);
    let service = installation.serve().await;
    let cases = [
        (service.client(&installation.new_key("ci").await).get("/v1/me").await, 200, json!("ci")),
        (service.anonymous().get("/v1/me").await, 401, Value::Null),
    ];
    for (answer, status, caller) in cases {
        let id = answer.header("x-request-id");
        let line = eventually("request logged", async || {
            let stderr = service.process.stderr();
            let mut lines = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["message"] == "request completed" && line["span"]["request_id"] == id)
        })
        .await;
        assert_eq!((&line["status"], &line["caller"]), (&json!(status), &caller));
        assert_eq!((&line["span"]["path"], &line["span"]["method"]), (&json!("/v1/me"), &json!("GET")));
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn log_holds_the_clients_request_id_and_the_beginning_of_a_long_path(pool: PgPool) {
    let service = installation(&pool).serve().await;
    let client = service.anonymous();
    let given = Uuid::now_v7().to_string();
    let path = format!("/{}", "%C3%A9".repeat(2_000));
    let answer = client.send(client.request("GET", &path).header("X-Request-Id", &given)).await;
    let problem = answer.problem(404, "not-found");
    assert_eq!(problem["instance"], path.as_str());

    let span = eventually("request logged", async || {
        let stderr = service.process.stderr();
        let mut lines = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|line| line["message"] == "request completed").map(|line| line["span"].clone())
    })
    .await;
    assert_eq!(span["path"], &path[..512]);
    assert_eq!(span["client_request_id"], given.as_str());
    assert_eq!(span["request_id"], answer.header("x-request-id"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn operations_listener_can_be_off(pool: PgPool) {
    let installation = installation(&pool).with("REGCRED_OPERATIONS_LISTEN", "off");
    let service = installation.serve().await;
    service.anonymous().get("/metrics").await.problem(404, "not-found");
    assert_eq!(service.anonymous().get("/healthz").await.status, 200);
    assert_eq!(service.anonymous().get("/readyz").await.status, 200);
    let log = service.process.stderr();
    assert!(!log.contains("operations_address"), "{log}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn operational_routes_need_no_key(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let ask = async |path: &str| {
        let answer = app.anonymous().get(path).await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        assert!(!answer.header("x-request-id").is_empty(), "{path}: {answer:?}");
        answer
    };

    assert_eq!(ask("/healthz").await.body, "ok\n");
    assert_eq!(app.operations().get("/healthz").await.body, "ok\n");
    assert_eq!(app.operations().get("/readyz").await.expect(200)["ready"], true);
    for path in ["/v1/me", "/openapi.json", "/docs/"] {
        app.operations().with_key(app.admin().key()).get(path).await.problem(404, "not-found");
    }
    let ready = ask("/readyz").await.json();
    assert!(ready["rowCache"] == "on" || ready["rowCache"] == "off", "{ready}");
    let expected = json!({"ready": true, "database": true, "migrations": true, "rowCache": ready["rowCache"]});
    assert_eq!(ready, expected, "nothing else is shown to callers without a key");
    assert_eq!(ask("/openapi.json").await.json(), serde_json::to_value(regcred::http::document()).expect("JSON"));
    let docs = ask("/docs").await;
    assert!(docs.header("content-type").starts_with("text/html") && docs.body.contains("swagger"), "{docs:?}");
    assert!(!docs.body.contains("src=\"http") && !docs.body.contains("href=\"http"), "external resource: {docs:?}");
    assert!(ask("/docs/swagger-initializer.js").await.body.contains("/openapi.json"));

    // Requests are counted by route pattern, so that paths of callers create no series.
    app.admin().get("/v1/registry-accounts/canary-1").await.problem(404, "not-found");
    app.anonymous().get("/canary-2").await.problem(404, "not-found");
    app.anonymous().get("/v1/me").await.problem(401, "unauthenticated");
    app.anonymous().get("/metrics").await.problem(404, "not-found");
    let metrics = app.operations().get("/metrics").await;
    assert!(metrics.header("content-type").starts_with("application/openmetrics-text"), "{metrics:?}");
    for line in [
        r#"regcred_http_requests_total{method="GET",route="/v1/registry-accounts/{name}",status="404"} 1"#,
        r#"regcred_http_requests_total{method="GET",route="/healthz",status="200"} 2"#,
        r#"regcred_http_requests_total{method="GET",route="none",status="404"} 5"#,
        "regcred_api_key_argon2_runs_total 1",
    ] {
        assert!(metrics.body.lines().any(|written| written == line), "{line} is not in {}", metrics.body);
    }
    assert!(metrics.body.contains(r#"status="401""#) && !metrics.body.contains("canary"), "{}", metrics.body);
    assert!(metrics.body.ends_with("# EOF\n"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_documented_route_requires_a_key(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    // Admin keys, so that only their state is at fault.
    let expired = app.new_key("expired", Some(Utc::now() - TimeDelta::seconds(1))).await;
    let revoked = app.caller("revoked", "admin", None).await;
    let me = revoked.get("/v1/me").await.expect(200);
    let key = format!("/v1/api-keys/{}", me["id"].as_str().expect("an id"));
    assert_eq!(app.admin().delete(&key).await.status, 204);
    let anonymous = app.anonymous();
    let callers = [
        ("no key", anonymous.clone()),
        ("a malformed key", anonymous.with_key("rgc_wrong")),
        ("an expired key", anonymous.with_key(&expired)),
        ("a revoked key", revoked),
    ];
    let document = serde_json::to_value(regcred::http::document()).expect("JSON");
    let mut requests = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        if !path.starts_with("/v1/") {
            continue;
        }
        let filled = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part }).collect::<Vec<_>>();
        for method in operations.as_object().expect("operations").keys().map(|method| method.to_uppercase()) {
            for (case, client) in &callers {
                let answer = client.send(client.request(&method, &filled.join("/")).json(&json!({}))).await;
                let refused = (answer.status, answer.slug());
                assert_eq!(refused, (401, "unauthenticated".to_owned()), "{method} {path} with {case}");
                assert!(answer.header("www-authenticate").starts_with("Bearer"), "{method} {path}: {answer:?}");
                requests += 1;
            }
        }
    }
    assert!(requests >= 120, "only {requests} requests");
}

// ---- Stop ----

/// Registers an account and a cluster.
async fn register(client: &Client, cluster: &Value) {
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "x"});
    client.post("/v1/registry-accounts", &account).await.expect(201);
    client.post("/v1/clusters", cluster).await.expect(201);
}

/// Request that waits for the slow cluster.
fn deliver(client: &Client) -> reqwest::RequestBuilder {
    let path = "/v1/clusters/slow/namespaces/default/secrets";
    client.request("POST", path).json(&json!({"name": "pull", "accounts": ["a"]}))
}

/// Checks that the request failed: with a problem, or because the connection was closed.
fn assert_aborted(outcome: &reqwest::Result<Answer>) {
    if let Ok(answer) = outcome {
        answer.problem(502, "cluster-unreachable");
    }
}

async fn until_refused(service: &Service) {
    eventually("new connections are refused", async || TcpStream::connect(service.address).err()).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn signal_under_load_fails_no_request_in_flight(pool: PgPool) {
    let installation =
        installation(&pool).with("REGCRED_HTTP_SHUTDOWN_SECONDS", "60").with("REGCRED_CLUSTER_TIMEOUT_SECONDS", "60");
    for signal in ["TERM", "INT"] {
        let service = installation.serve().await;
        let client = service.client(&installation.new_key(&format!("admin-{}", signal.to_lowercase())).await);
        let (gate, cluster) = Gate::cluster("slow");
        if signal == "TERM" {
            register(&client, &cluster).await;
        } else {
            client.patch("/v1/clusters/slow", &json!({"server": cluster["server"]})).await.expect(200);
        }
        let is_stopping = AtomicBool::new(false);
        // Short requests in sequence, until new connections are refused.
        let short = (0..8).map(async |_| {
            let mut answered = 0;
            loop {
                let request = client.request("POST", "/v1/docker-configs").json(&json!({"accounts": ["a"]}));
                match client.try_send(request).await {
                    Ok(answer) => assert_eq!(answer.status, 200, "{answer:?}"),
                    // No partial response: that would be a failed request in flight.
                    Err(error) => {
                        assert!(
                            is_stopping.load(Ordering::SeqCst) && !error.is_body() && !error.is_decode(),
                            "{error:?}"
                        );
                        return answered;
                    }
                }
                answered += 1;
            }
        });
        // Long requests that are in flight when the signal arrives.
        let long = join_all((0..20).map(|_| client.try_send(deliver(&client))));
        let stop = async {
            gate.until_waiting(20).await;
            is_stopping.store(true, Ordering::SeqCst);
            service.process.signal(signal);
            until_refused(&service).await;
            gate.open();
        };

        let (answered, long, ()) = tokio::join!(join_all(short), long, stop);

        for answer in long {
            assert_eq!(answer.expect("response").expect(201)["uid"], "u-1");
        }
        assert!(answered.iter().all(|count| *count > 0), "{answered:?}");
        let exit = service.process.wait().await;
        assert_eq!(exit.code, Some(0), "{exit:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn second_signal_aborts_the_shutdown(pool: PgPool) {
    let installation = installation(&pool)
        .with("REGCRED_HTTP_SHUTDOWN_SECONDS", "3600")
        .with("REGCRED_CLUSTER_TIMEOUT_SECONDS", "3600");
    let mut service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let (gate, cluster) = Gate::cluster("slow");
    register(&client, &cluster).await;
    let hanging = tokio::spawn({
        let client = client.clone();
        async move { client.try_send(deliver(&client)).await }
    });
    gate.until_waiting(1).await;

    service.process.signal("TERM");
    until_refused(&service).await;
    // The process waits for the request in flight.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(service.process.ended().is_none());
    service.process.signal("TERM");

    let exit = service.process.wait().await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_aborted(&hanging.await.expect("request task"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn grace_period_bounds_the_wait_for_requests_in_flight(pool: PgPool) {
    let installation =
        installation(&pool).with("REGCRED_HTTP_SHUTDOWN_SECONDS", "1").with("REGCRED_CLUSTER_TIMEOUT_SECONDS", "3600");
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let (gate, cluster) = Gate::cluster("slow");
    register(&client, &cluster).await;
    let hanging = tokio::spawn({
        let client = client.clone();
        async move { client.try_send(deliver(&client)).await }
    });
    gate.until_waiting(1).await;

    service.process.signal("TERM");

    let exit = service.process.wait().await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_aborted(&hanging.await.expect("request task"));
}

// ---- Master keys ----

/// Returns key id, state and rows of `master-key list`, in the order of the ring.
async fn list_keys(installation: &Installation) -> Vec<(String, String, i64)> {
    let listed = installation.must_run(&["master-key", "list"]).await;
    let lines = listed.lines().skip(1).map(|line| {
        let mut words = line.split_whitespace().map(str::to_owned);
        let mut word = || words.next().expect("three columns");
        (word(), word(), word().parse().expect("a number"))
    });
    lines.collect()
}

/// Inserts accounts directly: `account-0` with `password-0` and so on.
pub async fn store_accounts(pool: &PgPool, installation: &Installation, count: usize) {
    let ring = fs::read_to_string(installation.variable("REGCRED_MASTER_KEYS_FILE")).expect("key ring");
    let sealer = Sealer::new(KeyRing::parse(&SecretString::from(ring)).expect("key ring"), None);
    let ids: Vec<Uuid> = (0..count).map(|_| Uuid::now_v7()).collect();
    let passwords: Vec<Vec<u8>> = ids
        .iter()
        .enumerate()
        .map(|(number, id)| {
            let password = SecretString::from(format!("password-{number}"));
            let authority = format!("account-{number}.example.com");
            let destination = RegistryDestination { authority: &authority, plain_http: false, ca: None };
            let slot = SealedColumn::account_password(*id, &destination);
            sealer.seal(SealForm::Unbound, &slot, &password).expect("sealed").bytes
        })
        .collect();
    let names: Vec<String> = (0..count).map(|number| format!("account-{number}")).collect();
    sqlx::query(
        "INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id)
         SELECT id, name, name || '.example.com', 'martin', password, $4
         FROM unnest($1::uuid[], $2::text[], $3::bytea[]) AS new (id, name, password)",
    )
    .bind(&ids)
    .bind(&names)
    .bind(&passwords)
    .bind(sealer.sealing_key_id())
    .execute(pool)
    .await
    .expect("stored");
}

/// Renders stored accounts and checks their passwords.
pub async fn render(client: &Client, numbers: std::ops::Range<usize>) {
    let names: Vec<String> = numbers.clone().map(|number| format!("account-{number}")).collect();
    let rendered = client.post("/v1/docker-configs", &json!({"accounts": names})).await.expect(200);
    let entries = &rendered["config"]["auths"];
    for number in numbers {
        let entry = &entries[format!("account-{number}.example.com")];
        assert_eq!(entry["password"], format!("password-{number}"), "{entry}");
    }
}

/// Renders 50 accounts at a time until `is_done`; returns how often.
async fn render_until(client: &Client, count: usize, is_done: &AtomicBool) -> usize {
    let mut rendered = 0;
    while !is_done.load(Ordering::SeqCst) {
        let start = rendered * 7 % (count - 50);
        render(client, start..start + 50).await;
        rendered += 1;
    }
    rendered
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn master_key_rotation_under_load_fails_no_request(pool: PgPool) {
    const COUNT: usize = 3_000;
    let installation = installation(&pool);
    let ring_file = installation.variable("REGCRED_MASTER_KEYS_FILE");
    store_accounts(&pool, &installation, COUNT).await;
    let replicas = [installation.serve().await, installation.serve().await];
    let key = installation.new_key("admin").await;
    let cluster = json!({"name": "c", "server": "https://k", "auth": {"type": "token", "token": "canary-token"}});
    replicas[0].client(&key).post("/v1/clusters", &cluster).await.expect(201);
    let before = list_keys(&installation).await;
    let old = before[0].0.clone();
    assert_eq!(before, [(old.clone(), "seals".to_owned(), 3_001)]);

    let is_done = AtomicBool::new(false);
    let clients = replicas.each_ref().map(|replica| replica.client(&key));
    let load = clients.iter().map(|client| render_until(client, COUNT, &is_done));
    let rotation = async {
        installation.must_run(&["master-key", "generate", "--file", &ring_file]).await;
        installation.must_run(&["master-key", "rotate"]).await;
        let listed = list_keys(&installation).await;
        // A replica that has opened a value of the new key also seals with it.
        for (number, replica) in replicas.iter().enumerate() {
            render(&replica.client(&key), 0..1).await;
            let body =
                json!({"name": format!("new-{number}"), "registry": "ghcr.io", "username": "m", "password": "x"});
            replica.client(&key).post("/v1/registry-accounts", &body).await.expect(201);
        }
        is_done.store(true, Ordering::SeqCst);
        listed
    };
    let (rendered, listed) = tokio::join!(join_all(load), rotation);

    assert!(rendered.iter().all(|count| *count > 0), "{rendered:?}");
    let new = listed[0].0.clone();
    assert_ne!(new, old);
    assert_eq!(listed, [(new.clone(), "seals".to_owned(), 3_001), (old.clone(), "opens".to_owned(), 0)]);
    assert_eq!(
        list_keys(&installation).await[..2],
        [(new.clone(), "seals".to_owned(), 3_003), (old, "opens".to_owned(), 0)]
    );

    // Without the old key everything still opens after a restart.
    drop(replicas);
    let ring = fs::read_to_string(&ring_file).expect("key ring");
    fs::write(&ring_file, ring.lines().next().expect("the new key")).expect("written");
    let service = installation.serve().await;
    let client = service.client(&key);
    for start in (0..COUNT).step_by(1_000) {
        render(&client, start..start + 1_000).await;
    }
    let kept = client.patch("/v1/clusters/c", &json!({"allowPlainHttp": true})).await;
    assert_eq!(kept.expect(200)["version"], 2, "the token of the cluster opens");
    assert_eq!(list_keys(&installation).await, [(new, "seals".to_owned(), 3_003)]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn killed_rotation_loses_nothing_and_can_be_repeated(pool: PgPool) {
    const COUNT: usize = 1_200;
    let installation = installation(&pool);
    store_accounts(&pool, &installation, COUNT).await;
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let ring_file = installation.variable("REGCRED_MASTER_KEYS_FILE");
    installation.must_run(&["master-key", "generate", "--file", &ring_file]).await;
    // A lock on the last row blocks the last batch of the rotation.
    let mut lock = pool.begin().await.expect("a transaction");
    sqlx::query("SELECT id FROM registry_accounts ORDER BY id DESC LIMIT 1 FOR UPDATE")
        .fetch_one(&mut *lock)
        .await
        .expect("the last row");
    let rotation = installation.spawn(&["master-key", "rotate"]);
    eventually("two batches committed", async || rotation.stderr().contains("1000 values").then_some(())).await;

    rotation.signal("KILL");

    assert_eq!(rotation.wait().await.code, None);
    lock.rollback().await.expect("released");
    let halfway = list_keys(&installation).await;
    assert_eq!([halfway[0].2, halfway[1].2], [1_000, 200]);
    render(&client, 700..COUNT).await;

    let repeated = installation.run(&["master-key", "rotate"]).await;
    assert!(repeated.code == Some(0) && repeated.stderr.contains("200 values"), "{repeated:?}");
    let after = list_keys(&installation).await;
    assert_eq!([after[0].2, after[1].2], [1_200, 0]);
    render(&client, 700..COUNT).await;
    // Nothing remains for a third run.
    let again = installation.run(&["master-key", "rotate"]).await;
    assert!(again.code == Some(0) && again.stderr.contains("0 values"), "{again:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rotation_reports_values_that_do_not_open(pool: PgPool) {
    let installation = installation(&pool);
    store_accounts(&pool, &installation, 3).await;
    sqlx::query("UPDATE registry_accounts SET password = set_byte(password, 20, get_byte(password, 20) # 1) WHERE name = 'account-1'")
        .execute(&pool)
        .await
        .expect("damaged");
    let ring_file = installation.variable("REGCRED_MASTER_KEYS_FILE");
    installation.must_run(&["master-key", "generate", "--file", &ring_file]).await;
    let start = Instant::now();

    let exit = installation.run(&["master-key", "rotate"]).await;

    assert_eq!(exit.code, Some(1), "{exit:?}");
    assert!(exit.stderr.contains("2 values re-sealed, 1 skipped because they did not open"), "{exit:?}");
    let listed = list_keys(&installation).await;
    assert_eq!([listed[0].2, listed[1].2], [2, 1]);
    assert!(start.elapsed() < PATIENCE);
}

// ---- Memory and files ----

/// Returns the fields of the first log line with this message.
fn logged(service: &Service, message: &str) -> Option<Value> {
    let stderr = service.process.stderr();
    let mut lines = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.find(|line| line["message"] == message)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn service_and_worker_cannot_dump_their_memory(pool: PgPool) {
    let installation = installation(&pool);
    for arguments in [&["serve", "--migrate"][..], &["worker"]] {
        let service = Service::of(installation.spawn(arguments)).await;
        let process = format!("/proc/{}", service.process.id());
        let limits = fs::read_to_string(format!("{process}/limits")).expect("the process lives");
        let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).expect("a limit");
        assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"], "{limits}");
        // As the kernel reports it. Root could read the memory all the same.
        let protected = logged(&service, "process memory protected").expect("logged");
        assert_eq!(protected["dumpable"], false, "{protected}");
        // The kernel gives files of a process that is not dumpable to root, also if it runs as another user.
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(format!("{process}/environ")).expect("a file"));
        assert_eq!(owner, 0);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn start_warns_of_secret_files_that_others_can_read(pool: PgPool) {
    use std::os::unix::fs::PermissionsExt;
    let installation = installation(&pool);
    let variables = ["REGCRED_DATABASE_URL_FILE", "REGCRED_MASTER_KEYS_FILE", "REGCRED_API_KEY_PEPPER_FILE"];
    let warnings = async |modes: [u32; 3]| -> Vec<(String, String)> {
        for (variable, mode) in variables.into_iter().zip(modes) {
            fs::set_permissions(installation.variable(variable), fs::Permissions::from_mode(mode)).expect("set");
        }
        let service = installation.serve().await;
        let stderr = service.process.stderr();
        let lines = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let warnings = lines.filter(|line| line["message"] == "secret file readable by other users");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        warnings.map(|line| (text(&line["variable"]), text(&line["mode"]))).collect()
    };

    assert_eq!(warnings([0o600, 0o400, 0o600]).await, []);
    let expected = [(variables[0], "0644"), (variables[1], "0604"), (variables[2], "0640")];
    let expected = expected.map(|(variable, mode)| (variable.to_owned(), mode.to_owned()));
    assert_eq!(warnings([0o644, 0o604, 0o640]).await, expected);
}
