//! Sources of minted accounts, and the state of their mints.
//!
//! A worker claims due mints under a lease. Its results are stored under the lease token; a change of
//! the source raises the token, so that a mint of the old one is dropped. Locks are taken in the order
//! account, mint.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    domain::{
        account::{Account, Username},
        cluster::{CaCertificate, ServiceAccountRef},
        grants::{Grants, Ranges},
        mint::{LastError, Mint, MintError, MintReason, Source, StoredSource},
        names::Name,
        registry::RegistryScope,
        sealed::{Ca, RegistryDestination, Sealed, Slot},
    },
    storage::{PgConnection, StorageError, accounts::label_documents, corrupt, sealed::SealedColumn},
};

/// Name of the table, part of the associated data of sealed secrets.
pub const TABLE: &str = "account_mints";

struct MintRow {
    account_id: Uuid,
    source: String,
    serial: i64,
    minted_at: DateTime<Utc>,
    valid_until: DateTime<Utc>,
    refresh_at: DateTime<Utc>,
    next_attempt_at: DateTime<Utc>,
    error_reason: Option<String>,
    error_detail: Option<String>,
    is_expired: bool,
}

impl TryFrom<MintRow> for Mint {
    type Error = StorageError;

    fn try_from(row: MintRow) -> Result<Self, StorageError> {
        let id = row.account_id;
        Ok(Self {
            source: StoredSource::parse(row.source).map_err(corrupt(TABLE, id, "source"))?,
            serial: row.serial,
            minted_at: row.minted_at,
            valid_until: row.valid_until,
            refresh_at: row.refresh_at,
            next_attempt_at: row.next_attempt_at,
            last_error: last_error(row.error_reason.as_deref(), row.error_detail),
            is_expired: row.is_expired,
        })
    }
}

/// A reason that only another release knows is shown as [`MintReason::Misconfigured`], so that the
/// account stays readable.
fn last_error(reason: Option<&str>, detail: Option<String>) -> Option<LastError> {
    let reason = reason?.parse().unwrap_or(MintReason::Misconfigured);
    detail.map(|detail| LastError { reason, detail })
}

/// Source with its sealed secret, and the times of its first mint.
#[derive(Debug)]
pub struct MintToStore<'a> {
    /// The source.
    pub source: &'a Source,
    /// Its secret.
    pub secret: &'a Sealed,
    /// Cluster of a web identity.
    pub cluster: Option<Uuid>,
    /// Validity of the login.
    pub lifetime: Duration,
    /// Delay until the next mint.
    pub refresh_after: Duration,
}

