//! Whether regcred can serve.

use sqlx::PgPool;

use crate::{
    service::{ServiceError, connection},
    storage::schema,
};

/// What is needed to serve, and whether it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Postgres answers.
    pub database: bool,
    /// Postgres has every migration of this binary.
    pub migrations: bool,
}

impl Readiness {
    /// Whether all of it is there.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.database && self.migrations
    }
}

/// Looks at everything that serving needs.
pub async fn readiness(pool: &PgPool) -> Readiness {
    match pending(pool).await {
        Ok(pending) => Readiness { database: true, migrations: pending == 0 },
        Err(error) => {
            tracing::warn!(%error, "not ready: the database does not answer");
            Readiness { database: false, migrations: false }
        }
    }
}

async fn pending(pool: &PgPool) -> Result<usize, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(schema::pending(&mut conn).await?)
}
