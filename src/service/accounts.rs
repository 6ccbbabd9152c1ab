//! Registry accounts: register, look up, change, remove.

use std::sync::Arc;

use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        account::{Account, AccountChange, NewAccount},
        names::Name,
    },
    service::{ExpectedVersion, ServiceError, check_version, connection},
    storage::{self, PageRequest, StorageError, accounts::AccountFilter, sealed::SealedColumn},
};

/// The registry accounts.
#[derive(Debug, Clone)]
pub struct Accounts {
    pool: PgPool,
    sealer: Arc<Sealer>,
}

impl Accounts {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, sealer: Arc<Sealer>) -> Self {
        Self { pool, sealer }
    }

    /// Registers an account; its password is sealed before it is stored.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if the name is in use.
    pub async fn register(&self, new: NewAccount) -> Result<Account, ServiceError> {
        let id = Uuid::now_v7();
        let password = self.sealer.seal(SealedColumn::AccountPassword.slot(id), new.password.secret())?;
        let mut conn = connection(&self.pool).await?;
        storage::accounts::insert(&mut conn, id, &new, &password).await.map_err(|error| match error {
            StorageError::NameTaken => ServiceError::NameTaken(new.name.to_string()),
            other => other.into(),
        })
    }

    /// Finds an account.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name.
    pub async fn find(&self, name: &Name) -> Result<Account, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        storage::accounts::find(&mut conn, name).await?.ok_or_else(|| not_found(name))
    }

    /// Lists accounts by name, only those that `filter` lets through.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn list(&self, page: &PageRequest, filter: &AccountFilter) -> Result<Vec<Account>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::accounts::list(&mut conn, page, filter).await?)
    }

    /// Changes an account; a new password is a rotation. Every change raises the version, so that whoever
    /// read the account before notices.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the
    /// expected version, [`ServiceError::Invalid`] if the changed labels break a rule.
    pub async fn change(
        &self,
        name: &Name,
        change: AccountChange,
        expected: ExpectedVersion,
    ) -> Result<Account, ServiceError> {
        let mut tx = self.pool.begin().await?;
        let mut account = storage::accounts::lock(&mut tx, name).await?.ok_or_else(|| not_found(name))?;
        check_version(expected, account.version)?;
        let password = change
            .password
            .as_ref()
            .map(|password| self.sealer.seal(SealedColumn::AccountPassword.slot(account.id), password.secret()))
            .transpose()?;
        change.apply(&mut account).map_err(|invalid| ServiceError::field("labels", invalid))?;
        let changed = storage::accounts::update(&mut tx, &account, password.as_ref()).await?;
        tx.commit().await?;
        Ok(changed)
    }

    /// Removes an account and its password.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the
    /// expected version.
    pub async fn remove(&self, name: &Name, expected: ExpectedVersion) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        let account = storage::accounts::lock(&mut tx, name).await?.ok_or_else(|| not_found(name))?;
        check_version(expected, account.version)?;
        storage::accounts::delete(&mut tx, account.id).await?;
        tx.commit().await?;
        Ok(())
    }
}

pub(super) fn not_found(name: &Name) -> ServiceError {
    ServiceError::NotFound { kind: "registry account", name: name.to_string() }
}
