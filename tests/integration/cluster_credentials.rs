//! End of clusters' credentials: shown, warned of, refused, and put off by renewals.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, TimeDelta, Utc};
use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::{
    pull_secrets::Broker,
    support::{
        app::TestApp,
        client::{Answer, Client},
        eventually,
        files::TempDir,
        kubernetes,
        process::Installation,
    },
    verify::listening::{Requests, answer, serve},
};

/// A token that states this end. No API server accepts it.
fn token_until(end: DateTime<Utc>) -> String {
    let part = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.c2ln", part(json!({"alg": "RS256"})), part(json!({"exp": end.timestamp()})))
}

fn in_days(days: i64) -> DateTime<Utc> {
    Utc::now() + TimeDelta::days(days)
}

fn with_token(token: &str) -> Value {
    json!({"type": "token", "token": token})
}

fn end(cluster: &Value) -> Option<DateTime<Utc>> {
    serde_json::from_value(cluster["auth"]["expiresAt"].clone()).expect("a time or null")
}

fn codes(cluster: &Value) -> Vec<&str> {
    let warnings = cluster["warnings"].as_array().expect("warnings");
    warnings.iter().map(|warning| warning["code"].as_str().expect("a code")).collect()
}

/// Value of a metric, by its name and labels as printed.
async fn metric(app: &TestApp, series: &str) -> Option<u64> {
    let text = app.operations().get("/metrics").await.body;
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

async fn fetch(admin: &Client, name: &str) -> Value {
    admin.get(&format!("/v1/clusters/{name}")).await.expect(200)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn end_of_a_credential_is_shown_with_a_warning(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    let admin = app.admin();
    let opaque = app.register_cluster("opaque").await;
    assert_eq!((end(&opaque), codes(&opaque)), (None, vec![]));

    let soon = app.register_cluster_with("soon", &with_token(&token_until(in_days(5)))).await;
    let shown = end(&soon).expect("an end");
    assert!((in_days(5) - shown).num_minutes() < 2, "{soon}");
    assert_eq!(codes(&soon), ["credentialExpires"]);
    let later = app.register_cluster_with("later", &with_token(&token_until(in_days(40)))).await;
    assert!(end(&later).is_some());
    assert_eq!(codes(&later), [""; 0]);

    let certificate = json!({
        "type": "clientCertificate", "certificate": kubernetes::file("admin.crt"), "key": kubernetes::file("admin.key"),
    });
    let pair = app.register_cluster_with("pair", &certificate).await;
    assert!(end(&pair).is_some_and(|at| at > in_days(300)), "{pair}");

    // A credential that ends while it is stored.
    let ended = "UPDATE clusters SET credential_expires_at = now() - interval '1 hour' WHERE name = 'soon'";
    sqlx::query(ended).execute(&pool).await.expect("done");
    assert_eq!(codes(&fetch(&admin, "soon").await), ["credentialExpired"]);

    // A new credential replaces the end.
    let changed = admin.patch("/v1/clusters/soon", &json!({"auth": with_token("opaque")})).await.expect(200);
    assert_eq!((end(&changed), codes(&changed)), (None, vec![]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn credential_that_has_ended_is_refused_everywhere(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    app.register_cluster("dev").await;
    let ended = token_until(in_days(-1));
    let refused = |answer: &Answer, field: &str| {
        let problem = answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), [field], "{answer:?}");
        let detail = problem["errors"][0]["detail"].as_str().expect("a detail");
        let day = in_days(-1).format("%Y-").to_string();
        assert!(detail.contains(&format!("ended at {day}")) || detail.contains("ended at 2021-"), "{detail}");
        assert!(!answer.body.contains(&ended));
    };
    let register =
        async |auth: &Value| admin.post("/v1/clusters", &kubernetes::FIRST.registration("ended", auth)).await;
    refused(&register(&with_token(&ended)).await, "auth.token");
    let account = json!({"type": "serviceAccount", "token": ended, "namespace": "regcred", "name": "regcred"});
    refused(&register(&account).await, "auth.token");
    refused(&admin.patch("/v1/clusters/dev", &json!({"auth": with_token(&ended)})).await, "auth.token");

    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.not_after = date_time_ymd(2021, 1, 1);
    let key = KeyPair::generate().expect("a key");
    let certificate = params.self_signed(&key).expect("a certificate").pem();
    let pair = json!({"type": "clientCertificate", "certificate": certificate, "key": key.serialize_pem()});
    refused(&register(&pair).await, "auth.certificate");

    let kubeconfig = format!(
        "{{kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: c, user: u}}}}], clusters: [{{name: c, \
         cluster: {{server: 'https://127.0.0.1:1'}}}}], users: [{{name: u, user: {{token: {ended}}}}}]}}"
    );
    refused(&admin.post("/v1/clusters", &json!({"name": "ended", "kubeconfig": kubeconfig})).await, "kubeconfig");
    refused(&admin.patch("/v1/clusters/dev", &json!({"kubeconfig": kubeconfig})).await, "kubeconfig");
    assert_eq!(app.rows().await[1], 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn credential_of_an_earlier_release_is_described_and_counted(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    let renewed = json!({
        "type": "serviceAccount", "token": token_until(in_days(5)), "namespace": "regcred", "name": "regcred",
    });
    app.register_cluster_with("dev", &renewed).await;
    // As an earlier release changes a cluster: it does not know the new columns.
    sqlx::query("UPDATE clusters SET version = version + 1").execute(&pool).await.expect("changed");
    let changed = fetch(&app.admin(), "dev").await;
    assert_eq!((&changed["auth"]["type"], end(&changed)), (&json!("token"), None), "{changed}");

    // Reports at its start.
    let other = TestApp::beside(&app).await;
    let found = eventually("the end is known", async || {
        let found = fetch(&other.admin(), "dev").await;
        end(&found).is_some().then_some(found)
    })
    .await;
    assert_eq!(codes(&found), ["credentialExpires"]);
    assert_eq!(found["auth"]["type"], "token");
    for (days, count) in [(30, 1), (7, 1), (3, 0), (0, 0)] {
        let series = format!("regcred_cluster_credentials_expiring{{within_days=\"{days}\"}}");
        eventually(&series, async || (metric(&other, &series).await == Some(count)).then_some(())).await;
    }
    let warned: Option<i16> =
        sqlx::query_scalar("SELECT expiry_warned_days FROM clusters").fetch_one(&pool).await.expect("a row");
    assert_eq!(warned, Some(7), "the warning is logged once, by one replica");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_is_renewed_once_the_printed_role_is_applied(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    let admin = app.admin();
    let broker = Broker::without_rights().await;
    // Part of the name of the printed role.
    let name = broker.namespace.as_str();
    let mut auth = broker.auth();
    auth["type"] = json!("serviceAccount");
    auth["namespace"] = json!(broker.namespace);
    auth["name"] = json!(broker.name);
    let created = app.register_cluster_with(name, &auth).await;
    assert_eq!(created["auth"]["name"], json!(broker.name), "{created}");
    let first_end = end(&created).expect("an end");

    let failing = eventually("the renewal fails without the role", async || {
        let found = fetch(&admin, name).await;
        (found["auth"]["renewal"]["failures"].as_i64() > Some(0)).then_some(found)
    })
    .await;
    assert!(codes(&failing).contains(&"renewalFailing"), "{failing}");
    assert_eq!(end(&failing), Some(first_end), "the token stays");
    let error = failing["auth"]["renewal"]["lastError"].as_str().expect("an error");
    assert!(error.contains("may not create serviceaccounts/token"), "{error}");
    let check = admin.post(&format!("/v1/clusters/{name}/check"), &json!({})).await.expect(200);
    let missing = json!([{
        "verb": "create", "resource": "serviceaccounts/token", "name": broker.name, "namespace": broker.namespace,
    }]);
    assert_eq!(check["renewal"], missing, "{check}");

    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let printed = installation.must_run(&["cluster", "rbac", "--cluster", name]).await;
    assert!(printed.contains(&format!("resourceNames: [\"{}\"]", broker.name)), "{printed}");
    kubernetes::kubectl(&["apply", "-f", "-"], &printed);

    let renewed = eventually("the token is renewed", async || {
        // The backoff grows while the API server has not seen the role.
        sqlx::query("UPDATE clusters SET next_renewal_at = now() WHERE renewal_failures > 0")
            .execute(&pool)
            .await
            .expect("done");
        let found = fetch(&admin, name).await;
        (end(&found) > Some(first_end)).then_some(found)
    })
    .await;
    assert_eq!(renewed["auth"]["renewal"]["failures"], 0, "{renewed}");
    assert_eq!(codes(&renewed), [""; 0], "a renewed token needs no warning");
    assert_eq!(renewed["version"], created["version"], "the ETag stays");
    let next: DateTime<Utc> = serde_json::from_value(renewed["auth"]["renewal"]["nextAt"].clone()).expect("a time");
    assert!(next > Utc::now() && Some(next) < end(&renewed), "{renewed}");
    assert_eq!(metric(&app, "regcred_cluster_token_renewals_total{result=\"success\"}").await, Some(1));

    // The new token is the ServiceAccount's: it is used, and renews itself.
    let check = admin.post(&format!("/v1/clusters/{name}/check"), &json!({})).await.expect(200);
    assert_eq!((&check["reachable"], check.get("problem")), (&json!(true), None), "{check}");
    let second_end = end(&renewed);
    sqlx::query("UPDATE clusters SET next_renewal_at = now()").execute(&pool).await.expect("done");
    eventually("it is renewed again", async || (end(&fetch(&admin, name).await) > second_end).then_some(())).await;
    eventually("the check finds the right", async || {
        let check = admin.post(&format!("/v1/clusters/{name}/check"), &json!({})).await.expect(200);
        (check["renewal"] == json!([])).then_some(())
    })
    .await;
    let events = admin.get(&format!("/v1/audit-events?resource=clusters/{name}&action=cluster.renewToken")).await;
    assert_eq!(events.expect(200)["items"].as_array().map(Vec::len), Some(2));
}

/// An API server that issues tokens once `is_open`.
fn issuer(is_open: Arc<AtomicBool>) -> (String, Requests) {
    let (address, requests) = serve(move |request| {
        if !request.starts_with("POST /api/v1/namespaces/regcred/serviceaccounts/regcred/token") {
            return answer("404 Not Found", &[], "{}");
        }
        while !is_open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let status = json!({"token": token_until(in_days(1)), "expirationTimestamp": in_days(1).to_rfc3339()});
        answer("201 Created", &[("Content-Type", "application/json")], &json!({"status": status}).to_string())
    });
    (format!("http://{address}"), requests)
}

async fn register_at(admin: &Client, server: &str) {
    let auth = json!({"type": "serviceAccount", "token": "first", "namespace": "regcred", "name": "regcred"});
    let body = json!({"name": "dev", "server": server, "auth": auth, "allowPlainHttp": true});
    admin.post("/v1/clusters", &body).await.expect(201);
}

async fn renewals(pool: &PgPool) -> i64 {
    sqlx::query_scalar("SELECT credential_renewals FROM clusters").fetch_one(pool).await.expect("a row")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn one_of_two_replicas_renews_a_token(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    let _other = TestApp::beside(&app).await;
    let (server, requests) = issuer(Arc::new(AtomicBool::new(true)));
    register_at(&app.admin(), &server).await;

    eventually("the token is renewed", async || (renewals(&pool).await == 1).then_some(())).await;

    assert_eq!(requests.count(), 1, "{}", requests.text());
    assert!(requests.text().contains("Bearer first") || requests.text().contains("bearer first"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn renewal_does_not_overwrite_a_new_credential(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    let is_open = Arc::new(AtomicBool::new(false));
    let (server, requests) = issuer(Arc::clone(&is_open));
    register_at(&app.admin(), &server).await;
    eventually("the renewal has begun", async || (requests.count() > 0).then_some(())).await;

    let changed = app.admin().patch("/v1/clusters/dev", &json!({"auth": with_token("second")})).await.expect(200);
    let stored: Vec<u8> = sqlx::query_scalar("SELECT credential FROM clusters").fetch_one(&pool).await.expect("a row");
    is_open.store(true, Ordering::SeqCst);
    // The worker handles due renewals in turn: a later one shows that the first is over.
    let other = json!({"type": "serviceAccount", "token": "first", "namespace": "regcred", "name": "regcred"});
    let body = json!({"name": "other", "server": server, "auth": other, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &body).await.expect(201);
    eventually("the other token is renewed", async || {
        (end(&fetch(&app.admin(), "other").await).is_some()).then_some(())
    })
    .await;

    let found = fetch(&app.admin(), "dev").await;
    assert_eq!((&found["auth"], &found["version"]), (&changed["auth"], &changed["version"]), "{found}");
    let after: Vec<u8> =
        sqlx::query_scalar("SELECT credential FROM clusters WHERE name = 'dev'").fetch_one(&pool).await.expect("a row");
    assert_eq!(after, stored);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn service_account_needs_namespace_and_name(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let register =
        async |auth: Value| app.admin().post("/v1/clusters", &kubernetes::FIRST.registration("dev", &auth)).await;
    let answer = register(json!({"type": "serviceAccount", "token": "t"})).await;
    answer.problem(422, "invalid-request");
    assert_eq!(answer.fields(), ["auth.namespace", "auth.name"]);
    let answer =
        register(json!({"type": "serviceAccount", "token": "t", "namespace": "A", "name": "..", "key": "k"})).await;
    let mut fields = answer.fields();
    fields.sort_unstable();
    assert_eq!(fields, ["auth.key", "auth.name", "auth.namespace"]);
    let answer = register(json!({"type": "token", "token": "t", "namespace": "a", "name": "b"})).await;
    assert_eq!(answer.fields(), ["auth.namespace", "auth.name"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn commands_of_the_document_connect_a_cluster(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_regcred")).parent().expect("a folder").display().to_string();
    let path = format!("{program}:{}", std::env::var("PATH").expect("a path"));
    let kubeconfig = kubernetes::path("kubeconfig").display().to_string();
    let api = format!("http://{}", service.address);
    let shell = Installation::new(pool.connect_options().to_url_lossy().as_str());
    // kubectl caches there.
    let home = TempDir::new();
    let mut shell = shell
        .with("HOME", &home.path().display().to_string())
        .with("PATH", &path)
        .with("KUBECONFIG", &kubeconfig)
        .with("api", &api)
        .with("key", &key);
    for variable in ["REGCRED_MASTER_KEYS_FILE", "REGCRED_API_KEY_PEPPER_FILE"] {
        shell = shell.with(variable, &installation.variable(variable));
    }
    let printed = shell.spawn_program("dev/doc-examples", &["docs/CLUSTERS.md", "sh"]).wait().await;
    assert_eq!(printed.code, Some(0), "{printed:?}");
    let program = format!("set -euo pipefail\n{}", printed.stdout);
    let exit = shell.spawn_program("bash", &["-c", &program]).wait().await;
    assert_eq!(exit.code, Some(0), "{exit:?}");

    let admin = service.client(&key);
    let renewed = eventually("the token is renewed", async || {
        let found = fetch(&admin, "prod").await;
        (end(&found).is_some_and(|at| at > in_days(2))).then_some(found)
    })
    .await;
    assert_eq!(renewed["auth"]["renewal"]["failures"], 0, "{renewed}");
    let check = admin.post("/v1/clusters/prod/check", &json!({})).await.expect(200);
    assert_eq!((&check["renewal"], &check["pullSecrets"], check.get("problem")), (&json!([]), &json!([]), None));
}
