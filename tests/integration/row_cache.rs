//! Rows that a process remembers, and what others change in them meanwhile: two replicas on one Postgres.

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
    postgres::Postgres,
    process::{Installation, Service},
};

/// How long a replica may go on with what another one has changed, while the announcing connection lives.
const WHILE_HEARD: Duration = Duration::from_secs(1);
/// The same while that connection hangs: docs/ARCHITECTURE.md.
const WHILE_CUT: Duration = Duration::from_secs(5);

/// Waits until the replica remembers rows, or does not any more.
async fn until_remembering(client: &Client, remembers: bool) {
    let line = format!("\nregcred_rows_remembered {}\n", i32::from(remembers));
    eventually(&line, async || client.get("/metrics").await.body.contains(&line).then_some(())).await;
}

async fn password_of(client: &Client, account: &str) -> Option<String> {
    let answer = client.post("/v1/docker-configs", &json!({"accounts": [account]})).await;
    let auths = answer.expect(200)["config"]["auths"].clone();
    auths["ghcr.io"]["password"].as_str().map(str::to_owned)
}

/// A second replica on the database of the first.
async fn second_of(first: &TestApp) -> TestApp {
    let second = TestApp::beside(first).await;
    until_remembering(&first.anonymous(), true).await;
    until_remembering(&second.anonymous(), true).await;
    second
}

