//! The queue of targets: claims under a lease, results under the lease token.
//!
//! A statement that finishes claimed targets skips rows that are locked by other transactions, so a
//! batch never waits for a row while it holds others. The caller takes a skipped row with
//! [`lock_claimed`], alone.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::TABLE;
use crate::{
    domain::{
        names::{NamespaceName, ServiceAccountName},
        pull_secret::Written,
        reconcile::ReconcileOutcome,
    },
    storage::{PgConnection, StorageError, corrupt},
};

/// A target under lease.
#[derive(Debug, Clone)]
pub struct ClaimedTarget {
    /// Immutable identifier.
    pub id: i64,
    /// The pull secret.
    pub pull_secret_id: Uuid,
    /// The cluster.
    pub cluster_id: Uuid,
    /// The namespace.
    pub namespace: NamespaceName,
    /// Whether the Secret should exist.
    pub wanted: bool,
    /// State before the claim.
    pub state: String,
    /// Desired generation.
    pub generation: i64,
    /// Generation in the cluster.
    pub applied_generation: i64,
    /// Version of the declaration in the cluster.
    pub applied_version: i64,
    /// The Secret as last written.
    pub written: Written,
    /// The `ServiceAccount`s that regcred attached the Secret to.
    pub attached: Vec<ServiceAccountName>,
    /// Attempts since the last success or change, including this one.
    pub attempts: i32,
    /// Token that fences results of this claim.
    pub lease_token: i64,
    /// When the target was due. Another value in the row means that it was made due again since the
    /// claim.
    pub due_at: DateTime<Utc>,
    /// Type of the stored error.
    pub last_error_type: Option<String>,
}

/// Cluster with due targets.
#[derive(Debug)]
pub struct DueCluster {
    /// Id.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// Number that changes with the connection or the credential.
    pub revision: i64,
}

/// Lists the clusters with due targets.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.due_clusters", skip_all)]
pub async fn due_clusters(conn: &mut PgConnection) -> Result<Vec<DueCluster>, StorageError> {
    let clusters = sqlx::query_as!(
        DueCluster,
        r#"SELECT id, name, version + credential_renewals AS "revision!" FROM clusters WHERE EXISTS (
             SELECT FROM pull_secret_targets
             WHERE cluster_id = clusters.id AND next_attempt_at <= now()
                 AND (lease_until IS NULL OR lease_until <= now())
         )"#
    );
    Ok(clusters.fetch_all(conn).await?)
}

/// Claims up to `limit` due targets of a cluster for the duration of `lease`, the longest-waiting
/// first.
///
/// A corrupt row is logged and left out. It is claimed again when its lease ends.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.claim", skip_all, fields(cluster.id = %cluster))]
pub async fn claim(
    conn: &mut PgConnection,
    cluster: Uuid,
    limit: i64,
    lease: Duration,
) -> Result<Vec<ClaimedTarget>, StorageError> {
    // ARRAY: the limited query runs once. No indexed column changes, so a claim adds no index
    // entries.
    let rows = sqlx::query!(
        r#"UPDATE pull_secret_targets
           SET lease_until = now() + $3 * interval '1 second', lease_token = lease_token + 1,
               attempts = CASE WHEN state = 'synced' THEN 1 ELSE attempts + 1 END
           WHERE id = ANY(ARRAY(
               SELECT id FROM pull_secret_targets
               WHERE cluster_id = $1 AND next_attempt_at <= now() AND (lease_until IS NULL OR lease_until <= now())
               ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED
           ))
           RETURNING id, pull_secret_id, namespace, wanted, state, generation, applied_generation, applied_version, uid,
               resource_version, content_mac, attached, attempts, lease_token, next_attempt_at, last_error_type"#,
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
            id: row.id,
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
            due_at: row.next_attempt_at,
            last_error_type: row.last_error_type,
        })
    });
    let log = |error: &StorageError| tracing::error!(%error, "target skipped");
    Ok(targets.filter_map(|target| target.inspect_err(log).ok()).collect())
}

/// Waits for the lock on a target and takes it. Returns whether the target is still under the
/// claim's lease.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.lock_claimed", skip_all)]
pub async fn lock_claimed(conn: &mut PgConnection, target: &ClaimedTarget) -> Result<bool, StorageError> {
    let locked = sqlx::query_scalar!(
        r#"SELECT true AS "locked!" FROM pull_secret_targets
           WHERE id = $1 AND lease_token = $2 AND lease_until IS NOT NULL
           FOR UPDATE"#,
        target.id,
        target.lease_token,
    );
    Ok(locked.fetch_optional(conn).await?.is_some())
}

