//! Pages of lists, addressed by the key of the last item, so that every page costs the same.

use std::{
    fmt::{self, Display},
    marker::PhantomData,
    str::FromStr,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Serialize;
use utoipa::{
    IntoParams, PartialSchema, ToSchema,
    openapi::{
        Required,
        path::{Parameter, ParameterBuilder, ParameterIn},
    },
};

use crate::{
    domain::{
        invalid::Invalid,
        listing::{ListRequest, Listed, NamePart, Next, Position, Sort},
        names::{Name, NamespaceName},
    },
    http::{
        problem::ApiError,
        query::{FromQuery, Query},
    },
    service::{CursorKey, ServiceError},
    storage::PageRequest,
};

const LIMIT_DEFAULT: usize = 50;
const LIMIT_MAX: usize = 500;

/// One page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// Items, in the order of the list.
    pub items: Vec<T>,
    /// Cursor of the next page; `null` on the last page.
    pub next: Option<String>,
}

impl<V> Page<V> {
    /// Builds a page from up to [`rows`](PageQuery::rows) items.
    pub fn of<T: Into<V>, K>(mut found: Vec<T>, page_query: &PageQuery<K>, key: impl Fn(&T) -> String) -> Self {
        let has_next = found.len() > page_query.limit;
        found.truncate(page_query.limit);
        let next = found.last().filter(|_| has_next).map(|last| BASE64_URL_SAFE_NO_PAD.encode(key(last)));
        Self { items: found.into_iter().map(T::into).collect(), next }
    }

    /// Builds a page of a list of another service, which names the place of the next page.
    pub fn continued<K: Display>(items: Vec<V>, next: Option<&K>) -> Self {
        Self { items, next: next.map(|place| BASE64_URL_SAFE_NO_PAD.encode(place.to_string())) }
    }

    /// Builds a page of a list. Its cursor names an item, or hides a row that is none.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Crypto`] if the cursor cannot be sealed.
    pub fn listed<T: Into<V>, S: Sort, K>(
        found: Listed<T>,
        query: &ListQuery<S, K>,
        key: &CursorKey,
    ) -> Result<Self, ApiError> {
        let next = match found.next {
            Some(Next::Item(position)) => Some(position.to_text(query.sort)),
            Some(Next::Row(position)) => {
                let sealed = key.seal(&position.to_text(query.sort)).map_err(ServiceError::from)?;
                Some(format!("{SEALED}{sealed}"))
            }
            None => None,
        };
        let items = found.items.into_iter().map(T::into).collect();
        Ok(Self { items, next: next.map(|next| BASE64_URL_SAFE_NO_PAD.encode(next)) })
    }
}

/// Selects a page of a list whose items are ordered by keys of type `K`.
#[derive(Debug)]
pub struct PageQuery<K> {
    limit: usize,
    cursor: Option<K>,
}

/// Documentation of [`PageQuery`]: utoipa would require a schema of `K`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documents PageQuery")]
struct PageParameters {
    /// Maximum number of items in the page.
    #[param(minimum = 1, maximum = 500, default = 50)]
    limit: Option<i64>,
    /// `next` of the previous page.
    cursor: Option<String>,
}

impl<K> IntoParams for PageQuery<K> {
    fn into_params(parameter_in: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        PageParameters::into_params(parameter_in)
    }
}

impl<K: FromStr> FromQuery for PageQuery<K> {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { limit: limit(query), cursor: query.one("cursor", decode) }
    }
}

impl<K> PageQuery<K> {
    /// Key of the last item of the previous page.
    pub fn after(&self) -> Option<&K> {
        self.cursor.as_ref()
    }

    /// Maximum number of items in the page.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Number of rows to fetch: one more than the page holds, which shows whether another page
    /// follows.
    pub fn rows(&self) -> i64 {
        i64::try_from(self.limit + 1).unwrap_or(i64::MAX)
    }
}

impl<K: Display> PageQuery<K> {
    /// The query for the database.
    pub fn request(&self) -> PageRequest {
        PageRequest { after: self.after().map(K::to_string), limit: self.rows() }
    }
}

fn decode<K: FromStr>(cursor: &str) -> Result<K, Invalid> {
    let key = decode_text(cursor).and_then(|key| key.parse().ok());
    key.ok_or_else(|| Invalid::new("must be the `next` of an earlier page"))
}

fn decode_text(cursor: &str) -> Option<String> {
    BASE64_URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|text| String::from_utf8(text).ok())
}

/// First character of a cursor that hides a row. No position starts with it.
const SEALED: char = '~';

/// Selects a page of a list with the orders of `S`, whose items have unique keys of type `K`.
#[derive(Debug)]
pub struct ListQuery<S, K = Name> {
    limit: usize,
    sort: S,
    cursor: Option<Cursor>,
    key: PhantomData<K>,
}

