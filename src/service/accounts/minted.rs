//! Minted accounts: the first mint of a source, a mint on request, and what a change may do.

use uuid::Uuid;

use super::{Accounts, apply_change, visible};
use crate::{
    domain::{
        account::{Account, AccountChange, NewAccount, Password, Registration, SourceChange, Username},
        caller::Call,
        invalid::{FieldErrors, Invalid},
        mint::{Mint, Minted, NewSource, Validity},
        names::Name,
        registry::RegistryScope,
    },
    service::{
        ExpectedVersion, ServiceError, connection,
        mints::{FirstMint, MintTarget, log_minted, mint_event},
        no_such,
        pull_secrets::AccountTransition,
    },
    storage::{self, PgConnection, mints::MintToStore},
};

/// Source to store, and the times of its first login.
pub(super) struct MintedSource {
    source: NewSource,
    cluster: Option<Uuid>,
    /// Validity of the login; none in a dry run, which mints none.
    validity: Option<Validity>,
    /// Changed account; none for a new one.
    account: Option<Uuid>,
}

impl MintedSource {
    /// Takes the login out of a first mint. That of a dry run is a stand-in, which is not stored.
    fn new(source: NewSource, mint: FirstMint) -> Result<(Self, Username, Password), ServiceError> {
        let FirstMint { minted, cluster } = mint;
        let validity = minted.as_ref().map(|minted| minted.validity);
        let (username, password) = if let Some(Minted { username, password, .. }) = minted {
            (username, password)
        } else {
            let username = Username::parse(source.source.username());
            let username = username.map_err(|invalid| ServiceError::field("source.username", invalid))?;
            let password = Password::parse("dry-run".into());
            (username, password.map_err(|invalid| ServiceError::field("source", invalid))?)
        };
        Ok((Self { source, cluster, validity, account: None }, username, password))
    }

    /// Checks that a login was minted for this account and for the registry of its change.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Stale`] if another account has the name by now, and [`ServiceError::Invalid`]
    /// if the registry does not fit.
    pub(super) fn check_target(&self, account: &Account, registry: &RegistryScope) -> Result<(), ServiceError> {
        if self.account != Some(account.id) {
            return Err(ServiceError::Stale { current: account.version });
        }
        check_registry(&self.source, registry)
    }

    /// Whether a login was minted.
    pub(super) const fn is_minted(&self) -> bool {
        self.validity.is_some()
    }
}

impl Accounts {
    /// Mints the login of a new account that has a source, unless its name is in use.
    ///
    /// # Errors
    ///
    /// As [`Mints::mint_new`](crate::service::mints::Mints), and [`ServiceError::NameTaken`].
    pub(super) async fn mint_first(
        &self,
        caller: &Call,
        new: Registration,
    ) -> Result<(NewAccount, Option<MintedSource>), ServiceError> {
        let (new, source) = match new {
            Registration::Given(new) => return Ok((*new, None)),
            Registration::Minted(new, source) => (*new, *source),
        };
        // With an idempotency key, its claim decides: the account may be that of the same request.
        if caller.idempotency.is_none() {
            let mut conn = connection(&self.pool).await?;
            if storage::accounts::find(&mut conn, &new.name).await?.is_some() {
                return Err(ServiceError::NameTaken(new.name.to_string()));
            }
        }
        let target = MintTarget {
            name: &new.name,
            registry: &new.registry,
            plain_http: new.plain_http,
            ca_certificate: new.ca_certificate.as_ref(),
        };
        let mint = self.mints.mint_new(caller, &target, &source).await?;
        let (first, username, password) = MintedSource::new(source, mint)?;
        Ok((new.with_login(username, password), Some(first)))
    }

    /// Mints the login of a change that has a source, and adds it to the change. Returns the version
    /// at which the change must be stored.
    ///
    /// # Errors
    ///
    /// As [`Accounts::change`].
    pub(super) async fn mint_changed(
        &self,
        caller: &Call,
        name: &Name,
        change: &mut AccountChange,
        expected: ExpectedVersion,
    ) -> Result<(ExpectedVersion, Option<MintedSource>), ServiceError> {
        let Some(SourceChange::Set(source)) = &change.source else { return Ok((expected, None)) };
        let account = self.find(caller, name).await?.account;
        check_change(&account, change, None)?;
        let changed = apply_change(caller, &account, change, expected)?;
        let target = MintTarget {
            name,
            registry: &changed.registry,
            plain_http: changed.plain_http,
            ca_certificate: changed.ca_certificate.as_ref(),
        };
        let mint = self.mints.mint_new(caller, &target, source).await?;
        let (first, username, password) = MintedSource::new((**source).clone(), mint)?;
        let first = MintedSource { account: Some(account.id), ..first };
        change.username = Some(username);
        change.password = Some(password);
        // The end of the login is that of the mint.
        change.expires_at = Some(None);
        Ok((Some(account.version), Some(first)))
    }

