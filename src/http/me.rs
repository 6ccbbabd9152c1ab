//! `/v1/me`

use actix_web::{HttpResponse, get};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{caller::Permission, grants::GrantsDocument},
    http::{
        auth::{Caller, permission::Authenticated},
        problem::ApiError,
    },
};

/// The caller.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Me {
    /// Type of caller: `apiKey` or `identityProvider`.
    #[schema(example = "apiKey")]
    r#type: &'static str,
    /// Identifier of the API key; `null` for a token.
    id: Option<Uuid>,
    /// Name of the API key; for a token, the name of the identity provider and the subject.
    name: String,
    /// Role.
    role: &'static str,
    /// Effective grants.
    grants: GrantsDocument,
    /// Permissions of the role, as far as the grants are sufficient for them.
    #[schema(example = json!(["authenticated", "readAccounts", "revealCredentials"]))]
    permissions: Vec<&'static str>,
    /// Time at which the key or token expires; `null` if it does not.
    expires_at: Option<DateTime<Utc>>,
}

/// Get the caller: its identity, role, grants and permissions.
#[utoipa::path(tag = "api-keys", responses((status = OK, body = Me)))]
#[get("/me")]
pub async fn get_me(caller: Caller<Authenticated>) -> Result<HttpResponse, ApiError> {
    let identity = &caller.identity;
    Ok(HttpResponse::Ok().json(Me {
        r#type: identity.actor.kind.as_str(),
        id: identity.actor.id,
        name: identity.actor.name.clone(),
        role: identity.role.as_str(),
        grants: GrantsDocument::from(&identity.grants),
        permissions: identity.permissions().map(Permission::as_str).collect(),
        expires_at: identity.expires_at,
    }))
}
