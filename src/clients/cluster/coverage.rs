//! Lists for the coverage of a cluster, page by page. A page is dropped once it is grouped.
//!
//! Of pods and workloads only the images, pull secrets and owners are kept. Of Secrets only the
//! metadata is requested.

use std::collections::{BTreeMap, HashSet};

use http::{HeaderValue, Request, header};
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    ClusterClient, ClusterError, Pace,
    diagnosis::{Reference, name},
    unbuildable,
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
struct List<T> {
    metadata: ListMetadata,
    // Required: a response without `items` is not an empty list.
    items: Option<Vec<T>>,
}

#[derive(Default, Deserialize)]
struct ListMetadata {
    #[serde(rename = "continue", default)]
    continue_token: String,
}

/// Answer to an expired page.
#[derive(Deserialize)]
struct Expired {
    #[serde(default)]
    metadata: ListMetadata,
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
    spec: WorkloadSpec,
    #[serde(default)]
    status: WorkloadStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WorkloadSpec {
    template: Option<Template>,
    job_template: Option<JobTemplate>,
}

#[derive(Deserialize)]
struct Template {
    spec: PodSpec,
}

#[derive(Deserialize)]
struct JobTemplate {
    spec: JobSpec,
}

#[derive(Deserialize)]
struct JobSpec {
    template: Template,
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
    /// Lists the pods that have not ended.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn survey_pods(
        &self,
        scope: Place<'_>,
        pace: &Pace,
        mut each: impl FnMut(Observed),
    ) -> Result<(), ClusterError> {
        let path = scope.path("/api/v1", "pods");
        let request = ListRequest { path, parameters: "", limit: PAGE, metadata_only: false, may_be_unknown: false };
        self.list_pages(&request, "pods", pace, |pod: Pod| {
            if !matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
                let source = source_of_pod(&pod.metadata);
                observed(source, &pod.metadata, pod.spec).into_iter().for_each(&mut each);
            }
        })
        .await
        .map(drop)
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
    ) -> Result<(), ClusterError> {
        let versions = if kind == WorkloadKind::CronJob { &["v1", "v1beta1"][..] } else { &["v1"] };
        for version in versions {
            let path = scope.path(&format!("/apis/{}/{version}", kind.group()), kind.plural());
            let may_be_unknown = versions.last() != Some(version);
            let request = ListRequest { path, parameters: "", limit: PAGE, metadata_only: false, may_be_unknown };
            let listed = self.list_pages(&request, kind.plural(), pace, |workload: Workload| {
                let is_counted = workload.metadata.controller().is_some();
                let has_ended = workload.status.conditions.iter().any(|condition| {
                    condition.status == "True" && matches!(condition.kind.as_str(), "Complete" | "Failed")
                });
                let is_left_out = kind == WorkloadKind::Job && (is_counted || has_ended);
                let of_job = workload.spec.job_template.map(|job| job.spec.template);
                if let Some(template) = workload.spec.template.or(of_job).filter(|_| !is_left_out) {
                    let source = Source::Template(kind);
                    observed(source, &workload.metadata, template.spec).into_iter().for_each(&mut each);
                }
            });
            // API servers before 1.21 have the older version only.
            if !matches!(listed.await?, Listing::Unknown) {
                break;
            }
        }
        Ok(())
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
    ) -> Result<(), ClusterError> {
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
        .map(drop)
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
    ) -> Result<(), ClusterError> {
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
        .map(drop)
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

    /// Lists objects page by page, each page after a wait for the pace.
    async fn list_pages<T: DeserializeOwned>(
        &self,
        list: &ListRequest<'_>,
        objects: &str,
        pace: &Pace,
        mut each: impl FnMut(T),
    ) -> Result<Listing, ClusterError> {
        let (mut limit, mut next) = (list.limit, String::new());
        for _ in 0..PAGES_MAX {
            pace.wait().await;
            let ListRequest { path, parameters, metadata_only, .. } = list;
            let mut request = Request::get(format!("{path}?limit={limit}{parameters}{next}"));
            if *metadata_only {
                request = request.header(header::ACCEPT, HeaderValue::from_static(METADATA_ONLY));
            }
            let request = request.body(Vec::new()).map_err(unbuildable)?;
            let response = self.call_up_to(request, self.deadline(), BODY_MAX).await?;
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
                _ if response.body.is_none() && limit > 1 => limit /= 4,
                _ => {
                    let list: List<T> = response.read(self.server())?;
                    list.items.into_iter().flatten().for_each(&mut each);
                    if list.metadata.continue_token.is_empty() {
                        return Ok(Listing::Complete);
                    }
                    next = continued(&list.metadata);
                }
            }
            limit = limit.max(1);
        }
        let detail = format!("{} lists more than {PAGES_MAX} pages of {objects}", self.server());
        Err(ClusterError::Unreachable { detail })
    }
}

/// Result of a list.
enum Listing {
    /// All objects were listed.
    Complete,
    /// The API server does not know the resource.
    Unknown,
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

    #[test]
    fn pod_is_counted_with_its_template_or_by_itself() {
        assert_eq!(source("", &json!({})), Source::Pod);
        assert_eq!(source("Node", &json!({})), Source::Pod);
        assert_eq!(source("ReplicaSet", &json!({"pod-template-hash": "x"})), Source::PodOfTemplate);
        assert_eq!(source("ReplicaSet", &json!({})), Source::PodOfOther("ReplicaSet/x".to_owned()));
        assert_eq!(source("Job", &json!({})), Source::PodOfTemplate);
    }
}
