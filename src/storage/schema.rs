//! The schema's migrations, compiled into the binary.

use sqlx::{PgConnection, PgPool, migrate::Migrator};

use crate::storage::StorageError;

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

/// How many of this binary's migrations the database does not have.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked.
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
