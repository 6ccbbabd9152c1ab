//! What a diagnosis reads of a pod, or of the template of a workload.

use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use secrecy::{ExposeSecret, SecretSlice};

use super::node::NodeChoice;
use crate::domain::{
    invalid::Invalid,
    names::{Name, NamespaceName, PodName, SecretName, ServiceAccountName},
};

/// Result of reading an object of a cluster.
#[derive(Debug, Clone)]
pub enum Lookup<T> {
    /// The object.
    Found(T),
    /// It does not exist.
    Missing,
    /// The credential of the cluster may not read it.
    Forbidden,
    /// It was not read, because of a limit.
    NotRead,
}

/// Kind of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadKind {
    /// `Deployment`.
    Deployment,
    /// `StatefulSet`.
    StatefulSet,
    /// `DaemonSet`.
    DaemonSet,
    /// `Job`.
    Job,
    /// `CronJob`.
    CronJob,
}

impl WorkloadKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Deployment, Self::StatefulSet, Self::DaemonSet, Self::Job, Self::CronJob];

    /// Returns the name in paths and of `kubectl`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::StatefulSet => "statefulset",
            Self::DaemonSet => "daemonset",
            Self::Job => "job",
            Self::CronJob => "cronjob",
        }
    }

    /// Returns the plural name of the resource.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Deployment => "deployments",
            Self::StatefulSet => "statefulsets",
            Self::DaemonSet => "daemonsets",
            Self::Job => "jobs",
            Self::CronJob => "cronjobs",
        }
    }

    /// Returns the API group.
    #[must_use]
    pub const fn group(self) -> &'static str {
        match self {
            Self::Deployment | Self::StatefulSet | Self::DaemonSet => "apps",
            Self::Job | Self::CronJob => "batch",
        }
    }

    /// Parses a kind, in any case: `Deployment` is `deployment`.
    ///
    /// # Errors
    ///
    /// [`Invalid`] names the known kinds.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|kind| kind.as_str().eq_ignore_ascii_case(text));
        known.ok_or_else(|| Invalid::new("must be deployment, statefulset, daemonset, job or cronjob"))
    }
}

/// Controller of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Controller {
    /// Workload whose template the pod follows; `None` for a controller of another kind.
    pub workload: Option<(WorkloadKind, PodName)>,
    /// Whether the template has a list of pull secrets; `None` if that is unknown.
    pub has_own_list: Option<bool>,
}

/// Subject of a diagnosis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A pod.
    Pod {
        /// Name.
        name: PodName,
        /// Its controller, which creates it anew after its deletion.
        controller: Option<Controller>,
    },
    /// The pods that a workload creates.
    Workload {
        /// Kind.
        kind: WorkloadKind,
        /// Name.
        name: PodName,
    },
    /// A pod that does not exist yet.
    Spec,
}

/// Kind of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ContainerKind {
    /// Init container.
    Init,
    /// Ordinary container.
    Container,
    /// Ephemeral container.
    Ephemeral,
}

/// Why a container waits, by its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum WaitingReason {
    /// The last pull failed.
    ErrImagePull,
    /// The kubelet pauses after failed pulls.
    ImagePullBackOff,
    /// The image reference is invalid.
    InvalidImageName,
    /// The image is not on the node, and `imagePullPolicy` is `Never`.
    ErrImageNeverPull,
    /// The image on the node cannot be read.
    ImageInspectError,
}

impl WaitingReason {
    /// Parses a reason of the kubelet. Other reasons do not concern the image.
    #[must_use]
    pub fn parse(reason: &str) -> Option<Self> {
        Some(match reason {
            "ErrImagePull" => Self::ErrImagePull,
            "ImagePullBackOff" => Self::ImagePullBackOff,
            "InvalidImageName" => Self::InvalidImageName,
            "ErrImageNeverPull" => Self::ErrImageNeverPull,
            "ImageInspectError" => Self::ImageInspectError,
            _ => return None,
        })
    }
}

/// Phase of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PodPhase {
    /// Not all containers have started.
    Pending,
    /// It was bound to a node, and its containers have started.
    Running,
    /// All containers have ended, without an error.
    Succeeded,
    /// All containers have ended, one with an error.
    Failed,
    /// The API server does not say.
    Unknown,
}

