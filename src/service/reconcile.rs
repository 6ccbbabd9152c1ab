//! Brings targets of pull secrets in order: claims them, looks at what the cluster has, does the next step, stores the result.
//!
//! Level-triggered: whatever woke it, a try looks at what is declared and at what is there, and no event is needed for
//! correctness. A write names the version of the Secret that it was decided on, and the generation is written on the Secret,
//! so that a worker that comes late never puts an older generation over a newer one. A document that cannot be rendered
//! whole is not written: the last good Secret stays.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use secrecy::ExposeSecret;
use sqlx::{PgConnection, PgPool};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::{
    clients::cluster::{AppliedSecret, Attachment, ClusterClient, ClusterError, CreatedSecret, SecretContent},
    crypto::api_key::ContentKey,
    domain::{
        audit::{self, Action, Details, NewEvent, Outcome as EventOutcome, Resource},
        docker_config::RenderError,
        names::{Name, NamespaceName, ServiceAccountName},
        pull_secret::{self, Accounts, Declaration, Owner, Step, TargetState, Wanted, Written, backoff, plan},
    },
    service::{
        ServiceError,
        audit::TransactionalAudit,
        clusters::Clusters,
        connection,
        docker_configs::{AccountChoice, DockerConfigs},
        progress::Announcer,
    },
    storage::{
        self, StorageError,
        pull_secrets::{StoredPullSecret, Wakes},
        targets::{ClaimedComparison, ClaimedTarget, Settled, Settlement},
    },
};

mod metrics;
mod preview;
mod watch;

pub use metrics::ReconcileMetrics;
pub use preview::PreviewedTarget;

/// How long a rendered document is used for further targets of the same generation.
const RENDERED_FOR: Duration = Duration::from_secs(5);
/// What was done where nothing was to be done.
const LEFT: &str = "left";
/// How often one try looks again because somebody else changed the Secret at the same time.
const LOOKS: usize = 3;
/// The longest wait for something that does not exist yet, or that a cluster as a whole keeps from being done.
const SOON: Duration = Duration::from_secs(30);

/// How targets are worked on.
#[derive(Debug, Clone, Copy)]
pub struct ReconcileConfig {
    /// How long a claimed target is nobody else's.
    pub lease: Duration,
    /// How often a target that is in order is compared with the cluster all the same.
    pub resync: Duration,
    /// How often the namespaces of a cluster are compared with the selectors.
    pub compare: Duration,
}

/// A claimed target with its declaration.
#[derive(Debug, Clone)]
pub struct Job {
    target: ClaimedTarget,
    pull_secret: Arc<StoredPullSecret>,
    claimed: Instant,
}

impl Job {
    /// Which target it is, of those of its cluster.
    #[must_use]
    pub fn place(&self) -> (Uuid, NamespaceName) {
        (self.target.pull_secret_id, self.target.namespace.clone())
    }
}

/// A job and what it came to.
#[derive(Debug)]
pub struct Try {
    /// What was to be done.
    pub job: Job,
    /// What became of it.
    pub outcome: Outcome,
}

/// What a try came to.
#[derive(Debug)]
pub struct Outcome {
    result: Verdict,
    /// Whether the cluster was asked at all.
    pub reached: bool,
    /// Where the cluster as a whole could not be used: what keeps it.
    pub ill: Option<ClusterError>,
}

#[derive(Debug)]
enum Verdict {
    /// To be stored.
    Settled { settlement: Box<Settlement>, did: &'static str },
    /// The Secret is not there any more, or was never ours.
    Removed { did: &'static str },
}

/// A document, ready to be written.
struct Content {
    secret: SecretContent,
    mac: Vec<u8>,
}

struct Rendered {
    generation: i64,
    version: i64,
    at: Instant,
    content: Arc<Content>,
}

type RenderSlot = Arc<tokio::sync::Mutex<Option<Rendered>>>;

/// Brings targets in order.
#[derive(Clone)]
pub struct Reconciler {
    pool: PgPool,
    clusters: Clusters,
    docker_configs: DockerConfigs,
    content_key: ContentKey,
    audit: TransactionalAudit,
    config: ReconcileConfig,
    /// The declarations that were read last.
    declarations: Arc<Mutex<HashMap<Uuid, Arc<StoredPullSecret>>>>,
    /// The documents of the fan-outs under way, for seconds: rendering for each target would open every password thousands of times.
    renders: Arc<Mutex<HashMap<Uuid, RenderSlot>>>,
    metrics: ReconcileMetrics,
    announcer: Announcer,
}

impl fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler").field("settings", &self.config).finish_non_exhaustive()
    }
}

