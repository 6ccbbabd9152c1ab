//! Issuers that are away, slow, rotate, or are turned against their host.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use sqlx::PgPool;

use super::{
    ALLOW, bearer, counted,
    issuer::{DISCOVERY, KEYS, TestIssuer},
    keys::TestKey,
    me, spawn, trust,
};
use crate::{
    support::{app::TestApp, eventually, listener::refusing_server},
    verify::{
        certificates::Ca,
        listening::{Trap, answer},
    },
};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_issuer_that_is_down_is_down_for_its_own_tokens_alone(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let (down, up) = (TestIssuer::start(&[&key]), TestIssuer::start(&[&key]));
    down.set_down(true);
    trust(&app, "down", &down).await;
    trust(&app, "up", &up).await;
    let gone = refusing_server();
    let body = json!({
        "name": "gone", "type": "oidc", "issuer": gone, "audience": "regcred",
        "rules": [{"claims": {"sub": "ci"}, "role": "viewer"}],
    });
    app.admin().post("/v1/identity-providers", &body).await.expect(201);

    for issuer in [down.url(), gone] {
        let answer = me(&app, &up.token(&key, json!({"iss": issuer}))).await;
        answer.problem(503, "issuer-unavailable");
        assert_eq!(answer.header("retry-after"), "10");
    }
    me(&app, &up.token(&key, json!({}))).await.expect(200);
    app.admin().get("/v1/registry-accounts").await.expect(200);
    // What cannot be good is refused, and asks nobody.
    me(&app, &down.token(&key, json!({"aud": "vault"}))).await.problem(401, "invalid-token");
    assert_eq!(
        (counted(&app, "tokens", "unavailable").await, counted(&app, "issuer_key_fetches", "unreachable").await),
        (2, 2)
    );
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_issuer_that_is_slow_holds_up_nobody_else(pool: PgPool) {
    let app = TestApp::configured(pool, &[ALLOW, ("REGCRED_ISSUER_TIMEOUT_SECONDS", "60")]).await;
    let key = TestKey::p256("a");
    let (slow, quick) = (TestIssuer::start(&[&key]), TestIssuer::start(&[&key]));
    slow.hold(true);
    trust(&app, "slow", &slow).await;
    trust(&app, "quick", &quick).await;

    // More than there are worker threads or connections to Postgres.
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let client = bearer(&app, &slow.token(&key, json!({})));
            tokio::spawn(async move { client.get("/v1/me").await })
        })
        .collect();
    eventually("the slow issuer is asked", async || (slow.requests(DISCOVERY) == 1).then_some(())).await;
    for _ in 0..10 {
        me(&app, &quick.token(&key, json!({}))).await.expect(200);
        app.admin().get("/v1/registry-accounts").await.expect(200);
    }
    assert!(waiting.iter().all(|request| !request.is_finished()));
    slow.hold(false);

    for request in waiting {
        request.await.expect("an answer").expect(200);
    }
    assert_eq!((slow.requests(DISCOVERY), slow.requests(KEYS)), (1, 1));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_issuer_that_hangs_is_given_up_in_time(pool: PgPool) {
    let app = TestApp::configured(pool, &[ALLOW, ("REGCRED_ISSUER_TIMEOUT_SECONDS", "1")]).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    issuer.hold(true);
    trust(&app, "ci", &issuer).await;

    let start = Instant::now();
    me(&app, &issuer.token(&key, json!({}))).await.problem(503, "issuer-unavailable");
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    // And not tried again by the next one.
    me(&app, &issuer.token(&key, json!({}))).await.problem(503, "issuer-unavailable");
    assert_eq!(issuer.requests(DISCOVERY), 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_flood_of_tokens_makes_one_fetch(pool: PgPool) {
    let app = TestApp::configured(
        pool,
        &[ALLOW, ("REGCRED_ISSUER_REFRESH_SECONDS", "3600"), ("REGCRED_ISSUER_KEYS_SECONDS", "3600")],
    )
    .await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "ci", &issuer).await;

    let good = join_all((0..30).map(|_| async { me(&app, &issuer.token(&key, json!({}))).await.status })).await;
    assert_eq!(good, [200; 30]);
    let unknown =
        |number: usize| key.sign(&json!({"alg": "ES256", "kid": format!("k-{number}")}), &issuer.claims(json!({})));
    let unknown: Vec<String> = (0..25).map(unknown).collect();
    let refused = join_all(unknown.iter().map(|token| async { me(&app, token).await.status })).await;
    assert_eq!(refused, [401; 25]);

    assert_eq!((issuer.requests(DISCOVERY), issuer.requests(KEYS)), (1, 1));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_new_key_is_taken_soon_and_an_old_one_not_for_long(pool: PgPool) {
    let variables = [ALLOW, ("REGCRED_ISSUER_REFRESH_SECONDS", "1"), ("REGCRED_ISSUER_KEYS_SECONDS", "2")];
    let app = TestApp::configured(pool, &variables).await;
    let (old, new) = (TestKey::p256("old"), TestKey::rsa("new"));
    let issuer = TestIssuer::start(&[&old]);
    trust(&app, "ci", &issuer).await;
    me(&app, &issuer.token(&old, json!({}))).await.expect(200);

    issuer.publish(vec![old.jwk(), new.jwk()]);
    eventually("the new key is taken", async || {
        (me(&app, &issuer.token(&new, json!({}))).await.status == 200).then_some(())
    })
    .await;
    me(&app, &issuer.token(&old, json!({}))).await.expect(200);
    // Nobody shows a token of an unknown key: it is the lifetime that tells.
    issuer.publish(vec![new.jwk()]);
    eventually("the old key is not taken any more", async || {
        (me(&app, &issuer.token(&old, json!({}))).await.status == 401).then_some(())
    })
    .await;
    me(&app, &issuer.token(&new, json!({}))).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn keys_that_are_known_are_used_while_their_issuer_is_down_and_not_for_ever(pool: PgPool) {
    let short = [("REGCRED_ISSUER_REFRESH_SECONDS", "1"), ("REGCRED_ISSUER_KEYS_SECONDS", "1"), ALLOW];
    for (stale_seconds, status) in [("86400", 200), ("2", 503)] {
        let variables = [short[0], short[1], short[2], ("REGCRED_ISSUER_STALE_SECONDS", stale_seconds)];
        let app = TestApp::configured(pool.clone(), &variables).await;
        let key = TestKey::p256("a");
        let issuer = TestIssuer::start(&[&key]);
        trust(&app, &format!("ci-{stale_seconds}"), &issuer).await;
        me(&app, &issuer.token(&key, json!({}))).await.expect(200);
        issuer.set_down(true);

        let answer = eventually("the issuer was found to be down", async || {
            let answer = me(&app, &issuer.token(&key, json!({}))).await;
            let failed = counted(&app, "issuer_key_fetches", "unreachable").await;
            (failed >= 3).then_some(answer)
        })
        .await;
        assert_eq!(answer.status, status, "{answer:?}");
        issuer.set_down(false);
        eventually("it is up again", async || {
            (me(&app, &issuer.token(&key, json!({}))).await.status == 200).then_some(())
        })
        .await;
        // The next round has an app of its own on the same database, whose admin has the same name.
        let keys = app.admin().get("/v1/api-keys").await.expect(200);
        drop(app);
        sqlx::query("UPDATE api_keys SET revoked_at = now()").execute(&pool).await.expect("revoked");
        assert!(!keys["items"].as_array().expect("items").is_empty());
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_an_issuer_must_not_answer_gives_no_keys(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let trap = Trap::set();
    let elsewhere = TestIssuer::start(&[&key]);
    let discovery = |issuer: &TestIssuer, keys: &str| {
        answer("200 OK", &[], &json!({"issuer": issuer.url(), "jwks_uri": keys}).to_string())
    };
    let redirect = |to: String| answer("302 Found", &[("Location", &to)], "");
    type Spoil<'a> = Box<dyn Fn(&TestIssuer) + 'a>;
    let spoils: [(&str, Spoil<'_>); 14] = [
        (
            "a discovery document that is elsewhere",
            Box::new(|issuer| issuer.answer(DISCOVERY, redirect(format!("{}{DISCOVERY}", elsewhere.url())))),
        ),
        (
            "a discovery document that is within",
            Box::new(|issuer| issuer.answer(DISCOVERY, redirect(format!("http://127.0.0.2:{}/", trap.port)))),
        ),
        (
            "keys that are elsewhere",
            Box::new(|issuer| issuer.answer(KEYS, redirect(format!("{}{KEYS}", elsewhere.url())))),
        ),
        (
            "keys of another server over http",
            Box::new(|issuer| issuer.answer(DISCOVERY, discovery(issuer, &format!("{}{KEYS}", elsewhere.url())))),
        ),
        (
            "keys of the metadata service",
            Box::new(|issuer| issuer.answer(DISCOVERY, discovery(issuer, "https://169.254.169.254/latest"))),
        ),
        (
            "keys in a private network",
            Box::new(|issuer| issuer.answer(DISCOVERY, discovery(issuer, "https://10.0.0.1/keys"))),
        ),
        ("keys in a file", Box::new(|issuer| issuer.answer(DISCOVERY, discovery(issuer, "file:///etc/passwd")))),
        (
            "another issuer's document",
            Box::new(|issuer| {
                issuer.answer(
                    DISCOVERY,
                    answer(
                        "200 OK",
                        &[],
                        &json!({"issuer": elsewhere.url(), "jwks_uri": format!("{}{KEYS}", issuer.url())}).to_string(),
                    ),
                )
            }),
        ),
        ("no document", Box::new(|issuer| issuer.answer(DISCOVERY, answer("404 Not Found", &[], "")))),
        ("a document that is a page", Box::new(|issuer| issuer.answer(DISCOVERY, answer("200 OK", &[], "<html>")))),
        (
            "a document without end",
            Box::new(|issuer| issuer.answer(DISCOVERY, answer("200 OK", &[], &" ".repeat(65 * 1024)))),
        ),
        (
            "too many bytes of keys",
            Box::new(|issuer| {
                let mut jwk = key.jwk();
                jwk["x5c"] = json!(["x".repeat(256 * 1024)]);
                issuer.publish(vec![jwk]);
            }),
        ),
        ("too many keys", Box::new(|issuer| issuer.publish(vec![key.jwk(); 101]))),
        ("keys that are no keys", Box::new(|issuer| issuer.answer(KEYS, answer("200 OK", &[], r#"{"keys":"a"}"#)))),
    ];
    let count = spoils.len();
    for (number, (what, spoil)) in spoils.into_iter().enumerate() {
        let issuer = TestIssuer::start(&[&key]);
        spoil(&issuer);
        trust(&app, &format!("ci-{number}"), &issuer).await;
        let answer = me(&app, &issuer.token(&key, json!({}))).await;
        assert_eq!((answer.status, answer.slug().as_str()), (503, "issuer-unavailable"), "{what}: {answer:?}");
    }
    assert_eq!((trap.caught(), elsewhere.requests(DISCOVERY), elsewhere.requests(KEYS)), (0, 0, 0));
    let mut failed = 0;
    for result in ["refused", "invalid", "unreachable"] {
        failed += counted(&app, "issuer_key_fetches", result).await;
    }
    assert_eq!(failed, u64::try_from(count).expect("a number"));
    assert_eq!(counted(&app, "issuer_key_fetches", "refused").await, 2);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_private_issuer_is_known_by_its_own_ca(pool: PgPool) {
    let app = spawn(pool).await;
    let (ca, key) = (Ca::new(), TestKey::p384("a"));
    let issuer = TestIssuer::start_tls(&[&key], &ca.certify());
    trust(&app, "ci", &issuer).await;
    let token = issuer.token(&key, json!({}));
    me(&app, &token).await.problem(503, "issuer-unavailable");

    let other_ca = json!({"caCertificate": Ca::new().pem});
    app.admin().patch("/v1/identity-providers/ci", &other_ca).await.expect(200);
    me(&app, &token).await.problem(503, "issuer-unavailable");
    app.admin().patch("/v1/identity-providers/ci", &json!({"caCertificate": ca.pem})).await.expect(200);
    me(&app, &token).await.expect(200);
    app.admin().patch("/v1/identity-providers/ci", &json!({"caCertificate": null})).await.expect(200);
    me(&app, &token).await.problem(503, "issuer-unavailable");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_issuer_within_is_called_only_if_that_is_allowed(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "ci", &issuer).await;

    me(&app, &issuer.token(&key, json!({}))).await.problem(503, "issuer-unavailable");

    assert_eq!((issuer.requests(DISCOVERY), counted(&app, "issuer_key_fetches", "refused").await), (0, 1));
}
