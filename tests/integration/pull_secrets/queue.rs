//! The queue of targets by itself: results are stored in groups under their leases, and no query looks at more than it needs.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use regcred::{
    domain::pull_secret::{TargetState, Written},
    storage::{
        pull_secrets::delete_all_empty,
        targets::{
            ChangedSecrets, ClaimedTarget, Settlement, claim, delete_removed, is_settled, mark_secrets_due, release,
            settle, wait_for,
        },
    },
};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, PgPool};
use uuid::Uuid;

const TABLE: &str = "pull_secret_targets";
const LEASE: Duration = Duration::from_secs(30);

/// One pull secret with so many targets in one cluster, all of them due.
async fn declare(pool: &PgPool, targets: i32) -> (Uuid, Uuid) {
    let (id, cluster) = (Uuid::now_v7(), Uuid::now_v7());
    sqlx::query("INSERT INTO clusters (id, name, auth_type) VALUES ($1, 'here', 'inCluster')")
        .bind(cluster)
        .execute(pool)
        .await
        .expect("a cluster");
    sqlx::query("INSERT INTO pull_secrets (id, name, declaration) VALUES ($1, 'team-a', '{}')")
        .bind(id)
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

fn synced(resource_version: &str) -> Settlement {
    let written = Written {
        uid: Some("uid".to_owned()),
        resource_version: Some(resource_version.to_owned()),
        content_mac: Some(vec![1, 2, 3]),
    };
    Settlement {
        state: TargetState::Synced,
        applied: Some((1, 1)),
        written,
        attached: Vec::new(),
        error: None,
        again_after: Duration::from_mins(10),
    }
}

async fn settled(conn: &mut PgConnection, results: &[(&ClaimedTarget, &Settlement)]) -> BTreeSet<usize> {
    let cluster = results[0].0.cluster_id;
    settle(conn, cluster, results).await.expect("stored").into_iter().map(|one| one.index).collect()
}

/// State, version and next attempt (in seconds from now) of a target.
async fn stored(pool: &PgPool, namespace: &str) -> (String, Option<String>, f64) {
    let query = "SELECT state, resource_version, extract(epoch FROM next_attempt_at - now())::double precision
                 FROM pull_secret_targets WHERE namespace = $1";
    sqlx::query_as(query).bind(namespace).fetch_one(pool).await.expect("a target")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn results_are_stored_together_each_under_its_own_lease(pool: PgPool) {
    let (_, cluster) = declare(&pool, 3).await;
    let mut conn = pool.acquire().await.expect("a connection");
    let claimed = claim(&mut conn, cluster, 3, LEASE).await.expect("claimed");
    let [first, second, third] = &claimed[..] else { panic!("{claimed:?}") };
    // Somebody else took the second one when its lease was over, and somebody wants the third one looked at again.
    let mut lost = second.clone();
    lost.lease_token -= 1;
    sqlx::query("UPDATE pull_secret_targets SET next_attempt_at = now() WHERE namespace = $1")
        .bind(third.namespace.as_str())
        .execute(&mut *conn)
        .await
        .expect("poked");
    let (one, two, three) = (synced("11"), synced("12"), synced("13"));

    let done = settled(&mut conn, &[(first, &one), (&lost, &two), (third, &three)]).await;

    assert_eq!(done, BTreeSet::from([0, 2]));
    let (state, version, next) = stored(&pool, first.namespace.as_str()).await;
    assert_eq!((state.as_str(), version.as_deref()), ("synced", Some("11")));
    assert!(next > 500.0, "{next}");
    let (state, version, next) = stored(&pool, second.namespace.as_str()).await;
    assert_eq!((state.as_str(), version), ("pending", None));
    assert!(next > 0.0, "{next}");
    let (state, version, next) = stored(&pool, third.namespace.as_str()).await;
    assert_eq!((state.as_str(), version.as_deref()), ("pending", Some("13")));
    assert!(next <= 0.0, "{next}");
    // A commit whose answer was lost is tried again, and nothing comes of that.
    assert!(settled(&mut conn, &[(first, &two), (third, &two)]).await.is_empty());
    assert_eq!(stored(&pool, first.namespace.as_str()).await.1.as_deref(), Some("11"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn nobody_waits_for_a_target_with_others_locked(pool: PgPool) {
    let (_, cluster) = declare(&pool, 2).await;
    let mut conn = pool.acquire().await.expect("a connection");
    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    let [first, second] = &claimed[..] else { panic!("{claimed:?}") };
    // As a rotation does that has come to one of the two.
    let mut rotation = pool.begin().await.expect("a transaction");
    sqlx::query("UPDATE pull_secret_targets SET generation = 2, next_attempt_at = now() WHERE namespace = $1")
        .bind(second.namespace.as_str())
        .execute(&mut *rotation)
        .await
        .expect("raised");
    let (one, two) = (synced("11"), synced("12"));

    let done = settled(&mut conn, &[(first, &one), (second, &two)]).await;

    assert_eq!(done, BTreeSet::from([0]));
    let mut tx = pool.begin().await.expect("a transaction");
    let waiting = async {
        assert!(wait_for(&mut tx, second).await.expect("locked"));
        assert_eq!(settled(&mut tx, &[(second, &two)]).await, BTreeSet::from([0]));
        tx.commit().await.expect("committed");
    };
    let commits = async { rotation.commit().await.expect("committed") };
    tokio::join!(waiting, commits);
    let (state, version, next) = stored(&pool, second.namespace.as_str()).await;
    assert_eq!((state.as_str(), version.as_deref()), ("pending", Some("12")));
    assert!(next <= 0.0, "{next}");
    assert!(!wait_for(&mut conn, second).await.expect("an answer"), "its lease is over");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_target_that_is_wanted_again_is_not_deleted(pool: PgPool) {
    let (id, cluster) = declare(&pool, 2).await;
    sqlx::query("UPDATE pull_secret_targets SET wanted = false").execute(&pool).await.expect("unwanted");
    let mut conn = pool.acquire().await.expect("a connection");
    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    sqlx::query("UPDATE pull_secret_targets SET wanted = true, next_attempt_at = now() WHERE namespace = 'n-2'")
        .execute(&mut *conn)
        .await
        .expect("wanted");
    assert!(!is_settled(&mut conn, id, 1).await.expect("an answer"));

    let removed: Vec<&ClaimedTarget> = claimed.iter().collect();
    let deleted = delete_removed(&mut conn, cluster, &removed).await.expect("deleted");

    let names: Vec<&str> = deleted.iter().map(|index| claimed[*index].namespace.as_str()).collect();
    assert_eq!(names, ["n-1"]);
    // The other one has no row any more.
    assert_eq!(release(&mut conn, &removed, Duration::ZERO).await.expect("released").len(), 1);
    let again = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    assert_eq!(again.iter().map(|target| target.namespace.as_str()).collect::<Vec<_>>(), ["n-2"]);
    assert!(!is_settled(&mut conn, id, 1).await.expect("an answer"));
    settled(&mut conn, &[(&again[0], &synced("11"))]).await;
    assert!(is_settled(&mut conn, id, 1).await.expect("an answer"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_is_given_back_is_due_again_and_waits_for_nobody(pool: PgPool) {
    let (_, cluster) = declare(&pool, 2).await;
    let mut conn = pool.acquire().await.expect("a connection");
    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    let both: Vec<&ClaimedTarget> = claimed.iter().collect();
    let mut rotation = pool.begin().await.expect("a transaction");
    sqlx::query("UPDATE pull_secret_targets SET generation = 2, next_attempt_at = now() WHERE namespace = $1")
        .bind(both[1].namespace.as_str())
        .execute(&mut *rotation)
        .await
        .expect("raised");

    assert_eq!(release(&mut conn, &both, Duration::ZERO).await.expect("released"), [0]);
    rotation.commit().await.expect("committed");
    assert_eq!(release(&mut conn, &both, Duration::ZERO).await.expect("released"), [1]);
    assert!(release(&mut conn, &both, Duration::ZERO).await.expect("an answer").is_empty());

    let again = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");
    assert_eq!(again.iter().map(|target| target.attempts).collect::<Vec<_>>(), [1, 1]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_change_of_a_secret_is_looked_at_unless_that_is_to_be_done_anyway(pool: PgPool) {
    let (id, cluster) = declare(&pool, 3).await;
    let mut conn = pool.acquire().await.expect("a connection");
    // One is in order, one waits for something else, and one is due.
    sqlx::query(
        "UPDATE pull_secret_targets SET resource_version = '1',
             state = CASE WHEN namespace = 'n-1' THEN 'synced' ELSE 'pending' END,
             next_attempt_at = CASE WHEN namespace = 'n-3' THEN now() ELSE now() + interval '30 seconds' END",
    )
    .execute(&mut *conn)
    .await
    .expect("set");
    let mut changed = async |version: Option<&str>| {
        let changed = ChangedSecrets {
            ids: vec![id; 3],
            namespaces: ["n-1", "n-2", "n-3"].map(str::to_owned).into(),
            resource_versions: vec![version.map(str::to_owned); 3],
        };
        mark_secrets_due(&mut conn, cluster, &changed).await.expect("an answer")
    };

    assert_eq!(changed(Some("1")).await, 0, "it is what was written");
    assert_eq!(changed(None).await, 2);
    assert_eq!(changed(Some("2")).await, 0, "all are due by now");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_damaged_row_keeps_no_other_one_waiting(pool: PgPool) {
    let (_, cluster) = declare(&pool, 2).await;
    sqlx::query("UPDATE pull_secret_targets SET namespace = 'Not A Name' WHERE namespace = 'n-1'")
        .execute(&pool)
        .await
        .expect("damaged");
    let mut conn = pool.acquire().await.expect("a connection");

    let claimed = claim(&mut conn, cluster, 2, LEASE).await.expect("claimed");

    assert_eq!(claimed.iter().map(|target| target.namespace.as_str()).collect::<Vec<_>>(), ["n-2"]);
    assert!(claim(&mut conn, cluster, 2, LEASE).await.expect("claimed").is_empty(), "it is tried once a lease");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_a_process_did_not_come_to_delete_is_deleted(pool: PgPool) {
    let (id, _) = declare(&pool, 1).await;
    let mut conn = pool.acquire().await.expect("a connection");
    let there = async |conn: &mut PgConnection| -> bool {
        delete_all_empty(conn).await.expect("deleted");
        let there = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pull_secrets WHERE id = $1)").bind(id);
        there.fetch_one(conn).await.expect("an answer")
    };
    sqlx::query("UPDATE pull_secrets SET deleted_at = now()").execute(&mut *conn).await.expect("to be deleted");
    assert!(there(&mut conn).await, "it has a target");
    sqlx::query("DELETE FROM pull_secret_targets").execute(&mut *conn).await.expect("no target");
    assert!(!there(&mut conn).await);
}

/// 100,000 targets of 1,000 pull secrets in 20 clusters, nearly all of them in order and not due.
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

/// The nodes of a plan that read all of the table of targets, or all of an index of it.
fn scans<'a>(node: &'a Value, found: &mut Vec<&'a Value>) {
    match node {
        Value::Object(members) => {
            let text = |member: &str| members.get(member).and_then(Value::as_str).unwrap_or_default();
            let is_of_index = text("Index Name").starts_with(TABLE) && !members.contains_key("Index Cond");
            if is_of_index || (text("Node Type") == "Seq Scan" && text("Relation Name") == TABLE) {
                found.push(node);
            }
            members.values().for_each(|member| scans(member, found));
        }
        Value::Array(members) => members.iter().for_each(|member| scans(member, found)),
        _ => {}
    }
}

/// What the metrics tell is of all targets: a process with a worker counts them, every 15 seconds.
const COUNTS_ALL: &str = "AS \"oldest_pending_seconds!\"";

/// The plans of the queries of targets, for any values, which are those that a busy connection comes to use. The queries are those of
/// `.sqlx`, word by word: what is compiled in is checked against it at every build.
async fn plans(conn: &mut PgConnection, is_meant: impl Fn(&str) -> bool) -> Vec<(String, Value)> {
    sqlx::query("SET plan_cache_mode = force_generic_plan").execute(&mut *conn).await.expect("set");
    let mut plans = Vec::new();
    for file in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".sqlx")).expect(".sqlx") {
        let file = fs::read_to_string(file.expect("a file").path()).expect("text");
        let described: Value = serde_json::from_str(&file).expect("JSON");
        let query = described["query"].as_str().expect("a query");
        if !query.contains(TABLE) || !is_meant(query) {
            continue;
        }
        let parameters = described["describe"]["parameters"]["Left"].as_array().map_or(0, Vec::len);
        let values = vec!["NULL"; parameters].join(", ");
        let values = if values.is_empty() { values } else { format!("({values})") };
        sqlx::raw_sql(AssertSqlSafe(format!("PREPARE one AS {query}"))).execute(&mut *conn).await.expect(query);
        let explained = sqlx::query_scalar(AssertSqlSafe(format!("EXPLAIN (FORMAT JSON) EXECUTE one{values}")));
        plans.push((query.to_owned(), explained.fetch_one(&mut *conn).await.expect(query)));
        sqlx::query("DEALLOCATE one").execute(&mut *conn).await.expect("forgotten");
    }
    plans
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn no_query_reads_all_targets(pool: PgPool) {
    let mut conn = pool.acquire().await.expect("a connection");
    fill(&mut conn).await;
    let plans = plans(&mut conn, |query| !query.contains(COUNTS_ALL)).await;
    for (query, plan) in &plans {
        let mut found = Vec::new();
        scans(plan, &mut found);
        assert!(found.is_empty(), "{query}\n{plan:#}");
    }
    assert!(plans.len() >= 20, "only {} queries of targets were found", plans.len());
}

/// How the table of targets is read in a plan: by which index, or what else.
fn reads(node: &Value, found: &mut Vec<String>) {
    match node {
        Value::Object(members) => {
            let text = |member: &str| members.get(member).and_then(Value::as_str).unwrap_or_default();
            if text("Relation Name") == TABLE && text("Node Type").ends_with("Scan") {
                found.push(format!("{} {}", text("Node Type"), text("Index Name")));
            }
            members.values().for_each(|member| reads(member, found));
        }
        Value::Array(members) => members.iter().for_each(|member| reads(member, found)),
        _ => {}
    }
}

/// A pull secret that was declared a moment ago has its fan-outs before Postgres has looked what is in the table.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_is_named_is_looked_up_by_name_before_anything_is_known_of_the_table(pool: PgPool) {
    sqlx::query("ALTER TABLE pull_secret_targets SET (autovacuum_enabled = false)").execute(&pool).await.expect("set");
    declare(&pool, 1_000).await;
    let mut conn = pool.acquire().await.expect("a connection");
    let is_meant = |query: &str| query.contains("LATERAL") && query.contains("UPDATE pull_secret_targets AS target");
    let plans = plans(&mut conn, is_meant).await;
    for (query, plan) in &plans {
        // The rows are found first, and once.
        let found = plan.pointer("/0/Plan/Plans/0").expect("a part of its own");
        assert_eq!(found["Parent Relationship"], "InitPlan", "{query}\n{plan:#}");
        let mut how = Vec::new();
        reads(found, &mut how);
        assert_eq!(how, ["Index Scan pull_secret_targets_pkey"], "{query}\n{plan:#}");
    }
    assert_eq!(plans.len(), 3);
}
