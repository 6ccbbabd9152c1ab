//! Sessions of the web console.
//!
//! A session acts for the API key that it was created with: it has the key's role and grants of the
//! moment, and ends when the key is revoked or expires. The session of a person who signed in through
//! an identity provider has the role and grants that the provider's rules of the moment give to the
//! claims of the ID token, and ends when no rule matches any more.

use std::{iter, sync::Arc};

use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::{
    crypto::session::{NewSession, PresentedSession, SessionTokens},
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Actor, ActorKind, Call, Identity, Permission},
        identity_provider::ProviderConfig,
        session::{Person, SessionOwner},
        token::Claims,
    },
    service::{ServiceError, audit::TransactionalAudit, connection, idempotency, row_cache::RowCache, tokens},
    storage::{
        self, PgConnection, PgPool, StorageError,
        identity_providers::StoredProvider,
        sessions::{NamedSession, NewRow, Session},
    },
};

const KIND: &str = "session";
/// Sessions that are kept for each owner. A further one ends the oldest.
const KEPT: i64 = 16;
/// Ended sessions that each new one deletes.
const DELETED_MAX: i64 = 100;
/// Maximum number of concurrent look-ups. A flood of invalid cookies leaves the other connections of
/// the pool to other requests.
const LOOKUPS: usize = 4;

/// Sessions of a list of all.
const LISTED_MAX: i64 = 200;

/// A session with the caller that it acts for.
#[derive(Debug)]
pub struct ListedSession {
    /// The session.
    pub session: Session,
    /// The caller.
    pub owner: Actor,
}

/// Result of the authentication of a presented token.
#[derive(Debug)]
pub enum SessionAuthentication {
    /// The session is valid.
    Authenticated(Arc<Identity>, Box<Session>),
    /// The token is genuine, but its API key is revoked or expired, or no rule matches its claims.
    OwnerEnded(Actor),
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

