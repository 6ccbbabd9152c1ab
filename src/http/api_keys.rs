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
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::{
        caller::{ApiKeyFields, Call, NewApiKey, Role},
        grants::GrantsDocument,
        listing::{ApiKeySort, ApiKeyState, NamePart},
    },
    http::{
        accounts::seconds,
        auth::{
            Caller,
            permission::{ReadApiKeys, WriteApiKeys},
        },
        body::Json,
        idempotency::{Idempotency, IdempotencyKeyHeader},
        paging::{ListQuery, Page},
        problem::ApiError,
        query::{DryRunQuery, FromQuery, Query},
    },
    service::{
        CursorKey,
        api_keys::{ApiKeys, KeySelector},
        idempotency::IdempotencyError,
    },
    storage::api_keys::{ApiKey as StoredApiKey, ApiKeyFilter},
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
    /// The key. Only this response contains it. Empty for a dry run.
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
    params(DryRunQuery, IdempotencyKeyHeader),
    request_body = CreateApiKey,
    responses((status = CREATED, body = CreatedApiKey, headers(("Location" = String, description = "Path of the key")))),
)]
#[post("/api-keys")]
pub async fn create_api_key(
    caller: Caller<WriteApiKeys, DryRunQuery>,
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
    if caller.identity.dry_run {
        return Ok(HttpResponse::Ok().json(CreatedApiKey { api_key: stored.into(), key: String::new() }));
    }
    Ok(HttpResponse::Created()
        .insert_header((LOCATION, format!("/v1/api-keys/{}", stored.id)))
        .insert_header((CACHE_CONTROL, "no-store"))
        .json(CreatedApiKey { api_key: stored.into(), key: created.text.expose_secret().to_owned() }))
}

/// Filter of a list of API keys.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ApiKeyFilterQuery {
    /// Lists only keys whose name contains this part, in any case.
    #[param(value_type = Option<String>, example = "ci")]
    q: Option<NamePart>,
    /// Lists only keys in this state.
    #[param(inline)]
    state: Option<ApiKeyState>,
    /// Lists only keys that expire within this time or have expired: days (`30d`) or hours (`12h`).
    #[param(value_type = Option<String>, rename = "expiresWithin", example = "30d")]
    expires_within_seconds: Option<i64>,
}

impl FromQuery for ApiKeyFilterQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self {
            q: query.one("q", NamePart::parse),
            state: query.one("state", str::parse),
            expires_within_seconds: query.one("expiresWithin", seconds),
        }
    }
}

impl From<ApiKeyFilterQuery> for ApiKeyFilter {
    fn from(filter: ApiKeyFilterQuery) -> Self {
        let ApiKeyFilterQuery { q, state, expires_within_seconds } = filter;
        Self { name_part: q, state, expires_within_seconds }
    }
}

/// List API keys, including revoked and expired keys, by default oldest first.
///
/// A page may have fewer items than `limit`, or none, although `next` is set: with `q` or `state` it
/// searches at most 20,000 keys.
#[utoipa::path(
    tag = "api-keys",
    params(ListQuery<ApiKeySort, Uuid>, ApiKeyFilterQuery),
    responses((status = OK, body = Page<ApiKey>)),
)]
#[get("/api-keys")]
pub async fn list_api_keys(
    caller: Caller<ReadApiKeys, (ListQuery<ApiKeySort, Uuid>, ApiKeyFilterQuery)>,
    api_keys: Data<ApiKeys>,
    cursor_key: Data<CursorKey>,
) -> Result<HttpResponse, ApiError> {
    let (list_query, filter) = caller.query;
    let request = list_query.request(&cursor_key)?;
    let found = api_keys.list(&caller.identity, &request, &filter.into()).await?;
    let page: Page<ApiKey> = Page::listed(found, &list_query, &cursor_key)?;
    Ok(HttpResponse::Ok().json(page))
}

/// Get an API key, without its secret.
#[utoipa::path(
    tag = "api-keys",
    params(("id" = String, Path, description = "Id of the key, or its name while it is not revoked")),
    responses((status = OK, body = ApiKey)),
)]
#[get("/api-keys/{id}")]
pub async fn get_api_key(
    caller: Caller<ReadApiKeys>,
    api_keys: Data<ApiKeys>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let found = api_keys.find(&caller.identity, &KeySelector::parse(&path)).await?;
    Ok(HttpResponse::Ok().json(ApiKey::from(found)))
}

/// Revoke an API key. Idempotent by id; a name is free once its key is revoked.
///
/// The last valid admin key cannot be revoked: create another one first.
#[utoipa::path(
    tag = "api-keys",
    params(("id" = String, Path, description = "Id of the key, or its name while it is not revoked"), DryRunQuery),
    responses((status = NO_CONTENT)),
)]
#[delete("/api-keys/{id}")]
pub async fn revoke_api_key(
    caller: Caller<WriteApiKeys, DryRunQuery>,
    api_keys: Data<ApiKeys>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    api_keys.revoke(&caller.identity, &KeySelector::parse(&path)).await?;
    Ok(HttpResponse::NoContent().finish())
}
