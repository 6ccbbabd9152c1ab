//! Content of a snapshot, as it is stored and as the API answers it.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};
use utoipa::ToSchema;

use super::{adoption::Adoption, grouping::Source, user::UserKind};
use crate::domain::{
    diagnosis::{PullSecretsFrom, SecretState, Verdict},
    invalid::Invalid,
    names::PodName,
};

/// When a pull that does not work fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageFailsAt)]
pub enum FailsAt {
    /// When a pod is created on a node that does not have the image.
    NewNode,
    /// At every start of a container, because its `imagePullPolicy` is `Always`.
    Restart,
    /// Also on nodes that have the image: kubelets from 1.35 ask the registry unless the pod's login
    /// pulled it before (`KubeletEnsureSecretPulledImages`).
    CachedImage,
}

impl FailsAt {
    /// All occasions.
    pub const ALL: [Self; 3] = [Self::NewNode, Self::Restart, Self::CachedImage];
}

/// Name of a workload or pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = CoverageExample)]
pub struct Example {
    /// Kind.
    pub kind: UserKind,
    /// Name.
    pub name: String,
}

impl Example {
    /// None for a pod of a controller that is not known by kind.
    pub(super) fn of(source: &Source, name: &PodName) -> Option<Self> {
        let kind = match source {
            Source::Template(kind) => UserKind::from(*kind),
            Source::Pod | Source::PodOfOther(_) => UserKind::Pod,
            Source::PodOfTemplate => return None,
        };
        Some(Self { kind, name: name.to_string() })
    }
}

/// Number of objects of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = CoverageUserCount)]
pub struct UserCount {
    /// Kind.
    pub kind: UserKind,
    /// Number.
    pub count: u32,
}

/// Login that is used for a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageCredential)]
pub struct Credential {
    /// Name of the Secret.
    pub secret: String,
    /// Key of the entry.
    pub key: String,
    /// Whether the registry delivers an image with it.
    pub works: bool,
    /// Registry account whose login it is; `null` if regcred did not deliver the Secret.
    pub account: Option<String>,
    /// Pull secret of regcred that has the Secret.
    pub pull_secret: Option<String>,
}

/// Images of one repository that pods of one namespace pull with the same pull secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageGroup)]
pub struct Group {
    /// Namespace.
    pub namespace: String,
    /// Name of the ServiceAccount.
    pub service_account: String,
    /// Pull secrets that the kubelet uses, in its order.
    pub pull_secrets: Vec<String>,
    /// Where the list of pull secrets comes from.
    pub pull_secrets_from: PullSecretsFrom,
    /// Registry and repository; `null` for image references that cannot be parsed.
    pub repository: Option<String>,
    /// Tags and digests, at most 16.
    pub versions: Vec<String>,
    /// Workloads and pods without a controller, by kind.
    pub workloads: Vec<UserCount>,
    /// Pods that exist.
    pub pods: u32,
    /// One of them, to diagnose.
    pub example: Option<Example>,
    /// The worst verdict of the images.
    pub verdict: Verdict,
    /// The verdict as a sentence.
    pub sentence: String,
    /// The entry that works, or else the first one that matches; `null` without any.
    pub credential: Option<Credential>,
    /// When the pull fails; empty if the verdict is `ok` or `unknown`.
    pub fails_at: Vec<FailsAt>,
    /// Verdict in the snapshot before; `null` for a new group.
    #[serde(default)]
    pub previous_verdict: Option<Verdict>,
}

/// Who keeps a Secret up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageSecretOwner)]
pub enum SecretOwner {
    /// A pull secret of regcred.
    PullSecret,
    /// regcred delivered it directly. It does not follow rotations.
    Direct,
    /// Another client.
    Foreign,
}

impl SecretOwner {
    /// All owners.
    pub const ALL: [Self; 3] = [Self::PullSecret, Self::Direct, Self::Foreign];

    /// Returns the name in the API and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PullSecret => "pullSecret",
            Self::Direct => "direct",
            Self::Foreign => "foreign",
        }
    }
}

impl FromStr for SecretOwner {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|owner| owner.as_str() == text);
        known.ok_or_else(|| Invalid::new("must be pullSecret, direct or foreign"))
    }
}

