//! Whether logins work: asked on demand, before an account is stored, and by the worker while time goes by.
//!
//! What is found is stored beside the account and shown; nothing else follows from it. In particular no Secret is
//! changed or removed because a check failed: the registry may be the one that is ill.

use std::sync::{
    Arc,
    atomic::{AtomicI64, AtomicU64, Ordering},
};

use chrono::Utc;
use secrecy::SecretString;
use sqlx::PgPool;

use crate::{
    clients::registry::{Login, RegistryClient},
    crypto::sealer::Sealer,
    domain::{
        account::{Account, AccountChange, NewAccount},
        audit::{Action, NewEvent, Resource, worker},
        caller::Call,
        names::Name,
        registry::{RegistryScope, RepositoryName},
        verification::{EXPIRY_WARNINGS, Finding, Verification, VerificationResult},
    },
    service::{
        ExpectedVersion, ServiceError,
        accounts::{Accounts, not_found, refuse_redirection, require_granted},
        audit::writer::AuditWriter,
        check_version, connection,
    },
    storage::{self, sealed::SealedColumn, verifications::Expiring},
};

/// Expiry warnings that are given at a time.
const WARNINGS_AT_A_TIME: i64 = 500;

/// A check that has to succeed before anything is stored.
#[derive(Debug, Default, Clone)]
pub struct VerifyFirst {
    /// The repository that the login has to be able to read.
    pub repository: Option<String>,
}

/// Who wanted a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// A caller.
    Request,
    /// The account's interval.
    Background,
}

/// What was counted, for the metrics.
#[derive(Debug, Default)]
pub struct VerificationMetrics {
    requested: [AtomicU64; VerificationResult::ALL.len()],
    background: [AtomicU64; VerificationResult::ALL.len()],
    last_results: [AtomicI64; VerificationResult::ALL.len()],
    expiring: [AtomicI64; EXPIRY_WARNINGS.len()],
}

