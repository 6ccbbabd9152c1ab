//! Stored sources that this release does not accept, and results of verifications beside mints.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::ALLOW;
use crate::{
    support::{app::TestApp, eventually},
    verify::listening::{answer, serve},
};

const PATH: &str = "/v1/registry-accounts/minted";

/// Starts a token service, and a registry that rejects every login. Returns an account of both.
fn minted_account() -> Value {
    let (tokens, _) = serve(|_| answer("200 OK", &[], r#"{"access_token":"minted","expires_in":3600}"#));
    let (registry, _) = serve(|_| answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], ""));
    json!({
        "name": "minted", "registry": registry.to_string(), "plainHttp": true,
        "source": {
            "type": "oauth2", "tokenUrl": format!("http://{tokens}"), "username": "robot",
            "identity": {"type": "clientSecret", "clientId": "regcred", "clientSecret": "secret"},
        },
    })
}

async fn spawn(pool: PgPool) -> (TestApp, Value) {
    let app = TestApp::configured(pool, ALLOW).await;
    let account = minted_account();
    app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    (app, account)
}

async fn shown(app: &TestApp) -> Value {
    app.admin().get(PATH).await.expect(200)
}

async fn execute(app: &TestApp, sql: &'static str) {
    sqlx::raw_sql(sql).execute(&app.pool).await.expect("a statement");
}

async fn until_serial(app: &TestApp, serial: i64) -> Value {
    eventually("the login is minted", async || {
        let account = shown(app).await;
        (account["mint"]["serial"] == serial).then_some(account)
    })
    .await
}

