//! `/v1/registry-accounts`

use std::collections::BTreeMap;

use actix_web::{
    HttpResponse, delete, get, patch, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{
        account::{
            Account, AccountChange, Email, LabelChange, NewAccount, Password, Registration, SourceChange,
            UnmintedAccount, Username,
        },
        caller::Call,
        cluster::CaCertificate,
        docker_config::{Profile, ScopedAccount, Warning, WarningCode, key_for},
        invalid::{FieldError, FieldErrors},
        listing::RegistryAccountSort,
        matching::lint::lint_account,
        mint::{NewSource, Source, SourceDocument, SourceInAnswers},
        names::{Labels, Name},
        registry::RegistryScope,
        unique::UniqueMap,
        verification::{VerificationResult, VerifyInterval},
    },
    http::{
        auth::{
            Caller,
            permission::{ReadAccounts, WriteAccounts},
        },
        body::{Json, MergePatch},
        conditional::{self, IfMatch},
        idempotency::{Idempotency, IdempotencyKeyHeader},
        merge_patch,
        mints::AccountMint,
        paging::{ListQuery, Page},
        path_name,
        problem::ApiError,
        query::DryRunQuery,
        verification::VerifyQuery,
    },
    service::{
        CursorKey,
        accounts::{Accounts, ShownAccount},
    },
    storage::direct_secrets::OutdatedCopy,
};

mod query;

use query::{AccountFilterQuery, AccountUsersQuery};
pub(super) use query::{parse_labels, seconds};

/// Registry account to create.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateRegistryAccount {
    /// Unique name, a DNS-1123 label.
    #[schema(example = "team-a")]
    name: String,
    /// Registry scope of the credential: `host[:port][/path]`. Every spelling of Docker Hub becomes
    /// `docker.io`.
    #[schema(example = "registry.example.com:5000")]
    registry: String,
    /// User name. It must not contain `:`, which separates user name and password in `auth`.
    /// Required unless `source` is given.
    #[schema(example = "dev")]
    username: Option<String>,
    /// Password or access token. It is sealed before it is stored, and no response returns it.
    /// Required unless `source` is given.
    #[schema(value_type = Option<String>, format = Password, example = "correct-horse")]
    password: Option<SecretString>,
    /// Source of the login, in place of `username`, `password` and `expiresAt`. The login is minted
    /// in the request, and replaced before it expires.
    source: Option<SourceDocument>,
    /// E-mail address for docker configs, as written by `kubectl`. No reader requires it.
    email: Option<String>,
    /// Labels, by the rules of Kubernetes.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    labels: UniqueMap<String>,
    /// Connects to the registry without TLS.
    #[serde(default)]
    plain_http: bool,
    /// Time at which the password expires, if known.
    expires_at: Option<DateTime<Utc>>,
    /// CA certificates (PEM) to trust for this registry, in addition to those of regcred's host.
    ca_certificate: Option<String>,
    /// Interval of background verification, in seconds. Without it the login is not verified.
    #[schema(minimum = 300, maximum = 2_592_000)]
    verify_interval_seconds: Option<i64>,
}

/// Login of an account to create.
enum LoginInput {
    Given(Username, Password),
    Minted(Box<NewSource>),
}

impl LoginInput {
    /// Accepts a login, or a source and nothing that comes from it.
    fn parse(
        errors: &mut FieldErrors,
        username: Option<&str>,
        password: Option<SecretString>,
        expires_at: Option<DateTime<Utc>>,
        source: Option<SourceDocument>,
    ) -> Option<Self> {
        let given =
            [("username", username.is_some()), ("password", password.is_some()), ("expiresAt", expires_at.is_some())];
        if let Some(source) = source {
            for (field, _) in given.into_iter().filter(|(_, is_given)| *is_given) {
                errors.refuse(field, "is not allowed beside `source`, from which it comes");
            }
            return Some(Self::Minted(Box::new(errors.take_all(Source::parse(source))?)));
        }
        for (field, _) in given.into_iter().take(2).filter(|(_, is_given)| !is_given) {
            errors.refuse(field, "is required unless `source` is given");
        }
        let username = errors.take("username", username.map(Username::parse).transpose());
        let password = errors.take("password", password.map(Password::parse).transpose());
        Some(Self::Given(username??, password??))
    }
}

