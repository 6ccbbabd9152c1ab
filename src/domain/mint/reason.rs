//! Reasons why a mint fails.

use std::{fmt, str::FromStr, time::Duration};

use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::invalid::Invalid;

/// Reason why a mint failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum MintReason {
    /// The provider does not answer, or reports a failure of its own.
    Unreachable,
    /// The provider limits requests.
    Throttled,
    /// The provider knows the identity, and refuses it this login.
    Denied,
    /// The provider does not accept the identity: it is wrong, expired or revoked.
    InvalidIdentity,
    /// The provider does not accept the parameters of the source, or the guard refuses its address.
    Misconfigured,
    /// The clock of regcred's host and that of the provider differ too much.
    ClockSkew,
    /// The login had expired when it arrived.
    ExpiredOnArrival,
    /// The login is valid for less than five minutes.
    TooShortLived,
    /// The answer is not one of this provider.
    BadAnswer,
    /// The login is not for the account's registry.
    RegistryMismatch,
}

impl MintReason {
    /// All reasons.
    pub const ALL: [Self; 10] = [
        Self::Unreachable,
        Self::Throttled,
        Self::Denied,
        Self::InvalidIdentity,
        Self::Misconfigured,
        Self::ClockSkew,
        Self::ExpiredOnArrival,
        Self::TooShortLived,
        Self::BadAnswer,
        Self::RegistryMismatch,
    ];

    /// Returns the name in the API, in the database and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Throttled => "throttled",
            Self::Denied => "denied",
            Self::InvalidIdentity => "invalidIdentity",
            Self::Misconfigured => "misconfigured",
            Self::ClockSkew => "clockSkew",
            Self::ExpiredOnArrival => "expiredOnArrival",
            Self::TooShortLived => "tooShortLived",
            Self::BadAnswer => "badAnswer",
            Self::RegistryMismatch => "registryMismatch",
        }
    }

    /// Whether the failure ends by itself, so that the next attempt is soon.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Unreachable | Self::Throttled)
    }
}

impl fmt::Display for MintReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for MintReason {
    type Err = Invalid;

    fn from_str(reason: &str) -> Result<Self, Invalid> {
        let found = Self::ALL.into_iter().find(|known| known.as_str() == reason);
        found.ok_or_else(|| Invalid::new("is not a reason of a failed mint"))
    }
}

/// Failed mint. Its text contains nothing that the provider sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct MintError {
    /// Reason.
    pub reason: MintReason,
    /// Explanation and remedy.
    pub detail: String,
    /// Delay that the provider requests before the next attempt.
    pub retry_after: Option<Duration>,
    /// Whether regcred's own limits kept the mint from starting, so that the provider did not fail.
    pub is_deferral: bool,
}

impl MintError {
    /// Creates an error without a requested delay.
    pub fn new(reason: MintReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), retry_after: None, is_deferral: false }
    }
}
