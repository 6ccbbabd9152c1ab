//! Access reviews: which rights the cluster grants to regcred's credential.
//!
//! Callers request reviews, but the API server counts them against the same client as the worker's
//! calls. [`AccessReviews`] therefore limits and remembers those of one cluster.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::{Resource, api::PostParams};
use serde::Serialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{ClusterClient, ClusterError, unbuildable};
use crate::domain::{
    names::NamespaceName,
    rbac::{RequiredRules, Rule},
};

/// Maximum number of concurrent access reviews of one cluster.
const CONCURRENCY: usize = 8;
/// Time for which results are remembered.
const REMEMBERED: Duration = Duration::from_secs(3);
/// Number of reviews of one cluster that may follow a pause.
const BURST: u32 = 600;
/// Time after which a further review may follow.
const INTERVAL: Duration = Duration::from_millis(20);

/// Right to review. Without a name it covers all objects, without a namespace all namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Question {
    pub(super) verb: &'static str,
    pub(super) resource: &'static str,
    pub(super) name: Option<String>,
    pub(super) namespace: Option<String>,
}

impl Question {
    /// Right to all objects in all namespaces.
    pub(super) const fn everything(verb: &'static str, resource: &'static str) -> Self {
        Self { verb, resource, name: None, namespace: None }
    }

    fn of(rule: &Rule, namespace: Option<&NamespaceName>) -> Self {
        Self {
            verb: rule.verb(),
            resource: rule.resource(),
            name: rule.name().map(str::to_owned),
            namespace: namespace.map(NamespaceName::to_string),
        }
    }
}

/// Rule that regcred's credential needs but does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MissingRight {
    /// Verb, such as `patch`.
    pub verb: String,
    /// Resource, such as `serviceaccounts`.
    pub resource: String,
    /// Name of the object; `null` means all objects, as `create` needs.
    pub name: Option<String>,
    /// Namespace; `null` means all namespaces, as a selector needs.
    pub namespace: Option<String>,
}

/// The caller would exceed the limit of access reviews.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReviewsExhausted {
    /// Time after which the request fits the limit.
    pub retry_after: Duration,
}

/// Access reviews of one cluster: their remembered results, and the limit that they count against.
///
/// A check has exclusive access, so checks of one cluster follow each other and share results.
#[derive(Debug, Default)]
pub struct AccessReviews {
    /// Version of the cluster that the results are of.
    cluster_version: i64,
    /// Results are remembered until this time; none before the first check is finished.
    until: Option<Instant>,
    /// Version of the API server, and the time of its answer in milliseconds.
    pub(super) server: Option<Result<(Option<String>, u64), ClusterError>>,
    granted: HashMap<Question, bool>,
    /// First failed review. Further ones would fail as well, or add to the load.
    failure: Option<ClusterError>,
    /// Time at which the limit is unused again.
    unused_at: Option<Instant>,
}

impl AccessReviews {
    /// Begins a check of this version of the cluster: forgets results that are too old.
    pub fn begin(&mut self, cluster_version: i64) {
        let is_valid = self.until.is_some_and(|until| Instant::now() < until);
        if !is_valid || self.cluster_version != cluster_version {
            *self = Self { cluster_version, unused_at: self.unused_at, ..Self::default() };
        }
    }

    /// Ends a check. Results are remembered from the end of the first check on, whatever further
    /// ones add.
    pub fn end(&mut self) {
        let pause = match &self.failure {
            Some(ClusterError::Overloaded { retry_after: Some(pause) }) => *pause,
            _ => Duration::ZERO,
        };
        self.until.get_or_insert(Instant::now() + REMEMBERED.max(pause));
    }

