//! What keeping a Secret right takes beside creating it: look at it, apply it, delete it, attach it to `ServiceAccount`s, and list
//! the namespaces.
//!
//! Of Secrets and namespaces only metadata is asked for. Paths are made of parsed names alone.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderValue, Method, Request, header};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;
use url::form_urlencoded;

use super::{ClusterClient, ClusterError, CreatedSecret, FIELD_MANAGER, METADATA_ONLY, answer::Answer, unbuildable};
use crate::domain::{
    names::{NamespaceName, SecretName, ServiceAccountName},
    pull_secret::{FoundSecret, GENERATION_ANNOTATION},
};

const METADATA_LIST_ONLY: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
/// Namespaces in one page of a list: their metadata fits into an answer's bound by far.
const PAGE: usize = 250;
/// The most pages of a list: a hundred thousand namespaces are more than any cluster has.
const PAGES_MAX: usize = 400;
/// How often a change of a `ServiceAccount` that met another one is tried again.
const ATTACH_TRIES: usize = 5;

/// A Secret's value, ready to be sent: encoded once, written to many namespaces.
pub struct SecretContent {
    secret_type: String,
    data_key: String,
    base64: SecretString,
}

impl SecretContent {
    /// Encodes a document.
    #[must_use]
    pub fn new(secret_type: &str, data_key: &str, document: &SecretString) -> Self {
        Self {
            secret_type: secret_type.to_owned(),
            data_key: data_key.to_owned(),
            base64: STANDARD.encode(document.expose_secret()).into(),
        }
    }
}

/// A Secret as it shall be.
pub struct AppliedSecret<'a> {
    /// The namespace.
    pub namespace: &'a NamespaceName,
    /// The name.
    pub name: &'a SecretName,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
    /// The generation that is written on it.
    pub generation: i64,
    /// Its type and value.
    pub content: &'a SecretContent,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SecretObject<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: SecretMetadata<'a>,
    #[serde(rename = "type")]
    secret_type: &'a str,
    data: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SecretMetadata<'a> {
    name: &'a str,
    namespace: &'a str,
    labels: &'a BTreeMap<String, String>,
    annotations: BTreeMap<&'static str, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_version: Option<&'a str>,
}

impl AppliedSecret<'_> {
    fn body(&self, resource_version: Option<&str>) -> Result<Vec<u8>, ClusterError> {
        let object = SecretObject {
            api_version: "v1",
            kind: "Secret",
            metadata: SecretMetadata {
                name: self.name.as_str(),
                namespace: self.namespace.as_str(),
                labels: self.labels,
                annotations: BTreeMap::from([(GENERATION_ANNOTATION, self.generation.to_string())]),
                resource_version,
            },
            secret_type: &self.content.secret_type,
            data: BTreeMap::from([(self.content.data_key.as_str(), self.content.base64.expose_secret())]),
        };
        serde_json::to_vec(&object).map_err(|_| unbuildable())
    }
}

/// A namespace, as far as selectors look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundNamespace {
    /// Its name.
    pub name: NamespaceName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// It is being deleted and takes nothing new.
    pub terminating: bool,
}

#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    uid: Option<String>,
    resource_version: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    deletion_timestamp: Option<String>,
}

#[derive(Deserialize)]
struct List {
    metadata: ListMetadata,
    // An API server always writes them: an answer without is none to a list, and must not be taken for an empty one.
    items: Vec<Object>,
}

#[derive(Deserialize)]
struct ListMetadata {
    #[serde(rename = "continue")]
    next: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceAccount {
    metadata: Metadata,
    image_pull_secrets: Option<Vec<serde_json::Value>>,
}

impl ServiceAccount {
    fn position(&self, secret: &str) -> Option<usize> {
        self.image_pull_secrets.iter().flatten().position(|entry| entry["name"] == secret)
    }
}

/// What became of a `ServiceAccount`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// The Secret was put into it, or taken out.
    Changed,
    /// It was as wanted.
    Unchanged,
    /// There is no such `ServiceAccount`.
    NoServiceAccount,
}

