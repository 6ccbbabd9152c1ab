//! Lists for the coverage of a cluster, page by page. A page is dropped once it is grouped.
//!
//! Of pods and workloads only the images, pull secrets and owners are kept. Of Secrets only the
//! metadata is requested.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use http::{HeaderValue, Request, header};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::sleep;

use super::{
    ClusterClient, ClusterError, Pace,
    diagnosis::{Reference, name},
    response::Response,
    unbuildable,
    workload::{WorkloadSpec, versions},
};
use crate::domain::{
    coverage::{CONTAINERS_MAX, Observed, ObservedImage, PULL_SECRETS_MAX, PullPolicy, Source},
    diagnosis::WorkloadKind,
    names::{NamespaceName, PodName, SecretName, ServiceAccountName},
    secret::SecretType,
};

/// Objects of a page of pods or workloads, which have many fields.
const PAGE: u32 = 100;
/// Objects of a page of other lists.
const SMALL_PAGE: u32 = 250;
/// Nodes in one page: their status lists images.
const NODES_PAGE: u32 = 25;
/// Maximum length of a page, in bytes. A longer one is requested again with fewer objects.
const BODY_MAX: usize = 4 * 1024 * 1024;
/// Maximum number of pages of a list.
const PAGES_MAX: u32 = 20_000;
/// Maximum length of an image reference. A longer one is invalid.
const REFERENCE_MAX: usize = 1024;
/// Attempts to list a page, and the pause between them.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
/// Label of pods that a `Deployment` creates through its `ReplicaSet`.
const DEPLOYMENT_LABEL: &str = "pod-template-hash";

/// Where objects are listed.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// In all namespaces.
    Cluster,
    /// In one namespace.
    Namespace(&'a NamespaceName),
}

impl Place<'_> {
    fn path(self, root: &str, plural: &str) -> String {
        match self {
            Self::Cluster => format!("{root}/{plural}"),
            Self::Namespace(namespace) => format!("{root}/namespaces/{namespace}/{plural}"),
        }
    }
}

/// What a list requests.
struct ListRequest<'a> {
    path: String,
    /// Further parameters, encoded.
    parameters: &'a str,
    /// Maximum number of objects of a page.
    limit: u32,
    metadata_only: bool,
    /// Whether the API server may lack the resource.
    may_be_unknown: bool,
}

#[derive(Deserialize)]
pub(super) struct List<T> {
    pub(super) metadata: ListMetadata,
    // Required: a response without `items` is not an empty list.
    pub(super) items: Option<Vec<T>>,
}

#[derive(Default, Deserialize)]
pub(super) struct ListMetadata {
    #[serde(rename = "continue", default)]
    pub(super) continue_token: String,
}

/// A page without its objects.
#[derive(Deserialize)]
struct Continued {
    metadata: ListMetadata,
}

/// Answer to an expired page.
#[derive(Deserialize)]
pub(super) struct Expired {
    #[serde(default)]
    pub(super) metadata: ListMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    owner_references: Vec<Owner>,
}

#[derive(Deserialize)]
struct Owner {
    #[serde(default)]
    controller: bool,
    kind: String,
    name: String,
}

impl Metadata {
    fn controller(&self) -> Option<&Owner> {
        self.owner_references.iter().find(|owner| owner.controller)
    }
}

#[derive(Deserialize)]
struct Pod {
    metadata: Metadata,
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Default, Deserialize)]
struct PodStatus {
    #[serde(default)]
    phase: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    #[serde(default)]
    init_containers: Vec<ContainerSpec>,
    #[serde(default)]
    containers: Vec<ContainerSpec>,
    #[serde(default)]
    ephemeral_containers: Vec<ContainerSpec>,
    #[serde(default)]
    image_pull_secrets: Vec<Reference>,
    service_account_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerSpec {
    #[serde(default)]
    image: String,
    #[serde(default)]
    image_pull_policy: String,
}

#[derive(Deserialize)]
struct Workload {
    metadata: Metadata,
    spec: WorkloadSpec<PodSpec>,
    #[serde(default)]
    status: WorkloadStatus,
}

#[derive(Default, Deserialize)]
struct WorkloadStatus {
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceAccount {
    metadata: Metadata,
    #[serde(default)]
    image_pull_secrets: Vec<Reference>,
}

#[derive(Deserialize)]
struct Named {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Node {
    #[serde(default)]
    status: NodeStatus,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeStatus {
    #[serde(default)]
    node_info: NodeInfo,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeInfo {
    #[serde(default)]
    kubelet_version: String,
}

impl ClusterClient {
    /// Lists the pods that have not ended. Returns the number of objects that are too long, as other
    /// lists do.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn survey_pods(
        &self,
        scope: Place<'_>,
        pace: &Pace,
        mut each: impl FnMut(Observed),
    ) -> Result<u32, ClusterError> {
        let path = scope.path("/api/v1", "pods");
        let request = ListRequest { path, parameters: "", limit: PAGE, metadata_only: false, may_be_unknown: false };
        self.list_pages(&request, "pods", pace, |pod: Pod| {
            if !matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
                let source = source_of_pod(&pod.metadata);
                observed(source, &pod.metadata, pod.spec).into_iter().for_each(&mut each);
            }
        })
        .await
        .map(Listing::left_out)
    }

