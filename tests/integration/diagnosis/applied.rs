//! `?apply=true`: fixes that regcred carries out itself.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{Doctor, deployment, document, login, namespace_with, pod, pull_secret};
use crate::{
    pull_secrets::{declaration, put, settled},
    support::{client::Client, eventually, kubernetes::kubectl},
    verify::listening::{answer, serve},
};

const WEB: &str = "workloads/deployment/web";

fn path(namespace: &str, object: &str) -> String {
    format!("/v1/clusters/dev/namespaces/{namespace}/{object}/diagnose?apply=true")
}

async fn apply(client: &Client, namespace: &str) -> Value {
    client.post(&path(namespace, WEB), &Value::Null).await.expect(200)
}

/// Resources of the events with this action.
async fn audited(doctor: &Doctor, action: &str) -> Vec<Value> {
    let events = doctor.admin.get(&format!("/v1/audit-events?action={action}&outcome=success")).await.expect(200);
    events["items"].as_array().expect("events").iter().map(|event| event["resource"].clone()).collect()
}

/// A doctor with an account for the first registry.
async fn with_account(pool: PgPool) -> Doctor {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    doctor.app.register_account("prod", &a.address, &a.username, &a.password).await;
    doctor
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn applied_fix_declares_a_pull_secret_for_the_service_account(pool: PgPool) {
    let doctor = with_account(pool).await;
    let web = deployment(&[&Doctor::image_of(&doctor.a)], &[]);
    let namespace = namespace_with(&[], vec![web]).await;
    let before = doctor.diagnose(&namespace, WEB).await;
    let fix = &before["images"][0]["fix"];
    assert_eq!((&fix["type"], &fix["applicable"]), (&json!("attachServiceAccount"), &json!(true)), "{before:#}");
    assert_eq!((&fix["applied"], audited(&doctor, "pullSecret.declare").await.len()), (&json!(false), 0));

    let applied = apply(&doctor.admin, &namespace).await;

    let fix = &applied["images"][0]["fix"];
    assert_eq!((&fix["applied"], &applied["images"][0]["verdict"]), (&json!(true), &json!("noSecret")), "{applied:#}");
    let name = fix["steps"][0]["path"].as_str().and_then(|path| path.rsplit('/').next()).expect("a path");
    assert_eq!(audited(&doctor, "pullSecret.declare").await, [json!(format!("pull-secrets/{name}"))]);
    settled(&doctor.admin, name).await;
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);

    // Without the Secret in the list of the ServiceAccount, the pull secret exists already.
    let detach = r#"[{"op": "remove", "path": "/imagePullSecrets"}]"#;
    kubectl(&["patch", "serviceaccount", "default", "-n", &namespace, "--type=json", "-p", detach], "");
    let again = doctor.diagnose(&namespace, WEB).await;
    assert_eq!(again["images"][0]["fix"]["type"], "syncPullSecret", "{again:#}");
    doctor.apply(&again["images"][0]["fix"], ("unused", "unused")).await;
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn applied_fix_delivers_the_missing_secret(pool: PgPool) {
    let doctor = with_account(pool).await;
    let b = &doctor.b;
    doctor.app.register_account("prod-b", &b.address, &b.username, &b.password).await;
    // One Secret for two registries.
    let web = deployment(&[&Doctor::image_of(&doctor.a), &Doctor::image_of(b)], &["gone"]);
    let namespace = namespace_with(&[], vec![web]).await;

    let applied = apply(&doctor.admin, &namespace).await;

    assert_eq!(applied["images"][0]["fix"]["applied"], true, "{applied:#}");
    let secret = json!(format!("clusters/dev/namespaces/{namespace}/secrets/gone"));
    assert_eq!(audited(&doctor, "secret.deliver").await, [secret]);
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);
    // Nothing is left to do.
    let again = apply(&doctor.admin, &namespace).await;
    assert_eq!((&again["ok"], audited(&doctor, "secret.deliver").await.len()), (&json!(true), 1), "{again:#}");
}

