//! Import: the logins of a docker config become registry accounts, all of them or none.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use secrecy::ExposeSecret;
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        account::{Account, Email, NewAccount, Password, Username},
        account_name,
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        docker_config::{
            Warning,
            import::{FoundAccount, Import, ImportItem, ImportOutcome, SkipReason},
            parse::Config,
        },
        invalid::{FieldError, Invalid},
        matching::lint::lint_config,
        names::{Labels, Name},
        registry::RegistryScope,
    },
    service::{
        ServiceError, accounts,
        audit::TransactionalAudit,
        pull_secrets::{self, AccountTransition},
        row_cache::RowCache,
        spawn_blocking,
    },
    storage::{self, changes::Change, sealed::SealedColumn},
};

/// What became of one entry or field of the document.
#[derive(Debug)]
pub struct Imported {
    /// The entry's key, or the name of the field.
    pub key: String,
    /// Registry and name of its account, if it has one.
    pub account: Option<(String, Name)>,
    /// What became of it.
    pub outcome: EntryOutcome,
    /// The names of the entry's fields that its account does not hold.
    pub left_out: Vec<String>,
}

/// What became of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryOutcome {
    /// A new account.
    Created,
    /// An account that was there has this login now.
    Updated,
    /// An account that was there had this login already.
    Unchanged,
    /// Nothing that can become an account.
    Skipped {
        /// Why, for programs.
        reason: SkipReason,
        /// Why, for people.
        detail: String,
    },
}

/// Everything that became of a document.
#[derive(Debug)]
pub struct ImportReport {
    /// The entries in the document's order, then the fields beside them.
    pub items: Vec<Imported>,
    /// What in the document does not do what it looks like.
    pub warnings: Vec<Warning>,
}

/// Imports docker configs.
#[derive(Debug, Clone)]
pub struct Imports {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    sealer: Arc<Sealer>,
    audit: TransactionalAudit,
}

/// An entry that becomes an account, with its name.
struct Planned {
    position: usize,
    new: NewAccount,
}

impl Imports {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, row_cache: Arc<RowCache>, sealer: Arc<Sealer>, audit: TransactionalAudit) -> Self {
        Self { pool, row_cache, sealer, audit }
    }

    /// Imports a document in any of its forms. An account is named after its registry, with `prefix` before it;
    /// one of that name for that registry is updated. With `dry_run` everything is looked at and nothing stored.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] if the document cannot be read, with line and column, or if a name is in use by
    /// an account for another registry; [`ServiceError::NotGranted`] if one of the accounts is not granted to the
    /// caller, or would not be. Nothing is stored then.
    pub async fn import(
        &self,
        caller: &Call,
        document: impl AsRef<[u8]> + Send + 'static,
        prefix: String,
        dry_run: bool,
    ) -> Result<ImportReport, ServiceError> {
        let judge = move || {
            let config = Config::parse(document.as_ref())
                .map_err(|error| ServiceError::field("", Invalid::new(error.to_string())))?;
            Ok((plan(Import::of(&config), &prefix)?, lint_config(&config)))
        };
        let ((mut items, planned), warnings) = spawn_blocking(judge).await?;
        let mut tx = self.pool.begin().await?;
        storage::pull_secrets::lock_selectors_shared(&mut tx).await?;
        let names: Vec<String> = planned.iter().map(|planned| planned.new.name.to_string()).collect();
        let existing = storage::accounts::lock_many(&mut tx, &names).await?;
        let mut existing: HashMap<String, _> =
            existing.into_iter().map(|(account, sealed)| (account.name.to_string(), (account, sealed))).collect();
        refuse_not_granted(caller, &planned, &existing)?;
        refuse_other_registries(&planned, &existing)?;
        let compared: Vec<Resource> = existing.values().map(|(account, _)| Resource::account(&account.name)).collect();
        let (mut events, mut accounts) = (Vec::new(), Vec::new());
        for Planned { position, new } in planned {
            let name = new.name.clone();
            let mut done = |action: Action| {
                let event = NewEvent::of(caller, action, Resource::account(&name));
                events.push(event.details(Details::default().by_import()));
            };
            items[position].outcome = match existing.remove(new.name.as_str()) {
                None => {
                    let id = Uuid::now_v7();
                    let slot = SealedColumn::AccountPassword.slot(id);
                    let password = self.sealer.seal(slot, new.password.secret())?;
                    let inserted = storage::accounts::insert(&mut tx, id, &new, &password).await;
                    let inserted = inserted.map_err(|error| match error {
                        // Somebody else made it since the names were locked.
                        storage::StorageError::NameTaken => ServiceError::NameTaken(name.to_string()),
                        other => other.into(),
                    })?;
                    accounts.push((None, inserted, true));
                    done(Action::AccountCreate);
                    EntryOutcome::Created
                }
                Some((account, sealed)) => {
                    let slot = SealedColumn::AccountPassword.slot(account.id);
                    let password = self.sealer.open(slot, &sealed)?;
                    let has_password = password.expose_secret() == new.password.secret().expose_secret();
                    match with_login(account.clone(), &new) {
                        same if same == account && has_password => EntryOutcome::Unchanged,
                        changed => {
                            let password = self.sealer.seal(slot, new.password.secret())?;
                            let updated = storage::accounts::update(&mut tx, &changed, Some(&password)).await?;
                            accounts.push((Some(account), updated, !has_password));
                            done(if has_password { Action::AccountUpdate } else { Action::AccountRotate });
                            EntryOutcome::Updated
                        }
                    }
                }
            };
        }
        if dry_run {
            drop(tx);
            // `unchanged` tells that a password is the stored one.
            if !compared.is_empty() {
                let event = NewEvent::of(caller, Action::AccountImport, Resource::accounts()).related(compared);
                self.audit.record_alone(&self.pool, event.details(Details::default().dry_run(true))).await?;
            }
            return Ok(ImportReport { items, warnings });
        }
        let accounts = accounts.iter().map(|(before, after, has_new_password)| match before {
            None => AccountTransition::Created(after),
            Some(before) => AccountTransition::Changed { before, after, has_new_password: *has_new_password },
        });
        pull_secrets::follow_accounts(&mut tx, &accounts.collect::<Vec<_>>()).await?;
        self.audit.commit(tx, events).await?;
        for name in names {
            self.row_cache.forget(&Change::RegistryAccount(name));
        }
        Ok(ImportReport { items, warnings })
    }
}

