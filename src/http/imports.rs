//! `/v1/registry-accounts:import`

use actix_web::{HttpRequest, HttpResponse, post, web::Data};
use serde::Serialize;
use url::form_urlencoded;
use utoipa::ToSchema;

use crate::{
    domain::{
        docker_config::{Warning, import::SkipReason},
        invalid::FieldErrors,
    },
    http::{
        auth::{Caller, permission::WriteAccounts},
        body::Document,
        problem::ApiError,
    },
    service::imports::{EntryOutcome, ImportReport, ImportedEntry, Imports},
};

/// What became of a docker config.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImportResult {
    /// The entries in the document's order, then the fields beside them.
    items: Vec<ImportResultItem>,
    /// What in the document does not do what it looks like.
    warnings: Vec<Warning>,
}

/// What became of one entry or field of the document.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImportResultItem {
    /// The entry's key, or the name of the field.
    #[schema(example = "https://index.docker.io/v1/")]
    key: String,
    /// The registry, normalised; `null` for what was skipped.
    #[schema(example = "docker.io")]
    registry: Option<String>,
    /// Name of the account; `null` for what was skipped.
    name: Option<String>,
    /// What became of it.
    outcome: ImportOutcome,
    /// Why it was skipped, for programs.
    reason: Option<SkipReason>,
    /// Why it was skipped or what of it was left out, for people.
    detail: Option<String>,
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ImportOutcome {
    /// A new account.
    Created,
    /// An account that was there has this login now.
    Updated,
    /// An account that was there had this login already.
    Unchanged,
    /// Nothing that can become an account.
    Skipped,
}

impl From<ImportedEntry> for ImportResultItem {
    fn from(imported: ImportedEntry) -> Self {
        let (registry, name) = imported.account.map(|(registry, name)| (registry, name.to_string())).unzip();
        let left_out = (!imported.left_out.is_empty()).then(|| {
            let names: Vec<_> = imported.left_out.iter().map(|name| format!("`{name}`")).collect();
            format!("left out: {}; an account holds a user, a password and a valid address", names.join(", "))
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

/// Import the logins of a docker config as registry accounts, all of them or none.
///
/// Takes a `config.json` or a legacy `.dockercfg` as it is, the base64 value of a Secret that holds one, or the
/// manifest of such a Secret as JSON or YAML. Accounts are named after their registries. Whatever cannot become an
/// account is named in the answer with its reason.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "import_registry_accounts",
    params(
        ("namePrefix" = Option<String>, Query, description = "What the names of the accounts begin with", max_length = 32),
        ("dryRun" = Option<bool>, Query, description = "Look at everything and store nothing"),
    ),
    request_body(content(
        (Object = "application/json"),
        (String = "application/yaml"),
        (String = "text/plain"),
    )),
    responses((status = OK, body = ImportResult)),
)]
#[post("/registry-accounts:import")]
pub async fn import_accounts(
    caller: Caller<WriteAccounts>,
    imports: Data<Imports>,
    request: HttpRequest,
    document: Document,
) -> Result<HttpResponse, ApiError> {
    let (prefix, dry_run) = query(request.query_string())?;
    let report = imports.import(&caller.identity, document.0, prefix, dry_run).await?;
    Ok(HttpResponse::Ok().json(ImportResult::from(report)))
}

fn query(query: &str) -> Result<(String, bool), ApiError> {
    let mut errors = FieldErrors::default();
    let (mut prefix, mut dry_run) = (String::new(), false);
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match (&*key, &*value) {
            ("namePrefix", value) => value.clone_into(&mut prefix),
            ("dryRun", "true") => dry_run = true,
            ("dryRun", "false") => dry_run = false,
            ("dryRun", _) => errors.refuse("dryRun", "must be true or false"),
            (other, _) => errors.refuse(&other.chars().take(50).collect::<String>(), "is not a known query parameter"),
        }
    }
    Ok(errors.finish(|| Some((prefix, dry_run)))?)
}
