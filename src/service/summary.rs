//! Summary of what a caller may see: counts by state, and the oldest change that is not synced.

use crate::{
    domain::{caller::Identity, pull_secret::TargetState},
    service::{ServiceError, connection},
    storage::{
        self, PgPool,
        summary::{AccountCounts, BoundedCount, OldestPending, PullSecretCounts},
    },
};

/// Time in which an account expires soon: 30 days.
const EXPIRES_SOON_SECONDS: i64 = 30 * 86_400;

/// Summary of what a caller may see.
#[derive(Debug)]
pub struct Summary {
    /// Registry accounts.
    pub accounts: AccountCounts,
    /// Clusters.
    pub clusters: BoundedCount,
    /// Pull secrets by state.
    pub pull_secrets: PullSecretCounts,
    /// Targets by state.
    pub targets: Vec<(TargetState, BoundedCount)>,
    /// Oldest change that is not synced.
    pub oldest_pending: Option<OldestPending>,
}

/// Service for summaries.
#[derive(Debug, Clone)]
pub struct Summaries {
    pool: PgPool,
}

impl Summaries {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// Counts what the caller may see. The cost is bounded, whatever the number of rows.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn get(&self, caller: &Identity) -> Result<Summary, ServiceError> {
        use storage::summary::{
            count_accounts, count_clusters, count_pull_secrets, count_targets, find_oldest_pending,
        };

        let mut conn = connection(&self.pool).await?;
        let pull_secrets = count_pull_secrets(&mut conn, &caller.grants).await?;
        let sees_all = caller.grants.include_everything();
        let ids = (!sees_all).then_some(pull_secrets.ids.as_slice());
        let mut targets = count_targets(&mut conn, ids).await?;
        if !sees_all && pull_secrets.has_more {
            for (_, count) in &mut targets {
                count.has_more = true;
            }
        }
        let oldest_pending = find_oldest_pending(&mut conn, ids).await?;
        let accounts = count_accounts(&mut conn, &caller.grants, EXPIRES_SOON_SECONDS).await?;
        let clusters = count_clusters(&mut conn, &caller.grants).await?;
        Ok(Summary { accounts, clusters, pull_secrets, targets, oldest_pending })
    }
}
