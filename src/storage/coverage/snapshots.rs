//! Snapshots of clusters: their groups and pull secrets, as documents of the API.

use chrono::{DateTime, Utc};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use sqlx::types::Json;
use uuid::Uuid;

use crate::{
    domain::{
        coverage::{Group, PullSecretUse, Summary, Usage},
        invalid::Invalid,
    },
    storage::{PgConnection, StorageError, corrupt},
};

/// Name of the table of snapshots.
pub(super) const TABLE: &str = "coverage_snapshots";
/// Snapshots that are kept of each cluster.
const KEPT: i64 = 2;
/// Rows of one statement.
const BATCH: usize = 1_000;

/// A snapshot.
#[derive(Debug, Clone)]
pub struct StoredSnapshot {
    /// Identifier.
    pub id: Uuid,
    /// Time of the snapshot.
    pub taken_at: DateTime<Utc>,
    /// Summary.
    pub summary: Summary,
    /// Differences to the snapshot before; none for the first one.
    pub changes: Option<StoredChanges>,
}

/// Differences between two snapshots, as numbers of groups.
#[derive(Debug, Clone, Copy)]
pub struct StoredChanges {
    /// Time of the earlier snapshot.
    pub compared_with: DateTime<Utc>,
    /// Groups that are new.
    pub added: i64,
    /// Groups that no longer exist.
    pub removed: i64,
    /// Groups whose verdict was `ok` and is not any more.
    pub broken: i64,
    /// Groups whose verdict is `ok` now.
    pub fixed: i64,
}

struct Row {
    id: Uuid,
    taken_at: DateTime<Utc>,
    compared_with: Option<DateTime<Utc>>,
    summary: Json<Value>,
    added: i64,
    removed: i64,
    broken: i64,
    fixed: i64,
}

impl TryFrom<Row> for StoredSnapshot {
    type Error = StorageError;

    fn try_from(row: Row) -> Result<Self, StorageError> {
        let Row { added, removed, broken, fixed, .. } = row;
        Ok(Self {
            id: row.id,
            taken_at: row.taken_at,
            summary: parse(row.summary.0).map_err(corrupt(TABLE, row.id, "summary"))?,
            changes: row.compared_with.map(|compared_with| StoredChanges {
                compared_with,
                added,
                removed,
                broken,
                fixed,
            }),
        })
    }
}

/// Parses a stored document.
pub(super) fn parse<T: DeserializeOwned>(document: Value) -> Result<T, Invalid> {
    serde_json::from_value(document).map_err(|_| Invalid::new("is not a document of this release"))
}

/// Content of a new snapshot.
#[derive(Debug)]
pub struct NewSnapshot {
    /// Summary.
    pub summary: Summary,
    /// Groups.
    pub groups: Vec<Group>,
    /// Pull secrets of the cluster.
    pub secrets: Vec<PullSecretUse>,
    /// Users of each account.
    pub accounts: Vec<Usage>,
    /// Users of each pull secret of regcred.
    pub pull_secrets: Vec<Usage>,
}

/// Finds the newest snapshot of a cluster.
#[tracing::instrument(level = "debug", name = "db.coverage_snapshots.find", skip_all, fields(cluster.id = %cluster))]
pub async fn find(conn: &mut PgConnection, cluster: Uuid) -> Result<Option<StoredSnapshot>, StorageError> {
    let found = sqlx::query_as!(
        Row,
        r#"SELECT id, taken_at, compared_with, summary AS "summary: _", added, removed, broken, fixed
           FROM coverage_snapshots WHERE cluster_id = $1 ORDER BY id DESC LIMIT 1"#,
        cluster,
    );
    found.fetch_optional(conn).await?.map(StoredSnapshot::try_from).transpose()
}