impl TryFrom<CreateRegistryAccount> for Registration {
    type Error = Vec<FieldError>;

    fn try_from(body: CreateRegistryAccount) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let name = errors.take("name", Name::parse(&body.name));
        let registry = errors.take("registry", RegistryScope::parse(&body.registry));
        let login =
            LoginInput::parse(&mut errors, body.username.as_deref(), body.password, body.expires_at, body.source);
        let email = errors.take("email", body.email.as_deref().map(Email::parse).transpose());
        let labels = errors.take("labels", Labels::parse(body.labels.0));
        let ca_certificate = body.ca_certificate.as_deref().map(CaCertificate::parse).transpose();
        let ca_certificate = errors.take("caCertificate", ca_certificate);
        let verify_interval = body.verify_interval_seconds.map(VerifyInterval::from_seconds).transpose();
        let verify_interval = errors.take("verifyIntervalSeconds", verify_interval);
        errors.finish(|| {
            let account = UnmintedAccount {
                name: name?,
                registry: registry?,
                email: email?,
                labels: labels?,
                plain_http: body.plain_http,
                ca_certificate: ca_certificate?,
                verify_interval: verify_interval?,
            };
            Some(match login? {
                LoginInput::Given(username, password) => {
                    let new = account.with_login(username, password);
                    Self::Given(Box::new(NewAccount { expires_at: body.expires_at, ..new }))
                }
                LoginInput::Minted(source) => Self::Minted(Box::new(account), source),
            })
        })
    }
}

/// Change of a registry account, as a JSON merge patch. Absent fields are unchanged, and `null`
/// removes a field.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdateRegistryAccount {
    /// New registry scope.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    registry: Option<String>,
    /// New user name.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    username: Option<String>,
    /// New password (a rotation).
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(value_type = Option<String>, nullable = false, format = Password)]
    password: Option<SecretString>,
    /// New e-mail address; `null` removes it.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    email: Option<Option<String>>,
    /// Labels to set, or to remove with `null`. `null` for the field removes all labels.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>)]
    labels: Option<Option<UniqueMap<Option<String>>>>,
    /// Connects to the registry without TLS.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    plain_http: Option<bool>,
    /// Time at which the password expires; `null` if unknown.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<DateTime<Utc>>)]
    expires_at: Option<Option<DateTime<Utc>>>,
    /// New CA certificates (PEM); `null` to trust only those of regcred's host.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    ca_certificate: Option<Option<String>>,
    /// Interval of background verification, in seconds; `null` disables it.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<i64>, minimum = 300, maximum = 2_592_000)]
    verify_interval_seconds: Option<Option<i64>>,
    /// New source of the login, which replaces the present one completely. `null` removes it and
    /// requires `username` and `password`.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<SourceDocument>)]
    source: Option<Option<SourceDocument>>,
}

impl TryFrom<UpdateRegistryAccount> for AccountChange {
    type Error = Vec<FieldError>;

