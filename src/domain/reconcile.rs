//! Result of reconciling one target.

use std::time::Duration;

use crate::domain::{
    names::ServiceAccountName,
    pull_secret::{TargetState, Written},
};

/// Result of reconciling one target: the status to store, and what the attempt says about the
/// cluster.
#[derive(Debug, Clone)]
pub struct ReconcileOutcome {
    /// What was done to the Secret.
    pub action: SecretAction,
    /// New state.
    pub state: TargetState,
    /// What the cluster has now; none if nothing was brought up to date.
    pub applied: Option<Applied>,
    /// The Secret as last written.
    pub written: Written,
    /// The `ServiceAccount`s that regcred attached the Secret to, or may have.
    pub attached: Vec<ServiceAccountName>,
    /// Reason why the target is not in sync.
    pub error: Option<TargetError>,
    /// Delay until the next attempt, before jitter.
    pub requeue_after: Duration,
    /// Health of the cluster as a whole.
    pub cluster: ClusterHealth,
}

/// Generation and version of a declaration in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Generation of the pull secret.
    pub generation: i64,
    /// Version of its declaration.
    pub version: i64,
}

/// Reason why a target is not in sync.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetError {
    /// Stable identifier for programs.
    pub slug: &'static str,
    /// Text for people.
    pub detail: String,
}

/// What was done to the Secret of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretAction {
    /// Nothing.
    Unchanged,
    /// Created.
    Created,
    /// Updated after a read.
    Applied,
    /// Updated at the last written version, without a read.
    Rotated,
    /// Taken over from another owner.
    Adopted,
    /// Deleted.
    Removed,
    /// Nothing to delete.
    Absent,
}

impl SecretAction {
    /// Name in logs and audit events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::Created => "created",
            Self::Applied => "applied",
            Self::Rotated => "rotated",
            Self::Adopted => "adopted",
            Self::Removed => "removed",
            Self::Absent => "absent",
        }
    }

    /// Whether the Secret is gone, so that the target can be deleted.
    #[must_use]
    pub const fn is_removal(self) -> bool {
        matches!(self, Self::Removed | Self::Absent)
    }
}

/// What an attempt says about the cluster as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterHealth {
    /// The cluster was not called.
    Unknown,
    /// It answered. An error concerns the target alone.
    Reachable,
    /// It cannot be called.
    Unavailable {
        /// The failure does not pass by itself, such as a rejected credential.
        is_permanent: bool,
        /// Delay that the cluster asked for.
        retry_after: Option<Duration>,
    },
}