/// Records results and ends the leases. Returns the recorded targets, each with the seconds from
/// the change to its sync if it is synced.
///
/// - A target whose lease was lost, or whose result was recorded before, is left out.
/// - A locked row is left out: see [`lock_claimed`].
/// - A target that was made due again since the claim stays `pending` and is due at once.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.record_results", skip_all, fields(results = results.len()))]
pub async fn record_results(
    conn: &mut PgConnection,
    results: &[(&ClaimedTarget, &ReconcileOutcome)],
) -> Result<HashMap<i64, Option<f64>>, StorageError> {
    let columns = ResultColumns::of(results);
    // The rows are locked before they are read, so concurrent changes are seen.
    let rows = sqlx::query!(
        r#"WITH held AS (
               SELECT id, lease_token, generation, next_attempt_at, pending_since FROM pull_secret_targets
               WHERE id = ANY($1) AND lease_until IS NOT NULL
               FOR UPDATE SKIP LOCKED
           ), result AS (
               SELECT given.*, held.pending_since,
                   held.next_attempt_at <> given.due_at OR held.generation <> given.claimed_generation AS changed
               FROM unnest($1, $2::bigint[], $3::timestamptz[], $4::bigint[], $5::text[], $6::bigint[], $7::bigint[],
                   $8::text[], $9::text[], $10::bytea[], $11::text[], $12::text[], $13::text[], $14::double precision[])
                   AS given (id, lease_token, due_at, claimed_generation, state, generation, version, uid,
                       resource_version, content_mac, attached, error_type, error_detail, requeue_after)
               JOIN held ON held.id = given.id AND held.lease_token = given.lease_token
           )
           UPDATE pull_secret_targets AS target
           SET state = CASE WHEN result.changed THEN 'pending' ELSE result.state END,
               applied_generation = coalesce(result.generation, target.applied_generation),
               applied_version = coalesce(result.version, target.applied_version),
               uid = result.uid, resource_version = result.resource_version, content_mac = result.content_mac,
               attached = string_to_array(result.attached, ' '),
               last_error_type = result.error_type, last_error_detail = result.error_detail,
               next_attempt_at = CASE
                   WHEN result.changed THEN now() ELSE now() + result.requeue_after * interval '1 second'
               END,
               last_synced_at = CASE WHEN result.state = 'synced' THEN now() ELSE target.last_synced_at END,
               pending_since = CASE
                   WHEN result.state = 'synced' AND NOT result.changed THEN NULL ELSE target.pending_since
               END,
               lease_until = NULL
           FROM result
           WHERE target.id = result.id
           RETURNING target.id, CASE WHEN result.state = 'synced' AND NOT result.changed
               THEN extract(epoch FROM now() - result.pending_since)::double precision END AS seconds"#,
        &columns.ids,
        &columns.lease_tokens,
        &columns.due_at,
        &columns.claimed_generations,
        &columns.states as &[&str],
        &columns.generations as &[Option<i64>],
        &columns.versions as &[Option<i64>],
        &columns.uids as &[Option<&str>],
        &columns.resource_versions as &[Option<&str>],
        &columns.content_macs as &[Option<&[u8]>],
        &columns.attached,
        &columns.error_types as &[Option<&str>],
        &columns.error_details as &[Option<&str>],
        &columns.requeue_after,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.seconds)).collect())
}

/// Results as columns for SQL's `unnest`.
struct ResultColumns<'a> {
    ids: Vec<i64>,
    lease_tokens: Vec<i64>,
    due_at: Vec<DateTime<Utc>>,
    claimed_generations: Vec<i64>,
    states: Vec<&'static str>,
    generations: Vec<Option<i64>>,
    versions: Vec<Option<i64>>,
    uids: Vec<Option<&'a str>>,
    resource_versions: Vec<Option<&'a str>>,
    content_macs: Vec<Option<&'a [u8]>>,
    /// Names joined by spaces, which no name contains.
    attached: Vec<String>,
    error_types: Vec<Option<&'static str>>,
    error_details: Vec<Option<&'a str>>,
    /// Seconds.
    requeue_after: Vec<f64>,
}

impl<'a> ResultColumns<'a> {
    fn of(results: &[(&'a ClaimedTarget, &'a ReconcileOutcome)]) -> Self {
        macro_rules! column {
            ($target:ident, $outcome:ident => $value:expr) => {
                results.iter().map(|($target, $outcome)| $value).collect()
            };
        }
        Self {
            ids: column!(target, _outcome => target.id),
            lease_tokens: column!(target, _outcome => target.lease_token),
            due_at: column!(target, _outcome => target.due_at),
            claimed_generations: column!(target, _outcome => target.generation),
            states: column!(_target, outcome => outcome.state.as_str()),
            generations: column!(_target, outcome => outcome.applied.map(|applied| applied.generation)),
            versions: column!(_target, outcome => outcome.applied.map(|applied| applied.version)),
            uids: column!(_target, outcome => outcome.written.uid.as_deref()),
            resource_versions: column!(_target, outcome => outcome.written.resource_version.as_deref()),
            content_macs: column!(_target, outcome => outcome.written.content_mac.as_deref()),
            attached: column!(_target, outcome => {
                outcome.attached.iter().map(ServiceAccountName::as_str).collect::<Vec<_>>().join(" ")
            }),
            error_types: column!(_target, outcome => outcome.error.as_ref().map(|error| error.error_type.as_str())),
            error_details: column!(_target, outcome => outcome.error.as_ref().map(|error| error.detail.as_str())),
            requeue_after: column!(_target, outcome => jittered(outcome.requeue_after)),
        }
    }
}

