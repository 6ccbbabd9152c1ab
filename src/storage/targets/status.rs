//! Reads the status of targets.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::TABLE;
use crate::{
    domain::{
        names::{NamespaceName, ServiceAccountName},
        pull_secret::Written,
        rbac::Cleanup,
    },
    storage::{PgConnection, StorageError, corrupt},
};

/// Targets of a pull secret, by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Targets that should have the Secret. Each is in one of the four states below.
    pub desired: i64,
    /// In sync.
    pub synced: i64,
    /// Not reconciled since the last change.
    pub pending: i64,
    /// Last attempt failed.
    pub failed: i64,
    /// A Secret of another owner has the name.
    pub conflict: i64,
    /// Targets whose Secret is being removed.
    pub removing: i64,
    /// Clusters without a resync since the last change of the declaration.
    pub uncompared: i64,
    /// Generation that all targets have. Lags behind while the set of targets is unknown.
    pub observed_generation: i64,
}

/// All targets, by state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Survey {
    /// In sync.
    pub synced: i64,
    /// Not reconciled since the last change.
    pub pending: i64,
    /// Last attempt failed.
    pub failed: i64,
    /// A Secret of another owner has the name.
    pub conflict: i64,
    /// Targets whose Secret is being removed.
    pub removing: i64,
    /// Due and not under lease.
    pub due: i64,
    /// Under lease.
    pub claimed: i64,
    /// Age of the oldest change that has not been synced, in seconds; 0 if there is none.
    pub oldest_pending_seconds: f64,
}

/// Counts all targets. Reads the whole table.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.survey", skip_all)]
pub async fn survey(conn: &mut PgConnection) -> Result<Survey, StorageError> {
    let survey = sqlx::query_as!(
        Survey,
        r#"SELECT count(*) FILTER (WHERE wanted AND state = 'synced') AS "synced!",
               count(*) FILTER (WHERE wanted AND state = 'pending') AS "pending!",
               count(*) FILTER (WHERE wanted AND state = 'failed') AS "failed!",
               count(*) FILTER (WHERE wanted AND state = 'conflict') AS "conflict!",
               count(*) FILTER (WHERE NOT wanted) AS "removing!",
               count(*) FILTER (WHERE next_attempt_at <= now() AND (lease_until IS NULL OR lease_until <= now())) AS "due!",
               count(*) FILTER (WHERE lease_until > now()) AS "claimed!",
               coalesce(extract(epoch FROM now() - min(pending_since)), 0)::double precision AS "oldest_pending_seconds!"
           FROM pull_secret_targets"#
    );
    Ok(survey.fetch_one(conn).await?)
}

