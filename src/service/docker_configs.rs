//! Docker configs: accounts looked up, opened and rendered for a reader; and which entry a reader would use.

use std::{collections::HashMap, sync::Arc};

use secrecy::{ExposeSecret, SecretString};
use sqlx::PgPool;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        docker_config::{Credential, Profile, RenderedConfig, ScopedAccount, parse::Config, render},
        grants::Grants,
        invalid::{FieldError, FieldErrors, Invalid},
        matching::{Explanation, ImageName, explain_accounts, explain_config, lint::lint_config},
        names::Name,
        selector::AccountSelection,
    },
    service::{ServiceError, audit::writer::AuditWriter, connection, row_cache::RowCache, spawn_blocking},
    storage::{self, accounts::SealedCredential, sealed::SealedColumn},
};

/// Where accounts are looked for.
#[derive(Debug, Clone, Copy)]
enum Reading {
    /// In memory first.
    Remembered,
    /// In Postgres alone.
    Stored,
}

/// What an explanation is about.
#[derive(Debug)]
pub enum Subject {
    /// Stored accounts.
    Accounts(AccountSelection),
    /// A docker config that somebody else made, in any form.
    Config(SecretString),
}

/// Renders docker configs.
#[derive(Debug, Clone)]
pub struct DockerConfigs {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    sealer: Arc<Sealer>,
    audit_writer: AuditWriter,
}

/// A rendered docker config, and the accounts that are in it.
#[derive(Debug)]
pub struct Assembled {
    /// The docker config.
    pub rendered: RenderedConfig,
    /// Its accounts, in their order.
    pub accounts: Vec<Resource>,
}

impl DockerConfigs {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, row_cache: Arc<RowCache>, sealer: Arc<Sealer>, audit_writer: AuditWriter) -> Self {
        Self { pool, row_cache, sealer, audit_writer }
    }

    /// Renders accounts for a reader, and hands the passwords out only after that was recorded for good.
    ///
    /// # Errors
    ///
    /// As [`assemble`](Self::assemble); and [`ServiceError::Audit`] if it cannot be recorded.
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
        // Of one account it is the account that people look for; of several, the document.
        let (resource, related) = match <[Resource; 1]>::try_from(accounts) {
            Ok([account]) => (account, Vec::new()),
            Err(accounts) => (Resource::docker_configs(), accounts),
        };
        let event = NewEvent::of(caller, Action::Reveal, resource).related(related);
        self.audit_writer.record(event.details(details)).await?;
        Ok(rendered)
    }

    /// Renders accounts for a reader. It is all or nothing: a document that lacks an account is never made.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] names every account that is unknown or named twice; [`ServiceError::Render`]
    /// if the reader cannot be told what these accounts mean; [`ServiceError::Open`] if a password does not open.
    pub async fn assemble(
        &self,
        caller: &Identity,
        profile: Profile,
        choice: &AccountSelection,
    ) -> Result<Assembled, ServiceError> {
        self.render_chosen(profile, &self.choose(&caller.grants, choice, Reading::Remembered).await?)
    }

    /// Renders all of these accounts as they are stored at this moment, for whoever works on what a caller was allowed to
    /// declare before: what is remembered may be older than the generation that he works on.
    ///
    /// # Errors
    ///
    /// As [`assemble`](Self::assemble).
    pub(super) async fn assemble_stored(
        &self,
        profile: Profile,
        choice: &AccountSelection,
    ) -> Result<RenderedConfig, ServiceError> {
        let sealed = self.choose(&Grants::everything(), choice, Reading::Stored).await?;
        Ok(self.render_chosen(profile, &sealed)?.rendered)
    }

    fn render_chosen(&self, profile: Profile, sealed: &[Arc<SealedCredential>]) -> Result<Assembled, ServiceError> {
        let opened = sealed
            .iter()
            .map(|one| self.sealer.open(SealedColumn::AccountPassword.slot(one.id), &one.password))
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

    /// Says which entry each reader would use for an image. No password is opened.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] names every account that is unknown or named twice, and says why a config cannot be read.
    pub async fn explain(
        &self,
        caller: &Identity,
        subject: Subject,
        image: ImageName,
    ) -> Result<Explanation, ServiceError> {
        match subject {
            Subject::Accounts(choice) => {
                let sealed = self.choose(&caller.grants, &choice, Reading::Remembered).await?;
                let accounts: Vec<ScopedAccount<'_>> =
                    sealed.iter().map(|one| ScopedAccount { name: &one.name, scope: &one.registry }).collect();
                Ok(explain_accounts(&accounts, &image))
            }
            Subject::Config(text) => spawn_blocking(move || explain_text(&text, &image)).await,
        }
    }

    /// The chosen accounts. To the caller, one that is not granted is one that does not exist.
    async fn choose(
        &self,
        grants: &Grants,
        choice: &AccountSelection,
        reading: Reading,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        match choice {
            AccountSelection::Names(accounts) => {
                let names: Vec<&str> = accounts.iter().map(Name::as_str).collect();
                let granted = |account: &SealedCredential| grants.include_account(&account.name, &account.labels);
                let found = match reading {
                    Reading::Remembered => self.row_cache.credentials(&names, granted).await?,
                    Reading::Stored => self.row_cache.stored_credentials(&names, granted).await?,
                };
                in_order(accounts, found)
            }
            AccountSelection::Selector(selector) => {
                let limit = AccountSelection::MAX + 1;
                let mut conn = connection(&self.pool).await?;
                let selected = storage::accounts::select_credentials(&mut conn, grants, selector, limit).await?;
                let refused = |detail| Err(vec![FieldError::new("accountSelector", detail)].into());
                match selected.len() {
                    0 => refused("selects no registry account"),
                    1..=AccountSelection::MAX => Ok(selected.into_iter().map(Arc::new).collect()),
                    _ => refused("selects more than 1000 registry accounts"),
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

/// For a document that somebody else made, what is odd in it is of interest even where this image does not meet it.
fn explain_and_lint(config: &Config, image: &ImageName) -> Explanation {
    let mut explanation = explain_config(config, image);
    for warning in lint_config(config) {
        if !explanation.warnings.contains(&warning) {
            explanation.warnings.push(warning);
        }
    }
    explanation
}

/// Puts what was found in the order of the request, or names what was not.
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
