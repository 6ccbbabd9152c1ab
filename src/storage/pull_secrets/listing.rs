//! Lists of pull secrets.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{Row, StoredPullSecret, TABLE};
use crate::{
    domain::{
        grants::Grants,
        listing::{ListRequest, Listed, NamePart, Order, PullSecretState, SortKey},
    },
    storage::{
        PgConnection, StorageError, accounts,
        lists::{self, Checked, Key, Source, Sql},
    },
};

/// State of the pull secret `seen`, as in [`PullSecretState`].
///
/// Reads indexes up to the first entry. The orders make Postgres use them: it would otherwise expect
/// to find an entry soon in a scan of the table.
pub(in crate::storage) const STATE: &str = "CASE
    WHEN seen.deleted_at IS NOT NULL THEN 'deleting'
    WHEN (
        SELECT true FROM pull_secret_targets AS one
        WHERE one.pull_secret_id = seen.id AND one.state = 'conflict' AND one.wanted ORDER BY one.namespace LIMIT 1
    ) THEN 'conflict'
    WHEN (
        SELECT true FROM pull_secret_targets AS one
        WHERE one.pull_secret_id = seen.id AND one.state = 'failed' AND one.wanted ORDER BY one.namespace LIMIT 1
    ) THEN 'failed'
    WHEN (
        SELECT true FROM pull_secret_targets AS one
        WHERE one.pull_secret_id = seen.id AND one.state <> 'synced' ORDER BY one.state LIMIT 1
    ) OR EXISTS (
        SELECT FROM pull_secret_clusters AS link
        WHERE link.pull_secret_id = seen.id AND link.selects AND link.compared_version < seen.version
    ) THEN 'pending'
    ELSE 'synced'
END";

/// Filter of a list of pull secrets.
#[derive(Debug, Default)]
pub struct PullSecretFilter {
    /// Part of the name.
    pub name_part: Option<NamePart>,
    /// States, of which one must apply. Empty for any.
    pub states: Vec<PullSecretState>,
    /// Cluster that the declaration targets.
    pub cluster: Option<Uuid>,
    /// Namespace of a target.
    pub namespace: Option<String>,
    /// Ids, if only some pull secrets are asked for.
    pub ids: Option<Vec<Uuid>>,
}

/// Lists the pull secrets that match `filter` and whose accounts, clusters and namespaces are all
/// granted.
///
/// A page reads at most [`lists::HIDDEN_MAX`] rows that are hidden or do not match, or
/// [`lists::SEARCHED_MAX`] with a part of the name alone.
pub async fn list(
    conn: &mut PgConnection,
    grants: &Grants,
    request: &ListRequest,
    filter: &PullSecretFilter,
) -> Result<Listed<StoredPullSecret>, StorageError> {
    let is_seek = filter.states.is_empty() && filter.cluster.is_none() && filter.namespace.is_none();
    let is_seek = is_seek && grants.include_everything();
    let indexed = |sql: &mut Sql| {
        if let Some(ids) = &filter.ids {
            sql.push(" AND id = ANY(").push_bind(ids.clone()).push(")");
        }
    };
    let checks = |sql: &mut Sql| {
        push_filter(sql, filter);
        if !grants.include_everything() {
            push_granted(sql, grants);
        }
    };
    let rows = if is_seek { lists::SEARCHED_MAX } else { lists::HIDDEN_MAX };
    let checked = (!is_seek || filter.name_part.is_some()).then_some(Checked { conditions: &checks, rows });
    let source = Source { table: TABLE, key: Key::Name, indexed: &indexed, checked };
    let page = lists::page(conn, &source, request).await?;
    let found = find_listed(conn, &page.items).await?;
    Ok(lists::arrange(page, found, |one| one.name.to_string()))
}

/// Lists the ids of granted pull secrets in their order, from `from` on: `limit` at most.
pub async fn list_ids(
    conn: &mut PgConnection,
    grants: &Grants,
    (from, limit): (Uuid, usize),
    ids: Option<&[Uuid]>,
) -> Result<Listed<Uuid>, StorageError> {
    let indexed = |sql: &mut Sql| {
        sql.push(" AND id >= ").push_bind(from);
        if let Some(ids) = ids {
            sql.push(" AND id = ANY(").push_bind(ids.to_vec()).push(")");
        }
    };
    let checks = |sql: &mut Sql| {
        if !grants.include_everything() {
            push_granted(sql, grants);
        }
    };
    let checked = Some(Checked { conditions: &checks, rows: lists::HIDDEN_MAX });
    let source = Source { table: TABLE, key: Key::Id, indexed: &indexed, checked };
    let order = Order { key: SortKey::Id, descending: false };
    let page = lists::page(conn, &source, &ListRequest { order, after: None, limit }).await?;
    let items = page.items.iter().filter_map(|id| id.parse().ok()).collect();
    Ok(Listed { items, next: page.next })
}

