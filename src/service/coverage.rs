//! Coverage of clusters: callers request runs and read snapshots, and a worker carries the runs out.
//!
//! A run belongs to the process that holds its lease. Values of Secrets are in memory until it ends;
//! audit events with the names of the Secrets are durable before the first one is read.

mod contents;
mod examining;
mod memory;
mod metrics;
mod reading;
mod running;

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use uuid::Uuid;

use self::memory::{VALUES_TOTAL, ValueMemory};
pub use self::metrics::CoverageMetrics;
use crate::{
    clients::registry::RegistryClient,
    crypto::{api_key::CryptoError, fingerprint},
    domain::{
        audit::{Action, NewEvent, Outcome, Resource},
        caller::{Call, Identity},
        coverage::adoption,
        names::Name,
    },
    service::{
        ServiceError,
        audit::{TransactionalAudit, writer::AuditWriter},
        clusters::Clusters,
        connection,
        diagnosis::RememberedAnswers,
        docker_configs::DockerConfigs,
        idempotency,
    },
    storage::{
        self, PgPool,
        coverage::{
            lists::{GroupFilter, ListedGroup, ListedSecretUse, SecretFilter, SnapshotPosition},
            runs::StoredRun,
            snapshots::StoredSnapshot,
            usage::{AccountUsage, UsagePosition},
        },
    },
};

/// Interval of polls of a waiting caller.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Coverage of a cluster.
#[derive(Debug)]
pub struct ShownCoverage {
    /// Name of the cluster.
    pub cluster: Name,
    /// Its newest run.
    pub run: Option<StoredRun>,
    /// Its newest snapshot.
    pub snapshot: Option<StoredSnapshot>,
}

impl ShownCoverage {
    /// Whether no run is pending or running.
    fn has_ended(&self) -> bool {
        self.run.as_ref().is_none_or(StoredRun::has_ended)
    }
}

/// Service for the coverage of clusters.
#[derive(Debug, Clone)]
pub struct Coverages {
    pool: PgPool,
    clusters: Clusters,
    docker_configs: DockerConfigs,
    registries: Arc<RegistryClient>,
    audit: TransactionalAudit,
    audit_writer: AuditWriter,
    remembered: Arc<RememberedAnswers>,
    values: ValueMemory,
    metrics: Arc<CoverageMetrics>,
}

impl Coverages {
    /// Creates the service.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes.
    pub fn new(
        pool: PgPool,
        clusters: Clusters,
        docker_configs: DockerConfigs,
        registries: Arc<RegistryClient>,
        (audit, audit_writer): (TransactionalAudit, AuditWriter),
    ) -> Result<Self, CryptoError> {
        let remembered = Arc::new(RememberedAnswers::new()?);
        let (values, metrics) = (ValueMemory::new(VALUES_TOTAL), Arc::default());
        Ok(Self { pool, clusters, docker_configs, registries, audit, audit_writer, remembered, values, metrics })
    }

    /// Metrics of the newest snapshots.
    #[must_use]
    pub fn metrics(&self) -> Arc<CoverageMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Requests a run. If one is pending or running, nothing is changed.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] or [`ServiceError::Hidden`] for the cluster.
    pub async fn request(&self, caller: &Call, name: &Name) -> Result<ShownCoverage, ServiceError> {
        let cluster = self.clusters.find(caller, name).await?.id;
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let run = Uuid::now_v7();
        let is_new = storage::coverage::runs::request(&mut tx, cluster, run, &caller.actor, caller.request_id).await?;
        let shown = ShownCoverage {
            cluster: name.clone(),
            run: storage::coverage::runs::find(&mut tx, cluster).await?,
            snapshot: storage::coverage::snapshots::find(&mut tx, cluster).await?,
        };
        let event = NewEvent::of(caller, Action::ClusterCoverage, Resource::cluster(name)).outcome(Outcome::Attempt);
        self.audit.commit(tx, is_new.then_some(event)).await?;
        Ok(shown)
    }

    /// Finds the newest run and snapshot of a cluster.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<ShownCoverage, ServiceError> {
        let cluster = self.clusters.find(caller, name).await?.id;
        let mut conn = connection(&self.pool).await?;
        Ok(ShownCoverage {
            cluster: name.clone(),
            run: storage::coverage::runs::find(&mut conn, cluster).await?,
            snapshot: storage::coverage::snapshots::find(&mut conn, cluster).await?,
        })
    }

    /// Waits up to `time` until no run is pending or running.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub async fn wait(&self, caller: &Identity, name: &Name, time: Duration) -> Result<ShownCoverage, ServiceError> {
        let deadline = Instant::now() + time;
        loop {
            let shown = self.find(caller, name).await?;
            if shown.has_ended() || Instant::now() >= deadline {
                return Ok(shown);
            }
            tokio::time::sleep_until(deadline.min(Instant::now() + POLL_INTERVAL)).await;
        }
    }

    /// Lists groups of the newest snapshot, or of that of the position.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub async fn groups(
        &self,
        caller: &Identity,
        name: &Name,
        filter: &GroupFilter,
        (after, limit): (Option<&SnapshotPosition>, i64),
    ) -> Result<Vec<ListedGroup>, ServiceError> {
        let cluster = self.clusters.find(caller, name).await?.id;
        let mut conn = connection(&self.pool).await?;
        let Some(snapshot) = storage::coverage::lists::of_page(&mut conn, cluster, after.copied()).await? else {
            return Ok(Vec::new());
        };
        let page = (after.map_or(0, |after| after.number), limit);
        Ok(storage::coverage::lists::groups(&mut conn, snapshot, filter, page).await?)
    }

    /// Lists pull secrets of the newest snapshot, or of that of the position, with the steps that adopt
    /// them.
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub async fn secrets(
        &self,
        caller: &Identity,
        name: &Name,
        filter: &SecretFilter,
        (after, limit): (Option<&SnapshotPosition>, i64),
    ) -> Result<Vec<ListedSecretUse>, ServiceError> {
        let cluster = self.clusters.find(caller, name).await?.id;
        let mut conn = connection(&self.pool).await?;
        let Some(snapshot) = storage::coverage::lists::of_page(&mut conn, cluster, after.copied()).await? else {
            return Ok(Vec::new());
        };
        let page = (after.map_or(0, |after| after.number), limit);
        let mut listed = storage::coverage::lists::secrets(&mut conn, snapshot, filter, page).await?;
        for ListedSecretUse { secret, .. } in &mut listed {
            secret.adoption = if secret.adoptable { adoption(name, secret, fingerprint::sha256) } else { None };
        }
        Ok(listed)
    }

    /// Lists the accounts that workloads of all clusters use, those with the most workloads first.
    /// The caller must have all grants.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn accounts(&self, after: Option<&UsagePosition>, limit: i64) -> Result<Vec<AccountUsage>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::coverage::usage::list_accounts(&mut conn, after, limit).await?)
    }
}
