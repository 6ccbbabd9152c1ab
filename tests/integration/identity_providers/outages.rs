//! Issuers that are unavailable, slow, rotate keys, or are hostile.

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
async fn unavailable_issuer_affects_only_its_own_tokens(pool: PgPool) {
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
    // A token for another audience is rejected without a call.
    me(&app, &down.token(&key, json!({"aud": "vault"}))).await.problem(401, "invalid-token");
    assert_eq!(
        (counted(&app, "tokens", "unavailable").await, counted(&app, "issuer_key_fetches", "unreachable").await),
        (2, 2)
    );
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn slow_issuer_does_not_delay_other_callers(pool: PgPool) {
    let app = TestApp::configured(pool, &[ALLOW, ("REGCRED_ISSUER_TIMEOUT_SECONDS", "60")]).await;
    let key = TestKey::p256("a");
    let (slow, quick) = (TestIssuer::start(&[&key]), TestIssuer::start(&[&key]));
    slow.hold(true);
    trust(&app, "slow", &slow).await;
    trust(&app, "quick", &quick).await;

    // More requests than worker threads or connections to Postgres.
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
async fn hanging_issuer_times_out(pool: PgPool) {
    let app = TestApp::configured(pool, &[ALLOW, ("REGCRED_ISSUER_TIMEOUT_SECONDS", "1")]).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    issuer.hold(true);
    trust(&app, "ci", &issuer).await;

    let start = Instant::now();
    me(&app, &issuer.token(&key, json!({}))).await.problem(503, "issuer-unavailable");
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    // The next request does not retry immediately.
    me(&app, &issuer.token(&key, json!({}))).await.problem(503, "issuer-unavailable");
    assert_eq!(issuer.requests(DISCOVERY), 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn flood_of_tokens_causes_one_fetch(pool: PgPool) {
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
async fn new_key_is_accepted_after_the_refresh_interval(pool: PgPool) {
    // The keys do not expire during the test: only an unknown key id causes a fetch.
    let variables = [ALLOW, ("REGCRED_ISSUER_REFRESH_SECONDS", "1"), ("REGCRED_ISSUER_KEYS_SECONDS", "3600")];
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
    assert_eq!(issuer.requests(KEYS), 2);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn withdrawn_key_is_rejected_after_the_key_lifetime(pool: PgPool) {
    let variables = [ALLOW, ("REGCRED_ISSUER_REFRESH_SECONDS", "1"), ("REGCRED_ISSUER_KEYS_SECONDS", "2")];
    let app = TestApp::configured(pool, &variables).await;
    let (old, new) = (TestKey::p256("old"), TestKey::rsa("new"));
    let issuer = TestIssuer::start(&[&old, &new]);
    trust(&app, "ci", &issuer).await;
    me(&app, &issuer.token(&old, json!({}))).await.expect(200);

    // No token has an unknown key id, so only the key lifetime causes a fetch.
    issuer.publish(vec![new.jwk()]);
    eventually("the old key is not taken any more", async || {
        (me(&app, &issuer.token(&old, json!({}))).await.status == 401).then_some(())
    })
    .await;
    me(&app, &issuer.token(&new, json!({}))).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cached_keys_are_used_during_an_outage_up_to_the_stale_limit(pool: PgPool) {
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
        // The next round creates an admin key of the same name in the same database.
        let keys = app.admin().get("/v1/api-keys").await.expect(200);
        drop(app);
        sqlx::query("UPDATE api_keys SET revoked_at = now()").execute(&pool).await.expect("revoked");
        assert!(!keys["items"].as_array().expect("items").is_empty());
    }
}

/// Hostile or broken responses of an issuer.
const BAD_RESPONSES: [&str; 14] = [
    "discovery redirects to another issuer",
    "discovery redirects to a private address",
    "keys redirect to another issuer",
    "keys of another server over http",
    "keys of the metadata service",
    "keys in a private network",
    "keys in a file",
    "another issuer's document",
    "no document",
    "HTML in place of the document",
    "too large document",
    "too many bytes of keys",
    "too many keys",
    "keys of the wrong type",
];

fn respond_badly(what: &str, issuer: &TestIssuer, key: &TestKey, elsewhere: &TestIssuer, trap: &Trap) {
    let redirect = |to: String| answer("302 Found", &[("Location", &to)], "");
    let ok = |body: String| answer("200 OK", &[("Content-Type", "application/json")], &body);
    let discovery = |issuer: String, keys: &str| ok(json!({"issuer": issuer, "jwks_uri": keys}).to_string());
    let keys_at = |keys: &str| discovery(issuer.url(), keys);
    let (path, response) = match what {
        "discovery redirects to another issuer" => (DISCOVERY, redirect(format!("{}{DISCOVERY}", elsewhere.url()))),
        "discovery redirects to a private address" => (DISCOVERY, redirect(format!("http://127.0.0.2:{}/", trap.port))),
        "keys redirect to another issuer" => (KEYS, redirect(format!("{}{KEYS}", elsewhere.url()))),
        "keys of another server over http" => (DISCOVERY, keys_at(&format!("{}{KEYS}", elsewhere.url()))),
        "keys of the metadata service" => (DISCOVERY, keys_at("https://169.254.169.254/latest")),
        "keys in a private network" => (DISCOVERY, keys_at("https://10.0.0.1/keys")),
        "keys in a file" => (DISCOVERY, keys_at("file:///etc/passwd")),
        "another issuer's document" => (DISCOVERY, discovery(elsewhere.url(), &format!("{}{KEYS}", issuer.url()))),
        "no document" => (DISCOVERY, answer("404 Not Found", &[], "")),
        "HTML in place of the document" => (DISCOVERY, ok("<html>".to_owned())),
        "too large document" => (DISCOVERY, ok(" ".repeat(65 * 1024))),
        "too many bytes of keys" => {
            let mut jwk = key.jwk();
            jwk["x5c"] = json!(["x".repeat(256 * 1024)]);
            (KEYS, ok(json!({"keys": [jwk]}).to_string()))
        }
        "too many keys" => (KEYS, ok(json!({"keys": vec![key.jwk(); 101]}).to_string())),
        "keys of the wrong type" => (KEYS, ok(json!({"keys": "a"}).to_string())),
        other => panic!("{other}"),
    };
    issuer.answer(path, response);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn bad_responses_of_an_issuer_yield_no_keys(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let (trap, elsewhere) = (Trap::set(), TestIssuer::start(&[&key]));
    for (number, what) in BAD_RESPONSES.into_iter().enumerate() {
        let issuer = TestIssuer::start(&[&key]);
        respond_badly(what, &issuer, &key, &elsewhere, &trap);
        trust(&app, &format!("ci-{number}"), &issuer).await;
        let answer = me(&app, &issuer.token(&key, json!({}))).await;
        assert_eq!((answer.status, answer.slug().as_str()), (503, "issuer-unavailable"), "{what}: {answer:?}");
    }
    assert_eq!((trap.caught(), elsewhere.requests(DISCOVERY), elsewhere.requests(KEYS)), (0, 0, 0));
    // The outbound guard rejects the two responses that lead to private addresses; the other
    // responses are invalid.
    let refused = counted(&app, "issuer_key_fetches", "refused").await;
    assert_eq!((refused, counted(&app, "issuer_key_fetches", "invalid").await), (2, 12));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn private_issuer_is_verified_with_its_ca(pool: PgPool) {
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
async fn issuer_on_a_private_address_is_called_only_if_allowed(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "ci", &issuer).await;

    me(&app, &issuer.token(&key, json!({}))).await.problem(503, "issuer-unavailable");

    assert_eq!((issuer.requests(DISCOVERY), counted(&app, "issuer_key_fetches", "refused").await), (0, 1));
}
