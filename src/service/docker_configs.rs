//! Docker configs: render accounts for a profile, and explain which entry matches an image.

use std::{cmp::Reverse, collections::HashMap, sync::Arc};

use chrono::{DateTime, Utc};
use secrecy::SecretString;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        docker_config::{
            Credential, Profile, RenderedConfig, ScopedAccount, Warning, key_for, render, split_collisions,
        },
        grants::Grants,
        invalid::{FieldError, FieldErrors, Invalid},
        matching::{ImageName, MatchTarget, Used, used_accounts},
        names::Name,
        registry::DOCKER_HUB,
        selector::{AccountSelection, LabelSelector},
    },
    service::{ServiceError, audit::writer::AuditWriter, connection, no_such, row_cache::RowCache},
    storage::{self, PgPool, accounts::SealedCredential},
};

mod explain;

pub use explain::Subject;

/// Maximum number of granted accounts that are considered for an image.
const MATCHED_MAX: usize = 100;

/// Source of account rows.
#[derive(Debug, Clone, Copy)]
enum ReadMode {
    /// Row cache, then Postgres.
    Cached,
    /// Postgres only.
    Fresh,
}

/// Accounts to reveal.
#[derive(Debug)]
pub enum Choice {
    /// Named or selected accounts. Each must be rendered.
    Selection(AccountSelection),
    /// The accounts that the profile's reader uses for an image or a registry, if any.
    Match(MatchTarget),
}

/// Service that renders docker configs.
#[derive(Debug, Clone)]
pub struct DockerConfigs {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    sealer: Arc<Sealer>,
    audit_writer: AuditWriter,
}

/// Rendered docker config with its accounts.
#[derive(Debug)]
pub struct Assembled {
    /// The docker config.
    pub rendered: RenderedConfig,
    /// Accounts in the docker config, in order.
    pub accounts: Vec<Name>,
    /// Earliest end of a minted login in it; none without one.
    pub valid_until: Option<DateTime<Utc>>,
}

