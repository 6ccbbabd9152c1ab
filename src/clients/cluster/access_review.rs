//! Access reviews: which rights the cluster grants to regcred's credential.

use std::collections::{BTreeMap, BTreeSet};

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

/// Maximum number of concurrent access reviews.
const CONCURRENCY: usize = 16;
/// Maximum number of access reviews for single namespaces in one call of
/// [`ClusterClient::review_needs`].
const REVIEWS_MAX: usize = 500;

/// Verb, resource and, unless all are meant, namespace of a right.
pub(super) type Question<'a> = (&'a str, &'a str, Option<&'a str>);

/// Rule that regcred's credential needs but does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MissingRight {
    /// Verb, such as `patch`.
    pub verb: String,
    /// Resource, such as `serviceaccounts`.
    pub resource: String,
    /// Namespace; `null` means all namespaces, as a selector needs.
    pub namespace: Option<String>,
}

/// Rights that a cluster grants or denies.
#[derive(Debug, Clone, Default)]
pub struct ReviewedRights {
    /// Rights granted in all namespaces.
    everywhere: BTreeSet<Rule>,
    /// Rights reviewed in one namespace, and whether they are granted there.
    within: BTreeMap<(NamespaceName, Rule), bool>,
}

impl ReviewedRights {
    /// Returns the missing rights, and whether all of `needs` were reviewed.
    #[must_use]
    pub fn missing(&self, needs: &RequiredRules) -> (Vec<MissingRight>, bool) {
        let missing = |right: Rule, namespace: Option<&NamespaceName>| MissingRight {
            verb: right.verb().to_owned(),
            resource: right.resource().to_owned(),
            namespace: namespace.map(NamespaceName::to_string),
        };
        let denied = needs.cluster.iter().filter(|right| !self.everywhere.contains(right));
        let mut found: Vec<MissingRight> = denied.map(|right| missing(*right, None)).collect();
        let mut is_complete = true;
        for (namespace, right) in namespaced(needs, &self.everywhere) {
            match self.within.get(&(namespace.clone(), right)) {
                Some(true) => {}
                Some(false) => found.push(missing(right, Some(namespace))),
                None => is_complete = false,
            }
        }
        (found, is_complete)
    }
}

/// Rights that are needed in single namespaces and not granted everywhere.
fn namespaced<'a>(
    needs: &'a RequiredRules,
    everywhere: &'a BTreeSet<Rule>,
) -> impl Iterator<Item = (&'a NamespaceName, Rule)> {
    let within =
        needs.namespaces.iter().flat_map(|(namespace, rights)| rights.iter().map(move |right| (namespace, *right)));
    within.filter(|(_, right)| !everywhere.contains(right))
}

impl ClusterClient {
    /// Reviews which of these rights the cluster grants, within the time limit of one call.
    ///
    /// Each right is reviewed for all namespaces first. Rights that are denied there and needed in
    /// single namespaces are reviewed in these, up to 500 in total.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(name = "cluster.review_needs", skip_all, fields(server = %self.server()))]
    pub async fn review_needs(&self, needs: &[&RequiredRules]) -> Result<ReviewedRights, ClusterError> {
        let deadline = self.deadline();
        let all = needs.iter().flat_map(|one| one.cluster.iter().chain(one.namespaces.values().flatten()));
        let rights: BTreeSet<Rule> = all.copied().collect();
        let questions: Vec<Question<'_>> = rights.iter().map(|right| (right.verb(), right.resource(), None)).collect();
        let granted = self.review_all(questions, deadline).await?;
        let everywhere: BTreeSet<Rule> =
            rights.into_iter().zip(granted).filter(|(_, granted)| *granted).map(|(right, _)| right).collect();

        let rights: BTreeSet<(&NamespaceName, Rule)> =
            needs.iter().flat_map(|one| namespaced(one, &everywhere)).collect();
        let rights: Vec<(&NamespaceName, Rule)> = rights.into_iter().take(REVIEWS_MAX).collect();
        let questions =
            rights.iter().map(|(namespace, right)| (right.verb(), right.resource(), Some(namespace.as_str())));
        let granted = self.review_all(questions.collect(), deadline).await?;
        let rights = rights.into_iter().map(|(namespace, right)| (namespace.clone(), right));
        Ok(ReviewedRights { within: rights.zip(granted).collect(), everywhere })
    }

    /// Reviews rights concurrently. The results have the order of the questions.
    pub(super) async fn review_all(
        &self,
        questions: Vec<Question<'_>>,
        deadline: Instant,
    ) -> Result<Vec<bool>, ClusterError> {
        let reviews = questions
            .into_iter()
            .map(|(verb, resource, namespace)| self.is_allowed(verb, resource, namespace, deadline));
        stream::iter(reviews).buffered(CONCURRENCY).try_collect().await
    }

    /// Reviews one right; without a namespace, in all of them.
    pub(super) async fn is_allowed(
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