    fn try_from(body: UpdateRegistryAccount) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let registry = errors.take("registry", body.registry.as_deref().map(RegistryScope::parse).transpose());
        let username = errors.take("username", body.username.as_deref().map(Username::parse).transpose());
        let password = errors.take("password", body.password.map(Password::parse).transpose());
        let email = body.email.map(|email| email.as_deref().map(Email::parse).transpose());
        let email = errors.take("email", email.transpose());
        let ca_certificate = body.ca_certificate.map(|pem| pem.as_deref().map(CaCertificate::parse).transpose());
        let ca_certificate = errors.take("caCertificate", ca_certificate.transpose());
        let verify_interval =
            body.verify_interval_seconds.map(|seconds| seconds.map(VerifyInterval::from_seconds).transpose());
        let verify_interval = errors.take("verifyIntervalSeconds", verify_interval.transpose());
        let source = match body.source {
            None => Some(None),
            Some(None) => Some(Some(SourceChange::Remove)),
            Some(Some(source)) => {
                errors.take_all(Source::parse(source)).map(|source| Some(SourceChange::Set(Box::new(source))))
            }
        };
        errors.finish(|| {
            Some(AccountChange {
                source: source?,
                registry: registry?,
                username: username?,
                password: password?,
                email: email?,
                labels: body
                    .labels
                    .map(|labels| labels.map_or(LabelChange::Clear, |labels| LabelChange::Merge(labels.0))),
                plain_http: body.plain_http,
                expires_at: body.expires_at,
                ca_certificate: ca_certificate?,
                verify_interval: verify_interval?,
            })
        })
    }
}

/// Registry account, without its password.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegistryAccount {
    /// Immutable identifier.
    id: Uuid,
    /// Unique name.
    name: String,
    /// Registry scope `host[:port][/path]`, normalised.
    registry: String,
    /// User name.
    username: String,
    /// E-mail address.
    email: Option<String>,
    /// Labels.
    labels: BTreeMap<String, String>,
    /// Connects to the registry without TLS.
    plain_http: bool,
    /// Time at which the password expires, if known.
    expires_at: Option<DateTime<Utc>>,
    /// CA certificates (PEM) to trust for this registry.
    ca_certificate: Option<String>,
    /// Interval of background verification, in seconds; `null` if disabled.
    verify_interval_seconds: Option<i32>,
    /// Time of the last verification; `null` if there is none since the login changed.
    last_verified_at: Option<DateTime<Utc>>,
    /// Result of the last verification.
    last_verification_result: Option<VerificationResult>,
    /// Explanation of the last result.
    last_verification_detail: Option<String>,
    /// Source of the login, without its secret; `null` for a login that a caller set.
    #[schema(value_type = Option<SourceInAnswers>)]
    source: Option<Box<RawValue>>,
    /// State of the mints; `null` without a source, and in a dry run that sets one.
    mint: Option<AccountMint>,
    /// Version, incremented by every change. A mint changes none.
    version: i64,
    /// Time of creation.
    created_at: DateTime<Utc>,
    /// Time of the last change.
    updated_at: DateTime<Utc>,
    /// What uses the account. Only in lists with `usedBy=true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    used_by: Option<AccountUsers>,
    /// Differences between the account and the behaviour of docker config readers.
    warnings: Vec<Warning>,
}

/// What uses a registry account.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = RegistryAccountUsers)]
pub struct AccountUsers {
    /// Number of pull secrets that name or select the account, also of those that the caller may
    /// not read.
    pull_secrets: u64,
}

impl From<Account> for RegistryAccount {
    fn from(account: Account) -> Self {
        let warnings = warnings(&account);
        let verification = account.verification;
        let source = account.mint.as_ref().map(|mint| mint.source.as_json().to_owned());
        let mint = account.mint.filter(|mint| mint.serial > 0);
        Self {
            last_verified_at: verification.as_ref().map(|found| found.checked_at),
            last_verification_result: verification.as_ref().map(|found| found.result),
            last_verification_detail: verification.map(|found| found.detail),
            ca_certificate: account.ca_certificate.map(|ca| ca.as_pem().to_owned()),
            verify_interval_seconds: account.verify_interval.map(VerifyInterval::seconds),
            used_by: None,
            warnings,
            id: account.id,
            name: account.name.to_string(),
            registry: account.registry.to_string(),
            username: account.username.as_str().to_owned(),
            email: account.email.map(|email| email.as_str().to_owned()),
            labels: account.labels.into_map(),
            plain_http: account.plain_http,
            expires_at: mint.as_ref().map(|mint| mint.valid_until).or(account.expires_at),
            source,
            mint: mint.map(AccountMint::from),
            version: account.version,
            created_at: account.created_at,
            updated_at: account.updated_at,
        }
    }
}

