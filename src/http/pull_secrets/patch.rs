//! `PATCH /v1/pull-secrets/{name}`

use actix_web::{
    HttpResponse, patch,
    web::{Data, Path},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    KIND, PutPullSecret, prefer_settled,
    preview::{ReplacedOrPreview, preview},
};
use crate::{
    domain::{
        caller::Call,
        invalid::FieldError,
        pull_secret::{Declaration, DeletionPolicy, Document, TargetDocument},
        selector::LabelSelectorDocument,
    },
    http::{
        auth::{Caller, permission::WritePullSecrets},
        body::{MergePatch, parse_merged},
        conditional::{IfMatch, etag},
        idempotency::{Idempotency, IdempotencyKeyHeader},
        merge_patch, path_name,
        prefer::PreferWait,
        problem::ApiError,
        query::DryRunQuery,
    },
    service::{pull_secrets::PullSecrets, reconcile::Reconciler},
};

/// Change of a declaration, as a JSON merge patch. Absent fields are unchanged, lists are replaced,
/// and members of objects are merged.
///
/// To select accounts by label instead of by name, set `accounts` to `null` as well.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdatePullSecret {
    /// Names of the accounts to include; `null` to select them by label.
    #[serde(default, deserialize_with = "merge_patch::present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>, min_items = 1, max_items = 1000)]
    accounts: Option<Option<Vec<String>>>,
    /// Selector of the accounts; `null` to name them.
    #[serde(default, deserialize_with = "merge_patch::present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<LabelSelectorDocument>)]
    account_selector: Option<Option<Value>>,
    /// Type of the Secret. Its name is immutable.
    #[serde(default, deserialize_with = "merge_patch::set", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>, nullable = false, example = json!({"type": "kubernetes.io/dockercfg"}))]
    secret: Option<Value>,
    /// Namespaces to place the Secret in, instead of all previous ones.
    #[serde(default, deserialize_with = "merge_patch::set", skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, min_items = 1, max_items = 100)]
    targets: Option<Vec<TargetDocument>>,
    /// Service accounts to which the Secret is added; `null` for none.
    #[serde(default, deserialize_with = "merge_patch::present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>, max_items = 20)]
    service_accounts: Option<Option<Vec<String>>>,
    /// Policy for Secrets that are no longer declared; `null` for the default.
    #[serde(default, deserialize_with = "merge_patch::present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<DeletionPolicy>)]
    deletion_policy: Option<Option<DeletionPolicy>>,
    /// Takes over an existing Secret of this name that regcred did not create.
    #[serde(default, deserialize_with = "merge_patch::set", skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    adopt: Option<bool>,
}

impl UpdatePullSecret {
    /// Merges the change into a stored declaration.
    fn merge_into(&self, stored: Document) -> Result<Declaration, Vec<FieldError>> {
        let not_json = |_| vec![FieldError::new("", "cannot be merged")];
        let mut document = serde_json::to_value(stored).map_err(not_json)?;
        let patch = serde_json::to_value(self).map_err(not_json)?;
        merge_patch::merge_into(&mut document, &patch);
        Declaration::parse(parse_merged::<PutPullSecret>(document)?.document())
    }
}

/// Change a part of a declaration.
///
/// The worker applies the changed declaration, which is validated as that of `PUT`. A request
/// without a difference changes nothing.
#[utoipa::path(
    tag = "pull-secrets",
    params(
        ("name" = String, Path, description = "Name of the pull secret"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to change"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: respond once every target has settled, after N seconds at most (up to 60)"),
        DryRunQuery,
        IdempotencyKeyHeader,
    ),
    request_body(content(
        (UpdatePullSecret = "application/merge-patch+json"),
        (UpdatePullSecret = "application/json"),
    )),
    responses(
        (status = OK, description = "Changed, or the planned changes of a dry run", content(
            (ReplacedOrPreview = "application/json"),
        )),
    ),
)]
#[patch("/pull-secrets/{name}")]
pub async fn update_pull_secret(
    caller: Caller<WritePullSecrets, DryRunQuery>,
    pull_secrets: Data<PullSecrets>,
    previews: Data<Reconciler>,
    path: Path<String>,
    (expected, prefer): (IfMatch, PreferWait),
    idempotency: Idempotency,
    body: MergePatch<UpdatePullSecret>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name(KIND, &path)?;
    let merge = |stored: Document| body.0.merge_into(stored);
    if caller.identity.dry_run {
        let (declaration, condition) = pull_secrets.merged(&caller.identity, &name, expected.0, merge).await?;
        return preview(&caller.identity, (&pull_secrets, &previews), &name, &declaration, &condition).await;
    }
    let change = async |call: &Call| pull_secrets.change(call, &name, expected.0, merge).await;
    let current = async |call: &Call| pull_secrets.find(call, &name).await;
    let shown = idempotency.once(&caller.identity, change, current).await?;
    let shown = prefer_settled(&prefer, &pull_secrets, &caller.identity, &name, shown).await?;
    let mut response = HttpResponse::Ok();
    prefer.confirm(&mut response);
    Ok(response.insert_header(etag(shown.stored.version)).json(ReplacedOrPreview::Replaced(Box::new(shown.into()))))
}
