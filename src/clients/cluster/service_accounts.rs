//! `imagePullSecrets` of `ServiceAccount`s.

use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{
    Resource,
    api::{GetParams, Patch, PatchParams},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ClusterClient, ClusterError, FIELD_MANAGER, response::Metadata, unbuildable};
use crate::domain::names::{NamespaceName, SecretName, ServiceAccountName};

/// Maximum number of attempts to change a `ServiceAccount` that other clients change at the same
/// time.
const ATTEMPTS: usize = 5;

/// Result of changing a `ServiceAccount`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// The Secret was added or removed.
    Changed,
    /// The `ServiceAccount` was already in the desired state.
    Unchanged,
    /// The `ServiceAccount` does not exist.
    NoServiceAccount,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PullSecretsOf {
    metadata: Metadata,
    image_pull_secrets: Option<Vec<Value>>,
}

impl PullSecretsOf {
    fn position(&self, secret: &SecretName) -> Option<usize> {
        self.image_pull_secrets.iter().flatten().position(|entry| entry["name"] == secret.as_str())
    }
}

impl ClusterClient {
    /// Adds a Secret to the `imagePullSecrets` of a `ServiceAccount`, without changing other
    /// entries.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Changed`] if other clients keep changing it; see [`ClusterError`].
    pub async fn attach(
        &self,
        namespace: &NamespaceName,
        account: &ServiceAccountName,
        secret: &SecretName,
    ) -> Result<Attachment, ClusterError> {
        self.patch_service_account(namespace, account, |found| {
            if found.position(secret).is_some() {
                return None;
            }
            let entry = json!({"name": secret.as_str()});
            Some(match found.image_pull_secrets {
                Some(_) => json!({"op": "add", "path": "/imagePullSecrets/-", "value": entry}),
                None => json!({"op": "add", "path": "/imagePullSecrets", "value": [entry]}),
            })
        })
        .await
    }

    /// Removes a Secret from the `imagePullSecrets` of a `ServiceAccount`, without changing other
    /// entries.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Changed`] if other clients keep changing it; see [`ClusterError`].
    pub async fn detach(
        &self,
        namespace: &NamespaceName,
        account: &ServiceAccountName,
        secret: &SecretName,
    ) -> Result<Attachment, ClusterError> {
        self.patch_service_account(namespace, account, |found| {
            let position = found.position(secret)?;
            Some(json!({"op": "remove", "path": format!("/imagePullSecrets/{position}")}))
        })
        .await
    }

    /// Applies a JSON Patch that holds only for the version that was read.
    ///
    /// Server-side apply cannot be used: the list is atomic, so regcred would own the entries of
    /// others.
    async fn patch_service_account(
        &self,
        namespace: &NamespaceName,
        account: &ServiceAccountName,
        operation: impl Fn(&PullSecretsOf) -> Option<Value>,
    ) -> Result<Attachment, ClusterError> {
        let requests = kube::core::Request::new(ServiceAccount::url_path(&(), Some(namespace.as_str())));
        let right = |verb: &str| format!("{verb} ServiceAccounts in namespace {namespace}");
        for _ in 0..ATTEMPTS {
            let get = requests.get(account.as_str(), &GetParams::default()).map_err(unbuildable)?;
            let response = self.call(get, self.deadline()).await?;
            match response.status {
                404 => return Ok(Attachment::NoServiceAccount),
                _ if response.is_success() => {}
                _ => return Err(response.error(self.server(), &right("get"))),
            }
            let found: PullSecretsOf = response.read(self.server())?;
            let Some(operation) = operation(&found) else { return Ok(Attachment::Unchanged) };
            let version = found.metadata.resource_version.unwrap_or_default();
            let test = json!({"op": "test", "path": "/metadata/resourceVersion", "value": version});
            let patch = serde_json::from_value(json!([test, operation])).map_err(unbuildable)?;
            let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            let patch =
                requests.patch_metadata(account.as_str(), &params, &Patch::Json::<()>(patch)).map_err(unbuildable)?;
            let response = self.call(patch, self.deadline()).await?;
            match response.status {
                _ if response.is_success() => return Ok(Attachment::Changed),
                404 => return Ok(Attachment::NoServiceAccount),
                // Another client changed it first; 422 is a `test` that failed.
                409 | 422 => {}
                _ => return Err(response.error(self.server(), &right("patch"))),
            }
        }
        Err(ClusterError::Changed)
    }
}
