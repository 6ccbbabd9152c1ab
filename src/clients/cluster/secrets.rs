//! Secrets: create, apply, get, delete. Only metadata is requested, never a value.

use chrono::{DateTime, Utc};
use http::{HeaderValue, Request, header};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Resource,
    api::{DeleteParams, GetParams, ListParams, Patch, PatchParams, PostParams, Preconditions},
};

use super::{
    ClusterClient, ClusterError, FIELD_MANAGER,
    access_review::Question,
    response::{Metadata, PartialObject, Response},
    unbuildable,
};
use crate::domain::{
    names::{NamespaceName, SecretName},
    pull_secret::{FoundSecret, GENERATION_ANNOTATION, ID_LABEL},
    secret::{MANAGED_BY_LABEL, SecretManifest},
};

mod write_error;

use write_error::{TOO_LARGE, Write, write_error};

/// Maximum length of a Secret's data (`MaxSecretSize` in `k8s.io/api/core/v1`).
const SECRET_MAX: usize = 1024 * 1024;
/// Secrets in one page of a list.
const PAGE: u32 = 250;
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";

/// Metadata of a written Secret. A dry run may lack what only storing assigns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretMetadata {
    /// Identity of the object. A Secret that was deleted and created again has another one.
    pub uid: Option<String>,
    /// Version of the object.
    pub resource_version: Option<String>,
    /// Time of creation by the API server's clock.
    pub creation_timestamp: Option<DateTime<Utc>>,
}

/// Secret of direct delivery in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedSecret {
    /// Name.
    pub name: SecretName,
    /// Metadata.
    pub metadata: SecretMetadata,
}

impl ClusterClient {
    /// Creates a Secret by one POST.
    ///
    /// After [`ClusterError::Timeout`] or [`ClusterError::Unreachable`] the Secret may exist; a
    /// further attempt then returns [`ClusterError::SecretExists`]. With `dry_run` the API server
    /// checks everything and stores nothing. A 403 costs a second call, which tells a missing right
    /// from a quota or policy.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(
        name = "cluster.create_secret",
        skip_all,
        fields(server = %self.server(), %namespace, secret = %secret.name, dry_run)
    )]
    pub async fn create_secret(
        &self,
        namespace: &NamespaceName,
        secret: &SecretManifest<'_>,
        dry_run: bool,
    ) -> Result<SecretMetadata, ClusterError> {
        let deadline = self.deadline();
        let manifest = checked(SecretManifest { namespace: Some(namespace), ..*secret })?;
        let body = serde_json::to_vec(&manifest).map_err(unbuildable)?;
        let params = PostParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()) };
        let request = requests(namespace).create(&params, body).map_err(unbuildable)?;
        let response = self.call(metadata_only(request), deadline).await?;
        if response.is_success() {
            return written(&response, self.server());
        }
        let error = write_error(&response, Write::Create, self.server(), namespace);
        let create = Question { namespace: Some(namespace.to_string()), ..Question::everything("create", "secrets") };
        if matches!(error, ClusterError::Forbidden { .. }) && self.is_allowed(&create, deadline).await == Ok(true) {
            return Err(ClusterError::Refused {
                detail: format!(
                    "the cluster refused the Secret although regcred may create Secrets in namespace {namespace}: \
                     check its quotas and policies"
                ),
            });
        }
        Err(error)
    }

    /// Applies a Secret (server-side apply) if it still has this version. With `dry_run` the API
    /// server checks everything and stores nothing.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Changed`] if the Secret has another version or does not exist; see
    /// [`ClusterError`].
    pub async fn apply_secret(
        &self,
        namespace: &NamespaceName,
        secret: &SecretManifest<'_>,
        resource_version: &str,
        dry_run: bool,
    ) -> Result<SecretMetadata, ClusterError> {
        let resource_version = Some(resource_version);
        let manifest = checked(SecretManifest { namespace: Some(namespace), resource_version, ..*secret })?;
        let params = PatchParams { dry_run, ..PatchParams::apply(FIELD_MANAGER).force() };
        let request = requests(namespace)
            .patch_metadata(secret.name.as_str(), &params, &Patch::Apply(manifest))
            .map_err(unbuildable)?;
        let response = self.call(request, self.deadline()).await?;
        if response.is_success() {
            return written(&response, self.server());
        }
        Err(write_error(&response, Write::Apply, self.server(), namespace))
    }

    /// Reads the metadata of a Secret, or none if the Secret or its namespace does not exist.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn get_secret(
        &self,
        namespace: &NamespaceName,
        name: &SecretName,
    ) -> Result<Option<FoundSecret>, ClusterError> {
        let request = requests(namespace).get_metadata(name.as_str(), &GetParams::default()).map_err(unbuildable)?;
        let response = self.call(request, self.deadline()).await?;
        match response.status {
            404 => Ok(None),
            _ if response.is_success() => Ok(Some(found(response.read(self.server())?))),
            _ => Err(response.error(self.server(), &format!("get Secrets in namespace {namespace}"))),
        }
    }

    /// Lists the Secrets of direct delivery in a namespace; none if the namespace does not exist.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn list_direct_secrets(&self, namespace: &NamespaceName) -> Result<Vec<ListedSecret>, ClusterError> {
        let (key, value) = MANAGED_BY_LABEL;
        let params = ListParams::default().labels(&format!("{key}={value},!{ID_LABEL}"));
        let objects = format!("Secrets in namespace {namespace}");
        let listed = self.list_metadata(&requests(namespace), params, (PAGE, &objects)).await?;
        Ok(listed.into_iter().filter_map(listed_secret).collect())
    }

    /// Deletes a Secret if it still has the identity and version of `found`. Succeeds if the Secret
    /// does not exist.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Changed`] if the Secret has another identity or version; see
    /// [`ClusterError`].
    pub async fn delete_secret(
        &self,
        namespace: &NamespaceName,
        name: &SecretName,
        found: &FoundSecret,
    ) -> Result<(), ClusterError> {
        let preconditions =
            Preconditions { uid: Some(found.uid.clone()), resource_version: Some(found.resource_version.clone()) };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        let request = requests(namespace).delete(name.as_str(), &params).map_err(unbuildable)?;
        let response = self.call(metadata_only(request), self.deadline()).await?;
        match response.status {
            404 => Ok(()),
            409 => Err(ClusterError::Changed),
            _ if response.is_success() => Ok(()),
            _ => Err(response.error(self.server(), &format!("delete Secrets in namespace {namespace}"))),
        }
    }
}