    /// Stores or removes the source of a written account, in the transaction of the write. If the source
    /// stays and fails, the next attempt is due at once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] if the registry does not fit the source, or its cluster was removed
    /// during the mint.
    pub(super) async fn store_source(
        &self,
        conn: &mut PgConnection,
        caller: &Call,
        account: &mut Account,
        first: Option<&MintedSource>,
        change: Option<&SourceChange>,
    ) -> Result<(), ServiceError> {
        if let Some(MintedSource { source, cluster, validity, .. }) = first {
            check_registry(source, &account.registry)?;
            if let (Some(cluster), Some(identity)) = (*cluster, source.source.web_identity())
                && !storage::clusters::lock_existing(conn, cluster).await?
            {
                let detail = no_such(&caller.grants, "cluster", identity.cluster.as_str());
                return Err(ServiceError::field("source.identity.cluster", Invalid::new(detail)));
            }
            let secret = self.mints.seal(account.id, &account.destination(), source)?;
            let to_store = MintToStore {
                source: &source.source,
                secret: &secret,
                cluster: *cluster,
                lifetime: validity.as_ref().map(Validity::remaining).unwrap_or_default(),
                refresh_after: validity.as_ref().map(Validity::refresh_after).unwrap_or_default(),
            };
            let mint = storage::mints::put(conn, account.id, &to_store).await?;
            account.mint = Some(if validity.is_some() { mint } else { Mint { serial: 0, ..mint } });
        } else if let Some(SourceChange::Remove) = change {
            storage::mints::delete(conn, account.id).await?;
            account.mint = None;
        } else if let Some(mint) = &mut account.mint
            && let Some(next_attempt_at) = storage::mints::reset_backoff(conn, account.id).await?
        {
            mint.next_attempt_at = next_attempt_at;
        }
        Ok(())
    }

    /// Mints another login of an account at once. Its version does not change. A dry run returns the
    /// account, and sends nothing.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::NotMinted`] if the account has no source.
    /// - [`ServiceError::Mint`] or [`ServiceError::MintTimeout`] if the mint fails. The login stays.
    /// - [`ServiceError::Stale`] if source or registry change during the mint.
    pub async fn mint(&self, caller: &Call, name: &Name) -> Result<Account, ServiceError> {
        let account = self.find(caller, name).await?.account;
        if account.mint.is_none() {
            return Err(ServiceError::NotMinted(name.to_string()));
        }
        if caller.dry_run {
            return Ok(account);
        }
        let requested = self.mints.claim_one(&account).await?;
        let claimed = requested.claimed();
        let minted = self.mints.mint_on_request(caller, claimed).await?;
        let (mut tx, form) = self.begin(caller).await?;
        let replaced = self.mints.store(&mut tx, form, &[(claimed, &minted)]).await?.pop();
        // The lease ends with a change of the source or the registry.
        let before = replaced.ok_or(ServiceError::Stale { current: account.version })?;
        let before = visible(caller, name, Some(before))?;
        let after = visible(caller, name, storage::accounts::find(&mut tx, name).await?)?;
        let transition = AccountTransition::Changed { before: &before, after: &after, has_new_password: true };
        self.commit(tx, &[transition], vec![mint_event(Some(caller), claimed)]).await?;
        log_minted(claimed, &minted);
        Ok(after)
    }
}

fn check_registry(source: &NewSource, registry: &RegistryScope) -> Result<(), ServiceError> {
    source.source.check_registry(registry).map_err(|invalid| ServiceError::field("registry", invalid))
}

/// Rejects a change that gives a minted account another login than that of its source, or sends the
/// secret of its source elsewhere. `first` is the mint of the change, if it took place.
pub(super) fn check_change(
    account: &Account,
    change: &AccountChange,
    first: Option<&MintedSource>,
) -> Result<(), ServiceError> {
    let mut errors = FieldErrors::default();
    let given = [
        ("username", change.username.is_some()),
        ("password", change.password.is_some()),
        ("expiresAt", change.expires_at.is_some_and(|at| at.is_some())),
    ];
    let mut refuse_given = |detail: &str| {
        for (field, _) in given.iter().filter(|(_, is_given)| *is_given) {
            errors.refuse(field, detail);
        }
    };
    match (&change.source, &account.mint) {
        (Some(SourceChange::Set(_)), _) if first.is_none() => {
            refuse_given("is not allowed beside `source`, from which it comes");
        }
        (Some(SourceChange::Remove), Some(_)) => {
            for field in ["username", "password"] {
                if !given.contains(&(field, true)) {
                    errors.refuse(field, "is required with `source` null: the account needs a login");
                }
            }
        }
        (None, Some(_)) => {
            refuse_given("comes from `source`: set `source` to null to give the account a login of its own");
            let detail =
                "requires `source` with its secret: the secret is only used for the registry that it was set for";
            let is_elsewhere = |field: &str| match field {
                "registry" => {
                    change.registry.as_ref().is_some_and(|new| new.authority() != account.registry.authority())
                }
                "plainHttp" => change.plain_http.is_some_and(|new| new != account.plain_http),
                _ => change.ca_certificate.as_ref().is_some_and(|new| *new != account.ca_certificate),
            };
            for field in ["registry", "plainHttp", "caCertificate"].into_iter().filter(|field| is_elsewhere(field)) {
                errors.refuse(field, detail);
            }
        }
        _ => {}
    }
    errors.finish(|| Some(())).map_err(ServiceError::from)
}
