//! Request bodies: read within limits of size and time, and parsed with errors that name the field.

use std::{
    future::Future,
    pin::Pin,
    time::{Duration, Instant},
};

use actix_web::{
    FromRequest, HttpMessage, HttpRequest,
    dev::Payload,
    web::{Bytes, BytesMut},
};
use futures_util::StreamExt;
use serde::de::{DeserializeOwned, IgnoredAny};
use utoipa::ToSchema;

use crate::{
    domain::invalid::FieldError,
    http::{idempotency, problem::ApiError},
    service::ServiceError,
};

mod required;

/// Default limit of a JSON body, in bytes. It is many times the size of a kubeconfig or of 1,000
/// account names.
const JSON_MAX_BYTES: usize = 512 * 1024;
/// Limit of a body with a docker config, in bytes: the maximum size of a Secret, in base64 and in a
/// manifest.
pub const DOCUMENT_MAX_BYTES: usize = 2 * 1024 * 1024;
/// Time in which a body must arrive. actix-web limits only the time for the headers.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Detail of a missing field.
const IS_MISSING: &str = "is missing";
/// Detail of an invalid time.
const TIME: &str = "must be a time, such as 2027-01-31T00:00:00Z";
/// Lists of names, by field, with an example.
const LISTS: [(&str, &str); 5] = [
    ("accounts", r#"["prod"]"#),
    ("clusters", r#"["dev"]"#),
    ("namespaces", r#"["default"]"#),
    ("serviceAccounts", r#"["default"]"#),
    ("sourceCidrs", r#"["10.0.0.0/8"]"#),
];

const JSON: &str = "application/json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const YAML: &str = "application/yaml";
const TEXT: &str = "text/plain";

/// A JSON body of at most `MAX` bytes.
///
/// `T` decides whether unknown fields are refused. Errors name the field and never repeat its
/// value.
pub struct Json<T, const MAX: usize = JSON_MAX_BYTES>(pub T);

/// An optional JSON body.
pub struct OptionalJson<T>(pub Option<T>);

/// A JSON merge patch (RFC 7396), also accepted as `application/json`.
pub struct MergePatch<T>(pub T);

/// A docker config in any format, unparsed.
pub struct Document(pub Bytes);

type BoxedFuture<T> = Pin<Box<dyn Future<Output = Result<T, ApiError>>>>;

impl<T: DeserializeOwned + ToSchema + 'static, const MAX: usize> FromRequest for Json<T, MAX> {
    type Error = ApiError;
    type Future = BoxedFuture<Self>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let body = read_as(request, payload, &[JSON], MAX);
        Box::pin(async move { parse(&body.await?).map(Self) })
    }
}

impl<T: DeserializeOwned + ToSchema + 'static> FromRequest for OptionalJson<T> {
    type Error = ApiError;
    type Future = BoxedFuture<Self>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let is_json = request.content_type() == JSON;
        let body = read(request, payload.take(), JSON_MAX_BYTES);
        Box::pin(async move {
            match body.await? {
                body if body.is_empty() => Ok(Self(None)),
                _ if !is_json => Err(ApiError::UnsupportedMediaType(&[JSON])),
                body => parse(&body).map(|parsed| Self(Some(parsed))),
            }
        })
    }
}

impl<T: DeserializeOwned + ToSchema + 'static> FromRequest for MergePatch<T> {
    type Error = ApiError;
    type Future = BoxedFuture<Self>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let body = read_as(request, payload, &[MERGE_PATCH, JSON], JSON_MAX_BYTES);
        Box::pin(async move { parse(&body.await?).map(Self) })
    }
}

impl FromRequest for Document {
    type Error = ApiError;
    type Future = BoxedFuture<Self>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let body = read_as(request, payload, &[JSON, YAML, TEXT], DOCUMENT_MAX_BYTES);
        Box::pin(async move { body.await.map(Self) })
    }
}

