//! `/v1/registry-accounts:import`

use actix_web::{HttpResponse, post, web::Data};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::{
    domain::{
        account_name::NamePrefix,
        caller::Call,
        docker_config::{Warning, import::SkipReason},
    },
    http::{
        auth::{Caller, permission::WriteAccounts},
        body::Document,
        idempotency::{Idempotency, IdempotencyKeyHeader},
        problem::ApiError,
        query::{FromQuery, Query},
    },
    service::imports::{EntryOutcome, ImportReport, ImportedEntry, Imports},
};

/// Result of an import.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImportResult {
    /// Entries in the document's order, then its other fields.
    items: Vec<ImportResultItem>,
    /// Parts of the document that readers ignore or treat unexpectedly.
    warnings: Vec<Warning>,
}

/// Result for one entry or field of the document.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImportResultItem {
    /// Key of the entry, or name of the field.
    #[schema(example = "https://index.docker.io/v1/")]
    key: String,
    /// Registry, normalised; `null` if skipped.
    #[schema(example = "docker.io")]
    registry: Option<String>,
    /// Name of the account; `null` if skipped.
    name: Option<String>,
    /// Outcome.
    outcome: ImportOutcome,
    /// Reason why it was skipped.
    reason: Option<SkipReason>,
    /// Explanation of the reason, or of the parts that were left out.
    detail: Option<String>,
}

/// Outcome of importing an entry.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ImportOutcome {
    /// An account was created.
    Created,
    /// An existing account was updated.
    Updated,
    /// An existing account already had this login.
    Unchanged,
    /// The entry cannot become an account.
    Skipped,
}

impl From<ImportedEntry> for ImportResultItem {
    fn from(imported: ImportedEntry) -> Self {
        let (registry, name) = imported.account.map(|(registry, name)| (registry, name.to_string())).unzip();
        let left_out = (!imported.left_out.is_empty()).then(|| {
            let names: Vec<_> = imported.left_out.iter().map(|name| format!("`{name}`")).collect();
            format!("left out: {}; an account stores only user, password and a valid e-mail address", names.join(", "))
        });
        let (outcome, reason, detail) = match imported.outcome {
            EntryOutcome::Created => (ImportOutcome::Created, None, left_out),
            EntryOutcome::Updated => (ImportOutcome::Updated, None, left_out),
            EntryOutcome::Unchanged => (ImportOutcome::Unchanged, None, left_out),
            EntryOutcome::Skipped { reason, detail } => (ImportOutcome::Skipped, Some(reason), Some(detail)),
        };
        Self { key: imported.key, registry, name, outcome, reason, detail }
    }
}

impl From<ImportReport> for ImportResult {
    fn from(report: ImportReport) -> Self {
        Self { items: report.items.into_iter().map(Into::into).collect(), warnings: report.warnings }
    }
}

/// Options of an import.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query, rename_all = "camelCase")]
pub struct ImportQuery {
    /// Prefix of the accounts' names.
    #[param(value_type = Option<String>, max_length = 32)]
    name_prefix: NamePrefix,
    /// Checks everything and stores nothing.
    #[param(value_type = Option<bool>, default = false)]
    dry_run: bool,
}

impl FromQuery for ImportQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let name_prefix = query.one("namePrefix", NamePrefix::parse).unwrap_or_default();
        Self { name_prefix, dry_run: query.flag("dryRun") }
    }
}

/// Import the logins of a docker config as registry accounts, all or none.
///
/// Accepts a `config.json`, a legacy `.dockercfg`, the base64 value of a Secret that contains one,
/// or the manifest of such a Secret as JSON or YAML, with at most 1,000 entries. Accounts are named
/// after their registries, and their labels are not changed. The response lists every entry that
/// cannot become an account, with the reason. The response to a retry with the same
/// `Idempotency-Key` is that of a dry run.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "import_registry_accounts",
    params(ImportQuery, IdempotencyKeyHeader),
    request_body(content(
        (Object = "application/json"),
        (Object = "application/yaml"),
        (String = "text/plain"),
    )),
    responses((status = OK, body = ImportResult)),
)]
#[post("/registry-accounts:import")]
pub async fn import_accounts(
    caller: Caller<WriteAccounts, ImportQuery>,
    imports: Data<Imports>,
    idempotency: Idempotency,
    document: Document,
) -> Result<HttpResponse, ApiError> {
    let (document, ImportQuery { name_prefix, dry_run }) = (document.0, caller.query);
    let (again, prefix) = (document.clone(), name_prefix.clone());
    let import = async |call: &Call| imports.import(call, document, name_prefix, dry_run).await;
    let current = async |call: &Call| imports.import(call, again, prefix, true).await;
    let report = idempotency.once(&caller.identity, import, current).await?;
    Ok(HttpResponse::Ok().json(ImportResult::from(report)))
}
