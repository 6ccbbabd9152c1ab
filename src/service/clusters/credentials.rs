//! End of clusters' credentials: expiry warnings, and the renewal of tokens.
//!
//! A renewal replaces the token if the cluster and its credential are still those that were read.
//! Of two replicas that renew the same token, one stores its result; the other token ends unused.
//! A process that dies between request and storage leaves the old token, which is renewed again
//! when the lease ends.

use std::{
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::Duration,
};

use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use super::Clusters;
use crate::{
    clients::cluster::IssuedToken,
    domain::{
        audit::{Action, Details, NewEvent, Resource, worker},
        docker_config::{Warning, WarningCode},
        names::Name,
        pull_secret::backoff,
        verification::EXPIRY_WARNINGS,
    },
    service::{ServiceError, connection, master_keys, reconcile::target_error},
    storage::{
        cluster_credentials::{self, Expiring},
        clusters::{Renewal, StoredCluster},
    },
};

/// Requested lifetime of a token. API servers may limit it: the stated end counts.
const LIFETIME: Duration = Duration::from_hours(7 * 24);
/// Minimum delay after a failed renewal.
const RETRY_MIN: Duration = Duration::from_secs(10);
/// Maximum number of expiry warnings, or described credentials, per call.
const BATCH: i64 = 100;

/// Counters and gauges of credentials.
#[derive(Debug, Default)]
pub struct CredentialMetrics {
    renewed: AtomicU64,
    failed: AtomicU64,
    failing: AtomicI64,
    expiring: [AtomicI64; EXPIRY_WARNINGS.len()],
}

impl CredentialMetrics {
    /// Number of renewals by this process, per result.
    pub fn renewals(&self) -> [(&'static str, u64); 2] {
        [("success", &self.renewed), ("failure", &self.failed)]
            .map(|(result, count)| (result, count.load(Ordering::Relaxed)))
    }

    /// Number of clusters whose last renewal failed, as of the last report.
    pub fn failing(&self) -> i64 {
        self.failing.load(Ordering::Relaxed)
    }

    /// Number of clusters whose credential ends within each of [`EXPIRY_WARNINGS`], as of the last
    /// report.
    pub fn expiring(&self) -> impl Iterator<Item = (i16, i64)> {
        EXPIRY_WARNINGS.into_iter().zip(&self.expiring).map(|(days, count)| (days, count.load(Ordering::Relaxed)))
    }
}

impl Clusters {
    /// Logs due expiry warnings and refreshes the gauges. Each warning of [`EXPIRY_WARNINGS`] is
    /// logged once, regardless of the number of replicas.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn report_credentials(&self) -> Result<(), ServiceError> {
        self.describe_credentials().await?;
        let mut conn = connection(&self.pool).await?;
        let due = cluster_credentials::claim_warnings(&mut conn, &EXPIRY_WARNINGS, BATCH).await?;
        due.iter().for_each(log_expiry);
        let expiring = cluster_credentials::count_expiring(&mut conn, &EXPIRY_WARNINGS).await?;
        for (days, gauge) in EXPIRY_WARNINGS.into_iter().zip(&self.credential_metrics.expiring) {
            let counted = expiring.iter().find(|(counted, _)| *counted == days);
            gauge.store(counted.map_or(0, |(_, count)| *count), Ordering::Relaxed);
        }
        let failing = cluster_credentials::count_failing_renewals(&mut conn).await?;
        self.credential_metrics.failing.store(failing, Ordering::Relaxed);
        Ok(())
    }

