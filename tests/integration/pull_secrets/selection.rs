//! Selectors of namespaces and accounts, and grants.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    app_with_broker, declaration, find_secret, label, labelled_namespace, put, settled, sync, target, target_becomes,
};
use crate::support::{
    client::{Client, assert_holds},
    eventually, kubernetes,
};

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

/// Body of an account with the label of team b.
fn of_team_b(name: &str, registry: &str, password: &str) -> Value {
    json!({"name": name, "registry": registry, "username": name, "password": password, "labels": {"team": "b"}})
}

/// Declaration that selects the accounts of team b.
fn selection_of_team_b(namespaces: &[&str]) -> Value {
    let mut body = declaration(&[], "dev", namespaces);
    body.as_object_mut().expect("an object").remove("accounts");
    body["accountSelector"] = json!({"matchLabels": {"team": "b"}});
    body
}

/// User and password of each entry of a Secret.
async fn logins(namespace: &str) -> Vec<[String; 3]> {
    let secret = find_secret(namespace, "team-a-pull").await.expect("a Secret");
    let document: Value = serde_json::from_str(&kubernetes::document(&secret)).expect("JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let entries = document["auths"].as_object().expect("auths").iter();
    entries.map(|(key, entry)| [key.clone(), text(&entry["username"]), text(&entry["password"])]).collect()
}

/// Waits until the Secret has these entries.
async fn logins_become(namespace: &str, expected: &[[&str; 3]]) {
    let expected: Vec<[String; 3]> = expected.iter().map(|entry| entry.map(str::to_owned)).collect();
    let what = format!("the Secret has the entries {expected:?}");
    eventually(&what, async || (logins(namespace).await == expected).then_some(())).await;
}

/// The attack: a caller gives its own account the label that the selector of another team matches.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn foreign_account_cannot_enter_a_selection_by_a_label(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let prod = "registry.prod.example";
    admin.post("/v1/registry-accounts", &of_team_b("prod", prod, "one")).await.expect(201);
    put(&admin, "team-b", &selection_of_team_b(&[&namespace])).await.expect(201);
    let grants = json!({"accounts": ["x-*", {"matchLabels": {"team": "x", "tier": "1"}}], "clusters": ["*"],
        "namespaces": ["*"]});
    let operator = app.caller("op", "operator", Some(grants)).await;

    let refused = operator.post("/v1/registry-accounts", &of_team_b("x-1", prod, "stolen")).await;
    refused.problem(403, "forbidden");
    assert_eq!(refused.fields(), ["labels.team"]);
    let mut unlabelled = of_team_b("x-1", prod, "stolen");
    unlabelled.as_object_mut().expect("an object").remove("labels");
    operator.post("/v1/registry-accounts", &unlabelled).await.expect(201);
    let refused = operator.patch("/v1/registry-accounts/x-1", &json!({"labels": {"team": "b", "tier": "1"}})).await;
    refused.problem(403, "forbidden");
    assert_eq!(refused.fields(), ["labels.team", "labels.tier"]);
    // An import sets no labels.
    let config = json!({"auths": {format!("{prod}/app"): {"username": "x", "password": "stolen"}}});
    operator.post("/v1/registry-accounts:import?namePrefix=x-", &config).await.expect(200);

    admin.patch("/v1/registry-accounts/prod", &json!({"password": "two"})).await.expect(200);
    let shown = settled(&admin, "team-b").await;
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1, "failed": 0, "leftOut": []}));
    assert_eq!(logins(&namespace).await, [[prod, "prod", "two"].map(str::to_owned)]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn oldest_of_colliding_accounts_stays_and_rotations_continue(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    for (name, registry) in [("first", "a.example.com"), ("other", "b.example.com")] {
        admin.post("/v1/registry-accounts", &of_team_b(name, registry, "1")).await.expect(201);
    }
    let body = selection_of_team_b(&[&namespace]);
    assert_eq!(put(&admin, "team-b", &body).await.expect(201)["status"]["leftOut"], json!([]));

    // Its name sorts before that of the oldest account.
    admin.post("/v1/registry-accounts", &of_team_b("copy", "a.example.com", "2")).await.expect(201);
    let left_out = json!([{"account": "copy", "reason": "key-collision"}]);
    let shown = settled(&admin, "team-b").await;
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1, "failed": 0, "leftOut": left_out}));
    assert_eq!(admin.get("/v1/pull-secrets").await.expect(200)["items"][0]["status"], shown["status"]);
    let entries = [["a.example.com", "first", "1"], ["b.example.com", "other", "1"]];
    assert_eq!(logins(&namespace).await, entries.map(|entry| entry.map(str::to_owned)));

    // Rotations of each account: of the one that stays, of another one, and of the one left out.
    for (name, password) in [("first", "3"), ("other", "4"), ("copy", "5")] {
        admin.patch(&format!("/v1/registry-accounts/{name}"), &json!({"password": password})).await.expect(200);
    }
    let shown = settled(&admin, "team-b").await;
    assert_holds(&shown["status"], &json!({"synced": 1, "leftOut": left_out}));
    logins_become(&namespace, &[["a.example.com", "first", "3"], ["b.example.com", "other", "4"]]).await;

    // A dry run reports the same. Documents for callers are never incomplete.
    let mut dry_run = body.clone();
    dry_run["dryRun"] = json!(true);
    assert_eq!(put(&admin, "team-b", &dry_run).await.expect(200)["leftOut"], left_out);
    let selector = json!({"accountSelector": body["accountSelector"]});
    admin.post("/v1/docker-configs", &selector).await.problem(409, "key-collision");
    let delivery = json!({"name": "direct", "accountSelector": body["accountSelector"]});
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    admin.post(&path, &delivery).await.problem(409, "key-collision");

    // Without the oldest account, the next one takes its place.
    assert_eq!(admin.delete("/v1/registry-accounts/first").await.status, 204);
    logins_become(&namespace, &[["a.example.com", "copy", "5"], ["b.example.com", "other", "4"]]).await;
    assert_eq!(settled(&admin, "team-b").await["status"]["leftOut"], json!([]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn left_out_accounts_are_named_only_where_granted(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    for name in ["first", "copy"] {
        admin.post("/v1/registry-accounts", &of_team_b(name, "a.example.com", "1")).await.expect(201);
    }
    put(&admin, "team-b", &selection_of_team_b(&[&namespace])).await.expect(201);
    let grants = json!({"accounts": [{"matchLabels": {"team": "b"}}], "clusters": ["*"], "namespaces": ["*"]});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    let left_out = json!([{"account": "copy", "reason": "key-collision"}]);
    for client in [&admin, &viewer] {
        assert_eq!(client.get("/v1/pull-secrets/team-b").await.expect(200)["status"]["leftOut"], left_out);
        let stream = client.get("/v1/pull-secrets/team-b/events").await;
        assert!(stream.body.contains(&format!(r#""leftOut":{left_out}"#)), "{stream:?}");
    }

    // As if `copy` had lost its label since, and the document were not rendered again.
    let stale =
        "UPDATE pull_secrets SET left_out = ARRAY(SELECT id FROM registry_accounts WHERE name = 'account-5000')";
    sqlx::query(stale).execute(&pool).await.expect("updated");
    let of =
        async |client: &Client| client.get("/v1/pull-secrets/team-b").await.expect(200)["status"]["leftOut"].clone();
    assert_eq!(of(&admin).await, json!([{"account": "account-5000", "reason": "key-collision"}]));
    assert_eq!(of(&viewer).await, json!([]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn named_accounts_that_collide_are_refused_and_later_collisions_fail(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    app.register_account("copy-5000", "registry.example.com:5000", "copy", "xxx3").await;
    let colliding = declaration(&["account-5000", "copy-5000"], "dev", &[&namespace]);
    let mut dry_run = colliding.clone();
    dry_run["dryRun"] = json!(true);
    for body in [&colliding, &dry_run] {
        let refused = put(&admin, "team-a", body).await;
        refused.problem(409, "key-collision");
        assert_eq!(refused.fields(), ["accounts"]);
    }
    admin.get("/v1/pull-secrets/team-a").await.problem(404, "not-found");

    let declared = declaration(&["account-5000", "account-6000"], "dev", &[&namespace]);
    put(&admin, "team-a", &declared).await.expect(201);
    put(&admin, "team-a", &colliding).await.problem(409, "key-collision");
    let entries = logins(&namespace).await;

    // A later change of an account: the last document stays.
    let moved = json!({"registry": "registry.example.com:5000", "password": "xxx4"});
    admin.patch("/v1/registry-accounts/account-6000", &moved).await.expect(200);
    target_becomes(&admin, "team-a", "failed", "key-collision").await;
    assert_eq!(logins(&namespace).await, entries);
    let back = json!({"registry": "registry.example.com:6000", "password": "xxx5"});
    admin.patch("/v1/registry-accounts/account-6000", &back).await.expect(200);
    target_becomes(&admin, "team-a", "synced", "").await;
    let last = ["registry.example.com:6000", "dev-user", "xxx5"].map(str::to_owned);
    assert_eq!(logins(&namespace).await, [entries[0].clone(), last]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn selectors_that_match_nothing_are_warnings_until_they_match(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let team = format!("t{}", uuid::Uuid::now_v7().simple());
    let namespace = labelled_namespace(&[("team", &team)]).await;
    let codes = |warnings: &Value| -> Vec<String> {
        let warnings = warnings.as_array().expect("warnings").iter();
        warnings.map(|one| one["code"].as_str().expect("a code").to_owned()).collect()
    };
    let typo = json!({"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": format!("{team}-typo")}}});
    let right = json!({"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": team}}});
    let mut body = declaration(&[], "dev", &[]);
    body.as_object_mut().unwrap().remove("accounts");
    body["accountSelector"] = json!({"matchLabels": {"team": team}});
    body["targets"] = json!([right, typo]);

    let mut dry_run = body.clone();
    dry_run["dryRun"] = json!(true);
    let preview = put(&admin, "team-a", &dry_run).await.expect(200);
    assert_eq!(codes(&preview["warnings"]), ["selectsNoAccount", "selectsNoNamespace"]);
    assert_eq!(preview["targets"][0]["namespace"], namespace.as_str());
    assert_eq!(preview["targets"][0]["action"], "unknown", "there is no document: {preview}");

    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_eq!(codes(&shown["status"]["warnings"]), ["selectsNoAccount", "selectsNoNamespace"]);
    let detail = shown["status"]["warnings"][1]["detail"].as_str().expect("a detail");
    assert!(detail.contains("targets[1]") && detail.contains("`dev`"), "{detail}");
    let listed = admin.get("/v1/pull-secrets").await.expect(200);
    assert_eq!(listed["items"][0]["status"]["warnings"], shown["status"]["warnings"]);

    // The account and the namespace follow without a new declaration.
    admin.patch("/v1/registry-accounts/account-5000", &json!({"labels": {"team": team}})).await.expect(200);
    let shown = admin.get("/v1/pull-secrets/team-a").await.expect(200);
    assert_eq!(codes(&shown["status"]["warnings"]), ["selectsNoNamespace"]);
    let late = labelled_namespace(&[("team", &format!("{team}-typo"))]).await;
    sync(&admin, "team-a").await;
    eventually("the namespace is selected", async || {
        let shown = admin.get("/v1/pull-secrets/team-a").await.expect(200);
        codes(&shown["status"]["warnings"]).is_empty().then_some(())
    })
    .await;
    eventually("the Secret arrives", async || find_secret(&late, "team-a-pull").await).await;
    // The last account that matches goes.
    admin.patch("/v1/registry-accounts/account-5000", &json!({"labels": {"team": null}})).await.expect(200);
    let shown = admin.get("/v1/pull-secrets/team-a").await.expect(200);
    assert_eq!(codes(&shown["status"]["warnings"]), ["selectsNoAccount"]);
    let metrics = async || {
        let metrics = app.operations().get("/metrics").await.body;
        metrics.contains("regcred_pull_secrets_unmatched{selects=\"accounts\"} 1").then_some(())
    };
    eventually("the metric counts it", metrics).await;
}
