//! Identity providers: issuers whose tokens authenticate callers in place of API keys.
//!
//! A provider has three parts:
//!
//! - the [`AuthMethod`] that verifies a token: the keys of an OIDC issuer, or a `TokenReview` of a
//!   cluster;
//! - the [`Audience`] that a token must contain;
//! - the [`Rule`]s that map the claims of a token to a role and grants.
//!
//! People sign in to the web console through an issuer where regcred is a client ([`ClientId`]).

mod audience;
mod issuer;
mod lint;
mod login;
mod rule;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::{
    audience::{Audience, api_server_audience},
    issuer::Issuer,
    login::{ClientId, LoginClient},
    rule::{Rule, RuleDocument},
};
use crate::domain::{
    cluster::CaCertificate,
    invalid::{FieldError, FieldErrors, Invalid},
    names::Name,
    token::{Claims, PresentedToken, is_special_type, normalize_type},
};

/// Maximum number of rules per provider.
const RULES_MAX: usize = 100;
/// Maximum number of token types per provider.
const TOKEN_TYPES_MAX: usize = 10;
/// Maximum length of a token type, in bytes.
const TOKEN_TYPE_MAX: usize = 128;

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

/// Authentication method of a provider, with its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Whether tokens with further audiences are accepted.
    pub allow_multiple_audiences: bool,
    /// Values of `typ` for other purposes than access that are accepted.
    pub token_types: Vec<String>,
    /// Rules, in order of evaluation.
    pub rules: Vec<RuleDocument>,
    /// Id of the client for signing in; `oidc` only.
    pub login: Option<String>,
}

/// Validated configuration of a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderConfig {
    /// Method that verifies tokens.
    pub auth_method: AuthMethod,
    /// Required audience.
    pub audience: Audience,
    /// Whether tokens with further audiences are accepted. A service that received such a token
    /// can use it here.
    pub allow_multiple_audiences: bool,
    /// Values of `typ` for other purposes than access that are accepted, in lower case.
    pub token_types: Vec<String>,
    /// Rules, in order of evaluation.
    pub rules: Vec<Rule>,
    /// Client for signing in. Its secret is stored apart.
    pub login: Option<ClientId>,
}

/// Reason why a provider refuses the form of a token, before it is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormError {
    /// The token has further audiences.
    Audiences,
    /// The token was issued for another purpose than access.
    TokenType,
}

impl ProviderConfig {
    /// Validates every field and their combination, and refuses what would let unrelated parties
    /// in.
    ///
    /// # Errors
    ///
    /// Every missing, invalid or inapplicable field.
    pub fn parse(document: ProviderDocument) -> Result<Self, Vec<FieldError>> {
        let config = Self::parse_stored(document)?;
        let mut errors = FieldErrors::default();
        let reviews_tokens = matches!(config.auth_method, AuthMethod::TokenReview { .. });
        if reviews_tokens && config.audience.is_of_api_servers() {
            errors.refuse("audience", api_server_audience());
        }
        for (index, rule) in config.rules.iter().enumerate() {
            if let Some((field, reason)) = lint::weakness(&config.auth_method, rule) {
                errors.refuse(&format!("rules[{index}].{field}"), reason);
            }
        }
        errors.finish(|| Some(config))
    }

    /// Validates every field and their combination. A provider that was stored by an older version
    /// may have rules that let unrelated parties in; these match no token.
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse).
    pub fn parse_stored(document: ProviderDocument) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let ProviderDocument {
            provider_type,
            issuer,
            ca_certificate,
            cluster,
            audience,
            allow_multiple_audiences,
            token_types,
            rules,
            login,
        } = document;
        let present = [
            ("issuer", issuer.is_some()),
            ("caCertificate", ca_certificate.is_some()),
            ("cluster", cluster.is_some()),
            ("login", login.is_some()),
        ];
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
        let token_types = parse_token_types(&mut errors, &token_types);
        let rules = parse_rules(&mut errors, rules);
        let login = errors.take("login.clientId", login.as_deref().map(ClientId::parse).transpose());
        errors.finish(|| {
            let auth_method = match provider_type {
                ProviderType::Oidc => AuthMethod::Oidc { issuer: issuer?, ca_certificate: ca_certificate? },
                ProviderType::TokenReview => AuthMethod::TokenReview { cluster: cluster? },
            };
            let (audience, token_types, rules, login) = (audience?, token_types?, rules?, login?);
            Some(Self { auth_method, audience, allow_multiple_audiences, token_types, rules, login })
        })
    }

    /// Checks the form of a token that has the provider's audience.
    ///
    /// # Errors
    ///
    /// The provider does not accept further audiences, or the purpose of the token.
    pub fn check_form(&self, token: &PresentedToken) -> Result<(), FormError> {
        if !self.allow_multiple_audiences && token.claims.audiences().len() > 1 {
            return Err(FormError::Audiences);
        }
        match token.special_type() {
            Some(special) if !self.token_types.iter().any(|accepted| accepted == special) => Err(FormError::TokenType),
            _ => Ok(()),
        }
    }

    /// Returns the first rule that matches verified claims. A rule that would let unrelated parties
    /// in matches none.
    #[must_use]
    pub fn matching_rule(&self, claims: &Claims) -> Option<&Rule> {
        let mut matching = self.rules.iter().filter(|rule| rule.matches(claims));
        matching.find(|rule| lint::weakness(&self.auth_method, rule).is_none())
    }

    /// Whether the provider accepts tokens that every pod has.
    #[must_use]
    pub fn accepts_every_pod(&self) -> bool {
        matches!(self.auth_method, AuthMethod::TokenReview { .. }) && self.audience.is_of_api_servers()
    }
}

fn parse_token_types(errors: &mut FieldErrors, token_types: &[String]) -> Option<Vec<String>> {
    let normalized: Vec<String> = token_types.iter().map(|token_type| normalize_type(token_type)).collect();
    let is_usable = |token_type: &String| {
        let is_text = token_type.len() <= TOKEN_TYPE_MAX && token_type.bytes().all(|byte| byte.is_ascii_graphic());
        is_text && token_type != "+jwt" && is_special_type(token_type)
    };
    if normalized.len() > TOKEN_TYPES_MAX || !normalized.iter().all(is_usable) {
        let reason = "must be at most 10 types such as `secevent+jwt`: tokens without a type, and with the types `JWT` and \
                      `at+jwt`, are always accepted";
        errors.refuse("tokenTypes", reason);
        return None;
    }
    Some(normalized)
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
