//! Errors as problems (RFC 9457). One table gives each its status, slug and title.

use std::{fmt::Write as _, time::Duration};

use actix_web::{
    Error, HttpResponse, ResponseError,
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
    domain::{docker_config::RenderError, invalid::FieldError},
    http::request_meta::RequestMeta,
    service::{ServiceError, idempotency::IdempotencyError},
    storage::StorageError,
};

/// Prefix of problem types.
const TYPE_BASE: &str = "https://regcred.dev/problems/";

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
    #[error("send the body as {}", .0.join(" or "))]
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
    /// The caller exceeded its request rate limit.
    #[error("this caller exceeded its request rate limit; retry later")]
    TooManyRequests {
        /// Time after which to retry.
        retry_after: Duration,
    },
    /// The caller's role lacks the permission.
    #[error("your role does not include this operation; use a key with another role")]
    Forbidden,
    /// The caller's role includes the permission, but its grants are restricted.
    #[error("this operation requires grants of all accounts, clusters and namespaces")]
    NeedsAllGrants,
    /// No route has this path.
    #[error("no route has this path")]
    NoRoute,
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

    /// Error of one invalid field.
    pub fn field(field: &str, detail: impl ToString) -> Self {
        vec![FieldError::new(field, detail)].into()
    }

    /// Status, slug and title.
    fn parts(&self) -> ProblemParts {
        use StatusCode as S;
        match self {
            Self::Service(error) => service_parts(error),
            Self::MalformedJson(_) => (S::BAD_REQUEST, "malformed-json", "The body is not JSON"),
            Self::BodyTooLarge(_) => (S::PAYLOAD_TOO_LARGE, "body-too-large", "The body is too large"),
            Self::BodyTimeout => (S::REQUEST_TIMEOUT, "body-timeout", "The body did not arrive in time"),
            Self::BodyUnreadable => (S::BAD_REQUEST, "body-unreadable", "The body is not readable"),
            Self::UnsupportedMediaType(_) => {
                (S::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "Unsupported media type")
            }
            Self::NotAcceptable(_) => (S::NOT_ACCEPTABLE, "not-acceptable", "No acceptable media type"),
            Self::Unauthenticated(_) => (S::UNAUTHORIZED, "unauthenticated", "Authentication required"),
            Self::InvalidToken => (S::UNAUTHORIZED, "invalid-token", "Invalid token"),
            Self::NoMatchingRule => (S::FORBIDDEN, "no-matching-rule", "No rule matches the token"),
            Self::IssuerUnavailable { .. } => {
                (S::SERVICE_UNAVAILABLE, "issuer-unavailable", "Token issuer unavailable")
            }
            Self::TooManyAttempts { .. } => {
                (S::TOO_MANY_REQUESTS, "too-many-attempts", "Too many failed authentications")
            }
            Self::TooManyRequests { .. } => (S::TOO_MANY_REQUESTS, "too-many-requests", "Request rate limit exceeded"),
            Self::SourceNetworkRefused => {
                (S::FORBIDDEN, "source-network-refused", "The API key may not be used from this address")
            }
            Self::Forbidden | Self::NeedsAllGrants => (S::FORBIDDEN, "forbidden", "Not allowed"),
            Self::NoRoute => (S::NOT_FOUND, "not-found", "Not found"),
            Self::MethodNotAllowed(_) => (S::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed"),
            Self::BadRequest | Self::RepeatedHeader(_) => (S::BAD_REQUEST, "bad-request", "Malformed request"),
            Self::Internal(_) => internal_parts(),
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
            error if error.parts().0 == StatusCode::INTERNAL_SERVER_ERROR => {
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
            _ => None,
        }
    }
}

/// Status, slug and title of a problem.
type ProblemParts = (StatusCode, &'static str, &'static str);

fn internal_parts() -> ProblemParts {
    (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error")
}

fn service_parts(error: &ServiceError) -> ProblemParts {
    use StatusCode as S;
    match error {
        ServiceError::Invalid(_) | ServiceError::UnknownAccounts { .. } => {
            (S::UNPROCESSABLE_ENTITY, "invalid-request", "Invalid request")
        }
        ServiceError::NotFound { .. } | ServiceError::Hidden { .. } => (S::NOT_FOUND, "not-found", "Not found"),
        ServiceError::Audit(_) => (S::SERVICE_UNAVAILABLE, "audit-unavailable", "Audit log unavailable"),
        ServiceError::NotGranted { .. } | ServiceError::LabelsNotGranted { .. } | ServiceError::Trusted { .. } => {
            (S::FORBIDDEN, "forbidden", "Not allowed")
        }
        ServiceError::LastAdmin => (S::CONFLICT, "last-admin", "The last admin key cannot be revoked"),
        ServiceError::InUse { .. } => (S::CONFLICT, "in-use", "The resource is in use"),
        ServiceError::TooManyStreams { .. } => (S::TOO_MANY_REQUESTS, "too-many-streams", "Too many event streams"),
        ServiceError::ReviewsExhausted { .. } => {
            (S::TOO_MANY_REQUESTS, "too-many-requests", "Request rate limit exceeded")
        }
        ServiceError::StreamsExhausted => (S::SERVICE_UNAVAILABLE, "streams-exhausted", "No event stream available"),
        ServiceError::Deleting(_) => (S::CONFLICT, "pull-secret-deleting", "The pull secret is being deleted"),
        ServiceError::Idempotency(error) => idempotency_parts(*error),
        ServiceError::NameTaken(_) => (S::CONFLICT, "name-taken", "The name is in use"),
        ServiceError::AudienceTaken => (S::CONFLICT, "audience-taken", "The audience is in use"),
        ServiceError::Stale { .. } => (S::PRECONDITION_FAILED, "stale-version", "The resource has changed"),
        ServiceError::Render(RenderError::KeyCollision { .. }) => {
            (S::CONFLICT, "key-collision", "Two accounts have the same key")
        }
        ServiceError::Render(RenderError::Unsupported { .. }) => {
            (S::UNPROCESSABLE_ENTITY, "profile-unsupported", "The profile cannot express these accounts")
        }
        ServiceError::Cluster(error) => cluster_parts(error),
        ServiceError::VerificationFailed(_) => (S::UNPROCESSABLE_ENTITY, "verification-failed", "Verification failed"),
        ServiceError::Storage(StorageError::Unavailable(_)) => {
            (S::SERVICE_UNAVAILABLE, "database-unavailable", "Database unavailable")
        }
        ServiceError::Storage(
            StorageError::NameTaken | StorageError::AudienceTaken | StorageError::Corrupt { .. } | StorageError::Sql(_),
        )
        | ServiceError::Open(_)
        | ServiceError::Seal(_)
        | ServiceError::Crypto(_)
        | ServiceError::Task(_) => internal_parts(),
    }
}

fn idempotency_parts(error: IdempotencyError) -> ProblemParts {
    use StatusCode as S;
    match error {
        IdempotencyError::InUse => (S::CONFLICT, "idempotency-key-in-use", "A request with this key is in progress"),
        IdempotencyError::Reused => {
            (S::UNPROCESSABLE_ENTITY, "idempotency-key-reused", "The key was used for another request")
        }
        IdempotencyError::Performed => (S::CONFLICT, "idempotency-key-replayed", "The request was performed before"),
    }
}

fn cluster_parts(error: &ClusterError) -> ProblemParts {
    use StatusCode as S;
    let (status, title) = match error {
        ClusterError::SecretExists => (S::CONFLICT, "The Secret already exists"),
        ClusterError::NamespaceNotFound => (S::NOT_FOUND, "Namespace not found"),
        ClusterError::NamespaceTerminating => (S::CONFLICT, "The namespace is being deleted"),
        ClusterError::InvalidSecret { .. } => (S::UNPROCESSABLE_ENTITY, "The cluster refused the Secret"),
        ClusterError::TypeFixed | ClusterError::Immutable => (S::CONFLICT, "The Secret is immutable"),
        ClusterError::Changed => (S::CONFLICT, "The Secret has changed"),
        ClusterError::Refused { .. } => (S::CONFLICT, "A policy of the cluster refused the Secret"),
        ClusterError::Unauthorized => (S::BAD_GATEWAY, "The cluster rejected the credential"),
        ClusterError::Forbidden { .. } => (S::BAD_GATEWAY, "regcred lacks a permission in the cluster"),
        ClusterError::Unreachable { .. }
        | ClusterError::Tls { .. }
        | ClusterError::Overloaded { .. }
        | ClusterError::Misconfigured { .. } => (S::BAD_GATEWAY, "Cluster unreachable"),
        ClusterError::Timeout { .. } => (S::GATEWAY_TIMEOUT, "The cluster did not respond in time"),
    };
    (status, error.slug(), title)
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
    #[schema(example = "https://regcred.dev/problems/invalid-request")]
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
        self.parts().0
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
    let (status, slug, title) = error.parts();
    if status.is_server_error() {
        tracing::error!(problem = slug, cause = %chain(error), "request failed");
    } else {
        tracing::debug!(problem = slug, "request refused");
    }
    let request = response.request();
    let request_id = RequestMeta::of(request).map(|meta| meta.id.to_string());
    let fields = error.errors().iter().cloned().chain(error.other_field());
    let problem = Problem {
        problem_type: format!("{TYPE_BASE}{slug}"),
        title,
        status: status.as_u16(),
        detail: error.detail(),
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
