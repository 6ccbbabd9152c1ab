//! Sessions of the web console: the cookie, the requests it is accepted for, and its end.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    client::{Answer, Client},
    eventually,
};

/// A signed-in browser.
struct Browser {
    client: Client,
    cookie: String,
    id: String,
    /// Page that makes its requests.
    page: String,
}

impl Browser {
    /// Signs in with the key of a client, on a page that was loaded from a loopback address.
    async fn sign_in(app: &TestApp, caller: &Client) -> Self {
        let request = caller.request("POST", "/v1/sessions").header("Origin", format!("http://{}", app.address));
        let answer = caller.send(request).await;
        let created = answer.expect(201);
        let cookie = answer.header("set-cookie").split(';').next().expect("a cookie").to_owned();
        let id = created["id"].as_str().expect("an id").to_owned();
        Self { client: app.anonymous(), cookie, id, page: page(app) }
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, path).header("Cookie", &self.cookie);
        request.header("Sec-Fetch-Site", "same-origin").header("Referer", &self.page)
    }

    async fn get(&self, path: &str) -> Answer {
        self.client.send(self.request("GET", path)).await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.client.send(self.request("POST", path).json(body)).await
    }

    async fn delete(&self, path: &str) -> Answer {
        self.client.send(self.request("DELETE", path)).await
    }
}

