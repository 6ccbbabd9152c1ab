//! Event streams of pull secrets.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool, postgres::PgListener};

use super::{Broker, app_with_broker, declaration, put, settled};
use crate::support::{
    app::TestApp,
    client::assert_holds,
    event_stream::{Event, Stream},
    eventually, kubernetes,
    listener::refusing_server,
    process::{Installation, Service},
};

const PATH: &str = "/v1/pull-secrets/team-a/events";

/// Declares a pull secret in an unreachable cluster.
async fn declare_away(app: &TestApp) {
    let away = json!({"name": "away", "server": refusing_server(), "auth": {"type": "none"}, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &away).await.expect(201);
    app.register_account("dev-user", "registry.example.com:5000", "dev-user", "one").await;
    put(&app.admin(), "team-a", &declaration(&["dev-user"], "away", &["a-dev"])).await.expect(201);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stream_reports_the_progress_of_a_rotation(pool: PgPool) {
    const COUNT: usize = 40;
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let admin = app.admin();
    let mut namespaces = Vec::new();
    for _ in 0..COUNT {
        namespaces.push(kubernetes::new_namespace().await);
    }
    let names: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    let shown = put(&admin, "team-a", &declaration(&["account-5000"], "dev", &names)).await.expect(201);
    let mut heard = PgListener::connect_with(&pool).await.expect("a listener");
    heard.listen("regcred_pull_secret_progress").await.expect("it listens");

    // The first event has the current status.
    let began = Instant::now();
    let mut stream = Stream::open(&admin, PATH).await;
    let first = stream.event().await;
    assert_eq!((first.name.as_str(), &first.data["settled"]), ("status", &json!(true)), "{first:?}");
    assert_holds(
        &first.data,
        &json!({"id": shown["id"], "name": "team-a", "version": 1, "generation": 1, "observedGeneration": 1,
            "status": shown["status"], "deletedAt": null}),
    );

    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "rotated"})).await.expect(200);
    let is_done = |event: &Event| event.data["settled"] == true && event.data["observedGeneration"] == 2;
    let events = stream.until(is_done).await;
    let last = events.last().expect("an event");
    assert_holds(&last.data["status"], &json!({"desired": COUNT, "synced": COUNT, "pending": 0, "removing": 0}));
    // Fewer events than targets, and no repeated status.
    let most = 2 + 2 * usize::try_from(began.elapsed().as_secs() + 1).expect("few");
    assert!(events.len() <= most, "{} events", events.len());
    let mut ids: Vec<&str> = events.iter().map(|event| event.id.as_str()).collect();
    ids.dedup();
    assert_eq!(ids.len(), events.len(), "{events:?}");
    // Other processes are notified once for many targets.
    let mut notifications = vec![heard.recv().await.expect("a notification")];
    while let Some(more) = heard.next_buffered() {
        notifications.push(more);
    }
    assert!(notifications.iter().all(|one| one.payload() == shown["id"].as_str().expect("an id")));
    let most = 2 + 4 * usize::try_from(began.elapsed().as_secs() + 1).expect("few");
    assert!(notifications.len() <= most, "{} notifications", notifications.len());

    // A later stream has the same event id and data.
    let again = Stream::open(&admin, PATH).await.event().await;
    assert_eq!((&again.id, &again.data), (&last.id, &last.data));

    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    let events = stream.until(|event| event.data["deletedAt"].is_string() || event.name == "end").await;
    let reason = match events.last() {
        Some(end) if end.name == "end" => end.data["reason"].as_str().expect("a reason").to_owned(),
        _ => stream.end().await,
    };
    assert_eq!(reason, "gone");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn idle_stream_stays_open_and_reports_unannounced_changes(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let body = declaration(&["account-5000"], "dev", &[&kubernetes::new_namespace().await]);
    put(&app.admin(), "team-a", &body).await.expect(201);
    let mut stream = Stream::open(&app.admin(), PATH).await;
    let first = stream.event().await;
    assert_holds(&first.data["status"], &json!({"desired": 1, "synced": 1}));
    // Longer than the timeout of an ordinary response.
    let began = Instant::now();
    loop {
        let next = stream.next().await.expect("the stream stays open");
        if next.name.is_empty() {
            break;
        }
    }
    assert!(began.elapsed() >= Duration::from_secs(14), "the comment came after {:?}", began.elapsed());
    // A change without a notification is found by polling.
    sqlx::query("UPDATE pull_secret_targets SET state = 'conflict'").execute(&pool).await.expect("done");
    let events = stream.until(|event| event.data["status"]["conflict"] == 1).await;
    assert_eq!(events.last().expect("an event").data["settled"], true);
    // A recreated pull secret is another one.
    assert_eq!(app.admin().delete("/v1/pull-secrets/team-a?deletionPolicy=retain").await.status, 202);
    put(&app.admin(), "team-a", &body).await.expect(201);
    assert_eq!(stream.end().await, "gone");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stream_ends_when_access_ends(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    declare_away(&app).await;
    let grants = json!({"accounts": ["dev-user"], "clusters": ["away"], "namespaces": ["a-dev"]});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    viewer.get("/v1/pull-secrets/none/events").await.problem(404, "not-found");
    app.anonymous().get("/v1/pull-secrets/team-a/events").await.problem(401, "unauthenticated");

    // A declaration beyond the grants.
    let mut beyond = Stream::open(&viewer, PATH).await;
    beyond.event().await;
    put(&app.admin(), "team-a", &declaration(&["dev-user"], "away", &["a-dev", "b-dev"])).await.expect(200);
    assert_eq!(beyond.end().await, "gone");
    put(&app.admin(), "team-a", &declaration(&["dev-user"], "away", &["a-dev"])).await.expect(200);

    // A revoked key and an expired one.
    let mut revoked = Stream::open(&viewer, PATH).await;
    revoked.event().await;
    app.revoke_key("viewer", false).await.expect("revoked");
    assert_eq!(revoked.end().await, "unauthenticated");
    let soon = chrono::Utc::now() + Duration::from_secs(10);
    let body = json!({"name": "short", "role": "viewer", "expiresAt": soon});
    let key = app.admin().post("/v1/api-keys", &body).await.expect(201);
    let short = app.admin().with_key(key["key"].as_str().expect("a key"));
    let mut expiring = Stream::open(&short, PATH).await;
    expiring.event().await;
    assert_eq!(expiring.end().await, "unauthenticated");
    assert!(chrono::Utc::now() >= soon, "not before");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn open_streams_are_limited_per_caller(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    declare_away(&app).await;
    let viewer = app.caller("viewer", "viewer", None).await;
    let open = async || {
        let metrics = app.operations().get("/metrics").await.body;
        let line = metrics.lines().find_map(|line| line.strip_prefix("regcred_event_streams ")).expect("the metric");
        line.parse::<usize>().expect("a number")
    };
    assert_eq!(open().await, 0);
    let mut streams = Vec::new();
    for _ in 0..16 {
        streams.push(Stream::open(&viewer, PATH).await);
    }
    assert_eq!(open().await, 16);
    let refused = viewer.get("/v1/pull-secrets/team-a/events").await;
    refused.problem(429, "too-many-streams");
    assert_eq!(refused.header("retry-after"), "10");
    // Other callers and other requests are not limited.
    viewer.get("/v1/pull-secrets/team-a").await.expect(200);
    let other = Stream::open(&app.admin(), PATH).await;
    assert_eq!(open().await, 17);
    // One listening connection serves all streams, and none is open without streams.
    let listeners = async || {
        let count = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'regcred progress'",
        );
        let count: i64 = count.fetch_one(&pool).await.expect("a count");
        count
    };
    eventually("one connection listens", async || (listeners().await == 1).then_some(())).await;
    streams.pop();
    eventually("the slot is free", async || (open().await == 16).then_some(())).await;
    streams.push(Stream::open(&viewer, PATH).await);
    drop((streams, other));
    eventually("all slots are free", async || (open().await == 0).then_some(())).await;
    eventually("no connection listens", async || (listeners().await == 0).then_some(())).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn streams_end_at_once_on_shutdown(pool: PgPool) {
    let installation =
        Installation::new(pool.connect_options().to_url_lossy().as_ref()).with("REGCRED_HTTP_SHUTDOWN_SECONDS", "600");
    let key = installation.new_key("admin").await;
    let api = Service::of(installation.spawn(&["serve", "--no-worker"])).await;
    let worker = Service::of(installation.spawn(&["worker"])).await;
    let (client, broker, namespace) = (api.client(&key), Broker::new().await, kubernetes::new_namespace().await);
    super::faults::prepare(&client, &broker).await;
    put(&client, "team-a", &declaration(&["dev-user"], "dev", &[&namespace])).await.expect(201);
    settled(&client, "team-a").await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(Stream::open(&client, PATH).await);
    }
    // The worker runs in another process.
    client.patch("/v1/registry-accounts/dev-user", &json!({"password": "two"})).await.expect(200);
    for stream in &mut streams {
        stream.until(|event| event.data["observedGeneration"] == 2 && event.data["settled"] == true).await;
    }

    api.process.signal("TERM");
    for stream in streams {
        assert_eq!(stream.end().await, "stopping");
    }
    // Long before the shutdown timeout.
    let ended = api.process.wait().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    // The log has the start and the end of each stream, with the reason.
    let lines: Vec<Value> = ended.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |message: &str| {
        let lines = lines.iter().filter(|line| line["message"] == message && line["span"]["path"] == PATH);
        lines.cloned().collect::<Vec<Value>>()
    };
    let (begun, over) = (of("request completed"), of("event stream ended"));
    assert_eq!((begun.len(), over.len()), (3, 3), "{}", ended.stderr);
    assert!(begun.iter().all(|line| line["status"] == 200 && line["caller"] == "admin"), "{begun:?}");
    assert!(over.iter().all(|line| line["reason"] == "stopping" && line["events"].as_u64() >= Some(2)), "{over:?}");
    assert!(over.iter().all(|line| begun.iter().any(|begun| begun["span"] == line["span"])), "{over:?}");
    assert!(!ended.stderr.contains(&key), "the key is not in the log");
    drop(worker);
}
