//! End and renewal of clusters' credentials, in columns of `clusters`.
//!
//! These writes do not increment the version of a cluster: no caller changed it.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    domain::sealed::Sealed,
    storage::{PgConnection, StorageError, clusters::StoredCluster},
};

/// Lists clusters that an earlier release wrote, whose credential is not described.
#[tracing::instrument(level = "debug", name = "db.clusters.undescribed", skip_all)]
pub async fn undescribed(conn: &mut PgConnection, limit: i64) -> Result<Vec<Uuid>, StorageError> {
    let ids = sqlx::query_scalar!(
        "SELECT id FROM clusters WHERE credential_version IS DISTINCT FROM version LIMIT $1",
        limit
    );
    Ok(ids.fetch_all(conn).await?)
}

/// Describes the credential of one version of a cluster, unless another process has done so.
#[tracing::instrument(level = "debug", name = "db.clusters.describe", skip_all, fields(cluster.id = %cluster.id))]
pub async fn describe(
    conn: &mut PgConnection,
    cluster: &StoredCluster,
    expires_at: Option<DateTime<Utc>>,
) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE clusters
         SET credential_version = version, credential_expires_at = $3, expiry_warned_days = NULL,
             service_account_namespace = NULL, service_account_name = NULL, next_renewal_at = NULL
         WHERE id = $1 AND version = $2 AND credential_version IS DISTINCT FROM version",
        cluster.id,
        cluster.version,
        expires_at,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Due expiry warning of a credential.
#[derive(Debug)]
pub struct Expiring {
    /// Name of the cluster.
    pub name: String,
    /// End of the credential.
    pub expires_at: DateTime<Utc>,
    /// Maximum number of days left.
    pub days: i16,
}

/// Claims due expiry warnings. Each warning is returned once, regardless of the number of replicas.
/// A token that is renewed has none until a renewal fails.
#[tracing::instrument(level = "debug", name = "db.clusters.claim_expiry_warnings", skip_all)]
pub async fn claim_warnings(conn: &mut PgConnection, days: &[i16], limit: i64) -> Result<Vec<Expiring>, StorageError> {
    let rows = sqlx::query_as!(
        Expiring,
        r#"UPDATE clusters SET expiry_warned_days = due.days
           FROM (
               SELECT id AS due_id,
                   (SELECT min(d) FROM unnest($1::smallint[]) AS d
                    WHERE credential_expires_at <= now() + d * interval '1 day') AS days
               FROM clusters
               WHERE credential_expires_at <= now() + (SELECT max(d) FROM unnest($1::smallint[]) AS d) * interval '1 day'
                   AND credential_version = version AND (service_account_name IS NULL OR renewal_failures > 0)
                   AND coalesce(expiry_warned_days, 32767) >
                       (SELECT min(d) FROM unnest($1::smallint[]) AS d
                        WHERE credential_expires_at <= now() + d * interval '1 day')
               ORDER BY credential_expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
           ) AS due
           WHERE id = due.due_id
           RETURNING name, credential_expires_at AS "expires_at!", due.days AS "days!""#,
        days,
        limit,
    );
    Ok(rows.fetch_all(conn).await?)
}

/// Counts the clusters whose credential ends within each of `days`, including ended ones.
#[tracing::instrument(level = "debug", name = "db.clusters.count_expiring", skip_all)]
pub async fn count_expiring(conn: &mut PgConnection, days: &[i16]) -> Result<Vec<(i16, i64)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT d AS "days!",
               (SELECT count(*) FROM clusters
                WHERE credential_expires_at <= now() + d * interval '1 day' AND credential_version = version
                    AND (service_account_name IS NULL OR renewal_failures > 0)) AS "count!"
           FROM unnest($1::smallint[]) AS d"#,
        days,
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(|row| (row.days, row.count)).collect())
}

/// Claims due renewals for `lease_seconds`, longest overdue first.
#[tracing::instrument(level = "debug", name = "db.clusters.claim_renewals", skip_all)]
pub async fn claim_renewals(
    conn: &mut PgConnection,
    limit: i64,
    lease_seconds: i32,
) -> Result<Vec<Uuid>, StorageError> {
    let ids = sqlx::query_scalar!(
        "UPDATE clusters SET next_renewal_at = now() + $2::integer * interval '1 second'
         WHERE id IN (
             SELECT id FROM clusters WHERE next_renewal_at <= now() AND credential_version = version
             ORDER BY next_renewal_at LIMIT $1 FOR UPDATE SKIP LOCKED
         )
         RETURNING id",
        limit,
        lease_seconds,
    );
    Ok(ids.fetch_all(conn).await?)
}

/// Replaces the token of a cluster by its renewal, and schedules the next one at half of its life,
/// with jitter. Returns `false` if the cluster or its token has changed since it was read.
#[tracing::instrument(level = "debug", name = "db.clusters.record_renewal", skip_all, fields(cluster.id = %cluster.id))]
pub async fn record_renewal(
    conn: &mut PgConnection,
    cluster: &StoredCluster,
    credential: &Sealed,
    expires_at: DateTime<Utc>,
) -> Result<bool, StorageError> {
    let renewed = sqlx::query!(
        "UPDATE clusters
         SET credential = $4, credential_key_id = $5, credential_expires_at = $6, expiry_warned_days = NULL,
             credential_renewals = credential_renewals + 1, renewal_failures = 0, renewal_error = NULL,
             next_renewal_at = now() + greatest(interval '1 minute', ($6 - now()) * (0.45 + 0.1 * random()))
         WHERE id = $1 AND version = $2 AND credential_renewals = $3 AND credential_version = version",
        cluster.id,
        cluster.version,
        cluster.renewals,
        credential.bytes,
        credential.key_id,
        expires_at,
    )
    .execute(conn)
    .await?;
    Ok(renewed.rows_affected() > 0)
}

/// Records a failed renewal and schedules the next attempt. The token stays.
#[tracing::instrument(level = "debug", name = "db.clusters.record_renewal_failure", skip_all, fields(cluster.id = %cluster.id))]
pub async fn record_renewal_failure(
    conn: &mut PgConnection,
    cluster: &StoredCluster,
    error: &str,
    retry_seconds: i32,
) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE clusters
         SET renewal_failures = renewal_failures + 1, renewal_error = $4,
             next_renewal_at = now() + $5::integer * interval '1 second'
         WHERE id = $1 AND version = $2 AND credential_renewals = $3 AND credential_version = version",
        cluster.id,
        cluster.version,
        cluster.renewals,
        error,
        retry_seconds,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Counts the clusters whose last renewal failed.
#[tracing::instrument(level = "debug", name = "db.clusters.count_failing_renewals", skip_all)]
pub async fn count_failing_renewals(conn: &mut PgConnection) -> Result<i64, StorageError> {
    let count = sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM clusters
           WHERE next_renewal_at IS NOT NULL AND renewal_failures > 0 AND credential_version = version"#
    );
    Ok(count.fetch_one(conn).await?)
}
