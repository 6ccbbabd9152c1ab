//! Table `coverage_runs`: the newest run of each cluster.
//!
//! A worker claims a requested run under a lease on the database's clock. Progress and results are
//! stored under the lease token; another request raises the token, and so does another claim after
//! the lease ended.

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    domain::caller::Actor,
    storage::{PgConnection, StorageError},
};

/// Processes that may begin a run before it fails.
const ATTEMPTS_MAX: i32 = 3;

/// Type of the error of a run that was given up.
pub const GIVEN_UP: &str = "internal";

/// A run.
#[derive(Debug, Clone)]
pub struct StoredRun {
    /// Identifier of the request.
    pub run_id: Uuid,
    /// `pending`, `running`, `succeeded` or `failed`.
    pub state: String,
    /// Time of the request.
    pub requested_at: DateTime<Utc>,
    /// Time of the first claim.
    pub started_at: Option<DateTime<Utc>>,
    /// Time of the end.
    pub finished_at: Option<DateTime<Utc>>,
    /// What it does.
    pub stage: Option<String>,
    /// How much of that is done.
    pub done: i64,
    /// How much there is; none if it is unknown.
    pub total: Option<i64>,
    /// Type of its error.
    pub error_type: Option<String>,
    /// Explanation of its error.
    pub error_detail: Option<String>,
}

impl StoredRun {
    /// Whether it is neither pending nor running.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.finished_at.is_some()
    }
}

/// A claimed run.
#[derive(Debug, Clone)]
pub struct ClaimedRun {
    /// The cluster.
    pub cluster_id: Uuid,
    /// Identifier of the request.
    pub run_id: Uuid,
    /// Kind of the actor that requested it.
    pub actor_type: String,
    /// Id of the actor's API key.
    pub actor_id: Option<Uuid>,
    /// Name of the actor.
    pub actor_name: String,
    /// Id of the actor's request.
    pub request_id: Uuid,
    /// Token that fences progress and results of this claim.
    pub lease_token: i64,
}

/// Progress of a run.
#[derive(Debug, Clone, Copy)]
pub struct RunProgress {
    /// What it does.
    pub stage: &'static str,
    /// How much of that is done.
    pub done: i64,
    /// How much there is; none if it is unknown.
    pub total: Option<i64>,
}

/// Requests a run of a cluster, unless one is pending or running. Returns whether it is new.
#[tracing::instrument(level = "debug", name = "db.coverage_runs.request", skip_all, fields(cluster.id = %cluster))]
pub async fn request(
    conn: &mut PgConnection,
    cluster: Uuid,
    run: Uuid,
    actor: &Actor,
    request: Uuid,
) -> Result<bool, StorageError> {
    let requested = sqlx::query!(
        "INSERT INTO coverage_runs AS stored (cluster_id, run_id, actor_type, actor_id, actor_name, request_id)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT ON CONSTRAINT coverage_runs_pkey DO UPDATE
         SET run_id = excluded.run_id, state = 'pending', actor_type = excluded.actor_type, actor_id = excluded.actor_id,
             actor_name = excluded.actor_name, request_id = excluded.request_id, requested_at = now(), started_at = NULL,
             finished_at = NULL, stage = NULL, done = 0, total = NULL, error_type = NULL, error_detail = NULL,
             attempts = 0, lease_until = NULL, lease_token = stored.lease_token + 1
         WHERE stored.state IN ('succeeded', 'failed')",
        cluster,
        run,
        actor.kind.as_str(),
        actor.id,
        actor.name,
        request,
    );
    Ok(requested.execute(conn).await?.rows_affected() > 0)
}

/// Finds the newest run of a cluster.
#[tracing::instrument(level = "debug", name = "db.coverage_runs.find", skip_all, fields(cluster.id = %cluster))]
pub async fn find(conn: &mut PgConnection, cluster: Uuid) -> Result<Option<StoredRun>, StorageError> {
    let found = sqlx::query_as!(
        StoredRun,
        "SELECT run_id, state, requested_at, started_at, finished_at, stage, done, total, error_type, error_detail
         FROM coverage_runs WHERE cluster_id = $1",
        cluster,
    );
    Ok(found.fetch_optional(conn).await?)
}

