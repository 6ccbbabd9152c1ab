//! Requests that mint: what a dry run does, what happens to changes during a mint, and what copies of
//! minted logins tell.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::token_service::{PATH, TokenService, make_due, spawn, until_mint};
use crate::support::{app::TestApp, event_stream::Stream, eventually, kubernetes};

async fn create(app: &TestApp, provider: &TokenService) -> Value {
    app.admin().post("/v1/registry-accounts", &provider.account()).await.expect(201)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_checks_a_source_and_sends_nothing(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let admin = app.admin();
    let path = "/v1/registry-accounts?dryRun=true&verify=true";
    let tried = admin.post(path, &provider.account()).await.expect(200);
    assert_eq!((&tried["username"], &tried["source"]["type"]), (&json!("robot"), &json!("oauth2")));
    assert_eq!((&tried["mint"], &tried["expiresAt"]), (&Value::Null, &Value::Null));
    let mut wrong = provider.account();
    wrong["source"]["tokenUrl"] = json!("ftp://127.0.0.1");
    assert_eq!(admin.post(path, &wrong).await.fields(), ["source.tokenUrl"]);
    assert_eq!((app.rows().await[0], provider.requests.count()), (0, 0));

    let created = create(&app, &provider).await;
    let source = json!({"source": provider.account()["source"]});
    let tried = admin.patch(&format!("{PATH}?dryRun=true"), &source).await.expect(200);
    assert_eq!((&tried["version"], &tried["mint"]), (&json!(2), &Value::Null));
    let tried = admin.post(&format!("{PATH}/mint?dryRun=true"), &json!({})).await.expect(200);
    assert_eq!(tried["mint"], created["mint"]);
    app.register_account("static", "static.example.com", "dev", "one").await;
    admin.post("/v1/registry-accounts/static/mint?dryRun=true", &json!({})).await.problem(409, "not-minted");
    assert_eq!(provider.requests.count(), 1, "a dry run was sent");
    assert_eq!(admin.get(PATH).await.expect(200), created);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn name_that_is_taken_is_refused_before_or_after_the_mint(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let admin = app.admin();
    provider.gate.close();
    let request = admin.request("POST", "/v1/registry-accounts").json(&provider.account());
    let creating = tokio::spawn({
        let admin = admin.clone();
        async move { admin.send(request).await }
    });
    provider.gate.until_waiting(1).await;
    app.register_account("minted", "static.example.com", "dev", "one").await;
    provider.gate.open();
    creating.await.expect("an answer").problem(409, "name-taken");

    admin.post("/v1/registry-accounts", &provider.account()).await.problem(409, "name-taken");
    assert_eq!(provider.requests.count(), 1, "a taken name was minted for");
    assert_eq!(admin.get(PATH).await.expect(200)["mint"], Value::Null);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn repeated_request_with_an_idempotency_key_mints_once(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let admin = app.admin();
    let send = async |path: &str, key: &str, body: &Value| {
        admin.send(admin.request("POST", path).header("Idempotency-Key", key).json(body)).await
    };
    let created = send("/v1/registry-accounts", "create", &provider.account()).await.expect(201);
    let again = send("/v1/registry-accounts", "create", &provider.account()).await;
    assert_eq!((again.header("idempotency-replayed"), &again.expect(201)), ("true", &created));
    let mint = format!("{PATH}/mint");
    let minted = send(&mint, "mint", &json!({})).await.expect(200);
    assert_eq!(minted["mint"]["serial"], 2);
    assert_eq!(send(&mint, "mint", &json!({})).await.expect(200)["mint"], minted["mint"]);
    assert_eq!(provider.requests.count(), 2);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn mint_on_request_keeps_a_secret_that_was_sealed_again_meanwhile(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    create(&app, &provider).await;
    provider.gate.close();
    let admin = app.admin();
    let minting = tokio::spawn(async move { admin.post(&format!("{PATH}/mint"), &json!({})).await });
    provider.gate.until_waiting(1).await;
    let sealed = "UPDATE account_mints SET secret = '\\x00', secret_key_id = 'other+bound'";
    sqlx::query(sealed).execute(&app.pool).await.expect("sealed again");
    // Another mint does not make the account unknown.
    sqlx::query("UPDATE account_mints SET serial = serial + 1").execute(&app.pool).await.expect("minted");

    provider.gate.open();

    assert_eq!(minting.await.expect("an answer").expect(200)["mint"]["serial"], 3);
    let stored: (Vec<u8>, String) =
        sqlx::query_as("SELECT secret, secret_key_id FROM account_mints").fetch_one(&app.pool).await.expect("a row");
    assert_eq!(stored, (vec![0], "other+bound".to_owned()));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn mint_does_not_reach_another_account_of_the_same_name(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let admin = app.admin();
    let source = json!({"source": provider.account()["source"]});
    for (method, path, body) in [("PATCH", PATH.to_owned(), source), ("POST", format!("{PATH}/mint"), json!({}))] {
        create(&app, &provider).await;
        provider.gate.close();
        let request = admin.request(method, &path).json(&body);
        let minting = tokio::spawn({
            let admin = admin.clone();
            async move { admin.send(request).await }
        });
        provider.gate.until_waiting(1).await;
        assert_eq!(admin.delete(PATH).await.status, 204);
        let other = app.register_account("minted", "other.example.com", "dev", "one").await;
        provider.gate.open();
        minting.await.expect("an answer").problem(412, "stale-version");
        assert_eq!(admin.get(PATH).await.expect(200), other);
        assert_eq!(admin.delete(PATH).await.status, 204);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn copies_of_minted_logins_tell_their_end(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let admin = app.admin();
    let created = admin.post("/v1/registry-accounts", &provider.account()).await.expect(201);
    app.register_account("static", "static.example.com", "dev", "one").await;
    app.register_cluster("dev").await;
    let namespace = kubernetes::new_namespace().await;
    let secrets = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    let codes = |answer: &Value| {
        let warnings = answer["warnings"].as_array().expect("warnings");
        warnings.iter().map(|warning| warning["code"].as_str().expect("a code").to_owned()).collect::<Vec<_>>()
    };
    let until = &created["mint"]["validUntil"];
    let both = json!({"accounts": ["static", "minted"]});
    let rendered = admin.post("/v1/docker-configs", &both).await.expect(200);
    assert_eq!((&rendered["validUntil"], codes(&rendered)), (until, vec!["credentialShortLived".to_owned()]));
    let matching = json!({"match": {"image": "registry.example.com/app"}});
    let matched = admin.post("/v1/docker-configs", &matching).await.expect(200);
    assert_eq!((&matched["validUntil"], codes(&matched)), (until, vec!["credentialShortLived".to_owned()]));
    let delivered = admin.post(&secrets, &json!({"name": "pull", "accounts": ["minted"]})).await.expect(201);
    assert_eq!((&delivered["validUntil"], codes(&delivered)), (until, vec!["credentialShortLived".to_owned()]));
    let manifest = json!({"accounts": ["minted"], "secret": {"name": "pull"}});
    let manifest = admin.post("/v1/docker-configs/manifest", &manifest).await;
    let end: DateTime<Utc> = serde_json::from_value(until.clone()).expect("a time");
    assert!(manifest.header("warning").contains(&end.format("ends at %Y-%m-%dT%H:%M").to_string()), "{manifest:?}");

    let only_static = json!({"accounts": ["static"]});
    let rendered = admin.post("/v1/docker-configs", &only_static).await.expect(200);
    assert_eq!((&rendered["validUntil"], codes(&rendered)), (&Value::Null, vec![]));

    let ended = Utc::now() - TimeDelta::minutes(1);
    sqlx::query("UPDATE account_mints SET valid_until = $1").bind(ended).execute(&app.pool).await.expect("ended");
    // Notifies the row cache, as a mint does.
    sqlx::query("UPDATE registry_accounts SET email = 'a@example.com'").execute(&app.pool).await.expect("notified");
    let expired = eventually("the end is noticed", async || {
        let rendered = admin.post("/v1/docker-configs", &both).await.expect(200);
        (codes(&rendered) == ["credentialExpired"]).then_some(rendered)
    })
    .await;
    assert_eq!(expired["accounts"], json!(["static", "minted"]));
    let shown = admin.get(PATH).await.expect(200);
    assert!(shown["mint"]["state"] == "expired" && codes(&shown).contains(&"credentialExpired".to_owned()), "{shown}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn mints_are_audited_and_on_the_event_stream(pool: PgPool) {
    let (app, provider) = spawn(pool).await;
    let admin = app.admin();
    create(&app, &provider).await;
    let mut stream = Stream::open(&admin, "/v1/events").await;
    assert_eq!(stream.event().await.name, "reset");

    admin.post(&format!("{PATH}/mint"), &json!({})).await.expect(200);
    provider.refuse(Some("401 Unauthorized"));
    make_due(&app).await;
    until_mint(&app, "state", json!("failing")).await;
    // A repeated failure is neither an event of the audit log nor one of the stream.
    make_due(&app).await;
    eventually("the mint fails again", async || {
        let failures: i32 =
            sqlx::query_scalar("SELECT failures FROM account_mints").fetch_one(&app.pool).await.expect("a row");
        (failures >= 2).then_some(())
    })
    .await;
    provider.refuse(Some("403 Forbidden"));
    until_denied(&app).await;

    let minted = admin.get("/v1/audit-events?action=registryAccount.mint").await.expect(200);
    let minted = &minted["items"][0];
    assert_eq!((&minted["outcome"], &minted["details"]["serial"]), (&json!("success"), &json!(2)), "{minted}");
    let failed = admin.get("/v1/audit-events?action=registryAccount.mintFailed").await.expect(200);
    let failed = failed["items"].as_array().expect("events").iter();
    let failed: Vec<_> = failed.map(|event| (&event["outcome"], &event["details"]["reason"])).collect();
    let failure = json!("failure");
    assert_eq!(failed, [(&failure, &json!("denied")), (&failure, &json!("invalidIdentity"))]);
    for _ in ["mint", "invalidIdentity", "denied"] {
        let event = stream.event().await;
        assert_eq!((event.name.as_str(), &event.data["name"]), ("registryAccount", &json!("minted")), "{event:?}");
        assert_eq!((&event.data["change"], &event.data["version"]), (&json!("changed"), &json!(1)), "{event:?}");
    }
}

/// Makes mints due until one is denied. An attempt that began earlier ends otherwise.
async fn until_denied(app: &TestApp) {
    eventually("a mint is denied", async || {
        make_due(app).await;
        let account = app.admin().get(PATH).await.expect(200);
        (account["mint"]["lastError"]["type"] == "denied").then_some(())
    })
    .await;
}
