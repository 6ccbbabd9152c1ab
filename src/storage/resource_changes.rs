//! Table `resource_changes`: what recent transactions changed, for event streams.
//!
//! Triggers write it: `migrations/…_resource_changes.sql`. A reader names the snapshot of its last
//! read and gets the changes that were not visible in it. So it misses no transaction, in whatever
//! order transactions commit, and gets none twice.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::Value;
use sqlx::types::Json;
use uuid::Uuid;

use crate::{
    domain::{
        pull_secret::Declaration,
        resource_event::{ResourceChange, ResourceKind},
    },
    storage::{PgConnection, PgPool, StorageError, Transaction, corrupt, pull_secrets::parse_declaration},
};

const TABLE: &str = "resource_changes";

/// A snapshot of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    text: String,
    /// Start of the server. Another one may be a promoted standby, which lacks the last
    /// transactions and uses their ids again.
    server_started_at: DateTime<Utc>,
}

impl Snapshot {
    /// Whether changes since this snapshot can be told at `later`.
    #[must_use]
    pub fn precedes(&self, later: &Self) -> bool {
        self.server_started_at == later.server_started_at
    }
}

/// A target of a change.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ChangedTarget {
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// State after the change.
    pub state: String,
    /// Whether the Secret is being removed.
    pub removing: bool,
}

/// Labels of an account.
pub type LabelMap = BTreeMap<String, String>;

/// A recorded change.
#[derive(Debug)]
pub struct RecordedChange {
    /// Kind of the resource.
    pub kind: ResourceKind,
    /// What happened.
    pub change: ResourceChange,
    /// Id of the resource; of a target, that of its pull secret. So are the next three.
    pub resource_id: Uuid,
    /// Name.
    pub name: String,
    /// Version after the change.
    pub version: i64,
    /// Generation of a pull secret after the change.
    pub generation: Option<i64>,
    /// Labels of an account before the change.
    pub labels_before: Option<LabelMap>,
    /// Labels of an account after the change.
    pub labels: Option<LabelMap>,
    /// Declaration of a pull secret before the change, if the change replaced or deleted it.
    pub declaration_before: Option<Declaration>,
    /// Targets; `None` if there are too many.
    pub targets: Option<Vec<ChangedTarget>>,
}

/// Begins a transaction whose statements all read the same snapshot.
pub async fn begin(pool: &PgPool) -> Result<Transaction, StorageError> {
    Ok(pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?)
}

/// Returns the snapshot of a transaction of [`begin`].
#[tracing::instrument(level = "debug", name = "db.resource_changes.snapshot", skip_all)]
pub async fn snapshot(conn: &mut PgConnection) -> Result<Snapshot, StorageError> {
    let row = sqlx::query!(
        r#"SELECT pg_current_snapshot()::text AS "text!", pg_postmaster_start_time() AS "server_started_at!""#
    );
    let row = row.fetch_one(conn).await?;
    Ok(Snapshot { text: row.text, server_started_at: row.server_started_at })
}

/// Lists the changes that were committed after a snapshot, in order: at most `limit`.
///
/// A corrupt row is logged and left out.
#[tracing::instrument(level = "debug", name = "db.resource_changes.since", skip_all)]
pub async fn since(
    conn: &mut PgConnection,
    snapshot: &Snapshot,
    limit: i64,
) -> Result<Vec<RecordedChange>, StorageError> {
    // Transactions before the oldest one that was running are all visible in the snapshot.
    let rows = sqlx::query!(
        r#"SELECT kind, change, resource_id, name, version, generation,
               labels_before AS "labels_before: Json<LabelMap>", labels AS "labels: Json<LabelMap>",
               declaration_before AS "declaration_before: Json<Value>", targets AS "targets: Json<Vec<ChangedTarget>>"
           FROM resource_changes
           WHERE transaction_id >= pg_snapshot_xmin($1::text::pg_snapshot)
               AND NOT pg_visible_in_snapshot(transaction_id, $1::text::pg_snapshot)
           ORDER BY id LIMIT $2"#,
        snapshot.text,
        limit,
    )
    .fetch_all(conn)
    .await?;
    let changes = rows.into_iter().map(|row| {
        let id = row.resource_id;
        let before = row.declaration_before.map(|declaration| parse_declaration(declaration.0)).transpose();
        Ok(RecordedChange {
            kind: row.kind.parse().map_err(corrupt(TABLE, id, "kind"))?,
            change: row.change.parse().map_err(corrupt(TABLE, id, "change"))?,
            resource_id: id,
            name: row.name,
            version: row.version,
            generation: row.generation,
            labels_before: row.labels_before.map(|labels| labels.0),
            labels: row.labels.map(|labels| labels.0),
            declaration_before: before.map_err(corrupt(TABLE, id, "declaration_before"))?,
            targets: row.targets.map(|targets| targets.0),
        })
    });
    let is_damaged = |error: &StorageError| tracing::error!(%error, "change of a resource skipped");
    Ok(changes.filter_map(|change| change.inspect_err(is_damaged).ok()).collect())
}
