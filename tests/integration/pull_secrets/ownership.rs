//! Foreign Secrets, immutable Secrets, and namespaces that take none.

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, api::DeleteParams};
use serde_json::json;
use sqlx::PgPool;

use super::{app_with_broker, declaration, password, put, secret_patched, target, target_becomes};
use crate::support::{client::assert_holds, eventually, kubernetes};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn foreign_secret_is_untouched_until_adopted(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let arguments = ["-n", &namespace, "create", "secret", "docker-registry", "team-a-pull"];
    let login = ["--docker-server=own.example.com", "--docker-username=me", "--docker-password=mine"];
    kubernetes::kubectl(&[&arguments[..], &login[..]].concat(), "");
    let before = kubernetes::secret(&namespace, "team-a-pull").await;

    let mut body = declaration(&["account-5000"], "dev", &[&namespace]);
    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 1, "conflict": 1}));
    let conflict = target(&admin, "team-a").await;
    assert_eq!((&conflict["state"], &conflict["lastError"]["type"]), (&json!("conflict"), &json!("secret-exists")));
    assert_eq!(kubernetes::secret(&namespace, "team-a-pull").await, before);

    // A dry run reports the adoption without doing it.
    body["adopt"] = json!(true);
    body["dryRun"] = json!(true);
    let preview = put(&admin, "team-a", &body).await.expect(200);
    assert_eq!(
        preview["targets"],
        json!([{"cluster": "dev", "namespace": namespace, "action": "adopt", "error": null}])
    );
    assert_eq!(kubernetes::secret(&namespace, "team-a-pull").await, before);

    body["dryRun"] = json!(false);
    let shown = put(&admin, "team-a", &body).await.expect(200);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1}));
    let adopted = kubernetes::secret(&namespace, "team-a-pull").await;
    assert_eq!((&adopted.metadata.uid, password(&adopted).as_str()), (&before.metadata.uid, "xxx1"));

    // Another pull secret with the same Secret name never takes it over.
    put(&admin, "team-b", &body).await.expect(201);
    let conflict = target(&admin, "team-b").await;
    assert_eq!(conflict["state"], "conflict", "{conflict}");
    // Its deletion does not remove the Secret.
    admin.delete("/v1/pull-secrets/team-b").await;
    eventually("the pull secret is gone", async || {
        (admin.get("/v1/pull-secrets/team-b").await.status == 404).then_some(())
    })
    .await;
    assert_eq!(kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid, before.metadata.uid);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn immutable_secret_is_reported_and_never_recreated(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let mut body = declaration(&["account-5000"], "dev", &[&namespace]);
    put(&admin, "team-a", &body).await.expect(201);
    let uid = kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid;

    body["secret"]["type"] = json!("kubernetes.io/dockercfg");
    put(&admin, "team-a", &body).await.expect(200);
    let failed = target(&admin, "team-a").await;
    assert_eq!((&failed["state"], &failed["lastError"]["type"]), (&json!("failed"), &json!("secret-type-fixed")));
    body["secret"]["type"] = json!("kubernetes.io/dockerconfigjson");
    assert_holds(&put(&admin, "team-a", &body).await.expect(200)["status"], &json!({"synced": 1}));

    secret_patched(&namespace, "team-a-pull", json!({"immutable": true})).await;
    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "rotated"})).await.expect(200);
    target_becomes(&admin, "team-a", "failed", "secret-immutable").await;
    let secret = kubernetes::secret(&namespace, "team-a-pull").await;
    assert_eq!((secret.metadata.uid.clone(), password(&secret)), (uid, "xxx1".to_owned()));

    body["secret"]["name"] = json!("another");
    assert_eq!(put(&admin, "team-a", &body).await.fields(), ["secret.name"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn terminating_namespace_gets_no_secret(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    // No controller finalises it, so it stays terminating.
    let namespaces = Api::<Namespace>::all(kubernetes::admin());
    namespaces.delete(&namespace, &DeleteParams::default()).await.expect("deleted");
    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&namespace])).await.expect(201);
    let failed = target(&admin, "team-a").await;
    assert_eq!((&failed["state"], &failed["lastError"]["type"]), (&json!("failed"), &json!("namespace-terminating")));
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("the pull secret is gone", async || {
        (admin.get("/v1/pull-secrets/team-a").await.status == 404).then_some(())
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn conflict_names_the_pull_secret_for_those_who_may_see_it(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&namespace])).await.expect(201);
    let grants = json!({"accounts": ["account-6000"], "clusters": ["dev"], "namespaces": [namespace]});
    let narrow = app.caller("narrow", "operator", Some(grants)).await;
    let mut body = declaration(&["account-6000"], "dev", &[&namespace]);

    for adopt in [false, true] {
        body["adopt"] = json!(adopt);
        put(&admin, "team-b", &body).await;
        target_becomes(&admin, "team-b", "conflict", "secret-exists").await;
        let path = "/v1/pull-secrets/team-c?dryRun=true";
        for (client, holder) in [(&admin, "the pull secret `team-a`"), (&narrow, "another pull secret")] {
            let expected =
                format!("the Secret team-a-pull belongs to {holder}: declare another Secret name for one of them");
            let conflict = target(client, "team-b").await;
            assert_eq!(conflict["lastError"], json!({"type": "secret-exists", "detail": expected}));
            let preview = client.send(client.request("PUT", path).json(&body)).await.expect(200);
            let planned = &preview["targets"][0];
            assert_eq!((&planned["action"], &planned["error"]), (&json!("conflict"), &conflict["lastError"]));
        }
    }
    // A Secret that is not regcred's.
    kubernetes::kubectl(&["-n", &namespace, "create", "secret", "generic", "another"], "");
    body["secret"]["name"] = json!("another");
    body["adopt"] = json!(false);
    let request = admin.request("PUT", "/v1/pull-secrets/team-c?dryRun=true").json(&body);
    let preview = admin.send(request).await.expect(200);
    let detail = preview["targets"][0]["error"]["detail"].as_str().unwrap_or_default();
    assert!(detail.contains("does not belong to this pull secret"), "{preview}");
}
