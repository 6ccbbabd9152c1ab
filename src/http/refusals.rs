//! Records refused requests: caller, action, resource and reason.

use std::sync::Arc;

use actix_web::{HttpMessage, HttpRequest, http::Method, web::Data};

use crate::{
    domain::{
        audit::{Action, Resource, anonymous},
        caller::{Actor, Identity},
    },
    http::{problem::ApiError, request_meta::RequestMeta},
    service::{
        ServiceError,
        audit::{refusals::Refusal, writer::AuditWriter},
    },
};

/// Action of each route, by method and pattern.
#[rustfmt::skip]
const ACTIONS: &[(&str, &str, Action)] = &[
    ("POST",   "/v1/registry-accounts",               Action::AccountCreate),
    ("GET",    "/v1/registry-accounts",               Action::AccountRead),
    ("GET",    "/v1/registry-accounts/{name}",        Action::AccountRead),
    ("PATCH",  "/v1/registry-accounts/{name}",        Action::AccountUpdate),
    ("DELETE", "/v1/registry-accounts/{name}",        Action::AccountDelete),
    ("POST",   "/v1/registry-accounts/{name}/verify", Action::AccountVerify),
    ("POST",   "/v1/registry-accounts/{name}/mint",   Action::AccountMint),
    ("POST",   "/v1/registry-accounts:import",        Action::AccountImport),
    ("POST",   "/v1/docker-configs",                  Action::Reveal),
    ("POST",   "/v1/docker-configs/manifest",         Action::Reveal),
    ("POST",   "/v1/docker-configs/explain",          Action::Explain),
    ("POST",   "/v1/clusters",                        Action::ClusterCreate),
    ("GET",    "/v1/clusters",                        Action::ClusterRead),
    ("GET",    "/v1/clusters/{name}",                 Action::ClusterRead),
    ("PATCH",  "/v1/clusters/{name}",                 Action::ClusterUpdate),
    ("DELETE", "/v1/clusters/{name}",                 Action::ClusterDelete),
    ("POST",   "/v1/clusters/{name}/check",           Action::ClusterRead),
    ("POST",   "/v1/clusters/{cluster}/namespaces/{namespace}/secrets", Action::Deliver),
    ("GET",    "/v1/clusters/{cluster}/namespaces/{namespace}/secrets", Action::ClusterRead),
    ("GET",    "/v1/clusters/{cluster}/namespaces/{namespace}/pods", Action::PodDiagnose),
    ("POST",   "/v1/clusters/{cluster}/namespaces/{namespace}/diagnose", Action::PodDiagnose),
    ("POST",   "/v1/clusters/{cluster}/namespaces/{namespace}/pods/{pod}/diagnose", Action::PodDiagnose),
    ("POST",   "/v1/clusters/{cluster}/namespaces/{namespace}/workloads/{kind}/{name}/diagnose", Action::PodDiagnose),
    ("POST",   "/v1/clusters/{cluster}/coverage",         Action::ClusterCoverage),
    ("GET",    "/v1/clusters/{cluster}/coverage",         Action::ClusterCoverage),
    ("GET",    "/v1/clusters/{cluster}/coverage/groups",  Action::ClusterCoverage),
    ("GET",    "/v1/clusters/{cluster}/coverage/secrets", Action::ClusterCoverage),
    ("GET",    "/v1/coverage/accounts",                   Action::ClusterCoverage),
    ("POST",   "/v1/api-keys",                        Action::KeyCreate),
    ("GET",    "/v1/api-keys",                        Action::KeyRead),
    ("GET",    "/v1/api-keys/{id}",                   Action::KeyRead),
    ("DELETE", "/v1/api-keys/{id}",                   Action::KeyRevoke),
    ("POST",   "/v1/sessions",                        Action::SessionCreate),
    ("GET",    "/v1/sessions",                        Action::Other),
    ("DELETE", "/v1/sessions/{id}",                   Action::SessionEnd),
    ("DELETE", "/v1/sessions",                        Action::SessionEnd),
    ("PUT",    "/v1/pull-secrets/{name}",             Action::PullSecretDeclare),
    ("PATCH",  "/v1/pull-secrets/{name}",             Action::PullSecretDeclare),
    ("GET",    "/v1/pull-secrets",                    Action::PullSecretRead),
    ("GET",    "/v1/pull-secrets/{name}",             Action::PullSecretRead),
    ("DELETE", "/v1/pull-secrets/{name}",             Action::PullSecretDelete),
    ("GET",    "/v1/pull-secrets/{name}/targets",     Action::PullSecretRead),
    ("GET",    "/v1/pull-secrets/{name}/events",      Action::PullSecretRead),
    ("POST",   "/v1/pull-secrets/{name}/sync",        Action::PullSecretSync),
    ("GET",    "/v1/targets",                         Action::PullSecretRead),
    ("GET",    "/v1/summary",                         Action::Other),
    ("POST",   "/v1/identity-providers",              Action::ProviderCreate),
    ("GET",    "/v1/identity-providers",              Action::ProviderRead),
    ("GET",    "/v1/identity-providers/{name}",       Action::ProviderRead),
    ("PATCH",  "/v1/identity-providers/{name}",       Action::ProviderUpdate),
    ("DELETE", "/v1/identity-providers/{name}",       Action::ProviderDelete),
    ("GET",    "/v1/me",                              Action::Other),
    ("GET",    "/v1/events",                          Action::Other),
    ("GET",    "/v1/audit-events",                    Action::AuditRead),
];

