//! Keys of the process: follows their files and the binding of sealed values, and counts what still
//! depends on old ones.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    crypto::{pepper::Peppers, sealer::Sealer},
    service::{ServiceError, connection, master_keys},
    storage::{self, PgPool},
};

/// Interval of the counts.
const COUNT_INTERVAL: Duration = Duration::from_mins(1);

/// What depends on keys or forms that are to be retired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Sealed values that are not bound to their destination.
    pub unbound_values: i64,
    /// Active API keys whose HMAC is not under the first pepper; 0 for a ring of one pepper.
    pub keys_of_older_peppers: i64,
}

/// Master keys and peppers of the process.
#[derive(Debug)]
pub struct Keys {
    pool: PgPool,
    sealer: Arc<Sealer>,
    peppers: Arc<Peppers>,
    counted: Mutex<Option<(Instant, Counts)>>,
}

impl Keys {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, sealer: Arc<Sealer>, peppers: Arc<Peppers>) -> Self {
        Self { pool, sealer, peppers, counted: Mutex::default() }
    }

    /// Returns the last counts, if there are any.
    #[must_use]
    pub fn counts(&self) -> Option<Counts> {
        self.counted.lock().map(|(_, counts)| counts)
    }

    /// Reloads both rings, reads the mark of the binding, and counts once a minute. Logs failures;
    /// what was read last stays in use.
    pub async fn follow(&self) {
        if let Err(error) = self.sealer.reload() {
            tracing::error!(%error, "master key ring not reloaded, previous ring stays in use");
        }
        if let Err(error) = self.peppers.reload() {
            tracing::error!(%error, "pepper ring not reloaded, previous ring stays in use");
        }
        if let Err(error) = master_keys::follow_binding(&self.pool, &self.sealer).await {
            tracing::debug!(%error, "binding of sealed values not read");
        }
        let is_due = self.counted.lock().is_none_or(|(at, _)| at.elapsed() >= COUNT_INTERVAL);
        if is_due {
            match self.count().await {
                Ok(counts) => *self.counted.lock() = Some((Instant::now(), counts)),
                Err(error) => tracing::debug!(%error, "values of old keys not counted"),
            }
        }
    }

    async fn count(&self) -> Result<Counts, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let peppers = self.peppers.current();
        // A ring of one pepper has no older ones, so the table need not be read.
        let by_pepper = match peppers.ids().nth(1) {
            Some(_) => storage::api_keys::count_by_pepper(&mut conn).await?,
            None => Vec::new(),
        };
        let older = by_pepper.iter().filter(|(pepper, _)| pepper.as_deref() != peppers.first().id());
        Ok(Counts {
            unbound_values: storage::sealed::count_unbound(&mut conn).await?,
            keys_of_older_peppers: older.map(|(_, keys)| keys).sum(),
        })
    }
}

/// Counts the active API keys by the id of their pepper, for the command line.
///
/// # Errors
///
/// [`ServiceError::Storage`].
pub async fn count_by_pepper(pool: &PgPool) -> Result<Vec<(Option<String>, i64)>, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(storage::api_keys::count_by_pepper(&mut conn).await?)
}
