//! `/v1/pull-secrets`

use actix_web::{
    HttpResponse, delete, get,
    http::header::LOCATION,
    post, put,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::{
        caller::Call,
        docker_config::Warning,
        invalid::Invalid,
        listing::PullSecretState,
        names::Name,
        pull_secret::{Declaration, DeletionPolicy, Document, LeftOut, SecretDocument, TargetDocument},
        reconcile::TargetErrorType,
        selector::LabelSelectorDocument,
    },
    http::{
        auth::{
            Caller,
            permission::{ReadPullSecrets, WritePullSecrets},
        },
        body::Json,
        conditional::{IfMatch, MustBeNew, etag},
        idempotency::{Idempotency, IdempotencyKeyHeader},
        path_name,
        prefer::PreferWait,
        problem::ApiError,
        query::{DryRunQuery, FromQuery, Query},
    },
    service::{
        pull_secrets::{Declared, Precondition, PullSecrets, ReadOnlyFields, ShownPullSecret},
        reconcile::Reconciler,
    },
    storage::{coverage::usage::PullSecretUsage, resyncs::ResyncStatus, targets::status::Counts},
};

pub mod events;
pub mod lists;
pub mod patch;
mod preview;

use self::preview::{ReplacedOrPreview, preview};

const KIND: &str = "pull secret";

/// Declaration: accounts, the Secret that contains them, and the namespaces that it is placed in.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "some read-only fields are accepted and ignored")]
pub struct PutPullSecret {
    /// Names of the accounts to include.
    #[schema(min_items = 1, max_items = 1000, example = json!(["team-a", "team-b"]))]
    accounts: Option<Vec<String>>,
    /// Selects the accounts by label, including future ones, instead of `accounts`.
    account_selector: Option<LabelSelectorDocument>,
    /// Name and type of the Secret.
    secret: SecretDocument,
    /// Namespaces to place the Secret in.
    #[schema(min_items = 1, max_items = 100)]
    targets: Vec<TargetDocument>,
    /// Service accounts in each namespace to which the Secret is added as `imagePullSecrets`.
    #[serde(default)]
    #[schema(max_items = 20, example = json!(["default"]))]
    service_accounts: Vec<String>,
    /// Policy for Secrets that are no longer declared.
    #[serde(default)]
    deletion_policy: DeletionPolicy,
    /// Takes over an existing Secret of this name that regcred did not create.
    #[serde(default)]
    adopt: bool,
    /// Dry run. Use the query parameter `dryRun` instead.
    #[serde(default)]
    #[schema(deprecated)]
    dry_run: bool,
    /// As in a response. Read-only fields are optional, and refused if they differ from the stored
    /// ones.
    #[schema(read_only)]
    id: Option<Uuid>,
    /// As in the path.
    #[schema(read_only)]
    name: Option<String>,
    /// As in a response.
    #[schema(read_only)]
    version: Option<i64>,
    /// Ignored, as are the other fields that regcred changes by itself.
    #[schema(read_only, value_type = Option<i64>)]
    generation: Option<IgnoredAny>,
    /// Ignored.
    #[schema(read_only, value_type = Option<i64>)]
    observed_generation: Option<IgnoredAny>,
    /// Ignored.
    #[schema(read_only, value_type = Option<Object>)]
    status: Option<IgnoredAny>,
    /// Ignored.
    #[schema(read_only, value_type = Option<Vec<Object>>)]
    selections: Option<IgnoredAny>,
    /// Ignored.
    #[schema(read_only, value_type = Option<Object>)]
    used_by: Option<IgnoredAny>,
    /// As in a response.
    #[schema(read_only)]
    deleted_at: Option<DateTime<Utc>>,
    /// As in a response.
    #[schema(read_only)]
    created_at: Option<DateTime<Utc>>,
    /// As in a response.
    #[schema(read_only)]
    updated_at: Option<DateTime<Utc>>,
}

/// Pull secret and its status.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecret {
    /// Immutable identifier, the value of the label `regcred.dev/pull-secret-id` of its Secrets.
    id: Uuid,
    /// Unique name.
    name: String,
    /// Names of the included accounts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    accounts: Option<Vec<String>>,
    /// Selector of the included accounts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    account_selector: Option<LabelSelectorDocument>,
    /// Name and type of the Secret.
    secret: SecretDocument,
    /// Namespaces that the Secret is placed in.
    targets: Vec<TargetDocument>,
    /// Service accounts that the Secret is added to.
    service_accounts: Vec<String>,
    /// Policy for Secrets that are no longer declared.
    deletion_policy: DeletionPolicy,
    /// Whether an existing Secret of this name is taken over.
    adopt: bool,
    /// Version of the declaration, incremented by every change.
    version: i64,
    /// Generation of the desired state, incremented by changes of the declaration and of its
    /// accounts.
    generation: i64,
    /// Generation that all targets have reached.
    observed_generation: i64,
    /// Number of targets by state.
    status: PullSecretStatus,
    /// Clusters in which namespaces are selected by label.
    selections: Vec<PullSecretSelection>,
    /// What uses its Secrets, by the newest coverage of its clusters. Absent in lists, without a
    /// coverage, and for callers without all grants.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    used_by: Option<PullSecretUsers>,
    /// Time of deletion; the pull secret exists until its Secrets are removed.
    deleted_at: Option<DateTime<Utc>>,
    /// Time of creation.
    created_at: DateTime<Utc>,
    /// Time of the last change of the declaration.
    updated_at: DateTime<Utc>,
}

