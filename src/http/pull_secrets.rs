//! `/v1/pull-secrets`

use actix_web::{
    HttpRequest, HttpResponse, delete, get,
    http::header::LOCATION,
    post, put,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use url::form_urlencoded;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::{
        invalid::{FieldError, FieldErrors},
        pull_secret::{
            Declaration, DeletionPolicy, Document, PreviewAction, SecretDocument, TargetDocument, TargetState,
        },
        selector::LabelSelectorDocument,
    },
    http::{
        auth::{
            Caller,
            permission::{ReadPullSecrets, WritePullSecrets},
        },
        body::Json,
        conditional::{IfMatch, etag},
        paging::{Page, PageParams, PageQuery, TargetPage, page, page_of_targets},
        path_name,
        prefer::PreferWait,
        problem::ApiError,
    },
    service::{
        pull_secrets::{Declared, PullSecrets, ShownPullSecret},
        reconcile::{PreviewedTarget, Reconciler},
    },
    storage::{
        resyncs::ResyncStatus,
        targets::status::{Counts, ShownTarget},
    },
};

pub mod events;

const KIND: &str = "pull secret";

/// A declaration: these accounts, as this Secret, in these namespaces.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PutPullSecret {
    /// Names of the accounts that go into the Secret.
    #[schema(min_items = 1, max_items = 1000, example = json!(["martin-5000", "martin-6000"]))]
    accounts: Option<Vec<String>>,
    /// All accounts with such labels, those that are made later too, in place of `accounts`.
    account_selector: Option<LabelSelectorDocument>,
    /// Name and type of the Secret.
    secret: SecretDocument,
    /// Where it goes.
    #[schema(min_items = 1, max_items = 100)]
    targets: Vec<TargetDocument>,
    /// The `ServiceAccount`s of each namespace whose `imagePullSecrets` it is put into.
    #[serde(default)]
    #[schema(max_items = 20, example = json!(["default"]))]
    service_accounts: Vec<String>,
    /// What becomes of Secrets that are not declared any more.
    #[serde(default)]
    deletion_policy: DeletionPolicy,
    /// A Secret of this name that somebody else made is taken over.
    #[serde(default)]
    adopt: bool,
    /// Say what would change, and change nothing.
    #[serde(default)]
    dry_run: bool,
}

/// A pull secret and how it is doing.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecret {
    /// Identity, which its Secrets bear as the label `regcred.dev/pull-secret-id`.
    id: Uuid,
    /// Unique name.
    name: String,
    /// Names of the accounts that go into the Secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    accounts: Option<Vec<String>>,
    /// All accounts with such labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    account_selector: Option<LabelSelectorDocument>,
    /// Name and type of the Secret.
    secret: SecretDocument,
    /// Where it goes.
    targets: Vec<TargetDocument>,
    /// The `ServiceAccount`s that it is attached to.
    service_accounts: Vec<String>,
    /// What becomes of Secrets that are not declared any more.
    deletion_policy: DeletionPolicy,
    /// A Secret of this name that somebody else made is taken over.
    adopt: bool,
    /// Grows by one with every change of the declaration.
    version: i64,
    /// Grows with everything that the Secrets must follow: the declaration, and the accounts.
    generation: i64,
    /// The generation that every target has.
    observed_generation: i64,
    /// How many targets are in which state.
    status: PullSecretStatus,
    /// The clusters in which namespaces are selected by label.
    selections: Vec<PullSecretSelection>,
    /// Since when its Secrets are being removed; it is gone once they are.
    deleted_at: Option<DateTime<Utc>>,
    /// When it was declared first.
    created_at: DateTime<Utc>,
    /// When the declaration was changed last.
    updated_at: DateTime<Utc>,
}

/// How many targets are in which state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretStatus {
    /// Targets that shall have the Secret.
    desired: i64,
    /// Of these, those that have what is declared.
    synced: i64,
    /// Of these, those that were not brought up to date yet.
    pending: i64,
    /// Of these, those whose last try failed.
    failed: i64,
    /// Of these, those where somebody else's Secret has the name.
    conflict: i64,
    /// Targets that lose the Secret.
    removing: i64,
}

