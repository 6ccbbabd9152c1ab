//! Claims targets and releases them.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use super::{Job, Reconciler};
use crate::{
    domain::reconcile::TargetError,
    service::{ServiceError, connection},
    storage::{
        self, PgConnection,
        pull_secrets::StoredPullSecret,
        targets::queue::{self, ClaimedTarget, DueCluster},
    },
    telemetry::traces,
};

impl Reconciler {
    /// Lists the clusters with due targets. Evicts expired documents.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn due_clusters(&self) -> Result<Vec<DueCluster>, ServiceError> {
        self.evict_renders();
        let mut conn = connection(&self.pool).await?;
        Ok(queue::due_clusters(&mut conn).await?)
    }

    /// Claims up to `limit` due targets of a cluster.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn claim(&self, cluster: Uuid, limit: i64) -> Result<Vec<Job>, ServiceError> {
        let claimed_at = Instant::now();
        let mut conn = connection(&self.pool).await?;
        let targets = queue::claim(&mut conn, cluster, limit, self.config.lease).await?;
        if targets.is_empty() {
            return Ok(Vec::new());
        }
        // After the claim: the declarations are at least as new as the claimed generations.
        let mut ids: Vec<Uuid> = targets.iter().map(|target| target.pull_secret_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let causes = causes(&mut conn, &ids).await?;
        let declarations = self.current_declarations(&mut conn, ids).await?;
        let jobs = targets.into_iter().filter_map(|target| {
            let pull_secret = Arc::clone(declarations.get(&target.pull_secret_id)?);
            let cause = causes.get(&target.pull_secret_id).filter(|(generation, _)| {
                // A recheck applies no change.
                *generation == target.generation && target.applied_generation < target.generation
            });
            let cause = cause.map(|(_, traceparent)| Arc::clone(traceparent));
            Some(Job { target, pull_secret, claimed_at, cause })
        });
        Ok(jobs.collect())
    }

    /// Returns the current declarations of distinct ids, from the cache where their version matches the database.
    async fn current_declarations(
        &self,
        conn: &mut PgConnection,
        mut ids: Vec<Uuid>,
    ) -> Result<HashMap<Uuid, Arc<StoredPullSecret>>, ServiceError> {
        let versions = storage::pull_secrets::versions(conn, &ids).await?;
        let mut current: HashMap<Uuid, Arc<StoredPullSecret>> = HashMap::new();
        {
            let cached = self.declarations.lock();
            let valid =
                versions.iter().filter_map(|(id, version)| cached.get(id).filter(|one| one.version == *version));
            current.extend(valid.map(|one| (one.id, Arc::clone(one))));
        }
        ids.retain(|id| !current.contains_key(id));
        if !ids.is_empty() {
            let read = storage::pull_secrets::find_many(conn, &ids).await?;
            let mut cached = self.declarations.lock();
            for one in read.into_iter().map(Arc::new) {
                cached.insert(one.id, Arc::clone(&one));
                current.insert(one.id, one);
            }
        }
        Ok(current)
    }

    /// Releases jobs that were not reconciled. They are due after `after`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn release(&self, jobs: &[Job], after: Duration) -> Result<(), ServiceError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let targets: Vec<&ClaimedTarget> = jobs.iter().map(|job| &job.target).collect();
        let mut conn = connection(&self.pool).await?;
        let released: HashSet<i64> = queue::release(&mut conn, &targets, after).await?.into_iter().collect();
        drop(conn);
        for target in targets.into_iter().filter(|target| !released.contains(&target.id)) {
            // Alone: a transaction that waits for a row must hold no other.
            let mut tx = self.pool.begin().await?;
            if queue::lock_claimed(&mut tx, target).await? {
                queue::release(&mut tx, &[target], after).await?;
                tx.commit().await?;
            }
        }
        Ok(())
    }

    /// Records on the waiting targets of a cluster why it cannot be called.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn mark_unreachable(&self, cluster: Uuid, error: &TargetError) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(queue::mark_unreachable(&mut conn, cluster, error.error_type.as_str(), &error.detail).await?)
    }
}

/// Returns the changes of pull secrets, each with its generation, while traces are exported.
async fn causes(conn: &mut PgConnection, ids: &[Uuid]) -> Result<HashMap<Uuid, (i64, Arc<str>)>, ServiceError> {
    if !traces::are_exported() {
        return Ok(HashMap::new());
    }
    let found = storage::traces::find(conn, ids).await?.into_iter();
    Ok(found.map(|(id, change)| (id, (change.generation, change.traceparent.into()))).collect())
}