/// Asks until `is_over`, and says how long that was after `start`.
async fn time_until(start: Instant, what: &str, mut is_over: impl AsyncFnMut() -> bool) -> Duration {
    loop {
        // What was asked before the end may be answered after it.
        let asked_at = start.elapsed();
        if is_over().await {
            return asked_at;
        }
        assert!(start.elapsed() < PATIENCE, "this did not come about: {what}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_remembered_row_is_not_asked_for_again(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "martin", "first").await;
    until_remembering(&app.anonymous(), true).await;
    assert_eq!(password_of(&app.admin(), "a").await.as_deref(), Some("first"));

    // Without its tables nothing can be read.
    for table in ["api_keys", "registry_accounts"] {
        let rename = format!("ALTER TABLE {table} RENAME TO {table}_elsewhere");
        sqlx::raw_sql(sqlx::AssertSqlSafe(rename)).execute(&app.pool).await.expect("renamed");
    }
    assert_eq!(password_of(&app.admin(), "a").await.as_deref(), Some("first"));
    assert_eq!(app.admin().get("/v1/registry-accounts/a").await.status, 500);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_damaged_row_of_a_key_keeps_no_other_key_out(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let keys = [app.new_key("good", None).await, app.new_key("bad", None).await];
    // As a later version might write it.
    let later = "UPDATE api_keys SET grants = '{\"registries\": []}' WHERE name = 'bad'";
    sqlx::query(later).execute(&app.pool).await.expect("changed");
    let ids = keys.each_ref().map(|key| Uuid::parse_str(key.split('_').nth(1).expect("an id")).expect("a UUID"));

    let mut conn = app.pool.acquire().await.expect("a connection");
    let found = find_many(&mut conn, &ids).await.expect("both are read");

    let is_good = |id| found.iter().find(|(found, _)| *found == id).expect("it is there").1.is_ok();
    assert_eq!(ids.map(is_good), [true, false]);
    let [good, bad] = keys.map(|key| app.anonymous().with_key(&key));
    good.get("/v1/me").await.expect(200);
    bad.get("/v1/me").await.problem(500, "internal");
}

/// Postgres knows a time that is later than all others, and whoever has the database can write it.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_key_that_ends_at_the_end_of_time_is_good(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("good", None).await;
    let endless = "UPDATE api_keys SET expires_at = 'infinity' WHERE name = 'good'";
    sqlx::query(endless).execute(&app.pool).await.expect("changed");
    app.anonymous().with_key(&key).get("/v1/me").await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_key_that_one_replica_revokes_is_refused_by_the_other(pool: PgPool) {
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
        assert_eq!(here.get("/v1/me").await.status, 401, "the replica itself goes on with what it has revoked");
        let took = time_until(revoked_at, "refused", async || there.get("/v1/me").await.status == 401).await;
        assert!(took < WHILE_HEARD, "{took:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_rotation_is_followed_by_the_other_replica(pool: PgPool) {
    let first = TestApp::spawn(pool).await;
    let second = second_of(&first).await;
    first.register_account("a", "ghcr.io", "martin", "0").await;
    for version in 1..=20 {
        assert!(password_of(&second.admin(), "a").await.is_some());
        let change = json!({"password": version.to_string()});
        first.admin().patch("/v1/registry-accounts/a", &change).await.expect(200);

        let rotated_at = Instant::now();
        let expected = Some(version.to_string());
        assert_eq!(password_of(&first.admin(), "a").await, expected, "who rotates sees the old password");
        let took =
            time_until(rotated_at, "the new password", async || password_of(&second.admin(), "a").await == expected)
                .await;
        assert!(took < WHILE_HEARD, "{took:?}");
    }

    assert_eq!(first.admin().delete("/v1/registry-accounts/a").await.status, 204);
    time_until(Instant::now(), "gone", async || {
        second.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.status == 422
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_import_is_followed_too(pool: PgPool) {
    let first = TestApp::spawn(pool).await;
    let second = second_of(&first).await;
    first.register_account("ghcr-io", "ghcr.io", "martin", "old").await;
    for app in [&first, &second] {
        assert_eq!(password_of(&app.admin(), "ghcr-io").await.as_deref(), Some("old"));
    }
    let document = json!({"auths": {"ghcr.io": {"username": "martin", "password": "new"}}});
    first.admin().post("/v1/registry-accounts:import", &document).await.expect(200);
    assert_eq!(password_of(&first.admin(), "ghcr-io").await.as_deref(), Some("new"));
    time_until(Instant::now(), "the new password", async || {
        password_of(&second.admin(), "ghcr-io").await.as_deref() == Some("new")
    })
    .await;
}

/// Somebody with psql does not tell regcred anything; the triggers do.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_is_changed_by_hand_is_heard_of(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    until_remembering(&app.anonymous(), true).await;
    app.register_account("a", "ghcr.io", "martin", "x").await;
    let username = async || {
        let config = app.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
        config["config"]["auths"]["ghcr.io"]["username"].clone()
    };
    for (statement, expected) in [
        ("UPDATE registry_accounts SET username = 'one' WHERE name = 'a'", "one"),
        // Many rows in one statement are announced as one.
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
    sqlx::raw_sql("TRUNCATE api_keys").execute(&app.pool).await.expect("truncated");
    time_until(Instant::now(), "nobody is known", async || app.admin().get("/v1/me").await.status == 401).await;
}

/// The result of a verification changes no login, so nothing need be read again.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_verification_is_not_announced(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "martin", "x").await;
    let mut listener = sqlx::postgres::PgListener::connect_with(&app.pool).await.expect("a listener");
    listener.listen("regcred_changes").await.expect("listening");
    let verified = "UPDATE registry_accounts SET last_verified_at = now(), last_verification_result = 'valid',
        last_verification_detail = 'x'; UPDATE registry_accounts SET email = 'a@b.c'";
    sqlx::raw_sql(verified).execute(&app.pool).await.expect("updated");
    let first = listener.recv().await.expect("an announcement");
    assert_eq!(first.payload(), "registry_accounts a");
    let mut conn = app.pool.acquire().await.expect("a connection");
    sqlx::raw_sql("NOTIFY regcred_changes, 'end'").execute(&mut *conn).await.expect("notified");
    assert_eq!(listener.recv().await.expect("an announcement").payload(), "end", "the verification was announced");
}

/// Two processes on a Postgres of their own, with a client of each.
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
            until_remembering(client, true).await;
        }
        Self { postgres, services, clients, installation }
    }

    async fn sql(&self) -> PgConnection {
        PgConnection::connect(&self.postgres.url()).await.expect("a connection")
    }

    /// The server processes at the other end of the connections on which changes are announced.
    async fn announcers(&self) -> Vec<i32> {
        let query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'regcred changes'";
        sqlx::query_scalar(query).fetch_all(&mut self.sql().await).await.expect("pids")
    }
}

#[tokio::test]
async fn with_the_connection_closed_every_request_asks_postgres_until_there_is_another() {
    let replicas = Replicas::start().await;
    let [first, second] = &replicas.clients;
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "martin", "password": "old"});
    first.post("/v1/registry-accounts", &account).await.expect(201);
    assert_eq!(password_of(second, "a").await.as_deref(), Some("old"));
    // Again and again, at the moment of the change.
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
        assert!(took < WHILE_CUT, "{took:?}");
        for client in &replicas.clients {
            until_remembering(client, true).await;
        }
        assert_eq!(password_of(second, "a").await.as_deref(), Some(password.as_str()));
    }
    let log = replicas.services[1].process.stderr();
    assert!(log.contains("row cache disabled"), "{log}");
}