/// Stores the source of an account whose login was minted, in place of an earlier one. A cluster must
/// be locked.
#[tracing::instrument(level = "debug", name = "db.account_mints.put", skip_all, fields(account.id = %account))]
pub async fn put(conn: &mut PgConnection, account: Uuid, mint: &MintToStore<'_>) -> Result<Mint, StorageError> {
    // Tokens begin at the current time: a source that was removed and set again shares none with the
    // earlier one, whose late result would be stored otherwise.
    sqlx::query_as!(
        MintRow,
        r#"INSERT INTO account_mints AS stored
               (account_id, source, secret, secret_key_id, valid_until, refresh_at, next_attempt_at, cluster_id, lease_token)
           VALUES ($1, $2, $3, $4, now() + $5 * interval '1 second', now() + $6 * interval '1 second',
               now() + $6 * interval '1 second', $7, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
           ON CONFLICT ON CONSTRAINT account_mints_pkey DO UPDATE
           SET source = excluded.source, secret = excluded.secret, secret_key_id = excluded.secret_key_id,
               cluster_id = excluded.cluster_id, serial = stored.serial + 1, minted_at = now(),
               valid_until = excluded.valid_until, refresh_at = excluded.refresh_at, next_attempt_at = excluded.next_attempt_at, failures = 0,
               error_reason = NULL, error_detail = NULL, lease_until = NULL, lease_token = stored.lease_token + 1
           RETURNING account_id, source, serial, minted_at, valid_until, refresh_at, next_attempt_at, error_reason,
               error_detail, false AS "is_expired!""#,
        account,
        mint.source.as_text(),
        mint.secret.bytes,
        mint.secret.key_id,
        mint.lifetime.as_secs_f64(),
        mint.refresh_after.as_secs_f64(),
        mint.cluster,
    )
    .fetch_one(conn)
    .await?
    .try_into()
}

/// Finds the mints of accounts. Accounts without one are omitted.
#[tracing::instrument(level = "debug", name = "db.account_mints.find", skip_all)]
pub async fn find(conn: &mut PgConnection, accounts: &[Uuid]) -> Result<HashMap<Uuid, Mint>, StorageError> {
    let rows = sqlx::query_as!(
        MintRow,
        r#"SELECT account_id, source, serial, minted_at, valid_until, refresh_at, next_attempt_at, error_reason,
               error_detail, valid_until <= now() AS "is_expired!"
           FROM account_mints WHERE account_id = ANY($1)"#,
        accounts,
    );
    rows.fetch_all(conn).await?.into_iter().map(|row| Ok((row.account_id, row.try_into()?))).collect()
}

/// Adds the mints of accounts to them.
pub async fn attach(conn: &mut PgConnection, mut accounts: Vec<Account>) -> Result<Vec<Account>, StorageError> {
    let ids: Vec<Uuid> = accounts.iter().map(|account| account.id).collect();
    if !ids.is_empty() {
        let mut mints = find(conn, &ids).await?;
        for account in &mut accounts {
            account.mint = mints.remove(&account.id);
        }
    }
    Ok(accounts)
}

/// Adds the mint of a found account to it.
pub async fn attach_to(conn: &mut PgConnection, account: Option<Account>) -> Result<Option<Account>, StorageError> {
    Ok(attach(conn, account.into_iter().collect()).await?.pop())
}

/// Deletes the source of an account, which keeps its login.
#[tracing::instrument(level = "debug", name = "db.account_mints.delete", skip_all, fields(account.id = %account))]
pub async fn delete(conn: &mut PgConnection, account: Uuid) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM account_mints WHERE account_id = $1", account).execute(conn).await?;
    Ok(())
}

/// Minted account under lease, with the sealed secret of its source.
#[derive(Debug)]
pub struct ClaimedMint {
    /// The account.
    pub account_id: Uuid,
    /// Its name.
    pub name: Name,
    /// Its registry.
    pub registry: RegistryScope,
    /// Whether the registry is called without TLS.
    pub plain_http: bool,
    /// CA of the registry's certificate.
    pub ca_certificate: Option<CaCertificate>,
    /// Source of the login.
    pub source: StoredSource,
    /// Sealed secret of the source.
    pub secret: Sealed,
    /// Cluster of a web identity.
    pub cluster_id: Option<Uuid>,
    /// Number of mints before this one.
    pub serial: i64,
    /// Consecutive failures before this mint.
    pub failures: u32,
    /// Reason of the last failure, if this release knows it.
    pub last_reason: Option<MintReason>,
    /// Token that fences results of this claim.
    pub lease_token: i64,
}

impl ClaimedMint {
    /// Where the login is sent.
    #[must_use]
    pub fn destination(&self) -> RegistryDestination<'_> {
        let ca = self.ca_certificate.as_ref().map(|ca| Ca::Pem(ca.as_pem()));
        RegistryDestination { authority: self.registry.authority(), plain_http: self.plain_http, ca }
    }

    /// Returns the lease.
    #[must_use]
    pub const fn lease(&self) -> MintLease {
        MintLease { account_id: self.account_id, token: self.lease_token }
    }

    /// Returns the slot of the secret.
    #[must_use]
    pub fn slot(&self) -> Slot {
        SealedColumn::mint_secret(self.account_id, self.source.as_text(), &self.destination())
    }
}

struct ClaimedRow {
    account_id: Uuid,
    name: String,
    registry: String,
    plain_http: bool,
    ca_certificate: Option<String>,
    source: String,
    secret: Vec<u8>,
    secret_key_id: String,
    cluster_id: Option<Uuid>,
    serial: i64,
    failures: i32,
    error_reason: Option<String>,
    lease_token: i64,
}

impl TryFrom<ClaimedRow> for ClaimedMint {
    type Error = StorageError;

