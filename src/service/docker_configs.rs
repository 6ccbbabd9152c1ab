//! Docker configs: render accounts for a profile, and explain which entry matches an image.

use std::{collections::HashMap, sync::Arc};

use secrecy::{ExposeSecret, SecretString};

use crate::{
    crypto::sealer::Sealer,
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        docker_config::{Credential, Profile, RenderedConfig, ScopedAccount, parse::Config, render, split_collisions},
        grants::Grants,
        invalid::{FieldError, FieldErrors, Invalid},
        matching::{Explanation, ImageName, explain_accounts, explain_config, lint::lint_config},
        names::Name,
        selector::AccountSelection,
    },
    service::{ServiceError, audit::writer::AuditWriter, connection, row_cache::RowCache, spawn_blocking},
    storage::{self, PgPool, accounts::SealedCredential},
};

/// Source of account rows.
#[derive(Debug, Clone, Copy)]
enum ReadMode {
    /// Row cache, then Postgres.
    Cached,
    /// Postgres only.
    Fresh,
}

/// Subject of an explanation.
#[derive(Debug)]
pub enum Subject {
    /// Stored accounts.
    Accounts(AccountSelection),
    /// Docker config from the request, in any supported form.
    Config(SecretString),
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
    pub accounts: Vec<Resource>,
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
    pub async fn reveal(
        &self,
        caller: &Call,
        profile: Profile,
        choice: &AccountSelection,
    ) -> Result<RenderedConfig, ServiceError> {
        let details = Details::default().profile(profile);
        let assembled = self.assemble(caller, profile, choice).await;
        if let Err(ServiceError::Open(_)) = assembled {
            let event = NewEvent::of(caller, Action::Reveal, Resource::docker_configs());
            self.audit_writer.note_damage(event.details(details.clone())).await;
        }
        let Assembled { rendered, accounts } = assembled?;
        // The event of a single account is about that account, so that a search by resource finds
        // it.
        let (resource, related) = match <[Resource; 1]>::try_from(accounts) {
            Ok([account]) => (account, Vec::new()),
            Err(accounts) => (Resource::docker_configs(), accounts),
        };
        let event = NewEvent::of(caller, Action::Reveal, resource).related(related);
        self.audit_writer.record(event.details(details)).await?;
        Ok(rendered)
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
        self.render_chosen(profile, &self.choose(&caller.grants, choice, ReadMode::Cached).await?)
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
        let mut sealed = self.choose(&Grants::everything(), choice, ReadMode::Fresh).await?;
        let mut left_out = Vec::new();
        if let AccountSelection::Selector(_) = choice {
            sealed.sort_unstable_by_key(|account| account.id);
            (sealed, left_out) = split_collisions(profile, sealed, |account| &account.registry);
        }
        Ok((self.render_chosen(profile, &sealed)?.rendered, left_out))
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
        let names = sealed.iter().filter_map(|account| Name::parse(&account.name).ok());
        let accounts = names.map(|name| Resource::account(&name)).collect();
        Ok(Assembled { rendered: render(profile, &credentials)?, accounts })
    }

    /// Explains which entry each container runtime would use for an image. Passwords stay sealed.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::UnknownAccounts`] lists the accounts that do not exist or are not granted.
    /// - [`ServiceError::Invalid`] if an account is listed twice, or the config does not parse.
    pub async fn explain(
        &self,
        caller: &Identity,
        subject: Subject,
        image: ImageName,
    ) -> Result<Explanation, ServiceError> {
        match subject {
            Subject::Accounts(choice) => {
                let sealed = self.choose(&caller.grants, &choice, ReadMode::Cached).await?;
                let accounts: Vec<ScopedAccount<'_>> = sealed
                    .iter()
                    .map(|account| ScopedAccount { name: &account.name, scope: &account.registry })
                    .collect();
                Ok(explain_accounts(&accounts, &image))
            }
            Subject::Config(text) => spawn_blocking(move || explain_text(&text, &image)).await,
        }
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
                in_order(accounts, found)
            }
            AccountSelection::Selector(selector) => {
                let limit = AccountSelection::MAX + 1;
                let mut conn = connection(&self.pool).await?;
                let selected = storage::accounts::select_credentials(&mut conn, grants, selector, limit).await?;
                let invalid = |detail| Err(vec![FieldError::new("accountSelector", detail)].into());
                match selected.len() {
                    0 => invalid("matches no registry account"),
                    1..=AccountSelection::MAX => Ok(selected.into_iter().map(Arc::new).collect()),
                    _ => invalid("matches more than 1000 registry accounts"),
                }
            }
        }
    }
}

fn explain_text(text: &SecretString, image: &ImageName) -> Result<Explanation, ServiceError> {
    let config = Config::parse(text.expose_secret().as_bytes())
        .map_err(|error| ServiceError::field("config", Invalid::new(error.to_string())))?;
    Ok(explain_and_lint(&config, image))
}

/// Explains a config from the request. Its warnings include those that do not concern the image.
fn explain_and_lint(config: &Config, image: &ImageName) -> Explanation {
    let mut explanation = explain_config(config, image);
    for warning in lint_config(config) {
        if !explanation.warnings.contains(&warning) {
            explanation.warnings.push(warning);
        }
    }
    explanation
}

/// Sorts the found accounts in the order of the request, or reports the unknown ones.
fn in_order(accounts: &[Name], found: Vec<Arc<SealedCredential>>) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
    let mut by_name: HashMap<String, Arc<SealedCredential>> =
        found.into_iter().map(|account| (account.name.clone(), account)).collect();
    let mut errors = FieldErrors::default();
    let mut unknown = Vec::new();
    let mut ordered = Vec::with_capacity(accounts.len());
    for (index, name) in accounts.iter().enumerate() {
        if let Some(account) = by_name.remove(name.as_str()) {
            ordered.push(account);
        } else {
            errors.refuse(&format!("accounts[{index}]"), format!("there is no registry account named `{name}`"));
            unknown.push(name.clone());
        }
    }
    errors.finish(|| Some(ordered)).map_err(|errors| ServiceError::UnknownAccounts { errors, names: unknown })
}