/// Reads a body that has one of the media types.
fn read_as(
    request: &HttpRequest,
    payload: &mut Payload,
    media_types: &'static [&'static str],
    limit: usize,
) -> impl Future<Output = Result<Bytes, ApiError>> + use<> {
    let is_right = media_types.contains(&request.content_type());
    let body = read(request, payload.take(), limit);
    async move { if is_right { body.await } else { Err(ApiError::UnsupportedMediaType(media_types)) } }
}

/// Time at which the body was complete. The client controls it.
pub struct BodyRead(pub Instant);

/// Reads a body of at most `limit` bytes. A body that announces more is refused unread.
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
    let request = request.clone();
    async move {
        if announced > limit {
            return Err(ApiError::BodyTooLarge(limit));
        }
        let chunks = async {
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
        let body = tokio::time::timeout(READ_TIMEOUT, chunks).await.map_err(|_| ApiError::BodyTimeout)?;
        request.extensions_mut().insert(BodyRead(Instant::now()));
        body.inspect(|body| idempotency::keep_body(&request, body))
    }
}

fn parse<T: DeserializeOwned + ToSchema>(body: &[u8]) -> Result<T, ApiError> {
    // serde would deserialize an array into a struct, field by field.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::field("", "must be a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let converted = convert(&path, error.inner(), body);
        if is_about_missing_field(error.inner()) { with_other_missing_fields::<T>(converted, body) } else { converted }
    })?;
    json.end().map_err(|error| convert(".", &error, body))?;
    Ok(parsed)
}

fn is_about_missing_field(error: &serde_json::Error) -> bool {
    error.is_data() && error.to_string().starts_with("missing field")
}

/// Adds the other missing fields: serde reports the first one alone.
fn with_other_missing_fields<T: ToSchema>(error: ApiError, body: &[u8]) -> ApiError {
    let ApiError::Service(ServiceError::Invalid(mut errors)) = error else { return error };
    let Ok(value) = serde_json::from_slice(body) else { return errors.into() };
    for field in required::missing::<T>(&value) {
        let field = clipped(&field);
        if errors.iter().all(|error| error.field != field) {
            errors.push(FieldError::new(field, IS_MISSING));
        }
    }
    errors.into()
}

/// Parses a document that was merged from a stored one and a request.
pub fn parse_merged<T: DeserializeOwned>(document: serde_json::Value) -> Result<T, Vec<FieldError>> {
    serde_path_to_error::deserialize(document).map_err(|error| {
        let (field, detail) = data_error(&error.path().to_string(), &error.inner().to_string());
        vec![FieldError::new(field, detail)]
    })
}

/// Converts a serde error.
///
/// A syntax error is described by its position, and an invalid value by the expectation: serde's
/// messages repeat the value, which may be a password in the wrong field.
fn convert(path: &str, error: &serde_json::Error, body: &[u8]) -> ApiError {
    use serde_json::error::Category;
    let position = format!("line {}, column {}", error.line(), error.column());
    match error.classify() {
        Category::Data => {
            let (field, detail) = data_error(path, &error.to_string());
            vec![FieldError::new(field, detail)].into()
        }
        // serde_json also reports values of a wrong type, such as a number for an enum, as syntax
        // errors.
        Category::Syntax if is_json(body) => ApiError::field(&clipped(path), "is not valid"),
        Category::Eof => ApiError::MalformedJson(format!("it ends too early, at {position}")),
        Category::Syntax | Category::Io => ApiError::MalformedJson(format!("syntax error at {position}")),
    }
}

fn is_json(body: &[u8]) -> bool {
    std::str::from_utf8(body).is_ok_and(|text| serde_json::from_str::<IgnoredAny>(text).is_ok())
}

/// The field and its error, from serde's message and path.
fn data_error(path: &str, message: &str) -> (String, String) {
    let path = if path == "." { "" } else { path };
    let named = message.split('`').nth(1).unwrap_or_default();
    let expected = message.rsplit_once(", expected ").map(|(_, expected)| without_position(expected));
    if message.starts_with("missing field") {
        // The path ends at the object that lacks the field.
        return (joined(path, named), IS_MISSING.to_owned());
    }
    if message.starts_with("duplicate field") {
        return (joined(parent(path, named), named), "is given twice".to_owned());
    }
    if message.starts_with("unknown field") {
        let known =
            expected.map_or_else(String::new, |known| format!("; known are {}", known.trim_start_matches("one of ")));
        return (joined(parent(path, named), named), format!("is not a known field{known}"));
    }
    let detail = match expected {
        Some(expected) => expectation(path, expected),
        None if is_about_time(message) => TIME.to_owned(),
        None => "is not valid".to_owned(),
    };
    (clipped(path), detail)
}

