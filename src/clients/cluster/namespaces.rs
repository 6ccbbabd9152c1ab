//! Namespaces and their labels.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Namespace;
use kube::{Resource, api::ListParams};

use super::{ClusterClient, ClusterError, response::Metadata};
use crate::domain::names::NamespaceName;

/// Namespaces in one page. The metadata of this many fits into the maximum length of a response.
const PAGE: u32 = 250;

/// Namespace, as selectors match it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundNamespace {
    /// Name.
    pub name: NamespaceName,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Whether the namespace is being deleted and accepts no new objects.
    pub terminating: bool,
}

impl ClusterClient {
    /// Lists all namespaces, page by page.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn list_namespaces(&self) -> Result<Vec<FoundNamespace>, ClusterError> {
        let requests = kube::core::Request::new(Namespace::url_path(&(), None));
        let listed = self.list_metadata(&requests, ListParams::default(), (PAGE, "namespaces")).await?;
        Ok(listed.into_iter().filter_map(found).collect())
    }
}

/// None for an invalid name, which the API server does not accept either.
fn found(metadata: Metadata) -> Option<FoundNamespace> {
    let name = NamespaceName::parse(&metadata.name).ok()?;
    Some(FoundNamespace { name, labels: metadata.labels, terminating: metadata.deletion_timestamp.is_some() })
}
