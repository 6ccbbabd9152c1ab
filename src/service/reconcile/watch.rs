//! Watches clusters and makes affected targets due at once. Changes that a watch misses are found
//! by the recheck and the resync.
//!
//! One replica at a time watches a cluster, under a lease with an epoch.

use std::{collections::HashMap, time::Duration};

use futures_util::StreamExt;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::Reconciler;
use crate::{
    clients::cluster::{Change, ClusterClient, ClusterError, Interruption, Watched},
    service::{ServiceError, connection},
    storage::{
        self,
        targets::due::{self, ChangedSecrets},
        watches::ClaimedWatch,
    },
};

/// Changes buffered before backpressure reaches the API server.
const BUFFER: usize = 1_024;
/// Time for which changes are batched. Each write of a fan-out causes one.
const BATCH_WINDOW: Duration = Duration::from_millis(100);
/// Delay before a forbidden watch is started again.
const FORBIDDEN_DELAY: Duration = Duration::from_mins(5);
/// Consecutive refusals, half a minute in all, after which the cluster is connected anew: its
/// address or credential may have changed.
const REFUSALS_MAX: u32 = 5;

impl Reconciler {
    /// Claims the watches of all clusters that no replica watches.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn claim_watches(&self) -> Result<Vec<ClaimedWatch>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::watches::claim(&mut conn, self.config.lease).await?)
    }

    /// Watches a cluster until it changes, the lease is lost, or `stop` completes. Then releases
    /// the lease.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Cluster`] if the cluster cannot be watched. The lease is left to expire,
    /// which delays the next attempt.
    pub async fn watch(&self, watch: &ClaimedWatch, stop: impl Future<Output = ()>) -> Result<(), ServiceError> {
        let (name, client) = self.client(watch.cluster_id).await?;
        let (sender, receiver) = mpsc::channel(BUFFER);
        tokio::select! {
            ended = self.forward(&name, &client, Watched::Namespaces, &sender) => ended?,
            ended = self.forward(&name, &client, Watched::Secrets, &sender) => ended?,
            ended = self.process(watch.cluster_id, receiver) => ended?,
            ended = self.renew_lease(watch) => ended?,
            () = stop => {}
        }
        let mut conn = connection(&self.pool).await?;
        Ok(storage::watches::release(&mut conn, watch).await?)
    }

    /// Renews the lease until it is lost or the cluster changes.
    async fn renew_lease(&self, watch: &ClaimedWatch) -> Result<(), ServiceError> {
        loop {
            tokio::time::sleep(self.config.lease / 3).await;
            let mut conn = connection(&self.pool).await?;
            let revision = storage::watches::renew(&mut conn, watch, self.config.lease).await?;
            if revision != Some(watch.revision) {
                return Ok(());
            }
        }
    }

    /// Forwards the changes of one watch. A forbidden watch does not end the other one.
    async fn forward(
        &self,
        cluster: &str,
        client: &ClusterClient,
        watched: Watched,
        changes: &mpsc::Sender<Change>,
    ) -> Result<(), ServiceError> {
        let mut watch = client.watch(watched);
        let mut refusals = 0;
        while let Some(event) = watch.next().await {
            match event {
                Ok(change) => {
                    refusals = 0;
                    // The receiver has ended.
                    if changes.send(change).await.is_err() {
                        break;
                    }
                }
                Err(Interruption::Broken) => {}
                Err(Interruption::Refused(ClusterError::Forbidden { .. })) => {
                    tracing::debug!(cluster, watched = watched.as_str(), "watch forbidden");
                    tokio::time::sleep(FORBIDDEN_DELAY).await;
                }
                Err(Interruption::Refused(error)) => {
                    refusals += 1;
                    if refusals == REFUSALS_MAX {
                        return Err(error.into());
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes the targets of changes due, in batches.
    async fn process(&self, cluster: Uuid, mut changes: mpsc::Receiver<Change>) -> Result<(), ServiceError> {
        let mut batch = Vec::new();
        while changes.recv_many(&mut batch, BUFFER).await > 0 {
            tokio::time::sleep(BATCH_WINDOW).await;
            while let Ok(change) = changes.try_recv() {
                batch.push(change);
            }
            self.mark_due(cluster, Batch::of(batch.drain(..))).await?;
        }
        Ok(())
    }

    async fn mark_due(&self, cluster: Uuid, batch: Batch) -> Result<(), ServiceError> {
        let Batch { namespaces, changed_secrets, all_secrets } = batch;
        let mut tx = self.pool.begin().await?;
        let mut marked = 0;
        // Resyncs before targets: the lock order.
        if !namespaces.is_empty() {
            marked += due::mark_namespaces_due(&mut tx, cluster, &namespaces).await?;
        }
        marked += due::mark_secrets_due(&mut tx, cluster, &changed_secrets).await?;
        if let Some(all) = all_secrets {
            let (ids, names): (Vec<Uuid>, Vec<String>) = all.into_iter().unzip();
            marked += due::mark_missing_due(&mut tx, cluster, (&ids, &names)).await?;
        }
        if marked > 0 {
            storage::wakeups::wake_workers(&mut tx).await?;
        }
        Ok(tx.commit().await?)
    }
}

/// Changes of a cluster, by kind.
struct Batch {
    namespaces: Vec<String>,
    changed_secrets: ChangedSecrets,
    /// Pull secret and namespace of all Secrets, if a watch started.
    all_secrets: Option<Vec<(Uuid, String)>>,
}

impl Batch {
    /// Groups changes. The last change of a Secret wins.
    fn of(changes: impl Iterator<Item = Change>) -> Self {
        let mut namespaces = Vec::new();
        let mut secrets: HashMap<(Uuid, String), Option<String>> = HashMap::new();
        let mut all_secrets = None;
        for change in changes {
            match change {
                Change::Namespace(name) => namespaces.push(name),
                Change::Secret { namespace, pull_secret_id, resource_version } => {
                    secrets.insert((pull_secret_id, namespace), resource_version);
                }
                Change::AllSecrets(all) => all_secrets = Some(all),
            }
        }
        let mut changed_secrets = ChangedSecrets::default();
        for ((pull_secret_id, namespace), resource_version) in secrets {
            changed_secrets.pull_secret_ids.push(pull_secret_id);
            changed_secrets.namespaces.push(namespace);
            changed_secrets.resource_versions.push(resource_version);
        }
        Self { namespaces, changed_secrets, all_secrets }
    }
}
