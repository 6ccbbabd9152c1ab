//! Registry accounts: register, find, list, change, remove and verify.
//!
//! Every write of an account goes through [`Accounts`]. A caller can require a working login before
//! the write ([`RequiredVerification`]). Imports use the same steps, for many accounts in one
//! transaction:
//!
//! 1. [`Accounts::begin`] opens the transaction, finds the form of sealed values, and takes the lock
//!    on label selectors.
//! 2. [`Accounts::insert`] and [`Accounts::update`] seal the password and store the row.
//! 3. [`Accounts::commit`] bumps the generation of the pull secrets that use the accounts, commits
//!    together with the audit events, and invalidates the cached rows.

mod minted;

use std::{collections::BTreeSet, sync::Arc};

use secrecy::SecretString;
use uuid::Uuid;

use crate::{
    crypto::{constant_time, sealer::Sealer},
    domain::{
        account::{Account, AccountChange, NewAccount, Password, Registration, SourceChange},
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        cluster::CaCertificate,
        invalid::FieldError,
        listing::{ListRequest, Listed},
        names::{Labels, Name},
        registry::RegistryScope,
        sealed::{RegistryDestination, SealForm, Sealed},
        verification::{Verification, VerificationReport},
    },
    service::{
        ExpectedVersion, ServiceError,
        audit::{TransactionalAudit, recorded},
        check_version, connection, idempotency, master_keys,
        mints::Mints,
        on_conflict,
        pull_secrets::{self, AccountTransition},
        require_visible,
        row_cache::RowCache,
        verification::{RequiredVerification, Verifications},
    },
    storage::{
        self, PgConnection, PgPool, Transaction, accounts::AccountFilter, changes::Change,
        direct_secrets::OutdatedCopy, sealed::SealedColumn,
    },
};

use self::minted::{MintedSource, check_change};

pub(super) const KIND: &str = "registry account";

/// Service for registry accounts.
#[derive(Debug, Clone)]
pub struct Accounts {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    sealer: Arc<Sealer>,
    audit: TransactionalAudit,
    verifications: Verifications,
    mints: Mints,
}

/// An account, with the Secrets of direct delivery that contain an earlier login of it.
#[derive(Debug)]
pub struct ShownAccount {
    /// The account.
    pub account: Account,
    /// Secrets in clusters and namespaces that are granted to the caller.
    pub outdated_copies: Vec<OutdatedCopy>,
    /// Number of further Secrets, which the caller may not see.
    pub hidden_copies: usize,
}

impl ShownAccount {
    /// Shows an account that no Secret contains.
    fn current(account: Account) -> Self {
        Self { account, outdated_copies: Vec::new(), hidden_copies: 0 }
    }

    async fn read(conn: &mut PgConnection, caller: &Identity, account: Account) -> Result<Self, ServiceError> {
        let found = storage::direct_secrets::list_outdated(conn, account.id).await?;
        let grants = &caller.grants;
        let is_granted =
            |copy: &OutdatedCopy| grants.include_cluster(&copy.cluster) && grants.include_namespace(&copy.namespace);
        let (outdated_copies, hidden): (Vec<_>, Vec<_>) = found.into_iter().partition(is_granted);
        Ok(Self { account, outdated_copies, hidden_copies: hidden.len() })
    }
}

impl Accounts {
    /// Creates the service.
    #[must_use]
    pub fn new(
        pool: PgPool,
        row_cache: Arc<RowCache>,
        sealer: Arc<Sealer>,
        audit: TransactionalAudit,
        verifications: Verifications,
        mints: Mints,
    ) -> Self {
        Self { pool, row_cache, sealer, audit, verifications, mints }
    }

