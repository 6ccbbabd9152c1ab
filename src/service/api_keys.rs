//! API keys: authentication by key, and management of the keys.

use std::sync::Arc;

use chrono::TimeDelta;
use uuid::Uuid;

use crate::{
    crypto::{
        api_key::{self, KeyChecker, NewKey, PresentedKey},
        pepper::Pepper,
    },
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Actor, Call, Identity, NewApiKey, Role},
        listing::{ListRequest, Listed},
        names::Name,
    },
    service::{
        ServiceError,
        audit::{TransactionalAudit, recorded},
        connection, idempotency, on_conflict,
        row_cache::{CachedKey, RowCache},
    },
    storage::{
        self, PgConnection, PgPool, Transaction,
        api_keys::{AdminKey, ApiKey, ApiKeyFilter},
        changes::Change,
    },
};

const KIND: &str = "API key";

/// Authenticates callers by API key.
#[derive(Debug, Clone)]
pub struct ApiKeyAuthenticator {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    checker: Arc<KeyChecker>,
}

/// Result of the authentication of a presented key.
#[derive(Debug)]
pub enum Authentication {
    /// The key is valid.
    Authenticated(Arc<Identity>),
    /// The text is not a key.
    Malformed,
    /// The secret is correct, but the key is revoked or expired.
    Inactive(Arc<Identity>),
    /// No key has this id, or the secret is wrong: possibly a guess.
    WrongSecret(Uuid),
}

impl ApiKeyAuthenticator {
    /// Creates the authenticator.
    #[must_use]
    pub fn new(pool: PgPool, row_cache: Arc<RowCache>, checker: Arc<KeyChecker>) -> Self {
        Self { pool, row_cache, checker }
    }

    /// Authenticates a key. Revocation and expiry are checked at every call.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn authenticate(&self, key: &str) -> Result<Authentication, ServiceError> {
        let Some(presented) = PresentedKey::parse(key) else { return Ok(Authentication::Malformed) };
        let row = self.row_cache.api_key(presented.id).await?;
        if let Some(authentication) = self.check_mac(presented, row.as_deref()) {
            return Ok(authentication);
        }
        let is_valid = self.checker.check(presented, row.as_ref().map(|key| &key.verifier)).await?;
        Ok(match row {
            Some(key) if is_valid && key.is_active() => {
                self.renew(presented, &key).await;
                Authentication::Authenticated(Arc::clone(&key.identity))
            }
            Some(key) if is_valid => Authentication::Inactive(Arc::clone(&key.identity)),
            _ => Authentication::WrongSecret(presented.id),
        })
    }

    /// Stores the HMAC of a verified key under the first pepper, so that the older one can be
    /// removed.
    ///
    /// Only after argon2 has run: while Postgres refuses it, it is tried once per key and ten
    /// minutes.
    async fn renew(&self, presented: PresentedKey<'_>, key: &CachedKey) {
        let Some(renewed) = self.checker.renew(presented, &key.verifier) else { return };
        // First: the next request may read the renewed row.
        self.checker.note_renewed(&renewed);
        let stored = async {
            let mut conn = connection(&self.pool).await?;
            Ok::<_, ServiceError>(storage::api_keys::renew(&mut conn, presented.id, &key.verifier, &renewed).await?)
        };
        match stored.await {
            Ok(true) => {
                self.row_cache.invalidate(&Change::ApiKey(presented.id));
                tracing::info!(key.id = %presented.id, pepper = renewed.pepper_id, "api key renewed");
            }
            // Another process was faster, or an administrator changed the key.
            Ok(false) => {}
            Err(error) => tracing::warn!(key.id = %presented.id, %error, "api key not renewed"),
        }
    }

    /// Authenticates a key if neither a read from Postgres nor an argon2 hash is necessary.
    #[must_use]
    pub fn authenticate_cached(&self, key: &str) -> Option<Authentication> {
        let Some(presented) = PresentedKey::parse(key) else { return Some(Authentication::Malformed) };
        let row = self.row_cache.cached_api_key(presented.id)?;
        self.check_mac(presented, Some(&row))
    }

    /// Decides without argon2 where the HMAC is sufficient.
    ///
    /// Returns `None` only for an active key with a correct HMAC whose argon2 hash this process has
    /// not verified. Wrong keys therefore never cost an argon2 hash.
    fn check_mac(&self, presented: PresentedKey<'_>, row: Option<&CachedKey>) -> Option<Authentication> {
        if let Some(key) = row {
            self.checker.reload_for(&key.verifier);
        }
        let is_valid = self.checker.has_valid_mac(presented, row.map(|key| &key.verifier));
        match row {
            Some(key) if is_valid && !key.is_active() => Some(Authentication::Inactive(Arc::clone(&key.identity))),
            Some(key) if is_valid && self.checker.has_verified(&key.verifier) => {
                Some(Authentication::Authenticated(Arc::clone(&key.identity)))
            }
            Some(_) if is_valid => None,
            _ => Some(Authentication::WrongSecret(presented.id)),
        }
    }
}

