//! The queue of targets: leases, fencing, and the cost of its statements.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use regcred::{
    domain::{
        pull_secret::{TargetState, Written},
        reconcile::{Applied, ClusterHealth, ReconcileOutcome, SecretAction},
    },
    storage::{
        PgConnection, pool,
        pull_secrets::{bump_generation, delete_all_empty},
        schema::MIGRATOR,
        targets::{
            due::{ChangedSecrets, mark_secrets_due},
            queue::{ClaimedTarget, claim, delete_removed, lock_claimed, record_results, release},
            status::is_settled,
        },
    },
};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool, postgres::PgPoolOptions};
use uuid::Uuid;

use crate::support::postgres::Postgres;

const TABLE: &str = "pull_secret_targets";
const LEASE: Duration = Duration::from_secs(30);

/// Inserts a pull secret with due targets in a new cluster. Returns the ids of both.
async fn declare_in(pool: &PgPool, name: &str, targets: i32) -> (Uuid, Uuid) {
    let (id, cluster) = (Uuid::now_v7(), Uuid::now_v7());
    sqlx::query("INSERT INTO clusters (id, name, auth_type) VALUES ($1, $2, 'inCluster')")
        .bind(cluster)
        .bind(format!("cluster-of-{name}"))
        .execute(pool)
        .await
        .expect("a cluster");
    sqlx::query("INSERT INTO pull_secrets (id, name, declaration) VALUES ($1, $2, '{}')")
        .bind(id)
        .bind(name)
        .execute(pool)
        .await
        .expect("a pull secret");
    sqlx::query(
        "INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation)
         SELECT $1, $2, 'n-' || number, 1 FROM generate_series(1, $3) AS number",
    )
    .bind(id)
    .bind(cluster)
    .bind(targets)
    .execute(pool)
    .await
    .expect("targets");
    (id, cluster)
}

async fn declare(pool: &PgPool, targets: i32) -> (Uuid, Uuid) {
    declare_in(pool, "team-a", targets).await
}

/// A pool with the session settings of the service.
async fn service_pool(pool: &PgPool) -> PgPool {
    let options = pool::bounded((*pool.connect_options()).clone());
    PgPoolOptions::new().max_connections(2).connect_with(options).await.expect("a pool")
}

async fn connection(pool: &PgPool) -> PgConnection {
    pool.acquire().await.expect("a connection").detach().into()
}

fn synced(resource_version: &str) -> ReconcileOutcome {
    let written = Written {
        uid: Some("uid".to_owned()),
        resource_version: Some(resource_version.to_owned()),
        content_mac: Some(vec![1, 2, 3]),
    };
    ReconcileOutcome {
        action: SecretAction::Rotated,
        state: TargetState::Synced,
        applied: Some(Applied { generation: 1, version: 1 }),
        written,
        attached: Vec::new(),
        error: None,
        requeue_after: Duration::from_mins(10),
        cluster: ClusterHealth::Reachable,
    }
}

/// Records results and returns the ids of the recorded targets.
async fn recorded(conn: &mut PgConnection, results: &[(&ClaimedTarget, &ReconcileOutcome)]) -> BTreeSet<i64> {
    record_results(conn, results).await.expect("recorded").into_keys().collect()
}