/// Replaces the stored source, and makes a mint due.
async fn store_source(app: &TestApp, source: &Value) {
    let stored = sqlx::query(
        "UPDATE account_mints
         SET source = $1, error_reason = NULL, error_detail = NULL, failures = 0, next_attempt_at = now()",
    );
    stored.bind(source.to_string()).execute(&app.pool).await.expect("updated");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn source_of_another_release_leaves_its_account_usable(pool: PgPool) {
    let (app, account) = spawn(pool).await;
    let admin = app.admin();
    let with = |path: &str, value: Value| {
        let mut source = account["source"].clone();
        source["identity"].as_object_mut().expect("an object").remove("clientSecret");
        let (parent, name) = path.rsplit_once('/').expect("a path");
        source.pointer_mut(parent).expect("an object")[name] = value;
        source
    };
    let refused_audience = json!({
        "type": "ecr", "region": "eu-central-1", "assumeRole": {"roleArn": "arn:aws:iam::123456789012:role/pull"},
        "identity": {"type": "webIdentity", "cluster": "dev", "namespace": "a", "serviceAccount": "pull",
            "audience": "kubernetes"},
    });
    for (number, source) in [
        with("/newer", json!({"a": 1})),
        with("/identity/newer", json!("a")),
        with("/type", json!("newer")),
        with("/identity/type", json!("newer")),
        refused_audience,
    ]
    .into_iter()
    .enumerate()
    {
        store_source(&app, &source).await;
        let failed = eventually("the mint fails", async || {
            let account = shown(&app).await;
            (account["mint"]["state"] == "failing").then_some(account)
        })
        .await;
        let error = &failed["mint"]["lastError"];
        assert_eq!((&failed["source"], &error["type"]), (&source, &json!("misconfigured")), "{failed}");
        let detail = error["detail"].as_str().expect("a text");
        assert!(detail.contains("set `source` again"), "{detail}");
        let listed = admin.get("/v1/registry-accounts").await.expect(200);
        assert_eq!(listed["items"][0]["source"], source, "{listed}");
        // Unless the background has the mint at this moment.
        let refused = eventually("a requested mint fails", async || {
            let answer = admin.post(&format!("{PATH}/mint"), &json!({})).await;
            (answer.slug() != "mint-throttled").then(|| answer.problem(502, "mint-failed"))
        })
        .await;
        assert!(refused["detail"].as_str().is_some_and(|detail| detail.contains("(misconfigured)")), "{refused}");
        assert_eq!(admin.post(&format!("{PATH}/verify"), &json!({})).await.fields(), ["source"]);
        let labels = json!({"labels": {"number": number.to_string()}});
        assert_eq!(admin.patch(PATH, &labels).await.expect(200)["labels"], labels["labels"]);
        admin.post("/v1/docker-configs", &json!({"accounts": ["minted"]})).await.expect(200);
    }
    // So does a reason of a failure.
    execute(
        &app,
        "UPDATE account_mints SET error_reason = 'newer', error_detail = 'as it is', lease_token = lease_token + 1,
             next_attempt_at = now() + interval '1 day'",
    )
    .await;
    let expected = json!({"type": "misconfigured", "detail": "as it is"});
    assert_eq!(shown(&app).await["mint"]["lastError"], expected);

    let mended = admin.patch(PATH, &json!({"source": account["source"]})).await.expect(200);
    assert_eq!((&mended["mint"]["state"], &mended["source"]["type"]), (&json!("valid"), &json!("oauth2")));
    store_source(&app, &with("/type", json!("newer"))).await;
    assert_eq!(admin.delete(PATH).await.status, 204);
    assert_eq!(app.rows().await[0], 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn minted_login_has_no_result_of_the_earlier_one(pool: PgPool) {
    let (app, _) = spawn(pool).await;
    execute(&app, "UPDATE account_mints SET minted_at = now() - interval '10 minutes'").await;
    let verified = app.admin().post(&format!("{PATH}/verify"), &json!({})).await.expect(200);
    assert_eq!(verified["result"], "invalid", "{verified}");

    // The result asks for another login.
    let account = until_serial(&app, 2).await;
    let result = [&account["lastVerifiedAt"], &account["lastVerificationResult"], &account["lastVerificationDetail"]];
    assert_eq!(result, [&Value::Null; 3], "{account}");

    execute(
        &app,
        "UPDATE registry_accounts
         SET verify_interval_seconds = 2592000, next_verification_at = now() + interval '30 days';
         UPDATE account_mints SET next_attempt_at = now()",
    )
    .await;
    until_serial(&app, 3).await;
    let is_due: bool = sqlx::query_scalar(
        "SELECT next_verification_at <= now() + interval '5 minutes' OR coalesce(last_verified_at > minted_at, false)
         FROM registry_accounts JOIN account_mints ON account_id = id",
    )
    .fetch_one(&app.pool)
    .await
    .expect("a row");
    assert!(is_due, "the new login is verified after an interval only");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn result_that_waited_for_a_mint_is_not_stored(pool: PgPool) {
    let (app, _) = spawn(pool).await;
    // As a mint that is being stored.
    let mut mint = app.pool.begin().await.expect("a transaction");
    for statement in [
        "UPDATE account_mints SET serial = serial + 1, minted_at = now()",
        "UPDATE registry_accounts SET login_changed_at = now()",
    ] {
        sqlx::query(statement).execute(&mut *mint).await.expect("updated");
    }
    let blocking: i32 =
        sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *mint).await.expect("a process id");
    let admin = app.admin();
    let verifying = tokio::spawn(async move { admin.post(&format!("{PATH}/verify"), &json!({})).await });
    eventually("the result waits", async || {
        let waiting = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid)))";
        // Not in the transaction, which would see the same activity each time.
        let is_waiting: bool = sqlx::query_scalar(waiting).bind(blocking).fetch_one(&app.pool).await.expect("a row");
        is_waiting.then_some(())
    })
    .await;
    mint.commit().await.expect("committed");

    assert_eq!(verifying.await.expect("an answer").expect(200)["result"], "invalid");
    let account = shown(&app).await;
    assert_eq!(
        (&account["mint"]["serial"], &account["lastVerificationResult"]),
        (&json!(2), &Value::Null),
        "{account}"
    );
}