    /// Whether the limit is unused, so that nothing is lost with this value.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        let now = Instant::now();
        self.until.is_none_or(|until| until <= now) && self.unused_at.is_none_or(|unused_at| unused_at <= now)
    }

    /// Number of reviews that the limit admits now.
    fn admitted(&self, now: Instant) -> usize {
        let used = self.unused_at.map_or(Duration::ZERO, |unused_at| unused_at.saturating_duration_since(now));
        let left = (INTERVAL * BURST).saturating_sub(used);
        usize::try_from(left.as_nanos() / INTERVAL.as_nanos()).unwrap_or(usize::MAX)
    }

    /// Counts reviews against the limit.
    fn count(&mut self, reviews: usize, now: Instant) {
        let reviews = u32::try_from(reviews).unwrap_or(u32::MAX);
        self.unused_at = Some(self.unused_at.map_or(now, |unused_at| unused_at.max(now)) + INTERVAL * reviews);
    }

    /// Counts a further request of a check.
    pub(super) fn count_one(&mut self) -> Result<(), ReviewsExhausted> {
        let now = Instant::now();
        match self.time_until(1, now) {
            Duration::ZERO => {
                self.count(1, now);
                Ok(())
            }
            retry_after => Err(ReviewsExhausted { retry_after }),
        }
    }

    /// Time until the limit admits this many reviews.
    fn time_until(&self, reviews: usize, now: Instant) -> Duration {
        let lacking = reviews.saturating_sub(self.admitted(now));
        INTERVAL * u32::try_from(lacking).unwrap_or(u32::MAX)
    }

    pub(super) fn is_granted(&self, question: &Question) -> Option<bool> {
        self.granted.get(question).copied()
    }

    /// Whether a rule is granted in a namespace, or in all of them; none if that was not reviewed.
    /// A wider right includes it.
    fn grants(&self, rule: &Rule, namespace: Option<&NamespaceName>) -> Option<bool> {
        let wider = [Question::everything(rule.verb(), rule.resource()), Question::of(rule, None)];
        if wider.iter().any(|question| self.is_granted(question) == Some(true)) {
            return Some(true);
        }
        self.is_granted(&Question::of(rule, namespace))
    }

    /// Returns the missing rights, and whether all of `needs` were reviewed.
    #[must_use]
    pub fn missing(&self, needs: &RequiredRules) -> (Vec<MissingRight>, bool) {
        let mut found = Vec::new();
        let mut is_complete = true;
        for (namespace, rule) in scoped(needs) {
            match self.grants(rule, namespace) {
                Some(true) => {}
                Some(false) => found.push(MissingRight {
                    verb: rule.verb().to_owned(),
                    resource: rule.resource().to_owned(),
                    name: rule.name().map(str::to_owned),
                    namespace: namespace.map(NamespaceName::to_string),
                }),
                None => is_complete = false,
            }
        }
        (found, is_complete)
    }
}

/// All rules, first those of all namespaces.
fn scoped(needs: &RequiredRules) -> impl Iterator<Item = (Option<&NamespaceName>, &Rule)> {
    let everywhere = needs.cluster.iter().map(|rule| (None, rule));
    let within = needs.namespaces.iter();
    everywhere.chain(within.flat_map(|(namespace, rules)| rules.iter().map(move |rule| (Some(namespace), rule))))
}

impl ClusterClient {
    /// Reviews which of these rules the cluster grants, within the time limit of one call.
    ///
    /// Each right is reviewed without name and namespace first, and as required if that is denied.
    /// Reviews beyond the limit are omitted.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(name = "cluster.review_needs", skip_all, fields(server = %self.server()))]
    pub async fn review_needs(
        &self,
        reviews: &mut AccessReviews,
        needs: &[&RequiredRules],
    ) -> Result<(), ClusterError> {
        let deadline = self.deadline();
        let rights: BTreeSet<(&'static str, &'static str)> =
            needs.iter().flat_map(|one| scoped(one)).map(|(_, rule)| (rule.verb(), rule.resource())).collect();
        let everything = rights.into_iter().map(|(verb, resource)| Question::everything(verb, resource));
        self.review_some(reviews, everything.collect(), deadline).await?;
        // `None`, all namespaces, comes first.
        let rules: BTreeSet<(Option<&NamespaceName>, &Rule)> = needs.iter().flat_map(|one| scoped(one)).collect();
        let (everywhere, within): (Vec<_>, Vec<_>) = rules.into_iter().partition(|(namespace, _)| namespace.is_none());
        for rules in [everywhere, within] {
            let denied = rules.into_iter().filter(|(namespace, rule)| reviews.grants(rule, *namespace).is_none());
            let denied = denied.map(|(namespace, rule)| Question::of(rule, namespace)).collect();
            self.review_some(reviews, denied, deadline).await?;
        }
        Ok(())
    }

