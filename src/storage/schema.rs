//! Schema migrations, compiled into the binary.

use sqlx::{AssertSqlSafe, migrate::Migrator};

use crate::{
    domain::invalid::Invalid,
    storage::{PgConnection, PgPool, StorageError},
};

/// All migrations. The database may be ahead of this binary: migrations expand first and contract
/// one release later, so that the previous release still runs.
pub static MIGRATOR: Migrator = {
    let mut migrator = sqlx::migrate!();
    migrator.ignore_missing = true;
    migrator
};

/// Applies pending migrations under an advisory lock, so that concurrent replicas take turns.
///
/// # Errors
///
/// [`sqlx::migrate::MigrateError`] if a migration fails or an applied one was modified.
pub async fn migrate(pool: &PgPool) -> Result<(), sqlx::migrate::MigrateError> {
    MIGRATOR.run(pool.sqlx()).await
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
