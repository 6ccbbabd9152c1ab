//! Pages of the groups and pull secrets of a snapshot.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

use serde_json::Value;
use sqlx::types::Json;
use uuid::Uuid;

use super::snapshots::{TABLE, parse};
use crate::{
    domain::{
        coverage::{Group, PullSecretUse, SecretOwner},
        diagnosis::Verdict,
        invalid::Invalid,
        names::{Name, NamespaceName, SecretName},
    },
    storage::{PgConnection, StorageError, corrupt},
};

/// Place in a list of a snapshot, whose pages all are of this snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotPosition {
    /// The snapshot.
    pub snapshot: Uuid,
    /// Number in it.
    pub number: i64,
}

impl FromStr for SnapshotPosition {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::new("is not a place in a snapshot");
        let (snapshot, number) = text.split_once('/').ok_or_else(invalid)?;
        let snapshot = Uuid::try_parse(snapshot).map_err(|_| invalid())?;
        Ok(Self { snapshot, number: number.parse().map_err(|_| invalid())? })
    }
}

impl Display for SnapshotPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.snapshot, self.number)
    }
}

/// Filter of a list of groups.
#[derive(Debug, Default)]
pub struct GroupFilter {
    /// Verdicts, of which one must apply. Empty for any.
    pub verdicts: Vec<Verdict>,
    /// Namespace.
    pub namespace: Option<NamespaceName>,
    /// Account whose login is used.
    pub account: Option<Name>,
    /// Name of a Secret among the pull secrets.
    pub secret: Option<SecretName>,
    /// Pull secret of regcred whose Secret is among the pull secrets.
    pub pull_secret: Option<Name>,
    /// Whether the verdict differs from that of the snapshot before.
    pub changed: bool,
}

/// A group in a list.
#[derive(Debug)]
pub struct ListedGroup {
    /// Its place.
    pub position: SnapshotPosition,
    /// The group.
    pub group: Group,
}

/// Filter of a list of pull secrets.
#[derive(Debug, Default)]
pub struct SecretFilter {
    /// Namespace.
    pub namespace: Option<NamespaceName>,
    /// Owners, of which one must apply. Empty for any.
    pub owners: Vec<SecretOwner>,
    /// Whether something uses it.
    pub used: Option<bool>,
    /// Whether it could be adopted.
    pub adoptable: Option<bool>,
}

/// A pull secret in a list.
#[derive(Debug)]
pub struct ListedSecretUse {
    /// Its place.
    pub position: SnapshotPosition,
    /// The pull secret.
    pub secret: PullSecretUse,
}

/// Returns the snapshot of a page: that of the position if it still exists, or else the newest one.
#[tracing::instrument(level = "debug", name = "db.coverage_snapshots.of_page", skip_all, fields(cluster.id = %cluster))]
pub async fn of_page(
    conn: &mut PgConnection,
    cluster: Uuid,
    after: Option<SnapshotPosition>,
) -> Result<Option<Uuid>, StorageError> {
    let found = sqlx::query_scalar!(
        "SELECT id FROM coverage_snapshots WHERE cluster_id = $1 AND ($2::uuid IS NULL OR id = $2)
         ORDER BY id DESC LIMIT 1",
        cluster,
        after.map(|after| after.snapshot),
    );
    Ok(found.fetch_optional(conn).await?)
}

