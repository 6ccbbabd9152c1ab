//! Readiness of the service.

use sqlx::PgPool;

use crate::{
    service::{ServiceError, connection},
    storage::schema,
};

/// Result of a readiness check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Postgres answers.
    pub database: bool,
    /// All migrations of this binary are applied.
    pub migrations: bool,
}

impl Readiness {
    /// Whether the service can serve requests.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.database && self.migrations
    }
}

/// Checks Postgres and its schema.
pub async fn readiness(pool: &PgPool) -> Readiness {
    match pending(pool).await {
        Ok(pending) => Readiness { database: true, migrations: pending == 0 },
        Err(error) => {
            tracing::warn!(%error, "readiness check failed");
            Readiness { database: false, migrations: false }
        }
    }
}

async fn pending(pool: &PgPool) -> Result<usize, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(schema::pending(&mut conn).await?)
}