    fn try_from(row: ClaimedRow) -> Result<Self, StorageError> {
        const ACCOUNTS: &str = super::accounts::TABLE;
        let id = row.account_id;
        let ca_certificate = row.ca_certificate.as_deref().map(CaCertificate::parse).transpose();
        Ok(Self {
            account_id: id,
            name: Name::parse(&row.name).map_err(corrupt(ACCOUNTS, id, "name"))?,
            registry: RegistryScope::parse(&row.registry).map_err(corrupt(ACCOUNTS, id, "registry"))?,
            plain_http: row.plain_http,
            ca_certificate: ca_certificate.map_err(corrupt(ACCOUNTS, id, "ca_certificate"))?,
            source: StoredSource::parse(row.source).map_err(corrupt(TABLE, id, "source"))?,
            secret: Sealed { key_id: row.secret_key_id, bytes: row.secret },
            cluster_id: row.cluster_id,
            serial: row.serial,
            failures: u32::try_from(row.failures).unwrap_or_default(),
            last_reason: row.error_reason.and_then(|reason| reason.parse().ok()),
            lease_token: row.lease_token,
        })
    }
}

/// Minted account whose identity is a `ServiceAccount` of a cluster.
#[derive(Debug)]
pub struct WebIdentityUser {
    /// Name of the account.
    pub name: Name,
    /// The `ServiceAccount`; none if this release cannot read it.
    pub service_account: Option<ServiceAccountRef>,
}

struct WebIdentityRow {
    account_id: Uuid,
    name: String,
    source: String,
}

impl TryFrom<WebIdentityRow> for WebIdentityUser {
    type Error = StorageError;

    fn try_from(row: WebIdentityRow) -> Result<Self, StorageError> {
        let name = Name::parse(&row.name).map_err(corrupt(super::accounts::TABLE, row.account_id, "name"))?;
        let source = StoredSource::parse(row.source).map_err(corrupt(TABLE, row.account_id, "source"))?;
        Ok(Self { name, service_account: source.service_account() })
    }
}

/// Lists the minted accounts whose identity is a `ServiceAccount` of a cluster, by name.
#[tracing::instrument(level = "debug", name = "db.account_mints.using_cluster", skip_all, fields(cluster.id = %cluster))]
pub async fn using_cluster(conn: &mut PgConnection, cluster: Uuid) -> Result<Vec<WebIdentityUser>, StorageError> {
    let rows = sqlx::query_as!(
        WebIdentityRow,
        "SELECT account_id, name, source
         FROM account_mints JOIN registry_accounts ON id = account_id WHERE cluster_id = $1 ORDER BY name",
        cluster,
    );
    rows.fetch_all(conn).await?.into_iter().map(WebIdentityUser::try_from).collect()
}

/// Lists the granted ones of these accounts, by name, at most `limit`.
#[tracing::instrument(level = "debug", name = "db.account_mints.granted_using_cluster", skip_all, fields(cluster.id = %cluster))]
pub async fn granted_using_cluster(
    conn: &mut PgConnection,
    cluster: Uuid,
    grants: &Grants,
    limit: i64,
) -> Result<Vec<WebIdentityUser>, StorageError> {
    let (Ranges { low, high }, labels) = (grants.account_ranges(), label_documents(grants));
    // Takes the first rows of each grant: those of other callers do not count against the limit.
    let rows = sqlx::query_as!(
        WebIdentityRow,
        r#"SELECT account_id, name, source
           FROM account_mints JOIN registry_accounts ON id = account_id
           WHERE account_id = ANY (ARRAY(
               SELECT one.id FROM (
                   SELECT one.id, one.name
                   FROM unnest($2::text[], $3::text[]) AS granted (low, high)
                   CROSS JOIN LATERAL (
                       SELECT id, name FROM registry_accounts JOIN account_mints ON account_id = id
                       WHERE cluster_id = $1
                           AND name >= granted.low COLLATE "C" AND name < granted.high COLLATE "C"
                       ORDER BY name LIMIT $5
                   ) AS one
                   UNION
                   SELECT one.id, one.name
                   FROM unnest($4::jsonb[]) AS granted (labels)
                   CROSS JOIN LATERAL (
                       SELECT id, name FROM registry_accounts JOIN account_mints ON account_id = id
                       WHERE cluster_id = $1 AND registry_accounts.labels @> granted.labels
                       ORDER BY name LIMIT $5
                   ) AS one
               ) AS one
               ORDER BY one.name LIMIT $5
           ))
           ORDER BY name"#,
        cluster,
        &low,
        &high,
        &labels,
        limit,
    );
    rows.fetch_all(conn).await?.into_iter().map(WebIdentityUser::try_from).collect()
}

