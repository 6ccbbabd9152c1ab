//! `/v1/clusters/{cluster}/coverage`, and accounts by their users

use actix_web::{
    HttpResponse, get, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{caller::Call, coverage::Summary},
    http::{
        auth::{Caller, permission::DiagnoseClusters},
        idempotency::{Idempotency, IdempotencyKeyHeader},
        path_name,
        prefer::PreferWait,
        problem::ApiError,
        query::DryRunQuery,
    },
    service::coverage::{Coverages, ShownCoverage},
    storage::coverage::{
        runs::StoredRun,
        snapshots::{StoredChanges, StoredSnapshot},
    },
};

pub mod lists;

const KIND: &str = "cluster";

/// Coverage of a cluster: its newest run and snapshot.
#[derive(Debug, Serialize, ToSchema)]
pub struct Coverage {
    /// Name of the cluster.
    cluster: String,
    /// Newest run; `null` if none was requested.
    run: Option<CoverageRun>,
    /// Newest snapshot; `null` if no run has succeeded.
    snapshot: Option<CoverageSnapshot>,
}

/// Run that examines a cluster.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CoverageRun {
    /// Identifier.
    id: Uuid,
    /// State.
    #[schema(value_type = CoverageRunState)]
    state: String,
    /// Time of the request.
    requested_at: DateTime<Utc>,
    /// Time of the start; `null` while the run is pending.
    started_at: Option<DateTime<Utc>>,
    /// Time of the end; `null` before.
    finished_at: Option<DateTime<Utc>>,
    /// Progress; `null` unless the run is in progress.
    progress: Option<CoverageProgress>,
    /// Why the run failed; `null` unless it did.
    error: Option<CoverageError>,
}

/// State of a run.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[expect(dead_code, reason = "documents CoverageRun::state")]
enum CoverageRunState {
    /// No process carries the run out yet.
    Pending,
    /// The run is in progress.
    Running,
    /// The run stored a snapshot.
    Succeeded,
    /// The run stored nothing; the snapshot before it stays.
    Failed,
}

/// Progress of a run.
#[derive(Debug, Serialize, ToSchema)]
pub struct CoverageProgress {
    /// What the run does.
    #[schema(value_type = CoverageStage)]
    stage: String,
    /// Workloads and pods that were listed, or groups that were examined.
    done: i64,
    /// Number of groups; `null` while it is unknown.
    total: Option<i64>,
}

/// Stage of a run.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[expect(dead_code, reason = "documents CoverageProgress::stage")]
enum CoverageStage {
    /// Lists what the cluster runs.
    Listing,
    /// Reads pull secrets and asks registries.
    Examining,
    /// Stores the snapshot.
    Storing,
}

/// Error of a run.
#[derive(Debug, Serialize, ToSchema)]
pub struct CoverageError {
    /// Last segment of a problem type, such as `cluster-unreachable`.
    #[serde(rename = "type")]
    slug: String,
    /// Explanation, and how to fix it.
    detail: String,
}

/// Snapshot of a cluster.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CoverageSnapshot {
    /// Identifier.
    id: Uuid,
    /// Time of the snapshot.
    taken_at: DateTime<Utc>,
    /// Numbers, and what is missing.
    summary: Summary,
    /// Differences to the snapshot before; `null` for the first one.
    changes: Option<CoverageChanges>,
}

/// Differences to the snapshot before, as numbers of groups.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CoverageChanges {
    /// Time of the snapshot before.
    compared_with: DateTime<Utc>,
    /// New groups.
    added: i64,
    /// Groups that no longer exist.
    removed: i64,
    /// Groups whose verdict was `ok` and is not any more.
    broken: i64,
    /// Groups whose verdict is `ok` now.
    fixed: i64,
}

