//! SQL: free functions on a connection, one file per table. No other module contains SQL.
//!
//! Services own the transactions. A row that is not a valid domain value is an error, not a panic.
//!
//! Every function returns [`StorageError::Unavailable`] if Postgres is unreachable, and
//! [`StorageError::Corrupt`] if a row does not parse. Functions document only other errors.

#![expect(clippy::missing_errors_doc, reason = "the module documentation states the errors that all functions share")]

use std::io;

use uuid::Uuid;

use crate::domain::invalid::Invalid;

pub mod accounts;
pub mod api_keys;
pub mod audit;
pub mod changes;
pub mod cluster_credentials;
pub mod clusters;
pub mod connection;
pub mod coverage;
pub mod direct_secrets;
pub mod idempotency_keys;
pub mod identity_providers;
pub mod left_out;
pub mod lists;
pub mod mints;
pub mod notifications;
pub mod pool;
pub mod pull_secret_clusters;
pub mod pull_secrets;
pub mod resource_changes;
pub mod resyncs;
pub mod schema;
pub mod sealed;
pub mod sessions;
pub mod summary;
pub mod targets;
pub mod traces;
pub mod unmatched;
pub mod verifications;
pub mod wakeups;
pub mod watches;

pub use self::connection::{PgConnection, PgPool, Transaction};

/// Failure of a database operation.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Postgres is unreachable, shutting down, or ended the operation after a timeout. Retrying may
    /// help.
    #[error("the database is unavailable")]
    Unavailable(#[source] sqlx::Error),
    /// Another row has the name.
    #[error("the name is in use")]
    NameTaken,
    /// Another identity provider has the audience.
    #[error("the audience is in use")]
    AudienceTaken,
    /// A stored value is not a valid domain value.
    #[error("{table}/{id}: the stored {column} is invalid: {reason}")]
    Corrupt {
        /// Table of the row.
        table: &'static str,
        /// Primary key of the row.
        id: Uuid,
        /// Column of the value.
        column: &'static str,
        /// Rule that the value breaks.
        reason: Invalid,
    },
    /// Any other error of Postgres or the driver.
    #[error("the database returned an error")]
    Sql(#[source] sqlx::Error),
}

impl StorageError {
    /// Copies the error for another request that waited for the same operation.
    #[must_use]
    pub fn duplicate(&self) -> Self {
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

/// Whether an error concerns the availability of the server, not the statement.
fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::Protocol(_)
        | sqlx::Error::WorkerCrashed => true,
        // 08: connection exception; 57P: shutting down, crashed or starting up; 53300: too many
        // connections; 25006: read-only after a failover; 57014 and 25P03: timeouts of
        // `pool::bounded`; 40P01: deadlock, whose victim was rolled back and may retry.
        sqlx::Error::Database(db) => db.code().is_some_and(|code| {
            code.starts_with("08")
                || code.starts_with("57P")
                || ["53300", "25006", "57014", "25P03", "40P01"].contains(&&*code)
        }),
        _ => false,
    }
}

/// Maps the violation of a unique constraint on a name to [`StorageError::NameTaken`].
fn on_name_taken(constraint: &'static str) -> impl FnOnce(sqlx::Error) -> StorageError {
    move |error| match error.as_database_error() {
        Some(db) if db.constraint() == Some(constraint) => StorageError::NameTaken,
        _ => error.into(),
    }
}

/// Creates a [`StorageError::Corrupt`] for a column of a row.
fn corrupt(table: &'static str, id: Uuid, column: &'static str) -> impl FnOnce(Invalid) -> StorageError {
    move |reason| StorageError::Corrupt { table, id, column, reason }
}

/// Page of a list: at most `limit` rows after the name `after`.
#[derive(Debug, Clone)]
pub struct PageRequest {
    /// Last name of the previous page.
    pub after: Option<String>,
    /// Maximum number of rows.
    pub limit: i64,
}
