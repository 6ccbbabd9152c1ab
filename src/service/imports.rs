//! Import of docker configs: every login becomes a registry account, or none does.
//!
//! An import has three stages:
//!
//! 1. **Plan** ([`ImportPlan`]): parse the document, name the accounts, collect skipped entries.
//!    Pure. With [`ImportOptions::verify`], entries whose login does not work are then skipped.
//! 2. **Apply**: in one transaction, lock the existing accounts, check grants and registries, write
//!    what differs.
//! 3. **Report** ([`ImportReport`]): one item per entry, in the document's order.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use futures_util::{StreamExt, stream};

use crate::{
    clients::registry::Login,
    crypto::{constant_time, sealer::Sealer},
    domain::{
        account::{Account, Email, NewAccount, Password, Username},
        account_name::{self, NamePrefix},
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        docker_config::{
            Warning,
            import::{FoundAccount, Import, ImportItem, ImportOutcome, SkipReason},
            parse::{Config, Part},
        },
        invalid::{FieldError, Invalid},
        matching::lint::lint_config,
        names::{Labels, Name},
        registry::RegistryScope,
        sealed::{SealForm, Sealed},
        verification::{VerificationReport, VerificationResult},
    },
    service::{
        ServiceError,
        accounts::{self, Accounts},
        audit::{TransactionalAudit, recorded},
        pull_secrets::AccountTransition,
        spawn_blocking,
    },
    storage::{self, PgConnection, PgPool, sealed::SealedColumn},
};

/// Maximum number of entries in a document, which are written in one transaction.
const ENTRIES_MAX: usize = 1_000;
/// Maximum number of logins that one import verifies: the caller waits for all of them.
const VERIFIED_MAX: usize = 100;
/// Number of concurrent verifications.
const VERIFICATIONS: usize = 8;

/// Options of an import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// Text before the name of each account.
    pub prefix: NamePrefix,
    /// Labels that each account has afterwards, in addition to its other ones.
    pub labels: Labels,
    /// Whether registries are called without TLS.
    pub plain_http: bool,
    /// Registries, or parts of them, to import. Empty for all.
    pub only_registries: Vec<RegistryScope>,
    /// Skips entries whose login does not work.
    pub verify: bool,
    /// Whether no account of one of the names may exist.
    pub must_be_new: bool,
}

/// Result of one entry or top-level field of the document.
#[derive(Debug)]
pub struct ImportedEntry {
    /// Secret that contains the entry, if it is known.
    pub source: Option<String>,
    /// Key of the entry, or name of the field.
    pub key: String,
    /// Registry and name of the account; `None` for a skipped entry.
    pub account: Option<(String, Name)>,
    /// Outcome of the entry.
    pub outcome: EntryOutcome,
    /// Names of the entry's fields that the account does not store.
    pub left_out: Vec<String>,
}

/// Outcome of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryOutcome {
    /// The account was created.
    Created,
    /// The account existed and received this login.
    Updated,
    /// The account existed with this login.
    Unchanged,
    /// The entry cannot become an account.
    Skipped {
        /// Machine-readable reason.
        reason: SkipReason,
        /// Explanation of the reason.
        detail: String,
    },
}

/// Result of an import.
#[derive(Debug)]
pub struct ImportReport {
    /// Entries in the document's order, then top-level fields.
    pub items: Vec<ImportedEntry>,
    /// Parts of the document that do not have the effect that they appear to have.
    pub warnings: Vec<Warning>,
    /// Whether nothing was stored.
    pub dry_run: bool,
}

/// Service that imports docker configs.
#[derive(Debug, Clone)]
pub struct Imports {
    pool: PgPool,
    sealer: Arc<Sealer>,
    audit: TransactionalAudit,
    accounts: Accounts,
}

