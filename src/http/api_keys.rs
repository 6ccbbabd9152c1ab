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
    domain::{
        caller::{ApiKeyFields, Call, NewApiKey, Role},
        grants::GrantsDocument,
    },
    http::{
        auth::{
            Caller,
            permission::{ReadApiKeys, WriteApiKeys},
        },
        body::Json,
        idempotency::{Idempotency, IdempotencyKeyHeader},
        paging::{Page, PageQuery},
        problem::ApiError,
    },
    service::{ServiceError, api_keys::ApiKeys, idempotency::IdempotencyError},
    storage::api_keys::ApiKey as StoredApiKey,
};

/// API key to create.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateApiKey {
    /// Name, a DNS-1123 label, unique among the keys that are not revoked.
    #[schema(example = "ci-team-a")]
    name: String,
    /// Role.
    #[schema(value_type = Role, example = "deliverer")]
    role: String,
    /// Grants. An admin has access to everything and takes no grants.
    grants: Option<GrantsDocument>,
    /// Networks, such as `10.0.0.0/8`, that the key may be used from. Without any, it may be used
    /// from everywhere.
    #[schema(max_items = 100, example = json!(["10.0.0.0/8"]))]
    source_cidrs: Option<Vec<String>>,
    /// Time of expiry. Without it the key does not expire. Required if the configuration limits the
    /// lifetime of keys.
    expires_at: Option<DateTime<Utc>>,
}

/// API key, without its secret.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiKey {
    /// Immutable identifier, also the first part of the key.
    id: Uuid,
    /// Name.
    name: String,
    /// Role.
    #[schema(value_type = Role)]
    role: &'static str,
    /// Effective grants.
    grants: GrantsDocument,
    /// Networks that the key may be used from; empty for any.
    #[schema(example = json!(["10.0.0.0/8"]))]
    source_cidrs: Vec<String>,
    /// Time of creation.
    created_at: DateTime<Utc>,
    /// Time of expiry; `null` if the key does not expire.
    expires_at: Option<DateTime<Utc>>,
    /// Time of revocation; `null` if the key is not revoked.
    revoked_at: Option<DateTime<Utc>>,
}

/// New API key.
#[derive(Serialize, ToSchema)]
pub struct CreatedApiKey {
    #[serde(flatten)]
    api_key: ApiKey,
    /// The key. Only this response contains it.
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
            source_cidrs: stored.source_networks.to_texts(),
            created_at: stored.created_at,
            expires_at: stored.expires_at,
            revoked_at: stored.revoked_at,
        }
    }
}

/// Create an API key. Only this response contains the key.
///
/// A retry with the same `Idempotency-Key` gets 409 `idempotency-key-replayed`.
#[utoipa::path(
    tag = "api-keys",
    params(IdempotencyKeyHeader),
    request_body = CreateApiKey,
    responses((status = CREATED, body = CreatedApiKey, headers(("Location" = String, description = "Path of the key")))),
)]
#[post("/api-keys")]
pub async fn create_api_key(
    caller: Caller<WriteApiKeys>,
    api_keys: Data<ApiKeys>,
    idempotency: Idempotency,
    body: Json<CreateApiKey>,
) -> Result<HttpResponse, ApiError> {
    let CreateApiKey { name, role, grants, source_cidrs, expires_at } = body.0;
    let fields = ApiKeyFields { name: &name, role: &role, grants, source_cidrs, expires_at };
    let new = NewApiKey::parse(fields, crate::clock::now(), api_keys.lifetime_max())?;
    let create = async |call: &Call| api_keys.create(call, &new).await;
    // The text of the key cannot be read again.
    let performed = async |_: &Call| Err(IdempotencyError::Performed.into());
    let (stored, created) = idempotency.once(&caller.identity, create, performed).await?;
    Ok(HttpResponse::Created()
        .insert_header((LOCATION, format!("/v1/api-keys/{}", stored.id)))
        .insert_header((CACHE_CONTROL, "no-store"))
        .json(CreatedApiKey { api_key: stored.into(), key: created.text.expose_secret().to_owned() }))
}

/// List API keys, oldest first, including revoked and expired keys.
#[utoipa::path(
    tag = "api-keys",
    params(PageQuery<Uuid>),
    responses((status = OK, body = Page<ApiKey>)),
)]
#[get("/api-keys")]
pub async fn list_api_keys(
    caller: Caller<ReadApiKeys, PageQuery<Uuid>>,
    api_keys: Data<ApiKeys>,
) -> Result<HttpResponse, ApiError> {
    let page_query = &caller.query;
    let found = api_keys.list(&caller.identity, page_query.after().copied(), page_query.rows()).await?;
    let page: Page<ApiKey> = Page::of(found, page_query, |key| key.id.to_string());
    Ok(HttpResponse::Ok().json(page))
}

/// Get an API key, without its secret.
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

/// Revoke an API key. Idempotent.
///
/// The last valid admin key cannot be revoked: create another one first.
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

/// Parses the id of a key in a path. An invalid id is a key that does not exist.
fn path_id(id: &str) -> Result<Uuid, ApiError> {
    Uuid::try_parse(id)
        .map_err(|_| ServiceError::NotFound { kind: "API key", name: id.chars().take(100).collect() }.into())
}
