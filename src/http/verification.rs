//! `/v1/registry-accounts/{name}/verify`, and `?verify=true` of requests that create or change
//! accounts.

use actix_web::{
    HttpResponse, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{
    domain::verification::{Verification, VerificationResult},
    http::{
        auth::{Caller, permission::WriteAccounts},
        body::OptionalJson,
        path_name,
        problem::ApiError,
        query::{DryRunQuery, FromQuery, Query, text},
    },
    service::{accounts::Accounts, verification::RequiredVerification},
};

/// What to verify. Without a body, only the login is verified.
#[derive(Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifyRegistryAccount {
    /// Repository that the login must be able to pull, without registry and tag.
    #[schema(example = "os/alpine")]
    repository: Option<String>,
}

/// Result of a verification.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerificationOutcome {
    /// Result.
    result: VerificationResult,
    /// Explanation of the result, and how to fix it. It contains no text from the registry.
    detail: String,
    /// Time of the verification.
    checked_at: DateTime<Utc>,
}

impl From<Verification> for VerificationOutcome {
    fn from(found: Verification) -> Self {
        Self { result: found.result, detail: found.detail, checked_at: found.checked_at }
    }
}

/// Verification before an account is stored.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct VerifyQuery {
    /// Verifies the login first. Unless the result is `valid`, nothing is stored and the response
    /// is 422 `verification-failed`.
    #[param(value_type = Option<bool>, default = false)]
    verify: bool,
    /// Repository that the login must be able to pull. Requires `verify=true`.
    #[param(example = "os/alpine")]
    repository: Option<String>,
}

impl FromQuery for VerifyQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let parsed = Self { verify: query.flag("verify"), repository: query.one("repository", text) };
        if parsed.repository.is_some() && !parsed.verify {
            query.errors().refuse("repository", "requires verify=true");
        }
        parsed
    }
}

impl VerifyQuery {
    /// Returns the verification that must succeed before anything is stored, if any.
    pub fn verification(self) -> Option<RequiredVerification> {
        self.verify.then_some(RequiredVerification { repository: self.repository })
    }
}

/// Verify the login of a registry account.
///
/// Calls the registry and stores the result with the account; for a named repository only `valid`,
/// which proves the login. The response is 200 for every result, including a login that the registry
/// rejects. A dry run calls the registry, too, and does not store the result.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "verify_registry_account",
    params(("name" = String, Path, description = "Name of the account"), DryRunQuery),
    request_body = Option<VerifyRegistryAccount>,
    responses((status = OK, body = VerificationOutcome)),
)]
#[post("/registry-accounts/{name}/verify")]
pub async fn verify_account(
    caller: Caller<WriteAccounts, DryRunQuery>,
    accounts: Data<Accounts>,
    path: Path<String>,
    body: OptionalJson<VerifyRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("registry account", &path)?;
    let parameters = body.0.unwrap_or_default();
    let found = accounts.verify(&caller.identity, &name, parameters.repository.as_deref()).await?;
    Ok(HttpResponse::Ok().json(VerificationOutcome::from(found)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::query::parse;

    #[test]
    fn a_query_selects_a_verification() {
        let first = |query| parse::<VerifyQuery>(query).unwrap().verification();
        assert!(first("").is_none() && first("verify=false").is_none());
        assert_eq!(first("verify=true").unwrap().repository, None);
        assert_eq!(first("verify=true&repository=os%2Falpine").unwrap().repository.as_deref(), Some("os/alpine"));
        for refused in ["verify=1", "verify", "repository=a", "verified=true"] {
            assert!(parse::<VerifyQuery>(refused).is_err(), "{refused}");
        }
    }
}