    /// Registers an account. Its login is minted first if it has a source. With `verification`, the
    /// login must work.
    ///
    /// # Errors
    ///
    /// - As [`Mints`] if the mint fails.
    /// - [`ServiceError::NotGranted`] or [`ServiceError::LabelsNotGranted`] if the grants do not
    ///   include the account or its labels, whether or not the name is in use.
    /// - [`ServiceError::NameTaken`] if the name is in use.
    /// - [`ServiceError::VerificationFailed`] if the required verification fails.
    pub async fn register(
        &self,
        caller: &Call,
        new: Registration,
        verification: Option<RequiredVerification>,
    ) -> Result<ShownAccount, ServiceError> {
        // Before mint and verification, which call addresses that the caller names.
        let (name, labels) = new.name_and_labels();
        require_granted(caller, name, &Labels::default(), labels)?;
        let (new, first) = self.mint_first(caller, new).await?;
        let check = match verification.filter(|_| has_login(first.as_ref())) {
            Some(required) => Some(self.verifications.require_valid_new(&new, &required).await?),
            None => None,
        };
        let (mut tx, form) = self.begin(caller).await?;
        let mut account = self.insert(&mut tx, form, &new).await?;
        self.store_source(&mut tx, caller, &mut account, first.as_ref(), None).await?;
        let event = NewEvent::of(caller, Action::AccountCreate, Resource::account(&account.name));
        let details = Details::default().version(account.version);
        let event = event.details(details.changes(None, Some(&recorded::account(&account))));
        self.commit(tx, &[AccountTransition::Created(&account)], vec![event]).await?;
        Ok(ShownAccount::current(self.record_check(caller, account, check).await?))
    }

