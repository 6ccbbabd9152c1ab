//! Notifications: what Postgres tells whoever listens, when somebody else commits.

use std::time::Duration;

use sqlx::{Executor, PgPool, postgres::PgListener};

use crate::storage::{StorageError, pool};

/// A connection of its own on which notifications are heard. It is not made anew when it is lost: whoever listens has to know that
/// he may have missed something.
pub struct Notifications(PgListener);

impl Notifications {
    /// Connects beside `pool`, with its options, and begins to listen. `application` is what `pg_stat_activity` shows.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if Postgres cannot be reached within `timeout`, or refuses.
    pub async fn listen(
        pool: &PgPool,
        application: &str,
        channels: &[&str],
        timeout: Duration,
    ) -> Result<Self, StorageError> {
        // A pool for each connection: one that hangs is waited for by nobody then.
        let options = (*pool.connect_options()).clone().application_name(application);
        let own = pool::lazy(options, 1, timeout);
        let listening = async {
            let mut listener = PgListener::connect_with(&own).await?;
            listener.eager_reconnect(false);
            listener.listen_all(channels.iter().copied()).await?;
            Ok(Self(listener))
        };
        within(timeout, listening).await
    }

    /// Waits for the payload of a notification, `patience` at most; `None` if there was none.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost, and with it perhaps a notification.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<String>, StorageError> {
        match tokio::time::timeout(patience, self.0.try_recv()).await {
            Err(_) => Ok(None),
            Ok(Ok(Some(notification))) => Ok(Some(notification.payload().to_owned())),
            Ok(Ok(None)) => Err(lost("the connection was closed")),
            Ok(Err(error)) => Err(error.into()),
        }
    }

    /// The payload of a notification that has arrived already.
    pub fn next_arrived(&mut self) -> Option<String> {
        self.0.next_buffered().map(|notification| notification.payload().to_owned())
    }

    /// Asks for a sign of life on this connection. Postgres sends what was committed before it first, so that is with
    /// [`next_arrived`](Self::next_arrived) once this returns.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if there is none within `timeout`.
    pub async fn ping(&mut self, timeout: Duration) -> Result<(), StorageError> {
        within(timeout, async { Ok(self.0.execute("SELECT 1").await.map(drop)?) }).await
    }
}

async fn within<T>(timeout: Duration, work: impl Future<Output = Result<T, StorageError>>) -> Result<T, StorageError> {
    tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| Err(lost("Postgres does not answer")))
}

fn lost(how: &'static str) -> StorageError {
    StorageError::Unavailable(sqlx::Error::Io(std::io::Error::other(how)))
}