impl PodPhase {
    /// Parses a phase; another one is unknown.
    #[must_use]
    pub fn parse(phase: &str) -> Self {
        match phase {
            "Pending" => Self::Pending,
            "Running" => Self::Running,
            "Succeeded" => Self::Succeeded,
            "Failed" => Self::Failed,
            _ => Self::Unknown,
        }
    }
}

/// Pod in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedPod {
    /// Name.
    pub name: PodName,
    /// Workload that created it; `None` without one, or for one of another kind.
    pub owner: Option<(WorkloadKind, PodName)>,
    /// Phase.
    pub phase: PodPhase,
    /// Whether it is pending, and its containers have no status yet.
    pub is_new: bool,
    /// Why a container waits for its image; `None` if none does.
    pub waiting: Option<WaitingReason>,
}

impl ListedPod {
    /// Whether a container waits for its image, or may: no kubelet has reported about a new pod yet.
    #[must_use]
    pub const fn may_wait_for_image(&self) -> bool {
        self.is_new || self.waiting.is_some()
    }
}

/// What an event of the pod reports about a pull. Ordered from the least to the most specific.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PullEvent {
    /// The kubelet pauses after failed pulls.
    BackOff,
    /// The pull failed for a reason that is not known.
    Failed,
    /// `imagePullPolicy` forbids the pull.
    NeverPull,
    /// The image reference is invalid.
    InvalidName,
    /// The registry cannot be reached.
    Unreachable,
    /// TLS failed.
    TlsError,
    /// The registry limits pulls.
    RateLimited,
    /// The image has no manifest for the node's platform.
    NoMatchingPlatform,
    /// The image does not exist.
    NotFound,
    /// The registry refused the pull.
    Unauthorized,
}

impl PullEvent {
    /// The report after an earlier one: the newest that names a reason.
    #[must_use]
    pub fn after(self, earlier: Option<Self>) -> Self {
        let is_general = |event| matches!(event, Self::BackOff | Self::Failed);
        match earlier {
            Some(earlier) if is_general(self) && !is_general(earlier) => earlier,
            Some(earlier) if is_general(self) => self.max(earlier),
            _ => self,
        }
    }

    /// Classifies an event by its reason and message. The message is compared only: it may contain
    /// anything that a registry sent.
    #[must_use]
    pub fn classify(reason: &str, message: &str) -> Option<Self> {
        match reason {
            "BackOff" if message.contains("pulling image") => return Some(Self::BackOff),
            "ErrImageNeverPull" => return Some(Self::NeverPull),
            "InspectFailed" => return Some(Self::InvalidName),
            "Failed" => {}
            _ => return None,
        }
        let message = message.to_ascii_lowercase();
        let has = |parts: &[&str]| parts.iter().any(|part| message.contains(part));
        if !has(&["pull", "image"]) {
            return None;
        }
        Some(if has(&["toomanyrequests", "429", "rate limit"]) {
            Self::RateLimited
        } else if has(&["no match for platform", "no matching manifest"]) {
            Self::NoMatchingPlatform
        } else if has(&["x509", "certificate", "tls:", "http response to https"]) {
            Self::TlsError
        } else if has(&["unauthorized", "authorization failed", "401", "403", "denied", "no basic auth"]) {
            Self::Unauthorized
        } else if has(&["not found", "manifest unknown", "404"]) {
            Self::NotFound
        } else if has(&["no such host", "connection refused", "timeout", "no route", "dial tcp"]) {
            Self::Unreachable
        } else if has(&["errimageneverpull"]) {
            Self::NeverPull
        } else if has(&["invalidimagename", "invalid reference"]) {
            Self::InvalidName
        } else {
            Self::Failed
        })
    }
}

/// Container of a pod.
#[derive(Debug, Clone)]
pub struct Container {
    /// Name.
    pub name: Name,
    /// Kind.
    pub kind: ContainerKind,
    /// Image as written, unchecked.
    pub image: String,
    /// Why it waits.
    pub waiting: Option<WaitingReason>,
    /// What events report.
    pub event: Option<PullEvent>,
    /// Whether it has run: its image was on the node.
    pub has_started: bool,
}