/// The account with the login of the document. What the document does not say stays.
fn with_login(mut account: Account, new: &NewAccount) -> Account {
    account.username = new.username.clone();
    account.plain_http = account.plain_http || new.plain_http;
    if new.email.is_some() {
        account.email.clone_from(&new.email);
    }
    account
}

/// Gives every login a name; what cannot be an account is passed over with its reason.
fn plan(import: Import, prefix: &str) -> Result<(Vec<Imported>, Vec<Planned>), ServiceError> {
    let names = names(&import, prefix).map_err(|invalid| ServiceError::field("namePrefix", invalid))?;
    let mut items = Vec::with_capacity(import.items.len());
    let mut planned: Vec<Planned> = Vec::new();
    for (position, ImportItem { key, outcome }) in import.items.into_iter().enumerate() {
        items.push(match outcome {
            ImportOutcome::Skipped { reason, detail } => skipped(key, reason, detail),
            ImportOutcome::Found(found) => {
                let name = names[&found.scope].clone();
                match to_account(found, name.clone()) {
                    Ok((new, left_out)) => {
                        let account = Some((new.registry.to_string(), name));
                        planned.push(Planned { position, new });
                        Imported { key, account, outcome: EntryOutcome::Created, left_out }
                    }
                    Err(invalid) => skipped(key, SkipReason::InvalidEntry, invalid.to_string()),
                }
            }
        });
    }
    // In one order everywhere, so that two imports do not wait for each other in a circle.
    planned.sort_by(|one, other| one.new.name.as_str().cmp(other.new.name.as_str()));
    Ok((items, planned))
}

fn skipped(key: String, reason: SkipReason, detail: String) -> Imported {
    Imported { key, account: None, outcome: EntryOutcome::Skipped { reason, detail }, left_out: Vec::new() }
}

/// The names do not depend on the order of the entries: the same entries in another order are the same accounts.
fn names(import: &Import, prefix: &str) -> Result<HashMap<RegistryScope, Name>, Invalid> {
    let found = import.items.iter().filter_map(|item| match &item.outcome {
        ImportOutcome::Found(found) => Some(&found.scope),
        ImportOutcome::Skipped { .. } => None,
    });
    let mut taken = HashSet::new();
    let mut names = HashMap::new();
    for scope in found.collect::<BTreeSet<_>>() {
        let name = account_name::of(prefix, scope, |name| taken.contains(name))?;
        taken.insert(name.clone());
        names.insert(scope.clone(), name);
    }
    Ok(names)
}

/// The account, and which fields of the entry it does not hold.
fn to_account(found: FoundAccount, name: Name) -> Result<(NewAccount, Vec<String>), Invalid> {
    let about = |field: &str, invalid: &Invalid| Invalid::new(format!("its {field} {invalid}"));
    let mut left_out = found.left_out;
    // No reader uses the address: one that is not valid is no reason to lose a login.
    let email = found.email.as_deref().map(Email::parse).transpose().unwrap_or_else(|_| {
        left_out.push("email".to_owned());
        None
    });
    let new = NewAccount {
        name,
        registry: found.scope,
        username: Username::parse(&found.username).map_err(|e| about("user name", &e))?,
        password: Password::parse(found.password).map_err(|e| about("password", &e))?,
        email,
        labels: Labels::default(),
        plain_http: found.plain_http,
        expires_at: None,
        ca_certificate: None,
        verify_interval: None,
    };
    Ok((new, left_out))
}

/// Comes before all that tells something of accounts that are there. Whoever has no grant for an account that is
/// there has none for a new one of that name without labels, so that he learns nothing here.
fn refuse_not_granted<S>(
    caller: &Identity,
    planned: &[Planned],
    existing: &HashMap<String, (Account, S)>,
) -> Result<(), ServiceError> {
    for Planned { new, .. } in planned {
        let labels = existing.get(new.name.as_str()).map_or(&new.labels, |(account, _)| &account.labels);
        if !caller.grants.include_account(new.name.as_str(), labels.as_map()) {
            return Err(accounts::not_granted(&new.name));
        }
    }
    Ok(())
}

fn refuse_other_registries<S>(
    planned: &[Planned],
    existing: &HashMap<String, (Account, S)>,
) -> Result<(), ServiceError> {
    let taken: Vec<FieldError> = planned
        .iter()
        .filter_map(|planned| existing.get(planned.new.name.as_str()).map(|(account, _)| (planned, account)))
        .filter(|(planned, account)| account.registry != planned.new.registry)
        .map(|(planned, account)| {
            FieldError::new(
                "namePrefix",
                format!(
                    "gives the account for {} the name `{}`, which is that of the account for {}: choose another prefix",
                    planned.new.registry, account.name, account.registry
                ),
            )
        })
        .collect();
    if taken.is_empty() { Ok(()) } else { Err(taken.into()) }
}
