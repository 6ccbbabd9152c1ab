//! Cached rows and concurrent changes: two replicas on one Postgres.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use regcred::storage::api_keys::find_many;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection, PgPool};
use uuid::Uuid;

use crate::support::{
    PATIENCE,
    app::TestApp,
    client::Client,
    eventually,
    pg_proxy::{PgProxy, Wire},
    postgres::Postgres,
    process::{Installation, Service},
};

/// Maximum staleness while the connection for change notifications works.
const STALENESS: Duration = Duration::from_secs(1);
/// Maximum staleness while that connection hangs: docs/ARCHITECTURE.md.
const STALENESS_HANGING: Duration = Duration::from_secs(5);

/// Waits until the replica caches rows, or no longer does.
async fn until_caching(client: &Client, is_active: bool) {
    let state = if is_active { "on" } else { "off" };
    eventually(state, async || (client.get("/readyz").await.json()["rowCache"] == state).then_some(())).await;
}

async fn password_of(client: &Client, account: &str) -> Option<String> {
    let answer = client.post("/v1/docker-configs", &json!({"accounts": [account]})).await;
    let auths = answer.expect(200)["config"]["auths"].clone();
    auths["ghcr.io"]["password"].as_str().map(str::to_owned)
}

/// Starts a second replica on the database of the first.
async fn second_of(first: &TestApp) -> TestApp {
    let second = TestApp::beside(first).await;
    until_caching(&first.anonymous(), true).await;
    until_caching(&second.anonymous(), true).await;
    second
}