/// What is known of the namespaces of a cluster in which a pull secret selects by label.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretSelection {
    /// Name of the cluster.
    cluster: String,
    /// When its namespaces were compared with the selectors last.
    compared_at: Option<DateTime<Utc>>,
    /// What keeps them from being compared.
    last_error: Option<TargetError>,
}

/// Why something is not in order.
#[derive(Debug, Serialize, ToSchema)]
pub struct TargetError {
    /// The last part of a problem type, such as `cluster-unreachable`.
    #[serde(rename = "type")]
    slug: String,
    /// What is wrong and what to do about it, for people.
    detail: String,
}

/// A namespace of a cluster, and how its Secret is doing.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretTargetStatus {
    /// Name of the cluster.
    cluster: String,
    /// The namespace.
    namespace: String,
    /// How it is doing.
    #[schema(value_type = TargetState)]
    state: String,
    /// The Secret is being removed from here.
    removing: bool,
    /// What is wanted.
    generation: i64,
    /// What it has.
    applied_generation: i64,
    /// Identity of the Secret.
    uid: Option<String>,
    /// Version of the Secret.
    resource_version: Option<String>,
    /// Tries since something changed.
    attempts: i32,
    /// What is in the way.
    last_error: Option<TargetError>,
    /// When it was in order last.
    last_synced_at: Option<DateTime<Utc>>,
    /// When it is looked at next.
    next_attempt_at: DateTime<Utc>,
}

/// What a declaration would do.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretPreview {
    /// Always true.
    dry_run: bool,
    /// What would be done, by cluster and namespace.
    targets: Vec<PullSecretTargetPreview>,
}

/// What would become of a target.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretTargetPreview {
    /// Name of the cluster.
    cluster: String,
    /// The namespace; `null` where the cluster as a whole could not be looked at.
    namespace: Option<String>,
    /// What would be done.
    action: PreviewAction,
    /// Why it cannot be told.
    error: Option<TargetError>,
}

impl PutPullSecret {
    fn document(self) -> Document {
        Document {
            accounts: self.accounts,
            account_selector: self.account_selector,
            secret: self.secret,
            targets: self.targets,
            service_accounts: self.service_accounts,
            deletion_policy: self.deletion_policy,
            adopt: self.adopt,
        }
    }
}

impl TargetError {
    fn of(slug: Option<String>, detail: Option<String>) -> Option<Self> {
        slug.zip(detail).map(|(slug, detail)| Self { slug, detail })
    }
}

impl From<Counts> for PullSecretStatus {
    fn from(counts: Counts) -> Self {
        let Counts { desired, synced, pending, failed, conflict, removing, .. } = counts;
        Self { desired, synced, pending, failed, conflict, removing }
    }
}

impl From<ResyncStatus> for PullSecretSelection {
    fn from(resync: ResyncStatus) -> Self {
        Self {
            cluster: resync.cluster,
            compared_at: resync.compared_at,
            last_error: TargetError::of(resync.last_error_type, resync.last_error_detail),
        }
    }
}

