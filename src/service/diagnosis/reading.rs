//! Reads from a cluster what an examination needs. Each object of a namespace is read once.
//!
//! Needs no database: the command line uses it with a kubeconfig.

use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::memo::Memo;
use crate::{
    clients::cluster::{ClusterClient, ClusterError},
    domain::{
        diagnosis::{
            Examination, ImageAnswers, Lookup, MissingRead, Node, PodFacts, ReadSecret, Subject, WorkloadKind,
            pull_secret_names,
        },
        names::{NamespaceName, PodName, SecretName, ServiceAccountName},
    },
    service::{ServiceError, spawn_blocking},
};

/// Maximum number of Secrets that one diagnosis reads.
const SECRETS_MAX: usize = 20;
/// Maximum number of names of new Secrets that one diagnosis looks up.
const NAMES_MAX: usize = 10;
/// Maximum number of concurrent reads.
const CONCURRENCY: usize = 4;

/// What to diagnose.
#[derive(Debug)]
pub enum Target {
    /// A pod.
    Pod(PodName),
    /// The pods of a workload.
    Workload(WorkloadKind, PodName),
    /// A pod that does not exist yet.
    Spec(Box<PodFacts>),
}

/// Objects of one namespace that diagnoses read.
#[derive(Debug)]
pub struct NamespaceFacts<'a> {
    client: &'a ClusterClient,
    namespace: &'a NamespaceName,
    service_accounts: Memo<ServiceAccountName, Lookup<Vec<SecretName>>>,
    secrets: Memo<SecretName, Arc<ReadSecret>>,
}

impl<'a> NamespaceFacts<'a> {
    /// Facts of a namespace. Nothing is read yet.
    #[must_use]
    pub fn new(client: &'a ClusterClient, namespace: &'a NamespaceName) -> Self {
        Self { client, namespace, service_accounts: Memo::default(), secrets: Memo::default() }
    }

    /// The namespace.
    #[must_use]
    pub const fn namespace(&self) -> &'a NamespaceName {
        self.namespace
    }

    /// Pull secrets of the pod's `ServiceAccount`, unless the pod exists and has its own list.
    async fn of_service_account(&self, pod: &PodFacts) -> Result<Lookup<Vec<SecretName>>, ClusterError> {
        if let Subject::Pod { controller, .. } = &pod.subject {
            // The list of a pod whose template has none came from its `ServiceAccount`.
            let is_copied = controller.as_ref().is_some_and(|one| one.has_own_list == Some(false));
            if pod.has_own_list() && !is_copied {
                return Ok(Lookup::NotRead);
            }
        }
        let read = self.client.read_pull_secrets(self.namespace, &pod.service_account);
        self.service_accounts.get(pod.service_account.clone(), read).await
    }

    async fn secret(&self, name: SecretName) -> Result<Arc<ReadSecret>, ServiceError> {
        let read = async {
            let found = self.client.read_secret_value(self.namespace, &name).await?;
            let name = name.clone();
            spawn_blocking(move || Ok(Arc::new(ReadSecret::of(name, found)))).await
        };
        self.secrets.get(name.clone(), read).await
    }

    /// Keeps fixes from creating a Secret whose name the namespace has already, unless `is_declared`
    /// tells that a pull secret places it. Only a fix depends on it, so that a lookup which fails
    /// ends the search.
    ///
    /// # Errors
    ///
    /// The error of `is_declared`.
    pub async fn reserve_names(
        &self,
        examination: &mut Examination,
        answers: &[ImageAnswers],
        is_declared: impl AsyncFn(&str) -> Result<bool, ServiceError>,
    ) -> Result<(), ServiceError> {
        let mut known: Vec<SecretName> = Vec::new();
        while known.len() < NAMES_MAX {
            let lacking = examination.lacking(answers);
            let new = lacking.iter().filter_map(|(index, _)| SecretName::parse(&examination.new_secret(*index)?).ok());
            let Some(name) = new.into_iter().find(|name| !known.contains(name)) else { return Ok(()) };
            if !is_declared(name.as_str()).await? {
                match self.client.get_secret(self.namespace, &name).await {
                    Ok(Some(_)) => examination.reserve(name.clone()),
                    Ok(None) => {}
                    Err(_) => return Ok(()),
                }
            }
            known.push(name);
        }
        Ok(())
    }

    /// Whether the template of the pod's controller has a list of pull secrets.
    async fn read_template(&self, pod: &mut PodFacts) {
        if let Subject::Pod { controller: Some(controller), .. } = &mut pod.subject
            && let Some((kind, name)) = &controller.workload
        {
            // Only a fix depends on it.
            let template = self.client.read_workload(self.namespace, *kind, name).await;
            controller.has_own_list = template.ok().flatten().map(|template| template.has_own_list());
        }
    }

    async fn secrets(&self, names: Vec<SecretName>) -> Result<Vec<Arc<ReadSecret>>, ServiceError> {
        let reads = names.into_iter().enumerate().map(|(index, name)| async move {
            if index < SECRETS_MAX {
                self.secret(name).await
            } else {
                Ok(Arc::new(ReadSecret::of(name, Lookup::NotRead)))
            }
        });
        stream::iter(reads).buffered(CONCURRENCY).try_collect().await
    }
}

