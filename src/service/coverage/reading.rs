//! Reads what a cluster runs, in pages.

use std::{
    collections::{BTreeSet, HashMap},
    mem,
};

use super::{contents::SecretPlace, running::Progress};
use crate::{
    clients::cluster::{ClusterClient, ClusterError, Pace, Place},
    domain::{
        coverage::{Grouping, MissingPart},
        diagnosis::WorkloadKind,
        names::{NamespaceName, SecretName, ServiceAccountName},
        secret::SecretType,
    },
    service::ServiceError,
};

/// First minor version whose kubelets verify logins for cached images by default.
const VERIFYING_MINOR: u32 = 35;

/// `ServiceAccount`s, and pull secrets, of one run.
const OBJECTS_MAX: usize = 200_000;

/// What a cluster runs.
#[derive(Debug)]
pub(super) struct ClusterContent {
    /// Workloads and pods in groups.
    pub(super) grouping: Grouping,
    /// Pull secrets that exist, as far as they could be listed.
    pub(super) listed: BTreeSet<SecretPlace>,
    /// What could not be read.
    pub(super) missing: Vec<MissingPart>,
    /// Whether a node verifies logins for images that it has; none if it is unknown.
    pub(super) verifies_cached_images: Option<bool>,
}

/// Objects of a list.
#[derive(Debug, Clone, Copy)]
enum Listed {
    ServiceAccounts,
    Workloads(WorkloadKind),
    Pods,
    Secrets(SecretType),
}

impl Listed {
    const fn resource(self) -> &'static str {
        match self {
            Self::ServiceAccounts => "serviceaccounts",
            Self::Workloads(kind) => kind.plural(),
            Self::Pods => "pods",
            Self::Secrets(_) => "secrets",
        }
    }

    const fn effect(self) -> &'static str {
        match self {
            Self::ServiceAccounts => {
                "pull secrets of ServiceAccounts are unknown, which pods without their own list use"
            }
            Self::Workloads(_) => "workloads of this kind are counted by their pods only, and not at all without pods",
            Self::Pods => "pods without a controller, and pods that differ from their template, are not examined",
            Self::Secrets(_) => "pull secrets that nothing uses are unknown; only metadata is requested",
        }
    }
}

/// Reads a cluster.
pub(super) struct Reading<'a> {
    pub(super) client: &'a ClusterClient,
    pub(super) pace: &'a Pace,
    pub(super) progress: &'a Progress,
    /// Namespaces to list objects in where that is not permitted in the cluster.
    pub(super) namespaces: &'a [NamespaceName],
}

/// What was read so far.
#[derive(Debug, Default)]
struct State {
    service_accounts: HashMap<(NamespaceName, ServiceAccountName), Vec<SecretName>>,
    grouping: Grouping,
    listed: BTreeSet<SecretPlace>,
    missing: Vec<MissingPart>,
}

impl State {
    /// Adds objects that were left out to the missing parts. Returns whether there are none.
    fn leave_out(&mut self, objects: Listed, count: u32) -> bool {
        if count > 0 {
            let effect = format!("these objects are not examined: they are too long, or beyond {OBJECTS_MAX}");
            self.missing.push(MissingPart::of_limit(objects.resource(), effect, count));
        }
        count == 0
    }
}

impl Reading<'_> {
    /// Reads the cluster. A missing right leaves a part out.
    pub(super) async fn read(&self) -> Result<ClusterContent, ServiceError> {
        let mut state = State::default();
        let knows_accounts = self.list(Listed::ServiceAccounts, &mut state).await?;
        state.grouping = Grouping::new(mem::take(&mut state.service_accounts), knows_accounts);
        for kind in WorkloadKind::ALL {
            self.list(Listed::Workloads(kind), &mut state).await?;
        }
        self.list(Listed::Pods, &mut state).await?;
        for secret_type in [SecretType::DockerConfigJson, SecretType::Dockercfg] {
            self.list(Listed::Secrets(secret_type), &mut state).await?;
        }
        let verifies_cached_images = self.verifies_cached_images(&mut state).await?;
        let State { grouping, listed, missing, .. } = state;
        Ok(ClusterContent { grouping, listed, missing, verifies_cached_images })
    }

    /// Lists objects in the cluster or, where that is not permitted, in some namespaces. Returns
    /// whether all were listed.
    async fn list(&self, objects: Listed, state: &mut State) -> Result<bool, ServiceError> {
        match self.list_in(objects, Place::Cluster, state).await {
            Ok(left_out) => return Ok(state.leave_out(objects, left_out)),
            Err(ClusterError::Forbidden { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let (mut read, mut left_out) = (0, 0);
        for namespace in self.namespaces {
            match self.list_in(objects, Place::Namespace(namespace), state).await {
                Ok(of_namespace) => {
                    read += 1;
                    left_out += of_namespace;
                }
                Err(ClusterError::Forbidden { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        state.leave_out(objects, left_out);
        // Both types of Secrets need one right.
        if state.missing.iter().any(|part| part.verb.is_some() && part.resource == objects.resource()) {
            return Ok(false);
        }
        let effect = match read {
            0 => objects.effect().to_owned(),
            read => format!("{}; {read} namespaces of pull secrets were read instead of all", objects.effect()),
        };
        let (verb, resource) = (Some("list".to_owned()), objects.resource().to_owned());
        state.missing.push(MissingPart { verb, resource, effect, count: None });
        Ok(false)
    }

    async fn list_in(&self, objects: Listed, place: Place<'_>, state: &mut State) -> Result<u32, ClusterError> {
        let Self { client, pace, progress, .. } = self;
        match objects {
            Listed::ServiceAccounts => {
                let (accounts, mut beyond) = (&mut state.service_accounts, 0_u32);
                let each = |account, names: Vec<SecretName>| {
                    if accounts.len() < OBJECTS_MAX {
                        accounts.insert(account, names);
                    } else {
                        beyond += 1;
                    }
                };
                let too_long = client.survey_service_accounts(place, pace, each).await?;
                Ok(too_long + beyond)
            }
            Listed::Workloads(kind) => {
                let grouping = &mut state.grouping;
                client
                    .survey_workloads(kind, place, pace, |observed| {
                        grouping.add(observed);
                        progress.step();
                    })
                    .await
            }
            Listed::Pods => {
                let grouping = &mut state.grouping;
                client
                    .survey_pods(place, pace, |observed| {
                        grouping.add(observed);
                        progress.step();
                    })
                    .await
            }
            Listed::Secrets(secret_type) => {
                let (listed, mut beyond) = (&mut state.listed, 0_u32);
                let each = |namespace, name| {
                    if listed.len() < OBJECTS_MAX {
                        listed.insert((namespace, name));
                    } else {
                        beyond += 1;
                    }
                };
                let too_long = client.survey_secrets(secret_type, place, pace, each).await?;
                Ok(too_long + beyond)
            }
        }
    }

    async fn verifies_cached_images(&self, state: &mut State) -> Result<Option<bool>, ServiceError> {
        match self.client.kubelet_minors(self.pace).await {
            Ok(minors) => Ok(minors.last().map(|newest| *newest >= VERIFYING_MINOR)),
            Err(ClusterError::Forbidden { .. }) => {
                state.missing.push(MissingPart {
                    verb: Some("list".to_owned()),
                    resource: "nodes".to_owned(),
                    effect: "it is unknown whether nodes verify logins for images that they have".to_owned(),
                    count: None,
                });
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}
