//! The targets of pull secrets: declared, claimed, settled and looked at; and when a cluster's namespaces are compared with the
//! selectors.
//!
//! Time is the database's. Who works on a target holds its lease; a result is stored under the token of that lease alone.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    domain::{
        names::{NamespaceName, ServiceAccountName},
        pull_secret::{DeletionPolicy, TargetState, Written},
        rights::Leftover,
    },
    storage::{PageRequest, StorageError, corrupt},
};

const TABLE: &str = "pull_secret_targets";

/// Makes the named targets of a pull secret what a declaration says: those that are not named any more are to be removed, or with
/// [`DeletionPolicy::Retain`] forgotten. Where the declaration selects by label, the comparison of namespaces decides about the rest.
/// All are due with that.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.declare", skip_all, fields(pull_secret.id = %id))]
pub async fn declare(
    conn: &mut PgConnection,
    id: Uuid,
    generation: i64,
    (clusters, namespaces): (&[Uuid], &[String]),
    selecting: &[Uuid],
    policy: DeletionPolicy,
) -> Result<(), StorageError> {
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
        forget_unwanted(conn, id).await?;
    }
    Ok(())
}

/// Forgets the targets of a pull secret that are not wanted; their Secrets stay.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.forget_unwanted", skip_all, fields(pull_secret.id = %id))]
pub async fn forget_unwanted(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM pull_secret_targets WHERE pull_secret_id = $1 AND NOT wanted", id).execute(conn).await?;
    Ok(())
}