/// An immutable Secret cannot be repaired, so it stays as it is.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn applied_fix_syncs_the_pull_secret_of_a_broken_secret(pool: PgPool) {
    let doctor = with_account(pool).await;
    let web = deployment(&[&Doctor::image_of(&doctor.a)], &["team-a-pull"]);
    let namespace = namespace_with(&[], vec![web]).await;
    put(&doctor.admin, "team-a", &declaration(&["prod"], "dev", &[&namespace])).await.expect(201);
    // The API server validates the JSON of the Secret, but no `auth`: here it is "!".
    let broken = json!({"immutable": true, "data": {".dockerconfigjson": "eyJhdXRocyI6eyJhIjp7ImF1dGgiOiIhIn19fQ=="}})
        .to_string();
    kubectl(&["patch", "secret", "team-a-pull", "-n", &namespace, "-p", &broken], "");
    let failed = eventually("the target fails", async || {
        let found = doctor.diagnose(&namespace, WEB).await;
        (found["pullSecrets"][0]["managedBy"]["state"] == "failed").then_some(found)
    })
    .await;
    let managed = json!({"pullSecret": "team-a", "state": "failed", "lastError": "secret-immutable"});
    assert_eq!(failed["pullSecrets"][0]["managedBy"], managed, "{failed:#}");
    let image = &failed["images"][0];
    assert_eq!((&image["verdict"], &image["fix"]["type"]), (&json!("secretUnreadable"), &json!("syncPullSecret")));

    let applied = apply(&doctor.admin, &namespace).await;

    assert_eq!(applied["images"][0]["fix"]["applied"], true, "{applied:#}");
    assert_eq!(audited(&doctor, "pullSecret.sync").await, [json!("pull-secrets/team-a")]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn fix_with_commands_alone_is_not_applied(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (at_a, at_b) = (Doctor::image_of(&doctor.a), Doctor::image_of(&doctor.b));
    let namespace = namespace_with(&[], vec![login("k", &doctor.a), deployment(&[&at_a, &at_b], &["k"])]).await;

    let applied = apply(&doctor.admin, &namespace).await;

    let fix = &applied["images"][1]["fix"];
    let state = (&fix["type"], &fix["applicable"], &fix["applied"]);
    assert_eq!(state, (&json!("addPullSecret"), &json!(false), &json!(false)), "{applied:#}");
    for action in ["secret.deliver", "pullSecret.declare"] {
        assert_eq!(audited(&doctor, action).await.len(), 0);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn caller_applies_only_what_it_is_granted(pool: PgPool) {
    let doctor = with_account(pool).await;
    let image = Doctor::image_of(&doctor.a);
    let namespace = namespace_with(&[], vec![deployment(&[&image], &[])]).await;
    for role in ["viewer", "deliverer", "renderer"] {
        let grants = json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]});
        let caller = doctor.app.caller(role, role, Some(grants)).await;
        let refused = caller.post(&path(&namespace, WEB), &Value::Null).await.problem(403, "forbidden");
        assert!(refused["detail"].as_str().is_some_and(|text| text.contains("diagnosePods")), "{refused}");
    }
    // The account is not granted, so regcred can do nothing for this caller.
    let grants = json!({"accounts": ["x-*"], "clusters": ["dev"], "namespaces": [namespace]});
    let narrow = doctor.app.caller("narrow", "operator", Some(grants)).await;
    let applied = apply(&narrow, &namespace).await;
    assert_eq!(applied["images"][0]["fix"]["applicable"], false, "{applied:#}");
    assert_eq!(audited(&doctor, "pullSecret.declare").await.len(), 0);

    // A pull secret of the same name for something else is not replaced.
    let registry = doctor.a.address.replace(['.', ':'], "-");
    let name = format!("{namespace}-pull-{registry}");
    let other = declaration(&["prod"], "dev", &["other"]);
    let stored = put(&doctor.admin, &name, &other).await.expect(201);
    let applied = apply(&doctor.admin, &namespace).await;
    assert_eq!(applied["images"][0]["fix"]["applicable"], false, "{applied:#}");
    let kept = doctor.admin.get(&format!("/v1/pull-secrets/{name}")).await.expect(200);
    assert_eq!((&kept["version"], &kept["targets"]), (&stored["version"], &other["targets"]));
}

