//! The schema's migrations, compiled into the binary.

use sqlx::{AssertSqlSafe, PgConnection, PgPool, migrate::Migrator};

use crate::{domain::invalid::Invalid, storage::StorageError};

/// All migrations. A database that is ahead of this binary is fine: migrations expand first and contract one
/// release later, so that the release before still runs.
pub static MIGRATOR: Migrator = {
    let mut migrator = sqlx::migrate!();
    migrator.ignore_missing = true;
    migrator
};

/// Applies what is missing, under an advisory lock: replicas that start together take turns.
///
/// # Errors
///
/// [`sqlx::migrate::MigrateError`] if a migration fails or an applied one was changed afterwards.
pub async fn migrate(pool: &PgPool) -> Result<(), sqlx::migrate::MigrateError> {
    MIGRATOR.run(pool).await
}

/// Why rights were not granted.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// That can be no role.
    #[error(transparent)]
    Role(Invalid),
    /// Postgres refuses.
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
}

/// Grants a role the rights of a service in this schema: rows of all tables, but audit events and seals only to insert, and
/// unsealed batches only to insert and delete. Must be repeated after each migration, for new tables.
///
/// # Errors
///
/// [`GrantError::Role`] if that can be no role's name, else what Postgres says.
pub async fn grant(pool: &PgPool, role: &str) -> Result<(), GrantError> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if role.is_empty() || role.len() > 63 || !role.bytes().all(is_plain) {
        return Err(GrantError::Role(Invalid::new("must be a role of lower-case letters, digits and '_'")));
    }
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
    // Safe: of the role's name, only such characters were let through.
    sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut *tx).await?;
    Ok(tx.commit().await?)
}

/// How many of this binary's migrations the database does not have.
pub async fn pending(conn: &mut PgConnection) -> Result<usize, StorageError> {
    let exists = sqlx::query_scalar!(r#"SELECT to_regclass('_sqlx_migrations') IS NOT NULL AS "exists!""#)
        .fetch_one(&mut *conn)
        .await?;
    if !exists {
        return Ok(MIGRATOR.iter().count());
    }
    // Not a checked query: sqlx makes this table itself, so it is not there when queries are checked.
    let applied: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success").fetch_all(conn).await?;
    Ok(MIGRATOR.iter().filter(|migration| !applied.contains(&migration.version)).count())
}
