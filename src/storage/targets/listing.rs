//! Lists of targets.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

use chrono::{DateTime, Utc};
use sqlx::Row;
use uuid::Uuid;

use crate::{
    domain::{
        invalid::Invalid,
        listing::{Listed, Next, Position},
        names::NamespaceName,
        pull_secret::TargetState,
    },
    storage::{
        PageRequest, PgConnection, StorageError,
        lists::{SEARCHED_MAX, Sql},
    },
};

/// Filter of a list of targets.
#[derive(Debug, Clone, Default)]
pub struct TargetFilter {
    /// States, of which one must apply. Empty for any.
    pub states: Vec<TargetState>,
    /// Cluster.
    pub cluster: Option<Uuid>,
    /// Namespace.
    pub namespace: Option<NamespaceName>,
}

/// Place in a list of targets of several pull secrets, by pull secret, namespace and cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPosition {
    /// The pull secret.
    pub pull_secret_id: Uuid,
    /// Namespace and cluster of a target; `None` for the place after all targets of the pull secret.
    pub target: Option<(NamespaceName, Uuid)>,
}

impl FromStr for TargetPosition {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::new("is not a place in a list of targets");
        let id = |text: &str| Uuid::try_parse(text).map_err(|_| invalid());
        let mut parts = text.split('/');
        let (pull_secret, namespace, cluster) = (parts.next(), parts.next(), parts.next());
        let pull_secret_id = id(pull_secret.unwrap_or_default())?;
        match (namespace, cluster, parts.next()) {
            (None, None, None) => Ok(Self { pull_secret_id, target: None }),
            (Some(namespace), Some(cluster), None) => {
                Ok(Self { pull_secret_id, target: Some((namespace.parse()?, id(cluster)?)) })
            }
            _ => Err(invalid()),
        }
    }
}

impl Display for TargetPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pull_secret_id, target } = self;
        match target {
            Some((namespace, cluster)) => write!(f, "{pull_secret_id}/{namespace}/{cluster}"),
            None => write!(f, "{pull_secret_id}"),
        }
    }
}

/// Unique key of a target, without its id: an index has all of it.
type TargetKey = (Uuid, String, Uuid);

/// Targets that a list is about.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// Those of all pull secrets.
    All,
    /// Those of some pull secrets, few enough to read a page of each.
    PullSecrets(&'a [Uuid]),
}

/// Lists the targets of several pull secrets by pull secret, namespace and cluster.
///
/// A filter by cluster or namespace, and one of synced targets, is checked on at most
/// [`SEARCHED_MAX`] entries of an index.
pub async fn list(
    conn: &mut PgConnection,
    scope: Scope<'_>,
    filter: &TargetFilter,
    after: Option<&TargetPosition>,
    limit: usize,
) -> Result<Listed<ShownTarget>, StorageError> {
    let (mut keys, end) = match scope {
        Scope::All => find_keys(conn, filter, after, limit + 1).await?,
        Scope::PullSecrets(ids) => (find_keys_of(conn, ids, filter, after, limit + 1).await?, None),
    };
    let has_next = keys.len() > limit;
    keys.truncate(limit);
    let position = |key: &TargetKey| {
        let target = NamespaceName::parse(&key.1).ok().map(|namespace| (namespace, key.2));
        Position::unique(TargetPosition { pull_secret_id: key.0, target }.to_string())
    };
    let next =
        if has_next { keys.last().map(position).map(Next::Item) } else { end.map(|key| Next::Row(position(&key))) };
    Ok(Listed { items: read(conn, &keys).await?, next })
}

/// Adds the sources of a list, joined by `UNION ALL`: one for each state, or one for all if the list
/// has synced targets. The other states have an index; a literal shows Postgres that it has the
/// rows.
fn push_sources(sql: &mut Sql, states: &[TargetState], source: impl Fn(&mut Sql, &str)) {
    if states.is_empty() || states.contains(&TargetState::Synced) {
        return source(sql, "true");
    }
    for (place, state) in states.iter().enumerate() {
        sql.push(if place == 0 { "" } else { " UNION ALL " });
        source(sql, &format!("state = '{}'", state.as_str()));
    }
}

/// Adds a filter by states, after ` AND `.
fn push_states(sql: &mut Sql, states: &[TargetState]) {
    if !states.is_empty() {
        let states: Vec<String> = states.iter().map(|state| format!("'{}'", state.as_str())).collect();
        sql.push(" AND state IN (").push(states.join(", ")).push(")");
    }
}

