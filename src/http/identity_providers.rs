//! `/v1/identity-providers`

use actix_web::{
    HttpResponse, delete, get,
    http::header::LOCATION,
    patch, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{
        cluster::CaCertificate,
        identity_provider::{AuthMethod, ProviderConfig, ProviderDocument, ProviderType, RuleDocument},
        invalid::{FieldError, FieldErrors},
        names::Name,
    },
    http::{
        auth::{
            Caller,
            permission::{ReadIdentityProviders, WriteIdentityProviders},
        },
        body::{Json, MergePatch},
        conditional::{IfMatch, etag},
        merge_patch,
        paging::{Page, PageParams, PageQuery, page},
        path_name,
        problem::ApiError,
    },
    service::identity_providers::{IdentityProviders, ProviderChange},
    storage::identity_providers::StoredProvider,
};

/// An identity provider to be trusted.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateIdentityProvider {
    /// Unique name, a DNS-1123 label.
    #[schema(example = "gitlab")]
    name: String,
    /// How tokens are verified: by the keys of an OIDC issuer, or by asking the cluster that made them.
    #[serde(rename = "type")]
    provider_type: ProviderType,
    /// For `oidc`: the `iss` of its tokens, letter by letter. An `https://` URL.
    #[schema(example = "https://gitlab.example.com")]
    issuer: Option<String>,
    /// For `oidc`: PEM of the CA that signed the certificate of the issuer's host, beside those that regcred's host trusts.
    ca_certificate: Option<String>,
    /// For `tokenReview`: name of the registered cluster that reviews the tokens.
    cluster: Option<String>,
    /// The `aud` that a token must have. One that was made for somebody else is never taken.
    #[schema(example = "regcred")]
    audience: String,
    /// Who bearers are: the first rule whose claims all match decides. If none does, the answer is 403.
    rules: Vec<RuleDocument>,
}

impl CreateIdentityProvider {
    fn parse(self) -> Result<(Name, ProviderConfig), Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let name = errors.take("name", Name::parse(&self.name));
        let config = errors.take_all(ProviderConfig::parse(ProviderDocument {
            provider_type: self.provider_type,
            issuer: self.issuer,
            ca_certificate: self.ca_certificate,
            cluster: self.cluster,
            audience: self.audience,
            rules: self.rules,
        }));
        errors.finish(|| name.zip(config))
    }
}

/// A change of an identity provider, as a JSON merge patch. `rules` are replaced as a whole. The type is for good.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdateIdentityProvider {
    /// Another issuer.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    issuer: Option<String>,
    /// Another CA; `null` for those that regcred's host trusts alone.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    ca_certificate: Option<Option<String>>,
    /// Another cluster.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    cluster: Option<String>,
    /// Another audience.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    audience: Option<String>,
    /// Other rules, all of them.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    rules: Option<Vec<RuleDocument>>,
}

impl From<UpdateIdentityProvider> for ProviderChange {
    fn from(body: UpdateIdentityProvider) -> Self {
        let UpdateIdentityProvider { issuer, ca_certificate, cluster, audience, rules } = body;
        Self { issuer, ca_certificate, cluster, audience, rules }
    }
}

/// An identity provider: whose tokens are taken in place of API keys, and what they stand for.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct IdentityProvider {
    /// Identity that survives everything.
    id: Uuid,
    /// Unique name.
    name: String,
    /// How tokens are verified.
    #[serde(rename = "type")]
    provider_type: ProviderType,
    /// The `iss` of its tokens; `null` for `tokenReview`.
    issuer: Option<String>,
    /// PEM of the CA that signed the certificate of the issuer's host.
    ca_certificate: Option<String>,
    /// Name of the cluster that reviews the tokens; `null` for `oidc`.
    cluster: Option<String>,
    /// The `aud` that a token must have.
    audience: String,
    /// Who bearers are, with every kind of grant said.
    rules: Vec<RuleDocument>,
    /// Grows by one with every change.
    version: i64,
    /// When it was created.
    created_at: DateTime<Utc>,
    /// When it was changed last.
    updated_at: DateTime<Utc>,
}

