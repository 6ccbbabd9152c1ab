//! `/v1/me`

use actix_web::{HttpResponse, get};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::grants::GrantsDocument,
    http::{
        auth::{Caller, permission::Authenticated},
        problem::ApiError,
    },
};

/// Who is calling.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Me {
    /// What he is.
    #[schema(example = "apiKey")]
    r#type: &'static str,
    /// Id of the API key; `null` for a caller without one.
    id: Option<Uuid>,
    /// Name of the API key; of a caller with a token, the name of its identity provider and the subject.
    name: String,
    /// His role.
    role: &'static str,
    /// What it reaches, with every kind said.
    grants: GrantsDocument,
    /// When the key or token ends; `null` for never.
    expires_at: Option<DateTime<Utc>>,
}

/// Show who is calling, and what he reaches.
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
        expires_at: identity.expires_at,
    }))
}
