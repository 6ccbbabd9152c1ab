//! `PATCH` of a declaration, and `PUT` of what `GET` answers.

use futures_util::future::join_all;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{declaration, put};
use crate::support::{
    app::TestApp,
    client::{Answer, Client, assert_holds},
};

const PATH: &str = "/v1/pull-secrets/team-a";

/// An app with a pull secret in a cluster that cannot be reached.
async fn prepared(pool: PgPool) -> (TestApp, Client) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    for (name, team) in [("one", "a"), ("two", "b")] {
        let registry = format!("{name}.example.com");
        let account = json!({"name": name, "registry": registry, "username": "dev", "password": "xxx1",
            "labels": {"team": team, "tier": "1"}});
        admin.post("/v1/registry-accounts", &account).await.expect(201);
    }
    let cluster = json!({"name": "dev", "server": "https://127.0.0.1:1", "auth": {"type": "none"}});
    admin.post("/v1/clusters", &cluster).await.expect(201);
    let created = admin.request("PUT", PATH).json(&declaration(&["one"], "dev", &["default"]));
    admin.send(created).await.expect(201);
    (app, admin)
}

async fn events(app: &TestApp) -> i64 {
    let sql = "SELECT count(*) FROM audit_events WHERE action = 'pullSecret.declare'";
    sqlx::query_scalar(sql).fetch_one(&app.pool).await.expect("a number")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn patch_is_merged_into_the_declaration(pool: PgPool) {
    let (app, admin) = prepared(pool).await;
    let changed = admin.patch(PATH, &json!({"serviceAccounts": ["default"], "deletionPolicy": "retain"})).await;
    assert_eq!(changed.header("etag"), "\"2\"");
    let expected = json!({"accounts": ["one"], "serviceAccounts": ["default"], "deletionPolicy": "retain",
        "version": 2, "generation": 2, "secret": {"name": "team-a-pull", "type": "kubernetes.io/dockerconfigjson"}});
    assert_holds(&changed.expect(200), &expected);

    // Members of objects are merged, lists are replaced, and `null` removes.
    let selector = json!({"accounts": null, "accountSelector": {"matchLabels": {"team": "a", "tier": "1"}}});
    admin.patch(PATH, &selector).await.expect(200);
    let changed = admin.patch(PATH, &json!({"accountSelector": {"matchLabels": {"tier": null}}})).await.expect(200);
    assert_eq!(changed["accountSelector"]["matchLabels"], json!({"team": "a"}));
    assert!(changed.get("accounts").is_none(), "{changed}");
    let targets = json!([{"cluster": "dev", "namespaces": ["other"]}]);
    let changed = admin.patch(PATH, &json!({"targets": targets, "serviceAccounts": null})).await.expect(200);
    assert_holds(&changed, &json!({"targets": targets, "serviceAccounts": [], "version": 5}));

    // The same again changes nothing.
    let recorded = events(&app).await;
    let again = admin.patch(PATH, &json!({"targets": targets})).await;
    assert_eq!((again.header("etag"), again.expect(200)["generation"].clone()), ("\"5\"", json!(5)));
    assert_eq!(admin.patch(PATH, &json!({})).await.header("etag"), "\"5\"");
    assert_eq!(events(&app).await, recorded);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn patch_that_is_not_valid_names_the_field(pool: PgPool) {
    let (_app, admin) = prepared(pool).await;
    let before = admin.get(PATH).await.expect(200);
    for (patch, field) in [
        (json!({"accounts": ["missing"]}), "accounts[0]"),
        (json!({"accountSelector": {"matchLabels": {"team": "a"}}}), "accountSelector"),
        (json!({"accounts": null}), "accounts"),
        (json!({"accountSelector": {"matchLabel": {}}}), "accountSelector.matchLabel"),
        (json!({"secret": {"name": "another"}}), "secret.name"),
        (json!({"secret": {"type": "Opaque"}}), "secret.type"),
        (json!({"secret": null}), "secret"),
        (json!({"targets": []}), "targets"),
        (json!({"targets": null}), "targets"),
        (json!({"targets": [{"cluster": "missing", "namespaces": ["default"]}]}), "targets[0].cluster"),
        (json!({"deletionPolicy": "canary"}), "deletionPolicy"),
        (json!({"adopt": null}), "adopt"),
        (json!({"version": 1}), "version"),
        (json!({"dryRun": true}), "dryRun"),
    ] {
        let refused = admin.patch(PATH, &patch).await;
        refused.problem(422, "invalid-request");
        assert!(refused.fields().iter().any(|found| found == field), "{patch}: {refused:?}");
        assert!(!refused.body.contains("canary"), "{refused:?}");
    }
    assert_eq!(admin.get(PATH).await.expect(200)["version"], before["version"]);
    admin.patch("/v1/pull-secrets/missing", &json!({})).await.problem(404, "not-found");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn patch_honours_if_match_and_loses_no_concurrent_change(pool: PgPool) {
    let (_app, admin) = prepared(pool).await;
    let at = async |version: &str, patch: Value| -> Answer {
        admin.send(admin.request("PATCH", PATH).header("If-Match", version).json(&patch)).await
    };
    at("\"7\"", json!({"adopt": true})).await.problem(412, "stale-version");
    at("\"1\"", json!({"adopt": true})).await.expect(200);
    at("\"1\"", json!({"adopt": false})).await.problem(412, "stale-version");

    let patches =
        [json!({"accounts": ["two"]}), json!({"deletionPolicy": "retain"}), json!({"serviceAccounts": ["default"]})];
    for answer in join_all(patches.iter().map(|patch| admin.patch(PATH, patch))).await {
        answer.expect(200);
    }
    let expected = json!({"accounts": ["two"], "deletionPolicy": "retain", "serviceAccounts": ["default"],
        "adopt": true, "version": 5});
    assert_holds(&admin.get(PATH).await.expect(200), &expected);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn answer_of_get_can_be_put_back(pool: PgPool) {
    let (app, admin) = prepared(pool).await;
    let recorded = events(&app).await;
    let read = admin.get(PATH).await.expect(200);
    let again = put(&admin, "team-a", &read).await;
    assert_eq!((again.status, again.header("etag")), (200, "\"1\""), "{again:?}");
    assert_eq!(events(&app).await, recorded);

    let mut edited = read.clone();
    edited["deletionPolicy"] = json!("retain");
    edited["status"] = json!({"synced": 99});
    assert_eq!(put(&admin, "team-a", &edited).await.expect(200)["version"], 2);

    // What was read is outdated now.
    let refused = put(&admin, "team-a", &read).await;
    refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["version", "updatedAt"]);
    let current = admin.get(PATH).await.expect(200);
    for (field, value) in [
        ("id", json!("01939e5a-7c3e-7b7a-9d0c-5a1f0f6b2c11")),
        ("name", json!("team-b")),
        ("version", json!(9)),
        ("createdAt", json!("2026-01-01T00:00:00Z")),
        ("updatedAt", json!("2026-01-01T00:00:00Z")),
        ("deletedAt", json!("2026-01-01T00:00:00Z")),
        ("warning", json!([])),
    ] {
        let mut changed = current.clone();
        changed[field] = value;
        let refused = put(&admin, "team-a", &changed).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field]);
    }
    // Nothing can be stated about a pull secret that does not exist.
    let mut copied = current.clone();
    copied["name"] = json!("copy");
    let refused = put(&admin, "copy", &copied).await;
    assert_eq!(refused.fields(), ["id", "version", "createdAt", "updatedAt"]);
    assert_eq!(admin.get(PATH).await.expect(200)["version"], 2);
}