impl ClusterClient {
    /// Looks at a Secret, without its value; none if there is none, or no such namespace.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn find_secret(
        &self,
        namespace: &NamespaceName,
        name: &SecretName,
    ) -> Result<Option<FoundSecret>, ClusterError> {
        let request = request(Method::GET, &secret_path(namespace, name), None, Vec::new())?;
        let answer = self.call(accepting(request, METADATA_ONLY), self.deadline()).await?;
        match answer.status {
            404 => Ok(None),
            _ if answer.is_success() => self.read_secret(&answer).map(Some),
            _ => Err(self.failure(&answer, "get", "Secrets", namespace)),
        }
    }

    /// Creates a Secret by one POST, which is never repeated.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn post_secret(&self, secret: &AppliedSecret<'_>) -> Result<CreatedSecret, ClusterError> {
        let deadline = self.deadline();
        let path = format!("/api/v1/namespaces/{}/secrets?fieldManager={FIELD_MANAGER}", secret.namespace);
        let request = request(Method::POST, &path, Some("application/json"), secret.body(None)?)?;
        let answer = self.call(accepting(request, METADATA_ONLY), deadline).await?;
        if answer.is_success() {
            return self.created(&answer);
        }
        let namespace = secret.namespace.as_str();
        Err(self.tell_policy_from_right(answer.create_failure(self.server(), namespace), namespace, deadline).await)
    }

    /// Applies a Secret on the server's side, if it still is at this version: [`ClusterError::Changed`] if it is not, or if
    /// it has gone.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn apply_secret(
        &self,
        secret: &AppliedSecret<'_>,
        resource_version: &str,
    ) -> Result<CreatedSecret, ClusterError> {
        let path = format!("{}?fieldManager={FIELD_MANAGER}&force=true", secret_path(secret.namespace, secret.name));
        let body = secret.body(Some(resource_version))?;
        let request = request(Method::PATCH, &path, Some("application/apply-patch+yaml"), body)?;
        let answer = self.call(accepting(request, METADATA_ONLY), self.deadline()).await?;
        match answer.status {
            _ if answer.is_success() => self.created(&answer),
            403 if !answer.is_terminating() => Err(self.failure(&answer, "patch", "Secrets", secret.namespace)),
            _ => Err(answer.apply_failure(self.server(), secret.namespace.as_str())),
        }
    }

    /// Deletes a Secret, if it still is this very object at this version. One that is gone is fine.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]; [`ClusterError::Changed`] if it is another one by now.
    pub async fn delete_secret(
        &self,
        namespace: &NamespaceName,
        name: &SecretName,
        found: &FoundSecret,
    ) -> Result<(), ClusterError> {
        let preconditions = json!({"uid": found.uid, "resourceVersion": found.resource_version});
        let body = json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions});
        let path = secret_path(namespace, name);
        let request = request(Method::DELETE, &path, Some("application/json"), body.to_string().into_bytes())?;
        let answer = self.call(accepting(request, METADATA_ONLY), self.deadline()).await?;
        match answer.status {
            404 => Ok(()),
            409 => Err(ClusterError::Changed),
            _ if answer.is_success() => Ok(()),
            _ => Err(self.failure(&answer, "delete", "Secrets", namespace)),
        }
    }

    /// Puts a Secret into the `imagePullSecrets` of a `ServiceAccount`; other entries stay.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]; [`ClusterError::Changed`] if others change it all the time.
    pub async fn attach(
        &self,
        namespace: &NamespaceName,
        account: &ServiceAccountName,
        secret: &SecretName,
    ) -> Result<Attachment, ClusterError> {
        self.change_account(namespace, account, |found| {
            if found.position(secret.as_str()).is_some() {
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

    /// Takes a Secret out of the `imagePullSecrets` of a `ServiceAccount`; other entries stay.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]; [`ClusterError::Changed`] if others change it all the time.
    pub async fn detach(
        &self,
        namespace: &NamespaceName,
        account: &ServiceAccountName,
        secret: &SecretName,
    ) -> Result<Attachment, ClusterError> {
        self.change_account(namespace, account, |found| {
            let position = found.position(secret.as_str())?;
            Some(json!({"op": "remove", "path": format!("/imagePullSecrets/{position}")}))
        })
        .await
    }

    /// Changes a `ServiceAccount` by a JSON Patch that holds only for the version that was looked at: its list is atomic, and a
    /// server-side apply would own the entries of others.
    async fn change_account(
        &self,
        namespace: &NamespaceName,
        account: &ServiceAccountName,
        change: impl Fn(&ServiceAccount) -> Option<serde_json::Value>,
    ) -> Result<Attachment, ClusterError> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}");
        for _ in 0..ATTACH_TRIES {
            let look = request(Method::GET, &path, None, Vec::new())?;
            let answer = self.call(accepting(look, "application/json"), self.deadline()).await?;
            match answer.status {
                404 => return Ok(Attachment::NoServiceAccount),
                _ if answer.is_success() => {}
                _ => return Err(self.failure(&answer, "get", "ServiceAccounts", namespace)),
            }
            let found: ServiceAccount = self.read(&answer)?;
            let Some(operation) = change(&found) else { return Ok(Attachment::Unchanged) };
            let version = found.metadata.resource_version.unwrap_or_default();
            let test = json!({"op": "test", "path": "/metadata/resourceVersion", "value": version});
            let path = format!("{path}?fieldManager={FIELD_MANAGER}");
            let body = json!([test, operation]).to_string().into_bytes();
            let change = request(Method::PATCH, &path, Some("application/json-patch+json"), body)?;
            let answer = self.call(accepting(change, METADATA_ONLY), self.deadline()).await?;
            match answer.status {
                _ if answer.is_success() => return Ok(Attachment::Changed),
                404 => return Ok(Attachment::NoServiceAccount),
                // Somebody else was faster; 422 is a `test` that does not hold.
                409 | 422 => {}
                _ => return Err(self.failure(&answer, "patch", "ServiceAccounts", namespace)),
            }
        }
        Err(ClusterError::Changed)
    }

    /// Lists all namespaces, page by page.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn list_namespaces(&self) -> Result<Vec<FoundNamespace>, ClusterError> {
        let mut namespaces = Vec::new();
        let mut next: Option<String> = None;
        for _ in 0..PAGES_MAX {
            let mut path = format!("/api/v1/namespaces?limit={PAGE}");
            if let Some(next) = &next {
                path.push_str("&continue=");
                path.extend(form_urlencoded::byte_serialize(next.as_bytes()));
            }
            let request = request(Method::GET, &path, None, Vec::new())?;
            let answer = self.call(accepting(request, METADATA_LIST_ONLY), self.deadline()).await?;
            if answer.status == 403 {
                let detail = "regcred's credential for the cluster may not list namespaces (403)".to_owned();
                return Err(ClusterError::Forbidden { detail });
            }
            if !answer.is_success() {
                return Err(answer.failure(self.server()));
            }
            let list: List = self.read(&answer)?;
            namespaces.extend(list.items.into_iter().filter_map(|object| found_namespace(object.metadata)));
            next = list.metadata.next.filter(|next| !next.is_empty());
            if next.is_none() {
                return Ok(namespaces);
            }
        }
        let detail =
            format!("{} has more than {} namespaces, or its list does not end", self.server(), PAGE * PAGES_MAX);
        Err(ClusterError::Unreachable { detail })
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    fn read<T: for<'de> Deserialize<'de>>(&self, answer: &Answer) -> Result<T, ClusterError> {
        let read = answer.body.as_deref().and_then(|body| serde_json::from_slice(body).ok());
        read.ok_or_else(|| ClusterError::Unreachable {
            detail: format!("{} answered {}, but its answer cannot be read", self.server(), answer.status),
        })
    }

    fn read_secret(&self, answer: &Answer) -> Result<FoundSecret, ClusterError> {
        let Metadata { uid, resource_version, labels, annotations, .. } = self.read::<Object>(answer)?.metadata;
        let generation = annotations.get(GENERATION_ANNOTATION).and_then(|generation| generation.parse().ok());
        let (uid, resource_version) = (uid.unwrap_or_default(), resource_version.unwrap_or_default());
        Ok(FoundSecret { uid, resource_version, labels, generation })
    }

    /// What an answer that is not a success means where a right within a namespace was used.
    fn failure(&self, answer: &Answer, verb: &str, objects: &str, namespace: &NamespaceName) -> ClusterError {
        match answer.status {
            403 => ClusterError::Forbidden {
                detail: format!(
                    "regcred's credential for the cluster may not {verb} {objects} in namespace {namespace} (403)"
                ),
            },
            _ => answer.failure(self.server()),
        }
    }
}

fn found_namespace(metadata: Metadata) -> Option<FoundNamespace> {
    // The API server checks names by the same rule.
    let name = NamespaceName::parse(&metadata.name).ok()?;
    Some(FoundNamespace { name, labels: metadata.labels, terminating: metadata.deletion_timestamp.is_some() })
}

fn secret_path(namespace: &NamespaceName, name: &SecretName) -> String {
    format!("/api/v1/namespaces/{namespace}/secrets/{name}")
}

fn request(
    method: Method,
    path: &str,
    content_type: Option<&'static str>,
    body: Vec<u8>,
) -> Result<Request<Vec<u8>>, ClusterError> {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(content_type) = content_type {
        request = request.header(header::CONTENT_TYPE, content_type);
    }
    request.body(body).map_err(|_| unbuildable())
}

fn accepting(mut request: Request<Vec<u8>>, media_type: &'static str) -> Request<Vec<u8>> {
    request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(media_type));
    request
}
