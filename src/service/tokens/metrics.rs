//! What is counted of tokens, for the metrics.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::clients::oidc::IssuerClient;

/// What became of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenOutcome {
    /// A rule says who its bearer is.
    Accepted,
    /// It is no token, or says no end.
    Malformed,
    /// Its end is past.
    Expired,
    /// Its begin is to come.
    Early,
    /// No provider has its issuer and audience.
    UnknownProvider,
    /// It is signed in a way that is not taken, or not at all.
    Algorithm,
    /// Its issuer has no such key, or not for this algorithm.
    UnknownKey,
    /// The key did not sign it.
    Signature,
    /// The cluster does not vouch for it.
    NotVouchedFor,
    /// It is valid, and no rule matches.
    NoRule,
    /// Whoever vouches for it does not answer.
    Unavailable,
}

impl TokenOutcome {
    /// All outcomes.
    pub const ALL: [Self; 11] = [
        Self::Accepted,
        Self::Malformed,
        Self::Expired,
        Self::Early,
        Self::UnknownProvider,
        Self::Algorithm,
        Self::UnknownKey,
        Self::Signature,
        Self::NotVouchedFor,
        Self::NoRule,
        Self::Unavailable,
    ];

    /// The name in the log and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Malformed => "malformed",
            Self::Expired => "expired",
            Self::Early => "early",
            Self::UnknownProvider => "unknownProvider",
            Self::Algorithm => "algorithm",
            Self::UnknownKey => "unknownKey",
            Self::Signature => "signature",
            Self::NotVouchedFor => "notVouchedFor",
            Self::NoRule => "noRule",
            Self::Unavailable => "unavailable",
        }
    }
}

/// The counts of one process.
#[derive(Debug)]
pub struct TokenMetrics {
    issuers: Arc<IssuerClient>,
    tokens: [AtomicU64; TokenOutcome::ALL.len()],
}

impl TokenMetrics {
    pub(super) fn new(issuers: Arc<IssuerClient>) -> Self {
        Self { issuers, tokens: <[AtomicU64; TokenOutcome::ALL.len()]>::default() }
    }

    pub(super) fn count(&self, outcome: TokenOutcome) {
        self.tokens[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many tokens came to what.
    pub fn tokens(&self) -> impl Iterator<Item = (&'static str, u64)> {
        TokenOutcome::ALL.map(|one| (one.as_str(), self.tokens[one as usize].load(Ordering::Relaxed))).into_iter()
    }

    /// How many fetches of issuers' keys came to what.
    pub fn fetches(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.issuers.metrics().fetches()
    }
}