/// Maximum number of Secrets that a warning names.
const COPIES_SHOWN: usize = 20;

impl From<ShownAccount> for RegistryAccount {
    fn from(shown: ShownAccount) -> Self {
        let ShownAccount { account, outdated_copies, hidden_copies } = shown;
        let mut account = Self::from(account);
        if !outdated_copies.is_empty() || hidden_copies > 0 {
            let detail = outdated_copies_detail(&outdated_copies, hidden_copies);
            let (code, name) = (WarningCode::DirectCopies, account.name.clone());
            account.warnings.push(Warning { code, account: Some(name), key: None, detail });
        }
        account
    }
}

/// Names the Secrets of direct delivery that have an earlier login.
fn outdated_copies_detail(copies: &[OutdatedCopy], hidden: usize) -> String {
    let shown = copies.iter().take(COPIES_SHOWN);
    let mut named: Vec<String> =
        shown.map(|copy| format!("{}/{}/{}", copy.cluster, copy.namespace, copy.name)).collect();
    let more = copies.len().saturating_sub(COPIES_SHOWN);
    if more > 0 {
        named.push(format!("{more} more"));
    }
    if hidden > 0 {
        named.push(format!("{hidden} that you may not see"));
    }
    format!(
        "Secrets of direct delivery do not follow and have the earlier login: {}. Deliver them again with `ifExists`, or \
         declare a pull secret",
        named.join(", ")
    )
}

fn warnings(account: &Account) -> Vec<Warning> {
    let name = account.name.as_str();
    let mut warnings = lint_account(ScopedAccount { name, scope: &account.registry });
    if account.password_ends_with_whitespace {
        warnings.push(Warning::of_whitespace(Some(name), key_for(Profile::Kubernetes, &account.registry)));
    }
    if account.expires_at.is_some_and(|at| at <= crate::clock::now()) {
        warnings.push(Warning::expired(name));
    }
    if account.mint.as_ref().is_some_and(|mint| mint.is_expired) {
        warnings.push(Warning::of_expired_login(name));
    }
    warnings
}

/// Create a registry account.
///
/// The password is sealed before it is stored, and no response returns it. A caller without grants
/// of all accounts can only set labels of its own label grants.
///
/// With a `source`, the login is minted in the request, within 20 seconds; if that fails, nothing is
/// stored. A dry run checks the source and mints nothing: `mint` is `null`, and no login is verified.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "create_registry_account",
    params(DryRunQuery, VerifyQuery, IdempotencyKeyHeader),
    request_body = CreateRegistryAccount,
    responses((status = CREATED, body = RegistryAccount, headers(
        ("Location" = String, description = "Path of the account"),
        ("ETag" = String, description = "Version of the account"),
    ))),
)]
#[post("/registry-accounts")]
pub async fn create_account(
    caller: Caller<WriteAccounts, (DryRunQuery, VerifyQuery)>,
    accounts: Data<Accounts>,
    idempotency: Idempotency,
    body: Json<CreateRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let new = Registration::try_from(body.0)?;
    let (name, verification) = (new.name_and_labels().0.clone(), caller.query.1.verification());
    let register = async |call: &Call| accounts.register(call, new, verification).await;
    let current = async |call: &Call| accounts.find(call, &name).await;
    let account = idempotency.once(&caller.identity, register, current).await?;
    let path = format!("/v1/registry-accounts/{}", account.account.name);
    Ok(conditional::created(&caller.identity, path, account.account.version, RegistryAccount::from(account)))
}

