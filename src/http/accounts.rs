//! `/v1/registry-accounts`

use std::collections::BTreeMap;

use actix_web::{
    HttpResponse, delete, get,
    http::header::LOCATION,
    patch, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{
        account::{Account, AccountChange, Email, LabelChange, NewAccount, Password, Username},
        cluster::CaCertificate,
        docker_config::{ScopedAccount, Warning},
        invalid::{FieldError, FieldErrors},
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
        conditional::{IfMatch, etag},
        merge_patch,
        paging::{ExpiryParams, LabelParams, LabelledPageQuery, Page, PageParams, page},
        path_name,
        problem::ApiError,
        verification::{VerifyParams, VerifyQuery},
    },
    service::accounts::Accounts,
    storage::accounts::AccountFilter,
};

/// A registry account to be registered.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateRegistryAccount {
    /// Unique name, a DNS-1123 label.
    #[schema(example = "martin-5000")]
    name: String,
    /// What the credential is for: `host[:port][/path]`. Every spelling of Docker Hub becomes `docker.io`.
    #[schema(example = "registry.martin.com:5000")]
    registry: String,
    /// Who logs in. A `:` is refused: it would end the name in `auth`.
    #[schema(example = "martin")]
    username: String,
    /// Sealed before it is stored; no later call returns it.
    #[schema(value_type = String, format = Password, write_only, example = "xxx1")]
    password: SecretString,
    /// Written into docker configs as `kubectl` does; no reader needs it.
    email: Option<String>,
    /// Labels by Kubernetes' rules.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    labels: UniqueMap<String>,
    /// The registry is spoken to without TLS.
    #[serde(default)]
    plain_http: bool,
    /// When the password stops working, if known.
    expires_at: Option<DateTime<Utc>>,
    /// PEM of the CA that signed the registry's certificate, beside the authorities that regcred's host trusts.
    ca_certificate: Option<String>,
    /// How often the login is verified in the background, 300 to 2592000 seconds; never if not said.
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

/// A change of a registry account, as a JSON merge patch: what is absent stays, `null` removes.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdateRegistryAccount {
    /// Another registry scope.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    registry: Option<String>,
    /// Another user name.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    username: Option<String>,
    /// A rotation.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(value_type = Option<String>, nullable = false, format = Password, write_only)]
    password: Option<SecretString>,
    /// Another address; `null` removes it.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    email: Option<Option<String>>,
    /// Label by label: a value sets, `null` removes; `null` for all of them removes all.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>)]
    labels: Option<Option<UniqueMap<Option<String>>>>,
    /// With or without TLS.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    plain_http: Option<bool>,
    /// When the password stops working; `null` if not known.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<DateTime<Utc>>)]
    expires_at: Option<Option<DateTime<Utc>>>,
    /// Another CA; `null` for none beside the authorities that regcred's host trusts.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    ca_certificate: Option<Option<String>>,
    /// How often the login is verified in the background, 300 to 2592000 seconds; `null` for never.
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

/// A registry account; its password is in no answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegistryAccount {
    /// Identity that survives everything.
    id: Uuid,
    /// Unique name.
    name: String,
    /// `host[:port][/path]`, normalised.
    registry: String,
    /// Who logs in.
    username: String,
    /// Optional e-mail address.
    email: Option<String>,
    /// Labels.
    labels: BTreeMap<String, String>,
    /// The registry is spoken to without TLS.
    plain_http: bool,
    /// When the password stops working, if known.
    expires_at: Option<DateTime<Utc>>,
    /// PEM of the CA that signed the registry's certificate.
    ca_certificate: Option<String>,
    /// How often the login is verified in the background; `null` for never.
    verify_interval_seconds: Option<i32>,
    /// When the login was verified last; `null` if never, or not since the login was changed.
    last_verified_at: Option<DateTime<Utc>>,
    /// What was found then, for programs.
    last_verification_result: Option<VerificationResult>,
    /// What was found then, for people.
    last_verification_detail: Option<String>,
    /// Grows by one with every change.
    version: i64,
    /// When it was registered.
    created_at: DateTime<Utc>,
    /// When it was changed last.
    updated_at: DateTime<Utc>,
    /// What readers of its docker config will do otherwise than the account says.
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

/// Register a registry account.
///
/// The password is sealed before it is stored; no later call returns it.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "create_registry_account",
    params(VerifyParams),
    request_body = CreateRegistryAccount,
    responses((status = CREATED, body = RegistryAccount, headers(
        ("Location" = String, description = "Path of the account"),
        ("ETag" = String, description = "Version of the account"),
    ))),
)]
#[post("/registry-accounts")]
pub async fn create_account(
    caller: Caller<WriteAccounts>,
    accounts: Data<Accounts>,
    first: VerifyQuery,
    body: Json<CreateRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let account = accounts.register(&caller.identity, body.0.try_into()?, first.0).await?;
    let location = (LOCATION, format!("/v1/registry-accounts/{}", account.name));
    Ok(HttpResponse::Created()
        .insert_header(location)
        .insert_header(etag(account.version))
        .json(RegistryAccount::from(account)))
}

/// List registry accounts by name.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "list_registry_accounts",
    params(PageParams, LabelParams, ExpiryParams),
    responses((status = OK, body = Page<RegistryAccount>)),
)]
#[get("/registry-accounts")]
pub async fn list_accounts(
    caller: Caller<ReadAccounts>,
    accounts: Data<Accounts>,
    query: LabelledPageQuery,
) -> Result<HttpResponse, ApiError> {
    let LabelledPageQuery { page: asked, labels, expires_within_seconds } = query;
    let filter = AccountFilter { labels, expires_within_seconds };
    let found = accounts.list(&caller.identity, &asked, &filter).await?;
    let page: Page<RegistryAccount> = page(found, &asked, |account| account.name.as_str());
    Ok(HttpResponse::Ok().json(page))
}

/// Show a registry account.
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
    Ok(HttpResponse::Ok().insert_header(etag(account.version)).json(RegistryAccount::from(account)))
}

/// Change a registry account.
///
/// A new `password` is a rotation. Every change raises the version. Another registry, or `plainHttp` in place of TLS,
/// needs the `password` said again: a stored one is not sent anywhere else than it was given for.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "update_registry_account",
    params(
        ("name" = String, Path, description = "Name of the account"),
        ("If-Match" = Option<String>, Header, description = "Change only this version (its ETag)"),
        VerifyParams,
    ),
    request_body(content(
        (UpdateRegistryAccount = "application/merge-patch+json"),
        (UpdateRegistryAccount = "application/json"),
    )),
    responses((status = OK, body = RegistryAccount, headers(("ETag" = String, description = "Version of the account")))),
)]
#[patch("/registry-accounts/{name}")]
pub async fn update_account(
    caller: Caller<WriteAccounts>,
    accounts: Data<Accounts>,
    path: Path<String>,
    expected: IfMatch,
    first: VerifyQuery,
    body: MergePatch<UpdateRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("registry account", &path)?;
    let account = accounts.change(&caller.identity, &name, body.0.try_into()?, expected.0, first.0).await?;
    Ok(HttpResponse::Ok().insert_header(etag(account.version)).json(RegistryAccount::from(account)))
}

/// Delete a registry account and its password.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "delete_registry_account",
    params(
        ("name" = String, Path, description = "Name of the account"),
        ("If-Match" = Option<String>, Header, description = "Delete only this version (its ETag)"),
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
