//! `Idempotency-Key`: a retried request does not repeat its change
//! (draft-ietf-httpapi-idempotency-key-header).
//!
//! A handler that changes the database takes [`Idempotency`] and calls [`Idempotency::once`]. A
//! repeated request is answered with the current resource: responses are not stored.

use std::future::{Ready, ready};

use actix_web::{
    FromRequest, HttpMessage, HttpRequest,
    dev::Payload,
    http::header::{HeaderMap, HeaderName},
    web::{Bytes, Data},
};
use utoipa::IntoParams;

use crate::{
    domain::{
        caller::Call,
        idempotency::IdempotencyKey,
        invalid::{FieldError, Invalid},
    },
    http::problem::ApiError,
    service::{
        ServiceError,
        idempotency::{IdempotencyError, IdempotencyKeys, RequestParts},
    },
};

/// Name of the request header in errors and in the documentation.
pub const HEADER: &str = "Idempotency-Key";
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Header of the response to a request that was performed before.
pub const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// Documentation of the request header.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "documents Idempotency")]
pub struct IdempotencyKeyHeader {
    /// Key of this request, 1 to 255 visible ASCII characters, such as a UUID. A retry with the
    /// same key within 24 hours does not repeat the change: the response has the same status, the
    /// current resource and `Idempotency-Replayed: true`. Failed requests and dry runs do not use up
    /// the key.
    #[param(rename = "Idempotency-Key", min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    idempotency_key: Option<String>,
}

/// Body of a request with an idempotency key.
struct KeyedBody(Bytes);

/// Mark of a request that was performed before.
struct Replayed;

/// Keeps the body of a request with an idempotency key for its digest.
pub fn keep_body(request: &HttpRequest, body: &Bytes) {
    if request.headers().contains_key(IDEMPOTENCY_KEY) {
        request.extensions_mut().insert(KeyedBody(body.clone()));
    }
}

/// Whether a request was performed before.
pub fn is_replayed(request: &HttpRequest) -> bool {
    request.extensions().contains::<Replayed>()
}

/// Idempotency key of a request, if it has one.
pub struct Idempotency {
    key: Option<IdempotencyKey>,
    request: HttpRequest,
}

impl FromRequest for Idempotency {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let key = parse(request.headers()).map_err(|invalid| ApiError::from(vec![FieldError::new(HEADER, invalid)]));
        ready(key.map(|key| Self { key, request: request.clone() }))
    }
}

fn parse(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, Invalid> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY);
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => IdempotencyKey::parse(value.as_bytes()).map(Some),
        (Some(_), Some(_)) => Err(Invalid::new("must be given only once")),
    }
}

impl Idempotency {
    /// Performs a change, or returns what `current` reads if the same request was performed before.
    ///
    /// `perform` gets the call with its idempotency key, which its transaction claims. A dry run uses
    /// no key.
    pub async fn once<T>(
        self,
        caller: &Call,
        perform: impl AsyncFnOnce(&Call) -> Result<T, ServiceError>,
        current: impl AsyncFnOnce(&Call) -> Result<T, ServiceError>,
    ) -> Result<T, ApiError> {
        let Self { key: Some(key), request } = self else { return Ok(perform(caller).await?) };
        if caller.dry_run {
            return Ok(perform(caller).await?);
        }
        let missing = || ApiError::Internal(anyhow::anyhow!("the app has no idempotency keys"));
        let keys = request.app_data::<Data<IdempotencyKeys>>().ok_or_else(missing)?;
        let body = request.extensions_mut().remove::<KeyedBody>();
        let parts = RequestParts {
            method: request.method().as_str(),
            path: request.path(),
            query: request.query_string(),
            body: body.as_ref().map_or(&[], |KeyedBody(body)| body),
        };
        let mut call = keys.with_key(caller, key.clone(), parts);
        let mut is_new = keys.require_new(&call).await;
        if matches!(is_new, Err(ServiceError::Idempotency(IdempotencyError::Reused))) {
            keys.reload_peppers();
            call = keys.with_key(caller, key, parts);
            is_new = keys.require_new(&call).await;
        }
        // Not kept while the change runs: it may contain passwords.
        drop(body);
        let performed = match is_new {
            Ok(()) => perform(&call).await,
            Err(error) => Err(error),
        };
        match performed {
            Err(ServiceError::Idempotency(IdempotencyError::Performed)) => {
                request.extensions_mut().insert(Replayed);
                Ok(current(caller).await?)
            }
            Ok(_) | Err(ServiceError::Idempotency(_)) => Ok(performed?),
            Err(error) => {
                keys.wait_until_released(&call).await;
                Err(error.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    fn parsed(values: &[&'static str]) -> Result<Option<String>, Invalid> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(IDEMPOTENCY_KEY, HeaderValue::from_static(value));
        }
        parse(&headers).map(|key| key.map(|key| key.as_str().to_owned()))
    }

    #[test]
    fn header_is_given_at_most_once() {
        assert_eq!(parsed(&[]), Ok(None));
        assert_eq!(parsed(&["k"]), Ok(Some("k".to_owned())));
        assert!(parsed(&["k", "k"]).is_err());
        assert!(parsed(&[""]).is_err());
    }
}