/// Locks all targets of pull secrets, in the order of the key: so that of two who change many, one waits for the other, and never
/// both.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.lock", skip_all)]
pub async fn lock(conn: &mut PgConnection, pull_secrets: &[Uuid]) -> Result<(), StorageError> {
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

/// Has all targets of a pull secret looked at again now.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.poke", skip_all, fields(pull_secret.id = %id))]
pub async fn mark_due(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    // Comparisons first, as whoever declares does it.
    sqlx::query!(
        "UPDATE cluster_comparisons SET next_at = now() WHERE cluster_id IN (
             SELECT cluster_id FROM pull_secret_clusters WHERE pull_secret_id = $1 AND selects ORDER BY cluster_id
         )",
        id,
    )
    .execute(&mut *conn)
    .await?;
    lock(&mut *conn, &[id]).await?;
    // Pending, so that whoever waits for it waits until each was looked at.
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

/// Has all targets of a cluster looked at again now, and its namespaces compared: it is another one.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.poke_cluster", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_cluster_due(conn: &mut PgConnection, cluster: Uuid) -> Result<(), StorageError> {
    sqlx::query!("UPDATE cluster_comparisons SET next_at = now() WHERE cluster_id = $1", cluster)
        .execute(&mut *conn)
        .await?;
    // In the order of the key, as `lock` has it.
    sqlx::query!(
        "UPDATE pull_secret_targets
         SET state = 'pending', next_attempt_at = now(), attempts = 0, pending_since = coalesce(pending_since, now())
         WHERE cluster_id = $1 AND (pull_secret_id, namespace) IN (
             SELECT pull_secret_id, namespace FROM pull_secret_targets WHERE cluster_id = $1
             ORDER BY pull_secret_id, namespace FOR NO KEY UPDATE
         )",
        cluster,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What a declaration of namespaces by label makes of one cluster.
///
/// Those of `namespaces` that have no target get one; those that are not among them lose theirs. Neither touches what is as it
/// shall be. How many were changed.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.select", skip_all, fields(pull_secret.id = %id))]
pub async fn select(
    conn: &mut PgConnection,
    id: Uuid,
    cluster: Uuid,
    generation: i64,
    namespaces: &[String],
    policy: DeletionPolicy,
) -> Result<u64, StorageError> {
    let made = sqlx::query!(
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
    let unmade = sqlx::query!(
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
    if policy == DeletionPolicy::Retain && unmade > 0 {
        forget_unwanted(conn, id).await?;
    }
    Ok(made + unmade)
}

/// A target that somebody works on.
#[derive(Debug, Clone)]
pub struct ClaimedTarget {
    /// The pull secret.
    pub pull_secret_id: Uuid,
    /// The cluster.
    pub cluster_id: Uuid,
    /// The namespace.
    pub namespace: NamespaceName,
    /// Whether the Secret shall be there.
    pub wanted: bool,
    /// How it was doing.
    pub state: String,
    /// What is wanted of it.
    pub generation: i64,
    /// What it has.
    pub applied_generation: i64,
    /// The version of the declaration that it has.
    pub applied_version: i64,
    /// What was written last.
    pub written: Written,
    /// The `ServiceAccount`s that regcred attached the Secret to.
    pub attached: Vec<ServiceAccountName>,
    /// Tries, this one included.
    pub attempts: i32,
    /// What a result is stored under.
    pub lease_token: i64,
    /// The error that is stored, to tell a new one from it.
    pub last_error_type: Option<String>,
}

/// The clusters that have targets that are due, with their versions.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.due_clusters", skip_all)]
pub async fn due_clusters(conn: &mut PgConnection) -> Result<Vec<(Uuid, i64)>, StorageError> {
    let clusters = sqlx::query!(
        "SELECT id, version FROM clusters WHERE EXISTS (
             SELECT FROM pull_secret_targets
             WHERE cluster_id = clusters.id AND next_attempt_at <= now()
                 AND (lease_until IS NULL OR lease_until <= now())
         )"
    );
    Ok(clusters.fetch_all(conn).await?.into_iter().map(|row| (row.id, row.version)).collect())
}

/// Takes targets of a cluster that are due, those that wait longest first, so that nobody else takes them within the lease. A row
/// that is damaged is left out: it keeps no other one waiting, and is tried again, and logged, once a lease.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.claim", skip_all, fields(cluster.id = %cluster))]
pub async fn claim(
    conn: &mut PgConnection,
    cluster: Uuid,
    limit: i64,
    lease: Duration,
) -> Result<Vec<ClaimedTarget>, StorageError> {
    // Materialized, or a join may run the limited query once for each row, and take everything.
    // The next attempt is set to the end of the lease exactly: whoever wants the target looked at again meanwhile sets another
    // time, and is seen by that.
    let rows = sqlx::query!(
        r#"WITH due AS MATERIALIZED (
               SELECT pull_secret_id, namespace FROM pull_secret_targets
               WHERE cluster_id = $1 AND next_attempt_at <= now() AND (lease_until IS NULL OR lease_until <= now())
               ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED
           )
           UPDATE pull_secret_targets AS target
           SET lease_until = now() + $3 * interval '1 second', next_attempt_at = now() + $3 * interval '1 second',
               lease_token = lease_token + 1,
               attempts = CASE WHEN state = 'synced' THEN 1 ELSE attempts + 1 END
           FROM due
           WHERE target.pull_secret_id = due.pull_secret_id AND target.cluster_id = $1
               AND target.namespace = due.namespace
           RETURNING target.pull_secret_id, target.namespace, wanted, state, generation, applied_generation,
               applied_version, uid, resource_version, content_mac, attached, attempts, lease_token, last_error_type"#,
        cluster,
        limit,
        lease.as_secs_f64(),
    )
    .fetch_all(conn)
    .await?;
    let targets = rows.into_iter().map(|row| {
        let id = row.pull_secret_id;
        let attached = row.attached.iter().map(|name| ServiceAccountName::parse(name)).collect::<Result<_, _>>();
        Ok(ClaimedTarget {
            pull_secret_id: id,
            cluster_id: cluster,
            namespace: NamespaceName::parse(&row.namespace).map_err(corrupt(TABLE, id, "namespace"))?,
            wanted: row.wanted,
            state: row.state,
            generation: row.generation,
            applied_generation: row.applied_generation,
            applied_version: row.applied_version,
            written: Written { uid: row.uid, resource_version: row.resource_version, content_mac: row.content_mac },
            attached: attached.map_err(corrupt(TABLE, id, "attached"))?,
            attempts: row.attempts,
            lease_token: row.lease_token,
            last_error_type: row.last_error_type,
        })
    });
    let is_damaged = |error: &StorageError| tracing::error!(%error, "a target of a pull secret cannot be worked on");
    Ok(targets.filter_map(|target| target.inspect_err(is_damaged).ok()).collect())
}

/// What a try came to.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// How the target is doing now.
    pub state: TargetState,
    /// Generation and version that the cluster has now; none where nothing was brought up to date.
    pub applied: Option<(i64, i64)>,
    /// What is known of the Secret.
    pub written: Written,
    /// The `ServiceAccount`s that regcred attached it to.
    pub attached: Vec<ServiceAccountName>,
    /// What is in the way: a slug, and a sentence.
    pub error: Option<(&'static str, String)>,
    /// When to look again.
    pub again_after: Duration,
}

/// A target whose result was stored.
#[derive(Debug)]
pub struct Settled {
    /// Its place among the results that were given.
    pub index: usize,
    /// The seconds from the change to its being in order, where it is.
    pub seconds: Option<f64>,
}

/// Stores what tries of targets of one cluster came to, and ends their leases; nothing where somebody else has the target by
/// now. Where something changed since the claim, the target is due again at once.
///
/// What others have locked is left out, so that this never waits with some rows locked; [`wait_for`] waits for one. Gives those
/// that were stored.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.settle", skip_all, fields(results = results.len()))]
pub async fn settle(
    conn: &mut PgConnection,
    cluster: Uuid,
    results: &[(&ClaimedTarget, &Settlement)],
) -> Result<Vec<Settled>, StorageError> {
    macro_rules! column {
        ($target:ident, $settlement:ident => $value:expr) => {
            results.iter().map(|($target, $settlement)| $value).collect::<Vec<_>>()
        };
    }
    // A tenth more or less, so that what was settled together does not come back together.
    let jittered =
        |after: Duration| after.as_secs_f64() * (0.9 + 0.2 * f64::from(Uuid::now_v7().as_bytes()[15]) / 255.0);
    let attached: Vec<String> = column!(_target, settlement => {
        // No name has a space in it.
        settlement.attached.iter().map(ServiceAccountName::as_str).collect::<Vec<_>>().join(" ")
    });
    // Old values are read from the rows that are locked, so that what others changed meanwhile counts.
    // A lease that has ended was ended by whoever stored this result before: it is not stored twice.
    // The rows are found and locked apart from the update, and one by one (LATERAL), here and wherever rows are named. All of it as one
    // join would be as quick with fresh statistics; without them, as it is in the first fan-out of a pull secret, Postgres may walk
    // through all targets of the cluster for each of the results.
    let rows = sqlx::query!(
        r#"WITH held AS (
               SELECT target.pull_secret_id, target.namespace, target.pending_since,
                   target.next_attempt_at IS DISTINCT FROM target.lease_until AS changed, result.position, result.state,
                   result.generation, result.version, result.uid, result.resource_version, result.content_mac,
                   result.attached, result.error_type, result.error_detail, result.again_after
               FROM unnest($2::uuid[], $3::text[], $4::bigint[], $5::text[], $6::bigint[], $7::bigint[], $8::text[],
                   $9::text[], $10::bytea[], $11::text[], $12::text[], $13::text[], $14::double precision[])
                   WITH ORDINALITY AS result (id, namespace, token, state, generation, version, uid,
                       resource_version, content_mac, attached, error_type, error_detail, again_after, position)
               CROSS JOIN LATERAL (
                   SELECT pull_secret_id, namespace, pending_since, next_attempt_at, lease_until FROM pull_secret_targets
                   WHERE pull_secret_id = result.id AND cluster_id = $1 AND namespace = result.namespace
                       AND lease_token = result.token AND lease_until IS NOT NULL
                   FOR UPDATE SKIP LOCKED
               ) AS target
           )
           UPDATE pull_secret_targets AS target
           SET state = CASE WHEN held.changed THEN 'pending' ELSE held.state END,
               applied_generation = coalesce(held.generation, target.applied_generation),
               applied_version = coalesce(held.version, target.applied_version),
               uid = held.uid, resource_version = held.resource_version, content_mac = held.content_mac,
               attached = string_to_array(held.attached, ' '),
               last_error_type = held.error_type, last_error_detail = held.error_detail,
               next_attempt_at = CASE
                   WHEN held.changed THEN now() ELSE now() + held.again_after * interval '1 second'
               END,
               last_synced_at = CASE WHEN held.state = 'synced' THEN now() ELSE target.last_synced_at END,
               pending_since = CASE
                   WHEN held.state = 'synced' AND NOT held.changed THEN NULL ELSE target.pending_since
               END,
               lease_until = NULL
           FROM held
           WHERE target.pull_secret_id = held.pull_secret_id AND target.cluster_id = $1
               AND target.namespace = held.namespace
           RETURNING held.position AS "position!", CASE WHEN held.state = 'synced' AND NOT held.changed
               THEN extract(epoch FROM now() - held.pending_since)::double precision END AS seconds"#,
        cluster,
        &column!(target, _settlement => target.pull_secret_id),
        &column!(target, _settlement => target.namespace.as_str()) as &[&str],
        &column!(target, _settlement => target.lease_token),
        &column!(_target, settlement => settlement.state.as_str()) as &[&str],
        &column!(_target, settlement => settlement.applied.map(|(generation, _)| generation)) as &[Option<i64>],
        &column!(_target, settlement => settlement.applied.map(|(_, version)| version)) as &[Option<i64>],
        &column!(_target, settlement => settlement.written.uid.as_deref()) as &[Option<&str>],
        &column!(_target, settlement => settlement.written.resource_version.as_deref()) as &[Option<&str>],
        &column!(_target, settlement => settlement.written.content_mac.as_deref()) as &[Option<&[u8]>],
        &attached,
        &column!(_target, settlement => settlement.error.as_ref().map(|(slug, _)| *slug)) as &[Option<&str>],
        &column!(_target, settlement => settlement.error.as_ref().map(|(_, detail)| detail.as_str()))
            as &[Option<&str>],
        &column!(_target, settlement => jittered(settlement.again_after)),
    )
    .fetch_all(conn)
    .await?;
    let settled = rows.into_iter().filter_map(|row| {
        // Counted from one.
        let index = usize::try_from(row.position).ok()?.checked_sub(1)?;
        Some(Settled { index, seconds: row.seconds })
    });
    Ok(settled.collect())
}

/// Waits for whoever has a target locked, and locks it; whether its lease is still the one under which it was claimed.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.wait_for", skip_all)]
pub async fn wait_for(conn: &mut PgConnection, target: &ClaimedTarget) -> Result<bool, StorageError> {
    let locked = sqlx::query_scalar!(
        r#"SELECT true AS "locked!" FROM pull_secret_targets
           WHERE pull_secret_id = $1 AND cluster_id = $2 AND namespace = $3 AND lease_token = $4
               AND lease_until IS NOT NULL
           FOR UPDATE"#,
        target.pull_secret_id,
        target.cluster_id,
        target.namespace.as_str(),
        target.lease_token,
    );
    Ok(locked.fetch_optional(conn).await?.is_some())
}

/// Deletes targets of one cluster whose Secrets were removed, where nobody wants them again and nobody else has them by now. As
/// [`settle`] does, this leaves out what others have locked. Gives the places of those that were deleted.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.delete_removed", skip_all, fields(removed = removed.len()))]
pub async fn delete_removed(
    conn: &mut PgConnection,
    cluster: Uuid,
    removed: &[&ClaimedTarget],
) -> Result<Vec<usize>, StorageError> {
    let ids: Vec<Uuid> = removed.iter().map(|target| target.pull_secret_id).collect();
    let namespaces: Vec<&str> = removed.iter().map(|target| target.namespace.as_str()).collect();
    let tokens: Vec<i64> = removed.iter().map(|target| target.lease_token).collect();
    let positions = sqlx::query_scalar!(
        r#"WITH held AS (
               SELECT target.pull_secret_id, target.namespace, mine.position
               FROM unnest($2::uuid[], $3::text[], $4::bigint[]) WITH ORDINALITY AS mine (id, namespace, token, position)
               JOIN pull_secret_targets AS target ON target.pull_secret_id = mine.id AND target.cluster_id = $1
                   AND target.namespace = mine.namespace
               WHERE target.lease_token = mine.token AND NOT target.wanted
               FOR UPDATE OF target SKIP LOCKED
           )
           DELETE FROM pull_secret_targets AS target USING held
           WHERE target.pull_secret_id = held.pull_secret_id AND target.cluster_id = $1
               AND target.namespace = held.namespace
           RETURNING held.position AS "position!""#,
        cluster,
        &ids,
        &namespaces as &[&str],
        &tokens,
    )
    .fetch_all(conn)
    .await?;
    Ok(places(positions))
}

