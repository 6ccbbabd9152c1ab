//! Signing in to the web console through an identity provider. The provider is the issuer of the
//! tests of tokens; `make console-test` uses a real one.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use sqlx::PgPool;
use url::Url;

use crate::{
    identity_providers::{issuer::TestIssuer, keys::TestKey},
    sessions::ended,
    support::{app::TestApp, client::Answer, eventually},
    verify::listening::answer,
};

const TOKEN: &str = "/token";
const CANARY: &str = "canary-of-a-client-secret";

/// An app with the provider `corp`, whose group `dev` is a viewer.
struct Corp {
    app: TestApp,
    issuer: TestIssuer,
    key: TestKey,
}

/// What the browser carries between the two requests.
struct Attempt {
    cookie: String,
    query: HashMap<String, String>,
}

fn members(object: Value) -> Map<String, Value> {
    let Value::Object(members) = object else { panic!("an object: {object}") };
    members
}

impl Corp {
    async fn new(pool: PgPool) -> Self {
        let app = TestApp::configured(pool, &[("REGCRED_ISSUER_ALLOW", "127.0.0.0/8")]).await;
        let key = TestKey::p256("one");
        let issuer = TestIssuer::start(&[&key]);
        let body = json!({
            "name": "corp", "type": "oidc", "issuer": issuer.url(), "audience": "unused",
            "rules": [
                {"claims": {"groups": "ops"}, "role": "operator"},
                {"claims": {"groups": "dev"}, "role": "viewer"},
            ],
            "login": {"clientId": "console", "clientSecret": CANARY},
        });
        app.admin().post("/v1/identity-providers", &body).await.expect(201);
        Self { app, issuer, key }
    }

