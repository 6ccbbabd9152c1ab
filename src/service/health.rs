//! Readiness of the service.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::PgConnectOptions;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use crate::{
    service::row_cache::RowCache,
    storage::{PgConnection, PgPool, StorageError, schema},
};

/// Application name of the connection in `pg_stat_activity`.
const APPLICATION_NAME: &str = "regcred health";
/// Time for which a result is remembered.
const REMEMBERED: Duration = Duration::from_secs(1);
/// Time limit of a check.
const CHECK_MAX: Duration = Duration::from_secs(2);

/// State of Postgres, as this process needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Postgres answers.
    pub database: bool,
    /// All migrations of this binary are applied.
    pub migrations: bool,
}

impl Readiness {
    const UNAVAILABLE: Self = Self { database: false, migrations: false };

    /// Whether the service can serve requests.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.database && self.migrations
    }
}

/// Checks readiness on a connection of its own, at most once a second: callers are not
/// authenticated, and must not occupy the pool.
#[derive(Debug)]
pub struct Health {
    options: PgConnectOptions,
    row_cache: Arc<RowCache>,
    check: Arc<Mutex<Check>>,
}

#[derive(Debug, Default)]
struct Check {
    conn: Option<PgConnection>,
    last: Option<(Instant, Readiness)>,
}

impl Health {
    /// Connects with the options of `pool`, on the first check.
    #[must_use]
    pub fn new(pool: &PgPool, row_cache: Arc<RowCache>) -> Self {
        let options = pool.connect_options().application_name(APPLICATION_NAME);
        Self { options, row_cache, check: Arc::default() }
    }

    /// Returns the readiness as of at most a second ago. Concurrent callers share one check.
    pub async fn readiness(&self) -> Readiness {
        let (check, options) = (Arc::clone(&self.check), self.options.clone());
        // A task: a caller that hangs up does not end the check, and with it the connection.
        let checked = tokio::spawn(async move { check.lock().await.current(&options).await });
        checked.await.unwrap_or(Readiness::UNAVAILABLE)
    }

    /// Whether the row cache is in use.
    #[must_use]
    pub fn row_cache_is_on(&self) -> bool {
        self.row_cache.is_trusted()
    }
}

impl Check {
    async fn current(&mut self, options: &PgConnectOptions) -> Readiness {
        if let Some((at, readiness)) = self.last
            && at.elapsed() < REMEMBERED
        {
            return readiness;
        }
        let checked = timeout(CHECK_MAX, self.read(options)).await;
        let no_answer = || StorageError::Unavailable(sqlx::Error::PoolTimedOut);
        let readiness = checked.unwrap_or_else(|_| Err(no_answer())).unwrap_or_else(|error| {
            tracing::warn!(%error, "readiness check failed");
            Readiness::UNAVAILABLE
        });
        self.last = Some((Instant::now(), readiness));
        readiness
    }

    /// A connection on which an error occurred is not used again.
    async fn read(&mut self, options: &PgConnectOptions) -> Result<Readiness, StorageError> {
        if let Some(mut conn) = self.conn.take()
            && let Ok(readiness) = of(&mut conn).await
        {
            self.conn = Some(conn);
            return Ok(readiness);
        }
        // Postgres may have restarted.
        let mut conn = PgConnection::connect_with(options, CHECK_MAX).await?;
        let readiness = of(&mut conn).await?;
        self.conn = Some(conn);
        Ok(readiness)
    }
}

/// Reads the readiness on a connection.
///
/// # Errors
///
/// [`StorageError::Unavailable`] if Postgres does not answer.
pub async fn of(conn: &mut PgConnection) -> Result<Readiness, StorageError> {
    Ok(Readiness { database: true, migrations: schema::pending(conn).await? == 0 })
}