/// Words serde's description of an expected value for the caller.
fn expectation(path: &str, expected: &str) -> String {
    match expected {
        "a sequence" => {
            let field = path.rsplit('.').next().unwrap_or_default();
            let example = LISTS.iter().find(|(name, _)| *name == field);
            example.map_or_else(
                || "must be a list, in square brackets".to_owned(),
                |(_, example)| format!("must be a list, such as {example}"),
            )
        }
        "a map" => "must be an object, such as {\"name\": \"value\"}".to_owned(),
        "a boolean" => "must be true or false".to_owned(),
        "an RFC 3339 formatted date and time string" => TIME.to_owned(),
        "u8" | "u16" | "u32" | "u64" | "usize" => "must be a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" => "must be a whole number".to_owned(),
        _ if expected.starts_with("struct ") && path.is_empty() => "must be a JSON object".to_owned(),
        _ if expected.starts_with("struct ") => "must be an object, in curly brackets".to_owned(),
        _ => format!("must be {expected}"),
    }
}

/// Whether a message is one of chrono's. They are fixed texts, without the value.
fn is_about_time(message: &str) -> bool {
    let message = without_position(message);
    ["input contains invalid characters", "input is out of range", "premature end of input", "trailing input"]
        .contains(&message)
}

/// Path of the object that contains a field. serde's path may include the field.
fn parent<'a>(path: &'a str, field: &str) -> &'a str {
    path.strip_suffix(field).map_or(path, |parent| parent.trim_end_matches('.'))
}

fn joined(parent: &str, field: &str) -> String {
    clipped(&if parent.is_empty() { field.to_owned() } else { format!("{parent}.{field}") })
}

fn without_position(message: &str) -> &str {
    message.split(" at line ").next().unwrap_or_default()
}

