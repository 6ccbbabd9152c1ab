//! One run at a time, under a lease; events; calls to the API server.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{Survey, group, named, namespace_in, registration, run};
use crate::{
    diagnosis::setup::{deployment, login},
    pull_secrets::{declaration, put, settled},
    support::{app::TestApp, eventually, kubernetes::SECOND},
};

const PATH: &str = "/v1/clusters/prod/coverage";

/// Stores a run that a process claimed and does not carry on.
async fn abandon(app: &TestApp, attempts: i32, seconds_left: i32) {
    let sql = "INSERT INTO coverage_runs (cluster_id, run_id, state, actor_type, actor_name, request_id, started_at,
            attempts, lease_until, lease_token)
        SELECT id, gen_random_uuid(), 'running', 'apiKey', 'admin', gen_random_uuid(), now(), $1,
            now() + $2 * interval '1 second', 77 FROM clusters WHERE name = 'prod'";
    sqlx::query(sql).bind(attempts).bind(seconds_left).execute(&app.pool).await.expect("a run");
}

async fn state(survey: &Survey) -> Value {
    survey.admin.get(PATH).await.expect(200)["run"].clone()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn run_of_a_dead_process_is_taken_over_when_its_lease_ends(pool: PgPool) {
    let survey = Survey::new(pool).await;
    abandon(&survey.app, 1, 3).await;
    // A request gets the run that is in progress.
    let requested = survey.admin.post(PATH, &Value::Null).await.expect(202);
    assert_eq!(requested["run"]["state"], "running");

    let ended = eventually("the run has ended", async || {
        Some(state(&survey).await).filter(|run| run["finishedAt"].is_string())
    })
    .await;

    assert_eq!((&ended["state"], &ended["id"]), (&json!("succeeded"), &requested["run"]["id"]), "{ended:#}");
    let (attempts, token): (i32, i64) = sqlx::query_as("SELECT attempts, lease_token FROM coverage_runs")
        .fetch_one(&survey.app.pool)
        .await
        .expect("a run");
    assert_eq!((attempts, token), (2, 78));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn run_that_ends_its_processes_fails(pool: PgPool) {
    let survey = Survey::new(pool).await;
    let _beside = TestApp::beside(&survey.app).await;
    abandon(&survey.app, 3, 0).await;
    let ended = eventually("the run has ended", async || {
        Some(state(&survey).await).filter(|run| run["finishedAt"].is_string())
    })
    .await;
    assert_eq!((&ended["state"], &ended["error"]["type"]), (&json!("failed"), &json!("internal")), "{ended:#}");
    let failed = (json!("failure"), json!({"reason": "internal"}), Vec::new());
    assert_eq!(events(&survey).await, [failed], "one event of both replicas");
    // Another one may succeed.
    survey.run().await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unreachable_cluster_fails_the_run_and_keeps_the_snapshot(pool: PgPool) {
    let survey = Survey::new(pool).await;
    survey.run().await;
    let before = survey.admin.get(PATH).await.expect(200)["snapshot"]["id"].clone();
    let elsewhere = json!({"server": "https://127.0.0.1:1", "auth": {"type": "none"}});
    survey.admin.patch("/v1/clusters/prod", &elsewhere).await.expect(200);

    survey.admin.post(PATH, &Value::Null).await.expect(202);
    let ended = eventually("the run has ended", async || {
        Some(survey.admin.get(PATH).await.expect(200)).filter(|shown| shown["run"]["finishedAt"].is_string())
    })
    .await;

    assert_eq!(ended["run"]["error"]["type"], "cluster-unreachable", "{ended:#}");
    let failed: Vec<_> = events(&survey).await.into_iter().filter(|(outcome, ..)| outcome == "failure").collect();
    assert_eq!(failed, [(json!("failure"), json!({"reason": "cluster-unreachable"}), Vec::new())]);
    assert_eq!(ended["snapshot"]["id"], before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn several_requests_and_replicas_make_one_run(pool: PgPool) {
    let survey = Survey::new(pool).await;
    let _beside = TestApp::beside(&survey.app).await;
    let requests = (0..8).map(|_| survey.admin.post(PATH, &Value::Null));
    let answers = futures_util::future::join_all(requests).await;
    let ids: std::collections::BTreeSet<String> =
        answers.iter().map(|answer| answer.expect(202)["run"]["id"].to_string()).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    run(&survey.admin, "prod").await;
}

/// Events of a run, oldest first: outcome, details and related resources.
async fn events(survey: &Survey) -> Vec<(Value, Value, Vec<Value>)> {
    let events = survey.admin.get("/v1/audit-events?action=cluster.coverage").await.expect(200);
    let mut events: Vec<_> = events["items"].as_array().expect("events").clone();
    events.reverse();
    let parts = |event: Value| {
        assert_eq!(
            (&event["resource"], &event["actor"]["name"]),
            (&json!("clusters/prod"), &json!("admin")),
            "{event:#}"
        );
        (event["outcome"].clone(), event["details"].clone(), event["related"].as_array().cloned().unwrap_or_default())
    };
    events.into_iter().map(parts).collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn run_names_the_secrets_that_it_reads_and_reads_no_managed_one(pool: PgPool) {
    let survey = Survey::new(pool).await;
    // Runs of other tests read the namespace, too.
    let user = survey.use_own_user().await;
    let (a, b) = (&survey.a, &survey.b);
    survey.app.register_account("prod-a", &a.address, &a.username, &a.password).await;
    let (image_a, image_b) = (format!("{}/os/alpine:3", a.address), format!("{}/os/alpine:3", b.address));
    let objects = vec![
        login("by-hand", b),
        login("idle", b),
        deployment(&[&image_a], &["team-a-pull"]),
        named(deployment(&[&image_b], &["by-hand"]), "other"),
    ];
    let namespace = namespace_in(SECOND, &[], objects).await;
    put(&survey.admin, "team-a", &declaration(&["prod-a"], "prod", &[&namespace])).await.expect(201);
    settled(&survey.admin, "team-a").await;
    let before = SECOND.requests_of(&user, &namespace).await.len();

    let coverage = survey.run().await;

    let reads = SECOND.requests_of(&user, &namespace).await.split_off(before);
    assert_eq!(reads, [("get".to_owned(), "by-hand".to_owned())]);
    let groups = survey.groups(&namespace).await;
    let managed = group(&groups, &format!("{}/os/alpine", a.address), &["team-a-pull"]);
    assert_eq!(managed["verdict"], "ok");
    let events = events(&survey).await;
    let secret = |name: &str| json!(format!("clusters/prod/namespaces/{namespace}/secrets/{name}"));
    assert_eq!((&events[0].0, events[0].2.len()), (&json!("attempt"), 0), "{events:#?}");
    assert!(events.iter().any(|(_, _, related)| related.contains(&secret("by-hand"))), "{events:#?}");
    assert!(events.iter().all(|(_, _, related)| !related.contains(&secret("team-a-pull"))), "{events:#?}");
    assert!(events.iter().all(|(_, _, related)| !related.contains(&secret("idle"))), "{events:#?}");
    let (outcome, details, _) = events.last().expect("an event");
    assert_eq!((outcome, &details["count"]), (&json!("success"), &coverage["snapshot"]["summary"]["groups"]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn removed_cluster_takes_its_coverage_along(pool: PgPool) {
    let survey = Survey::new(pool).await;
    survey.run().await;
    let deleted = survey.admin.delete("/v1/clusters/prod").await;
    assert_eq!(deleted.status, 204, "{deleted:?}");
    for table in ["coverage_runs", "coverage_snapshots", "coverage_groups", "coverage_secrets", "coverage_usage"] {
        let sql = format!("SELECT count(*) FROM {table}");
        let rows: i64 =
            sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&survey.app.pool).await.expect("a count");
        assert_eq!(rows, 0, "{table}");
    }
    survey.admin.get(PATH).await.problem(404, "not-found");
    survey.admin.post("/v1/clusters", &registration()).await.expect(201);
    let shown = survey.admin.get(PATH).await.expect(200);
    assert_eq!(shown, json!({"cluster": "prod", "run": null, "snapshot": null}));
}
