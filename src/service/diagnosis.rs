//! Diagnosis of image pulls: reads a pod and its pull secrets, and asks the registries.
//!
//! Values of Secrets are in memory until the request ends. An audit event with the names of the
//! Secrets is durable before the first one is read.
//!
//! [`NamespaceFacts`], [`Case`] and [`RegistryQuestions`] do the work without a database.

mod applying;
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
    clients::{cluster::ClusterError, registry::RegistryClient},
    domain::{
        audit::{Action, NewEvent, Resource},
        caller::Call,
        diagnosis::{Diagnosis, Examination, ManagedBy, PullSecretName, RegcredContext},
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
    storage::{self, PageRequest, PgConnection, PgPool, targets::listing::TargetFilter},
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
        let event = NewEvent::of(caller, Action::PodDiagnose, resource).related(read.collect());
        self.audit_writer.record(event).await?;
        let (examination, missing_rights) = case.examine(&facts).await?;
        let answers = RegistryQuestions::new(&self.registries, QuestionLimits::default()).ask(&examination).await;
        let managed = self.managed(caller, (cluster, namespace), &examination).await?;
        let context = self.context(caller, (cluster, namespace), &examination).await?;
        Ok(examination.conclude(&answers, &managed, missing_rights, Some(&context)))
    }

    /// Returns the pull secrets that Secrets belong to, as far as the caller may see them.
    async fn managed(
        &self,
        caller: &Call,
        (cluster, namespace): (&Name, &NamespaceName),
        examination: &Examination,
    ) -> Result<Vec<(SecretName, ManagedBy)>, ServiceError> {
        let labelled: Vec<_> = examination.managed().collect();
        if labelled.is_empty() {
            return Ok(Vec::new());
        }
        let cluster = self.clusters.find(caller, cluster).await?.id;
        let mut conn = connection(&self.pool).await?;
        let mut managed = Vec::new();
        for (name, id) in labelled {
            let found = storage::pull_secrets::find_many(&mut conn, &[id]).await?;
            // The label is that of an editor of the namespace, who may write anything.
            let is_named = found.iter().any(|stored| stored.declaration.secret_name == *name);
            if !is_named {
                continue;
            }
            let filter =
                TargetFilter { cluster: Some(cluster), namespace: Some(namespace.clone()), states: Vec::new() };
            let page = PageRequest { after: None, limit: 1 };
            // Without a target here, the label was copied from another namespace.
            let Some(target) = storage::targets::listing::list_of(&mut conn, id, &filter, &page).await?.pop() else {
                continue;
            };
            let mut by = ManagedBy { pull_secret: None, state: None, last_error: None };
            if let Some(stored) = pull_secrets::visible(&mut conn, caller, found).await?.pop() {
                by.pull_secret = Some(stored.name.to_string());
                by.state = Some(target.state);
                by.last_error = target.last_error_type;
            }
            managed.push((name.clone(), by));
        }
        Ok(managed)
    }

    /// Finds the accounts for each image, and whether a pull secret for it exists.
    async fn context(
        &self,
        caller: &Call,
        (cluster, namespace): (&Name, &NamespaceName),
        examination: &Examination,
    ) -> Result<RegcredContext, ServiceError> {
        let count = examination.image_count();
        let mut accounts: Vec<Vec<Name>> = (0..count).map(|_| Vec::new()).collect();
        let mut pull_secrets = vec![PullSecretName::Taken; count];
        for (index, image, _) in examination.questions() {
            let found = self.docker_configs.names_for(caller, &image.name).await?;
            if found.is_empty() {
                continue;
            }
            if let (Some(secret), Some(name)) = (examination.new_secret(index), pull_secrets.get_mut(index)) {
                let mut conn = connection(&self.pool).await?;
                *name = pull_secret_name(&mut conn, caller, (cluster, namespace), &secret).await?;
            }
            if let Some(of_image) = accounts.get_mut(index) {
                *of_image = found;
            }
        }
        Ok(RegcredContext { cluster: cluster.clone(), accounts, pull_secrets })
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
