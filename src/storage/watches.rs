//! Table `cluster_watches`: which replica watches a cluster.

use std::time::Duration;

use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// A watch under lease.
#[derive(Debug, Clone)]
pub struct ClaimedWatch {
    /// The cluster.
    pub cluster_id: Uuid,
    /// Its name.
    pub cluster_name: String,
    /// Number that changes with the connection or the credential. Either needs a new connection.
    pub revision: i64,
    /// Fencing token: grows with every claim.
    pub epoch: i64,
}

/// Claims the watches of all clusters that pull secrets target and no replica watches.
#[tracing::instrument(level = "debug", name = "db.cluster_watches.claim", skip_all)]
pub async fn claim(conn: &mut PgConnection, lease: Duration) -> Result<Vec<ClaimedWatch>, StorageError> {
    let claimed = sqlx::query_as!(
        ClaimedWatch,
        r#"INSERT INTO cluster_watches AS watch (cluster_id, lease_until)
           SELECT id, now() + $1 * interval '1 second' FROM clusters
           WHERE EXISTS (SELECT FROM pull_secret_clusters WHERE cluster_id = clusters.id)
               AND NOT EXISTS (SELECT FROM cluster_watches WHERE cluster_id = clusters.id AND lease_until > now())
           ORDER BY id
           ON CONFLICT (cluster_id) DO UPDATE SET lease_until = excluded.lease_until, epoch = watch.epoch + 1
           WHERE watch.lease_until <= now()
           RETURNING cluster_id, epoch,
               (SELECT name FROM clusters WHERE id = watch.cluster_id) AS "cluster_name!",
               (SELECT version + credential_renewals FROM clusters WHERE id = watch.cluster_id) AS "revision!""#,
        lease.as_secs_f64(),
    );
    Ok(claimed.fetch_all(conn).await?)
}

/// Renews the lease of a watch and returns the current revision of the cluster.
///
/// Returns `None` if the lease was lost or no pull secret targets the cluster any more.
#[tracing::instrument(level = "debug", name = "db.cluster_watches.renew", skip_all, fields(cluster.id = %watch.cluster_id))]
pub async fn renew(
    conn: &mut PgConnection,
    watch: &ClaimedWatch,
    lease: Duration,
) -> Result<Option<i64>, StorageError> {
    let revision = sqlx::query_scalar!(
        r#"UPDATE cluster_watches AS watch SET lease_until = now() + $3 * interval '1 second'
         FROM clusters
         WHERE watch.cluster_id = $1 AND watch.epoch = $2 AND clusters.id = watch.cluster_id
             AND EXISTS (SELECT FROM pull_secret_clusters WHERE cluster_id = $1)
         RETURNING clusters.version + clusters.credential_renewals AS "revision!""#,
        watch.cluster_id,
        watch.epoch,
        lease.as_secs_f64(),
    );
    Ok(revision.fetch_optional(conn).await?)
}

/// Releases the lease of a watch.
#[tracing::instrument(level = "debug", name = "db.cluster_watches.release", skip_all, fields(cluster.id = %watch.cluster_id))]
pub async fn release(conn: &mut PgConnection, watch: &ClaimedWatch) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE cluster_watches SET lease_until = now() WHERE cluster_id = $1 AND epoch = $2",
        watch.cluster_id,
        watch.epoch,
    )
    .execute(conn)
    .await?;
    Ok(())
}