impl Imports {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, sealer: Arc<Sealer>, audit: TransactionalAudit, accounts: Accounts) -> Self {
        Self { pool, sealer, audit, accounts }
    }

    /// Imports a document in any supported form.
    ///
    /// An account is named after its registry, with the prefix in front. An existing account of that
    /// name and registry is updated. A dry run has the same report and stores nothing.
    ///
    /// # Errors
    ///
    /// Nothing is stored on an error.
    ///
    /// - [`ServiceError::Invalid`] if the document does not parse (with line and column) or has too
    ///   many entries, or a name belongs to an account of another registry.
    /// - [`ServiceError::NotGranted`] or [`ServiceError::LabelsNotGranted`] if the grants do not
    ///   include one of the accounts or its labels.
    /// - [`ServiceError::NameTaken`] if the grants include a new account of a name, but not the
    ///   existing one.
    /// - [`ServiceError::Exists`] if an account of one of the names exists, and none may.
    pub async fn import(
        &self,
        caller: &Call,
        document: impl AsRef<[u8]> + Send + 'static,
        options: ImportOptions,
    ) -> Result<ImportReport, ServiceError> {
        let (verify, must_be_new) = (options.verify, options.must_be_new);
        let mut plan = spawn_blocking(move || ImportPlan::parse(document.as_ref(), &options)).await?;
        if verify {
            self.skip_unverified(caller, &mut plan).await?;
        }
        let (mut tx, form) = self.accounts.begin(caller).await?;
        let existing = lock_existing(&mut tx, &plan.accounts).await?;
        require_allowed(caller, &plan.accounts, &existing)?;
        let first = plan.accounts.iter().find(|planned| existing.contains_key(planned.new.name.as_str()));
        if let Some(planned) = first.filter(|_| must_be_new) {
            return Err(ServiceError::Exists { name: planned.new.name.to_string() });
        }
        plan.skip_minted(&existing);
        let writes = self.apply(&mut tx, form, &plan.accounts, &existing).await?;
        let stored = || writes.iter().flatten();
        let transitions: Vec<_> = stored().map(AccountWrite::transition).collect();
        self.accounts.commit(tx, &transitions, stored().map(|write| write.event(caller)).collect()).await?;
        if caller.dry_run {
            self.record_dry_run(caller, &existing).await?;
        } else {
            self.record_checks(caller, &mut plan, &writes).await?;
        }
        Ok(plan.into_report(&writes, caller.dry_run))
    }

    /// Verifies the planned logins, and skips those that do not work.
    async fn skip_unverified(&self, caller: &Call, plan: &mut ImportPlan) -> Result<(), ServiceError> {
        if plan.accounts.len() > VERIFIED_MAX {
            let detail = "verifies at most 100 logins: import the document in parts, or name `onlyRegistries`";
            return Err(ServiceError::field("verify", Invalid::new(detail)));
        }
        let mut tx = self.pool.begin().await?;
        let existing = lock_existing(&mut tx, &plan.accounts).await?;
        tx.rollback_and_keep().await?;
        // Before the verifications, which call addresses that the caller names.
        require_allowed(caller, &plan.accounts, &existing)?;
        plan.skip_minted(&existing);
        let verifications = self.accounts.verifications();
        let checks = plan.accounts.iter().map(|PlannedAccount { new, .. }| {
            let account = existing.get(new.name.as_str()).map(|existing| &existing.account);
            let login = Login {
                registry: &new.registry,
                plain_http: new.plain_http || account.is_some_and(|account| account.plain_http),
                ca_certificate: account.and_then(|account| account.ca_certificate.as_ref()),
                username: new.username.as_str(),
                password: new.password.secret(),
            };
            async move { verifications.check_unstored(&login).await }
        });
        let checks: Vec<_> = stream::iter(checks.collect::<Vec<_>>()).buffered(VERIFICATIONS).collect().await;
        plan.keep_valid(checks);
        Ok(())
    }

    /// Stores the results of verifications with the accounts that were written.
    async fn record_checks(
        &self,
        caller: &Call,
        plan: &mut ImportPlan,
        writes: &[Option<AccountWrite>],
    ) -> Result<(), ServiceError> {
        for (planned, write) in plan.accounts.iter_mut().zip(writes) {
            if let Some((check, write)) = planned.check.take().zip(write.as_ref()) {
                self.accounts.record_check(caller, write.after.clone(), Some(check)).await?;
            }
        }
        Ok(())
    }

    /// Writes the planned accounts that are new or differ. The result has one element per planned
    /// account, `None` for an unchanged one.
    async fn apply(
        &self,
        conn: &mut PgConnection,
        form: SealForm,
        planned: &[PlannedAccount],
        existing: &ExistingAccounts,
    ) -> Result<Vec<Option<AccountWrite>>, ServiceError> {
        let mut writes = Vec::with_capacity(planned.len());
        for PlannedAccount { new, .. } in planned {
            writes.push(if let Some(existing) = existing.get(new.name.as_str()) {
                self.update(conn, form, existing, new).await?
            } else {
                let after = self.accounts.insert(conn, form, new).await?;
                Some(AccountWrite { before: None, after, has_new_password: true })
            });
        }
        Ok(writes)
    }

    async fn update(
        &self,
        conn: &mut PgConnection,
        form: SealForm,
        ExistingAccount { account, password }: &ExistingAccount,
        new: &NewAccount,
    ) -> Result<Option<AccountWrite>, ServiceError> {
        let stored = self.sealer.open(&SealedColumn::account_password(account.id, &account.destination()), password)?;
        let has_new_password = !constant_time::is_equal(&stored, new.password.secret());
        let changed = with_login(account.clone(), new, has_new_password)?;
        if changed == *account && !has_new_password {
            return Ok(None);
        }
        let after = self.accounts.update(conn, form, account, &changed, Some(&new.password)).await?;
        Ok(Some(AccountWrite { before: Some(account.clone()), after, has_new_password }))
    }

    /// Audits a dry run that compared stored passwords: `unchanged` discloses that a password is
    /// the stored one.
    async fn record_dry_run(&self, caller: &Call, existing: &ExistingAccounts) -> Result<(), ServiceError> {
        if existing.is_empty() {
            return Ok(());
        }
        let compared = existing.values().map(|existing| Resource::account(&existing.account.name)).collect();
        let event = NewEvent::of(caller, Action::AccountImport, Resource::accounts()).related(compared);
        Ok(self.audit.record_alone(&self.pool, event.details(Details::default().dry_run(true))).await?)
    }
}

