//! Errors of calls to clusters. Their texts contain no credential and nothing that an API server
//! sent.

use std::{error::Error, time::Duration};

use crate::{
    clients::outbound::{Cause, Peer},
    domain::reconcile::TargetErrorType,
};

/// Failed call to a cluster.
///
/// Texts are built from the status, the machine-readable reason and local knowledge, never from a
/// message of the API server: such a message may repeat what was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// 409: the name is in use in this namespace.
    #[error("a Secret of this name already exists in this namespace")]
    SecretExists,
    /// 409, and the existing Secret must not be replaced.
    #[error("{detail}")]
    SecretKept {
        /// The reason, for a person.
        detail: String,
    },
    /// 404: the namespace does not exist.
    #[error("the cluster has no such namespace")]
    NamespaceNotFound,
    /// 403 with this cause: the namespace is being deleted.
    #[error("the namespace is being deleted and accepts no new Secrets")]
    NamespaceTerminating,
    /// 422: the API server's validation refused the Secret.
    #[error("{detail}")]
    InvalidSecret {
        /// Path of the field in the Secret, such as `metadata.name` or `data[.dockerconfigjson]`,
        /// if known.
        field: Option<String>,
        /// The violated rule.
        detail: String,
    },
    /// 422: the Secret exists with another type, which is immutable.
    #[error("the Secret has another type, which cannot be changed: delete the Secret or choose another name")]
    TypeFixed,
    /// 422: the Secret exists and is immutable.
    #[error("the Secret is immutable: delete it or choose another name")]
    Immutable,
    /// 409: the object was changed or deleted since it was read.
    #[error("another client changed the object at the same time")]
    Changed,
    /// 4xx despite sufficient rights: a quota, an admission webhook or a policy of the cluster
    /// refused the Secret.
    #[error("{detail}")]
    Refused {
        /// Sentence for a person.
        detail: String,
    },
    /// 401: the cluster does not accept the credential.
    #[error("the cluster does not accept regcred's credential (401): it is wrong, expired or revoked")]
    Unauthorized,
    /// 403: the credential lacks the right.
    #[error("{detail}")]
    Forbidden {
        /// The missing right.
        detail: String,
    },
    /// No connection, a broken connection, a 5xx, or a response that is not from a Kubernetes API
    /// server.
    #[error("{detail}")]
    Unreachable {
        /// Sentence for a person.
        detail: String,
    },
    /// The identity of the API server could not be verified.
    #[error("{detail}")]
    Tls {
        /// Sentence for a person.
        detail: String,
    },
    /// No complete response in time.
    #[error("{detail}")]
    Timeout {
        /// Sentence for a person.
        detail: String,
    },
    /// 429: the API server is overloaded.
    #[error("the API server is overloaded (429): try again later")]
    Overloaded {
        /// Delay that the API server requests.
        retry_after: Option<Duration>,
    },
    /// The connection cannot be used as configured.
    #[error("{detail}")]
    Misconfigured {
        /// Sentence for a person.
        detail: String,
    },
}

impl ClusterError {
    /// Maps a failure before the response.
    pub(super) fn from_transport(peer: &Peer, error: &(dyn Error + 'static)) -> Self {
        let cause = Cause::of(error);
        let detail = peer.describe(&cause);
        match cause {
            Cause::Tls(_) => Self::Tls { detail },
            Cause::ConnectTimeout | Cause::Timeout => Self::Timeout { detail },
            _ => Self::Unreachable { detail },
        }
    }

    /// Whether the error concerns the entire cluster rather than one object. A missing right
    /// concerns one namespace.
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

    /// Type of the error of a target.
    #[must_use]
    pub const fn error_type(&self) -> TargetErrorType {
        match self {
            Self::SecretExists | Self::SecretKept { .. } => TargetErrorType::SecretExists,
            Self::NamespaceNotFound => TargetErrorType::NamespaceNotFound,
            Self::NamespaceTerminating => TargetErrorType::NamespaceTerminating,
            Self::InvalidSecret { .. } => TargetErrorType::InvalidSecret,
            Self::TypeFixed => TargetErrorType::SecretTypeFixed,
            Self::Immutable => TargetErrorType::SecretImmutable,
            Self::Changed => TargetErrorType::SecretChanged,
            Self::Refused { .. } => TargetErrorType::SecretRefused,
            Self::Unauthorized => TargetErrorType::ClusterUnauthorized,
            Self::Forbidden { .. } => TargetErrorType::ClusterForbidden,
            Self::Unreachable { .. } | Self::Tls { .. } | Self::Overloaded { .. } | Self::Misconfigured { .. } => {
                TargetErrorType::ClusterUnreachable
            }
            Self::Timeout { .. } => TargetErrorType::ClusterTimeout,
        }
    }

    /// Whether the API server may answer the same request soon.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Timeout { .. } | Self::Overloaded { .. })
    }

    /// Last part of the problem type; stable.
    #[must_use]
    pub fn slug(&self) -> &'static str {
        self.error_type().as_str()
    }
}
