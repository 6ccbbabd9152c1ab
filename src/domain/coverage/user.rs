//! Objects whose pods use images.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::diagnosis::WorkloadKind;

/// Kind of an object whose pods use images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = CoverageUserKind)]
pub enum UserKind {
    /// `Deployment`.
    Deployment,
    /// `StatefulSet`.
    StatefulSet,
    /// `DaemonSet`.
    DaemonSet,
    /// `Job` that no `CronJob` created.
    Job,
    /// `CronJob`.
    CronJob,
    /// Pod without a controller.
    Pod,
    /// Another controller of pods.
    Other,
}

impl UserKind {
    /// Returns the name in the API and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => WorkloadKind::Deployment.as_str(),
            Self::StatefulSet => WorkloadKind::StatefulSet.as_str(),
            Self::DaemonSet => WorkloadKind::DaemonSet.as_str(),
            Self::Job => WorkloadKind::Job.as_str(),
            Self::CronJob => WorkloadKind::CronJob.as_str(),
            Self::Pod => "pod",
            Self::Other => "other",
        }
    }
}

impl From<WorkloadKind> for UserKind {
    fn from(kind: WorkloadKind) -> Self {
        match kind {
            WorkloadKind::Deployment => Self::Deployment,
            WorkloadKind::StatefulSet => Self::StatefulSet,
            WorkloadKind::DaemonSet => Self::DaemonSet,
            WorkloadKind::Job => Self::Job,
            WorkloadKind::CronJob => Self::CronJob,
        }
    }
}

/// `imagePullPolicy` of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PullPolicy {
    /// The image is never pulled.
    Never,
    /// The image is pulled if the node does not have it.
    IfNotPresent,
    /// The registry is asked at every start.
    Always,
}

impl PullPolicy {
    /// Parses the policy of an object that an API server stored, which sets the default.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "Always" => Self::Always,
            "Never" => Self::Never,
            _ => Self::IfNotPresent,
        }
    }
}
