//! Registry accounts: register, look up, change, remove.

use std::sync::Arc;

use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        account::{Account, AccountChange, NewAccount},
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        invalid::FieldError,
        names::{Labels, Name},
        registry::RegistryScope,
    },
    service::{
        ExpectedVersion, ServiceError,
        audit::TransactionalAudit,
        check_version, connection,
        pull_secrets::{self, AccountTransition},
        row_cache::RowCache,
    },
    storage::{self, PageRequest, StorageError, accounts::AccountFilter, changes::Change, sealed::SealedColumn},
};

/// The registry accounts.
#[derive(Debug, Clone)]
pub struct Accounts {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    sealer: Arc<Sealer>,
    audit: TransactionalAudit,
}

impl Accounts {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, row_cache: Arc<RowCache>, sealer: Arc<Sealer>, audit: TransactionalAudit) -> Self {
        Self { pool, row_cache, sealer, audit }
    }

    /// Registers an account; its password is sealed before it is stored.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if the name is in use, [`ServiceError::NotGranted`] if the account would not be
    /// granted to the caller, whether the name is in use or not.
    pub async fn register(&self, caller: &Call, new: NewAccount) -> Result<Account, ServiceError> {
        require_granted(caller, &new.name, &new.labels)?;
        let id = Uuid::now_v7();
        let password = self.sealer.seal(SealedColumn::AccountPassword.slot(id), new.password.secret())?;
        let mut tx = self.pool.begin().await?;
        storage::pull_secrets::lock_selectors_shared(&mut tx).await?;
        let account = storage::accounts::insert(&mut tx, id, &new, &password).await.map_err(|error| match error {
            StorageError::NameTaken => ServiceError::NameTaken(new.name.to_string()),
            other => other.into(),
        })?;
        pull_secrets::follow_accounts(&mut tx, &[AccountTransition::Created(&account)]).await?;
        let event = NewEvent::of(caller, Action::AccountCreate, Resource::account(&account.name));
        self.audit.commit(tx, [event.details(Details::default().version(account.version))]).await?;
        Ok(account)
    }

    /// Finds an account.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name.
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<Account, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        granted(caller, name, storage::accounts::find(&mut conn, name).await?)
    }

    /// Lists granted accounts by name, only those that `filter` lets through.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn list(
        &self,
        caller: &Identity,
        page: &PageRequest,
        filter: &AccountFilter,
    ) -> Result<Vec<Account>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::accounts::list(&mut conn, &caller.grants, page, filter).await?)
    }

    /// Changes an account; a new password is a rotation. Every change raises the version, so that whoever
    /// read the account before notices.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the
    /// expected version, [`ServiceError::Invalid`] if the changed labels break a rule, [`ServiceError::NotGranted`]
    /// if with them the account would not be granted to the caller any more.
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        change: AccountChange,
        expected: ExpectedVersion,
    ) -> Result<Account, ServiceError> {
        let mut tx = self.pool.begin().await?;
        storage::pull_secrets::lock_selectors_shared(&mut tx).await?;
        let mut account = granted(caller, name, storage::accounts::lock(&mut tx, name).await?)?;
        check_version(expected, account.version)?;
        let before = account.clone();
        refuse_redirection(&account, &change)?;
        let password = change
            .password
            .as_ref()
            .map(|password| self.sealer.seal(SealedColumn::AccountPassword.slot(account.id), password.secret()))
            .transpose()?;
        let fields = change.fields();
        change.apply(&mut account).map_err(|invalid| ServiceError::field("labels", invalid))?;
        require_granted(caller, name, &account.labels)?;
        let changed = storage::accounts::update(&mut tx, &account, password.as_ref()).await?;
        let transition =
            AccountTransition::Changed { before: &before, after: &changed, has_new_password: password.is_some() };
        pull_secrets::follow_accounts(&mut tx, &[transition]).await?;
        let action = if password.is_some() { Action::AccountRotate } else { Action::AccountUpdate };
        let details = Details::default().fields(&fields).version(changed.version);
        self.audit.commit(tx, [NewEvent::of(caller, action, Resource::account(name)).details(details)]).await?;
        self.row_cache.forget(&Change::RegistryAccount(name.to_string()));
        Ok(changed)
    }

    /// Removes an account and its password.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the
    /// expected version, [`ServiceError::InUse`] if a pull secret names it.
    pub async fn remove(&self, caller: &Call, name: &Name, expected: ExpectedVersion) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        storage::pull_secrets::lock_selectors_shared(&mut tx).await?;
        let account = granted(caller, name, storage::accounts::lock(&mut tx, name).await?)?;
        check_version(expected, account.version)?;
        let users = storage::pull_secrets::naming_account(&mut tx, account.id).await?;
        pull_secrets::refuse_used(&mut tx, caller, "registry account", name, users).await?;
        storage::accounts::delete(&mut tx, account.id).await?;
        pull_secrets::follow_accounts(&mut tx, &[AccountTransition::Deleted(&account)]).await?;
        let details = Details::default().version(account.version);
        let event = NewEvent::of(caller, Action::AccountDelete, Resource::account(name)).details(details);
        self.audit.commit(tx, [event]).await?;
        self.row_cache.forget(&Change::RegistryAccount(name.to_string()));
        Ok(())
    }
}

pub(super) fn not_found(name: &Name) -> ServiceError {
    ServiceError::NotFound { kind: "registry account", name: name.to_string() }
}

pub(super) fn not_granted(name: &Name) -> ServiceError {
    ServiceError::NotGranted { kind: "registry account", name: name.to_string(), as_it_is: " with these labels" }
}

/// Refuses an account that would not be granted to the caller.
pub(super) fn require_granted(caller: &Identity, name: &Name, labels: &Labels) -> Result<(), ServiceError> {
    if caller.grants.include_account(name.as_str(), labels.as_map()) { Ok(()) } else { Err(not_granted(name)) }
}

/// The account, if it is there for this caller.
fn granted(caller: &Identity, name: &Name, found: Option<Account>) -> Result<Account, ServiceError> {
    let account = found.ok_or_else(|| not_found(name))?;
    if caller.grants.include_account(account.name.as_str(), account.labels.as_map()) {
        Ok(account)
    } else {
        Err(ServiceError::Hidden { kind: "registry account", name: name.to_string() })
    }
}

/// Refuses to have a stored password sent to another registry, or in the clear, than it was given for: otherwise
/// whoever may change an account could read a password that he cannot see, at a registry of his own. Another part of
/// the same registry is no such change.
pub(super) fn refuse_redirection(account: &Account, change: &AccountChange) -> Result<(), ServiceError> {
    let elsewhere = |registry: &RegistryScope| registry.authority() != account.registry.authority();
    let moved = [
        ("registry", change.registry.as_ref().is_some_and(elsewhere)),
        ("plainHttp", change.plain_http == Some(true) && !account.plain_http),
    ];
    match moved.into_iter().find(|(_, is_moved)| *is_moved) {
        Some((field, _)) if change.password.is_none() => {
            let detail = "cannot be changed so without `password`: the stored one is not sent anywhere else";
            Err(vec![FieldError::new(field, detail)].into())
        }
        _ => Ok(()),
    }
}
