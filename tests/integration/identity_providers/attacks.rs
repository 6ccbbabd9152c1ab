//! Valid tokens, and forged ones.

use aws_lc_rs::hmac;
use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use chrono::Utc;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    ALLOW, counted,
    issuer::{KEYS, TestIssuer},
    keys::{TestKey, unsigned},
    me, spawn, trust,
};
use crate::support::app::TestApp;

const REFUSAL: &str = "the token is rejected: its issuer, audience, signature or time is not accepted";

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_supported_algorithm_authenticates(pool: PgPool) {
    let app = spawn(pool).await;
    let (rsa, p256, p384, ed25519) =
        (TestKey::rsa("rsa"), TestKey::p256("p256"), TestKey::p384("p384"), TestKey::ed25519("ed"));
    let issuer = TestIssuer::start(&[&rsa, &p256, &p384, &ed25519]);
    trust(&app, "ci", &issuer).await;

    for (algorithm, key) in [
        ("RS256", &rsa),
        ("RS384", &rsa),
        ("RS512", &rsa),
        ("PS256", &rsa),
        ("PS384", &rsa),
        ("PS512", &rsa),
        ("ES256", &p256),
        ("ES384", &p384),
        ("EdDSA", &ed25519),
    ] {
        let claims = issuer.claims(json!({}));
        let token = key.sign(&json!({"alg": algorithm, "kid": key.id}), &claims);
        let me = me(&app, &token).await.expect(200);
        assert_eq!(
            (&me["type"], &me["id"], &me["name"]),
            (&json!("identityProvider"), &Value::Null, &json!("ci/ci")),
            "{algorithm}"
        );
        let everything = json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]});
        assert_eq!((&me["role"], &me["grants"]), (&json!("viewer"), &everything));
        let ends: chrono::DateTime<Utc> = serde_json::from_value(me["expiresAt"].clone()).expect("a time");
        assert_eq!(ends.timestamp(), claims["exp"].as_i64().expect("a number"));
    }
    assert_eq!(issuer.requests(KEYS), 1);
    assert_eq!((counted(&app, "tokens", "accepted").await, counted(&app, "issuer_key_fetches", "ok").await), (9, 1));
}