/// A pod, and what is known of it before its pull secrets are read.
#[derive(Debug)]
pub struct Case {
    pod: PodFacts,
    of_service_account: Lookup<Vec<SecretName>>,
    nodes: Arc<Lookup<Vec<Node>>>,
    missing_rights: Vec<MissingRead>,
}

impl Case {
    /// Reads the target, its events, its `ServiceAccount` and its nodes.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the target does not exist, [`ServiceError::Cluster`] if the API
    /// server does not answer or does not permit reading the target.
    pub async fn read(facts: &NamespaceFacts<'_>, target: Target) -> Result<Self, ServiceError> {
        let (client, namespace) = (facts.client, facts.namespace);
        let mut pod = match target {
            Target::Pod(name) => {
                let found = client.read_pod(namespace, &name).await?;
                found.ok_or_else(|| ServiceError::not_found("pod", &name))?
            }
            Target::Workload(kind, name) => {
                let found = client.read_workload(namespace, kind, &name).await?;
                found.ok_or_else(|| ServiceError::not_found(kind.as_str(), &name))?
            }
            Target::Spec(facts) => *facts,
        };
        let has_events = client.read_pull_events(&mut pod).await?;
        facts.read_template(&mut pod).await;
        let nodes = client.read_nodes(&pod.nodes).await?;
        let mut case = Self::of_pod(facts, pod, Arc::new(nodes)).await?;
        if !has_events {
            case.missing_rights.push(EVENTS);
        }
        Ok(case)
    }

    /// Case of a pod that was read, in a cluster with these nodes. Reads its `ServiceAccount`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Cluster`] if the API server does not answer.
    pub async fn of_pod(
        facts: &NamespaceFacts<'_>,
        pod: PodFacts,
        nodes: Arc<Lookup<Vec<Node>>>,
    ) -> Result<Self, ServiceError> {
        let mut missing_rights = Vec::new();
        let of_service_account = facts.of_service_account(&pod).await?;
        if let Lookup::Forbidden = of_service_account {
            missing_rights.push(SERVICE_ACCOUNTS);
        }
        if let Lookup::Forbidden = *nodes {
            missing_rights.push(NODES);
        }
        Ok(Self { pod, of_service_account, nodes, missing_rights })
    }

    /// Names of the pull secrets that [`examine`](Self::examine) reads.
    #[must_use]
    pub fn secrets(&self) -> Vec<SecretName> {
        let mut names = pull_secret_names(&self.pod, &self.of_service_account).1;
        names.truncate(SECRETS_MAX);
        names
    }

    /// Reads the pull secrets and finds the entries of each image. Also returns the missing rights.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Cluster`] if the API server does not answer.
    pub async fn examine(self, facts: &NamespaceFacts<'_>) -> Result<(Examination, Vec<MissingRead>), ServiceError> {
        let Self { pod, of_service_account, nodes, mut missing_rights } = self;
        let secrets = facts.secrets(pull_secret_names(&pod, &of_service_account).1).await?;
        if secrets.iter().any(|secret| secret.is_forbidden()) {
            missing_rights.push(SECRETS);
        }
        let examine = move || Ok(Examination::new(pod, &of_service_account, secrets, &nodes));
        Ok((spawn_blocking(examine).await?, missing_rights))
    }
}

const EVENTS: MissingRead = MissingRead {
    verb: "list",
    resource: "events",
    effect: "the diagnosis lacks what the kubelet reported about the pulls",
};
const SERVICE_ACCOUNTS: MissingRead = MissingRead {
    verb: "get",
    resource: "serviceaccounts",
    effect: "pull secrets of the ServiceAccount are unknown, which a pod without its own list uses",
};
const NODES: MissingRead = MissingRead {
    verb: "list",
    resource: "nodes",
    effect: "the platforms of nodes are unknown, so only a node selector can show that an image has none for them",
};
const SECRETS: MissingRead =
    MissingRead { verb: "get", resource: "secrets", effect: "logins cannot be found or tried" };