#[tokio::test]
async fn with_the_connection_hanging_nothing_stale_is_handed_out_beyond_the_bound() {
    let replicas = Replicas::start().await;
    let [first, second] = &replicas.clients;
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "martin", "password": "old"});
    first.post("/v1/registry-accounts", &account).await.expect(201);
    let ci = replicas.installation.new_key("ci").await;
    let ci = replicas.services[1].client(&ci);
    let id = ci.get("/v1/me").await.expect(200)["id"].as_str().expect("an id").to_owned();
    assert_eq!(password_of(second, "a").await.as_deref(), Some("old"));

    // The connections stay open, and nothing comes through: what TCP notices after minutes.
    let announcers = replicas.announcers().await;
    assert_eq!(announcers.len(), 2);
    let hung = Hung::stop(&announcers);
    first.patch("/v1/registry-accounts/a", &json!({"password": "new"})).await.expect(200);
    assert_eq!(first.delete(&format!("/v1/api-keys/{id}")).await.status, 204);
    let changed_at = Instant::now();

    let stale = join_all((0..4).map(async |_| {
        time_until(changed_at, "the new password", async || password_of(second, "a").await.as_deref() == Some("new"))
            .await
    }));
    let revoked = time_until(changed_at, "refused", async || ci.get("/v1/me").await.status == 401);
    let (stale, revoked) = tokio::join!(stale, revoked);
    for took in stale.into_iter().chain([revoked]) {
        assert!(took < WHILE_CUT, "{took:?} after the change");
    }
    // And never again, from whatever was read before.
    until_remembering(second, true).await;
    assert_eq!(password_of(second, "a").await.as_deref(), Some("new"));
    drop(hung);
    for client in &replicas.clients {
        until_remembering(client, true).await;
        assert_eq!(password_of(client, "a").await.as_deref(), Some("new"));
    }
    assert_eq!(ci.get("/v1/me").await.status, 401);
}

/// Server processes that stand still until this is dropped.
struct Hung(Vec<i32>);

impl Hung {
    fn stop(pids: &[i32]) -> Self {
        signal("STOP", pids);
        Self(pids.to_vec())
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        signal("CONT", &self.0);
    }
}

fn signal(signal: &str, pids: &[i32]) {
    for pid in pids {
        let sent =
            std::process::Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &pid.to_string()]).status();
        assert!(sent.expect("a shell").success() || signal == "CONT", "{pid} is gone");
    }
}

/// Many reads that began before a change and end after it: none of them is remembered.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn reads_that_were_under_way_during_a_change_leave_nothing_old(pool: PgPool) {
    let first = TestApp::spawn(pool).await;
    let second = second_of(&first).await;
    first.register_account("a", "ghcr.io", "martin", "0").await;
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
