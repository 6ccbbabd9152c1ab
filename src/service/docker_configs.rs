//! Docker configs: accounts looked up, opened and rendered for a reader.

use std::{collections::HashMap, sync::Arc};

use secrecy::SecretString;
use sqlx::PgPool;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        docker_config::{Credential, Profile, RenderedConfig, render},
        invalid::{FieldError, FieldErrors},
        names::Name,
    },
    service::{ServiceError, connection},
    storage::{self, accounts::SealedCredential, sealed::SealedColumn},
};

/// The most accounts in one docker config.
const ACCOUNTS_MAX: usize = 1_000;

/// Renders docker configs.
#[derive(Debug, Clone)]
pub struct DockerConfigs {
    pool: PgPool,
    sealer: Arc<Sealer>,
}

impl DockerConfigs {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, sealer: Arc<Sealer>) -> Self {
        Self { pool, sealer }
    }

    /// Renders the named accounts. It is all or nothing: a document that lacks an account is never made.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] names every account that is unknown or named twice; [`ServiceError::Render`]
    /// if the reader cannot be told what these accounts mean; [`ServiceError::Open`] if a password does not open.
    pub async fn assemble(&self, profile: Profile, accounts: &[String]) -> Result<RenderedConfig, ServiceError> {
        let names = parse_names(accounts)?;
        let mut conn = connection(&self.pool).await?;
        let found = storage::accounts::find_credentials(&mut conn, &names).await?;
        drop(conn);
        let sealed = in_order(accounts, found)?;
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
        Ok(render(profile, &credentials)?)
    }
}

/// Checks the names as a list: at least one, none twice, each of a form that can exist.
fn parse_names(accounts: &[String]) -> Result<Vec<&str>, ServiceError> {
    if accounts.is_empty() || accounts.len() > ACCOUNTS_MAX {
        return Err(vec![FieldError::new("accounts", "must name 1 to 1000 accounts")].into());
    }
    let mut errors = FieldErrors::default();
    let mut seen = HashMap::with_capacity(accounts.len());
    for (index, name) in accounts.iter().enumerate() {
        let field = format!("accounts[{index}]");
        errors.take(&field, Name::parse(name));
        if let Some(first) = seen.insert(name.as_str(), index) {
            errors.refuse(&field, format!("is the same account as accounts[{first}]"));
        }
    }
    errors.finish(|| Some(accounts.iter().map(String::as_str).collect())).map_err(Into::into)
}

/// Puts what was found in the order of the request, or names what was not.
fn in_order(accounts: &[String], found: Vec<SealedCredential>) -> Result<Vec<SealedCredential>, ServiceError> {
    let mut by_name: HashMap<String, SealedCredential> =
        found.into_iter().map(|account| (account.name.clone(), account)).collect();
    let mut errors = FieldErrors::default();
    let mut ordered = Vec::with_capacity(accounts.len());
    for (index, name) in accounts.iter().enumerate() {
        match by_name.remove(name) {
            Some(account) => ordered.push(account),
            None => {
                errors.refuse(&format!("accounts[{index}]"), format!("there is no registry account named `{name}`"));
            }
        }
    }
    errors.finish(|| Some(ordered)).map_err(Into::into)
}
