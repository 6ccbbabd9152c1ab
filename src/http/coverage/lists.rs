//! Lists of the newest snapshots: groups, pull secrets, and accounts by their users.

use actix_web::{
    HttpResponse, get,
    web::{Data, Path},
};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::KIND;
use crate::{
    domain::{
        coverage::{Group, PullSecretUse, SecretOwner},
        diagnosis::Verdict,
        names::{Name, NamespaceName, SecretName},
    },
    http::{
        auth::{Caller, permission::DiagnoseClusters},
        paging::{Page, PageQuery},
        path_name,
        problem::ApiError,
        query::{FromQuery, Query},
    },
    service::coverage::Coverages,
    storage::coverage::{
        lists::{GroupFilter, ListedGroup, ListedSecretUse, SecretFilter, SnapshotPosition},
        usage::{AccountUsage, UsagePosition},
    },
};

impl From<ListedGroup> for Group {
    fn from(listed: ListedGroup) -> Self {
        listed.group
    }
}

/// Filter of a list of groups.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query, rename_all = "camelCase")]
pub struct GroupQuery {
    /// Lists only groups with this verdict. May be repeated; one of them must apply.
    #[param(value_type = Option<Vec<Verdict>>)]
    verdict: Vec<Verdict>,
    /// Lists only groups of this namespace.
    #[param(value_type = Option<String>)]
    namespace: Option<NamespaceName>,
    /// Lists only groups that use the login of this registry account.
    #[param(value_type = Option<String>)]
    account: Option<Name>,
    /// Lists only groups with a Secret of this name among their pull secrets.
    #[param(value_type = Option<String>)]
    secret: Option<SecretName>,
    /// Lists only groups with the Secret of this pull secret of regcred among theirs.
    #[param(value_type = Option<String>)]
    pull_secret: Option<Name>,
    /// Lists only groups that are new, or whose verdict differs from that of the snapshot before.
    #[param(value_type = Option<bool>, default = false)]
    changed: bool,
}

impl FromQuery for GroupQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self {
            verdict: query.all("verdict", str::parse),
            namespace: query.one("namespace", NamespaceName::parse),
            account: query.one("account", Name::parse),
            secret: query.one("secret", SecretName::parse),
            pull_secret: query.one("pullSecret", Name::parse),
            changed: query.flag("changed"),
        }
    }
}

impl From<GroupQuery> for GroupFilter {
    fn from(query: GroupQuery) -> Self {
        let GroupQuery { verdict, namespace, account, secret, pull_secret, changed } = query;
        Self { verdicts: verdict, namespace, account, secret, pull_secret, changed }
    }
}

/// List the groups of the newest snapshot, by namespace.
///
/// A group has the images of one repository that pods of one namespace pull with the same pull
/// secrets. All pages are of the snapshot of the first one, as long as it is kept.
#[utoipa::path(
    tag = "coverage",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        PageQuery<SnapshotPosition>,
        GroupQuery,
    ),
    responses((status = OK, body = Page<Group>)),
)]
#[get("/clusters/{cluster}/coverage/groups")]
pub async fn list_coverage_groups(
    caller: Caller<DiagnoseClusters, (PageQuery<SnapshotPosition>, GroupQuery)>,
    coverages: Data<Coverages>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let (page_query, filter) = caller.query;
    let name = path_name(KIND, &path)?;
    let page = (page_query.after(), page_query.rows());
    let found = coverages.groups(&caller.identity, &name, &filter.into(), page).await?;
    let page: Page<Group> = Page::of(found, &page_query, |group| group.position.to_string());
    Ok(HttpResponse::Ok().json(page))
}

/// Filter of a list of pull secrets.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct SecretQuery {
    /// Lists only pull secrets of this namespace.
    #[param(value_type = Option<String>)]
    namespace: Option<NamespaceName>,
    /// Lists only pull secrets of this owner. May be repeated; one of them must apply.
    #[param(value_type = Option<Vec<SecretOwner>>)]
    owner: Vec<SecretOwner>,
    /// Lists only pull secrets that something uses (`true`), or nothing (`false`).
    #[param(value_type = Option<bool>)]
    used: Option<bool>,
    /// Lists only pull secrets that regcred could adopt (`true`), or not (`false`).
    #[param(value_type = Option<bool>)]
    adoptable: Option<bool>,
}

impl FromQuery for SecretQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self {
            namespace: query.one("namespace", NamespaceName::parse),
            owner: query.all("owner", str::parse),
            used: query.optional_flag("used"),
            adoptable: query.optional_flag("adoptable"),
        }
    }
}

impl From<SecretQuery> for SecretFilter {
    fn from(query: SecretQuery) -> Self {
        let SecretQuery { namespace, owner, used, adoptable } = query;
        Self { namespace, owners: owner, used, adoptable }
    }
}

/// List the pull secrets of the newest snapshot, by namespace: those that nothing uses, those that
/// do not exist, and those that regcred could adopt.
#[utoipa::path(
    tag = "coverage",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        PageQuery<SnapshotPosition>,
        SecretQuery,
    ),
    responses((status = OK, body = Page<PullSecretUse>)),
)]
#[get("/clusters/{cluster}/coverage/secrets")]
pub async fn list_coverage_secrets(
    caller: Caller<DiagnoseClusters, (PageQuery<SnapshotPosition>, SecretQuery)>,
    coverages: Data<Coverages>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let (page_query, filter) = caller.query;
    let name = path_name(KIND, &path)?;
    let page = (page_query.after(), page_query.rows());
    let found = coverages.secrets(&caller.identity, &name, &filter.into(), page).await?;
    let page: Page<ListedSecretUse> = Page::of(found, &page_query, |secret| secret.position.to_string());
    let items = page.items.into_iter().map(|listed| listed.secret).collect();
    Ok(HttpResponse::Ok().json(Page { items, next: page.next }))
}

/// What a rotation of a registry account reaches.
#[derive(Debug, Serialize, ToSchema)]
pub struct CoverageAccount {
    /// Name of the account.
    account: String,
    /// Workloads and pods without a controller with an image for which its login is used.
    workloads: i64,
    /// Namespaces with such a workload.
    namespaces: i64,
    /// Clusters with such a workload.
    clusters: i64,
}

impl From<AccountUsage> for CoverageAccount {
    fn from(usage: AccountUsage) -> Self {
        let AccountUsage { account, workloads, namespaces, clusters } = usage;
        Self { account, workloads, namespaces, clusters }
    }
}

/// List the registry accounts that workloads use, by the newest snapshots of all clusters.
///
/// Those that the most workloads use come first: "a rotation of `prod-1` reaches 214 workloads in
/// 37 namespaces of 3 clusters".
#[utoipa::path(
    tag = "coverage",
    params(PageQuery<UsagePosition>),
    responses((status = OK, body = Page<CoverageAccount>)),
)]
#[get("/coverage/accounts")]
pub async fn list_coverage_accounts(
    caller: Caller<DiagnoseClusters, PageQuery<UsagePosition>>,
    coverages: Data<Coverages>,
) -> Result<HttpResponse, ApiError> {
    let page_query = caller.query;
    let found = coverages.accounts(page_query.after(), page_query.rows()).await?;
    let position = |usage: &AccountUsage| format!("{}/{}", usage.workloads, usage.account);
    let page: Page<CoverageAccount> = Page::of(found, &page_query, position);
    Ok(HttpResponse::Ok().json(page))
}
