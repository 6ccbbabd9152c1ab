//! `/v1/registry-accounts/{name}/verify`, and `?verify=true` where accounts are made or changed.

use std::future::{Ready, ready};

use actix_web::{
    FromRequest, HttpRequest, HttpResponse,
    dev::Payload,
    post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use url::form_urlencoded;
use utoipa::{IntoParams, ToSchema};

use crate::{
    domain::{
        invalid::FieldErrors,
        verification::{Verification, VerificationResult},
    },
    http::{
        auth::{Caller, permission::WriteAccounts},
        body::OptionalJson,
        path_name,
        problem::ApiError,
    },
    service::{accounts::Accounts, verification::RequiredVerification},
};

/// What to verify. Without a body the login alone is.
#[derive(Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifyRegistryAccount {
    /// A repository that the login should be able to pull, without registry and tag.
    #[schema(example = "os/alpine")]
    repository: Option<String>,
}

/// What a check of a login found.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerificationOutcome {
    /// What was found, for programs.
    result: VerificationResult,
    /// What was found and what to do about it, for people. Nothing in it was written by a registry.
    detail: String,
    /// When.
    checked_at: DateTime<Utc>,
}

impl From<Verification> for VerificationOutcome {
    fn from(found: Verification) -> Self {
        Self { result: found.result, detail: found.detail, checked_at: found.checked_at }
    }
}

/// Whether the login has to work before anything is stored.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query to clients; VerifyQuery parses it")]
pub struct VerifyParams {
    /// With `true`, nothing is stored unless the registry is seen to take the login; else the answer is 422
    /// `verification-failed`.
    verify: Option<bool>,
    /// With `verify=true`: a repository that the login has to be able to pull, too.
    repository: Option<String>,
}

/// The query of a request that makes or changes an account.
pub struct VerifyQuery(pub Option<RequiredVerification>);

impl FromRequest for VerifyQuery {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(parse(request.query_string()).map(Self))
    }
}

fn parse(query: &str) -> Result<Option<RequiredVerification>, ApiError> {
    let mut errors = FieldErrors::default();
    let (mut is_wanted, mut first) = (false, RequiredVerification::default());
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match (&*key, &*value) {
            ("verify", "true") => is_wanted = true,
            ("verify", "false") => is_wanted = false,
            ("verify", _) => errors.refuse("verify", "must be true or false"),
            ("repository", repository) => first.repository = Some(repository.to_owned()),
            (other, _) => errors.refuse(&other.chars().take(50).collect::<String>(), "is not a known query parameter"),
        }
    }
    if first.repository.is_some() && !is_wanted {
        errors.refuse("repository", "goes with verify=true");
    }
    Ok(errors.finish(|| Some(is_wanted.then_some(first)))?)
}

/// Verify the login of a registry account.
///
/// Asks the registry, and stores what it found with the account. A login that does not work is what was found, not an error:
/// the answer is 200 with the result.
#[utoipa::path(
    tag = "registry-accounts",
    operation_id = "verify_registry_account",
    params(("name" = String, Path, description = "Name of the account")),
    request_body = Option<VerifyRegistryAccount>,
    responses((status = OK, body = VerificationOutcome)),
)]
#[post("/registry-accounts/{name}/verify")]
pub async fn verify_account(
    caller: Caller<WriteAccounts>,
    accounts: Data<Accounts>,
    path: Path<String>,
    body: OptionalJson<VerifyRegistryAccount>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("registry account", &path)?;
    let wanted = body.0.unwrap_or_default();
    let found = accounts.verify(&caller.identity, &name, wanted.repository.as_deref()).await?;
    Ok(HttpResponse::Ok().json(VerificationOutcome::from(found)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_says_whether_to_verify() {
        assert!(parse("").unwrap().is_none() && parse("verify=false").unwrap().is_none());
        assert_eq!(parse("verify=true").unwrap().unwrap().repository, None);
        let repository = parse("verify=true&repository=os%2Falpine").unwrap().unwrap().repository;
        assert_eq!(repository.as_deref(), Some("os/alpine"));
        for refused in ["verify=1", "verify", "repository=a", "verified=true"] {
            assert!(parse(refused).is_err(), "{refused}");
        }
    }
}