/// Claims the oldest run that no process carries out, for the duration of `lease`.
#[tracing::instrument(level = "debug", name = "db.coverage_runs.claim", skip_all)]
pub async fn claim(conn: &mut PgConnection, lease: Duration) -> Result<Option<ClaimedRun>, StorageError> {
    let claimed = sqlx::query_as!(
        ClaimedRun,
        "UPDATE coverage_runs
         SET state = 'running', started_at = coalesce(started_at, now()), attempts = attempts + 1,
             lease_until = now() + $1 * interval '1 second', lease_token = lease_token + 1
         WHERE cluster_id = (
             SELECT cluster_id FROM coverage_runs
             WHERE state IN ('pending', 'running') AND (lease_until IS NULL OR lease_until <= now()) AND attempts < $2
             ORDER BY requested_at LIMIT 1 FOR UPDATE SKIP LOCKED
         )
         RETURNING cluster_id, run_id, actor_type, actor_id, actor_name, request_id, lease_token",
        lease.as_secs_f64(),
        ATTEMPTS_MAX,
    );
    Ok(claimed.fetch_optional(conn).await?)
}

/// Ends the runs that several processes began and none ended, and returns them with the name of their
/// cluster. A run is returned once, regardless of the number of replicas.
#[tracing::instrument(level = "debug", name = "db.coverage_runs.give_up", skip_all)]
pub async fn give_up(conn: &mut PgConnection) -> Result<Vec<(ClaimedRun, String)>, StorageError> {
    let given_up = sqlx::query!(
        "UPDATE coverage_runs AS run
         SET state = 'failed', finished_at = now(), lease_until = NULL, stage = NULL, error_type = $2,
             error_detail = 'the processes that began the run ended before it: run it again'
         FROM clusters AS cluster
         WHERE cluster.id = run.cluster_id AND run.state = 'running' AND run.lease_until <= now() AND run.attempts >= $1
         RETURNING run.cluster_id, run.run_id, run.actor_type, run.actor_id, run.actor_name, run.request_id,
             run.lease_token, cluster.name",
        ATTEMPTS_MAX,
        GIVEN_UP,
    );
    let given_up = given_up.fetch_all(conn).await?.into_iter().map(|row| {
        let run = ClaimedRun {
            cluster_id: row.cluster_id,
            run_id: row.run_id,
            actor_type: row.actor_type,
            actor_id: row.actor_id,
            actor_name: row.actor_name,
            request_id: row.request_id,
            lease_token: row.lease_token,
        };
        (run, row.name)
    });
    Ok(given_up.collect())
}

/// Prolongs the lease of a claimed run, and stores its progress. Returns whether the lease is still
/// held.
#[tracing::instrument(level = "debug", name = "db.coverage_runs.renew", skip_all, fields(cluster.id = %run.cluster_id))]
pub async fn renew(
    conn: &mut PgConnection,
    run: &ClaimedRun,
    lease: Duration,
    progress: RunProgress,
) -> Result<bool, StorageError> {
    let renewed = sqlx::query!(
        "UPDATE coverage_runs SET lease_until = now() + $3 * interval '1 second', stage = $4, done = $5, total = $6
         WHERE cluster_id = $1 AND lease_token = $2 AND lease_until > now()",
        run.cluster_id,
        run.lease_token,
        lease.as_secs_f64(),
        progress.stage,
        progress.done,
        progress.total,
    );
    Ok(renewed.execute(conn).await?.rows_affected() > 0)
}

/// Ends a claimed run. Returns whether its lease was still held.
#[tracing::instrument(level = "debug", name = "db.coverage_runs.finish", skip_all, fields(cluster.id = %run.cluster_id))]
pub async fn finish(
    conn: &mut PgConnection,
    run: &ClaimedRun,
    error: Option<(&str, &str)>,
) -> Result<bool, StorageError> {
    let (error_type, error_detail) = error.unzip();
    let finished = sqlx::query!(
        "UPDATE coverage_runs
         SET state = CASE WHEN $3::text IS NULL THEN 'succeeded' ELSE 'failed' END, finished_at = now(), stage = NULL,
             error_type = $3, error_detail = $4, lease_until = NULL
         WHERE cluster_id = $1 AND lease_token = $2 AND lease_until > now()",
        run.cluster_id,
        run.lease_token,
        error_type,
        error_detail,
    );
    Ok(finished.execute(conn).await?.rows_affected() > 0)
}

/// Ends the lease of a run that its process does not end. Another process claims it at once.
#[tracing::instrument(level = "debug", name = "db.coverage_runs.release", skip_all, fields(cluster.id = %run.cluster_id))]
pub async fn release(conn: &mut PgConnection, run: &ClaimedRun) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE coverage_runs SET state = 'pending', lease_until = NULL, attempts = attempts - 1
         WHERE cluster_id = $1 AND lease_token = $2 AND lease_until > now()",
        run.cluster_id,
        run.lease_token,
    )
    .execute(conn)
    .await?;
    Ok(())
}
