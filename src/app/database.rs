//! Postgres at startup: connection, migrations and rights.

use std::time::{Duration, Instant};

use super::AppError;
use crate::{
    config::DatabaseConfig,
    service::health,
    storage::{PgPool, pool, schema},
};

/// Interval between two attempts to reach Postgres at startup.
const START_INTERVAL: Duration = Duration::from_secs(1);

/// Creates a pool and waits until Postgres answers.
///
/// # Errors
///
/// [`AppError::Dependency`] if Postgres does not answer within the start timeout.
pub async fn connect(config: &DatabaseConfig) -> Result<PgPool, AppError> {
    let pool = pool::lazy(config.options.clone(), config.max_connections, config.acquire_timeout);
    let deadline = Instant::now() + config.start_timeout;
    loop {
        // Not through the pool, which would wait for its own timeout and hide the cause.
        let Err(error) = pool::probe(&config.options).await else { return Ok(pool) };
        let server = format!("{}:{}", config.options.get_host(), config.options.get_port());
        if Instant::now() + START_INTERVAL > deadline {
            return Err(AppError::Dependency(format!(
                "Postgres at {server} did not answer within {} s: {error}. Check \
                 REGCRED_DATABASE_URL and that Postgres is running",
                config.start_timeout.as_secs()
            )));
        }
        tracing::warn!(%server, %error, "postgres unavailable, retrying");
        tokio::time::sleep(START_INTERVAL).await;
    }
}

/// Applies pending migrations.
///
/// # Errors
///
/// [`AppError::Dependency`] if a migration fails.
pub async fn migrate(pool: &PgPool) -> Result<(), AppError> {
    schema::migrate(pool).await.map_err(|error| AppError::Dependency(format!("the schema migration failed: {error}")))
}

/// Grants a database role the rights that the service needs.
///
/// # Errors
///
/// [`AppError::Config`] if the role name is invalid, [`AppError::Dependency`] if Postgres refuses.
pub async fn grant(pool: &PgPool, role: &str) -> Result<(), AppError> {
    schema::grant(pool, role).await.map_err(|error| match error {
        schema::GrantError::Role(invalid) => AppError::Config(format!("--grant-to {invalid}")),
        schema::GrantError::Sql(error) => AppError::Dependency(format!("Postgres did not grant the rights: {error}")),
    })
}

/// Waits for Postgres, checks the schema, and returns the pool of the service.
pub(super) async fn open(config: &DatabaseConfig) -> Result<PgPool, AppError> {
    let pool = connect(config).await?;
    require_current_schema(&pool).await?;
    pool.close().await;
    Ok(pool::of_service(config.options.clone(), config.max_connections, config.acquire_timeout))
}

async fn require_current_schema(pool: &PgPool) -> Result<(), AppError> {
    let reading = async { health::of(&mut pool.acquire().await?).await };
    match reading.await {
        Ok(readiness) if readiness.is_ready() => Ok(()),
        Ok(_) => Err(AppError::Config(
            "the database schema is older than this binary: run `regcred migrate` or `regcred \
             serve --migrate`"
                .to_owned(),
        )),
        Err(error) => {
            tracing::warn!(%error, "schema check failed");
            Err(AppError::Dependency("Postgres stopped answering during startup: check that it is running".to_owned()))
        }
    }
}
