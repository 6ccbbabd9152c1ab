//! Connections to Postgres whose operations end within a bound.
//!
//! sqlx has no time limit for an operation and sets no TCP timeout. If the server is stopped or the
//! network drops packets, an operation would hold its request and its place in the pool until TCP
//! gives up, after a quarter of an hour. The types of this module have the names of sqlx's and
//! stand in for them: all SQL of the service runs on them.
//!
//! - An operation without an answer within the limit fails with [`sqlx::Error::Io`], and the
//!   connection is closed.
//! - The limit is longer than the `statement_timeout` of the connection, so that a server that
//!   answers ends the statement itself.
//! - Returning a connection to the pool, which includes a rollback and a ping, takes at most
//!   [`RETURN_MAX`].

use std::{
    fmt, future, io,
    ops::{Deref, DerefMut},
    time::Duration,
};

use futures_util::{
    StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use sqlx::{
    Connection, Describe, Either, Execute, Executor, Postgres, SqlStr,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgQueryResult, PgRow, PgStatement, PgTypeInfo},
};
use tokio::{runtime::Handle, time::timeout};

/// Limit of an operation of a command, whose statements may be long.
const COMMAND_MAX: Duration = Duration::from_hours(1);
/// Longest time until a connection is back in the pool, or closed.
const RETURN_MAX: Duration = Duration::from_secs(5);

/// A pool of bounded connections.
#[derive(Debug, Clone)]
pub struct PgPool {
    pool: sqlx::PgPool,
    limit: Duration,
}

impl PgPool {
    /// Bounds the operations on the connections of a pool.
    #[must_use]
    pub fn new(pool: sqlx::PgPool, limit: Duration) -> Self {
        Self { pool, limit }
    }

    /// Takes a connection from the pool.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] if there is none within the acquire timeout.
    pub async fn acquire(&self) -> sqlx::Result<PgConnection> {
        Ok(PgConnection::new(Link::Pooled(self.pool.acquire().await?), self.limit))
    }

    /// Takes a connection from the pool and begins a transaction.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] as [`acquire`](Self::acquire), or of the statement.
    pub async fn begin(&self) -> sqlx::Result<Transaction> {
        self.acquire().await?.begin().await
    }

    /// As [`begin`](Self::begin), with another statement than `BEGIN`.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] as [`begin`](Self::begin).
    pub async fn begin_with(&self, statement: &'static str) -> sqlx::Result<Transaction> {
        self.acquire().await?.begin_with(statement).await
    }

    /// Options of its connections.
    #[must_use]
    pub fn connect_options(&self) -> PgConnectOptions {
        (*self.pool.connect_options()).clone()
    }

    /// Longest wait for a connection.
    #[must_use]
    pub fn acquire_timeout(&self) -> Duration {
        self.pool.options().get_acquire_timeout()
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// The pool of sqlx, for its statistics and for migrations.
    #[must_use]
    pub fn sqlx(&self) -> &sqlx::PgPool {
        &self.pool
    }
}

/// A pool for commands.
impl From<sqlx::PgPool> for PgPool {
    fn from(pool: sqlx::PgPool) -> Self {
        Self::new(pool, COMMAND_MAX)
    }
}

/// A bounded connection, of a pool or of its own.
pub struct PgConnection {
    /// `None` only while it is dropped.
    link: Option<Link>,
    limit: Duration,
    /// An operation had no answer: the next one would wait for it too.
    is_stuck: bool,
    is_in_transaction: bool,
}

enum Link {
    Pooled(PoolConnection<Postgres>),
    Own(Box<sqlx::PgConnection>),
}

impl PgConnection {
    fn new(link: Link, limit: Duration) -> Self {
        Self { link: Some(link), limit, is_stuck: false, is_in_transaction: false }
    }

    /// Connects outside any pool. `limit` bounds this and all operations.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] if Postgres refuses or does not answer.
    pub async fn connect_with(options: &PgConnectOptions, limit: Duration) -> sqlx::Result<Self> {
        let conn = within(limit, &mut false, sqlx::PgConnection::connect_with(options)).await?;
        Ok(Self::new(Link::Own(Box::new(conn)), limit))
    }

    /// Begins a transaction.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] of the statement.
    pub async fn begin(self) -> sqlx::Result<Transaction> {
        self.begin_with("BEGIN").await
    }

    async fn begin_with(mut self, statement: &'static str) -> sqlx::Result<Transaction> {
        // First, so that a failed or aborted attempt is rolled back.
        self.is_in_transaction = true;
        self.execute(statement).await?;
        Ok(Transaction { conn: self, is_dry: false })
    }

