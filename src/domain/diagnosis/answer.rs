//! Answer of a diagnosis.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    fix::Fix,
    pod::{ContainerKind, PullEvent, WaitingReason},
    registry::{ManifestState, PullReport},
    secret::{SecretProblem, SecretState},
};
use crate::domain::{invalid::Invalid, matching::Mismatch, names::Name, verification::VerificationResult};

/// Why the images of a pod can be pulled, or cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Diagnosis {
    /// Whether the verdict of every image is `ok`, and no problem prevents the pod.
    pub ok: bool,
    /// Where the list of pull secrets comes from.
    pub pull_secrets_from: PullSecretsFrom,
    /// Name of the ServiceAccount.
    pub service_account: String,
    /// Pull secrets that the kubelet uses, in its order.
    pub pull_secrets: Vec<DiagnosedSecret>,
    /// Images, each once, 50 at most.
    pub images: Vec<DiagnosedImage>,
    /// Problems of the pod as a whole.
    pub problems: Vec<PodProblem>,
    /// What regcred may not read in the cluster, and what the diagnosis lacks for it.
    pub missing_rights: Vec<MissingRead>,
}

impl Diagnosis {
    /// Fixes of the pod and of its images.
    pub fn fixes(&self) -> impl Iterator<Item = &Fix> {
        let of_pod = self.problems.iter().filter_map(|problem| problem.fix.as_ref());
        of_pod.chain(self.images.iter().filter_map(|image| image.fix.as_ref()))
    }

    /// The same, to be changed.
    pub fn fixes_mut(&mut self) -> impl Iterator<Item = &mut Fix> {
        let of_pod = self.problems.iter_mut().filter_map(|problem| problem.fix.as_mut());
        of_pod.chain(self.images.iter_mut().filter_map(|image| image.fix.as_mut()))
    }
}

/// Source of the list of pull secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PullSecretsFrom {
    /// `imagePullSecrets` of the pod, its template or the request.
    Pod,
    /// `imagePullSecrets` of the ServiceAccount, which the API server copies to a new pod without
    /// any.
    ServiceAccount,
    /// There are no pull secrets.
    None,
}

/// A pull secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiagnosedSecret {
    /// Name.
    pub name: String,
    /// Whether it could be read.
    pub state: SecretState,
    /// Keys of the entries that the kubelet finds in it, 50 at most.
    pub keys: Vec<String>,
    /// Problems.
    pub problems: Vec<SecretProblem>,
    /// The pull secret of regcred that it belongs to; `null` if there is none.
    pub managed_by: Option<ManagedBy>,
}

/// Pull secret of regcred that a Secret belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ManagedBy {
    /// Name; `null` if the caller may not see it.
    pub pull_secret: Option<String>,
    /// State of the target: `pending`, `synced`, `failed` or `conflict`.
    pub state: Option<String>,
    /// Type of its last error.
    pub last_error: Option<String>,
    /// Whether the Secret is as regcred wrote it last.
    #[serde(skip)]
    pub is_as_written: bool,
    /// Accounts in it.
    #[serde(skip)]
    pub accounts: Vec<ManagedAccount>,
}

/// Account in a pull secret of regcred.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagedAccount {
    /// Name.
    pub name: Name,
    /// Key of its entry.
    pub key: String,
    /// Whether regcred mints its login.
    pub is_minted: bool,
}

/// Verdict about an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PullVerdict)]
pub enum Verdict {
    /// The image can be pulled.
    Ok,
    /// The image needs a login, and there are no pull secrets.
    NoSecret,
    /// The image needs a login, and a pull secret does not exist.
    SecretMissing,
    /// The kubelet cannot use a pull secret.
    SecretUnreadable,
    /// The image needs a login, and no entry is for it.
    NoMatchingEntry,
    /// The registry rejects the login.
    CredentialInvalid,
    /// The registry accepts the login, which may not pull the image.
    NoAccess,
    /// The image does not exist, or the login may not see it.
    ImageNotFound,
    /// The registry does not answer, is no registry, or may not be called.
    RegistryUnreachable,
    /// The registry limits pulls.
    RateLimited,
    /// The certificate of the registry is not trusted, or only one side uses TLS.
    TlsError,
    /// The image has no manifest for the platform.
    ArchitectureMismatch,
    /// The diagnosis is incomplete.
    Unknown,
}

impl Verdict {
    /// All verdicts.
    pub const ALL: [Self; 13] = [
        Self::Ok,
        Self::NoSecret,
        Self::SecretMissing,
        Self::SecretUnreadable,
        Self::NoMatchingEntry,
        Self::CredentialInvalid,
        Self::NoAccess,
        Self::ImageNotFound,
        Self::RegistryUnreachable,
        Self::RateLimited,
        Self::TlsError,
        Self::ArchitectureMismatch,
        Self::Unknown,
    ];