    /// Lists the templates of workloads of a kind. Jobs that have ended, or that a `CronJob`
    /// created, are left out.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn survey_workloads(
        &self,
        kind: WorkloadKind,
        scope: Place<'_>,
        pace: &Pace,
        mut each: impl FnMut(Observed),
    ) -> Result<u32, ClusterError> {
        let versions = versions(kind);
        for version in versions {
            let path = scope.path(&format!("/apis/{}/{version}", kind.group()), kind.plural());
            let may_be_unknown = versions.last() != Some(version);
            let request = ListRequest { path, parameters: "", limit: PAGE, metadata_only: false, may_be_unknown };
            let listed = self.list_pages(&request, kind.plural(), pace, |workload: Workload| {
                let has_ended = workload.status.conditions.iter().any(|condition| {
                    condition.status == "True" && matches!(condition.kind.as_str(), "Complete" | "Failed")
                });
                let is_left_out = kind == WorkloadKind::Job && (has_ended || is_counted(&workload.metadata));
                if let Some(pod) = workload.spec.pod().filter(|_| !is_left_out) {
                    observed(Source::Template(kind), &workload.metadata, pod).into_iter().for_each(&mut each);
                }
            });
            if let Listing::Complete { left_out } = listed.await? {
                return Ok(left_out);
            }
        }
        Ok(0)
    }

    /// Lists the pull secrets of all `ServiceAccount`s.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn survey_service_accounts(
        &self,
        scope: Place<'_>,
        pace: &Pace,
        mut each: impl FnMut((NamespaceName, ServiceAccountName), Vec<SecretName>),
    ) -> Result<u32, ClusterError> {
        let path = scope.path("/api/v1", "serviceaccounts");
        let request =
            ListRequest { path, parameters: "", limit: SMALL_PAGE, metadata_only: false, may_be_unknown: false };
        self.list_pages(&request, "serviceaccounts", pace, |account: ServiceAccount| {
            let namespace = NamespaceName::parse(&account.metadata.namespace).ok();
            if let (Some(namespace), Ok(found)) = (namespace, ServiceAccountName::parse(&account.metadata.name)) {
                each((namespace, found), names(&account.image_pull_secrets));
            }
        })
        .await
        .map(Listing::left_out)
    }

    /// Lists the names of the image pull secrets of a type.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn survey_secrets(
        &self,
        secret_type: SecretType,
        scope: Place<'_>,
        pace: &Pace,
        mut each: impl FnMut(NamespaceName, SecretName),
    ) -> Result<u32, ClusterError> {
        let path = scope.path("/api/v1", "secrets");
        let parameters = format!("&fieldSelector=type%3D{}", secret_type.as_str().replace('/', "%2F"));
        let request = ListRequest {
            path,
            parameters: &parameters,
            limit: SMALL_PAGE,
            metadata_only: true,
            may_be_unknown: false,
        };
        self.list_pages(&request, "secrets", pace, |secret: Named| {
            let namespace = NamespaceName::parse(&secret.metadata.namespace);
            if let (Ok(namespace), Ok(found)) = (namespace, SecretName::parse(&secret.metadata.name)) {
                each(namespace, found);
            }
        })
        .await
        .map(Listing::left_out)
    }

