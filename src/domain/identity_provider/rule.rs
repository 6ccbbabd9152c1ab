//! A rule: who bears such claims has this role and these grants.

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

/// The most claims of one rule.
const CLAIMS_MAX: usize = 20;
/// The longest name of a claim, in bytes.
const NAME_MAX: usize = 128;
/// The longest value of a claim, in bytes.
const VALUE_MAX: usize = 1024;

/// Claims that are checked for every token, or that are other ones each time: none says who the bearer is.
const NOT_BINDING: [&str; 6] = ["iss", "aud", "exp", "nbf", "iat", "jti"];

/// What the bearer of a token is if all of these claims match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Claims that must be there with these values; at least one.
    pub claims: BTreeMap<String, String>,
    /// What he may do.
    pub role: Role,
    /// What he reaches.
    pub grants: Grants,
}

/// What the bearer of a token is if all of these claims match: in requests, answers and the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = IdentityRule)]
pub struct RuleDocument {
    /// Claims that must all be there with these values, letter by letter; at least one. Numbers and booleans of a token are
    /// compared as text; of a list, one element has to match.
    #[schema(example = json!({"project_id": "42", "ref_protected": "true"}))]
    #[serde(deserialize_with = "unique::map")]
    pub claims: BTreeMap<String, String>,
    /// `operator`, `deliverer`, `renderer` or `viewer`.
    #[schema(example = "deliverer")]
    pub role: String,
    /// What he reaches.
    pub grants: Option<GrantsDocument>,
}

impl Rule {
    /// Parses a rule that stands at `field`.
    ///
    /// # Errors
    ///
    /// Every part that is refused.
    pub fn parse(field: &str, document: RuleDocument) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let RuleDocument { claims, role, grants } = document;
        if claims.is_empty() || claims.len() > CLAIMS_MAX {
            errors.refuse(&format!("{field}.claims"), "must be 1 to 20 claims: without one it would match every token");
        }
        for (name, value) in &claims {
            let shown: String = name.chars().take(100).collect();
            errors.take(&format!("{field}.claims.{shown}"), check_claim(name, value));
        }
        let role = errors.take(&format!("{field}.role"), role.parse().and_then(refuse_admin));
        let grants = Grants::parse(role.unwrap_or(Role::Viewer), grants.unwrap_or_default());
        let grants = errors.take_all(grants.map_err(|refused| below(field, refused)));
        errors.finish(|| Some(Self { claims, role: role?, grants: grants? }))
    }

    /// Whether all of its claims match.
    #[must_use]
    pub fn matches(&self, claims: &Claims) -> bool {
        self.claims.iter().all(|(name, wanted)| claims.has(name, wanted))
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
        return Err(Invalid::new("must be the name of a claim, of at most 128 bytes"));
    }
    if NOT_BINDING.contains(&name) {
        return Err(Invalid::new("tells nobody from anybody else: it is checked by itself, or another one each time"));
    }
    if value.is_empty() || value.len() > VALUE_MAX {
        return Err(Invalid::new("must have a value of 1 to 1024 bytes"));
    }
    Ok(())
}

/// An admin's right would follow from what somebody else writes into a token, and grants could not narrow it.
fn refuse_admin(role: Role) -> Result<Role, Invalid> {
    match role {
        Role::Admin => Err(Invalid::new("must be operator, deliverer, renderer or viewer: an admin needs an API key")),
        role => Ok(role),
    }
}

fn below(field: &str, refused: Vec<FieldError>) -> Vec<FieldError> {
    refused.into_iter().map(|error| FieldError::new(format!("{field}.{}", error.field), error.detail)).collect()
}
