//! A run: claimed by a worker, carried out under its lease, and stored as a snapshot.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use super::{
    Coverages,
    contents::{Contents, SecretPlace},
    examining::{ASKING, Examining, VALUES_MAX, found},
    reading::{ClusterContent, Reading},
};
use crate::{
    clients::cluster::{ClusterError, Pace},
    domain::{
        audit::{Action, Details, NewEvent, Outcome, Resource},
        caller::{Actor, ActorKind},
        coverage::{FoundSecret, MissingPart, Survey, SurveyFacts},
        diagnosis::SecretState,
        names::{Name, NamespaceName},
    },
    service::{
        ServiceError, connection,
        diagnosis::{QuestionLimits, RegistryQuestions},
    },
    storage::{
        self, StorageError,
        coverage::{
            runs::{ClaimedRun, RunProgress},
            snapshots::NewSnapshot,
        },
    },
};

/// Duration of a lease, and the interval of its renewals.
const LEASE: Duration = Duration::from_secs(30);
const RENEWAL: Duration = Duration::from_secs(5);
/// Time after the last renewal for which a process relies on its lease.
const RELIED_ON: Duration = LEASE.saturating_sub(RENEWAL);
/// Duration of a run.
const RUN_MAX: Duration = Duration::from_mins(15);
/// Calls to the API server.
const CALLS_PER_SECOND: u32 = 50;
/// Secrets of other clients that one run reads.
const SECRETS_MAX: usize = 10_000;
/// Those of one namespace.
const SECRETS_OF_NAMESPACE_MAX: usize = 200;
/// Secrets that one audit event names.
const SECRETS_OF_EVENT: usize = 200;
/// Namespaces that are examined at the same time.
const NAMESPACES: usize = 8;
/// Limits of the questions to registries.
const LIMITS: QuestionLimits = QuestionLimits { questions: 20_000, within: Duration::from_mins(10) };