/// Gives targets back that were not worked on: they are due after `after`, and the try does not count. As [`settle`] does, this
/// leaves out what others have locked. Gives the places of those that were given back.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.release", skip_all)]
pub async fn release(
    conn: &mut PgConnection,
    targets: &[&ClaimedTarget],
    after: Duration,
) -> Result<Vec<usize>, StorageError> {
    let ids: Vec<Uuid> = targets.iter().map(|target| target.pull_secret_id).collect();
    let clusters: Vec<Uuid> = targets.iter().map(|target| target.cluster_id).collect();
    let namespaces: Vec<&str> = targets.iter().map(|target| target.namespace.as_str()).collect();
    let tokens: Vec<i64> = targets.iter().map(|target| target.lease_token).collect();
    let positions = sqlx::query_scalar!(
        r#"WITH held AS (
             SELECT target.pull_secret_id, target.cluster_id, target.namespace, mine.position
             FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::bigint[]) WITH ORDINALITY
                 AS mine (id, cluster_id, namespace, token, position)
             CROSS JOIN LATERAL (
                 SELECT pull_secret_id, cluster_id, namespace FROM pull_secret_targets
                 WHERE pull_secret_id = mine.id AND cluster_id = mine.cluster_id AND namespace = mine.namespace
                     AND lease_token = mine.token AND lease_until IS NOT NULL
                 FOR UPDATE SKIP LOCKED
             ) AS target
         )
         UPDATE pull_secret_targets AS target
         SET lease_until = NULL, attempts = greatest(attempts - 1, 0),
             next_attempt_at = CASE
                 WHEN next_attempt_at IS DISTINCT FROM lease_until THEN now() ELSE now() + $5 * interval '1 second'
             END
         FROM held
         WHERE target.pull_secret_id = held.pull_secret_id AND target.cluster_id = held.cluster_id
             AND target.namespace = held.namespace
         RETURNING held.position AS "position!""#,
        &ids,
        &clusters,
        &namespaces as &[&str],
        &tokens,
        after.as_secs_f64(),
    )
    .fetch_all(conn)
    .await?;
    Ok(places(positions))
}

