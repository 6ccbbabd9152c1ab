//! What regcred knows of the Secrets of a cluster without a call.

use uuid::Uuid;

use crate::{
    domain::{
        names::{NamespaceName, SecretName},
        registry::RegistryScope,
    },
    storage::{PgConnection, StorageError},
};

/// Namespaces of a list that regcred falls back to.
const NAMESPACES_MAX: i64 = 200;

/// Secret of a pull secret in a namespace.
#[derive(Debug)]
pub struct DeclaredSecret {
    /// The pull secret.
    pub pull_secret_id: Uuid,
    /// The namespace.
    pub namespace: NamespaceName,
    /// Whether the Secret has the accounts of the pull secret.
    pub is_synced: bool,
}

/// Lists the targets of a cluster, without those whose Secret has another owner.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.list_declared", skip_all, fields(cluster.id = %cluster))]
pub async fn declared_secrets(conn: &mut PgConnection, cluster: Uuid) -> Result<Vec<DeclaredSecret>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT pull_secret_id, namespace, state = 'synced' AND uid IS NOT NULL AS "is_synced!"
           FROM pull_secret_targets WHERE cluster_id = $1 AND wanted AND state <> 'conflict'"#,
        cluster,
    );
    let targets = rows.fetch_all(conn).await?.into_iter().filter_map(|row| {
        let namespace = NamespaceName::parse(&row.namespace).ok()?;
        Some(DeclaredSecret { pull_secret_id: row.pull_secret_id, namespace, is_synced: row.is_synced })
    });
    Ok(targets.collect())
}

/// Lists the namespaces of a cluster with a target, by name: a bounded number.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.namespaces", skip_all, fields(cluster.id = %cluster))]
pub async fn namespaces(conn: &mut PgConnection, cluster: Uuid) -> Result<Vec<NamespaceName>, StorageError> {
    let rows = sqlx::query_scalar!(
        "SELECT DISTINCT namespace FROM pull_secret_targets WHERE cluster_id = $1 AND wanted
         ORDER BY namespace LIMIT $2",
        cluster,
        NAMESPACES_MAX,
    );
    Ok(rows.fetch_all(conn).await?.iter().filter_map(|name| NamespaceName::parse(name).ok()).collect())
}

/// An account in a Secret of direct delivery.
#[derive(Debug)]
pub struct DirectAccount {
    /// The namespace.
    pub namespace: NamespaceName,
    /// Name of the Secret.
    pub secret: SecretName,
    /// Id of the account.
    pub account_id: Uuid,
    /// Name of the account.
    pub account: String,
    /// Registry of the account.
    pub registry: RegistryScope,
}

/// Lists the accounts of the Secrets that were delivered directly to a cluster.
#[tracing::instrument(level = "debug", name = "db.direct_secrets.list_of_cluster", skip_all, fields(cluster.id = %cluster))]
pub async fn direct_accounts(conn: &mut PgConnection, cluster: Uuid) -> Result<Vec<DirectAccount>, StorageError> {
    let rows = sqlx::query!(
        "SELECT direct.namespace, direct.name AS secret, account.id AS account_id, account.name AS account, account.registry
         FROM direct_secrets AS direct JOIN registry_accounts AS account ON account.id = direct.account_id
         WHERE direct.cluster_id = $1",
        cluster,
    );
    let accounts = rows.fetch_all(conn).await?.into_iter().filter_map(|row| {
        Some(DirectAccount {
            namespace: NamespaceName::parse(&row.namespace).ok()?,
            secret: SecretName::parse(&row.secret).ok()?,
            account_id: row.account_id,
            account: row.account,
            registry: RegistryScope::parse(&row.registry).ok()?,
        })
    });
    Ok(accounts.collect())
}
