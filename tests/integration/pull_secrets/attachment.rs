//! `ServiceAccount`s and missing rights.

use k8s_openapi::api::rbac::v1::PolicyRule;
use serde_json::json;
use sqlx::PgPool;

use super::{
    Broker, app_with_broker, declaration, entries, password, put, rule, rules, service_account, sync, target,
    target_becomes,
};
use crate::support::{eventually, kubernetes};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn missing_service_account_is_awaited(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let mut body = declaration(&["account-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["builder"]);
    admin.send(admin.request("PUT", "/v1/pull-secrets/team-a").json(&body)).await.expect(201);
    let waiting = target_becomes(&admin, "team-a", "pending", "service-account-not-found").await;
    assert!(waiting["lastError"]["detail"].as_str().unwrap().contains("builder"), "{waiting}");
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "xxx1");
    service_account(&namespace, "builder", &[]).await;
    target_becomes(&admin, "team-a", "synced", "").await;
    assert_eq!(entries(&namespace, "builder").await, ["team-a-pull"]);

    body["serviceAccounts"] = json!([]);
    put(&admin, "team-a", &body).await.expect(200);
    assert_eq!(entries(&namespace, "builder").await, [""; 0]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn secret_is_recorded_when_attachment_fails(pool: PgPool) {
    let (app, broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    for name in ["default", "builder"] {
        service_account(&namespace, name, &[]).await;
    }
    let only =
        PolicyRule { resource_names: Some(vec!["default".to_owned()]), ..rule("serviceaccounts", &["get", "patch"]) };
    broker.set_rules(vec![rule("secrets", &["create", "get", "patch", "delete"]), only]).await;
    let mut body = declaration(&["account-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["default", "builder"]);
    put(&admin, "team-a", &body).await.expect(201);

    let target = target_becomes(&admin, "team-a", "failed", "cluster-forbidden").await;

    let uid = kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid;
    assert_eq!((&target["appliedGeneration"], target["uid"].as_str()), (&json!(1), uid.as_deref()), "{target}");
    assert_eq!(entries(&namespace, "default").await, ["team-a-pull"]);
    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "rotated"})).await.expect(200);
    eventually("the Secret follows the rotation", async || {
        (password(&kubernetes::secret(&namespace, "team-a-pull").await) == "rotated").then_some(())
    })
    .await;
    // The attachment was recorded, too.
    broker.set_rules(rules()).await;
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("the Secret is detached", async || entries(&namespace, "default").await.is_empty().then_some(())).await;
}
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn missing_right_and_rejected_token_are_reported(pool: PgPool) {
    let (app, broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    service_account(&namespace, "default", &[]).await;
    let mut body = declaration(&["account-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["default"]);
    put(&admin, "team-a", &body).await.expect(201);

    let said = async |words: &str| {
        let target = target_becomes(&admin, "team-a", "failed", "cluster-forbidden").await;
        let detail = target["lastError"]["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(words), "{words:?} is not in {detail:?}");
        assert!(detail.contains(&namespace), "{detail}");
    };
    broker.set_rules(vec![rule("secrets", &["get"]), rule("serviceaccounts", &["get", "patch"])]).await;
    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "rotated-1"})).await.expect(200);
    said("may not patch Secrets").await;
    broker.set_rules(vec![rule("serviceaccounts", &["get", "patch"])]).await;
    sync(&admin, "team-a").await;
    eventually("the other right is named", async || {
        let target = target(&admin, "team-a").await;
        let detail = target["lastError"]["detail"].as_str().unwrap_or_default().to_owned();
        (detail.contains("Secrets in namespace")).then_some(())
    })
    .await;
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "xxx1", "the last good Secret stays");
    broker.set_rules(rules()).await;
    sync(&admin, "team-a").await;
    target_becomes(&admin, "team-a", "synced", "").await;
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "rotated-1");

    broker.set_rules(vec![rule("secrets", &["create", "get", "patch", "delete"])]).await;
    sync(&admin, "team-a").await;
    said("may not get ServiceAccounts").await;
    broker.set_rules(rules()).await;
    sync(&admin, "team-a").await;
    target_becomes(&admin, "team-a", "synced", "").await;

    // A rejected token, such as an expired one.
    broker.delete().await;
    eventually("the token is refused", async || {
        // The API server caches valid tokens for some seconds.
        sync(&admin, "team-a").await;
        let target = target(&admin, "team-a").await;
        (target["lastError"]["type"] == "cluster-unauthorized").then_some(())
    })
    .await;
    let fresh = Broker::new().await;
    admin.patch("/v1/clusters/dev", &json!({"auth": fresh.auth()})).await.expect(200);
    target_becomes(&admin, "team-a", "synced", "").await;
}
