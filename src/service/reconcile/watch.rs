//! Watching clusters: what changes there is looked at at once, and not only at the next comparison. Whatever is missed is found
//! by that.
//!
//! One replica at a time watches a cluster, under a lease with an epoch.

use std::{collections::HashMap, time::Duration};

use tokio::sync::mpsc;
use uuid::Uuid;

use super::Reconciler;
use crate::{
    clients::cluster::{Change, ClusterClient, ClusterError, Watched},
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

impl Reconciler {
    /// Takes the clusters that pull secrets go to and that nobody watches.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn claim_watches(&self) -> Result<Vec<ClaimedWatch>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::targets::claim_watches(&mut conn, self.settings.lease).await?)
    }

    /// Watches a cluster until a watch ends, or another replica has the lease.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Cluster`] if it cannot be watched; the lease is left to run out then, so that it is not tried all the time.
    pub async fn watch(&self, watch: ClaimedWatch) -> Result<(), ServiceError> {
        let (_, client) = self.client(watch.cluster_id).await?;
        let (sender, receiver) = mpsc::channel(WAITING);
        tokio::select! {
            ended = watch_allowed(&client, Watched::Namespaces, &sender) => ended?,
            ended = watch_allowed(&client, Watched::Secrets, &sender) => ended?,
            followed = self.follow(watch.cluster_id, receiver) => followed?,
            held = self.hold(watch) => return held,
        }
        let mut conn = connection(&self.pool).await?;
        Ok(storage::targets::release_watch(&mut conn, watch).await?)
    }

    /// Keeps the lease for as long as it can be kept.
    async fn hold(&self, watch: ClaimedWatch) -> Result<(), ServiceError> {
        loop {
            tokio::time::sleep(self.settings.lease / 3).await;
            let mut conn = connection(&self.pool).await?;
            if !storage::targets::renew_watch(&mut conn, watch, self.settings.lease).await? {
                return Ok(());
            }
        }
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
            for change in gathered.drain(..) {
                match change {
                    Change::Namespace(name) => namespaces.push(name),
                    Change::Secret { namespace, pull_secret_id, resource_version } => {
                        secrets.insert((pull_secret_id, namespace), resource_version);
                    }
                }
            }
            let mut secrets_changed = ChangedSecrets::default();
            for ((pull_secret_id, namespace), resource_version) in secrets {
                secrets_changed.ids.push(pull_secret_id);
                secrets_changed.namespaces.push(namespace);
                secrets_changed.resource_versions.push(resource_version);
            }
            let mut tx = self.pool.begin().await?;
            let mut poked = storage::targets::poke_secrets(&mut tx, cluster, &secrets_changed).await?;
            if !namespaces.is_empty() {
                poked += storage::targets::poke_namespaces(&mut tx, cluster, &namespaces).await?;
            }
            if poked > 0 {
                storage::pull_secrets::notify(&mut tx).await?;
            }
            tx.commit().await?;
        }
        Ok(())
    }
}

/// A right that is missing is missing for one of the two watches, and may be given later.
async fn watch_allowed(
    client: &ClusterClient,
    watched: Watched,
    changes: &mpsc::Sender<Change>,
) -> Result<(), ServiceError> {
    match client.watch(watched, changes).await {
        Err(ClusterError::Forbidden { detail }) => {
            tracing::debug!(detail, "a cluster is compared at intervals alone");
            tokio::time::sleep(FORBIDDEN).await;
            Ok(())
        }
        ended => Ok(ended?),
    }
}
