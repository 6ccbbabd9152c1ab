//! `/v1/summary`

use actix_web::{HttpResponse, get, web::Data};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::{pull_secret::TargetState, verification::VerificationResult},
    http::{
        auth::{Caller, permission::ReadPullSecrets},
        problem::ApiError,
    },
    service::summary::{AuditSummary as Audited, Summaries, Summary as Counted},
    storage::summary::{BoundedCount, OldestPending, PullSecretCounts},
};

/// Counts of what the caller may see.
///
/// A count reads a bounded number of rows. If `hasMore` is `true`, there are at least `count`, and
/// perhaps more.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Registry accounts.
    registry_accounts: AccountSummary,
    /// Clusters.
    clusters: Count,
    /// Pull secrets by state, counted up to 1,000.
    pull_secrets: PullSecretSummary,
    /// Targets by state, as `GET /v1/targets?state=…` lists them. Synced ones are counted among the
    /// first 20,000 targets.
    targets: TargetSummary,
    /// Target whose change has waited longest to be synced; `null` if all are synced. For a caller
    /// whose grants are restricted, of the first 10,000 waiting targets.
    oldest_pending_target: Option<OldestPendingTarget>,
    /// State of the audit log; `null` for callers without `readAudit`.
    audit: Option<AuditSummary>,
}

/// State of the audit log. Only `regcred audit verify` says whether it is intact.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuditSummary {
    /// Last seal of the chain; `null` before the first one.
    last_seal: Option<AuditSeal>,
    /// Batches of events that wait for a seal.
    unsealed: Count,
    /// Age of the oldest of them, in seconds; 0 without any. Over 60 s, changes are refused.
    oldest_unsealed_seconds: f64,
    /// Signs of tampering that the process that answers has found since its start.
    tampering: u64,
}

/// Seal of the audit log.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuditSeal {
    /// Number of the seal.
    number: i64,
    /// Time of the seal.
    sealed_at: DateTime<Utc>,
    /// Events in this seal and all before it.
    events: i64,
}

impl From<Audited> for AuditSummary {
    fn from(Audited { state, tampering }: Audited) -> Self {
        let seal = state.seal.zip(state.sealed_at).zip(state.events);
        Self {
            last_seal: seal.map(|((number, sealed_at), events)| AuditSeal { number, sealed_at, events }),
            unsealed: state.unsealed().into(),
            oldest_unsealed_seconds: state.oldest_unsealed_seconds,
            tampering,
        }
    }
}

/// Number of resources.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = SummaryCount)]
pub struct Count {
    /// Resources that were counted, up to 10,000.
    count: i64,
    /// Whether there may be more.
    has_more: bool,
}

/// Registry accounts.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccountSummary {
    /// All accounts.
    total: Count,
    /// Accounts by result of the last verification. Results of no account are omitted.
    by_verification: Vec<VerificationCount>,
    /// Expired accounts.
    expired: Count,
    /// Accounts that expire within 30 days.
    expiring_soon: Count,
}

/// Number of accounts with one result.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerificationCount {
    /// Result of the last verification; `null` for accounts that were not verified.
    result: Option<VerificationResult>,
    /// Accounts that were counted, up to 10,000.
    count: i64,
    /// Whether there may be more.
    has_more: bool,
}

/// Pull secrets by state.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretSummary {
    /// All targets are up to date, or there is none.
    synced: i64,
    /// Some target is not up to date yet, and none failed.
    pending: i64,
    /// The last attempt failed in some target, and no target is in conflict.
    failed: i64,
    /// In some target, a Secret of another owner has the name.
    conflict: i64,
    /// Being deleted.
    deleting: i64,
    /// Whether there may be more: there are over 1,000 pull secrets, and the oldest were counted.
    has_more: bool,
}

/// Targets by state.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetSummary {
    /// Up to date.
    synced: Count,
    /// Not reconciled since the last change.
    pending: Count,
    /// The last attempt failed.
    failed: Count,
    /// A Secret of another owner has the name.
    conflict: Count,
}

/// Target whose change has waited longest to be synced.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OldestPendingTarget {
    /// Name of the pull secret.
    pull_secret: String,
    /// Name of the cluster.
    cluster: String,
    /// Namespace.
    namespace: String,
    /// State.
    #[schema(value_type = TargetState)]
    state: String,
    /// Time of the change.
    since: DateTime<Utc>,
    /// Age of the change, in seconds.
    age_seconds: f64,
}

impl From<BoundedCount> for Count {
    fn from(BoundedCount { count, has_more }: BoundedCount) -> Self {
        Self { count, has_more }
    }
}

impl From<PullSecretCounts> for PullSecretSummary {
    fn from(counts: PullSecretCounts) -> Self {
        let of = |state| counts.by_state.get(state).copied().unwrap_or_default();
        Self {
            synced: of("synced"),
            pending: of("pending"),
            failed: of("failed"),
            conflict: of("conflict"),
            deleting: of("deleting"),
            has_more: counts.has_more,
        }
    }
}

impl From<Vec<(TargetState, BoundedCount)>> for TargetSummary {
    fn from(counts: Vec<(TargetState, BoundedCount)>) -> Self {
        let of = |state| {
            let found = counts.iter().find(|(counted, _)| *counted == state);
            Count::from(found.map(|(_, count)| *count).unwrap_or_default())
        };
        Self {
            synced: of(TargetState::Synced),
            pending: of(TargetState::Pending),
            failed: of(TargetState::Failed),
            conflict: of(TargetState::Conflict),
        }
    }
}

impl From<OldestPending> for OldestPendingTarget {
    fn from(oldest: OldestPending) -> Self {
        let OldestPending { pull_secret, cluster, namespace, state, since, age_seconds } = oldest;
        Self { pull_secret, cluster, namespace, state, since, age_seconds }
    }
}

impl From<Counted> for Summary {
    fn from(counted: Counted) -> Self {
        let Counted { accounts, clusters, pull_secrets, targets, oldest_pending, audit } = counted;
        let by_result = accounts.by_result.into_iter().filter(|(_, count)| count.count > 0 || count.has_more);
        Self {
            registry_accounts: AccountSummary {
                total: accounts.total.into(),
                by_verification: by_result
                    .map(|(result, count)| VerificationCount { result, count: count.count, has_more: count.has_more })
                    .collect(),
                expired: accounts.expired.into(),
                expiring_soon: accounts.expiring.into(),
            },
            clusters: clusters.into(),
            pull_secrets: pull_secrets.into(),
            targets: targets.into(),
            oldest_pending_target: oldest_pending.map(OldestPendingTarget::from),
            audit: audit.map(AuditSummary::from),
        }
    }
}

/// Get a summary: counts by state, the oldest change that is not synced, and the state of the audit
/// log.
///
/// It contains what the lists contain for the caller. Its cost is bounded: counts stop at a limit.
#[utoipa::path(tag = "pull-secrets", responses((status = OK, body = Summary)))]
#[get("/summary")]
pub async fn get_summary(
    caller: Caller<ReadPullSecrets>,
    summaries: Data<Summaries>,
) -> Result<HttpResponse, ApiError> {
    let summary = summaries.get(&caller.identity).await?;
    Ok(HttpResponse::Ok().json(Summary::from(summary)))
}