/// A pull secret of the cluster, and what uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoveragePullSecret)]
pub struct PullSecretUse {
    /// Namespace.
    pub namespace: String,
    /// Name of the Secret.
    pub name: String,
    /// Whether it exists and could be read; `notRead` if nothing uses it.
    pub state: SecretState,
    /// Type; `null` if it was not read, or is not that of a pull secret.
    #[serde(rename = "type")]
    pub secret_type: Option<String>,
    /// Who keeps it up to date.
    pub owner: SecretOwner,
    /// Pull secret of regcred.
    pub pull_secret: Option<String>,
    /// Workloads and pods without a controller that use it.
    pub workloads: u32,
    /// Pods that use it.
    pub pods: u32,
    /// Service accounts that list it.
    pub service_accounts: u32,
    /// Keys of its entries, at most 50; empty if it was not read.
    pub keys: Vec<String>,
    /// Whether regcred could adopt it: another client made it, and each of its entries, 50 at most, has a
    /// login.
    pub adoptable: bool,
    /// How regcred takes it over; `null` unless it is adoptable.
    #[serde(default, deserialize_with = "ignored")]
    pub adoption: Option<Adoption>,
}

/// Steps are not stored: they follow from the other fields.
fn ignored<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Adoption>, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| None)
}

impl PullSecretUse {
    /// Whether no workload and no pod uses it.
    #[must_use]
    pub const fn is_unused(&self) -> bool {
        self.workloads == 0 && self.pods == 0
    }
}

/// Number of groups, workloads and pods with a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = CoverageVerdictCount)]
pub struct VerdictCount {
    /// Kind of the workloads.
    pub kind: UserKind,
    /// The worst verdict of their images.
    pub verdict: Verdict,
    /// Number of workloads.
    pub count: u32,
}

/// Number of groups whose pulls fail on an occasion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageFailureCount)]
pub struct FailureCount {
    /// Occasion.
    pub fails_at: FailsAt,
    /// Number of groups.
    pub groups: u32,
}

/// Number of pull secrets of the cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageSecretCounts)]
pub struct SecretCounts {
    /// All that are known.
    pub total: u32,
    /// Those of pull secrets of regcred.
    pub of_pull_secrets: u32,
    /// Those that regcred delivered directly.
    pub direct: u32,
    /// Those of other clients.
    pub foreign: u32,
    /// Those that nothing uses.
    pub unused: u32,
    /// Those that are used and do not exist.
    pub missing: u32,
    /// Those that regcred could adopt.
    pub adoptable: u32,
}

/// Part of a snapshot that is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = CoverageMissingPart)]
pub struct MissingPart {
    /// Verb of the right that regcred lacks, such as `list`; `null` if a limit was reached.
    pub verb: Option<String>,
    /// Resource, such as `pods`.
    pub resource: String,
    /// What the snapshot lacks, and why it matters.
    pub effect: String,
    /// Number of objects that are concerned; `null` if it is unknown.
    pub count: Option<u32>,
}

impl MissingPart {
    /// What a limit left out.
    #[must_use]
    pub fn of_limit(resource: &str, effect: impl Into<String>, count: u32) -> Self {
        Self { verb: None, resource: resource.to_owned(), effect: effect.into(), count: Some(count) }
    }
}

/// Summary of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageSummary)]
pub struct Summary {
    /// Number of groups.
    pub groups: u32,
    /// Number of groups whose verdict is `ok`.
    pub groups_ok: u32,
    /// Number of workloads and pods without a controller.
    pub workloads: u32,
    /// Number of pods.
    pub pods: u32,
    /// Number of namespaces with a workload or pod.
    pub namespaces: u32,
    /// Workloads by kind and worst verdict.
    pub verdicts: Vec<VerdictCount>,
    /// Groups whose pulls fail, by occasion.
    pub failures: Vec<FailureCount>,
    /// Pull secrets.
    pub pull_secrets: SecretCounts,
    /// Whether a node verifies logins for images that it has; `null` if the version of no node is
    /// known.
    pub verifies_cached_images: Option<bool>,
    /// What could not be read.
    pub missing: Vec<MissingPart>,
    /// Calls to the API server.
    pub calls: u32,
    /// Duration of the run in seconds.
    pub seconds: u32,
}