/// Builder for requests about the Secrets of a namespace.
fn requests(namespace: &NamespaceName) -> kube::core::Request {
    kube::core::Request::new(Secret::url_path(&(), Some(namespace.as_str())))
}

/// Requests only the metadata in response: kube builds such requests for GET and PATCH, but not for
/// POST and DELETE.
fn metadata_only(mut request: Request<Vec<u8>>) -> Request<Vec<u8>> {
    request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(METADATA_ONLY));
    request
}

fn checked(manifest: SecretManifest<'_>) -> Result<SecretManifest<'_>, ClusterError> {
    if manifest.content.size() > SECRET_MAX {
        return Err(ClusterError::InvalidSecret { field: Some("data".to_owned()), detail: TOO_LARGE.to_owned() });
    }
    Ok(manifest)
}

fn written(response: &Response, server: &str) -> Result<SecretMetadata, ClusterError> {
    let object: Option<PartialObject> = response.json();
    let object = object.ok_or_else(|| ClusterError::Unreachable {
        detail: format!(
            "{server} answered {}, but the rest of its response cannot be read: the Secret may exist now",
            response.status
        ),
    })?;
    let Metadata { uid, resource_version, creation_timestamp, .. } = object.metadata;
    Ok(SecretMetadata { uid, resource_version, creation_timestamp })
}

/// None for an invalid name, which the API server does not accept either.
fn listed_secret(metadata: Metadata) -> Option<ListedSecret> {
    let Metadata { name, uid, resource_version, creation_timestamp, .. } = metadata;
    let metadata = SecretMetadata { uid, resource_version, creation_timestamp };
    Some(ListedSecret { name: SecretName::parse(&name).ok()?, metadata })
}

fn found(object: PartialObject) -> FoundSecret {
    let Metadata { uid, resource_version, labels, annotations, .. } = object.metadata;
    let generation = annotations.get(GENERATION_ANNOTATION).and_then(|generation| generation.parse().ok());
    let (uid, resource_version) = (uid.unwrap_or_default(), resource_version.unwrap_or_default());
    FoundSecret { uid, resource_version, labels, generation }
}