/// State, resource version and seconds until the next attempt of a target.
async fn stored(pool: &PgPool, namespace: &str) -> (String, Option<String>, f64) {
    let query = "SELECT state, resource_version, extract(epoch FROM next_attempt_at - now())::double precision
                 FROM pull_secret_targets WHERE namespace = $1";
    sqlx::query_as(query).bind(namespace).fetch_one(pool).await.expect("a target")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn results_of_a_batch_are_recorded_each_under_its_lease(pool: PgPool) {
    let (_, cluster) = declare(&pool, 3).await;
    let mut conn = connection(&pool).await;
    let claimed = claim(&mut conn, cluster, 3, LEASE).await.expect("claimed");
    let [first, second, third] = &claimed[..] else { panic!("{claimed:?}") };
    // The second lease was lost to another worker. The third target was made due again.
    let mut lost = second.clone();
    lost.lease_token -= 1;
    sqlx::query("UPDATE pull_secret_targets SET next_attempt_at = now() WHERE namespace = $1")
        .bind(third.namespace.as_str())
        .execute(&mut conn)
        .await
        .expect("due");
    let (one, two, three) = (synced("11"), synced("12"), synced("13"));

    let done = recorded(&mut conn, &[(first, &one), (&lost, &two), (third, &three)]).await;

    assert_eq!(done, BTreeSet::from([first.id, third.id]));
    let (state, version, next) = stored(&pool, first.namespace.as_str()).await;
    assert_eq!((state.as_str(), version.as_deref()), ("synced", Some("11")));
    assert!(next > 500.0, "{next}");
    let (state, version, _) = stored(&pool, second.namespace.as_str()).await;
    assert_eq!((state.as_str(), version), ("pending", None));
    assert!(lock_claimed(&mut conn, second).await.expect("an answer"), "the lease of the other worker holds");
    let (state, version, next) = stored(&pool, third.namespace.as_str()).await;
    assert_eq!((state.as_str(), version.as_deref()), ("pending", Some("13")));
    assert!(next <= 0.0, "{next}");
    // A retry after a lost answer changes nothing.
    assert!(recorded(&mut conn, &[(first, &two), (third, &two)]).await.is_empty());
    assert_eq!(stored(&pool, first.namespace.as_str()).await.1.as_deref(), Some("11"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_batch_never_waits_for_a_locked_row(pool: PgPool) {
    let (_, cluster) = declare(&pool, 2).await;
    let mut conn = connection(&pool).await;
    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    let [first, second] = &claimed[..] else { panic!("{claimed:?}") };
    // A rotation that holds one of the two rows.
    let mut rotation = pool.begin().await.expect("a transaction");
    sqlx::query("UPDATE pull_secret_targets SET generation = 2, next_attempt_at = now() WHERE namespace = $1")
        .bind(second.namespace.as_str())
        .execute(&mut *rotation)
        .await
        .expect("bumped");
    let (one, two) = (synced("11"), synced("12"));

    let done = recorded(&mut conn, &[(first, &one), (second, &two)]).await;

    assert_eq!(done, BTreeSet::from([first.id]));
    let mut tx = connection(&pool).await.begin().await.expect("a transaction");
    let waiting = async {
        assert!(lock_claimed(&mut tx, second).await.expect("locked"));
        assert_eq!(recorded(&mut tx, &[(second, &two)]).await, BTreeSet::from([second.id]));
        tx.commit().await.expect("committed");
    };
    let commits = async { rotation.commit().await.expect("committed") };
    tokio::join!(waiting, commits);
    let (state, version, next) = stored(&pool, second.namespace.as_str()).await;
    assert_eq!((state.as_str(), version.as_deref()), ("pending", Some("12")));
    assert!(next <= 0.0, "{next}");
    assert!(!lock_claimed(&mut conn, second).await.expect("an answer"), "its lease has ended");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_target_that_is_wanted_again_is_not_deleted(pool: PgPool) {
    let (id, cluster) = declare(&pool, 2).await;
    sqlx::query("UPDATE pull_secret_targets SET wanted = false").execute(&pool).await.expect("unwanted");
    let mut conn = connection(&pool).await;
    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    sqlx::query("UPDATE pull_secret_targets SET wanted = true, next_attempt_at = now() WHERE namespace = 'n-2'")
        .execute(&mut conn)
        .await
        .expect("wanted");
    assert!(!is_settled(&mut conn, id, 1).await.expect("an answer"));

    let removed: Vec<&ClaimedTarget> = claimed.iter().collect();
    let deleted = delete_removed(&mut conn, &removed).await.expect("deleted");

    let is_deleted = |target: &&ClaimedTarget| deleted.contains(&target.id);
    let names: Vec<&str> = claimed.iter().filter(is_deleted).map(|target| target.namespace.as_str()).collect();
    assert_eq!(names, ["n-1"]);
    // The other row is gone.
    assert_eq!(release(&mut conn, &removed, Duration::ZERO).await.expect("released").len(), 1);
    let again = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    assert_eq!(again.iter().map(|target| target.namespace.as_str()).collect::<Vec<_>>(), ["n-2"]);
    assert!(!is_settled(&mut conn, id, 1).await.expect("an answer"));
    recorded(&mut conn, &[(&again[0], &synced("11"))]).await;
    assert!(is_settled(&mut conn, id, 1).await.expect("an answer"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn released_targets_are_due_and_locked_rows_are_skipped(pool: PgPool) {
    let (_, cluster) = declare(&pool, 2).await;
    let mut conn = connection(&pool).await;
    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    let both: Vec<&ClaimedTarget> = claimed.iter().collect();
    let mut rotation = pool.begin().await.expect("a transaction");
    sqlx::query("UPDATE pull_secret_targets SET generation = 2, next_attempt_at = now() WHERE namespace = $1")
        .bind(both[1].namespace.as_str())
        .execute(&mut *rotation)
        .await
        .expect("bumped");

    assert_eq!(release(&mut conn, &both, Duration::ZERO).await.expect("released"), [both[0].id]);
    rotation.commit().await.expect("committed");
    assert_eq!(release(&mut conn, &both, Duration::ZERO).await.expect("released"), [both[1].id]);
    assert!(release(&mut conn, &both, Duration::ZERO).await.expect("an answer").is_empty());

    let again = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    assert_eq!(again.iter().map(|target| target.attempts).collect::<Vec<_>>(), [1, 1]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_claimed_target_is_claimed_again_only_after_its_lease(pool: PgPool) {
    let (_, cluster) = declare(&pool, 1).await;
    let mut conn = connection(&pool).await;
    let claimed = claim(&mut conn, cluster, 1, LEASE).await.expect("claimed");
    assert!(claim(&mut conn, cluster, 1, LEASE).await.expect("an answer").is_empty());
    sqlx::query("UPDATE pull_secret_targets SET lease_until = now()").execute(&mut conn).await.expect("expired");

    let again = claim(&mut conn, cluster, 1, LEASE).await.expect("claimed");

    assert_eq!(again[0].lease_token, claimed[0].lease_token + 1);
    assert!(recorded(&mut conn, &[(&claimed[0], &synced("11"))]).await.is_empty(), "the first claim is fenced");
    assert_eq!(recorded(&mut conn, &[(&again[0], &synced("12"))]).await.len(), 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_changed_secret_makes_its_target_due_unless_it_is_already(pool: PgPool) {
    let (id, cluster) = declare(&pool, 3).await;
    let mut conn = connection(&pool).await;
    // n-1 is synced, n-2 waits for its backoff, n-3 is due.
    sqlx::query(
        "UPDATE pull_secret_targets SET resource_version = '1',
             state = CASE WHEN namespace = 'n-1' THEN 'synced' ELSE 'pending' END,
             next_attempt_at = CASE WHEN namespace = 'n-3' THEN now() ELSE now() + interval '30 seconds' END",
    )
    .execute(&mut conn)
    .await
    .expect("set");
    let mut changed = async |cluster: Uuid, version: Option<&str>| {
        let changed = ChangedSecrets {
            pull_secret_ids: vec![id; 3],
            namespaces: ["n-1", "n-2", "n-3"].map(str::to_owned).into(),
            resource_versions: vec![version.map(str::to_owned); 3],
        };
        mark_secrets_due(&mut conn, cluster, &changed).await.expect("an answer")
    };

    assert_eq!(changed(cluster, Some("1")).await, 0, "the version that was written");
    assert_eq!(changed(Uuid::now_v7(), None).await, 0, "another cluster");
    assert_eq!(changed(cluster, None).await, 2);
    assert_eq!(changed(cluster, Some("2")).await, 0, "all are due");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_corrupt_row_delays_no_other_target(pool: PgPool) {
    let (_, cluster) = declare(&pool, 2).await;
    sqlx::query("UPDATE pull_secret_targets SET namespace = 'Not A Name' WHERE namespace = 'n-1'")
        .execute(&pool)
        .await
        .expect("corrupted");
    let mut conn = connection(&pool).await;

    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");

    assert_eq!(claimed.iter().map(|target| target.namespace.as_str()).collect::<Vec<_>>(), ["n-2"]);
    assert!(claim(&mut conn, cluster, 2, LEASE).await.expect("claimed").is_empty(), "one attempt per lease");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn deleted_pull_secrets_without_targets_are_cleaned_up(pool: PgPool) {
    let (id, _) = declare(&pool, 1).await;
    let mut conn = connection(&pool).await;
    let exists = async |conn: &mut PgConnection| -> bool {
        delete_all_empty(conn).await.expect("deleted");
        let exists = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pull_secrets WHERE id = $1)").bind(id);
        exists.fetch_one(conn).await.expect("an answer")
    };
    sqlx::query("UPDATE pull_secrets SET deleted_at = now()").execute(&mut conn).await.expect("deleted");
    assert!(exists(&mut conn).await, "it has a target");
    sqlx::query("DELETE FROM pull_secret_targets").execute(&mut conn).await.expect("no target");
    assert!(!exists(&mut conn).await);
}

/// Entries read so far from the indexes of the table.
async fn index_entries_read(conn: &mut PgConnection) -> i64 {
    // This session's counts reach the view at the end of the statement.
    sqlx::query("SELECT pg_stat_force_next_flush()").execute(&mut *conn).await.expect("flushed");
    let query = "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = $1";
    sqlx::query_scalar(query).bind(TABLE).fetch_one(conn).await.expect("a sum")
}

/// Rotates a pull secret: claims and records all targets, with the watch reporting each write.
async fn rotate(conn: &mut PgConnection, id: Uuid, cluster: Uuid, round: i32) -> usize {
    bump_generation(conn, &[id]).await.expect("bumped");
    let (outcome, mut done) = (synced(&format!("v{round}")), 0);
    loop {
        let claimed = claim(conn, cluster, 64, LEASE).await.expect("claimed");
        if claimed.is_empty() {
            return done;
        }
        let results: Vec<_> = claimed.iter().map(|target| (target, &outcome)).collect();
        done += recorded(conn, &results).await.len();
        let changed = ChangedSecrets {
            pull_secret_ids: vec![id; claimed.len()],
            namespaces: claimed.iter().map(|target| target.namespace.to_string()).collect(),
            resource_versions: vec![outcome.written.resource_version.clone(); claimed.len()],
        };
        assert_eq!(mark_secrets_due(conn, cluster, &changed).await.expect("an answer"), 0);
    }
}

/// The first fan-outs of a new cluster run with statistics from before it existed.
///
/// On its own server: Postgres keeps index entries of dead row versions while transactions of other
/// tests are open.
#[tokio::test]
async fn a_rotation_with_stale_statistics_reads_few_index_entries() {
    const TARGETS: i32 = 5_000;
    const ENTRIES_PER_TARGET: i64 = 20;
    let mut postgres = Postgres::prepare();
    postgres.start().await;
    let pool = service_pool(&PgPool::connect_lazy(&postgres.url()).expect("a URL")).await;
    MIGRATOR.run(&pool).await.expect("migrated");
    sqlx::query("ALTER TABLE pull_secret_targets SET (autovacuum_enabled = false)").execute(&pool).await.expect("set");
    declare_in(&pool, "team-a", 15).await;
    sqlx::query("ANALYZE pull_secret_targets").execute(&pool).await.expect("analysed");
    let (id, cluster) = declare_in(&pool, "team-b", TARGETS).await;
    let mut conn = connection(&pool).await;
    let mut read_per_target = Vec::new();
    for round in 0..3 {
        let before = index_entries_read(&mut conn).await;
        let done = rotate(&mut conn, id, cluster, round).await;
        assert_eq!(done, usize::try_from(TARGETS).expect("positive"));
        read_per_target.push((index_entries_read(&mut conn).await - before) / i64::from(TARGETS));
    }
    assert!(read_per_target.iter().all(|read| *read <= ENTRIES_PER_TARGET), "{read_per_target:?} per target");
}

/// Inserts 100,000 targets of 1,000 pull secrets in 20 clusters, nearly all of them synced and not
/// due.
async fn fill(conn: &mut PgConnection) {
    for statement in [
        "INSERT INTO clusters (id, name, auth_type)
         SELECT gen_random_uuid(), 'cluster-' || number, 'inCluster' FROM generate_series(1, 20) AS number",
        "INSERT INTO pull_secrets (id, name, declaration)
         SELECT gen_random_uuid(), 'pull-' || number, '{}' FROM generate_series(1, 1000) AS number",
        "INSERT INTO pull_secret_clusters (pull_secret_id, cluster_id, selects)
         SELECT pull_secrets.id, clusters.id, true FROM pull_secrets
         JOIN clusters ON clusters.name = 'cluster-' || 1 + split_part(pull_secrets.name, '-', 2)::integer % 20",
        "INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation, applied_generation, state,
             last_synced_at, pending_since, next_attempt_at, uid, resource_version)
         SELECT link.pull_secret_id, link.cluster_id, 'namespace-' || number, 1, 1,
             CASE WHEN number = 1 THEN 'failed' ELSE 'synced' END, now(), NULL,
             now() + random() * interval '600 seconds' - interval '3 seconds', gen_random_uuid()::text, number::text
         FROM pull_secret_clusters AS link, generate_series(1, 100) AS number",
        "ANALYZE",
    ] {
        sqlx::query(statement).execute(&mut *conn).await.expect(statement);
    }
}

/// Collects the nodes of a plan that read the whole table of targets or a whole index of it.
fn scans<'a>(node: &'a Value, found: &mut Vec<&'a Value>) {
    match node {
        Value::Object(members) => {
            let text = |member: &str| members.get(member).and_then(Value::as_str).unwrap_or_default();
            let is_index_scan = text("Index Name").starts_with(TABLE) && !members.contains_key("Index Cond");
            if is_index_scan || (text("Node Type") == "Seq Scan" && text("Relation Name") == TABLE) {
                found.push(node);
            }
            members.values().for_each(|member| scans(member, found));
        }
        Value::Array(members) => members.iter().for_each(|member| scans(member, found)),
        _ => {}
    }
}

/// Part of the survey, which counts all targets for the metrics every 15 seconds.
const SURVEY: &str = "AS \"oldest_pending_seconds!\"";

/// Returns the generic plans of the queries on targets, which a busy connection uses. The queries
/// are read from `.sqlx`, which every build checks against the code.
async fn plans(conn: &mut PgConnection) -> Vec<(String, Value)> {
    sqlx::query("SET plan_cache_mode = force_generic_plan").execute(&mut *conn).await.expect("set");
    let mut plans = Vec::new();
    for file in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".sqlx")).expect(".sqlx") {
        let file = fs::read_to_string(file.expect("a file").path()).expect("text");
        let described: Value = serde_json::from_str(&file).expect("JSON");
        let query = described["query"].as_str().expect("a query");
        if !query.contains(TABLE) || query.contains(SURVEY) {
            continue;
        }
        let parameters = described["describe"]["parameters"]["Left"].as_array().map_or(0, Vec::len);
        let values = vec!["NULL"; parameters].join(", ");
        let values = if values.is_empty() { values } else { format!("({values})") };
        sqlx::raw_sql(AssertSqlSafe(format!("PREPARE one AS {query}"))).execute(&mut *conn).await.expect(query);
        let explained = sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN (FORMAT JSON) EXECUTE one{values}")));
        plans.push((query.to_owned(), explained.fetch_one(&mut *conn).await.expect(query)));
        sqlx::query("DEALLOCATE one").execute(&mut *conn).await.expect("deallocated");
    }
    plans
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn no_query_reads_all_targets(pool: PgPool) {
    let service = service_pool(&pool).await;
    let mut conn = connection(&service).await;
    fill(&mut conn).await;
    let plans = plans(&mut conn).await;
    for (query, plan) in &plans {
        let mut found = Vec::new();
        scans(plan, &mut found);
        assert!(found.is_empty(), "{query}\n{plan:#}");
    }
    assert!(plans.len() >= 20, "only {} queries of targets were found", plans.len());
}
