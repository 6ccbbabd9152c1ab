//! Reads for the diagnosis of image pulls: pods, templates of workloads, the pull secrets of
//! `ServiceAccount`s, the values of Secrets by name, and events of pods.
//!
//! The only reads of values of Secrets. They end with the diagnosis, or the run of a coverage.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use chrono::{DateTime, Utc};
use http::Request;
use kube::{Resource, api::ListParams};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    ClusterClient, ClusterError,
    response::Response,
    unbuildable,
    workload::{WorkloadSpec, versions},
};
use crate::domain::{
    diagnosis::{
        Container, ContainerKind, Controller, ListedPod, Lookup, Node, NodeChoice, PodFacts, PodPhase, PullEvent,
        SecretValue, Subject, WaitingReason, WorkloadKind,
    },
    names::{Name, NamespaceName, PodName, SecretName, ServiceAccountName},
    pull_secret::ID_LABEL,
    secret::MANAGED_BY_LABEL,
};

/// Maximum number of events of a pod.
const EVENTS_MAX: usize = 100;
/// Nodes in one page. Their metadata has long annotations.
const NODES_PAGE: u32 = 100;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pod {
    metadata: PodMetadata,
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodMetadata {
    name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    owner_references: Vec<OwnerReference>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OwnerReference {
    #[serde(default)]
    controller: bool,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    name: String,
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
    node_name: Option<String>,
    #[serde(default)]
    node_selector: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct ContainerSpec {
    name: String,
    #[serde(default)]
    image: String,
}

#[derive(Deserialize)]
pub(super) struct Reference {
    #[serde(default)]
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStatus {
    #[serde(default)]
    phase: String,
    #[serde(default)]
    init_container_statuses: Vec<ContainerStatus>,
    #[serde(default)]
    container_statuses: Vec<ContainerStatus>,
    #[serde(default)]
    ephemeral_container_statuses: Vec<ContainerStatus>,
}

#[derive(Deserialize)]
struct ContainerStatus {
    name: String,
    #[serde(default)]
    state: ContainerState,
    /// Empty until the image is on the node.
    #[serde(rename = "imageID", default)]
    image_id: String,
}

#[derive(Default, Deserialize)]
struct ContainerState {
    waiting: Option<Waiting>,
}

#[derive(Deserialize)]
struct Waiting {
    #[serde(default)]
    reason: String,
}

#[derive(Deserialize)]
struct Workload {
    spec: WorkloadSpec<PodSpec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceAccount {
    #[serde(default)]
    image_pull_secrets: Vec<Reference>,
}

#[derive(Deserialize)]
struct Secret {
    metadata: SecretMetadata,
    #[serde(rename = "type", default)]
    secret_type: String,
    #[serde(default)]
    data: BTreeMap<String, SecretString>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SecretMetadata {
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    owner_references: Vec<IgnoredAny>,
    resource_version: Option<String>,
}

#[derive(Deserialize)]
struct Events {
    items: Option<Vec<Event>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    #[serde(default)]
    involved_object: InvolvedObject,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
    event_time: Option<DateTime<Utc>>,
    last_timestamp: Option<DateTime<Utc>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct InvolvedObject {
    #[serde(default)]
    field_path: String,
}

impl Pod {
    /// None for an invalid name, which the API server does not accept either.
    pub(super) fn listed(&self) -> Option<ListedPod> {
        let phase = PodPhase::parse(&self.status.phase);
        Some(ListedPod {
            name: PodName::parse(&self.metadata.name).ok()?,
            owner: self.metadata.controller().and_then(|controller| controller.workload),
            phase,
            is_new: phase == PodPhase::Pending && self.status.containers().next().is_none(),
            waiting: self.status.containers().find_map(ContainerStatus::waiting),
        })
    }
}

impl PodMetadata {
    fn controller(&self) -> Option<Controller> {
        let owner = self.owner_references.iter().find(|owner| owner.controller)?;
        let (kind, name) = if owner.kind == "ReplicaSet" {
            // The ReplicaSet of a Deployment is named after it and the hash of its template.
            let hash = self.labels.get("pod-template-hash").map(|hash| format!("-{hash}"));
            let name = hash.and_then(|hash| owner.name.strip_suffix(&hash));
            (Some(WorkloadKind::Deployment), name)
        } else {
            (WorkloadKind::parse(&owner.kind).ok(), Some(owner.name.as_str()))
        };
        let group = owner.api_version.split('/').next();
        let kind = kind.filter(|kind| group == Some(kind.group()));
        let workload = kind.zip(name.and_then(|name| PodName::parse(name).ok()));
        Some(Controller { workload, has_own_list: None })
    }
}

impl Event {
    fn time(&self) -> Option<DateTime<Utc>> {
        self.last_timestamp.or(self.event_time)
    }
}

impl PodStatus {
    /// Statuses of all containers.
    fn containers(&self) -> impl Iterator<Item = &ContainerStatus> {
        let statuses = self.init_container_statuses.iter().chain(&self.container_statuses);
        statuses.chain(&self.ephemeral_container_statuses)
    }
}

impl ContainerStatus {
    /// Why the container waits for its image.
    fn waiting(&self) -> Option<WaitingReason> {
        WaitingReason::parse(&self.state.waiting.as_ref()?.reason)
    }
}

impl ClusterClient {
    /// Reads a pod; none if it does not exist.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn read_pod(&self, namespace: &NamespaceName, name: &PodName) -> Result<Option<PodFacts>, ClusterError> {
        let right = format!("get pods in namespace {namespace}");
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        let Lookup::Found(response) = self.read(&path, &right).await? else { return Ok(None) };
        let pod: Pod = response.read(self.server())?;
        let subject = Subject::Pod { name: name.clone(), controller: pod.metadata.controller() };
        let statuses: Vec<_> = pod.status.containers().collect();
        let uid = Some(pod.metadata.uid).filter(|uid| !uid.is_empty());
        Ok(Some(PodFacts { uid, ..facts(subject, namespace, pod.spec, &statuses) }))
    }

    /// Whether a namespace exists; none if the credential may not read it.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]. A missing right is no error.
    pub async fn has_namespace(&self, namespace: &NamespaceName) -> Result<Option<bool>, ClusterError> {
        Ok(match self.read_if_allowed(&format!("/api/v1/namespaces/{namespace}")).await? {
            Lookup::Found(_) => Some(true),
            Lookup::Missing => Some(false),
            Lookup::Forbidden | Lookup::NotRead => None,
        })
    }

    /// Reads the template of a workload; none if the workload does not exist.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn read_workload(
        &self,
        namespace: &NamespaceName,
        kind: WorkloadKind,
        name: &PodName,
    ) -> Result<Option<PodFacts>, ClusterError> {
        let right = format!("get {} in namespace {namespace}", kind.plural());
        for version in versions(kind) {
            let (group, plural) = (kind.group(), kind.plural());
            let path = format!("/apis/{group}/{version}/namespaces/{namespace}/{plural}/{name}");
            // An unknown version is a 404, too.
            let Lookup::Found(response) = self.read(&path, &right).await? else { continue };
            let workload: Workload = response.read(self.server())?;
            let Some(pod) = workload.spec.pod() else { return Ok(None) };
            let subject = Subject::Workload { kind, name: name.clone() };
            return Ok(Some(facts(subject, namespace, pod, &[])));
        }
        Ok(None)
    }

    /// Reads the pull secrets of a `ServiceAccount`.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]. A missing right is no error.
    pub async fn read_pull_secrets(
        &self,
        namespace: &NamespaceName,
        account: &ServiceAccountName,
    ) -> Result<Lookup<Vec<SecretName>>, ClusterError> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}");
        Ok(match self.read_if_allowed(&path).await? {
            Lookup::Found(response) => {
                let account: ServiceAccount = response.read(self.server())?;
                Lookup::Found(account.image_pull_secrets.iter().filter_map(name).collect())
            }
            Lookup::Missing => Lookup::Missing,
            Lookup::Forbidden => Lookup::Forbidden,
            Lookup::NotRead => Lookup::NotRead,
        })
    }

    /// Reads the value of a Secret.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]. A missing right is no error.
    pub async fn read_secret_value(
        &self,
        namespace: &NamespaceName,
        name: &SecretName,
    ) -> Result<Lookup<SecretValue>, ClusterError> {
        let path = format!("/api/v1/namespaces/{namespace}/secrets/{name}");
        Ok(match self.read_if_allowed(&path).await? {
            // Longer than the maximum of a response, or no Secret.
            Lookup::Found(response) => response.json().map_or(Lookup::NotRead, |secret| Lookup::Found(value(&secret))),
            Lookup::Missing => Lookup::Missing,
            Lookup::Forbidden => Lookup::Forbidden,
            Lookup::NotRead => Lookup::NotRead,
        })
    }

    /// Adds what the events of a pod report about pulls to its containers. Returns whether the
    /// events could be read.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]. A missing right is no error.
    pub async fn read_pull_events(&self, pod: &mut PodFacts) -> Result<bool, ClusterError> {
        let Subject::Pod { name, .. } = &pod.subject else { return Ok(true) };
        // An earlier pod of this name has another uid.
        let is_plain = |uid: &&String| uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let uid = pod.uid.as_ref().filter(is_plain).map(|uid| format!("%2CinvolvedObject.uid%3D{uid}"));
        let uid = uid.unwrap_or_default();
        let selector = format!("involvedObject.kind%3DPod%2CinvolvedObject.name%3D{name}{uid}");
        let path = format!("/api/v1/namespaces/{}/events?limit={EVENTS_MAX}&fieldSelector={selector}", pod.namespace);
        let Lookup::Found(response) = self.read_if_allowed(&path).await? else { return Ok(false) };
        let events: Option<Events> = response.json();
        let mut events = events.and_then(|events| events.items).unwrap_or_default();
        events.sort_by_key(Event::time);
        for event in events {
            let Some(reported) = PullEvent::classify(&event.reason, &event.message) else { continue };
            let place = container_of(&event.involved_object.field_path);
            for container in pod.containers.iter_mut().filter(|one| Some(one.name.as_str()) == place) {
                container.event = Some(reported.after(container.event));
            }
        }
        Ok(true)
    }

    /// Lists the nodes of a choice. Only their metadata is requested.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]. A missing right is no error.
    pub async fn read_nodes(&self, choice: &NodeChoice) -> Result<Lookup<Vec<Node>>, ClusterError> {
        let labels: Vec<String> = choice.selector.iter().map(|(label, value)| format!("{label}={value}")).collect();
        let mut params = ListParams::default().labels(&labels.join(","));
        if let Some(name) = &choice.name {
            params = params.fields(&format!("metadata.name={name}"));
        }
        let requests = kube::core::Request::new(k8s_openapi::api::core::v1::Node::url_path(&(), None));
        match self.list_metadata(&requests, params, (NODES_PAGE, "nodes")).await {
            Ok(nodes) => {
                let nodes = nodes.into_iter().map(|node| Node { name: node.name, labels: node.labels });
                Ok(Lookup::Found(nodes.collect()))
            }
            Err(ClusterError::Forbidden { .. }) => Ok(Lookup::Forbidden),
            Err(error) => Err(error),
        }
    }

    /// Reads an object that the diagnosis cannot do without.
    async fn read(&self, path: &str, right: &str) -> Result<Lookup<Response>, ClusterError> {
        let request = Request::get(path).body(Vec::new()).map_err(unbuildable)?;
        let response = self.call(request, self.deadline()).await?;
        match response.status {
            404 => Ok(Lookup::Missing),
            _ if response.is_success() => Ok(Lookup::Found(response)),
            _ => Err(response.error(self.server(), right)),
        }
    }

    async fn read_if_allowed(&self, path: &str) -> Result<Lookup<Response>, ClusterError> {
        match self.read(path, "read what a diagnosis needs").await {
            Err(ClusterError::Forbidden { .. }) => Ok(Lookup::Forbidden),
            other => other,
        }
    }
}

fn facts(subject: Subject, namespace: &NamespaceName, spec: PodSpec, statuses: &[&ContainerStatus]) -> PodFacts {
    let kinds = [
        (ContainerKind::Init, spec.init_containers),
        (ContainerKind::Container, spec.containers),
        (ContainerKind::Ephemeral, spec.ephemeral_containers),
    ];
    let waiting = |name: &str| statuses.iter().find(|status| status.name == name)?.waiting();
    let has_started = |name: &str| statuses.iter().any(|status| status.name == name && !status.image_id.is_empty());
    let containers = kinds.into_iter().flat_map(|(kind, containers)| {
        containers.into_iter().filter_map(move |one| Some((Name::parse(&one.name).ok()?, kind, one.image)))
    });
    let containers = containers.map(|(name, kind, image)| Container {
        waiting: waiting(name.as_str()),
        event: None,
        has_started: has_started(name.as_str()),
        name,
        kind,
        image,
    });
    let pull_secrets: Vec<SecretName> = spec.image_pull_secrets.iter().filter_map(name).collect();
    let account = spec.service_account_name.and_then(|name| ServiceAccountName::parse(&name).ok());
    PodFacts {
        containers: containers.collect(),
        has_invalid_reference: pull_secrets.len() != spec.image_pull_secrets.len(),
        pull_secrets,
        service_account: account.unwrap_or_else(ServiceAccountName::default_account),
        nodes: NodeChoice { name: spec.node_name, selector: spec.node_selector },
        namespace: namespace.clone(),
        uid: None,
        subject,
    }
}

/// None for an invalid name, which no Secret has.
pub(super) fn name(reference: &Reference) -> Option<SecretName> {
    SecretName::parse(&reference.name).ok()
}

/// The two documents that the kubelet reads. Everything else is dropped.
fn value(secret: &Secret) -> SecretValue {
    let document = |key: &str| {
        let decoded = BASE64_STANDARD.decode(secret.data.get(key)?.expose_secret()).ok()?;
        Some(SecretSlice::from(decoded))
    };
    let is_document = |key: &str| matches!(key, ".dockerconfigjson" | ".dockercfg");
    let Secret { metadata, data, .. } = secret;
    // Another tool would restore the Secret, or lose it.
    let is_managed = metadata.labels.get(MANAGED_BY_LABEL.0).is_some_and(|by| by != MANAGED_BY_LABEL.1);
    SecretValue {
        secret_type: secret.secret_type.clone(),
        dockerconfigjson: document(".dockerconfigjson"),
        dockercfg: document(".dockercfg"),
        has_other_data: data.len() > 1 || data.keys().any(|key| !is_document(key)),
        has_owner: is_managed || !metadata.owner_references.is_empty(),
        resource_version: metadata.resource_version.clone(),
        pull_secret_id: secret.metadata.labels.get(ID_LABEL).and_then(|id| id.parse().ok()),
    }
}

/// Name of the container in `spec.containers{web}`.
fn container_of(field_path: &str) -> Option<&str> {
    field_path.split_once('{')?.1.strip_suffix('}')
}
