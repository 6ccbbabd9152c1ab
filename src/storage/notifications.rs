//! LISTEN connections.

use std::{collections::VecDeque, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgListener};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::storage::{PgPool, StorageError, pool};

/// A dedicated LISTEN connection.
///
/// It does not reconnect by itself: after a loss the listener must assume that it missed
/// notifications.
pub struct Notifications {
    listener: PgListener,
    /// Notifications that arrived during a ping.
    arrived: VecDeque<String>,
}

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
        within(timeout, async {
            let mut listener = connect(pool.connect_options(), application, timeout).await?;
            listener.listen_all(channels.iter().copied()).await?;
            Ok(Self { listener, arrived: VecDeque::new() })
        })
        .await
    }

    /// Waits up to `patience` for the payload of a notification.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost. A notification may be lost with it.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<String>, StorageError> {
        if let Some(arrived) = self.next_arrived() {
            return Ok(Some(arrived));
        }
        Ok(self.receive(Instant::now() + patience).await?.map(|(_, payload)| payload))
    }

    /// Returns the payload of a notification that has arrived.
    pub fn next_arrived(&mut self) -> Option<String> {
        let arrived = self.arrived.pop_front();
        arrived.or_else(|| self.listener.next_buffered().map(|notification| notification.payload().to_owned()))
    }

    /// Returns channel and payload of the next notification; `None` at the deadline.
    async fn receive(&mut self, deadline: Instant) -> Result<Option<(String, String)>, StorageError> {
        match timeout_at(deadline, self.listener.try_recv()).await {
            Err(_) => Ok(None),
            Ok(Ok(Some(notification))) => {
                Ok(Some((notification.channel().to_owned(), notification.payload().to_owned())))
            }
            Ok(Ok(None)) => Err(lost("the connection was closed")),
            Ok(Err(error)) => Err(error.into()),
        }
    }
}

/// A LISTEN connection that proves that notifications arrive on it.
///
/// A pooler between regcred and Postgres may answer statements and swallow notifications. Therefore
/// a second connection notifies the first one, on a channel that no other process uses. It is
/// another connection because Postgres returns a connection's own notifications with the answer of
/// the statement, also through such a pooler.
pub struct ProvenNotifications {
    notifications: Notifications,
    /// Never listens. A [`PgListener`] accepts notifications that a pooler delivers to the wrong
    /// connection, where a plain connection would fail.
    notifier: PgListener,
    echo_channel: String,
}

impl ProvenNotifications {
    /// Connects with the options of `pool`, and listens to `channels` once a test notification
    /// arrived: a shared connection of a pooler must not receive others. Returns `None` if it did
    /// not.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if Postgres does not answer within `timeout`.
    pub async fn listen(
        pool: &PgPool,
        [application, notifier_application]: [&str; 2],
        channels: &[&str],
        timeout: Duration,
    ) -> Result<Option<Self>, StorageError> {
        let echo_channel = format!("regcred_echo_{}", Uuid::now_v7().simple());
        let notifications = Notifications::listen(pool, application, &[&echo_channel], timeout).await?;
        let connecting = connect(pool.connect_options(), notifier_application, timeout);
        let notifier = within(timeout, connecting).await?;
        let mut proven = Self { notifications, notifier, echo_channel };
        if !proven.ping(timeout).await? {
            return Ok(None);
        }
        let listening = proven.notifications.listener.listen_all(channels.iter().copied());
        Box::pin(within(timeout, async { Ok(listening.await?) })).await?;
        Ok(Some(proven))
    }

    /// Sends a notification with a nonce and waits for it. Returns whether it arrived. If so, all
    /// notifications committed before the ping are available through
    /// [`next_arrived`](Self::next_arrived).
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if Postgres does not answer within `timeout`.
    pub async fn ping(&mut self, timeout: Duration) -> Result<bool, StorageError> {
        let deadline = Instant::now() + timeout;
        let nonce = Uuid::now_v7().to_string();
        let notify = sqlx::query!("SELECT pg_notify($1, $2)", self.echo_channel, nonce);
        let notifying = async { Ok(notify.execute(&mut self.notifier).await.map(drop)?) };
        within(timeout, notifying).await?;
        while let Some((channel, payload)) = self.notifications.receive(deadline).await? {
            match channel == self.echo_channel {
                true if payload == nonce => return Ok(true),
                // Of an earlier ping.
                true => {}
                false => self.notifications.arrived.push_back(payload),
            }
        }
        Ok(false)
    }

    /// Waits up to `patience` for the payload of a notification.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost. A notification may be lost with it.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<String>, StorageError> {
        self.notifications.next(patience).await
    }

    /// Returns the payload of a notification that has arrived.
    pub fn next_arrived(&mut self) -> Option<String> {
        self.notifications.next_arrived()
    }
}

/// Connects without listening. Each connection has a pool of its own: a hanging one delays no
/// other.
async fn connect(options: PgConnectOptions, application: &str, timeout: Duration) -> Result<PgListener, StorageError> {
    let own = pool::open(options.application_name(application), 1, timeout);
    let mut listener = PgListener::connect_with(&own).await?;
    listener.eager_reconnect(false);
    Ok(listener)
}

async fn within<T>(timeout: Duration, work: impl Future<Output = Result<T, StorageError>>) -> Result<T, StorageError> {
    tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| Err(lost("Postgres does not answer")))
}

fn lost(cause: &'static str) -> StorageError {
    StorageError::Unavailable(sqlx::Error::Io(std::io::Error::other(cause)))
}
