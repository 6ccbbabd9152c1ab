//! Counts for the summary. Each statement reads a bounded number of rows.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::{FromRow, Row};
use uuid::Uuid;

use crate::{
    domain::{
        grants::{Grants, Ranges},
        listing::PullSecretState,
        pull_secret::TargetState,
        verification::VerificationResult,
    },
    storage::{
        PgConnection, StorageError, accounts,
        lists::{EXPIRY, HIDDEN_MAX, SEARCHED_MAX, Sql},
        pull_secrets::listing::{STATE, push_granted},
    },
};

/// Largest exact count.
pub const COUNT_MAX: i64 = 10_000;

/// Number of rows, up to [`COUNT_MAX`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BoundedCount {
    /// Rows that were counted.
    pub count: i64,
    /// Whether there may be more.
    pub has_more: bool,
}

impl BoundedCount {
    /// Result of a statement that counts up to one row more than [`COUNT_MAX`].
    fn of(counted: i64) -> Self {
        Self { count: counted.min(COUNT_MAX), has_more: counted > COUNT_MAX }
    }
}

/// Registry accounts.
#[derive(Debug, Default)]
pub struct AccountCounts {
    /// All of them.
    pub total: BoundedCount,
    /// By result of the last verification; `None` for accounts without one.
    pub by_result: Vec<(Option<VerificationResult>, BoundedCount)>,
    /// Expired.
    pub expired: BoundedCount,
    /// Not expired, but within the given time.
    pub expiring: BoundedCount,
}

/// Conditions of the counts of accounts, in the order of the columns.
fn account_conditions() -> Vec<String> {
    let results = VerificationResult::ALL.map(|result| format!("last_verification_result = '{}'", result.as_str()));
    let mut conditions = vec!["true".to_owned(), "last_verification_result IS NULL".to_owned()];
    conditions.extend(results);
    conditions.push(format!("{EXPIRY} <= now()"));
    conditions
}

/// Counts the granted accounts. `expiring_within_seconds` limits [`AccountCounts::expiring`].
///
/// With grants, it counts the first [`COUNT_MAX`] of the granted accounts.
pub async fn count_accounts(
    conn: &mut PgConnection,
    grants: &Grants,
    expiring_within_seconds: i64,
) -> Result<AccountCounts, StorageError> {
    let sees_all = grants.include_accounts_with(&BTreeMap::new());
    let mut sql = Sql::new("");
    if !sees_all {
        push_granted_accounts(&mut sql, grants);
    }
    let source = if sees_all { "registry_accounts" } else { "granted" };
    for (place, condition) in account_conditions().iter().enumerate() {
        sql.push(if place == 0 { "SELECT " } else { ", " });
        push_count(&mut sql, source, condition);
    }
    sql.push(", ")
        .push(format_args!("(SELECT count(*) FROM (SELECT FROM {source} WHERE {EXPIRY} > now() AND {EXPIRY}"));
    sql.push(" <= now() + ").push_bind(expiring_within_seconds).push(" * interval '1 second' LIMIT ");
    sql.push_bind(COUNT_MAX + 1).push(") AS counted)");
    let row = sql.build().persistent(false).fetch_one(conn).await?;
    let mut counts = (0..row.len())
        .map(|place| Ok(BoundedCount::of(row.try_get(place)?)))
        .collect::<Result<Vec<_>, sqlx::Error>>()?;
    let total = counts.remove(0);
    if total.has_more && !sees_all {
        for count in &mut counts {
            count.has_more = true;
        }
    }
    let (expiring, expired) = (counts.pop().unwrap_or_default(), counts.pop().unwrap_or_default());
    let results = std::iter::once(None).chain(VerificationResult::ALL.map(Some));
    Ok(AccountCounts { total, by_result: results.zip(counts).collect(), expired, expiring })
}

fn push_count(sql: &mut Sql, source: &str, condition: &str) {
    sql.push(format_args!("(SELECT count(*) FROM (SELECT FROM {source} WHERE {condition} LIMIT "));
    sql.push_bind(COUNT_MAX + 1).push(") AS counted)");
}

