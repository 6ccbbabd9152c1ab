//! Minted accounts through the API, with a token service as provider.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::token_service::{PATH, TokenService, make_due, password, spawn, until_mint};
use crate::support::{app::TestApp, kubernetes};

async fn create(app: &TestApp, provider: &TokenService) -> Value {
    app.admin().post("/v1/registry-accounts", &provider.account()).await.expect(201)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_with_a_source_has_a_minted_login(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let created = create(&app, &provider).await;
    assert_eq!((&created["username"], &created["mint"]["state"]), (&json!("robot"), &json!("valid")));
    assert_eq!((&created["mint"]["serial"], &created["mint"]["lastError"]), (&json!(1), &Value::Null));
    assert_eq!(created["expiresAt"], created["mint"]["validUntil"]);
    assert_eq!(created["source"]["identity"], json!({"type": "clientSecret", "clientId": "regcred"}));
    assert!(!created.to_string().contains("canary"), "{created}");
    assert_eq!(password(&app).await, "minted-1");

    let minted = app.admin().post(&format!("{PATH}/mint"), &json!({})).await.expect(200);
    assert_eq!((&minted["mint"]["serial"], &minted["version"]), (&json!(2), &created["version"]));
    assert_eq!(password(&app).await, "minted-2");
    assert_eq!(app.admin().get(PATH).await.expect(200)["mint"], minted["mint"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn failed_mint_stores_nothing(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    for (status, expected, slug) in [
        ("500 Internal Server Error", 502, "mint-failed"),
        ("401 Unauthorized", 502, "mint-failed"),
        ("429 Too Many Requests", 503, "mint-throttled"),
    ] {
        provider.refuse(Some(status));
        let answer = app.admin().post("/v1/registry-accounts", &provider.account()).await;
        let problem = answer.problem(expected, slug);
        assert!(!problem.to_string().contains("canary"), "{problem}");
        assert_eq!(answer.header("retry-after").is_empty(), expected == 502);
        app.admin().get(PATH).await.problem(404, "not-found");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn login_and_source_exclude_each_other(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let mut both = provider.account();
    both["username"] = json!("dev");
    both["password"] = json!("canary");
    both["expiresAt"] = json!("2030-01-01T00:00:00Z");
    let answer = app.admin().post("/v1/registry-accounts", &both).await;
    assert_eq!(answer.fields(), ["username", "password", "expiresAt"]);
    let neither = json!({"name": "minted", "registry": "registry.example.com"});
    let answer = app.admin().post("/v1/registry-accounts", &neither).await;
    assert_eq!(answer.fields(), ["username", "password"]);

    let mut with_ca = provider.account();
    with_ca["caCertificate"] = json!(kubernetes::file("ca.crt"));
    app.admin().post("/v1/registry-accounts", &with_ca).await.expect(201);
    for (change, fields) in [
        (json!({"password": "canary"}), &["password"][..]),
        (json!({"username": "dev", "expiresAt": "2030-01-01T00:00:00Z"}), &["username", "expiresAt"]),
        (json!({"registry": "other.example.com"}), &["registry"]),
        (json!({"plainHttp": false}), &["plainHttp"]),
        (json!({"caCertificate": null}), &["caCertificate"]),
        (json!({"caCertificate": kubernetes::SECOND.file("ca.crt")}), &["caCertificate"]),
        (json!({"source": null}), &["username", "password"]),
        (json!({"source": provider.source(), "password": "canary"}), &["password"]),
    ] {
        assert_eq!(app.admin().patch(PATH, &change).await.fields(), fields, "{change}");
    }
    assert_eq!(app.admin().get(PATH).await.expect(200)["mint"]["serial"], 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn source_can_be_removed_and_set_again(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    create(&app, &provider).await;
    let change = json!({"source": null, "username": "dev", "password": "static"});
    let changed = app.admin().patch(PATH, &change).await.expect(200);
    assert_eq!((&changed["mint"], &changed["source"], &changed["version"]), (&Value::Null, &Value::Null, &json!(2)));
    assert_eq!(password(&app).await, "static");
    app.admin().post(&format!("{PATH}/mint"), &json!({})).await.problem(409, "not-minted");

    let changed = app.admin().patch(PATH, &json!({"source": provider.source()})).await.expect(200);
    assert_eq!((&changed["mint"]["serial"], &changed["username"]), (&json!(1), &json!("robot")));
    assert_eq!(password(&app).await, "minted-2");

    assert_eq!(app.admin().delete(PATH).await.status, 204);
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM account_mints").fetch_one(&app.pool).await.expect("rows");
    assert_eq!(rows, 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn due_login_is_replaced_and_a_failure_keeps_it(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    create(&app, &provider).await;
    make_due(&app).await;
    let minted = until_mint(&app, "serial", json!(2)).await;
    assert_eq!((&minted["version"], password(&app).await), (&json!(1), "minted-2".to_owned()));

    provider.refuse(Some("500 Internal Server Error"));
    make_due(&app).await;
    let failing = until_mint(&app, "state", json!("failing")).await;
    assert_eq!(failing["mint"]["lastError"]["type"], "unreachable");
    assert!(!failing.to_string().contains("canary"), "{failing}");
    assert_eq!(password(&app).await, "minted-2");

    provider.refuse(None);
    make_due(&app).await;
    let valid = until_mint(&app, "serial", json!(3)).await;
    assert_eq!((&valid["mint"]["state"], &valid["mint"]["lastError"]), (&json!("valid"), &Value::Null));
    assert_eq!(password(&app).await, "minted-3");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn edited_source_gets_no_secret(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    create(&app, &provider).await;
    sqlx::query("UPDATE account_mints SET source = replace(source, '/token', '/canary'), next_attempt_at = now()")
        .execute(&app.pool)
        .await
        .expect("an edit");
    let account = until_mint(&app, "state", json!("failing")).await;
    assert_eq!(account["mint"]["lastError"]["type"], "misconfigured");
    assert_eq!(password(&app).await, "minted-1");
}