/// Entries of a document, before any access to the database.
struct ImportPlan {
    /// Entries that become accounts, by name: concurrent imports then lock and insert rows in the
    /// same order.
    accounts: Vec<PlannedAccount>,
    skipped: Vec<SkippedEntry>,
    warnings: Vec<Warning>,
}

struct PlannedAccount {
    /// Position in the document.
    position: usize,
    source: Option<String>,
    key: String,
    new: NewAccount,
    left_out: Vec<String>,
    /// Result of its verification.
    check: Option<VerificationReport>,
}

struct SkippedEntry {
    /// Position in the document.
    position: usize,
    source: Option<String>,
    key: String,
    reason: SkipReason,
    detail: String,
}

impl ImportPlan {
    fn parse(document: &[u8], options: &ImportOptions) -> Result<Self, ServiceError> {
        let parts =
            Part::parse_all(document).map_err(|error| ServiceError::field("", Invalid::new(error.to_string())))?;
        let configs = || parts.iter().filter_map(Part::config);
        if configs().map(|config| config.entries.len()).sum::<usize>() > ENTRIES_MAX {
            return Err(ServiceError::field(
                "",
                Invalid::new("the document has more than 1000 entries: import it in parts"),
            ));
        }
        let mut import = Import::of_parts(&parts);
        import.items.iter_mut().for_each(|item| apply_options(item, options));
        let names =
            derive_names(&import, &options.prefix).map_err(|invalid| ServiceError::field("namePrefix", invalid))?;
        let warnings = configs().flat_map(warnings_of).collect();
        let mut plan = Self { accounts: Vec::new(), skipped: Vec::new(), warnings };
        for (position, item) in import.items.into_iter().enumerate() {
            plan.add(position, item, &names, &options.labels);
        }
        plan.accounts.sort_by(|one, other| one.new.name.as_str().cmp(other.new.name.as_str()));
        Ok(plan)
    }

    fn add(&mut self, position: usize, item: ImportItem, names: &HashMap<RegistryScope, Name>, labels: &Labels) {
        let ImportItem { source, key, outcome } = item;
        let (reason, detail) = match outcome {
            ImportOutcome::Skipped { reason, detail } => (reason, detail),
            ImportOutcome::Found(found) => {
                let name = names[&found.scope].clone();
                match to_account(found, name, labels) {
                    Ok((new, left_out)) => {
                        self.accounts.push(PlannedAccount { position, source, key, new, left_out, check: None });
                        return;
                    }
                    Err(invalid) => (SkipReason::InvalidEntry, invalid.to_string()),
                }
            }
        };
        self.skipped.push(SkippedEntry { position, source, key, reason, detail });
    }

    /// Keeps the accounts with a valid login, and skips the others. `checks` has one element per
    /// planned account.
    fn keep_valid(&mut self, checks: Vec<VerificationReport>) {
        let planned = std::mem::take(&mut self.accounts);
        for (planned, check) in planned.into_iter().zip(checks) {
            if check.result == VerificationResult::Valid {
                self.accounts.push(PlannedAccount { check: Some(check), ..planned });
                continue;
            }
            let PlannedAccount { position, source, key, .. } = planned;
            let detail = format!("{}: {}", check.result, check.detail);
            self.skipped.push(SkippedEntry { position, source, key, reason: SkipReason::VerificationFailed, detail });
        }
    }