fn push_filter(sql: &mut Sql, filter: &PullSecretFilter) {
    if let Some(part) = &filter.name_part {
        lists::push_name_part(sql, part.as_str());
    }
    if !filter.states.is_empty() {
        let states: Vec<String> = filter.states.iter().map(|state| state.as_str().to_owned()).collect();
        sql.push(" AND ").push(STATE).push(" = ANY(").push_bind(states).push(")");
    }
    if let Some(cluster) = filter.cluster {
        sql.push(" AND EXISTS (SELECT FROM pull_secret_clusters AS link WHERE link.pull_secret_id = seen.id");
        sql.push(" AND link.cluster_id = ").push_bind(cluster).push(")");
    }
    if let Some(namespace) = &filter.namespace {
        sql.push(" AND EXISTS (SELECT FROM pull_secret_targets AS one WHERE one.pull_secret_id = seen.id");
        sql.push(" AND one.namespace = ").push_bind(namespace.clone());
        if let Some(cluster) = filter.cluster {
            sql.push(" AND one.cluster_id = ").push_bind(cluster);
        }
        sql.push(")");
    }
}

/// Adds the condition that all that the pull secret `seen` names is granted.
///
/// A selector of namespaces requires a grant of all of them, and one of accounts must have all
/// labels of a grant, as in [`Declaration::is_within`](crate::domain::pull_secret::Declaration) and
/// [`Grants::include_accounts_with`].
pub(in crate::storage) fn push_granted(sql: &mut Sql, grants: &Grants) {
    let (clusters, namespaces) = (grants.cluster_ranges(), grants.namespace_ranges());
    sql.push(
        " AND NOT EXISTS (
              SELECT FROM jsonb_array_elements(declaration -> 'targets') AS target
              WHERE NOT EXISTS (SELECT FROM unnest(",
    );
    sql.push_bind(clusters.low).push("::text[], ").push_bind(clusters.high);
    sql.push(
        r#"::text[]) AS granted (low, high)
           WHERE target ->> 'cluster' >= low COLLATE "C" AND target ->> 'cluster' < high COLLATE "C")"#,
    );
    if !grants.include_all_namespaces() {
        sql.push(
            " OR target -> 'namespaces' IS NULL OR EXISTS (
                  SELECT FROM jsonb_array_elements_text(target -> 'namespaces') AS listed (name)
                  WHERE NOT EXISTS (SELECT FROM unnest(",
        );
        sql.push_bind(namespaces.low).push("::text[], ").push_bind(namespaces.high);
        sql.push(
            r#"::text[]) AS granted (low, high)
               WHERE listed.name >= low COLLATE "C" AND listed.name < high COLLATE "C"))"#,
        );
    }
    sql.push(")");
    if !grants.include_accounts_with(&BTreeMap::new()) {
        push_granted_accounts(sql, grants);
    }
}

fn push_granted_accounts(sql: &mut Sql, grants: &Grants) {
    let (accounts, labels) = (grants.account_ranges(), accounts::label_documents(grants));
    sql.push(
        " AND CASE
              WHEN declaration -> 'accounts' IS NULL THEN declaration -> 'accountSelector' -> 'matchLabels' @> ANY(",
    );
    sql.push_bind(labels.clone());
    sql.push(
        "::jsonb[])
              ELSE NOT EXISTS (
                  SELECT FROM jsonb_array_elements_text(declaration -> 'accounts') AS named (name)
                  WHERE NOT EXISTS (
                      SELECT FROM registry_accounts AS found WHERE found.name = named.name AND (found.labels @> ANY(",
    );
    sql.push_bind(labels).push("::jsonb[]) OR EXISTS (SELECT FROM unnest(").push_bind(accounts.low);
    sql.push("::text[], ").push_bind(accounts.high);
    sql.push(
        r#"::text[]) AS granted (low, high)
           WHERE found.name >= low COLLATE "C" AND found.name < high COLLATE "C"))))
          END"#,
    );
}

/// Finds pull secrets by name. Unknown names are omitted.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.find_listed", skip_all)]
async fn find_listed(conn: &mut PgConnection, names: &[String]) -> Result<Vec<StoredPullSecret>, StorageError> {
    sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secrets WHERE name = ANY($1)"#,
        names,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(StoredPullSecret::try_from)
    .collect()
}
