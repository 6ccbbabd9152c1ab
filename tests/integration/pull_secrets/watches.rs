//! Watches and metrics.

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, api::DeleteParams};
use serde_json::json;
use sqlx::PgPool;

use super::{Broker, app_with_broker, declaration, find_secret, put, rule, rules};
use crate::support::{app::TestApp, eventually, kubernetes};

/// Grants the watch of Secrets.
async fn allow_watch(broker: &Broker) {
    let mut rights = rules();
    rights.push(rule("secrets", &["list", "watch"]));
    broker.set_rules(rights).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn secret_deleted_between_watches_is_recreated(pool: PgPool) {
    // The recheck interval is ten minutes.
    let (first, broker) = app_with_broker(pool.clone(), &[]).await;
    allow_watch(&broker).await;
    let namespace = kubernetes::new_namespace().await;
    put(&first.admin(), "team-a", &declaration(&["account-5000"], "dev", &[&namespace])).await.expect(201);
    eventually("the cluster is watched", async || {
        sqlx::query("SELECT FROM cluster_watches").fetch_optional(&pool).await.expect("rows")
    })
    .await;
    let second = TestApp::beside(&first).await;
    // It held the watch; its lease expires.
    drop(first);

    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
    secrets.delete("team-a-pull", &DeleteParams::default()).await.expect("deleted");

    eventually("the Secret is recreated", async || find_secret(&namespace, "team-a-pull").await).await;
    drop(second);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn metrics_cover_targets_calls_and_sync_durations(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let missing = format!("{namespace}-missing");

    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&namespace, &missing])).await.expect(201);
    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "other"})).await.expect(200);

    let expected = [
        "regcred_pull_secret_targets{state=\"synced\"} 1",
        "regcred_pull_secret_targets{state=\"failed\"} 1",
        "regcred_pull_secret_targets{state=\"conflict\"} 0",
        "regcred_pull_secret_sync_duration_seconds_count 2",
        "regcred_cluster_calls_total{cluster=\"dev\",verb=\"create\",code=\"201\"} 1",
        "regcred_cluster_calls_total{cluster=\"dev\",verb=\"patch\",code=\"200\"} 1",
        // The rules do not include the watch of Secrets.
        "regcred_cluster_calls_total{cluster=\"dev\",verb=\"list\",code=\"403\"} 1",
        "regcred_cluster_calls_total{cluster=\"dev\",verb=\"watch\",code=\"200\"} 1",
        "regcred_pull_secret_targets_claimed 0",
    ];
    eventually("the metrics have the expected values", async || {
        let text = app.operations().get("/metrics").await.body;
        let lacks: Vec<&str> = expected.into_iter().filter(|line| !text.lines().any(|one| one == *line)).collect();
        let oldest =
            text.lines().find_map(|line| line.strip_prefix("regcred_pull_secret_targets_oldest_pending_seconds "));
        let waits = oldest.and_then(|seconds| seconds.parse::<f64>().ok()).is_some_and(|seconds| seconds > 0.0);
        (lacks.is_empty() && waits).then_some(())
    })
    .await;
}