/// Service that manages API keys for API callers.
///
/// It checks no grants: only roles without grants may use it ([`Role::takes_grants`]).
#[derive(Debug, Clone)]
pub struct ApiKeys {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    checker: Arc<KeyChecker>,
    audit: TransactionalAudit,
    lifetime_max: Option<TimeDelta>,
}

impl ApiKeys {
    /// Creates the service. `lifetime_max` is the maximum lifetime of a new key.
    #[must_use]
    pub fn new(
        pool: PgPool,
        row_cache: Arc<RowCache>,
        checker: Arc<KeyChecker>,
        audit: TransactionalAudit,
        lifetime_max: Option<TimeDelta>,
    ) -> Self {
        Self { pool, row_cache, checker, audit, lifetime_max }
    }

    /// Returns the maximum lifetime of a new key.
    #[must_use]
    pub fn lifetime_max(&self) -> Option<TimeDelta> {
        self.lifetime_max
    }

    /// Creates a key. Its text is returned once and not stored.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if a key that is not revoked has the name.
    pub async fn create(&self, caller: &Call, new: &NewApiKey) -> Result<(ApiKey, NewKey), ServiceError> {
        let key = self.checker.generate().await?;
        let event = NewEvent::of(caller, Action::KeyCreate, Resource::api_key(key.id));
        let tx = idempotency::begin(&self.pool, caller).await?;
        insert(tx, &self.audit, new, key, event).await
    }

    /// Lists the keys that match `filter`, including revoked and expired ones.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn list(
        &self,
        _caller: &Identity,
        request: &ListRequest,
        filter: &ApiKeyFilter,
    ) -> Result<Listed<ApiKey>, ServiceError> {
        list(&self.pool, request, filter).await
    }

    /// Finds a key.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the selector matches no key.
    pub async fn find(&self, _caller: &Identity, selector: &KeySelector) -> Result<ApiKey, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        selector.find(&mut conn).await
    }

    /// Revokes a key in every replica. Idempotent by id.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] if the selector matches no key.
    /// - [`ServiceError::LastAdmin`] if no usable admin key would remain.
    pub async fn revoke(&self, caller: &Call, selector: &KeySelector) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let id = selector.find(&mut conn).await?.id;
        drop(conn);
        let event = NewEvent::of(caller, Action::KeyRevoke, Resource::api_key(id));
        let remaining = RemainingAdmin::of(self.lifetime_max);
        let tx = idempotency::begin(&self.pool, caller).await?;
        revoke_id(tx, &self.audit, id, event, Some(remaining)).await?;
        self.row_cache.invalidate(&Change::ApiKey(id));
        Ok(())
    }
}

/// Selects a key by its id, or by its name if it is not revoked.
#[derive(Debug)]
pub struct KeySelector {
    id: Option<Uuid>,
    name: Option<Name>,
    text: String,
}

impl KeySelector {
    /// Parses a segment of a path. Text that is neither an id nor a name selects no key.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let (id, name) = (Uuid::try_parse(text).ok(), Name::parse(text).ok());
        Self { id, name, text: text.chars().take(100).collect() }
    }

    /// Finds the key. An id precedes a name of the same text.
    async fn find(&self, conn: &mut PgConnection) -> Result<ApiKey, ServiceError> {
        if let Some(id) = self.id
            && let Some(found) = storage::api_keys::find(conn, id).await?
        {
            return Ok(found);
        }
        if let Some(name) = &self.name
            && let Some(id) = storage::api_keys::find_id(conn, name.as_str()).await?
            && let Some(found) = storage::api_keys::find(conn, id).await?
        {
            return Ok(found);
        }
        Err(ServiceError::not_found(KIND, &self.text))
    }
}

/// Creates a key from the command line. See [`ApiKeys::create`].
///
/// # Errors
///
/// [`ServiceError::NameTaken`] if a key that is not revoked has the name.
pub async fn create(
    pool: &PgPool,
    audit: &TransactionalAudit,
    actor: &Actor,
    pepper: &Pepper,
    new: &NewApiKey,
) -> Result<(ApiKey, NewKey), ServiceError> {
    let key = api_key::generate(pepper)?;
    let event = NewEvent::by(actor, Action::KeyCreate, Resource::api_key(key.id));
    insert(pool.begin().await?, audit, new, key, event).await
}

async fn insert(
    mut tx: Transaction,
    audit: &TransactionalAudit,
    new: &NewApiKey,
    key: NewKey,
    event: NewEvent,
) -> Result<(ApiKey, NewKey), ServiceError> {
    let inserted = storage::api_keys::insert(&mut tx, key.id, new, &key.verifier).await;
    let inserted = inserted.map_err(on_conflict(&new.name))?;
    let details = Details::default().name(&new.name).role(new.role).changes(None, Some(&recorded::api_key(new)));
    audit.commit(tx, [event.details(details)]).await?;
    Ok((inserted, key))
}

