//! Rules that map the claims of a token to a role and grants.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::{
    caller::Role,
    grants::{Grants, GrantsDocument},
    invalid::{FieldError, FieldErrors, Invalid},
    token::Claims,
    unique,
};

/// Maximum number of claims per rule.
const CLAIMS_MAX: usize = 20;
/// Maximum length of a claim's name, in bytes.
const NAME_MAX: usize = 128;
/// Maximum length of a claim's value, in bytes.
const VALUE_MAX: usize = 1024;

/// Claims that do not identify the bearer: they are verified for every token or differ per token.
const NOT_IDENTIFYING: [&str; 6] = ["iss", "aud", "exp", "nbf", "iat", "jti"];

/// Role and grants of the bearers of matching tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Required claims; at least one.
    pub claims: BTreeMap<String, String>,
    /// Role of the bearer.
    pub role: Role,
    /// Resources that the bearer can access.
    pub grants: Grants,
}

/// Role and grants of the bearers of matching tokens. A rule matches if all of its claims match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = IdentityRule)]
pub struct RuleDocument {
    /// Required claims with their exact values; at least one.
    ///
    /// Numbers and booleans of a token are compared as text. A list matches if one of its elements
    /// does.
    #[schema(example = json!({"project_id": "42", "ref_protected": "true"}))]
    #[serde(deserialize_with = "unique::map")]
    pub claims: BTreeMap<String, String>,
    /// Role of the bearer: `operator`, `deliverer`, `renderer` or `viewer`.
    #[schema(value_type = Role, example = "deliverer")]
    pub role: String,
    /// Resources that the bearer can access.
    pub grants: Option<GrantsDocument>,
}

impl Rule {
    /// Validates a rule. `field` is its JSON path.
    ///
    /// # Errors
    ///
    /// Every invalid part, with its JSON path.
    pub fn parse(field: &str, document: RuleDocument) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let RuleDocument { claims, role, grants } = document;
        if claims.is_empty() || claims.len() > CLAIMS_MAX {
            errors.refuse(
                &format!("{field}.claims"),
                "must have 1 to 20 claims: a rule without claims would match every token",
            );
        }
        for (name, value) in &claims {
            let shown: String = name.chars().take(100).collect();
            errors.take(&format!("{field}.claims.{shown}"), check_claim(name, value));
        }
        let role = errors.take(&format!("{field}.role"), role.parse().and_then(reject_admin));
        let grants = Grants::parse_new(role.unwrap_or(Role::Viewer), grants.unwrap_or_default());
        let grants = errors.take_all(grants.map_err(|errors| with_prefix(field, errors)));
        errors.finish(|| Some(Self { claims, role: role?, grants: grants? }))
    }

    /// Whether the token has all claims of the rule.
    #[must_use]
    pub fn matches(&self, claims: &Claims) -> bool {
        self.claims.iter().all(|(name, value)| claims.has(name, value))
    }
}

impl From<&Rule> for RuleDocument {
    fn from(rule: &Rule) -> Self {
        Self {
            claims: rule.claims.clone(),
            role: rule.role.as_str().to_owned(),
            grants: Some(GrantsDocument::from(&rule.grants)),
        }
    }
}

fn check_claim(name: &str, value: &str) -> Result<(), Invalid> {
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(Invalid::new("must be the name of a claim with at most 128 bytes"));
    }
    if NOT_IDENTIFYING.contains(&name) {
        return Err(Invalid::new("does not identify the bearer: use another claim, such as `sub`"));
    }
    if value.is_empty() || value.len() > VALUE_MAX {
        return Err(Invalid::new("must have a value of 1 to 1024 bytes"));
    }
    Ok(())
}

/// Rejects `admin`: the issuer would decide about administrators, and grants cannot restrict the
/// role.
fn reject_admin(role: Role) -> Result<Role, Invalid> {
    match role {
        Role::Admin => Err(Invalid::new(
            "must be operator, deliverer, renderer or viewer: only an API key can have the role admin",
        )),
        role => Ok(role),
    }
}

fn with_prefix(field: &str, errors: Vec<FieldError>) -> Vec<FieldError> {
    errors.into_iter().map(|error| FieldError::new(format!("{field}.{}", error.field), error.detail)).collect()
}
