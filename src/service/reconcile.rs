//! Reconciles targets of pull secrets: claims them, brings the cluster to the declared state, and
//! records the results.
//!
//! | Stage | Module |
//! |---|---|
//! | claim due targets under a lease | `claim` |
//! | render the document | `render` |
//! | apply or remove the Secret | `apply` |
//! | record results with their audit events | `results` |
//! | compare namespaces with selectors | `resync` |
//! | watch clusters | `watch` |
//!
//! Reconciliation is level-triggered: an attempt compares the declaration with the cluster,
//! whatever caused it. Correctness never depends on an event.
//!
//! Fencing: a write names the resource version that it was decided on, and the Secret carries its
//! generation, so a worker that lost its lease never overwrites a newer generation. A document that
//! cannot be rendered completely is not written; the last good Secret stays.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    clients::cluster::ClusterClient,
    crypto::pepper::Peppers,
    domain::{
        names::NamespaceName,
        pull_secret::TargetState,
        reconcile::{ClusterHealth, ReconcileOutcome, SecretAction},
    },
    service::{
        ServiceError, audit::TransactionalAudit, clusters::Clusters, connection, docker_configs::DockerConfigs,
        progress::ProgressPublisher, reconcile::render::RenderSlot,
    },
    storage::{
        self, PgPool, StorageError, pull_secrets::StoredPullSecret, targets::queue::ClaimedTarget,
        wakeups::WakeUpListener,
    },
};

mod apply;
mod claim;
mod failure;
mod metrics;
mod preview;
mod render;
mod results;
mod resync;
mod watch;

pub use failure::target_error;
pub use metrics::ReconcileMetrics;
pub use preview::{Previewed, PreviewedTarget};

/// Configuration of the [`Reconciler`].
#[derive(Debug, Clone, Copy)]
pub struct ReconcileConfig {
    /// Duration of a lease.
    pub lease: Duration,
    /// Interval at which a synced target is reconciled again.
    pub recheck_interval: Duration,
    /// Interval at which the namespaces of a cluster are compared with the selectors.
    pub resync_interval: Duration,
}

/// A claimed target with its declaration.
#[derive(Debug, Clone)]
pub struct Job {
    target: ClaimedTarget,
    pull_secret: Arc<StoredPullSecret>,
    claimed_at: Instant,
    /// Span of the change that the attempt applies, as a W3C `traceparent`.
    cause: Option<Arc<str>>,
}

impl Job {
    /// Identifies the target within its cluster.
    #[must_use]
    pub fn key(&self) -> (Uuid, NamespaceName) {
        (self.target.pull_secret_id, self.target.namespace.clone())
    }

    /// Outcome of an attempt that changed nothing.
    fn unchanged(&self, state: TargetState, cluster: ClusterHealth) -> ReconcileOutcome {
        ReconcileOutcome {
            action: SecretAction::Unchanged,
            state,
            applied: None,
            written: self.target.written.clone(),
            attached: self.target.attached.clone(),
            error: None,
            requeue_after: Duration::ZERO,
            cluster,
        }
    }
}

/// A job and its outcome.
pub type Attempt = (Job, ReconcileOutcome);

/// Reconciles targets.
#[derive(Clone)]
pub struct Reconciler {
    pool: PgPool,
    clusters: Clusters,
    docker_configs: DockerConfigs,
    peppers: Arc<Peppers>,
    audit: TransactionalAudit,
    config: ReconcileConfig,
    /// Declarations, valid while their version matches the database.
    declarations: Arc<Mutex<HashMap<Uuid, Arc<StoredPullSecret>>>>,
    /// Documents of the current fan-outs. Rendering per target would open each password thousands
    /// of times.
    renders: Arc<Mutex<HashMap<Uuid, RenderSlot>>>,
    metrics: ReconcileMetrics,
    progress: ProgressPublisher,
}

impl fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Reconciler {
    /// Creates the service.
    #[must_use]
    pub fn new(
        pool: PgPool,
        clusters: Clusters,
        docker_configs: DockerConfigs,
        peppers: Arc<Peppers>,
        audit: TransactionalAudit,
        config: ReconcileConfig,
    ) -> Self {
        Self {
            pool,
            clusters,
            docker_configs,
            peppers,
            audit,
            config,
            declarations: Arc::default(),
            renders: Arc::default(),
            metrics: ReconcileMetrics::default(),
            progress: ProgressPublisher::default(),
        }
    }

    /// Metrics of this service.
    #[must_use]
    pub fn metrics(&self) -> ReconcileMetrics {
        self.metrics.clone()
    }

    /// Counts all targets for the metrics, and deletes the rows of deleted pull secrets that
    /// another process left behind.
    ///
    /// # Errors
    ///
    /// On an error the metrics report no targets.
    pub async fn survey(&self) -> Result<(), ServiceError> {
        let surveyed = async {
            let mut conn = connection(&self.pool).await?;
            storage::pull_secrets::delete_all_empty(&mut conn).await?;
            let targets = storage::targets::status::survey(&mut conn).await?;
            Ok((targets, storage::unmatched::count(&mut conn).await?))
        };
        let surveyed: Result<_, StorageError> = surveyed.await;
        self.metrics.set_survey(surveyed.as_ref().ok().copied());
        Ok(surveyed.map(drop)?)
    }

    /// Publishes the progress of pull secrets while it is polled.
    pub async fn publish_progress(&self) {
        self.progress.run(&self.pool).await;
    }

    /// Listens for wake-ups.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if the connection fails.
    pub async fn listen(&self) -> Result<WakeUpListener, ServiceError> {
        Ok(WakeUpListener::connect(&self.pool, self.pool.acquire_timeout()).await?)
    }

    /// Returns the name of a cluster and a client for it.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Cluster`] if its connection is misconfigured, [`ServiceError::Open`] if its
    /// credential does not open.
    pub async fn client(&self, cluster: Uuid) -> Result<(String, ClusterClient), ServiceError> {
        self.clusters.client_by_id(cluster).await
    }

    /// Whether the lease of a job is over. Checked before calls that no resource version fences.
    fn is_lease_over(&self, job: &Job) -> bool {
        job.claimed_at.elapsed() >= self.config.lease
    }

    async fn pull_secret_exists(&self, id: Uuid) -> Result<bool, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::pull_secrets::exists(&mut conn, id).await?)
    }
}