    /// Skips the entries whose accounts have a source.
    fn skip_minted(&mut self, existing: &ExistingAccounts) {
        let is_minted = |planned: &PlannedAccount| {
            existing.get(planned.new.name.as_str()).is_some_and(|existing| existing.account.mint.is_some())
        };
        let (minted, accounts): (Vec<_>, Vec<_>) = std::mem::take(&mut self.accounts).into_iter().partition(is_minted);
        self.accounts = accounts;
        self.skipped.extend(minted.into_iter().map(|PlannedAccount { position, source, key, new, .. }| {
            let detail = format!("the login of the registry account `{}` is minted from its source", new.name);
            SkippedEntry { position, source, key, reason: SkipReason::Minted, detail }
        }));
    }

    /// Builds the report. `writes` has one element per planned account.
    fn into_report(self, writes: &[Option<AccountWrite>], dry_run: bool) -> ImportReport {
        let accounts = self.accounts.into_iter().zip(writes).map(|(planned, write)| {
            let PlannedAccount { position, source, key, new, left_out, check: _ } = planned;
            let outcome = match write {
                None => EntryOutcome::Unchanged,
                Some(AccountWrite { before: None, .. }) => EntryOutcome::Created,
                Some(AccountWrite { before: Some(_), .. }) => EntryOutcome::Updated,
            };
            let account = Some((new.registry.to_string(), new.name));
            (position, ImportedEntry { source, key, account, outcome, left_out })
        });
        let skipped = self.skipped.into_iter().map(|SkippedEntry { position, source, key, reason, detail }| {
            let outcome = EntryOutcome::Skipped { reason, detail };
            (position, ImportedEntry { source, key, account: None, outcome, left_out: Vec::new() })
        });
        let mut items: Vec<_> = accounts.chain(skipped).collect();
        items.sort_by_key(|(position, _)| *position);
        ImportReport { items: items.into_iter().map(|(_, entry)| entry).collect(), warnings: self.warnings, dry_run }
    }
}

/// Applies the options that concern one entry.
fn apply_options(item: &mut ImportItem, ImportOptions { plain_http, only_registries, .. }: &ImportOptions) {
    let ImportOutcome::Found(found) = &mut item.outcome else { return };
    found.plain_http |= plain_http;
    if !only_registries.is_empty() && !only_registries.iter().any(|scope| scope.contains(&found.scope)) {
        let detail = format!("`onlyRegistries` does not contain {}", found.scope);
        item.outcome = ImportOutcome::Skipped { reason: SkipReason::NotSelected, detail };
    }
}

/// Warnings about a document. Those of a Secret name it.
fn warnings_of(config: &Config) -> Vec<Warning> {
    let mut warnings = lint_config(config);
    if let Some(source) = &config.source {
        for warning in &mut warnings {
            warning.detail = format!("in the Secret `{source}`: {}", warning.detail);
        }
    }
    warnings
}

/// Existing accounts of the planned names, locked, by name.
type ExistingAccounts = HashMap<String, ExistingAccount>;

struct ExistingAccount {
    account: Account,
    password: Sealed,
}

async fn lock_existing(conn: &mut PgConnection, planned: &[PlannedAccount]) -> Result<ExistingAccounts, ServiceError> {
    let names: Vec<String> = planned.iter().map(|planned| planned.new.name.to_string()).collect();
    let locked = storage::accounts::lock_many(conn, &names).await?.into_iter();
    Ok(locked.map(|(account, password)| (account.name.to_string(), ExistingAccount { account, password })).collect())
}

/// Write of one account.
struct AccountWrite {
    /// Account before the write; `None` for a new one.
    before: Option<Account>,
    after: Account,
    has_new_password: bool,
}

impl AccountWrite {
    fn transition(&self) -> AccountTransition<'_> {
        let Self { before, after, has_new_password } = self;
        match before {
            None => AccountTransition::Created(after),
            Some(before) => AccountTransition::Changed { before, after, has_new_password: *has_new_password },
        }
    }

    fn event(&self, caller: &Call) -> NewEvent {
        let action = match (&self.before, self.has_new_password) {
            (None, _) => Action::AccountCreate,
            (Some(_), true) => Action::AccountRotate,
            (Some(_), false) => Action::AccountUpdate,
        };
        let (before, after) = (self.before.as_ref().map(recorded::account), recorded::account(&self.after));
        let details = Details::default().by_import().changes(before.as_ref(), Some(&after));
        NewEvent::of(caller, action, Resource::account(&self.after.name)).details(details)
    }
}

