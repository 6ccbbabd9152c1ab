//! The preflight: does a cluster answer, which version is it, and what may regcred do there.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{StreamExt, stream};
use http::Request;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::{Resource, api::PostParams};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{ClusterClient, ClusterError, post};
use crate::domain::{
    names::NamespaceName,
    rbac::{RequiredRules, Rule},
};

/// Access reviews in flight at a time.
const CONCURRENCY: usize = 16;
/// The most access reviews about single namespaces in one look.
const REVIEWS_MAX: usize = 500;

/// Rights that are needed within a namespace.
const NAMESPACED: [(&str, &str); 6] = [
    ("create", "secrets"),
    ("get", "secrets"),
    ("patch", "secrets"),
    ("delete", "secrets"),
    ("get", "serviceaccounts"),
    ("patch", "serviceaccounts"),
];

/// Rights that are needed for namespace selectors, always in the whole cluster.
const CLUSTER_WIDE: [(&str, &str); 2] = [("list", "namespaces"), ("watch", "namespaces")];

/// What a look at a cluster found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Whether an API server answered.
    pub reachable: bool,
    /// Version of the API server; absent where it does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// How long the API server took to tell its version, connecting included where a new connection was needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u64>,
    /// What regcred's credential may do.
    pub permissions: Vec<Permission>,
    /// What is in the way, where something is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<CheckProblem>,
    /// The pull secrets that lack a right in the cluster, of those that the caller may see, by name; at most 100. Empty if none
    /// lacks any. Absent where it was not found out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_secrets: Option<Vec<LackingPullSecret>>,
    /// More may be missing than `pullSecrets` says: there was too much to ask for, or to list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_secrets_cut: Option<bool>,
}

/// A pull secret and the rights that it lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LackingPullSecret {
    /// Name of the pull secret.
    pub name: String,
    /// The rights; at most 50.
    pub missing: Vec<MissingRight>,
}

/// A right that regcred's credential does not have and needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MissingRight {
    /// The verb, such as `patch`.
    pub verb: String,
    /// The resource, such as `serviceaccounts`.
    pub resource: String,
    /// The namespace; `null` means all of them, which is what a selector needs.
    pub namespace: Option<String>,
}

/// What the cluster says of rights that are needed.
#[derive(Debug, Clone, Default)]
pub struct Reviewed {
    /// Allowed in the whole cluster.
    everywhere: BTreeSet<Rule>,
    /// Asked for in one namespace: whether it is allowed there.
    within: BTreeMap<(NamespaceName, Rule), bool>,
}

impl Reviewed {
    /// Which of these rights are missing; and whether all of them were asked for.
    #[must_use]
    pub fn missing(&self, needs: &RequiredRules) -> (Vec<MissingRight>, bool) {
        let missing = |right: Rule, namespace: Option<&NamespaceName>| MissingRight {
            verb: right.verb().to_owned(),
            resource: right.resource().to_owned(),
            namespace: namespace.map(NamespaceName::to_string),
        };
        let denied = needs.cluster.iter().filter(|right| !self.everywhere.contains(right));
        let mut found: Vec<MissingRight> = denied.map(|right| missing(*right, None)).collect();
        let mut is_all = true;
        for (namespace, right) in questions(needs, &self.everywhere) {
            match self.within.get(&(namespace.clone(), right)) {
                Some(true) => {}
                Some(false) => found.push(missing(right, Some(namespace))),
                None => is_all = false,
            }
        }
        (found, is_all)
    }
}

/// What is needed in single namespaces and is not allowed everywhere.
fn questions<'a>(
    needs: &'a RequiredRules,
    everywhere: &'a BTreeSet<Rule>,
) -> impl Iterator<Item = (&'a NamespaceName, Rule)> {
    let within =
        needs.namespaces.iter().flat_map(|(namespace, rights)| rights.iter().map(move |right| (namespace, *right)));
    within.filter(|(_, right)| !everywhere.contains(right))
}

/// One right, as the cluster itself judges it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Permission {
    /// The verb, such as `create`.
    pub verb: String,
    /// The resource, such as `secrets`.
    pub resource: String,
    /// The namespace; `null` means all of them.
    pub namespace: Option<String>,
    /// Whether it is allowed.
    pub allowed: bool,
}

/// Why a cluster cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct CheckProblem {
    /// The last part of a problem type, such as `cluster-unreachable`.
    #[serde(rename = "type")]
    pub slug: String,
    /// What is wrong, for a person.
    pub detail: String,
}

