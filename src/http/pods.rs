//! `/v1/clusters/{cluster}/namespaces/{namespace}/pods`

use actix_web::{
    HttpResponse, get,
    web::{Data, Path},
};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::{
    clients::cluster::ContinueToken,
    domain::{
        diagnosis::{ListedPod, PodPhase, WaitingReason},
        invalid::Invalid,
    },
    http::{
        auth::{Caller, permission::DiagnosePods},
        diagnosis::parse_place,
        paging::{Page, PageQuery},
        problem::ApiError,
        query::{FromQuery, Query},
    },
    service::diagnosis::Diagnoses,
};

/// Filter of a list of pods.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PodQuery {
    /// Lists only pods of which a container waits for its image, and pending ones without the status of a
    /// container. A page may then have few items, or none, although more follow.
    #[param(value_type = Option<bool>, default = false)]
    failing: bool,
}

impl FromQuery for PodQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { failing: query.flag("failing") }
    }
}

/// Workload that created a pod.
#[derive(Debug, Serialize, ToSchema)]
pub struct PodOwner {
    /// `deployment`, `statefulset`, `daemonset`, `job` or `cronjob`.
    #[schema(example = "deployment")]
    kind: &'static str,
    /// Name.
    name: String,
}

/// Pod of a namespace, without its specification.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pod {
    /// Name.
    name: String,
    /// Workload that created it; `null` without one, and for controllers of other kinds.
    owner: Option<PodOwner>,
    /// Phase.
    phase: PodPhase,
    /// Why a container waits for its image, by its status; `null` if none does.
    waiting: Option<WaitingReason>,
}

impl From<ListedPod> for Pod {
    fn from(ListedPod { name, owner, phase, waiting, .. }: ListedPod) -> Self {
        let owner = owner.map(|(kind, name)| PodOwner { kind: kind.as_str(), name: name.to_string() });
        Self { name: name.to_string(), owner, phase, waiting }
    }
}

/// List the pods of a namespace, to choose one to diagnose.
///
/// The API server lists them in pages, by name. That requires the right to list pods in the
/// namespace; without it the response is 502 `cluster-forbidden`. A page may have fewer items than
/// `limit` although more follow, and its cursor expires after some minutes.
#[utoipa::path(
    tag = "diagnosis",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
        PageQuery<ContinueToken>,
        PodQuery,
    ),
    responses((status = OK, body = Page<Pod>)),
)]
#[get("/clusters/{cluster}/namespaces/{namespace}/pods")]
pub async fn list_pods(
    caller: Caller<DiagnosePods, (PageQuery<ContinueToken>, PodQuery)>,
    doctor: Data<Diagnoses>,
    path: Path<(String, String)>,
) -> Result<HttpResponse, ApiError> {
    let (cluster, namespace) = path.into_inner();
    let (cluster, namespace) = parse_place(&cluster, &namespace)?;
    let (page, filter) = &caller.query;
    let limit = u32::try_from(page.limit()).unwrap_or(u32::MAX);
    let found = doctor.list_pods(&caller.identity, (&cluster, &namespace), limit, page.after()).await?;
    let found = found.ok_or_else(|| ApiError::field("cursor", Invalid::new("has expired: start again without it")))?;
    let pods = found.pods.into_iter().filter(|pod| !filter.failing || pod.may_wait_for_image());
    let page: Page<Pod> = Page::continued(pods.map(Pod::from).collect(), found.next.as_ref());
    Ok(HttpResponse::Ok().json(page))
}