/// Places among what was given, which Postgres counts from one.
fn places(positions: Vec<i64>) -> Vec<usize> {
    positions.into_iter().filter_map(|position| usize::try_from(position).ok()?.checked_sub(1)).collect()
}

/// Whether somebody still holds the lease of a target.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.is_held", skip_all)]
pub async fn is_held(conn: &mut PgConnection, target: &ClaimedTarget) -> Result<bool, StorageError> {
    let held = sqlx::query_scalar!(
        r#"SELECT EXISTS (
               SELECT FROM pull_secret_targets
               WHERE pull_secret_id = $1 AND cluster_id = $2 AND namespace = $3 AND lease_token = $4
                   AND lease_until > now()
           ) AS "held!""#,
        target.pull_secret_id,
        target.cluster_id,
        target.namespace.as_str(),
        target.lease_token,
    );
    Ok(held.fetch_one(conn).await?)
}

/// Says of all targets of a cluster that wait for their first try of a change what keeps the cluster from being called.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.mark_waiting", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_waiting(
    conn: &mut PgConnection,
    cluster: Uuid,
    error_type: &str,
    error_detail: &str,
) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE pull_secret_targets SET state = 'failed', last_error_type = $2, last_error_detail = $3
         WHERE (pull_secret_id, cluster_id, namespace) IN (
             SELECT pull_secret_id, cluster_id, namespace FROM pull_secret_targets
             WHERE cluster_id = $1 AND state = 'pending' AND next_attempt_at <= now()
                 AND (lease_until IS NULL OR lease_until <= now())
             FOR UPDATE SKIP LOCKED
         )",
        cluster,
        error_type,
        error_detail,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// How many targets of a pull secret are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Those that shall have the Secret.
    pub desired: i64,
    /// Of these, those that are in order.
    pub synced: i64,
    /// Of these, those that were not brought up to date yet.
    pub pending: i64,
    /// Of these, those whose last try failed.
    pub failed: i64,
    /// Of these, those where somebody else's Secret has the name.
    pub conflict: i64,
    /// Those that lose the Secret.
    pub removing: i64,
    /// Clusters whose namespaces were not compared with this version's selectors yet.
    pub uncompared: i64,
    /// The generation that all targets have; an older one as long as it is not known which targets there are.
    pub observed_generation: i64,
}

