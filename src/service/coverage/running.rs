//! A run: claimed by a worker, carried out under its lease, and stored as a snapshot.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::Instant};
use uuid::Uuid;

use super::{
    Coverages,
    contents::{Contents, SecretPlace},
    examining::{ASKING, Examining, found},
    reading::{ClusterContent, Reading},
};
use crate::{
    clients::cluster::Pace,
    domain::{
        audit::{Action, Details, NewEvent, Outcome, Resource},
        caller::{Actor, ActorKind},
        coverage::{FoundSecret, MissingPart, Survey, SurveyFacts},
        diagnosis::SecretState,
        names::Name,
    },
    service::{
        ServiceError, connection,
        diagnosis::{QuestionLimits, RegistryQuestions},
    },
    storage::{
        self,
        coverage::{
            runs::{ClaimedRun, RunProgress},
            snapshots::NewSnapshot,
        },
    },
};

/// Duration of a lease, and the interval of its renewals.
const LEASE: Duration = Duration::from_secs(30);
const RENEWAL: Duration = Duration::from_secs(5);
/// Calls to the API server.
const CALLS_PER_SECOND: u32 = 50;
/// Secrets of other clients that one run reads.
const SECRETS_MAX: usize = 10_000;
/// Secrets that one audit event names.
const SECRETS_OF_EVENT: usize = 200;
/// Namespaces that are examined at the same time.
const NAMESPACES: usize = 8;
/// Limits of the questions to registries.
const LIMITS: QuestionLimits = QuestionLimits { questions: 20_000, within: Duration::from_mins(10) };

/// What a run does, for callers that wait.
#[derive(Debug)]
pub(super) struct Progress(Mutex<RunProgress>);

impl Progress {
    fn new() -> Self {
        Self(Mutex::new(RunProgress { stage: "listing", done: 0, total: None }))
    }

    /// Counts a step.
    pub(super) fn step(&self) {
        self.0.lock().done += 1;
    }

    fn enter(&self, stage: &'static str, total: usize) {
        *self.0.lock() = RunProgress { stage, done: 0, total: i64::try_from(total).ok() };
    }

    fn current(&self) -> RunProgress {
        *self.0.lock()
    }
}

