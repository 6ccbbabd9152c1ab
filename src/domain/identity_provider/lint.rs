//! Rules that are too wide to be meant: where anybody can have tokens of an issuer, a rule has to say whose it means.

use super::{Issuer, Rule};
use crate::domain::invalid::FieldErrors;

/// Hosts whose tokens anybody in the world can have, and the claims of which one at least says whose token it is.
///
/// What is not here does not bind: anybody runs a job in an environment named `production` on a protected branch.
/// A reusable workflow (`job_workflow_ref`) is called by whoever likes to.
const PUBLIC: [(&str, &[&str]); 5] = [
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

/// What a cluster says of a `ServiceAccount`'s token.
pub(super) const REVIEWED: [&str; 6] =
    ["namespace", "serviceAccount", "serviceAccountUid", "podName", "podUid", "nodeName"];

/// Refuses rules that would let anybody in who can have a token of a public issuer.
pub(super) fn bind_identity(errors: &mut FieldErrors, issuer: &Issuer, rules: &[Rule]) {
    let host = issuer.host();
    let Some((_, binding)) = PUBLIC.iter().find(|(public, _)| *public == host) else { return };
    for (index, rule) in rules.iter().enumerate() {
        if !binding.iter().any(|claim| rule.claims.contains_key(*claim)) {
            errors.refuse(
                &format!("rules[{index}].claims"),
                format!(
                    "must say whose tokens are meant, since anybody can have one of {host}: by {}",
                    binding.join(", ")
                ),
            );
        }
    }
}

/// Refuses rules for reviewed tokens that name what no review tells, or no namespace: there is a `ServiceAccount` `default`
/// in every one.
pub(super) fn bind_namespace(errors: &mut FieldErrors, rules: &[Rule]) {
    for (index, rule) in rules.iter().enumerate() {
        for claim in rule.claims.keys().filter(|claim| !REVIEWED.contains(&claim.as_str())) {
            let claim: String = claim.chars().take(100).collect();
            errors.refuse(
                &format!("rules[{index}].claims.{claim}"),
                format!("is nothing that a cluster tells of a token; it tells {}", REVIEWED.join(", ")),
            );
        }
        if !rule.claims.contains_key("namespace") {
            errors.refuse(
                &format!("rules[{index}].claims"),
                "must name the `namespace`: ServiceAccounts of one name are in many",
            );
        }
    }
}
