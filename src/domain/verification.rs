//! Verification of registry logins: results, background interval and expiry warnings.

use std::{fmt, str::FromStr, time::Duration};

use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::invalid::Invalid;

/// Result of a login check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum VerificationResult {
    /// The registry accepts the login. If a repository was given, the login can pull from it.
    Valid,
    /// The registry or its token service rejects the login: it is wrong, expired or revoked.
    Invalid,
    /// The registry answers the same with and without the login, so the password is neither
    /// confirmed nor rejected.
    Anonymous,
    /// The registry accepts the login, but the login cannot pull from the repository.
    NoAccess,
    /// The registry does not respond, or reports a failure of its own.
    Unreachable,
    /// The registry's certificate is not trusted, or only one side uses TLS.
    TlsError,
    /// The server does not implement the registry API.
    NotARegistry,
    /// The registry limits requests, or too many checks of it are in progress.
    RateLimited,
    /// The address is not public and the configuration does not allow it. regcred did not call it.
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

    /// Returns the name in the API, in the database and in metrics.
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

    /// Whether the login itself is at fault, as opposed to the connection to the registry.
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
        found.ok_or_else(|| Invalid::new("is not a verification result"))
    }
}

/// Outcome of one login check: the result and its explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerificationReport {
    /// Machine-readable result.
    pub result: VerificationResult,
    /// Explanation and remedy. Contains no text from the registry.
    pub detail: String,
    /// Delay that the registry requests before the next call.
    pub retry_after: Option<Duration>,
}

impl VerificationReport {
    /// Creates an outcome without a requested delay.
    pub fn new(result: VerificationResult, detail: impl Into<String>) -> Self {
        Self { result, detail: detail.into(), retry_after: None }
    }
}

/// Stored outcome of the last login check of an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// Machine-readable result.
    pub result: VerificationResult,
    /// Explanation and remedy.
    pub detail: String,
    /// Time of the check, by the database's clock.
    pub checked_at: DateTime<Utc>,
}

/// Interval of the background verification of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyInterval(i32);

impl VerifyInterval {
    /// Parses an interval in seconds.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the interval is shorter than five minutes, to protect the registry, or longer
    /// than 30 days.
    pub fn from_seconds(seconds: i64) -> Result<Self, Invalid> {
        match i32::try_from(seconds) {
            Ok(seconds) if (300..=30 * 86_400).contains(&seconds) => Ok(Self(seconds)),
            _ => Err(Invalid::new("must be from 300 (five minutes) to 2592000 (30 days)")),
        }
    }

    /// Returns the interval in seconds.
    #[must_use]
    pub const fn seconds(self) -> i32 {
        self.0
    }
}

/// Days before an account's `expiresAt` at which regcred logs a warning, in descending order. 0 is
/// the expiry itself.
pub const EXPIRY_WARNINGS: [i16; 6] = [30, 14, 7, 3, 1, 0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_names_round_trip() {
        for result in VerificationResult::ALL {
            assert_eq!(result.as_str().parse(), Ok(result));
            assert_eq!(serde_json::to_value(result).unwrap(), result.as_str());
        }
        assert!("ok".parse::<VerificationResult>().is_err());
    }

    #[test]
    fn interval_is_five_minutes_to_thirty_days() {
        for (seconds, good) in [(299, false), (300, true), (2_592_000, true), (2_592_001, false), (i64::MAX, false)] {
            assert_eq!(VerifyInterval::from_seconds(seconds).is_ok(), good, "{seconds}");
        }
    }
}