/// Counts the targets of pull secrets, in the order of `ids`.
///
/// Reads only targets that are not synced: a trigger counts the wanted ones. A synced target is
/// wanted and has the generation of its pull secret.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.count", skip_all)]
pub async fn count(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<Counts>, StorageError> {
    let rows = sqlx::query_as!(
        Counts,
        r#"SELECT wanted.total AS "desired!", wanted.total - other.wanted AS "synced!", other.pending AS "pending!",
               other.failed AS "failed!", other.conflict AS "conflict!", other.removing AS "removing!",
               compared.uncompared AS "uncompared!",
               least(
                   coalesce(other.observed_generation, pull_secrets.generation),
                   pull_secrets.generation - (compared.uncompared > 0)::integer
               ) AS "observed_generation!"
           FROM unnest($1::uuid[]) WITH ORDINALITY AS one (id, position)
           JOIN pull_secrets ON pull_secrets.id = one.id
           CROSS JOIN LATERAL (
               SELECT coalesce(sum(stored.wanted), 0)::bigint AS total
               FROM pull_secret_target_counts AS stored WHERE stored.pull_secret_id = one.id
           ) AS wanted
           CROSS JOIN LATERAL (
               SELECT count(*) FILTER (WHERE wanted) AS wanted,
                   count(*) FILTER (WHERE wanted AND state = 'pending') AS pending,
                   count(*) FILTER (WHERE wanted AND state = 'failed') AS failed,
                   count(*) FILTER (WHERE wanted AND state = 'conflict') AS conflict,
                   count(*) FILTER (WHERE NOT wanted) AS removing,
                   min(applied_generation) FILTER (WHERE wanted) AS observed_generation
               FROM pull_secret_targets WHERE pull_secret_id = one.id AND state <> 'synced'
           ) AS other
           CROSS JOIN LATERAL (
               SELECT count(*) AS uncompared FROM pull_secret_clusters AS link
               WHERE link.pull_secret_id = one.id AND link.selects AND link.compared_version < pull_secrets.version
           ) AS compared
           ORDER BY one.position"#,
        ids,
    );
    Ok(rows.fetch_all(conn).await?)
}

/// Whether every target was reconciled since the last change (synced, failed or in conflict) and
/// every cluster was resynced with this version of the declaration.
///
/// Reads only targets that are not synced, so callers may poll it.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.is_settled", skip_all, fields(pull_secret.id = %id))]
pub async fn is_settled(conn: &mut PgConnection, id: Uuid, version: i64) -> Result<bool, StorageError> {
    // An unwanted target is never `synced`, so the partial index finds the rows of both target
    // conditions.
    let settled = sqlx::query_scalar!(
        r#"SELECT NOT EXISTS (SELECT FROM pull_secret_targets WHERE pull_secret_id = $1 AND state = 'pending')
               AND NOT EXISTS (
                   SELECT FROM pull_secret_targets WHERE pull_secret_id = $1 AND state <> 'synced' AND NOT wanted
               )
               AND NOT EXISTS (
                   SELECT FROM pull_secret_clusters
                   WHERE pull_secret_id = $1 AND selects AND compared_version < $2
               ) AS "settled!""#,
        id,
        version,
    );
    Ok(settled.fetch_one(conn).await?)
}

/// Lists the namespaces of a cluster with work beyond the declarations, by pull secret: Secrets to
/// remove and `ServiceAccount`s to detach.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.cleanups", skip_all, fields(cluster.id = %cluster))]
pub async fn cleanups(
    conn: &mut PgConnection,
    cluster: Uuid,
    limit: Option<i64>,
) -> Result<BTreeMap<Uuid, Vec<Cleanup>>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT target.pull_secret_id, target.namespace, NOT target.wanted AS "removes!", beside.detaches AS "detaches!"
           FROM pull_secret_targets AS target
           JOIN pull_secrets ON pull_secrets.id = target.pull_secret_id
           CROSS JOIN LATERAL (
               SELECT ARRAY(
                   SELECT name FROM unnest(target.attached) AS name
                   WHERE NOT target.wanted OR NOT (pull_secrets.declaration -> 'serviceAccounts') ? name
               ) AS detaches
           ) AS beside
           WHERE target.cluster_id = $1 AND (NOT target.wanted OR beside.detaches <> '{}')
           ORDER BY target.pull_secret_id, target.namespace LIMIT $2"#,
        cluster,
        limit,
    )
    .fetch_all(conn)
    .await?;
    let mut cleanups: BTreeMap<Uuid, Vec<Cleanup>> = BTreeMap::new();
    for row in rows {
        let id = row.pull_secret_id;
        let namespace = NamespaceName::parse(&row.namespace).map_err(corrupt(TABLE, id, "namespace"))?;
        let detaches: Result<_, _> = row.detaches.iter().map(|name| ServiceAccountName::parse(name)).collect();
        let detaches = detaches.map_err(corrupt(TABLE, id, "attached"))?;
        cleanups.entry(id).or_default().push(Cleanup { namespace, removes: row.removes, detaches });
    }
    Ok(cleanups)
}

/// A target as a dry run needs it.
#[derive(Debug)]
pub struct KnownTarget {
    /// The cluster.
    pub cluster_id: Uuid,
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// The Secret as last written.
    pub written: Written,
}

/// Lists all targets of a pull secret by cluster and namespace.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.list_known", skip_all, fields(pull_secret.id = %id))]
pub async fn list_known(conn: &mut PgConnection, id: Uuid) -> Result<Vec<KnownTarget>, StorageError> {
    let rows = sqlx::query!(
        "SELECT cluster_id, clusters.name AS cluster, namespace, uid, resource_version, content_mac
         FROM pull_secret_targets JOIN clusters ON clusters.id = cluster_id
         WHERE pull_secret_id = $1 ORDER BY clusters.name, namespace",
        id,
    )
    .fetch_all(conn)
    .await?;
    let known = rows.into_iter().map(|row| KnownTarget {
        cluster_id: row.cluster_id,
        cluster: row.cluster,
        namespace: row.namespace,
        written: Written { uid: row.uid, resource_version: row.resource_version, content_mac: row.content_mac },
    });
    Ok(known.collect())
}
