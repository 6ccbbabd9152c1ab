//! Postgres connection pool.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    Connection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::timeout;

use crate::{domain::invalid::Invalid, storage::PgPool};

/// Idle time after which a connection is tested before use, so that one closed by Postgres causes a
/// reconnect and not a failed request. Testing it every time would slow reads down by a fifth.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);
/// Time limit of that test. A connection that is not tested in time is replaced.
const TEST_MAX: Duration = Duration::from_secs(1);
/// Time limit for a single connection attempt.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Parses a Postgres URL.
///
/// # Errors
///
/// [`Invalid`] if it is not a URL; without the URL, which contains a password.
pub fn parse_url(url: &SecretString) -> Result<PgConnectOptions, Invalid> {
    url.expose_secret()
        .trim()
        .parse::<PgConnectOptions>()
        .map(|options| options.application_name("regcred"))
        .map_err(|_| Invalid::new("must be a URL such as postgres://user:password@host:5432/regcred"))
}

/// Maximum duration of a statement of the service.
const STATEMENT_MAX: Duration = Duration::from_secs(10);
/// Limit of an operation of the service: Postgres ends a statement first, if it answers at all.
pub const OPERATION_MAX: Duration = Duration::from_secs(12);

/// Makes Postgres end statements that exceed [`STATEMENT_MAX`] and transactions that are idle for
/// 5 s. An idle transaction belongs to a process that is stopped or has lost its host, and may hold
/// locks that other replicas wait for. Postgres also drops a connection whose peer is gone.
///
/// These are options of the connection, so they cost nothing per statement.
#[must_use]
pub fn bounded(options: PgConnectOptions) -> PgConnectOptions {
    let statement = format!("{}s", STATEMENT_MAX.as_secs());
    options.options([
        ("statement_timeout", statement.as_str()),
        ("idle_in_transaction_session_timeout", "5s"),
        ("tcp_keepalives_idle", "10"),
        ("tcp_keepalives_interval", "5"),
        ("tcp_keepalives_count", "4"),
        ("tcp_user_timeout", "30s"),
        // The working set is in memory. With the default, made for spinning disks, a claim reads all due targets to
        // save page reads, and leaves the index entries of old row versions in place.
        ("random_page_cost", "1.1"),
    ])
}

/// Creates the pool of the service, as [`lazy`] does. Its statements and operations are bounded.
#[must_use]
pub fn of_service(options: PgConnectOptions, max_connections: u32, acquire_timeout: Duration) -> PgPool {
    PgPool::new(open(bounded(options), max_connections, acquire_timeout), OPERATION_MAX)
}

/// Creates a pool for commands without connecting. Requests fail while Postgres is unavailable and
/// succeed again afterwards.
#[must_use]
pub fn lazy(options: PgConnectOptions, max_connections: u32, acquire_timeout: Duration) -> PgPool {
    open(options, max_connections, acquire_timeout).into()
}

pub(super) fn open(options: PgConnectOptions, max_connections: u32, acquire_timeout: Duration) -> sqlx::PgPool {
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(acquire_timeout)
        .test_before_acquire(false)
        .before_acquire(|conn, meta| {
            Box::pin(async move {
                if meta.idle_for < TRUSTED_IDLE {
                    return Ok(true);
                }
                Ok(matches!(timeout(TEST_MAX, conn.ping()).await, Ok(Ok(()))))
            })
        })
        .connect_lazy_with(options)
}

/// Connects once, outside any pool.
///
/// # Errors
///
/// Returns the message of the driver, which contains no password.
pub async fn probe(options: &PgConnectOptions) -> Result<(), String> {
    let connecting = sqlx::PgConnection::connect_with(options);
    match timeout(PROBE_TIMEOUT, connecting).await {
        Ok(Ok(conn)) => conn.close().await.map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the connection attempt timed out".to_owned()),
    }
}
