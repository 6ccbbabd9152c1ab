//! Errors as problems (RFC 9457).

use std::{fmt::Write as _, sync::Arc, time::Duration};

use actix_web::{
    Error, HttpMessage as _, HttpRequest, HttpResponse, ResponseError,
    body::{BoxBody, MessageBody},
    dev::{ServiceRequest, ServiceResponse},
    http::{
        StatusCode,
        header::{self, HeaderName},
    },
    middleware::Next,
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    clients::cluster::ClusterError,
    domain::{
        caller::{Identity, Permission, Role},
        docker_config::RenderError,
        invalid::FieldError,
        mint::MintReason,
    },
    http::request_meta::RequestMeta,
    service::{OR_NOT_GRANTED, ServiceError, idempotency::IdempotencyError},
    storage::StorageError,
};

mod types;

pub use self::types::ProblemType;

/// Errors of handlers.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Error of a use case.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The body is not JSON.
    #[error("the body is not JSON: {0}")]
    MalformedJson(String),
    /// The body exceeds this number of bytes.
    #[error("the body exceeds {0} bytes")]
    BodyTooLarge(usize),
    /// The body did not arrive in time.
    #[error("the body did not arrive within 10 seconds; send the request again")]
    BodyTimeout,
    /// The body is incomplete, or its transfer coding is invalid.
    #[error("the body is incomplete, or its transfer coding is invalid")]
    BodyUnreadable,
    /// The route does not support the body's media type.
    #[error("send the body as {}, with the header `Content-Type: {}`", .0.join(" or "), .0.first().unwrap_or(&""))]
    UnsupportedMediaType(&'static [&'static str]),
    /// The route supports none of the accepted media types.
    #[error("accept {0}")]
    NotAcceptable(&'static str),
    /// The API key is missing or invalid.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The token is malformed, expired or not intended for regcred.
    #[error("the token is rejected: its issuer, audience, signature or time is not accepted")]
    InvalidToken,
    /// No rule of the identity provider matches a valid token.
    #[error(
        "the token is valid, but no rule of its identity provider matches its claims; change the rules or the token"
    )]
    NoMatchingRule,
    /// The issuer, or the cluster that reviews the tokens, is unavailable.
    #[error("the token cannot be verified because its issuer is unavailable; retry later")]
    IssuerUnavailable {
        /// Time after which to retry.
        retry_after: Duration,
    },
    /// Too many failed authentications of one key id, or from one address.
    #[error("too many failed authentications; check the API key or token and retry later")]
    TooManyAttempts {
        /// Time after which to retry.
        retry_after: Duration,
    },
    /// The API key is valid, but not for the address of the client.
    #[error("this API key may not be used from your address; use a key without this restriction, or another network")]
    SourceNetworkRefused,
    /// A session of the web console is not accepted for this request, or cannot be created.
    #[error("{0}")]
    SessionRefused(&'static str),
    /// A person is not signed in by an identity provider.
    #[error("{0}")]
    LoginRefused(&'static str),
    /// The caller exceeded its request rate limit.
    #[error("this caller exceeded its request rate limit; retry later")]
    TooManyRequests {
        /// Time after which to retry.
        retry_after: Duration,
    },
    /// The caller's role lacks the permission.
    #[error(
        "your role `{}` does not include the permission `{}`; use a key with the role {}",
        role.as_str(),
        permission.as_str(),
        roles_with(*permission)
    )]
    Forbidden {
        /// Role of the caller.
        role: Role,
        /// Permission that the route requires.
        permission: Permission,
    },
    /// The caller's role includes the permission, but its grants are restricted.
    #[error(
        "the permission `{}` requires grants of all accounts, clusters and namespaces, which yours are not; see `GET \
         /v1/me`",
        .0.as_str()
    )]
    NeedsAllGrants(Permission),
    /// No route has this path.
    #[error("no route has this path; see `/openapi.json` or `/docs/`")]
    NoRoute,
    /// No route has this path, but one has it without the slash at its end.
    #[error("no route has this path; leave out the slash at its end")]
    TrailingSlash,
    /// The path does not support the method.
    #[error("this path supports only {0}")]
    MethodNotAllowed(String),
    /// A header that decides about the request was sent twice.
    #[error("the header `{0}` must be sent only once")]
    RepeatedHeader(&'static HeaderName),
    /// A request that actix-web refused, such as one with a path that is not UTF-8.
    #[error("the request is malformed")]
    BadRequest,
    /// Internal error. Its cause is logged and never sent.
    #[error("internal error")]
    Internal(#[source] anyhow::Error),
}

/// Names the roles that include a permission.
fn roles_with(permission: Permission) -> String {
    let roles = Role::ALL.into_iter().filter(|role| role.allows(permission));
    roles.map(|role| format!("`{}`", role.as_str())).collect::<Vec<_>>().join(" or ")
}

impl From<Vec<FieldError>> for ApiError {
    fn from(errors: Vec<FieldError>) -> Self {
        Self::Service(ServiceError::Invalid(errors))
    }
}

impl ApiError {
    /// Whether this error may conceal an existing resource.
    pub fn may_conceal(&self) -> bool {
        use ServiceError as E;
        matches!(
            self,
            Self::Service(
                E::NotFound { .. }
                    | E::Hidden { .. }
                    | E::NotGranted { .. }
                    | E::LabelsNotGranted { .. }
                    | E::UnknownAccounts { .. }
            )
        )
    }

    /// Whether the text is also that of a resource that is not granted to the caller.
    fn may_be_ungranted(&self) -> bool {
        use ServiceError as E;
        matches!(
            self,
            Self::Service(E::NotFound { .. } | E::Hidden { .. } | E::Cluster(ClusterError::NamespaceNotFound))
        )
    }

    /// Error of one invalid field.
    pub fn field(field: &str, detail: impl ToString) -> Self {
        vec![FieldError::new(field, detail)].into()
    }

    fn problem_type(&self) -> ProblemType {
        use ProblemType as T;
        match self {
            Self::Service(error) => service_type(error),
            Self::MalformedJson(_) => T::MalformedJson,
            Self::BodyTooLarge(_) => T::BodyTooLarge,
            Self::BodyTimeout => T::BodyTimeout,
            Self::BodyUnreadable => T::BodyUnreadable,
            Self::UnsupportedMediaType(_) => T::UnsupportedMediaType,
            Self::NotAcceptable(_) => T::NotAcceptable,
            Self::Unauthenticated(_) => T::Unauthenticated,
            Self::InvalidToken => T::InvalidToken,
            Self::NoMatchingRule => T::NoMatchingRule,
            Self::IssuerUnavailable { .. } => T::IssuerUnavailable,
            Self::TooManyAttempts { .. } => T::TooManyAttempts,
            Self::TooManyRequests { .. } => T::TooManyRequests,
            Self::SourceNetworkRefused => T::SourceNetworkRefused,
            Self::SessionRefused(_) => T::SessionRefused,
            Self::LoginRefused(_) => T::LoginRefused,
            Self::Forbidden { .. } | Self::NeedsAllGrants(_) => T::Forbidden,
            Self::NoRoute | Self::TrailingSlash => T::NotFound,
            Self::MethodNotAllowed(_) => T::MethodNotAllowed,
            Self::BadRequest | Self::RepeatedHeader(_) => T::BadRequest,
            Self::Internal(_) => T::Internal,
        }
    }

    fn errors(&self) -> &[FieldError] {
        match self {
            Self::Service(
                ServiceError::Invalid(errors)
                | ServiceError::UnknownAccounts { errors, .. }
                | ServiceError::LabelsNotGranted { errors, .. },
            ) => errors,
            _ => &[],
        }
    }

    /// Text for the caller. It never contains the cause of an internal error.
    fn detail(&self) -> String {
        match self {
            error if !error.errors().is_empty() => {
                let all = error.errors().iter().map(sentence).collect::<Vec<_>>();
                all.join("; ")
            }
            error if error.problem_type() == ProblemType::Internal => {
                "internal error; search the log of regcred for this request id".to_owned()
            }
            error => error.to_string(),
        }
    }

    /// Field that an API server or a registry refused, or a header.
    fn other_field(&self) -> Option<FieldError> {
        match self {
            Self::Service(ServiceError::Cluster(ClusterError::InvalidSecret { field, detail })) => {
                let field = field.as_deref().unwrap_or_default();
                Some(FieldError::new(field.strip_prefix("metadata.").unwrap_or(field), detail))
            }
            Self::Service(ServiceError::VerificationFailed(finding)) => {
                let field = if finding.result.is_about_login() { "password" } else { "registry" };
                Some(FieldError::new(field, &finding.detail))
            }
            Self::Service(ServiceError::Mint(error) | ServiceError::MintTimeout(error)) => {
                Some(FieldError::new("source", &error.detail))
            }
            Self::Service(ServiceError::Render(error)) => Some(FieldError::new("accounts", error)),
            Self::RepeatedHeader(name) => Some(FieldError::new(name.as_str(), "must be sent only once")),
            _ => None,
        }
    }

    fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::TooManyAttempts { retry_after }
            | Self::TooManyRequests { retry_after }
            | Self::Service(ServiceError::ReviewsExhausted { retry_after }) => Some(retry_after.as_secs() + 1),
            Self::IssuerUnavailable { retry_after } => Some(retry_after.as_secs().max(1)),
            Self::Service(
                ServiceError::Storage(StorageError::Unavailable(_))
                | ServiceError::Audit(_)
                | ServiceError::Idempotency(IdempotencyError::InUse),
            ) => Some(1),
            Self::Service(ServiceError::TooManyStreams { .. } | ServiceError::StreamsExhausted) => Some(10),
            Self::Service(ServiceError::Cluster(ClusterError::Overloaded { retry_after })) => {
                retry_after.map(|after| after.as_secs())
            }
            Self::Service(ServiceError::VerificationFailed(finding)) => {
                finding.retry_after.map(|after| after.as_secs().max(1))
            }
            Self::Service(ServiceError::Mint(error)) if error.reason == MintReason::Throttled => {
                Some(error.retry_after.map_or(10, |after| after.as_secs().max(1)))
            }
            _ => None,
        }
    }
}

