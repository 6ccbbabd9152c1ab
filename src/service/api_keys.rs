//! API keys: who is at the door, and the keys themselves.

use std::sync::Arc;

use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    crypto::api_key::{self, KeyChecker, NewKey, Pepper, PresentedKey},
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Actor, Call, Identity, NewApiKey, Role},
        names::Name,
    },
    service::{
        ServiceError,
        audit::TransactionalAudit,
        connection,
        row_cache::{KnownKey, RowCache},
    },
    storage::{
        self, StorageError,
        api_keys::{AdminKey, ApiKey},
        changes::Change,
    },
};

/// The door: says whom a shown key stands for.
#[derive(Debug, Clone)]
pub struct ApiKeyAuthenticator {
    row_cache: Arc<RowCache>,
    checker: Arc<KeyChecker>,
}

/// What the door says of a shown key.
#[derive(Debug)]
pub enum Authentication {
    /// It is the key of this caller.
    Known(Arc<Identity>),
    /// It is no key.
    Refused,
    /// It is the right key of this caller, and was revoked or has expired.
    Ended(Arc<Identity>),
    /// It has the form of a key and a secret that is not the one of this id: somebody guesses.
    Wrong(Uuid),
}

impl ApiKeyAuthenticator {
    /// Puts the service together.
    #[must_use]
    pub fn new(row_cache: Arc<RowCache>, checker: Arc<KeyChecker>) -> Self {
        Self { row_cache, checker }
    }

    /// Says whom a key stands for. Whether it is revoked or expired is asked at each request.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn identify(&self, key: &str) -> Result<Authentication, ServiceError> {
        let Some(shown) = PresentedKey::parse(key) else { return Ok(Authentication::Refused) };
        let known = self.row_cache.api_key(shown.id).await?;
        if let Some(authentication) = self.judge(shown, known.as_deref()) {
            return Ok(authentication);
        }
        let is_right = self.checker.check(shown, known.as_ref().map(|key| &key.verifier)).await?;
        Ok(match known {
            Some(key) if is_right && key.is_active() => Authentication::Known(Arc::clone(&key.identity)),
            Some(key) if is_right => Authentication::Ended(Arc::clone(&key.identity)),
            _ => Authentication::Wrong(shown.id),
        })
    }

    /// The same, if neither Postgres nor argon2 needs to be waited for.
    #[must_use]
    pub fn identify_at_once(&self, key: &str) -> Option<Authentication> {
        let Some(shown) = PresentedKey::parse(key) else { return Some(Authentication::Refused) };
        let known = self.row_cache.recall_api_key(shown.id)?;
        self.judge(shown, Some(&known))
    }

    /// What can be said of a key without argon2. The HMAC proves the secret, and argon2 is for those who may come in.
    fn judge(&self, shown: PresentedKey<'_>, known: Option<&KnownKey>) -> Option<Authentication> {
        let is_right = self.checker.has_valid_mac(shown, known.map(|key| &key.verifier));
        match known {
            Some(key) if is_right && !key.is_active() => Some(Authentication::Ended(Arc::clone(&key.identity))),
            Some(key) if is_right && self.checker.has_verified(&key.verifier) => {
                Some(Authentication::Known(Arc::clone(&key.identity)))
            }
            Some(_) if is_right => None,
            _ => Some(Authentication::Wrong(shown.id)),
        }
    }
}

/// The API keys, for callers. Who may work with them reaches all of them: [`Role::takes_grants`].
#[derive(Debug, Clone)]
pub struct ApiKeys {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    checker: Arc<KeyChecker>,
    audit: TransactionalAudit,
}

impl ApiKeys {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, row_cache: Arc<RowCache>, checker: Arc<KeyChecker>, audit: TransactionalAudit) -> Self {
        Self { pool, row_cache, checker, audit }
    }

    /// Makes a key; its text is in the answer and nowhere else.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if a key that is not revoked has the name.
    pub async fn create(&self, caller: &Call, new: &NewApiKey) -> Result<(ApiKey, NewKey), ServiceError> {
        let key = self.checker.generate().await?;
        let event = NewEvent::of(caller, Action::KeyCreate, Resource::api_key(key.id));
        insert(&self.pool, &self.audit, new, key, event).await
    }

    /// Lists keys, revoked and expired ones too, the oldest first: at most `limit` after the one with the id `after`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn list(&self, _caller: &Identity, after: Option<Uuid>, limit: i64) -> Result<Vec<ApiKey>, ServiceError> {
        list(&self.pool, after, limit).await
    }

    /// Finds a key.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none with this id.
    pub async fn find(&self, _caller: &Identity, id: Uuid) -> Result<ApiKey, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        storage::api_keys::show(&mut conn, id).await?.ok_or_else(|| not_found(id))
    }

    /// Revokes a key, at once in every replica. To do so again changes nothing.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none with this id, [`ServiceError::LastAdmin`] if nobody could make
    /// keys any more.
    pub async fn revoke(&self, caller: &Call, id: Uuid) -> Result<(), ServiceError> {
        let event = NewEvent::of(caller, Action::KeyRevoke, Resource::api_key(id));
        revoke_id(&self.pool, &self.audit, id, event, false).await?;
        self.row_cache.forget(&Change::ApiKey(id));
        Ok(())
    }
}

