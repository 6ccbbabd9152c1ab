//! `/v1/identity-providers`

use actix_web::{
    HttpResponse, delete, get, patch, post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{
        caller::Call,
        cluster::CaCertificate,
        identity_provider::{AuthMethod, LoginClient, ProviderConfig, ProviderDocument, ProviderType, RuleDocument},
        invalid::{FieldError, FieldErrors},
        listing::ResourceSort,
        names::Name,
    },
    http::{
        auth::{
            Caller,
            permission::{ReadIdentityProviders, WriteIdentityProviders},
        },
        body::{Json, MergePatch},
        conditional::{self, IfMatch},
        idempotency::{Idempotency, IdempotencyKeyHeader},
        merge_patch,
        paging::{ListQuery, NameQuery, Page},
        path_name,
        problem::ApiError,
        query::DryRunQuery,
    },
    service::{
        CursorKey,
        identity_providers::{IdentityProviders, ProviderChange},
    },
    storage::identity_providers::StoredProvider,
};

/// Client that regcred is at an issuer, so that people can sign in to the web console.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoginInput {
    /// Id of the client.
    #[schema(example = "regcred")]
    client_id: String,
    /// Secret of the client. It is sealed before it is stored, and no response returns it.
    #[schema(value_type = String, format = Password, example = "correct-horse")]
    client_secret: SecretString,
}

impl LoginInput {
    fn parse(self) -> Result<LoginClient, Vec<FieldError>> {
        LoginClient::parse(&self.client_id, self.client_secret)
    }
}

/// Client that regcred is at an issuer, without its secret.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Login {
    /// Id of the client.
    client_id: String,
}

/// Identity provider to trust.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateIdentityProvider {
    /// Unique name, a DNS-1123 label.
    #[schema(example = "gitlab")]
    name: String,
    /// Verification of tokens: with the keys of an OIDC issuer, or with a `TokenReview` by the
    /// issuing cluster.
    #[serde(rename = "type")]
    provider_type: ProviderType,
    /// Issuer, for `oidc`: an `https://` URL that equals the `iss` of the tokens.
    #[schema(example = "https://gitlab.example.com")]
    issuer: Option<String>,
    /// CA certificates (PEM) to trust for the issuer, for `oidc`, in addition to those of regcred's
    /// host.
    ca_certificate: Option<String>,
    /// Name of the registered cluster that reviews the tokens, for `tokenReview`.
    cluster: Option<String>,
    /// Audience that the `aud` of a token must contain. Tokens for other audiences are rejected.
    #[schema(example = "regcred")]
    audience: String,
    /// Accepts tokens with further audiences. A service that received such a token can use it here.
    #[serde(default)]
    allow_multiple_audiences: bool,
    /// Values of `typ` in the header of a token that are accepted although they declare another
    /// purpose than access, such as `secevent+jwt`. A token without a type, or with the type `JWT`
    /// or `at+jwt`, is accepted in any case.
    #[serde(default)]
    #[schema(max_items = 10)]
    token_types: Vec<String>,
    /// Rules that map claims to a role and grants. The first rule whose claims all match applies.
    /// Without a match the response is 403.
    rules: Vec<RuleDocument>,
    /// Client for signing in to the web console, for `oidc`. The rules are applied to the claims of
    /// the ID token. The issuer must allow the redirect to `/console/login/{name}` of regcred's address,
    /// with the name of this provider and without wildcards.
    login: Option<LoginInput>,
}

impl CreateIdentityProvider {
    fn parse(self) -> Result<(Name, ProviderConfig, Option<LoginClient>), Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let name = errors.take("name", Name::parse(&self.name));
        let login = errors.take_all(self.login.map(LoginInput::parse).transpose()).flatten();
        let config = errors.take_all(ProviderConfig::parse(ProviderDocument {
            provider_type: self.provider_type,
            issuer: self.issuer,
            ca_certificate: self.ca_certificate,
            cluster: self.cluster,
            audience: self.audience,
            allow_multiple_audiences: self.allow_multiple_audiences,
            token_types: self.token_types,
            rules: self.rules,
            login: login.as_ref().map(|client| client.client_id.to_string()),
        }));
        errors.finish(|| Some((name?, config?, login)))
    }
}