/// Sets the login of the document and the labels of the import, and keeps everything else.
fn with_login(mut account: Account, new: &NewAccount, has_new_password: bool) -> Result<Account, ServiceError> {
    account.labels = merged_labels(&account, new)?;
    if has_new_password {
        account.password_ends_with_whitespace = new.password.ends_with_whitespace();
    }
    account.username = new.username.clone();
    account.plain_http = account.plain_http || new.plain_http;
    if new.email.is_some() {
        account.email.clone_from(&new.email);
    }
    Ok(account)
}

/// Labels of an account after an import.
fn merged_labels(account: &Account, new: &NewAccount) -> Result<Labels, ServiceError> {
    let mut labels = account.labels.as_map().clone();
    labels.extend(new.labels.as_map().clone());
    Labels::parse(labels).map_err(|invalid| ServiceError::field("labels", invalid))
}

/// Derives a name per registry. The result does not depend on the order of the entries.
fn derive_names(import: &Import, prefix: &NamePrefix) -> Result<HashMap<RegistryScope, Name>, Invalid> {
    let found = import.items.iter().filter_map(|item| match &item.outcome {
        ImportOutcome::Found(found) => Some(&found.scope),
        ImportOutcome::Skipped { .. } => None,
    });
    let mut taken = HashSet::new();
    let mut names = HashMap::new();
    for scope in found.collect::<BTreeSet<_>>() {
        let name = account_name::derive(prefix, scope, |name| taken.contains(name))?;
        taken.insert(name.clone());
        names.insert(scope.clone(), name);
    }
    Ok(names)
}

/// Converts an entry. Also returns the names of the fields that the account does not store.
fn to_account(found: FoundAccount, name: Name, labels: &Labels) -> Result<(NewAccount, Vec<String>), Invalid> {
    let in_field = |field: &str, invalid: &Invalid| Invalid::new(format!("its {field} {invalid}"));
    let mut left_out = found.left_out;
    // No reader uses the address, so an invalid one does not invalidate the login.
    let email = found.email.as_deref().map(Email::parse).transpose().unwrap_or_else(|_| {
        left_out.push("email".to_owned());
        None
    });
    let new = NewAccount {
        name,
        registry: found.scope,
        username: Username::parse(&found.username).map_err(|invalid| in_field("user name", &invalid))?,
        password: Password::parse(found.password).map_err(|invalid| in_field("password", &invalid))?,
        email,
        labels: labels.clone(),
        plain_http: found.plain_http,
        expires_at: None,
        ca_certificate: None,
        verify_interval: None,
    };
    Ok((new, left_out))
}

/// Rejects the import if an account is not granted, or its name belongs to another registry.
fn require_allowed(
    caller: &Identity,
    planned: &[PlannedAccount],
    existing: &ExistingAccounts,
) -> Result<(), ServiceError> {
    // First, so that no later error discloses an account that is not granted.
    require_granted(caller, planned, existing)?;
    require_same_registry(planned, existing)
}

/// Rejects the import if an account or its labels are not granted.
fn require_granted(
    caller: &Identity,
    planned: &[PlannedAccount],
    existing: &ExistingAccounts,
) -> Result<(), ServiceError> {
    let unlabelled = Labels::default();
    for PlannedAccount { new, .. } in planned {
        match existing.get(new.name.as_str()) {
            Some(ExistingAccount { account, .. }) => {
                if !caller.grants.include_account(account.name.as_str(), account.labels.as_map()) {
                    // As for a creation: an ungranted account does not become granted by new labels.
                    accounts::require_granted(caller, &new.name, &unlabelled, &new.labels)?;
                    return Err(ServiceError::NameTaken(new.name.to_string()));
                }
                let after = merged_labels(account, new)?;
                accounts::require_granted(caller, &new.name, &account.labels, &after)?;
            }
            None => accounts::require_granted(caller, &new.name, &unlabelled, &new.labels)?,
        }
    }
    Ok(())
}

/// Rejects the import if a name belongs to an account of another registry.
fn require_same_registry(planned: &[PlannedAccount], existing: &ExistingAccounts) -> Result<(), ServiceError> {
    let mut errors = Vec::new();
    for PlannedAccount { new, .. } in planned {
        let Some(ExistingAccount { account, .. }) = existing.get(new.name.as_str()) else { continue };
        if account.registry != new.registry {
            let detail = format!(
                "derives the name `{}` for {}, but that account is for {}: choose another prefix",
                account.name, new.registry, account.registry
            );
            errors.push(FieldError::new("namePrefix", detail));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.into()) }
}
