//! `GET /v1/events`.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    pull_secrets::{declaration, put, settled},
    support::{
        app::TestApp,
        client::{Client, assert_holds},
        event_stream::{Event, Stream},
        eventually,
        listener::refusing_server,
        postgres::Postgres,
        process::Installation,
    },
};

const PATH: &str = "/v1/events";
const PASSWORD: &str = "canary-5f1e";

async fn create_account(admin: &Client, name: &str, labels: &Value) {
    let registry = format!("{name}.example.com");
    let body = json!({"name": name, "registry": registry, "username": "dev", "password": PASSWORD, "labels": labels});
    admin.post("/v1/registry-accounts", &body).await.expect(201);
}

/// Registers a cluster that cannot be reached.
async fn create_cluster(admin: &Client, name: &str) {
    let body = json!({"name": name, "server": refusing_server(), "auth": {"type": "none"}, "allowPlainHttp": true});
    admin.post("/v1/clusters", &body).await.expect(201);
}

/// Declares a pull secret without waiting for its targets.
async fn declare(admin: &Client, name: &str, body: &Value, status: u16) {
    admin.send(admin.request("PUT", &format!("/v1/pull-secrets/{name}")).json(body)).await.expect(status);
}

async fn delete(admin: &Client, path: &str, status: u16) {
    let answer = admin.delete(path).await;
    assert_eq!(answer.status, status, "{answer:?}");
}

/// Opens a new stream and reads its `reset`. Returns the id of that, too.
async fn open(client: &Client, path: &str) -> (Stream, String) {
    let mut stream = Stream::open(client, path).await;
    let first = stream.event().await;
    assert_eq!((first.name.as_str(), &first.data), ("reset", &json!({"kind": "reset"})));
    (stream, first.id)
}

fn is_about(event: &Event, kind: &str, change: &str, name: &str) -> bool {
    assert_eq!(event.data["kind"], event.name.as_str(), "{event:?}");
    event.name == kind && event.data["change"] == change && event.data["name"] == name
}

