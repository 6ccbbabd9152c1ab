//! Diagnosis with the caller's own kubeconfig.

use std::time::Duration;

use super::{Diagnosed, Local, Object};
use crate::{
    cli::{CliError, argument},
    clients::{cluster::ClusterClient, outbound::Guard, registry::RegistryClient},
    config::{Reader, variable},
    domain::{
        diagnosis::{Examination, Kubectl, MissingRead},
        names::NamespaceName,
    },
    service::{
        ServiceError,
        diagnosis::{Case, NamespaceFacts, QuestionLimits, RegistryQuestions},
    },
};

/// Maximum number of pods of a diagnosis without an object.
pub(super) const PODS_MAX: usize = 20;
/// Limits of that diagnosis.
const MANY: QuestionLimits = QuestionLimits { questions: 600, within: Duration::from_mins(1) };

impl Local {
    pub(super) async fn diagnose(&self, object: Option<&Object>) -> Result<Vec<Diagnosed>, CliError> {
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
        let objects = match object {
            Some(object) => vec![object.clone()],
            None => waiting_pods(&client, &namespace).await?,
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
            examined.push((target, (examination.with_kubectl(kubectl.clone()), missing_rights)));
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
        Ok(found)
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

/// Pods of the namespace that wait for an image.
async fn waiting_pods(client: &ClusterClient, namespace: &NamespaceName) -> Result<Vec<Object>, CliError> {
    let (pods, is_complete) = client.list_waiting_pods(namespace).await.map_err(ServiceError::from)?;
    if !is_complete {
        note!("the namespace has too many pods: only a part of them was read");
    }
    if pods.len() > PODS_MAX {
        note!("{} pods wait for an image; the first {PODS_MAX} are diagnosed", pods.len());
    }
    Ok(pods.into_iter().take(PODS_MAX).map(|name| Object { kind: None, name }).collect())
}

async fn conclude(
    object: Object,
    facts: &NamespaceFacts<'_>,
    (mut examination, missing_rights): (Examination, Vec<MissingRead>),
    questions: &RegistryQuestions<'_>,
) -> Result<Diagnosed, CliError> {
    let answers = questions.ask(&examination).await;
    facts.reserve_names(&mut examination, &answers, async |_: &str| Ok(false)).await?;
    let diagnosis = examination.conclude(&answers, &[], missing_rights, None);
    let diagnosis = serde_json::to_value(diagnosis).unwrap_or_default();
    Ok(Diagnosed { object, namespace: facts.namespace().clone(), diagnosis })
}
