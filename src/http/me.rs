//! `/v1/me`

use actix_web::{HttpResponse, get};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::http::{
    auth::{Caller, permission::Authenticated},
    problem::ApiError,
};

/// Who is calling.
#[derive(Debug, Serialize, ToSchema)]
pub struct Me {
    /// Id of the API key.
    id: Uuid,
    /// Name of the API key.
    name: String,
    /// Role of the API key.
    role: &'static str,
}

/// Show who is calling.
#[utoipa::path(tag = "api-keys", responses((status = OK, body = Me)))]
#[get("/me")]
pub async fn get_me(caller: Caller<Authenticated>) -> Result<HttpResponse, ApiError> {
    let identity = caller.identity;
    Ok(HttpResponse::Ok().json(Me { id: identity.key_id, name: identity.name, role: identity.role.as_str() }))
}