impl DockerConfigs {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, row_cache: Arc<RowCache>, sealer: Arc<Sealer>, audit_writer: AuditWriter) -> Self {
        Self { pool, row_cache, sealer, audit_writer }
    }

    /// Renders accounts for a profile. The passwords are returned after the audit event is durable.
    ///
    /// # Errors
    ///
    /// As [`assemble`](Self::assemble), and [`ServiceError::Audit`] if the event cannot be stored.
    /// Without an account for an image, the document is empty.
    pub async fn reveal(&self, caller: &Call, profile: Profile, choice: &Choice) -> Result<Assembled, ServiceError> {
        let details = Details::default().profile(profile);
        let (assembled, details) = match choice {
            Choice::Selection(selection) => (self.assemble(caller, profile, selection).await, details),
            Choice::Match(target) => (self.assemble_matching(caller, profile, target).await, details.matched(target)),
        };
        if let Err(ServiceError::Open(_)) = assembled {
            let event = NewEvent::of(caller, Action::Reveal, Resource::docker_configs());
            self.audit_writer.note_damage(event.details(details.clone())).await;
        }
        let assembled = assembled?;
        let accounts: Vec<_> = assembled.accounts.iter().map(Resource::account).collect();
        // The event of a single account is about that account, so that a search by resource finds
        // it.
        let (resource, related) = match <[Resource; 1]>::try_from(accounts) {
            Ok([account]) => (account, Vec::new()),
            Err(accounts) => (Resource::docker_configs(), accounts),
        };
        let event = NewEvent::of(caller, Action::Reveal, resource).related(related);
        self.audit_writer.record(event.details(details)).await?;
        Ok(assembled)
    }

    /// Renders all chosen accounts for a profile, or fails.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::UnknownAccounts`] lists the accounts that do not exist or are not granted.
    /// - [`ServiceError::Invalid`] if an account is listed twice or the selector matches none.
    /// - [`ServiceError::Render`] if the profile cannot express the combination of accounts.
    /// - [`ServiceError::Open`] if a password does not open.
    pub async fn assemble(
        &self,
        caller: &Identity,
        profile: Profile,
        choice: &AccountSelection,
    ) -> Result<Assembled, ServiceError> {
        self.render_copy(profile, &self.choose(&caller.grants, choice, ReadMode::Cached).await?)
    }

    /// Renders the granted accounts that the profile's reader uses for a target. Only these are
    /// opened.
    async fn assemble_matching(
        &self,
        caller: &Identity,
        profile: Profile,
        target: &MatchTarget,
    ) -> Result<Assembled, ServiceError> {
        let Used { accounts, warnings } = self.find_matching(caller, profile, target).await?;
        let mut assembled = self.render_copy(profile, &accounts)?;
        assembled.rendered.warnings.extend(warnings);
        Ok(assembled)
    }

    /// Returns the granted accounts that the kubelet would use for an image, those with the longest
    /// scope first; none if there are too many.
    pub(super) async fn narrowest_for(
        &self,
        caller: &Identity,
        image: &ImageName,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        let target = MatchTarget::Image(image.clone());
        let mut used = match self.find_matching(caller, Profile::Kubernetes, &target).await {
            Ok(used) => used.accounts,
            Err(ServiceError::Invalid(_)) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        // The oldest of equal ones, as in pull secrets.
        used.sort_by_key(|account| (Reverse(account.registry.as_str().len()), account.id));
        Ok(used)
    }

    /// Opens the password of an account.
    pub(super) fn password(&self, account: &SealedCredential) -> Result<SecretString, ServiceError> {
        Ok(self.sealer.open(&account.slot(), &account.password)?)
    }

    /// Returns the granted accounts of a selection, without opening them.
    pub(super) async fn chosen(
        &self,
        caller: &Identity,
        selection: &AccountSelection,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        self.choose(&caller.grants, selection, ReadMode::Cached).await
    }

    /// Finds the granted accounts that the profile's reader uses for a target. Nothing is opened.
    async fn find_matching(
        &self,
        caller: &Identity,
        profile: Profile,
        target: &MatchTarget,
    ) -> Result<Used<Arc<SealedCredential>>, ServiceError> {
        let limit = i64::try_from(MATCHED_MAX).unwrap_or(i64::MAX) + 1;
        let mut conn = connection(&self.pool).await?;
        let scopes = target.covering_scopes();
        let mut found = storage::accounts::match_credentials(&mut conn, &caller.grants, &scopes, limit).await?;
        drop(conn);
        if found.len() > MATCHED_MAX {
            let detail = "matches more than 100 registry accounts: name some of them in `accounts`";
            return Err(vec![FieldError::new("match", detail)].into());
        }
        // Of accounts with one key, the oldest is used, as by pull secrets.
        found.sort_unstable_by_key(|account| account.id);
        let found = found.into_iter().map(Arc::new).collect();
        Ok(used_accounts(profile, found, target, scoped))
    }

    /// Renders accounts as stored, for background work. A cached row could be older than the
    /// generation that is being reconciled. Grants were checked when a caller declared the work.
    ///
    /// Of selected accounts with the same key, the one with the lowest id, which is the oldest,
    /// stays. The others are returned: a new account must not stop the updates of those that a
    /// selector matched before. Named accounts must not collide.
    ///
    /// # Errors
    ///
    /// As [`assemble`](Self::assemble).
    pub(super) async fn assemble_stored(
        &self,
        profile: Profile,
        choice: &AccountSelection,
    ) -> Result<(RenderedConfig, Vec<Arc<SealedCredential>>), ServiceError> {
        let (sealed, left_out) = self.choose_stored(profile, choice).await?;
        Ok((self.render_chosen(profile, &sealed)?.rendered, left_out))
    }

    /// Renders accounts as [`assemble_stored`](Self::assemble_stored) does. Also returns the account
    /// of each key.
    ///
    /// # Errors
    ///
    /// As [`assemble`](Self::assemble).
    pub(super) async fn assemble_with_accounts(
        &self,
        profile: Profile,
        choice: &AccountSelection,
    ) -> Result<(RenderedConfig, HashMap<String, Arc<SealedCredential>>), ServiceError> {
        let (sealed, _) = self.choose_stored(profile, choice).await?;
        let rendered = self.render_chosen(profile, &sealed)?.rendered;
        let of_key = |key: &String| {
            // Docker Hub may have a second key.
            let is_hub = |one: &Arc<SealedCredential>| *key == DOCKER_HUB && one.registry.as_str() == DOCKER_HUB;
            let account = sealed.iter().find(|one| key_for(profile, &one.registry) == key || is_hub(one))?;
            Some((key.clone(), Arc::clone(account)))
        };
        let accounts = rendered.keys.iter().filter_map(of_key).collect();
        Ok((rendered, accounts))
    }

    /// Finds accounts as stored, and separates those whose key an older one has.
    async fn choose_stored(
        &self,
        profile: Profile,
        choice: &AccountSelection,
    ) -> Result<(Vec<Arc<SealedCredential>>, Vec<Arc<SealedCredential>>), ServiceError> {
        let mut sealed = self.choose(&Grants::everything(), choice, ReadMode::Fresh).await?;
        if let AccountSelection::Selector(_) = choice {
            sealed.sort_unstable_by_key(|account| account.id);
            return Ok(split_collisions(profile, sealed, |account| &account.registry));
        }
        Ok((sealed, Vec::new()))
    }

    /// Renders accounts to a document that does not follow them, and warns of minted logins in it.
    fn render_copy(&self, profile: Profile, sealed: &[Arc<SealedCredential>]) -> Result<Assembled, ServiceError> {
        let mut assembled = self.render_chosen(profile, sealed)?;
        for account in sealed {
            if let Some(until) = account.valid_until.filter(|_| !account.is_expired()) {
                assembled.rendered.warnings.push(Warning::of_short_lived_login(&account.name, until));
            }
        }
        Ok(assembled)
    }

    fn render_chosen(&self, profile: Profile, sealed: &[Arc<SealedCredential>]) -> Result<Assembled, ServiceError> {
        let opened = sealed
            .iter()
            .map(|account| self.sealer.open(&account.slot(), &account.password))
            .collect::<Result<Vec<SecretString>, _>>()?;
        let credentials: Vec<Credential<'_>> = sealed
            .iter()
            .zip(&opened)
            .map(|(account, password)| Credential {
                account: &account.name,
                scope: &account.registry,
                username: &account.username,
                password,
                email: account.email.as_deref(),
            })
            .collect();
        let accounts = sealed.iter().filter_map(|account| Name::parse(&account.name).ok()).collect();
        let mut rendered = render(profile, &credentials)?;
        let expired = sealed.iter().filter(|account| account.is_expired());
        rendered.warnings.extend(expired.map(|account| Warning::of_expired_login(&account.name)));
        let valid_until = sealed.iter().filter_map(|account| account.valid_until).min();
        Ok(Assembled { rendered, accounts, valid_until })
    }

    /// Finds the chosen accounts. An account that is not granted is reported as unknown.
    async fn choose(
        &self,
        grants: &Grants,
        choice: &AccountSelection,
        read_mode: ReadMode,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        match choice {
            AccountSelection::Names(accounts) => {
                let names: Vec<&str> = accounts.iter().map(Name::as_str).collect();
                let granted = |account: &SealedCredential| grants.include_account(&account.name, &account.labels);
                let found = match read_mode {
                    ReadMode::Cached => self.row_cache.credentials(&names, granted).await?,
                    ReadMode::Fresh => self.row_cache.fresh_credentials(&names, granted).await?,
                };
                in_order(grants, accounts, found)
            }
            AccountSelection::Selector(selector) => match self.select(grants, selector).await? {
                selected if selected.is_empty() => Err(no_account()),
                selected => Ok(selected),
            },
        }
    }

    /// Finds the accounts that a selector matches, by name.
    async fn select(
        &self,
        grants: &Grants,
        selector: &LabelSelector,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        let limit = AccountSelection::MAX + 1;
        let mut conn = connection(&self.pool).await?;
        let selected = storage::accounts::select_credentials(&mut conn, grants, selector, limit).await?;
        if selected.len() > AccountSelection::MAX {
            return Err(vec![FieldError::new("accountSelector", "matches more than 1000 registry accounts")].into());
        }
        Ok(selected.into_iter().map(Arc::new).collect())
    }
}

/// Error of a selector that matches no account.
pub(super) fn no_account() -> ServiceError {
    ServiceError::field("accountSelector", Invalid::new("matches no registry account"))
}

fn scoped(account: &Arc<SealedCredential>) -> ScopedAccount<'_> {
    ScopedAccount { name: &account.name, scope: &account.registry }
}

/// Sorts the found accounts in the order of the request, or reports the unknown ones.
fn in_order(
    grants: &Grants,
    accounts: &[Name],
    found: Vec<Arc<SealedCredential>>,
) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
    let mut by_name: HashMap<String, Arc<SealedCredential>> =
        found.into_iter().map(|account| (account.name.clone(), account)).collect();
    let mut errors = FieldErrors::default();
    let mut unknown = Vec::new();
    let mut ordered = Vec::with_capacity(accounts.len());
    for (index, name) in accounts.iter().enumerate() {
        if let Some(account) = by_name.remove(name.as_str()) {
            ordered.push(account);
        } else {
            errors.refuse(&format!("accounts[{index}]"), no_such(grants, "registry account", name.as_str()));
            unknown.push(name.clone());
        }
    }
    errors.finish(|| Some(ordered)).map_err(|errors| ServiceError::UnknownAccounts { errors, names: unknown })
}