fn service_type(error: &ServiceError) -> ProblemType {
    use ProblemType as T;
    match error {
        ServiceError::Invalid(_) | ServiceError::UnknownAccounts { .. } => T::InvalidRequest,
        ServiceError::NotFound { .. } | ServiceError::Hidden { .. } => T::NotFound,
        ServiceError::Audit(_) => T::AuditUnavailable,
        ServiceError::NotGranted { .. } | ServiceError::LabelsNotGranted { .. } | ServiceError::Trusted { .. } => {
            T::Forbidden
        }
        ServiceError::LastAdmin => T::LastAdmin,
        ServiceError::InUse { .. } => T::InUse,
        ServiceError::TooManyStreams { .. } => T::TooManyStreams,
        ServiceError::ReviewsExhausted { .. } => T::TooManyRequests,
        ServiceError::StreamsExhausted => T::StreamsExhausted,
        ServiceError::Deleting(_) => T::PullSecretDeleting,
        ServiceError::Idempotency(IdempotencyError::InUse) => T::IdempotencyKeyInUse,
        ServiceError::Idempotency(IdempotencyError::Reused) => T::IdempotencyKeyReused,
        ServiceError::Idempotency(IdempotencyError::Performed) => T::IdempotencyKeyReplayed,
        ServiceError::NameTaken(_) => T::NameTaken,
        ServiceError::AudienceTaken => T::AudienceTaken,
        ServiceError::Stale { .. } | ServiceError::Exists { .. } => T::StaleVersion,
        ServiceError::Render(RenderError::KeyCollision { .. }) => T::KeyCollision,
        ServiceError::Render(RenderError::Unsupported { .. }) => T::ProfileUnsupported,
        ServiceError::Cluster(error) => cluster_type(error),
        ServiceError::Mint(error) if error.reason == MintReason::Throttled => T::MintThrottled,
        ServiceError::Mint(_) => T::MintFailed,
        ServiceError::MintTimeout(_) => T::MintTimeout,
        ServiceError::NotMinted(_) => T::NotMinted,
        ServiceError::VerificationFailed(_) => T::VerificationFailed,
        ServiceError::Storage(StorageError::Unavailable(_)) => T::DatabaseUnavailable,
        ServiceError::Storage(
            StorageError::NameTaken | StorageError::AudienceTaken | StorageError::Corrupt { .. } | StorageError::Sql(_),
        )
        | ServiceError::Open(_)
        | ServiceError::Seal(_)
        | ServiceError::Crypto(_)
        | ServiceError::Task(_) => T::Internal,
    }
}

