//! Watching clusters: what changes there is looked at at once, and not only at the next comparison. Whatever is missed is found
//! by that.
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
        targets::{ChangedSecrets, ClaimedWatch},
    },
};

/// Changes that wait to be looked at; the API server waits with the rest.
const WAITING: usize = 1_024;
/// How long changes are gathered, so that a fan-out, each write of which is a change, costs a few statements.
const GATHERED: Duration = Duration::from_millis(100);
/// When a watch is tried again that the cluster does not allow.
const FORBIDDEN: Duration = Duration::from_mins(5);
/// How often in a row a watch is tried to be begun, half a minute in all, before the cluster is connected anew: its address or its
/// credential may be another one by then.
const TRIES: u32 = 5;

impl Reconciler {
    /// Takes the clusters that pull secrets go to and that nobody watches.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn claim_watches(&self) -> Result<Vec<ClaimedWatch>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::targets::claim_watches(&mut conn, self.config.lease).await?)
    }

    /// Watches a cluster until it is changed, another replica has the lease, or it shall `stop`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Cluster`] if it cannot be watched; the lease is left to run out then, so that it is not tried all the time.
    pub async fn watch(&self, watch: ClaimedWatch, stop: impl Future<Output = ()>) -> Result<(), ServiceError> {
        let (name, client) = self.client(watch.cluster_id).await?;
        let (sender, receiver) = mpsc::channel(WAITING);
        tokio::select! {
            ended = self.forward(&name, &client, Watched::Namespaces, &sender) => ended?,
            ended = self.forward(&name, &client, Watched::Secrets, &sender) => ended?,
            followed = self.follow(watch.cluster_id, receiver) => followed?,
            held = self.hold(watch) => held?,
            () = stop => {}
        }
        let mut conn = connection(&self.pool).await?;
        Ok(storage::targets::release_watch(&mut conn, watch).await?)
    }

    /// Keeps the lease for as long as it can be kept, and the cluster stays as it is.
    async fn hold(&self, watch: ClaimedWatch) -> Result<(), ServiceError> {
        loop {
            tokio::time::sleep(self.config.lease / 3).await;
            let mut conn = connection(&self.pool).await?;
            let version = storage::targets::renew_watch(&mut conn, watch, self.config.lease).await?;
            if version != Some(watch.cluster_version) {
                return Ok(());
            }
        }
    }

    /// Passes on what a watch tells. A right that is missing is missing for one of the two watches, and may be given later.
    async fn forward(
        &self,
        cluster: &str,
        client: &ClusterClient,
        watched: Watched,
        changes: &mpsc::Sender<Change>,
    ) -> Result<(), ServiceError> {
        let mut watch = client.watch(watched);
        let mut refusals = 0;
        while let Some(told) = watch.next().await {
            match told {
                Ok(change) => {
                    refusals = 0;
                    // Whoever follows the changes may have gone: then so does this.
                    if changes.send(change).await.is_err() {
                        break;
                    }
                }
                Err(Interruption::Broken) => {}
                Err(Interruption::Refused(ClusterError::Forbidden { .. })) => {
                    tracing::debug!(cluster, watched = watched.as_str(), "a cluster is compared at intervals alone");
                    tokio::time::sleep(FORBIDDEN).await;
                }
                Err(Interruption::Refused(error)) => {
                    refusals += 1;
                    if refusals == TRIES {
                        return Err(error.into());
                    }
                }
            }
        }
        Ok(())
    }

    /// Has looked at what changes.
    async fn follow(&self, cluster: Uuid, mut changes: mpsc::Receiver<Change>) -> Result<(), ServiceError> {
        let mut gathered = Vec::new();
        while changes.recv_many(&mut gathered, WAITING).await > 0 {
            tokio::time::sleep(GATHERED).await;
            while let Ok(change) = changes.try_recv() {
                gathered.push(change);
            }
            let mut namespaces = Vec::new();
            // The last change of each Secret is what counts.
            let mut secrets: HashMap<(Uuid, String), Option<String>> = HashMap::new();
            let mut all_secrets = None;
            for change in gathered.drain(..) {
                match change {
                    Change::Namespace(name) => namespaces.push(name),
                    Change::Secret { namespace, pull_secret_id, resource_version } => {
                        secrets.insert((pull_secret_id, namespace), resource_version);
                    }
                    Change::AllSecrets(all) => all_secrets = Some(all),
                }
            }
            let mut secrets_changed = ChangedSecrets::default();
            for ((pull_secret_id, namespace), resource_version) in secrets {
                secrets_changed.ids.push(pull_secret_id);
                secrets_changed.namespaces.push(namespace);
                secrets_changed.resource_versions.push(resource_version);
            }
            let mut tx = self.pool.begin().await?;
            let mut poked = 0;
            // Comparisons first, as whoever declares does it.
            if !namespaces.is_empty() {
                poked += storage::targets::mark_namespaces_due(&mut tx, cluster, &namespaces).await?;
            }
            poked += storage::targets::mark_secrets_due(&mut tx, cluster, &secrets_changed).await?;
            if let Some(all) = all_secrets {
                let (ids, names): (Vec<Uuid>, Vec<String>) = all.into_iter().unzip();
                poked += storage::targets::mark_missing_due(&mut tx, cluster, (&ids, &names)).await?;
            }
            if poked > 0 {
                storage::pull_secrets::notify(&mut tx).await?;
            }
            tx.commit().await?;
        }
        Ok(())
    }
}
