//! Table `direct_secrets`: Secrets of direct delivery, with the accounts in them.
//!
//! A row says what was delivered, not that the Secret still exists.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::types::Json;
use uuid::Uuid;

use crate::{
    domain::names::{Name, NamespaceName, SecretName},
    storage::{PgConnection, StorageError},
};

/// Further Secrets that are kept for each account of a delivery; older ones are deleted. Otherwise
/// deliveries under ever new names would fill the table.
const KEPT: i64 = 100;

/// A delivered Secret.
#[derive(Debug, Clone, Copy)]
pub struct DirectSecret<'a> {
    /// Name of the cluster.
    pub cluster: &'a Name,
    /// The namespace.
    pub namespace: &'a NamespaceName,
    /// Name of the Secret.
    pub name: &'a SecretName,
}

/// Records a delivery. It replaces an earlier one of the same Secret.
///
/// `seconds_ago` is the age of the logins in it. Accounts, and a cluster, that were deleted
/// meanwhile are left out.
#[tracing::instrument(level = "debug", name = "db.direct_secrets.record", skip_all)]
pub async fn record(
    conn: &mut PgConnection,
    secret: DirectSecret<'_>,
    accounts: &[&str],
    seconds_ago: f64,
) -> Result<(), StorageError> {
    // Cluster and accounts are locked before rows of this table, as their deletion does, and
    // accounts by name. Of concurrent deliveries, one deletes the older rows, and none waits.
    sqlx::query!(
        r#"WITH accounts AS MATERIALIZED (
               SELECT id FROM registry_accounts WHERE name = ANY($4::text[]) ORDER BY name FOR KEY SHARE
           ), cluster AS MATERIALIZED (
               SELECT id FROM clusters WHERE name = $1 AND (SELECT count(*) FROM accounts) > 0 FOR KEY SHARE
           ), replaced AS (
               DELETE FROM direct_secrets AS old USING cluster
               WHERE old.cluster_id = cluster.id AND old.namespace = $2 AND old.name = $3
                   AND old.account_id NOT IN (SELECT id FROM accounts)
           ), excess AS (
               DELETE FROM direct_secrets WHERE ctid = ANY (ARRAY(
                   SELECT ctid FROM direct_secrets
                   WHERE ctid = ANY (ARRAY(
                       SELECT older.ctid FROM cluster, accounts CROSS JOIN LATERAL (
                           SELECT ctid FROM direct_secrets AS old
                           WHERE old.account_id = accounts.id
                               AND (old.cluster_id, old.namespace, old.name) <> (cluster.id, $2, $3)
                           ORDER BY old.delivered_at DESC OFFSET $6
                       ) AS older
                   ))
                   FOR UPDATE SKIP LOCKED
               ))
           )
           INSERT INTO direct_secrets (account_id, cluster_id, namespace, name, delivered_at)
           SELECT accounts.id, cluster.id, $2, $3, now() - $5 * interval '1 second' FROM accounts, cluster
           ON CONFLICT (account_id, cluster_id, namespace, name) DO UPDATE SET delivered_at = excluded.delivered_at"#,
        secret.cluster.as_str(),
        secret.namespace.as_str(),
        secret.name.as_str(),
        accounts as _,
        seconds_ago,
        KEPT,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A Secret with an earlier login of an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutdatedCopy {
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// Name of the Secret.
    pub name: String,
}

/// Lists the Secrets that were delivered before the last change of an account's login.
#[tracing::instrument(level = "debug", name = "db.direct_secrets.list_outdated", skip_all, fields(account.id = %account))]
pub async fn list_outdated(conn: &mut PgConnection, account: Uuid) -> Result<Vec<OutdatedCopy>, StorageError> {
    let rows = sqlx::query_as!(
        OutdatedCopy,
        r#"SELECT clusters.name AS cluster, direct.namespace, direct.name
           FROM direct_secrets AS direct
           JOIN clusters ON clusters.id = direct.cluster_id
           JOIN registry_accounts AS account ON account.id = direct.account_id
           WHERE direct.account_id = $1 AND direct.delivered_at < account.login_changed_at
           ORDER BY clusters.name, direct.namespace, direct.name"#,
        account,
    );
    Ok(rows.fetch_all(conn).await?)
}

/// An account in a recorded Secret.
#[derive(Debug)]
pub struct Included {
    /// Name of the Secret.
    pub secret: String,
    /// Name of the account.
    pub account: String,
    /// Labels of the account.
    pub labels: BTreeMap<String, String>,
    /// Time of the delivery.
    pub delivered_at: DateTime<Utc>,
    /// Whether the login of the account has changed since.
    pub is_outdated: bool,
}

/// Lists the accounts of these Secrets in a namespace, by name.
#[tracing::instrument(level = "debug", name = "db.direct_secrets.list_included", skip_all)]
pub async fn list_included(
    conn: &mut PgConnection,
    cluster: &Name,
    namespace: &NamespaceName,
    secrets: &[&str],
) -> Result<Vec<Included>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT direct.name AS secret, account.name AS account, account.labels AS "labels: Json<BTreeMap<String, String>>",
               direct.delivered_at, coalesce(direct.delivered_at < account.login_changed_at, false) AS "is_outdated!"
           FROM direct_secrets AS direct
           JOIN clusters ON clusters.id = direct.cluster_id
           JOIN registry_accounts AS account ON account.id = direct.account_id
           WHERE clusters.name = $1 AND direct.namespace = $2 AND direct.name = ANY($3::text[])
           ORDER BY account.name"#,
        cluster.as_str(),
        namespace.as_str(),
        secrets as _,
    )
    .fetch_all(conn)
    .await?;
    let included = rows.into_iter().map(|row| Included {
        secret: row.secret,
        account: row.account,
        labels: row.labels.0,
        delivered_at: row.delivered_at,
        is_outdated: row.is_outdated,
    });
    Ok(included.collect())
}