/// Claims the mint of an account, due or not, and forgets its consecutive failures. Returns `None`
/// if the account has no source, or if the mint is under lease.
#[tracing::instrument(level = "debug", name = "db.account_mints.claim_one", skip_all, fields(account.id = %account))]
pub async fn claim_one(
    conn: &mut PgConnection,
    account: Uuid,
    lease: Duration,
) -> Result<Option<ClaimedMint>, StorageError> {
    let row = sqlx::query_as!(
        ClaimedRow,
        "UPDATE account_mints
         SET lease_until = now() + $2 * interval '1 second', lease_token = lease_token + 1, failures = 0
         FROM registry_accounts
         WHERE registry_accounts.id = account_id AND account_id = $1 AND (lease_until IS NULL OR lease_until <= now())
         RETURNING account_id, name, registry, plain_http, ca_certificate, source, secret, secret_key_id, cluster_id, serial,
             failures, error_reason, lease_token",
        account,
        lease.as_secs_f64(),
    );
    row.fetch_optional(conn).await?.map(ClaimedMint::try_from).transpose()
}

/// Claims up to `limit` due mints for the duration of `lease`, the longest-waiting first.
///
/// A corrupt row is logged and left out. It is claimed again when its lease ends.
#[tracing::instrument(level = "debug", name = "db.account_mints.claim", skip_all)]
pub async fn claim(conn: &mut PgConnection, limit: i64, lease: Duration) -> Result<Vec<ClaimedMint>, StorageError> {
    // ARRAY: the limited query runs once.
    let rows = sqlx::query_as!(
        ClaimedRow,
        "UPDATE account_mints SET lease_until = now() + $2 * interval '1 second', lease_token = lease_token + 1
         FROM registry_accounts
         WHERE registry_accounts.id = account_id AND account_id = ANY(ARRAY(
             SELECT account_id FROM account_mints
             WHERE next_attempt_at <= now() AND (lease_until IS NULL OR lease_until <= now())
             ORDER BY next_attempt_at LIMIT $1 FOR UPDATE SKIP LOCKED
         ))
         RETURNING account_id, name, registry, plain_http, ca_certificate, source, secret, secret_key_id, cluster_id, serial,
             failures, error_reason, lease_token",
        limit,
        lease.as_secs_f64(),
    );
    let claimed = rows.fetch_all(conn).await?.into_iter().map(ClaimedMint::try_from);
    let log = |error: &StorageError| tracing::error!(%error, "mint skipped");
    Ok(claimed.filter_map(|mint| mint.inspect_err(log).ok()).collect())
}

/// Login of a successful mint, sealed.
#[derive(Debug)]
pub struct MintResult<'a> {
    /// The mint.
    pub mint: &'a ClaimedMint,
    /// User name.
    pub username: &'a Username,
    /// Sealed password.
    pub password: Sealed,
    /// Whether the password ends with white space.
    pub ends_with_whitespace: bool,
    /// Validity of the login.
    pub lifetime: Duration,
    /// Delay until the next mint.
    pub refresh_after: Duration,
}

