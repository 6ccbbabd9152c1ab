//! The door: every `/v1` route needs an API key, and each handler's signature states what the key must allow.

use std::{
    future::{Ready, ready},
    marker::PhantomData,
    sync::Arc,
    time::Duration,
};

use actix_web::{
    Error, FromRequest, HttpMessage, HttpRequest,
    body::{EitherBody, MessageBody},
    dev::{Payload, ServiceRequest, ServiceResponse},
    http::header,
    middleware::Next,
    web::Data,
};

use crate::{
    domain::caller::{Identity, Permission},
    http::{
        attempts::{Attempts, Source},
        problem::ApiError,
        request_limit::RequestLimit,
        source,
    },
    service::api_keys::{Door, Verdict},
};

/// How long an answer is held back that says that somebody sends too much: one who asks again at once, and does not look
/// when he may, is slowed down by it, and takes less from the others.
const HELD_FOR: Duration = Duration::from_millis(250);

/// Middleware that finds out who calls, before anything of the body is read, and whether he may send one more request.
pub async fn authenticate(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<EitherBody<impl MessageBody>>, Error> {
    let identity = match admit(&request).await {
        Ok(identity) => identity,
        Err(error @ (ApiError::TooManyRequests { .. } | ApiError::TooManyAttempts { .. })) => {
            tokio::time::sleep(HELD_FOR).await;
            return Ok(request.error_response(error).map_into_right_body());
        }
        // As a response: an error would pass by all other middleware, and with it by what writes the problem.
        Err(error) => return Ok(request.error_response(error).map_into_right_body()),
    };
    request.extensions_mut().insert(Arc::new(identity));
    Ok(next.call(request).await?.map_into_left_body())
}

/// Identifies a caller and counts his request. One who has none left is refused before his key is checked, which costs a query.
async fn admit(request: &ServiceRequest) -> Result<Identity, ApiError> {
    let limit = request.app_data::<Data<RequestLimit>>();
    let limit = limit.ok_or_else(|| ApiError::Internal(anyhow::anyhow!("the app does not count requests")))?;
    let too_many = |retry_after| ApiError::TooManyRequests { retry_after };
    if let Some(id) = bearer(request).and_then(Door::named_id) {
        limit.look(id).map_err(too_many)?;
    }
    let identity = identify(request).await?;
    limit.count(&identity.actor).map_err(too_many)?;
    Ok(identity)
}

async fn identify(request: &ServiceRequest) -> Result<Identity, ApiError> {
    let key = bearer(request).ok_or(ApiError::Unauthenticated(
        "send an API key as `Authorization: Bearer rgc_…`; `regcred api-key create` makes one",
    ))?;
    let door =
        request.app_data::<Data<Door>>().ok_or_else(|| ApiError::Internal(anyhow::anyhow!("the app has no door")))?;
    // One sentence for every reason, so that nobody learns which keys exist.
    let refused = ApiError::Unauthenticated("the API key is unknown, mistyped, revoked or expired");
    match door.identify(key).await? {
        Verdict::Known(identity) => Ok(identity),
        Verdict::Refused => Err(refused),
        // Counted only now: a right key is never asked how many wrong ones came before it.
        Verdict::Wrong(id) => {
            let source = source::address(request.request()).map(Source::of);
            match request.app_data::<Data<Attempts>>().map(|attempts| attempts.count(id, source)) {
                Some(Err(retry_after)) => Err(ApiError::TooManyAttempts { retry_after }),
                Some(Ok(())) => Err(refused),
                None => Err(ApiError::Internal(anyhow::anyhow!("the app does not count attempts"))),
            }
        }
    }
}

fn bearer(request: &ServiceRequest) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
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
        ReadApiKeys, WriteApiKeys,
    }
}

/// A caller who has the permission `P`. It comes first among a handler's arguments, so that nothing of the
/// request is looked at for somebody who may not ask.
pub struct Caller<P> {
    /// Who calls; every use case takes it.
    pub identity: Arc<Identity>,
    permission: PhantomData<P>,
}

impl<P: Requires> FromRequest for Caller<P> {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let identity = request.extensions().get::<Arc<Identity>>().cloned();
        ready(match identity {
            Some(identity) if identity.role.allows(P::PERMISSION) => Ok(Self { identity, permission: PhantomData }),
            Some(_) => Err(ApiError::Forbidden),
            None => Err(ApiError::Internal(anyhow::anyhow!("a handler outside /v1 asks for a caller"))),
        })
    }
}
