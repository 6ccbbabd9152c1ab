//! Check of a cluster: whether it answers, its version, and regcred's rights there.

use serde::Serialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{
    ClusterClient, ClusterError,
    access_review::{MissingRight, Question},
};

/// Rights that regcred needs in a namespace.
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
    pub version: Option<String>,
    /// Time that the API server took to answer the version request, including a new connection if
    /// one was needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u64>,
    /// Rights of regcred's credential.
    pub permissions: Vec<Permission>,
    /// Reason why the cluster cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<CheckProblem>,
    /// Pull secrets visible to the caller that lack a right in the cluster, by name; at most 100.
    /// Absent if the rights were not reviewed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_secrets: Option<Vec<LackingPullSecret>>,
    /// Whether `pullSecrets` is incomplete because a limit was reached.
    #[serde(skip_serializing_if = "Option::is_none")]
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
            pull_secrets: None,
            pull_secrets_cut: None,
        }
    }
}

impl ClusterClient {
    /// Checks whether the cluster answers and which rights regcred has there, within the time limit
    /// of one call.
    ///
    /// Without `namespaces`, the rights are reviewed for all namespaces. A credential that is
    /// limited to some namespaces does not have these.
    #[tracing::instrument(name = "cluster.check", skip_all, fields(server = %self.server()))]
    pub async fn check(&self, namespaces: &[&str]) -> Check {
        let start = Instant::now();
        let deadline = start + self.timeout;
        let version = match self.version(deadline).await {
            Ok(version) => version,
            Err(error) => return Check::failed(&error),
        };
        let latency_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (permissions, problem) = match self.permissions(namespaces, deadline).await {
            Ok(permissions) => (permissions, None),
            Err(error) => (Vec::new(), Check::failed(&error).problem),
        };
        Check {
            reachable: true,
            version,
            latency_ms: Some(latency_ms),
            permissions,
            problem,
            pull_secrets: None,
            pull_secrets_cut: None,
        }
    }

    async fn permissions(&self, namespaces: &[&str], deadline: Instant) -> Result<Vec<Permission>, ClusterError> {
        let all = [None];
        let some: Vec<Option<&str>> = namespaces.iter().copied().map(Some).collect();
        let scopes = if some.is_empty() { &all[..] } else { &some[..] };
        let in_scopes = scopes.iter().flat_map(|scope| NAMESPACED.map(|(verb, resource)| (verb, resource, *scope)));
        let questions: Vec<Question<'_>> =
            in_scopes.chain(CLUSTER_WIDE.map(|(verb, resource)| (verb, resource, None))).collect();
        let granted = self.review_all(questions.clone(), deadline).await?;
        let permissions = questions.into_iter().zip(granted).map(|((verb, resource, namespace), allowed)| Permission {
            verb: verb.to_owned(),
            resource: resource.to_owned(),
            namespace: namespace.map(str::to_owned),
            allowed,
        });
        Ok(permissions.collect())
    }
}