/// The label of a Secret is copied to another namespace, where no pull secret places it.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn copied_label_does_not_make_a_secret_managed(pool: PgPool) {
    let doctor = with_account(pool).await;
    let declared = namespace_with(&[], Vec::new()).await;
    let stored = put(&doctor.admin, "team-a", &declaration(&["prod"], "dev", &[&declared])).await.expect(201);
    let mut copied = pull_secret("team-a-pull", &json!({"auths": {}}));
    copied["metadata"]["labels"] = json!({"regcred.dev/pull-secret-id": stored["id"]});
    let web = deployment(&[&Doctor::image_of(&doctor.a)], &["team-a-pull"]);
    let namespace = namespace_with(&[], vec![copied, web]).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    assert_eq!(found["pullSecrets"][0]["managedBy"], Value::Null, "{found:#}");
    assert_eq!(found["images"][0]["fix"]["type"], "addPullSecret", "{found:#}");
}

/// A delivery would leave a Secret that is a conflict for the pull secret.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn deleted_secret_of_a_pull_secret_is_delivered_by_it(pool: PgPool) {
    let doctor = with_account(pool).await;
    let web = deployment(&[&Doctor::image_of(&doctor.a)], &["team-a-pull"]);
    let namespace = namespace_with(&[], vec![web]).await;
    let blocker = pull_secret("team-a-pull", &json!({"auths": {}}));
    kubectl(&["create", "-n", &namespace, "-f", "-"], &blocker.to_string());
    put(&doctor.admin, "team-a", &declaration(&["prod"], "dev", &[&namespace])).await.expect(201);
    eventually("the target is a conflict", async || {
        let found = doctor.admin.get("/v1/pull-secrets/team-a").await.expect(200);
        (found["status"]["conflict"] == 1).then_some(())
    })
    .await;
    // As if a worker had it in progress: no other one delivers the Secret before it is diagnosed.
    let lease = async |seconds: f64| {
        let update = "UPDATE pull_secret_targets SET lease_until = now() + $1 * interval '1 second'";
        sqlx::query(update).bind(seconds).execute(&doctor.app.pool).await.expect("leased");
    };
    lease(3_600.0).await;
    kubectl(&["delete", "secret", "team-a-pull", "-n", &namespace], "");
    let hidden = json!({"accounts": ["x-*"], "clusters": ["dev"], "namespaces": [namespace]});
    let narrow = doctor.app.caller("narrow", "operator", Some(hidden)).await;

    let seen = super::setup::diagnose(&narrow, &namespace, WEB).await;
    let applied = apply(&doctor.admin, &namespace).await;

    let image = &applied["images"][0];
    assert_eq!(image["verdict"], "secretMissing", "{applied:#}");
    assert_eq!((&image["fix"]["type"], &image["fix"]["applied"]), (&json!("syncPullSecret"), &json!(true)));
    let fix = &seen["images"][0]["fix"];
    assert_eq!((&fix["type"], &fix["steps"]), (&json!("syncPullSecret"), &json!([])), "{seen:#}");
    assert_eq!(applied["pullSecrets"][0]["managedBy"]["pullSecret"], "team-a", "{applied:#}");
    assert_eq!(seen["pullSecrets"][0]["managedBy"]["pullSecret"], Value::Null, "{seen:#}");
    assert_eq!(audited(&doctor, "secret.deliver").await.len(), 0);
    lease(-1.0).await;
    settled(&doctor.admin, "team-a").await;
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);
}

/// A caller that applies a fix delivers logins on the word of an editor of the namespace.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn fix_delivers_the_narrowest_account_only(pool: PgPool) {
    let doctor = with_account(pool).await;
    let a = &doctor.a;
    doctor.app.register_account("narrow", &format!("{}/os", a.address), &a.username, &a.password).await;
    let namespace = namespace_with(&[], vec![deployment(&[&Doctor::image_of(a)], &["gone"])]).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    assert_eq!(found["images"][0]["fix"]["steps"][0]["body"]["accounts"], json!(["narrow"]), "{found:#}");
}

