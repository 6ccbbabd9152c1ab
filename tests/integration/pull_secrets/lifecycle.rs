//! Declaration, rotation, preview and deletion.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{app_with_broker, declaration, entries, find_secret, password, put, service_account, settled};
use crate::support::{client::assert_holds, eventually, kubernetes};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rotation_reaches_every_namespace(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let (one, two) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    service_account(&one, "default", &["other"]).await;
    service_account(&two, "default", &[]).await;
    let mut body = declaration(&["account-5000", "account-6000"], "dev", &[&one, &two]);
    body["serviceAccounts"] = json!(["default"]);

    let made = put(&admin, "team-a", &body).await;
    let shown = made.expect(201);
    assert_eq!(made.header("location"), "/v1/pull-secrets/team-a");
    assert_eq!((made.header("etag"), made.header("preference-applied")), ("\"1\"", "wait=30"));
    assert_holds(&shown, &body);
    assert_holds(&shown, &json!({"name": "team-a", "generation": 1, "observedGeneration": 1}));
    assert_holds(&shown["status"], &json!({"desired": 2, "synced": 2, "pending": 0, "failed": 0, "conflict": 0}));

    let mut uids = Vec::new();
    for namespace in [&one, &two] {
        let secret = kubernetes::secret(namespace, "team-a-pull").await;
        let (secret_type, documents) = kubernetes::meaning(&secret);
        assert_eq!(secret_type, Some("kubernetes.io/dockerconfigjson"));
        let auths = &documents[".dockerconfigjson"]["auths"];
        assert_eq!(auths["registry.example.com:5000"]["password"], "xxx1");
        assert_eq!(auths["registry.example.com:6000"]["auth"], "ZGV2LXVzZXI6eHh4Mg==");
        let labels = secret.metadata.labels.expect("labels");
        assert_eq!(labels["app.kubernetes.io/managed-by"], "regcred");
        assert_eq!(labels["regcred.dev/pull-secret-id"], shown["id"].as_str().unwrap());
        uids.push(secret.metadata.uid);
    }
    assert_eq!(entries(&one, "default").await, ["other", "team-a-pull"]);
    assert_eq!(entries(&two, "default").await, ["team-a-pull"]);

    // An equal declaration changes nothing.
    let again = put(&admin, "team-a", &body).await;
    assert_holds(&again.expect(200), &json!({"version": 1, "generation": 1}));

    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "rotated"})).await.expect(200);
    let shown = settled(&admin, "team-a").await;
    assert_holds(&shown, &json!({"version": 1, "generation": 2, "observedGeneration": 2}));
    for (namespace, uid) in [&one, &two].into_iter().zip(uids) {
        let secret = kubernetes::secret(namespace, "team-a-pull").await;
        assert_eq!(secret.metadata.uid, uid, "the Secret survives a rotation");
        let (_, documents) = kubernetes::meaning(&secret);
        assert_eq!(documents[".dockerconfigjson"]["auths"]["registry.example.com:5000"]["password"], "rotated");
        assert_eq!(documents[".dockerconfigjson"]["auths"]["registry.example.com:6000"]["password"], "xxx2");
    }

    // A change outside of the document writes nothing.
    let versions = async || {
        let secret = kubernetes::secret(&one, "team-a-pull").await;
        secret.metadata.resource_version
    };
    let before = versions().await;
    admin.patch("/v1/registry-accounts/account-5000", &json!({"labels": {"team": "b"}})).await.expect(200);
    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "rotated"})).await.expect(200);
    let shown = settled(&admin, "team-a").await;
    assert_holds(&shown, &json!({"generation": 2, "observedGeneration": 2}));
    assert_eq!(versions().await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn targets_are_listed_by_page_and_state(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let good = kubernetes::new_namespace().await;
    let body = declaration(&["account-5000"], "dev", &["regcred-test-missing", &good]);
    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 2, "synced": 1, "failed": 1}));
    assert_holds(&shown, &json!({"generation": 1, "observedGeneration": 0}));

    let failed = admin.get("/v1/pull-secrets/team-a/targets?state=failed").await.expect(200);
    assert_eq!(failed["items"].as_array().map(Vec::len), Some(1), "{failed}");
    let target = &failed["items"][0];
    assert_holds(
        target,
        &json!({"cluster": "dev", "namespace": "regcred-test-missing", "state": "failed", "appliedGeneration": 0, "uid": null}),
    );
    assert_eq!(target["lastError"]["type"], "namespace-not-found");
    let synced = admin.get("/v1/pull-secrets/team-a/targets?state=synced").await.expect(200);
    let secret = kubernetes::secret(&good, "team-a-pull").await;
    assert_eq!(synced["items"][0]["uid"], json!(secret.metadata.uid));
    assert_eq!(synced["items"][0]["resourceVersion"], json!(secret.metadata.resource_version));

    let first = admin.get("/v1/pull-secrets/team-a/targets?limit=1").await.expect(200);
    let next = first["next"].as_str().expect("a next page");
    let second = admin.get(&format!("/v1/pull-secrets/team-a/targets?limit=1&cursor={next}")).await.expect(200);
    assert_eq!(second["next"], Value::Null);
    assert_ne!(first["items"][0]["namespace"], second["items"][0]["namespace"]);
    admin.get("/v1/pull-secrets/team-a/targets?state=broken").await.problem(422, "invalid-request");

    let listed = admin.get("/v1/pull-secrets").await.expect(200);
    assert_eq!(listed["items"][0]["name"], "team-a");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn deletion_follows_the_deletion_policy(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let (one, two) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    service_account(&one, "default", &["other"]).await;
    service_account(&two, "default", &[]).await;
    let mut body = declaration(&["account-5000"], "dev", &[&one, &two]);
    body["serviceAccounts"] = json!(["default"]);
    put(&admin, "team-a", &body).await.expect(201);

    // A namespace that is no longer declared loses the Secret.
    body["targets"][0]["namespaces"] = json!([one]);
    let shown = put(&admin, "team-a", &body).await.expect(200);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1, "removing": 0}));
    assert!(find_secret(&two, "team-a-pull").await.is_none());
    assert_eq!(entries(&two, "default").await, [""; 0]);

    // Accounts and clusters in use cannot be deleted.
    let used = admin.delete("/v1/registry-accounts/account-5000").await.problem(409, "in-use");
    assert!(used["detail"].as_str().unwrap().contains("`pull-secrets/team-a`"), "{used}");
    admin.delete("/v1/clusters/dev").await.problem(409, "in-use");
    admin.delete("/v1/registry-accounts/account-6000").await;

    let stale = admin.request("DELETE", "/v1/pull-secrets/team-a").header("if-match", "\"1\"");
    admin.send(stale).await.problem(412, "stale-version");
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("the pull secret is gone", async || {
        (admin.get("/v1/pull-secrets/team-a").await.status == 404).then_some(())
    })
    .await;
    assert!(find_secret(&one, "team-a-pull").await.is_none());
    assert_eq!(entries(&one, "default").await, ["other"]);

    body["deletionPolicy"] = json!("retain");
    put(&admin, "team-b", &body).await.expect(201);
    assert_eq!(admin.delete("/v1/pull-secrets/team-b").await.status, 202);
    admin.get("/v1/pull-secrets/team-b").await.problem(404, "not-found");
    assert_eq!(password(&kubernetes::secret(&one, "team-a-pull").await), "xxx1");
    assert_eq!(entries(&one, "default").await, ["other", "team-a-pull"]);
    assert_eq!(admin.delete("/v1/clusters/dev").await.status, 204);
    assert_eq!(admin.delete("/v1/registry-accounts/account-5000").await.status, 204);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_reports_effects_without_changes(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let [kept, lost, new] =
        [kubernetes::new_namespace().await, kubernetes::new_namespace().await, kubernetes::new_namespace().await];
    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&kept, &lost])).await.expect(201);

    let actions = async |body: &Value| {
        let mut body = body.clone();
        body["dryRun"] = json!(true);
        let preview = put(&admin, "team-a", &body).await.expect(200);
        let targets = preview["targets"].as_array().expect("targets").clone();
        let actions = targets.into_iter().map(|target| {
            (target["namespace"].as_str().unwrap().to_owned(), target["action"].as_str().unwrap().to_owned())
        });
        actions.collect::<BTreeMap<_, _>>()
    };
    let expected = |pairs: &[(&String, &str)]| {
        pairs.iter().map(|(namespace, action)| ((*namespace).clone(), (*action).to_owned())).collect::<BTreeMap<_, _>>()
    };
    let body = declaration(&["account-5000"], "dev", &[&kept, &new]);
    assert_eq!(actions(&body).await, expected(&[(&kept, "unchanged"), (&lost, "remove"), (&new, "create")]));
    let mut body = declaration(&["account-6000"], "dev", &[&kept]);
    body["deletionPolicy"] = json!("retain");
    assert_eq!(actions(&body).await, expected(&[(&kept, "update"), (&lost, "forget")]));
    assert_holds(&admin.get("/v1/pull-secrets/team-a").await.expect(200), &json!({"version": 1}));
    assert!(find_secret(&new, "team-a-pull").await.is_none());

    body["accounts"] = json!(["missing"]);
    body["dryRun"] = json!(true);
    assert_eq!(put(&admin, "team-a", &body).await.fields(), ["accounts[0]"]);
    let fresh = admin.request("PUT", "/v1/pull-secrets/fresh").header("if-match", "\"1\"").json(&body);
    assert_eq!(admin.send(fresh).await.status, 422);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stale_if_match_is_refused(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let body = declaration(&["account-5000"], "dev", &[&namespace]);
    let put_at = async |version: &str, accounts: &[&str]| {
        let mut body = body.clone();
        body["accounts"] = json!(accounts);
        admin.send(admin.request("PUT", "/v1/pull-secrets/team-a").header("if-match", version).json(&body)).await
    };
    put_at("\"1\"", &["account-5000"]).await.problem(412, "stale-version");
    put(&admin, "team-a", &body).await.expect(201);
    assert_eq!(put_at("\"1\"", &["account-6000"]).await.header("etag"), "\"2\"");
    put_at("\"1\"", &["account-5000"]).await.problem(412, "stale-version");
    assert_holds(&admin.get("/v1/pull-secrets/team-a").await.expect(200), &json!({"accounts": ["account-6000"]}));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn import_bumps_the_generation_once(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let import = async |password: &str| {
        let login = json!({"username": "dev-user", "password": password});
        let document = json!({"auths": {"registry.example.com:7000": login, "registry.example.com:8000": login}});
        let request = admin.request("POST", "/v1/registry-accounts:import");
        let answer = admin.send(request.header("Content-Type", "application/json").body(document.to_string())).await;
        answer.expect(200)["items"].clone()
    };
    let items = import("first").await;
    let names = [0, 1].map(|item| items[item]["name"].as_str().expect("a name").to_owned());
    put(&admin, "team-a", &declaration(&names.each_ref().map(String::as_str), "dev", &[&namespace])).await.expect(201);

    let items = import("second").await;

    assert_eq!([&items[0]["outcome"], &items[1]["outcome"]], ["updated", "updated"]);
    let shown = settled(&admin, "team-a").await;
    assert_holds(&shown, &json!({"generation": 2, "observedGeneration": 2}));
    let secret = kubernetes::secret(&namespace, "team-a-pull").await;
    let (_, documents) = kubernetes::meaning(&secret);
    for port in [7000, 8000] {
        let auth = &documents[".dockerconfigjson"]["auths"][format!("registry.example.com:{port}")];
        assert_eq!(auth["password"], "second");
    }
    // Equal logins change nothing.
    import("second").await;
    assert_eq!(settled(&admin, "team-a").await["generation"], 2);
}
