//! Diagnosis of image pulls: reads a pod and its pull secrets, and asks the registries.
//!
//! Values of Secrets are in memory until the request ends. An audit event with the names of the
//! Secrets is durable before the first one is read.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::{Duration, Instant, timeout_at};

use crate::{
    clients::{
        cluster::{ClusterClient, ClusterError},
        registry::{PullQuestion, RegistryClient},
    },
    domain::{
        audit::{Action, NewEvent, Resource},
        caller::Call,
        diagnosis::{
            Candidate, Diagnosis, Examination, ImageAnswers, Lookup, ManagedBy, MissingRead, PodFacts, PullReport,
            RegcredContext, SecretValue, Subject, WorkloadKind, pull_secret_names,
        },
        matching::ImageReference,
        names::{Name, NamespaceName, PodName, SecretName},
        verification::VerificationResult,
    },
    service::{
        ServiceError,
        audit::{refusals::Refusal, writer::AuditWriter},
        clusters::Clusters,
        connection,
        docker_configs::DockerConfigs,
        pull_secrets,
    },
    storage::{self, PageRequest, PgPool, targets::listing::TargetFilter},
};

/// Maximum number of Secrets that one diagnosis reads.
const SECRETS_MAX: usize = 20;
/// Maximum number of questions to registries of one diagnosis.
const QUESTIONS_MAX: usize = 60;
/// Time in which registries must answer all questions of one diagnosis.
const REGISTRIES_WITHIN: Duration = Duration::from_secs(20);
/// Maximum number of concurrent reads, and of concurrent questions.
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

/// Service that diagnoses image pulls.
#[derive(Debug, Clone)]
pub struct Diagnoses {
    pool: PgPool,
    clusters: Clusters,
    docker_configs: DockerConfigs,
    registries: Arc<RegistryClient>,
    audit_writer: AuditWriter,
}

/// Limits of the questions of one diagnosis.
struct Budget {
    left: AtomicUsize,
    deadline: Instant,
}

impl Budget {
    fn new() -> Self {
        Self { left: AtomicUsize::new(QUESTIONS_MAX), deadline: Instant::now() + REGISTRIES_WITHIN }
    }

    /// Takes a question. False if there is none left.
    fn take(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
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
        let mut missing_rights = Vec::new();
        let mut pod = read_target(&client, namespace, target).await?;
        if !client.read_pull_events(&mut pod).await? {
            missing_rights.push(EVENTS);
        }
        let service_account = read_service_account(&client, &pod).await?;
        if let Lookup::Forbidden = service_account {
            missing_rights.push(SERVICE_ACCOUNTS);
        }
        let (_, names) = pull_secret_names(&pod, &service_account);
        let read = names.iter().take(SECRETS_MAX).map(|name| Resource::secret(cluster, namespace, name));
        let event = NewEvent::of(caller, Action::PodDiagnose, resource).related(read.collect());
        self.audit_writer.record(event).await?;
        let secrets = read_secrets(&client, namespace, names).await?;
        if secrets.iter().any(|(_, found)| matches!(found, Lookup::Forbidden)) {
            missing_rights.push(SECRETS);
        }
        let examination = Examination::new(pod, &service_account, secrets);
        let answers = self.ask_registries(&examination).await;
        let managed = self.managed(caller, (cluster, namespace), &examination).await?;
        let context = self.context(caller, cluster, &examination).await?;
        Ok(examination.conclude(&answers, &managed, missing_rights, Some(&context)))
    }

    /// Asks the registry of each image.
    async fn ask_registries(&self, examination: &Examination) -> Vec<ImageAnswers> {
        let budget = Budget::new();
        let wants_platforms = examination.wants_platforms();
        let questions = examination.questions().map(|(index, image, candidates)| {
            let asked = self.ask(image, candidates, wants_platforms, &budget);
            async move { (index, asked.await) }
        });
        let mut answers: Vec<ImageAnswers> = (0..examination.image_count()).map(|_| ImageAnswers::default()).collect();
        // Collected first: the borrow of a closure's argument would otherwise be part of the stream's type.
        let questions: Vec<_> = questions.collect();
        let mut asked = stream::iter(questions).buffer_unordered(CONCURRENCY);
        while let Some((index, found)) = asked.next().await {
            if let Some(answer) = answers.get_mut(index) {
                *answer = found;
            }
        }
        answers
    }

