//! Detects rules that match tokens of unrelated parties.
//!
//! Anyone can obtain a token of a public issuer, so a rule must name the party that it trusts.

use super::{AuthMethod, Issuer, Rule};

/// GitHub's issuer. A repository chooses the template of its `sub`.
const GITHUB: &str = "token.actions.githubusercontent.com";

/// Public issuers, and the claims that identify the owner of a token. A rule must have at least one
/// of them.
///
/// Other claims do not identify an owner: every project can have an environment named `production`
/// or a protected branch, and every project can call a reusable workflow (`job_workflow_ref`).
const PUBLIC_ISSUERS: [(&str, &[&str]); 5] = [
    (GITHUB, &["repository_id", "repository_owner_id", "sub", "repository", "repository_owner"]),
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

/// First parts of GitHub's `sub` that identify the owner.
const GITHUB_SUBJECTS: [&str; 5] =
    ["repo:", "repository_id:", "repository_owner_id:", "repository:", "repository_owner:"];

/// Claims that a `TokenReview` yields for a `ServiceAccount` token.
const REVIEW_CLAIMS: [&str; 6] = ["namespace", "serviceAccount", "serviceAccountUid", "podName", "podUid", "nodeName"];

/// Returns why a rule matches tokens of unrelated parties, or no token: the field below the rule,
/// and the reason.
pub(super) fn weakness(method: &AuthMethod, rule: &Rule) -> Option<(String, String)> {
    match method {
        AuthMethod::Oidc { issuer, .. } => weakness_for_issuer(issuer, rule),
        AuthMethod::TokenReview { .. } => weakness_for_cluster(rule),
    }
}

/// A rule for a public issuer must identify the owner of the token.
fn weakness_for_issuer(issuer: &Issuer, rule: &Rule) -> Option<(String, String)> {
    let host = issuer.host();
    let (_, identifying) = PUBLIC_ISSUERS.iter().find(|(public, _)| *public == host)?;
    let mut present = identifying.iter().filter(|claim| rule.claims.contains_key(**claim)).peekable();
    if present.peek().is_none() {
        let reason = format!(
            "must identify the owner of the token, because anyone can obtain one from {host}: add one of {}",
            identifying.join(", ")
        );
        return Some(("claims".to_owned(), reason));
    }
    let has_only_subject = present.all(|claim| *claim == "sub");
    let subject = rule.claims.get("sub").filter(|_| host == GITHUB && has_only_subject)?;
    (!names_owner_on_github(subject)).then(|| {
        let reason = "must begin with the repository or its owner, such as `repo:acme/app:`, because every repository \
                      chooses the other parts of its `sub`: add `repository_id` instead";
        ("claims.sub".to_owned(), reason.to_owned())
    })
}

/// Whether a `sub` of GitHub begins with the token's repository or its owner. The values of later
/// parts, such as an environment's name, are free text.
fn names_owner_on_github(subject: &str) -> bool {
    GITHUB_SUBJECTS.iter().any(|start| {
        let value = subject.strip_prefix(start).and_then(|rest| rest.split(':').next());
        value.is_some_and(|value| {
            let parts = value.split('/').filter(|part| !part.is_empty() && !part.contains('*'));
            let is_id = value.bytes().all(|byte| byte.is_ascii_digit());
            match *start {
                "repo:" | "repository:" => parts.count() == 2,
                "repository_owner:" => parts.count() == 1,
                _ => is_id && !value.is_empty(),
            }
        })
    })
}

/// A rule for reviewed tokens must name the namespace, since every namespace has a
/// `ServiceAccount` named `default`, and no unknown claim.
fn weakness_for_cluster(rule: &Rule) -> Option<(String, String)> {
    if let Some(claim) = rule.claims.keys().find(|claim| !REVIEW_CLAIMS.contains(&claim.as_str())) {
        let claim: String = claim.chars().take(100).collect();
        let reason = format!("is not a claim of a reviewed token: use {}", REVIEW_CLAIMS.join(", "));
        return Some((format!("claims.{claim}"), reason));
    }
    (!rule.claims.contains_key("namespace")).then(|| {
        let reason = "must include `namespace`: the same ServiceAccount name exists in many namespaces";
        ("claims".to_owned(), reason.to_owned())
    })
}
