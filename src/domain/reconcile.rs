//! Result of reconciling one target.

use std::{str::FromStr, time::Duration};

use utoipa::ToSchema;

use crate::domain::{
    audit::words,
    invalid::Invalid,
    names::{Name, SecretName, ServiceAccountName},
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
    /// Type, for programs.
    pub error_type: TargetErrorType,
    /// Text for people.
    pub detail: String,
}

words! {
    /// Types of errors of targets and clusters: the slugs of problems of clusters, and some of
    /// their own.
    TargetErrorType {
        /// The selected accounts cannot be rendered.
        AccountsUnusable = "accounts-unusable",
        /// The credential lacks a right.
        ClusterForbidden = "cluster-forbidden",
        /// The API server did not answer in time.
        ClusterTimeout = "cluster-timeout",
        /// The API server rejected the credential.
        ClusterUnauthorized = "cluster-unauthorized",
        /// The API server cannot be reached.
        ClusterUnreachable = "cluster-unreachable",
        /// A fault of regcred.
        Internal = "internal",
        /// The API server's validation refused the Secret.
        InvalidSecret = "invalid-secret",
        /// Two accounts have the same key.
        KeyCollision = "key-collision",
        /// The namespace does not exist.
        NamespaceNotFound = "namespace-not-found",
        /// The namespace is being deleted.
        NamespaceTerminating = "namespace-terminating",
        /// The profile cannot express the accounts.
        ProfileUnsupported = "profile-unsupported",
        /// Another client changed the Secret at the same time.
        SecretChanged = "secret-changed",
        /// A Secret of another owner has the name.
        SecretExists = "secret-exists",
        /// The Secret is immutable.
        SecretImmutable = "secret-immutable",
        /// A quota, a policy or a webhook of the cluster refused the Secret.
        SecretRefused = "secret-refused",
        /// The Secret has another type.
        SecretTypeFixed = "secret-type-fixed",
        /// A `ServiceAccount` to attach to does not exist.
        ServiceAccountNotFound = "service-account-not-found",
        /// A stored value is damaged or does not open.
        StoredValueUnreadable = "stored-value-unreadable",
    }
}

/// Holder of a Secret that a pull secret must not change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// No existing pull secret.
    Foreign,
    /// Another pull secret, with its name if the reader may know it.
    PullSecret(Option<Name>),
}

impl TargetError {
    /// A Secret of another holder has the name.
    #[must_use]
    pub fn conflict(secret: &SecretName, holder: &Holder) -> Self {
        let detail = match holder {
            Holder::Foreign => format!(
                "a Secret named {secret} exists and does not belong to this pull secret: delete or rename it, or set \
                 `adopt`"
            ),
            Holder::PullSecret(name) => {
                let holder =
                    name.as_ref().map_or("another pull secret".to_owned(), |name| format!("the pull secret `{name}`"));
                format!("the Secret {secret} belongs to {holder}: declare another Secret name for one of them")
            }
        };
        Self { error_type: TargetErrorType::SecretExists, detail }
    }
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