/// Makes a key, for whoever has the database; see [`ApiKeys::create`].
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
    insert(pool, audit, new, key, event).await
}

async fn insert(
    pool: &PgPool,
    audit: &TransactionalAudit,
    new: &NewApiKey,
    key: NewKey,
    event: NewEvent,
) -> Result<(ApiKey, NewKey), ServiceError> {
    let mut tx = pool.begin().await?;
    let inserted = match storage::api_keys::insert(&mut tx, key.id, new, &key.verifier).await {
        Ok(inserted) => inserted,
        Err(StorageError::NameTaken) => return Err(ServiceError::NameTaken(new.name.to_string())),
        Err(other) => return Err(other.into()),
    };
    audit.commit(tx, [event.details(Details::default().name(&new.name).role(new.role))]).await?;
    Ok((inserted, key))
}

/// Lists keys, for whoever has the database; see [`ApiKeys::list`].
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres cannot be asked.
pub async fn list(pool: &PgPool, after: Option<Uuid>, limit: i64) -> Result<Vec<ApiKey>, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(storage::api_keys::list(&mut conn, after, limit).await?)
}

/// Revokes the key of this name, for whoever has the database.
///
/// # Errors
///
/// [`ServiceError::NotFound`] if no key that is not revoked has the name, [`ServiceError::LastAdmin`] as for
/// [`ApiKeys::revoke`].
pub async fn revoke(pool: &PgPool, audit: &TransactionalAudit, actor: &Actor, name: &Name) -> Result<(), ServiceError> {
    let id = find_id(pool, name).await?;
    let event = NewEvent::by(actor, Action::KeyRevoke, Resource::api_key(id));
    revoke_id(pool, audit, id, event, false).await
}

/// As [`revoke`], and the last admin's key too: whoever has the database can make another.
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
    revoke_id(pool, audit, id, event, true).await
}

async fn find_id(pool: &PgPool, name: &Name) -> Result<Uuid, ServiceError> {
    let mut conn = connection(pool).await?;
    let found = storage::api_keys::find_id(&mut conn, name.as_str()).await?;
    found.ok_or_else(|| ServiceError::NotFound { kind: "API key", name: name.to_string() })
}

async fn revoke_id(
    pool: &PgPool,
    audit: &TransactionalAudit,
    id: Uuid,
    event: NewEvent,
    even_last_admin: bool,
) -> Result<(), ServiceError> {
    let mut tx = pool.begin().await?;
    let key = storage::api_keys::show(&mut tx, id).await?.ok_or_else(|| not_found(id))?;
    if key.role == Role::Admin && !even_last_admin {
        let admins = storage::api_keys::lock_admins(&mut tx).await?;
        refuse_last_admin(&admins, id)?;
    }
    if storage::api_keys::revoke(&mut tx, id).await? {
        let name = Name::parse(&key.name).ok();
        let details = name.map_or_else(Details::default, |name| Details::default().name(&name));
        return Ok(audit.commit(tx, [event.details(details.role(key.role))]).await?);
    }
    Ok(tx.commit().await?)
}

/// Of the keys that open the door today, one must be left; and where one never expires, one such must be left, for
/// otherwise the door would close by itself some day.
fn refuse_last_admin(admins: &[AdminKey], id: Uuid) -> Result<(), ServiceError> {
    let Some(key) = admins.iter().find(|admin| admin.id == id) else { return Ok(()) };
    if admins.iter().any(|other| other.id != id && (key.expires || !other.expires)) {
        return Ok(());
    }
    Err(ServiceError::LastAdmin)
}

fn not_found(id: Uuid) -> ServiceError {
    ServiceError::NotFound { kind: "API key", name: id.to_string() }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(&[false], true)]
    #[case(&[true], true)]
    #[case(&[false, true], true)]
    #[case(&[true, true], false)]
    #[case(&[true, false], false)]
    #[case(&[false, false, true], false)]
    fn one_admin_is_always_left(#[case] expire: &[bool], #[case] refused: bool) {
        let admins: Vec<AdminKey> =
            expire.iter().map(|expires| AdminKey { id: Uuid::now_v7(), expires: *expires }).collect();
        assert_eq!(refuse_last_admin(&admins, admins[0].id).is_err(), refused);
        assert!(refuse_last_admin(&admins, Uuid::now_v7()).is_ok());
    }
}
