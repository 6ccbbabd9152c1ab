//! Resync: compares the namespaces of a cluster with the selectors of pull secrets, and adds or
//! removes targets.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::timeout;
use uuid::Uuid;

use super::{Reconciler, failure::target_error};
use crate::{
    clients::cluster::{ClusterError, FoundNamespace},
    domain::{names::NamespaceName, pull_secret::Declaration},
    service::{ServiceError, connection},
    storage::{self, pull_secrets::StoredPullSecret, resyncs::ClaimedResync},
};

/// Delay after a failed resync.
const RETRY_INTERVAL: Duration = Duration::from_secs(15);

impl Reconciler {
    /// Claims a due resync.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn claim_resync(&self) -> Result<Option<ClaimedResync>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::resyncs::claim(&mut conn, self.config.lease).await?)
    }

    /// Resyncs a cluster and records the result.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`]. Failures of the cluster are recorded.
    pub async fn resync(&self, claimed: ClaimedResync) -> Result<(), ServiceError> {
        let resynced = timeout(self.config.lease * 2 / 3, self.resync_cluster(claimed.cluster_id)).await;
        let resynced = resynced.unwrap_or_else(|_| {
            let detail = "listing the namespaces of the cluster took too long".to_owned();
            Err(ClusterError::Timeout { detail }.into())
        });
        let (error, requeue_after) = match resynced {
            Ok(()) => (None, self.config.resync_interval),
            Err(ServiceError::Storage(error)) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(cluster = claimed.cluster_name, %error, "resync failed");
                (Some(target_error(&error)), RETRY_INTERVAL)
            }
        };
        let mut conn = connection(&self.pool).await?;
        let error = error.as_ref().map(|error| (error.error_type.as_str(), error.detail.as_str()));
        Ok(storage::resyncs::record_result(&mut conn, &claimed, error, requeue_after).await?)
    }

    async fn resync_cluster(&self, cluster: Uuid) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let ids = storage::pull_secret_clusters::selecting(&mut conn, cluster).await?;
        drop(conn);
        if ids.is_empty() {
            return Ok(());
        }
        let (cluster_name, client) = self.client(cluster).await?;
        let mut conn = connection(&self.pool).await?;
        // Before the list: a declaration that changes later makes the resync due again.
        let pull_secrets = storage::pull_secrets::find_many(&mut conn, &ids).await?;
        drop(conn);
        let namespaces = client.list_namespaces().await?;
        for pull_secret in pull_secrets {
            let wanted = wanted_namespaces(&pull_secret.declaration, &cluster_name, &namespaces);
            let unmatched = unmatched_targets(&pull_secret.declaration, &cluster_name, &namespaces);
            self.select_namespaces(&pull_secret, cluster, &wanted, &unmatched).await?;
        }
        Ok(())
    }

    /// Makes `wanted` the targets of a pull secret in a cluster, unless its declaration changed
    /// since it was read. `unmatched` holds the places of its selectors that matched nothing.
    async fn select_namespaces(
        &self,
        pull_secret: &StoredPullSecret,
        cluster: Uuid,
        wanted: &BTreeSet<NamespaceName>,
        unmatched: &[usize],
    ) -> Result<(), ServiceError> {
        let wanted: Vec<String> = wanted.iter().map(NamespaceName::to_string).collect();
        let StoredPullSecret { id, version, .. } = *pull_secret;
        let mut tx = self.pool.begin().await?;
        let Some(generation) = storage::pull_secrets::lock_version(&mut tx, id, version).await? else {
            return Ok(());
        };
        let policy = pull_secret.declaration.deletion_policy;
        let changed = storage::targets::select(&mut tx, id, cluster, generation, &wanted, policy).await?;
        let unmatched: Vec<i32> = unmatched.iter().filter_map(|place| i32::try_from(*place).ok()).collect();
        storage::pull_secret_clusters::record_resync(&mut tx, id, cluster, version, &unmatched).await?;
        if changed > 0 {
            storage::wakeups::wake_workers(&mut tx).await?;
        }
        Ok(tx.commit().await?)
    }
}

/// Namespaces that a declaration lists or selects in a cluster.
pub(super) fn wanted_namespaces(
    declaration: &Declaration,
    cluster: &str,
    namespaces: &[FoundNamespace],
) -> BTreeSet<NamespaceName> {
    let listed = declaration.listed().into_iter().filter(|(name, _)| name.as_str() == cluster);
    let selected = namespaces
        .iter()
        .filter(|namespace| !namespace.terminating && declaration.selects(cluster, &namespace.name, &namespace.labels));
    listed.map(|(_, namespace)| namespace).chain(selected.map(|namespace| &namespace.name)).cloned().collect()
}

/// Places in `targets` of the selectors that match none of the namespaces of a cluster.
pub(super) fn unmatched_targets(declaration: &Declaration, cluster: &str, namespaces: &[FoundNamespace]) -> Vec<usize> {
    let living = namespaces.iter().filter(|namespace| !namespace.terminating);
    declaration.unmatched(cluster, &living.map(|namespace| (&namespace.name, &namespace.labels)))
}