    /// Lists the minor versions of the kubelets, each once.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn kubelet_minors(&self, pace: &Pace) -> Result<Vec<u32>, ClusterError> {
        let mut minors = Vec::new();
        let path = Place::Cluster.path("/api/v1", "nodes");
        let request =
            ListRequest { path, parameters: "", limit: NODES_PAGE, metadata_only: false, may_be_unknown: false };
        let listed = self.list_pages(&request, "nodes", pace, |node: Node| {
            minors.extend(minor(&node.status.node_info.kubelet_version));
        });
        listed.await?;
        minors.sort_unstable();
        minors.dedup();
        Ok(minors)
    }

    /// Lists objects page by page. One that is longer than a page may be is left out.
    async fn list_pages<T: DeserializeOwned>(
        &self,
        list: &ListRequest<'_>,
        objects: &str,
        pace: &Pace,
        mut each: impl FnMut(T),
    ) -> Result<Listing, ClusterError> {
        let (mut limit, mut next) = (list.limit, String::new());
        let (mut left_out, mut is_skipping) = (0, false);
        for _ in 0..PAGES_MAX {
            let metadata_only = list.metadata_only || is_skipping;
            let response = self.page(list, objects, (limit, &next, metadata_only), pace).await?;
            match response.status {
                404 if next.is_empty() && list.may_be_unknown => return Ok(Listing::Unknown),
                // The list is continued in its present state.
                410 if !next.is_empty() => match response.json::<Expired>() {
                    Some(expired) if !expired.metadata.continue_token.is_empty() => {
                        next = continued(&expired.metadata);
                    }
                    _ => return Err(response.error(self.server(), &format!("list {objects}"))),
                },
                _ if !response.is_success() => {
                    return Err(response.error(self.server(), &format!("list {objects}")));
                }
                _ if response.body.is_none() && limit > 1 => limit = (limit / 4).max(1),
                // Only its place in the list is needed.
                _ if response.body.is_none() && !metadata_only => is_skipping = true,
                _ => {
                    let metadata = if is_skipping {
                        left_out += 1;
                        response.read::<Continued>(self.server())?.metadata
                    } else {
                        let found: List<T> = response.read(self.server())?;
                        found.items.into_iter().flatten().for_each(&mut each);
                        found.metadata
                    };
                    if metadata.continue_token.is_empty() {
                        return Ok(Listing::Complete { left_out });
                    }
                    next = continued(&metadata);
                    is_skipping = false;
                    limit = longer(limit, list.limit);
                }
            }
            pace.rest();
        }
        let detail = format!("{} lists more than {PAGES_MAX} pages of {objects}", self.server());
        Err(ClusterError::Unreachable { detail })
    }

    /// Requests a page at the pace of the run, again if the API server fails or is overloaded.
    async fn page(
        &self,
        list: &ListRequest<'_>,
        objects: &str,
        (limit, next, metadata_only): (u32, &str, bool),
        pace: &Pace,
    ) -> Result<Response, ClusterError> {
        let ListRequest { path, parameters, .. } = list;
        let mut attempt = 1;
        loop {
            pace.wait().await;
            let mut request = Request::get(format!("{path}?limit={limit}{parameters}{next}"));
            if metadata_only {
                request = request.header(header::ACCEPT, HeaderValue::from_static(METADATA_ONLY));
            }
            let request = request.body(Vec::new()).map_err(unbuildable)?;
            let response = match self.call_up_to(request, self.deadline(), BODY_MAX).await {
                Ok(response) if matches!(response.status, 429 | 500..=599) => {
                    Err(response.error(self.server(), &format!("list {objects}")))
                }
                response => response,
            };
            match response {
                Err(error) if attempt < ATTEMPTS && error.is_transient() => {
                    sleep(PAUSE * attempt).await;
                    attempt += 1;
                }
                response => return response,
            }
        }
    }
}

/// Result of a list.
enum Listing {
    /// All objects were listed.
    Complete {
        /// Number of objects that are too long.
        left_out: u32,
    },
    /// The API server does not know the resource.
    Unknown,
}

impl Listing {
    const fn left_out(self) -> u32 {
        match self {
            Self::Complete { left_out } => left_out,
            Self::Unknown => 0,
        }
    }
}

/// Limit after a page that was short enough: one long object does not make the rest of a list slow.
fn longer(limit: u32, most: u32) -> u32 {
    (limit + limit.div_ceil(4)).min(most)
}

/// Whether a Job is counted with its `CronJob`.
fn is_counted(job: &Metadata) -> bool {
    job.controller().is_some_and(|owner| owner.kind == "CronJob")
}

fn continued(metadata: &ListMetadata) -> String {
    let token = url::form_urlencoded::byte_serialize(metadata.continue_token.as_bytes());
    format!("&continue={}", token.collect::<String>())
}

fn source_of_pod(metadata: &Metadata) -> Source {
    let Some(owner) = metadata.controller() else { return Source::Pod };
    match owner.kind.as_str() {
        "StatefulSet" | "DaemonSet" | "Job" => Source::PodOfTemplate,
        "ReplicaSet" if metadata.labels.contains_key(DEPLOYMENT_LABEL) => Source::PodOfTemplate,
        // A static pod of a node.
        "Node" => Source::Pod,
        kind => Source::PodOfOther(format!("{kind}/{}", owner.name)),
    }
}