fn action(method: &Method, pattern: &str) -> Action {
    let known = ACTIONS.iter().find(|(m, p, _)| method.as_str() == *m && pattern == *p);
    known.map_or(Action::Other, |(_, _, action)| *action)
}

/// Counts a failed request if its caller lacked a permission or a grant.
pub fn note(request: &HttpRequest, error: &ApiError) {
    let identity = request.extensions().get::<Arc<Identity>>().cloned();
    let Some((reason, resources)) = refused(error, identity.as_deref()) else { return };
    let action = action(request.method(), &request.match_pattern().unwrap_or_default());
    let resources =
        if resources.is_empty() { Resource::of_path(request.path()).into_iter().collect() } else { resources };
    count(request, identity.map_or_else(anonymous, |identity| identity.actor.clone()), action, resources, reason);
}

/// Counts a rejected credential. `owner` is set if the credential is genuine, such as a revoked
/// key.
pub fn note_rejected_credential(request: &HttpRequest, owner: Option<Actor>, reason: &'static str) {
    count(request, owner.unwrap_or_else(anonymous), Action::Authenticate, Vec::new(), reason);
}

fn count(request: &HttpRequest, actor: Actor, action: Action, resources: Vec<Resource>, reason: &'static str) {
    let Some(audit_writer) = request.app_data::<Data<AuditWriter>>() else { return };
    let meta = RequestMeta::of(request);
    let (request_id, source) = (meta.map(|meta| meta.id.uuid()), meta.and_then(|meta| meta.source));
    audit_writer.refuse(Refusal { actor, action, resources, reason, request_id, source });
}

/// Returns the reason, and resources that the path does not name. `None` if no permission or grant
/// was missing.
fn refused(error: &ApiError, identity: Option<&Identity>) -> Option<(&'static str, Vec<Resource>)> {
    let named = |kind: &str, name: &str| {
        let path = match kind {
            "registry account" => "registry-accounts",
            "cluster" => "clusters",
            "pull secret" => "pull-secrets",
            _ => return Vec::new(),
        };
        Resource::parse(&format!("{path}/{name}")).into_iter().collect()
    };
    match error {
        ApiError::Forbidden { .. } => Some(("role", Vec::new())),
        ApiError::NeedsAllGrants(_) => Some(("not-granted", Vec::new())),
        ApiError::Service(ServiceError::NotGranted { kind, name, .. } | ServiceError::Hidden { kind, name }) => {
            Some(("not-granted", named(kind, name)))
        }
        ApiError::Service(ServiceError::LabelsNotGranted { name, .. }) => {
            Some(("not-granted", named("registry account", name)))
        }
        ApiError::Service(ServiceError::Trusted { name, .. }) => Some(("trusted", named("cluster", name))),
        // A caller that reaches everything was not refused: the accounts do not exist.
        ApiError::Service(ServiceError::UnknownAccounts { names, .. }) if !identity?.grants.include_everything() => {
            Some(("not-granted", names.iter().map(Resource::account).collect()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_has_an_action() {
        let document = serde_json::to_value(crate::http::document()).unwrap();
        let mut routes = 0;
        for (path, methods) in document["paths"].as_object().unwrap() {
            for method in methods.as_object().unwrap().keys().filter(|_| path.starts_with("/v1/")) {
                let method = method.to_uppercase();
                assert!(ACTIONS.iter().any(|(m, p, _)| *m == method && p == path), "{method} {path} has no action");
                routes += 1;
            }
        }
        assert_eq!(routes, ACTIONS.len());
    }
}