    /// Finds an account.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<ShownAccount, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let account = visible(caller, name, storage::accounts::find(&mut conn, name).await?)?;
        ShownAccount::read(&mut conn, caller, account).await
    }

    /// Lists the granted accounts that match `filter`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn list(
        &self,
        caller: &Identity,
        request: &ListRequest,
        filter: &AccountFilter,
    ) -> Result<Listed<Account>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::accounts::list(&mut conn, &caller.grants, request, filter).await?)
    }

    /// Counts the pull secrets that name or select each of these accounts.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn count_users(&self, accounts: &[Account]) -> Result<Vec<u64>, ServiceError> {
        let ids: Vec<Uuid> = accounts.iter().map(|account| account.id).collect();
        let labels: BTreeSet<_> = accounts.iter().map(|account| account.labels.as_map()).collect();
        let labels: Vec<_> = labels.into_iter().collect();
        let mut conn = connection(&self.pool).await?;
        let naming = storage::pull_secrets::count_naming(&mut conn, &ids).await?;
        let selecting = storage::pull_secrets::selecting(&mut conn, &labels).await?;
        let count = |account: &Account| {
            let named = naming.get(&account.id).copied().unwrap_or_default();
            let selecting = selecting.iter().filter(|(_, selector)| selector.matches(account.labels.as_map()));
            named + selecting.count() as u64
        };
        Ok(accounts.iter().map(count).collect())
    }

    /// Changes an account and increments its version. A new password is a rotation. Without a
    /// difference, nothing is changed. With `verification`, the changed login must work first.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::Stale`] if the account is not at the expected version, or changes during
    ///   the verification.
    /// - [`ServiceError::Invalid`] if the changed labels are not valid, or the change would send
    ///   the stored password to another registry.
    /// - [`ServiceError::NotGranted`] or [`ServiceError::LabelsNotGranted`] if the grants do not
    ///   include the changed account or its added or changed labels.
    /// - [`ServiceError::VerificationFailed`] if the required verification fails.
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        mut change: AccountChange,
        expected: ExpectedVersion,
        verification: Option<RequiredVerification>,
    ) -> Result<ShownAccount, ServiceError> {
        let (expected, first) = self.mint_changed(caller, name, &mut change, expected).await?;
        let first = first.as_ref();
        let (expected, check) = match verification.filter(|_| has_login(first)) {
            Some(required) => {
                let (version, check) = self.verify_change(caller, name, &change, first, expected, &required).await?;
                (Some(version), Some(check))
            }
            None => (expected, None),
        };
        let changed = self.store_change(caller, name, &change, first, expected).await?;
        let account = self.record_check(caller, changed.account, check).await?;
        Ok(ShownAccount { account, ..changed })
    }

    /// Verifies the login that a change would produce. Returns the account's version, at which the
    /// change must be stored.
    async fn verify_change(
        &self,
        caller: &Call,
        name: &Name,
        change: &AccountChange,
        first: Option<&MintedSource>,
        expected: ExpectedVersion,
        required: &RequiredVerification,
    ) -> Result<(i64, VerificationReport), ServiceError> {
        let account = self.find(caller, name).await?.account;
        check_change(&account, change, first)?;
        let changed = apply_change(caller, &account, change, expected)?;
        first.map_or(Ok(()), |first| first.check_target(&account, &changed.registry))?;
        let password = change.password.as_ref();
        let check = self.verifications.require_valid_changed(caller, &account, &changed, password, required).await?;
        Ok((account.version, check))
    }

    async fn store_change(
        &self,
        caller: &Call,
        name: &Name,
        change: &AccountChange,
        first: Option<&MintedSource>,
        expected: ExpectedVersion,
    ) -> Result<ShownAccount, ServiceError> {
        let (mut tx, form) = self.begin(caller).await?;
        let before = visible(caller, name, storage::accounts::lock(&mut tx, name).await?)?;
        check_change(&before, change, first)?;
        let changed = apply_change(caller, &before, change, expected)?;
        first.map_or(Ok(()), |first| first.check_target(&before, &changed.registry))?;
        let password = self.new_password(&mut tx, caller, &before, change.password.as_ref()).await?;
        let has_new_password = password.is_some();
        let removes_source = matches!(change.source, Some(SourceChange::Remove)) && before.mint.is_some();
        if changed == before && !has_new_password && first.is_none() && !removes_source {
            let shown = ShownAccount::read(&mut tx, caller, before).await?;
            self.audit.commit(tx, []).await?;
            return Ok(shown);
        }
        let mut after = self.update(&mut tx, form, &before, &changed, password).await?;
        self.store_source(&mut tx, caller, &mut after, first, change.source.as_ref()).await?;
        let action = if has_new_password { Action::AccountRotate } else { Action::AccountUpdate };
        let fields = after.fields_changed_since(&before, has_new_password);
        let details = Details::default().fields(&fields).version(after.version);
        let details = details.changes(Some(&recorded::account(&before)), Some(&recorded::account(&after)));
        let event = NewEvent::of(caller, action, Resource::account(name)).details(details);
        let transition = AccountTransition::Changed { before: &before, after: &after, has_new_password };
        let shown = ShownAccount::read(&mut tx, caller, after.clone()).await?;
        self.commit(tx, &[transition], vec![event]).await?;
        Ok(shown)
    }

    /// Returns a password unless it is the stored one. A stored one that does not open differs.
    ///
    /// A dry run does not compare: it would disclose, without an audit event, whether a guess is
    /// right.
    async fn new_password<'a>(
        &self,
        conn: &mut PgConnection,
        caller: &Call,
        account: &Account,
        password: Option<&'a Password>,
    ) -> Result<Option<&'a Password>, ServiceError> {
        let Some(password) = password.filter(|_| !caller.dry_run) else { return Ok(password) };
        let sealed = storage::verifications::find_password(conn, account).await?;
        let slot = SealedColumn::account_password(account.id, &account.destination());
        let stored = sealed.and_then(|sealed| self.sealer.open(&slot, &sealed).ok());
        let is_stored = stored.is_some_and(|stored| constant_time::is_equal(&stored, password.secret()));
        Ok((!is_stored).then_some(password))
    }

    /// Removes an account and its password.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::Stale`] if the account is not at the expected version.
    /// - [`ServiceError::InUse`] if a pull secret references the account by name.
    pub async fn remove(&self, caller: &Call, name: &Name, expected: ExpectedVersion) -> Result<(), ServiceError> {
        let (mut tx, _) = self.begin(caller).await?;
        let account = visible(caller, name, storage::accounts::lock(&mut tx, name).await?)?;
        check_version(expected, account.version)?;
        let users = storage::pull_secrets::naming_account(&mut tx, account.id).await?;
        pull_secrets::ensure_unused(&mut tx, caller, KIND, name, users).await?;
        storage::accounts::delete(&mut tx, account.id).await?;
        let details = Details::default().version(account.version);
        let details = details.changes(Some(&recorded::account(&account)), None);
        let event = NewEvent::of(caller, Action::AccountDelete, Resource::account(name)).details(details);
        self.commit(tx, &[AccountTransition::Deleted(&account)], vec![event]).await
    }

    /// Verifies the stored login of an account at its registry and stores the result. A login that
    /// does not work is a result, not an error. A result for a named repository is stored only if
    /// it is `valid`.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::Invalid`] if the repository is outside the account's registry scope.
    pub async fn verify(
        &self,
        caller: &Call,
        name: &Name,
        repository: Option<&str>,
    ) -> Result<Verification, ServiceError> {
        let account = self.find(caller, name).await?.account;
        self.verifications.verify(caller, &account, repository).await
    }

    /// Stores the result of a check with its account.
    pub(super) async fn record_check(
        &self,
        caller: &Call,
        mut account: Account,
        check: Option<VerificationReport>,
    ) -> Result<Account, ServiceError> {
        if let Some(check) = check {
            account.verification = Some(self.verifications.record(caller, &account, check).await?);
        }
        Ok(account)
    }

    /// Verifications of logins.
    pub(super) fn verifications(&self) -> &Verifications {
        &self.verifications
    }

    /// Begins a transaction that writes accounts, and returns the form in which it seals.
    pub(super) async fn begin(&self, caller: &Call) -> Result<(Transaction, SealForm), ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let form = master_keys::seal_form(&mut tx, &self.sealer).await?;
        storage::pull_secrets::lock_selectors_shared(&mut tx).await?;
        Ok((tx, form))
    }

    /// Seals the password and inserts the account.
    pub(super) async fn insert(
        &self,
        conn: &mut PgConnection,
        form: SealForm,
        new: &NewAccount,
    ) -> Result<Account, ServiceError> {
        let id = Uuid::now_v7();
        let password = self.seal(form, id, &new.destination(), new.password.secret())?;
        storage::accounts::insert(conn, id, new, &password).await.map_err(on_conflict(&new.name))
    }

    /// Stores a changed account, with a new password if there is one. Seals the stored password
    /// again if its destination has changed.
    pub(super) async fn update(
        &self,
        conn: &mut PgConnection,
        form: SealForm,
        before: &Account,
        changed: &Account,
        password: Option<&Password>,
    ) -> Result<Account, ServiceError> {
        let (id, destination) = (changed.id, changed.destination());
        let password = match password {
            Some(password) => Some(self.seal(form, id, &destination, password.secret())?),
            None if destination == before.destination() => None,
            None => {
                let stored = storage::verifications::find_password(conn, before).await?;
                let stored = stored.ok_or_else(|| ServiceError::not_found(KIND, &changed.name))?;
                let slot = SealedColumn::account_password(id, &before.destination());
                Some(self.seal(form, id, &destination, &self.sealer.open(&slot, &stored)?)?)
            }
        };
        Ok(storage::accounts::update(conn, changed, password.as_ref()).await?)
    }

    fn seal(
        &self,
        form: SealForm,
        id: Uuid,
        destination: &RegistryDestination<'_>,
        password: &SecretString,
    ) -> Result<Sealed, ServiceError> {
        Ok(self.sealer.seal(form, &SealedColumn::account_password(id, destination), password)?)
    }

    /// Commits writes of accounts with their audit events.
    pub(super) async fn commit(
        &self,
        mut tx: Transaction,
        transitions: &[AccountTransition<'_>],
        events: Vec<NewEvent>,
    ) -> Result<(), ServiceError> {
        pull_secrets::propagate_account_changes(&mut tx, transitions).await?;
        self.audit.commit(tx, events).await?;
        for transition in transitions {
            // A new account has no cached row.
            if let AccountTransition::Changed { after: account, .. } | AccountTransition::Deleted(account) = transition
            {
                self.row_cache.invalidate(&Change::RegistryAccount(account.name.to_string()));
            }
        }
        Ok(())
    }
}

