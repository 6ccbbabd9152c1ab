//! Authentication and authorization of every route under `/v1`.
//!
//! A caller presents an API key, a token of an identity provider, or the cookie of a session. Each handler's signature states
//! the permission that it requires, as the type parameter of [`Caller`].

use std::{
    future::{Ready, ready},
    marker::PhantomData,
    sync::Arc,
    time::{Duration, Instant},
};

use actix_web::{
    Error, FromRequest, HttpMessage, HttpRequest,
    body::{EitherBody, MessageBody},
    dev::{Payload, ServiceRequest, ServiceResponse},
    http::header::{self, HeaderMap},
    middleware::Next,
    web::Data,
};
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use crate::{
    domain::caller::{Call, Identity, Permission},
    http::{
        body::BodyRead,
        problem::ApiError,
        query::{self, FromQuery},
        rate_limit::{FailedAuthenticationLimiter, RequestLimiter, Source},
        refusals,
        request_meta::{RequestId, RequestMeta},
        session_cookie,
        sessions::CurrentSession,
    },
    service::{
        api_keys::{ApiKeyAuthenticator, Authentication},
        sessions::{SessionAuthentication, Sessions},
        tokens::{TokenAuthentication, TokenAuthenticator},
    },
};

/// Delay of a 429 response. It slows down a client that ignores `Retry-After`.
const RATE_LIMIT_DELAY: Duration = Duration::from_millis(250);

/// Minimum latency of a not-found answer, doubled until it exceeds the work. It hides whether a
/// resource exists.
const NOT_FOUND_LATENCY: Duration = Duration::from_millis(5);

/// Middleware that identifies the caller and applies its request rate limit before the body is
/// read.
pub async fn authenticate(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<EitherBody<impl MessageBody>>, Error> {
    let identity = match admit(&mut request).await {
        Ok(identity) => identity,
        Err(error @ (ApiError::TooManyRequests { .. } | ApiError::TooManyAttempts { .. })) => {
            tokio::time::sleep(RATE_LIMIT_DELAY).await;
            return Ok(request.error_response(error).map_into_right_body());
        }
        // As a response: an error would bypass the other middleware, which writes the problem.
        Err(error) => return Ok(request.error_response(error).map_into_right_body()),
    };
    request.extensions_mut().insert(identity);
    let admitted = Instant::now();
    let response = next.call(request).await?;
    if let Some(error) = response.response().error().and_then(Error::as_error) {
        refusals::note(response.request(), error);
        if let Some(until) = concealed_until(response.request(), error, admitted) {
            tokio::time::sleep_until(until.into()).await;
        }
    }
    Ok(response.map_into_left_body())
}

/// Time until which an error is delayed, if it may conceal a resource from this caller.
fn concealed_until(request: &HttpRequest, error: &ApiError, admitted: Instant) -> Option<Instant> {
    let extensions = request.extensions();
    let identity = extensions.get::<Arc<Identity>>();
    if !error.may_conceal() || identity.is_some_and(|identity| identity.grants.include_everything()) {
        return None;
    }
    let read_at = extensions.get::<BodyRead>().map_or(admitted, |BodyRead(at)| *at);
    let elapsed = read_at.elapsed();
    let mut latency = NOT_FOUND_LATENCY;
    while latency < elapsed {
        latency *= 2;
    }
    Some(read_at + latency)
}

/// Identifies the caller and counts its request.
async fn admit(request: &mut ServiceRequest) -> Result<Arc<Identity>, ApiError> {
    let identity = identify(request).await?;
    let limiter = app_data::<RequestLimiter>(request.request())?;
    limiter.count(&identity.actor).map_err(|retry_after| ApiError::TooManyRequests { retry_after })?;
    Ok(identity)
}

fn app_data<T: 'static>(request: &HttpRequest) -> Result<&Data<T>, ApiError> {
    let missing = || ApiError::Internal(anyhow::anyhow!("the app has no {}", std::any::type_name::<T>()));
    request.app_data().ok_or_else(missing)
}

