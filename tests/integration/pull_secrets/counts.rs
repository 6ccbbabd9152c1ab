//! Counts of targets by state against the rows themselves.

use regcred::{
    domain::pull_secret::DeletionPolicy,
    storage::{
        PgConnection,
        pull_secrets::bump_generation,
        targets::{declare, select, status},
    },
};
use sqlx::PgPool;
use uuid::Uuid;

const GENERATION: i64 = 1;

struct Targets {
    conn: PgConnection,
    pull_secrets: Vec<Uuid>,
    clusters: Vec<Uuid>,
}

impl Targets {
    async fn new(pool: &PgPool) -> Self {
        let ids = |statement| sqlx::query_scalar(statement).fetch_all(pool);
        let clusters = ids("INSERT INTO clusters (id, name, auth_type)
             SELECT gen_random_uuid(), 'cluster-' || number, 'inCluster' FROM generate_series(1, 2) AS number RETURNING id");
        let pull_secrets = ids("INSERT INTO pull_secrets (id, name, declaration)
             SELECT gen_random_uuid(), 'pull-secret-' || number, '{}' FROM generate_series(1, 2) AS number RETURNING id");
        Self {
            clusters: clusters.await.expect("clusters"),
            pull_secrets: pull_secrets.await.expect("pull secrets"),
            conn: pool.acquire().await.expect("a connection").detach().into(),
        }
    }

    async fn execute(&mut self, statement: &'static str) {
        sqlx::query(statement).execute(&mut self.conn).await.expect(statement);
    }

    /// Declares namespaces of the first cluster, and the second cluster as one with a selector.
    async fn declare(&mut self, pull_secret: usize, namespaces: &[&str], policy: DeletionPolicy) {
        let namespaces: Vec<String> = namespaces.iter().map(|name| (*name).to_owned()).collect();
        let clusters = vec![self.clusters[0]; namespaces.len()];
        let listed = (&clusters[..], &namespaces[..]);
        let id = self.pull_secrets[pull_secret];
        declare(&mut self.conn, id, GENERATION, listed, &self.clusters[1..], policy).await.expect("declared");
        self.check().await;
    }

    /// Stores what a resync of the second cluster found.
    async fn select(&mut self, pull_secret: usize, namespaces: &[&str], policy: DeletionPolicy) {
        let namespaces: Vec<String> = namespaces.iter().map(|name| (*name).to_owned()).collect();
        let (id, cluster) = (self.pull_secrets[pull_secret], self.clusters[1]);
        select(&mut self.conn, id, cluster, GENERATION, &namespaces, policy).await.expect("selected");
        self.check().await;
    }

    /// Records that the wanted targets in namespaces like `pattern` are in `state`.
    async fn record(&mut self, pattern: &str, state: &str) {
        sqlx::query(
            "UPDATE pull_secret_targets SET state = $2, applied_generation = generation
             WHERE namespace LIKE $1 AND wanted",
        )
        .bind(pattern)
        .bind(state)
        .execute(&mut self.conn)
        .await
        .expect("recorded");
        self.check().await;
    }

    /// Compares the counts with the rows.
    async fn check(&mut self) {
        let counts = status::count(&mut self.conn, &self.pull_secrets).await.expect("counts");
        for (id, counts) in self.pull_secrets.iter().zip(&counts) {
            let in_state = async |conn: &mut PgConnection, condition: &str| -> i64 {
                let statement =
                    format!("SELECT count(*) FROM pull_secret_targets WHERE pull_secret_id = $1 AND {condition}");
                sqlx::query_scalar(sqlx::AssertSqlSafe(statement)).bind(id).fetch_one(conn).await.expect("a count")
            };
            let conn = &mut self.conn;
            assert_eq!(counts.desired, in_state(conn, "wanted").await);
            assert_eq!(counts.synced, in_state(conn, "wanted AND state = 'synced'").await);
            assert_eq!(counts.pending, in_state(conn, "wanted AND state = 'pending'").await);
            assert_eq!(counts.failed, in_state(conn, "wanted AND state = 'failed'").await);
            assert_eq!(counts.conflict, in_state(conn, "wanted AND state = 'conflict'").await);
            assert_eq!(counts.removing, in_state(conn, "NOT wanted").await);
            let observed: Option<i64> = sqlx::query_scalar(
                "SELECT coalesce(min(applied_generation), max(pull_secrets.generation))
                 FROM pull_secrets LEFT JOIN pull_secret_targets ON pull_secret_id = pull_secrets.id AND wanted
                 WHERE pull_secrets.id = $1",
            )
            .bind(id)
            .fetch_one(conn)
            .await
            .expect("a generation");
            assert_eq!(Some(counts.observed_generation), observed);
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn counts_are_those_of_the_rows_after_every_change(pool: PgPool) {
    use DeletionPolicy::{Delete, Retain};
    let mut targets = Targets::new(&pool).await;
    targets.check().await;
    targets.declare(0, &["a-1", "a-2", "a-3"], Delete).await;
    targets.declare(1, &["b-1"], Delete).await;
    targets.select(0, &["a-4", "a-5"], Delete).await;
    targets.record("%", "synced").await;
    targets.record("a-2", "failed").await;
    targets.record("a-5", "conflict").await;
    // A namespace leaves the list, and another one the selection: both Secrets are removed.
    targets.declare(0, &["a-1", "a-2"], Delete).await;
    targets.select(0, &["a-5"], Delete).await;
    targets.record("%", "synced").await;
    // Wanted again, before it was removed.
    targets.select(0, &["a-4", "a-5"], Delete).await;
    targets.execute("DELETE FROM pull_secret_targets WHERE NOT wanted").await;
    targets.check().await;
    // With `retain`, rows are deleted in the same transaction.
    targets.declare(0, &["a-2"], Retain).await;
    targets.select(0, &[], Retain).await;
    let ids = targets.pull_secrets.clone();
    bump_generation(&mut targets.conn, &ids).await.expect("a rotation");
    targets.check().await;
    targets.record("b-%", "synced").await;
    // Of both pull secrets in one statement, and nothing of the last transaction that was rolled back.
    targets.execute("BEGIN").await;
    targets.execute("DELETE FROM pull_secret_targets").await;
    targets.check().await;
    targets.execute("ROLLBACK").await;
    targets.check().await;
    targets.execute("UPDATE pull_secret_targets SET wanted = false, state = 'pending'").await;
    targets.check().await;
    let stored: Vec<i64> =
        sqlx::query_scalar("SELECT wanted FROM pull_secret_target_counts").fetch_all(&pool).await.expect("counts");
    assert_eq!(stored, [0, 0]);
    targets.execute("DELETE FROM pull_secret_targets").await;
    targets.execute("DELETE FROM pull_secrets").await;
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM pull_secret_target_counts").fetch_one(&pool).await.expect("a count");
    assert_eq!(left, 0);
}
