//! Pages of lists: the keys of a page's rows, by the index of the list's order.
//!
//! The statements are composed of constant text and bound parameters, because orders and filters
//! combine. They read keys only; statements that are checked at compile time read the rows.
//!
//! A page costs the same anywhere in a list: it seeks its position in an index. Conditions that no
//! index serves are checked row by row, on a bounded number of rows.

use std::collections::HashMap;

use sqlx::{Postgres, QueryBuilder, Row, postgres::PgRow};

use crate::{
    domain::listing::{ListRequest, Listed, Next, Order, Position, SortKey, SortValue},
    storage::{PgConnection, StorageError},
};

/// Maximum number of rows that a page reads and that grants hide.
pub const HIDDEN_MAX: usize = 1_000;
/// Maximum number of rows that a page reads in search of a part of a name. It is part of an index.
pub const SEARCHED_MAX: usize = 20_000;
/// Expiry that sorts after every time, as the indexes have it.
pub const EXPIRY: &str = "coalesce(expires_at, 'infinity'::timestamptz)";

/// A statement in progress.
pub type Sql = QueryBuilder<Postgres>;

/// Source of a list's keys.
pub struct Source<'a> {
    /// The table.
    pub table: &'static str,
    /// Unique column.
    pub key: Key,
    /// Adds conditions that an index serves, each after ` AND `.
    pub indexed: &'a (dyn Fn(&mut Sql) + Sync),
    /// Conditions that are checked row by row, and the number of rows.
    pub checked: Option<Checked<'a>>,
}

/// Conditions that are checked row by row.
pub struct Checked<'a> {
    /// Adds the conditions, each after ` AND `.
    pub conditions: &'a (dyn Fn(&mut Sql) + Sync),
    /// Maximum number of rows that a page reads.
    pub rows: usize,
}

/// Unique column that completes the order of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// `name`
    Name,
    /// `id`, a UUID.
    Id,
}

impl Key {
    fn column(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Id => "id",
        }
    }

    fn push(self, sql: &mut Sql, key: &str) {
        sql.push_bind(key.to_owned());
        if self == Self::Id {
            sql.push("::uuid");
        }
    }
}