impl Coverages {
    /// Claims a run that no process carries out.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn claim(&self) -> Result<Option<ClaimedRun>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        storage::coverage::runs::give_up(&mut conn).await?;
        Ok(storage::coverage::runs::claim(&mut conn, LEASE).await?)
    }

    /// Carries out a claimed run and stores its snapshot or error. Ends early if the lease is lost.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if the result cannot be stored. The run is repeated when its lease ends.
    #[tracing::instrument(name = "coverage.run", skip_all, fields(cluster.id = %run.cluster_id, run.id = %run.run_id))]
    pub async fn perform(&self, run: &ClaimedRun) -> Result<(), ServiceError> {
        let progress = Progress::new();
        let surveyed = tokio::select! {
            surveyed = self.survey(run, &progress) => surveyed,
            () = self.keep_lease(run, &progress) => {
                tracing::warn!(cluster.id = %run.cluster_id, "coverage lease lost");
                return Ok(());
            }
        };
        self.record(run, surveyed).await
    }

    /// Ends the lease of a run that was interrupted, so that another process claims it at once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn release(&self, run: &ClaimedRun) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::coverage::runs::release(&mut conn, run).await?)
    }

    /// Refreshes the gauges.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn report_status(&self) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        self.metrics.set(storage::coverage::usage::numbers(&mut conn).await?);
        Ok(())
    }

    /// Prolongs the lease until it is lost. While Postgres is unavailable, the lease runs on.
    async fn keep_lease(&self, run: &ClaimedRun, progress: &Progress) {
        loop {
            tokio::time::sleep(RENEWAL).await;
            let renewing = async {
                let mut conn = connection(&self.pool).await?;
                storage::coverage::runs::renew(&mut conn, run, LEASE, progress.current()).await
            };
            match renewing.await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => tracing::debug!(%error, "coverage lease not renewed"),
            }
        }
    }

    async fn survey(&self, run: &ClaimedRun, progress: &Progress) -> Result<NewSnapshot, ServiceError> {
        let started = Instant::now();
        let (cluster, client) = self.clusters.client_by_id(run.cluster_id).await?;
        let contents = self.contents(run.cluster_id).await?;
        let namespaces = {
            let mut conn = connection(&self.pool).await?;
            storage::coverage::sources::namespaces(&mut conn, run.cluster_id).await?
        };
        let pace = Pace::new(CALLS_PER_SECOND);
        let reading = Reading { client: &client, pace: &pace, progress, namespaces: &namespaces };
        let mut content = reading.read().await?;
        let announced = announced(&content, &contents);
        self.announce(run, &cluster, &announced).await?;
        let by_namespace = content.grouping.take_groups();
        progress.enter("examining", by_namespace.values().map(Vec::len).sum());
        let questions = RegistryQuestions::new(&self.registries, LIMITS).remembering(&self.remembered);
        let asking = Semaphore::new(ASKING);
        let examining = &Examining {
            client: &client,
            pace: &pace,
            grouping: &content.grouping,
            contents: &contents,
            announced: &announced,
            questions: &questions,
            asking: &asking,
        };
        let mut survey = Survey::new(contents.known.clone(), content.verifies_cached_images);
        let mut secrets = existing(&content, &contents);
        let examined = stream::iter(by_namespace)
            .map(|(namespace, groups)| Box::pin(async move { examining.examine(namespace, groups).await }));
        let mut examined = examined.buffered(NAMESPACES);
        while let Some(namespace) = examined.next().await {
            let namespace = namespace?;
            for (key, group, judged) in &namespace.groups {
                survey.add(key, group, judged);
                progress.step();
            }
            let key = |name| (namespace.namespace.clone(), name);
            secrets.extend(namespace.secrets.into_iter().map(|(name, found)| (key(name), found)));
        }
        drop(examined);
        let facts = SurveyFacts {
            verifies_cached_images: content.verifies_cached_images,
            missing: missing(&content, &secrets, &announced),
            calls: pace.calls(),
            seconds: u32::try_from(started.elapsed().as_secs()).unwrap_or(u32::MAX),
        };
        progress.enter("storing", survey.groups.len());
        Ok(snapshot(survey, &content, &secrets, facts))
    }

    /// Makes events with the names of the Secrets durable, before the first one is read.
    async fn announce(
        &self,
        run: &ClaimedRun,
        cluster: &str,
        announced: &BTreeSet<SecretPlace>,
    ) -> Result<(), ServiceError> {
        let Ok(cluster) = Name::parse(cluster) else { return Ok(()) };
        let places: Vec<&SecretPlace> = announced.iter().collect();
        for chunk in places.chunks(SECRETS_OF_EVENT) {
            let read = chunk.iter().map(|(namespace, name)| Resource::secret(&cluster, namespace, name));
            let event = event(run, &cluster).related(read.collect()).outcome(Outcome::Attempt);
            let count = u64::try_from(places.len()).unwrap_or(u64::MAX);
            self.audit_writer.record(event.details(Details::default().did("read").count(count))).await?;
        }
        Ok(())
    }

    /// Stores the result of a run, if its lease is still held.
    async fn record(&self, run: &ClaimedRun, surveyed: Result<NewSnapshot, ServiceError>) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        let error = surveyed.as_ref().err().map(failure);
        let stored = error.as_ref().map(|(slug, detail)| (*slug, detail.as_str()));
        if !storage::coverage::runs::finish(&mut tx, run, stored).await? {
            tracing::warn!(cluster.id = %run.cluster_id, "coverage lease lost");
            return Ok(());
        }
        let cluster = storage::clusters::find_by_id(&mut tx, run.cluster_id).await?;
        let cluster = cluster.and_then(|cluster| Name::parse(&cluster.name).ok());
        let Some(event) = cluster.map(|cluster| event(run, &cluster)) else { return Ok(()) };
        let event = match (&surveyed, &error) {
            (Ok(snapshot), _) => {
                storage::coverage::snapshots::insert(&mut tx, run.cluster_id, Uuid::now_v7(), snapshot).await?;
                event.details(Details::default().count(snapshot.summary.groups.into()))
            }
            (Err(_), Some((slug, _))) => event.details(Details::default().reason(slug)).outcome(Outcome::Failure),
            (Err(_), None) => event.outcome(Outcome::Failure),
        };
        self.audit.commit(tx, [event]).await?;
        match surveyed {
            Ok(snapshot) => {
                let (groups, calls, seconds) =
                    (snapshot.summary.groups, snapshot.summary.calls, snapshot.summary.seconds);
                tracing::info!(cluster.id = %run.cluster_id, groups, calls, duration_s = seconds, "coverage stored");
            }
            Err(error) => tracing::warn!(cluster.id = %run.cluster_id, %error, "coverage failed"),
        }
        self.report_status().await
    }
}