/// Adds the granted accounts, up to one more than [`COUNT_MAX`], as `granted`.
fn push_granted_accounts(sql: &mut Sql, grants: &Grants) {
    let Ranges { low, high } = grants.account_ranges();
    sql.push("WITH granted AS MATERIALIZED (SELECT * FROM (");
    let columns = "id, last_verification_result, expires_at";
    sql.push("SELECT one.* FROM unnest(");
    sql.push_bind(low).push("::text[], ").push_bind(high).push("::text[]) AS granted (low, high) CROSS JOIN LATERAL (");
    sql.push(format_args!("SELECT {columns} FROM registry_accounts "));
    sql.push(r#"WHERE name >= granted.low COLLATE "C" AND name < granted.high COLLATE "C" LIMIT "#);
    sql.push_bind(COUNT_MAX + 1).push(") AS one UNION SELECT one.* FROM unnest(");
    sql.push_bind(accounts::label_documents(grants)).push("::jsonb[]) AS granted (labels) CROSS JOIN LATERAL (");
    sql.push(format_args!("SELECT {columns} FROM registry_accounts WHERE labels @> granted.labels LIMIT "));
    sql.push_bind(COUNT_MAX + 1).push(") AS one) AS every LIMIT ").push_bind(COUNT_MAX + 1).push(") ");
}

/// State of the audit log.
#[derive(Debug, FromRow)]
pub struct AuditState {
    /// Number of the last seal.
    pub seal: Option<i64>,
    /// Its time.
    pub sealed_at: Option<DateTime<Utc>>,
    /// Events in all seals.
    pub events: Option<i64>,
    /// Batches that wait for a seal, up to one more than [`COUNT_MAX`].
    unsealed: i64,
    /// Age of the oldest of them, in seconds; zero without any.
    pub oldest_unsealed_seconds: f64,
}

impl AuditState {
    /// Batches that wait for a seal.
    #[must_use]
    pub fn unsealed(&self) -> BoundedCount {
        BoundedCount::of(self.unsealed)
    }
}

/// Reads the last seal, and what waits for the next one.
pub async fn find_audit_state(conn: &mut PgConnection) -> Result<AuditState, StorageError> {
    let mut sql = Sql::new("SELECT last.number AS seal, last.sealed_at, last.events, waiting.unsealed, ");
    sql.push("waiting.oldest_unsealed_seconds FROM (SELECT count(*) AS unsealed, ");
    sql.push(
        "coalesce(extract(epoch FROM clock_timestamp() - min(written_at)), 0)::float8 AS oldest_unsealed_seconds ",
    );
    sql.push("FROM (SELECT written_at FROM audit_unsealed ORDER BY id LIMIT ").push_bind(COUNT_MAX + 1);
    sql.push(") AS first) AS waiting LEFT JOIN LATERAL ");
    sql.push("(SELECT number, sealed_at, events FROM audit_seals ORDER BY number DESC LIMIT 1) AS last ON true");
    Ok(sql.build_query_as::<AuditState>().persistent(false).fetch_one(conn).await?)
}

/// Counts the granted clusters.
pub async fn count_clusters(conn: &mut PgConnection, grants: &Grants) -> Result<BoundedCount, StorageError> {
    let Ranges { low, high } = grants.cluster_ranges();
    let counted = sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM (
               SELECT DISTINCT one.name FROM unnest($1::text[], $2::text[]) AS granted (low, high)
               CROSS JOIN LATERAL (
                   SELECT name FROM clusters
                   WHERE name >= granted.low COLLATE "C" AND name < granted.high COLLATE "C" ORDER BY name LIMIT $3
               ) AS one LIMIT $3
           ) AS counted"#,
        &low,
        &high,
        COUNT_MAX + 1,
    );
    Ok(BoundedCount::of(counted.fetch_one(conn).await?))
}

/// Pull secrets by state.
#[derive(Debug, Default)]
pub struct PullSecretCounts {
    /// Ids of those that were counted.
    pub ids: Vec<Uuid>,
    /// Number by state.
    pub by_state: BTreeMap<&'static str, i64>,
    /// Whether there may be more.
    pub has_more: bool,
}

/// Counts the granted ones of the oldest [`HIDDEN_MAX`] pull secrets by state.
pub async fn count_pull_secrets(conn: &mut PgConnection, grants: &Grants) -> Result<PullSecretCounts, StorageError> {
    let window = i64::try_from(HIDDEN_MAX).unwrap_or(i64::MAX);
    let mut sql = Sql::new("SELECT seen.id, coalesce(true");
    if !grants.include_everything() {
        push_granted(&mut sql, grants);
    }
    sql.push(", false) AS is_granted, ")
        .push(STATE)
        .push(" AS state FROM (SELECT * FROM pull_secrets ORDER BY id LIMIT ");
    sql.push_bind(window + 1).push(") AS seen ORDER BY seen.id");
    let rows = sql.build().persistent(false).fetch_all(conn).await?;
    let mut counts = PullSecretCounts { has_more: rows.len() > HIDDEN_MAX, ..PullSecretCounts::default() };
    counts.by_state.extend(PullSecretState::ALL.map(|state| (state.as_str(), 0)));
    for row in rows.iter().take(HIDDEN_MAX) {
        if row.try_get("is_granted")? {
            counts.ids.push(row.try_get("id")?);
            let state: String = row.try_get("state")?;
            if let Some(count) = counts.by_state.get_mut(state.as_str()) {
                *count += 1;
            }
        }
    }
    Ok(counts)
}