/// Limits the length of a field name that the client chose.
fn clipped(field: &str) -> String {
    field.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, ToSchema)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    #[expect(dead_code, reason = "tests check only errors")]
    struct Outer {
        name: String,
        inner: Option<Inner>,
        list: Option<Vec<Inner>>,
        kind: Option<Kind>,
        namespaces: Option<Vec<String>>,
        expires_at: Option<chrono::DateTime<chrono::Utc>>,
        labels: Option<std::collections::BTreeMap<String, String>>,
        dry_run: Option<bool>,
    }

    #[derive(Debug, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "tests check only errors")]
    struct Inner {
        count: u8,
    }

    #[derive(Debug, Deserialize, ToSchema)]
    #[serde(rename_all = "camelCase")]
    enum Kind {
        One,
        Two,
    }

    #[rstest]
    #[case("{}", "name", "is missing")]
    #[case(
        r#"{"name":"a","nam":"canary"}"#,
        "nam",
        "is not a known field; known are `name`, `inner`, `list`, `kind`, `namespaces`, `expiresAt`, `labels`, `dryRun`"
    )]
    #[case(r#"{"name":"a","name":"canary"}"#, "name", "is given twice")]
    #[case(r#"{"name":["canary"]}"#, "name", "must be a string")]
    #[case(r#"{"name":42}"#, "name", "must be a string")]
    #[case(r#"{"name":"a","inner":{}}"#, "inner.count", "is missing")]
    #[case(r#"{"name":"a","inner":{"cont":"canary"}}"#, "inner.cont", "is not a known field; known are `count`")]
    #[case(r#"{"name":"a","inner":{"count":1,"count":2}}"#, "inner.count", "is given twice")]
    #[case(
        r#"{"name":"a","inner":{"count":"canary, expected nothing"}}"#,
        "inner.count",
        "must be a whole number, 0 or more"
    )]
    #[case(r#"{"name":"a","list":[{"count":1},{"count":256}]}"#, "list[1].count", "must be a whole number, 0 or more")]
    #[case(r#"{"name":"a","list":[{"count":1},{}]}"#, "list[1].count", "is missing")]
    #[case(r#"{"name":"a","kind":"canary"}"#, "kind", "must be `one` or `two`")]
    #[case(r#"{"name":"a","kind":42}"#, "kind", "is not valid")]
    #[case(r#"{"name":"a","kind":["canary"]}"#, "kind", "is not valid")]
    #[case(r#"{"name":"canary\ud800"}"#, "name", "is not valid")]
    #[case(r#"{"name":"a","inner":{"count":1e999}}"#, "inner.count", "is not valid")]
    #[case(r#"{"name":"a","namespaces":"canary"}"#, "namespaces", r#"must be a list, such as ["default"]"#)]
    #[case(r#"{"name":"a","list":{"count":1}}"#, "list", "must be a list, in square brackets")]
    #[case(r#"{"name":"a","inner":"canary"}"#, "inner", "must be an object, in curly brackets")]
    #[case(r#"{"name":"a","labels":["canary"]}"#, "labels", r#"must be an object, such as {"name": "value"}"#)]
    #[case(r#"{"name":"a","dryRun":"canary"}"#, "dryRun", "must be true or false")]
    #[case(r#"{"name":"a","expiresAt":"canary"}"#, "expiresAt", TIME)]
    #[case(r#"{"name":"a","expiresAt":"2027-01-31"}"#, "expiresAt", TIME)]
    #[case(r#"{"name":"a","expiresAt":"2027-02-30T00:00:00Z"}"#, "expiresAt", TIME)]
    #[case(r#"{"name":"a","expiresAt":"2027-01-31T00:00:00Zcanary"}"#, "expiresAt", TIME)]
    #[case(r#"{"name":"a","expiresAt":1}"#, "expiresAt", TIME)]
    #[case(r#"["canary"]"#, "", "must be a JSON object")]
    #[case(r#""canary""#, "", "must be a JSON object")]
    fn an_error_names_the_field_and_never_repeats_a_value(
        #[case] body: &str,
        #[case] field: &str,
        #[case] detail: &str,
    ) {
        let refused = parse::<Outer>(body.as_bytes()).err();
        let Some(ApiError::Service(ServiceError::Invalid(errors))) = refused else { panic!("{refused:?}") };
        assert_eq!((errors[0].field.as_str(), errors[0].detail.as_str()), (field, detail));
    }

    #[rstest]
    #[case("{}", &["name"])]
    #[case(r#"{"inner":{},"list":[{"count":1},{}]}"#, &["inner.count", "list[1].count", "name"])]
    #[case(r#"{"name":"a","inner":{},"list":[{}]}"#, &["inner.count", "list[0].count"])]
    #[case(r#"{"name":"a","inner":null,"list":[{}]}"#, &["list[0].count"])]
    fn all_missing_fields_are_named_at_once(#[case] body: &str, #[case] fields: &[&str]) {
        let refused = parse::<Outer>(body.as_bytes()).err();
        let Some(ApiError::Service(ServiceError::Invalid(errors))) = refused else { panic!("{refused:?}") };
        let mut named: Vec<&str> = errors.iter().map(|error| error.field.as_str()).collect();
        named.sort_unstable();
        assert_eq!(named, fields);
        assert!(errors.iter().all(|error| error.detail == IS_MISSING), "{errors:?}");
    }

    #[rstest]
    #[case(r#"{"name":"canary""#, "it ends too early, at line 1, column 16")]
    #[case(r#"{"name":"canary"}#"#, "syntax error at line 1, column 18")]
    #[case("", "it ends too early, at line 1, column 0")]
    fn malformed_json_is_described_by_position(#[case] body: &str, #[case] detail: &str) {
        let refused = parse::<Outer>(body.as_bytes()).err();
        let Some(ApiError::MalformedJson(message)) = refused else { panic!("{refused:?}") };
        assert_eq!(message, detail);
    }
}