/// Lists the groups of a snapshot, at most `limit` after a number.
#[tracing::instrument(level = "debug", name = "db.coverage_groups.list", skip_all, fields(snapshot.id = %snapshot))]
pub async fn groups(
    conn: &mut PgConnection,
    snapshot: Uuid,
    filter: &GroupFilter,
    (after, limit): (i64, i64),
) -> Result<Vec<ListedGroup>, StorageError> {
    let verdicts: Vec<&str> = filter.verdicts.iter().map(|verdict| verdict.as_str()).collect();
    let (namespaces, secrets) = match &filter.pull_secret {
        Some(name) => {
            let (namespaces, secrets) = placed(&mut *conn, snapshot, name).await?;
            (Some(namespaces), Some(secrets))
        }
        None => (None, None),
    };
    let rows = sqlx::query!(
        r#"SELECT number, document AS "document: Json<Value>", previous_verdict FROM coverage_groups
           WHERE snapshot_id = $1 AND number > $2 AND (cardinality($3::text[]) = 0 OR verdict = ANY($3))
               AND ($4::text IS NULL OR namespace = $4) AND ($5::text IS NULL OR account = $5)
               AND (NOT $6::boolean OR previous_verdict IS DISTINCT FROM verdict)
               AND ($7::text IS NULL OR document -> 'pullSecrets' ? $7)
               AND ($8::text[] IS NULL OR (namespace = ANY($8) AND document -> 'pullSecrets' ?| $9::text[]))
           ORDER BY number LIMIT $10"#,
        snapshot,
        after,
        &verdicts as _,
        filter.namespace.as_ref().map(NamespaceName::as_str),
        filter.account.as_ref().map(Name::as_str),
        filter.changed,
        filter.secret.as_ref().map(SecretName::as_str),
        namespaces.as_deref() as _,
        secrets.as_deref() as _,
        limit,
    );
    let listed = rows.fetch_all(conn).await?.into_iter().map(|row| {
        let mut group: Group = parse(row.document.0).map_err(corrupt(TABLE, snapshot, "document of a group"))?;
        group.previous_verdict = row.previous_verdict.and_then(|verdict| verdict.parse().ok());
        Ok(ListedGroup { position: SnapshotPosition { snapshot, number: row.number }, group })
    });
    listed.collect()
}

/// Namespaces with a Secret of a pull secret of regcred, and the names of these Secrets.
async fn placed(
    conn: &mut PgConnection,
    snapshot: Uuid,
    pull_secret: &Name,
) -> Result<(Vec<String>, Vec<String>), StorageError> {
    let rows = sqlx::query!(
        r#"SELECT namespace, document ->> 'name' AS "name!" FROM coverage_secrets
           WHERE snapshot_id = $1 AND owner = 'pullSecret' AND document ->> 'pullSecret' = $2"#,
        snapshot,
        pull_secret.as_str(),
    );
    let (namespaces, mut names): (Vec<String>, Vec<String>) =
        rows.fetch_all(conn).await?.into_iter().map(|row| (row.namespace, row.name)).unzip();
    names.sort_unstable();
    names.dedup();
    Ok((namespaces, names))
}

/// Lists the pull secrets of a snapshot, at most `limit` after a number.
#[tracing::instrument(level = "debug", name = "db.coverage_secrets.list", skip_all, fields(snapshot.id = %snapshot))]
pub async fn secrets(
    conn: &mut PgConnection,
    snapshot: Uuid,
    filter: &SecretFilter,
    (after, limit): (i64, i64),
) -> Result<Vec<ListedSecretUse>, StorageError> {
    let owners: Vec<&str> = filter.owners.iter().map(|owner| owner.as_str()).collect();
    let rows = sqlx::query!(
        r#"SELECT number, document AS "document: Json<Value>" FROM coverage_secrets
           WHERE snapshot_id = $1 AND number > $2 AND ($3::text IS NULL OR namespace = $3)
               AND (cardinality($4::text[]) = 0 OR owner = ANY($4))
               AND ($5::boolean IS NULL OR is_unused <> $5) AND ($6::boolean IS NULL OR is_adoptable = $6)
           ORDER BY number LIMIT $7"#,
        snapshot,
        after,
        filter.namespace.as_ref().map(NamespaceName::as_str),
        &owners as _,
        filter.used,
        filter.adoptable,
        limit,
    );
    let listed = rows.fetch_all(conn).await?.into_iter().map(|row| {
        Ok(ListedSecretUse {
            position: SnapshotPosition { snapshot, number: row.number },
            secret: parse(row.document.0).map_err(corrupt(TABLE, snapshot, "document of a pull secret"))?,
        })
    });
    listed.collect()
}