    /// Reviews all of these rights, or none if the limit does not admit all of them.
    pub(super) async fn review_all(
        &self,
        reviews: &mut AccessReviews,
        questions: &[Question],
        deadline: Instant,
    ) -> Result<Result<(), ClusterError>, ReviewsExhausted> {
        let open: Vec<Question> =
            questions.iter().filter(|question| reviews.is_granted(question).is_none()).cloned().collect();
        let wait = reviews.time_until(open.len(), Instant::now());
        if wait > Duration::ZERO && reviews.failure.is_none() {
            return Err(ReviewsExhausted { retry_after: wait });
        }
        Ok(self.review_some(reviews, open, deadline).await)
    }

    /// Reviews rights concurrently: those that are not known yet, and as many as the limit admits.
    async fn review_some(
        &self,
        reviews: &mut AccessReviews,
        mut questions: Vec<Question>,
        deadline: Instant,
    ) -> Result<(), ClusterError> {
        questions.retain(|question| reviews.is_granted(question).is_none());
        if questions.is_empty() {
            return Ok(());
        }
        if let Some(failure) = &reviews.failure {
            return Err(failure.clone());
        }
        let now = Instant::now();
        questions.truncate(reviews.admitted(now));
        // Counted before they are sent, so that a caller that disconnects does not evade the limit.
        reviews.count(questions.len(), now);
        let calls = questions.into_iter().map(|question| async move {
            let is_allowed = self.is_allowed(&question, deadline).await?;
            Ok::<_, ClusterError>((question, is_allowed))
        });
        let granted: Result<Vec<(Question, bool)>, ClusterError> =
            stream::iter(calls).buffered(CONCURRENCY).try_collect().await;
        match granted {
            Ok(granted) => {
                reviews.granted.extend(granted);
                Ok(())
            }
            Err(error) => {
                reviews.failure = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Reviews one right.
    pub(super) async fn is_allowed(&self, question: &Question, deadline: Instant) -> Result<bool, ClusterError> {
        let (resource, subresource) = match question.resource.split_once('/') {
            Some((resource, subresource)) => (resource, Some(subresource)),
            None => (question.resource, None),
        };
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(question.verb.to_owned()),
                    resource: Some(resource.to_owned()),
                    subresource: subresource.map(str::to_owned),
                    name: question.name.clone(),
                    namespace: question.namespace.clone(),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let body = serde_json::to_vec(&review).map_err(unbuildable)?;
        let requests = kube::core::Request::new(SelfSubjectAccessReview::url_path(&(), None));
        let request = requests.create(&PostParams::default(), body).map_err(unbuildable)?;
        let response = self.call(request, deadline).await?;
        if !response.is_success() {
            return Err(response.error(self.server(), "create selfsubjectaccessreviews"));
        }
        let review: Option<SelfSubjectAccessReview> = response.json();
        let status = review.and_then(|review| review.status);
        status.map(|status| status.allowed).ok_or_else(|| ClusterError::Unreachable {
            detail: format!("{} sent an incomplete access review", self.server()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::names::SecretName;

    fn rule(name: &str) -> Rule {
        Rule::GetSecret(SecretName::parse(name).unwrap())
    }

    fn namespace(name: &str) -> NamespaceName {
        NamespaceName::parse(name).unwrap()
    }

    #[test]
    fn wider_right_includes_a_narrower_one() {
        let mut reviews = AccessReviews::default();
        let a = namespace("a");
        assert_eq!(reviews.grants(&rule("pull"), Some(&a)), None);
        reviews.granted.insert(Question::everything("get", "secrets"), false);
        assert_eq!(reviews.grants(&rule("pull"), Some(&a)), None);
        reviews.granted.insert(Question::of(&rule("pull"), None), true);
        assert_eq!(reviews.grants(&rule("pull"), Some(&a)), Some(true));
        assert_eq!(reviews.grants(&rule("other"), Some(&a)), None);
        reviews.granted.insert(Question::of(&rule("other"), Some(&a)), false);
        assert_eq!(reviews.grants(&rule("other"), Some(&a)), Some(false));
        reviews.granted.insert(Question::everything("get", "secrets"), true);
        assert_eq!(reviews.grants(&rule("other"), Some(&a)), Some(true));
    }

    #[test]
    fn missing_right_names_object_and_namespace() {
        let mut reviews = AccessReviews::default();
        let (a, b) = (namespace("a"), namespace("b"));
        let needs = RequiredRules {
            cluster: BTreeSet::from([Rule::ListNamespaces]),
            namespaces: [(a.clone(), BTreeSet::from([rule("pull")])), (b.clone(), BTreeSet::from([rule("pull")]))]
                .into(),
        };
        assert_eq!(reviews.missing(&needs), (Vec::new(), false));
        for (question, is_granted) in [
            (Question::everything("list", "namespaces"), true),
            (Question::of(&rule("pull"), Some(&a)), false),
            (Question::of(&rule("pull"), Some(&b)), true),
        ] {
            reviews.granted.insert(question, is_granted);
        }
        let missing = MissingRight {
            verb: "get".to_owned(),
            resource: "secrets".to_owned(),
            name: Some("pull".to_owned()),
            namespace: Some("a".to_owned()),
        };
        assert_eq!(reviews.missing(&needs), (vec![missing], true));
    }

    #[test]
    fn limit_admits_a_burst_and_then_its_rate() {
        let (mut reviews, now) = (AccessReviews::default(), Instant::now());
        assert_eq!(reviews.admitted(now), 600);
        assert_eq!(reviews.count_one(), Ok(()));
        reviews.count(10_000, now);
        assert!(reviews.count_one().is_err());
        reviews.unused_at = Some(now + INTERVAL * 600);
        assert_eq!((reviews.admitted(now), reviews.time_until(5, now)), (0, INTERVAL * 5));
        assert_eq!(reviews.admitted(now + INTERVAL * 7), 7);
        assert_eq!(reviews.time_until(5, now + INTERVAL * 7), Duration::ZERO);
        assert_eq!(reviews.admitted(now + INTERVAL * 10_000), 600);
        // The limit outlasts the results.
        reviews.begin(2);
        assert_eq!(reviews.admitted(now), 0);
        assert!(!reviews.is_unused() && AccessReviews::default().is_unused());
    }

    #[test]
    fn results_are_remembered_for_one_version_and_a_few_seconds() {
        let mut reviews = AccessReviews::default();
        let question = Question::everything("get", "secrets");
        let remembers = |reviews: &AccessReviews| reviews.is_granted(&question).is_some();
        reviews.begin(1);
        reviews.granted.insert(question.clone(), true);
        // A check that was cancelled is not finished.
        reviews.begin(1);
        assert!(!remembers(&reviews));

        reviews.granted.insert(question.clone(), true);
        reviews.end();
        let until = reviews.until;
        reviews.begin(1);
        reviews.end();
        assert!(remembers(&reviews) && reviews.until == until);
        reviews.begin(2);
        assert!(!remembers(&reviews));

        reviews.granted.insert(question.clone(), true);
        reviews.until = Some(Instant::now());
        reviews.begin(2);
        assert!(!remembers(&reviews));
    }

    #[test]
    fn overloaded_server_is_left_alone_for_the_time_that_it_requests() {
        let mut reviews = AccessReviews::default();
        reviews.begin(1);
        reviews.failure = Some(ClusterError::Overloaded { retry_after: Some(Duration::from_mins(1)) });
        reviews.end();
        assert!(reviews.until.unwrap() > Instant::now() + Duration::from_secs(50));
    }
}