/// Lists keys from the command line. See [`ApiKeys::list`].
///
/// # Errors
///
/// [`ServiceError::Storage`].
pub async fn list(pool: &PgPool, request: &ListRequest, filter: &ApiKeyFilter) -> Result<Listed<ApiKey>, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(storage::api_keys::list(&mut conn, request, filter).await?)
}

/// Revokes the key with this name from the command line. `lifetime_max` is the maximum lifetime of
/// new keys.
///
/// # Errors
///
/// - [`ServiceError::NotFound`] if no key that is not revoked has the name.
/// - [`ServiceError::LastAdmin`] if no usable admin key would remain.
pub async fn revoke(
    pool: &PgPool,
    audit: &TransactionalAudit,
    actor: &Actor,
    name: &Name,
    lifetime_max: Option<TimeDelta>,
) -> Result<(), ServiceError> {
    let id = find_id(pool, name).await?;
    let event = NewEvent::by(actor, Action::KeyRevoke, Resource::api_key(id));
    revoke_id(pool.begin().await?, audit, id, event, Some(RemainingAdmin::of(lifetime_max))).await
}

/// Like [`revoke`], but also revokes the last admin key. With access to the database, a new one can
/// be created.
///
/// # Errors
///
/// [`ServiceError::NotFound`] if no key that is not revoked has the name.
pub async fn revoke_even_last_admin(
    pool: &PgPool,
    audit: &TransactionalAudit,
    actor: &Actor,
    name: &Name,
) -> Result<(), ServiceError> {
    let id = find_id(pool, name).await?;
    let event = NewEvent::by(actor, Action::KeyRevoke, Resource::api_key(id));
    revoke_id(pool.begin().await?, audit, id, event, None).await
}

/// Admin key that must remain after a revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RemainingAdmin {
    /// Any active one. New keys have an expiry, so none without could replace the revoked one.
    Active,
    /// An active one, without expiry if the revoked key has none.
    AsLasting,
}

impl RemainingAdmin {
    fn of(lifetime_max: Option<TimeDelta>) -> Self {
        if lifetime_max.is_some() { Self::Active } else { Self::AsLasting }
    }
}

async fn find_id(pool: &PgPool, name: &Name) -> Result<Uuid, ServiceError> {
    let mut conn = connection(pool).await?;
    let found = storage::api_keys::find_id(&mut conn, name.as_str()).await?;
    found.ok_or_else(|| ServiceError::not_found(KIND, name))
}

async fn revoke_id(
    mut tx: Transaction,
    audit: &TransactionalAudit,
    id: Uuid,
    event: NewEvent,
    remaining: Option<RemainingAdmin>,
) -> Result<(), ServiceError> {
    let key = storage::api_keys::find(&mut tx, id).await?.ok_or_else(|| ServiceError::not_found(KIND, &id))?;
    if let (Role::Admin, Some(remaining)) = (key.role, remaining) {
        let admins = storage::api_keys::lock_admins(&mut tx).await?;
        require_remaining_admin(&admins, id, remaining)?;
    }
    if storage::api_keys::revoke(&mut tx, id).await? {
        let name = Name::parse(&key.name).ok();
        let details = name.map_or_else(Details::default, |name| Details::default().name(&name));
        return Ok(audit.commit(tx, [event.details(details.role(key.role))]).await?);
    }
    Ok(tx.commit().await?)
}

/// Requires that an active admin key remains after the revocation of `id`. If `id` never expires, a
/// remaining key must never expire either, unless keys must expire: otherwise administrators would
/// be locked out when the last one expires.
fn require_remaining_admin(admins: &[AdminKey], id: Uuid, remaining: RemainingAdmin) -> Result<(), ServiceError> {
    let Some(key) = admins.iter().find(|admin| admin.id == id) else { return Ok(()) };
    let may_expire = key.expires || remaining == RemainingAdmin::Active;
    if admins.iter().any(|other| other.id != id && (may_expire || !other.expires)) {
        return Ok(());
    }
    Err(ServiceError::LastAdmin)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(&[false], [true, true])]
    #[case(&[true], [true, true])]
    #[case(&[false, true], [true, false])]
    #[case(&[true, true], [false, false])]
    #[case(&[true, false], [false, false])]
    #[case(&[false, false, true], [false, false])]
    fn revocation_keeps_one_usable_admin_key(#[case] expire: &[bool], #[case] refused: [bool; 2]) {
        let admins: Vec<AdminKey> =
            expire.iter().map(|expires| AdminKey { id: Uuid::now_v7(), expires: *expires }).collect();
        for (remaining, refused) in [RemainingAdmin::AsLasting, RemainingAdmin::Active].into_iter().zip(refused) {
            assert_eq!(require_remaining_admin(&admins, admins[0].id, remaining).is_err(), refused, "{remaining:?}");
            assert!(require_remaining_admin(&admins, Uuid::now_v7(), remaining).is_ok());
        }
    }
}