/// Changes of the resources of a kind, in order, each with the name of the resource.
fn changes<'a>(events: &'a [Event], kind: &str) -> Vec<(&'a str, &'a str)> {
    let of_kind = events.iter().filter(|event| event.name == kind);
    let text = |event: &'a Event, member: &str| event.data[member].as_str().expect("a string");
    of_kind.map(|event| (text(event, "change"), text(event, "name"))).collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_kind_reports_creation_change_and_deletion(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let (mut stream, _) = open(&admin, PATH).await;

    create_account(&admin, "dev-user", &json!({})).await;
    admin.patch("/v1/registry-accounts/dev-user", &json!({"email": "dev@example.com"})).await.expect(200);
    create_cluster(&admin, "away").await;
    admin.patch("/v1/clusters/away", &json!({"server": refusing_server()})).await.expect(200);
    put(&admin, "team-a", &declaration(&["dev-user"], "away", &["a-dev"])).await.expect(201);
    let mut events = stream.until(|event| event.data["state"] == "failed").await;
    admin.patch("/v1/registry-accounts/dev-user", &json!({"password": "rotated"})).await.expect(200);
    delete(&admin, "/v1/pull-secrets/team-a?deletionPolicy=retain", 202).await;
    delete(&admin, "/v1/clusters/away", 204).await;
    delete(&admin, "/v1/registry-accounts/dev-user", 204).await;
    events.extend(stream.until(|event| is_about(event, "registryAccount", "deleted", "dev-user")).await);

    let of = |changes: &[&'static str], name| changes.iter().map(|change| (*change, name)).collect::<Vec<_>>();
    let expected = of(&["created", "changed", "changed", "deleted"], "dev-user");
    assert_eq!(changes(&events, "registryAccount"), expected);
    assert_eq!(changes(&events, "cluster"), of(&["created", "changed", "deleted"], "away"));
    let pull_secrets = changes(&events, "pullSecret");
    assert_eq!(
        (pull_secrets.first(), pull_secrets.last()),
        (Some(&("created", "team-a")), Some(&("deleted", "team-a")))
    );
    assert!(pull_secrets.contains(&("changed", "team-a")), "{pull_secrets:?}");
    let targets = changes(&events, "target");
    assert_eq!((targets.first(), targets.last()), (Some(&("created", "team-a")), Some(&("deleted", "team-a"))));

    let created = events.iter().find(|event| event.name == "target").expect("a target");
    assert_eq!(
        created.data,
        json!({"kind": "target", "change": "created", "name": "team-a", "version": 1, "cluster": "away",
            "namespace": "a-dev", "state": "pending", "removing": false})
    );
    let rotated = events.iter().find(|event| event.name == "pullSecret" && event.data["generation"] == 2);
    let expected = json!({"kind": "pullSecret", "change": "changed", "name": "team-a", "version": 1, "generation": 2});
    assert_eq!(rotated.expect("the rotation").data, expected);
    let account = events.iter().rfind(|event| event.name == "registryAccount").expect("an account");
    assert_eq!(account.data, json!({"kind": "registryAccount", "change": "deleted", "name": "dev-user", "version": 3}));
    // Ids are places in one history.
    let places: Vec<u64> =
        events.iter().map(|event| event.id.split_once('-').expect("an id").1.parse().expect("a number")).collect();
    assert!(places.is_sorted_by(|one, next| one < next), "{places:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn narrowed_caller_sees_only_what_it_is_granted(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let grants = json!({"accounts": ["dev-*"], "clusters": ["away"], "namespaces": ["a-*"]});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    let (mut narrowed, _) = open(&viewer, PATH).await;
    let (mut all, _) = open(&admin, PATH).await;

    for account in ["dev-user", "ops-user"] {
        create_account(&admin, account, &json!({})).await;
    }
    for cluster in ["away", "beyond"] {
        create_cluster(&admin, cluster).await;
    }
    for (name, account, cluster, namespace) in [
        ("team-a", "dev-user", "away", "a-dev"),
        ("other-account", "ops-user", "away", "a-dev"),
        ("other-cluster", "dev-user", "beyond", "a-dev"),
        ("other-namespace", "dev-user", "away", "b-dev"),
        ("moved", "dev-user", "away", "b-dev"),
    ] {
        declare(&admin, name, &declaration(&[account], cluster, &[namespace]), 201).await;
    }
    // Into the view of the caller, and out of it once that was seen: the creation of what is gone
    // before the changes are read is left out.
    declare(&admin, "moved", &declaration(&["dev-user"], "away", &["a-dev"]), 200).await;
    let mut seen = narrowed.until(|event| event.data["name"] == "moved").await;
    declare(&admin, "moved", &declaration(&["ops-user"], "away", &["a-dev"]), 200).await;
    for name in ["team-a", "other-account", "other-cluster", "other-namespace"] {
        delete(&admin, &format!("/v1/pull-secrets/{name}?deletionPolicy=retain"), 202).await;
    }
    create_account(&admin, "dev-last", &json!({})).await;

    let is_last = |event: &Event| event.data["name"] == "dev-last";
    seen.extend(narrowed.until(is_last).await);
    let names: BTreeSet<&str> = seen.iter().map(|event| event.data["name"].as_str().expect("a name")).collect();
    assert_eq!(names, BTreeSet::from(["away", "dev-last", "dev-user", "moved", "team-a"]));
    let of = |name: &str| {
        let of_name = changes(&seen, "pullSecret").into_iter().filter(|(_, of)| *of == name).map(|(change, _)| change);
        of_name.collect::<Vec<&str>>()
    };
    let team = of("team-a");
    assert_eq!((team.first(), team.last()), (Some(&"created"), Some(&"deleted")), "{team:?}");
    let moved = of("moved");
    assert_eq!((moved.first(), moved.last()), (Some(&"created"), Some(&"deleted")), "{moved:?}");
    // The caller with all grants sees the others too.
    let names: BTreeSet<String> = all.until(is_last).await.iter().map(|event| event.data["name"].to_string()).collect();
    assert_eq!(names.len(), 10, "{names:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn label_that_changes_what_a_caller_may_see_resets_its_stream(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    create_account(&admin, "dev-user", &json!({"team": "b"})).await;
    let grants = json!({"accounts": [{"matchLabels": {"team": "a"}}], "clusters": ["*"], "namespaces": ["*"]});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    let (mut stream, first) = open(&viewer, "/v1/events?kind=pullSecret").await;
    let (mut by_name, _) = open(&admin, PATH).await;

    create_account(&admin, "other", &json!({"team": "a"})).await;
    admin.patch("/v1/registry-accounts/dev-user", &json!({"labels": {"team": "a"}})).await.expect(200);
    let event = stream.event().await;
    assert_eq!(event.name, "reset");
    assert_ne!(event.id, first);
    // For a caller that sees the account anyway, it is a change.
    let events = by_name.until(|event| is_about(event, "registryAccount", "changed", "dev-user")).await;
    assert!(events.iter().all(|event| event.name != "reset"), "{events:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn kinds_are_chosen_and_need_the_permission_to_read_them(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let grants = json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]});
    let renderer = app.caller("renderer", "renderer", Some(grants)).await;
    let (mut readable, first) = open(&renderer, PATH).await;
    let (mut chosen, _) = open(&admin, "/v1/events?kind=cluster&kind=pullSecret").await;
    renderer.get("/v1/events?kind=registryAccount&kind=cluster").await.problem(403, "forbidden");
    let refused = admin.get("/v1/events?kind=accounts").await;
    refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["kind"]);

    create_cluster(&admin, "away").await;
    create_account(&admin, "dev-user", &json!({})).await;
    put(&admin, "team-a", &declaration(&["dev-user"], "away", &["a-dev"])).await.expect(201);
    let events = chosen.until(|event| event.name == "pullSecret").await;
    assert_eq!(changes(&events, "cluster"), [("created", "away")]);
    assert_eq!(events.len(), 2, "{events:?}");
    // A caller without the permission for clusters and pull secrets.
    let event = readable.event().await;
    assert!(is_about(&event, "registryAccount", "created", "dev-user"), "{event:?}");
    // A heartbeat has the place behind the events that the caller may not see.
    eventually("the fan-out is over", async || {
        let shown = settled(&admin, "team-a").await;
        (shown["status"]["failed"] == 1).then_some(())
    })
    .await;
    let heartbeat = readable.next().await.expect("the stream goes on");
    assert_eq!((heartbeat.name.as_str(), &heartbeat.data), ("", &Value::Null));
    assert!(heartbeat.id.len() >= first.len() && heartbeat.id != event.id, "{heartbeat:?}");
    create_account(&admin, "next", &json!({})).await;
    let event = Stream::resume(&renderer, PATH, &heartbeat.id).await.event().await;
    assert!(is_about(&event, "registryAccount", "created", "next"), "{event:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stream_ends_with_its_key(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.anonymous().get(PATH).await.problem(401, "unauthenticated");
    let viewer = app.caller("viewer", "viewer", None).await;
    let (stream, _) = open(&viewer, PATH).await;
    app.revoke_key("viewer", false).await.expect("revoked");
    assert_eq!(stream.end().await, "unauthenticated");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn interrupted_stream_resumes_without_loss_or_repetition(pool: PgPool) {
    const COUNT: usize = 60;
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let (stream, mut last) = open(&admin, PATH).await;
    drop(stream);
    let writer = admin.clone();
    let writing = tokio::spawn(async move {
        // Transactions that overlap, so that they commit in another order than they began.
        let create = |index: usize| {
            let writer = writer.clone();
            async move { create_account(&writer, &format!("account-{index:03}"), &json!({})).await }
        };
        for first in (0..COUNT).step_by(6) {
            futures_util::future::join_all((first..first + 6).map(create)).await;
        }
    });
    let mut names = Vec::new();
    while names.len() < COUNT {
        let mut stream = Stream::resume(&admin, PATH, &last).await;
        for _ in 0..5.min(COUNT - names.len()) {
            let event = stream.event().await;
            assert_eq!(event.name, "registryAccount", "{event:?}");
            names.push(event.data["name"].as_str().expect("a name").to_owned());
            last = event.id;
        }
    }
    writing.await.expect("all are created");
    let expected: Vec<String> = (0..COUNT).map(|index| format!("account-{index:03}")).collect();
    names.sort();
    assert_eq!(names, expected);
    create_account(&admin, "last", &json!({})).await;
    assert_eq!(Stream::resume(&admin, PATH, &last).await.event().await.data["name"], "last");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unknown_place_resets_the_stream(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let other = TestApp::beside(&app).await;
    let admin = app.admin();
    let (_, of_other) = open(&other.admin(), PATH).await;
    let (_, known) = open(&admin, PATH).await;
    let future = known.rsplit_once('-').map(|(epoch, _)| format!("{epoch}-99")).expect("an id");
    for unknown in [of_other.as_str(), "1.2.1-3", "", &future] {
        let first = Stream::resume(&admin, PATH, unknown).await.event().await;
        assert_eq!((first.name.as_str(), &first.id), ("reset", &known), "{unknown}");
    }

    // More changes than the history holds.
    let many = "INSERT INTO clusters (id, name, auth_type)
        SELECT gen_random_uuid(), 'c-' || number, 'inCluster' FROM generate_series(1, 10001) AS number";
    let (open_before, _) = open(&admin, PATH).await;
    sqlx::query(many).execute(&app.pool).await.expect("inserted");
    for mut stream in [Stream::resume(&admin, PATH, &known).await, open_before] {
        let event = stream.event().await;
        assert_eq!(event.name, "reset");
        assert_ne!(event.id, known);
    }
    // Both replicas report what follows.
    let (mut here, _) = open(&admin, PATH).await;
    let (mut there, _) = open(&other.admin(), PATH).await;
    create_account(&admin, "dev-user", &json!({})).await;
    for stream in [&mut here, &mut there] {
        let event = stream.event().await;
        assert!(is_about(&event, "registryAccount", "created", "dev-user"), "{event:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rotation_over_many_targets_is_few_events(pool: PgPool) {
    const COUNT: usize = 2_000;
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    create_account(&admin, "dev-user", &json!({})).await;
    create_cluster(&admin, "away").await;
    let namespaces: Vec<String> = (0..COUNT).map(|index| format!("n-{index}")).collect();
    let namespaces: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    put(&admin, "team-a", &declaration(&["dev-user"], "away", &namespaces)).await.expect(201);
    settled(&admin, "team-a").await;
    let (mut stream, _) = open(&admin, PATH).await;
    sqlx::query("DELETE FROM resource_changes").execute(&app.pool).await.expect("deleted");

    admin.patch("/v1/registry-accounts/dev-user", &json!({"password": "rotated"})).await.expect(200);
    let recorded = "SELECT count(*), count(targets) FROM resource_changes WHERE kind = 'target' AND transaction_id = (
        SELECT transaction_id FROM resource_changes WHERE kind = 'registryAccount')";
    let recorded: (i64, i64) = sqlx::query_as(recorded).fetch_one(&app.pool).await.expect("counts");
    assert_eq!(recorded, (1, 0), "one row without the targets");
    settled(&admin, "team-a").await;
    create_account(&admin, "last", &json!({})).await;
    let events = stream.until(|event| event.data["name"] == "last").await;
    assert!(events.len() < COUNT / 10, "{} events", events.len());
    let many = events.iter().find(|event| event.name == "target").expect("an event of the targets");
    let expected = json!({"kind": "target", "change": "changed", "name": "team-a", "version": 1, "cluster": null,
        "namespace": null, "state": null, "removing": false});
    assert_eq!(many.data, expected);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn resealed_and_claimed_rows_record_no_change(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    create_account(&admin, "dev-user", &json!({})).await;
    create_cluster(&admin, "away").await;
    put(&admin, "team-a", &declaration(&["dev-user"], "away", &["a-dev"])).await.expect(201);
    settled(&admin, "team-a").await;
    sqlx::query("DELETE FROM resource_changes").execute(&app.pool).await.expect("deleted");
    for statement in [
        "UPDATE registry_accounts SET password_key_id = password_key_id, next_verification_at = now()",
        "UPDATE clusters SET credential_key_id = credential_key_id",
        "UPDATE pull_secret_targets SET lease_until = now() - interval '1 second', lease_token = lease_token + 1",
        "UPDATE pull_secrets SET account_selector = NULL",
    ] {
        sqlx::query(statement).execute(&app.pool).await.expect("updated");
    }
    let recorded: i64 = sqlx::query_scalar("SELECT count(*) FROM resource_changes WHERE kind <> 'target'")
        .fetch_one(&app.pool)
        .await
        .expect("a count");
    assert_eq!(recorded, 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn old_changes_are_deleted_by_later_ones(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let old = "INSERT INTO resource_changes (recorded_at, kind, change, resource_id, name, version)
        SELECT now() - interval '6 minutes', 'cluster', 'changed', gen_random_uuid(), 'old', 1
        FROM generate_series(1, 500)";
    sqlx::query(old).execute(&app.pool).await.expect("inserted");
    eventually("old changes are gone", async || {
        let new = "INSERT INTO resource_changes (kind, change, resource_id, name, version)
            VALUES ('cluster', 'changed', gen_random_uuid(), 'new', 1)";
        sqlx::query(new).execute(&app.pool).await.expect("inserted");
        let count =
            "SELECT count(*) FILTER (WHERE name = 'old'), count(*) FILTER (WHERE name = 'new') FROM resource_changes";
        let (old, new): (i64, i64) = sqlx::query_as(count).fetch_one(&app.pool).await.expect("counts");
        assert!(new > 0, "new changes are kept");
        (old == 0).then_some(())
    })
    .await;
}

/// A restarted server may be another one: which changes it lacks cannot be told.
#[tokio::test]
async fn restart_of_postgres_resets_streams() {
    let mut postgres = Postgres::prepare();
    postgres.start().await;
    let installation = Installation::new(&postgres.url());
    let service = installation.serve().await;
    let admin = service.client(&installation.new_key("admin").await);
    let (stream, last) = open(&admin, PATH).await;

    postgres.stop().await;
    assert_eq!(stream.end().await, "unavailable");
    admin.get(PATH).await.problem(503, "database-unavailable");
    postgres.start().await;
    eventually("the service answers", async || (admin.get("/v1/me").await.status == 200).then_some(())).await;
    create_account(&admin, "dev-user", &json!({})).await;
    let first = eventually("the stream opens", async || {
        let request = admin.request("GET", PATH).header("Last-Event-ID", &last);
        let answer = admin.send(request).await;
        (answer.status == 200).then_some(answer)
    })
    .await;
    assert!(first.body.contains("event: reset"), "{first:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn lost_connections_lose_no_event(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let (mut stream, mut last) = open(&admin, PATH).await;
    for index in 0..5 {
        let name = format!("account-{index}");
        let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE 'regcred%'";
        let mut superuser = crate::support::postgres::superuser(&app.pool).await;
        sqlx::query(kill).execute(&mut superuser).await.expect("terminated");
        eventually("the account is created", async || {
            let body = json!({"name": name, "registry": "r.example.com", "username": "dev", "password": PASSWORD});
            (admin.post("/v1/registry-accounts", &body).await.status != 503).then_some(())
        })
        .await;
        loop {
            match stream.next().await {
                Some(event) if event.name == "registryAccount" => {
                    assert_holds(&event.data, &json!({"change": "created", "name": name}));
                    last = event.id;
                    break;
                }
                Some(event) => assert!(event.name.is_empty() || event.name == "end", "{event:?}"),
                // Its caller could not be authenticated again.
                None => {
                    stream = eventually("the stream opens", async || {
                        let is_up = admin.get("/v1/me").await.status == 200;
                        if is_up { Some(Stream::resume(&admin, PATH, &last).await) } else { None }
                    })
                    .await;
                }
            }
        }
    }
}