/// Number of Secrets and questions beyond the limits.
#[derive(Debug, Default)]
struct Beyond {
    /// Secrets that no event names.
    secrets: u32,
    /// Secrets whose namespace has too many bytes of values.
    values: u32,
    /// Questions to registries.
    questions: u32,
}

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
    /// [`ServiceError::Storage`], and [`ServiceError::Audit`] if the event of a run that ended with its
    /// processes cannot be stored.
    pub async fn claim(&self) -> Result<Option<ClaimedRun>, ServiceError> {
        self.give_up().await?;
        let mut conn = connection(&self.pool).await?;
        Ok(storage::coverage::runs::claim(&mut conn, LEASE).await?)
    }

    /// Ends the runs whose processes died, each with an event.
    async fn give_up(&self) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        let given_up = storage::coverage::runs::give_up(&mut tx).await?;
        let failed = |(run, cluster): &(ClaimedRun, String)| {
            let event = event(run, &Name::parse(cluster).ok()?).outcome(Outcome::Failure);
            Some(event.details(Details::default().reason(storage::coverage::runs::GIVEN_UP)))
        };
        self.audit.commit(tx, given_up.iter().filter_map(failed).collect::<Vec<_>>()).await?;
        for (run, _) in given_up {
            tracing::warn!(cluster.id = %run.cluster_id, run.id = %run.run_id, "coverage given up");
        }
        Ok(())
    }

    /// Carries out a claimed run and stores its snapshot or error. Ends early if the lease is lost.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if the result cannot be stored. The run is repeated when its lease ends.
    #[tracing::instrument(name = "coverage.run", skip_all, fields(cluster.id = %run.cluster_id, run.id = %run.run_id))]
    pub async fn perform(&self, run: &ClaimedRun) -> Result<(), ServiceError> {
        let progress = Progress::new();
        let surveyed = within(RUN_MAX, Box::pin(self.survey(run, &progress)), self.keep_lease(run, &progress)).await;
        let Some(surveyed) = surveyed else {
            tracing::warn!(cluster.id = %run.cluster_id, "coverage lease lost");
            return Ok(());
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
        keep((RENEWAL, RELIED_ON), || async {
            let mut conn = connection(&self.pool).await?;
            storage::coverage::runs::renew(&mut conn, run, LEASE, progress.current()).await
        })
        .await;
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
        let (announced, left_out) = announced(&content, &contents);
        self.announce(run, &cluster, &announced).await?;
        let by_namespace = content.grouping.take_groups();
        progress.enter("examining", by_namespace.values().map(Vec::len).sum());
        let questions = RegistryQuestions::new(&self.registries, LIMITS)?.remembering(&self.remembered);
        let asking = Semaphore::new(ASKING);
        let examining = &Examining {
            client: &client,
            pace: &pace,
            grouping: &content.grouping,
            contents: &contents,
            announced: &announced,
            questions: &questions,
            asking: &asking,
            values: &self.values,
        };
        let mut survey = Survey::new(contents.known.clone(), content.verifies_cached_images);
        let mut secrets = existing(&content, &contents);
        let mut beyond = Beyond { secrets: left_out, ..Beyond::default() };
        let examined = stream::iter(by_namespace)
            .map(|(namespace, groups)| Box::pin(async move { examining.examine(namespace, groups).await }));
        let mut examined = examined.buffer_unordered(NAMESPACES);
        while let Some(namespace) = examined.next().await {
            let namespace = namespace?;
            for (key, group, judged) in &namespace.groups {
                survey.add(key, group, judged);
                progress.step();
            }
            beyond.values = beyond.values.saturating_add(namespace.left_out);
            let key = |name| (namespace.namespace.clone(), name);
            secrets.extend(namespace.secrets.into_iter().map(|(name, found)| (key(name), found)));
        }
        drop(examined);
        // Those of a namespace are in order.
        survey.groups.sort_by_cached_key(|group| group.namespace.clone());
        beyond.questions = questions.left_out();
        let facts = SurveyFacts {
            verifies_cached_images: content.verifies_cached_images,
            missing: missing(&content, &secrets, &announced, &beyond),
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
        // Without an event, no Secret is read.
        let cluster = Name::parse(cluster).map_err(|_| ServiceError::not_found("cluster", &run.cluster_id))?;
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

/// Renews a lease at intervals. Returns once it is lost, or may be by the clock of this process.
async fn keep<R>((interval, relied_on): (Duration, Duration), mut renew: impl FnMut() -> R)
where
    R: Future<Output = Result<bool, StorageError>>,
{
    let mut renewed = Instant::now();
    while renewed.elapsed() < relied_on {
        sleep(interval).await;
        // The database's time of the renewal is later.
        let asked = Instant::now();
        match timeout(interval, renew()).await {
            Ok(Ok(true)) => renewed = asked,
            Ok(Ok(false)) => return,
            Ok(Err(error)) => tracing::debug!(%error, "coverage lease not renewed"),
            Err(_) => tracing::debug!("coverage lease not renewed in time"),
        }
    }
}

/// Result of a survey, which fails after a time. None if the lease is lost before.
async fn within<T>(
    time: Duration,
    survey: impl Future<Output = Result<T, ServiceError>>,
    lease: impl Future<Output = ()>,
) -> Option<Result<T, ServiceError>> {
    tokio::select! {
        surveyed = survey => Some(surveyed),
        () = sleep(time) => Some(Err(overdue(time))),
        () = lease => None,
    }
}

fn overdue(time: Duration) -> ServiceError {
    let minutes = time.as_secs() / 60;
    ClusterError::Timeout { detail: format!("the run did not end within {minutes} minutes") }.into()
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

/// Secrets of other clients that groups use, and the number of those that limits leave out.
fn announced(content: &ClusterContent, contents: &Contents) -> (BTreeSet<SecretPlace>, u32) {
    let mut used = content.grouping.secrets();
    used.retain(|place| !contents.values.contains_key(place));
    let total = used.len();
    let announced = fairly(used, SECRETS_OF_NAMESPACE_MAX, SECRETS_MAX);
    let left_out = u32::try_from(total - announced.len()).unwrap_or(u32::MAX);
    (announced, left_out)
}

/// Secrets within the limits of a namespace and of all: first one of each namespace, then a second
/// one.
fn fairly(places: BTreeSet<SecretPlace>, of_namespace: usize, of_all: usize) -> BTreeSet<SecretPlace> {
    let mut counts: HashMap<NamespaceName, usize> = HashMap::new();
    let ranked = places.into_iter().map(|place| {
        let count = counts.entry(place.0.clone()).or_default();
        *count += 1;
        (*count, place)
    });
    let mut ranked: Vec<(usize, SecretPlace)> = ranked.filter(|(rank, _)| *rank <= of_namespace).collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().take(of_all).map(|(_, place)| place).collect()
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
    beyond: &Beyond,
) -> Vec<MissingPart> {
    let mut missing = content.missing.clone();
    missing.extend(content.grouping.missing());
    let is_forbidden = |place: &&SecretPlace| {
        let found = secrets.get(*place);
        found.is_some_and(|found| found.state == SecretState::Forbidden)
    };
    let forbidden = u32::try_from(announced.iter().filter(is_forbidden).count()).unwrap_or(u32::MAX);
    if forbidden > 0 {
        missing.push(MissingPart {
            verb: Some("get".to_owned()),
            resource: "secrets".to_owned(),
            effect: "logins of these Secrets cannot be found or tried".to_owned(),
            count: Some(forbidden),
        });
    }
    let limits = [
        (
            "secrets",
            format!(
                "a run reads {SECRETS_MAX} Secrets of other clients and {SECRETS_OF_NAMESPACE_MAX} of a namespace; \
                 groups with further ones are unknown"
            ),
            beyond.secrets,
        ),
        (
            "secrets",
            format!(
                "a run reads {} MiB of a namespace's Secrets; groups with further ones are unknown",
                VALUES_MAX >> 20
            ),
            beyond.values,
        ),
        (
            "registries",
            format!("a run asks registries {} times within 10 minutes; further groups are unknown", LIMITS.questions),
            beyond.questions,
        ),
    ];
    let reached = limits.into_iter().filter(|(_, _, count)| *count > 0);
    missing.extend(reached.map(|(resource, effect, count)| MissingPart::of_limit(resource, effect, count)));
    missing
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

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future};

    use rstest::rstest;

    use super::*;
    use crate::domain::names::SecretName;

    fn place(namespace: &str, name: &str) -> SecretPlace {
        (NamespaceName::parse(namespace).unwrap(), SecretName::parse(name).unwrap())
    }

    #[test]
    fn no_namespace_takes_the_secrets_of_another_one() {
        let many = (0..500).map(|at| place("a", &format!("k{at:03}")));
        let places: BTreeSet<SecretPlace> = many.chain([place("b", "k"), place("c", "k"), place("c", "l")]).collect();

        let within = fairly(places.clone(), 200, 4);

        assert_eq!(within, BTreeSet::from([place("a", "k000"), place("a", "k001"), place("b", "k"), place("c", "k")]));
        assert_eq!(fairly(places, 200, 1_000).len(), 203);
    }

    const INTERVAL: Duration = Duration::from_millis(2);
    /// Far longer than the lease of a test.
    const LATE: Duration = Duration::from_secs(20);

    #[rstest]
    #[case::lost(Some(false), Duration::from_hours(1))]
    #[case::hangs(None, Duration::from_millis(20))]
    #[tokio::test]
    async fn lease_that_is_not_renewed_is_given_up(#[case] answer: Option<bool>, #[case] relied_on: Duration) {
        let keeping = keep((INTERVAL, relied_on), || async move {
            match answer {
                Some(answer) => Ok(answer),
                None => future::pending().await,
            }
        });

        timeout(LATE, keeping).await.unwrap();
    }

    #[tokio::test]
    async fn run_fails_at_its_deadline_and_ends_with_its_lease() {
        let never = future::pending::<Result<u8, ServiceError>>;
        let overdue = within(INTERVAL, never(), future::pending()).await.unwrap().unwrap_err();
        assert_eq!(failure(&overdue).0, "cluster-timeout");
        assert!(within(LATE, never(), future::ready(())).await.is_none());
        assert_eq!(within(LATE, future::ready(Ok(1)), future::pending()).await.unwrap().unwrap(), 1);
        assert!(failure(&super::overdue(RUN_MAX)).1.contains("within 15 minutes"));
    }

    #[tokio::test]
    async fn renewed_lease_is_kept_beyond_its_time() {
        let (started, renewals) = (Instant::now(), Cell::new(0));
        let relied_on = Duration::from_secs(1);
        let renew = || {
            renewals.set(renewals.get() + 1);
            future::ready(Ok(started.elapsed() < 2 * relied_on))
        };

        timeout(LATE, keep((INTERVAL, relied_on), renew)).await.unwrap();

        assert!(started.elapsed() >= 2 * relied_on && renewals.get() > 1);
    }
}
