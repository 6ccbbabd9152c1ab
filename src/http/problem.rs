//! Errors as RFC 9457 problems: one place that gives each its status, slug and title.

use std::{fmt::Write as _, time::Duration};

use actix_web::{
    Error, HttpResponse, ResponseError,
    body::{BoxBody, MessageBody},
    dev::{ServiceRequest, ServiceResponse},
    http::{StatusCode, header},
    middleware::Next,
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    clients::cluster::ClusterError,
    domain::{docker_config::RenderError, invalid::FieldError},
    http::request_meta::RequestMeta,
    service::ServiceError,
    storage::StorageError,
};

/// What every problem's type begins with.
const TYPE_BASE: &str = "https://regcred.dev/problems/";

/// Everything that a handler may fail with.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// A use case failed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The body is not JSON.
    #[error("the body is not JSON: {0}")]
    MalformedJson(String),
    /// The body is longer than this route takes, in bytes.
    #[error("the body is longer than {0} bytes")]
    BodyTooLarge(usize),
    /// The body took longer to arrive than a client may take.
    #[error("the body did not arrive in time")]
    BodyTimeout,
    /// The body broke off, or its transfer coding is wrong.
    #[error("the body could not be read")]
    BodyUnreadable,
    /// The body has a media type that this route does not take.
    #[error("the body must be sent as {}", .0.join(" or "))]
    UnsupportedMediaType(&'static [&'static str]),
    /// The caller accepts nothing that this route can answer with.
    #[error("this answer can only be had as {0}")]
    NotAcceptable(&'static str),
    /// No key, or not a good one.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// A token that is none, or not one for us, or not any more.
    #[error("the token is not valid here: its issuer, audience, signature or time is not accepted")]
    InvalidToken,
    /// A token that is valid, and nothing says who its bearer is.
    #[error("the token is valid, but no rule of its identity provider matches its claims")]
    NoMatchingRule,
    /// Whoever vouches for such tokens does not answer.
    #[error("whoever issued the token cannot be asked now whether it is valid")]
    IssuerUnavailable {
        /// When to try again.
        retry_after: Duration,
    },
    /// Too many wrong keys of one id, or from one address.
    #[error("too many attempts with wrong API keys or tokens")]
    TooManyAttempts {
        /// When to try again.
        retry_after: Duration,
    },
    /// A good key, and more requests than one caller may send.
    #[error("this caller sends more requests than one may")]
    TooManyRequests {
        /// When to try again.
        retry_after: Duration,
    },
    /// The caller may see this but not do it.
    #[error("your role does not include this")]
    Forbidden,
    /// The caller's role includes this, and what he reaches is too little for it.
    #[error("this shows what belongs to everybody: it needs grants of all accounts, clusters and namespaces")]
    NeedsAllGrants,
    /// There is no such route.
    #[error("there is nothing at this path")]
    NoRoute,
    /// The path is there, the method is not.
    #[error("this path takes only {0}")]
    MethodNotAllowed(String),
    /// Anything that actix refused by itself, such as a path that is not UTF-8.
    #[error("the request is not well-formed")]
    BadRequest,
    /// Our fault; the cause is logged and never sent.
    #[error("internal error")]
    Internal(#[source] anyhow::Error),
}

impl From<Vec<FieldError>> for ApiError {
    fn from(errors: Vec<FieldError>) -> Self {
        Self::Service(ServiceError::Invalid(errors))
    }
}

impl ApiError {
    /// Whether it says of something that there is none, where there may be one that the caller shall not know of.
    pub fn may_hide(&self) -> bool {
        use ServiceError as E;
        matches!(
            self,
            Self::Service(E::NotFound { .. } | E::Hidden { .. } | E::NotGranted { .. } | E::UnknownAccounts { .. })
        )
    }

    /// One refused field.
    pub fn field(field: &str, detail: impl ToString) -> Self {
        vec![FieldError::new(field, detail)].into()
    }

    /// Status, slug and title: one table for answers, metrics and documents.
    fn parts(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        match self {
            Self::Service(error) => service_parts(error),
            Self::MalformedJson(_) => (S::BAD_REQUEST, "malformed-json", "The body is not JSON"),
            Self::BodyTooLarge(_) => (S::PAYLOAD_TOO_LARGE, "body-too-large", "The body is too large"),
            Self::BodyTimeout => (S::REQUEST_TIMEOUT, "body-timeout", "The body came too slowly"),
            Self::BodyUnreadable => (S::BAD_REQUEST, "body-unreadable", "The body could not be read"),
            Self::UnsupportedMediaType(_) => {
                (S::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "The body's media type is not supported")
            }
            Self::NotAcceptable(_) => (S::NOT_ACCEPTABLE, "not-acceptable", "No acceptable media type"),
            Self::Unauthenticated(_) => (S::UNAUTHORIZED, "unauthenticated", "A valid API key is needed"),
            Self::InvalidToken => (S::UNAUTHORIZED, "invalid-token", "The token is not valid"),
            Self::NoMatchingRule => (S::FORBIDDEN, "no-matching-rule", "No rule takes this token"),
            Self::IssuerUnavailable { .. } => {
                (S::SERVICE_UNAVAILABLE, "issuer-unavailable", "The token's issuer is not available")
            }
            Self::TooManyAttempts { .. } => (S::TOO_MANY_REQUESTS, "too-many-attempts", "Too many attempts"),
            Self::TooManyRequests { .. } => (S::TOO_MANY_REQUESTS, "too-many-requests", "Too many requests"),
            Self::Forbidden | Self::NeedsAllGrants => (S::FORBIDDEN, "forbidden", "Not allowed"),
            Self::NoRoute => (S::NOT_FOUND, "not-found", "Not found"),
            Self::MethodNotAllowed(_) => (S::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed"),
            Self::BadRequest => (S::BAD_REQUEST, "bad-request", "The request is not well-formed"),
            Self::Internal(_) => internal_parts(),
        }
    }

    fn errors(&self) -> &[FieldError] {
        match self {
            Self::Service(ServiceError::Invalid(errors) | ServiceError::UnknownAccounts { errors, .. }) => errors,
            _ => &[],
        }
    }

    /// What the caller reads: for errors of ours, nothing of their cause.
    fn detail(&self) -> String {
        match self {
            Self::Service(ServiceError::Invalid(errors) | ServiceError::UnknownAccounts { errors, .. }) => {
                let all = errors.iter().map(sentence).collect::<Vec<_>>();
                all.join("; ")
            }
            error if error.parts().0 == StatusCode::INTERNAL_SERVER_ERROR => {
                "something went wrong inside regcred; its log has the cause under this request id".to_owned()
            }
            error => error.to_string(),
        }
    }

    /// The refused field, where somebody else refused it: an API server, a registry.
    fn remote_field(&self) -> Option<FieldError> {
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
            _ => None,
        }
    }

    fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::TooManyAttempts { retry_after } | Self::TooManyRequests { retry_after } => {
                Some(retry_after.as_secs() + 1)
            }
            Self::IssuerUnavailable { retry_after } => Some(retry_after.as_secs().max(1)),
            Self::Service(ServiceError::Storage(StorageError::Unavailable(_)) | ServiceError::Audit(_)) => Some(1),
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

fn internal_parts() -> (StatusCode, &'static str, &'static str) {
    (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error")
}

fn service_parts(error: &ServiceError) -> (StatusCode, &'static str, &'static str) {
    use StatusCode as S;
    match error {
        ServiceError::Invalid(_) | ServiceError::UnknownAccounts { .. } => {
            (S::UNPROCESSABLE_ENTITY, "invalid-request", "The request is not valid")
        }
        ServiceError::NotFound { .. } | ServiceError::Hidden { .. } => (S::NOT_FOUND, "not-found", "Not found"),
        ServiceError::Audit(_) => (S::SERVICE_UNAVAILABLE, "audit-unavailable", "The audit record cannot be written"),
        ServiceError::NotGranted { .. } | ServiceError::Trusted { .. } => (S::FORBIDDEN, "forbidden", "Not allowed"),
        ServiceError::LastAdmin => (S::CONFLICT, "last-admin", "Nobody could make API keys any more"),
        ServiceError::InUse { .. } => (S::CONFLICT, "in-use", "Something uses it"),
        ServiceError::TooManyStreams { .. } => (S::TOO_MANY_REQUESTS, "too-many-streams", "Too many streams"),
        ServiceError::StreamsExhausted => (S::SERVICE_UNAVAILABLE, "streams-exhausted", "No stream is free"),
        ServiceError::Deleting(_) => (S::CONFLICT, "pull-secret-deleting", "The pull secret is being deleted"),
        ServiceError::NameTaken(_) => (S::CONFLICT, "name-taken", "The name is in use"),
        ServiceError::AudienceTaken => (S::CONFLICT, "audience-taken", "The audience is in use"),
        ServiceError::Stale { .. } => (S::PRECONDITION_FAILED, "stale-version", "The resource was changed meanwhile"),
        ServiceError::Render(RenderError::KeyCollision { .. }) => {
            (S::CONFLICT, "key-collision", "Two accounts claim one key")
        }
        ServiceError::Render(RenderError::Unsupported { .. }) => {
            (S::UNPROCESSABLE_ENTITY, "profile-unsupported", "This profile cannot express these accounts")
        }
        ServiceError::Cluster(error) => cluster_parts(error),
        ServiceError::VerificationFailed(_) => {
            (S::UNPROCESSABLE_ENTITY, "verification-failed", "The login was not verified")
        }
        ServiceError::Storage(StorageError::Unavailable(_)) => {
            (S::SERVICE_UNAVAILABLE, "database-unavailable", "The database is not available")
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

fn cluster_parts(error: &ClusterError) -> (StatusCode, &'static str, &'static str) {
    use StatusCode as S;
    let (status, title) = match error {
        ClusterError::SecretExists => (S::CONFLICT, "The Secret exists already"),
        ClusterError::NamespaceNotFound => (S::NOT_FOUND, "There is no such namespace"),
        ClusterError::NamespaceTerminating => (S::CONFLICT, "The namespace is being deleted"),
        ClusterError::InvalidSecret { .. } => (S::UNPROCESSABLE_ENTITY, "The cluster does not take this Secret"),
        ClusterError::TypeFixed | ClusterError::Immutable => (S::CONFLICT, "The Secret cannot be changed so"),
        ClusterError::Changed => (S::CONFLICT, "The Secret was changed meanwhile"),
        ClusterError::Refused { .. } => (S::CONFLICT, "A policy of the cluster refused the Secret"),
        ClusterError::Unauthorized => (S::BAD_GATEWAY, "The cluster does not know regcred"),
        ClusterError::Forbidden { .. } => (S::BAD_GATEWAY, "regcred lacks a right in the cluster"),
        ClusterError::Unreachable { .. }
        | ClusterError::Tls { .. }
        | ClusterError::Overloaded { .. }
        | ClusterError::Misconfigured { .. } => (S::BAD_GATEWAY, "The cluster cannot be reached"),
        ClusterError::Timeout { .. } => (S::GATEWAY_TIMEOUT, "The cluster gave no answer in time"),
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
    /// What kind of problem it is; programs decide on this.
    #[serde(rename = "type")]
    #[schema(example = "https://regcred.dev/problems/invalid-request")]
    pub problem_type: String,
    /// The kind, for people.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What happened, and what to do about it.
    pub detail: String,
    /// Path of the request.
    pub instance: String,
    /// Id of the request, as in the log and in `X-Request-Id`.
    pub request_id: String,
    /// The fields that were refused, where there are any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldProblem>,
}

/// One refused field.
#[derive(Debug, Serialize, ToSchema)]
pub struct FieldProblem {
    /// JSON path of the field, as in `accounts[1]`.
    pub field: String,
    /// What is wrong with it.
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

    /// The bare status; [`write_problems`], which knows the request, writes the body.
    fn error_response(&self) -> HttpResponse {
        HttpResponse::new(self.status_code())
    }
}

/// Middleware that writes the problem of every request that failed, and logs the cause of what is our fault.
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

/// An error that actix made itself, before or beside our own extractors.
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
        tracing::error!(problem = slug, cause = %chain(error), "the request failed");
    } else {
        tracing::debug!(problem = slug, "the request was refused");
    }
    let request = response.request();
    let request_id = RequestMeta::of(request).map(|meta| meta.id.to_string());
    let fields = error.errors().iter().cloned().chain(error.remote_field());
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
    // The rest of a body that was refused unread must not be taken for the next request.
    if matches!(error, ApiError::BodyTooLarge(_) | ApiError::BodyTimeout | ApiError::BodyUnreadable) {
        builder.force_close();
    }
    match serde_json::to_string(&problem) {
        Ok(body) => builder.body(body),
        Err(_) => builder.finish(),
    }
}

/// An error and all its causes in one line, for the log.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(line, ": {error}");
        cause = error.source();
    }
    line
}
