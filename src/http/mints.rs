//! `/v1/registry-accounts/{name}/mint`, and the mint in answers.

use actix_web::{
    HttpResponse, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::{
        caller::Call,
        mint::{Mint, MintReason, MintState},
    },
    http::{
        accounts::RegistryAccount,
        auth::{Caller, permission::WriteAccounts},
        conditional,
        idempotency::{Idempotency, IdempotencyKeyHeader},
        path_name,
        problem::ApiError,
        query::DryRunQuery,
    },
    service::accounts::Accounts,
};

/// State of the mints of a registry account.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccountMint {
    /// State.
    state: MintState,
    /// Time of the last successful mint.
    minted_at: DateTime<Utc>,
    /// End of the login.
    valid_until: DateTime<Utc>,
    /// Planned time of the next mint.
    refresh_at: DateTime<Utc>,
    /// Number of mints.
    serial: i64,
    /// Failure of the last mint; `null` after a success.
    last_error: Option<MintFailure>,
    /// Time of the next attempt.
    next_attempt_at: DateTime<Utc>,
}

/// Failure of a mint.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MintFailure {
    /// Reason.
    #[serde(rename = "type")]
    reason: MintReason,
    /// Explanation and remedy. It contains no text from the provider.
    detail: String,
}

impl From<Mint> for AccountMint {
    fn from(mint: Mint) -> Self {
        Self {
            state: mint.state(),
            minted_at: mint.minted_at,
            valid_until: mint.valid_until,
            refresh_at: mint.refresh_at,
            serial: mint.serial,
            last_error: mint.last_error.map(|error| MintFailure { reason: error.reason, detail: error.detail }),
            next_attempt_at: mint.next_attempt_at,
        }
    }
}

/// Mint the login of a registry account.
///
/// Requests another login from the account's source at once, as after a change at the provider. If
/// that fails, the present login stays. A dry run requests none, and returns the account.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "mint_registry_account",
    params(("name" = String, Path, description = "Name of the account"), DryRunQuery, IdempotencyKeyHeader),
    responses((status = OK, body = RegistryAccount, headers(
        ("ETag" = String, description = "Version of the account"),
    ))),
)]
#[post("/registry-accounts/{name}/mint")]
pub async fn mint_account(
    caller: Caller<WriteAccounts, DryRunQuery>,
    accounts: Data<Accounts>,
    path: Path<String>,
    idempotency: Idempotency,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("registry account", &path)?;
    let mint = async |call: &Call| accounts.mint(call, &name).await;
    let current = async |call: &Call| Ok(accounts.find(call, &name).await?.account);
    let account = idempotency.once(&caller.identity, mint, current).await?;
    Ok(conditional::changed(&caller.identity, account.version, RegistryAccount::from(account)))
}