    /// A request of a page of regcred.
    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let request = self.app.anonymous().request(method, path);
        request.header("Sec-Fetch-Site", "same-origin").header("Origin", format!("http://{}", self.app.address))
    }

    async fn start(&self) -> Attempt {
        let request = self.request("POST", "/login").json(&json!({"provider": "corp"}));
        let started = self.app.anonymous().send(request).await;
        let url = started.expect(201)["authorizationUrl"].as_str().expect("a URL").to_owned();
        let query = Url::parse(&url).expect("a URL").query_pairs().into_owned().collect();
        let cookie = started.header("set-cookie").split(';').next().expect("a cookie").to_owned();
        Attempt { cookie, query }
    }

    /// Has the provider answer with an ID token for an attempt.
    fn grant(&self, attempt: &Attempt, more: Value) {
        let mut claims = json!({"aud": "console", "sub": "lena", "nonce": attempt.query["nonce"], "groups": ["dev"]});
        claims.as_object_mut().expect("claims").extend(members(more));
        let body =
            json!({"token_type": "Bearer", "access_token": "x", "id_token": self.issuer.token(&self.key, claims)});
        let json_header = [("Content-Type", "application/json")];
        self.issuer.answer(TOKEN, answer("200 OK", &json_header, &body.to_string()));
    }

    async fn complete(&self, attempt: &Attempt, body: Value) -> Answer {
        let mut complete = json!({"provider": "corp", "code": "the-code", "state": attempt.query["state"]});
        complete.as_object_mut().expect("members").extend(members(body));
        let request = self.request("POST", "/login/complete").header("Cookie", &attempt.cookie);
        self.app.anonymous().send(request.json(&complete)).await
    }

    /// Signs in, and returns the cookie of the session.
    async fn sign_in(&self, claims: Value) -> String {
        let attempt = self.start().await;
        self.grant(&attempt, claims);
        let completed = self.complete(&attempt, json!({})).await;
        completed.expect(201);
        let cookies = completed.headers.get_all("set-cookie").iter();
        let mut cookies = cookies.map(|cookie| cookie.to_str().expect("text"));
        let session = cookies.find(|cookie| cookie.starts_with("regcred=")).expect("a session");
        session.split(';').next().expect("a cookie").to_owned()
    }

    async fn get(&self, cookie: &str, path: &str) -> Answer {
        self.app.anonymous().send(self.request("GET", path).header("Cookie", cookie)).await
    }

    /// Registers a further provider with its own issuer.
    async fn add_provider(&self, name: &str) -> TestIssuer {
        let issuer = TestIssuer::start(&[&self.key]);
        let body = json!({
            "name": name, "type": "oidc", "issuer": issuer.url(), "audience": "unused",
            "rules": [{"claims": {"groups": "dev"}, "role": "viewer"}],
            "login": {"clientId": "console", "clientSecret": "another"},
        });
        self.app.admin().post("/v1/identity-providers", &body).await.expect(201);
        issuer
    }

    async fn change(&self, patch: Value) {
        self.app.admin().patch("/v1/identity-providers/corp", &patch).await.expect(200);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn person_signs_in_with_the_rights_of_the_first_rule(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let offered = corp.app.anonymous().get("/login").await.expect(200);
    assert_eq!(offered, json!({"items": [{"name": "corp"}]}));

    let cookie = corp.sign_in(json!({"groups": ["other", "dev"]})).await;

    let me = corp.get(&cookie, "/v1/me").await.expect(200);
    assert_eq!(
        (&me["type"], &me["name"], &me["role"]),
        (&json!("identityProvider"), &json!("corp/lena"), &json!("viewer"))
    );
    assert_eq!((&me["id"], &me["expiresAt"]), (&Value::Null, &me["session"]["expiresAt"]));
    let created = eventually("the event is sealed", async || {
        let page = corp.app.admin().get("/v1/audit-events?action=session.create").await.expect(200);
        page["items"].as_array().expect("items").first().cloned()
    })
    .await;
    assert_eq!(created["actor"], json!({"type": "identityProvider", "id": null, "name": "corp/lena"}));
    // A session of a person neither reveals passwords nor makes further sessions.
    let post = async |path: &str| {
        let request = corp.request("POST", path).header("Cookie", &cookie);
        corp.app.anonymous().send(request.json(&json!({}))).await
    };
    assert_eq!(post("/v1/docker-configs").await.status, 403);
    post("/v1/sessions").await.problem(403, "session-refused");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn request_to_the_provider_follows_the_code_flow_with_pkce(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let attempt = corp.start().await;
    let expected = [
        ("response_type", "code".to_owned()),
        ("client_id", "console".to_owned()),
        ("redirect_uri", format!("http://{}/console/login/corp", corp.app.address)),
        ("code_challenge_method", "S256".to_owned()),
    ];
    for (name, value) in expected {
        assert_eq!(attempt.query[name], value, "{name}");
    }
    assert!(attempt.query["scope"].split(' ').any(|scope| scope == "openid"));
    assert!(attempt.cookie.starts_with("regcred-login="));
    assert!(!attempt.cookie.contains(&attempt.query["code_challenge"]));
    corp.grant(&attempt, json!({}));
    corp.complete(&attempt, json!({"iss": corp.issuer.url()})).await.expect(201);

    let request = corp.issuer.last_request(TOKEN);
    let (head, body) = request.split_once("\r\n\r\n").expect("a body");
    // `console:canary-of-a-client-secret`
    assert!(head.to_ascii_lowercase().contains("authorization: basic y29uc29sztpjyw5hcnkt"), "{head}");
    let form: HashMap<String, String> = url::form_urlencoded::parse(body.as_bytes()).into_owned().collect();
    assert_eq!((&*form["grant_type"], &*form["code"]), ("authorization_code", "the-code"));
    assert_eq!(form["redirect_uri"], attempt.query["redirect_uri"]);
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, form["code_verifier"].as_bytes());
    let challenge = base64::Engine::encode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, digest);
    assert_eq!(challenge, attempt.query["code_challenge"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn attempt_of_another_browser_is_refused_without_a_call(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let (one, two) = (corp.start().await, corp.start().await);
    corp.grant(&one, json!({}));
    let mixed = Attempt { cookie: two.cookie.clone(), query: one.query.clone() };
    corp.complete(&mixed, json!({})).await.problem(403, "login-refused");
    let none = Attempt { cookie: "other=x".to_owned(), query: one.query.clone() };
    corp.complete(&none, json!({})).await.problem(403, "login-refused");
    corp.complete(&one, json!({"iss": "https://other.example.com"})).await.problem(403, "login-refused");
    assert_eq!(corp.issuer.requests(TOKEN), 0);
    // From another page, and without the browser's statement.
    let body = json!({"provider": "corp", "code": "x", "state": one.query["state"]});
    let foreign = corp.app.anonymous().request("POST", "/login/complete").header("Cookie", &one.cookie).json(&body);
    corp.app.anonymous().send(foreign).await.problem(403, "session-refused");
    let foreign = corp.app.anonymous().request("POST", "/login").header("Sec-Fetch-Site", "cross-site");
    corp.app.anonymous().send(foreign.json(&json!({"provider": "corp"}))).await.problem(403, "session-refused");

    corp.complete(&one, json!({})).await.expect(201);
    assert_eq!(corp.issuer.requests(TOKEN), 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn answer_on_the_page_of_another_provider_is_refused_without_a_call(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let honest = corp.add_provider("honest").await;
    // `corp` sent the browser on to `honest`, which sends it to its own page, with the state of `corp`.
    let attempt = corp.start().await;
    corp.grant(&attempt, json!({}));
    for provider in ["honest", "unknown", "", "corp/", "CORP"] {
        corp.complete(&attempt, json!({"provider": provider})).await.problem(403, "login-refused");
    }
    assert_eq!((corp.issuer.requests(TOKEN), honest.requests(TOKEN)), (0, 0));
    let request = corp.request("POST", "/login/complete").header("Cookie", &attempt.cookie);
    let unnamed = json!({"code": "the-code", "state": attempt.query["state"]});
    corp.app.anonymous().send(request.json(&unnamed)).await.problem(422, "invalid-request");
    corp.complete(&attempt, json!({})).await.expect(201);
    assert_eq!((corp.issuer.requests(TOKEN), honest.requests(TOKEN)), (1, 0));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn failed_sign_ins_of_an_address_end_in_429_without_a_call(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let attempt = corp.start().await;
    // The cookie of an attempt can be sent again, with any code.
    corp.grant(&attempt, json!({"groups": ["other"]}));
    let mut refused = 0;
    let limited = loop {
        let answer = corp.complete(&attempt, json!({})).await;
        if answer.status == 429 {
            break answer;
        }
        answer.problem(403, "no-matching-rule");
        refused += 1;
        assert!(refused < 300, "sign-ins are not limited");
    };
    limited.problem(429, "too-many-attempts");
    assert!(limited.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds > 0));
    assert!(refused >= 30, "{refused}");
    assert_eq!(corp.issuer.requests(TOKEN), refused);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn change_of_issuer_or_client_stops_sign_ins_in_flight(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let elsewhere = TestIssuer::start(&[&corp.key]);
    let login = |client: &str| json!({"clientId": client, "clientSecret": CANARY});
    // The first sign-in fetches the keys of the issuer.
    corp.sign_in(json!({})).await;
    for (change, accepted) in [
        (json!({"rules": [{"claims": {"groups": "dev"}, "role": "operator"}]}), true),
        (json!({"login": login("other")}), false),
        (json!({"issuer": elsewhere.url(), "login": login("console")}), false),
    ] {
        corp.change(json!({"issuer": corp.issuer.url(), "login": login("console")})).await;
        let attempt = corp.start().await;
        corp.grant(&attempt, json!({}));
        let calls = corp.issuer.requests(TOKEN);
        corp.issuer.hold(true);
        let changed = async {
            eventually("the code is exchanged", async || (corp.issuer.requests(TOKEN) > calls).then_some(())).await;
            corp.change(change.clone()).await;
            corp.issuer.hold(false);
        };
        let (completed, ()) = tokio::join!(corp.complete(&attempt, json!({})), changed);
        if accepted {
            completed.expect(201);
            continue;
        }
        let detail = completed.problem(403, "login-refused")["detail"].clone();
        assert_eq!(detail, "people do not sign in through this identity provider", "{change}");
        let sessions = "SELECT count(*) FROM sessions";
        let sessions: i64 = sqlx::query_scalar(sessions).fetch_one(&corp.app.pool).await.expect("a number");
        assert_eq!(sessions, 0, "{change}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn id_token_that_does_not_fit_the_attempt_is_refused(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let other_key = TestKey::p256("one");
    let cases = [
        json!({"nonce": "other"}),
        json!({"nonce": null}),
        json!({"aud": "other"}),
        json!({"aud": ["console", "other"]}),
        json!({"azp": "other"}),
        json!({"iss": "https://issuer.example.com"}),
        json!({"exp": 1}),
        json!({"exp": null}),
        json!({"sub": null}),
        json!({"events": {}}),
    ];
    for claims in cases {
        let attempt = corp.start().await;
        corp.grant(&attempt, claims.clone());
        let refused = corp.complete(&attempt, json!({})).await;
        assert_eq!((refused.status, refused.slug()), (403, "login-refused".to_owned()), "{claims}: {refused:?}");
    }
    let attempt = corp.start().await;
    let claims = json!({"aud": "console", "sub": "lena", "nonce": attempt.query["nonce"], "groups": ["dev"]});
    let forged = json!({"id_token": corp.issuer.token(&other_key, claims)});
    let json_header = [("Content-Type", "application/json")];
    corp.issuer.answer(TOKEN, answer("200 OK", &json_header, &forged.to_string()));
    corp.complete(&attempt, json!({})).await.problem(403, "login-refused");
    // A person without a rule.
    let attempt = corp.start().await;
    corp.grant(&attempt, json!({"groups": ["other"]}));
    corp.complete(&attempt, json!({})).await.problem(403, "no-matching-rule");
    let sessions: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sessions").fetch_one(&corp.app.pool).await.expect("a number");
    assert_eq!(sessions, 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn provider_that_refuses_or_fails_is_told_apart(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let json_header = [("Content-Type", "application/json")];
    for (status, body, expected) in [
        ("400 Bad Request", r#"{"error":"invalid_grant","error_description":"hostile text"}"#, (403, "login-refused")),
        ("401 Unauthorized", r#"{"error":"invalid_client"}"#, (403, "login-refused")),
        ("200 OK", r#"{"access_token":"x"}"#, (503, "issuer-unavailable")),
        ("302 Found", "{}", (503, "issuer-unavailable")),
        ("500 Internal Server Error", "{}", (503, "issuer-unavailable")),
    ] {
        let attempt = corp.start().await;
        corp.issuer.answer(TOKEN, answer(status, &json_header, body));
        let refused = corp.complete(&attempt, json!({})).await;
        assert_eq!((refused.status, &*refused.slug()), expected, "{status}: {refused:?}");
        assert!(!refused.body.contains("hostile"), "{refused:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn change_of_the_provider_applies_to_sessions_at_once(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let cookie = corp.sign_in(json!({})).await;
    let role = async || corp.get(&cookie, "/v1/me").await.json()["role"].clone();
    assert_eq!(role().await, "viewer");
    corp.change(json!({"rules": [{"claims": {"sub": "lena"}, "role": "operator"}]})).await;
    assert_eq!(role().await, "operator");
    corp.change(json!({"rules": [{"claims": {"sub": "mia"}, "role": "operator"}]})).await;
    corp.get(&cookie, "/v1/me").await.problem(401, "unauthenticated");
    corp.change(json!({"rules": [{"claims": {"groups": "dev"}, "role": "viewer"}]})).await;
    assert_eq!(role().await, "viewer");

    // Another secret of the same client keeps sessions; without the client, they end.
    corp.change(json!({"login": {"clientId": "console", "clientSecret": "another"}})).await;
    assert_eq!(role().await, "viewer");
    corp.change(json!({"login": null})).await;
    corp.get(&cookie, "/v1/me").await.problem(401, "unauthenticated");
    assert_eq!(corp.app.anonymous().get("/login").await.expect(200)["items"], json!([]));
    let request = corp.request("POST", "/login").json(&json!({"provider": "corp"}));
    corp.app.anonymous().send(request).await.problem(403, "login-refused");
    corp.change(json!({"login": {"clientId": "console", "clientSecret": "another"}})).await;
    corp.get(&cookie, "/v1/me").await.problem(401, "unauthenticated");

    let cookie = corp.sign_in(json!({})).await;
    assert_eq!(corp.app.admin().delete("/v1/identity-providers/corp").await.status, 204);
    corp.get(&cookie, "/v1/me").await.problem(401, "unauthenticated");
    // One of each session, by the caller that changed or removed the provider.
    let events = ended(&corp.app, 2).await;
    assert_eq!(events.len(), 2, "{events:#?}");
    for event in &events {
        assert_eq!((&event["actor"]["name"], &event["outcome"]), (&json!("admin"), &json!("success")));
        assert_eq!(event["details"]["reason"], "identity-provider-changed");
    }
    assert_ne!(events[0]["resource"], events[1]["resource"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn claims_cannot_be_changed_in_the_database(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let cookie = corp.sign_in(json!({})).await;
    let (claims, subject): (String, String) =
        sqlx::query_as("SELECT claims, subject FROM sessions").fetch_one(&corp.app.pool).await.expect("a session");
    assert_eq!((&*claims, &*subject), (r#"{"groups":["dev"],"sub":"lena"}"#, "lena"));
    let set = async |claims: &str, subject: &str| {
        let update = sqlx::query("UPDATE sessions SET claims = $1, subject = $2").bind(claims).bind(subject);
        update.execute(&corp.app.pool).await.expect("updated");
    };
    for (forged, subject) in [(r#"{"groups":["ops"],"sub":"lena"}"#, "lena"), (&*claims, "mia")] {
        set(forged, subject).await;
        corp.get(&cookie, "/v1/me").await.problem(401, "unauthenticated");
    }
    set(&claims, "lena").await;
    corp.get(&cookie, "/v1/me").await.expect(200);
    let to_key = "UPDATE sessions SET api_key_id = (SELECT id FROM api_keys), identity_provider_id = NULL, \
                  subject = NULL, claims = NULL";
    sqlx::query(to_key).execute(&corp.app.pool).await.expect("updated");
    corp.get(&cookie, "/v1/me").await.problem(401, "unauthenticated");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn person_lists_and_ends_own_sessions_everywhere(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let (one, two) = (corp.sign_in(json!({})).await, corp.sign_in(json!({})).await);
    let other = corp.sign_in(json!({"sub": "mia"})).await;
    let listed = corp.get(&one, "/v1/sessions").await.expect(200);
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(2), "{listed}");
    assert_eq!(listed["items"][0]["owner"], json!({"type": "identityProvider", "name": "corp/lena"}));
    assert_eq!(corp.app.admin().get("/v1/sessions").await.expect(200)["items"], json!([]));
    let all = corp.app.admin().get("/v1/sessions?all=true").await.expect(200);
    let names: Vec<_> = all["items"].as_array().expect("items").iter().map(|item| &item["owner"]["name"]).collect();
    assert_eq!(names, ["corp/mia", "corp/lena", "corp/lena"]);
    let foreign = corp.get(&other, "/v1/me").await.expect(200)["session"]["id"].clone();
    let path = format!("/v1/sessions/{}", foreign.as_str().expect("an id"));
    let request = corp.request("DELETE", &path).header("Cookie", &one);
    corp.app.anonymous().send(request).await.problem(404, "not-found");

    let request = corp.request("DELETE", "/v1/sessions").header("Cookie", &one);
    let ended = corp.app.anonymous().send(request).await;
    assert_eq!((ended.status, ended.headers.get_all("set-cookie").iter().count()), (204, 2));
    for cookie in [&one, &two] {
        corp.get(cookie, "/v1/me").await.problem(401, "unauthenticated");
    }
    corp.get(&other, "/v1/me").await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn client_secret_is_written_and_never_read(pool: PgPool) {
    let corp = Corp::new(pool).await;
    let admin = corp.app.admin();
    let answers = [
        admin.get("/v1/identity-providers/corp").await,
        admin.get("/v1/identity-providers").await,
        admin.patch("/v1/identity-providers/corp", &json!({"audience": "other"})).await,
    ];
    for answer in answers {
        assert!(answer.status == 200 && !answer.body.contains(CANARY), "{answer:?}");
    }
    let view = admin.get("/v1/identity-providers/corp").await.expect(200);
    assert_eq!(view["login"], json!({"clientId": "console"}));
    let (stored, key_id): (Vec<u8>, String) =
        sqlx::query_as("SELECT login_secret, login_secret_key_id FROM identity_providers")
            .fetch_one(&corp.app.pool)
            .await
            .expect("a provider");
    assert!(!String::from_utf8_lossy(&stored).contains(CANARY) && key_id.ends_with("+bound"), "{key_id}");
    // A secret is sent again with a new issuer or CA, so that it is not redirected.
    let elsewhere = json!({"issuer": "https://evil.example.com"});
    let refused = admin.patch("/v1/identity-providers/corp", &elsewhere).await;
    refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["login"]);
    let moved = "UPDATE identity_providers SET issuer = replace(issuer, '127.0.0.1', 'localhost')";
    sqlx::query(moved).execute(&corp.app.pool).await.expect("updated");
    let attempt = corp.app.anonymous().send(corp.request("POST", "/login").json(&json!({"provider": "corp"}))).await;
    assert!(attempt.status >= 400, "{attempt:?}");
    for wrong in [json!({"clientId": "", "clientSecret": "x"}), json!({"clientId": "x", "clientSecret": ""})] {
        let refused = admin.patch("/v1/identity-providers/corp", &json!({"login": wrong})).await;
        refused.problem(422, "invalid-request");
    }
    let mut review = json!({"name": "pods", "type": "tokenReview", "cluster": "dev", "audience": "pods",
        "rules": [{"claims": {"namespace": "a"}, "role": "viewer"}]});
    review["login"] = json!({"clientId": "x", "clientSecret": "x"});
    let refused = admin.post("/v1/identity-providers", &review).await;
    assert!(refused.fields().contains(&"login".to_owned()), "{refused:?}");
}