/// Whether there is a login to verify. A dry run mints none.
fn has_login(first: Option<&MintedSource>) -> bool {
    first.is_none_or(MintedSource::is_minted)
}

/// Applies a change after checking all of its preconditions.
fn apply_change(
    caller: &Identity,
    account: &Account,
    change: &AccountChange,
    expected: ExpectedVersion,
) -> Result<Account, ServiceError> {
    check_version(expected, account.version)?;
    require_password_for_new_destination(account, change)?;
    let changed = change.apply_to(account).map_err(|invalid| ServiceError::field("labels", invalid))?;
    require_granted(caller, &changed.name, &account.labels, &changed.labels)?;
    Ok(changed)
}

/// Rejects a write of an account that the caller's grants do not include with the new labels, or
/// that adds or changes labels beyond the grants. A new account has no labels `before`.
pub(super) fn require_granted(
    caller: &Identity,
    name: &Name,
    before: &Labels,
    after: &Labels,
) -> Result<(), ServiceError> {
    if !caller.grants.include_account(name.as_str(), after.as_map()) {
        return Err(ServiceError::NotGranted { kind: KIND, name: name.to_string(), qualifier: " with these labels" });
    }
    let detail = "must belong to one of your label grants, all of whose labels the account has: ask an admin to set it";
    let refused = caller.grants.refused_labels(before.as_map(), after.as_map());
    let errors: Vec<FieldError> =
        refused.into_iter().map(|key| FieldError::new(format!("labels.{key}"), detail)).collect();
    if errors.is_empty() { Ok(()) } else { Err(ServiceError::LabelsNotGranted { name: name.to_string(), errors }) }
}

