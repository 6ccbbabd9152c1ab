//! Table `pull_secret_clusters`: the clusters that a declaration targets.

use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// Replaces the clusters of a declaration. `selects` says of each whether the declaration selects
/// namespaces in it by label.
#[tracing::instrument(level = "debug", name = "db.pull_secret_clusters.replace", skip_all, fields(pull_secret.id = %id))]
pub async fn replace(
    conn: &mut PgConnection,
    id: Uuid,
    clusters: &[Uuid],
    selects: &[bool],
) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM pull_secret_clusters WHERE pull_secret_id = $1 AND cluster_id <> ALL($2)", id, clusters)
        .execute(&mut *conn)
        .await?;
    sqlx::query!(
        "INSERT INTO pull_secret_clusters (pull_secret_id, cluster_id, selects)
         SELECT $1, one.id, one.selects FROM unnest($2::uuid[], $3::boolean[]) AS one (id, selects)
         ON CONFLICT (pull_secret_id, cluster_id) DO UPDATE SET selects = excluded.selects",
        id,
        clusters,
        selects,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Lists the pull secrets that select namespaces in a cluster.
#[tracing::instrument(level = "debug", name = "db.pull_secret_clusters.selecting", skip_all, fields(cluster.id = %cluster))]
pub async fn selecting(conn: &mut PgConnection, cluster: Uuid) -> Result<Vec<Uuid>, StorageError> {
    let ids = sqlx::query_scalar!(
        "SELECT pull_secret_id FROM pull_secret_clusters WHERE cluster_id = $1 AND selects ORDER BY pull_secret_id",
        cluster,
    );
    Ok(ids.fetch_all(conn).await?)
}

/// Records that a cluster was resynced with a version of a declaration. `unmatched` holds the places
/// in `targets` of the namespace selectors that matched nothing in it.
#[tracing::instrument(level = "debug", name = "db.pull_secret_clusters.record_resync", skip_all, fields(pull_secret.id = %id))]
pub async fn record_resync(
    conn: &mut PgConnection,
    id: Uuid,
    cluster: Uuid,
    version: i64,
    unmatched: &[i32],
) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE pull_secret_clusters SET compared_version = $3, unmatched_targets = $4
         WHERE pull_secret_id = $1 AND cluster_id = $2
             AND (compared_version < $3 OR compared_version = $3 AND unmatched_targets <> $4)",
        id,
        cluster,
        version,
        unmatched,
    )
    .execute(conn)
    .await?;
    Ok(())
}
