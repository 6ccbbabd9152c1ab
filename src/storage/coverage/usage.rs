//! What the newest snapshots of all clusters say of accounts and pull secrets.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::types::Json;
use uuid::Uuid;

use super::snapshots::parse;
use crate::{
    domain::{
        coverage::{Summary, VerdictCount},
        invalid::Invalid,
        names::Name,
    },
    storage::{PgConnection, StorageError},
};

/// Clusters that metrics have series of.
const CLUSTERS_MAX: i64 = 250;

/// Place in a list of accounts, those with the most workloads first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsagePosition {
    /// Workloads that use the account.
    pub workloads: i64,
    /// Name of the account.
    pub name: Name,
}

impl FromStr for UsagePosition {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (workloads, name) = text.split_once('/').ok_or_else(|| Invalid::new("must contain a `/`"))?;
        let workloads = workloads.parse().map_err(|_| Invalid::new("must begin with a number"))?;
        Ok(Self { workloads, name: name.parse()? })
    }
}

impl Display for UsagePosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.workloads, self.name)
    }
}

/// What a rotation of an account reaches.
#[derive(Debug, Clone)]
pub struct AccountUsage {
    /// Name of the account.
    pub account: String,
    /// Workloads that use it.
    pub workloads: i64,
    /// Namespaces with such a workload.
    pub namespaces: i64,
    /// Clusters with such a workload.
    pub clusters: i64,
}

/// Lists the accounts that workloads use, those with the most workloads first.
#[tracing::instrument(level = "debug", name = "db.coverage_usage.list_accounts", skip_all)]
pub async fn list_accounts(
    conn: &mut PgConnection,
    after: Option<&UsagePosition>,
    limit: i64,
) -> Result<Vec<AccountUsage>, StorageError> {
    let rows = sqlx::query_as!(
        AccountUsage,
        r#"SELECT used.account AS "account!", used.workloads AS "workloads!", used.namespaces AS "namespaces!",
               used.clusters AS "clusters!"
           FROM (
               SELECT account.name AS account, sum(usage.workloads)::bigint AS workloads,
                   sum(usage.namespaces)::bigint AS namespaces, count(*) AS clusters
               FROM (SELECT DISTINCT ON (cluster_id) id FROM coverage_snapshots ORDER BY cluster_id, id DESC) AS newest
               JOIN coverage_usage AS usage ON usage.snapshot_id = newest.id AND usage.kind = 'account'
               JOIN registry_accounts AS account ON account.id = usage.resource_id
               GROUP BY account.name
           ) AS used
           WHERE $1::bigint IS NULL OR used.workloads < $1 OR (used.workloads = $1 AND used.account > $2 COLLATE "C")
           ORDER BY used.workloads DESC, used.account LIMIT $3"#,
        after.map(|after| after.workloads),
        after.map(|after| after.name.as_str()),
        limit,
    );
    Ok(rows.fetch_all(conn).await?)
}

/// What uses a pull secret.
#[derive(Debug, Clone)]
pub struct PullSecretUsage {
    /// Workloads.
    pub workloads: i64,
    /// Namespaces with such a workload.
    pub namespaces: i64,
    /// Clusters with such a workload.
    pub clusters: i64,
    /// Time of the oldest of these snapshots.
    pub as_of: DateTime<Utc>,
}

/// Finds what uses a pull secret, by the newest snapshots of its clusters; none without a snapshot.
#[tracing::instrument(level = "debug", name = "db.coverage_usage.find_pull_secret", skip_all, fields(pull_secret.id = %id))]
pub async fn find_pull_secret(conn: &mut PgConnection, id: Uuid) -> Result<Option<PullSecretUsage>, StorageError> {
    let row = sqlx::query!(
        r#"SELECT coalesce(sum(usage.workloads), 0)::bigint AS "workloads!",
               coalesce(sum(usage.namespaces), 0)::bigint AS "namespaces!", count(usage.snapshot_id) AS "clusters!",
               min(newest.taken_at) AS as_of
           FROM (
               SELECT DISTINCT ON (cluster_id) id, taken_at FROM coverage_snapshots
               WHERE cluster_id IN (SELECT cluster_id FROM pull_secret_clusters WHERE pull_secret_id = $1)
               ORDER BY cluster_id, id DESC
           ) AS newest
           LEFT JOIN coverage_usage AS usage
               ON usage.snapshot_id = newest.id AND usage.kind = 'pullSecret' AND usage.resource_id = $1"#,
        id,
    )
    .fetch_one(conn)
    .await?;
    let (workloads, namespaces, clusters) = (row.workloads, row.namespaces, row.clusters);
    Ok(row.as_of.map(|as_of| PullSecretUsage { workloads, namespaces, clusters, as_of }))
}

/// Numbers of the newest snapshot of a cluster.
#[derive(Debug, Clone)]
pub struct ClusterNumbers {
    /// Name of the cluster.
    pub cluster: String,
    /// Time of the snapshot.
    pub taken_at: DateTime<Utc>,
    /// Workloads by kind and verdict.
    pub verdicts: Vec<VerdictCount>,
}

/// Reads the numbers of the newest snapshots, of a bounded number of clusters by name.
#[tracing::instrument(level = "debug", name = "db.coverage_snapshots.numbers", skip_all)]
pub async fn numbers(conn: &mut PgConnection) -> Result<Vec<ClusterNumbers>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT clusters.name, newest.taken_at, newest.summary AS "summary: Json<Value>"
           FROM clusters CROSS JOIN LATERAL (
               SELECT taken_at, summary FROM coverage_snapshots
               WHERE cluster_id = clusters.id ORDER BY id DESC LIMIT 1
           ) AS newest
           ORDER BY clusters.name LIMIT $1"#,
        CLUSTERS_MAX,
    );
    let numbers = rows.fetch_all(conn).await?.into_iter().map(|row| {
        // A document of another release has no numbers here.
        let summary: Result<Summary, Invalid> = parse(row.summary.0);
        let verdicts = summary.map(|summary| summary.verdicts).unwrap_or_default();
        ClusterNumbers { cluster: row.name, taken_at: row.taken_at, verdicts }
    });
    Ok(numbers.collect())
}