/// First names of a list, each once: those that are read, and one more if there are further ones.
fn names(references: &[Reference]) -> Vec<SecretName> {
    let mut seen = HashSet::new();
    let names = references.iter().filter_map(name).filter(|name| seen.insert(name.clone()));
    names.take(PULL_SECRETS_MAX + 1).collect()
}

/// None for invalid names, which the API server does not accept either.
fn observed(source: Source, metadata: &Metadata, spec: PodSpec) -> Option<Observed> {
    let containers = spec.init_containers.into_iter().chain(spec.containers).chain(spec.ephemeral_containers);
    let mut images: Vec<ObservedImage> = Vec::new();
    let mut left_out = 0;
    for one in containers.filter(|one| !one.image.is_empty()) {
        if images.len() >= CONTAINERS_MAX {
            left_out += 1;
            continue;
        }
        let policy = PullPolicy::parse(&one.image_pull_policy);
        let image = if one.image.len() > REFERENCE_MAX { "…".to_owned() } else { one.image };
        images.push(ObservedImage { image, policy });
    }
    let account = spec.service_account_name.and_then(|name| ServiceAccountName::parse(&name).ok());
    Some(Observed {
        source,
        name: PodName::parse(&metadata.name).ok()?,
        namespace: NamespaceName::parse(&metadata.namespace).ok()?,
        service_account: account.unwrap_or_else(ServiceAccountName::default_account),
        pull_secrets: names(&spec.image_pull_secrets),
        images,
        containers_left_out: left_out,
    })
}

/// Minor version of `v1.35.2`.
fn minor(version: &str) -> Option<u32> {
    let rest = version.strip_prefix("v1.")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    #[rstest]
    #[case("v1.35.2", Some(35))]
    #[case("v1.20.2-debian", Some(20))]
    #[case("v1.36+", Some(36))]
    #[case("", None)]
    #[case("v2.1", None)]
    fn minor_version_is_read(#[case] version: &str, #[case] expected: Option<u32>) {
        assert_eq!(minor(version), expected);
    }

    fn source(kind: &str, labels: &Value) -> Source {
        let owners = if kind.is_empty() { json!([]) } else { json!([{"controller": true, "kind": kind, "name": "x"}]) };
        let metadata = json!({"name": "web", "labels": labels, "ownerReferences": owners});
        source_of_pod(&serde_json::from_value(metadata).unwrap())
    }

    #[test]
    fn long_lists_of_a_workload_are_cut_when_they_are_observed() {
        let secrets: Vec<Value> = (0..5_000).map(|at| json!({"name": format!("k{}", at / 2)})).collect();
        let containers: Vec<Value> = (0..5_000).map(|at| json!({"image": format!("reg.io/app-{at}")})).collect();
        let spec = json!({"imagePullSecrets": secrets, "containers": containers});
        let metadata: Metadata = serde_json::from_value(json!({"name": "web", "namespace": "a"})).unwrap();

        let observed = observed(Source::Pod, &metadata, serde_json::from_value(spec).unwrap()).unwrap();

        let names: Vec<&str> = observed.pull_secrets.iter().map(SecretName::as_str).collect();
        assert_eq!((names.len(), &names[..3]), (PULL_SECRETS_MAX + 1, &["k0", "k1", "k2"][..]));
        assert_eq!((observed.images.len(), observed.containers_left_out), (CONTAINERS_MAX, 4_900));
    }

    #[rstest]
    #[case("CronJob", true)]
    #[case("JobSet", false)]
    fn job_of_another_controller_is_a_workload(#[case] kind: &str, #[case] expected: bool) {
        let owners = json!([{"controller": true, "kind": kind, "name": "x"}]);
        let metadata = json!({"name": "batch", "ownerReferences": owners});
        assert_eq!(is_counted(&serde_json::from_value(metadata).unwrap()), expected);
    }

    #[test]
    fn limit_of_a_list_grows_again() {
        let limits: Vec<u32> =
            std::iter::successors(Some(1), |limit| Some(longer(*limit, 100)).filter(|next| next != limit)).collect();
        assert_eq!((limits.len(), limits.first(), limits.last()), (18, Some(&1), Some(&100)));
    }

    #[test]
    fn pod_is_counted_with_its_template_or_by_itself() {
        assert_eq!(source("", &json!({})), Source::Pod);
        assert_eq!(source("Node", &json!({})), Source::Pod);
        assert_eq!(source("ReplicaSet", &json!({"pod-template-hash": "x"})), Source::PodOfTemplate);
        assert_eq!(source("ReplicaSet", &json!({})), Source::PodOfOther("ReplicaSet/x".to_owned()));
        assert_eq!(source("Job", &json!({})), Source::PodOfTemplate);
    }
}
