//! Coverage of a cluster: which images in use have a working login, what uses each pull secret, and
//! what a rotation reaches.
//!
//! Pure: a caller reads the cluster and asks the registries.
//!
//! 1. [`Grouping`] collects workloads and pods in groups: images of one repository that pods of one
//!    namespace pull with the same pull secrets.
//! 2. Each group is examined as a diagnosis examines a pod, and has one verdict
//!    ([`GroupKey::facts`], [`Judged::of`]).
//! 3. [`Survey`] combines the groups to the content of a snapshot.

mod adoption;
mod grouping;
mod judged;
mod snapshot;
mod survey;
mod user;

pub use self::{
    adoption::{Adoption, adoption},
    grouping::{CONTAINERS_MAX, GroupKey, Grouped, Grouping, Observed, ObservedImage, PULL_SECRETS_MAX, Source},
    judged::{Judged, MatchedEntry},
    snapshot::{
        Credential, Example, FailsAt, FailureCount, Group, MissingPart, PullSecretUse, SecretCounts, SecretOwner,
        Summary, UserCount, VerdictCount,
    },
    survey::{FoundSecret, KnownAccount, KnownSecret, Survey, SurveyFacts, Usage, Uses},
    user::{PullPolicy, UserKind},
};

#[cfg(test)]
mod tests;
