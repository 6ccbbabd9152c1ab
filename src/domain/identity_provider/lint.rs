//! Rejects rules that match tokens of unrelated parties.
//!
//! Anyone can obtain a token of a public issuer, so a rule must name the party that it trusts.

use super::{Issuer, Rule};
use crate::domain::invalid::FieldErrors;

/// Public issuers, and the claims that identify the owner of a token. A rule must have at least one
/// of them.
///
/// Other claims do not identify an owner: every project can have an environment named `production`
/// or a protected branch, and every project can call a reusable workflow (`job_workflow_ref`).
const PUBLIC_ISSUERS: [(&str, &[&str]); 5] = [
    (
        "token.actions.githubusercontent.com",
        &["repository_id", "repository_owner_id", "sub", "repository", "repository_owner"],
    ),
    ("gitlab.com", &["project_id", "namespace_id", "sub", "project_path", "namespace_path"]),
    ("agent.buildkite.com", &["pipeline_id", "organization_id", "sub", "organization_slug"]),
    (
        "app.terraform.io",
        &[
            "terraform_workspace_id",
            "terraform_project_id",
            "terraform_organization_id",
            "sub",
            "terraform_organization_name",
        ],
    ),
    ("accounts.google.com", &["sub"]),
];

/// Claims that a `TokenReview` yields for a `ServiceAccount` token.
const REVIEW_CLAIMS: [&str; 6] = ["namespace", "serviceAccount", "serviceAccountUid", "podName", "podUid", "nodeName"];

/// Rejects rules for a public issuer that do not identify the owner of the token.
pub(super) fn require_identity_claims(errors: &mut FieldErrors, issuer: &Issuer, rules: &[Rule]) {
    let host = issuer.host();
    let Some((_, identifying)) = PUBLIC_ISSUERS.iter().find(|(public, _)| *public == host) else { return };
    for (index, rule) in rules.iter().enumerate() {
        if !identifying.iter().any(|claim| rule.claims.contains_key(*claim)) {
            errors.refuse(
                &format!("rules[{index}].claims"),
                format!(
                    "must identify the owner of the token, because anyone can obtain one from {host}: add one of {}",
                    identifying.join(", ")
                ),
            );
        }
    }
}

/// Rejects rules for reviewed tokens that name unknown claims or lack `namespace`: every namespace
/// has a `ServiceAccount` named `default`.
pub(super) fn require_namespace_claims(errors: &mut FieldErrors, rules: &[Rule]) {
    for (index, rule) in rules.iter().enumerate() {
        for claim in rule.claims.keys().filter(|claim| !REVIEW_CLAIMS.contains(&claim.as_str())) {
            let claim: String = claim.chars().take(100).collect();
            errors.refuse(
                &format!("rules[{index}].claims.{claim}"),
                format!("is not a claim of a reviewed token: use {}", REVIEW_CLAIMS.join(", ")),
            );
        }
        if !rule.claims.contains_key("namespace") {
            errors.refuse(
                &format!("rules[{index}].claims"),
                "must include `namespace`: the same ServiceAccount name exists in many namespaces",
            );
        }
    }
}
