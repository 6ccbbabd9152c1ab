//! Turns errors into outcomes.

use std::time::Duration;

use super::Job;
use crate::{
    clients::cluster::ClusterError,
    domain::{
        docker_config::RenderError,
        pull_secret::{TargetState, backoff},
        reconcile::{ClusterHealth, ReconcileOutcome, TargetError, TargetErrorType},
    },
    service::ServiceError,
    storage::StorageError,
};

/// Maximum backoff while a namespace or `ServiceAccount` does not exist yet.
pub(super) const MISSING_BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Maximum backoff while the cluster is unavailable. The breaker spaces the calls, so its targets
/// need not wait longer once it is back.
pub(super) const CLUSTER_BACKOFF_MAX: Duration = Duration::from_secs(15);
/// Minimum pause after a 429 without `Retry-After`.
const OVERLOAD_PAUSE: Duration = Duration::from_secs(1);

/// Outcome of an attempt that failed before it changed the cluster.
pub(super) fn failed(job: &Job, error: &ServiceError) -> ReconcileOutcome {
    let cluster = cluster_health(error);
    let backoff = backoff(job.target.attempts);
    let requeue_after = match error {
        _ if matches!(cluster, ClusterHealth::Unavailable { .. }) => backoff.min(CLUSTER_BACKOFF_MAX),
        ServiceError::Cluster(
            ClusterError::NamespaceNotFound | ClusterError::NamespaceTerminating | ClusterError::Changed,
        ) => backoff.min(MISSING_BACKOFF_MAX),
        _ => backoff,
    };
    ReconcileOutcome { error: Some(target_error(error)), requeue_after, ..job.unchanged(TargetState::Failed, cluster) }
}

/// Derives the health of the cluster as a whole from an error.
fn cluster_health(error: &ServiceError) -> ClusterHealth {
    let ServiceError::Cluster(error) = error else { return ClusterHealth::Unknown };
    if !error.is_about_cluster() {
        return ClusterHealth::Reachable;
    }
    let retry_after = match error {
        ClusterError::Overloaded { retry_after } => Some(retry_after.unwrap_or(OVERLOAD_PAUSE)),
        _ => None,
    };
    let is_transient = matches!(
        error,
        ClusterError::Unreachable { .. } | ClusterError::Timeout { .. } | ClusterError::Overloaded { .. }
    );
    ClusterHealth::Unavailable { is_permanent: !is_transient, retry_after }
}

/// Describes an error for the status of a target. Logs causes that only operators may see.
#[must_use]
pub fn target_error(error: &ServiceError) -> TargetError {
    let (error_type, detail) = match error {
        ServiceError::Cluster(error) => (error.error_type(), error.to_string()),
        ServiceError::Render(RenderError::KeyCollision { .. }) => (TargetErrorType::KeyCollision, error.to_string()),
        ServiceError::Render(RenderError::Unsupported { .. }) => {
            (TargetErrorType::ProfileUnsupported, error.to_string())
        }
        ServiceError::Invalid(errors) => {
            let all: Vec<String> = errors.iter().map(|error| format!("{} {}", error.field, error.detail)).collect();
            (TargetErrorType::AccountsUnusable, all.join("; "))
        }
        ServiceError::Open(_) | ServiceError::Storage(StorageError::Corrupt { .. }) => {
            tracing::error!(%error, "pull secret not rendered");
            let detail = "a stored value is damaged or does not open; the last good Secret stays. regcred's log names the row: \
                          set the value again";
            (TargetErrorType::StoredValueUnreadable, detail.to_owned())
        }
        other => {
            tracing::error!(error = %other, "target not reconciled");
            (TargetErrorType::Internal, "internal error; see regcred's log".to_owned())
        }
    };
    TargetError { error_type, detail }
}
