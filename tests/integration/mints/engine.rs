//! What happens to a mint in flight, and to a result that is not stored.

use serde_json::json;
use sqlx::PgPool;

use super::{
    metrics::successful_mints,
    token_service::{PATH, TokenService, make_due, password, spawn, until_mint},
};
use crate::support::{app::TestApp, eventually};

async fn spawn_with_account(pool: PgPool) -> (TestApp, TokenService) {
    let (app, provider) = spawn(pool).await;
    app.admin().post("/v1/registry-accounts", &provider.account()).await.expect(201);
    (app, provider)
}

async fn execute(app: &TestApp, sql: &'static str) {
    sqlx::raw_sql(sql).execute(&app.pool).await.expect("a statement");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn late_result_of_a_removed_source_is_dropped(pool: PgPool) {
    let (app, provider) = spawn_with_account(pool).await;
    provider.gate.close();
    make_due(&app).await;
    provider.gate.until_waiting(1).await;
    let change = json!({"source": null, "username": "dev", "password": "static"});
    app.admin().patch(PATH, &change).await.expect(200);
    app.admin().patch(PATH, &json!({"source": provider.source_at("other")})).await.expect(200);
    assert_eq!(password(&app).await, "minted-3");
    // As the first claim of the new source does.
    execute(&app, "UPDATE account_mints SET lease_token = lease_token + 1, lease_until = now() + interval '1 minute'")
        .await;
    let minted = successful_mints(&app).await;

    provider.gate.open();

    eventually("the late mint ends", async || (successful_mints(&app).await > minted).then_some(())).await;
    // The worker stores results in the order in which mints end: that of a mint that begins now
    // comes after the late one.
    let other = json!({"name": "other", "registry": "other.example.com", "plainHttp": true,
        "source": provider.source()});
    app.admin().post("/v1/registry-accounts", &other).await.expect(201);
    execute(
        &app,
        "UPDATE account_mints SET next_attempt_at = now()
         WHERE account_id = (SELECT id FROM registry_accounts WHERE name = 'other')",
    )
    .await;
    eventually("the other account is minted", async || {
        let other = app.admin().get("/v1/registry-accounts/other").await.expect(200);
        (other["mint"]["serial"] == 2).then_some(())
    })
    .await;
    assert_eq!(password(&app).await, "minted-3");
    assert_eq!(app.admin().get(PATH).await.expect(200)["mint"]["serial"], 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn result_is_stored_again_after_a_failure(pool: PgPool) {
    let (app, provider) = spawn_with_account(pool).await;
    // Sequences are not rolled back: the first attempt fails, and no other.
    execute(
        &app,
        "CREATE SEQUENCE attempts;
         CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
         BEGIN
             IF nextval('attempts') = 1 THEN RAISE EXCEPTION 'refused'; END IF;
             RETURN NEW;
         END $$;
         CREATE TRIGGER fail_once BEFORE UPDATE ON account_mints FOR EACH ROW
             WHEN (NEW.serial <> OLD.serial) EXECUTE FUNCTION fail_once();
         UPDATE account_mints SET next_attempt_at = now()",
    )
    .await;
    let account = until_mint(&app, "serial", json!(2)).await;
    assert_eq!(account["mint"]["state"], "valid", "{account}");
    assert_eq!((password(&app).await.as_str(), provider.requests.count()), ("minted-2", 2));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_has_one_mint_in_flight(pool: PgPool) {
    let (app, provider) = spawn_with_account(pool).await;
    provider.gate.close();
    let client = app.admin();
    let first = tokio::spawn(async move { client.post(&format!("{PATH}/mint"), &json!({})).await });
    provider.gate.until_waiting(1).await;
    make_due(&app).await;

    let second = app.admin().post(&format!("{PATH}/mint"), &json!({})).await;

    let detail = second.problem(503, "mint-throttled")["detail"].to_string();
    assert!(detail.contains("another mint of the account is in progress"), "{detail}");
    assert_eq!(second.header("retry-after"), "5");
    provider.gate.open();
    assert_eq!(first.await.expect("an answer").expect(200)["mint"]["serial"], 2);
    assert_eq!(provider.requests.count(), 2);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn failure_of_a_requested_mint_is_stored_and_audited_under_its_caller(pool: PgPool) {
    let (app, provider) = spawn_with_account(pool).await;
    let mint = async |status: u16| {
        // A background attempt may be in progress.
        eventually("the mint ends", async || {
            let answer = app.admin().post(&format!("{PATH}/mint"), &json!({})).await;
            (answer.status == status).then_some(())
        })
        .await;
    };
    provider.refuse(Some("403 Forbidden"));

    app.admin().post(&format!("{PATH}/mint"), &json!({})).await.problem(502, "mint-failed");
    mint(502).await;

    let account = app.admin().get(PATH).await.expect(200);
    assert_eq!((&account["mint"]["state"], &account["mint"]["serial"]), (&json!("failing"), &json!(1)));
    assert_eq!(account["mint"]["lastError"]["type"], "denied");
    let events = app.admin().get("/v1/audit-events?action=registryAccount.mintFailed").await.expect(200);
    let events = events["items"].as_array().expect("events");
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!((&events[0]["actor"]["name"], &events[0]["details"]["reason"]), (&json!("admin"), &json!("denied")));
    provider.refuse(None);
    mint(200).await;
    assert_eq!(app.admin().get(PATH).await.expect(200)["mint"]["lastError"], json!(null));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn change_of_a_failing_account_makes_its_next_attempt_due(pool: PgPool) {
    let (app, provider) = spawn_with_account(pool).await;
    let change = async |email: &str| app.admin().patch(PATH, &json!({"email": email})).await.expect(200);
    let before = app.admin().get(PATH).await.expect(200)["mint"].clone();
    assert_eq!(change("a@example.com").await["mint"], before);
    execute(
        &app,
        "UPDATE account_mints SET failures = 9, error_reason = 'denied', error_detail = 'refused',
             next_attempt_at = now() + interval '1 hour'",
    )
    .await;
    assert_eq!(provider.requests.count(), 1);

    let changed = change("b@example.com").await;

    assert_eq!(changed["mint"]["nextAttemptAt"], changed["updatedAt"], "{changed}");
    let account = until_mint(&app, "serial", json!(2)).await;
    assert_eq!((&account["mint"]["state"], provider.requests.count()), (&json!("valid"), 2));
}