/// Column that an order sorts by before the unique one, and its value for a position.
fn sorted_by(order: Order) -> Option<(&'static str, &'static str)> {
    match order.key {
        SortKey::Name | SortKey::Id => None,
        SortKey::SharedName => Some((r#"name COLLATE "C""#, "list_sort")),
        SortKey::CreatedAt => Some(("created_at", "list_sort")),
        // The driver does not decode `infinity`.
        SortKey::ExpiresAt => Some((EXPIRY, "nullif(list_sort, 'infinity'::timestamptz)")),
    }
}

/// Reads the keys of a page.
pub async fn page(
    conn: &mut PgConnection,
    source: &Source<'_>,
    request: &ListRequest,
) -> Result<Listed<String>, StorageError> {
    let mut found = positions(conn, source, request).await?;
    let has_next = found.hits.len() > request.limit;
    found.hits.truncate(request.limit);
    let next = if has_next { found.hits.last().cloned().map(Next::Item) } else { found.end.map(Next::Row) };
    Ok(Listed { items: found.hits.into_iter().map(|position| position.key).collect(), next })
}

/// Rows that a page found.
struct Found {
    hits: Vec<Position>,
    /// Last row that was read, if rows may follow it although the page is short.
    end: Option<Position>,
}

async fn positions(conn: &mut PgConnection, source: &Source<'_>, request: &ListRequest) -> Result<Found, StorageError> {
    // One more than the page has tells whether another one follows.
    let wanted = request.limit + 1;
    let mut sql = statement(source, request, wanted);
    // Not prepared: Postgres plans it for these values, and its cache of statements stays small.
    let rows = sql.build().persistent(false).fetch_all(conn).await?;
    let mut found = Found { hits: Vec::with_capacity(rows.len()), end: None };
    for row in &rows {
        let position = position(request.order, row)?;
        if row.try_get("is_end")? {
            found.end = Some(position.clone());
        }
        if row.try_get("is_hit")? {
            found.hits.push(position);
        }
    }
    if found.hits.len() == wanted {
        found.end = None;
    }
    Ok(found)
}

fn statement(source: &Source<'_>, request: &ListRequest, wanted: usize) -> Sql {
    let Source { table, key, .. } = *source;
    let ListRequest { order, after, .. } = request;
    let direction = if order.descending { " DESC" } else { "" };
    let column = key.column();
    let (value, columns, order_by, found_order_by) = match sorted_by(*order) {
        Some((by, value)) => (
            value,
            format!("{column} AS list_key, {by} AS list_sort"),
            format!("{by}{direction}, {column}{direction}"),
            format!("found.list_sort{direction}, found.list_key{direction}"),
        ),
        None => (
            "NULL::text",
            format!("{column} AS list_key"),
            format!("{column}{direction}"),
            format!("found.list_key{direction}"),
        ),
    };
    let rows = source.checked.as_ref().map_or(wanted, |checked| checked.rows);
    let rows = i64::try_from(rows).unwrap_or(i64::MAX);
    let mut sql = Sql::new("SELECT list_key::text AS list_key, ");
    sql.push(value).push(" AS list_value, is_hit, ");
    match &source.checked {
        Some(checked) => {
            sql.push("list_place = ").push_bind(rows).push(" AS is_end FROM (SELECT *, coalesce(true");
            (checked.conditions)(&mut sql);
            sql.push(", false) AS is_hit FROM (SELECT *, row_number() OVER (ORDER BY ").push(&order_by);
            sql.push(") AS list_place, ");
        }
        None => {
            sql.push("false AS is_end FROM (SELECT *, true AS is_hit, 0 AS list_place FROM (SELECT ");
        }
    }
    sql.push(columns).push(" FROM ").push(table).push(" WHERE true");
    (source.indexed)(&mut sql);
    if let Some(after) = after {
        seek(&mut sql, key, *order, after);
    }
    sql.push(" ORDER BY ").push(order_by).push(" LIMIT ").push_bind(rows).push(") AS seen) AS found WHERE is_hit");
    if source.checked.is_some() {
        sql.push(" OR list_place = ").push_bind(rows);
    }
    sql.push(" ORDER BY ").push(found_order_by).push(" LIMIT ");
    sql.push_bind(i64::try_from(wanted).unwrap_or(i64::MAX));
    sql
}

/// Adds the condition that a row follows a position.
fn seek(sql: &mut Sql, key: Key, order: Order, after: &Position) {
    let comparison = if order.descending { " < " } else { " > " };
    let column = key.column();
    let Some((by, _)) = sorted_by(order) else {
        sql.push(" AND ").push(column).push(comparison);
        return key.push(sql, &after.key);
    };
    sql.push(" AND (").push(by).push(", ").push(column).push(")").push(comparison).push("(");
    match &after.value {
        SortValue::Text(text) => sql.push_bind(text.clone()).push(r#" COLLATE "C""#),
        SortValue::Time(Some(time)) => sql.push_bind(*time),
        SortValue::Time(None) | SortValue::Unique => sql.push("'infinity'::timestamptz"),
    };
    sql.push(", ");
    key.push(sql, &after.key);
    sql.push(")");
}

fn position(order: Order, row: &PgRow) -> Result<Position, StorageError> {
    let value = match order.key {
        SortKey::Name | SortKey::Id => SortValue::Unique,
        SortKey::SharedName => SortValue::Text(row.try_get("list_value")?),
        SortKey::CreatedAt => SortValue::Time(Some(row.try_get("list_value")?)),
        SortKey::ExpiresAt => SortValue::Time(row.try_get("list_value")?),
    };
    Ok(Position { value, key: row.try_get("list_key")? })
}

/// Number of rows to read: one more than the page has tells whether another one follows.
pub(super) fn wanted(request: &ListRequest) -> i64 {
    i64::try_from(request.limit + 1).unwrap_or(i64::MAX)
}

/// Cuts a page from up to [`wanted`] rows of a list with unique keys.
pub(super) fn cut<T>(mut rows: Vec<T>, request: &ListRequest, key: impl Fn(&T) -> String) -> Listed<T> {
    let has_next = rows.len() > request.limit;
    rows.truncate(request.limit);
    let next = rows.last().filter(|_| has_next).map(|last| Next::Item(Position::unique(key(last))));
    Listed { items: rows, next }
}

/// Sorts rows in the order of a page's keys, and returns the page. Rows that were deleted since
/// the keys were read are left out.
pub(super) fn arrange<T>(page: Listed<String>, mut rows: Vec<T>, key: impl Fn(&T) -> String) -> Listed<T> {
    let places: HashMap<String, usize> = page.items.into_iter().enumerate().map(|(place, key)| (key, place)).collect();
    rows.sort_by_key(|row| places.get(&key(row)).copied());
    Listed { items: rows, next: page.next }
}

/// Adds the condition that a name contains a part.
pub(super) fn push_name_part(sql: &mut Sql, part: &str) {
    sql.push(" AND strpos(name, ").push_bind(part.to_owned()).push(") > 0");
}
