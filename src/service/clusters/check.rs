//! Checks of clusters.
//!
//! A check costs the API server hundreds of requests, and any viewer may request one. So each
//! cluster is checked once at a time, results are remembered for seconds, and reviews are limited
//! ([`AccessReviews`]).

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use uuid::Uuid;

use super::Clusters;
use crate::{
    clients::cluster::{
        AccessReviews, Check, ClusterClient, ClusterError, LackingAccount, LackingPullSecret, MissingRight,
        ReviewsExhausted,
    },
    domain::{
        caller::{Identity, Permission},
        names::Name,
        rbac::RequiredRules,
    },
    service::{
        ServiceError, connection,
        rbac::{self, NamedRules},
    },
};

/// Maximum number of namespaces with leftover Secrets that a check covers, in addition to the
/// declared ones.
const LEFTOVERS_MAX: usize = 10_000;
/// Maximum number of minted accounts that a check covers.
const ACCOUNTS_MAX: usize = 1_000;
/// Maximum number of pull secrets, and of minted accounts, that a check names.
const LACKING_MAX: usize = 100;
/// Maximum number of missing rights per pull secret in a check.
const MISSING_MAX: usize = 50;

/// Access reviews of each cluster that was checked recently. The lock is held during a check.
#[derive(Debug, Default)]
pub(super) struct Checks(Mutex<HashMap<Uuid, Arc<tokio::sync::Mutex<AccessReviews>>>>);

impl Checks {
    fn of(&self, cluster: Uuid) -> Arc<tokio::sync::Mutex<AccessReviews>> {
        let mut checks = self.0.lock();
        checks.retain(|id, reviews| {
            *id == cluster
                || Arc::strong_count(reviews) > 1
                || reviews.try_lock().is_ok_and(|reviews| !reviews.is_unused())
        });
        Arc::clone(checks.entry(cluster).or_default())
    }
}

impl From<ReviewsExhausted> for ServiceError {
    fn from(ReviewsExhausted { retry_after }: ReviewsExhausted) -> Self {
        Self::ReviewsExhausted { retry_after }
    }
}

impl Clusters {
    /// Checks a cluster: connection, version, regcred's rights, and the minted accounts and pull
    /// secrets that lack rights. An unreachable cluster is a result, not an error.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ClusterError::NamespaceNotFound`] for a namespace that is not granted.
    /// - [`ServiceError::ReviewsExhausted`] if callers have the cluster checked too often.
    pub async fn check(&self, caller: &Identity, name: &Name, namespaces: &[&str]) -> Result<Check, ServiceError> {
        let is_granted = namespaces.iter().all(|namespace| caller.grants.include_namespace(namespace));
        let stored = self.find(caller, name).await?;
        let client = match self.client_for(&stored).await {
            Ok(_) | Err(ServiceError::Cluster(_)) if !is_granted => return Err(ClusterError::NamespaceNotFound.into()),
            Ok(client) => client,
            Err(ServiceError::Cluster(error)) => return Ok(Check::failed(&error)),
            Err(other) => return Err(other),
        };
        let reviews = self.checks.of(stored.id);
        let mut reviews = reviews.lock().await;
        reviews.begin(stored.revision());
        let mut check = client.check(&mut reviews, namespaces).await?;
        if let Some(renewal) = &stored.renewal
            && check.problem.is_none()
        {
            let rules = RequiredRules::of_tokens(&renewal.account);
            match client.review_needs(&mut reviews, &[&rules]).await {
                Ok(()) => check.renewal = Some(reviews.missing(&rules).0),
                Err(error) => check.problem = Check::failed(&error).problem,
            }
        }
        if check.reachable && check.problem.is_none() && caller.may(Permission::ReadPullSecrets) {
            self.add_missing_rights(caller, (stored.id, name), (&client, &mut reviews), &mut check).await?;
        }
        // Last: each minted account may need a review of its own, and use up the limit.
        if check.reachable && check.problem.is_none() && caller.may(Permission::ReadAccounts) {
            self.add_missing_rights_of_accounts(caller, stored.id, (&client, &mut reviews), &mut check).await?;
        }
        reviews.end();
        Ok(check)
    }

    /// Adds the missing rights of the pull secrets that the caller can see.
    async fn add_missing_rights(
        &self,
        caller: &Identity,
        cluster: (Uuid, &Name),
        (client, reviews): (&ClusterClient, &mut AccessReviews),
        check: &mut Check,
    ) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let (needed, is_complete) = rbac::required_by_visible(&mut conn, caller, cluster, LEFTOVERS_MAX).await?;
        drop(conn);
        let rules: Vec<&RequiredRules> = needed.iter().map(|needed| &needed.rules).collect();
        if let Err(error) = client.review_needs(reviews, &rules).await {
            check.problem = Check::failed(&error).problem;
            return Ok(());
        }
        let (lacking, are_all) = lacking_rights(reviews, needed);
        let lacking = lacking.into_iter().map(|(name, missing)| LackingPullSecret { name, missing }).collect();
        check.pull_secrets = Some(lacking);
        check.pull_secrets_cut = Some(!is_complete || !are_all);
        Ok(())
    }

    /// Adds the missing rights of the minted accounts that the caller can see.
    async fn add_missing_rights_of_accounts(
        &self,
        caller: &Identity,
        cluster: Uuid,
        (client, reviews): (&ClusterClient, &mut AccessReviews),
        check: &mut Check,
    ) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let (needed, is_complete) =
            rbac::required_by_visible_accounts(&mut conn, caller, cluster, ACCOUNTS_MAX).await?;
        drop(conn);
        let rules: Vec<&RequiredRules> = needed.iter().map(|needed| &needed.rules).collect();
        match client.review_needs(reviews, &rules).await {
            Ok(()) => {
                let (lacking, are_all) = lacking_rights(reviews, needed);
                let lacking = lacking.into_iter().map(|(name, missing)| LackingAccount { name, missing });
                check.registry_accounts = Some(lacking.collect());
                check.registry_accounts_cut = Some(!is_complete || !are_all);
            }
            Err(error) => check.problem = Check::failed(&error).problem,
        }
        Ok(())
    }
}

/// Returns the names with missing rights, and whether these are all.
fn lacking_rights(reviews: &AccessReviews, needed: Vec<NamedRules>) -> (Vec<(String, Vec<MissingRight>)>, bool) {
    let mut are_all = true;
    let mut lacking = Vec::new();
    for NamedRules { name, rules } in needed {
        let (mut missing, is_complete) = reviews.missing(&rules);
        are_all &= is_complete && missing.len() <= MISSING_MAX;
        missing.truncate(MISSING_MAX);
        if !missing.is_empty() {
            lacking.push((name.to_string(), missing));
        }
    }
    are_all &= lacking.len() <= LACKING_MAX;
    lacking.truncate(LACKING_MAX);
    (lacking, are_all)
}