    /// Stores the end of credentials that an earlier release wrote.
    async fn describe_credentials(&self) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let ids = cluster_credentials::undescribed(&mut conn, BATCH).await?;
        drop(conn);
        for id in ids {
            let Ok(stored) = self.find_by_id(id).await else { continue };
            let opened = self.open(&stored);
            if let Err(error) = &opened {
                tracing::error!(cluster = stored.name, %error, "cluster credential not read");
            }
            let expires_at = opened.ok().and_then(|auth| auth.expires_at());
            let mut conn = connection(&self.pool).await?;
            cluster_credentials::describe(&mut conn, &stored, expires_at).await?;
        }
        Ok(())
    }

    /// Claims clusters with a due renewal. No other replica claims them for `lease_seconds`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn claim_renewals(&self, limit: i64, lease_seconds: i32) -> Result<Vec<Uuid>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(cluster_credentials::claim_renewals(&mut conn, limit, lease_seconds).await?)
    }

    /// Renews the token of a claimed cluster. After a failure the old token stays, and the renewal
    /// is due again after a backoff.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the cluster was removed since the claim;
    /// [`ServiceError::Storage`] or [`ServiceError::Audit`] if the result could not be stored.
    pub async fn renew_token(&self, id: Uuid) -> Result<(), ServiceError> {
        let stored = self.find_by_id(id).await?;
        let Some(renewal) = &stored.renewal else { return Ok(()) };
        match self.request_token(&stored, renewal).await {
            Ok(issued) => self.store_token(&stored, renewal, &issued).await,
            Err(error @ ServiceError::Storage(_)) => Err(error),
            Err(error) => self.record_failure(&stored, renewal, &error).await,
        }
    }

    async fn request_token(&self, stored: &StoredCluster, renewal: &Renewal) -> Result<IssuedToken, ServiceError> {
        let client = self.client_for(stored).await?;
        Ok(client.request_token(&renewal.account, None, LIFETIME).await?)
    }

    /// Stores a new token and its audit event, unless the cluster or its token has changed since.
    async fn store_token(
        &self,
        stored: &StoredCluster,
        renewal: &Renewal,
        issued: &IssuedToken,
    ) -> Result<(), ServiceError> {
        let name = cluster_name(stored)?;
        let mut tx = self.pool.begin().await?;
        let form = master_keys::seal_form(&mut tx, &self.sealer).await?;
        let sealed = self.sealer.seal(form, &stored.slot(), &issued.token)?;
        if !cluster_credentials::record_renewal(&mut tx, stored, &sealed, issued.expires_at).await? {
            return Ok(());
        }
        let event = NewEvent::by(&worker(), Action::ClusterRenew, Resource::cluster(&name));
        self.audit.commit(tx, [event.details(Details::default().version(stored.version))]).await?;
        self.credential_metrics.renewed.fetch_add(1, Ordering::Relaxed);
        let (service_account, expires_at) = (&renewal.account, issued.expires_at);
        tracing::info!(cluster = stored.name, %service_account, %expires_at, "cluster token renewed");
        Ok(())
    }

    async fn record_failure(
        &self,
        stored: &StoredCluster,
        renewal: &Renewal,
        error: &ServiceError,
    ) -> Result<(), ServiceError> {
        let retry = backoff(renewal.failures.saturating_add(1)).max(RETRY_MIN);
        let retry_seconds = i32::try_from(retry.as_secs()).unwrap_or(i32::MAX);
        let detail = target_error(error).detail;
        let mut conn = connection(&self.pool).await?;
        cluster_credentials::record_renewal_failure(&mut conn, stored, &detail, retry_seconds).await?;
        self.credential_metrics.failed.fetch_add(1, Ordering::Relaxed);
        let (service_account, expires_at) = (&renewal.account, stored.expires_at.map(|at| at.to_rfc3339()));
        tracing::warn!(cluster = stored.name, %service_account, expires_at, detail, "cluster token not renewed");
        Ok(())
    }
}

/// Warnings about the end of a cluster's credential: of one that nothing renews, from 30 days before
/// its end; of a renewed one, while renewals fail.
#[must_use]
pub fn credential_warnings(stored: &StoredCluster, now: DateTime<Utc>) -> Vec<Warning> {
    let warning = |code, detail: String| Warning { code, account: None, key: None, detail };
    let mut warnings = Vec::new();
    if let Some(Renewal { account, failures: 1.., error, .. }) = &stored.renewal {
        let reason = error.as_deref().unwrap_or("unknown reason");
        let detail = format!("the token of the ServiceAccount {account} is not renewed: {reason}");
        warnings.push(warning(WarningCode::RenewalFailing, detail));
    }
    let (Some(expires_at), false) = (stored.expires_at, stored.renewal.is_some() && warnings.is_empty()) else {
        return warnings;
    };
    let at = expires_at.to_rfc3339_opts(SecondsFormat::Secs, true);
    let days = (expires_at - now).num_days();
    if expires_at <= now {
        let detail = format!("the credential ended at {at}: set `auth` to a new one");
        warnings.push(warning(WarningCode::CredentialExpired, detail));
    } else if days < i64::from(EXPIRY_WARNINGS[0]) {
        let detail = format!("the credential ends at {at}, in {days} days: set `auth` to a new one before");
        warnings.push(warning(WarningCode::CredentialExpires, detail));
    }
    warnings
}

fn cluster_name(stored: &StoredCluster) -> Result<Name, ServiceError> {
    Name::parse(&stored.name).map_err(|invalid| ServiceError::field("name", invalid))
}

fn log_expiry(Expiring { name, expires_at, days }: &Expiring) {
    let expires_at = expires_at.to_rfc3339_opts(SecondsFormat::Secs, true);
    if *days == 0 {
        tracing::warn!(cluster = name, expires_at, "cluster credential expired");
    } else {
        tracing::warn!(cluster = name, expires_at, days, "cluster credential expires soon");
    }
}