    /// Authenticates the token of a session. It does not postpone the end of an idle session:
    /// [`note_use`](Self::note_use) does.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn authenticate(&self, text: &str) -> Result<SessionAuthentication, ServiceError> {
        let Some(presented) = PresentedSession::parse(text) else { return Ok(SessionAuthentication::Unknown) };
        let found = self.find(presented.id).await?;
        let Some((session, provider)) = found else { return Ok(SessionAuthentication::Unknown) };
        if !self.tokens.is_valid(presented, &session.owner, &session.mac) {
            return Ok(SessionAuthentication::Unknown);
        }
        let identity = match &session.owner {
            SessionOwner::ApiKey(id) => match self.row_cache.api_key(*id).await? {
                Some(key) if key.is_active() => Arc::clone(&key.identity),
                Some(key) => return Ok(SessionAuthentication::OwnerEnded(key.identity.actor.clone())),
                None => return Ok(SessionAuthentication::Unknown),
            },
            SessionOwner::Person(person) => {
                let Some(provider) = provider else { return Ok(SessionAuthentication::Unknown) };
                match identity_of(&provider, person, &session) {
                    Ok(identity) => Arc::new(identity),
                    Err(actor) => return Ok(SessionAuthentication::OwnerEnded(actor)),
                }
            }
        };
        Ok(SessionAuthentication::Authenticated(identity, Box::new(session)))
    }

    /// Finds a session, with the provider through which its owner signed in.
    async fn find(&self, id: Uuid) -> Result<Option<(Session, Option<StoredProvider>)>, ServiceError> {
        let unavailable = || StorageError::from(sqlx::Error::PoolTimedOut);
        let permit = tokio::time::timeout(self.pool.acquire_timeout(), self.lookups.acquire()).await;
        let Ok(Ok(_permit)) = permit else { return Err(unavailable().into()) };
        let mut conn = connection(&self.pool).await?;
        let Some(session) = storage::sessions::find(&mut conn, id).await? else { return Ok(None) };
        let provider = match session.owner.person() {
            Some(person) => storage::identity_providers::find_by_id(&mut conn, person.provider_id).await?,
            None => None,
        };
        Ok(Some((session, provider.filter(|provider| provider.config.login.is_some()))))
    }

    /// Notes a request of an authenticated session, which postpones its end.
    pub async fn note_use(&self, session: &Session) {
        if !session.is_stale {
            return;
        }
        // A session that cannot be postponed, on a read-only database, can still read.
        if let Err(error) = self.touch(session.id).await {
            tracing::warn!(%error, session.id = %session.id, "session not postponed");
        }
    }

    async fn touch(&self, id: Uuid) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::sessions::touch(&mut conn, id).await?)
    }

    /// Creates a session for the API key of the caller. The text of its token is returned once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the caller has no API key.
    pub async fn create(&self, caller: &Call) -> Result<(Session, NewSession), ServiceError> {
        let api_key_id = caller.actor.id.ok_or_else(|| ServiceError::not_found("API key", &caller.actor.name))?;
        let new = self.tokens.generate(&SessionOwner::ApiKey(api_key_id))?;
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        storage::sessions::delete_ended(&mut tx, DELETED_MAX).await?;
        let source = caller.source.map(|source| source.to_string());
        let row = NewRow { id: new.id, mac: &new.mac, source_ip: source.as_deref() };
        let session = storage::sessions::insert(&mut tx, api_key_id, &row).await?;
        let events = created(caller, &mut tx, &session).await?;
        self.audit.commit(tx, events).await?;
        Ok((session, new))
    }

    /// Creates a session for a person who signed in through a provider with this configuration. `None`
    /// if the provider has another issuer, CA or client by now, or no client.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub(super) async fn create_for(
        &self,
        caller: &Call,
        person: Person,
        config: &ProviderConfig,
    ) -> Result<Option<(Session, NewSession)>, ServiceError> {
        let owner = SessionOwner::Person(person);
        let new = self.tokens.generate(&owner)?;
        let SessionOwner::Person(person) = owner else { return Ok(None) };
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        storage::sessions::delete_ended(&mut tx, DELETED_MAX).await?;
        let source = caller.source.map(|source| source.to_string());
        let row = NewRow { id: new.id, mac: &new.mac, source_ip: source.as_deref() };
        let inserted = storage::sessions::insert_person(&mut tx, &person, config, &row).await?;
        let Some(session) = inserted else { return Ok(None) };
        let events = created(caller, &mut tx, &session).await?;
        self.audit.commit(tx, events).await?;
        Ok(Some((session, new)))
    }

    /// Lists the sessions of the caller, newest first. `current` is that of the request.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn list(&self, caller: &Identity, current: Option<&Session>) -> Result<Vec<ListedSession>, ServiceError> {
        let Some(owner) = owner_of(caller, current) else { return Ok(Vec::new()) };
        let mut conn = connection(&self.pool).await?;
        let found = storage::sessions::list(&mut conn, &owner, KEPT).await?;
        let listed = found.into_iter().map(|session| ListedSession { session, owner: caller.actor.clone() });
        Ok(listed.collect())
    }

    /// Lists the newest sessions of all callers. The caller needs
    /// [`Permission::WriteApiKeys`](crate::domain::caller::Permission::WriteApiKeys).
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn list_all(&self, _caller: &Identity) -> Result<Vec<ListedSession>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let found = storage::sessions::list_all(&mut conn, LISTED_MAX).await?;
        let listed = found.into_iter().map(|NamedSession { session, name }| {
            let owner = match &session.owner {
                SessionOwner::ApiKey(id) => Actor { kind: ActorKind::ApiKey, id: Some(*id), name },
                SessionOwner::Person(person) => tokens::actor(&name, &claims_of(person)),
            };
            ListedSession { session, owner }
        });
        Ok(listed.collect())
    }

    /// Ends a session of the caller. `current` is that of the request. A caller that may revoke API keys
    /// ends those of others, too.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the caller has no such session.
    pub async fn end(&self, caller: &Call, current: Option<&Session>, id: Uuid) -> Result<(), ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let ended = match owner_of(caller, current) {
            _ if caller.may(Permission::WriteApiKeys) => storage::sessions::delete_any(&mut tx, id).await?,
            Some(owner) => storage::sessions::delete(&mut tx, id, &owner).await?,
            None => false,
        };
        if !ended {
            return Err(ServiceError::not_found(KIND, &id));
        }
        let event = NewEvent::of(caller, Action::SessionEnd, Resource::session(id));
        Ok(self.audit.commit(tx, [event]).await?)
    }

    /// Ends all sessions of the caller, that of the request included.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn end_all(&self, caller: &Call, current: Option<&Session>) -> Result<(), ServiceError> {
        let Some(owner) = owner_of(caller, current) else { return Ok(()) };
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let ended = storage::sessions::delete_all(&mut tx, &owner).await?;
        let events = ended.into_iter().map(|id| NewEvent::of(caller, Action::SessionEnd, Resource::session(id)));
        Ok(self.audit.commit(tx, events.collect::<Vec<_>>()).await?)
    }
}

/// Ends the oldest sessions of the owner of a new one. Returns the events of all.
async fn created(caller: &Call, conn: &mut PgConnection, new: &Session) -> Result<Vec<NewEvent>, ServiceError> {
    let ended = storage::sessions::delete_excess(conn, new.id, &new.owner, KEPT).await?;
    let created = NewEvent::of(caller, Action::SessionCreate, Resource::session(new.id));
    Ok(iter::once(created).chain(ended.into_iter().map(|id| ended_by(caller, id, "too-many-sessions"))).collect())
}

/// Event of a session that ended because of a change.
pub(super) fn ended_by(caller: &Call, session: Uuid, reason: &'static str) -> NewEvent {
    let event = NewEvent::of(caller, Action::SessionEnd, Resource::session(session));
    event.details(Details::default().reason(reason))
}

/// Owner of the caller's sessions; `None` for a token.
fn owner_of(caller: &Identity, current: Option<&Session>) -> Option<SessionOwner> {
    match current {
        Some(session) => Some(session.owner.clone()),
        None => caller.actor.id.map(SessionOwner::ApiKey),
    }
}

/// Returns the caller that a session of a person acts for, or its actor if no rule matches.
fn identity_of(provider: &StoredProvider, person: &Person, session: &Session) -> Result<Identity, Actor> {
    let claims = claims_of(person);
    tokens::identity(provider, &claims, session.expires_at).ok_or_else(|| tokens::actor(&provider.name, &claims))
}

fn claims_of(person: &Person) -> Claims {
    Claims::parse(&person.claims).unwrap_or_default()
}
