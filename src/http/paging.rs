//! Pages of lists, addressed by the key of the last item, so that every page costs the same.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Serialize;
use utoipa::{
    IntoParams, ToSchema,
    openapi::path::{Parameter, ParameterIn},
};

use crate::{
    domain::{
        invalid::Invalid,
        names::{Name, NamespaceName},
    },
    http::query::{FromQuery, Query},
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

    /// Continues after this position if the items do not tell that more follow.
    pub fn or_resumed_at(self, position: Option<&str>) -> Self {
        Self { next: self.next.or_else(|| position.map(|position| BASE64_URL_SAFE_NO_PAD.encode(position))), ..self }
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
        let limit = query.one("limit", |value| match value.parse() {
            Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => Ok(limit),
            _ => Err(Invalid::new("must be a number from 1 to 500")),
        });
        Self { limit: limit.unwrap_or(LIMIT_DEFAULT), cursor: query.one("cursor", decode) }
    }
}

impl<K> PageQuery<K> {
    /// Key of the last item of the previous page.
    pub fn after(&self) -> Option<&K> {
        self.cursor.as_ref()
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
    let key = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|key| String::from_utf8(key).ok());
    let key = key.and_then(|key| key.parse().ok());
    key.ok_or_else(|| Invalid::new("must be the `next` of an earlier page"))
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