/// Polls until `is_over`. Returns the time between `start` and the last poll.
async fn time_until(start: Instant, what: &str, mut is_over: impl AsyncFnMut() -> bool) -> Duration {
    loop {
        // Taken before the request, which may be answered later.
        let polled_at = start.elapsed();
        if is_over().await {
            return polled_at;
        }
        assert!(start.elapsed() < PATIENCE, "timeout: {what}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cached_row_is_not_read_again(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "robot", "first").await;
    until_caching(&app.anonymous(), true).await;
    assert_eq!(password_of(&app.admin(), "a").await.as_deref(), Some("first"));

    // Without the tables nothing can be read from Postgres.
    for table in ["api_keys", "registry_accounts"] {
        let rename = format!("ALTER TABLE {table} RENAME TO {table}_elsewhere");
        sqlx::raw_sql(sqlx::AssertSqlSafe(rename)).execute(&app.pool).await.expect("renamed");
    }
    assert_eq!(password_of(&app.admin(), "a").await.as_deref(), Some("first"));
    assert_eq!(app.admin().get("/v1/registry-accounts/a").await.status, 500);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn damaged_row_of_one_key_does_not_affect_other_keys(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let keys = [app.new_key("good", None).await, app.new_key("bad", None).await];
    // Grants of a later version.
    let later = "UPDATE api_keys SET grants = '{\"registries\": []}' WHERE name = 'bad'";
    sqlx::query(later).execute(&app.pool).await.expect("changed");
    let ids = keys.each_ref().map(|key| Uuid::parse_str(key.split('_').nth(1).expect("an id")).expect("a UUID"));

    let mut conn = app.storage().acquire().await.expect("a connection");
    let found = find_many(&mut conn, &ids).await.expect("rows");

    let is_good = |id| found.iter().find(|(found, _)| *found == id).expect("row").1.is_ok();
    assert_eq!(ids.map(is_good), [true, false]);
    let [good, bad] = keys.map(|key| app.anonymous().with_key(&key));
    good.get("/v1/me").await.expect(200);
    bad.get("/v1/me").await.problem(500, "internal");
}

/// `infinity` is a valid timestamp in Postgres.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_with_infinite_expiry_is_accepted(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("good", None).await;
    let endless = "UPDATE api_keys SET expires_at = 'infinity' WHERE name = 'good'";
    sqlx::query(endless).execute(&app.pool).await.expect("changed");
    app.anonymous().with_key(&key).get("/v1/me").await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_revoked_by_one_replica_is_rejected_by_the_other(pool: PgPool) {
    let first = TestApp::spawn(pool).await;
    let second = second_of(&first).await;
    for round in 0..5 {
        let body = json!({"name": format!("ci-{round}"), "role": "viewer"});
        let made = first.admin().post("/v1/api-keys", &body).await.expect(201);
        let [here, there] = [&first, &second].map(|app| app.anonymous().with_key(made["key"].as_str().expect("a key")));
        for client in [&here, &there, &there] {
            client.get("/v1/me").await.expect(200);
        }

        let id = made["id"].as_str().expect("an id");
        assert_eq!(first.admin().delete(&format!("/v1/api-keys/{id}")).await.status, 204);

        let revoked_at = Instant::now();
        assert_eq!(here.get("/v1/me").await.status, 401, "the revoking replica accepts the key");
        let took = time_until(revoked_at, "rejected", async || there.get("/v1/me").await.status == 401).await;
        assert!(took < STALENESS, "{took:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rotated_password_is_used_by_the_other_replica(pool: PgPool) {
    let first = TestApp::spawn(pool).await;
    let second = second_of(&first).await;
    first.register_account("a", "ghcr.io", "robot", "0").await;
    for version in 1..=20 {
        assert!(password_of(&second.admin(), "a").await.is_some());
        let change = json!({"password": version.to_string()});
        first.admin().patch("/v1/registry-accounts/a", &change).await.expect(200);

        let rotated_at = Instant::now();
        let expected = Some(version.to_string());
        assert_eq!(password_of(&first.admin(), "a").await, expected, "the rotating replica uses the old password");
        let took =
            time_until(rotated_at, "the new password", async || password_of(&second.admin(), "a").await == expected)
                .await;
        assert!(took < STALENESS, "{took:?}");
    }

    assert_eq!(first.admin().delete("/v1/registry-accounts/a").await.status, 204);
    time_until(Instant::now(), "deleted", async || {
        second.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.status == 422
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn imported_password_is_used_by_the_other_replica(pool: PgPool) {
    let first = TestApp::spawn(pool).await;
    let second = second_of(&first).await;
    first.register_account("ghcr-io", "ghcr.io", "robot", "old").await;
    for app in [&first, &second] {
        assert_eq!(password_of(&app.admin(), "ghcr-io").await.as_deref(), Some("old"));
    }
    let document = json!({"auths": {"ghcr.io": {"username": "robot", "password": "new"}}});
    first.admin().post("/v1/registry-accounts:import", &document).await.expect(200);
    assert_eq!(password_of(&first.admin(), "ghcr-io").await.as_deref(), Some("new"));
    time_until(Instant::now(), "the new password", async || {
        password_of(&second.admin(), "ghcr-io").await.as_deref() == Some("new")
    })
    .await;
}

/// Triggers notify regcred of changes made with psql.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn changes_made_in_the_database_invalidate_the_cache(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    until_caching(&app.anonymous(), true).await;
    app.register_account("a", "ghcr.io", "robot", "x").await;
    let username = async || {
        let config = app.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
        config["config"]["auths"]["ghcr.io"]["username"].clone()
    };
    for (statement, expected) in [
        ("UPDATE registry_accounts SET username = 'one' WHERE name = 'a'", "one"),
        // Many rows in one statement cause one notification.
        (
            "INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id)
              SELECT gen_random_uuid(), 'x' || n, 'reg.io', 'u', '', '' FROM generate_series(1, 200) AS n;
          UPDATE registry_accounts SET username = 'many'",
            "many",
        ),
    ] {
        username().await;
        sqlx::raw_sql(statement).execute(&app.pool).await.expect("changed");
        time_until(Instant::now(), expected, async || username().await == expected).await;
    }
    let caller = app.caller("ci", "viewer", None).await;
    for statement in
        ["UPDATE api_keys SET role = 'operator' WHERE name = 'ci'", "DELETE FROM api_keys WHERE name = 'ci'"]
    {
        caller.get("/v1/me").await.expect(200);
        sqlx::raw_sql(statement).execute(&app.pool).await.expect("changed");
        time_until(Instant::now(), statement, async || {
            let me = caller.get("/v1/me").await;
            me.status == 401 || me.json()["role"] == "operator"
        })
        .await;
    }
    app.admin().get("/v1/me").await.expect(200);
    sqlx::raw_sql("TRUNCATE api_keys CASCADE").execute(&app.pool).await.expect("truncated");
    time_until(Instant::now(), "all keys rejected", async || app.admin().get("/v1/me").await.status == 401).await;
}

/// A verification result does not change the login, so cached rows remain valid.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn verification_result_sends_no_notification(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "robot", "x").await;
    let mut listener = sqlx::postgres::PgListener::connect_with(&app.pool).await.expect("listener");
    listener.listen("regcred_changes").await.expect("listening");
    let verified = "UPDATE registry_accounts SET last_verified_at = now(), last_verification_result = 'valid',
        last_verification_detail = 'x'; UPDATE registry_accounts SET email = 'a@b.c'";
    sqlx::raw_sql(verified).execute(&app.pool).await.expect("updated");
    let first = listener.recv().await.expect("notification");
    assert_eq!(first.payload(), "registry_accounts a");
    let mut conn = app.pool.acquire().await.expect("a connection");
    sqlx::raw_sql("NOTIFY regcred_changes, 'end'").execute(&mut *conn).await.expect("notified");
    assert_eq!(listener.recv().await.expect("notification").payload(), "end", "the verification sent a notification");
}

/// Two processes on their own Postgres, with a client for each.
struct Replicas {
    postgres: Postgres,
    services: [Service; 2],
    clients: [Client; 2],
    installation: Installation,
}

impl Replicas {
    async fn start() -> Self {
        let mut postgres = Postgres::prepare();
        postgres.start().await;
        let installation = Installation::new(&postgres.url());
        let services = [installation.serve().await, installation.serve().await];
        let key = installation.new_key("admin").await;
        let clients = [services[0].client(&key), services[1].client(&key)];
        for client in &clients {
            until_caching(client, true).await;
        }
        Self { postgres, services, clients, installation }
    }

    async fn sql(&self) -> PgConnection {
        PgConnection::connect(&self.postgres.url()).await.expect("a connection")
    }

    /// Returns the Postgres processes that serve the connections for change notifications.
    async fn notifiers(&self) -> Vec<i32> {
        let query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'regcred changes'";
        sqlx::query_scalar(query).fetch_all(&mut self.sql().await).await.expect("pids")
    }
}

#[tokio::test]
async fn without_the_notification_connection_every_request_reads_from_postgres() {
    let replicas = Replicas::start().await;
    let [first, second] = &replicas.clients;
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "old"});
    first.post("/v1/registry-accounts", &account).await.expect(201);
    assert_eq!(password_of(second, "a").await.as_deref(), Some("old"));
    // Closes the connection at the moment of the change, repeatedly.
    for round in 0..5 {
        let password = format!("new-{round}");
        let mut sql = replicas.sql().await;
        let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'regcred changes'";
        let cut = sqlx::raw_sql(cut).execute(&mut sql);
        let change = json!({"password": password});
        let (cut, changed) = tokio::join!(cut, first.patch("/v1/registry-accounts/a", &change));
        cut.expect("cut");
        changed.expect(200);

        let rotated_at = Instant::now();
        let took = time_until(rotated_at, "the new password", async || {
            password_of(second, "a").await.as_deref() == Some(password.as_str())
        })
        .await;
        assert!(took < STALENESS_HANGING, "{took:?}");
        for client in &replicas.clients {
            until_caching(client, true).await;
        }
        assert_eq!(password_of(second, "a").await.as_deref(), Some(password.as_str()));
    }
    let log = replicas.services[1].process.stderr();
    assert!(log.contains("row cache disabled"), "{log}");
}

#[tokio::test]
async fn hanging_notification_connection_bounds_staleness() {
    let replicas = Replicas::start().await;
    let [first, second] = &replicas.clients;
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "robot", "password": "old"});
    first.post("/v1/registry-accounts", &account).await.expect(201);
    let ci = replicas.installation.new_key("ci").await;
    let ci = replicas.services[1].client(&ci);
    let id = ci.get("/v1/me").await.expect(200)["id"].as_str().expect("an id").to_owned();
    assert_eq!(password_of(second, "a").await.as_deref(), Some("old"));

    // The connections stay open without traffic, which TCP detects only after minutes.
    let notifiers = replicas.notifiers().await;
    assert_eq!(notifiers.len(), 2);
    let stopped = Stopped::new(&notifiers);
    first.patch("/v1/registry-accounts/a", &json!({"password": "new"})).await.expect(200);
    assert_eq!(first.delete(&format!("/v1/api-keys/{id}")).await.status, 204);
    let changed_at = Instant::now();

    let stale = join_all((0..4).map(async |_| {
        time_until(changed_at, "the new password", async || password_of(second, "a").await.as_deref() == Some("new"))
            .await
    }));
    let revoked = time_until(changed_at, "rejected", async || ci.get("/v1/me").await.status == 401);
    let (stale, revoked) = tokio::join!(stale, revoked);
    for took in stale.into_iter().chain([revoked]) {
        assert!(took < STALENESS_HANGING, "{took:?} after the change");
    }
    // No earlier read brings the old value back.
    until_caching(second, true).await;
    assert_eq!(password_of(second, "a").await.as_deref(), Some("new"));
    drop(stopped);
    for client in &replicas.clients {
        until_caching(client, true).await;
        assert_eq!(password_of(client, "a").await.as_deref(), Some("new"));
    }
    assert_eq!(ci.get("/v1/me").await.status, 401);
}

/// Two processes on one Postgres: the first one is connected directly, the second one through a
/// proxy.
struct Proxied {
    postgres: Postgres,
    proxy: PgProxy,
    services: [Service; 2],
    clients: [Client; 2],
}

impl Proxied {
    async fn start(wire: Wire) -> Self {
        let mut postgres = Postgres::prepare();
        postgres.start().await;
        let installation = Installation::new(&postgres.url());
        let first = installation.serve().await;
        let key = installation.new_key("admin").await;
        let proxy = PgProxy::before(postgres.port(), wire);
        let proxied = installation.with("REGCRED_DATABASE_URL_FILE", "");
        let second = proxied.with("REGCRED_DATABASE_URL", &proxy.url(&postgres.url())).serve().await;
        let clients = [first.client(&key), second.client(&key)];
        Self { postgres, proxy, services: [first, second], clients }
    }

    /// Changes a password and revokes a key through the first process. Returns the times until the
    /// second one uses both.
    async fn change(&self, name: &str) -> [Duration; 2] {
        let [first, second] = &self.clients;
        let account = json!({"name": name, "registry": "ghcr.io", "username": "robot", "password": "old"});
        first.post("/v1/registry-accounts", &account).await.expect(201);
        let made = first.post("/v1/api-keys", &json!({"name": name, "role": "viewer"})).await.expect(201);
        let caller = second.with_key(made["key"].as_str().expect("a key"));
        for _ in 0..2 {
            assert_eq!(password_of(second, name).await.as_deref(), Some("old"));
            caller.get("/v1/me").await.expect(200);
        }

        let id = made["id"].as_str().expect("an id");
        first.patch(&format!("/v1/registry-accounts/{name}"), &json!({"password": "new"})).await.expect(200);
        assert_eq!(first.delete(&format!("/v1/api-keys/{id}")).await.status, 204);
        let changed_at = Instant::now();
        let revoked = time_until(changed_at, "rejected", async || caller.get("/v1/me").await.status == 401);
        let rotated =
            time_until(changed_at, "rotated", async || password_of(second, name).await.as_deref() == Some("new"));
        let (revoked, rotated) = tokio::join!(revoked, rotated);
        [revoked, rotated]
    }
}

/// A transaction pooler answers every statement and loses the notifications.
#[tokio::test]
async fn nothing_is_cached_where_notifications_do_not_arrive() {
    let proxied = Proxied::start(Wire::WithoutNotifications).await;
    let second = &proxied.services[1];
    eventually("the log has the cause", async || second.process.stderr().contains("transaction pooler").then_some(()))
        .await;

    let ready = second.anonymous().get("/readyz").await.expect(200);
    assert_eq!((&ready["ready"], &ready["rowCache"]), (&json!(true), &json!("off")));
    let metrics = second.operations().get("/metrics").await.body;
    assert!(metrics.contains("\nregcred_row_cache_active 0\n"), "{metrics}");
    until_caching(&proxied.clients[0], true).await;

    // The first request after a change sees it.
    for took in proxied.change("a").await {
        assert!(took < STALENESS, "{took:?}");
    }
    // The deaf connection does not listen to changes: a pooler would pass them on to the wrong
    // client.
    let query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%regcred_changes%'";
    let mut sql = PgConnection::connect(&proxied.postgres.url()).await.expect("a connection");
    let listening: i64 = sqlx::query_scalar(query).fetch_one(&mut sql).await.expect("a count");
    assert!(listening <= 1, "{listening}");
}

#[tokio::test]
async fn caching_ends_when_notifications_stop_and_resumes() {
    let proxied = Proxied::start(Wire::Whole).await;
    until_caching(&proxied.clients[1], true).await;
    proxied.change("a").await;

    proxied.proxy.becomes(Wire::WithoutNotifications);
    for took in proxied.change("b").await {
        assert!(took < STALENESS_HANGING, "{took:?}");
    }
    until_caching(&proxied.clients[1], false).await;

    proxied.proxy.becomes(Wire::Whole);
    until_caching(&proxied.clients[1], true).await;
    for took in proxied.change("c").await {
        assert!(took < STALENESS_HANGING, "{took:?}");
    }
}

/// Processes that are stopped until this is dropped.
struct Stopped(Vec<i32>);

impl Stopped {
    fn new(pids: &[i32]) -> Self {
        signal("STOP", pids);
        Self(pids.to_vec())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal("CONT", &self.0);
    }
}

fn signal(signal: &str, pids: &[i32]) {
    for pid in pids {
        let sent =
            std::process::Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &pid.to_string()]).status();
        assert!(sent.expect("shell").success() || signal == "CONT", "{pid} exited");
    }
}

/// Reads that start before a change and finish after it are not cached.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn reads_concurrent_with_a_change_are_not_cached(pool: PgPool) {
    let first = TestApp::spawn(pool).await;
    let second = second_of(&first).await;
    first.register_account("a", "ghcr.io", "robot", "0").await;
    let clients = [first.admin(), second.admin()];
    for version in 1..=20 {
        let expected = Some(version.to_string());
        let readers = join_all((0..8).map(async |reader: usize| {
            for _ in 0..5 {
                assert!(password_of(&clients[reader % 2], "a").await.is_some());
            }
        }));
        let writer = async {
            let change: Value = json!({"password": version.to_string()});
            first.admin().patch("/v1/registry-accounts/a", &change).await.expect(200);
            Instant::now()
        };
        let (_, changed_at) = tokio::join!(readers, writer);
        for client in &clients {
            time_until(changed_at, "the new password", async || password_of(client, "a").await == expected).await;
            assert_eq!(password_of(client, "a").await, expected);
        }
    }
}
