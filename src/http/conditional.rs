//! `ETag`, `If-Match` and `If-None-Match`: optimistic concurrency control.

use std::future::{Ready, ready};

use actix_web::{FromRequest, HttpRequest, HttpResponse, dev::Payload, http::header};
use serde::Serialize;

use crate::{domain::caller::Call, http::problem::ApiError, service::ExpectedVersion};

/// `ETag` header of a resource version.
pub fn etag(version: i64) -> (header::HeaderName, String) {
    (header::ETAG, format!("\"{version}\""))
}

/// 200 with a resource and its `ETag`.
pub fn ok(version: i64, resource: impl Serialize) -> HttpResponse {
    HttpResponse::Ok().insert_header(etag(version)).json(resource)
}

/// 200 with a changed resource and its `ETag`. A dry run has none: another change may be stored as
/// that version.
pub fn changed(caller: &Call, version: i64, resource: impl Serialize) -> HttpResponse {
    if caller.dry_run { HttpResponse::Ok().json(resource) } else { ok(version, resource) }
}

/// 201 with a resource, its path and its `ETag`. For a dry run, 200 with the resource.
pub fn created(caller: &Call, path: String, version: i64, resource: impl Serialize) -> HttpResponse {
    if caller.dry_run {
        return HttpResponse::Ok().json(resource);
    }
    HttpResponse::Created().insert_header((header::LOCATION, path)).insert_header(etag(version)).json(resource)
}

/// Version that `If-Match` requires. `*` and a missing header require none.
pub struct IfMatch(pub ExpectedVersion);

impl FromRequest for IfMatch {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(parse(request).map(Self))
    }
}

/// Whether `If-None-Match: *` requires that nothing exists which the request would change.
pub struct MustBeNew(pub bool);

impl FromRequest for MustBeNew {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let is_any = |value: &header::HeaderValue| value.as_bytes().trim_ascii() == b"*";
        ready(match request.headers().get(header::IF_NONE_MATCH) {
            None => Ok(Self(false)),
            Some(value) if is_any(value) => Ok(Self(true)),
            Some(_) => Err(ApiError::field("If-None-Match", "must be `*`")),
        })
    }
}

fn parse(request: &HttpRequest) -> Result<ExpectedVersion, ApiError> {
    let Some(value) = request.headers().get(header::IF_MATCH) else { return Ok(None) };
    let refused = || ApiError::field("If-Match", "must be `*` or the ETag of one version, such as \"1\"");
    let tag = value.to_str().map_err(|_| refused())?.trim();
    if tag == "*" {
        return Ok(None);
    }
    let version = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).ok_or_else(refused)?;
    // An unknown ETag matches no version.
    Ok(Some(version.parse().unwrap_or(-1)))
}