impl From<ShownPullSecret> for PullSecret {
    fn from(shown: ShownPullSecret) -> Self {
        let ShownPullSecret { stored, counts, resyncs } = shown;
        let document = stored.declaration.document();
        Self {
            id: stored.id,
            name: stored.name.to_string(),
            accounts: document.accounts,
            account_selector: document.account_selector,
            secret: document.secret,
            targets: document.targets,
            service_accounts: document.service_accounts,
            deletion_policy: document.deletion_policy,
            adopt: document.adopt,
            version: stored.version,
            generation: stored.generation,
            observed_generation: counts.observed_generation,
            status: counts.into(),
            selections: resyncs.into_iter().map(PullSecretSelection::from).collect(),
            deleted_at: stored.deleted_at,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

impl From<ShownTarget> for PullSecretTargetStatus {
    fn from(target: ShownTarget) -> Self {
        Self {
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

impl From<PreviewedTarget> for PullSecretTargetPreview {
    fn from(target: PreviewedTarget) -> Self {
        let error = target.error.map(|error| TargetError { slug: error.slug.to_owned(), detail: error.detail });
        Self { cluster: target.cluster, namespace: target.namespace, action: target.action, error }
    }
}

/// Declare a pull secret, or replace a declaration.
///
/// The Secrets are brought up to date by the worker; the answer does not wait for that, unless `Prefer: wait=N` asks for it. With
/// `dryRun` the clusters are looked at, what would change is said, and nothing is stored.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret, a DNS-1123 label"),
        ("If-Match" = Option<String>, Header, description = "Replace only this version (its ETag)"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: answer once every target has settled, or after N seconds, 60 at most"),
    ),
    request_body = PutPullSecret,
    responses(
        (status = CREATED, description = "Declared", body = PullSecret, headers(
            ("Location" = String, description = "Path of the pull secret"),
            ("ETag" = String, description = "Version of the declaration"),
        )),
        (status = OK, description = "Replaced; or, for a dry run, what would change", content(
            (PullSecret = "application/json"),
        )),
    ),
)]
#[put("/pull-secrets/{name}")]
pub async fn put_pull_secret(
    caller: Caller<WritePullSecrets>,
    pull_secrets: Data<PullSecrets>,
    previews: Data<Reconciler>,
    path: Path<String>,
    expected: IfMatch,
    prefer: PreferWait,
    body: Json<PutPullSecret>,
) -> Result<HttpResponse, ApiError> {
    let dry_run = body.0.dry_run;
    let name = crate::domain::names::Name::parse(&path).map_err(|invalid| ApiError::field("name", invalid))?;
    let declaration = Declaration::parse(body.0.document())?;
    if dry_run {
        let existing = pull_secrets.validate(&caller.identity, &name, &declaration, expected.0).await?;
        let targets = previews.preview(&declaration, existing.as_ref()).await?;
        let targets = targets.into_iter().map(PullSecretTargetPreview::from).collect();
        return Ok(HttpResponse::Ok().json(PullSecretPreview { dry_run, targets }));
    }
    let (declared, shown) = pull_secrets.declare(&caller.identity, &name, &declaration, expected.0).await?;
    let shown = match prefer.0 {
        Some(time) => pull_secrets.wait(&caller.identity, &name, time).await?,
        None => shown,
    };
    let mut response = match declared {
        Declared::Created => HttpResponse::Created(),
        Declared::Replaced => HttpResponse::Ok(),
    };
    if declared == Declared::Created {
        response.insert_header((LOCATION, format!("/v1/pull-secrets/{name}")));
    }
    if let Some(applied) = prefer.applied() {
        response.insert_header(applied);
    }
    Ok(response.insert_header(etag(shown.stored.version)).json(PullSecret::from(shown)))
}

/// List pull secrets by name.
#[utoipa::path(
    tag = "pull-secrets",
    params(PageParams),
    responses((status = OK, body = Page<PullSecret>)),
)]
#[get("/pull-secrets")]
pub async fn list_pull_secrets(
    caller: Caller<ReadPullSecrets>,
    pull_secrets: Data<PullSecrets>,
    query: PageQuery,
) -> Result<HttpResponse, ApiError> {
    let found = pull_secrets.list(&caller.identity, &query.0).await?;
    let page: Page<PullSecret> = page(found, &query.0, |shown| shown.stored.name.as_str());
    Ok(HttpResponse::Ok().json(page))
}

/// Show a pull secret and how it is doing.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: answer once every target has settled, or after N seconds, 60 at most"),
    ),
    responses((status = OK, body = PullSecret, headers(("ETag" = String, description = "Version of the declaration")))),
)]
#[get("/pull-secrets/{name}")]
pub async fn get_pull_secret(
    caller: Caller<ReadPullSecrets>,
    pull_secrets: Data<PullSecrets>,
    path: Path<String>,
    prefer: PreferWait,
) -> Result<HttpResponse, ApiError> {
    let name = path_name(KIND, &path)?;
    let shown = match prefer.0 {
        Some(time) => pull_secrets.wait(&caller.identity, &name, time).await?,
        None => pull_secrets.find(&caller.identity, &name).await?,
    };
    let mut response = HttpResponse::Ok();
    if let Some(applied) = prefer.applied() {
        response.insert_header(applied);
    }
    Ok(response.insert_header(etag(shown.stored.version)).json(PullSecret::from(shown)))
}

