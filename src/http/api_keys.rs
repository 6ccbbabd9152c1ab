//! `/v1/api-keys`

use actix_web::{
    HttpResponse, delete, get,
    http::header::{CACHE_CONTROL, LOCATION},
    post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{caller::NewApiKey, grants::GrantsDocument},
    http::{
        auth::{
            Caller,
            permission::{ReadApiKeys, WriteApiKeys},
        },
        body::Json,
        paging::{Page, PageParams, PageQuery, page_by_id},
        problem::ApiError,
    },
    service::{ServiceError, api_keys::ApiKeys},
    storage::api_keys::ApiKey as StoredApiKey,
};

/// An API key to be made.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateApiKey {
    /// A DNS-1123 label, unique among the keys that are not revoked.
    #[schema(example = "ci-team-a")]
    name: String,
    /// `admin`, `operator`, `deliverer`, `renderer` or `viewer`.
    #[schema(example = "deliverer")]
    role: String,
    /// What it reaches; an admin reaches everything and takes none.
    grants: Option<GrantsDocument>,
    /// When it ends; never if not said.
    expires_at: Option<DateTime<Utc>>,
}

/// An API key; nothing of its secret.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiKey {
    /// Identity of the key, also the first part of its text.
    id: Uuid,
    /// Name of the key.
    name: String,
    /// Role of the key.
    role: &'static str,
    /// What it reaches, with every kind said.
    grants: GrantsDocument,
    /// When it was made.
    created_at: DateTime<Utc>,
    /// When it ends; `null` for never.
    expires_at: Option<DateTime<Utc>>,
    /// When it was revoked; `null` for one that was not.
    revoked_at: Option<DateTime<Utc>>,
}

/// A new API key.
#[derive(Serialize, ToSchema)]
pub struct CreatedApiKey {
    #[serde(flatten)]
    api_key: ApiKey,
    /// The key itself. It is shown this once.
    #[schema(format = Password, example = "rgc_…")]
    key: String,
}

impl From<StoredApiKey> for ApiKey {
    fn from(stored: StoredApiKey) -> Self {
        Self {
            id: stored.id,
            name: stored.name,
            role: stored.role.as_str(),
            grants: GrantsDocument::from(&stored.grants),
            created_at: stored.created_at,
            expires_at: stored.expires_at,
            revoked_at: stored.revoked_at,
        }
    }
}

/// Make an API key. The answer is the only one that shows it.
#[utoipa::path(
    tag = "api-keys",
    request_body = CreateApiKey,
    responses((status = CREATED, body = CreatedApiKey, headers(("Location" = String, description = "Path of the key")))),
)]
#[post("/api-keys")]
pub async fn create_api_key(
    caller: Caller<WriteApiKeys>,
    api_keys: Data<ApiKeys>,
    body: Json<CreateApiKey>,
) -> Result<HttpResponse, ApiError> {
    let CreateApiKey { name, role, grants, expires_at } = body.0;
    let new = NewApiKey::parse(&name, &role, grants, expires_at, crate::clock::now())?;
    let (stored, made) = api_keys.create(&caller.identity, &new).await?;
    Ok(HttpResponse::Created()
        .insert_header((LOCATION, format!("/v1/api-keys/{}", stored.id)))
        .insert_header((CACHE_CONTROL, "no-store"))
        .json(CreatedApiKey { api_key: stored.into(), key: made.text.expose_secret().to_owned() }))
}

/// List API keys, the oldest first; revoked and expired ones too.
#[utoipa::path(
    tag = "api-keys",
    params(PageParams),
    responses((status = OK, body = Page<ApiKey>)),
)]
#[get("/api-keys")]
pub async fn list_api_keys(
    caller: Caller<ReadApiKeys>,
    api_keys: Data<ApiKeys>,
    query: PageQuery,
) -> Result<HttpResponse, ApiError> {
    let cursor = query.0.after.as_deref().map(Uuid::try_parse).transpose();
    let after = cursor.map_err(|_| ApiError::field("cursor", "must be the `next` of an earlier page"))?;
    let found = api_keys.list(&caller.identity, after, query.0.limit).await?;
    let page: Page<ApiKey> = page_by_id(found, &query.0, |key| key.id);
    Ok(HttpResponse::Ok().json(page))
}

/// Show an API key, without its text.
#[utoipa::path(
    tag = "api-keys",
    params(("id" = String, Path, description = "Id of the key")),
    responses((status = OK, body = ApiKey)),
)]
#[get("/api-keys/{id}")]
pub async fn get_api_key(
    caller: Caller<ReadApiKeys>,
    api_keys: Data<ApiKeys>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let found = api_keys.find(&caller.identity, path_id(&path)?).await?;
    Ok(HttpResponse::Ok().json(ApiKey::from(found)))
}

/// Revoke an API key, at once. To do so again changes nothing.
///
/// The last admin's key is kept: make another one first.
#[utoipa::path(
    tag = "api-keys",
    params(("id" = String, Path, description = "Id of the key")),
    responses((status = NO_CONTENT)),
)]
#[delete("/api-keys/{id}")]
pub async fn revoke_api_key(
    caller: Caller<WriteApiKeys>,
    api_keys: Data<ApiKeys>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    api_keys.revoke(&caller.identity, path_id(&path)?).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// A key's id from a path: what cannot be an id names nothing.
fn path_id(id: &str) -> Result<Uuid, ApiError> {
    Uuid::try_parse(id)
        .map_err(|_| ServiceError::NotFound { kind: "API key", name: id.chars().take(100).collect() }.into())
}