/// Change of an identity provider, as a JSON merge patch.
///
/// `rules` are replaced completely. The type is immutable.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UpdateIdentityProvider {
    /// New issuer.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    issuer: Option<String>,
    /// New CA certificates (PEM); `null` to trust only those of regcred's host.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<String>)]
    ca_certificate: Option<Option<String>>,
    /// New cluster.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    cluster: Option<String>,
    /// New audience.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    audience: Option<String>,
    /// Accepts tokens with further audiences.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    allow_multiple_audiences: Option<bool>,
    /// New accepted types of tokens for other purposes than access.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false, max_items = 10)]
    token_types: Option<Vec<String>>,
    /// New rules.
    #[serde(default, deserialize_with = "merge_patch::set")]
    #[schema(nullable = false)]
    rules: Option<Vec<RuleDocument>>,
    /// New client for signing in; `null` if people shall not sign in any more. Another client, issuer
    /// or CA, and `null`, end the sessions of the people who signed in. A new issuer or CA requires
    /// the client again.
    #[serde(default, deserialize_with = "merge_patch::present")]
    #[schema(value_type = Option<LoginInput>)]
    login: Option<Option<LoginInput>>,
}

impl TryFrom<UpdateIdentityProvider> for ProviderChange {
    type Error = Vec<FieldError>;

    fn try_from(body: UpdateIdentityProvider) -> Result<Self, Vec<FieldError>> {
        let UpdateIdentityProvider {
            issuer,
            ca_certificate,
            cluster,
            audience,
            allow_multiple_audiences,
            token_types,
            rules,
            login,
        } = body;
        let login = login.map(|client| client.map(LoginInput::parse).transpose()).transpose()?;
        Ok(Self { issuer, ca_certificate, cluster, audience, allow_multiple_audiences, token_types, rules, login })
    }
}

/// Identity provider whose tokens are accepted instead of API keys.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct IdentityProvider {
    /// Immutable identifier.
    id: Uuid,
    /// Unique name.
    name: String,
    /// Verification of tokens.
    #[serde(rename = "type")]
    provider_type: ProviderType,
    /// Issuer; `null` for `tokenReview`.
    issuer: Option<String>,
    /// CA certificates (PEM) to trust for the issuer.
    ca_certificate: Option<String>,
    /// Name of the cluster that reviews the tokens; `null` for `oidc`.
    cluster: Option<String>,
    /// Audience that a token must have.
    audience: String,
    /// Accepts tokens with further audiences.
    allow_multiple_audiences: bool,
    /// Accepted types of tokens for other purposes than access.
    token_types: Vec<String>,
    /// Rules, with effective grants.
    rules: Vec<RuleDocument>,
    /// Client for signing in to the web console; `null` if people do not sign in through the provider.
    login: Option<Login>,
    /// Version, incremented by every change.
    version: i64,
    /// Time of creation.
    created_at: DateTime<Utc>,
    /// Time of the last change.
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
            allow_multiple_audiences: stored.config.allow_multiple_audiences,
            token_types: stored.config.token_types,
            rules: stored.config.rules.iter().map(RuleDocument::from).collect(),
            login: stored.config.login.map(|client| Login { client_id: client.to_string() }),
            version: stored.version,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