/// Accounts of a fix, and its description.
fn delivered(diagnosis: &Value) -> (Value, String) {
    let fix = &diagnosis["images"][0]["fix"];
    (fix["steps"][0]["body"]["accounts"].clone(), fix["description"].as_str().expect("a description").to_owned())
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_whose_login_is_refused_is_not_delivered(pool: PgPool) {
    let doctor = with_account(pool).await;
    let a = &doctor.a;
    doctor.app.register_account("narrow", &format!("{}/os", a.address), &a.username, "wrong").await;
    let namespace = namespace_with(&[], vec![deployment(&[&Doctor::image_of(a)], &["gone"])]).await;

    let applied = apply(&doctor.admin, &namespace).await;

    let (accounts, description) = delivered(&applied);
    assert_eq!(accounts, json!(["prod"]), "{applied:#}");
    assert!(!description.contains("could not be asked"), "{description}");
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);
    let mut tried = audited(&doctor, "registryAccount.verify").await;
    tried.sort_by_key(Value::to_string);
    assert_eq!(tried, [json!("registry-accounts/narrow"), json!("registry-accounts/prod")]);

    // Without an account that works, the caller brings a login.
    doctor.admin.patch("/v1/registry-accounts/prod", &json!({"password": "wrong"})).await.expect(200);
    let namespace = namespace_with(&[], vec![deployment(&[&Doctor::image_of(a)], &["gone"])]).await;
    let found = doctor.diagnose(&namespace, WEB).await;
    let fix = &found["images"][0]["fix"];
    assert_eq!((&fix["applicable"], &fix["steps"][0]["type"]), (&json!(false), &json!("command")), "{found:#}");
    doctor.apply(fix, (&a.username, &a.password)).await;
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);
}

/// The registry limits this login, so nothing is known of it.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn fix_tells_that_a_login_could_not_be_tried(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (registry, _) = serve(|request| {
        if request.to_ascii_lowercase().contains("authorization: basic") {
            answer("429 Too Many Requests", &[("Retry-After", "3600")], "{}")
        } else {
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "{}")
        }
    });
    doctor.app.register_account("limited", &registry.to_string(), "martin", "canary-password").await;
    let namespace = namespace_with(&[], vec![deployment(&[&format!("{registry}/app:1")], &["gone"])]).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    let (accounts, description) = delivered(&found);
    assert_eq!(accounts, json!(["limited"]), "{found:#}");
    assert!(description.contains("could not be asked whether it accepts the login of limited"), "{description}");
}

/// A public image needs no login, so none is presented.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn login_of_an_account_is_presented_for_a_fix_only(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (registry, requests) = serve(|_| answer("200 OK", &[], "{}"));
    doctor.app.register_account("prod", &registry.to_string(), "martin", "canary-password").await;
    let namespace = namespace_with(&[], vec![deployment(&[&format!("{registry}/app:1")], &[])]).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    assert_eq!(found["ok"], true, "{found:#}");
    assert!(requests.count() > 0 && !requests.text().to_ascii_lowercase().contains("authorization"));
    assert_eq!(audited(&doctor, "registryAccount.verify").await.len(), 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn new_secret_has_a_name_that_is_free(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    let name = format!("pull-{}", a.address.replace(['.', ':'], "-"));
    let other = |name: &str| pull_secret(name, &document("quay.io", "u", "p"));
    let objects = vec![other(&name), other(&format!("{name}-2")), deployment(&[&Doctor::image_of(a)], &[])];
    let namespace = namespace_with(&[], objects).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    let fix = &found["images"][0]["fix"];
    assert_eq!(fix["secret"], format!("{name}-3"), "{found:#}");
    doctor.apply(fix, (&a.username, &a.password)).await;
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);
}

/// A pod that a Deployment creates anew cannot be changed itself.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn fix_of_a_controlled_pod_changes_its_workload(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    let image = Doctor::image_of(a);
    for (of_template, fix_type) in [(&["other"][..], "addPullSecret"), (&[], "attachServiceAccount")] {
        let other = pull_secret("other", &document("quay.io", "u", "p"));
        let mut web = pod(&[&image], &["other"]);
        web["metadata"] = json!({"name": "web-7d9-x", "labels": {"pod-template-hash": "7d9"}, "ownerReferences": [{
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d9", "uid": "x", "controller": true}]});
        let namespace = namespace_with(&["other"], vec![other, deployment(&[&image], of_template), web]).await;

        let found = doctor.diagnose(&namespace, "pods/web-7d9-x").await;

        let fix = &found["images"][0]["fix"];
        assert_eq!(fix["type"], fix_type, "{found:#}");
        doctor.apply(fix, (&a.username, &a.password)).await;
        assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true, "{fix:#}");
        doctor.admin.post(&path(&namespace, "pods/web-7d9-x"), &Value::Null).await.problem(404, "not-found");
    }
}