impl Reconciler {
    /// Puts the service together.
    #[must_use]
    pub fn new(
        pool: PgPool,
        clusters: Clusters,
        docker_configs: DockerConfigs,
        content_key: ContentKey,
        audit: TransactionalAudit,
        config: ReconcileConfig,
    ) -> Self {
        Self {
            pool,
            clusters,
            docker_configs,
            content_key,
            audit,
            config,
            declarations: Arc::default(),
            renders: Arc::default(),
            metrics: ReconcileMetrics::default(),
            announcer: Announcer::default(),
        }
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> ReconcileMetrics {
        self.metrics.clone()
    }

    /// Looks how all targets are doing, for those who read the metrics, and ends the deletions that a process did not come to
    /// end.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked; the metrics say nothing of targets then.
    pub async fn survey(&self) -> Result<(), ServiceError> {
        let surveyed = async {
            let mut conn = connection(&self.pool).await?;
            storage::pull_secrets::delete_all_empty(&mut conn).await?;
            storage::targets::survey(&mut conn).await
        };
        let surveyed = surveyed.await;
        self.metrics.note_survey(surveyed.as_ref().ok().copied());
        Ok(surveyed.map(drop)?)
    }

    /// Tells who waits for it how pull secrets get on, for as long as it is polled.
    pub async fn announce(&self) {
        self.announcer.run(&self.pool).await;
    }

    /// Listens for changes that others make.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn listen(&self) -> Result<Wakes, ServiceError> {
        Ok(Wakes::listen(&self.pool, self.pool.options().get_acquire_timeout()).await?)
    }