async fn identify(request: &mut ServiceRequest) -> Result<Arc<Identity>, ApiError> {
    let Some(key) = bearer(request.headers()) else {
        if let Some(token) = session_cookie::token(request.request()) {
            return Box::pin(identify_session(request, token)).await;
        }
        return Err(ApiError::Unauthenticated(
            "send an API key as `Authorization: Bearer rgc_…`, or a token of an identity provider; `regcred api-key create` creates a key",
        ));
    };
    // A token contains two dots, an API key none.
    if key.contains('.') {
        // Boxed: the future takes kilobytes that a request with a key does not need.
        return Box::pin(identify_token(request, key)).await;
    }
    let authenticator = app_data::<ApiKeyAuthenticator>(request.request())?;
    let authentication = if let Some(authentication) = authenticator.authenticate_cached(key) {
        authentication
    } else {
        let (authenticator, key) = (authenticator.clone(), SecretString::from(key));
        shrink_to_fit(request.headers_mut());
        // Boxed, as above.
        Box::pin(async move { authenticator.authenticate(key.expose_secret()).await }).await?
    };
    // One text for every reason, so that it does not tell which keys exist.
    let refused = ApiError::Unauthenticated("the API key is unknown, malformed, revoked or expired; use another key");
    let note = |owner, reason| refusals::note_rejected_credential(request.request(), owner, reason);
    match authentication {
        Authentication::Authenticated(identity) => {
            let source = RequestMeta::of(request.request()).and_then(|meta| meta.source);
            if identity.may_call_from(source) {
                return Ok(identity);
            }
            note(Some(identity.actor.clone()), "source-network");
            // Not against the caller's request rate: the owner of a stolen key keeps it.
            Err(count_failure(request.request(), None, ApiError::SourceNetworkRefused))
        }
        Authentication::Malformed => {
            note(None, "malformed-key");
            Err(refused)
        }
        Authentication::Inactive(identity) => {
            note(Some(identity.actor.clone()), "ended-key");
            Err(refused)
        }
        Authentication::WrongSecret(id) => {
            note(None, "wrong-key");
            Err(count_failure(request.request(), Some(id), refused))
        }
    }
}

/// Moves headers to a map without spare capacity.
///
/// The map that actix-http creates takes 7 KB, and many requests may wait for argon2 at the same
/// time.
fn shrink_to_fit(headers: &mut HeaderMap) {
    *headers = std::mem::take(headers).into_iter().collect();
}

async fn identify_token(request: &ServiceRequest, token: &str) -> Result<Arc<Identity>, ApiError> {
    let note = |reason| refusals::note_rejected_credential(request.request(), None, reason);
    match app_data::<TokenAuthenticator>(request.request())?.authenticate(token).await? {
        TokenAuthentication::Authenticated(identity) => Ok(Arc::new(identity)),
        TokenAuthentication::NoMatchingRule => {
            note("no-matching-rule");
            Err(ApiError::NoMatchingRule)
        }
        TokenAuthentication::Unavailable { retry_after } => Err(ApiError::IssuerUnavailable { retry_after }),
        TokenAuthentication::Rejected => {
            note("invalid-token");
            Err(count_failure(request.request(), None, ApiError::InvalidToken))
        }
    }
}

