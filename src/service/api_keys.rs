//! API keys: who is at the door, and the keys themselves.

use std::sync::Arc;

use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    crypto::api_key::{self, KeyChecker, NewKey, Pepper, ShownKey},
    domain::{
        caller::{Identity, NewApiKey, Role},
        names::Name,
    },
    service::{ServiceError, connection},
    storage::{
        self, StorageError,
        api_keys::{AdminKey, ApiKey, StoredKey},
    },
};

/// The door: says whom a shown key stands for.
#[derive(Debug, Clone)]
pub struct Door {
    pool: PgPool,
    checker: Arc<KeyChecker>,
}

/// What the door says of a shown key.
#[derive(Debug)]
pub enum Verdict {
    /// It is the key of this caller.
    Known(Identity),
    /// It is no key, or one that was revoked or has expired.
    Refused,
    /// It has the form of a key and a secret that is not the one of this id: somebody guesses.
    Wrong(Uuid),
}

impl Door {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, checker: Arc<KeyChecker>) -> Self {
        Self { pool, checker }
    }

    /// The id that a shown key names, before anything of it is checked but its form.
    #[must_use]
    pub fn named_id(key: &str) -> Option<Uuid> {
        ShownKey::parse(key).map(|shown| shown.id)
    }

    /// Says whom a key stands for. The row is read at each request, so that a revocation counts at once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn identify(&self, key: &str) -> Result<Verdict, ServiceError> {
        let Some(shown) = ShownKey::parse(key) else { return Ok(Verdict::Refused) };
        let stored = {
            let mut conn = connection(&self.pool).await?;
            storage::api_keys::find(&mut conn, shown.id).await?
        };
        let is_right = self.checker.check(&shown, stored.as_ref().map(|key| &key.verifier)).await?;
        Ok(match stored {
            Some(StoredKey { identity, is_active: true, .. }) if is_right => Verdict::Known(identity),
            Some(_) if is_right => Verdict::Refused,
            _ => Verdict::Wrong(shown.id),
        })
    }
}

/// The API keys, for callers. Who may work with them reaches all of them: [`Role::takes_grants`].
#[derive(Debug, Clone)]
pub struct ApiKeys {
    pool: PgPool,
    checker: Arc<KeyChecker>,
}

impl ApiKeys {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, checker: Arc<KeyChecker>) -> Self {
        Self { pool, checker }
    }

    /// Makes a key; its text is in the answer and nowhere else.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if a key that is not revoked has the name.
    pub async fn create(&self, _caller: &Identity, new: &NewApiKey) -> Result<(ApiKey, NewKey), ServiceError> {
        insert(&self.pool, new, self.checker.generate().await?).await
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
    pub async fn revoke(&self, _caller: &Identity, id: Uuid) -> Result<(), ServiceError> {
        revoke_id(&self.pool, id).await
    }
}

/// Makes a key, for whoever has the database; see [`ApiKeys::create`].
///
/// # Errors
///
/// [`ServiceError::NameTaken`] if a key that is not revoked has the name.
pub async fn create(pool: &PgPool, pepper: &Pepper, new: &NewApiKey) -> Result<(ApiKey, NewKey), ServiceError> {
    insert(pool, new, api_key::generate(pepper)?).await
}

async fn insert(pool: &PgPool, new: &NewApiKey, key: NewKey) -> Result<(ApiKey, NewKey), ServiceError> {
    let mut conn = connection(pool).await?;
    match storage::api_keys::insert(&mut conn, key.id, new, &key.verifier).await {
        Ok(inserted) => Ok((inserted, key)),
        Err(StorageError::NameTaken) => Err(ServiceError::NameTaken(new.name.to_string())),
        Err(other) => Err(other.into()),
    }
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
pub async fn revoke(pool: &PgPool, name: &Name) -> Result<(), ServiceError> {
    revoke_id(pool, find_id(pool, name).await?).await
}

/// As [`revoke`], and the last admin's key too: whoever has the database can make another.
///
/// # Errors
///
/// [`ServiceError::NotFound`] if no key that is not revoked has the name.
pub async fn revoke_even_last_admin(pool: &PgPool, name: &Name) -> Result<(), ServiceError> {
    let id = find_id(pool, name).await?;
    let mut conn = connection(pool).await?;
    Ok(storage::api_keys::revoke(&mut conn, id).await?)
}

async fn find_id(pool: &PgPool, name: &Name) -> Result<Uuid, ServiceError> {
    let mut conn = connection(pool).await?;
    let found = storage::api_keys::find_id(&mut conn, name.as_str()).await?;
    found.ok_or_else(|| ServiceError::NotFound { kind: "API key", name: name.to_string() })
}

async fn revoke_id(pool: &PgPool, id: Uuid) -> Result<(), ServiceError> {
    let mut tx = pool.begin().await?;
    let key = storage::api_keys::show(&mut tx, id).await?.ok_or_else(|| not_found(id))?;
    if key.role == Role::Admin {
        let admins = storage::api_keys::lock_admins(&mut tx).await?;
        refuse_last_admin(&admins, id)?;
    }
    storage::api_keys::revoke(&mut tx, id).await?;
    tx.commit().await?;
    Ok(())
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
