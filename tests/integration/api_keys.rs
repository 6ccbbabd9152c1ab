//! API keys by name.

use serde_json::json;
use sqlx::PgPool;

use crate::support::{app::TestApp, eventually};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_is_found_and_revoked_by_name_or_id(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let create = async || admin.post("/v1/api-keys", &json!({"name": "ci", "role": "viewer"})).await.expect(201);
    let first = create().await;
    let first_id = first["id"].as_str().expect("an id");

    let found = admin.get("/v1/api-keys/ci").await.expect(200);
    assert_eq!(found["id"], first["id"]);
    assert_eq!(admin.delete("/v1/api-keys/ci").await.status, 204);
    assert!(admin.get(&format!("/v1/api-keys/{first_id}")).await.expect(200)["revokedAt"].is_string());
    // The name is free, the id is not.
    admin.delete("/v1/api-keys/ci").await.problem(404, "not-found");
    assert_eq!(admin.delete(&format!("/v1/api-keys/{first_id}")).await.status, 204);

    let second = create().await;
    assert_eq!(admin.get("/v1/api-keys/ci").await.expect(200)["id"], second["id"]);
    // A key that is named like the id of another one: the id precedes.
    admin.post("/v1/api-keys", &json!({"name": first_id, "role": "viewer"})).await.expect(201);
    assert_eq!(admin.get(&format!("/v1/api-keys/{first_id}")).await.expect(200)["name"], "ci");
    for unknown in ["unknown-key", "A", "0198a0b1-7000-7000-8000-000000000001"] {
        admin.get(&format!("/v1/api-keys/{unknown}")).await.problem(404, "not-found");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn audit_events_of_a_key_are_found_by_name(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let create = async || admin.post("/v1/api-keys", &json!({"name": "ci", "role": "viewer"})).await.expect(201);
    let first = create().await;
    assert_eq!(admin.delete("/v1/api-keys/ci").await.status, 204);
    let second = create().await;
    admin.post("/v1/api-keys", &json!({"name": "other", "role": "viewer"})).await.expect(201);
    app.admin()
        .with_key(second["key"].as_str().expect("a key"))
        .delete("/v1/api-keys/ci")
        .await
        .problem(403, "forbidden");

    let list = async |query: &str| {
        let page = admin.get(&format!("/v1/audit-events?{query}")).await.expect(200);
        let items = page["items"].as_array().expect("items").iter();
        items.map(|event| event["action"].as_str().expect("an action").to_owned()).collect::<Vec<_>>()
    };
    // Newest first, with the refused one, which is recorded with a delay.
    let expected = ["apiKey.revoke", "apiKey.create", "apiKey.revoke", "apiKey.create"];
    eventually("all events are found", async || (list("resource=api-keys/ci").await == expected).then_some(())).await;
    assert_eq!(list("resource=api-keys/ci&limit=1").await, expected[..1]);
    assert_eq!(list(&format!("resource=api-keys/{}", first["id"].as_str().expect("an id"))).await, expected[2..]);

    let alone = admin.get("/v1/audit-events?resource=ci").await;
    alone.problem(422, "invalid-request");
    assert_eq!(alone.fields(), ["resource"]);
    assert!(alone.body.contains("api-keys/ci"), "{alone:?}");
}