async fn identify_session(request: &ServiceRequest, token: &str) -> Result<Arc<Identity>, ApiError> {
    let request = request.request();
    session_cookie::require_own_page(request)?;
    let note = |owner, reason| refusals::note_rejected_credential(request, owner, reason);
    let refused = ApiError::Unauthenticated("the session has ended; sign in again");
    let sessions = app_data::<Sessions>(request)?;
    match sessions.authenticate(token).await? {
        SessionAuthentication::Authenticated(identity, session) => {
            let source = RequestMeta::of(request).and_then(|meta| meta.source);
            if !identity.may_call_from(source) {
                note(Some(identity.actor.clone()), "source-network");
                return Err(count_failure(request, None, ApiError::SourceNetworkRefused));
            }
            // Last: a request that is refused does not postpone the end of an idle session.
            sessions.note_use(&session).await;
            request.extensions_mut().insert(CurrentSession(Arc::new(*session)));
            Ok(identity)
        }
        SessionAuthentication::OwnerEnded(actor) => {
            note(Some(actor), "ended-key");
            Err(refused)
        }
        SessionAuthentication::Unknown => {
            note(None, "ended-session");
            Err(count_failure(request, None, refused))
        }
    }
}

/// Counts a failed authentication. Returns `error`, or the rate limit's error once that is
/// exceeded.
pub(super) fn count_failure(request: &HttpRequest, key_id: Option<Uuid>, error: ApiError) -> ApiError {
    count(request, key_id).err().unwrap_or(error)
}

/// Counts an attempt like a failed authentication, before its result is known.
///
/// # Errors
///
/// [`ApiError::TooManyAttempts`] once the rate limit is exceeded.
pub(super) fn count_attempt(request: &HttpRequest) -> Result<(), ApiError> {
    count(request, None)
}

fn count(request: &HttpRequest, key_id: Option<Uuid>) -> Result<(), ApiError> {
    let source = RequestMeta::of(request).and_then(|meta| meta.source).map(Source::of);
    let counted = app_data::<FailedAuthenticationLimiter>(request)?.count(key_id, source);
    counted.map_err(|retry_after| ApiError::TooManyAttempts { retry_after })
}

pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// The credential of a request, kept by a streaming response to authenticate its caller again.
pub struct PresentedCredential {
    authenticator: Data<ApiKeyAuthenticator>,
    token_authenticator: Data<TokenAuthenticator>,
    sessions: Data<Sessions>,
    text: SecretString,
    is_session: bool,
}

/// Result of authenticating a caller again.
pub enum Reauthentication {
    /// The credential is valid, with these rights.
    Known(Arc<Identity>),
    /// The credential is no longer valid.
    Ended,
    /// The authenticator is unavailable.
    Unavailable,
}

impl PresentedCredential {
    /// The credential that this request presents.
    pub fn of(request: &HttpRequest) -> Result<Self, ApiError> {
        let missing = || ApiError::Internal(anyhow::anyhow!("a handler outside /v1 requires a credential"));
        let is_session = CurrentSession::of(request).is_some();
        let text = if is_session { session_cookie::token(request) } else { bearer(request.headers()) };
        Ok(Self {
            authenticator: app_data::<ApiKeyAuthenticator>(request)?.clone(),
            token_authenticator: app_data::<TokenAuthenticator>(request)?.clone(),
            sessions: app_data::<Sessions>(request)?.clone(),
            text: text.ok_or_else(missing)?.into(),
            is_session,
        })
    }

    /// Authenticates the caller again.
    pub async fn reauthenticate(&self) -> Reauthentication {
        let text = self.text.expose_secret();
        if self.is_session {
            return self.reauthenticate_session(text).await;
        }
        if text.contains('.') {
            return match self.token_authenticator.authenticate(text).await {
                Ok(TokenAuthentication::Authenticated(identity)) => Reauthentication::Known(Arc::new(identity)),
                Ok(TokenAuthentication::Rejected | TokenAuthentication::NoMatchingRule) => Reauthentication::Ended,
                Ok(TokenAuthentication::Unavailable { .. }) | Err(_) => Reauthentication::Unavailable,
            };
        }
        match self.authenticator.authenticate(text).await {
            Ok(Authentication::Authenticated(identity)) => Reauthentication::Known(identity),
            Ok(Authentication::Malformed | Authentication::Inactive(_) | Authentication::WrongSecret(_)) => {
                Reauthentication::Ended
            }
            Err(_) => Reauthentication::Unavailable,
        }
    }