/// Page of the console of an app.
fn page(app: &TestApp) -> String {
    format!("http://{}/console/", app.address)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn session_acts_for_its_key_until_that_is_revoked(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let grants = json!({"accounts": ["team-*"], "clusters": ["dev"], "namespaces": ["a-*"]});
    let operator = app.caller("ops", "operator", Some(grants.clone())).await;
    let browser = Browser::sign_in(&app, &operator).await;

    let me = browser.get("/v1/me").await.expect(200);
    assert_eq!((&me["name"], &me["role"], &me["grants"]), (&json!("ops"), &json!("operator"), &grants));
    assert_eq!((&me["session"]["id"], &me["session"]["current"]), (&json!(browser.id), &json!(true)));
    let account = json!({"name": "team-a", "registry": "r.example.com", "username": "dev", "password": "one"});
    browser.post("/v1/registry-accounts", &account).await.expect(201);
    let foreign = json!({"name": "other", "registry": "r.example.com", "username": "dev", "password": "one"});
    browser.post("/v1/registry-accounts", &foreign).await.problem(403, "forbidden");
    let events = app.admin().get("/v1/audit-events?resource=registry-accounts/team-a").await.expect(200);
    assert_eq!(events["items"][0]["actor"]["name"], "ops");

    assert_eq!(app.admin().delete("/v1/api-keys/ops").await.status, 204);
    browser.get("/v1/me").await.problem(401, "unauthenticated");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cookie_is_only_for_the_browser_and_this_host(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let sign_in = async |origin: &str| {
        app.admin().send(app.admin().request("POST", "/v1/sessions").header("Origin", origin)).await
    };
    let secure = sign_in("https://regcred.example.com").await;
    secure.expect(201);
    let attributes = "; Path=/; HttpOnly; Secure; SameSite=Strict";
    let cookie = secure.header("set-cookie");
    assert!(cookie.starts_with("__Host-regcred=") && cookie.ends_with(attributes), "{cookie}");
    let loopback = sign_in("http://127.0.0.1:8080").await;
    loopback.expect(201);
    let cookie = loopback.header("set-cookie");
    assert!(cookie.starts_with("regcred=") && cookie.ends_with("; Path=/; HttpOnly; SameSite=Strict"), "{cookie}");
    assert!(!loopback.body.contains(cookie.split(['=', ';']).nth(1).expect("a token")));
    sign_in("http://regcred.example.com").await.problem(403, "session-refused");

    let stored: Vec<Vec<u8>> =
        sqlx::query_scalar("SELECT mac FROM sessions").fetch_all(&app.pool).await.expect("sessions");
    assert_eq!(stored.iter().map(Vec::len).collect::<Vec<_>>(), [32, 32]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn session_is_accepted_from_own_pages_with_json_only(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let browser = Browser::sign_in(&app, &app.admin()).await;
    for site in ["cross-site", "same-site", "none"] {
        let request =
            app.anonymous().request("GET", "/v1/me").header("Cookie", &browser.cookie).header("Referer", page(&app));
        app.anonymous().send(request.header("Sec-Fetch-Site", site)).await.problem(403, "session-refused");
    }
    let request =
        app.anonymous().request("GET", "/v1/me").header("Cookie", &browser.cookie).header("Referer", page(&app));
    app.anonymous().send(request).await.problem(403, "session-refused");
    for media in ["text/plain", "application/x-www-form-urlencoded", "application/yaml"] {
        let request = browser.request("POST", "/v1/registry-accounts:import").header("Content-Type", media);
        app.anonymous().send(request.body("auths: {}")).await.problem(403, "session-refused");
    }
    browser
        .post("/v1/registry-accounts:import", &json!({"auths": {"r.example.com": {"auth": "YTpi"}}}))
        .await
        .expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn session_reveals_no_password_and_makes_no_session(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "r.example.com", "dev", "canary-password").await;
    let browser = Browser::sign_in(&app, &app.admin()).await;
    let render = json!({"accounts": ["a"]});
    let manifest = json!({"accounts": ["a"], "secret": {"name": "pull"}});
    for (path, body) in [("/v1/docker-configs", &render), ("/v1/docker-configs/manifest", &manifest)] {
        let refused = browser.post(path, body).await;
        refused.problem(403, "session-refused");
        app.admin().post(path, body).await.expect(200);
    }
    browser.post("/v1/sessions", &json!({})).await.problem(403, "session-refused");
    let me = browser.get("/v1/me").await.expect(200);
    let permissions = me["permissions"].as_array().expect("permissions");
    assert!(!permissions.contains(&json!("revealCredentials")) && permissions.contains(&json!("writeApiKeys")));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn session_ends_when_it_is_idle_or_old(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let set = async |sql: &'static str| sqlx::query(sql).execute(&app.pool).await.expect("updated");
    let browser = Browser::sign_in(&app, &app.admin()).await;
    set("UPDATE sessions SET last_used_at = now() - interval '29 minutes'").await;
    browser.get("/v1/me").await.expect(200);
    let idle: bool = sqlx::query_scalar("SELECT last_used_at < now() - interval '1 minute' FROM sessions")
        .fetch_one(&app.pool)
        .await
        .expect("a session");
    assert!(!idle, "a request postpones the end");
    set("UPDATE sessions SET last_used_at = now() - interval '31 minutes'").await;
    browser.get("/v1/me").await.problem(401, "unauthenticated");
    assert_eq!(app.admin().get("/v1/sessions").await.expect(200)["items"], json!([]));

    let browser = Browser::sign_in(&app, &app.admin()).await;
    set("UPDATE sessions SET created_at = now() - interval '479 minutes'").await;
    browser.get("/v1/me").await.expect(200);
    set("UPDATE sessions SET created_at = now() - interval '481 minutes'").await;
    browser.get("/v1/me").await.problem(401, "unauthenticated");
    Browser::sign_in(&app, &app.admin()).await;
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM sessions").fetch_one(&app.pool).await.expect("a number");
    assert_eq!(rows, 1, "a new session deletes old ones");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn refused_request_does_not_postpone_the_end_of_a_session(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let operator = app.caller("ops", "operator", None).await;
    let browser = Browser::sign_in(&app, &operator).await;
    let idle = "UPDATE sessions SET last_used_at = now() - interval '10 minutes'";
    sqlx::query(idle).execute(&app.pool).await.expect("updated");
    let is_idle = async || -> bool {
        let idle = sqlx::query_scalar("SELECT last_used_at < now() - interval '9 minutes' FROM sessions");
        idle.fetch_one(&app.pool).await.expect("a session")
    };
    let mut guess = browser.cookie.clone();
    let last = guess.pop().expect("a digit");
    guess.push(if last == '0' { '1' } else { '0' });
    let request = app.anonymous().request("GET", "/v1/me").header("Cookie", &guess).header("Referer", page(&app));
    let refused = app.anonymous().send(request.header("Sec-Fetch-Site", "same-origin")).await;
    refused.problem(401, "unauthenticated");
    assert!(is_idle().await, "the secret is wrong");
    assert_eq!(app.admin().delete("/v1/api-keys/ops").await.status, 204);
    browser.get("/v1/me").await.problem(401, "unauthenticated");
    assert!(is_idle().await, "its key is revoked");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cookie_without_prefix_is_refused_behind_a_proxy(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_HTTP_TRUSTED_PROXIES", "10.0.0.1")]).await;
    let sign_in = async |origin: &str| {
        app.admin().send(app.admin().request("POST", "/v1/sessions").header("Origin", origin)).await
    };
    sign_in("http://127.0.0.1:8080").await.problem(403, "session-refused");
    let created = sign_in("https://regcred.example.com").await;
    let token = created.header("set-cookie").split(['=', ';']).nth(1).expect("a token");
    let me = async |name: &str| {
        let request = app.anonymous().request("GET", "/v1/me").header("Cookie", format!("{name}={token}"));
        let request = request.header("Referer", page(&app));
        app.anonymous().send(request.header("Sec-Fetch-Site", "same-origin")).await
    };
    me("regcred").await.problem(401, "unauthenticated");
    me("__Host-regcred").await.expect(200);
}

/// The proxy rewrites `Host` and states nothing of itself; the browser states the page.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cookie_without_prefix_is_refused_behind_a_silent_proxy(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let browser = Browser::sign_in(&app, &app.admin()).await;
    let through_proxy = Browser { page: "https://regcred.example.com/console/".to_owned(), ..browser };

    through_proxy.get("/v1/me").await.problem(401, "unauthenticated");

    Browser { page: page(&app), ..through_proxy }.get("/v1/me").await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn session_is_listed_and_ended_by_its_key(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let replica = TestApp::beside(&app).await;
    let viewer = app.caller("view", "viewer", None).await;
    let (one, two) = (Browser::sign_in(&app, &app.admin()).await, Browser::sign_in(&app, &app.admin()).await);
    let other = Browser::sign_in(&app, &viewer).await;

    let listed = one.get("/v1/sessions").await.expect(200);
    let ids: Vec<_> = listed["items"].as_array().expect("items").iter().map(|item| &item["id"]).collect();
    assert_eq!(ids, [&json!(two.id), &json!(one.id)]);
    assert_eq!((&listed["items"][0]["current"], &listed["items"][1]["current"]), (&json!(false), &json!(true)));
    other.delete(&format!("/v1/sessions/{}", one.id)).await.problem(404, "not-found");
    app.admin().delete("/v1/sessions/current").await.problem(404, "not-found");

    assert_eq!(one.delete(&format!("/v1/sessions/{}", two.id)).await.status, 204);
    let request =
        replica.anonymous().request("GET", "/v1/me").header("Cookie", &two.cookie).header("Referer", page(&replica));
    replica.anonymous().send(request.header("Sec-Fetch-Site", "same-origin")).await.problem(401, "unauthenticated");
    let out = one.delete("/v1/sessions/current").await;
    assert_eq!(out.status, 204);
    assert_eq!(out.headers.get_all("set-cookie").iter().count(), 2);
    one.get("/v1/me").await.problem(401, "unauthenticated");
    other.get("/v1/me").await.expect(200);

    let actions = ended(&app, 2).await;
    assert!(actions.iter().all(|event| event["actor"]["name"] == "admin"), "{actions:?}");
    assert_eq!(actions[1]["resource"], format!("sessions/{}", two.id));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn seventeenth_session_of_a_key_ends_the_oldest(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let first = Browser::sign_in(&app, &app.admin()).await;
    let second = Browser::sign_in(&app, &app.admin()).await;
    for _ in 0..15 {
        Browser::sign_in(&app, &app.admin()).await;
    }
    first.get("/v1/me").await.problem(401, "unauthenticated");
    second.get("/v1/me").await.expect(200);
    let [event] = &ended(&app, 1).await[..] else { panic!("one event") };
    assert_eq!(event["resource"], format!("sessions/{}", first.id), "{event:#}");
    assert_eq!((&event["actor"]["name"], &event["outcome"]), (&json!("admin"), &json!("success")));
    assert_eq!(event["details"]["reason"], "too-many-sessions");
}

/// Events of ended sessions, once there are that many.
pub async fn ended(app: &TestApp, count: usize) -> Vec<Value> {
    eventually("the events are sealed", async || {
        let page = app.admin().get("/v1/audit-events?action=session.end").await.expect(200);
        let items = page["items"].as_array().expect("items").clone();
        (items.len() >= count).then_some(items)
    })
    .await
}

/// It ended by itself, without an event.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn idle_session_that_a_sign_in_deletes_has_no_event(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for _ in 0..2 {
        Browser::sign_in(&app, &app.admin()).await;
    }
    let idle = "UPDATE sessions SET last_used_at = now() - interval '31 minutes' WHERE id = (
        SELECT id FROM sessions ORDER BY created_at LIMIT 1)";
    sqlx::query(idle).execute(&app.pool).await.expect("updated");
    for _ in 0..16 {
        Browser::sign_in(&app, &app.admin()).await;
    }

    assert_eq!(ended(&app, 1).await.len(), 1);
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM sessions").fetch_one(&app.pool).await.expect("a number");
    assert_eq!(rows, 16);
}

/// A writer of the database has no pepper, so it cannot make a session for another key.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn row_that_names_another_key_is_no_session(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let viewer = app.caller("view", "viewer", None).await;
    let browser = Browser::sign_in(&app, &viewer).await;
    browser.get("/v1/me").await.expect(200);

    sqlx::query("UPDATE sessions SET api_key_id = (SELECT id FROM api_keys WHERE name = 'admin')")
        .execute(&app.pool)
        .await
        .expect("updated");

    browser.get("/v1/me").await.problem(401, "unauthenticated");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn event_stream_ends_with_its_session(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let browser = Browser::sign_in(&app, &app.admin()).await;
    let mut stream = browser.request("GET", "/v1/events").send().await.expect("a stream");
    assert_eq!(stream.status(), 200);
    assert_eq!(browser.delete("/v1/sessions/current").await.status, 204);

    let mut text = String::new();
    while let Some(chunk) = stream.chunk().await.expect("a chunk") {
        text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
    }

    assert!(text.contains(r#"{"reason":"unauthenticated"}"#), "{text}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn console_has_its_policy_and_a_page_for_every_path(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for path in ["/console/", "/console/accounts?q=a", "/console/pull-secrets/team-a"] {
        let page = app.anonymous().get(path).await;
        assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"), "{path}");
        let policy = page.header("content-security-policy");
        assert!(policy.contains("require-trusted-types-for 'script'") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(page.header("cache-control"), "no-store");
        // Its requests state the page to regcred.
        assert_eq!(page.header("referrer-policy"), "same-origin");
    }
    for missing in
        ["/console/assets/none.js", "/console/assets/..%2f..%2f..%2fCargo.toml", "/console/assets/none.js.br"]
    {
        app.anonymous().get(missing).await.problem(404, "not-found");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn admin_lists_and_ends_the_sessions_of_others(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (viewer, operator) = (app.caller("view", "viewer", None).await, app.caller("ops", "operator", None).await);
    let browser = Browser::sign_in(&app, &viewer).await;
    let admin = Browser::sign_in(&app, &app.admin()).await;

    let listed = admin.get("/v1/sessions?all=true").await.expect(200);
    let owners: Vec<_> = listed["items"].as_array().expect("items").iter().map(|item| &item["owner"]).collect();
    let of = |name: &str| json!({"type": "apiKey", "name": name});
    assert_eq!(owners, [&of("admin"), &of("view")]);
    assert_eq!(admin.get("/v1/sessions").await.expect(200)["items"].as_array().map(Vec::len), Some(1));
    operator.get("/v1/sessions?all=true").await.problem(403, "forbidden");
    browser.get("/v1/sessions?all=true").await.problem(403, "forbidden");
    operator.delete(&format!("/v1/sessions/{}", browser.id)).await.problem(404, "not-found");

    assert_eq!(admin.delete(&format!("/v1/sessions/{}", browser.id)).await.status, 204);
    browser.get("/v1/me").await.problem(401, "unauthenticated");
    admin.get("/v1/me").await.expect(200);
}