fn visible(caller: &Identity, name: &Name, found: Option<Account>) -> Result<Account, ServiceError> {
    require_visible(KIND, name, found, |account| {
        caller.grants.include_account(account.name.as_str(), account.labels.as_map())
    })
}

/// Rejects a change that would send the stored password to another registry host, over plain HTTP,
/// or to a host that another CA vouches for.
///
/// Otherwise a caller that can change an account, but not read its password, could receive it at a
/// registry of its own. Another path on the same host is allowed, and so is the removal of the CA,
/// after which fewer certificates are trusted.
fn require_password_for_new_destination(account: &Account, change: &AccountChange) -> Result<(), ServiceError> {
    if change.password.is_some() || matches!(change.source, Some(SourceChange::Set(_))) {
        return Ok(());
    }
    let is_elsewhere = |registry: &RegistryScope| registry.authority() != account.registry.authority();
    let is_new_ca = |ca: &CaCertificate| account.ca_certificate.as_ref() != Some(ca);
    let changes = [
        ("registry", change.registry.as_ref().is_some_and(is_elsewhere)),
        ("plainHttp", change.plain_http == Some(true) && !account.plain_http),
        ("caCertificate", change.ca_certificate.as_ref().and_then(Option::as_ref).is_some_and(is_new_ca)),
    ];
    let detail =
        "requires `password` in the same request: the stored password is only sent to the registry that it was set for";
    match changes.into_iter().find(|(_, is_changed)| *is_changed) {
        Some((field, _)) => Err(vec![FieldError::new(field, detail)].into()),
        None => Ok(()),
    }
}