/// Counts targets by state, of all pull secrets or of some. Synced targets are counted among
/// [`SEARCHED_MAX`] ones: they have no index.
pub async fn count_targets(
    conn: &mut PgConnection,
    pull_secrets: Option<&[Uuid]>,
) -> Result<Vec<(TargetState, BoundedCount)>, StorageError> {
    let searched = i64::try_from(SEARCHED_MAX).unwrap_or(i64::MAX);
    let indexed = TargetState::ALL.into_iter().filter(|state| *state != TargetState::Synced);
    let mut sql = Sql::new("SELECT count(*) FILTER (WHERE state = 'synced'), count(*)");
    for state in indexed.clone() {
        // A literal, so that Postgres sees that the partial index has these rows.
        let state = state.as_str();
        sql.push(format_args!(", (SELECT count(*) FROM (SELECT FROM pull_secret_targets WHERE state = '{state}'"));
        push_pull_secrets(&mut sql, pull_secrets);
        sql.push(" LIMIT ").push_bind(COUNT_MAX + 1).push(") AS counted)");
    }
    sql.push(" FROM (SELECT state FROM pull_secret_targets WHERE true");
    push_pull_secrets(&mut sql, pull_secrets);
    sql.push(" LIMIT ").push_bind(searched).push(") AS seen");
    let row = sql.build().persistent(false).fetch_one(conn).await?;
    let (synced, seen): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let synced = BoundedCount { count: synced.min(COUNT_MAX), has_more: synced > COUNT_MAX || seen == searched };
    let mut counts = vec![(TargetState::Synced, synced)];
    for (place, state) in indexed.enumerate() {
        counts.push((state, BoundedCount::of(row.try_get(place + 2)?)));
    }
    Ok(counts)
}

fn push_pull_secrets(sql: &mut Sql, pull_secrets: Option<&[Uuid]>) {
    if let Some(ids) = pull_secrets {
        sql.push(" AND pull_secret_id = ANY(").push_bind(ids.to_vec()).push(")");
    }
}

/// Target whose change has waited longest to be synced.
#[derive(Debug, FromRow)]
pub struct OldestPending {
    /// Name of the pull secret.
    pub pull_secret: String,
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// State.
    pub state: String,
    /// Time of the change.
    pub since: DateTime<Utc>,
    /// Age of the change, in seconds.
    pub age_seconds: f64,
}

/// Finds the target whose change has waited longest: of all pull secrets, or among
/// [`COUNT_MAX`] waiting targets of some.
pub async fn find_oldest_pending(
    conn: &mut PgConnection,
    pull_secrets: Option<&[Uuid]>,
) -> Result<Option<OldestPending>, StorageError> {
    let mut sql = Sql::new(
        "SELECT pull_secrets.name AS pull_secret, clusters.name AS cluster, oldest.namespace, oldest.state,
             oldest.pending_since AS since, extract(epoch FROM now() - oldest.pending_since)::double precision AS age_seconds
         FROM (SELECT * FROM ",
    );
    if pull_secrets.is_some() {
        sql.push("(SELECT * FROM pull_secret_targets WHERE state <> 'synced' AND pending_since IS NOT NULL");
        push_pull_secrets(&mut sql, pull_secrets);
        sql.push(" LIMIT ").push_bind(COUNT_MAX).push(") AS waiting");
    } else {
        sql.push("pull_secret_targets WHERE pending_since IS NOT NULL");
    }
    sql.push(
        " ORDER BY pending_since LIMIT 1) AS oldest
         JOIN clusters ON clusters.id = oldest.cluster_id
         JOIN pull_secrets ON pull_secrets.id = oldest.pull_secret_id",
    );
    let found = sql.build_query_as::<OldestPending>().persistent(false).fetch_optional(conn).await?;
    Ok(found)
}
