//! SQL: free functions on a connection, one file per table. No other module contains SQL.
//!
//! Transactions belong to the services. A row that is not a valid domain value is an error, never a panic.
//!
//! Every function returns [`StorageError::Unavailable`] if Postgres cannot be reached, and
//! [`StorageError::Corrupt`] if a row does not parse. Only other errors are documented on the function.

#![expect(clippy::missing_errors_doc, reason = "the module documentation states the errors that all functions share")]

use std::io;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::invalid::Invalid;

pub mod accounts;
pub mod api_keys;
pub mod audit;
pub mod changes;
pub mod clusters;
pub mod identity_providers;
pub mod notifications;
pub mod pool;
pub mod pull_secret_clusters;
pub mod pull_secrets;
pub mod resyncs;
pub mod schema;
pub mod sealed;
pub mod targets;
pub mod verifications;
pub mod wakeups;
pub mod watches;

/// What can go wrong between a service and Postgres.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Postgres cannot be reached, is shutting down, or has put an end to what waited for too long; trying again later may help.
    #[error("the database is not available")]
    Unavailable(#[source] sqlx::Error),
    /// Another row has this name.
    #[error("the name is in use")]
    NameTaken,
    /// Another identity provider is meant by the same tokens.
    #[error("the audience is in use")]
    AudienceTaken,
    /// A stored value is not a valid domain value.
    #[error("{table}/{id}: the stored {column} is not valid: {reason}")]
    Corrupt {
        /// Table of the row.
        table: &'static str,
        /// Primary key of the row.
        id: Uuid,
        /// Column that holds the value.
        column: &'static str,
        /// Which rule it breaks.
        reason: Invalid,
    },
    /// Anything else that Postgres or the driver said.
    #[error("the database refused")]
    Sql(#[source] sqlx::Error),
}

impl StorageError {
    /// The same, for one more who waited for what failed.
    #[must_use]
    pub fn for_another(&self) -> Self {
        match self {
            Self::Unavailable(source) => Self::Unavailable(sqlx::Error::Io(io::Error::other(source.to_string()))),
            Self::Sql(source) => Self::Sql(sqlx::Error::Protocol(source.to_string())),
            Self::NameTaken => Self::NameTaken,
            Self::AudienceTaken => Self::AudienceTaken,
            Self::Corrupt { table, id, column, reason } => {
                Self::Corrupt { table, id: *id, column, reason: reason.clone() }
            }
        }
    }
}

impl From<sqlx::Error> for StorageError {
    fn from(error: sqlx::Error) -> Self {
        if is_unavailable(&error) { Self::Unavailable(error) } else { Self::Sql(error) }
    }
}

/// Whether an error says that the server is away or busy, and nothing about the statement.
fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::Protocol(_)
        | sqlx::Error::WorkerCrashed => true,
        // 08: connection exception; 57P: shutting down, crashed, starting up; 53300: too many connections;
        // 25006: read-only, as a server is that was failed over; 57014 and 25P03: what `pool::bounded` has ended; 40P01: a circle
        // of waits, of which Postgres ends one, who has changed nothing then and may try again.
        sqlx::Error::Database(db) => db.code().is_some_and(|code| {
            code.starts_with("08")
                || code.starts_with("57P")
                || ["53300", "25006", "57014", "25P03", "40P01"].contains(&&*code)
        }),
        _ => false,
    }
}

/// Turns the violation of a name's unique constraint into [`StorageError::NameTaken`].
fn on_name_taken(constraint: &'static str) -> impl FnOnce(sqlx::Error) -> StorageError {
    move |error| match error.as_database_error() {
        Some(db) if db.constraint() == Some(constraint) => StorageError::NameTaken,
        _ => error.into(),
    }
}

/// Makes a [`StorageError::Corrupt`] for one column of a row.
fn corrupt(table: &'static str, id: Uuid, column: &'static str) -> impl FnOnce(Invalid) -> StorageError {
    move |reason| StorageError::Corrupt { table, id, column, reason }
}

/// One page of a list: at most `limit` rows after the name `after`.
#[derive(Debug, Clone)]
pub struct PageRequest {
    /// The last name of the page before, if there was one.
    pub after: Option<String>,
    /// The most rows to return.
    pub limit: i64,
}

/// Asks Postgres for a sign of life.
///
/// # Errors
///
/// [`StorageError::Unavailable`] if there is none.
pub async fn ping(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT 1 AS one").fetch_one(conn).await?;
    Ok(())
}
