//! Identity providers: whose tokens are taken in place of API keys, and what they stand for.
//!
//! A provider says who vouches for a token (an OIDC issuer, or a cluster that reviews it), for whom the token must have been
//! made (the audience), and by its rules who the bearer is here.

mod issuer;
mod lint;
mod rule;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::{
    issuer::Issuer,
    rule::{Rule, RuleDocument},
};
use crate::domain::{
    cluster::CaCertificate,
    invalid::{FieldError, FieldErrors, Invalid},
    names::Name,
};

/// The most rules of one provider.
const RULES_MAX: usize = 100;
/// The longest audience, in bytes.
const AUDIENCE_MAX: usize = 256;

/// How the tokens of a provider are verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ProviderType {
    /// By the keys that the issuer publishes.
    Oidc,
    /// By asking the cluster that made them.
    TokenReview,
}

impl ProviderType {
    /// The name in the API and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Oidc => "oidc",
            Self::TokenReview => "tokenReview",
        }
    }
}

impl fmt::Display for ProviderType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ProviderType {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        let known = [Self::Oidc, Self::TokenReview].into_iter().find(|kind| kind.as_str() == name);
        known.ok_or_else(|| Invalid::new("must be oidc or tokenReview"))
    }
}

/// Whom a token must have been made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audience(String);

impl Audience {
    /// Checks an audience.
    ///
    /// # Errors
    ///
    /// It is empty, too long, or not of visible ASCII.
    pub fn parse(audience: &str) -> Result<Self, Invalid> {
        if audience.is_empty() {
            return Err(Invalid::new("must not be empty: a token that was made for somebody else is never taken"));
        }
        if audience.len() > AUDIENCE_MAX || !audience.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Invalid::new("must be at most 256 visible ASCII characters without spaces"));
        }
        Ok(Self(audience.to_owned()))
    }

    /// The audience as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Who vouches for a provider's tokens.
#[derive(Debug, Clone)]
pub enum Voucher {
    /// An OIDC issuer, with its keys.
    Oidc {
        /// The `iss` of its tokens, letter by letter.
        issuer: Issuer,
        /// Who signs the issuer's TLS certificate, beside the authorities that this host trusts.
        ca_certificate: Option<CaCertificate>,
    },
    /// The cluster of this name, by a `TokenReview`.
    TokenReview {
        /// Name of the cluster.
        cluster: Name,
    },
}

impl Voucher {
    /// How tokens are verified.
    #[must_use]
    pub const fn provider_type(&self) -> ProviderType {
        match self {
            Self::Oidc { .. } => ProviderType::Oidc,
            Self::TokenReview { .. } => ProviderType::TokenReview,
        }
    }
}

/// A provider as a caller describes it: nothing of it is checked.
#[derive(Debug, Clone)]
pub struct ProviderDocument {
    /// How tokens are verified.
    pub provider_type: ProviderType,
    /// For `oidc`.
    pub issuer: Option<String>,
    /// For `oidc`.
    pub ca_certificate: Option<String>,
    /// For `tokenReview`.
    pub cluster: Option<String>,
    /// Whom tokens must have been made for.
    pub audience: String,
    /// Who bearers are, in the order in which it is tried.
    pub rules: Vec<RuleDocument>,
}

/// A provider, without its name.
#[derive(Debug, Clone)]
pub struct ProviderConfig {
    /// Who vouches for its tokens.
    pub voucher: Voucher,
    /// Whom its tokens must have been made for.
    pub audience: Audience,
    /// Who bearers are: the first rule that matches decides.
    pub rules: Vec<Rule>,
}

impl ProviderConfig {
    /// Checks the parts and that they fit together.
    ///
    /// # Errors
    ///
    /// Every field that is missing, refused or too much.
    pub fn parse(document: ProviderDocument) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let ProviderDocument { provider_type, issuer, ca_certificate, cluster, audience, rules } = document;
        let given =
            [("issuer", issuer.is_some()), ("caCertificate", ca_certificate.is_some()), ("cluster", cluster.is_some())];
        for (field, is_given) in given {
            let (belongs, is_needed) = match provider_type {
                ProviderType::Oidc => (field != "cluster", field == "issuer"),
                ProviderType::TokenReview => (field == "cluster", field == "cluster"),
            };
            match (belongs, is_needed, is_given) {
                (_, true, false) => errors.refuse(field, "is missing for this type"),
                (false, _, true) => errors.refuse(field, "does not belong to this type"),
                _ => {}
            }
        }
        let audience = errors.take("audience", Audience::parse(&audience));
        let ca_certificate =
            errors.take("caCertificate", ca_certificate.as_deref().map(CaCertificate::parse).transpose());
        let issuer = issuer.and_then(|issuer| errors.take("issuer", Issuer::parse(&issuer)));
        let cluster = cluster.and_then(|cluster| errors.take("cluster", Name::parse(&cluster)));
        let rules = rules_of(&mut errors, rules);
        if let Some(rules) = &rules {
            match provider_type {
                ProviderType::Oidc => {
                    if let Some(issuer) = &issuer {
                        lint::bind_identity(&mut errors, issuer, rules);
                    }
                }
                ProviderType::TokenReview => lint::bind_namespace(&mut errors, rules),
            }
        }
        errors.finish(|| {
            let voucher = match provider_type {
                ProviderType::Oidc => Voucher::Oidc { issuer: issuer?, ca_certificate: ca_certificate? },
                ProviderType::TokenReview => Voucher::TokenReview { cluster: cluster? },
            };
            Some(Self { voucher, audience: audience?, rules: rules? })
        })
    }
}

fn rules_of(errors: &mut FieldErrors, rules: Vec<RuleDocument>) -> Option<Vec<Rule>> {
    if rules.is_empty() || rules.len() > RULES_MAX {
        errors.refuse("rules", "must be 1 to 100 rules: without one nobody is let in");
        return None;
    }
    // All of them first, so that every refused one is named.
    let parsed = rules.into_iter().enumerate();
    let parsed: Vec<Option<Rule>> =
        parsed.map(|(index, rule)| errors.take_all(Rule::parse(&format!("rules[{index}]"), rule))).collect();
    parsed.into_iter().collect()
}

#[cfg(test)]
mod tests;
