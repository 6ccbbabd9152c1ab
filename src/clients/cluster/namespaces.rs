//! Namespaces and their labels.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Namespace;
use kube::{Resource, api::ListParams};
use serde::Deserialize;

use super::{
    ClusterClient, ClusterError,
    response::{Metadata, PartialObject},
    unbuildable,
};
use crate::domain::names::NamespaceName;

/// Namespaces in one page. The metadata of this many fits into the maximum length of a response.
const PAGE: u32 = 250;
/// Maximum number of pages: a hundred thousand namespaces are more than a cluster has.
const PAGES_MAX: u32 = 400;

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

#[derive(Deserialize)]
struct List {
    metadata: ListMetadata,
    // Required: a response without `items` is not an empty list.
    items: Vec<PartialObject>,
}

#[derive(Deserialize)]
struct ListMetadata {
    #[serde(rename = "continue")]
    continue_token: Option<String>,
}

impl ClusterClient {
    /// Lists all namespaces, page by page.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn list_namespaces(&self) -> Result<Vec<FoundNamespace>, ClusterError> {
        let requests = kube::core::Request::new(Namespace::url_path(&(), None));
        let mut namespaces = Vec::new();
        let mut params = ListParams::default().limit(PAGE);
        for _ in 0..PAGES_MAX {
            let request = requests.list_metadata(&params).map_err(unbuildable)?;
            let response = self.call(request, self.deadline()).await?;
            if !response.is_success() {
                return Err(response.error(self.server(), "list namespaces"));
            }
            let list: List = response.read(self.server())?;
            namespaces.extend(list.items.into_iter().filter_map(|object| found(object.metadata)));
            params.continue_token = list.metadata.continue_token.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                return Ok(namespaces);
            }
        }
        let detail = format!("{} lists more than {} namespaces", self.server(), PAGE * PAGES_MAX);
        Err(ClusterError::Unreachable { detail })
    }
}

/// None for an invalid name, which the API server does not accept either.
fn found(metadata: Metadata) -> Option<FoundNamespace> {
    let name = NamespaceName::parse(&metadata.name).ok()?;
    Some(FoundNamespace { name, labels: metadata.labels, terminating: metadata.deletion_timestamp.is_some() })
}
