//! Diagnosis with the caller's own kubeconfig.

use std::time::Duration;

use super::{Diagnosed, Local, Object};
use crate::{
    cli::{CliError, argument},
    clients::{cluster::ClusterClient, outbound::Guard, registry::RegistryClient},
    config::{Reader, variable},
    domain::{
        diagnosis::{Examination, MissingRead},
        names::NamespaceName,
    },
    service::{
        ServiceError,
        diagnosis::{Case, NamespaceFacts, QuestionLimits, RegistryQuestions},
    },
};

/// Maximum number of pods of a diagnosis without an object.
const PODS_MAX: usize = 20;
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
        let mut examined = Vec::new();
        for object in objects {
            let case = Case::read(&facts, object.target()).await?;
            examined.push((object, case.examine(&facts).await?));
        }
        // The registries of the images are allowed at any address, because the caller chose the
        // cluster; the token services that they name are not.
        let mut allowed = config.allowed;
        let hosts = examined.iter().flat_map(|(_, (examination, _))| examination.registry_hosts());
        hosts.for_each(|host| allowed.allow_host(&host));
        let registries = RegistryClient::new(Guard::new(allowed), config.registries);
        let limits = if object.is_some() { QuestionLimits::default() } else { MANY };
        let questions = RegistryQuestions::new(&registries, limits);
        let mut found = Vec::new();
        for (object, examined) in examined {
            found.push(conclude(object, &namespace, examined, &questions).await);
        }
        Ok(found)
    }
}

/// Pods of the namespace that wait for an image.
async fn waiting_pods(client: &ClusterClient, namespace: &NamespaceName) -> Result<Vec<Object>, CliError> {
    let pods = client.list_waiting_pods(namespace).await.map_err(ServiceError::from)?;
    if pods.len() > PODS_MAX {
        note!("{} pods wait for an image; the first {PODS_MAX} are diagnosed", pods.len());
    }
    Ok(pods.into_iter().take(PODS_MAX).map(|name| Object { kind: None, name }).collect())
}

async fn conclude(
    object: Object,
    namespace: &NamespaceName,
    (examination, missing_rights): (Examination, Vec<MissingRead>),
    questions: &RegistryQuestions<'_>,
) -> Diagnosed {
    let answers = questions.ask(&examination).await;
    let diagnosis = examination.conclude(&answers, &[], missing_rights, None);
    let diagnosis = serde_json::to_value(diagnosis).unwrap_or_default();
    Diagnosed { object, namespace: namespace.clone(), diagnosis }
}