impl From<StoredProvider> for IdentityProvider {
    fn from(stored: StoredProvider) -> Self {
        let provider_type = stored.config.auth_method.provider_type();
        let (issuer, ca_certificate, cluster) = match &stored.config.auth_method {
            AuthMethod::Oidc { issuer, ca_certificate } => {
                let ca_certificate = ca_certificate.as_ref().map(CaCertificate::as_pem);
                (Some(issuer.to_string()), ca_certificate.map(str::to_owned), None)
            }
            AuthMethod::TokenReview { cluster } => (None, None, Some(cluster.to_string())),
        };
        Self {
            id: stored.id,
            name: stored.name,
            provider_type,
            issuer,
            ca_certificate,
            cluster,
            audience: stored.config.audience.as_str().to_owned(),
            rules: stored.config.rules.iter().map(RuleDocument::from).collect(),
            version: stored.version,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

/// Trust an identity provider.
///
/// Its tokens are taken as `Authorization: Bearer` from then on. Nothing is sent to it now.
#[utoipa::path(
    tag = "identity-providers",
    request_body = CreateIdentityProvider,
    responses((status = CREATED, body = IdentityProvider, headers(
        ("Location" = String, description = "Path of the provider"),
        ("ETag" = String, description = "Version of the provider"),
    ))),
)]
#[post("/identity-providers")]
pub async fn create_identity_provider(
    caller: Caller<WriteIdentityProviders>,
    providers: Data<IdentityProviders>,
    body: Json<CreateIdentityProvider>,
) -> Result<HttpResponse, ApiError> {
    let (name, config) = body.0.parse()?;
    let provider = providers.create(&caller.identity, &name, &config).await?;
    Ok(HttpResponse::Created()
        .insert_header((LOCATION, format!("/v1/identity-providers/{name}")))
        .insert_header(etag(provider.version))
        .json(IdentityProvider::from(provider)))
}

/// List identity providers by name.
#[utoipa::path(
    tag = "identity-providers",
    params(PageParams),
    responses((status = OK, body = Page<IdentityProvider>)),
)]
#[get("/identity-providers")]
pub async fn list_identity_providers(
    caller: Caller<ReadIdentityProviders>,
    providers: Data<IdentityProviders>,
    query: PageQuery,
) -> Result<HttpResponse, ApiError> {
    let found = providers.list(&caller.identity, &query.0).await?;
    let page: Page<IdentityProvider> = page(found, &query.0, |provider| &provider.name);
    Ok(HttpResponse::Ok().json(page))
}

/// Show an identity provider.
#[utoipa::path(
    tag = "identity-providers",
    params(("name" = String, Path, description = "Name of the provider")),
    responses((status = OK, body = IdentityProvider, headers(("ETag" = String, description = "Version of the provider")))),
)]
#[get("/identity-providers/{name}")]
pub async fn get_identity_provider(
    caller: Caller<ReadIdentityProviders>,
    providers: Data<IdentityProviders>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let provider = providers.find(&caller.identity, &path_name("identity provider", &path)?).await?;
    Ok(HttpResponse::Ok().insert_header(etag(provider.version)).json(IdentityProvider::from(provider)))
}

/// Change an identity provider. It counts for the next request.
#[utoipa::path(
    tag = "identity-providers",
    params(
        ("name" = String, Path, description = "Name of the provider"),
        ("If-Match" = Option<String>, Header, description = "Change only this version (its ETag)"),
    ),
    request_body(content(
        (UpdateIdentityProvider = "application/merge-patch+json"),
        (UpdateIdentityProvider = "application/json"),
    )),
    responses((status = OK, body = IdentityProvider, headers(("ETag" = String, description = "Version of the provider")))),
)]
#[patch("/identity-providers/{name}")]
pub async fn update_identity_provider(
    caller: Caller<WriteIdentityProviders>,
    providers: Data<IdentityProviders>,
    path: Path<String>,
    expected: IfMatch,
    body: MergePatch<UpdateIdentityProvider>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("identity provider", &path)?;
    let provider = providers.change(&caller.identity, &name, body.0.into(), expected.0).await?;
    Ok(HttpResponse::Ok().insert_header(etag(provider.version)).json(IdentityProvider::from(provider)))
}

/// Delete an identity provider. Its tokens are refused from the next request on.
#[utoipa::path(
    tag = "identity-providers",
    params(
        ("name" = String, Path, description = "Name of the provider"),
        ("If-Match" = Option<String>, Header, description = "Delete only this version (its ETag)"),
    ),
    responses((status = NO_CONTENT)),
)]
#[delete("/identity-providers/{name}")]
pub async fn delete_identity_provider(
    caller: Caller<WriteIdentityProviders>,
    providers: Data<IdentityProviders>,
    path: Path<String>,
    expected: IfMatch,
) -> Result<HttpResponse, ApiError> {
    providers.remove(&caller.identity, &path_name("identity provider", &path)?, expected.0).await?;
    Ok(HttpResponse::NoContent().finish())
}
