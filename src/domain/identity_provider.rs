//! Identity providers: issuers whose tokens authenticate callers in place of API keys.
//!
//! A provider has three parts:
//!
//! - the [`AuthMethod`] that verifies a token: the keys of an OIDC issuer, or a `TokenReview` of a
//!   cluster;
//! - the [`Audience`] that a token must contain;
//! - the [`Rule`]s that map the claims of a token to a role and grants.

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

/// Maximum number of rules per provider.
const RULES_MAX: usize = 100;
/// Maximum length of an audience, in bytes.
const AUDIENCE_MAX: usize = 256;

/// Method that verifies the tokens of a provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ProviderType {
    /// Signature check with the keys that the OIDC issuer publishes.
    Oidc,
    /// `TokenReview` by the cluster that issued the token.
    TokenReview,
}

impl ProviderType {
    /// Returns the name in the API and in the database.
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

/// Value that a token must contain in `aud`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audience(String);

impl Audience {
    /// Parses an audience.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the audience is empty, too long, or not visible ASCII.
    pub fn parse(audience: &str) -> Result<Self, Invalid> {
        if audience.is_empty() {
            return Err(Invalid::new("must not be empty: tokens for other audiences are never accepted"));
        }
        if audience.len() > AUDIENCE_MAX || !audience.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Invalid::new("must be at most 256 visible ASCII characters without spaces"));
        }
        Ok(Self(audience.to_owned()))
    }

    /// Returns the audience as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Authentication method of a provider, with its parameters.
#[derive(Debug, Clone)]
pub enum AuthMethod {
    /// Signature check with the keys of an OIDC issuer.
    Oidc {
        /// Exact `iss` of the tokens.
        issuer: Issuer,
        /// CA of the issuer's TLS certificate, trusted in addition to the host's trust store.
        ca_certificate: Option<CaCertificate>,
    },
    /// `TokenReview` by a registered cluster.
    TokenReview {
        /// Name of the cluster.
        cluster: Name,
    },
}

impl AuthMethod {
    /// Returns the type of the method.
    #[must_use]
    pub const fn provider_type(&self) -> ProviderType {
        match self {
            Self::Oidc { .. } => ProviderType::Oidc,
            Self::TokenReview { .. } => ProviderType::TokenReview,
        }
    }
}

/// Configuration of a provider, not yet validated.
#[derive(Debug, Clone)]
pub struct ProviderDocument {
    /// Method that verifies tokens.
    pub provider_type: ProviderType,
    /// Exact `iss` of the tokens; `oidc` only.
    pub issuer: Option<String>,
    /// PEM of the CA of the issuer's TLS certificate; `oidc` only.
    pub ca_certificate: Option<String>,
    /// Name of the cluster; `tokenReview` only.
    pub cluster: Option<String>,
    /// Required audience.
    pub audience: String,
    /// Rules, in order of evaluation.
    pub rules: Vec<RuleDocument>,
}

/// Validated configuration of a provider.
#[derive(Debug, Clone)]
pub struct ProviderConfig {
    /// Method that verifies tokens.
    pub auth_method: AuthMethod,
    /// Required audience.
    pub audience: Audience,
    /// Rules, in order of evaluation: the first match applies.
    pub rules: Vec<Rule>,
}

impl ProviderConfig {
    /// Validates every field and their combination.
    ///
    /// # Errors
    ///
    /// Every missing, invalid or inapplicable field.
    pub fn parse(document: ProviderDocument) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let ProviderDocument { provider_type, issuer, ca_certificate, cluster, audience, rules } = document;
        let present =
            [("issuer", issuer.is_some()), ("caCertificate", ca_certificate.is_some()), ("cluster", cluster.is_some())];
        for (field, is_present) in present {
            let (is_allowed, is_required) = match provider_type {
                ProviderType::Oidc => (field != "cluster", field == "issuer"),
                ProviderType::TokenReview => (field == "cluster", field == "cluster"),
            };
            match (is_allowed, is_required, is_present) {
                (_, true, false) => errors.refuse(field, "is required for this type"),
                (false, _, true) => errors.refuse(field, "is not allowed for this type"),
                _ => {}
            }
        }
        let audience = errors.take("audience", Audience::parse(&audience));
        let ca_certificate =
            errors.take("caCertificate", ca_certificate.as_deref().map(CaCertificate::parse).transpose());
        let issuer = issuer.and_then(|issuer| errors.take("issuer", Issuer::parse(&issuer)));
        let cluster = cluster.and_then(|cluster| errors.take("cluster", Name::parse(&cluster)));
        let rules = parse_rules(&mut errors, rules);
        if let Some(rules) = &rules {
            match provider_type {
                ProviderType::Oidc => {
                    if let Some(issuer) = &issuer {
                        lint::require_identity_claims(&mut errors, issuer, rules);
                    }
                }
                ProviderType::TokenReview => lint::require_namespace_claims(&mut errors, rules),
            }
        }
        errors.finish(|| {
            let auth_method = match provider_type {
                ProviderType::Oidc => AuthMethod::Oidc { issuer: issuer?, ca_certificate: ca_certificate? },
                ProviderType::TokenReview => AuthMethod::TokenReview { cluster: cluster? },
            };
            Some(Self { auth_method, audience: audience?, rules: rules? })
        })
    }
}

fn parse_rules(errors: &mut FieldErrors, rules: Vec<RuleDocument>) -> Option<Vec<Rule>> {
    if rules.is_empty() || rules.len() > RULES_MAX {
        errors.refuse("rules", "must have 1 to 100 rules: a token without a matching rule is rejected");
        return None;
    }
    // Parse every rule before returning, to report all errors.
    let parsed = rules.into_iter().enumerate();
    let parsed: Vec<Option<Rule>> =
        parsed.map(|(index, rule)| errors.take_all(Rule::parse(&format!("rules[{index}]"), rule))).collect();
    parsed.into_iter().collect()
}

#[cfg(test)]
mod tests;
