//! Applies or removes the Secret of one target.

use std::collections::BTreeMap;

use tokio::time::timeout;
use tracing::{Instrument, field::Empty};

use super::{
    Job, Reconciler,
    failure::{MISSING_BACKOFF_MAX, failed},
    render::Content,
};
use crate::{
    clients::cluster::{Attachment, ClusterClient, ClusterError, SecretMetadata},
    domain::{
        names::ServiceAccountName,
        pull_secret::{self, GENERATION_ANNOTATION, Owner, Step, TargetState, Wanted, Written, backoff, plan},
        reconcile::{Applied, ClusterHealth, Holder, ReconcileOutcome, SecretAction, TargetError, TargetErrorType},
        secret::SecretManifest,
    },
    service::{ServiceError, connection},
    storage::{self, StorageError},
    telemetry::traces,
};

/// Reads of a Secret in one attempt. Each further one follows a concurrent change.
const READS_MAX: usize = 3;
/// Minimum number of attempts for the backoff after a conflict, which only an operator can resolve.
const CONFLICT_ATTEMPTS: i32 = 6;
/// Fraction of the recheck interval after which a synced target is due. The recorded delay has
/// jitter of a tenth, and the attempt takes time: the recheck is never late.
const RECHECK_FRACTION: f64 = 0.85;

impl Reconciler {
    /// Reconciles one target. Failures that concern the target or the cluster become part of the
    /// outcome.
    ///
    /// Returns `None` if too little of the lease is left for an attempt.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres is unavailable: the outcome is unknown, and the lease
    /// expires.
    pub async fn reconcile(&self, client: &ClusterClient, job: &Job) -> Result<Option<ReconcileOutcome>, ServiceError> {
        let span = tracing::debug_span!(
            "reconcile",
            server = client.server(),
            pull_secret = job.pull_secret.name.as_str(),
            namespace = job.target.namespace.as_str(),
            generation = job.target.generation,
            action = Empty,
            reason = Empty,
        );
        if let Some(cause) = &job.cause {
            traces::link(&span, cause);
        }
        let outcome = self.attempt(client, job).instrument(span.clone()).await?;
        if let Some(outcome) = &outcome {
            span.record("action", outcome.action.as_str());
            span.record("reason", outcome.error.as_ref().map(|error| error.error_type.as_str()));
        }
        Ok(outcome)
    }

    async fn attempt(&self, client: &ClusterClient, job: &Job) -> Result<Option<ReconcileOutcome>, ServiceError> {
        // The last third of the lease is reserved for recording the result.
        let budget = self.config.lease * 2 / 3;
        let Some(left) = budget.checked_sub(job.claimed_at.elapsed()).filter(|left| *left > budget / 2) else {
            return Ok(None);
        };
        let attempt = timeout(left, async {
            if job.target.wanted { self.apply(client, job).await } else { self.remove_secret(client, job).await }
        });
        let result = attempt.await.unwrap_or_else(|_| {
            let detail = format!("the attempt took more than {} s: the API server is slow", left.as_secs());
            Err(ClusterError::Timeout { detail }.into())
        });
        match result {
            Ok(outcome) => Ok(Some(outcome)),
            Err(ServiceError::Storage(error)) if !matches!(error, StorageError::Corrupt { .. }) => Err(error.into()),
            Err(error) => Ok(Some(failed(job, &error))),
        }
    }

    /// Brings the Secret to the declared state and attaches it.
    async fn apply(&self, client: &ClusterClient, job: &Job) -> Result<ReconcileOutcome, ServiceError> {
        let (target, pull_secret) = (&job.target, &job.pull_secret);
        let declaration = &pull_secret.declaration;
        let content = self.render(pull_secret, target.generation).await?;
        let labels = pull_secret::labels(pull_secret.id);
        let annotations = BTreeMap::from([(GENERATION_ANNOTATION.to_owned(), target.generation.to_string())]);
        let secret = SecretManifest {
            name: &declaration.secret_name,
            namespace: Some(&target.namespace),
            labels: &labels,
            annotations: &annotations,
            resource_version: None,
            content: &content.secret,
        };
        let mut outcome = match self.rotate(client, job, &secret, &content).await? {
            Some(created) => self.synced(job, SecretAction::Rotated, written(created, &content)),
            None => self.compare_and_apply(client, job, &secret, &content).await?,
        };
        let is_attached = outcome.action == SecretAction::Rotated
            && target.last_error_type.is_none()
            && target.applied_version == pull_secret.version
            && target.attached == declaration.service_accounts;
        if outcome.applied.is_some() && !is_attached {
            self.attach(client, job, &mut outcome).await;
        }
        Ok(outcome)
    }

