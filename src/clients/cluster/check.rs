//! Check of a cluster: whether it answers, its version, and regcred's rights there.

use serde::Serialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{
    ClusterClient, ClusterError,
    access_review::{AccessReviews, MissingRight, Question, ReviewsExhausted},
};

/// Rights to any object in a namespace. Pull secrets need narrower ones.
const NAMESPACED: [(&str, &str); 6] = [
    ("create", "secrets"),
    ("get", "secrets"),
    ("patch", "secrets"),
    ("delete", "secrets"),
    ("get", "serviceaccounts"),
    ("patch", "serviceaccounts"),
];

/// Rights that namespace selectors need, always in all namespaces.
const CLUSTER_WIDE: [(&str, &str); 2] = [("list", "namespaces"), ("watch", "namespaces")];

/// Result of checking a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Whether an API server answered.
    pub reachable: bool,
    /// Version of the API server; absent if it does not reveal it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub version: Option<String>,
    /// Time that the API server took to answer the version request, including a new connection if
    /// one was needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub latency_ms: Option<u64>,
    /// Rights of regcred's credential to objects of any name. Pull secrets need rights to declared
    /// names only, see `pullSecrets`.
    pub permissions: Vec<Permission>,
    /// Reason why the cluster cannot be used; absent if it can.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub problem: Option<CheckProblem>,
    /// Rights that the renewal of the cluster's token lacks, for `auth.type` `serviceAccount`. Absent
    /// if they were not reviewed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub renewal: Option<Vec<MissingRight>>,
    /// Minted accounts visible to the caller that lack the right to request their tokens, by name; at
    /// most 100. Absent if the rights were not reviewed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub registry_accounts: Option<Vec<LackingAccount>>,
    /// Whether `registryAccounts` is incomplete because a limit was reached, or because another
    /// release stored a source that this one cannot read.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub registry_accounts_cut: Option<bool>,
    /// Pull secrets visible to the caller that lack a right in the cluster, by name; at most 100.
    /// Absent if the rights were not reviewed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pull_secrets: Option<Vec<LackingPullSecret>>,
    /// Whether `pullSecrets` is incomplete because a limit was reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pull_secrets_cut: Option<bool>,
}

/// Pull secret and the rights that it lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LackingPullSecret {
    /// Name of the pull secret.
    pub name: String,
    /// Missing rights; at most 50.
    pub missing: Vec<MissingRight>,
}

/// Minted account and the rights that it lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LackingAccount {
    /// Name of the registry account.
    pub name: String,
    /// Missing rights.
    pub missing: Vec<MissingRight>,
}

/// Rule, and whether the cluster grants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Permission {
    /// Verb, such as `create`.
    pub verb: String,
    /// Resource, such as `secrets`.
    pub resource: String,
    /// Namespace; `null` means all namespaces.
    pub namespace: Option<String>,
    /// Whether the right is granted.
    pub allowed: bool,
}

/// Reason why a cluster cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct CheckProblem {
    /// Last part of a problem type, such as `cluster-unreachable`.
    #[serde(rename = "type")]
    pub slug: String,
    /// Sentence for a person.
    pub detail: String,
}

impl Check {
    /// Result for a cluster that cannot be checked.
    #[must_use]
    pub fn failed(error: &ClusterError) -> Self {
        // The API server answered with these three.
        let reachable = matches!(
            error,
            ClusterError::Unauthorized | ClusterError::Forbidden { .. } | ClusterError::Overloaded { .. }
        );
        let problem = CheckProblem { slug: error.slug().to_owned(), detail: error.to_string() };
        Self {
            reachable,
            version: None,
            latency_ms: None,
            permissions: Vec::new(),
            problem: Some(problem),
            renewal: None,
            registry_accounts: None,
            registry_accounts_cut: None,
            pull_secrets: None,
            pull_secrets_cut: None,
        }
    }
}

impl ClusterClient {
    /// Checks whether the cluster answers and which rights regcred has there, within the time limit
    /// of one call. What `reviews` remembers is not requested again.
    ///
    /// Without `namespaces`, the rights are reviewed for all namespaces. A credential that is
    /// limited to some namespaces does not have these.
    ///
    /// # Errors
    ///
    /// [`ReviewsExhausted`] if the limit of reviews does not admit those of all `namespaces`.
    #[tracing::instrument(name = "cluster.check", skip_all, fields(server = %self.server()))]
    pub async fn check(&self, reviews: &mut AccessReviews, namespaces: &[&str]) -> Result<Check, ReviewsExhausted> {
        let start = Instant::now();
        let deadline = start + self.timeout;
        if reviews.server.is_none() {
            reviews.count_one()?;
            let version = self.version(deadline).await;
            let latency_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            reviews.server = Some(version.map(|version| (version, latency_ms)));
        }
        let (version, latency_ms) = match &reviews.server {
            Some(Ok((version, latency_ms))) => (version.clone(), Some(*latency_ms)),
            Some(Err(error)) => return Ok(Check::failed(error)),
            None => (None, None),
        };
        let questions = questions(namespaces);
        let problem = self.review_all(reviews, &questions, deadline).await?.err();
        let permissions = questions.into_iter().filter_map(|question| {
            Some(Permission {
                allowed: reviews.is_granted(&question).filter(|_| problem.is_none())?,
                verb: question.verb.to_owned(),
                resource: question.resource.to_owned(),
                namespace: question.namespace,
            })
        });
        Ok(Check {
            reachable: true,
            version,
            latency_ms,
            permissions: permissions.collect(),
            problem: problem.and_then(|error| Check::failed(&error).problem),
            renewal: None,
            registry_accounts: None,
            registry_accounts_cut: None,
            pull_secrets: None,
            pull_secrets_cut: None,
        })
    }
}

/// Rights that a check reviews.
fn questions(namespaces: &[&str]) -> Vec<Question> {
    let everywhere = |(verb, resource)| Question::everything(verb, resource);
    let within = |namespace: &str, right| Question { namespace: Some(namespace.to_owned()), ..everywhere(right) };
    let mut questions: Vec<Question> =
        namespaces.iter().flat_map(|namespace| NAMESPACED.map(|right| within(namespace, right))).collect();
    if namespaces.is_empty() {
        questions.extend(NAMESPACED.map(everywhere));
    }
    questions.extend(CLUSTER_WIDE.map(everywhere));
    questions
}
