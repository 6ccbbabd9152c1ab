//! `/login`: signing in to the web console through an identity provider.
//!
//! The routes need no caller, so they are not under `/v1`. They answer pages of regcred itself only.

use actix_web::{
    HttpRequest, HttpResponse, get,
    http::header::{CACHE_CONTROL, SET_COOKIE},
    post,
    web::Data,
};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    domain::{
        caller::{Call, Identity},
        names::Name,
    },
    http::{
        auth::{count_attempt, count_failure},
        body::Json,
        problem::ApiError,
        query, refusals,
        request_meta::{RequestId, RequestMeta},
        session_cookie::{self, Transport},
        sessions::{self, Session},
    },
    service::logins::{LoginError, Logins, ReturnedLogin},
};

/// Maximum length of a body, in bytes: callers have no credential.
const BODY_MAX: usize = 16 * 1024;
/// Pages that providers send the browser back to, below the address of regcred. Each provider has its
/// own, so that the page names the provider that an answer comes from (RFC 9700, section 4.4.2.2).
const RETURN_PAGES: &str = "/console/login/";

/// Identity providers through which people sign in.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoginProviders {
    /// The first 20 by name.
    items: Vec<LoginProvider>,
}

/// Identity provider through which people sign in.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoginProvider {
    /// Name of the provider.
    #[schema(example = "corp")]
    name: String,
}

/// Attempt to sign in.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StartLogin {
    /// Name of the identity provider.
    #[schema(example = "corp")]
    provider: String,
}

/// Started attempt to sign in.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct StartedLogin {
    /// Page of the provider that the browser must open.
    #[schema(example = "https://issuer.example.com/authorize?response_type=code&client_id=regcred")]
    authorization_url: String,
}

/// What the provider gave the browser.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CompleteLogin {
    /// Name of the identity provider: the last segment of the address that the browser returned to.
    #[schema(example = "corp")]
    provider: String,
    /// `code` of the address that the browser returned to.
    #[schema(value_type = String, format = Password, example = "SplxlOBeZQQYbYS6WxSbIA")]
    code: SecretString,
    /// `state` of that address.
    #[schema(example = "af0ifjsldkj")]
    state: String,
    /// `iss` of that address (RFC 9207).
    iss: Option<String>,
}

/// List the identity providers through which people sign in to the web console.
#[utoipa::path(tag = "sessions", responses((status = OK, body = LoginProviders)))]
#[get("/login")]
pub async fn list_login_providers(request: HttpRequest, logins: Data<Logins>) -> Result<HttpResponse, ApiError> {
    query::parse::<()>(request.query_string())?;
    let names = logins.offered().await?;
    Ok(HttpResponse::Ok()
        .json(LoginProviders { items: names.into_iter().map(|name| LoginProvider { name }).collect() }))
}

/// Start to sign in through an identity provider.
///
/// The response sets a cookie for ten minutes, and names the page of the provider, which sends the
/// browser back to `/console/login/{provider}`.
#[utoipa::path(tag = "sessions", request_body = StartLogin, responses((status = CREATED, body = StartedLogin)))]
#[post("/login")]
pub async fn start_login(
    request: HttpRequest,
    logins: Data<Logins>,
    body: Json<StartLogin, BODY_MAX>,
) -> Result<HttpResponse, ApiError> {
    let (transport, origin) = own_page(&request)?;
    let name = Name::parse(&body.0.provider).map_err(|invalid| ApiError::field("provider", invalid))?;
    let started = logins.start(&name, &redirect_uri(&origin, name.as_str())).await;
    let started = started.map_err(|error| match failed(&request, error) {
        refused @ ApiError::LoginRefused(_) => count_failure(&request, None, refused),
        other => other,
    })?;
    Ok(HttpResponse::Created()
        .insert_header((CACHE_CONTROL, "no-store"))
        .insert_header((SET_COOKIE, transport.set_login(&started.cookie)))
        .json(StartedLogin { authorization_url: started.authorization_url }))
}

/// Complete signing in: exchange the code of the provider for a session.
///
/// The response sets the cookie of the session, as `POST /v1/sessions` does. The session acts for the
/// person: with the role and grants of the first rule of the provider that matches the claims of the
/// ID token at the moment. Each request counts against the limit of failed authentications of the
/// address, also a successful one.
#[utoipa::path(tag = "sessions", request_body = CompleteLogin, responses((status = CREATED, body = Session)))]
#[post("/login/complete")]
pub async fn complete_login(
    request: HttpRequest,
    logins: Data<Logins>,
    body: Json<CompleteLogin, BODY_MAX>,
) -> Result<HttpResponse, ApiError> {
    let (transport, origin) = own_page(&request)?;
    // Before the exchange: a genuine cookie can be sent again with any code.
    count_attempt(&request).inspect_err(|_| note_refusal(&request, "login-refused"))?;
    let provider = &body.0.provider;
    let redirect_uri = redirect_uri(&origin, provider);
    let returned = ReturnedLogin {
        cookie: session_cookie::login_token(&request, transport).unwrap_or_default(),
        provider,
        state: &body.0.state,
        code: &body.0.code,
        issuer: body.0.iss.as_deref(),
        redirect_uri: &redirect_uri,
    };
    let meta = RequestMeta::of(&request).ok_or_else(|| ApiError::Internal(anyhow::anyhow!("a request without ids")))?;
    let completed = logins.complete(&returned, |identity| call(identity, meta)).await;
    let (listed, new) = completed.map_err(|error| failed(&request, error))?;
    let mut response = sessions::created(Session::listed(listed, None), transport, &new.text);
    response.headers_mut().append(SET_COOKIE, transport.remove_login());
    Ok(response)
}

/// Refuses unknown parameters and requests of other pages. Returns how the page was loaded, and its
/// origin.
fn own_page(request: &HttpRequest) -> Result<(Transport, String), ApiError> {
    query::parse::<()>(request.query_string())?;
    session_cookie::require_own_page(request)?;
    let transport = Transport::of(request)?;
    Ok((transport, session_cookie::own_origin(request)?))
}

/// Address that a provider sends the browser back to.
fn redirect_uri(origin: &str, provider: &str) -> String {
    format!("{origin}{RETURN_PAGES}{provider}")
}

/// The first request of a person.
fn call(identity: Identity, meta: RequestMeta) -> Call {
    Call {
        identity: identity.into(),
        request_id: meta.id.uuid(),
        client_request_id: meta.client_id.map(RequestId::uuid),
        source: meta.source,
        idempotency: None,
        dry_run: false,
    }
}

fn note_refusal(request: &HttpRequest, reason: &'static str) {
    refusals::note_rejected_credential(request, None, reason);
}

/// Records a refusal.
fn failed(request: &HttpRequest, error: LoginError) -> ApiError {
    match error {
        LoginError::Refused(reason) => {
            note_refusal(request, "login-refused");
            ApiError::LoginRefused(reason)
        }
        LoginError::NoMatchingRule => {
            note_refusal(request, "no-matching-rule");
            ApiError::NoMatchingRule
        }
        LoginError::Unavailable { retry_after } => ApiError::IssuerUnavailable { retry_after },
        LoginError::Service(error) => error.into(),
    }
}