/// Stores the logins of successful mints, and ends their leases. Returns the accounts whose login was
/// replaced. The accounts must be locked.
///
/// A result whose lease was lost is left out: the source was changed, or another worker mints. The
/// versions of the accounts do not change, because no caller changed them. The result of the last
/// verification is cleared, and the next one is due within a minute, as after any change of a login.
#[tracing::instrument(level = "debug", name = "db.account_mints.record_results", skip_all, fields(results = results.len()))]
pub async fn record_results(conn: &mut PgConnection, results: &[MintResult<'_>]) -> Result<Vec<Uuid>, StorageError> {
    let ids: Vec<Uuid> = results.iter().map(|result| result.mint.account_id).collect();
    let tokens: Vec<i64> = results.iter().map(|result| result.mint.lease_token).collect();
    let lifetimes: Vec<f64> = results.iter().map(|result| result.lifetime.as_secs_f64()).collect();
    let delays: Vec<f64> = results.iter().map(|result| result.refresh_after.as_secs_f64()).collect();
    let usernames: Vec<&str> = results.iter().map(|result| result.username.as_str()).collect();
    let passwords: Vec<&[u8]> = results.iter().map(|result| result.password.bytes.as_slice()).collect();
    let key_ids: Vec<&str> = results.iter().map(|result| result.password.key_id.as_str()).collect();
    let white_space: Vec<bool> = results.iter().map(|result| result.ends_with_whitespace).collect();
    // Locked in the order of a rotation of the master key, which locks many rows as well.
    let stored = sqlx::query_scalar!(
        r#"WITH result AS (
               SELECT * FROM unnest(
                   $1::uuid[], $2::bigint[], $3::float8[], $4::float8[], $5::text[], $6::bytea[], $7::text[], $8::boolean[]
               ) AS result (id, token, lifetime, delay, username, password, key_id, white_space)
           ), locked AS MATERIALIZED (
               SELECT account_id FROM account_mints WHERE account_id = ANY($1) ORDER BY account_id FOR UPDATE
           ), minted AS (
               UPDATE account_mints
               SET serial = serial + 1, minted_at = now(), valid_until = now() + lifetime * interval '1 second',
                   refresh_at = now() + delay * interval '1 second', next_attempt_at = now() + delay * interval '1 second',
                   failures = 0, error_reason = NULL, error_detail = NULL, lease_until = NULL
               FROM result JOIN locked ON locked.account_id = result.id
               WHERE account_mints.account_id = result.id AND lease_token = result.token AND lease_until > now()
               RETURNING account_mints.account_id
           )
           UPDATE registry_accounts
           SET username = result.username, password = result.password, password_key_id = result.key_id,
               password_ends_with_whitespace = result.white_space, login_changed_at = now(),
               last_verified_at = NULL, last_verification_result = NULL, last_verification_detail = NULL,
               next_verification_at =
                   CASE WHEN verify_interval_seconds IS NOT NULL THEN now() + random() * interval '1 minute' END
           FROM result JOIN minted ON minted.account_id = result.id
           WHERE registry_accounts.id = result.id
           RETURNING registry_accounts.id"#,
        &ids,
        &tokens,
        &lifetimes,
        &delays,
        &usernames as &[&str],
        &passwords as &[&[u8]],
        &key_ids as &[&str],
        &white_space,
    );
    Ok(stored.fetch_all(conn).await?)
}

/// Failure of a claimed mint.
#[derive(Debug)]
pub struct FailedMint<'a> {
    /// The mint.
    pub mint: &'a ClaimedMint,
    /// The failure.
    pub error: &'a MintError,
    /// Delay until the next attempt.
    pub retry_after: Duration,
}

/// Stores failures of mints, and ends their leases. The logins stay. Returns the accounts whose failure
/// was stored; one whose lease was lost is left out.
#[tracing::instrument(level = "debug", name = "db.account_mints.record_failures", skip_all, fields(results = failed.len()))]
pub async fn record_failures(conn: &mut PgConnection, failed: &[FailedMint<'_>]) -> Result<Vec<Uuid>, StorageError> {
    let ids: Vec<Uuid> = failed.iter().map(|failed| failed.mint.account_id).collect();
    let tokens: Vec<i64> = failed.iter().map(|failed| failed.mint.lease_token).collect();
    let reasons: Vec<&str> = failed.iter().map(|failed| failed.error.reason.as_str()).collect();
    let details: Vec<&str> = failed.iter().map(|failed| failed.error.detail.as_str()).collect();
    let delays: Vec<f64> = failed.iter().map(|failed| failed.retry_after.as_secs_f64()).collect();
    let stored = sqlx::query_scalar!(
        "WITH locked AS MATERIALIZED (
             SELECT account_id FROM account_mints WHERE account_id = ANY($1) ORDER BY account_id FOR UPDATE
         )
         UPDATE account_mints
         SET failures = failures + 1, error_reason = result.reason, error_detail = result.detail,
             next_attempt_at = now() + result.delay * interval '1 second', lease_until = NULL
         FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::float8[]) AS result (id, token, reason, detail, delay)
         JOIN locked ON locked.account_id = result.id
         WHERE account_mints.account_id = result.id AND lease_token = result.token AND lease_until > now()
         RETURNING account_mints.account_id",
        &ids,
        &tokens,
        &reasons as &[&str],
        &details as &[&str],
        &delays,
    );
    Ok(stored.fetch_all(conn).await?)
}

