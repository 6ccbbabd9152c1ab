//! Sessions of the web console.
//!
//! A session acts for the API key that it was created with: it has the key's role and grants of the
//! moment, and ends when the key is revoked or expires.

use std::sync::Arc;

use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::{
    crypto::session::{NewSession, PresentedSession, SessionTokens},
    domain::{
        audit::{Action, NewEvent, Resource},
        caller::{Call, Identity},
    },
    service::{ServiceError, audit::TransactionalAudit, connection, idempotency, row_cache::RowCache},
    storage::{self, PgPool, StorageError, sessions::Session},
};

const KIND: &str = "session";
/// Sessions that are kept for each API key. A further one ends the oldest.
const KEPT: i64 = 16;
/// Ended sessions that each new one deletes.
const DELETED_MAX: i64 = 100;
/// Maximum number of concurrent look-ups. A flood of invalid cookies leaves the other connections of
/// the pool to other requests.
const LOOKUPS: usize = 4;

/// Result of the authentication of a presented token.
#[derive(Debug)]
pub enum SessionAuthentication {
    /// The session is valid.
    Authenticated(Arc<Identity>, Box<Session>),
    /// The token is genuine, but its API key is revoked or expired.
    KeyEnded(Arc<Identity>),
    /// The session has ended, or the token is a guess.
    Unknown,
}

/// Service for sessions.
#[derive(Debug, Clone)]
pub struct Sessions {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    tokens: SessionTokens,
    audit: TransactionalAudit,
    lookups: Arc<Semaphore>,
}

impl Sessions {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, row_cache: Arc<RowCache>, tokens: SessionTokens, audit: TransactionalAudit) -> Self {
        Self { pool, row_cache, tokens, audit, lookups: Arc::new(Semaphore::new(LOOKUPS)) }
    }

    /// Authenticates the token of a session. `is_use` notes a request of a person, which postpones
    /// the end of an idle session.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn authenticate(&self, text: &str, is_use: bool) -> Result<SessionAuthentication, ServiceError> {
        let Some(presented) = PresentedSession::parse(text) else { return Ok(SessionAuthentication::Unknown) };
        let Some(session) = self.find(presented.id, is_use).await? else { return Ok(SessionAuthentication::Unknown) };
        if !self.tokens.is_valid(presented, session.api_key_id, &session.mac) {
            return Ok(SessionAuthentication::Unknown);
        }
        Ok(match self.row_cache.api_key(session.api_key_id).await? {
            Some(key) if key.is_active() => {
                SessionAuthentication::Authenticated(Arc::clone(&key.identity), Box::new(session))
            }
            Some(key) => SessionAuthentication::KeyEnded(Arc::clone(&key.identity)),
            None => SessionAuthentication::Unknown,
        })
    }

    async fn find(&self, id: Uuid, is_use: bool) -> Result<Option<Session>, ServiceError> {
        let unavailable = || StorageError::from(sqlx::Error::PoolTimedOut);
        let permit = tokio::time::timeout(self.pool.acquire_timeout(), self.lookups.acquire()).await;
        let Ok(Ok(_permit)) = permit else { return Err(unavailable().into()) };
        let mut conn = connection(&self.pool).await?;
        let found = storage::sessions::find(&mut conn, id).await?;
        if let Some(session) = found.as_ref().filter(|session| is_use && session.is_stale) {
            // A session that cannot be postponed, on a read-only database, can still read.
            if let Err(error) = storage::sessions::touch(&mut conn, session.id).await {
                tracing::warn!(%error, session.id = %session.id, "session not postponed");
            }
        }
        Ok(found)
    }

    /// Creates a session for the API key of the caller. The text of its token is returned once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the caller has no API key.
    pub async fn create(&self, caller: &Call) -> Result<(Session, NewSession), ServiceError> {
        let api_key_id = caller.actor.id.ok_or_else(|| ServiceError::not_found("API key", &caller.actor.name))?;
        let new = self.tokens.generate(api_key_id)?;
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        storage::sessions::delete_ended(&mut tx, DELETED_MAX).await?;
        let source = caller.source.map(|source| source.to_string());
        let session = storage::sessions::insert(&mut tx, new.id, api_key_id, &new.mac, source.as_deref(), KEPT).await?;
        let event = NewEvent::of(caller, Action::SessionCreate, Resource::session(new.id));
        self.audit.commit(tx, [event]).await?;
        Ok((session, new))
    }

    /// Lists the sessions of the caller's API key, newest first.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn list(&self, caller: &Identity) -> Result<Vec<Session>, ServiceError> {
        let Some(api_key_id) = caller.actor.id else { return Ok(Vec::new()) };
        let mut conn = connection(&self.pool).await?;
        Ok(storage::sessions::list(&mut conn, api_key_id, KEPT).await?)
    }

    /// Ends a session of the caller's API key.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the key has no such session.
    pub async fn end(&self, caller: &Call, id: Uuid) -> Result<(), ServiceError> {
        let api_key_id = caller.actor.id.ok_or_else(|| ServiceError::not_found(KIND, &id))?;
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        if !storage::sessions::delete(&mut tx, id, api_key_id).await? {
            return Err(ServiceError::not_found(KIND, &id));
        }
        let event = NewEvent::of(caller, Action::SessionEnd, Resource::session(id));
        Ok(self.audit.commit(tx, [event]).await?)
    }
}
