//! Types of problems. The table is the only place that gives each its status, slug and title; the
//! OpenAPI document lists the slugs, and a test compares them with `docs/OPERATIONS.md`.

use std::borrow::Cow;

use actix_web::http::StatusCode;
use serde_json::json;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};

/// Prefix of problem types.
const TYPE_BASE: &str = "https://regcred.dev/problems/";

macro_rules! problem_types {
    ($($variant:ident = $status:ident, $slug:literal, $title:literal;)+) => {
        /// Type of a problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ProblemType {
            $(
                #[doc = concat!("`", $slug, "`")]
                $variant,
            )+
        }

        impl ProblemType {
            /// All types.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Status, slug and title.
            const fn parts(self) -> (StatusCode, &'static str, &'static str) {
                match self {
                    $(Self::$variant => (StatusCode::$status, $slug, $title),)+
                }
            }
        }
    };
}

#[rustfmt::skip]
problem_types! {
    BadRequest             = BAD_REQUEST,            "bad-request", "Malformed request";
    MalformedJson          = BAD_REQUEST,            "malformed-json", "The body is not JSON";
    BodyUnreadable         = BAD_REQUEST,            "body-unreadable", "The body is not readable";
    Unauthenticated        = UNAUTHORIZED,           "unauthenticated", "Authentication required";
    InvalidToken           = UNAUTHORIZED,           "invalid-token", "Invalid token";
    Forbidden              = FORBIDDEN,              "forbidden", "Not allowed";
    NoMatchingRule         = FORBIDDEN,              "no-matching-rule", "No rule matches the token";
    SessionRefused         = FORBIDDEN,              "session-refused", "A session is not accepted here";
    SourceNetworkRefused   = FORBIDDEN,              "source-network-refused", "The API key may not be used from this address";
    NotFound               = NOT_FOUND,              "not-found", "Not found";
    NamespaceNotFound      = NOT_FOUND,              "namespace-not-found", "Namespace not found";
    MethodNotAllowed       = METHOD_NOT_ALLOWED,     "method-not-allowed", "Method not allowed";
    NotAcceptable          = NOT_ACCEPTABLE,         "not-acceptable", "No acceptable media type";
    BodyTimeout            = REQUEST_TIMEOUT,        "body-timeout", "The body did not arrive in time";
    AudienceTaken          = CONFLICT,               "audience-taken", "The audience is in use";
    IdempotencyKeyInUse    = CONFLICT,               "idempotency-key-in-use", "A request with this key is in progress";
    IdempotencyKeyReplayed = CONFLICT,               "idempotency-key-replayed", "The request was performed before";
    InUse                  = CONFLICT,               "in-use", "The resource is in use";
    KeyCollision           = CONFLICT,               "key-collision", "Two accounts have the same key";
    LastAdmin              = CONFLICT,               "last-admin", "The last admin key cannot be revoked";
    NameTaken              = CONFLICT,               "name-taken", "The name is in use";
    NamespaceTerminating   = CONFLICT,               "namespace-terminating", "The namespace is being deleted";
    NotMinted              = CONFLICT,               "not-minted", "The account has no source";
    PullSecretDeleting     = CONFLICT,               "pull-secret-deleting", "The pull secret is being deleted";
    SecretChanged          = CONFLICT,               "secret-changed", "The Secret has changed";
    SecretExists           = CONFLICT,               "secret-exists", "The Secret already exists";
    SecretImmutable        = CONFLICT,               "secret-immutable", "The Secret is immutable";
    SecretRefused          = CONFLICT,               "secret-refused", "A policy of the cluster refused the Secret";
    SecretTypeFixed        = CONFLICT,               "secret-type-fixed", "The Secret is immutable";
    StaleVersion           = PRECONDITION_FAILED,    "stale-version", "The resource has changed";
    BodyTooLarge           = PAYLOAD_TOO_LARGE,      "body-too-large", "The body is too large";
    UnsupportedMediaType   = UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "Unsupported media type";
    IdempotencyKeyReused   = UNPROCESSABLE_ENTITY,   "idempotency-key-reused", "The key was used for another request";
    InvalidRequest         = UNPROCESSABLE_ENTITY,   "invalid-request", "Invalid request";
    InvalidSecret          = UNPROCESSABLE_ENTITY,   "invalid-secret", "The cluster refused the Secret";
    ProfileUnsupported     = UNPROCESSABLE_ENTITY,   "profile-unsupported", "The profile cannot express these accounts";
    VerificationFailed     = UNPROCESSABLE_ENTITY,   "verification-failed", "Verification failed";
    TooManyAttempts        = TOO_MANY_REQUESTS,      "too-many-attempts", "Too many failed authentications";
    TooManyRequests        = TOO_MANY_REQUESTS,      "too-many-requests", "Request rate limit exceeded";
    TooManyStreams         = TOO_MANY_REQUESTS,      "too-many-streams", "Too many event streams";
    Internal               = INTERNAL_SERVER_ERROR,  "internal", "Internal error";
    ClusterForbidden       = BAD_GATEWAY,            "cluster-forbidden", "regcred lacks a permission in the cluster";
    ClusterUnauthorized    = BAD_GATEWAY,            "cluster-unauthorized", "The cluster rejected the credential";
    ClusterUnreachable     = BAD_GATEWAY,            "cluster-unreachable", "Cluster unreachable";
    MintFailed             = BAD_GATEWAY,            "mint-failed", "The login was not minted";
    AuditUnavailable       = SERVICE_UNAVAILABLE,    "audit-unavailable", "Audit log unavailable";
    DatabaseUnavailable    = SERVICE_UNAVAILABLE,    "database-unavailable", "Database unavailable";
    IssuerUnavailable      = SERVICE_UNAVAILABLE,    "issuer-unavailable", "Token issuer unavailable";
    MintThrottled          = SERVICE_UNAVAILABLE,    "mint-throttled", "The provider limits requests";
    StreamsExhausted       = SERVICE_UNAVAILABLE,    "streams-exhausted", "No event stream available";
    ClusterTimeout         = GATEWAY_TIMEOUT,        "cluster-timeout", "The cluster did not respond in time";
    MintTimeout            = GATEWAY_TIMEOUT,        "mint-timeout", "The login was not minted in time";
}

impl ProblemType {
    /// HTTP status.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        self.parts().0
    }

    /// Last segment of the type; stable.
    #[must_use]
    pub const fn slug(self) -> &'static str {
        self.parts().1
    }

    /// Summary for people.
    #[must_use]
    pub const fn title(self) -> &'static str {
        self.parts().2
    }

    /// URI of the type.
    #[must_use]
    pub fn uri(self) -> String {
        format!("{TYPE_BASE}{}", self.slug())
    }
}

impl PartialSchema for ProblemType {
    fn schema() -> RefOr<Schema> {
        let uris = Self::ALL.iter().map(|one| json!(one.uri()));
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("Types of problems of this release. docs/OPERATIONS.md explains each."))
            .enum_values(Some(uris))
            .into()
    }
}

impl ToSchema for ProblemType {
    fn name() -> Cow<'static, str> {
        "ProblemType".into()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn slugs_are_unique_and_of_errors() {
        let slugs: BTreeSet<&str> = ProblemType::ALL.iter().map(|one| one.slug()).collect();
        assert_eq!(slugs.len(), ProblemType::ALL.len());
        for one in ProblemType::ALL {
            assert!(one.status().is_client_error() || one.status().is_server_error(), "{one:?}");
            assert!(one.slug().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{one:?}");
        }
    }
}
