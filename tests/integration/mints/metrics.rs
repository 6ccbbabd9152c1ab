//! Metrics of mints.

use std::str::FromStr;

use base64::{Engine, prelude::BASE64_STANDARD};
use chrono::{NaiveDateTime, TimeDelta, Utc};
use serde_json::json;
use sqlx::PgPool;

use super::token_service::{PATH, make_due, spawn, until_mint};
use crate::{
    support::{app::TestApp, eventually},
    verify::listening::{answer, serve},
};

const CLOCK_OFFSET: &str = "regcred_mint_clock_offset_seconds";

/// Value of a series.
fn value<T: FromStr>(metrics: &str, series: &str) -> Option<T> {
    metrics.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

async fn metrics(app: &TestApp) -> String {
    app.operations().get("/metrics").await.body
}

/// Number of mints of token services that have succeeded.
pub async fn successful_mints(app: &TestApp) -> u64 {
    value(&metrics(app).await, r#"regcred_mints_total{source="oauth2",result="success"}"#).expect("the series")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn mints_are_counted_by_source_and_result(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    app.admin().post("/v1/registry-accounts", &provider.account()).await.expect(201);
    app.admin().post(&format!("{PATH}/mint"), &json!({})).await.expect(200);
    provider.refuse(Some("401 Unauthorized"));
    make_due(&app).await;
    until_mint(&app, "state", json!("failing")).await;

    let metrics = metrics(&app).await;

    let of = |result: &str| -> Option<u64> {
        value(&metrics, &format!("regcred_mints_total{{source=\"oauth2\",result=\"{result}\"}}"))
    };
    assert_eq!((of("success"), of("throttled")), (Some(2), Some(0)), "{metrics}");
    // A failed mint is attempted again.
    assert!(of("invalidIdentity").is_some_and(|count| count >= 1), "{metrics}");
    let durations: Option<u64> = value(&metrics, "regcred_mint_duration_seconds_count");
    assert!(durations.is_some_and(|count| count >= 3), "{metrics}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn minted_accounts_are_counted_by_state(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let admin = app.admin();
    for name in ["valid", "failing", "expired"] {
        let mut account = provider.account();
        account["name"] = json!(name);
        account["registry"] = json!(format!("{name}.example.com"));
        admin.post("/v1/registry-accounts", &account).await.expect(201);
    }
    let shown: Option<u64> = value(&metrics(&app).await, r#"regcred_minted_accounts{state="expired"}"#);
    assert!(shown.is_none_or(|count| count == 0));
    provider.refuse(Some("403 Forbidden"));
    let due = "UPDATE account_mints SET next_attempt_at = now()
               WHERE account_id = (SELECT id FROM registry_accounts WHERE name = 'failing')";
    sqlx::query(due).execute(&app.pool).await.expect("due");
    eventually("the mint fails", async || {
        let account = admin.get("/v1/registry-accounts/failing").await.expect(200);
        (account["mint"]["state"] == "failing").then_some(())
    })
    .await;
    let end = "UPDATE account_mints SET valid_until = now() - interval '500 seconds'
               WHERE account_id = (SELECT id FROM registry_accounts WHERE name = 'expired')";
    sqlx::query(end).execute(&app.pool).await.expect("ended");

    // Accounts are counted when a worker starts, and every minute.
    let other = TestApp::beside(&app).await;

    let metrics = eventually("accounts are counted", async || {
        let metrics = metrics(&other).await;
        metrics.contains("\nregcred_minted_accounts{").then_some(metrics)
    })
    .await;
    for state in ["valid", "failing", "expired"] {
        let count: Option<u64> = value(&metrics, &format!("regcred_minted_accounts{{state=\"{state}\"}}"));
        assert_eq!(count, Some(1), "{state}: {metrics}");
    }
    // The other logins end in an hour.
    let least: Option<f64> = value(&metrics, "regcred_minted_accounts_least_validity_seconds");
    assert!(least.is_some_and(|seconds| (-3600.0..=-500.0).contains(&seconds)), "{metrics}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn offset_of_the_clock_of_a_provider_is_shown(pool: PgPool) {
    let (app, _) = spawn(pool).await;
    // Refuses requests that are not of its own time, an hour ahead.
    let (address, requests) = serve(|request| {
        let now = Utc::now() + TimeDelta::hours(1);
        let stated = request.lines().find_map(|line| line.strip_prefix("x-amz-date: ")).expect("a time");
        let stated = NaiveDateTime::parse_from_str(stated.trim(), "%Y%m%dT%H%M%SZ").expect("a time").and_utc();
        let (status, body) = if (now - stated).abs() < TimeDelta::minutes(5) {
            let data = json!({
                "authorizationToken": BASE64_STANDARD.encode("AWS:login"),
                "expiresAt": (now + TimeDelta::hours(12)).timestamp(),
            });
            ("200 OK", json!({"authorizationData": [data]}))
        } else {
            ("400 Bad Request", json!({"__type": "InvalidSignatureException"}))
        };
        let date = now.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        answer(status, &[("Date", &date)], &body.to_string())
    });
    let account = json!({
        "name": "minted", "registry": "123456789012.dkr.ecr.eu-central-1.amazonaws.com", "plainHttp": true,
        "source": {
            "type": "ecr", "region": "eu-central-1", "endpoint": format!("http://{address}"),
            "identity": {"type": "accessKey", "accessKeyId": "AKIA1", "secretAccessKey": "canary"},
        },
    });
    let offset = async || value::<f64>(&metrics(&app).await, CLOCK_OFFSET).expect("the series");
    assert!(offset().await.abs() < 60.0);

    app.admin().post("/v1/registry-accounts", &account).await.expect(201);

    assert_eq!(requests.count(), 2);
    let offset = offset().await;
    assert!((3600.0 - offset).abs() < 60.0, "{offset}");
}
