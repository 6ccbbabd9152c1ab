//! The summary.

use serde_json::json;
use sqlx::PgPool;

use super::{all, insert_accounts, insert_cluster, insert_deliveries, insert_pull_secret, insert_targets};
use crate::support::{app::TestApp, eventually};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_summary_counts_what_the_lists_contain(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_deliveries(&pool).await;
    let admin = app.admin();
    let summary = admin.get("/v1/summary").await.expect(200);
    for state in ["synced", "pending", "failed", "conflict"] {
        let (targets, _) = all(&admin, "/v1/targets", &format!("&state={state}"), 500).await;
        let expected = json!({"count": targets.len(), "hasMore": false});
        assert_eq!(summary["targets"][state], expected, "targets {state}");
        let (pull_secrets, _) = all(&admin, "/v1/pull-secrets", &format!("&state={state}"), 500).await;
        assert_eq!(summary["pullSecrets"][state], pull_secrets.len(), "pull secrets {state}");
    }
    assert_eq!(summary["clusters"], json!({"count": 2, "hasMore": false}));
    let accounts = &summary["registryAccounts"];
    assert_eq!(accounts["total"], json!({"count": 5, "hasMore": false}));
    let valid = json!({"result": "valid", "count": 4, "hasMore": false});
    let unverified = json!({"result": null, "count": 1, "hasMore": false});
    assert_eq!(accounts["byVerification"], json!([unverified, valid]));
    // Of 5 accounts, those with the numbers 0 and 4 have expired.
    assert_eq!(accounts["expired"]["count"], 2);
    assert_eq!(accounts["expiringSoon"]["count"], 0);
    // The target in the last namespace has waited longest.
    let oldest = &summary["oldestPendingTarget"];
    assert_eq!(oldest["pullSecret"], "one");
    assert_eq!(oldest["cluster"], "dev");
    assert_eq!(oldest["namespace"], "n-101");
    assert!(oldest["ageSeconds"].as_f64().is_some_and(|age| age >= 101.0), "{oldest}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_summary_contains_what_is_granted_alone(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_accounts(&pool, 50).await;
    let (dev, prod) = (insert_cluster(&pool, "dev").await, insert_cluster(&pool, "prod").await);
    let hidden = insert_pull_secret(&pool, "hidden", "account-000002", "prod").await;
    insert_targets(&pool, hidden, prod, 100).await;
    let own = insert_pull_secret(&pool, "own", "account-000001", "dev").await;
    insert_targets(&pool, own, dev, 3).await;
    let grants = json!({"accounts": ["account-00000*", {"matchLabels": {"team": "rare"}}], "clusters": ["dev"], "namespaces": ["n-0"]});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    let summary = viewer.get("/v1/summary").await.expect(200);
    // The account with the rare label is also granted by name.
    assert_eq!(summary["registryAccounts"]["total"], json!({"count": 10, "hasMore": false}));
    assert_eq!(summary["clusters"]["count"], 1);
    assert_eq!(
        summary["pullSecrets"]["conflict"].as_i64().expect("a count")
            + summary["pullSecrets"]["failed"].as_i64().expect("a count"),
        1
    );
    assert_eq!(summary["targets"]["synced"]["count"], 1);
    assert_eq!(summary["targets"]["failed"]["count"], 1);
    assert_eq!(summary["targets"]["pending"]["count"], 1);
    assert_eq!(summary["oldestPendingTarget"]["pullSecret"], "own");
    assert!(!summary.to_string().contains("prod"), "{summary}");
    let none = json!({"accounts": [], "clusters": [], "namespaces": []});
    let nothing = app.caller("nothing", "viewer", Some(none)).await;
    let summary = nothing.get("/v1/summary").await.expect(200);
    assert_eq!(summary["registryAccounts"]["total"]["count"], 0);
    assert_eq!(summary["oldestPendingTarget"], json!(null));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_count_beyond_its_limit_says_so(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_accounts(&pool, 10_050).await;
    let at_least = json!({"count": 10_000, "hasMore": true});
    let everything = app.admin().get("/v1/summary").await.expect(200);
    assert_eq!(everything["registryAccounts"]["total"], at_least);
    assert_eq!(everything["registryAccounts"]["expired"]["hasMore"], false, "this count is exact");
    let grants = json!({"accounts": ["account-*"], "clusters": [], "namespaces": []});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    let granted = viewer.get("/v1/summary").await.expect(200);
    assert_eq!(granted["registryAccounts"]["total"], at_least);
    assert_eq!(granted["registryAccounts"]["expired"]["hasMore"], true, "10,000 accounts were examined");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_summary_has_the_state_of_the_audit_log(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    app.register_account("a", "ghcr.io", "robot", "x").await;
    let events: i64 = sqlx::query_scalar("SELECT count(*) FROM audit_events").fetch_one(&pool).await.expect("a number");
    assert!(events > 0);
    let sealed = eventually("all events are sealed", async || {
        let summary = app.admin().get("/v1/summary").await.expect(200);
        let audit = &summary["audit"];
        (audit["lastSeal"]["events"].as_i64() >= Some(events)).then(|| audit.clone())
    })
    .await;
    let number: i64 =
        sqlx::query_scalar("SELECT max(number) FROM audit_seals").fetch_one(&pool).await.expect("a number");
    assert!(sealed["lastSeal"]["number"].as_i64().is_some_and(|last| (1..=number).contains(&last)), "{sealed}");
    assert_eq!((&sealed["tampering"], &sealed["unsealed"]["hasMore"]), (&json!(0), &json!(false)), "{sealed}");
    assert!(sealed["oldestUnsealedSeconds"].as_f64().is_some_and(|age| age < 60.0), "{sealed}");

    // Without all grants, a viewer does not read the audit log.
    let grants = json!({"accounts": ["a"], "clusters": [], "namespaces": []});
    let viewer = app.caller("narrow", "viewer", Some(grants)).await;
    assert_eq!(viewer.get("/v1/summary").await.expect(200)["audit"], json!(null));
}
