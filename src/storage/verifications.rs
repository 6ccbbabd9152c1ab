//! Verification state of registry accounts, in columns of `registry_accounts`.
//!
//! These writes do not increment the version of an account: no caller changed it.

use chrono::{DateTime, Utc};

use crate::{
    domain::{account::Account, sealed::Sealed, verification::VerificationResult},
    storage::{PgConnection, StorageError},
};

/// Finds the sealed password of an account at the version that was read. A mint, which changes no
/// version, may have replaced it since.
#[tracing::instrument(name = "db.registry_accounts.find_password", skip_all, fields(account.id = %account.id))]
pub async fn find_password(conn: &mut PgConnection, account: &Account) -> Result<Option<Sealed>, StorageError> {
    let row = sqlx::query!(
        "SELECT password, password_key_id FROM registry_accounts WHERE id = $1 AND version = $2",
        account.id,
        account.version,
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| Sealed { key_id: row.password_key_id, bytes: row.password }))
}

/// Stores the result of a check and schedules the next one after the account's interval, with 10 %
/// jitter.
///
/// Returns the time of the check by the database's clock, or `None` if a caller changed the account,
/// or a mint its login, since the account was read.
#[tracing::instrument(name = "db.registry_accounts.record_verification", skip_all, fields(account.id = %account.id))]
pub async fn record(
    conn: &mut PgConnection,
    account: &Account,
    result: VerificationResult,
    detail: &str,
) -> Result<Option<DateTime<Utc>>, StorageError> {
    // Columns of this row only: when the statement has waited for a mint, Postgres reads no other row
    // anew.
    let checked_at = sqlx::query_scalar!(
        r#"UPDATE registry_accounts
           SET last_verified_at = now(), last_verification_result = $3, last_verification_detail = $4,
               next_verification_at = now() + verify_interval_seconds * (0.9 + 0.2 * random()) * interval '1 second'
           WHERE id = $1 AND version = $2 AND login_changed_at IS NOT DISTINCT FROM $5
           RETURNING last_verified_at AS "checked_at!""#,
        account.id,
        account.version,
        result.as_str(),
        detail,
        account.login_changed_at,
    )
    .fetch_optional(conn)
    .await?;
    Ok(checked_at)
}

/// Claims accounts with a due check for `lease_seconds`, longest overdue first, and returns their
/// names.
#[tracing::instrument(name = "db.registry_accounts.claim_verifications", skip_all)]
pub async fn claim(conn: &mut PgConnection, limit: i64, lease_seconds: i32) -> Result<Vec<String>, StorageError> {
    let names = sqlx::query_scalar!(
        "UPDATE registry_accounts SET next_verification_at = now() + $2::integer * interval '1 second'
         WHERE id IN (
             SELECT id FROM registry_accounts WHERE next_verification_at <= now()
             ORDER BY next_verification_at LIMIT $1 FOR UPDATE SKIP LOCKED
         )
         RETURNING name",
        limit,
        lease_seconds,
    )
    .fetch_all(conn)
    .await?;
    Ok(names)
}

/// Due expiry warning of an account.
#[derive(Debug)]
pub struct Expiring {
    /// Account name.
    pub name: String,
    /// Registry of the account.
    pub registry: String,
    /// Expiry of the password.
    pub expires_at: DateTime<Utc>,
    /// Maximum number of days left.
    pub days: i16,
}

/// Claims due expiry warnings. Each warning is returned once, regardless of the number of replicas.
#[tracing::instrument(name = "db.registry_accounts.claim_expiry_warnings", skip_all)]
pub async fn claim_warnings(conn: &mut PgConnection, days: &[i16], limit: i64) -> Result<Vec<Expiring>, StorageError> {
    let rows = sqlx::query_as!(
        Expiring,
        r#"UPDATE registry_accounts SET expiry_warned_days = due.days
           FROM (
               SELECT id AS due_id,
                   (SELECT min(d) FROM unnest($1::smallint[]) AS d WHERE expires_at <= now() + d * interval '1 day')
                       AS days
               FROM registry_accounts
               WHERE expires_at <= now() + (SELECT max(d) FROM unnest($1::smallint[]) AS d) * interval '1 day'
                   AND coalesce(expiry_warned_days, 32767) >
                       (SELECT min(d) FROM unnest($1::smallint[]) AS d WHERE expires_at <= now() + d * interval '1 day')
               ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
           ) AS due
           WHERE id = due.due_id
           RETURNING name, registry, expires_at AS "expires_at!", due.days AS "days!""#,
        days,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows)
}

/// Counts the accounts per last result.
#[tracing::instrument(name = "db.registry_accounts.count_verifications", skip_all)]
pub async fn count_results(conn: &mut PgConnection) -> Result<Vec<(String, i64)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT last_verification_result AS "result!", count(*) AS "count!" FROM registry_accounts
           WHERE last_verification_result IS NOT NULL GROUP BY 1"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.result, row.count)).collect())
}

/// Counts the accounts that expire within each of `days`, including expired ones.
#[tracing::instrument(name = "db.registry_accounts.count_expiring", skip_all)]
pub async fn count_expiring(conn: &mut PgConnection, days: &[i16]) -> Result<Vec<(i16, i64)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT d AS "days!",
               (SELECT count(*) FROM registry_accounts WHERE expires_at <= now() + d * interval '1 day') AS "count!"
           FROM unnest($1::smallint[]) AS d"#,
        days,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.days, row.count)).collect())
}