/// Number of targets by state, selected accounts that are not in the document, and warnings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretStatus {
    /// Targets that should have the Secret.
    desired: i64,
    /// Desired targets that are up to date.
    synced: i64,
    /// Desired targets that are not up to date yet.
    pending: i64,
    /// Desired targets whose last attempt failed.
    failed: i64,
    /// Desired targets where a Secret of another owner has the name.
    conflict: i64,
    /// Targets from which the Secret is being removed.
    removing: i64,
    /// Accounts that the selector matches and that the document leaves out, by name. Accounts that
    /// are not granted to the caller are omitted.
    left_out: Vec<LeftOut>,
    /// The worst state of its targets.
    state: PullSecretState,
    /// Selectors that match nothing. Those of namespaces are known once a cluster was compared with
    /// the declaration.
    warnings: Vec<Warning>,
}

/// Number of workloads and pods without a controller that use a pull secret.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretUsers {
    /// Workloads.
    workloads: i64,
    /// Namespaces with such a workload.
    namespaces: i64,
    /// Clusters with such a workload.
    clusters: i64,
    /// Time of the oldest snapshot that was counted.
    as_of: DateTime<Utc>,
}

/// Status of a cluster in which a pull secret selects namespaces by label.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretSelection {
    /// Name of the cluster.
    cluster: String,
    /// Time of the last comparison of its namespaces with the selectors.
    compared_at: Option<DateTime<Utc>>,
    /// Error of the last comparison.
    last_error: Option<TargetError>,
}

/// Error of a target or a cluster.
#[derive(Debug, Serialize, ToSchema)]
pub struct TargetError {
    /// Last segment of a problem type, such as `cluster-unreachable`.
    #[serde(rename = "type")]
    #[schema(value_type = TargetErrorType)]
    slug: String,
    /// Explanation, and how to fix it.
    detail: String,
}

impl PutPullSecret {
    fn read_only(&self) -> ReadOnlyFields {
        ReadOnlyFields {
            id: self.id,
            version: self.version,
            deleted_at: self.deleted_at,
            created_at: self.created_at,
            updated_at: self.updated_at,
        }
    }

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

impl PullSecretStatus {
    /// Status of a pull secret, without the lists that `shown` keeps.
    fn of(shown: &mut ShownPullSecret) -> Self {
        let Counts { desired, synced, pending, failed, conflict, removing, .. } = shown.counts;
        let (state, warnings) = (shown.state(), shown.warnings());
        let left_out = std::mem::take(&mut shown.left_out);
        Self { desired, synced, pending, failed, conflict, removing, left_out, state, warnings }
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
    fn from(mut shown: ShownPullSecret) -> Self {
        let status = PullSecretStatus::of(&mut shown);
        let ShownPullSecret { stored, counts, resyncs, usage, .. } = shown;
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
            status,
            selections: resyncs.into_iter().map(PullSecretSelection::from).collect(),
            used_by: usage.map(|PullSecretUsage { workloads, namespaces, clusters, as_of }| PullSecretUsers {
                workloads,
                namespaces,
                clusters,
                as_of,
            }),
            deleted_at: stored.deleted_at,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

/// Create or replace a pull secret.
///
/// The worker applies the declaration. The response waits for that only with `Prefer: wait=N`. With
/// `dryRun=true`, regcred reads the clusters and returns the planned changes without storing
/// anything. An equal declaration changes nothing, so the response of `GET` may be sent back.
///
/// Named accounts with the same key are refused. Of selected accounts with the same key, the oldest
/// one is in the document, and the others are in `status.leftOut`.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret, a DNS-1123 label"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to replace"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: create the pull secret, and replace none"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: respond once every target has settled, after N seconds at most (up to 60)"),
        DryRunQuery,
    ),
    request_body = PutPullSecret,
    responses(
        (status = CREATED, description = "Created", body = PullSecret, headers(
            ("Location" = String, description = "Path of the pull secret"),
            ("ETag" = String, description = "Version of the declaration"),
        )),
        (status = OK, description = "Replaced, or the planned changes of a dry run", content(
            (ReplacedOrPreview = "application/json"),
        )),
    ),
)]
#[put("/pull-secrets/{name}")]
pub async fn put_pull_secret(
    caller: Caller<WritePullSecrets, DryRunQuery>,
    pull_secrets: Data<PullSecrets>,
    previews: Data<Reconciler>,
    path: Path<String>,
    (expected, must_be_new): (IfMatch, MustBeNew),
    prefer: PreferWait,
    body: Json<PutPullSecret>,
) -> Result<HttpResponse, ApiError> {
    let dry_run = body.0.dry_run || caller.identity.dry_run;
    let name = Name::parse(&path).map_err(|invalid| ApiError::field("name", invalid))?;
    if body.0.name.as_ref().is_some_and(|given| given != name.as_str()) {
        return Err(ApiError::field("name", "is read-only and differs from the name in the path: omit it"));
    }
    let condition = Precondition { version: expected.0, read_only: body.0.read_only(), must_be_new: must_be_new.0 };
    let declaration = Declaration::parse(body.0.document())?;
    if dry_run {
        return preview(&caller.identity, (&pull_secrets, &previews), &name, &declaration, &condition).await;
    }
    let (declared, shown) = pull_secrets.declare(&caller.identity, &name, &declaration, &condition).await?;
    let shown = prefer_settled(&prefer, &pull_secrets, &caller.identity, &name, shown).await?;
    let mut response = match declared {
        Declared::Created => HttpResponse::Created(),
        Declared::Replaced => HttpResponse::Ok(),
    };
    if declared == Declared::Created {
        response.insert_header((LOCATION, format!("/v1/pull-secrets/{name}")));
    }
    prefer.confirm(&mut response);
    Ok(response.insert_header(etag(shown.stored.version)).json(ReplacedOrPreview::Replaced(Box::new(shown.into()))))
}

/// Get a pull secret and its status.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: respond once every target has settled, after N seconds at most (up to 60)"),
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
    prefer.confirm(&mut response);
    Ok(response.insert_header(etag(shown.stored.version)).json(PullSecret::from(shown)))
}

