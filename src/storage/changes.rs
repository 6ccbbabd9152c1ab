//! What others change in the rows that this process remembers: Postgres tells whoever listens, at their commit.
//!
//! The triggers that tell it are in `migrations/…_announce_changes.sql`.

use std::time::Duration;

use sqlx::PgPool;
use uuid::Uuid;

use crate::storage::{StorageError, notifications::Notifications};

const CHANNEL: &str = "regcred_changes";
/// What `pg_stat_activity` shows of the connection.
const APPLICATION_NAME: &str = "regcred changes";

/// What was changed or deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This API key.
    ApiKey(Uuid),
    /// This registry account.
    RegistryAccount(String),
    /// Many rows, or some of a kind that this binary does not know.
    Many,
}

impl Change {
    fn parse(payload: &str) -> Self {
        match payload.split_once(' ') {
            Some(("api_keys", id)) => id.parse().map_or(Self::Many, Self::ApiKey),
            Some(("registry_accounts", name)) => Self::RegistryAccount(name.to_owned()),
            _ => Self::Many,
        }
    }
}

/// A connection of its own on which changes are heard.
pub struct Listener(Notifications);

impl Listener {
    /// Connects beside `pool`, with its options, and begins to listen.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if Postgres cannot be reached within `timeout`, or refuses.
    pub async fn connect(pool: &PgPool, timeout: Duration) -> Result<Self, StorageError> {
        Ok(Self(Notifications::listen(pool, APPLICATION_NAME, &[CHANNEL], timeout).await?))
    }

    /// Waits for a change, `patience` at most; `None` if there was none.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost, and with it perhaps a change.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Change>, StorageError> {
        Ok(self.0.next(patience).await?.as_deref().map(Change::parse))
    }

    /// Asks for a sign of life on this connection. The changes that were committed before it are with
    /// [`next_arrived`](Self::next_arrived) once this returns.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if there is none within `timeout`.
    pub async fn ping(&mut self, timeout: Duration) -> Result<(), StorageError> {
        self.0.ping(timeout).await
    }

    /// A change that has arrived already.
    pub fn next_arrived(&mut self) -> Option<Change> {
        self.0.next_arrived().as_deref().map(Change::parse)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(
        "api_keys 0198a1b2-0000-7000-8000-000000000001",
        Change::ApiKey(Uuid::from_u128(0x0198_a1b2_0000_7000_8000_0000_0000_0001))
    )]
    #[case("registry_accounts martin-5000", Change::RegistryAccount("martin-5000".to_owned()))]
    #[case("registry_accounts", Change::Many)]
    #[case("api_keys", Change::Many)]
    #[case("api_keys nonsense", Change::Many)]
    #[case("a_table_of_tomorrow x", Change::Many)]
    #[case("", Change::Many)]
    fn a_change_that_is_not_understood_is_taken_for_many(#[case] payload: &str, #[case] expected: Change) {
        assert_eq!(Change::parse(payload), expected);
    }
}