fn keyed_hash(header: &Value, claims: &Value, secret: &[u8]) -> String {
    let text = unsigned(header, claims);
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), text.as_bytes());
    format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag))
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_invalid_token_is_rejected_with_the_same_message(pool: PgPool) {
    let hour = "3600";
    let variables = [ALLOW, ("REGCRED_ISSUER_REFRESH_SECONDS", hour), ("REGCRED_ISSUER_KEYS_SECONDS", hour)];
    let app = TestApp::configured(pool, &variables).await;
    let (rsa, p256, foreign) = (TestKey::rsa("rsa"), TestKey::p256("p256"), TestKey::rsa("rsa"));
    let pss_only = TestKey::rsa("pss");
    let issuer = TestIssuer::start(&[&rsa, &p256]);
    let mut pss_jwk = pss_only.jwk();
    pss_jwk["alg"] = json!("PS256");
    issuer.publish(vec![rsa.jwk(), p256.jwk(), pss_jwk]);
    let other = TestIssuer::start(&[&foreign]);
    trust(&app, "ci", &issuer).await;
    let now = Utc::now().timestamp();
    let good = issuer.token(&rsa, json!({}));
    let claims = issuer.claims(json!({}));
    let header = json!({"alg": "RS256", "kid": "rsa"});
    let hs256 = json!({"alg": "HS256", "kid": "rsa"});
    let pem = format!(
        "-----BEGIN RSA PUBLIC KEY-----\n{}\n-----END RSA PUBLIC KEY-----\n",
        BASE64_STANDARD.encode(rsa.public_der())
    );
    let (start, signature) = good.rsplit_once('.').expect("a token");
    let (head, _) = start.split_once('.').expect("a token");
    let other_payload = BASE64_URL_SAFE_NO_PAD.encode(issuer.claims(json!({"sub": "ci", "admin": true})).to_string());
    let with_own_key =
        json!({"alg": "RS256", "kid": "rsa", "jwk": foreign.jwk(), "jku": format!("{}{KEYS}", other.url())});

    let bad = [
        ("expired", issuer.token(&rsa, json!({"exp": now - 1}))),
        ("without an end", issuer.token(&rsa, json!({"exp": null}))),
        ("not yet", issuer.token(&rsa, json!({"nbf": now + 120}))),
        ("made in the future", issuer.token(&rsa, json!({"iat": now + 120}))),
        ("for others", issuer.token(&rsa, json!({"aud": "vault"}))),
        ("for others in a list", issuer.token(&rsa, json!({"aud": ["vault", "sts"]}))),
        ("without an audience", issuer.token(&rsa, json!({"aud": null}))),
        ("of an unknown issuer", other.token(&foreign, json!({}))),
        ("of an issuer with a slash", issuer.token(&rsa, json!({"iss": format!("{}/", issuer.url())}))),
        (
            "of an issuer that no database can hold",
            issuer.token(&rsa, json!({"iss": format!("{}\u{0}", issuer.url())})),
        ),
        ("for an audience that no database can hold", issuer.token(&rsa, json!({"aud": "regcred\u{0}"}))),
        ("of another issuer's key", foreign.sign(&header, &claims)),
        ("with its own key in the header", foreign.sign(&with_own_key, &claims)),
        ("alg none", format!("{}.", unsigned(&json!({"alg": "none", "kid": "rsa"}), &claims))),
        (
            "alg nOnE and a signature",
            format!("{}.{signature}", unsigned(&json!({"alg": "nOnE", "kid": "rsa"}), &claims)),
        ),
        ("HS256 with the public key as DER", keyed_hash(&hs256, &claims, &rsa.public_der())),
        ("HS256 with the public key as PEM", keyed_hash(&hs256, &claims, pem.as_bytes())),
        ("HS256 with the public key as JWK", keyed_hash(&hs256, &claims, rsa.jwk().to_string().as_bytes())),
        ("ES256 of an RSA key", p256.sign(&json!({"alg": "ES256", "kid": "rsa"}), &claims)),
        ("RS256 of an EC key", rsa.sign(&json!({"alg": "RS256", "kid": "p256"}), &claims)),
        ("RS256 of a key for PS256", pss_only.sign(&json!({"alg": "RS256", "kid": "pss"}), &claims)),
        ("an unknown key", rsa.sign(&json!({"alg": "RS256", "kid": "other"}), &claims)),
        ("no key among many", rsa.sign(&json!({"alg": "RS256"}), &claims)),
        ("a critical header", rsa.sign(&json!({"alg": "RS256", "kid": "rsa", "crit": ["exp"]}), &claims)),
        ("another payload", format!("{head}.{other_payload}.{signature}")),
        ("no signature", format!("{start}.")),
        ("too long", issuer.token(&rsa, json!({"x": "x".repeat(20_000)}))),
        ("no token", "a.b.c".to_owned()),
    ];
    let last = bad.len();
    for (what, token) in bad {
        let answer = me(&app, &token).await;
        let problem = answer.problem(401, "invalid-token");
        assert_eq!(problem["detail"], REFUSAL, "{what}");
        assert_eq!(answer.header("www-authenticate"), "Bearer realm=\"regcred\", error=\"invalid_token\"", "{what}");
    }
    me(&app, &good).await.expect(200);
    me(&app, &pss_only.sign(&json!({"alg": "PS256", "kid": "pss"}), &claims)).await.expect(200);

    // One fetch of the keys: the unknown key id causes no second one within the refresh interval,
    // and no other server is called.
    assert_eq!((issuer.requests(KEYS), other.requests(KEYS)), (1, 0));
    let mut refused = 0;
    for outcome in
        ["malformed", "expired", "early", "unknownProvider", "algorithm", "unknownKey", "signature", "notVouchedFor"]
    {
        refused += counted(&app, "tokens", outcome).await;
    }
    assert_eq!(refused, u64::try_from(last).expect("a number"));
    assert_eq!((counted(&app, "tokens", "algorithm").await, counted(&app, "tokens", "unknownKey").await), (5, 5));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn invalid_tokens_are_rate_limited_and_valid_ones_are_not(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::ed25519("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "ci", &issuer).await;

    let bad = issuer.token(&key, json!({"aud": "vault"}));
    let mut answer = me(&app, &bad).await;
    for _ in 0..40 {
        if answer.status != 401 {
            break;
        }
        answer = me(&app, &bad).await;
    }

    answer.problem(429, "too-many-attempts");
    assert!(answer.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds >= 1), "{answer:?}");
    me(&app, &issuer.token(&key, json!({}))).await.expect(200);
    app.admin().get("/v1/me").await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_without_key_id_is_accepted_if_the_issuer_has_one_key(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::rsa("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "ci", &issuer).await;

    me(&app, &key.sign(&json!({"alg": "RS256"}), &issuer.claims(json!({})))).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_with_several_audiences_is_rejected_unless_the_provider_allows_it(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "ci", &issuer).await;
    let provider = "/v1/identity-providers/ci";
    let shared = issuer.token(&key, json!({"aud": ["vault", "regcred"]}));

    me(&app, &shared).await.problem(401, "invalid-token");
    assert_eq!((counted(&app, "tokens", "audiences").await, issuer.requests(KEYS)), (1, 0));
    me(&app, &issuer.token(&key, json!({"aud": ["regcred"]}))).await.expect(200);

    assert_eq!(app.admin().get(provider).await.expect(200)["allowMultipleAudiences"], false);
    let changed = app.admin().patch(provider, &json!({"allowMultipleAudiences": true})).await.expect(200);
    assert_eq!(changed["allowMultipleAudiences"], true);
    me(&app, &shared).await.expect(200);
    me(&app, &issuer.token(&key, json!({"aud": "regcred2"}))).await.problem(401, "invalid-token");
    me(&app, &issuer.token(&key, json!({"aud": ["vault", "regcred2"]}))).await.problem(401, "invalid-token");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_for_another_purpose_is_rejected_unless_the_provider_accepts_it(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "ci", &issuer).await;
    let provider = "/v1/identity-providers/ci";
    let typed = |token_type: &str, more: Value| {
        let header = json!({"alg": key.algorithm(), "typ": token_type, "kid": key.id});
        key.sign(&header, &issuer.claims(more))
    };
    let events = json!({"events": {"http://schemas.openid.net/event/backchannel-logout": {}}});

    for token in [typed("logout+jwt", json!({})), typed("application/Logout+JWT", events.clone()), typed("JWT", events)]
    {
        me(&app, &token).await.problem(401, "invalid-token");
    }
    assert_eq!((counted(&app, "tokens", "tokenType").await, issuer.requests(KEYS)), (3, 0));
    me(&app, &typed("at+jwt", json!({}))).await.expect(200);

    for refused in [json!(["JWT"]), json!([""]), json!(["at+jwt"]), json!(vec!["a+jwt"; 11])] {
        let answer = app.admin().patch(provider, &json!({"tokenTypes": refused})).await;
        assert_eq!((answer.status, answer.fields()), (422, vec!["tokenTypes".to_owned()]), "{refused}");
    }
    let changed = app.admin().patch(provider, &json!({"tokenTypes": ["Logout+JWT"]})).await.expect(200);
    assert_eq!(changed["tokenTypes"], json!(["logout+jwt"]));
    me(&app, &typed("logout+jwt", json!({}))).await.expect(200);
    me(&app, &typed("secevent+jwt", json!({}))).await.problem(401, "invalid-token");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn control_characters_in_a_subject_are_escaped(pool: PgPool) {
    let app = spawn(pool).await;
    let key = TestKey::p256("a");
    let issuer = TestIssuer::start(&[&key]);
    let rules = json!([{"claims": {"project_id": "42"}, "role": "viewer"}]);
    super::trust_with(&app, "ci", &issuer, rules).await;

    let sub = format!("a\nb\u{1b}[2J{}", "x".repeat(1000));
    let me = me(&app, &issuer.token(&key, json!({"sub": sub, "project_id": 42}))).await.expect(200);

    let name = me["name"].as_str().expect("a name");
    assert!(name.starts_with("ci/a\\u{a}b\\u{1b}[2Jxxx") && name.chars().count() < 260, "{name}");
}