/// Options of a deletion.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeleteQuery {
    /// Policy for the Secrets, instead of the declared one.
    #[param(rename = "deletionPolicy")]
    deletion_policy: Option<DeletionPolicy>,
}

impl FromQuery for DeleteQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let policy = query.one("deletionPolicy", |policy| match policy {
            "delete" => Ok(DeletionPolicy::Delete),
            "retain" => Ok(DeletionPolicy::Retain),
            _ => Err(Invalid::new("must be delete or retain")),
        });
        Self { deletion_policy: policy }
    }
}

/// Delete a pull secret.
///
/// With the deletion policy `delete`, the pull secret exists until all of its Secrets are removed.
/// With `retain`, the Secrets remain and the pull secret is deleted immediately, even if a cluster
/// no longer exists.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to delete"),
        DeleteQuery,
        DryRunQuery,
    ),
    responses((status = ACCEPTED, description = "Deleted, or its Secrets are being removed")),
)]
#[delete("/pull-secrets/{name}")]
pub async fn delete_pull_secret(
    caller: Caller<WritePullSecrets, (DeleteQuery, DryRunQuery)>,
    pull_secrets: Data<PullSecrets>,
    path: Path<String>,
    expected: IfMatch,
) -> Result<HttpResponse, ApiError> {
    let policy = caller.query.0.deletion_policy;
    pull_secrets.remove(&caller.identity, &path_name(KIND, &path)?, expected.0, policy).await?;
    Ok(HttpResponse::Accepted().finish())
}

/// Reconcile every target now.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        DryRunQuery,
        ("Prefer" = Option<String>, Header, description = "`wait=N`: respond once every target has settled, after N seconds at most (up to 60)"),
        IdempotencyKeyHeader,
    ),
    responses((status = ACCEPTED, body = PullSecret)),
)]
#[post("/pull-secrets/{name}/sync")]
pub async fn sync_pull_secret(
    caller: Caller<WritePullSecrets, DryRunQuery>,
    pull_secrets: Data<PullSecrets>,
    path: Path<String>,
    prefer: PreferWait,
    idempotency: Idempotency,
) -> Result<HttpResponse, ApiError> {
    let name = path_name(KIND, &path)?;
    let sync = async |call: &Call| pull_secrets.sync(call, &name).await;
    let current = async |call: &Call| pull_secrets.find(call, &name).await;
    let shown = idempotency.once(&caller.identity, sync, current).await?;
    let mut response = HttpResponse::Accepted();
    let shown = prefer_settled(&prefer, &pull_secrets, &caller.identity, &name, shown).await?;
    prefer.confirm(&mut response);
    Ok(response.json(PullSecret::from(shown)))
}

/// Waits until the pull secret has settled, if the client prefers that. Returns its status.
async fn prefer_settled(
    prefer: &PreferWait,
    pull_secrets: &PullSecrets,
    caller: &Call,
    name: &Name,
    shown: ShownPullSecret,
) -> Result<ShownPullSecret, ApiError> {
    // A dry run changed nothing that could be waited for.
    Ok(match prefer.0.filter(|_| !caller.dry_run) {
        Some(time) => pull_secrets.wait(caller, name, time).await?,
        None => shown,
    })
}
