//! Lists: pages by name, so that a page costs the same wherever it is.

use std::{
    collections::BTreeMap,
    future::{Ready, ready},
};

use actix_web::{FromRequest, HttpRequest, dev::Payload};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Serialize;
use url::form_urlencoded;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::{
        invalid::{FieldError, FieldErrors},
        names::{Labels, Name, NamespaceName},
        pull_secret::TargetState,
    },
    http::problem::ApiError,
    storage::PageRequest,
};

const LIMIT_DEFAULT: i64 = 50;
const LIMIT_MAX: i64 = 500;

/// One page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// The resources, in the order of their names; API keys in the order in which they were made.
    pub items: Vec<T>,
    /// The cursor of the next page; `null` on the last one.
    pub next: Option<String>,
}

/// Which page of a list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query to clients; PageQuery and LabelledPageQuery parse it")]
pub struct PageParams {
    /// The most items in the page, 1 to 500; 50 if not said.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<i64>,
    /// The `next` of the page before.
    cursor: Option<String>,
}

/// A filter by label.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query to clients; LabelledPageQuery parses it")]
pub struct LabelParams {
    /// Only resources with this label, as `key=value`; may be given several times.
    label: Option<Vec<String>>,
}

/// A filter by expiry.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query to clients; LabelledPageQuery parses it")]
pub struct ExpiryParams {
    /// Only resources whose `expiresAt` is at most so far away, or past: a number of days (`30d`) or hours (`12h`).
    #[param(rename = "expiresWithin", example = "30d")]
    expires_within: Option<String>,
}

/// The query of a list without a filter.
pub struct PageQuery(pub PageRequest);

/// The query of a list that can be filtered by label.
pub struct LabelledPageQuery {
    /// Which page.
    pub page: PageRequest,
    /// Only with all of these labels.
    pub labels: Labels,
    /// Only those that expire within so many seconds.
    pub expires_within_seconds: Option<i64>,
}

impl FromRequest for PageQuery {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(parse(request, false).map(|query| Self(query.page)))
    }
}

impl FromRequest for LabelledPageQuery {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(parse(request, true))
    }
}

/// The query of a list of a pull secret's targets.
pub struct TargetPage {
    /// Which page.
    pub page: PageRequest,
    /// Only those in this state.
    pub state: Option<TargetState>,
}

impl FromRequest for TargetPage {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(parse_targets(request.query_string()))
    }
}

fn parse_targets(query: &str) -> Result<TargetPage, ApiError> {
    let mut page = PageRequest { after: None, limit: LIMIT_DEFAULT + 1 };
    let mut state = None;
    let mut errors = FieldErrors::default();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "limit" => match value.parse() {
                Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => page.limit = limit + 1,
                _ => errors.refuse("limit", "must be a number from 1 to 500"),
            },
            "cursor" => match decode_target(&value) {
                Some(after) => page.after = Some(after),
                None => errors.refuse("cursor", "must be the `next` of an earlier page"),
            },
            "state" => state = errors.take("state", value.parse()),
            other => errors.refuse(&other.chars().take(50).collect::<String>(), "is not a known query parameter"),
        }
    }
    Ok(errors.finish(|| Some(TargetPage { page, state }))?)
}

/// `CLUSTER/NAMESPACE`
fn decode_target(cursor: &str) -> Option<String> {
    let target = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
    let (cluster, namespace) = target.split_once('/')?;
    (Name::parse(cluster).is_ok() && NamespaceName::parse(namespace).is_ok()).then_some(target)
}

/// As [`page`], for targets, which are listed by cluster and namespace.
pub fn page_of_targets<T, V: From<T>>(mut found: Vec<T>, asked: &PageRequest, place: impl Fn(&T) -> String) -> Page<V> {
    let limit = usize::try_from(asked.limit - 1).unwrap_or_default();
    let has_next = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| has_next).map(|last| BASE64_URL_SAFE_NO_PAD.encode(place(last)));
    Page { items: found.into_iter().map(V::from).collect(), next }
}

fn parse(request: &HttpRequest, takes_labels: bool) -> Result<LabelledPageQuery, ApiError> {
    // One more than asked for, to know whether there is a next page.
    let mut page = PageRequest { after: None, limit: LIMIT_DEFAULT + 1 };
    let mut labels = BTreeMap::new();
    let mut expires_within_seconds = None;
    let mut errors = Vec::new();
    let mut refuse = |field: &str, detail: &str| errors.push(FieldError::new(field, detail));
    for (key, value) in form_urlencoded::parse(request.query_string().as_bytes()) {
        match &*key {
            "limit" => match value.parse() {
                Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => page.limit = limit + 1,
                _ => refuse("limit", "must be a number from 1 to 500"),
            },
            "cursor" => match decode(&value) {
                Some(name) => page.after = Some(name),
                None => refuse("cursor", "must be the `next` of an earlier page"),
            },
            "label" if takes_labels => match value.split_once('=') {
                Some((key, value)) => drop(labels.insert(key.to_owned(), value.to_owned())),
                None => refuse("label", "must be key=value"),
            },
            "expiresWithin" if takes_labels => match seconds(&value) {
                Some(seconds) => expires_within_seconds = Some(seconds),
                None => refuse("expiresWithin", "must be a number of days or hours, such as 30d or 12h"),
            },
            other => refuse(&other.chars().take(50).collect::<String>(), "is not a known query parameter"),
        }
    }
    let labels = Labels::parse(labels).map_err(|invalid| refuse("label", &invalid.to_string()));
    match labels {
        Ok(labels) if errors.is_empty() => Ok(LabelledPageQuery { page, labels, expires_within_seconds }),
        _ => Err(errors.into()),
    }
}

fn seconds(duration: &str) -> Option<i64> {
    let (number, unit) = duration.split_at_checked(duration.len().checked_sub(1)?)?;
    let number: i64 = number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())??;
    let unit = match unit {
        "d" => 86_400,
        "h" => 3_600,
        _ => return None,
    };
    (number <= 100_000).then_some(number * unit)
}

fn decode(cursor: &str) -> Option<String> {
    let name = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
    Name::parse(&name).is_ok().then_some(name)
}

/// As [`page`], for resources that are listed by id: names of API keys come again after a revocation.
pub fn page_by_id<T, V: From<T>>(mut found: Vec<T>, asked: &PageRequest, id: impl Fn(&T) -> Uuid) -> Page<V> {
    let limit = usize::try_from(asked.limit - 1).unwrap_or_default();
    let has_next = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| has_next).map(|last| BASE64_URL_SAFE_NO_PAD.encode(id(last).to_string()));
    Page { items: found.into_iter().map(V::from).collect(), next }
}

/// Shapes a page of what was found for a [`PageRequest`], which asked for one more than the caller did.
pub fn page<T, V: From<T>>(mut found: Vec<T>, asked: &PageRequest, name: impl Fn(&T) -> &str) -> Page<V> {
    let limit = usize::try_from(asked.limit - 1).unwrap_or_default();
    let has_next = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| has_next).map(|last| BASE64_URL_SAFE_NO_PAD.encode(name(last)));
    Page { items: found.into_iter().map(V::from).collect(), next }
}