/// How all targets are doing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Survey {
    /// Those that are in order.
    pub synced: i64,
    /// Those that were not brought up to date yet.
    pub pending: i64,
    /// Those whose last try failed.
    pub failed: i64,
    /// Those where somebody else's Secret has the name.
    pub conflict: i64,
    /// Those that lose the Secret.
    pub removing: i64,
    /// Those that are due and that nobody works on.
    pub due: i64,
    /// Those that somebody works on.
    pub claimed: i64,
    /// How long the one that waits longest has not been as it shall be, in seconds; 0 where none waits.
    pub oldest_pending_seconds: f64,
}

/// Looks at all targets: reads the whole table once.
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

/// Counts the targets of these pull secrets, in the order of `ids`.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.count", skip_all)]
pub async fn count(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<Counts>, StorageError> {
    let rows = sqlx::query_as!(
        Counts,
        r#"SELECT counted.desired AS "desired!", counted.synced AS "synced!", counted.pending AS "pending!",
               counted.failed AS "failed!", counted.conflict AS "conflict!", counted.removing AS "removing!",
               compared.uncompared AS "uncompared!",
               least(
                   coalesce(counted.observed_generation, pull_secrets.generation),
                   pull_secrets.generation - (compared.uncompared > 0)::integer
               ) AS "observed_generation!"
           FROM unnest($1::uuid[]) WITH ORDINALITY AS one (id, position)
           JOIN pull_secrets ON pull_secrets.id = one.id
           CROSS JOIN LATERAL (
               SELECT count(*) FILTER (WHERE wanted) AS desired,
                   count(*) FILTER (WHERE wanted AND state = 'synced') AS synced,
                   count(*) FILTER (WHERE wanted AND state = 'pending') AS pending,
                   count(*) FILTER (WHERE wanted AND state = 'failed') AS failed,
                   count(*) FILTER (WHERE wanted AND state = 'conflict') AS conflict,
                   count(*) FILTER (WHERE NOT wanted) AS removing,
                   min(applied_generation) FILTER (WHERE wanted) AS observed_generation
               FROM pull_secret_targets WHERE pull_secret_id = one.id
           ) AS counted
           CROSS JOIN LATERAL (
               SELECT count(*) AS uncompared FROM pull_secret_clusters AS link
               WHERE link.pull_secret_id = one.id AND link.selects AND link.compared_version < pull_secrets.version
           ) AS compared
           ORDER BY one.position"#,
        ids,
    );
    Ok(rows.fetch_all(conn).await?)
}

/// Whether every target of a pull secret came to something since the last change (in order, failed or in conflict), and all
/// namespaces were compared with the selectors of this version. This looks at what is not in order alone, so it may be asked often.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.is_settled", skip_all, fields(pull_secret.id = %id))]
pub async fn is_settled(conn: &mut PgConnection, id: Uuid, version: i64) -> Result<bool, StorageError> {
    // What is on its way out is never `synced`, and so each part is found by the index of what is not in order.
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

/// A target, as it is shown.
#[derive(Debug)]
pub struct ShownTarget {
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// Whether the Secret shall be there; else it is being removed.
    pub wanted: bool,
    /// How it is doing.
    pub state: String,
    /// What is wanted of it.
    pub generation: i64,
    /// What it has.
    pub applied_generation: i64,
    /// Identity of the Secret.
    pub uid: Option<String>,
    /// Version of the Secret.
    pub resource_version: Option<String>,
    /// Tries since something changed.
    pub attempts: i32,
    /// What is in the way, for programs.
    pub last_error_type: Option<String>,
    /// What is in the way, for people.
    pub last_error_detail: Option<String>,
    /// When it was in order last.
    pub last_synced_at: Option<DateTime<Utc>>,
    /// When it is looked at next.
    pub next_attempt_at: DateTime<Utc>,
}

/// Lists targets of a pull secret by cluster and namespace; `page.after` is `CLUSTER/NAMESPACE`.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.list", skip_all, fields(pull_secret.id = %id))]
pub async fn list(
    conn: &mut PgConnection,
    id: Uuid,
    state: Option<TargetState>,
    page: &PageRequest,
) -> Result<Vec<ShownTarget>, StorageError> {
    let (cluster, namespace) = page.after.as_deref().and_then(|after| after.split_once('/')).unzip();
    let rows = sqlx::query_as!(
        ShownTarget,
        r#"SELECT clusters.name AS cluster, namespace, wanted, state, target.generation, applied_generation, uid,
               resource_version, attempts, last_error_type, last_error_detail, last_synced_at, next_attempt_at
           FROM pull_secret_targets AS target JOIN clusters ON clusters.id = cluster_id
           WHERE pull_secret_id = $1 AND ($2::text IS NULL OR state = $2)
               AND ($3::text IS NULL OR (clusters.name, namespace) > ($3 COLLATE "C", $4 COLLATE "C"))
           ORDER BY clusters.name, namespace LIMIT $5"#,
        id,
        state.map(TargetState::as_str),
        cluster,
        namespace,
        page.limit,
    );
    Ok(rows.fetch_all(conn).await?)
}

/// Where in a cluster there is more to do than the declarations say, by pull secret: Secrets that are being removed, and
/// `ServiceAccount`s that they are to be taken out of. At most `limit` of them, if there is a limit.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or a row is damaged.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.leftovers", skip_all, fields(cluster.id = %cluster))]
pub async fn leftovers(
    conn: &mut PgConnection,
    cluster: Uuid,
    limit: Option<i64>,
) -> Result<BTreeMap<Uuid, Vec<Leftover>>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT target.pull_secret_id, target.namespace, NOT target.wanted AS "removes!", beside.detaches AS "detaches!"
           FROM pull_secret_targets AS target
           JOIN pull_secrets ON pull_secrets.id = target.pull_secret_id
           CROSS JOIN LATERAL (
               SELECT CASE
                   WHEN target.wanted THEN NOT to_jsonb(target.attached) <@ (pull_secrets.declaration -> 'serviceAccounts')
                   ELSE target.attached <> '{}'
               END AS detaches
           ) AS beside
           WHERE target.cluster_id = $1 AND (NOT target.wanted OR beside.detaches)
           ORDER BY target.pull_secret_id, target.namespace LIMIT $2"#,
        cluster,
        limit,
    )
    .fetch_all(conn)
    .await?;
    let mut leftovers: BTreeMap<Uuid, Vec<Leftover>> = BTreeMap::new();
    for row in rows {
        let id = row.pull_secret_id;
        let namespace = NamespaceName::parse(&row.namespace).map_err(corrupt(TABLE, id, "namespace"))?;
        let leftover = Leftover { namespace, removes: row.removes, detaches: row.detaches };
        leftovers.entry(id).or_default().push(leftover);
    }
    Ok(leftovers)
}

