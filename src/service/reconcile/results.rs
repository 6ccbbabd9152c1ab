//! Records results in batches, each in one transaction with its audit events.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use uuid::Uuid;

use super::{Attempt, Reconciler};
use crate::{
    domain::{
        audit::{self, Action, Details, NewEvent, Outcome, Resource},
        names::Name,
        reconcile::SecretAction,
    },
    service::{ServiceError, connection},
    storage::{
        self, PgConnection, StorageError,
        targets::queue::{self, ClaimedTarget},
    },
};

/// Recorded targets, each with the seconds from the change to its sync if it is synced.
type Recorded = HashMap<i64, Option<f64>>;

impl Reconciler {
    /// Records the results of attempts in one cluster. Idempotent: a recorded result is not
    /// recorded again.
    ///
    /// The batch is one transaction. Rows that another transaction has locked follow one by one, so
    /// a batch never waits for a row while it holds others.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] or [`ServiceError::Audit`]: no result of the failed transaction is
    /// recorded.
    pub async fn record_results(&self, cluster: &str, attempts: &[Attempt]) -> Result<(), ServiceError> {
        let Some((first, _)) = attempts.first() else { return Ok(()) };
        let id = first.target.cluster_id;
        let corrupt = |reason| StorageError::Corrupt { table: "clusters", id, column: "name", reason };
        let cluster = Name::parse(cluster).map_err(corrupt)?;
        let mut tx = self.pool.begin().await?;
        let recorded = store(&mut tx, attempts.iter()).await?;
        let (done, locked): (Vec<&Attempt>, Vec<&Attempt>) =
            attempts.iter().partition(|(job, _)| recorded.contains_key(&job.target.id));
        let events: Vec<NewEvent> = done.iter().filter_map(|attempt| audit_event(&cluster, attempt)).collect();
        self.audit.commit(tx, events).await?;
        self.report(&cluster, &done, &recorded);
        for attempt in locked {
            self.record_locked(&cluster, attempt).await?;
        }
        self.delete_empty(attempts).await?;
        for (job, _) in attempts {
            self.progress.add(job.target.pull_secret_id);
        }
        Ok(())
    }

    /// Records one result after waiting for the lock on its row.
    async fn record_locked(&self, cluster: &Name, attempt: &Attempt) -> Result<(), ServiceError> {
        let target = &attempt.0.target;
        let mut tx = self.pool.begin().await?;
        if !queue::lock_claimed(&mut tx, target).await? {
            return Ok(());
        }
        let recorded = store(&mut tx, std::iter::once(attempt)).await?;
        if recorded.is_empty() {
            // The Secret was removed, and the target is wanted again.
            queue::release(&mut tx, &[target], Duration::ZERO).await?;
        }
        self.audit.commit(tx, audit_event(cluster, attempt)).await?;
        self.report(cluster, &[attempt], &recorded);
        Ok(())
    }

    /// Deletes the rows of deleted pull secrets whose last target was removed.
    async fn delete_empty(&self, attempts: &[Attempt]) -> Result<(), ServiceError> {
        let removals = attempts.iter().filter(|(_, outcome)| outcome.action.is_removal());
        let ids: BTreeSet<Uuid> = removals.map(|(job, _)| job.target.pull_secret_id).collect();
        if ids.is_empty() {
            return Ok(());
        }
        // After the commit: of two workers that remove the last two targets, the second finds none.
        let mut conn = connection(&self.pool).await?;
        for id in ids {
            storage::pull_secrets::delete_empty(&mut conn, id).await?;
        }
        Ok(())
    }

    /// Counts and logs recorded results.
    fn report(&self, cluster: &Name, attempts: &[&Attempt], recorded: &Recorded) {
        let cluster = cluster.as_str();
        for (job, outcome) in attempts {
            let Some(seconds) = recorded.get(&job.target.id) else { continue };
            if let Some(seconds) = seconds {
                self.metrics.sync_durations.observe(*seconds);
            }
            let (target, pull_secret, action) = (&job.target, job.pull_secret.name.as_str(), outcome.action);
            let (namespace, generation) = (target.namespace.as_str(), target.generation);
            match &outcome.error {
                _ if action.is_removal() => {
                    let action = action.as_str();
                    tracing::info!(pull_secret, cluster, namespace, action, "target removed");
                }
                Some(error) if target.last_error_type.as_deref() != Some(error.error_type.as_str()) => {
                    let (reason, detail, attempts) =
                        (error.error_type.as_str(), error.detail.as_str(), target.attempts);
                    tracing::warn!(
                        pull_secret,
                        cluster,
                        namespace,
                        generation,
                        reason,
                        detail,
                        attempts,
                        "target failed"
                    );
                }
                None if action != SecretAction::Unchanged => {
                    let (action, duration_seconds) = (action.as_str(), *seconds);
                    tracing::info!(
                        pull_secret,
                        cluster,
                        namespace,
                        generation,
                        action,
                        duration_seconds,
                        "target reconciled"
                    );
                }
                _ => {}
            }
        }
    }
}

/// Stores results whose leases hold and whose rows are not locked.
async fn store(conn: &mut PgConnection, attempts: impl Iterator<Item = &Attempt>) -> Result<Recorded, ServiceError> {
    let (removals, results): (Vec<_>, Vec<_>) =
        attempts.map(|(job, outcome)| (&job.target, outcome)).partition(|(_, outcome)| outcome.action.is_removal());
    let mut recorded = Recorded::new();
    if !results.is_empty() {
        recorded = queue::record_results(&mut *conn, &results).await?;
    }
    if !removals.is_empty() {
        let removed: Vec<&ClaimedTarget> = removals.iter().map(|(target, _)| *target).collect();
        let deleted = queue::delete_removed(conn, &removed).await?;
        recorded.extend(deleted.into_iter().map(|id| (id, None)));
    }
    Ok(recorded)
}

/// Audit event of an attempt: a change in the cluster, another generation, or another reason for
/// failure. `None` if nothing differs from the previous attempt.
fn audit_event(cluster: &Name, (job, outcome): &Attempt) -> Option<NewEvent> {
    let (target, pull_secret) = (&job.target, &job.pull_secret);
    let details = Details::default().target(cluster, &target.namespace).generation(target.generation);
    let action = outcome.action;
    let reason = outcome.error.as_ref().map(|error| error.error_type.as_str());
    let is_new_reason = reason != target.last_error_type.as_deref();
    let (result, details) = match (outcome.applied, reason) {
        _ if action.is_removal() => (Outcome::Success, details.did(action.as_str())),
        (Some(applied), reason)
            if action != SecretAction::Unchanged || applied.generation > target.applied_generation || is_new_reason =>
        {
            let details = details.did(action.as_str());
            (Outcome::Success, reason.map_or(details.clone(), |slug| details.reason(slug)))
        }
        (None, Some(slug)) if is_new_reason => (Outcome::Failure, details.reason(slug)),
        _ => return None,
    };
    let event_action = if target.wanted { Action::PullSecretApply } else { Action::PullSecretRemove };
    let secret = Resource::secret(cluster, &target.namespace, &pull_secret.declaration.secret_name);
    let event = NewEvent::by(&audit::worker(), event_action, Resource::pull_secret(&pull_secret.name));
    Some(event.outcome(result).details(details).related(vec![secret]))
}
