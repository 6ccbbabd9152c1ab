//! Table `cluster_comparisons`: the resync of a cluster compares its namespaces with the selectors
//! of pull secrets.
//!
//! A cluster has a row while a pull secret selects namespaces in it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// A resync under lease.
#[derive(Debug, Clone)]
pub struct ClaimedResync {
    /// The cluster.
    pub cluster_id: Uuid,
    /// Its name.
    pub cluster_name: String,
    /// Token that fences the result of this claim.
    pub lease_token: i64,
}

/// Schedules a resync, due now, in each cluster in which a pull secret selects namespaces.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.schedule", skip_all, fields(pull_secret.id = %id))]
pub async fn schedule(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!(
        "INSERT INTO cluster_comparisons (cluster_id)
         SELECT cluster_id FROM pull_secret_clusters WHERE pull_secret_id = $1 AND selects ORDER BY cluster_id
         ON CONFLICT (cluster_id) DO UPDATE SET next_at = now()",
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Makes the resync of a cluster due. Returns the number of changed rows.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.mark_due", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_due(conn: &mut PgConnection, cluster: Uuid) -> Result<u64, StorageError> {
    let marked = sqlx::query!("UPDATE cluster_comparisons SET next_at = now() WHERE cluster_id = $1", cluster);
    Ok(marked.execute(conn).await?.rows_affected())
}

/// Makes the resyncs of the clusters due in which a pull secret selects namespaces.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.mark_due_for", skip_all, fields(pull_secret.id = %id))]
pub async fn mark_due_for(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE cluster_comparisons SET next_at = now() WHERE cluster_id IN (
             SELECT cluster_id FROM pull_secret_clusters WHERE pull_secret_id = $1 AND selects ORDER BY cluster_id
         )",
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Claims a due resync for the duration of `lease`.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.claim", skip_all)]
pub async fn claim(conn: &mut PgConnection, lease: Duration) -> Result<Option<ClaimedResync>, StorageError> {
    // The end of the lease is also the next resync: another value means that it was made due again.
    let claimed = sqlx::query_as!(
        ClaimedResync,
        r#"UPDATE cluster_comparisons
         SET lease_until = now() + $1 * interval '1 second', next_at = now() + $1 * interval '1 second',
             lease_token = lease_token + 1
         WHERE cluster_id = (
             SELECT cluster_id FROM cluster_comparisons
             WHERE next_at <= now() AND (lease_until IS NULL OR lease_until <= now())
             ORDER BY next_at LIMIT 1 FOR UPDATE SKIP LOCKED
         )
         RETURNING cluster_id, lease_token,
             (SELECT name FROM clusters WHERE id = cluster_id) AS "cluster_name!""#,
        lease.as_secs_f64(),
    );
    Ok(claimed.fetch_optional(conn).await?)
}

/// Records the result of a resync. The next one is due after `requeue_after`, or at once if it was
/// made due since the claim.
///
/// Deletes the row if no pull secret selects namespaces in the cluster any more.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.record_result", skip_all, fields(cluster.id = %resync.cluster_id))]
pub async fn record_result(
    conn: &mut PgConnection,
    resync: &ClaimedResync,
    error: Option<(&str, &str)>,
    requeue_after: Duration,
) -> Result<(), StorageError> {
    let (error_type, error_detail) = error.unzip();
    sqlx::query!(
        "UPDATE cluster_comparisons
         SET next_at = CASE
                 WHEN next_at IS DISTINCT FROM lease_until THEN now() ELSE now() + $3 * interval '1 second'
             END,
             compared_at = CASE WHEN $4::text IS NULL THEN now() ELSE compared_at END,
             last_error_type = $4, last_error_detail = $5, lease_until = NULL
         WHERE cluster_id = $1 AND lease_token = $2",
        resync.cluster_id,
        resync.lease_token,
        requeue_after.as_secs_f64(),
        error_type,
        error_detail,
    )
    .execute(&mut *conn)
    .await?;
    // `next_at`: the subquery does not see a declaration that commits meanwhile, which makes the
    // row due.
    sqlx::query!(
        "DELETE FROM cluster_comparisons WHERE cluster_id = $1 AND lease_until IS NULL AND next_at > now() AND NOT EXISTS (
             SELECT FROM pull_secret_clusters WHERE cluster_id = $1 AND selects
         )",
        resync.cluster_id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Last resync of a cluster in which a pull secret selects namespaces.
#[derive(Debug)]
pub struct ResyncStatus {
    /// Name of the cluster.
    pub cluster: String,
    /// Time of the last successful resync.
    pub compared_at: Option<DateTime<Utc>>,
    /// Type of the last error.
    pub last_error_type: Option<String>,
    /// Text of the last error.
    pub last_error_detail: Option<String>,
}

/// Lists the clusters in which a pull secret selects namespaces, by name.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.list", skip_all, fields(pull_secret.id = %id))]
pub async fn list(conn: &mut PgConnection, id: Uuid) -> Result<Vec<ResyncStatus>, StorageError> {
    let rows = sqlx::query_as!(
        ResyncStatus,
        r#"SELECT clusters.name AS cluster, compared_at AS "compared_at?", last_error_type AS "last_error_type?",
               last_error_detail AS "last_error_detail?"
           FROM pull_secret_clusters AS link
           JOIN clusters ON clusters.id = link.cluster_id
           LEFT JOIN cluster_comparisons ON cluster_comparisons.cluster_id = link.cluster_id
           WHERE link.pull_secret_id = $1 AND link.selects ORDER BY clusters.name"#,
        id,
    );
    Ok(rows.fetch_all(conn).await?)
}