    /// An open stream does not keep an idle session alive.
    async fn reauthenticate_session(&self, text: &str) -> Reauthentication {
        match self.sessions.authenticate(text).await {
            Ok(SessionAuthentication::Authenticated(identity, _)) => Reauthentication::Known(identity),
            Ok(SessionAuthentication::OwnerEnded(_) | SessionAuthentication::Unknown) => Reauthentication::Ended,
            Err(_) => Reauthentication::Unavailable,
        }
    }
}

/// A permission as a type, so that a handler's signature can name it.
pub trait Requires: 'static {
    /// The permission.
    const PERMISSION: Permission;
}

/// The permissions that handlers name.
pub mod permission {
    use super::{Permission, Requires};

    macro_rules! permissions {
        ($($name:ident),+ $(,)?) => {$(
            #[doc = concat!("[`Permission::", stringify!($name), "`]")]
            pub struct $name;
            impl Requires for $name {
                const PERMISSION: Permission = Permission::$name;
            }
        )+};
    }
    permissions! {
        Authenticated, ReadAccounts, WriteAccounts, RevealCredentials, ReadClusters, WriteClusters, DeliverSecrets,
        DiagnosePods, DiagnoseClusters, ReadPullSecrets, WritePullSecrets, ReadApiKeys, WriteApiKeys, ReadIdentityProviders,
        WriteIdentityProviders, ReadAudit,
    }
}

/// A caller that has the permission `P`, and the query parameters `Q` of its request.
///
/// Must be a handler's first argument: the permission is checked first, then the query, then the
/// other arguments. A route without parameters leaves `Q` out, and then refuses every parameter.
pub struct Caller<P, Q = ()> {
    /// Identity and request of the caller. Every use case takes it.
    pub identity: Call,
    /// Query parameters.
    pub query: Q,
    permission: PhantomData<P>,
}

impl<P: Requires, Q: FromQuery> FromRequest for Caller<P, Q> {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Self::authorize(request))
    }
}

/// Refuses a caller without the permission.
///
/// # Errors
///
/// [`ApiError::Forbidden`] or [`ApiError::NeedsAllGrants`].
pub fn require(identity: &Identity, permission: Permission) -> Result<(), ApiError> {
    let role = identity.role;
    match (identity.may(permission), role.allows(permission)) {
        (true, _) => Ok(()),
        (false, true) => Err(ApiError::NeedsAllGrants(permission)),
        (false, false) => Err(ApiError::Forbidden { role, permission }),
    }
}

/// Whether a session may use a permission. A script that another page injected could not be told
/// from the console, so passwords are revealed to keys and tokens only.
pub fn is_open_to_sessions(permission: Permission) -> bool {
    permission != Permission::RevealCredentials
}

impl<P: Requires, Q: FromQuery> Caller<P, Q> {
    fn authorize(request: &HttpRequest) -> Result<Self, ApiError> {
        let extensions = request.extensions();
        let (Some(identity), Some(meta)) = (extensions.get::<Arc<Identity>>(), extensions.get::<RequestMeta>()) else {
            return Err(ApiError::Internal(anyhow::anyhow!("a handler outside /v1 requires a caller")));
        };
        require(identity, P::PERMISSION)?;
        if !is_open_to_sessions(P::PERMISSION) && extensions.contains::<CurrentSession>() {
            return Err(ApiError::SessionRefused("passwords are not revealed to a session; use an API key"));
        }
        let query: Q = query::parse(request.query_string())?;
        let identity = Call {
            identity: Arc::clone(identity),
            request_id: meta.id.uuid(),
            client_request_id: meta.client_id.map(RequestId::uuid),
            source: meta.source,
            idempotency: None,
            dry_run: query.is_dry_run(),
        };
        Ok(Self { identity, query, permission: PhantomData })
    }
}
