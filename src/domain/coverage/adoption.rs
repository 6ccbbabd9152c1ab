//! How regcred takes over a pull secret that another client made.

use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::snapshot::PullSecretUse;
use crate::domain::{
    account_name::{self, NamePrefix},
    diagnosis::{PullSecretName, Step},
    names::{Name, NamespaceName},
    registry::RegistryScope,
};

/// Takes over a pull secret: its logins become registry accounts, and a pull secret replaces it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CoverageAdoption)]
pub struct Adoption {
    /// Names of the registry accounts that the import creates.
    pub accounts: Vec<String>,
    /// Name of the pull secret that adopts the Secret.
    pub pull_secret: String,
    /// Steps in order: the import, for a shell with `REGCRED_URL` and `REGCRED_TOKEN`, and the
    /// declaration.
    pub steps: Vec<Step>,
}

/// Returns the steps that adopt a pull secret; none if names cannot be derived from its keys.
#[must_use]
pub fn adoption(cluster: &Name, secret: &PullSecretUse) -> Option<Adoption> {
    let PullSecretUse { namespace, name, .. } = secret;
    let pull_secret = PullSecretName::of(&NamespaceName::parse(namespace).ok()?, name)?;
    let prefix = prefix(&pull_secret);
    let accounts = account_names(&NamePrefix::parse(&prefix).ok()?, &secret.keys)?;
    let import = format!(
        "kubectl get secret '{name}' -n '{namespace}' -o json | curl --fail-with-body --data-binary @- -H \
         'Content-Type: application/json' -H \"Authorization: Bearer $REGCRED_TOKEN\" \
         \"$REGCRED_URL/v1/registry-accounts:import?namePrefix={prefix}\""
    );
    let declaration = json!({
        "accounts": accounts, "secret": {"name": name, "type": secret.secret_type}, "adopt": true,
        "deletionPolicy": "retain", "targets": [{"cluster": cluster.as_str(), "namespaces": [namespace]}],
    });
    let steps = vec![
        Step::Command { command: import },
        Step::Request { method: "PUT", path: format!("/v1/pull-secrets/{pull_secret}"), body: declaration },
    ];
    Some(Adoption { accounts, pull_secret: pull_secret.to_string(), steps })
}

/// Prefix of the accounts of one Secret: an import must not replace the login of another one.
fn prefix(pull_secret: &Name) -> String {
    let name = pull_secret.as_str();
    if name.len() < NamePrefix::MAX {
        return format!("{name}-");
    }
    let start: String = name.chars().take(NamePrefix::MAX - 10).collect();
    format!("{start}-{:08x}-", crc32fast::hash(name.as_bytes()))
}

/// Names that the import derives from the keys; none for a key that it skips.
fn account_names(prefix: &NamePrefix, keys: &[String]) -> Option<Vec<String>> {
    let mut scopes: Vec<RegistryScope> = Vec::new();
    let mut names: Vec<Name> = Vec::new();
    for key in keys {
        let scope = RegistryScope::parse(key).ok()?;
        if scopes.contains(&scope) {
            continue;
        }
        names.push(account_name::derive(prefix, &scope, |name| names.contains(name)).ok()?);
        scopes.push(scope);
    }
    (!names.is_empty()).then(|| names.iter().map(Name::to_string).collect())
}
