//! Summary of what a caller may see: counts by state, and the oldest change that is not synced.

use std::sync::Arc;

use crate::{
    domain::{
        caller::{Identity, Permission},
        pull_secret::TargetState,
    },
    service::{ServiceError, audit::metrics::AuditMetrics, connection},
    storage::{
        self, PgPool,
        summary::{AccountCounts, AuditState, BoundedCount, OldestPending, PullSecretCounts},
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
    /// Audit log, for callers that may read it.
    pub audit: Option<AuditSummary>,
}

/// State of the audit log.
#[derive(Debug)]
pub struct AuditSummary {
    /// Last seal, and what waits for the next one.
    pub state: AuditState,
    /// Signs of tampering that this process has found.
    pub tampering: u64,
}

/// Service for summaries.
#[derive(Debug, Clone)]
pub struct Summaries {
    pool: PgPool,
    audit: Arc<AuditMetrics>,
}

impl Summaries {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, audit: Arc<AuditMetrics>) -> Self {
        Self { pool, audit }
    }

    /// Counts what the caller may see. The cost is bounded, whatever the number of rows.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn get(&self, caller: &Identity) -> Result<Summary, ServiceError> {
        use storage::summary::{
            count_accounts, count_clusters, count_pull_secrets, count_targets, find_audit_state, find_oldest_pending,
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
        let audit = if caller.may(Permission::ReadAudit) {
            let tampering = self.audit.tampering().iter().map(|(_, count)| count).sum();
            Some(AuditSummary { state: find_audit_state(&mut conn).await?, tampering })
        } else {
            None
        };
        Ok(Summary { accounts, clusters, pull_secrets, targets, oldest_pending, audit })
    }
}