/// Adds the filters by place, each after ` AND `.
fn push_places(sql: &mut Sql, filter: &TargetFilter) {
    if let Some(cluster) = filter.cluster {
        sql.push(" AND cluster_id = ").push_bind(cluster);
    }
    if let Some(namespace) = &filter.namespace {
        sql.push(" AND namespace = ").push_bind(namespace.to_string());
    }
}

/// Finds targets of all pull secrets. Also returns the last entry that was read, if entries may
/// follow it.
async fn find_keys(
    conn: &mut PgConnection,
    filter: &TargetFilter,
    after: Option<&TargetPosition>,
    wanted: usize,
) -> Result<(Vec<TargetKey>, Option<TargetKey>), StorageError> {
    const ORDER: &str = " ORDER BY pull_secret_id, namespace, cluster_id LIMIT ";
    let has_synced = filter.states.contains(&TargetState::Synced);
    let is_checked = has_synced || filter.cluster.is_some() || filter.namespace.is_some();
    let sources = if has_synced { 1 } else { filter.states.len().max(1) };
    let read = i64::try_from(if is_checked { SEARCHED_MAX / sources } else { wanted }).unwrap_or(i64::MAX);
    let mut sql = Sql::new("SELECT pull_secret_id, namespace, cluster_id, is_hit, place = ");
    sql.push_bind(read).push(" AS is_end FROM (SELECT *, true");
    if has_synced {
        push_states(&mut sql, &filter.states);
    }
    push_places(&mut sql, filter);
    sql.push(
        " AS is_hit FROM (SELECT *, row_number() OVER (ORDER BY pull_secret_id, namespace, cluster_id) AS place FROM (",
    );
    push_sources(&mut sql, &filter.states, |sql, condition| {
        sql.push("(SELECT pull_secret_id, namespace, cluster_id, state FROM pull_secret_targets WHERE ")
            .push(condition);
        match after.map(|after| (after.pull_secret_id, &after.target)) {
            Some((id, Some((namespace, cluster)))) => {
                sql.push(" AND (pull_secret_id, namespace, cluster_id) > (").push_bind(id).push(", ");
                sql.push_bind(namespace.to_string()).push(r#" COLLATE "C", "#).push_bind(*cluster).push(")");
            }
            Some((id, None)) => {
                sql.push(" AND pull_secret_id > ").push_bind(id);
            }
            None => {}
        }
        // The first rows of the union are among the first rows of each source.
        sql.push(ORDER).push_bind(read).push(")");
    });
    sql.push(") AS every").push(ORDER).push_bind(read);
    sql.push(") AS seen) AS found WHERE is_hit OR place = ").push_bind(read);
    sql.push(ORDER).push_bind(i64::try_from(wanted).unwrap_or(i64::MAX));
    let rows = sql.build().persistent(false).fetch_all(conn).await?;
    let (mut hits, mut end) = (Vec::with_capacity(rows.len()), None);
    for row in &rows {
        let key: TargetKey = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        if row.try_get("is_end")? {
            end = Some(key.clone());
        }
        if row.try_get("is_hit")? {
            hits.push(key);
        }
    }
    let is_full = hits.len() == wanted;
    Ok((hits, end.filter(|_| !is_full)))
}

/// Finds targets of some pull secrets: reads a page of each.
async fn find_keys_of(
    conn: &mut PgConnection,
    ids: &[Uuid],
    filter: &TargetFilter,
    after: Option<&TargetPosition>,
    wanted: usize,
) -> Result<Vec<TargetKey>, StorageError> {
    const ORDER: &str = " ORDER BY namespace, cluster_id LIMIT ";
    let wanted = i64::try_from(wanted).unwrap_or(i64::MAX);
    let mut sql = Sql::new("SELECT one.id, page.namespace, page.cluster_id FROM unnest(");
    sql.push_bind(ids.to_vec()).push("::uuid[]) AS one (id) CROSS JOIN LATERAL (SELECT * FROM (");
    push_sources(&mut sql, &filter.states, |sql, condition| {
        sql.push("(SELECT namespace, cluster_id FROM pull_secret_targets WHERE pull_secret_id = one.id AND ");
        sql.push(condition);
        push_states(sql, &filter.states);
        push_places(sql, filter);
        if let Some(TargetPosition { pull_secret_id, target: Some((namespace, cluster)) }) = after {
            sql.push(" AND (one.id <> ").push_bind(*pull_secret_id).push(" OR (namespace, cluster_id) > (");
            sql.push_bind(namespace.to_string()).push(r#" COLLATE "C", "#).push_bind(*cluster).push("))");
        }
        sql.push(ORDER).push_bind(wanted).push(")");
    });
    sql.push(") AS every").push(ORDER).push_bind(wanted);
    sql.push(") AS page ORDER BY one.id, page.namespace, page.cluster_id LIMIT ").push_bind(wanted);
    let rows = sql.build().persistent(false).fetch_all(conn).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).collect()
}

/// Lists targets of a pull secret by cluster and namespace. `page.after` is `CLUSTER/NAMESPACE`.
///
/// Reads the index entries of all targets that match, and the rows of the page.
pub async fn list_of(
    conn: &mut PgConnection,
    id: Uuid,
    filter: &TargetFilter,
    page: &PageRequest,
) -> Result<Vec<ShownTarget>, StorageError> {
    let mut sql = Sql::new(
        "SELECT namespace, cluster_id FROM pull_secret_targets JOIN clusters ON clusters.id = cluster_id
         WHERE pull_secret_id = ",
    );
    sql.push_bind(id);
    push_states(&mut sql, &filter.states);
    push_places(&mut sql, filter);
    if let Some((cluster, namespace)) = page.after.as_deref().and_then(|after| after.split_once('/')) {
        sql.push(" AND (clusters.name, namespace) > (").push_bind(cluster.to_owned());
        sql.push(r#" COLLATE "C", "#).push_bind(namespace.to_owned()).push(r#" COLLATE "C")"#);
    }
    sql.push(" ORDER BY clusters.name, namespace LIMIT ").push_bind(page.limit);
    let rows = sql.build().persistent(false).fetch_all(&mut *conn).await?;
    let keys: Result<Vec<TargetKey>, sqlx::Error> =
        rows.iter().map(|row| Ok((id, row.try_get(0)?, row.try_get(1)?))).collect();
    read(conn, &keys?).await
}

/// A target as the API returns it.
#[derive(Debug)]
pub struct ShownTarget {
    /// Name of the pull secret.
    pub pull_secret: String,
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// Whether the Secret should exist. Otherwise it is being removed.
    pub wanted: bool,
    /// State.
    pub state: String,
    /// Desired generation.
    pub generation: i64,
    /// Generation in the cluster.
    pub applied_generation: i64,
    /// UID of the Secret.
    pub uid: Option<String>,
    /// Resource version of the Secret.
    pub resource_version: Option<String>,
    /// Attempts since the last success or change.
    pub attempts: i32,
    /// Type of the last error.
    pub last_error_type: Option<String>,
    /// Text of the last error.
    pub last_error_detail: Option<String>,
    /// Time of the last sync.
    pub last_synced_at: Option<DateTime<Utc>>,
    /// Time of the next attempt.
    pub next_attempt_at: DateTime<Utc>,
}

/// Reads targets in the order of their keys. A target that was deleted meanwhile is left out.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.read", skip_all)]
async fn read(conn: &mut PgConnection, keys: &[TargetKey]) -> Result<Vec<ShownTarget>, StorageError> {
    let pull_secrets: Vec<Uuid> = keys.iter().map(|key| key.0).collect();
    let namespaces: Vec<String> = keys.iter().map(|key| key.1.clone()).collect();
    let clusters: Vec<Uuid> = keys.iter().map(|key| key.2).collect();
    let rows = sqlx::query_as!(
        ShownTarget,
        r#"SELECT pull_secrets.name AS pull_secret, clusters.name AS cluster, target.namespace, wanted, state,
               target.generation, applied_generation, uid, resource_version, attempts, last_error_type,
               last_error_detail, last_synced_at, next_attempt_at
           FROM unnest($1::uuid[], $2::text[], $3::uuid[]) WITH ORDINALITY
               AS one (pull_secret_id, namespace, cluster_id, place)
           JOIN pull_secret_targets AS target ON target.pull_secret_id = one.pull_secret_id
               AND target.namespace = one.namespace AND target.cluster_id = one.cluster_id
           JOIN clusters ON clusters.id = one.cluster_id
           JOIN pull_secrets ON pull_secrets.id = one.pull_secret_id
           ORDER BY one.place"#,
        &pull_secrets,
        &namespaces,
        &clusters,
    );
    Ok(rows.fetch_all(conn).await?)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const ID: &str = "01890000-0000-7000-8000-000000000001";

    #[rstest]
    #[case(ID.to_owned(), true)]
    #[case(format!("{ID}/team-a/{ID}"), true)]
    #[case(format!("{ID}/team-a"), false)]
    #[case(format!("{ID}/Team/{ID}"), false)]
    #[case(format!("{ID}/team-a/{ID}/"), false)]
    #[case(String::new(), false)]
    fn a_target_position_survives_its_text(#[case] text: String, #[case] is_valid: bool) {
        let parsed = text.parse::<TargetPosition>();
        assert_eq!(parsed.map(|position| position.to_string()).ok(), is_valid.then_some(text));
    }
}
