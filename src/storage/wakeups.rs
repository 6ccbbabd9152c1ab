//! Notifications between replicas: wake-ups of workers, and progress of pull secrets.

use std::time::Duration;

use uuid::Uuid;

use crate::storage::{PgConnection, PgPool, StorageError, notifications::Notifications};

/// Channel for due work.
const WAKE_UP_CHANNEL: &str = "regcred_pull_secrets";
/// Application name of its listeners in `pg_stat_activity`.
const WAKE_UP_APPLICATION: &str = "regcred wakes";
/// Channel for recorded results. The payload holds ids of pull secrets.
const PROGRESS_CHANNEL: &str = "regcred_pull_secret_progress";
/// Application name of its listeners in `pg_stat_activity`.
const PROGRESS_APPLICATION: &str = "regcred progress";
/// Ids that fit into one notification, which holds 8,000 bytes.
const PROGRESS_IDS_MAX: usize = 200;

/// Wakes the workers of all replicas when the transaction commits. Postgres merges equal
/// notifications of one transaction.
pub async fn wake_workers(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_notify($1, '')", WAKE_UP_CHANNEL).execute(conn).await?;
    Ok(())
}

/// Listens for [`wake_workers`] on its own connection.
pub struct WakeUpListener(Notifications);

impl WakeUpListener {
    /// Connects with the options of `pool` and starts to listen.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if Postgres does not answer within `timeout`.
    pub async fn connect(pool: &PgPool, timeout: Duration) -> Result<Self, StorageError> {
        Ok(Self(Notifications::listen(pool, WAKE_UP_APPLICATION, &[WAKE_UP_CHANNEL], timeout).await?))
    }

    /// Waits up to `patience` for a wake-up and consumes all that arrived. Returns whether there
    /// was one.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost. A wake-up may be lost with it.
    pub async fn next(&mut self, patience: Duration) -> Result<bool, StorageError> {
        let woken = self.0.next(patience).await?.is_some();
        while self.0.next_arrived().is_some() {}
        Ok(woken)
    }
}

/// Announces that results of these pull secrets were recorded, in one notification.
pub async fn announce_progress(conn: &mut PgConnection, ids: &[Uuid]) -> Result<(), StorageError> {
    let ids: Vec<String> = ids.iter().map(Uuid::to_string).collect();
    let payload = if ids.len() > PROGRESS_IDS_MAX { String::new() } else { ids.join(",") };
    sqlx::query!("SELECT pg_notify($1, $2)", PROGRESS_CHANNEL, payload).execute(conn).await?;
    Ok(())
}

/// Pull secrets whose status may have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// These.
    Of(Vec<Uuid>),
    /// Any.
    OfAny,
}

impl Progress {
    /// Parses a payload. An unknown form means any pull secret.
    fn parse(payload: &str) -> Self {
        payload.split(',').map(Uuid::parse_str).collect::<Result<_, _>>().map_or(Self::OfAny, Self::Of)
    }
}

/// Listens for [`announce_progress`] and [`wake_workers`] on its own connection.
pub struct ProgressListener(Notifications);

impl ProgressListener {
    /// Connects with the options of `pool` and starts to listen.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if Postgres does not answer within `timeout`.
    pub async fn connect(pool: &PgPool, timeout: Duration) -> Result<Self, StorageError> {
        let channels = [WAKE_UP_CHANNEL, PROGRESS_CHANNEL];
        Ok(Self(Notifications::listen(pool, PROGRESS_APPLICATION, &channels, timeout).await?))
    }

    /// Waits up to `patience` for progress.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost. Progress may be lost with it.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Progress>, StorageError> {
        Ok(self.0.next(patience).await?.as_deref().map(Progress::parse))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_progress_payload_means_any_pull_secret() {
        let (one, two) = (Uuid::now_v7(), Uuid::now_v7());
        assert_eq!(Progress::parse(&format!("{one},{two}")), Progress::Of(vec![one, two]));
        for payload in ["", "x", ",", &format!("{one},")] {
            assert_eq!(Progress::parse(payload), Progress::OfAny, "{payload}");
        }
    }
}
