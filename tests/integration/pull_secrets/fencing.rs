//! Generations: concurrent rotations, restored databases, forged annotations.

use regcred::domain::pull_secret::GENERATION_ANNOTATION;
use serde_json::json;
use sqlx::PgPool;

use super::{app_with_broker, declaration, password, put, secret_patched, settled, sync, target_becomes};
use crate::support::{client::assert_holds, eventually, kubernetes};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn newest_of_concurrent_rotations_wins(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let mut namespaces = Vec::new();
    for _ in 0..20 {
        namespaces.push(kubernetes::new_namespace().await);
    }
    let names: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &names)).await.expect(201);
    for round in 0..5 {
        let rotate = async |name: &'static str| {
            let patch = json!({"password": format!("{name}-{round}")});
            admin.patch("/v1/registry-accounts/account-5000", &patch).await.expect(200)["version"].as_i64().unwrap()
        };
        // In both orders, while the previous rotation is in flight.
        let (one, two) = if round % 2 == 0 {
            futures_util::join!(rotate("one"), rotate("two"))
        } else {
            let (two, one) = futures_util::join!(rotate("two"), rotate("one"));
            (one, two)
        };
        let newest = if one > two { format!("one-{round}") } else { format!("two-{round}") };
        let shown = settled(&admin, "team-a").await;
        assert_holds(&shown["status"], &json!({"desired": 20, "synced": 20}));
        for namespace in &namespaces {
            assert_eq!(password(&kubernetes::secret(namespace, "team-a-pull").await), newest);
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn restored_database_overwrites_newer_generations(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&namespace])).await.expect(201);
    for password in ["two", "three"] {
        admin.patch("/v1/registry-accounts/account-5000", &json!({"password": password})).await.expect(200);
        settled(&admin, "team-a").await;
    }
    // As after the restore of a backup.
    let restore = "UPDATE pull_secret_targets SET generation = 1, applied_generation = 1, resource_version = '1', content_mac = '\\x00'";
    sqlx::query(restore).execute(&pool).await.expect("done");
    sqlx::query("UPDATE pull_secrets SET generation = 1").execute(&pool).await.expect("done");
    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "restored"})).await.expect(200);
    eventually("the Secret has the value of the database", async || {
        (password(&kubernetes::secret(&namespace, "team-a-pull").await) == "restored").then_some(())
    })
    .await;
    settled(&admin, "team-a").await;
    target_becomes(&admin, "team-a", "synced", "").await;
}

/// An editor of a Secret can write any generation on it.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn forged_generation_annotation_does_not_block_rotation(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let (theirs, ours) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    let body = declaration(&["account-5000"], "dev", &[&theirs, &ours]);
    put(&admin, "team-a", &body).await.expect(201);
    let numbers = ["9223372036854775806", "9223372036854775807", "-9223372036854775808", "none"];
    for number in numbers {
        let edit = json!({"metadata": {"annotations": {GENERATION_ANNOTATION: number}}});
        secret_patched(&theirs, "team-a-pull", edit).await;
        sync(&admin, "team-a").await;
        let password_now = format!("after{number}");
        admin.patch("/v1/registry-accounts/account-5000", &json!({"password": password_now})).await.expect(200);
        let shown = settled(&admin, "team-a").await;
        assert_holds(&shown["status"], &json!({"synced": 2}));
        for namespace in [&theirs, &ours] {
            assert_eq!(password(&kubernetes::secret(namespace, "team-a-pull").await), password_now);
        }
    }
    assert_eq!(settled(&admin, "team-a").await["generation"], 1 + numbers.len());
    put(&admin, "team-a", &declaration(&["account-6000"], "dev", &[&theirs, &ours])).await.expect(200);
}
