//! Lists of pull secrets and of their targets.

use actix_web::{
    HttpResponse, get,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::{KIND, PullSecret, TargetError};
use crate::{
    domain::{
        listing::{NamePart, PullSecretState, ResourceSort, TargetSort},
        names::{Name, NamespaceName},
        pull_secret::TargetState,
    },
    http::{
        auth::{Caller, permission::ReadPullSecrets},
        paging::{ListQuery, Page, PageQuery, TargetKey},
        path_name,
        problem::ApiError,
        query::{FromQuery, Query},
    },
    service::{
        CursorKey,
        pull_secrets::{PullSecretQuery, PullSecrets, TargetQuery},
    },
    storage::targets::listing::{ShownTarget, TargetPosition},
};

/// Status of one target: a namespace of a cluster.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretTargetStatus {
    /// Name of the pull secret.
    pull_secret: String,
    /// Name of the cluster.
    cluster: String,
    /// Namespace.
    namespace: String,
    /// State.
    #[schema(value_type = TargetState)]
    state: String,
    /// Whether the Secret is being removed.
    removing: bool,
    /// Desired generation.
    generation: i64,
    /// Applied generation.
    applied_generation: i64,
    /// UID of the Secret.
    uid: Option<String>,
    /// Resource version of the Secret.
    resource_version: Option<String>,
    /// Attempts since the last change.
    attempts: i32,
    /// Error of the last attempt.
    last_error: Option<TargetError>,
    /// Time of the last successful attempt.
    last_synced_at: Option<DateTime<Utc>>,
    /// Time of the next attempt.
    next_attempt_at: DateTime<Utc>,
}

/// Filter of a list of pull secrets.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PullSecretFilterQuery {
    /// Lists only pull secrets whose name contains this part, in any case.
    #[param(value_type = Option<String>, example = "team-a")]
    q: Option<NamePart>,
    /// Lists only pull secrets in this state. May be repeated; one of them must apply.
    #[param(value_type = Option<Vec<PullSecretState>>)]
    state: Vec<PullSecretState>,
    /// Lists only pull secrets that target this cluster.
    #[param(value_type = Option<String>)]
    cluster: Option<Name>,
    /// Lists only pull secrets with a target in this namespace.
    #[param(value_type = Option<String>)]
    namespace: Option<NamespaceName>,
    /// Lists only pull secrets that name or select this registry account.
    #[param(value_type = Option<String>)]
    account: Option<Name>,
}

impl FromQuery for PullSecretFilterQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self {
            q: query.one("q", NamePart::parse),
            state: query.all("state", str::parse),
            cluster: query.one("cluster", Name::parse),
            namespace: query.one("namespace", NamespaceName::parse),
            account: query.one("account", Name::parse),
        }
    }
}

impl From<PullSecretFilterQuery> for PullSecretQuery {
    fn from(filter: PullSecretFilterQuery) -> Self {
        let PullSecretFilterQuery { q, state, cluster, namespace, account } = filter;
        Self { name_part: q, states: state, cluster, namespace, account }
    }
}

/// List pull secrets, by default ordered by name.
///
/// A page may have fewer items than `limit`, or none, although `next` is set: it reads at most
/// 1,000 pull secrets that are hidden from the caller or that a filter excludes, and with `q` alone
/// at most 20,000.
#[utoipa::path(
    tag = "pull-secrets",
    params(ListQuery<ResourceSort>, PullSecretFilterQuery),
    responses((status = OK, body = Page<PullSecret>)),
)]
#[get("/pull-secrets")]
pub async fn list_pull_secrets(
    caller: Caller<ReadPullSecrets, (ListQuery<ResourceSort>, PullSecretFilterQuery)>,
    pull_secrets: Data<PullSecrets>,
    cursor_key: Data<CursorKey>,
) -> Result<HttpResponse, ApiError> {
    let (list_query, filter) = caller.query;
    let request = list_query.request(&cursor_key)?;
    let found = pull_secrets.list(&caller.identity, &request, filter.into()).await?;
    let page: Page<PullSecret> = Page::listed(found, &list_query, &cursor_key)?;
    Ok(HttpResponse::Ok().json(page))
}

