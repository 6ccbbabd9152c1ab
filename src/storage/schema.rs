//! Schema migrations, compiled into the binary.

use std::time::{Duration, Instant};

use sqlx::{
    AssertSqlSafe, Connection,
    error::DatabaseError,
    migrate::{Migrate, MigrateError, Migrator},
};
use tokio::time::sleep;

use crate::{
    domain::invalid::Invalid,
    storage::{PgConnection, PgPool, StorageError},
};

/// All migrations. The database may be ahead of this binary: migrations expand first and contract
/// one release later, so that the previous release still runs.
pub static MIGRATOR: Migrator = {
    let mut migrator = sqlx::migrate!();
    migrator.ignore_missing = true;
    // [`migrate`] takes it.
    migrator.locking = false;
    migrator
};

/// Longest wait of a migration for a lock of a table. Requests of the previous release queue behind
/// it. Below Postgres' `deadlock_timeout` (1 s), so of a deadlock with one of them the migration ends.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '500ms'";
/// Time within which all locks must have been granted, and the pause between two attempts.
const LOCKED_WITHIN: Duration = Duration::from_mins(5);
const PAUSE: Duration = Duration::from_millis(500);

/// Applies pending migrations under an advisory lock, so that concurrent replicas take turns. A
/// migration that does not get its locks is rolled back and tried again: it gives way to the requests
/// of the replicas that serve.
///
/// # Errors
///
/// [`MigrateError`] if a migration fails or an applied one was modified.
pub async fn migrate(pool: &PgPool) -> Result<(), MigrateError> {
    // Closed afterwards, which ends the advisory lock.
    let mut conn = pool.sqlx().acquire().await?.detach();
    Migrate::lock(&mut conn).await?;
    // After the advisory lock, whose holder may take minutes.
    sqlx::query(LOCK_TIMEOUT).execute(&mut conn).await?;
    let started = Instant::now();
    let result = loop {
        match MIGRATOR.run(&mut conn).await {
            Err(MigrateError::ExecuteMigration(error, version))
                if lacks_lock(&error) && started.elapsed() < LOCKED_WITHIN =>
            {
                tracing::info!(version, "migration waits for transactions that use its tables");
                sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
            }
            result => break result,
        }
    };
    // A connection that is already lost has no lock.
    let _ = conn.close().await;
    result
}

/// Whether a lock was not granted in time, or in a deadlock.
fn lacks_lock(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(DatabaseError::code);
    code.is_some_and(|code| ["55P03", "40P01"].contains(&&*code))
}

/// Reason why rights were not granted.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The role name is invalid.
    #[error(transparent)]
    Role(Invalid),
    /// Postgres refused.
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
}

/// Grants a role the rights of the service: rows of all tables, except that audit events can only
/// be added and audit chains not deleted. Repeat it after each migration, for new tables.
///
/// # Errors
///
/// [`GrantError::Role`] if the role name is invalid, [`GrantError::Sql`] if Postgres refuses.
pub async fn grant(pool: &PgPool, role: &str) -> Result<(), GrantError> {
    check_role(role).map_err(GrantError::Role)?;
    let statements = format!(
        r#"GRANT USAGE ON SCHEMA public TO "{role}";
           GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{role}";
           REVOKE INSERT, UPDATE, DELETE ON _sqlx_migrations FROM "{role}";
           REVOKE UPDATE, DELETE ON audit_events, audit_seals FROM "{role}";
           REVOKE UPDATE ON audit_unsealed FROM "{role}";
           -- Postgres wants UPDATE of one column for FOR UPDATE, and a trigger refuses the UPDATE itself.
           GRANT UPDATE (written_at) ON audit_unsealed TO "{role}";
           REVOKE DELETE ON audit_chains FROM "{role}";"#
    );
    let mut tx = pool.begin().await?;
    // Safe: the role name contains only the characters checked above.
    sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut *tx).await?;
    Ok(tx.commit().await?)
}

/// Checks the syntax of the name of a database role.
///
/// # Errors
///
/// [`Invalid`] if it has other characters than lower-case letters, digits and `_`.
pub fn check_role(role: &str) -> Result<(), Invalid> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if role.is_empty() || role.len() > 63 || !role.bytes().all(is_plain) {
        return Err(Invalid::new("must be a role name of lower-case letters, digits and '_'"));
    }
    Ok(())
}

/// Returns the number of pending migrations.
pub async fn pending(conn: &mut PgConnection) -> Result<usize, StorageError> {
    let exists = sqlx::query_scalar!(r#"SELECT to_regclass('_sqlx_migrations') IS NOT NULL AS "exists!""#)
        .fetch_one(&mut *conn)
        .await?;
    if !exists {
        return Ok(MIGRATOR.iter().count());
    }
    // Unchecked: sqlx creates this table itself, so it does not exist when queries are checked.
    let applied: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success").fetch_all(conn).await?;
    Ok(MIGRATOR.iter().filter(|migration| !applied.contains(&migration.version)).count())
}
