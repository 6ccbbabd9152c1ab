//! Minted accounts: logins that regcred requests from a provider and replaces before they expire.
//!
//! A [`Source`] says where a login comes from and under which identity it is requested. A mint
//! returns a [`Minted`] login or a [`MintError`], whose reason is one of a fixed list.

pub mod aws;
mod document;
mod key_file;
mod parse;
mod reason;
pub mod schedule;
mod source;
mod stored;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

pub use self::{
    document::{
        AssumeRoleDocument, ClientAuthentication, IdentityDocument, IdentityInAnswers, IdentityType, SourceDocument,
        SourceInAnswers, SourceType,
    },
    reason::{MintError, MintReason},
    source::{
        AZURE_USERNAME, AssumeRole, AwsIdentity, AzureIdentity, AzureSource, ECR_USERNAME, EcrSource, GOOGLE_USERNAME,
        GoogleIdentity, GoogleSource, NewSource, OAuth2Source, Provider, Source, WebIdentity,
    },
    stored::StoredSource,
};
use crate::domain::account::{Password, Username};

/// Login that a provider issued.
#[derive(Debug, Clone)]
pub struct Minted {
    /// User name of the login.
    pub username: Username,
    /// Password or token.
    pub password: Password,
    /// Validity of the login.
    pub validity: Validity,
}

/// Validity of a minted login.
#[derive(Debug, Clone, Copy)]
pub struct Validity {
    /// Validity that was left when the answer arrived, by the provider's clock.
    pub lifetime: Duration,
    /// Arrival of the answer.
    pub received_at: Instant,
}

impl Validity {
    /// Returns the validity that is left.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.lifetime.saturating_sub(self.received_at.elapsed())
    }

    /// Returns the delay until the next mint.
    #[must_use]
    pub fn refresh_after(&self) -> Duration {
        schedule::refresh_after(self.lifetime, fastrand::f64()).saturating_sub(self.received_at.elapsed())
    }
}

/// State of a minted account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum MintState {
    /// The login is valid, and the last mint succeeded.
    Valid,
    /// The login is valid, but the last mint failed.
    Failing,
    /// The login has expired.
    Expired,
}

impl MintState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Valid, Self::Failing, Self::Expired];

    /// Returns the name in the API and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Failing => "failing",
            Self::Expired => "expired",
        }
    }
}

/// Failure of the last mint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastError {
    /// Reason.
    pub reason: MintReason,
    /// Explanation and remedy. Contains no text of the provider.
    pub detail: String,
}

/// What a minted account shows of its mints. Times are the database's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mint {
    /// Source of the login.
    pub source: StoredSource,
    /// Number of mints, each of which replaces the login; 0 in a dry run, which mints none.
    pub serial: i64,
    /// Time of the last successful mint.
    pub minted_at: DateTime<Utc>,
    /// End of the login.
    pub valid_until: DateTime<Utc>,
    /// Planned time of the next mint.
    pub refresh_at: DateTime<Utc>,
    /// Time of the next attempt, which is later than `refresh_at` after a failure.
    pub next_attempt_at: DateTime<Utc>,
    /// Failure of the last mint; none after a success.
    pub last_error: Option<LastError>,
    /// Whether the login had expired when the row was read.
    pub is_expired: bool,
}

impl Mint {
    /// Returns the state when the row was read.
    #[must_use]
    pub const fn state(&self) -> MintState {
        match (self.is_expired, &self.last_error) {
            (true, _) => MintState::Expired,
            (false, Some(_)) => MintState::Failing,
            (false, None) => MintState::Valid,
        }
    }
}