/// Filter of a list of targets.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TargetFilterQuery {
    /// Lists only targets in this state. May be repeated; one of them must apply.
    #[param(value_type = Option<Vec<TargetState>>)]
    state: Vec<TargetState>,
    /// Lists only targets in this cluster.
    #[param(value_type = Option<String>)]
    cluster: Option<Name>,
    /// Lists only targets in this namespace.
    #[param(value_type = Option<String>)]
    namespace: Option<NamespaceName>,
}

impl FromQuery for TargetFilterQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self {
            state: query.all("state", str::parse),
            cluster: query.one("cluster", Name::parse),
            namespace: query.one("namespace", NamespaceName::parse),
        }
    }
}

impl From<TargetFilterQuery> for TargetQuery {
    fn from(filter: TargetFilterQuery) -> Self {
        let TargetFilterQuery { state, cluster, namespace } = filter;
        Self { states: state, cluster, namespace, account: None, pull_secret: None }
    }
}

/// Selects a page of a list of targets of several pull secrets.
type TargetListQuery = ListQuery<TargetSort, TargetPosition>;

/// Filter of a list of targets of several pull secrets.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TargetUserQuery {
    /// Lists only targets of this pull secret.
    #[param(value_type = Option<String>, rename = "pullSecret")]
    pull_secret: Option<Name>,
    /// Lists only targets of pull secrets that name or select this registry account.
    #[param(value_type = Option<String>)]
    account: Option<Name>,
}

impl FromQuery for TargetUserQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { pull_secret: query.one("pullSecret", Name::parse), account: query.one("account", Name::parse) }
    }
}

/// List the targets of a pull secret, ordered by cluster and namespace.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        PageQuery<TargetKey>,
        TargetFilterQuery,
    ),
    responses((status = OK, body = Page<PullSecretTargetStatus>)),
)]
#[get("/pull-secrets/{name}/targets")]
pub async fn list_pull_secret_targets(
    caller: Caller<ReadPullSecrets, (PageQuery<TargetKey>, TargetFilterQuery)>,
    pull_secrets: Data<PullSecrets>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let (page_query, filter) = caller.query;
    let name = path_name(KIND, &path)?;
    let found = pull_secrets.targets(&caller.identity, &name, &filter.into(), &page_query.request()).await?;
    let page: Page<PullSecretTargetStatus> =
        Page::of(found, &page_query, |target| format!("{}/{}", target.cluster, target.namespace));
    Ok(HttpResponse::Ok().json(page))
}

/// List the targets of all pull secrets: "what is broken?" is `state=failed&state=conflict`.
///
/// Ordered by pull secret, oldest first, then by namespace and cluster. A page may have fewer items
/// than `limit`, or none, although `next` is set: it searches at most 20,000 targets for those of a
/// cluster or namespace, and reads at most 1,000 pull secrets that are hidden from the caller.
#[utoipa::path(
    tag = "pull-secrets",
    params(TargetListQuery, TargetFilterQuery, TargetUserQuery),
    responses((status = OK, body = Page<PullSecretTargetStatus>)),
)]
#[get("/targets")]
pub async fn list_targets(
    caller: Caller<ReadPullSecrets, (TargetListQuery, (TargetFilterQuery, TargetUserQuery))>,
    pull_secrets: Data<PullSecrets>,
    cursor_key: Data<CursorKey>,
) -> Result<HttpResponse, ApiError> {
    let (list_query, (filter, TargetUserQuery { pull_secret, account })) = caller.query;
    let request = list_query.request(&cursor_key)?;
    let query = TargetQuery { account, pull_secret, ..TargetQuery::from(filter) };
    let found = pull_secrets.all_targets(&caller.identity, &request, &query).await?;
    let page: Page<PullSecretTargetStatus> = Page::listed(found, &list_query, &cursor_key)?;
    Ok(HttpResponse::Ok().json(page))
}

impl From<ShownTarget> for PullSecretTargetStatus {
    fn from(target: ShownTarget) -> Self {
        Self {
            pull_secret: target.pull_secret,
            cluster: target.cluster,
            namespace: target.namespace,
            state: target.state,
            removing: !target.wanted,
            generation: target.generation,
            applied_generation: target.applied_generation,
            uid: target.uid,
            resource_version: target.resource_version,
            attempts: target.attempts,
            last_error: TargetError::of(target.last_error_type, target.last_error_detail),
            last_synced_at: target.last_synced_at,
            next_attempt_at: target.next_attempt_at,
        }
    }
}
