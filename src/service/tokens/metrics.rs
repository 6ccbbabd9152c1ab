//! Metrics of token authentication.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::clients::oidc::IssuerClient;

/// Outcome of the authentication of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenOutcome {
    /// The token is valid and a rule matches.
    Accepted,
    /// The text is not a token, or the token has no valid expiry.
    Malformed,
    /// The token has expired.
    Expired,
    /// The token is not valid yet.
    Early,
    /// No provider has the token's issuer and audience.
    UnknownProvider,
    /// The token has further audiences, which the provider does not accept.
    Audiences,
    /// The token was issued for another purpose than access.
    TokenType,
    /// The provider's audience is one of API servers, so every pod has a token for it.
    ApiServerAudience,
    /// The signature algorithm is not supported, or the token is not signed.
    Algorithm,
    /// The issuer has no such key for this algorithm.
    UnknownKey,
    /// The signature is not valid.
    Signature,
    /// The cluster's `TokenReview` rejects the token.
    NotVouchedFor,
    /// The token is valid, but no rule matches.
    NoRule,
    /// The issuer or cluster does not respond.
    Unavailable,
}

impl TokenOutcome {
    /// All outcomes.
    pub const ALL: [Self; 14] = [
        Self::Accepted,
        Self::Malformed,
        Self::Expired,
        Self::Early,
        Self::UnknownProvider,
        Self::Audiences,
        Self::TokenType,
        Self::ApiServerAudience,
        Self::Algorithm,
        Self::UnknownKey,
        Self::Signature,
        Self::NotVouchedFor,
        Self::NoRule,
        Self::Unavailable,
    ];

    /// Returns the name in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Malformed => "malformed",
            Self::Expired => "expired",
            Self::Early => "early",
            Self::UnknownProvider => "unknownProvider",
            Self::Audiences => "audiences",
            Self::TokenType => "tokenType",
            Self::ApiServerAudience => "apiServerAudience",
            Self::Algorithm => "algorithm",
            Self::UnknownKey => "unknownKey",
            Self::Signature => "signature",
            Self::NotVouchedFor => "notVouchedFor",
            Self::NoRule => "noRule",
            Self::Unavailable => "unavailable",
        }
    }
}

/// Counters of token authentication.
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

    /// Returns the number of tokens per outcome.
    pub fn tokens(&self) -> impl Iterator<Item = (&'static str, u64)> {
        TokenOutcome::ALL
            .map(|outcome| (outcome.as_str(), self.tokens[outcome as usize].load(Ordering::Relaxed)))
            .into_iter()
    }

    /// Returns the number of fetches of issuers' keys per result.
    pub fn fetches(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.issuers.metrics().fetches()
    }
}
