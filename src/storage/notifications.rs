//! LISTEN connections.

use std::time::Duration;

use sqlx::{Executor, PgPool, postgres::PgListener};

use crate::storage::{StorageError, pool};

/// A dedicated LISTEN connection.
///
/// It does not reconnect by itself: after a loss the listener must assume that it missed
/// notifications.
pub struct Notifications(PgListener);

impl Notifications {
    /// Connects with the options of `pool` and starts to listen. `application` is the name in
    /// `pg_stat_activity`.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if Postgres does not answer within `timeout`.
    pub async fn listen(
        pool: &PgPool,
        application: &str,
        channels: &[&str],
        timeout: Duration,
    ) -> Result<Self, StorageError> {
        // A pool per connection: a hanging one delays no other.
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

    /// Waits up to `patience` for the payload of a notification.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost. A notification may be lost with it.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<String>, StorageError> {
        match tokio::time::timeout(patience, self.0.try_recv()).await {
            Err(_) => Ok(None),
            Ok(Ok(Some(notification))) => Ok(Some(notification.payload().to_owned())),
            Ok(Ok(None)) => Err(lost("the connection was closed")),
            Ok(Err(error)) => Err(error.into()),
        }
    }

    /// Returns the payload of a notification that has arrived.
    pub fn next_arrived(&mut self) -> Option<String> {
        self.0.next_buffered().map(|notification| notification.payload().to_owned())
    }

    /// Pings Postgres on this connection. Notifications committed before the ping are available
    /// through [`next_arrived`](Self::next_arrived) afterwards.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if there is no answer within `timeout`.
    pub async fn ping(&mut self, timeout: Duration) -> Result<(), StorageError> {
        within(timeout, async { Ok(self.0.execute("SELECT 1").await.map(drop)?) }).await
    }
}

async fn within<T>(timeout: Duration, work: impl Future<Output = Result<T, StorageError>>) -> Result<T, StorageError> {
    tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| Err(lost("Postgres does not answer")))
}

fn lost(cause: &'static str) -> StorageError {
    StorageError::Unavailable(sqlx::Error::Io(std::io::Error::other(cause)))
}
