//! Diagnosis of image pulls: reads a pod and its pull secrets, and asks the registries.
//!
//! Values of Secrets are in memory until the request ends. An audit event with the names of the
//! Secrets is durable before the first one is read; a further Secret that a fix may use has its own.
//!
//! [`NamespaceFacts`], [`Case`] and [`RegistryQuestions`] do the work without a database.

mod accounts;
mod applying;
mod managed;
mod memo;
mod questions;
mod reading;
mod remembered;

use std::sync::Arc;

pub use self::{
    applying::Remedies,
    questions::{QuestionLimits, RegistryQuestions},
    reading::{Case, NamespaceFacts, Target},
    remembered::RememberedAnswers,
};
use crate::{
    clients::{
        cluster::{ClusterError, ContinueToken, PodPage},
        registry::RegistryClient,
    },
    domain::{
        audit::{Action, NewEvent, Resource},
        caller::Call,
        diagnosis::{Diagnosis, Examination, FixAccount, ImageAnswers, PullSecretName, RegcredContext},
        names::{Name, NamespaceName, SecretName},
    },
    service::{
        ServiceError,
        audit::{refusals::Refusal, writer::AuditWriter},
        clusters::Clusters,
        connection,
        docker_configs::DockerConfigs,
        pull_secrets,
    },
    storage::{self, PgConnection, PgPool},
};

/// Service that diagnoses image pulls.
#[derive(Debug, Clone)]
pub struct Diagnoses {
    pool: PgPool,
    clusters: Clusters,
    docker_configs: DockerConfigs,
    registries: Arc<RegistryClient>,
    audit_writer: AuditWriter,
}

impl Diagnoses {
    /// Creates the service.
    #[must_use]
    pub fn new(
        pool: PgPool,
        clusters: Clusters,
        docker_configs: DockerConfigs,
        registries: Arc<RegistryClient>,
        audit_writer: AuditWriter,
    ) -> Self {
        Self { pool, clusters, docker_configs, registries, audit_writer }
    }

    /// Diagnoses the image pulls of a pod.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`] for the cluster, and
    ///   [`ServiceError::NotFound`] for the pod.
    /// - [`ClusterError::NamespaceNotFound`] for a namespace that is not granted, without a call to
    ///   the cluster.
    /// - [`ServiceError::Cluster`] if the API server does not answer, or does not let regcred read
    ///   the pod.
    /// - [`ServiceError::Audit`] if the event cannot be stored: no Secret is read then.
    pub async fn diagnose(
        &self,
        caller: &Call,
        (cluster, namespace): (&Name, &NamespaceName),
        target: Target,
    ) -> Result<Diagnosis, ServiceError> {
        let client = self.clusters.client(caller, cluster).await?;
        let resource = resource(cluster, namespace, &target);
        if !caller.grants.include_namespace(namespace.as_str()) {
            self.refuse(caller, resource);
            return Err(ClusterError::NamespaceNotFound.into());
        }
        let facts = NamespaceFacts::new(&client, namespace);
        let case = Case::read(&facts, target).await?;
        let secrets = case.secrets();
        let read = secrets.iter().map(|name| Resource::secret(cluster, namespace, name));
        let event = NewEvent::of(caller, Action::PodDiagnose, resource.clone()).related(read.collect());
        self.audit_writer.record(event).await?;
        let (mut examination, missing_rights) = case.examine(&facts).await?;
        let questions = RegistryQuestions::new(&self.registries, QuestionLimits::default())?;
        let answers = questions.ask(&examination).await;
        let managed = self.managed(caller, (cluster, namespace), &examination).await?;
        let place = (cluster, namespace);
        let is_declared = async |secret: &str| {
            let mut conn = connection(&self.pool).await?;
            let name = pull_secret_name(&mut conn, caller, place, secret).await?;
            Ok(matches!(name, PullSecretName::Declared(_)))
        };
        let announce = async |secret: &SecretName| {
            let read = vec![Resource::secret(cluster, namespace, secret)];
            let event = NewEvent::of(caller, Action::PodDiagnose, resource.clone()).related(read);
            self.audit_writer.record(event).await?;
            Ok(())
        };
        facts.reserve_names(&mut examination, (&answers, &questions), is_declared, announce).await?;
        let context = self.context(caller, place, &examination, (&answers, &questions)).await?;
        Ok(examination.conclude(&answers, &managed, missing_rights, Some(&context)))
    }

