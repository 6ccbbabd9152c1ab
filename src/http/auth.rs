//! The door: every `/v1` route needs an API key or a token of an identity provider, and each handler's signature states what
//! its bearer must be allowed.

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

use crate::{
    domain::caller::{Call, Identity, Permission},
    http::{
        attempts::{Attempts, Source},
        body::BodyRead,
        problem::ApiError,
        refusals,
        request_limit::RequestLimit,
        request_meta::RequestMeta,
    },
    service::{
        api_keys::{ApiKeyAuthenticator, Authentication},
        tokens::{TokenAuthenticator, TokenVerdict},
    },
};

/// How long an answer is held back that says that somebody sends too much: one who asks again at once, and does not look
/// when he may, is slowed down by it, and takes less from the others.
const HELD_FOR: Duration = Duration::from_millis(250);

/// How long after a request was read its answer comes that says that there is no such thing, or twice as long, or again. What is
/// there and not granted takes some microseconds more to look at than what is not there: nobody shall be able to tell.
const HIDDEN_FOR: Duration = Duration::from_millis(5);

/// Middleware that finds out who calls, before anything of the body is read, and whether he may send one more request.
pub async fn authenticate(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<EitherBody<impl MessageBody>>, Error> {
    let identity = match admit(&mut request).await {
        Ok(identity) => identity,
        Err(error @ (ApiError::TooManyRequests { .. } | ApiError::TooManyAttempts { .. })) => {
            tokio::time::sleep(HELD_FOR).await;
            return Ok(request.error_response(error).map_into_right_body());
        }
        // As a response: an error would pass by all other middleware, and with it by what writes the problem.
        Err(error) => return Ok(request.error_response(error).map_into_right_body()),
    };
    request.extensions_mut().insert(identity);
    let admitted = Instant::now();
    let response = next.call(request).await?;
    let mut hidden = None;
    if let Some(error) = response.response().error().and_then(Error::as_error) {
        refusals::note(response.request(), error);
        let extensions = response.request().extensions();
        let identity = extensions.get::<Arc<Identity>>();
        if error.may_hide() && identity.is_none_or(|identity| !identity.grants.include_everything()) {
            let body_read = extensions.get::<BodyRead>().map(|BodyRead(at)| *at);
            hidden = Some(hidden_until(body_read.unwrap_or(admitted)));
        }
    }
    if let Some(until) = hidden {
        tokio::time::sleep_until(until.into()).await;
    }
    Ok(response.map_into_left_body())
}

/// When the answer to a request comes that was read at this time, and that may hide something.
fn hidden_until(read_at: Instant) -> Instant {
    let took = read_at.elapsed();
    let mut held = HIDDEN_FOR;
    while held < took {
        held *= 2;
    }
    read_at + held
}

/// Identifies a caller and counts his request.
async fn admit(request: &mut ServiceRequest) -> Result<Arc<Identity>, ApiError> {
    let identity = identify(request).await?;
    let limit = request.app_data::<Data<RequestLimit>>();
    let limit = limit.ok_or_else(|| ApiError::Internal(anyhow::anyhow!("the app does not count requests")))?;
    limit.count(&identity.actor).map_err(|retry_after| ApiError::TooManyRequests { retry_after })?;
    Ok(identity)
}

async fn identify(request: &mut ServiceRequest) -> Result<Arc<Identity>, ApiError> {
    let key = bearer(request.headers()).ok_or(ApiError::Unauthenticated(
        "send an API key as `Authorization: Bearer rgc_…`, or a token of an identity provider; `regcred api-key create` makes a key",
    ))?;
    // A key has no dot in it, and a token has two.
    if key.contains('.') {
        // In a box: it takes kilobytes, which a request with a key need not have.
        return Box::pin(identify_token(request, key)).await;
    }
    let authenticator = request
        .app_data::<Data<ApiKeyAuthenticator>>()
        .ok_or_else(|| ApiError::Internal(anyhow::anyhow!("the app has no door")))?;
    let authentication = if let Some(authentication) = authenticator.identify_at_once(key) {
        authentication
    } else {
        let (authenticator, key) = (authenticator.clone(), SecretString::from(key));
        leave_no_empty_room(request.headers_mut());
        // In a box, as above.
        Box::pin(async move { authenticator.identify(key.expose_secret()).await }).await?
    };
    // One sentence for every reason, so that nobody learns which keys exist.
    let refused = ApiError::Unauthenticated("the API key is unknown, mistyped, revoked or expired");
    let note = |owner, reason| refusals::note_rejected_credential(request.request(), owner, reason);
    match authentication {
        Authentication::Known(identity) => Ok(identity),
        Authentication::Refused => {
            note(None, "malformed-key");
            Err(refused)
        }
        Authentication::Ended(identity) => {
            note(Some(identity.actor.clone()), "ended-key");
            Err(refused)
        }
        // Counted only now: a right key is never asked how many wrong ones came before it.
        Authentication::Wrong(id) => {
            note(None, "wrong-key");
            match request.app_data::<Data<Attempts>>().map(|attempts| attempts.count(id, source_of(request))) {
                Some(Err(retry_after)) => Err(ApiError::TooManyAttempts { retry_after }),
                Some(Ok(())) => Err(refused),
                None => Err(ApiError::Internal(anyhow::anyhow!("the app does not count attempts"))),
            }
        }
    }
}

/// Moves headers to a map that has no more room than they need. The one that actix-http reads them into takes 7 KB, and those who
/// wait for argon2 may be many.
fn leave_no_empty_room(headers: &mut HeaderMap) {
    *headers = std::mem::take(headers).into_iter().collect();
}

async fn identify_token(request: &ServiceRequest, token: &str) -> Result<Arc<Identity>, ApiError> {
    let note = |reason| refusals::note_rejected_credential(request.request(), None, reason);
    let authenticator = request.app_data::<Data<TokenAuthenticator>>();
    let authenticator =
        authenticator.ok_or_else(|| ApiError::Internal(anyhow::anyhow!("the app has no door for tokens")))?;
    match authenticator.identify(token).await? {
        TokenVerdict::Known(identity) => Ok(Arc::new(identity)),
        TokenVerdict::NoRule => {
            note("no-matching-rule");
            Err(ApiError::NoMatchingRule)
        }
        TokenVerdict::Unavailable { retry_after } => Err(ApiError::IssuerUnavailable { retry_after }),
        // Counted only now: a good token is never asked how many bad ones came before it.
        TokenVerdict::Refused => {
            note("invalid-token");
            match request.app_data::<Data<Attempts>>().map(|attempts| attempts.count_source(source_of(request))) {
                Some(Err(retry_after)) => Err(ApiError::TooManyAttempts { retry_after }),
                Some(Ok(())) => Err(ApiError::InvalidToken),
                None => Err(ApiError::Internal(anyhow::anyhow!("the app does not count attempts"))),
            }
        }
    }
}

fn source_of(request: &ServiceRequest) -> Option<Source> {
    RequestMeta::of(request.request())?.source.map(Source::of)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// What a caller showed at the door, for an answer that goes on for long: it is shown again at intervals.
pub struct Shown {
    authenticator: Data<ApiKeyAuthenticator>,
    token_authenticator: Data<TokenAuthenticator>,
    text: SecretString,
}

/// What the door says of it then.
pub enum ShownAgain {
    /// It still is this caller's, with what it allows now.
    Known(Arc<Identity>),
    /// It is good no more.
    Ended,
    /// Nobody can be asked.
    Unavailable,
}

impl Shown {
    /// What the caller of this request showed.
    pub fn of(request: &HttpRequest) -> Result<Self, ApiError> {
        let missing = || ApiError::Internal(anyhow::anyhow!("a handler outside /v1 asks what was shown at the door"));
        Ok(Self {
            authenticator: request.app_data::<Data<ApiKeyAuthenticator>>().cloned().ok_or_else(missing)?,
            token_authenticator: request.app_data::<Data<TokenAuthenticator>>().cloned().ok_or_else(missing)?,
            text: bearer(request.headers()).ok_or_else(missing)?.into(),
        })
    }

    /// Shows it again.
    pub async fn again(&self) -> ShownAgain {
        let text = self.text.expose_secret();
        if text.contains('.') {
            return match self.token_authenticator.identify(text).await {
                Ok(TokenVerdict::Known(identity)) => ShownAgain::Known(Arc::new(identity)),
                Ok(TokenVerdict::Refused | TokenVerdict::NoRule) => ShownAgain::Ended,
                Ok(TokenVerdict::Unavailable { .. }) | Err(_) => ShownAgain::Unavailable,
            };
        }
        match self.authenticator.identify(text).await {
            Ok(Authentication::Known(identity)) => ShownAgain::Known(identity),
            Ok(Authentication::Refused | Authentication::Ended(_) | Authentication::Wrong(_)) => ShownAgain::Ended,
            Err(_) => ShownAgain::Unavailable,
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
        ReadPullSecrets, WritePullSecrets, ReadApiKeys, WriteApiKeys, ReadIdentityProviders, WriteIdentityProviders,
        ReadAudit,
    }
}

/// A caller who has the permission `P`. It comes first among a handler's arguments, so that nothing of the
/// request is looked at for somebody who may not ask.
pub struct Caller<P> {
    /// Who calls, and in which request; every use case takes it.
    pub identity: Call,
    permission: PhantomData<P>,
}

impl<P: Requires> FromRequest for Caller<P> {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let extensions = request.extensions();
        let identity = extensions.get::<Arc<Identity>>().cloned();
        ready(match (identity, extensions.get::<RequestMeta>()) {
            (Some(identity), Some(meta)) if identity.may(P::PERMISSION) => {
                let identity = Call { identity, request_id: meta.id.uuid(), source: meta.source };
                Ok(Self { identity, permission: PhantomData })
            }
            (Some(identity), Some(_)) if identity.role.allows(P::PERMISSION) => Err(ApiError::NeedsAllGrants),
            (Some(_), Some(_)) => Err(ApiError::Forbidden),
            _ => Err(ApiError::Internal(anyhow::anyhow!("a handler outside /v1 asks for a caller"))),
        })
    }
}
