//! `/v1/me`

use actix_web::{HttpRequest, HttpResponse, get};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{
        caller::{ActorKind, Permission, Role},
        grants::GrantsDocument,
    },
    http::{
        auth::{Caller, is_open_to_sessions, permission::Authenticated},
        problem::ApiError,
        sessions::{CurrentSession, Session},
    },
};

/// The caller.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Me {
    /// Type of caller: `apiKey` or `identityProvider`.
    #[schema(value_type = ActorKind, example = "apiKey")]
    r#type: &'static str,
    /// Identifier of the API key; `null` for a token.
    id: Option<Uuid>,
    /// Name of the API key; for a token, the name of the identity provider and the subject.
    name: String,
    /// Role.
    #[schema(value_type = Role)]
    role: &'static str,
    /// Effective grants.
    grants: GrantsDocument,
    /// Permissions of the role, as far as the grants are sufficient for them. A session has no
    /// `revealCredentials`.
    #[schema(example = json!(["authenticated", "readAccounts", "revealCredentials"]))]
    permissions: Vec<&'static str>,
    /// Networks that the API key may be used from; empty for any.
    #[schema(example = json!(["10.0.0.0/8"]))]
    source_cidrs: Vec<String>,
    /// Time at which the key or token expires; `null` if it does not.
    expires_at: Option<DateTime<Utc>>,
    /// Session of the web console that the request was made with; `null` for a key or token.
    session: Option<Session>,
}

/// Get the caller: its identity, role, grants and permissions.
#[utoipa::path(tag = "api-keys", responses((status = OK, body = Me)))]
#[get("/me")]
pub async fn get_me(caller: Caller<Authenticated>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let identity = &caller.identity;
    let session = CurrentSession::of(&request);
    let is_usable = |permission: &Permission| session.is_none() || is_open_to_sessions(*permission);
    Ok(HttpResponse::Ok().json(Me {
        r#type: identity.actor.kind.as_str(),
        id: identity.actor.id,
        name: identity.actor.name.clone(),
        role: identity.role.as_str(),
        grants: GrantsDocument::from(&identity.grants),
        permissions: identity.permissions().filter(is_usable).map(Permission::as_str).collect(),
        source_cidrs: identity.source_networks.to_texts(),
        expires_at: identity.expires_at,
        session: session.as_deref().map(|current| Session::seen_by(current.clone(), Some(current))),
    }))
}