impl VerificationMetrics {
    fn count(&self, trigger: Trigger, result: VerificationResult) {
        let counts = match trigger {
            Trigger::Request => &self.requested,
            Trigger::Background => &self.background,
        };
        counts[result as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many checks had each result, with who wanted them.
    pub fn checks(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let of = |trigger, counts: &[AtomicU64; VerificationResult::ALL.len()]| {
            VerificationResult::ALL
                .map(|result| (trigger, result.as_str(), counts[result as usize].load(Ordering::Relaxed)))
        };
        of("request", &self.requested).into_iter().chain(of("background", &self.background))
    }

    /// How many accounts there are of each last result, when the worker looked last.
    pub fn last_results(&self) -> impl Iterator<Item = (&'static str, i64)> {
        VerificationResult::ALL
            .into_iter()
            .map(|result| (result.as_str(), self.last_results[result as usize].load(Ordering::Relaxed)))
    }

    /// How many accounts expire within so many days, when the worker looked last.
    pub fn expiring(&self) -> impl Iterator<Item = (i16, i64)> {
        EXPIRY_WARNINGS.into_iter().zip(&self.expiring).map(|(days, count)| (days, count.load(Ordering::Relaxed)))
    }
}

/// Verifies the logins of registry accounts.
#[derive(Debug, Clone)]
pub struct Verifications {
    pool: PgPool,
    sealer: Arc<Sealer>,
    accounts: Accounts,
    registries: Arc<RegistryClient>,
    audit_writer: AuditWriter,
    metrics: Arc<VerificationMetrics>,
}

impl Verifications {
    /// Puts the service together.
    #[must_use]
    pub fn new(
        pool: PgPool,
        sealer: Arc<Sealer>,
        accounts: Accounts,
        registries: RegistryClient,
        audit_writer: AuditWriter,
    ) -> Self {
        Self { pool, sealer, accounts, registries: Arc::new(registries), audit_writer, metrics: Arc::default() }
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> Arc<VerificationMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Verifies a stored account and stores what was found with it.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Invalid`] if the repository is none of
    /// the account's. A login that does not work is no error but what was found.
    pub async fn verify(
        &self,
        caller: &Call,
        name: &Name,
        repository: Option<&str>,
    ) -> Result<Verification, ServiceError> {
        let account = self.accounts.find(caller, name).await?;
        parse_repository(repository, &account.registry)?;
        // The stored password is about to be shown to its registry. What that says of it is stored with the account.
        self.record_showing(caller, name).await?;
        self.verify_account(&account, repository, Trigger::Request).await
    }

    /// Records that a caller has the stored password of an account shown to its registry, before it is.
    async fn record_showing(&self, caller: &Call, name: &Name) -> Result<(), ServiceError> {
        let event = NewEvent::of(caller, Action::AccountVerify, Resource::account(name));
        Ok(self.audit_writer.record(event).await?)
    }

    async fn verify_account(
        &self,
        account: &Account,
        repository: Option<&str>,
        trigger: Trigger,
    ) -> Result<Verification, ServiceError> {
        let repository = parse_repository(repository, &account.registry)?;
        let password = self.stored_password(account).await?;
        let finding = self.check(account, &password, repository.as_ref(), trigger).await;
        self.record(account, finding).await
    }

    /// Registers an account, if wanted only with a login that works.
    ///
    /// # Errors
    ///
    /// As [`Accounts::register`]; and [`ServiceError::VerificationFailed`] if the login did not prove to work. Nothing is stored then.
    pub async fn register(
        &self,
        caller: &Call,
        new: NewAccount,
        first: Option<VerifyFirst>,
    ) -> Result<Account, ServiceError> {
        let Some(first) = first else { return self.accounts.register(caller, new).await };
        // Before anything is sent to anybody.
        require_granted(caller, &new.name, &new.labels)?;
        let repository = parse_repository(first.repository.as_deref(), &new.registry)?;
        let login = Login {
            registry: &new.registry,
            plain_http: new.plain_http,
            ca_certificate: new.ca_certificate.as_ref(),
            username: new.username.as_str(),
            password: new.password.secret(),
        };
        let finding = require_valid(self.ask(&login, repository.as_ref(), Trigger::Request).await)?;
        let mut account = self.accounts.register(caller, new).await?;
        account.verification = Some(self.record(&account, finding).await?);
        Ok(account)
    }

    /// Changes an account, if wanted only where its login works after the change.
    ///
    /// # Errors
    ///
    /// As [`Accounts::change`]; and [`ServiceError::VerificationFailed`] if the changed login did not prove to work,
    /// [`ServiceError::Audit`] if it cannot be recorded that the stored password is shown to its registry. Nothing is changed then.
    /// An account that somebody else changes while its login is checked is [`ServiceError::Stale`].
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        change: AccountChange,
        expected: ExpectedVersion,
        first: Option<VerifyFirst>,
    ) -> Result<Account, ServiceError> {
        let Some(first) = first else { return self.accounts.change(caller, name, change, expected).await };
        let account = self.accounts.find(caller, name).await?;
        check_version(expected, account.version)?;
        // Before anything is sent to anybody.
        refuse_redirection(&account, &change)?;
        let version = account.version;
        let password = if let Some(password) = &change.password {
            password.secret().clone()
        } else {
            self.stored_password(&account).await?
        };
        let mut changed = account;
        change.clone().apply(&mut changed).map_err(|invalid| ServiceError::field("labels", invalid))?;
        require_granted(caller, name, &changed.labels)?;
        let repository = parse_repository(first.repository.as_deref(), &changed.registry)?;
        if change.password.is_none() {
            self.record_showing(caller, name).await?;
        }
        let finding = require_valid(self.check(&changed, &password, repository.as_ref(), Trigger::Request).await)?;
        let mut account = self.accounts.change(caller, name, change, Some(version)).await?;
        account.verification = Some(self.record(&account, finding).await?);
        Ok(account)
    }

    /// Takes the accounts whose check is due; their names. For `lease_seconds` no other replica takes them.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn claim(&self, limit: i64, lease_seconds: i32) -> Result<Vec<Name>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let names = storage::verifications::claim(&mut conn, limit, lease_seconds).await?;
        Ok(names.iter().filter_map(|name| Name::parse(name).ok()).collect())
    }

    /// Verifies an account whose check is due, after that was recorded, and says in the log when it changed what is known of it.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub async fn verify_due(&self, name: &Name) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let found = storage::accounts::find(&mut conn, name).await?;
        drop(conn);
        let before = found.ok_or_else(|| not_found(name))?;
        let known = before.verification.as_ref().map(|verification| verification.result);
        self.audit_writer.record(NewEvent::by(&worker(), Action::AccountVerify, Resource::account(name))).await?;
        let found = self.verify_account(&before, None, Trigger::Background).await?;
        let (account, registry, result) = (name.as_str(), before.registry.as_str(), found.result.as_str());
        match (known, found.result) {
            (known, now) if known == Some(now) => {}
            (_, VerificationResult::Valid) => {
                tracing::info!(account, registry, result, "the login of a registry account works");
            }
            _ => tracing::warn!(
                account,
                registry,
                result,
                detail = found.detail,
                "the login of a registry account could not be verified"
            ),
        }
        Ok(())
    }

    /// Warns of accounts whose `expiresAt` is near, once for each of [`EXPIRY_WARNINGS`] whatever the number of replicas, and counts
    /// what the metrics show.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn look_around(&self) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let due = storage::verifications::claim_warnings(&mut conn, &EXPIRY_WARNINGS, WARNINGS_AT_A_TIME).await?;
        due.iter().for_each(warn);
        let expiring = storage::verifications::count_expiring(&mut conn, &EXPIRY_WARNINGS).await?;
        for (days, gauge) in EXPIRY_WARNINGS.into_iter().zip(&self.metrics.expiring) {
            let counted = expiring.iter().find(|(counted, _)| *counted == days);
            gauge.store(counted.map_or(0, |(_, count)| *count), Ordering::Relaxed);
        }
        let results = storage::verifications::count_results(&mut conn).await?;
        for result in VerificationResult::ALL {
            let counted = results.iter().find(|(counted, _)| counted == result.as_str());
            self.metrics.last_results[result as usize].store(counted.map_or(0, |(_, count)| *count), Ordering::Relaxed);
        }
        Ok(())
    }

    async fn stored_password(&self, account: &Account) -> Result<SecretString, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let sealed = storage::verifications::find_password(&mut conn, account.id, account.version).await?;
        // Changed, or deleted, since it was read.
        let sealed = sealed.ok_or_else(|| not_found(&account.name))?;
        Ok(self.sealer.open(SealedColumn::AccountPassword.slot(account.id), &sealed)?)
    }

    async fn check(
        &self,
        account: &Account,
        password: &SecretString,
        repository: Option<&RepositoryName>,
        trigger: Trigger,
    ) -> Finding {
        let login = Login {
            registry: &account.registry,
            plain_http: account.plain_http,
            ca_certificate: account.ca_certificate.as_ref(),
            username: account.username.as_str(),
            password,
        };
        self.ask(&login, repository, trigger).await
    }

    async fn ask(&self, login: &Login<'_>, repository: Option<&RepositoryName>, trigger: Trigger) -> Finding {
        let finding = self.registries.verify(login, repository).await;
        self.metrics.count(trigger, finding.result);
        finding
    }

    async fn record(&self, account: &Account, finding: Finding) -> Result<Verification, ServiceError> {
        let Finding { result, detail, .. } = finding;
        let mut conn = connection(&self.pool).await?;
        let (id, version) = (account.id, account.version);
        let stored_at = storage::verifications::record(&mut conn, id, version, result, &detail).await?;
        Ok(Verification { result, detail, checked_at: stored_at.unwrap_or_else(Utc::now) })
    }
}

fn parse_repository(
    repository: Option<&str>,
    registry: &RegistryScope,
) -> Result<Option<RepositoryName>, ServiceError> {
    let parsed = repository.map(|repository| RepositoryName::parse(repository, registry)).transpose();
    parsed.map_err(|invalid| ServiceError::field("repository", invalid))
}

/// Only a login that was seen to work will do: `anonymous` says nothing of the password.
fn require_valid(finding: Finding) -> Result<Finding, ServiceError> {
    match finding.result {
        VerificationResult::Valid => Ok(finding),
        _ => Err(ServiceError::VerificationFailed(finding)),
    }
}

fn warn(expiring: &Expiring) {
    let Expiring { name, registry, expires_at, days } = expiring;
    if *days == 0 {
        tracing::warn!(account = %name, %registry, %expires_at, "the password of a registry account has expired");
    } else {
        tracing::warn!(account = %name, %registry, %expires_at, days, "the password of a registry account expires soon");
    }
}
