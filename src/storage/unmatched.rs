//! Selectors of pull secrets that match nothing: `pull_secrets.selects_account` and
//! `pull_secret_clusters.unmatched_targets`.

use std::collections::HashMap;

use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// Selectors of a pull secret that match nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unmatched {
    /// Whether the account selector matches no account.
    pub accounts: bool,
    /// Names of clusters, each with the places in `targets` of the selectors that match none of its
    /// namespaces.
    pub targets: Vec<(String, Vec<i32>)>,
}

/// Records whether the account selector of a pull secret matches an account.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.record_selects_account", skip_all, fields(pull_secret.id = %id))]
pub async fn record_accounts(conn: &mut PgConnection, id: Uuid, selects: Option<bool>) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE pull_secrets SET selects_account = $2 WHERE id = $1 AND selects_account IS DISTINCT FROM $2",
        id,
        selects,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Lists the selectors of pull secrets that match nothing. Those of a cluster count once it was
/// compared with the current declaration.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.list_unmatched", skip_all)]
pub async fn list(conn: &mut PgConnection, ids: &[Uuid]) -> Result<HashMap<Uuid, Unmatched>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT id AS "id!", NULL AS "cluster?", '{}'::integer[] AS "targets!" FROM pull_secrets
           WHERE id = ANY($1) AND NOT selects_account AND account_selector IS NOT NULL
           UNION ALL
           SELECT pull_secrets.id, clusters.name, link.unmatched_targets
           FROM pull_secrets
           JOIN pull_secret_clusters AS link ON link.pull_secret_id = pull_secrets.id
           JOIN clusters ON clusters.id = link.cluster_id
           WHERE pull_secrets.id = ANY($1) AND link.selects AND link.unmatched_targets <> '{}'
               AND link.compared_version = pull_secrets.version
           ORDER BY 2"#,
        ids,
    )
    .fetch_all(conn)
    .await?;
    let mut unmatched: HashMap<Uuid, Unmatched> = HashMap::new();
    for row in rows {
        let one = unmatched.entry(row.id).or_default();
        match row.cluster {
            Some(cluster) => one.targets.push((cluster, row.targets)),
            None => one.accounts = true,
        }
    }
    Ok(unmatched)
}

/// Pull secrets with a selector that matches nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UnmatchedCounts {
    /// With an account selector that matches no account.
    pub accounts: i64,
    /// With a namespace selector that matches no namespace of a cluster.
    pub namespaces: i64,
}

/// Counts the pull secrets with a selector that matches nothing.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.count_unmatched", skip_all)]
pub async fn count(conn: &mut PgConnection) -> Result<UnmatchedCounts, StorageError> {
    let counts = sqlx::query_as!(
        UnmatchedCounts,
        r#"SELECT count(*) FILTER (WHERE NOT selects_account AND account_selector IS NOT NULL) AS "accounts!",
               count(*) FILTER (WHERE EXISTS (
                   SELECT FROM pull_secret_clusters AS link
                   WHERE link.pull_secret_id = pull_secrets.id AND link.selects AND link.unmatched_targets <> '{}'
                       AND link.compared_version = pull_secrets.version
               )) AS "namespaces!"
           FROM pull_secrets WHERE deleted_at IS NULL"#
    );
    Ok(counts.fetch_one(conn).await?)
}
