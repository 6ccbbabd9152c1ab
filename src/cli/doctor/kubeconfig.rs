//! Diagnosis with the caller's own kubeconfig.

use std::{collections::HashSet, time::Duration};

use super::{Diagnosed, Local, Object, Search};
use crate::{
    cli::{CliError, argument},
    clients::{
        cluster::{ClusterClient, ClusterError, Pace, Place},
        outbound::Guard,
        registry::RegistryClient,
    },
    config::{Reader, variable},
    domain::{
        diagnosis::{Examination, Kubectl, MissingRead, WorkloadKind},
        names::{NamespaceName, SecretName},
    },
    service::{
        ServiceError,
        diagnosis::{Case, NamespaceFacts, QuestionLimits, RegistryQuestions},
    },
};

/// Maximum number of objects of a diagnosis without a named one.
pub(super) const OBJECTS_MAX: usize = 20;
/// Lists of workloads per second.
const LISTS_PER_SECOND: u32 = 10;
/// Limits of that diagnosis.
const MANY: QuestionLimits = QuestionLimits { questions: 600, within: Duration::from_mins(1) };

impl Local {
    /// Diagnoses the object. Without one, also returns what was searched for objects.
    pub(super) async fn diagnose(&self, object: Option<&Object>) -> Result<(Vec<Diagnosed>, Option<Search>), CliError> {
        let mut reader = Reader::new(&variable);
        let proxy = reader.outbound_proxy();
        let config = reader.verify(proxy.flatten());
        let config = reader.finish(|| config)?;
        let opened = ClusterClient::of_user(self.kubeconfig.as_deref(), self.context.as_deref()).await;
        let (client, of_context) = opened.map_err(ServiceError::from)?;
        let namespace = match &self.namespace {
            Some(namespace) => namespace.clone(),
            None => argument("the namespace of the context", NamespaceName::parse(&of_context))?,
        };
        // Without the right to read it, a namespace that does not exist has no objects.
        if client.has_namespace(&namespace).await.map_err(ServiceError::from)? == Some(false) {
            return Err(CliError::Failed(format!("the namespace {namespace} does not exist in the cluster")));
        }
        let (objects, search) = match object {
            Some(object) => (vec![object.clone()], None),
            None => search(&client, &namespace).await.map(|(objects, search)| (objects, Some(search)))?,
        };
        let facts = NamespaceFacts::new(&client, &namespace);
        let kubectl = self.kubectl()?;
        let mut examined = Vec::new();
        for target in objects {
            let case = match Case::read(&facts, target.target()).await {
                // Deleted since the list was read.
                Err(ServiceError::NotFound { .. }) if object.is_none() => continue,
                case => case?,
            };
            let (examination, missing_rights) = case.examine(&facts).await?;
            let examination = examination.with_kubectl(kubectl.clone()).with_local_node_option();
            examined.push((target, (examination, missing_rights)));
        }
        // The caller chose the cluster, and with it the registries of its images.
        let registries = RegistryClient::new(Guard::new(config.allowed), config.registries);
        let registries = registries.trusting_image_registries(self.local_node);
        let limits = if object.is_some() { QuestionLimits::default() } else { MANY };
        let questions = RegistryQuestions::new(&registries, limits).map_err(ServiceError::from)?;
        let mut found = Vec::new();
        for (object, examined) in examined {
            found.push(conclude(object, &facts, examined, &questions).await?);
        }
        Ok((found, search))
    }

    /// The printed command lines must reach the cluster that was diagnosed.
    fn kubectl(&self) -> Result<Kubectl, CliError> {
        let file = match self.kubeconfig.as_deref().map(std::path::Path::to_str) {
            Some(None) => return Err(CliError::Usage("the path of the kubeconfig must be UTF-8".to_owned())),
            file => file.flatten(),
        };
        Ok(Kubectl::with_options(file, self.context.as_deref()))
    }
}

/// Finds the objects to diagnose: pods that wait for an image, and workloads without a pod.
async fn search(client: &ClusterClient, namespace: &NamespaceName) -> Result<(Vec<Object>, Search), CliError> {
    let pods = client.list_waiting_pods(namespace).await.map_err(ServiceError::from)?;
    let mut objects: Vec<Object> = pods.waiting.into_iter().map(|name| Object { kind: None, name }).collect();
    if pods.is_complete {
        objects.extend(without_pods(client, namespace, &pods.workloads).await?);
    } else {
        note!("the namespace has too many pods: only a part of them was read");
    }
    if objects.len() > OBJECTS_MAX {
        note!("more than {OBJECTS_MAX} pods wait for an image, or workloads have no pod; the first are diagnosed");
        objects.truncate(OBJECTS_MAX);
    }
    Ok((objects, Search { namespace: namespace.clone(), pods: Some(pods.total) }))
}

/// Workloads of the namespace beside these, as far as the kubeconfig permits listing them.
async fn without_pods(
    client: &ClusterClient,
    namespace: &NamespaceName,
    with_pods: &HashSet<(WorkloadKind, String)>,
) -> Result<Vec<Object>, CliError> {
    let pace = Pace::new(LISTS_PER_SECOND);
    let mut objects: Vec<Object> = Vec::new();
    for kind in WorkloadKind::ALL {
        let listed = client.survey_workloads(kind, Place::Namespace(namespace), &pace, |workload| {
            // One more tells that there are too many.
            if objects.len() <= OBJECTS_MAX && !with_pods.contains(&(kind, workload.name.to_string())) {
                objects.push(Object { kind: Some(kind), name: workload.name });
            }
        });
        match listed.await {
            Ok(_) => {}
            Err(ClusterError::Forbidden { .. }) => {
                note!("may not list {}: name one to diagnose it, such as {}/NAME", kind.plural(), kind.as_str());
            }
            Err(error) => return Err(ServiceError::from(error).into()),
        }
    }
    Ok(objects)
}

async fn conclude(
    object: Object,
    facts: &NamespaceFacts<'_>,
    (mut examination, missing_rights): (Examination, Vec<MissingRead>),
    questions: &RegistryQuestions<'_>,
) -> Result<Diagnosed, CliError> {
    let answers = questions.ask(&examination).await;
    let answered = (answers.as_slice(), questions);
    facts.reserve_names(&mut examination, answered, async |_: &str| Ok(false), async |_: &SecretName| Ok(())).await?;
    let diagnosis = examination.conclude(&answers, &[], missing_rights, None);
    let diagnosis = serde_json::to_value(diagnosis).unwrap_or_default();
    Ok(Diagnosed { object, namespace: facts.namespace().clone(), diagnosis })
}