    /// Tries the entries in the order of the kubelet until one works, and then without a login.
    async fn ask(
        &self,
        image: &ImageReference,
        candidates: &[Candidate],
        wants_platforms: bool,
        budget: &Budget,
    ) -> ImageAnswers {
        let mut answers = ImageAnswers::default();
        for candidate in candidates {
            let login = candidate.question();
            let report = match login {
                Some(_) => self.pull(PullQuestion { image, login, wants_platforms }, budget).await,
                None => None,
            };
            let is_last = report.as_ref().is_some_and(|report| report.pulls() || is_about_connection(report));
            answers.attempts.push(report);
            if is_last {
                return answers;
            }
        }
        answers.anonymous = self.pull(PullQuestion { image, login: None, wants_platforms }, budget).await;
        answers
    }

    async fn pull(&self, question: PullQuestion<'_>, budget: &Budget) -> Option<PullReport> {
        if !budget.take() {
            return None;
        }
        timeout_at(budget.deadline, self.registries.pull(&question)).await.ok()
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
            let mut by = ManagedBy { pull_secret: None, state: None, last_error: None };
            if let Some(stored) = pull_secrets::visible(&mut conn, caller, found).await?.pop() {
                let filter =
                    TargetFilter { cluster: Some(cluster), namespace: Some(namespace.clone()), states: Vec::new() };
                let page = PageRequest { after: None, limit: 1 };
                let target = storage::targets::listing::list_of(&mut conn, id, &filter, &page).await?.pop();
                by.pull_secret = Some(stored.name.to_string());
                by.state = target.as_ref().map(|target| target.state.clone());
                by.last_error = target.and_then(|target| target.last_error_type);
            }
            managed.push((name.clone(), by));
        }
        Ok(managed)
    }

    /// Finds the accounts for each image.
    async fn context(
        &self,
        caller: &Call,
        cluster: &Name,
        examination: &Examination,
    ) -> Result<RegcredContext, ServiceError> {
        let mut accounts: Vec<Vec<Name>> = (0..examination.image_count()).map(|_| Vec::new()).collect();
        for (index, image, _) in examination.questions() {
            if let Some(of_image) = accounts.get_mut(index) {
                *of_image = self.docker_configs.names_for(caller, &image.name).await?;
            }
        }
        Ok(RegcredContext { cluster: cluster.clone(), accounts })
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
const SECRETS: MissingRead = MissingRead {
    verb: "get",
    resource: "secrets",
    effect: "logins cannot be found or tried; `regcred cluster rbac --doctor` prints the right",
};

/// Whether another login would get the same answer.
fn is_about_connection(report: &PullReport) -> bool {
    use VerificationResult as R;
    matches!(report.result, R::Unreachable | R::TlsError | R::NotARegistry | R::RateLimited | R::Refused)
}

fn resource(cluster: &Name, namespace: &NamespaceName, target: &Target) -> Resource {
    match target {
        Target::Pod(name) => Resource::object(cluster, namespace, "pods", name),
        Target::Workload(kind, name) => Resource::object(cluster, namespace, kind.plural(), name),
        Target::Spec(_) => Resource::namespace(cluster, namespace),
    }
}

async fn read_target(
    client: &ClusterClient,
    namespace: &NamespaceName,
    target: Target,
) -> Result<PodFacts, ServiceError> {
    let (kind, name, found) = match target {
        Target::Pod(name) => ("pod", name.clone(), client.read_pod(namespace, &name).await?),
        Target::Workload(kind, name) => {
            (kind.as_str(), name.clone(), client.read_workload(namespace, kind, &name).await?)
        }
        Target::Spec(facts) => return Ok(*facts),
    };
    found.ok_or_else(|| ServiceError::not_found(kind, &name))
}

/// Reads the `ServiceAccount`, unless the pod exists and has pull secrets.
async fn read_service_account(client: &ClusterClient, pod: &PodFacts) -> Result<Lookup<Vec<SecretName>>, ServiceError> {
    if matches!(pod.subject, Subject::Pod { .. }) && !pod.pull_secrets.is_empty() {
        return Ok(Lookup::NotRead);
    }
    Ok(client.read_pull_secrets(&pod.namespace, &pod.service_account).await?)
}

async fn read_secrets(
    client: &ClusterClient,
    namespace: &NamespaceName,
    names: Vec<SecretName>,
) -> Result<Vec<(SecretName, Lookup<SecretValue>)>, ServiceError> {
    let reads = names.into_iter().enumerate().map(|(index, name)| async move {
        let found =
            if index < SECRETS_MAX { client.read_secret_value(namespace, &name).await? } else { Lookup::NotRead };
        Ok::<_, ServiceError>((name, found))
    });
    stream::iter(reads).buffered(CONCURRENCY).try_collect().await
}