/// Type with the slug of the error.
fn cluster_type(error: &ClusterError) -> ProblemType {
    use ProblemType as T;
    match error {
        ClusterError::SecretExists | ClusterError::SecretKept { .. } => T::SecretExists,
        ClusterError::NamespaceNotFound => T::NamespaceNotFound,
        ClusterError::NamespaceTerminating => T::NamespaceTerminating,
        ClusterError::InvalidSecret { .. } => T::InvalidSecret,
        ClusterError::TypeFixed => T::SecretTypeFixed,
        ClusterError::Immutable => T::SecretImmutable,
        ClusterError::Changed => T::SecretChanged,
        ClusterError::Refused { .. } => T::SecretRefused,
        ClusterError::Unauthorized => T::ClusterUnauthorized,
        ClusterError::Forbidden { .. } => T::ClusterForbidden,
        ClusterError::Unreachable { .. }
        | ClusterError::Tls { .. }
        | ClusterError::Overloaded { .. }
        | ClusterError::Misconfigured { .. } => T::ClusterUnreachable,
        ClusterError::Timeout { .. } => T::ClusterTimeout,
    }
}

fn sentence(error: &FieldError) -> String {
    if error.field.is_empty() { error.detail.clone() } else { format!("`{}`: {}", error.field, error.detail) }
}