    /// Updates the Secret at the version written last, in one call. Returns `None` if no rotation
    /// is due, or if the Secret may no longer be at that version.
    async fn rotate(
        &self,
        client: &ClusterClient,
        job: &Job,
        secret: &SecretManifest<'_>,
        content: &Content,
    ) -> Result<Option<SecretMetadata>, ServiceError> {
        let Written { resource_version: Some(version), content_mac: Some(mac), .. } = &job.target.written else {
            return Ok(None);
        };
        if content.mac.is_of(Some(mac)) || job.target.applied_generation >= job.target.generation {
            return Ok(None);
        }
        match client.apply_secret(&job.target.namespace, secret, version, false).await {
            Ok(created) => Ok(Some(created)),
            // Some API servers answer 500 for a deleted object. The read that follows tells them
            // apart.
            Err(ClusterError::Changed | ClusterError::Unreachable { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the Secret, plans the next step and does it.
    async fn compare_and_apply(
        &self,
        client: &ClusterClient,
        job: &Job,
        secret: &SecretManifest<'_>,
        content: &Content,
    ) -> Result<ReconcileOutcome, ServiceError> {
        let target = &job.target;
        let wanted = Wanted {
            id: target.pull_secret_id,
            generation: target.generation,
            content_mac: &content.mac,
            adopt: job.pull_secret.declaration.adopt,
        };
        for _ in 0..READS_MAX {
            let found = client.get_secret(&target.namespace, secret.name).await?;
            let is_ours = found.as_ref().is_none_or(|found| found.owner(wanted.id, &target.written) == Owner::Us);
            let version = match plan(&wanted, &target.written, found.as_ref()) {
                Step::Leave => {
                    // Also stores the hash under the first pepper.
                    let content_mac = Some(content.mac.current.clone());
                    let written = Written { content_mac, ..target.written.clone() };
                    return Ok(self.synced(job, SecretAction::Unchanged, written));
                }
                // A creation names no version, so only the lease fences it.
                Step::Create if self.is_lease_over(job) => return Ok(superseded(job)),
                Step::Create => match client.create_secret(&target.namespace, secret, false).await {
                    Ok(created) => return Ok(self.synced(job, SecretAction::Created, written(created, content))),
                    Err(ClusterError::SecretExists) => continue,
                    Err(error) => return Err(error.into()),
                },
                Step::Apply { resource_version } => resource_version,
                Step::Conflict(Some(owner)) if self.pull_secret_exists(owner).await? => {
                    return Ok(conflict(job, &Holder::PullSecret(None)));
                }
                Step::Conflict(_) => return Ok(conflict(job, &Holder::Foreign)),
                Step::ConflictUnlessGone(owner) if self.pull_secret_exists(owner).await? => {
                    return Ok(conflict(job, &Holder::PullSecret(None)));
                }
                Step::ConflictUnlessGone(_) => found.map(|found| found.resource_version).unwrap_or_default(),
                Step::Superseded { by, resource_version } => {
                    if self.is_lease_lost(job, by).await? {
                        return Ok(superseded(job));
                    }
                    resource_version
                }
            };
            match client.apply_secret(&target.namespace, secret, &version, false).await {
                Ok(created) => {
                    let action = if is_ours { SecretAction::Applied } else { SecretAction::Adopted };
                    return Ok(self.synced(job, action, written(created, content)));
                }
                Err(ClusterError::Changed) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ClusterError::Changed.into())
    }

    fn synced(&self, job: &Job, action: SecretAction, written: Written) -> ReconcileOutcome {
        ReconcileOutcome {
            action,
            applied: Some(Applied { generation: job.target.generation, version: job.pull_secret.version }),
            written,
            requeue_after: self.config.recheck_interval.mul_f64(RECHECK_FRACTION),
            ..job.unchanged(TargetState::Synced, ClusterHealth::Reachable)
        }
    }

    /// Whether this worker lost its lease, having found a newer generation on the Secret.
    ///
    /// With the lease held, no worker wrote later. Then the database was restored from a backup, or
    /// the annotation was edited; the generation is never adopted, and the Secret is written as
    /// declared.
    async fn is_lease_lost(&self, job: &Job, found_generation: i64) -> Result<bool, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let is_leased = storage::targets::queue::is_leased(&mut conn, &job.target).await?;
        if is_leased {
            tracing::warn!(
                pull_secret = job.pull_secret.name.as_str(),
                namespace = job.target.namespace.as_str(),
                generation = job.target.generation,
                found_generation,
                "newer generation overwritten"
            );
        }
        Ok(!is_leased)
    }

    /// Attaches the Secret to the declared `ServiceAccount`s, then detaches it from all others.
    /// Stops at the first failure.
    async fn attach(&self, client: &ClusterClient, job: &Job, outcome: &mut ReconcileOutcome) {
        let declaration = &job.pull_secret.declaration;
        let (namespace, name) = (&job.target.namespace, &declaration.secret_name);
        let mut others: Vec<&ServiceAccountName> = job.target.attached.iter().collect();
        let (mut attached, mut missing, mut failure) = (Vec::new(), None, None);
        for account in &declaration.service_accounts {
            others.retain(|other| *other != account);
            match client.attach(namespace, account, name).await {
                Ok(Attachment::Changed | Attachment::Unchanged) => attached.push(account.clone()),
                Ok(Attachment::NoServiceAccount) => missing = missing.or(Some(account)),
                Err(error) => {
                    // The answer may have been lost after the change.
                    attached.push(account.clone());
                    failure = Some(error);
                    break;
                }
            }
        }
        while let Some(account) = others.pop() {
            if failure.is_none() && !declaration.service_accounts.contains(account) {
                match client.detach(namespace, account, name).await {
                    Ok(_) => continue,
                    Err(error) => failure = Some(error),
                }
            }
            attached.push(account.clone());
        }
        outcome.attached = attached;
        if let Some(error) = failure {
            let ReconcileOutcome { state, error, requeue_after, cluster, .. } = failed(job, &error.into());
            *outcome = ReconcileOutcome { state, error, requeue_after, cluster, ..outcome.clone() };
        } else if let Some(account) = missing {
            let detail =
                format!("the ServiceAccount {account} does not exist: create it, or remove it from the declaration");
            outcome.state = TargetState::Pending;
            outcome.error = Some(TargetError { error_type: TargetErrorType::ServiceAccountNotFound, detail });
            outcome.requeue_after = backoff(job.target.attempts).min(MISSING_BACKOFF_MAX);
        }
    }

    /// Detaches and deletes the Secret if it is regcred's.
    async fn remove_secret(&self, client: &ClusterClient, job: &Job) -> Result<ReconcileOutcome, ServiceError> {
        let (target, name) = (&job.target, &job.pull_secret.declaration.secret_name);
        let found = client.get_secret(&target.namespace, name).await?;
        let ours = found.filter(|found| found.owner(target.pull_secret_id, &target.written) == Owner::Us);
        for account in &target.attached {
            // A detachment names no version of the Secret, so only the lease fences it.
            if self.is_lease_over(job) {
                return Ok(superseded(job));
            }
            client.detach(&target.namespace, account, name).await?;
        }
        let action = match ours {
            None => SecretAction::Absent,
            Some(found) => {
                client.delete_secret(&target.namespace, name, &found).await?;
                SecretAction::Removed
            }
        };
        Ok(ReconcileOutcome { action, ..job.unchanged(TargetState::Pending, ClusterHealth::Reachable) })
    }
}

fn written(created: SecretMetadata, content: &Content) -> Written {
    Written {
        uid: created.uid,
        resource_version: created.resource_version,
        content_mac: Some(content.mac.current.clone()),
    }
}

/// Outcome of an attempt whose lease ended. Another worker may have the target.
fn superseded(job: &Job) -> ReconcileOutcome {
    job.unchanged(TargetState::Pending, ClusterHealth::Reachable)
}

/// Outcome of an attempt that found a Secret of another holder.
fn conflict(job: &Job, holder: &Holder) -> ReconcileOutcome {
    ReconcileOutcome {
        error: Some(TargetError::conflict(&job.pull_secret.declaration.secret_name, holder)),
        requeue_after: backoff(job.target.attempts.max(CONFLICT_ATTEMPTS)),
        ..job.unchanged(TargetState::Conflict, ClusterHealth::Reachable)
    }
}