/// Starts an event of the caller that requested the run.
fn event(run: &ClaimedRun, cluster: &Name) -> NewEvent {
    let kinds = [ActorKind::ApiKey, ActorKind::IdentityProvider, ActorKind::CommandLine];
    let kind = kinds.into_iter().find(|kind| kind.as_str() == run.actor_type).unwrap_or(ActorKind::Worker);
    let actor = Actor { kind, id: run.actor_id, name: run.actor_name.clone() };
    let event = NewEvent::by(&actor, Action::ClusterCoverage, Resource::cluster(cluster));
    NewEvent { request_id: Some(run.request_id), ..event }
}

/// Type and explanation of a failure.
fn failure(error: &ServiceError) -> (&'static str, String) {
    match error {
        ServiceError::Cluster(error) => (error.slug(), error.to_string()),
        ServiceError::Storage(_) => ("database-unavailable", "the database was unavailable: run it again".to_owned()),
        _ => ("internal", "the log of regcred has the cause".to_owned()),
    }
}

/// Secrets of other clients that groups use: a bounded number.
fn announced(content: &ClusterContent, contents: &Contents) -> BTreeSet<SecretPlace> {
    let used = content.grouping.secrets().into_iter();
    used.filter(|place| !contents.values.contains_key(place)).take(SECRETS_MAX).collect()
}

/// Pull secrets that are known to exist, before those that are used are read.
fn existing(content: &ClusterContent, contents: &Contents) -> BTreeMap<SecretPlace, FoundSecret> {
    let unread = FoundSecret { state: SecretState::NotRead, secret_type: None, keys: Vec::new(), is_sound: false };
    let mut existing: BTreeMap<SecretPlace, FoundSecret> =
        content.listed.iter().map(|place| (place.clone(), unread.clone())).collect();
    existing.extend(contents.values.iter().map(|(place, secret)| (place.clone(), found(secret))));
    existing
}

/// Parts that could not be read, or are beyond a limit.
fn missing(
    content: &ClusterContent,
    secrets: &BTreeMap<SecretPlace, FoundSecret>,
    announced: &BTreeSet<SecretPlace>,
) -> Vec<MissingPart> {
    let mut missing = content.missing.clone();
    missing.extend(content.grouping.missing());
    let count = |state: SecretState| {
        let of_state = announced.iter().filter(|place| secrets.get(*place).is_some_and(|found| found.state == state));
        u32::try_from(of_state.count()).unwrap_or(u32::MAX)
    };
    let mut add = |verb: Option<&str>, effect: &str, count: u32| {
        if count > 0 {
            let (verb, resource, effect) = (verb.map(str::to_owned), "secrets".to_owned(), effect.to_owned());
            missing.push(MissingPart { verb, resource, effect, count: Some(count) });
        }
    };
    add(Some("get"), "logins of these Secrets cannot be found or tried", count(SecretState::Forbidden));
    if announced.len() >= SECRETS_MAX {
        add(
            None,
            "a run reads this many Secrets of other clients; groups with further ones are unknown",
            announced_max(),
        );
    }
    missing
}

fn announced_max() -> u32 {
    u32::try_from(SECRETS_MAX).unwrap_or(u32::MAX)
}

fn snapshot(
    survey: Survey,
    content: &ClusterContent,
    secrets: &BTreeMap<SecretPlace, FoundSecret>,
    facts: SurveyFacts,
) -> NewSnapshot {
    let grouping = &content.grouping;
    let pull_secrets_used = survey.pull_secrets(secrets, &grouping.attachments());
    NewSnapshot {
        summary: survey.summary(grouping, &pull_secrets_used, facts),
        accounts: survey.accounts(grouping),
        pull_secrets: survey.users_of_pull_secrets(grouping),
        secrets: pull_secrets_used,
        groups: survey.groups,
    }
}
