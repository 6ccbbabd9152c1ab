//! Whether a login works: what a check of it can find, how often it is looked at, and when its end is near.

use std::{fmt, str::FromStr, time::Duration};

use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::invalid::Invalid;

/// What a check of a login found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum VerificationResult {
    /// The registry takes the login; where a repository was named, the login may read it.
    Valid,
    /// The registry or its token service does not take the login: it is wrong, expired or revoked.
    Invalid,
    /// The registry treats this login as it treats anybody without one, so nothing is known of the password.
    Anonymous,
    /// The login is taken, but it may not do this.
    NoAccess,
    /// No answer, or one that says that the registry is not well.
    Unreachable,
    /// The registry could not be shown to be the right one, or one side speaks TLS and the other does not.
    TlsError,
    /// Something answers, but not as a registry does.
    NotARegistry,
    /// The registry asks to come back later, or too many checks of it are under way.
    RateLimited,
    /// regcred does not call this address: it is not public, and the configuration does not allow it.
    Refused,
}

impl VerificationResult {
    /// All results.
    pub const ALL: [Self; 9] = [
        Self::Valid,
        Self::Invalid,
        Self::Anonymous,
        Self::NoAccess,
        Self::Unreachable,
        Self::TlsError,
        Self::NotARegistry,
        Self::RateLimited,
        Self::Refused,
    ];

    /// The name in the API, in the database and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Invalid => "invalid",
            Self::Anonymous => "anonymous",
            Self::NoAccess => "noAccess",
            Self::Unreachable => "unreachable",
            Self::TlsError => "tlsError",
            Self::NotARegistry => "notARegistry",
            Self::RateLimited => "rateLimited",
            Self::Refused => "refused",
        }
    }

    /// Whether the login itself is what was found wanting, and not the way to the registry.
    #[must_use]
    pub const fn is_about_login(self) -> bool {
        matches!(self, Self::Invalid | Self::Anonymous | Self::NoAccess)
    }
}

impl fmt::Display for VerificationResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for VerificationResult {
    type Err = Invalid;

    fn from_str(result: &str) -> Result<Self, Invalid> {
        let found = Self::ALL.into_iter().find(|known| known.as_str() == result);
        found.ok_or_else(|| Invalid::new("is no result of a verification"))
    }
}

/// A result with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was found, for programs.
    pub result: VerificationResult,
    /// What was found and what to do about it, for people. Nothing in it was written by a registry.
    pub detail: String,
    /// How long the registry asks to be left alone, where it does.
    pub retry_after: Option<Duration>,
}

impl Finding {
    /// Puts a finding together.
    pub fn new(result: VerificationResult, detail: impl Into<String>) -> Self {
        Self { result, detail: detail.into(), retry_after: None }
    }
}

/// What the last check of an account found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// What was found, for programs.
    pub result: VerificationResult,
    /// What was found, for people.
    pub detail: String,
    /// When.
    pub checked_at: DateTime<Utc>,
}

/// How often an account is verified in the background.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyInterval(i32);

impl VerifyInterval {
    /// Checks an interval in seconds.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is shorter than five minutes, which no registry should have to bear, or longer than 30 days.
    pub fn from_seconds(seconds: i64) -> Result<Self, Invalid> {
        match i32::try_from(seconds) {
            Ok(seconds) if (300..=30 * 86_400).contains(&seconds) => Ok(Self(seconds)),
            _ => Err(Invalid::new("must be from 300 (five minutes) to 2592000 (30 days)")),
        }
    }

    /// The interval in seconds.
    #[must_use]
    pub const fn seconds(self) -> i32 {
        self.0
    }
}

/// The days before an account's `expiresAt` at which regcred warns, the nearest last; 0 is the end itself.
pub const EXPIRY_WARNINGS: [i16; 6] = [30, 14, 7, 3, 1, 0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_is_read_back() {
        for result in VerificationResult::ALL {
            assert_eq!(result.as_str().parse(), Ok(result));
            assert_eq!(serde_json::to_value(result).unwrap(), result.as_str());
        }
        assert!("ok".parse::<VerificationResult>().is_err());
    }

    #[test]
    fn an_interval_has_its_bounds() {
        for (seconds, good) in [(299, false), (300, true), (2_592_000, true), (2_592_001, false), (i64::MAX, false)] {
            assert_eq!(VerifyInterval::from_seconds(seconds).is_ok(), good, "{seconds}");
        }
    }
}
