//! Diagnosis of image pulls: what the kubelet does with the pull secrets of a pod, and why a pull
//! fails.
//!
//! Pure: a caller reads the cluster, and asks the registries what [`Examination`] wants to know.
//!
//! 1. [`pull_secret_names`] says which pull secrets the kubelet uses, in order.
//! 2. [`Examination::new`] reads their values as the kubelet does and finds the entries of each
//!    image.
//! 3. [`Examination::conclude`] judges the answers of the registries and proposes fixes.
//!
//! A credential leaves for a registry only if [`Candidate::question`] returns it: its entry names
//! that registry.

mod answer;
mod examination;
mod fix;
mod node;
mod node_logins;
mod pod;
mod registry;
mod secret;
mod verdict;

pub use self::{
    answer::{
        Attempt, ContainerReference, DiagnosedImage, DiagnosedSecret, Diagnosis, ManagedAccount, ManagedBy,
        MissingRead, NearEntry, PodProblem, PodProblemKind, PullSecretsFrom, RegistryAnswer, SkipReason, Verdict,
    },
    examination::{Candidate, Examination, ImageAnswers, Question, pull_secret_names},
    fix::{Change, Fix, FixAccount, FixType, Kubectl, PullSecretName, RegcredContext, Step},
    node::{Node, NodeChoice},
    pod::{
        Container, ContainerKind, Controller, ListedPod, Lookup, PodFacts, PodPhase, PullEvent, SecretValue, Subject,
        WaitingReason, WorkloadKind,
    },
    registry::{ManifestState, Platform, PullReport},
    secret::{ReadSecret, SecretProblem, SecretProblemKind, SecretState},
};

#[cfg(test)]
mod tests;