/// Adds up to a tenth of jitter in either direction, so that a batch does not become due at one
/// instant.
fn jittered(after: Duration) -> f64 {
    after.as_secs_f64() * (0.9 + 0.2 * fastrand::f64())
}

/// Deletes targets whose Secrets were removed, unless they are wanted again or the lease was lost.
/// Locked rows are left out. Returns the ids of the deleted targets.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.delete_removed", skip_all, fields(removed = removed.len()))]
pub async fn delete_removed(conn: &mut PgConnection, removed: &[&ClaimedTarget]) -> Result<Vec<i64>, StorageError> {
    let (ids, tokens) = leases(removed);
    let deleted = sqlx::query_scalar!(
        "DELETE FROM pull_secret_targets WHERE id = ANY(ARRAY(
             SELECT target.id FROM pull_secret_targets AS target
             JOIN unnest($1::bigint[], $2::bigint[]) AS removed (id, lease_token)
                 ON removed.id = target.id AND removed.lease_token = target.lease_token
             WHERE NOT target.wanted
             FOR UPDATE OF target SKIP LOCKED
         )) RETURNING id",
        &ids,
        &tokens,
    );
    Ok(deleted.fetch_all(conn).await?)
}

/// Releases targets that were not reconciled: they are due after `after`, and the attempt does not
/// count. Locked rows are left out. Returns the ids of the released targets.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.release", skip_all)]
pub async fn release(
    conn: &mut PgConnection,
    targets: &[&ClaimedTarget],
    after: Duration,
) -> Result<Vec<i64>, StorageError> {
    let (ids, tokens) = leases(targets);
    let due_at: Vec<DateTime<Utc>> = targets.iter().map(|target| target.due_at).collect();
    let released = sqlx::query_scalar!(
        "WITH held AS (
             SELECT target.id, target.next_attempt_at <> claimed.due_at AS changed
             FROM pull_secret_targets AS target
             JOIN unnest($1::bigint[], $2::bigint[], $3::timestamptz[]) AS claimed (id, lease_token, due_at)
                 ON claimed.id = target.id AND claimed.lease_token = target.lease_token
             WHERE target.lease_until IS NOT NULL
             FOR UPDATE OF target SKIP LOCKED
         )
         UPDATE pull_secret_targets AS target
         SET lease_until = NULL, attempts = greatest(attempts - 1, 0),
             next_attempt_at = CASE WHEN held.changed THEN now() ELSE now() + $4 * interval '1 second' END
         FROM held
         WHERE target.id = held.id
         RETURNING target.id",
        &ids,
        &tokens,
        &due_at,
        after.as_secs_f64(),
    );
    Ok(released.fetch_all(conn).await?)
}

/// Ids and lease tokens as columns for SQL's `unnest`.
fn leases(targets: &[&ClaimedTarget]) -> (Vec<i64>, Vec<i64>) {
    targets.iter().map(|target| (target.id, target.lease_token)).unzip()
}

/// Whether the lease of a claim is in force.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.is_leased", skip_all)]
pub async fn is_leased(conn: &mut PgConnection, target: &ClaimedTarget) -> Result<bool, StorageError> {
    let leased = sqlx::query_scalar!(
        r#"SELECT EXISTS (
               SELECT FROM pull_secret_targets WHERE id = $1 AND lease_token = $2 AND lease_until > now()
           ) AS "leased!""#,
        target.id,
        target.lease_token,
    );
    Ok(leased.fetch_one(conn).await?)
}

/// Marks the pending targets of a cluster that cannot be called as failed, with the reason.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.mark_unreachable", skip_all, fields(cluster.id = %cluster))]
pub async fn mark_unreachable(
    conn: &mut PgConnection,
    cluster: Uuid,
    error_type: &str,
    error_detail: &str,
) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE pull_secret_targets SET state = 'failed', last_error_type = $2, last_error_detail = $3
         WHERE id = ANY(ARRAY(
             SELECT id FROM pull_secret_targets
             WHERE cluster_id = $1 AND state = 'pending' AND next_attempt_at <= now()
                 AND (lease_until IS NULL OR lease_until <= now())
             FOR UPDATE SKIP LOCKED
         ))",
        cluster,
        error_type,
        error_detail,
    )
    .execute(conn)
    .await?;
    Ok(())
}
