//! API keys: who is at the door, and the keys themselves.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use sqlx::PgPool;

use crate::{
    crypto::api_key::{self, KeyChecker, NewKey, Pepper, ShownKey},
    domain::{
        caller::{Identity, Role},
        names::Name,
    },
    service::{ServiceError, connection},
    storage::{
        self, StorageError,
        api_keys::{KeySummary, StoredKey},
    },
};

/// The door: says whom a shown key stands for.
#[derive(Debug, Clone)]
pub struct Door {
    pool: PgPool,
    checker: Arc<KeyChecker>,
}

impl Door {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, checker: Arc<KeyChecker>) -> Self {
        Self { pool, checker }
    }

    /// Says whom a key stands for; `None` if it is not a key, unknown, wrong, revoked or expired, and a caller
    /// cannot tell which. The row is read at each request, so that a revocation counts at once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn identify(&self, key: &str) -> Result<Option<Identity>, ServiceError> {
        let Some(shown) = ShownKey::parse(key) else { return Ok(None) };
        let stored = {
            let mut conn = connection(&self.pool).await?;
            storage::api_keys::find(&mut conn, shown.id).await?
        };
        let is_right = self.checker.check(&shown, stored.as_ref().map(|key| &key.verifier)).await?;
        Ok(match stored {
            Some(StoredKey { identity, is_active: true, .. }) if is_right => Some(identity),
            _ => None,
        })
    }
}

/// Makes a key; its text is in the answer and nowhere else.
///
/// # Errors
///
/// [`ServiceError::NameTaken`] if a key that is not revoked has the name.
pub async fn create(
    pool: &PgPool,
    pepper: &Pepper,
    name: &Name,
    role: Role,
    expires_at: Option<DateTime<Utc>>,
) -> Result<NewKey, ServiceError> {
    let key = api_key::generate(pepper)?;
    let mut conn = connection(pool).await?;
    storage::api_keys::insert(&mut conn, key.id, name.as_str(), role, &key.verifier, expires_at).await.map_err(
        |error| match error {
            StorageError::NameTaken => ServiceError::NameTaken(name.to_string()),
            other => other.into(),
        },
    )?;
    Ok(key)
}

/// Lists all keys, revoked ones too.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres cannot be asked.
pub async fn list(pool: &PgPool) -> Result<Vec<KeySummary>, ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(storage::api_keys::list(&mut conn).await?)
}

/// Revokes a key, at once in every replica.
///
/// # Errors
///
/// [`ServiceError::NotFound`] if no key that is not revoked has the name.
pub async fn revoke(pool: &PgPool, name: &Name) -> Result<(), ServiceError> {
    let mut conn = connection(pool).await?;
    if storage::api_keys::revoke(&mut conn, name.as_str()).await? {
        return Ok(());
    }
    Err(ServiceError::NotFound { kind: "API key", name: name.to_string() })
}
