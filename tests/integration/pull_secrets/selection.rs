//! Selectors of namespaces and accounts, and grants.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    app_with_broker, declaration, find_secret, label, labelled_namespace, put, settled, sync, target, target_becomes,
};
use crate::support::{client::assert_holds, eventually, kubernetes};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn namespaces_are_selected_by_label(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let team = format!("t{}", uuid::Uuid::now_v7().simple());
    let (one, two) = (labelled_namespace(&[("team", &team)]).await, labelled_namespace(&[("team", &team)]).await);
    let other = labelled_namespace(&[("team", "other")]).await;
    let mut body = declaration(&["account-5000"], "dev", &[]);
    body["targets"] = json!([{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": team}},
        "excludeNamespaces": [two]}]);
    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1}));
    assert!(shown["selections"][0]["comparedAt"].is_string() && shown["selections"][0]["lastError"].is_null());
    assert!(find_secret(&one, "team-a-pull").await.is_some());
    assert!(find_secret(&two, "team-a-pull").await.is_none() && find_secret(&other, "team-a-pull").await.is_none());

    // One namespace starts to match, one stops.
    label(&other, &[("team", Some(&team))]).await;
    label(&one, &[("team", None)]).await;
    sync(&admin, "team-a").await;
    eventually("the Secrets follow the labels", async || {
        let (moved, gone) = (find_secret(&other, "team-a-pull").await, find_secret(&one, "team-a-pull").await);
        (moved.is_some() && gone.is_none()).then_some(())
    })
    .await;
    assert_holds(&settled(&admin, "team-a").await["status"], &json!({"desired": 1, "synced": 1, "removing": 0}));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn selected_accounts_are_followed_and_documents_are_complete(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let mut body = declaration(&[], "dev", &[&namespace]);
    body.as_object_mut().unwrap().remove("accounts");
    body["accountSelector"] = json!({"matchLabels": {"team": "a"}});
    put(&admin, "team-a", &body).await.expect(201);
    let failed = target(&admin, "team-a").await;
    assert_eq!(failed["lastError"]["type"], "accounts-unusable", "{failed}");

    let keys = async || {
        let secret = find_secret(&namespace, "team-a-pull").await?;
        let document: Value = serde_json::from_str(&kubernetes::document(&secret)).expect("JSON");
        Some(document["auths"].as_object().expect("auths").keys().cloned().collect::<Vec<_>>())
    };
    let becomes = async |expected: &[&str]| {
        let what = format!("the Secret has the keys {expected:?}");
        eventually(&what, async || (keys().await? == expected).then_some(())).await;
    };
    admin.patch("/v1/registry-accounts/account-5000", &json!({"labels": {"team": "a"}})).await.expect(200);
    becomes(&["registry.example.com:5000"]).await;
    let new = json!({"name": "new", "registry": "new.example.com", "username": "n", "password": "p", "labels": {"team": "a"}});
    admin.post("/v1/registry-accounts", &new).await.expect(201);
    becomes(&["new.example.com", "registry.example.com:5000"]).await;
    admin.patch("/v1/registry-accounts/account-5000", &json!({"labels": {"team": null}})).await.expect(200);
    becomes(&["new.example.com"]).await;
    admin.patch("/v1/registry-accounts/account-5000", &json!({"labels": {"team": "a"}})).await.expect(200);
    becomes(&["new.example.com", "registry.example.com:5000"]).await;

    // Two accounts of one registry do not fit into one document: the last good one stays.
    let mut double = new.clone();
    double["name"] = json!("double");
    admin.post("/v1/registry-accounts", &double).await.expect(201);
    target_becomes(&admin, "team-a", "failed", "key-collision").await;
    becomes(&["new.example.com", "registry.example.com:5000"]).await;
    assert_eq!(admin.delete("/v1/registry-accounts/double").await.status, 204);
    target_becomes(&admin, "team-a", "synced", "").await;

    // A corrupt row.
    sqlx::query("UPDATE registry_accounts SET password = '\\x00' WHERE name = 'new'")
        .execute(&pool)
        .await
        .expect("done");
    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "rotated"})).await.expect(200);
    target_becomes(&admin, "team-a", "failed", "stored-value-unreadable").await;
    becomes(&["new.example.com", "registry.example.com:5000"]).await;
    admin.patch("/v1/registry-accounts/new", &json!({"password": "p2"})).await.expect(200);
    target_becomes(&admin, "team-a", "synced", "").await;

    // Without any account the last good document stays, too.
    assert_eq!(admin.delete("/v1/registry-accounts/new").await.status, 204);
    becomes(&["registry.example.com:5000"]).await;
    admin.patch("/v1/registry-accounts/account-5000", &json!({"labels": {"team": null}})).await.expect(200);
    target_becomes(&admin, "team-a", "failed", "accounts-unusable").await;
    becomes(&["registry.example.com:5000"]).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn grants_limit_declarations_and_visibility(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let grants = json!({"accounts": ["account-5*", {"matchLabels": {"team": "a"}}], "clusters": ["dev"], "namespaces": [namespace]});
    let operator = app.caller("op", "operator", Some(grants)).await;
    let body = declaration(&["account-5000"], "dev", &[&namespace]);

    let refused = async |change: &dyn Fn(&mut Value), field: &str| {
        let mut body = body.clone();
        change(&mut body);
        let answer = put(&operator, "team-a", &body).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), [field]);
    };
    refused(&|body| body["accounts"] = json!(["account-5000", "account-6000"]), "accounts[1]").await;
    refused(&|body| body["targets"][0]["cluster"] = json!("prod"), "targets[0].cluster").await;
    refused(&|body| body["targets"][0]["namespaces"] = json!(["kube-system"]), "targets[0].namespaces[0]").await;
    let by_label = json!([{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}}]);
    refused(&|body| body["targets"] = by_label.clone(), "targets[0].namespaceSelector").await;
    let select = |labels: Value| {
        move |body: &mut Value| {
            body.as_object_mut().unwrap().remove("accounts");
            body["accountSelector"] = json!({"matchLabels": labels});
        }
    };
    refused(&select(json!({"tier": "x"})), "accountSelector").await;

    put(&operator, "team-a", &body).await.expect(201);
    let mut selected = body.clone();
    select(json!({"team": "a", "tier": "x"}))(&mut selected);
    put(&operator, "team-s", &selected).await.expect(201);

    // A pull secret beyond the grants is hidden. A resource that it uses is reported as in use.
    put(&admin, "wide", &declaration(&["account-5000", "account-6000"], "dev", &[&namespace])).await.expect(201);
    operator.get("/v1/pull-secrets/wide").await.problem(404, "not-found");
    operator.get("/v1/pull-secrets/wide/targets").await.problem(404, "not-found");
    put(&operator, "wide", &body).await.problem(409, "name-taken");
    let listed = operator.get("/v1/pull-secrets?limit=2").await.expect(200);
    let names: Vec<&str> =
        listed["items"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["team-a", "team-s"]);
    let used = operator.delete("/v1/registry-accounts/account-5000").await.problem(409, "in-use");
    let detail = used["detail"].as_str().unwrap();
    assert!(detail.contains("`pull-secrets/team-a` and 1 more") && !detail.contains("wide"), "{detail}");

    let deliverer =
        app.caller("ci", "deliverer", Some(json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]}))).await;
    deliverer.get("/v1/pull-secrets/wide").await.expect(200);
    put(&deliverer, "mine", &body).await.problem(403, "forbidden");
    let renderer = app.caller("r", "renderer", Some(json!({"accounts": ["*"]}))).await;
    renderer.get("/v1/pull-secrets").await.problem(403, "forbidden");
}
