//! Registry accounts and their sealed passwords.

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::types::Json;
use std::collections::BTreeMap;
use uuid::Uuid;

use crate::{
    domain::{
        account::{Account, Email, NewAccount, Username},
        cluster::CaCertificate,
        grants::{Grants, Ranges},
        listing::{ListRequest, Listed, NamePart, Order, SortKey},
        names::{Labels, Name},
        registry::RegistryScope,
        sealed::Sealed,
        selector::LabelSelector,
        verification::{Verification, VerificationResult, VerifyInterval},
    },
    storage::{
        PgConnection, StorageError, corrupt,
        lists::{self, Checked, Key, Source, Sql},
        mints, on_name_taken,
    },
};

mod credentials;

pub use credentials::{SealedCredential, find_credentials, match_credentials, select_credentials};

/// Name of the table, part of the associated data of sealed passwords.
pub const TABLE: &str = "registry_accounts";

struct AccountRow {
    id: Uuid,
    name: String,
    registry: String,
    username: String,
    email: Option<String>,
    labels: Json<BTreeMap<String, String>>,
    plain_http: bool,
    expires_at: Option<DateTime<Utc>>,
    ca_certificate: Option<String>,
    verify_interval_seconds: Option<i32>,
    last_verified_at: Option<DateTime<Utc>>,
    last_verification_result: Option<String>,
    last_verification_detail: Option<String>,
    password_ends_with_whitespace: bool,
    login_changed_at: Option<DateTime<Utc>>,
    version: i64,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl TryFrom<AccountRow> for Account {
    type Error = StorageError;

    fn try_from(row: AccountRow) -> Result<Self, StorageError> {
        let id = row.id;
        let email = row.email.as_deref().map(Email::parse).transpose();
        let ca_certificate = row.ca_certificate.as_deref().map(CaCertificate::parse).transpose();
        let seconds = row.verify_interval_seconds.map(i64::from);
        let verify_interval = seconds.map(VerifyInterval::from_seconds).transpose();
        let result = row.last_verification_result.as_deref().map(str::parse).transpose();
        let result = result.map_err(corrupt(TABLE, id, "last_verification_result"))?;
        let verification = (|| {
            Some(Verification {
                result: result?,
                detail: row.last_verification_detail?,
                checked_at: row.last_verified_at?,
            })
        })();
        Ok(Self {
            id,
            name: Name::parse(&row.name).map_err(corrupt(TABLE, id, "name"))?,
            registry: RegistryScope::parse(&row.registry).map_err(corrupt(TABLE, id, "registry"))?,
            username: Username::parse(&row.username).map_err(corrupt(TABLE, id, "username"))?,
            email: email.map_err(corrupt(TABLE, id, "email"))?,
            labels: Labels::parse(row.labels.0).map_err(corrupt(TABLE, id, "labels"))?,
            plain_http: row.plain_http,
            expires_at: row.expires_at,
            ca_certificate: ca_certificate.map_err(corrupt(TABLE, id, "ca_certificate"))?,
            verify_interval: verify_interval.map_err(corrupt(TABLE, id, "verify_interval_seconds"))?,
            verification,
            mint: None,
            password_ends_with_whitespace: row.password_ends_with_whitespace,
            login_changed_at: row.login_changed_at,
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }
}

/// Filter of a list of accounts.
#[derive(Debug, Default)]
pub struct AccountFilter {
    /// Required labels.
    pub labels: Labels,
    /// Maximum number of seconds until `expiresAt`. Includes expired accounts.
    pub expires_within_seconds: Option<i64>,
    /// Part of the name.
    pub name_part: Option<NamePart>,
    /// Result of the last verification.
    pub result: Option<VerificationResult>,
}

/// Inserts an account with its sealed password.
///
/// # Errors
///
/// [`StorageError::NameTaken`] if the name is in use.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.insert", skip_all, fields(account.id = %id))]
pub async fn insert(
    conn: &mut PgConnection,
    id: Uuid,
    new: &NewAccount,
    password: &Sealed,
) -> Result<Account, StorageError> {
    // The first background verification is due within a random minute: an import must not cause a
    // burst of checks.
    sqlx::query_as!(
        AccountRow,
        r#"INSERT INTO registry_accounts
               (id, name, registry, username, password, password_key_id, email, labels, plain_http, expires_at,
                ca_certificate, verify_interval_seconds, password_ends_with_whitespace, next_verification_at)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13,
               CASE WHEN $12::integer IS NOT NULL THEN now() + random() * interval '1 minute' END)
           RETURNING id, name, registry, username, email, labels AS "labels: _", plain_http, expires_at, ca_certificate,
               verify_interval_seconds, last_verified_at, last_verification_result,
               last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at,
                   updated_at"#,
        id,
        new.name.as_str(),
        new.registry.to_string(),
        new.username.as_str(),
        password.bytes,
        password.key_id,
        new.email.as_ref().map(Email::as_str),
        Json(new.labels.as_map()) as _,
        new.plain_http,
        new.expires_at,
        new.ca_certificate.as_ref().map(CaCertificate::as_pem),
        new.verify_interval.map(VerifyInterval::seconds),
        new.password.ends_with_whitespace(),
    )
    .fetch_one(conn)
    .await
    .map_err(on_name_taken("registry_accounts_name_key"))?
    .try_into()
}

/// Finds an account by name.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.find", skip_all)]
pub async fn find(conn: &mut PgConnection, name: &Name) -> Result<Option<Account>, StorageError> {
    let row = sqlx::query_as!(
        AccountRow,
        r#"SELECT id, name, registry, username, email, labels AS "labels: _", plain_http, expires_at, ca_certificate,
               verify_interval_seconds, last_verified_at, last_verification_result,
               last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at,
                   updated_at
           FROM registry_accounts WHERE name = $1"#,
        name.as_str(),
    )
    .fetch_optional(&mut *conn)
    .await?;
    mints::attach_to(conn, row.map(Account::try_from).transpose()?).await
}

/// Finds an account by name and locks it until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.lock", skip_all)]
pub async fn lock(conn: &mut PgConnection, name: &Name) -> Result<Option<Account>, StorageError> {
    let row = sqlx::query_as!(
        AccountRow,
        r#"SELECT id, name, registry, username, email, labels AS "labels: _", plain_http, expires_at, ca_certificate,
               verify_interval_seconds, last_verified_at, last_verification_result,
               last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at,
                   updated_at
           FROM registry_accounts WHERE name = $1 FOR UPDATE"#,
        name.as_str(),
    )
    .fetch_optional(&mut *conn)
    .await?;
    mints::attach_to(conn, row.map(Account::try_from).transpose()?).await
}

/// Finds accounts by id, without their mints, in the order in which all transactions lock them, and
/// locks them until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.lock_ids", skip_all)]
pub async fn lock_ids(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<Account>, StorageError> {
    let rows = sqlx::query_as!(
        AccountRow,
        r#"SELECT id, name, registry, username, email, labels AS "labels: _", plain_http, expires_at, ca_certificate,
               verify_interval_seconds, last_verified_at, last_verification_result,
               last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at,
                   updated_at
           FROM registry_accounts WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE"#,
        ids,
    );
    rows.fetch_all(conn).await?.into_iter().map(Account::try_from).collect()
}

/// Lists the granted accounts that match `filter`.
///
/// By name and without filters of names and results, a page is full whatever the grants are.
/// Otherwise it reads a bounded number of accounts that are hidden from the caller.
pub async fn list(
    conn: &mut PgConnection,
    grants: &Grants,
    request: &ListRequest,
    filter: &AccountFilter,
) -> Result<Listed<Account>, StorageError> {
    let by_name = Order { key: SortKey::Name, descending: false };
    let includes_all = grants.include_accounts_with(&BTreeMap::new());
    if !includes_all && request.order == by_name && filter.name_part.is_none() && filter.result.is_none() {
        return list_by_grants(conn, grants, request, filter).await;
    }
    // The index of results is ordered by name.
    let is_by_name = request.order.key == SortKey::Name;
    let indexed = |sql: &mut Sql| {
        push_indexed(sql, filter);
        if is_by_name {
            push_result(sql, filter);
        }
    };
    let checks = |sql: &mut Sql| {
        if let Some(part) = &filter.name_part {
            lists::push_name_part(sql, part.as_str());
        }
        if !is_by_name {
            push_result(sql, filter);
        }
        if !includes_all {
            push_granted(sql, grants);
        }
    };
    let rows = if includes_all { lists::SEARCHED_MAX } else { lists::HIDDEN_MAX };
    let checked = Checked { conditions: &checks, rows };
    let is_searched = filter.name_part.is_some() || filter.result.is_some() && !is_by_name;
    let checked = (!includes_all || is_searched).then_some(checked);
    let source = Source { table: TABLE, key: Key::Name, indexed: &indexed, checked };
    let page = lists::page(conn, &source, request).await?;
    let accounts = find_many(conn, &page.items).await?;
    Ok(lists::arrange(page, accounts, |account| account.name.to_string()))
}

/// Adds the filters that an index serves.
fn push_indexed(sql: &mut Sql, filter: &AccountFilter) {
    if !filter.labels.as_map().is_empty() {
        sql.push(" AND labels @> ").push_bind(serde_json::json!(filter.labels.as_map()));
    }
    if let Some(seconds) = filter.expires_within_seconds {
        sql.push(" AND ").push(lists::EXPIRY).push(" <= now() + ").push_bind(seconds).push(" * interval '1 second'");
    }
}

/// Adds the filter by the result of the last verification.
fn push_result(sql: &mut Sql, filter: &AccountFilter) {
    if let Some(result) = filter.result {
        sql.push(" AND last_verification_result = ").push_bind(result.as_str());
    }
}

/// Adds the condition that an account is granted.
pub(super) fn push_granted(sql: &mut Sql, grants: &Grants) {
    let Ranges { low, high } = grants.account_ranges();
    sql.push(" AND (labels @> ANY(").push_bind(label_documents(grants));
    sql.push("::jsonb[]) OR EXISTS (SELECT FROM unnest(").push_bind(low).push("::text[], ").push_bind(high);
    sql.push(r#"::text[]) AS granted (low, high) WHERE name >= low COLLATE "C" AND name < high COLLATE "C"))"#);
}

/// Returns the granted labels, as in [`label_grants`], for a composed statement.
pub(super) fn label_documents(grants: &Grants) -> Vec<serde_json::Value> {
    grants.account_labels().into_iter().map(|labels| serde_json::json!(labels)).collect()
}

/// Finds accounts by name. Unknown names are omitted.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.find_many", skip_all)]
async fn find_many(conn: &mut PgConnection, names: &[String]) -> Result<Vec<Account>, StorageError> {
    let rows = sqlx::query_as!(
        AccountRow,
        r#"SELECT id, name, registry, username, email, labels AS "labels: _", plain_http, expires_at, ca_certificate,
               verify_interval_seconds, last_verified_at, last_verification_result,
               last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at, updated_at
           FROM registry_accounts WHERE name = ANY($1)"#,
        names,
    )
    .fetch_all(&mut *conn)
    .await?;
    mints::attach(conn, rows.into_iter().map(Account::try_from).collect::<Result<_, _>>()?).await
}

/// Lists the granted accounts with these labels and this expiry, by name.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.list_by_grants", skip_all)]
async fn list_by_grants(
    conn: &mut PgConnection,
    grants: &Grants,
    request: &ListRequest,
    filter: &AccountFilter,
) -> Result<Listed<Account>, StorageError> {
    let after = request.after.as_ref().map(|after| after.key.as_str());
    let Ranges { low, high } = grants.account_ranges().after(after);
    // Takes the first rows of each grant by an index; the page is a subset of them. The cost of a
    // page depends neither on its position nor on the number of accounts that are not granted.
    let rows = sqlx::query_as!(
        AccountRow,
        r#"SELECT id, name, registry, username, email, labels AS "labels: _", plain_http, expires_at, ca_certificate,
               verify_interval_seconds, last_verified_at, last_verification_result,
               last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at,
                   updated_at
           FROM registry_accounts
           WHERE id = ANY (ARRAY(
               SELECT one.id FROM (
                   SELECT one.id, one.name
                   FROM unnest($4::text[], $5::text[]) AS granted (low, high)
                   CROSS JOIN LATERAL (
                       SELECT id, name FROM registry_accounts
                       WHERE name >= granted.low COLLATE "C" AND name < granted.high COLLATE "C" AND labels @> $2
                           AND ($7::bigint IS NULL OR expires_at <= now() + $7 * interval '1 second')
                       ORDER BY name LIMIT $3
                   ) AS one
                   UNION
                   SELECT one.id, one.name
                   FROM unnest($6::jsonb[]) AS granted (labels)
                   CROSS JOIN LATERAL (
                       SELECT id, name FROM registry_accounts
                       WHERE labels @> granted.labels AND ($1::text IS NULL OR name > $1) AND labels @> $2
                           AND ($7::bigint IS NULL OR expires_at <= now() + $7 * interval '1 second')
                       ORDER BY name LIMIT $3
                   ) AS one
               ) AS one
               ORDER BY one.name LIMIT $3
           ))
           ORDER BY name"#,
        after,
        Json(filter.labels.as_map()) as _,
        lists::wanted(request),
        &low,
        &high,
        &credentials::label_grants(grants) as _,
        filter.expires_within_seconds,
    )
    .fetch_all(&mut *conn)
    .await?;
    let accounts = rows.into_iter().map(Account::try_from).collect::<Result<_, _>>()?;
    let accounts = mints::attach(conn, accounts).await?;
    Ok(lists::cut(accounts, request, |account: &Account| account.name.to_string()))
}

/// Stores a changed account, optionally with a new sealed password, and increments its version.
///
/// A change of the login, or of the connection to the registry, clears the last verification and
/// makes the background verification due within a minute. A change of the entry in docker configs
/// outdates the Secrets of direct delivery.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.update", skip_all, fields(account.id = %account.id))]
pub async fn update(
    conn: &mut PgConnection,
    account: &Account,
    password: Option<&Sealed>,
) -> Result<Account, StorageError> {
    let row = sqlx::query_as!(
        AccountRow,
        r#"UPDATE registry_accounts
           SET registry = $2, username = $3, email = $4, labels = $5, plain_http = $6, expires_at = $7,
               password = coalesce($8, password), password_key_id = coalesce($9, password_key_id),
               ca_certificate = $10, verify_interval_seconds = $11, password_ends_with_whitespace = $12,
               last_verified_at = CASE WHEN login.is_same THEN last_verified_at END,
               last_verification_result = CASE WHEN login.is_same THEN last_verification_result END,
               last_verification_detail = CASE WHEN login.is_same THEN last_verification_detail END,
               next_verification_at = CASE
                   WHEN $11::integer IS NULL THEN NULL
                   WHEN login.is_same AND verify_interval_seconds = $11 THEN next_verification_at
                   ELSE now() + random() * interval '1 minute'
               END,
               expiry_warned_days = CASE WHEN expires_at IS NOT DISTINCT FROM $7 THEN expiry_warned_days END,
               login_changed_at = CASE WHEN login.is_same_entry THEN login_changed_at ELSE now() END,
               version = version + 1, updated_at = now()
           FROM (
               SELECT id AS same_id, $8::bytea IS NULL AND registry = $2 AND username = $3 AND plain_http = $6
                   AND ca_certificate IS NOT DISTINCT FROM $10 AS is_same,
                   $8::bytea IS NULL AND registry = $2 AND username = $3 AND email IS NOT DISTINCT FROM $4
                       AS is_same_entry
               FROM registry_accounts WHERE id = $1
           ) AS login
           WHERE id = $1
           RETURNING id, name, registry, username, email, labels AS "labels: _", plain_http, expires_at, ca_certificate,
               verify_interval_seconds, last_verified_at, last_verification_result,
               last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at,
                   updated_at"#,
        account.id,
        account.registry.to_string(),
        account.username.as_str(),
        account.email.as_ref().map(Email::as_str),
        Json(account.labels.as_map()) as _,
        account.plain_http,
        account.expires_at,
        password.map(|sealed| sealed.bytes.as_slice()),
        password.map(|sealed| sealed.key_id.as_str()),
        account.ca_certificate.as_ref().map(CaCertificate::as_pem),
        account.verify_interval.map(VerifyInterval::seconds),
        account.password_ends_with_whitespace,
    )
    .fetch_one(conn)
    .await?;
    Ok(Account { mint: account.mint.clone(), ..Account::try_from(row)? })
}

/// Deletes an account.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.delete", skip_all, fields(account.id = %id))]
pub async fn delete(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM registry_accounts WHERE id = $1", id).execute(conn).await?;
    Ok(())
}

/// Whether a selector matches an account.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.selects_any", skip_all)]
pub async fn selects_any(conn: &mut PgConnection, selector: &LabelSelector) -> Result<bool, StorageError> {
    let mut rows = sqlx::query_scalar!(
        r#"SELECT labels AS "labels: Json<BTreeMap<String, String>>" FROM registry_accounts WHERE labels @> $1"#,
        Json(selector.match_labels().as_map()) as _,
    )
    .fetch(conn);
    while let Some(labels) = rows.try_next().await? {
        if selector.matches(&labels.0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Finds accounts with their sealed passwords by name and locks them until the transaction ends.
/// Unknown names are omitted.
#[tracing::instrument(level = "debug", name = "db.registry_accounts.lock_many", skip_all)]
pub async fn lock_many(conn: &mut PgConnection, names: &[String]) -> Result<Vec<(Account, Sealed)>, StorageError> {
    // Ordered by id, as every statement that locks many accounts: they cannot deadlock.
    let rows = sqlx::query!(
        r#"SELECT id, name, registry, username, email, labels AS "labels: Json<BTreeMap<String, String>>", plain_http,
               expires_at, ca_certificate, verify_interval_seconds, last_verified_at,
               last_verification_result, last_verification_detail, password_ends_with_whitespace, login_changed_at, version, created_at,
                   updated_at, password,
               password_key_id
           FROM registry_accounts WHERE name = ANY($1) ORDER BY id FOR NO KEY UPDATE"#,
        names,
    )
    .fetch_all(&mut *conn)
    .await?;
    let locked = rows
        .into_iter()
        .map(|row| {
            let sealed = Sealed { key_id: row.password_key_id, bytes: row.password };
            let account = AccountRow {
                id: row.id,
                name: row.name,
                registry: row.registry,
                username: row.username,
                email: row.email,
                labels: row.labels,
                plain_http: row.plain_http,
                expires_at: row.expires_at,
                ca_certificate: row.ca_certificate,
                verify_interval_seconds: row.verify_interval_seconds,
                last_verified_at: row.last_verified_at,
                last_verification_result: row.last_verification_result,
                last_verification_detail: row.last_verification_detail,
                password_ends_with_whitespace: row.password_ends_with_whitespace,
                login_changed_at: row.login_changed_at,
                version: row.version,
                created_at: row.created_at,
                updated_at: row.updated_at,
            };
            Ok::<(Account, Sealed), StorageError>((account.try_into()?, sealed))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let (accounts, passwords): (Vec<_>, Vec<_>) = locked.into_iter().unzip();
    Ok(mints::attach(conn, accounts).await?.into_iter().zip(passwords).collect())
}
