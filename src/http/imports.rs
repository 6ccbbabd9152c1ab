//! `/v1/registry-accounts:import`

use actix_web::{HttpResponse, post, web::Data};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::{
    domain::{
        account_name::NamePrefix,
        caller::Call,
        docker_config::{Warning, import::SkipReason},
        names::Labels,
        registry::RegistryScope,
    },
    http::{
        accounts::parse_labels,
        auth::{Caller, permission::WriteAccounts},
        body::Document,
        conditional::MustBeNew,
        idempotency::{Idempotency, IdempotencyKeyHeader},
        problem::ApiError,
        query::{DryRunQuery, FromQuery, Query, text},
    },
    service::imports::{EntryOutcome, ImportOptions, ImportReport, ImportedEntry, Imports},
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
    /// `NAMESPACE/NAME` of the Secret that contains the entry; `null` if the document is no manifest.
    #[schema(example = "team-a/registrykey")]
    source: Option<String>,
    /// Key of the entry, name of the field, or name of an object without a docker config.
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
    /// In a dry run: an account would be created.
    WouldCreate,
    /// In a dry run: an existing account would be updated.
    WouldUpdate,
    /// An existing account already had this login.
    Unchanged,
    /// The entry cannot become an account.
    Skipped,
}

impl ImportResultItem {
    fn new(imported: ImportedEntry, dry_run: bool) -> Self {
        let (registry, name) = imported.account.map(|(registry, name)| (registry, name.to_string())).unzip();
        let left_out = (!imported.left_out.is_empty()).then(|| {
            let names: Vec<_> = imported.left_out.iter().map(|name| format!("`{name}`")).collect();
            format!("left out: {}; an account stores only user, password and a valid e-mail address", names.join(", "))
        });
        let (outcome, reason, detail) = match imported.outcome {
            EntryOutcome::Created if dry_run => (ImportOutcome::WouldCreate, None, left_out),
            EntryOutcome::Created => (ImportOutcome::Created, None, left_out),
            EntryOutcome::Updated if dry_run => (ImportOutcome::WouldUpdate, None, left_out),
            EntryOutcome::Updated => (ImportOutcome::Updated, None, left_out),
            EntryOutcome::Unchanged => (ImportOutcome::Unchanged, None, left_out),
            EntryOutcome::Skipped { reason, detail } => (ImportOutcome::Skipped, Some(reason), Some(detail)),
        };
        Self { source: imported.source, key: imported.key, registry, name, outcome, reason, detail }
    }
}

impl From<ImportReport> for ImportResult {
    fn from(report: ImportReport) -> Self {
        let items = report.items.into_iter().map(|entry| ImportResultItem::new(entry, report.dry_run));
        Self { items: items.collect(), warnings: report.warnings }
    }
}

/// Options of an import.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query, rename_all = "camelCase")]
pub struct ImportQuery {
    /// Prefix of the accounts' names.
    #[param(value_type = Option<String>, max_length = 32)]
    name_prefix: NamePrefix,
    /// Label that every account gets, `key=value`. May be repeated. Other labels of an existing
    /// account stay.
    #[param(value_type = Option<Vec<String>>, example = json!(["team=a"]))]
    labels: Labels,
    /// Connects to the registries without TLS, also to those without `http://` in the document.
    #[param(value_type = Option<bool>, default = false)]
    plain_http: bool,
    /// Registry scope to import, `host[:port][/path]`. May be repeated. Entries of other registries
    /// are skipped.
    #[param(value_type = Option<Vec<String>>, example = json!(["registry.example.com:5000"]))]
    only_registries: Vec<RegistryScope>,
    /// Verifies at most 100 logins first. Entries whose result is not `valid` are skipped.
    #[param(value_type = Option<bool>, default = false)]
    verify: bool,
}

impl FromQuery for ImportQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let labels = query.all("labels", text);
        Self {
            name_prefix: query.one("namePrefix", NamePrefix::parse).unwrap_or_default(),
            labels: query.errors().take("labels", parse_labels(&labels)).unwrap_or_default(),
            plain_http: query.flag("plainHttp"),
            only_registries: query.all("onlyRegistries", RegistryScope::parse),
            verify: query.flag("verify"),
        }
    }
}

impl From<ImportQuery> for ImportOptions {
    fn from(query: ImportQuery) -> Self {
        let ImportQuery { name_prefix, labels, plain_http, only_registries, verify } = query;
        Self { prefix: name_prefix, labels, plain_http, only_registries, verify, must_be_new: false }
    }
}

/// Import the logins of a docker config as registry accounts, all or none.
///
/// Accepts a `config.json`, a legacy `.dockercfg`, the base64 value of a Secret that contains one,
/// or the manifest of such a Secret or of a list of objects (`kind: List`) as JSON or YAML, with at
/// most 1,000 entries. Accounts are named after their registries. A caller without grants of all
/// accounts can only set labels of its own label grants. The response lists every entry that cannot
/// become an account, with the reason. The response to a retry with the same
/// `Idempotency-Key` is that of a dry run.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "import_registry_accounts",
    params(
        DryRunQuery,
        ImportQuery,
        ("If-None-Match" = Option<String>, Header, description = "`*`: import nothing if an account of one of the names exists"),
        IdempotencyKeyHeader,
    ),
    request_body(content(
        (Object = "application/json"),
        (Object = "application/yaml"),
        (String = "text/plain"),
    )),
    responses((status = OK, body = ImportResult)),
)]
#[post("/registry-accounts:import")]
pub async fn import_accounts(
    caller: Caller<WriteAccounts, (DryRunQuery, ImportQuery)>,
    imports: Data<Imports>,
    must_be_new: MustBeNew,
    idempotency: Idempotency,
    document: Document,
) -> Result<HttpResponse, ApiError> {
    let (document, mut options) = (document.0, ImportOptions::from(caller.query.1));
    // A retry finds the accounts of the first request.
    let (again, same) = (document.clone(), options.clone());
    options.must_be_new = must_be_new.0;
    let import = async |call: &Call| imports.import(call, document, options).await;
    let current = async |call: &Call| imports.import(&Call { dry_run: true, ..call.clone() }, again, same).await;
    let report = idempotency.once(&caller.identity, import, current).await?;
    Ok(HttpResponse::Ok().json(ImportResult::from(report)))
}