#[derive(Debug)]
enum Cursor {
    Open(Position),
    Sealed(String),
}

impl<S: Sort + PartialSchema, K> IntoParams for ListQuery<S, K> {
    fn into_params(parameter_in: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let mut parameters = PageParameters::into_params(parameter_in);
        let sort = ParameterBuilder::new()
            .name("sort")
            .parameter_in(ParameterIn::Query)
            .required(Required::False)
            .description(Some(format!(
                "Order of the list; `{}` by default. A cursor continues its own order only.",
                S::default().as_str()
            )))
            .schema(Some(S::schema()));
        parameters.push(sort.build());
        parameters
    }
}

impl<S: Sort, K: FromStr> FromQuery for ListQuery<S, K> {
    fn from_query(query: &mut Query<'_>) -> Self {
        let limit = limit(query);
        let sort = query.one("sort", S::from_str).unwrap_or_default();
        let cursor = query.one("cursor", |cursor| {
            let text = decode_text(cursor).ok_or_else(another_list)?;
            match text.strip_prefix(SEALED) {
                Some(sealed) => Ok(Cursor::Sealed(sealed.to_owned())),
                None => Self::position(&text, sort).map(Cursor::Open),
            }
        });
        Self { limit, sort, cursor, key: PhantomData }
    }
}

impl<S: Sort, K: FromStr> ListQuery<S, K> {
    fn position(text: &str, sort: S) -> Result<Position, Invalid> {
        Position::parse(text, sort, |key| key.parse::<K>().is_ok()).ok_or_else(another_list)
    }

    /// The query for the database.
    ///
    /// # Errors
    ///
    /// 422 if the cursor is sealed, and not of this list and order.
    pub fn request(&self, key: &CursorKey) -> Result<ListRequest, ApiError> {
        let after = match &self.cursor {
            Some(Cursor::Open(position)) => Some(position.clone()),
            Some(Cursor::Sealed(sealed)) => {
                let opened = key.open(sealed).ok_or_else(another_list);
                let position = opened.and_then(|text| Self::position(&text, self.sort));
                Some(position.map_err(|invalid| ApiError::field("cursor", invalid))?)
            }
            None => None,
        };
        Ok(ListRequest { order: self.sort.order(), after, limit: self.limit })
    }
}

fn another_list() -> Invalid {
    Invalid::new("must be the `next` of an earlier page with the same `sort`")
}

fn limit(query: &mut Query<'_>) -> usize {
    let limit = query.one("limit", |value| match value.parse() {
        Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => Ok(limit),
        _ => Err(Invalid::new("must be a number from 1 to 500")),
    });
    limit.unwrap_or(LIMIT_DEFAULT)
}

/// Filter of a list of named resources.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct NameQuery {
    /// Lists only resources whose name contains this part, in any case.
    #[param(value_type = Option<String>, example = "team-a")]
    pub q: Option<NamePart>,
}

impl FromQuery for NameQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { q: query.one("q", NamePart::parse) }
    }
}

/// Key of a pull secret's target: `CLUSTER/NAMESPACE`.
#[derive(Debug)]
pub struct TargetKey {
    cluster: Name,
    namespace: NamespaceName,
}

impl FromStr for TargetKey {
    type Err = Invalid;

    fn from_str(key: &str) -> Result<Self, Invalid> {
        let (cluster, namespace) = key.split_once('/').ok_or_else(|| Invalid::new("must contain a `/`"))?;
        Ok(Self { cluster: cluster.parse()?, namespace: namespace.parse()? })
    }
}

impl Display for TargetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::query::parse;

    fn page(query: &str, found: &[&str]) -> Page<String> {
        let page_query: PageQuery<Name> = parse(query).unwrap();
        Page::of(found.iter().map(|name| (*name).to_owned()).collect(), &page_query, String::clone)
    }

    #[test]
    fn a_full_page_has_a_cursor_if_another_follows() {
        assert_eq!(page("limit=2", &["a", "b"]).next, None);
        let first = page("limit=2", &["a", "b", "c"]);
        assert_eq!(first.items, ["a", "b"]);
        let next: PageQuery<Name> = parse(&format!("cursor={}", first.next.unwrap())).unwrap();
        let request = next.request();
        assert_eq!((request.after.as_deref(), request.limit), (Some("b"), 51));
    }

    #[test]
    fn a_cursor_of_another_list_is_refused() {
        let cursor = BASE64_URL_SAFE_NO_PAD.encode("dev/team-a");
        let target: PageQuery<TargetKey> = parse(&format!("cursor={cursor}")).unwrap();
        assert_eq!(target.request().after.as_deref(), Some("dev/team-a"));
        assert!(parse::<PageQuery<Name>>(&format!("cursor={cursor}")).is_err());
        assert!(parse::<PageQuery<uuid::Uuid>>(&format!("cursor={cursor}")).is_err());
    }
}