impl From<StoredRun> for CoverageRun {
    fn from(run: StoredRun) -> Self {
        let is_running = run.state == "running";
        let (done, total) = (run.done, run.total);
        Self {
            id: run.run_id,
            state: run.state,
            requested_at: run.requested_at,
            started_at: run.started_at,
            finished_at: run.finished_at,
            progress: run.stage.filter(|_| is_running).map(|stage| CoverageProgress { stage, done, total }),
            error: run.error_type.zip(run.error_detail).map(|(slug, detail)| CoverageError { slug, detail }),
        }
    }
}

impl From<StoredChanges> for CoverageChanges {
    fn from(changes: StoredChanges) -> Self {
        let StoredChanges { compared_with, added, removed, broken, fixed } = changes;
        Self { compared_with, added, removed, broken, fixed }
    }
}

impl From<StoredSnapshot> for CoverageSnapshot {
    fn from(snapshot: StoredSnapshot) -> Self {
        let StoredSnapshot { id, taken_at, summary, changes } = snapshot;
        Self { id, taken_at, summary, changes: changes.map(CoverageChanges::from) }
    }
}

impl From<ShownCoverage> for Coverage {
    fn from(shown: ShownCoverage) -> Self {
        Self {
            cluster: shown.cluster.to_string(),
            run: shown.run.map(CoverageRun::from),
            snapshot: shown.snapshot.map(CoverageSnapshot::from),
        }
    }
}

/// Examine a cluster: which images in use can be pulled, and with which login.
///
/// A worker lists pods, workloads, service accounts and the metadata of pull secrets, reads the
/// values of pull secrets that other clients made and that are in use, and asks the registries as a
/// diagnosis does. The result is a snapshot; the last two are kept and compared.
///
/// A cluster has one run at a time: while one is pending or in progress, the response has it, and
/// nothing is changed. Every run is audited, with the names of the Secrets that it reads.
#[utoipa::path(
    tag = "coverage",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        DryRunQuery,
        ("Prefer" = Option<String>, Header, description = "`wait=N`: respond once the run has ended, after N seconds at most (up to 60)"),
        IdempotencyKeyHeader,
    ),
    responses((status = ACCEPTED, body = Coverage)),
)]
#[post("/clusters/{cluster}/coverage")]
pub async fn run_coverage(
    caller: Caller<DiagnoseClusters, DryRunQuery>,
    coverages: Data<Coverages>,
    path: Path<String>,
    prefer: PreferWait,
    idempotency: Idempotency,
) -> Result<HttpResponse, ApiError> {
    let name = path_name(KIND, &path)?;
    let request = async |call: &Call| coverages.request(call, &name).await;
    let current = async |call: &Call| coverages.find(call, &name).await;
    let mut shown = idempotency.once(&caller.identity, request, current).await?;
    // A dry run requested nothing that could be waited for.
    if let Some(time) = prefer.0.filter(|_| !caller.identity.dry_run) {
        shown = coverages.wait(&caller.identity, &name, time).await?;
    }
    let mut response = HttpResponse::Accepted();
    prefer.confirm(&mut response);
    Ok(response.json(Coverage::from(shown)))
}

/// Get the newest run and the newest snapshot of a cluster.
#[utoipa::path(
    tag = "coverage",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: respond once no run is in progress, after N seconds at most (up to 60)"),
    ),
    responses((status = OK, body = Coverage)),
)]
#[get("/clusters/{cluster}/coverage")]
pub async fn get_coverage(
    caller: Caller<DiagnoseClusters>,
    coverages: Data<Coverages>,
    path: Path<String>,
    prefer: PreferWait,
) -> Result<HttpResponse, ApiError> {
    let name = path_name(KIND, &path)?;
    let shown = match prefer.0 {
        Some(time) => coverages.wait(&caller.identity, &name, time).await?,
        None => coverages.find(&caller.identity, &name).await?,
    };
    let mut response = HttpResponse::Ok();
    prefer.confirm(&mut response);
    Ok(response.json(Coverage::from(shown)))
}
