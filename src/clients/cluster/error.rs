//! What can go wrong between regcred and a cluster, in words that hold no credential and nothing an API server wrote.

use std::time::Duration;

/// Why a cluster did not do what it was asked.
///
/// Every text is made here from the status, the machine-readable reason and local knowledge: never from a message that came over
/// the wire, since such a message may repeat what was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// 409: the name is in use in this namespace.
    #[error("a Secret of this name exists in this namespace already")]
    SecretExists,
    /// 404: there is no such namespace.
    #[error("the cluster has no such namespace")]
    NamespaceNotFound,
    /// 403 with this cause: the namespace is on its way out and takes nothing new.
    #[error("the namespace is being deleted and takes no new Secrets")]
    NamespaceTerminating,
    /// 422: the API server's validation refused the Secret.
    #[error("{detail}")]
    InvalidSecret {
        /// Path of the field in the Secret, such as `metadata.name` or `data[.dockerconfigjson]`; none where unknown.
        field: Option<String>,
        /// What the rule is.
        detail: String,
    },
    /// 422: the Secret is there with another type, which nobody can change.
    #[error("the Secret has another type, and a type cannot be changed: delete the Secret, or choose another name")]
    TypeFixed,
    /// 422: the Secret is there and says that it is immutable.
    #[error("the Secret is immutable: delete it, or choose another name")]
    Immutable,
    /// 409: the object was changed, or deleted, since it was looked at.
    #[error("somebody else changed the object at the same time")]
    Changed,
    /// 4xx though the rights suffice: a quota, an admission webhook or a policy of the cluster refused the Secret.
    #[error("{detail}")]
    Refused {
        /// What is known about it.
        detail: String,
    },
    /// 401: the cluster does not accept the credential.
    #[error("the cluster does not accept regcred's credential for it (401): it is wrong, expired or revoked")]
    Unauthorized,
    /// 403: the credential lacks the right.
    #[error("{detail}")]
    Forbidden {
        /// Which right is missing.
        detail: String,
    },
    /// No connection, a connection that broke, 5xx, or an answer that no Kubernetes API server gives.
    #[error("{detail}")]
    Unreachable {
        /// What happened.
        detail: String,
    },
    /// The API server could not be shown to be the right one.
    #[error("{detail}")]
    Tls {
        /// What did not verify.
        detail: String,
    },
    /// No (whole) answer in time.
    #[error("{detail}")]
    Timeout {
        /// What was waited for, and how long.
        detail: String,
    },
    /// 429: the API server asks to come back later.
    #[error("the API server is overloaded (429) and asks to come back later")]
    Overloaded {
        /// When it asks to come back.
        retry_after: Option<Duration>,
    },
    /// The connection cannot be used as it is configured.
    #[error("{detail}")]
    Misconfigured {
        /// What is missing.
        detail: String,
    },
}

impl ClusterError {
    /// Whether the cluster as a whole is in no state to be called, and not this one object. A missing right is about one
    /// namespace at least.
    #[must_use]
    pub const fn is_about_cluster(&self) -> bool {
        matches!(
            self,
            Self::Unauthorized
                | Self::Unreachable { .. }
                | Self::Tls { .. }
                | Self::Timeout { .. }
                | Self::Overloaded { .. }
                | Self::Misconfigured { .. }
        )
    }

    /// The stable last part of the problem type.
    #[must_use]
    pub const fn slug(&self) -> &'static str {
        match self {
            Self::SecretExists => "secret-exists",
            Self::NamespaceNotFound => "namespace-not-found",
            Self::NamespaceTerminating => "namespace-terminating",
            Self::InvalidSecret { .. } => "invalid-secret",
            Self::TypeFixed => "secret-type-fixed",
            Self::Immutable => "secret-immutable",
            Self::Changed => "secret-changed",
            Self::Refused { .. } => "secret-refused",
            Self::Unauthorized => "cluster-unauthorized",
            Self::Forbidden { .. } => "cluster-forbidden",
            Self::Unreachable { .. } | Self::Tls { .. } | Self::Overloaded { .. } | Self::Misconfigured { .. } => {
                "cluster-unreachable"
            }
            Self::Timeout { .. } => "cluster-timeout",
        }
    }
}
