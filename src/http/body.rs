//! Request bodies: read within limits of size and time, parsed, and refused with the name of the field.

use std::{future::Future, pin::Pin, time::Duration};

use actix_web::{
    FromRequest, HttpMessage, HttpRequest,
    dev::Payload,
    web::{Bytes, BytesMut},
};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use crate::{domain::invalid::FieldError, http::problem::ApiError};

/// The longest JSON body, in bytes. A kubeconfig or 1,000 names of accounts fit many times over.
const JSON_MAX_BYTES: usize = 512 * 1024;
/// A body that is not whole after this time is cut off: actix guards the headers of a slow client only.
const READ_WITHIN: Duration = Duration::from_secs(10);

const JSON: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";

/// A JSON body. Unknown fields are refused where `T` does so, and every refusal names the field without
/// repeating its value.
pub struct Json<T>(pub T);

/// A JSON merge patch (RFC 7396), also taken as plain JSON.
pub struct MergePatch<T>(pub T);

type BoxedFuture<T> = Pin<Box<dyn Future<Output = Result<T, ApiError>>>>;

impl<T: DeserializeOwned + 'static> FromRequest for Json<T> {
    type Error = ApiError;
    type Future = BoxedFuture<Self>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let is_right = [JSON].contains(&request.content_type());
        let body = read(request, payload.take(), JSON_MAX_BYTES);
        Box::pin(async move {
            if !is_right {
                return Err(ApiError::UnsupportedMediaType("application/json"));
            }
            parse(&body.await?).map(Self)
        })
    }
}

impl<T: DeserializeOwned + 'static> FromRequest for MergePatch<T> {
    type Error = ApiError;
    type Future = BoxedFuture<Self>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let is_right = [JSON, MERGE_PATCH].contains(&request.content_type());
        let body = read(request, payload.take(), JSON_MAX_BYTES);
        Box::pin(async move {
            if !is_right {
                return Err(ApiError::UnsupportedMediaType("application/merge-patch+json, application/json"));
            }
            parse(&body.await?).map(Self)
        })
    }
}

/// Reads a body of at most `limit` bytes; one that announces more is refused unread.
fn read(
    request: &HttpRequest,
    mut payload: Payload,
    limit: usize,
) -> impl Future<Output = Result<Bytes, ApiError>> + use<> {
    let announced = request
        .headers()
        .get(actix_web::http::header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok())
        .unwrap_or_default();
    async move {
        if announced > limit {
            return Err(ApiError::BodyTooLarge(limit));
        }
        let all = async {
            let mut body = BytesMut::with_capacity(announced);
            while let Some(chunk) = payload.next().await {
                let chunk = chunk.map_err(|_| ApiError::BodyUnreadable)?;
                if body.len() + chunk.len() > limit {
                    return Err(ApiError::BodyTooLarge(limit));
                }
                body.extend_from_slice(&chunk);
            }
            Ok(body.freeze())
        };
        tokio::time::timeout(READ_WITHIN, all).await.map_err(|_| ApiError::BodyTimeout)?
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        refusal(&path, error.inner())
    })?;
    json.end().map_err(|error| refusal(".", &error))?;
    Ok(parsed)
}

/// Says what is wrong with a body. Syntax is described by place alone, and of a wrong value only what was
/// expected is passed on: serde's messages repeat the value, which may be a password in the wrong field.
fn refusal(path: &str, error: &serde_json::Error) -> ApiError {
    use serde_json::error::Category;
    let place = format!("line {}, column {}", error.line(), error.column());
    match error.classify() {
        Category::Data => {
            let (field, detail) = data_refusal(path, &error.to_string());
            vec![FieldError::new(field, detail)].into()
        }
        Category::Eof => ApiError::MalformedJson(format!("it ends too early, at {place}")),
        Category::Syntax | Category::Io => ApiError::MalformedJson(format!("there is an error at {place}")),
    }
}

fn data_refusal(path: &str, message: &str) -> (String, String) {
    let parent = if path == "." { String::new() } else { path.to_owned() };
    let quoted = || message.split('`').nth(1).unwrap_or_default();
    let beside = |name: &str| match parent.rsplit_once('.') {
        // serde_path_to_error counts an unknown field to the path, but not a missing one.
        _ if parent.is_empty() || parent.ends_with(name) => parent.clone().max(name.to_owned()),
        _ => format!("{parent}.{name}"),
    };
    if message.starts_with("missing field") {
        let name = quoted();
        let field = if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") };
        return (field, "is missing".to_owned());
    }
    if message.starts_with("duplicate field") {
        return (beside(quoted()), "is there twice".to_owned());
    }
    if message.starts_with("unknown field") {
        let known = message.rsplit_once(", expected ").map(|(_, known)| without_place(known));
        let detail = known.map_or_else(
            || "is not a known field".to_owned(),
            |known| format!("is not a known field; known are {known}"),
        );
        return (clipped(&beside(quoted())), detail);
    }
    let expected = message.rsplit_once(", expected ").map(|(_, expected)| without_place(expected));
    let detail = expected.map_or_else(|| "is not valid".to_owned(), |expected| format!("must be {expected}"));
    (clipped(&parent), detail)
}

fn without_place(message: &str) -> &str {
    message.split(" at line ").next().unwrap_or_default()
}

/// Names of unknown fields come from the caller: as much of one as helps him to find it.
fn clipped(field: &str) -> String {
    field.chars().take(100).collect()
}
