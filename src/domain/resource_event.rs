//! Events of resources: kinds, changes, and the ids that streams resume from.

use std::{fmt, str::FromStr};

use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::{
    caller::{Identity, Permission},
    invalid::Invalid,
};

/// Kind of a resource that has events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
#[schema(rename_all = "camelCase")]
pub enum ResourceKind {
    /// Registry account.
    RegistryAccount,
    /// Pull secret.
    PullSecret,
    /// Target of a pull secret.
    Target,
    /// Cluster.
    Cluster,
}

impl ResourceKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::RegistryAccount, Self::PullSecret, Self::Target, Self::Cluster];

    /// Permission to read resources of this kind, and their events.
    #[must_use]
    pub const fn permission(self) -> Permission {
        match self {
            Self::RegistryAccount => Permission::ReadAccounts,
            Self::PullSecret | Self::Target => Permission::ReadPullSecrets,
            Self::Cluster => Permission::ReadClusters,
        }
    }

    /// Kinds that the caller may read.
    #[must_use]
    pub fn readable_by(identity: &Identity) -> Vec<Self> {
        Self::ALL.into_iter().filter(|kind| identity.may(kind.permission())).collect()
    }

    /// Name in the API and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RegistryAccount => "registryAccount",
            Self::PullSecret => "pullSecret",
            Self::Target => "target",
            Self::Cluster => "cluster",
        }
    }
}

impl FromStr for ResourceKind {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| Invalid::new("must be registryAccount, pullSecret, target or cluster"))
    }
}

/// What happened to a resource, as a caller sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ResourceChange {
    /// The resource is new, or became visible to the caller.
    Created,
    /// The resource changed.
    Changed,
    /// The resource is gone, or no longer visible to the caller.
    Deleted,
}

impl ResourceChange {
    const ALL: [Self; 3] = [Self::Created, Self::Changed, Self::Deleted];

    /// The change as a caller sees it that may see the resource before the change, and after it.
    /// `None` if the caller sees neither.
    #[must_use]
    pub fn seen(self, before: bool, after: bool) -> Option<Self> {
        match self {
            Self::Created => after.then_some(self),
            Self::Deleted => before.then_some(self),
            Self::Changed => match (before, after) {
                (true, true) => Some(Self::Changed),
                (false, true) => Some(Self::Created),
                (true, false) => Some(Self::Deleted),
                (false, false) => None,
            },
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Changed => "changed",
            Self::Deleted => "deleted",
        }
    }
}

impl FromStr for ResourceChange {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|change| change.as_str() == text);
        known.ok_or_else(|| Invalid::new("must be created, changed or deleted"))
    }
}

/// Id of an event: a place in the history of one process.
///
/// A process that begins its history anew takes another epoch, so that no older id names an event
/// of the new history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventId {
    /// History of a process.
    pub epoch: u64,
    /// Number of events in the history up to and including this one.
    pub sequence: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.epoch, self.sequence)
    }
}

impl FromStr for EventId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let parsed = text.split_once('-').and_then(|(epoch, sequence)| {
            Some(Self { epoch: u64::from_str_radix(epoch, 16).ok()?, sequence: sequence.parse().ok()? })
        });
        // Only the form that regcred writes: other spellings of a number are not ids.
        parsed.filter(|id| id.to_string() == text).ok_or_else(|| Invalid::new("must be the id of an event"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_id_has_one_spelling() {
        let id = EventId { epoch: 0xab, sequence: 7 };
        assert_eq!(id.to_string(), "00000000000000ab-7");
        assert_eq!("00000000000000ab-7".parse(), Ok(id));
        for text in
            ["", "-", "ab-7", "00000000000000AB-7", "00000000000000ab-07", "00000000000000ab-+7", "1.2.1-3", "é-1"]
        {
            assert!(text.parse::<EventId>().is_err(), "{text}");
        }
    }

    #[test]
    fn change_of_visibility_reads_as_creation_or_deletion() {
        use ResourceChange::{Changed, Created, Deleted};
        let cases = [
            (Changed, true, true, Some(Changed)),
            (Changed, false, true, Some(Created)),
            (Changed, true, false, Some(Deleted)),
            (Changed, false, false, None),
            (Created, false, true, Some(Created)),
            (Created, false, false, None),
            (Deleted, true, false, Some(Deleted)),
            (Deleted, false, false, None),
        ];
        for (change, before, after, seen) in cases {
            assert_eq!(change.seen(before, after), seen, "{change:?} {before} {after}");
        }
    }

    #[test]
    fn names_of_kinds_and_changes_parse() {
        for kind in ResourceKind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        for change in ResourceChange::ALL {
            assert_eq!(change.as_str().parse(), Ok(change));
        }
        assert!("Cluster".parse::<ResourceKind>().is_err() && "gone".parse::<ResourceChange>().is_err());
    }
}
