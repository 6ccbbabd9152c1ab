//! Table `pull_secret_targets`: the Secret of a pull secret in one namespace of one cluster.
//!
//! This file creates and removes targets. [`queue`] claims them and records results, [`due`] makes
//! them due again, [`status`] and [`listing`] read them.
//!
//! Database time decides when a target is due and when a lease ends. A result is recorded only
//! under the lease token of its claim.

use uuid::Uuid;

use crate::{
    domain::pull_secret::DeletionPolicy,
    storage::{PgConnection, StorageError},
};

pub mod due;
pub mod holders;
pub mod listing;
pub mod queue;
pub mod status;

const TABLE: &str = "pull_secret_targets";

/// Applies a declaration to the targets of a pull secret and makes all of them due.
///
/// `listed` holds the cluster and the namespace of each listed target. A target that is no longer
/// listed becomes unwanted; with [`DeletionPolicy::Retain`] its row is deleted. In the clusters of
/// `selecting`, which have a namespace selector, the resync decides about unlisted targets.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.declare", skip_all, fields(pull_secret.id = %id))]
pub async fn declare(
    conn: &mut PgConnection,
    id: Uuid,
    generation: i64,
    listed: (&[Uuid], &[String]),
    selecting: &[Uuid],
    policy: DeletionPolicy,
) -> Result<(), StorageError> {
    let (clusters, namespaces) = listed;
    sqlx::query!(
        "UPDATE pull_secret_targets AS target
         SET generation = $2, state = 'pending', attempts = 0, next_attempt_at = now(),
             pending_since = coalesce(pending_since, now()),
             wanted = CASE
                 WHEN EXISTS (
                     SELECT FROM unnest($3::uuid[], $4::text[]) AS listed (cluster_id, namespace)
                     WHERE listed.cluster_id = target.cluster_id AND listed.namespace = target.namespace
                 ) THEN true
                 WHEN cluster_id = ANY($5) THEN wanted
                 ELSE false
             END
         WHERE pull_secret_id = $1",
        id,
        generation,
        clusters,
        namespaces,
        selecting,
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation)
         SELECT $1, listed.cluster_id, listed.namespace, $2
         FROM unnest($3::uuid[], $4::text[]) AS listed (cluster_id, namespace)
         ON CONFLICT DO NOTHING",
        id,
        generation,
        clusters,
        namespaces,
    )
    .execute(&mut *conn)
    .await?;
    if policy == DeletionPolicy::Retain {
        delete_unwanted(conn, id).await?;
    }
    Ok(())
}

/// Deletes the unwanted targets of a pull secret. Their Secrets stay in the clusters.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.delete_unwanted", skip_all, fields(pull_secret.id = %id))]
pub async fn delete_unwanted(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM pull_secret_targets WHERE pull_secret_id = $1 AND NOT wanted", id).execute(conn).await?;
    Ok(())
}

/// Locks all targets of pull secrets. The fixed order prevents deadlocks between transactions that
/// change many targets.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.lock_all", skip_all)]
pub async fn lock_all(conn: &mut PgConnection, pull_secrets: &[Uuid]) -> Result<(), StorageError> {
    sqlx::query!(
        "SELECT count(*) FROM (
             SELECT FROM pull_secret_targets WHERE pull_secret_id = ANY($1)
             ORDER BY pull_secret_id, cluster_id, namespace FOR NO KEY UPDATE
         ) AS locked",
        pull_secrets,
    )
    .fetch_one(conn)
    .await?;
    Ok(())
}

/// Makes `namespaces` the wanted targets of a pull secret in one cluster. Returns the number of
/// changed targets.
///
/// Targets that are already correct are not touched.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.select", skip_all, fields(pull_secret.id = %id))]
pub async fn select(
    conn: &mut PgConnection,
    id: Uuid,
    cluster: Uuid,
    generation: i64,
    namespaces: &[String],
    policy: DeletionPolicy,
) -> Result<u64, StorageError> {
    let added = sqlx::query!(
        "INSERT INTO pull_secret_targets AS target (pull_secret_id, cluster_id, namespace, generation)
         SELECT $1, $2, selected, $3 FROM unnest($4::text[]) AS selected
         ON CONFLICT (pull_secret_id, cluster_id, namespace) DO UPDATE
         SET wanted = true, state = 'pending', attempts = 0, next_attempt_at = now(),
             pending_since = coalesce(target.pending_since, now())
         WHERE NOT target.wanted",
        id,
        cluster,
        generation,
        namespaces,
    )
    .execute(&mut *conn)
    .await?
    .rows_affected();
    let removed = sqlx::query!(
        "UPDATE pull_secret_targets
         SET wanted = false, state = 'pending', attempts = 0, next_attempt_at = now(),
             pending_since = coalesce(pending_since, now())
         WHERE pull_secret_id = $1 AND cluster_id = $2 AND wanted AND namespace <> ALL($3)",
        id,
        cluster,
        namespaces,
    )
    .execute(&mut *conn)
    .await?
    .rows_affected();
    if policy == DeletionPolicy::Retain && removed > 0 {
        delete_unwanted(conn, id).await?;
    }
    Ok(added + removed)
}
