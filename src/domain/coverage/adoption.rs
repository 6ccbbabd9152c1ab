//! How regcred takes over a pull secret that another client made.

use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::snapshot::PullSecretUse;
use crate::domain::{
    account_name::{self, NamePrefix},
    diagnosis::Step,
    names::Name,
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

/// Maximum length of the name of a pull secret.
const PULL_SECRET_MAX: usize = 63;
/// Length of the digest in generated names.
const DIGEST_LENGTH: usize = 16;

/// Returns the steps that adopt a pull secret; none if names cannot be derived from its keys.
///
/// Generated names end in a digest of the cluster, the namespace and the Secret: an adoption never
/// replaces the accounts or the pull secret of another one. Both steps fail if what they create exists
/// by then. `digest` returns a collision-resistant
/// digest as lower-case hexadecimal digits.
#[must_use]
pub fn adoption(cluster: &Name, secret: &PullSecretUse, digest: impl Fn(&[u8]) -> String) -> Option<Adoption> {
    let PullSecretUse { namespace, name, .. } = secret;
    // No part contains the separator.
    let mut digest = digest(format!("{cluster}/{namespace}/{name}").as_bytes());
    digest.truncate(DIGEST_LENGTH);
    let readable = format!("{cluster}-{namespace}-{name}").replace('.', "-");
    let pull_secret =
        Name::parse(&format!("{}-{digest}", start(&readable, PULL_SECRET_MAX - digest.len() - 1))).ok()?;
    let prefix = format!("{}-{digest}-", start(&readable, NamePrefix::MAX - digest.len() - 2));
    let accounts = account_names(&NamePrefix::parse(&prefix).ok()?, &secret.keys)?;
    let import = format!(
        "kubectl get secret '{name}' -n '{namespace}' -o json | curl --fail-with-body --data-binary @- -H \
         'Content-Type: application/json' -H 'If-None-Match: *' -H \"Authorization: Bearer $REGCRED_TOKEN\" \
         \"$REGCRED_URL/v1/registry-accounts:import?namePrefix={prefix}\""
    );
    let declaration = json!({
        "accounts": accounts, "secret": {"name": name, "type": secret.secret_type}, "adopt": true,
        "deletionPolicy": "retain", "targets": [{"cluster": cluster.as_str(), "namespaces": [namespace]}],
    });
    let steps = vec![
        Step::Command { command: import },
        Step::declaration(format!("/v1/pull-secrets/{pull_secret}"), declaration),
    ];
    Some(Adoption { accounts, pull_secret: pull_secret.to_string(), steps })
}

/// First characters of a name, as the start of another one.
fn start(name: &str, length: usize) -> &str {
    // Names are ASCII.
    name.get(..length).unwrap_or(name).trim_end_matches('-')
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
