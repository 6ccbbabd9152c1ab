//! Makes targets due again.
//!
//! Transactions lock resyncs before targets, and targets in the order of pull secret, cluster and
//! namespace. A watch skips locked rows instead.

use uuid::Uuid;

use super::lock_all;
use crate::storage::{PgConnection, StorageError, resyncs};

/// Gives all targets the generation of their pull secrets and makes them due.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.bump_generation", skip_all)]
pub async fn bump_generation(conn: &mut PgConnection, pull_secrets: &[Uuid]) -> Result<(), StorageError> {
    lock_all(&mut *conn, pull_secrets).await?;
    sqlx::query!(
        "UPDATE pull_secret_targets AS target
         SET generation = pull_secrets.generation, state = 'pending', attempts = 0, next_attempt_at = now(),
             pending_since = coalesce(pending_since, now())
         FROM pull_secrets
         WHERE pull_secrets.id = target.pull_secret_id AND pull_secrets.id = ANY($1)",
        pull_secrets,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Makes all targets of a pull secret due, and the resyncs of the clusters in which it selects
/// namespaces.
///
/// The targets become `pending`, so that a caller can wait until each was reconciled.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.mark_due", skip_all, fields(pull_secret.id = %id))]
pub async fn mark_due(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    resyncs::mark_due_for(&mut *conn, id).await?;
    lock_all(&mut *conn, &[id]).await?;
    sqlx::query!(
        "UPDATE pull_secret_targets
         SET state = 'pending', next_attempt_at = now(), attempts = 0, pending_since = coalesce(pending_since, now())
         WHERE pull_secret_id = $1",
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Makes all targets of a cluster due, and its resync.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.mark_cluster_due", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_cluster_due(conn: &mut PgConnection, cluster: Uuid) -> Result<(), StorageError> {
    resyncs::mark_due(&mut *conn, cluster).await?;
    sqlx::query!(
        "UPDATE pull_secret_targets
         SET state = 'pending', next_attempt_at = now(), attempts = 0, pending_since = coalesce(pending_since, now())
         WHERE id = ANY(ARRAY(
             SELECT id FROM pull_secret_targets WHERE cluster_id = $1
             ORDER BY pull_secret_id, namespace FOR NO KEY UPDATE
         ))",
        cluster,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Changed Secrets of a cluster, as columns for SQL's `unnest`.
#[derive(Debug, Default)]
pub struct ChangedSecrets {
    /// Pull secret of each.
    pub pull_secret_ids: Vec<Uuid>,
    /// Namespace of each.
    pub namespaces: Vec<String>,
    /// Resource version of each; none if the Secret was deleted.
    pub resource_versions: Vec<Option<String>>,
}

/// Makes the targets of changed Secrets due. Returns their number.
///
/// Skips targets at the same resource version, since most changes are regcred's own, and targets
/// that are due or under lease.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.mark_secrets_due", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_secrets_due(
    conn: &mut PgConnection,
    cluster: Uuid,
    changed: &ChangedSecrets,
) -> Result<u64, StorageError> {
    // The CTE does not filter by cluster: with outdated statistics, Postgres would choose the index
    // by cluster and read all its targets for each Secret.
    let marked = sqlx::query!(
        "WITH named AS MATERIALIZED (
             SELECT target.id, target.cluster_id, target.resource_version IS DISTINCT FROM changed.resource_version AS differs
             FROM unnest($2::uuid[], $3::text[], $4::text[]) AS changed (pull_secret_id, namespace, resource_version)
             JOIN pull_secret_targets AS target USING (pull_secret_id, namespace)
         )
         UPDATE pull_secret_targets SET next_attempt_at = now()
         WHERE id = ANY(ARRAY(
             SELECT id FROM pull_secret_targets
             WHERE id = ANY(ARRAY(SELECT id FROM named WHERE cluster_id = $1 AND differs))
                 AND lease_until IS NULL AND next_attempt_at > now()
             FOR UPDATE SKIP LOCKED
         ))",
        cluster,
        &changed.pull_secret_ids,
        &changed.namespaces,
        &changed.resource_versions as _,
    )
    .execute(conn)
    .await?;
    Ok(marked.rows_affected())
}

/// Makes the targets of a cluster due whose Secret is missing from `found`, which holds the pull
/// secret and the namespace of every Secret in the cluster. Returns their number.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.mark_missing_due", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_missing_due(
    conn: &mut PgConnection,
    cluster: Uuid,
    found: (&[Uuid], &[String]),
) -> Result<u64, StorageError> {
    let (pull_secret_ids, namespaces) = found;
    let marked = sqlx::query!(
        "UPDATE pull_secret_targets SET next_attempt_at = now()
         WHERE id = ANY(ARRAY(
             SELECT target.id FROM pull_secret_targets AS target
             WHERE target.cluster_id = $1 AND target.lease_until IS NULL AND target.next_attempt_at > now()
                 AND NOT EXISTS (
                     SELECT FROM unnest($2::uuid[], $3::text[]) AS found (pull_secret_id, namespace)
                     WHERE found.pull_secret_id = target.pull_secret_id AND found.namespace = target.namespace
                 )
             FOR UPDATE OF target SKIP LOCKED
         ))",
        cluster,
        pull_secret_ids,
        namespaces,
    )
    .execute(conn)
    .await?;
    Ok(marked.rows_affected())
}

/// Makes the resync of a cluster due, and the targets that wait for one of these namespaces.
/// Returns the number of changed rows.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.mark_namespaces_due", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_namespaces_due(
    conn: &mut PgConnection,
    cluster: Uuid,
    namespaces: &[String],
) -> Result<u64, StorageError> {
    let resyncs = resyncs::mark_due(&mut *conn, cluster).await?;
    let marked = sqlx::query!(
        "UPDATE pull_secret_targets SET next_attempt_at = now()
         WHERE id = ANY(ARRAY(
             SELECT id FROM pull_secret_targets
             WHERE cluster_id = $1 AND namespace = ANY($2) AND state = 'failed' AND lease_until IS NULL
                 AND last_error_type IN ('namespace-not-found', 'namespace-terminating')
             FOR UPDATE SKIP LOCKED
         ))",
        cluster,
        namespaces,
    )
    .execute(conn)
    .await?;
    Ok(resyncs + marked.rows_affected())
}