/// Create an identity provider.
///
/// Its tokens are accepted as `Authorization: Bearer` from then on. An issuer is not called. A
/// cluster is asked for its own audiences, which are refused; if it does not answer, each token is
/// checked instead.
#[utoipa::path(
    tag = "identity-providers",
    params(DryRunQuery, IdempotencyKeyHeader),
    request_body = CreateIdentityProvider,
    responses((status = CREATED, body = IdentityProvider, headers(
        ("Location" = String, description = "Path of the provider"),
        ("ETag" = String, description = "Version of the provider"),
    ))),
)]
#[post("/identity-providers")]
pub async fn create_identity_provider(
    caller: Caller<WriteIdentityProviders, DryRunQuery>,
    providers: Data<IdentityProviders>,
    idempotency: Idempotency,
    body: Json<CreateIdentityProvider>,
) -> Result<HttpResponse, ApiError> {
    let (name, config, login) = body.0.parse()?;
    let create = async |call: &Call| providers.create(call, &name, &config, login.as_ref()).await;
    let current = async |call: &Call| providers.find(call, &name).await;
    let provider = idempotency.once(&caller.identity, create, current).await?;
    let path = format!("/v1/identity-providers/{name}");
    Ok(conditional::created(&caller.identity, path, provider.version, IdentityProvider::from(provider)))
}

/// List identity providers, by default ordered by name.
#[utoipa::path(
    tag = "identity-providers",
    params(ListQuery<ResourceSort>, NameQuery),
    responses((status = OK, body = Page<IdentityProvider>)),
)]
#[get("/identity-providers")]
pub async fn list_identity_providers(
    caller: Caller<ReadIdentityProviders, (ListQuery<ResourceSort>, NameQuery)>,
    providers: Data<IdentityProviders>,
    cursor_key: Data<CursorKey>,
) -> Result<HttpResponse, ApiError> {
    let (list_query, NameQuery { q }) = caller.query;
    let request = list_query.request(&cursor_key)?;
    let found = providers.list(&caller.identity, &request, q.as_ref()).await?;
    let page: Page<IdentityProvider> = Page::listed(found, &list_query, &cursor_key)?;
    Ok(HttpResponse::Ok().json(page))
}

/// Get an identity provider.
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
    Ok(conditional::ok(provider.version, IdentityProvider::from(provider)))
}

/// Change an identity provider. The change applies to the next request. A request without a
/// difference changes nothing.
#[utoipa::path(
    tag = "identity-providers",
    params(
        ("name" = String, Path, description = "Name of the provider"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to change"),
        DryRunQuery,
        IdempotencyKeyHeader,
    ),
    request_body(content(
        (UpdateIdentityProvider = "application/merge-patch+json"),
        (UpdateIdentityProvider = "application/json"),
    )),
    responses((status = OK, body = IdentityProvider, headers(("ETag" = String, description = "Version of the provider")))),
)]
#[patch("/identity-providers/{name}")]
pub async fn update_identity_provider(
    caller: Caller<WriteIdentityProviders, DryRunQuery>,
    providers: Data<IdentityProviders>,
    path: Path<String>,
    expected: IfMatch,
    idempotency: Idempotency,
    body: MergePatch<UpdateIdentityProvider>,
) -> Result<HttpResponse, ApiError> {
    let name = path_name("identity provider", &path)?;
    let change: ProviderChange = body.0.try_into()?;
    let change = async |call: &Call| providers.change(call, &name, change, expected.0).await;
    let current = async |call: &Call| providers.find(call, &name).await;
    let provider = idempotency.once(&caller.identity, change, current).await?;
    Ok(conditional::changed(&caller.identity, provider.version, IdentityProvider::from(provider)))
}

/// Delete an identity provider. Its tokens are rejected from the next request on.
#[utoipa::path(
    tag = "identity-providers",
    params(
        ("name" = String, Path, description = "Name of the provider"),
        ("If-Match" = Option<String>, Header, description = "ETag of the version to delete"),
        DryRunQuery,
    ),
    responses((status = NO_CONTENT)),
)]
#[delete("/identity-providers/{name}")]
pub async fn delete_identity_provider(
    caller: Caller<WriteIdentityProviders, DryRunQuery>,
    providers: Data<IdentityProviders>,
    path: Path<String>,
    expected: IfMatch,
) -> Result<HttpResponse, ApiError> {
    providers.remove(&caller.identity, &path_name("identity provider", &path)?, expected.0).await?;
    Ok(HttpResponse::NoContent().finish())
}
