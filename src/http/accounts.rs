//! `/v1/registry-accounts`

use std::collections::BTreeMap;

use actix_web::{
    HttpResponse, delete, get, patch, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::{
        account::{Account, AccountChange, Email, LabelChange, NewAccount, Password, Username},
        caller::Call,
        cluster::CaCertificate,
        docker_config::{ScopedAccount, Warning},
        invalid::{FieldError, FieldErrors, Invalid},
        matching::lint::lint_account,
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
        paging::{Page, PageQuery},
        path_name,
        problem::ApiError,
        query::{FromQuery, Query, text},
        verification::VerifyQuery,
    },
    service::accounts::Accounts,
    storage::accounts::AccountFilter,
};

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
    #[schema(example = "dev")]
    username: String,
    /// Password or access token. It is sealed before it is stored, and no response returns it.
    #[schema(value_type = String, format = Password, example = "correct-horse")]
    password: SecretString,
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

impl TryFrom<CreateRegistryAccount> for NewAccount {
    type Error = Vec<FieldError>;

    fn try_from(body: CreateRegistryAccount) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let name = errors.take("name", Name::parse(&body.name));
        let registry = errors.take("registry", RegistryScope::parse(&body.registry));
        let username = errors.take("username", Username::parse(&body.username));
        let password = errors.take("password", Password::parse(body.password));
        let email = errors.take("email", body.email.as_deref().map(Email::parse).transpose());
        let labels = errors.take("labels", Labels::parse(body.labels.0));
        let ca_certificate = body.ca_certificate.as_deref().map(CaCertificate::parse).transpose();
        let ca_certificate = errors.take("caCertificate", ca_certificate);
        let verify_interval = body.verify_interval_seconds.map(VerifyInterval::from_seconds).transpose();
        let verify_interval = errors.take("verifyIntervalSeconds", verify_interval);
        errors.finish(|| {
            Some(NewAccount {
                name: name?,
                registry: registry?,
                username: username?,
                password: password?,
                email: email?,
                labels: labels?,
                plain_http: body.plain_http,
                expires_at: body.expires_at,
                ca_certificate: ca_certificate?,
                verify_interval: verify_interval?,
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
        errors.finish(|| {
            Some(AccountChange {
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
    /// Version, incremented by every change.
    version: i64,
    /// Time of creation.
    created_at: DateTime<Utc>,
    /// Time of the last change.
    updated_at: DateTime<Utc>,
    /// Differences between the account and the behaviour of docker config readers.
    warnings: Vec<Warning>,
}

impl From<Account> for RegistryAccount {
    fn from(account: Account) -> Self {
        let verification = account.verification;
        Self {
            last_verified_at: verification.as_ref().map(|found| found.checked_at),
            last_verification_result: verification.as_ref().map(|found| found.result),
            last_verification_detail: verification.map(|found| found.detail),
            ca_certificate: account.ca_certificate.map(|ca| ca.as_pem().to_owned()),
            verify_interval_seconds: account.verify_interval.map(VerifyInterval::seconds),
            warnings: lint_account(ScopedAccount { name: account.name.as_str(), scope: &account.registry }),
            id: account.id,
            name: account.name.to_string(),
            registry: account.registry.to_string(),
            username: account.username.as_str().to_owned(),
            email: account.email.map(|email| email.as_str().to_owned()),
            labels: account.labels.into_map(),
            plain_http: account.plain_http,
            expires_at: account.expires_at,
            version: account.version,
            created_at: account.created_at,
            updated_at: account.updated_at,
        }
    }
}

/// Create a registry account.
///
/// The password is sealed before it is stored, and no response returns it. A caller without grants
/// of all accounts can only set labels of its own label grants.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "create_registry_account",
    params(VerifyQuery, IdempotencyKeyHeader),
    request_body = CreateRegistryAccount,
    responses((status = CREATED, body = RegistryAccount, headers(
        ("Location" = String, description = "Path of the account"),
        ("ETag" = String, description = "Version of the account"),
    ))),
)]
#[post("/registry-accounts")]
pub async fn create_account(
    caller: Caller<WriteAccounts, VerifyQuery>,
    accounts: Data<Accounts>,
    idempotency: Idempotency,
    body: Json<CreateRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let new = NewAccount::try_from(body.0)?;
    let (name, verification) = (new.name.clone(), caller.query.verification());
    let register = async |call: &Call| accounts.register(call, new, verification).await;
    let current = async |call: &Call| accounts.find(call, &name).await;
    let account = idempotency.once(&caller.identity, register, current).await?;
    let path = format!("/v1/registry-accounts/{}", account.name);
    Ok(conditional::created(path, account.version, RegistryAccount::from(account)))
}

/// Filter of a list of registry accounts.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AccountFilterQuery {
    /// Lists only accounts with this label, `key=value`. May be repeated; all labels must match.
    #[param(value_type = Option<Vec<String>>, example = json!(["team=a"]))]
    label: Labels,
    /// Lists only accounts that expire within this time or have expired: days (`30d`) or hours
    /// (`12h`).
    #[param(value_type = Option<String>, rename = "expiresWithin", example = "30d")]
    expires_within_seconds: Option<i64>,
}

impl FromQuery for AccountFilterQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let labels = query.all("label", text);
        let labels = query.errors().take("label", parse_labels(&labels)).unwrap_or_default();
        Self { label: labels, expires_within_seconds: query.one("expiresWithin", seconds) }
    }
}

impl From<AccountFilterQuery> for AccountFilter {
    fn from(filter: AccountFilterQuery) -> Self {
        Self { labels: filter.label, expires_within_seconds: filter.expires_within_seconds }
    }
}

fn parse_labels(labels: &[String]) -> Result<Labels, Invalid> {
    let mut parsed = BTreeMap::new();
    for label in labels {
        let (key, value) = label.split_once('=').ok_or_else(|| Invalid::new("must be key=value"))?;
        parsed.insert(key.to_owned(), value.to_owned());
    }
    Labels::parse(parsed)
}

fn seconds(duration: &str) -> Result<i64, Invalid> {
    const MAX: i64 = 100_000;
    let invalid = || Invalid::new("must be a number of days or hours, such as 30d or 12h");
    let (number, unit) = match (duration.strip_suffix('d'), duration.strip_suffix('h')) {
        (Some(days), _) => (days, 86_400),
        (_, Some(hours)) => (hours, 3_600),
        _ => return Err(invalid()),
    };
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse::<i64>().ok().filter(|number| is_number && *number <= MAX);
    number.map(|number| number * unit).ok_or_else(invalid)
}

/// List registry accounts, ordered by name.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "list_registry_accounts",
    params(PageQuery<Name>, AccountFilterQuery),
    responses((status = OK, body = Page<RegistryAccount>)),
)]
#[get("/registry-accounts")]
pub async fn list_accounts(
    caller: Caller<ReadAccounts, (PageQuery<Name>, AccountFilterQuery)>,
    accounts: Data<Accounts>,
) -> Result<HttpResponse, ApiError> {
    let (page_query, filter) = caller.query;
    let found = accounts.list(&caller.identity, &page_query.request(), &filter.into()).await?;
    let page: Page<RegistryAccount> = Page::of(found, &page_query, |account| account.name.to_string());
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
    Ok(conditional::ok(account.version, RegistryAccount::from(account)))
}

/// Change a registry account.
///
/// A new `password` is a rotation. Every change increments the version. A change of the registry's
/// host or port, a change to `plainHttp`, and another `caCertificate` require the `password`: a
/// stored password is only sent to the registry that it was given for. Every label that is added or
/// changed must belong to a label grant of the caller that the account then satisfies.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "update_registry_account",
    params(
        ("name" = String, Path, description = "Name of the account"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to change"),
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
    caller: Caller<WriteAccounts, VerifyQuery>,
    accounts: Data<Accounts>,
    path: Path<String>,
    expected: IfMatch,
    idempotency: Idempotency,
    body: MergePatch<UpdateRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("registry account", &path)?;
    let (update, verification) = (AccountChange::try_from(body.0)?, caller.query.verification());
    let change = async |call: &Call| accounts.change(call, &name, update, expected.0, verification).await;
    let current = async |call: &Call| accounts.find(call, &name).await;
    let account = idempotency.once(&caller.identity, change, current).await?;
    Ok(conditional::ok(account.version, RegistryAccount::from(account)))
}

/// Delete a registry account.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "delete_registry_account",
    params(
        ("name" = String, Path, description = "Name of the account"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to delete"),
    ),
    responses((status = NO_CONTENT)),
)]
#[delete("/registry-accounts/{name}")]
pub async fn delete_account(
    caller: Caller<WriteAccounts>,
    accounts: Data<Accounts>,
    path: Path<String>,
    expected: IfMatch,
) -> Result<HttpResponse, ApiError> {
    accounts.remove(&caller.identity, &path_name("registry account", &path)?, expected.0).await?;
    Ok(HttpResponse::NoContent().finish())
}