/// Inserts a snapshot, compares it with the one before, and deletes older ones. The run of the
/// cluster must be locked.
#[tracing::instrument(level = "debug", name = "db.coverage_snapshots.insert", skip_all, fields(cluster.id = %cluster))]
pub async fn insert(
    conn: &mut PgConnection,
    cluster: Uuid,
    id: Uuid,
    snapshot: &NewSnapshot,
) -> Result<(), StorageError> {
    let previous = sqlx::query_scalar!(
        "SELECT id FROM coverage_snapshots WHERE cluster_id = $1 ORDER BY id DESC LIMIT 1",
        cluster
    );
    let previous = previous.fetch_optional(&mut *conn).await?;
    let id = previous.map_or(id, |previous| id.max(successor(previous)));
    sqlx::query!(
        "INSERT INTO coverage_snapshots (id, cluster_id, summary, compared_with)
         VALUES ($1, $2, $3, (SELECT taken_at FROM coverage_snapshots WHERE id = $4))",
        id,
        cluster,
        Json(&snapshot.summary) as _,
        previous,
    )
    .execute(&mut *conn)
    .await?;
    insert_groups(conn, (id, previous), &snapshot.groups).await?;
    insert_secrets(conn, id, &snapshot.secrets).await?;
    insert_usage(conn, id, "account", &snapshot.accounts).await?;
    insert_usage(conn, id, "pullSecret", &snapshot.pull_secrets).await?;
    if let Some(previous) = previous {
        record_changes(conn, id, previous).await?;
    }
    sqlx::query!(
        "DELETE FROM coverage_snapshots WHERE id IN (
             SELECT id FROM coverage_snapshots WHERE cluster_id = $1 ORDER BY id DESC OFFSET $2
         )",
        cluster,
        KEPT,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The newest snapshot has the greatest id, also if the clocks of processes differ.
fn successor(previous: Uuid) -> Uuid {
    Uuid::from_u128(previous.as_u128().saturating_add(1))
}

/// Documents as JSON values, in batches with the number of the first one.
fn batches<T: Serialize>(rows: &[T]) -> impl Iterator<Item = (i64, Vec<Value>)> {
    rows.chunks(BATCH).enumerate().map(|(at, chunk)| {
        let documents = chunk.iter().map(|row| serde_json::to_value(row).unwrap_or_default());
        (i64::try_from(at * BATCH).unwrap_or(i64::MAX), documents.collect())
    })
}

async fn insert_groups(
    conn: &mut PgConnection,
    (id, previous): (Uuid, Option<Uuid>),
    groups: &[Group],
) -> Result<(), StorageError> {
    for (first, documents) in batches(groups) {
        sqlx::query!(
            "INSERT INTO coverage_groups
                 (snapshot_id, number, namespace, identity, verdict, previous_verdict, account, document)
             SELECT $1, $2 + one.number, one.document ->> 'namespace', one.identity, one.document ->> 'verdict',
                 before.verdict, one.document -> 'credential' ->> 'account', one.document
             FROM (
                 SELECT number, document, md5(concat_ws(
                     ' ', document ->> 'serviceAccount', document ->> 'pullSecrets', document ->> 'repository'
                 )) AS identity
                 FROM unnest($4::jsonb[]) WITH ORDINALITY AS given (document, number)
             ) AS one
             LEFT JOIN coverage_groups AS before
                 ON before.snapshot_id = $3 AND before.namespace = one.document ->> 'namespace'
                     AND before.identity = one.identity",
            id,
            first,
            previous,
            &documents as &[Value],
        )
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

async fn insert_secrets(conn: &mut PgConnection, id: Uuid, secrets: &[PullSecretUse]) -> Result<(), StorageError> {
    for (first, documents) in batches(secrets) {
        sqlx::query!(
            "INSERT INTO coverage_secrets (snapshot_id, number, namespace, owner, is_unused, is_adoptable, document)
             SELECT $1, $2 + number, document ->> 'namespace', document ->> 'owner',
                 (document ->> 'workloads')::bigint = 0 AND (document ->> 'pods')::bigint = 0,
                 (document ->> 'adoptable')::boolean, document
             FROM unnest($3::jsonb[]) WITH ORDINALITY AS given (document, number)",
            id,
            first,
            &documents as &[Value],
        )
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

async fn insert_usage(conn: &mut PgConnection, id: Uuid, kind: &str, usage: &[Usage]) -> Result<(), StorageError> {
    let ids: Vec<Uuid> = usage.iter().map(|one| one.id).collect();
    let workloads: Vec<i64> = usage.iter().map(|one| one.workloads.into()).collect();
    let namespaces: Vec<i64> = usage.iter().map(|one| one.namespaces.into()).collect();
    sqlx::query!(
        "INSERT INTO coverage_usage (snapshot_id, kind, resource_id, workloads, namespaces)
         SELECT $1, $2, one.id, one.workloads, one.namespaces
         FROM unnest($3::uuid[], $4::bigint[], $5::bigint[]) AS one (id, workloads, namespaces)",
        id,
        kind,
        &ids,
        &workloads,
        &namespaces,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Counts the differences between two snapshots.
async fn record_changes(conn: &mut PgConnection, id: Uuid, previous: Uuid) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE coverage_snapshots
         SET added = changes.added, broken = changes.broken, fixed = changes.fixed,
             removed = (SELECT count(*) FROM coverage_groups WHERE snapshot_id = $2) - changes.kept
         FROM (
             SELECT count(*) FILTER (WHERE previous_verdict IS NULL) AS added,
                 count(*) FILTER (WHERE previous_verdict IS NOT NULL) AS kept,
                 count(*) FILTER (WHERE previous_verdict = 'ok' AND verdict <> 'ok') AS broken,
                 count(*) FILTER (WHERE previous_verdict <> 'ok' AND verdict = 'ok') AS fixed
             FROM coverage_groups WHERE snapshot_id = $1
         ) AS changes
         WHERE id = $1",
        id,
        previous,
    )
    .execute(conn)
    .await?;
    Ok(())
}