/// A problem (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// Type of the problem, a stable URI for programs.
    #[serde(rename = "type")]
    #[schema(value_type = ProblemType, example = "https://regcred.dev/problems/invalid-request")]
    pub problem_type: String,
    /// Summary of the type.
    pub title: &'static str,
    /// HTTP status.
    pub status: u16,
    /// Explanation, and how to fix it.
    pub detail: String,
    /// Path of the request.
    pub instance: String,
    /// Request id, as in logs and `X-Request-Id`.
    pub request_id: String,
    /// Invalid fields and query parameters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldProblem>,
}

/// Invalid field or query parameter.
#[derive(Debug, Serialize, ToSchema)]
pub struct FieldProblem {
    /// JSON path of the field, such as `accounts[1]`, or name of the parameter.
    pub field: String,
    /// Reason.
    pub detail: String,
}

impl From<FieldError> for FieldProblem {
    fn from(error: FieldError) -> Self {
        Self { field: error.field, detail: error.detail }
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.problem_type().status()
    }

    /// Response without a body. [`write_problems`] adds it, because it knows the request.
    fn error_response(&self) -> HttpResponse {
        HttpResponse::new(self.status_code())
    }
}

/// Middleware that writes the problem of every failed request and logs the causes of server errors.
pub async fn write_problems(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let response = match next.call(request).await {
        Ok(response) => response.map_into_boxed_body(),
        Err(error) => return Err(error),
    };
    let Some(error) = response.response().error() else { return Ok(response) };
    let problem = match error.as_error::<ApiError>() {
        Some(error) => respond(error, &response),
        None => respond(&foreign(error), &response),
    };
    Ok(response.into_response(problem))
}

/// Converts an error of actix-web.
fn foreign(error: &Error) -> ApiError {
    let response = error.as_response_error();
    match response.status_code() {
        StatusCode::NOT_FOUND => ApiError::NoRoute,
        status if status.is_client_error() => ApiError::BadRequest,
        _ => ApiError::Internal(anyhow::anyhow!("{response}")),
    }
}