/// What a dry run compares a target with.
#[derive(Debug)]
pub struct KnownTarget {
    /// The cluster.
    pub cluster_id: Uuid,
    /// Its name.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// What was written last.
    pub written: Written,
}

/// All targets of a pull secret.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.known", skip_all, fields(pull_secret.id = %id))]
pub async fn known(conn: &mut PgConnection, id: Uuid) -> Result<Vec<KnownTarget>, StorageError> {
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

/// A comparison of a cluster's namespaces with the selectors, that somebody works on.
#[derive(Debug, Clone, Copy)]
pub struct ClaimedComparison {
    /// The cluster.
    pub cluster_id: Uuid,
    /// What the result is stored under.
    pub lease_token: i64,
}

/// Takes a comparison that is due, so that nobody else takes it within the lease.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.claim", skip_all)]
pub async fn claim_comparison(
    conn: &mut PgConnection,
    lease: Duration,
) -> Result<Option<ClaimedComparison>, StorageError> {
    let claimed = sqlx::query_as!(
        ClaimedComparison,
        "UPDATE cluster_comparisons
         SET lease_until = now() + $1 * interval '1 second', next_at = now() + $1 * interval '1 second',
             lease_token = lease_token + 1
         WHERE cluster_id = (
             SELECT cluster_id FROM cluster_comparisons
             WHERE next_at <= now() AND (lease_until IS NULL OR lease_until <= now())
             ORDER BY next_at LIMIT 1 FOR UPDATE SKIP LOCKED
         )
         RETURNING cluster_id, lease_token",
        lease.as_secs_f64(),
    );
    Ok(claimed.fetch_optional(conn).await?)
}

/// Ends a comparison: the next one is due after `again_after`, or at once where somebody wants it. One of a cluster in which
/// nothing is selected any more goes.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.settle", skip_all, fields(cluster.id = %comparison.cluster_id))]
pub async fn settle_comparison(
    conn: &mut PgConnection,
    comparison: ClaimedComparison,
    error: Option<(&str, &str)>,
    again_after: Duration,
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
        comparison.cluster_id,
        comparison.lease_token,
        again_after.as_secs_f64(),
        error_type,
        error_detail,
    )
    .execute(&mut *conn)
    .await?;
    // Not where somebody wants one meanwhile: whether anything is selected is looked up as it was when this statement began.
    sqlx::query!(
        "DELETE FROM cluster_comparisons WHERE cluster_id = $1 AND lease_until IS NULL AND next_at > now() AND NOT EXISTS (
             SELECT FROM pull_secret_clusters WHERE cluster_id = $1 AND selects
         )",
        comparison.cluster_id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The pull secrets that select namespaces by label in a cluster.
#[tracing::instrument(level = "debug", name = "db.pull_secret_clusters.selecting", skip_all, fields(cluster.id = %cluster))]
pub async fn selecting_in(conn: &mut PgConnection, cluster: Uuid) -> Result<Vec<Uuid>, StorageError> {
    let ids = sqlx::query_scalar!(
        "SELECT pull_secret_id FROM pull_secret_clusters WHERE cluster_id = $1 AND selects ORDER BY pull_secret_id",
        cluster,
    );
    Ok(ids.fetch_all(conn).await?)
}

/// Locks a pull secret by id at a version, so that its targets are made of the declaration that was read; its generation.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.lock_version", skip_all, fields(pull_secret.id = %id))]
pub async fn lock_version(conn: &mut PgConnection, id: Uuid, version: i64) -> Result<Option<i64>, StorageError> {
    let generation = sqlx::query_scalar!(
        "SELECT generation FROM pull_secrets WHERE id = $1 AND version = $2 AND deleted_at IS NULL FOR NO KEY UPDATE",
        id,
        version,
    );
    Ok(generation.fetch_optional(conn).await?)
}

/// Notes that a cluster's namespaces were compared with a version of a declaration.
#[tracing::instrument(level = "debug", name = "db.pull_secret_clusters.note_compared", skip_all, fields(pull_secret.id = %id))]
pub async fn note_compared(conn: &mut PgConnection, id: Uuid, cluster: Uuid, version: i64) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE pull_secret_clusters SET compared_version = $3
         WHERE pull_secret_id = $1 AND cluster_id = $2 AND compared_version < $3",
        id,
        cluster,
        version,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What is known of the namespaces of a cluster in which a pull secret selects.
#[derive(Debug)]
pub struct Comparison {
    /// Name of the cluster.
    pub cluster: String,
    /// When its namespaces were compared with the selectors last.
    pub compared_at: Option<DateTime<Utc>>,
    /// What keeps them from being compared, for programs.
    pub last_error_type: Option<String>,
    /// What keeps them from being compared, for people.
    pub last_error_detail: Option<String>,
}

/// The clusters in which a pull secret selects by label, by name.
#[tracing::instrument(level = "debug", name = "db.cluster_comparisons.list", skip_all, fields(pull_secret.id = %id))]
pub async fn comparisons(conn: &mut PgConnection, id: Uuid) -> Result<Vec<Comparison>, StorageError> {
    let rows = sqlx::query_as!(
        Comparison,
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

/// A cluster that this replica watches.
#[derive(Debug, Clone, Copy)]
pub struct ClaimedWatch {
    /// The cluster.
    pub cluster_id: Uuid,
    /// Version of the cluster: with another one it is to be connected anew.
    pub cluster_version: i64,
    /// Grows with every replica that takes it.
    pub epoch: i64,
}

/// Takes the clusters that pull secrets go to and that nobody watches.
#[tracing::instrument(level = "debug", name = "db.cluster_watches.claim", skip_all)]
pub async fn claim_watches(conn: &mut PgConnection, lease: Duration) -> Result<Vec<ClaimedWatch>, StorageError> {
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
               (SELECT version FROM clusters WHERE id = watch.cluster_id) AS "cluster_version!""#,
        lease.as_secs_f64(),
    );
    Ok(claimed.fetch_all(conn).await?)
}

/// Keeps a watch, and gives the version that the cluster has by now; none if somebody else has the watch, or no pull secret goes
/// there any more.
#[tracing::instrument(level = "debug", name = "db.cluster_watches.renew", skip_all, fields(cluster.id = %watch.cluster_id))]
pub async fn renew_watch(
    conn: &mut PgConnection,
    watch: ClaimedWatch,
    lease: Duration,
) -> Result<Option<i64>, StorageError> {
    let version = sqlx::query_scalar!(
        "UPDATE cluster_watches AS watch SET lease_until = now() + $3 * interval '1 second'
         FROM clusters
         WHERE watch.cluster_id = $1 AND watch.epoch = $2 AND clusters.id = watch.cluster_id
             AND EXISTS (SELECT FROM pull_secret_clusters WHERE cluster_id = $1)
         RETURNING clusters.version",
        watch.cluster_id,
        watch.epoch,
        lease.as_secs_f64(),
    );
    Ok(version.fetch_optional(conn).await?)
}

/// Gives a watch back.
#[tracing::instrument(level = "debug", name = "db.cluster_watches.release", skip_all, fields(cluster.id = %watch.cluster_id))]
pub async fn release_watch(conn: &mut PgConnection, watch: ClaimedWatch) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE cluster_watches SET lease_until = now() WHERE cluster_id = $1 AND epoch = $2",
        watch.cluster_id,
        watch.epoch,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Secrets that changed, as three columns for SQL's `unnest`.
#[derive(Debug, Default)]
pub struct ChangedSecrets {
    /// The pull secret of each.
    pub ids: Vec<Uuid>,
    /// Its namespace.
    pub namespaces: Vec<String>,
    /// Its version; none if it was deleted.
    pub resource_versions: Vec<Option<String>>,
}

/// Has the targets of changed Secrets looked at again now, but not those that are at this very version, nor those that are due or that
/// somebody works on: most changes are regcred's own. How many.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.poke_secrets", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_secrets_due(
    conn: &mut PgConnection,
    cluster: Uuid,
    changed: &ChangedSecrets,
) -> Result<u64, StorageError> {
    // IS FALSE, so that the index of what is due looks no better than the key.
    let poked = sqlx::query!(
        "WITH found AS (
             SELECT target.pull_secret_id, target.namespace
             FROM unnest($2::uuid[], $3::text[], $4::text[]) AS changed (id, namespace, resource_version)
             CROSS JOIN LATERAL (
                 SELECT pull_secret_id, namespace FROM pull_secret_targets
                 WHERE pull_secret_id = changed.id AND cluster_id = $1 AND namespace = changed.namespace
                     AND lease_until IS NULL AND (next_attempt_at <= now()) IS FALSE
                     AND resource_version IS DISTINCT FROM changed.resource_version
                 FOR UPDATE SKIP LOCKED
             ) AS target
         )
         UPDATE pull_secret_targets AS target SET next_attempt_at = now()
         FROM found
         WHERE target.pull_secret_id = found.pull_secret_id AND target.cluster_id = $1
             AND target.namespace = found.namespace",
        cluster,
        &changed.ids,
        &changed.namespaces,
        &changed.resource_versions as _,
    )
    .execute(conn)
    .await?;
    Ok(poked.rows_affected())
}

