//! The pool of Postgres connections.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    Connection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::domain::invalid::Invalid;

/// A connection that was idle for longer than this is tried before it is used: one that Postgres closed
/// meanwhile costs a reconnect then, not a failed request. Asking every time would cost a fifth of all reads.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);
/// How long one connection may take to come about.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Parses a Postgres URL.
///
/// # Errors
///
/// [`Invalid`] says that it is no URL; it never shows the URL, which has a password in it.
pub fn parse_url(url: &SecretString) -> Result<PgConnectOptions, Invalid> {
    url.expose_secret()
        .trim()
        .parse::<PgConnectOptions>()
        .map(|options| options.application_name("regcred"))
        .map_err(|_| Invalid::new("must be a URL such as postgres://user:password@host:5432/regcred"))
}

/// How long a statement of a service may take.
pub const STATEMENT_MAX: Duration = Duration::from_secs(30);

/// Has Postgres end what a service never means to do: a statement that takes longer than [`STATEMENT_MAX`], and a transaction in which
/// nothing is said for 5 s. The latter is that of a process that stands still or has lost its host. It may have locked rows that all
/// other replicas wait for.
#[must_use]
pub fn bounded(options: PgConnectOptions) -> PgConnectOptions {
    let statement = format!("{}s", STATEMENT_MAX.as_secs());
    options.options([("statement_timeout", statement.as_str()), ("idle_in_transaction_session_timeout", "5s")])
}

/// Makes a pool without connecting: requests fail as long as Postgres is away, and work once it is back.
#[must_use]
pub fn lazy(options: PgConnectOptions, max_connections: u32, acquire_timeout: Duration) -> PgPool {
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(acquire_timeout)
        .test_before_acquire(false)
        .before_acquire(|conn, meta| {
            Box::pin(async move {
                if meta.idle_for < TRUSTED_IDLE {
                    return Ok(true);
                }
                Ok(conn.ping().await.is_ok())
            })
        })
        .connect_lazy_with(options)
}

/// Connects once, beside any pool, and says why it does not work if it does not.
///
/// # Errors
///
/// The driver's words; they hold no password.
pub async fn probe(options: &PgConnectOptions) -> Result<(), String> {
    let connecting = sqlx::PgConnection::connect_with(options);
    match tokio::time::timeout(PROBE_TIMEOUT, connecting).await {
        Ok(Ok(conn)) => conn.close().await.map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the connection hangs".to_owned()),
    }
}
