//! Notifications of changed rows, which the row cache holds.
//!
//! Triggers send them at commit: `migrations/…_announce_changes.sql`.

use std::time::Duration;

use uuid::Uuid;

use crate::storage::{PgPool, StorageError, notifications::ProvenNotifications};

const CHANNEL: &str = "regcred_changes";
/// Application name of the connection in `pg_stat_activity`.
const APPLICATION_NAME: &str = "regcred changes";
/// The same for the connection that tests it.
const NOTIFIER_NAME: &str = "regcred echo";

/// A changed or deleted row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// API key, by id.
    ApiKey(Uuid),
    /// Registry account, by name.
    RegistryAccount(String),
    /// Any row: many changed, or the payload is unknown to this binary.
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

/// Listens for changes on its own connection, which is tested from a second one.
pub struct Listener(ProvenNotifications);

impl Listener {
    /// Connects with the options of `pool` and starts to listen. Returns `None` if notifications do
    /// not arrive on this connection.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if Postgres does not answer within `timeout`.
    pub async fn connect(pool: &PgPool, timeout: Duration) -> Result<Option<Self>, StorageError> {
        let names = [APPLICATION_NAME, NOTIFIER_NAME];
        Ok(Box::pin(ProvenNotifications::listen(pool, names, &[CHANNEL], timeout)).await?.map(Self))
    }

    /// Waits up to `patience` for a change.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost. A change may be lost with it.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Change>, StorageError> {
        Ok(self.0.next(patience).await?.as_deref().map(Change::parse))
    }

    /// Tests whether notifications arrive on this connection. If so, changes committed before the
    /// ping are available through [`next_arrived`](Self::next_arrived) afterwards.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if there is no answer within `timeout`.
    pub async fn ping(&mut self, timeout: Duration) -> Result<bool, StorageError> {
        self.0.ping(timeout).await
    }

    /// Returns a change that has arrived.
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
    #[case("registry_accounts team-a", Change::RegistryAccount("team-a".to_owned()))]
    #[case("registry_accounts", Change::Many)]
    #[case("api_keys", Change::Many)]
    #[case("api_keys nonsense", Change::Many)]
    #[case("a_table_of_tomorrow x", Change::Many)]
    #[case("", Change::Many)]
    fn unknown_payload_means_any_row(#[case] payload: &str, #[case] expected: Change) {
        assert_eq!(Change::parse(payload), expected);
    }
}