fn respond(error: &ApiError, response: &ServiceResponse) -> HttpResponse {
    let problem_type = error.problem_type();
    let (status, slug) = (problem_type.status(), problem_type.slug());
    if status.is_server_error() {
        tracing::error!(problem = slug, cause = %chain(error), "request failed");
    } else {
        tracing::debug!(problem = slug, "request refused");
    }
    let request = response.request();
    let request_id = RequestMeta::of(request).map(|meta| meta.id.to_string());
    let fields = error.errors().iter().cloned().chain(error.other_field());
    let problem = Problem {
        problem_type: problem_type.uri(),
        title: problem_type.title(),
        status: status.as_u16(),
        detail: detail_for(error, request),
        instance: request.path().to_owned(),
        request_id: request_id.unwrap_or_default(),
        errors: fields.map(FieldProblem::from).collect(),
    };
    let mut builder = HttpResponse::build(status);
    builder.content_type("application/problem+json");
    match error {
        ApiError::Unauthenticated(_) => {
            builder.insert_header((header::WWW_AUTHENTICATE, "Bearer realm=\"regcred\""));
        }
        ApiError::InvalidToken => {
            builder.insert_header((header::WWW_AUTHENTICATE, "Bearer realm=\"regcred\", error=\"invalid_token\""));
        }
        ApiError::MethodNotAllowed(allow) => {
            builder.insert_header((header::ALLOW, allow.as_str()));
        }
        _ => {}
    }
    if let Some(seconds) = error.retry_after_seconds() {
        builder.insert_header((header::RETRY_AFTER, seconds));
    }
    // The rest of an unread body must not be parsed as the next request.
    if matches!(error, ApiError::BodyTooLarge(_) | ApiError::BodyTimeout | ApiError::BodyUnreadable) {
        builder.force_close();
    }
    match serde_json::to_string(&problem) {
        Ok(body) => builder.body(body),
        Err(_) => builder.finish(),
    }
}

/// Text for the caller. One whose grants are restricted cannot tell a missing resource from one that
/// is not granted, and is told so.
fn detail_for(error: &ApiError, request: &HttpRequest) -> String {
    let detail = error.detail();
    let extensions = request.extensions();
    let is_restricted = extensions.get::<Arc<Identity>>().is_some_and(|identity| !identity.grants.include_everything());
    if error.may_be_ungranted() && is_restricted { format!("{detail}{OR_NOT_GRANTED}") } else { detail }
}

/// Formats an error and its causes for the log.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(line, ": {error}");
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_permission_names_the_roles_that_have_it() {
        let forbidden = |role, permission| ApiError::Forbidden { role, permission }.to_string();
        assert_eq!(
            forbidden(Role::Viewer, Permission::WriteAccounts),
            "your role `viewer` does not include the permission `writeAccounts`; use a key with the role `admin` or \
             `operator`"
        );
        assert!(forbidden(Role::Operator, Permission::WriteApiKeys).ends_with("use a key with the role `admin`"));
    }

    #[test]
    fn problem_of_a_cluster_has_the_slug_of_its_error() {
        let detail = String::new;
        let errors = [
            ClusterError::SecretExists,
            ClusterError::NamespaceNotFound,
            ClusterError::NamespaceTerminating,
            ClusterError::InvalidSecret { field: None, detail: detail() },
            ClusterError::TypeFixed,
            ClusterError::Immutable,
            ClusterError::Changed,
            ClusterError::Refused { detail: detail() },
            ClusterError::Unauthorized,
            ClusterError::Forbidden { detail: detail() },
            ClusterError::Unreachable { detail: detail() },
            ClusterError::Tls { detail: detail() },
            ClusterError::Timeout { detail: detail() },
            ClusterError::Overloaded { retry_after: None },
            ClusterError::Misconfigured { detail: detail() },
        ];
        for error in errors {
            assert_eq!(cluster_type(&error).slug(), error.slug(), "{error:?}");
        }
    }
}