/// How a pull secret is deleted.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query to clients; `policy` parses it")]
pub struct DeleteParams {
    /// What becomes of the Secrets, in place of what is declared: `delete` or `retain`.
    #[param(rename = "deletionPolicy")]
    deletion_policy: Option<DeletionPolicy>,
}

/// Delete a pull secret.
///
/// With the deletion policy `delete` its Secrets are removed first, and it is there until they have gone. With `retain` they stay, and
/// it goes at once: the way out where a cluster is gone for good.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        ("If-Match" = Option<String>, Header, description = "Delete only this version (its ETag)"),
        DeleteParams,
    ),
    responses((status = ACCEPTED, description = "Its Secrets are being removed, or it is gone")),
)]
#[delete("/pull-secrets/{name}")]
pub async fn delete_pull_secret(
    caller: Caller<WritePullSecrets>,
    pull_secrets: Data<PullSecrets>,
    path: Path<String>,
    expected: IfMatch,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let policy = policy(request.query_string())?;
    pull_secrets.remove(&caller.identity, &path_name(KIND, &path)?, expected.0, policy).await?;
    Ok(HttpResponse::Accepted().finish())
}

/// List the targets of a pull secret by cluster and namespace.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        PageParams,
        ("state" = Option<TargetState>, Query, description = "Only targets in this state"),
    ),
    responses((status = OK, body = Page<PullSecretTargetStatus>)),
)]
#[get("/pull-secrets/{name}/targets")]
pub async fn list_pull_secret_targets(
    caller: Caller<ReadPullSecrets>,
    pull_secrets: Data<PullSecrets>,
    path: Path<String>,
    query: TargetPage,
) -> Result<HttpResponse, ApiError> {
    let name = path_name(KIND, &path)?;
    let found = pull_secrets.targets(&caller.identity, &name, query.state, &query.page).await?;
    let page: Page<PullSecretTargetStatus> =
        page_of_targets(found, &query.page, |target| format!("{}/{}", target.cluster, target.namespace));
    Ok(HttpResponse::Ok().json(page))
}

/// Look at every target again now.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: answer once every target has settled, or after N seconds, 60 at most"),
    ),
    responses((status = ACCEPTED, body = PullSecret)),
)]
#[post("/pull-secrets/{name}/sync")]
pub async fn sync_pull_secret(
    caller: Caller<WritePullSecrets>,
    pull_secrets: Data<PullSecrets>,
    path: Path<String>,
    prefer: PreferWait,
) -> Result<HttpResponse, ApiError> {
    let name = path_name(KIND, &path)?;
    let shown = pull_secrets.sync(&caller.identity, &name).await?;
    let mut response = HttpResponse::Accepted();
    let shown = match prefer.0 {
        Some(time) => pull_secrets.wait(&caller.identity, &name, time).await?,
        None => shown,
    };
    if let Some(applied) = prefer.applied() {
        response.insert_header(applied);
    }
    Ok(response.json(PullSecret::from(shown)))
}

fn policy(query: &str) -> Result<Option<DeletionPolicy>, ApiError> {
    let mut errors = FieldErrors::default();
    let mut policy = None;
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match (&*key, &*value) {
            ("deletionPolicy", "delete") => policy = Some(DeletionPolicy::Delete),
            ("deletionPolicy", "retain") => policy = Some(DeletionPolicy::Retain),
            ("deletionPolicy", _) => errors.refuse("deletionPolicy", "must be delete or retain"),
            (other, _) => {
                errors.refuse(&other.chars().take(50).collect::<String>(), "is not a known query parameter");
            }
        }
    }
    let finished: Result<Option<DeletionPolicy>, Vec<FieldError>> = errors.finish(|| Some(policy));
    Ok(finished?)
}