    /// The connection of sqlx, its limit, and whether it is stuck.
    fn parts(&mut self) -> sqlx::Result<(&mut sqlx::PgConnection, Duration, &mut bool)> {
        let conn = match self.link.as_mut().ok_or(sqlx::Error::PoolClosed)? {
            Link::Pooled(conn) => &mut **conn,
            Link::Own(conn) => conn.as_mut(),
        };
        Ok((conn, self.limit, &mut self.is_stuck))
    }
}

impl From<sqlx::PgConnection> for PgConnection {
    fn from(conn: sqlx::PgConnection) -> Self {
        Self::new(Link::Own(Box::new(conn)), COMMAND_MAX)
    }
}

impl fmt::Debug for PgConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgConnection").field("is_stuck", &self.is_stuck).finish_non_exhaustive()
    }
}

/// Returns a pooled connection. Dropping a connection of its own closes it, which ends a
/// transaction too.
impl Drop for PgConnection {
    fn drop(&mut self) {
        let Some(Link::Pooled(mut conn)) = self.link.take() else { return };
        if self.is_stuck {
            conn.close_on_drop();
        } else if self.is_in_transaction {
            if let Ok(runtime) = Handle::try_current() {
                runtime.spawn(roll_back(conn));
            }
        } else if let Ok(runtime) = Handle::try_current() {
            // As the destructor of sqlx does, but bounded. A connection that is not back in time is
            // dropped, and its place in the pool is free.
            runtime.spawn(timeout(RETURN_MAX, conn.return_to_pool()));
        }
    }
}

async fn roll_back(mut conn: PoolConnection<Postgres>) {
    let rolled_back = async {
        let rolled_back = conn.execute("ROLLBACK").await.is_ok();
        if rolled_back {
            conn.return_to_pool().await;
        }
        rolled_back
    };
    if !timeout(RETURN_MAX, rolled_back).await.unwrap_or(false) {
        conn.close_on_drop();
    }
}

/// A transaction. Dropping it rolls back.
#[derive(Debug)]
pub struct Transaction {
    conn: PgConnection,
    is_dry: bool,
}

impl Transaction {
    /// Turns the transaction into that of a dry run: [`commit`](Self::commit) rolls it back.
    #[must_use]
    pub fn dry(self) -> Self {
        Self { is_dry: true, ..self }
    }

    /// Whether the transaction is that of a dry run.
    #[must_use]
    pub const fn is_dry(&self) -> bool {
        self.is_dry
    }

    /// Commits, or rolls back for a dry run.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] of the statement. If the connection broke or had no answer, the transaction
    /// may be committed all the same.
    pub async fn commit(self) -> sqlx::Result<()> {
        let statement = if self.is_dry { "ROLLBACK" } else { "COMMIT" };
        self.end(statement).await.map(drop)
    }

    /// Commits, and returns the connection.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] as [`commit`](Self::commit).
    pub async fn commit_and_keep(self) -> sqlx::Result<PgConnection> {
        self.end("COMMIT").await
    }

    /// Rolls back, and returns the connection.
    ///
    /// # Errors
    ///
    /// [`sqlx::Error`] of the statement. The connection is then closed, which rolls back too.
    pub async fn rollback_and_keep(self) -> sqlx::Result<PgConnection> {
        self.end("ROLLBACK").await
    }

    async fn end(mut self, statement: &'static str) -> sqlx::Result<PgConnection> {
        self.conn.execute(statement).await?;
        self.conn.is_in_transaction = false;
        Ok(self.conn)
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.conn
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.conn
    }
}

impl<'c> Executor<'c> for &'c mut PgConnection {
    type Database = Postgres;

    /// Bounds the time to each row.
    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Either<PgQueryResult, PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let (conn, limit, is_stuck) = match self.parts() {
            Ok(parts) => parts,
            Err(error) => return stream::once(future::ready(Err(error))).boxed(),
        };
        let rows = Some((conn.fetch_many(query), is_stuck));
        let bounded = stream::unfold(rows, move |rows| async move {
            let (mut rows, is_stuck) = rows?;
            let row = within(limit, is_stuck, async { rows.next().await.transpose() }).await.transpose()?;
            let rest = row.is_ok().then_some((rows, is_stuck));
            Some((row, rest))
        });
        bounded.boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        Box::pin(async move {
            let (conn, limit, is_stuck) = self.parts()?;
            within(limit, is_stuck, conn.fetch_optional(query)).await
        })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        Box::pin(async move {
            let (conn, limit, is_stuck) = self.parts()?;
            within(limit, is_stuck, conn.prepare_with(sql, parameters)).await
        })
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        Box::pin(async move {
            let (conn, limit, is_stuck) = self.parts()?;
            within(limit, is_stuck, conn.describe(sql)).await
        })
    }
}

/// Runs an operation, for at most `limit`.
async fn within<T>(
    limit: Duration,
    is_stuck: &mut bool,
    operation: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    if !*is_stuck {
        match timeout(limit, operation).await {
            Ok(result) => return result,
            Err(_) => *is_stuck = true,
        }
    }
    Err(sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, "Postgres did not answer in time")))
}
