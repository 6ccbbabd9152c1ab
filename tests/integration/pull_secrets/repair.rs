//! Drift between the cluster and the declaration.

use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;
use sqlx::PgPool;

use super::{
    app_with_broker, declaration, entries, find_secret, label, labelled_namespace, put, rule, rules, secret_patched,
    service_account, settled, sync,
};
use crate::support::{client::assert_holds, eventually, kubernetes};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn edited_and_deleted_secrets_are_repaired_without_events(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[("REGCRED_PULL_SECRETS_RESYNC_SECONDS", "1")]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    service_account(&namespace, "builder", &[]).await;
    let mut body = declaration(&["account-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["builder"]);
    put(&admin, "team-a", &body).await.expect(201);
    let uid = kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid;

    let edit = json!({"data": {".dockerconfigjson": ByteString(b"{\"auths\":{}}".to_vec())},
        "metadata": {"labels": {"regcred.dev/pull-secret-id": null, "mine": "too"}}});
    secret_patched(&namespace, "team-a-pull", edit).await;
    let secret = eventually("the edit is reverted", async || {
        let secret = kubernetes::secret(&namespace, "team-a-pull").await;
        let labels = secret.metadata.labels.clone().unwrap_or_default();
        (kubernetes::document(&secret).contains("xxx1") && labels.contains_key("regcred.dev/pull-secret-id"))
            .then_some(secret)
    })
    .await;
    assert_eq!(secret.metadata.uid, uid);
    assert_eq!(secret.metadata.labels.expect("labels")["mine"], "too", "foreign labels stay");

    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
    secrets.delete("team-a-pull", &DeleteParams::default()).await.expect("deleted");
    let secret = eventually("the Secret is recreated", async || find_secret(&namespace, "team-a-pull").await).await;
    assert_ne!(secret.metadata.uid, uid);

    let accounts = Api::<ServiceAccount>::namespaced(kubernetes::admin(), &namespace);
    let patch = Patch::Merge(json!({"imagePullSecrets": [{"name": "mine"}]}));
    accounts.patch("builder", &PatchParams::default(), &patch).await.expect("patched");
    eventually("the Secret is attached again", async || {
        (entries(&namespace, "builder").await == ["mine", "team-a-pull"]).then_some(())
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn watched_changes_are_reconciled_at_once(pool: PgPool) {
    // Only the watch can find the changes.
    let never = [("REGCRED_PULL_SECRETS_RESYNC_SECONDS", "86400"), ("REGCRED_PULL_SECRETS_COMPARE_SECONDS", "86400")];
    let (app, broker) = app_with_broker(pool.clone(), &never).await;
    let mut rights = rules();
    rights.push(rule("secrets", &["list", "watch"]));
    broker.set_rules(rights).await;
    let admin = app.admin();
    let team = format!("t{}", uuid::Uuid::now_v7().simple());
    let mut body = declaration(&["account-5000"], "dev", &[]);
    body["targets"] = json!([{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": team}}}]);
    put(&admin, "team-a", &body).await.expect(201);

    let namespace = labelled_namespace(&[("team", &team)]).await;
    let made = eventually("the Secret exists", async || find_secret(&namespace, "team-a-pull").await).await;
    settled(&admin, "team-a").await;
    let edit = json!({"data": {".dockerconfigjson": ByteString(b"{\"auths\":{}}".to_vec())}});
    secret_patched(&namespace, "team-a-pull", edit).await;
    eventually("the edit is reverted", async || {
        let secret = kubernetes::secret(&namespace, "team-a-pull").await;
        kubernetes::document(&secret).contains("xxx1").then_some(())
    })
    .await;
    settled(&admin, "team-a").await;
    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
    secrets.delete("team-a-pull", &DeleteParams::default()).await.expect("deleted");
    let again = eventually("the Secret is recreated", async || find_secret(&namespace, "team-a-pull").await).await;
    assert_ne!(again.metadata.uid, made.metadata.uid);

    settled(&admin, "team-a").await;
    label(&namespace, &[("team", None)]).await;
    eventually("the Secret is removed", async || find_secret(&namespace, "team-a-pull").await.is_none().then_some(()))
        .await;
    let epochs: Vec<i64> =
        sqlx::query_scalar("SELECT epoch FROM cluster_watches").fetch_all(&pool).await.expect("rows");
    assert_eq!(epochs, [1], "one watch, never interrupted");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn awaited_sync_reconciles_every_target(pool: PgPool) {
    // Without the right to watch Secrets.
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&namespace])).await.expect(201);
    for _ in 0..3 {
        let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
        secrets.delete("team-a-pull", &DeleteParams::default()).await.expect("deleted");
        let shown = sync(&admin, "team-a").await;
        assert_holds(&shown["status"], &json!({"synced": 1, "pending": 0}));
        assert!(find_secret(&namespace, "team-a-pull").await.is_some(), "{shown}");
    }
}
