//! The next step for one target, given the state of the cluster.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::ID_LABEL;
use crate::domain::secret::MANAGED_BY_LABEL;

/// Metadata of a Secret in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundSecret {
    /// UID of the object.
    pub uid: String,
    /// Resource version of the object.
    pub resource_version: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value of [`GENERATION_ANNOTATION`](super::GENERATION_ANNOTATION).
    pub generation: Option<i64>,
}

/// A Secret as regcred last wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// UID of the Secret.
    pub uid: Option<String>,
    /// Resource version of the Secret.
    pub resource_version: Option<String>,
    /// Keyed hash of the content.
    pub content_mac: Option<Vec<u8>>,
}

/// Keyed hashes of the desired content of a Secret, one for each pepper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentMac {
    /// Hash under the first pepper, which is stored.
    pub current: Vec<u8>,
    /// Hashes under older peppers, which stored hashes may equal.
    pub older: Vec<Vec<u8>>,
}

impl ContentMac {
    /// Whether a stored hash is that of the desired content.
    #[must_use]
    pub fn is_of(&self, stored: Option<&[u8]>) -> bool {
        stored.is_some_and(|stored| std::iter::once(&self.current).chain(&self.older).any(|mac| mac == stored))
    }
}

/// Labels of the Secrets of a pull secret.
#[must_use]
pub fn labels(id: Uuid) -> BTreeMap<String, String> {
    let (key, value) = MANAGED_BY_LABEL;
    BTreeMap::from([(key.to_owned(), value.to_owned()), (ID_LABEL.to_owned(), id.to_string())])
}

/// Owner of a Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This pull secret, by label or by UID.
    Us,
    /// Another pull secret, by label.
    Other(Uuid),
    /// Not regcred.
    Foreign,
}

impl FoundSecret {
    /// Whether the Secret was made by direct delivery.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        let (key, value) = MANAGED_BY_LABEL;
        self.labels.get(key).is_some_and(|found| found == value) && !self.labels.contains_key(ID_LABEL)
    }

    /// Owner, as seen by the pull secret `id`.
    #[must_use]
    pub fn owner(&self, id: Uuid, written: &Written) -> Owner {
        if written.uid.as_deref() == Some(&self.uid) {
            return Owner::Us;
        }
        match self.labels.get(ID_LABEL).map(|label| label.parse::<Uuid>()) {
            Some(Ok(owner)) if owner == id => Owner::Us,
            Some(Ok(other)) => Owner::Other(other),
            Some(Err(_)) | None => Owner::Foreign,
        }
    }
}

/// Desired state of a Secret.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The pull secret.
    pub id: Uuid,
    /// Its generation.
    pub generation: i64,
    /// Keyed hashes of the desired content.
    pub content_mac: &'a ContentMac,
    /// Whether to take over a Secret of another owner.
    pub adopt: bool,
}

/// Next step for a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Create the Secret.
    Create,
    /// Update it at this version.
    Apply {
        /// Resource version.
        resource_version: String,
    },
    /// Leave it: it is in sync.
    Leave,
    /// It belongs to another owner: this pull secret, unless that is gone, or not regcred.
    Conflict(Option<Uuid>),
    /// It belongs to another pull secret: adopt it only if that one is gone.
    ConflictUnlessGone(Uuid),
    /// It has a newer generation: the worker lost its lease, or the annotation is not from this
    /// database.
    Superseded {
        /// Generation on the Secret.
        by: i64,
        /// Resource version of the Secret.
        resource_version: String,
    },
}

/// Plans the next step for a target, given the Secret in the cluster.
#[must_use]
pub fn plan(wanted: &Wanted<'_>, written: &Written, found: Option<&FoundSecret>) -> Step {
    let Some(found) = found else { return Step::Create };
    let apply = || Step::Apply { resource_version: found.resource_version.clone() };
    match found.owner(wanted.id, written) {
        Owner::Us => {}
        Owner::Other(other) if wanted.adopt => return Step::ConflictUnlessGone(other),
        Owner::Foreign if wanted.adopt => return apply(),
        Owner::Other(other) => return Step::Conflict(Some(other)),
        Owner::Foreign => return Step::Conflict(None),
    }
    match found.generation {
        Some(by) if by > wanted.generation => Step::Superseded { by, resource_version: found.resource_version.clone() },
        _ if is_unchanged(wanted, written, found) => Step::Leave,
        _ => apply(),
    }
}

/// Whether the object is at the written version with the desired content.
fn is_unchanged(wanted: &Wanted<'_>, written: &Written, found: &FoundSecret) -> bool {
    written.uid.as_deref() == Some(&found.uid)
        && written.resource_version.as_deref() == Some(&found.resource_version)
        && wanted.content_mac.is_of(written.content_mac.as_deref())
}

/// Effect of a declaration on a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PreviewAction {
    /// The Secret would be created.
    Create,
    /// The Secret would be updated.
    Update,
    /// The Secret is in sync.
    Unchanged,
    /// A Secret of another owner would be taken over.
    Adopt,
    /// A Secret of another owner has the name and would not be changed.
    Conflict,
    /// The Secret would be deleted.
    Remove,
    /// The Secret would stay and no longer be managed.
    Forget,
    /// The effect is unknown.
    Unknown,
}

/// Exponential backoff after failed attempts: 1 s to 5 min, before jitter.
#[must_use]
pub fn backoff(attempts: i32) -> Duration {
    let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(0).min(9);
    Duration::from_secs(1 << doublings).min(Duration::from_mins(5))
}