/// Pod, or the template of one.
#[derive(Debug)]
pub struct PodFacts {
    /// Subject.
    pub subject: Subject,
    /// Namespace.
    pub namespace: NamespaceName,
    /// Identifier of a pod that exists.
    pub uid: Option<String>,
    /// Containers of all kinds.
    pub containers: Vec<Container>,
    /// Its own `imagePullSecrets`, in order.
    pub pull_secrets: Vec<SecretName>,
    /// Whether `imagePullSecrets` has entries without a valid name, which the kubelet ignores.
    pub has_invalid_reference: bool,
    /// Its `ServiceAccount`.
    pub service_account: ServiceAccountName,
    /// Nodes that it can run on.
    pub nodes: NodeChoice,
}

impl PodFacts {
    /// Whether its `imagePullSecrets` is not empty, so that the API server adds none.
    #[must_use]
    pub fn has_own_list(&self) -> bool {
        !self.pull_secrets.is_empty() || self.has_invalid_reference
    }
}

/// Value of a Secret, for the time of one diagnosis. `Debug` omits the data.
pub struct SecretValue {
    /// Type.
    pub secret_type: String,
    /// Value of `.dockerconfigjson`.
    pub dockerconfigjson: Option<SecretSlice<u8>>,
    /// Value of `.dockercfg`.
    pub dockercfg: Option<SecretSlice<u8>>,
    /// Whether it has other data.
    pub has_other_data: bool,
    /// Whether another object owns it.
    pub has_owner: bool,
    /// Pull secret that a label names.
    pub pull_secret_id: Option<Uuid>,
    /// Resource version.
    pub resource_version: Option<String>,
}

impl SecretValue {
    /// Length of its documents, in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        let documents = [&self.dockerconfigjson, &self.dockercfg].into_iter().flatten();
        documents.map(|document| document.expose_secret().len()).sum()
    }
}

impl std::fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretValue").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("BackOff", "Back-off pulling image \"reg.io/app\"", Some(PullEvent::BackOff))]
    #[case("BackOff", "Back-off restarting failed container", None)]
    #[case("Failed", "Failed to pull image \"a\": rpc error: 401 Unauthorized", Some(PullEvent::Unauthorized))]
    #[case("Failed", "Failed to pull image \"a\": pull access denied, no basic auth", Some(PullEvent::Unauthorized))]
    #[case("Failed", "Failed to pull image \"a\": a: not found", Some(PullEvent::NotFound))]
    #[case("Failed", "Failed to pull image \"a\": 429 toomanyrequests", Some(PullEvent::RateLimited))]
    #[case("Failed", "Failed to pull image: x509: unknown authority", Some(PullEvent::TlsError))]
    #[case("Failed", "Failed to pull image: no match for platform", Some(PullEvent::NoMatchingPlatform))]
    #[case("Failed", "Failed to pull image: dial tcp: no such host", Some(PullEvent::Unreachable))]
    #[case("Failed", "Failed to pull image: canary", Some(PullEvent::Failed))]
    #[case("Failed", "Error: ImagePullBackOff", Some(PullEvent::Failed))]
    #[case("Failed", "Error: failed to create containerd task", None)]
    #[case("Pulled", "Successfully pulled image", None)]
    fn event_is_classified(#[case] reason: &str, #[case] message: &str, #[case] expected: Option<PullEvent>) {
        assert_eq!(PullEvent::classify(reason, message), expected);
    }

    #[test]
    fn newest_event_that_names_a_reason_counts() {
        use PullEvent::{BackOff, Failed, NotFound, Unauthorized};
        for (events, expected) in [
            (&[Unauthorized, NotFound][..], NotFound),
            (&[NotFound, Failed, BackOff], NotFound),
            (&[Failed, BackOff], Failed),
            (&[BackOff, Unauthorized, BackOff], Unauthorized),
        ] {
            let found = events.iter().fold(None, |earlier, event| Some(event.after(earlier)));
            assert_eq!(found, Some(expected), "{events:?}");
        }
    }

    #[test]
    fn kind_is_parsed_in_any_case() {
        for kind in WorkloadKind::ALL {
            assert_eq!(WorkloadKind::parse(kind.as_str()), Ok(kind));
        }
        assert_eq!(WorkloadKind::parse("DaemonSet"), Ok(WorkloadKind::DaemonSet));
        assert!(WorkloadKind::parse("replicaset").is_err());
    }
}