/// Lease of a claimed mint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MintLease {
    /// The account.
    pub account_id: Uuid,
    /// Token of the claim.
    pub token: i64,
}

/// Ends the leases of mints that were not carried out, which is no failure. A due one is due again
/// after its delay.
#[tracing::instrument(level = "debug", name = "db.account_mints.release", skip_all, fields(mints = leases.len()))]
pub async fn release(conn: &mut PgConnection, leases: &[(MintLease, Duration)]) -> Result<(), StorageError> {
    let ids: Vec<Uuid> = leases.iter().map(|(lease, _)| lease.account_id).collect();
    let tokens: Vec<i64> = leases.iter().map(|(lease, _)| lease.token).collect();
    let delays: Vec<f64> = leases.iter().map(|(_, delay)| delay.as_secs_f64()).collect();
    sqlx::query!(
        "WITH locked AS MATERIALIZED (
             SELECT account_id FROM account_mints WHERE account_id = ANY($1) ORDER BY account_id FOR UPDATE
         )
         UPDATE account_mints
         SET lease_until = NULL, next_attempt_at = greatest(next_attempt_at, now() + released.delay * interval '1 second')
         FROM unnest($1::uuid[], $2::bigint[], $3::float8[]) AS released (id, token, delay)
         JOIN locked ON locked.account_id = released.id
         WHERE account_mints.account_id = released.id AND lease_token = released.token AND lease_until > now()",
        &ids,
        &tokens,
        &delays,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Makes a failing mint due at once, and forgets its consecutive failures. Returns the time of the
/// next attempt; `None` unless the mint fails.
#[tracing::instrument(level = "debug", name = "db.account_mints.reset_backoff", skip_all, fields(account.id = %account))]
pub async fn reset_backoff(conn: &mut PgConnection, account: Uuid) -> Result<Option<DateTime<Utc>>, StorageError> {
    let next_attempt_at = sqlx::query_scalar!(
        "UPDATE account_mints SET failures = 0, next_attempt_at = least(next_attempt_at, now())
         WHERE account_id = $1 AND error_reason IS NOT NULL RETURNING next_attempt_at",
        account,
    );
    Ok(next_attempt_at.fetch_optional(conn).await?)
}

/// Makes the mint of an account due, because its registry rejects the login. Not within `pause` of the
/// last mint, and not while mints fail.
#[tracing::instrument(level = "debug", name = "db.account_mints.request_refresh", skip_all, fields(account.id = %account))]
pub async fn request_refresh(
    conn: &mut PgConnection,
    account: Uuid,
    serial: i64,
    pause: Duration,
) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE account_mints SET next_attempt_at = now()
         WHERE account_id = $1 AND serial = $2 AND minted_at <= now() - $3 * interval '1 second'
             AND next_attempt_at > now() AND error_reason IS NULL",
        account,
        serial,
        pause.as_secs_f64(),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Number of minted accounts by state, and the shortest validity that is left.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MintCounts {
    /// Accounts whose login is valid and whose last mint succeeded.
    pub valid: i64,
    /// Accounts whose login is valid and whose last mint failed.
    pub failing: i64,
    /// Accounts whose login has expired.
    pub expired: i64,
    /// Shortest validity that is left, in seconds; negative if a login has expired.
    pub least_validity_seconds: Option<f64>,
}

/// Counts the minted accounts by state.
#[tracing::instrument(level = "debug", name = "db.account_mints.count", skip_all)]
pub async fn count(conn: &mut PgConnection) -> Result<MintCounts, StorageError> {
    let counts = sqlx::query_as!(
        MintCounts,
        r#"SELECT count(*) FILTER (WHERE valid_until > now() AND error_reason IS NULL) AS "valid!",
               count(*) FILTER (WHERE valid_until > now() AND error_reason IS NOT NULL) AS "failing!",
               count(*) FILTER (WHERE valid_until <= now()) AS "expired!",
               extract(epoch FROM min(valid_until) - now())::float8 AS least_validity_seconds
           FROM account_mints"#
    );
    Ok(counts.fetch_one(conn).await?)
}