    /// The clusters that have targets that are due, with their versions. Documents that nobody used lately are forgotten here.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn due_clusters(&self) -> Result<Vec<(Uuid, i64)>, ServiceError> {
        self.forget_renders();
        let mut conn = connection(&self.pool).await?;
        Ok(storage::targets::due_clusters(&mut conn).await?)
    }

    /// Takes targets of a cluster that are due.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn claim(&self, cluster: Uuid, limit: i64) -> Result<Vec<Job>, ServiceError> {
        let claimed = Instant::now();
        let mut conn = connection(&self.pool).await?;
        let targets = storage::targets::claim(&mut conn, cluster, limit, self.config.lease).await?;
        if targets.is_empty() {
            return Ok(Vec::new());
        }
        // After the claim, so that the declaration is at least as new as the generations that were claimed.
        let mut ids: Vec<Uuid> = targets.iter().map(|target| target.pull_secret_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let versions = storage::pull_secrets::versions(&mut conn, &ids).await?;
        let mut known: HashMap<Uuid, Arc<StoredPullSecret>> = HashMap::new();
        {
            let kept = lock(&self.declarations);
            for (id, version) in &versions {
                if let Some(one) = kept.get(id).filter(|one| one.version == *version) {
                    known.insert(*id, Arc::clone(one));
                }
            }
        }
        let unknown: Vec<Uuid> = ids.into_iter().filter(|id| !known.contains_key(id)).collect();
        if !unknown.is_empty() {
            let read = storage::pull_secrets::find_many(&mut conn, &unknown).await?;
            let mut kept = lock(&self.declarations);
            for one in read {
                let one = Arc::new(one);
                kept.insert(one.id, Arc::clone(&one));
                known.insert(one.id, one);
            }
        }
        let jobs = targets.into_iter().filter_map(|target| {
            let pull_secret = Arc::clone(known.get(&target.pull_secret_id)?);
            Some(Job { target, pull_secret, claimed })
        });
        Ok(jobs.collect())
    }

    /// The client for a cluster, and its name.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Cluster`] if its connection cannot be used, [`ServiceError::Open`] if its credential does not open.
    pub async fn client(&self, cluster: Uuid) -> Result<(String, ClusterClient), ServiceError> {
        self.clusters.client_of(cluster).await
    }

    /// Works on a target; whatever is in the way becomes part of the outcome. None if there is no time left in its lease for a
    /// whole try.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked: nothing is known then, and the lease runs out.
    pub async fn work(&self, client: &ClusterClient, job: &Job) -> Result<Option<Outcome>, ServiceError> {
        // A third of the lease is left to store the result.
        let budget = self.config.lease * 2 / 3;
        let Some(left) = budget.checked_sub(job.claimed.elapsed()).filter(|left| *left > budget / 2) else {
            return Ok(None);
        };
        let done = timeout(left, async {
            if job.target.wanted {
                self.place(client, job).await
            } else {
                self.remove_secret(client, job).await.map(done)
            }
        });
        let result = done.await.unwrap_or_else(|_| {
            let detail = format!("the target took more than {} s: several calls were slow", left.as_secs());
            Err(ClusterError::Timeout { detail }.into())
        });
        match result {
            Ok(outcome) => Ok(Some(outcome)),
            // Not about the target at all.
            Err(ServiceError::Storage(error)) if !matches!(error, StorageError::Corrupt { .. }) => Err(error.into()),
            Err(error) => Ok(Some(Self::failed(job, &error))),
        }
    }

    /// Stores what became of targets of one cluster, all in one transaction but for those that somebody else has locked, which follow one
    /// by one. Whatever was stored before is not stored twice, so this can be tried again. With each result its event is stored, where
    /// there is one, or neither is.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked, [`ServiceError::Audit`] if events cannot be written.
    pub async fn settle(&self, cluster: &str, tries: &[Try]) -> Result<(), ServiceError> {
        let all: Vec<&Try> = tries.iter().collect();
        let mut tx = self.pool.begin().await?;
        let stored = self.store(&mut tx, &all).await?;
        self.audit.commit(tx, Self::events(cluster, stored.iter().map(|one| all[one.index]))?).await?;
        let places: HashSet<usize> = stored.iter().map(|one| one.index).collect();
        self.tell(cluster, &all, &stored);
        let others = all.iter().enumerate().filter(|(index, _)| !places.contains(index));
        for (_, &one) in others {
            // One row at a time: who waits for a row here has no other one that somebody could wait for.
            let mut tx = self.pool.begin().await?;
            if storage::targets::wait_for(&mut tx, &one.job.target).await? {
                let stored = self.store(&mut tx, &[one]).await?;
                if stored.is_empty() {
                    // Its Secret was removed, and somebody wants it again.
                    storage::targets::release(&mut tx, &[&one.job.target], Duration::ZERO).await?;
                }
                self.audit.commit(tx, Self::events(cluster, [one])?).await?;
                self.tell(cluster, &[one], &stored);
            }
        }
        let removed = tries.iter().filter(|one| matches!(one.outcome.result, Verdict::Removed { .. }));
        let removed: BTreeSet<Uuid> = removed.map(|one| one.job.target.pull_secret_id).collect();
        if !removed.is_empty() {
            // After the commit: of two that remove the last two targets, the second one finds none.
            let mut conn = connection(&self.pool).await?;
            for id in removed {
                storage::pull_secrets::delete_empty(&mut conn, id).await?;
            }
        }
        for one in tries {
            self.announcer.note(one.job.target.pull_secret_id);
        }
        Ok(())
    }

    /// Counts what was stored, and tells the story of each target in the log.
    fn tell(&self, cluster: &str, tries: &[&Try], stored: &[Settled]) {
        for Settled { index, seconds } in stored {
            if let Some(seconds) = seconds {
                self.metrics.sync_durations.observe(*seconds);
            }
            let Try { job, outcome } = tries[*index];
            let (target, name) = (&job.target, job.pull_secret.name.as_str());
            let (namespace, generation) = (target.namespace.as_str(), target.generation);
            match &outcome.result {
                Verdict::Settled { settlement, did } => match &settlement.error {
                    Some((error, detail)) if target.last_error_type.as_deref() != Some(error) => tracing::warn!(
                        pull_secret = name,
                        cluster,
                        namespace,
                        generation,
                        error,
                        detail,
                        attempts = target.attempts,
                        "a target of a pull secret is not in order"
                    ),
                    None if *did != LEFT => tracing::info!(
                        pull_secret = name,
                        cluster,
                        namespace,
                        generation,
                        did,
                        took_seconds = seconds,
                        "a target of a pull secret is in order"
                    ),
                    _ => {}
                },
                Verdict::Removed { did } => {
                    tracing::info!(
                        pull_secret = name,
                        cluster,
                        namespace,
                        did,
                        "a target of a pull secret was removed"
                    );
                }
            }
        }
    }

    /// Stores results in a transaction, where their leases still hold and no other transaction has them locked. Returns which.
    async fn store(&self, conn: &mut PgConnection, tries: &[&Try]) -> Result<Vec<Settled>, ServiceError> {
        let Some(first) = tries.first() else { return Ok(Vec::new()) };
        let cluster = first.job.target.cluster_id;
        let (mut places, mut results) = (Vec::new(), Vec::new());
        let (mut removed_places, mut removed) = (Vec::new(), Vec::new());
        for (index, one) in tries.iter().enumerate() {
            match &one.outcome.result {
                Verdict::Settled { settlement, .. } => {
                    places.push(index);
                    results.push((&one.job.target, &**settlement));
                }
                Verdict::Removed { .. } => {
                    removed_places.push(index);
                    removed.push(&one.job.target);
                }
            }
        }
        let mut stored = Vec::with_capacity(tries.len());
        if !results.is_empty() {
            let settled = storage::targets::settle(&mut *conn, cluster, &results).await?;
            stored.extend(settled.into_iter().map(|one| Settled { index: places[one.index], ..one }));
        }
        if !removed.is_empty() {
            let deleted = storage::targets::delete_removed(&mut *conn, cluster, &removed).await?;
            stored.extend(deleted.into_iter().map(|index| Settled { index: removed_places[index], seconds: None }));
        }
        Ok(stored)
    }

    /// Returns the audit events of what was done in a cluster.
    fn events<'a>(cluster: &str, tries: impl IntoIterator<Item = &'a Try>) -> Result<Vec<NewEvent>, ServiceError> {
        let mut tries = tries.into_iter().peekable();
        let Some(first) = tries.peek() else { return Ok(Vec::new()) };
        let id = first.job.target.cluster_id;
        let damaged = |reason| StorageError::Corrupt { table: "clusters", id, column: "name", reason };
        let name = Name::parse(cluster).map_err(damaged)?;
        Ok(tries.filter_map(|one| event(&name, one)).collect())
    }

    /// Gives targets back that were not worked on.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn release(&self, jobs: &[Job], after: Duration) -> Result<(), ServiceError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let targets: Vec<&ClaimedTarget> = jobs.iter().map(|job| &job.target).collect();
        let mut conn = connection(&self.pool).await?;
        let released = storage::targets::release(&mut conn, &targets, after).await?;
        drop(conn);
        let released: HashSet<usize> = released.into_iter().collect();
        for (_, &target) in targets.iter().enumerate().filter(|(index, _)| !released.contains(index)) {
            // One row at a time, as in `settle`.
            let mut tx = self.pool.begin().await?;
            if storage::targets::wait_for(&mut tx, target).await? {
                storage::targets::release(&mut tx, &[target], after).await?;
                tx.commit().await?;
            }
        }
        Ok(())
    }

    /// Says of all targets that wait for a cluster what keeps it from being called.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn mark_waiting(&self, cluster: Uuid, error: &ServiceError) -> Result<(), ServiceError> {
        let (slug, detail) = explain(error);
        let mut conn = connection(&self.pool).await?;
        Ok(storage::targets::mark_waiting(&mut conn, cluster, slug, &detail).await?)
    }

    /// Takes a cluster whose namespaces are due to be compared with the selectors.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn claim_comparison(&self) -> Result<Option<ClaimedComparison>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::targets::claim_comparison(&mut conn, self.config.lease).await?)
    }

    /// Compares the namespaces of a cluster with the selectors: what matches gets a target, and what does not loses it.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn compare(&self, comparison: ClaimedComparison) -> Result<(), ServiceError> {
        let compared = timeout(self.config.lease * 2 / 3, self.compare_claimed(comparison)).await;
        let compared = compared.unwrap_or_else(|_| {
            let detail = "listing the namespaces of the cluster took too long".to_owned();
            Err(ClusterError::Timeout { detail }.into())
        });
        let (error, again_after) = match compared {
            Ok(()) => (None, self.config.compare),
            Err(ServiceError::Storage(error)) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(cluster.id = %comparison.cluster_id, %error, "namespaces could not be compared with selectors");
                (Some(explain(&error)), SOON / 2)
            }
        };
        let mut conn = connection(&self.pool).await?;
        let error = error.as_ref().map(|(slug, detail)| (*slug, detail.as_str()));
        Ok(storage::targets::settle_comparison(&mut conn, comparison, error, again_after).await?)
    }

    async fn compare_claimed(&self, comparison: ClaimedComparison) -> Result<(), ServiceError> {
        let cluster = comparison.cluster_id;
        let mut conn = connection(&self.pool).await?;
        let ids = storage::targets::selecting_in(&mut conn, cluster).await?;
        drop(conn);
        if ids.is_empty() {
            return Ok(());
        }
        let (cluster_name, client) = self.client(cluster).await?;
        let mut conn = connection(&self.pool).await?;
        // Before the list: a declaration that is changed later has the comparison done again.
        let pull_secrets = storage::pull_secrets::find_many(&mut conn, &ids).await?;
        drop(conn);
        let namespaces = client.list_namespaces().await?;
        for one in pull_secrets {
            let declaration = &one.declaration;
            let listed = declaration.listed().into_iter();
            let listed = listed.filter(|(cluster, _)| cluster.as_str() == cluster_name);
            let mut meant: Vec<String> = listed.map(|(_, namespace)| namespace.to_string()).collect();
            let selected = namespaces.iter().filter(|namespace| {
                !namespace.terminating && declaration.selects(&cluster_name, &namespace.name, &namespace.labels)
            });
            meant.extend(selected.map(|namespace| namespace.name.to_string()));
            meant.sort_unstable();
            meant.dedup();
            let mut tx = self.pool.begin().await?;
            let Some(generation) = storage::targets::lock_version(&mut tx, one.id, one.version).await? else {
                continue;
            };
            let policy = declaration.deletion_policy;
            let changed = storage::targets::select(&mut tx, one.id, cluster, generation, &meant, policy).await?;
            storage::targets::note_compared(&mut tx, one.id, cluster, one.version).await?;
            if changed > 0 {
                storage::pull_secrets::notify(&mut tx).await?;
            }
            tx.commit().await?;
        }
        Ok(())
    }

    /// Sees to it that the Secret is there as declared, and attached.
    async fn place(&self, client: &ClusterClient, job: &Job) -> Result<Outcome, ServiceError> {
        let (target, pull_secret) = (&job.target, &job.pull_secret);
        let declaration = &pull_secret.declaration;
        let content = self.render(pull_secret, target.generation).await?;
        let labels = pull_secret::labels(pull_secret.id);
        let secret = AppliedSecret {
            namespace: &target.namespace,
            name: &declaration.secret_name,
            labels: &labels,
            generation: target.generation,
            content: &content.secret,
        };
        let placed = match self.rotate(client, job, &secret, &content).await? {
            Some(created) => Placed::At("rotated", written(created, &content)),
            None => self.look_and_place(client, job, &secret, &content).await?,
        };
        let (did, written) = match placed {
            Placed::At(did, written) => (did, written),
            Placed::Not(settlement) => return Ok(done(settled(settlement, LEFT))),
        };
        let was_in_order = target.last_error_type.is_none() && target.applied_version == pull_secret.version;
        let is_rotation = did == "rotated" && was_in_order;
        let Attached { attached, missing, failure } = if is_rotation && declaration.service_accounts == target.attached
        {
            Attached { attached: target.attached.clone(), ..Attached::default() }
        } else {
            self.attach(client, job).await
        };
        let applied = Some((target.generation, pull_secret.version));
        if let Some(error) = failure {
            // The Secret is there all the same.
            let failed = Self::failure(job, &error);
            let ill = Self::illness(&error);
            return Ok(Outcome {
                result: settled(Settlement { applied, written, attached, ..failed }, did),
                reached: true,
                ill,
            });
        }
        let settlement = match missing.first() {
            None => Settlement {
                state: TargetState::Synced,
                applied,
                written,
                attached,
                error: None,
                // Stored as a tenth more or less: never later than it says, and a little earlier, because it takes some time, too.
                again_after: self.config.resync.mul_f64(0.85),
            },
            Some(account) => {
                let detail = format!("the Secret is there; the ServiceAccount {account} does not exist yet");
                Settlement {
                    state: TargetState::Pending,
                    applied,
                    written,
                    attached,
                    error: Some(("service-account-not-found", detail)),
                    again_after: backoff(target.attempts).min(SOON),
                }
            }
        };
        Ok(done(settled(settlement, did)))
    }

    /// The usual case of a rotation, in one call: the Secret is as it was written last, and gets its new content. None where it is not
    /// the case, or no longer.
    async fn rotate(
        &self,
        client: &ClusterClient,
        job: &Job,
        secret: &AppliedSecret<'_>,
        content: &Content,
    ) -> Result<Option<CreatedSecret>, ServiceError> {
        let Written { resource_version: Some(version), content_mac: Some(mac), .. } = &job.target.written else {
            return Ok(None);
        };
        if *mac == content.mac || job.target.applied_generation >= job.target.generation {
            return Ok(None);
        }
        match client.apply_secret(secret, version).await {
            Ok(created) => Ok(Some(created)),
            // Gone or changed; some API servers have no better answer than 500 for what is gone. A look tells.
            Err(ClusterError::Changed | ClusterError::Unreachable { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn look_and_place(
        &self,
        client: &ClusterClient,
        job: &Job,
        secret: &AppliedSecret<'_>,
        content: &Content,
    ) -> Result<Placed, ServiceError> {
        let target = &job.target;
        let wanted = Wanted {
            id: target.pull_secret_id,
            generation: target.generation,
            content_mac: &content.mac,
            adopt: job.pull_secret.declaration.adopt,
        };
        for _ in 0..LOOKS {
            let found = client.find_secret(secret.namespace, secret.name).await?;
            let is_ours = found.as_ref().is_none_or(|found| found.owner(wanted.id, &target.written) == Owner::Us);
            let version = match plan(&wanted, &target.written, found.as_ref()) {
                Step::Leave => return Ok(Placed::At(LEFT, target.written.clone())),
                // A Secret that is made has no version that a late one would miss.
                Step::Create if self.has_no_lease(job) => return Ok(Placed::Not(Self::superseded(job))),
                Step::Create => match client.post_secret(secret).await {
                    Ok(created) => return Ok(Placed::At("created", written(created, content))),
                    Err(ClusterError::SecretExists) => continue,
                    Err(error) => return Err(error.into()),
                },
                Step::Apply { resource_version } => resource_version,
                Step::Conflict => return Ok(Placed::Not(Self::conflict(job, None))),
                Step::ConflictUnlessGone(owner) => {
                    if self.is_there(owner).await? {
                        return Ok(Placed::Not(Self::conflict(job, Some(owner))));
                    }
                    found.map(|found| found.resource_version).unwrap_or_default()
                }
                Step::Superseded { by, resource_version } => {
                    if self.is_late(job, by).await? {
                        return Ok(Placed::Not(Self::superseded(job)));
                    }
                    resource_version
                }
            };
            match client.apply_secret(secret, &version).await {
                Ok(created) => {
                    let did = if is_ours { "applied" } else { "adopted" };
                    return Ok(Placed::At(did, written(created, content)));
                }
                Err(ClusterError::Changed) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ClusterError::Changed.into())
    }

    /// Whether there is a pull secret of this id.
    async fn is_there(&self, id: Uuid) -> Result<bool, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::pull_secrets::exists(&mut conn, id).await?)
    }

    fn conflict(job: &Job, owner: Option<Uuid>) -> Settlement {
        let name = &job.pull_secret.declaration.secret_name;
        let detail = match owner {
            Some(_) => format!("the Secret {name} belongs to another pull secret: one of the two needs another name"),
            None => format!(
                "a Secret named {name} is there and is not this pull secret's: it stays as it is; set `adopt` to take it over"
            ),
        };
        Settlement {
            state: TargetState::Conflict,
            applied: None,
            written: job.target.written.clone(),
            attached: job.target.attached.clone(),
            error: Some(("secret-exists", detail)),
            again_after: backoff(job.target.attempts.max(6)),
        }
    }

    /// Whether somebody is late who finds a newer generation on the Secret: he has lost his lease. Whoever still has it knows that nobody
    /// wrote after him. Then the number is not of this database, which may be a restored backup, or somebody made it up; it is never
    /// taken over, and the Secret is written as it shall be.
    async fn is_late(&self, job: &Job, found: i64) -> Result<bool, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let is_held = storage::targets::is_held(&mut conn, &job.target).await?;
        if is_held {
            tracing::warn!(
                pull_secret = job.pull_secret.name.as_str(),
                namespace = job.target.namespace.as_str(),
                generation = job.target.generation,
                found,
                "a Secret has a newer generation than the database: was a backup restored? It is written again"
            );
        }
        Ok(!is_held)
    }

    /// What is stored of a try that came late: somebody else has the target.
    fn superseded(job: &Job) -> Settlement {
        Settlement {
            state: TargetState::Pending,
            applied: None,
            written: job.target.written.clone(),
            attached: job.target.attached.clone(),
            error: None,
            again_after: Duration::ZERO,
        }
    }

    /// Whether the lease of a job was over before a call that nothing else would stop.
    fn has_no_lease(&self, job: &Job) -> bool {
        job.claimed.elapsed() >= self.config.lease
    }

    /// Attaches the Secret to the declared `ServiceAccount`s and detaches it from those that are not declared any more, up to the first
    /// that fails.
    async fn attach(&self, client: &ClusterClient, job: &Job) -> Attached {
        let declaration = &job.pull_secret.declaration;
        let (namespace, name) = (&job.target.namespace, &declaration.secret_name);
        let mut done = Attached::default();
        let mut others: Vec<&ServiceAccountName> = job.target.attached.iter().collect();
        for account in &declaration.service_accounts {
            others.retain(|other| *other != account);
            match client.attach(namespace, account, name).await {
                Ok(Attachment::Changed | Attachment::Unchanged) => done.attached.push(account.clone()),
                Ok(Attachment::NoServiceAccount) => done.missing.push(account.clone()),
                Err(error) => {
                    // It may have it: the answer may have been lost.
                    done.attached.push(account.clone());
                    done.failure = Some(error.into());
                    break;
                }
            }
        }
        while let Some(account) = others.pop() {
            let is_declared = declaration.service_accounts.contains(account);
            if done.failure.is_none() && !is_declared {
                match client.detach(namespace, account, name).await {
                    Ok(_) => continue,
                    Err(error) => done.failure = Some(error.into()),
                }
            }
            done.attached.push(account.clone());
        }
        done
    }

    /// Removes the Secret, if it is ours.
    async fn remove_secret(&self, client: &ClusterClient, job: &Job) -> Result<Verdict, ServiceError> {
        let (target, name) = (&job.target, &job.pull_secret.declaration.secret_name);
        let found = client.find_secret(&target.namespace, name).await?;
        let ours = found.filter(|found| found.owner(target.pull_secret_id, &target.written) == Owner::Us);
        for account in &target.attached {
            if self.has_no_lease(job) {
                return Ok(settled(Self::superseded(job), LEFT));
            }
            client.detach(&target.namespace, account, name).await?;
        }
        let Some(found) = ours else { return Ok(Verdict::Removed { did: "absent" }) };
        client.delete_secret(&target.namespace, name, &found).await?;
        Ok(Verdict::Removed { did: "removed" })
    }

    /// The document of a pull secret: rendered once for all targets of a generation.
    async fn render(&self, pull_secret: &StoredPullSecret, generation: i64) -> Result<Arc<Content>, ServiceError> {
        let slot = Arc::clone(lock(&self.renders).entry(pull_secret.id).or_default());
        let mut slot = slot.lock().await;
        if let Some(rendered) = &*slot
            && rendered.generation == generation
            && rendered.version >= pull_secret.version
            && rendered.at.elapsed() < RENDERED_FOR
        {
            return Ok(Arc::clone(&rendered.content));
        }
        let at = Instant::now();
        let content = Arc::new(self.assemble(&pull_secret.declaration).await?);
        *slot = Some(Rendered { generation, version: pull_secret.version, at, content: Arc::clone(&content) });
        Ok(content)
    }

    async fn assemble(&self, declaration: &Declaration) -> Result<Content, ServiceError> {
        let choice = match &declaration.accounts {
            Accounts::Names(names) => AccountChoice::Names(names.iter().map(Name::to_string).collect()),
            Accounts::Selector(selector) => AccountChoice::Selector(selector.clone()),
        };
        let secret_type = declaration.secret_type;
        let rendered = self.docker_configs.assemble_stored(secret_type.profile(), &choice).await?;
        let mac =
            self.content_key.mac(&[secret_type.as_str().as_bytes(), rendered.document.expose_secret().as_bytes()]);
        let secret = SecretContent::new(secret_type.as_str(), secret_type.data_key(), &rendered.document);
        Ok(Content { secret, mac })
    }

    fn forget_renders(&self) {
        let mut renders = lock(&self.renders);
        renders.retain(|_, slot| match slot.try_lock() {
            Ok(rendered) => rendered.as_ref().is_some_and(|rendered| rendered.at.elapsed() < RENDERED_FOR),
            // Somebody renders right now.
            Err(_) => true,
        });
        if renders.is_empty() {
            lock(&self.declarations).clear();
        }
    }

    /// What keeps the cluster as a whole, where that is what an error is about.
    fn illness(error: &ServiceError) -> Option<ClusterError> {
        match error {
            ServiceError::Cluster(error) if error.is_about_cluster() => Some(error.clone()),
            _ => None,
        }
    }

    fn failed(job: &Job, error: &ServiceError) -> Outcome {
        Outcome {
            result: settled(Self::failure(job, error), "failed"),
            reached: matches!(error, ServiceError::Cluster(_)),
            ill: Self::illness(error),
        }
    }

    /// What is stored where something was in the way and nothing was done.
    fn failure(job: &Job, error: &ServiceError) -> Settlement {
        let target = &job.target;
        let (slug, detail) = explain(error);
        let again_after = match error {
            // If it is the cluster, its breaker says when it is tried again; and once it is back, no target shall wait for long.
            _ if Self::illness(error).is_some() => backoff(target.attempts).min(SOON / 2),
            ServiceError::Cluster(
                ClusterError::NamespaceNotFound | ClusterError::NamespaceTerminating | ClusterError::Changed,
            ) => backoff(target.attempts).min(SOON),
            _ => backoff(target.attempts),
        };
        Settlement {
            state: TargetState::Failed,
            applied: None,
            written: target.written.clone(),
            attached: target.attached.clone(),
            error: Some((slug, detail)),
            again_after,
        }
    }
}

/// What a try came to in which the cluster did what it was asked.
fn done(result: Verdict) -> Outcome {
    Outcome { result, reached: true, ill: None }
}

fn settled(settlement: Settlement, did: &'static str) -> Verdict {
    Verdict::Settled { settlement: Box::new(settlement), did }
}

/// What became of the `ServiceAccount`s of a target.
#[derive(Default)]
struct Attached {
    /// Those that have the Secret, or may have it.
    attached: Vec<ServiceAccountName>,
    /// Those that do not exist.
    missing: Vec<ServiceAccountName>,
    /// What was in the way of the rest.
    failure: Option<ServiceError>,
}

/// What the audit record says of a try: that something was done in the cluster, that a target came to another generation, or that it is
/// kept from being in order by something else than before. None where nothing is other than it was.
fn event(cluster: &Name, Try { job, outcome }: &Try) -> Option<NewEvent> {
    let (target, pull_secret) = (&job.target, &job.pull_secret);
    let details = Details::default().target(cluster, &target.namespace).generation(target.generation);
    let (outcome, details) = match &outcome.result {
        Verdict::Removed { did } => (EventOutcome::Success, details.did(did)),
        Verdict::Settled { settlement, did } => {
            let reason = settlement.error.as_ref().map(|(slug, _)| *slug);
            let is_other = reason != target.last_error_type.as_deref();
            match (settlement.applied, reason) {
                (Some((generation, _)), reason)
                    if *did != LEFT || generation > target.applied_generation || is_other =>
                {
                    let details = details.did(if *did == LEFT { "unchanged" } else { did });
                    (EventOutcome::Success, reason.map_or(details.clone(), |slug| details.reason(slug)))
                }
                (None, Some(slug)) if is_other => (EventOutcome::Failure, details.reason(slug)),
                // As it was; or too late, and somebody else has the target.
                _ => return None,
            }
        }
    };
    let action = if target.wanted { Action::PullSecretApply } else { Action::PullSecretRemove };
    let secret = Resource::secret(cluster, &target.namespace, &pull_secret.declaration.secret_name);
    let event = NewEvent::by(&audit::worker(), action, Resource::pull_secret(&pull_secret.name));
    Some(event.outcome(outcome).details(details).related(vec![secret]))
}

/// Where a Secret is after a try.
enum Placed {
    /// There, as it shall be, and what was done for that.
    At(&'static str, Written),
    /// Not there as it shall be.
    Not(Settlement),
}

fn written(created: CreatedSecret, content: &Content) -> Written {
    Written { uid: created.uid, resource_version: created.resource_version, content_mac: Some(content.mac.clone()) }
}

/// Slug and sentence for what keeps a target from being in order; nothing of a cause that is for the log alone.
fn explain(error: &ServiceError) -> (&'static str, String) {
    match error {
        ServiceError::Cluster(error) => (error.slug(), error.to_string()),
        ServiceError::Render(RenderError::KeyCollision { .. }) => ("key-collision", error.to_string()),
        ServiceError::Render(RenderError::Unsupported { .. }) => ("profile-unsupported", error.to_string()),
        ServiceError::Invalid(errors) => {
            let all: Vec<String> = errors.iter().map(|error| format!("{} {}", error.field, error.detail)).collect();
            ("accounts-unusable", all.join("; "))
        }
        ServiceError::Open(_) | ServiceError::Storage(StorageError::Corrupt { .. }) => {
            tracing::error!(%error, "a pull secret cannot be rendered");
            let detail =
                "a stored value does not open or is damaged: regcred's log names its row; the last good Secret stays";
            ("stored-value-unreadable", detail.to_owned())
        }
        other => {
            tracing::error!(error = %other, "a target of a pull secret could not be worked on");
            ("internal", "something went wrong inside regcred; its log has the cause".to_owned())
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> parking_lot::MutexGuard<'_, T> {
    // Nothing that holds these can panic halfway through a change.
    mutex.lock()
}
