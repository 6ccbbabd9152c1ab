//! Background verification, and warnings before a password expires.

use std::{collections::BTreeSet, time::Duration};

use chrono::{TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::listening::{answer, serve};
use crate::support::{
    app::TestApp,
    client::Client,
    eventually,
    process::{Installation, Service},
    registry,
};

const QUICK: &[(&str, &str)] = &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8"), ("REGCRED_VERIFY_POLL_SECONDS", "1")];

fn account(name: &str, registry: &str, password: &str, interval: Option<i64>) -> Value {
    json!({
        "name": name, "registry": registry, "username": "martin", "password": password, "plainHttp": true,
        "verifyIntervalSeconds": interval,
    })
}

async fn make_due(pool: &PgPool) {
    let due = "UPDATE registry_accounts SET next_verification_at = now() WHERE next_verification_at IS NOT NULL";
    sqlx::query(due).execute(pool).await.expect("due");
}

async fn result_of(client: &Client, name: &str) -> Value {
    client.get(&format!("/v1/registry-accounts/{name}")).await.expect(200)["lastVerificationResult"].clone()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_with_an_interval_is_verified_in_the_background(pool: PgPool) {
    let app = TestApp::configured(pool, QUICK).await;
    let there = registry::a();
    let client = app.admin();
    for (name, password, interval) in
        [("works", there.password.as_str(), Some(300)), ("fails", "canary-password", Some(3600)), ("quiet", "x", None)]
    {
        let created = client.post("/v1/registry-accounts", &account(name, &there.address, password, interval)).await;
        assert_eq!(created.expect(201)["verifyIntervalSeconds"], json!(interval));
    }
    let soon: bool = sqlx::query_scalar(
        "SELECT bool_and(next_verification_at BETWEEN now() - interval '1 minute' AND now() + interval '1 minute')
         FROM registry_accounts WHERE name <> 'quiet'",
    )
    .fetch_one(&app.pool)
    .await
    .expect("a row");
    assert!(soon);

    make_due(&app.pool).await;
    eventually("both were verified", async || {
        let found = (result_of(&client, "works").await, result_of(&client, "fails").await);
        (found == (json!("valid"), json!("invalid"))).then_some(())
    })
    .await;
    assert_eq!(result_of(&client, "quiet").await, Value::Null);
    let events = client.get("/v1/audit-events?action=registryAccount.verify").await.expect(200)["items"].clone();
    let events = events.as_array().expect("items").iter();
    let shown: BTreeSet<[&str; 3]> = events
        .map(|event| {
            [&event["actor"]["type"], &event["resource"], &event["outcome"]].map(|text| text.as_str().unwrap())
        })
        .collect();
    let event = |resource| ["worker", resource, "success"];
    assert_eq!(shown, ["registry-accounts/fails", "registry-accounts/works"].map(event).into());
    // The next verification is due after the interval, plus or minus a tenth.
    let in_bounds: bool = sqlx::query_scalar(
        "SELECT bool_and(next_verification_at - last_verified_at
                BETWEEN verify_interval_seconds * interval '0.89 second' AND verify_interval_seconds * interval '1.11 second')
         FROM registry_accounts WHERE name <> 'quiet'",
    )
    .fetch_one(&app.pool)
    .await
    .expect("a row");
    assert!(in_bounds);
    eventually("the metrics count them", async || {
        let metrics = app.operations().get("/metrics").await.body;
        metrics.contains(r#"regcred_verifications_total{trigger="background",result="invalid"} 1"#).then_some(())
    })
    .await;

    // A rotation is verified soon. Without an interval, there is no verification.
    let path = "/v1/registry-accounts/fails";
    let rotated = client.patch(path, &json!({"password": there.password})).await.expect(200);
    assert_eq!(rotated["lastVerificationResult"], Value::Null);
    make_due(&app.pool).await;
    eventually("the new password was verified", async || (result_of(&client, "fails").await == "valid").then_some(()))
        .await;
    client.patch(path, &json!({"verifyIntervalSeconds": null})).await.expect(200);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM registry_accounts WHERE next_verification_at IS NOT NULL")
        .fetch_one(&app.pool)
        .await
        .expect("a count");
    assert_eq!(left, 1);
    let refused = client.patch(path, &json!({"verifyIntervalSeconds": 10})).await;
    refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["verifyIntervalSeconds"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn replicas_share_background_verification(pool: PgPool) {
    let (address, requests) = serve(|request| {
        if request.contains("authorization") {
            answer("200 OK", &[], "{}")
        } else {
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "")
        }
    });
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_ref())
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")
        .with("REGCRED_VERIFY_POLL_SECONDS", "1");
    let replicas = [installation.serve().await, installation.serve().await];
    let client = replicas[0].client(&installation.new_key("admin").await);
    for number in 0..40 {
        let body = account(&format!("a{number}"), &address.to_string(), "canary-password", None);
        client.post("/v1/registry-accounts", &body).await.expect(201);
    }
    // All at once: with an interval, the first check of each would be due within a random minute.
    let due = "UPDATE registry_accounts SET verify_interval_seconds = 86400, next_verification_at = now()";
    sqlx::query(due).execute(&pool).await.expect("due");
    eventually("all were verified", async || {
        let left = "SELECT count(*) FROM registry_accounts WHERE last_verification_result IS DISTINCT FROM 'valid'";
        let left: i64 = sqlx::query_scalar(left).fetch_one(&pool).await.expect("a count");
        (left == 0).then_some(())
    })
    .await;
    assert_eq!(requests.count(), 2 * 40);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn background_verification_can_be_disabled(pool: PgPool) {
    let mut variables = QUICK.to_vec();
    variables.push(("REGCRED_VERIFY_BACKGROUND", "false"));
    let app = TestApp::configured(pool, &variables).await;
    let there = registry::a();
    let body = account("a", &there.address, &there.password, Some(300));
    app.admin().post("/v1/registry-accounts", &body).await.expect(201);
    make_due(&app.pool).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(result_of(&app.admin(), "a").await, Value::Null);
    let found = app.admin().post("/v1/registry-accounts/a/verify", &json!({})).await.expect(200);
    assert_eq!(found["result"], "valid");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn expiring_account_is_listed_counted_and_logged_once(pool: PgPool) {
    let url = pool.connect_options().to_url_lossy().to_string();
    let installation = Installation::new(&url);
    let key = installation.new_key("admin").await;
    // Without a worker, so that none has logged the warnings before.
    let service = Service::of(installation.spawn(&["serve", "--no-worker"])).await;
    let client = service.client(&key);
    for (name, hours) in [("gone", -1), ("day", 20), ("days", 60), ("week", 150), ("month", 600), ("later", 2000)] {
        let mut body = account(name, "reg.example", "canary-password", None);
        body["expiresAt"] = json!(Utc::now() + TimeDelta::hours(hours));
        client.post("/v1/registry-accounts", &body).await.expect(201);
    }
    client.post("/v1/registry-accounts", &account("never", "reg.example", "x", None)).await.expect(201);
    for (query, names) in [
        ("30d", vec!["day", "days", "gone", "month", "week"]),
        ("7d", vec!["day", "days", "gone", "week"]),
        ("24h", vec!["day", "gone"]),
        ("0d", vec!["gone"]),
    ] {
        let listed = client.get(&format!("/v1/registry-accounts?expiresWithin={query}")).await.expect(200);
        let listed: Vec<&str> =
            listed["items"].as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect();
        assert_eq!(listed, names, "{query}");
    }
    for refused in ["", "d", "30", "-1d", "30w", "1e3d", "9999999999999999999d"] {
        let refused = client.get(&format!("/v1/registry-accounts?expiresWithin={refused}")).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["expiresWithin"]);
    }
    drop(service);

    // The worker checks at startup. All replicas together log each warning once.
    for (round, warnings) in [(1, 5), (2, 0)] {
        let service = installation.serve().await;
        let warned = || {
            let log = service.process.stderr();
            log.lines().filter(|line| line.contains("expires soon") || line.contains("password expired")).count()
        };
        eventually("metrics and warnings are complete", async || {
            let metrics = service.operations().get("/metrics").await.body;
            let counted = [("30", 5), ("14", 4), ("7", 4), ("3", 3), ("1", 2), ("0", 1)].map(|(days, count)| {
                metrics.contains(&format!("regcred_registry_accounts_expiring{{within_days=\"{days}\"}} {count}\n"))
            });
            (counted.iter().all(|is_there| *is_there) && warned() >= warnings).then_some(())
        })
        .await;
        let log = service.process.stderr();
        assert_eq!(warned(), warnings, "round {round}: {log}");
        if round == 1 {
            for (name, days) in [("day", 1), ("days", 3), ("week", 7), ("month", 30)] {
                let is_logged = log.lines().any(|line| {
                    line.contains(&format!("\"account\":\"{name}\"")) && line.contains(&format!("\"days\":{days}"))
                });
                assert!(is_logged, "{name}: {log}");
            }
        }
    }
    // A changed expiry causes a new warning.
    let service = Service::of(installation.spawn(&["serve", "--no-worker"])).await;
    let later = json!({"expiresAt": Utc::now() + TimeDelta::hours(10)});
    service.client(&key).patch("/v1/registry-accounts/later", &later).await.expect(200);
    drop(service);
    let service = installation.serve().await;
    eventually("a new warning", async || service.process.stderr().contains("\"account\":\"later\"").then_some(()))
        .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn hanging_check_does_not_delay_shutdown(pool: PgPool) {
    let (hanging, requests) = serve(|_| {
        std::thread::sleep(Duration::from_secs(30));
        Vec::new()
    });
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_ref())
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")
        .with("REGCRED_VERIFY_POLL_SECONDS", "1")
        .with("REGCRED_VERIFY_TIMEOUT_SECONDS", "60");
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    client.post("/v1/registry-accounts", &account("a", &hanging.to_string(), "x", Some(300))).await.expect(201);
    make_due(&pool).await;
    eventually("the check is in progress", async || (requests.count() > 0).then_some(())).await;
    let start = std::time::Instant::now();
    service.process.signal("TERM");
    let exit = service.process.wait().await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}