impl Check {
    /// The answer for a cluster that cannot even be called.
    #[must_use]
    pub fn failed(error: &ClusterError) -> Self {
        // These three are said by somebody who answered.
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
    /// Looks whether the cluster answers and which of the rights that regcred works with it has there.
    ///
    /// Without `namespaces` the rights are asked for all namespaces at once, which a credential that is limited to some of them
    /// does not have. The whole look ends within the timeout of a call.
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

    /// Asks which of these rights the cluster allows: each for the whole cluster first, and then in single namespaces what is denied
    /// there and needed in them alone. Of these only the first [`REVIEWS_MAX`] are asked for. It ends within the timeout of a call.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(name = "cluster.review_needs", skip_all, fields(server = %self.server()))]
    pub async fn review_needs(&self, needs: &[&RequiredRules]) -> Result<Reviewed, ClusterError> {
        let deadline = Instant::now() + self.timeout;
        let all = |one: &&RequiredRules| {
            let within = one.namespaces.values().flatten();
            one.cluster.iter().chain(within).copied().collect::<Vec<Rule>>()
        };
        let rights: BTreeSet<Rule> = needs.iter().flat_map(all).collect();
        let everywhere = self.allowed(rights.into_iter().map(|right| (None, right)).collect(), deadline).await?;
        let everywhere: BTreeSet<Rule> =
            everywhere.into_iter().filter(|(_, allowed)| *allowed).map(|((_, right), _)| right).collect();
        let asked: BTreeSet<(&NamespaceName, Rule)> =
            needs.iter().flat_map(|one| questions(one, &everywhere)).collect();
        let asked = asked.into_iter().take(REVIEWS_MAX);
        let asked = asked.map(|(namespace, right)| (Some(namespace.clone()), right)).collect();
        let within = self.allowed(asked, deadline).await?.into_iter();
        let within = within.filter_map(|((namespace, right), allowed)| Some(((namespace?, right), allowed)));
        Ok(Reviewed { within: within.collect(), everywhere })
    }

    async fn allowed(
        &self,
        questions: Vec<(Option<NamespaceName>, Rule)>,
        deadline: Instant,
    ) -> Result<Vec<((Option<NamespaceName>, Rule), bool)>, ClusterError> {
        let answers: Vec<Result<_, ClusterError>> = stream::iter(questions)
            .map(|(namespace, right)| async move {
                let within = namespace.as_ref().map(NamespaceName::as_str);
                let allowed = self.may(right.verb(), right.resource(), within, deadline).await?;
                Ok(((namespace, right), allowed))
            })
            .buffered(CONCURRENCY)
            .collect()
            .await;
        answers.into_iter().collect()
    }

    /// The version, or none from an API server that keeps it to itself.
    async fn version(&self, deadline: Instant) -> Result<Option<String>, ClusterError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Version {
            git_version: String,
        }
        let request = Request::get("/version").body(Vec::new()).map_err(|_| super::unbuildable())?;
        let answer = self.call(request, deadline).await?;
        match answer.status {
            200 => {
                let version: Option<Version> =
                    answer.body.as_deref().and_then(|body| serde_json::from_slice(body).ok());
                version
                    .map(|version| version.git_version)
                    .filter(|version| version.len() <= 64 && version.bytes().all(|byte| byte.is_ascii_graphic()))
                    .map(Some)
                    .ok_or_else(|| ClusterError::Unreachable {
                        detail: format!(
                            "{} does not answer as a Kubernetes API server does: check the URL",
                            self.server()
                        ),
                    })
            }
            403 => Ok(None),
            _ => Err(answer.failure(self.server())),
        }
    }

    async fn permissions(&self, namespaces: &[&str], deadline: Instant) -> Result<Vec<Permission>, ClusterError> {
        let all = [None];
        let some: Vec<Option<&str>> = namespaces.iter().copied().map(Some).collect();
        let scopes = if some.is_empty() { &all[..] } else { &some[..] };
        let in_scopes = scopes.iter().flat_map(|scope| NAMESPACED.map(|(verb, resource)| (verb, resource, *scope)));
        let questions = in_scopes.chain(CLUSTER_WIDE.map(|(verb, resource)| (verb, resource, None)));
        let answers: Vec<Result<Permission, ClusterError>> = stream::iter(questions)
            .map(|(verb, resource, namespace)| async move {
                let allowed = self.may(verb, resource, namespace, deadline).await?;
                Ok(Permission {
                    verb: verb.to_owned(),
                    resource: resource.to_owned(),
                    namespace: namespace.map(str::to_owned),
                    allowed,
                })
            })
            .buffered(CONCURRENCY)
            .collect()
            .await;
        answers.into_iter().collect()
    }

    /// Asks the cluster whether it would allow this.
    pub(super) async fn may(
        &self,
        verb: &str,
        resource: &str,
        namespace: Option<&str>,
        deadline: Instant,
    ) -> Result<bool, ClusterError> {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    resource: Some(resource.to_owned()),
                    namespace: namespace.map(str::to_owned),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let request = post(SelfSubjectAccessReview::url_path(&(), None), &PostParams::default(), &review)?;
        let answer = self.call(request, deadline).await?;
        if !answer.is_success() {
            return Err(answer.failure(self.server()));
        }
        let review: Option<SelfSubjectAccessReview> =
            answer.body.as_deref().and_then(|body| serde_json::from_slice(body).ok());
        review
            .and_then(|review| review.status)
            .map(|status| status.allowed)
            .ok_or_else(|| ClusterError::Unreachable { detail: format!("{} broke off its answer", self.server()) })
    }
}