    /// Returns the name in the API, in the database and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NoSecret => "noSecret",
            Self::SecretMissing => "secretMissing",
            Self::SecretUnreadable => "secretUnreadable",
            Self::NoMatchingEntry => "noMatchingEntry",
            Self::CredentialInvalid => "credentialInvalid",
            Self::NoAccess => "noAccess",
            Self::ImageNotFound => "imageNotFound",
            Self::RegistryUnreachable => "registryUnreachable",
            Self::RateLimited => "rateLimited",
            Self::TlsError => "tlsError",
            Self::ArchitectureMismatch => "architectureMismatch",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the login is at fault, or the lack of one.
    #[must_use]
    pub const fn is_about_login(self) -> bool {
        match self {
            Self::NoSecret
            | Self::SecretMissing
            | Self::SecretUnreadable
            | Self::NoMatchingEntry
            | Self::CredentialInvalid
            | Self::NoAccess => true,
            Self::Ok
            | Self::ImageNotFound
            | Self::RegistryUnreachable
            | Self::RateLimited
            | Self::TlsError
            | Self::ArchitectureMismatch
            | Self::Unknown => false,
        }
    }
}

impl FromStr for Verdict {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|verdict| verdict.as_str() == text);
        known.ok_or_else(|| {
            let all: Vec<&str> = Self::ALL.iter().map(|verdict| verdict.as_str()).collect();
            Invalid::new(format!("must be one of {}", all.join(", ")))
        })
    }
}

/// An image of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiagnosedImage {
    /// Complete reference, with tag or digest; `null` if the pod's is invalid.
    pub image: Option<String>,
    /// Containers with this image.
    pub containers: Vec<ContainerReference>,
    /// Verdict.
    pub verdict: Verdict,
    /// The verdict as a sentence.
    pub sentence: String,
    /// Remedy; `null` if none is needed or known.
    pub fix: Option<Fix>,
    /// Entries that match the image, in the order in which the kubelet tries them, 20 at most.
    pub attempts: Vec<Attempt>,
    /// Answer of the registry to a client without a login; `null` if it was not asked.
    pub anonymous: Option<RegistryAnswer>,
    /// Without a match: up to three similar entries, and why they do not match.
    pub nearest: Vec<NearEntry>,
    /// Pull secrets with different logins for the same key that matches.
    pub collisions: Vec<String>,
    /// Platforms of the image, if it has several manifests and the pod requires an architecture.
    pub platforms: Vec<String>,
    /// Why a container of the pod waits, by its status.
    pub waiting: Option<WaitingReason>,
    /// What the events of the pod report, classified.
    pub event: Option<PullEvent>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ContainerReference {
    /// Name.
    pub name: String,
    /// Kind.
    #[serde(rename = "type")]
    pub kind: ContainerKind,
}

/// An entry that the kubelet tries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PullAttempt)]
pub struct Attempt {
    /// Name of the pull secret.
    pub secret: String,
    /// Key of the entry.
    pub key: String,
    /// Answer of the registry; `null` if it was not asked.
    pub answer: Option<RegistryAnswer>,
    /// Why the registry was not asked with this entry.
    pub skipped: Option<SkipReason>,
}

/// Why a registry was not asked with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PullSkipReason)]
pub enum SkipReason {
    /// An earlier entry works.
    EarlierWorks,
    /// The login of the entry cannot be sent: it is not UTF-8.
    NoLogin,
    /// The key has a wildcard, and the request chose the image: a login is sent only to a registry
    /// that its entry or the cluster names.
    Wildcard,
    /// The key names another registry than the image.
    OtherRegistry,
    /// A pull secret makes every pull fail.
    PodFails,
    /// The registry is at the node's own host.
    NodeHost,
    /// A limit of the diagnosis was reached.
    Limit,
}

/// Answer of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegistryAnswer {
    /// Result, as of a verification.
    pub result: VerificationResult,
    /// Explanation.
    pub detail: String,
    /// Whether the image exists.
    pub manifest: ManifestState,
}

impl From<&PullReport> for RegistryAnswer {
    fn from(report: &PullReport) -> Self {
        Self { result: report.result, detail: report.detail.clone(), manifest: report.manifest }
    }
}

/// An entry that nearly matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct NearEntry {
    /// Name of the pull secret.
    pub secret: String,
    /// Key of the entry.
    pub key: String,
    /// Reason, for programs.
    pub mismatch: Mismatch,
    /// Reason, for people.
    pub detail: String,
}

/// Kind of a problem of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PodProblemKind {
    /// The ServiceAccount does not exist, so the API server creates no pod.
    ServiceAccountMissing,
    /// An entry of `imagePullSecrets` has no valid name. The kubelet ignores it.
    InvalidReference,
    /// The pod has more images than an answer.
    TooManyImages,
}

impl PodProblemKind {
    /// Whether the pod works in spite of it.
    pub(super) const fn is_note(self) -> bool {
        match self {
            Self::InvalidReference => true,
            Self::ServiceAccountMissing | Self::TooManyImages => false,
        }
    }
}

/// Problem of a pod as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodProblem {
    /// Kind.
    #[serde(rename = "type")]
    pub kind: PodProblemKind,
    /// Explanation.
    pub sentence: String,
    /// Remedy.
    pub fix: Option<Fix>,
}

/// A right that regcred lacks in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MissingRead {
    /// Verb, such as `get`.
    pub verb: &'static str,
    /// Resource, such as `secrets`.
    pub resource: &'static str,
    /// What the diagnosis lacks without it.
    pub effect: &'static str,
}