/// Has the targets looked at again now whose Secret a cluster does not have any more: these are all that it has, as pull secrets
/// and their namespaces. How many.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.poke_missing", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_missing_due(
    conn: &mut PgConnection,
    cluster: Uuid,
    (ids, namespaces): (&[Uuid], &[String]),
) -> Result<u64, StorageError> {
    let poked = sqlx::query!(
        "UPDATE pull_secret_targets AS target SET next_attempt_at = now()
         WHERE cluster_id = $1 AND (pull_secret_id, namespace) IN (
             SELECT target.pull_secret_id, target.namespace FROM pull_secret_targets AS target
             WHERE target.cluster_id = $1 AND target.lease_until IS NULL AND target.next_attempt_at > now()
                 AND NOT EXISTS (
                     SELECT FROM unnest($2::uuid[], $3::text[]) AS there (id, namespace)
                     WHERE there.id = target.pull_secret_id AND there.namespace = target.namespace
                 )
             ORDER BY target.pull_secret_id, target.namespace FOR UPDATE OF target SKIP LOCKED
         )",
        cluster,
        ids,
        namespaces,
    )
    .execute(conn)
    .await?;
    Ok(poked.rows_affected())
}

/// Has a cluster's namespaces compared with the selectors now, and the targets looked at that wait for one of these namespaces. How
/// many.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.poke_namespaces", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_namespaces_due(
    conn: &mut PgConnection,
    cluster: Uuid,
    namespaces: &[String],
) -> Result<u64, StorageError> {
    let compared = sqlx::query!("UPDATE cluster_comparisons SET next_at = now() WHERE cluster_id = $1", cluster)
        .execute(&mut *conn)
        .await?;
    let waiting = sqlx::query!(
        "UPDATE pull_secret_targets SET next_attempt_at = now()
         WHERE (pull_secret_id, cluster_id, namespace) IN (
             SELECT pull_secret_id, cluster_id, namespace FROM pull_secret_targets
             WHERE cluster_id = $1 AND namespace = ANY($2) AND state = 'failed' AND lease_until IS NULL
                 AND last_error_type IN ('namespace-not-found', 'namespace-terminating')
             ORDER BY pull_secret_id, namespace FOR UPDATE SKIP LOCKED
         )",
        cluster,
        namespaces,
    )
    .execute(conn)
    .await?;
    Ok(compared.rows_affected() + waiting.rows_affected())
}
