//! Schema migrations, compiled into the binary.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use sqlx::{
    AssertSqlSafe, Connection,
    error::DatabaseError,
    migrate::{Migrate, MigrateError, Migration, Migrator},
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

/// Wait of a migration for a lock of a table at its first attempt; each further one waits twice as
/// long. Requests of the previous release queue behind it.
const LOCK_TIMEOUT_FIRST: Duration = Duration::from_millis(50);
/// Longest wait. Below Postgres' `deadlock_timeout` (1 s), so of a deadlock with a request the
/// migration ends.
const LOCK_TIMEOUT_MAX: Duration = Duration::from_millis(500);
/// Time within which all locks must have been granted.
const LOCKED_WITHIN: Duration = Duration::from_mins(5);

/// Applies pending migrations under an advisory lock, so that concurrent replicas take turns. They
/// give way to the requests of the replicas that serve: a migration that does not get its locks is
/// rolled back and tried again.
///
/// # Errors
///
/// [`MigrateError`] if a migration fails or an applied one was modified.
pub async fn migrate(pool: &PgPool) -> Result<(), MigrateError> {
    // Closed afterwards, which ends the advisory lock.
    let mut conn = pool.sqlx().acquire().await?.detach();
    Migrate::lock(&mut conn).await?;
    let result = apply_pending(&mut conn).await;
    // A connection that is already lost has no lock.
    let _ = conn.close().await;
    result
}

async fn apply_pending(conn: &mut sqlx::PgConnection) -> Result<(), MigrateError> {
    conn.ensure_migrations_table(&MIGRATOR.table_name).await?;
    let applied = conn.list_applied_migrations(&MIGRATOR.table_name).await?;
    let is_pending = |one: &&Migration| !applied.iter().any(|applied| applied.version == one.version);
    let started = Instant::now();
    for migration in MIGRATOR.iter().filter(is_pending) {
        let mut lock_timeout = LOCK_TIMEOUT_FIRST;
        loop {
            match apply(conn, migration, lock_timeout).await {
                Err(MigrateError::ExecuteMigration(error, _) | MigrateError::Execute(error))
                    if lacks_lock(&error) && started.elapsed() < LOCKED_WITHIN =>
                {
                    tracing::info!(version = migration.version, "migration waits for transactions that use its tables");
                    sleep(lock_timeout.mul_f64(0.5 + fastrand::f64())).await;
                    lock_timeout = LOCK_TIMEOUT_MAX.min(lock_timeout * 2);
                }
                result => break result?,
            }
        }
    }
    // Checks all that were applied before.
    MIGRATOR.run(conn).await
}

/// Applies one migration. Locks the tables that it alters first: a weaker lock of an earlier statement
/// and the one of `ALTER TABLE` would be a deadlock with each transaction that writes to the table.
async fn apply(
    conn: &mut sqlx::PgConnection,
    migration: &Migration,
    lock_timeout: Duration,
) -> Result<(), MigrateError> {
    let mut tx = conn.begin().await?;
    let lock_timeout = format!("{}ms", lock_timeout.as_millis());
    sqlx::query("SELECT set_config('lock_timeout', $1, true)").bind(lock_timeout).execute(&mut *tx).await?;
    for table in altered_tables(migration.sql.as_str()) {
        let exists: bool =
            sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL").bind(table).fetch_one(&mut *tx).await?;
        if exists {
            // Safe: the name is a part of the migration.
            let lock = format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
            sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *tx).await?;
        }
    }
    MIGRATOR.run_to(migration.version, &mut *tx).await?;
    Ok(tx.commit().await?)
}

/// Words that follow `ALTER TABLE`: names of tables, and perhaps a word of a comment.
fn altered_tables(sql: &str) -> BTreeSet<&str> {
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let after = sql.split("ALTER TABLE ").skip(1);
    after.filter_map(|after| after.split(|character| !is_name(character)).next()).collect()
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