    /// Lists the pods of a namespace, to choose one. Returns `None` if the place is not one of this
    /// list. No event is recorded: no Secret is read.
    ///
    /// # Errors
    ///
    /// As [`diagnose`](Self::diagnose), without those of a pod.
    pub async fn list_pods(
        &self,
        caller: &Call,
        (cluster, namespace): (&Name, &NamespaceName),
        limit: u32,
        after: Option<&ContinueToken>,
    ) -> Result<Option<PodPage>, ServiceError> {
        let client = self.clusters.client(caller, cluster).await?;
        if !caller.grants.include_namespace(namespace.as_str()) {
            self.refuse(caller, Resource::namespace(cluster, namespace));
            return Err(ClusterError::NamespaceNotFound.into());
        }
        Ok(client.list_pods(namespace, limit, after).await?)
    }

    /// Finds the account for each image, and whether a pull secret for it exists.
    async fn context(
        &self,
        caller: &Call,
        (cluster, namespace): (&Name, &NamespaceName),
        examination: &Examination,
        (answers, questions): (&[ImageAnswers], &RegistryQuestions<'_>),
    ) -> Result<RegcredContext, ServiceError> {
        let count = examination.image_count();
        let mut accounts: Vec<Option<FixAccount>> = vec![None; count];
        let mut pull_secrets = vec![PullSecretName::Taken; count];
        let asked: Vec<usize> = examination.questions().map(|(index, ..)| index).collect();
        for (index, image) in examination.lacking(answers).into_iter().filter(|(index, _)| asked.contains(index)) {
            let Some(found) = self.account_for(caller, image, questions).await? else { continue };
            if let (Some(secret), Some(name)) = (examination.new_secret(index), pull_secrets.get_mut(index)) {
                let mut conn = connection(&self.pool).await?;
                *name = pull_secret_name(&mut conn, caller, (cluster, namespace), &secret).await?;
            }
            if let Some(of_image) = accounts.get_mut(index) {
                *of_image = Some(found);
            }
        }
        let renewal = self.clusters.find(caller, cluster).await?.renewal;
        let service_account = renewal.map(|renewal| renewal.account);
        Ok(RegcredContext { cluster: cluster.clone(), accounts, pull_secrets, service_account })
    }

    fn refuse(&self, caller: &Call, resource: Resource) {
        self.audit_writer.refuse(Refusal {
            actor: caller.actor.clone(),
            action: Action::PodDiagnose,
            resources: vec![resource],
            reason: "not-granted",
            request_id: Some(caller.request_id),
            source: caller.source,
        });
    }
}

/// Whether the pull secret for a Secret of this namespace can be declared, or already is.
async fn pull_secret_name(
    conn: &mut PgConnection,
    caller: &Call,
    (cluster, namespace): (&Name, &NamespaceName),
    secret: &str,
) -> Result<PullSecretName, ServiceError> {
    let Some(name) = PullSecretName::of(namespace, secret) else { return Ok(PullSecretName::Taken) };
    let Some(stored) = storage::pull_secrets::find(conn, &name).await? else { return Ok(PullSecretName::Free(name)) };
    let is_declared = stored.deleted_at.is_none()
        && stored.declaration.secret_name.as_str() == secret
        && stored.declaration.listed().contains(&(cluster, namespace));
    let is_visible = !pull_secrets::visible(conn, caller, vec![stored]).await?.is_empty();
    Ok(if is_declared && is_visible { PullSecretName::Declared(name) } else { PullSecretName::Taken })
}

fn resource(cluster: &Name, namespace: &NamespaceName, target: &Target) -> Resource {
    match target {
        Target::Pod(name) => Resource::object(cluster, namespace, "pods", name),
        Target::Workload(kind, name) => Resource::object(cluster, namespace, kind.plural(), name),
        Target::Spec(_) => Resource::namespace(cluster, namespace),
    }
}