/// List registry accounts, by default ordered by name.
///
/// A page may have fewer items than `limit`, or none, although `next` is set: with `q`, and
/// with `result` in another order than by name, it searches at most 20,000 accounts. With `q`,
/// `result` or another order it reads at most 1,000 accounts that are hidden from the caller.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "list_registry_accounts",
    params(ListQuery<RegistryAccountSort>, AccountFilterQuery, AccountUsersQuery),
    responses((status = OK, body = Page<RegistryAccount>)),
)]
#[get("/registry-accounts")]
pub async fn list_accounts(
    caller: Caller<ReadAccounts, (ListQuery<RegistryAccountSort>, (AccountFilterQuery, AccountUsersQuery))>,
    accounts: Data<Accounts>,
    cursor_key: Data<CursorKey>,
) -> Result<HttpResponse, ApiError> {
    let (list_query, (filter, parts)) = caller.query;
    let request = list_query.request(&cursor_key)?;
    let found = accounts.list(&caller.identity, &request, &filter.into()).await?;
    let users = if parts.used_by { Some(accounts.count_users(&found.items).await?) } else { None };
    let mut page: Page<RegistryAccount> = Page::listed(found, &list_query, &cursor_key)?;
    for (account, pull_secrets) in page.items.iter_mut().zip(users.unwrap_or_default()) {
        account.used_by = Some(AccountUsers { pull_secrets });
    }
    Ok(HttpResponse::Ok().json(page))
}

/// Get a registry account.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "get_registry_account",
    params(("name" = String, Path, description = "Name of the account")),
    responses((status = OK, body = RegistryAccount, headers(("ETag" = String, description = "Version of the account")))),
)]
#[get("/registry-accounts/{name}")]
pub async fn get_account(
    caller: Caller<ReadAccounts>,
    accounts: Data<Accounts>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let account = accounts.find(&caller.identity, &path_name("registry account", &path)?).await?;
    Ok(conditional::ok(account.account.version, RegistryAccount::from(account)))
}

/// Change a registry account.
///
/// A new `password` is a rotation. Every change increments the version; a request without a
/// difference, also with the stored password, changes nothing. The warning `directCopies` names
/// Secrets of direct delivery, which do not follow. A change of the registry's
/// host or port, a change to `plainHttp`, and another `caCertificate` require the `password`: a
/// stored password is only sent to the registry that it was given for; a minted account requires its
/// `source`, with the secret. Every label that is added or
/// changed must belong to a label grant of the caller that the account then satisfies.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "update_registry_account",
    params(
        ("name" = String, Path, description = "Name of the account"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to change"),
        DryRunQuery,
        VerifyQuery,
        IdempotencyKeyHeader,
    ),
    request_body(content(
        (UpdateRegistryAccount = "application/merge-patch+json"),
        (UpdateRegistryAccount = "application/json"),
    )),
    responses((status = OK, body = RegistryAccount, headers(("ETag" = String, description = "Version of the account")))),
)]
#[patch("/registry-accounts/{name}")]
pub async fn update_account(
    caller: Caller<WriteAccounts, (DryRunQuery, VerifyQuery)>,
    accounts: Data<Accounts>,
    path: Path<String>,
    expected: IfMatch,
    idempotency: Idempotency,
    body: MergePatch<UpdateRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("registry account", &path)?;
    let (update, verification) = (AccountChange::try_from(body.0)?, caller.query.1.verification());
    let change = async |call: &Call| accounts.change(call, &name, update, expected.0, verification).await;
    let current = async |call: &Call| accounts.find(call, &name).await;
    let account = idempotency.once(&caller.identity, change, current).await?;
    Ok(conditional::changed(&caller.identity, account.account.version, RegistryAccount::from(account)))
}

/// Delete a registry account.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "delete_registry_account",
    params(
        ("name" = String, Path, description = "Name of the account"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to delete"),
        DryRunQuery,
    ),
    responses((status = NO_CONTENT)),
)]
#[delete("/registry-accounts/{name}")]
pub async fn delete_account(
    caller: Caller<WriteAccounts, DryRunQuery>,
    accounts: Data<Accounts>,
    path: Path<String>,
    expected: IfMatch,
) -> Result<HttpResponse, ApiError> {
    accounts.remove(&caller.identity, &path_name("registry account", &path)?, expected.0).await?;
    Ok(HttpResponse::NoContent().finish())
}
