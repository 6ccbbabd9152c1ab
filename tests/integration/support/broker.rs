//! A `ServiceAccount` for regcred with the rights that pull secrets need. The benches share this
//! file.

use k8s_openapi::{
    api::{
        authentication::v1::{TokenRequest, TokenRequestSpec},
        core::v1::ServiceAccount,
        rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, RoleRef, Subject},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;

/// Metadata with this name.
pub fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
}

/// Grants verbs on a resource of the core API group.
pub fn rule(resource: &str, verbs: &[&str]) -> PolicyRule {
    PolicyRule {
        api_groups: Some(vec![String::new()]),
        resources: Some(vec![resource.to_owned()]),
        verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
        ..PolicyRule::default()
    }
}

/// Creates a `ServiceAccount` without rights and returns a token of it.
pub async fn create_service_account(
    admin: &Client,
    namespace: &str,
    name: &str,
    token_seconds: i64,
) -> kube::Result<String> {
    let accounts = Api::<ServiceAccount>::namespaced(admin.clone(), namespace);
    let account = ServiceAccount { metadata: named(name), ..ServiceAccount::default() };
    accounts.create(&PostParams::default(), &account).await?;
    let request = TokenRequest {
        spec: Some(TokenRequestSpec { expiration_seconds: Some(token_seconds), ..TokenRequestSpec::default() }),
        ..TokenRequest::default()
    };
    let created = accounts.create_token_request(name, &PostParams::default(), &request).await?;
    Ok(created.status.and_then(|status| status.token).unwrap_or_default())
}

/// Grants rights in all namespaces, with a role and a binding named as the `ServiceAccount`.
pub async fn grant(admin: &Client, namespace: &str, name: &str, rules: Vec<PolicyRule>) -> kube::Result<()> {
    let role = ClusterRole { metadata: named(name), rules: Some(rules), ..ClusterRole::default() };
    Api::all(admin.clone()).create(&PostParams::default(), &role).await?;
    let binding = ClusterRoleBinding {
        metadata: named(name),
        role_ref: RoleRef {
            api_group: Some("rbac.authorization.k8s.io".to_owned()),
            kind: "ClusterRole".to_owned(),
            name: name.to_owned(),
        },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".to_owned(),
            name: name.to_owned(),
            namespace: Some(namespace.to_owned()),
            ..Subject::default()
        }]),
    };
    Api::all(admin.clone()).create(&PostParams::default(), &binding).await?;
    Ok(())
}

/// Replaces the rights granted by [`grant`].
pub async fn set_rules(admin: &Client, name: &str, rules: &[PolicyRule]) -> kube::Result<()> {
    let patch = Patch::Merge(json!({"rules": rules}));
    Api::<ClusterRole>::all(admin.clone()).patch(name, &PatchParams::default(), &patch).await?;
    Ok(())
}
