//! Verification of registry logins: on request, before a write, and in the background.
//!
//! A result is stored with its account and has no other effect. In particular, no Secret changes
//! because of a failed check: the registry itself may be down.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use secrecy::SecretString;

use crate::{
    clients::registry::{Login, RegistryClient},
    crypto::sealer::Sealer,
    domain::{
        account::{Account, NewAccount, Password},
        audit::{Action, NewEvent, Resource, worker},
        caller::Call,
        names::Name,
        registry::{RegistryScope, RepositoryName},
        verification::{EXPIRY_WARNINGS, Verification, VerificationReport, VerificationResult},
    },
    service::{ServiceError, accounts::KIND, audit::writer::AuditWriter, connection},
    storage::{self, PgPool, sealed::SealedColumn, verifications::Expiring},
};

/// Minimum time between two mints that a rejected login causes.
const REJECTED_PAUSE: Duration = Duration::from_mins(5);
/// Maximum number of expiry warnings per call of [`Verifications::report_status`].
const WARNINGS_MAX: i64 = 500;

/// Verification that must succeed before an account is written.
#[derive(Debug, Default, Clone)]
pub struct RequiredVerification {
    /// Repository that the login must be able to pull from.
    pub repository: Option<String>,
}

/// Reason for a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    /// Request of a caller.
    Request,
    /// Verification interval of the account.
    Background,
}

/// Counters and gauges of verifications.
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

    /// Returns the number of checks per trigger and result.
    pub fn checks(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let by_result = |trigger, counts: &[AtomicU64; VerificationResult::ALL.len()]| {
            VerificationResult::ALL
                .map(|result| (trigger, result.as_str(), counts[result as usize].load(Ordering::Relaxed)))
        };
        by_result("request", &self.requested).into_iter().chain(by_result("background", &self.background))
    }

    /// Returns the number of accounts per last result, as of the last
    /// [`Verifications::report_status`].
    pub fn last_results(&self) -> impl Iterator<Item = (&'static str, i64)> {
        VerificationResult::ALL
            .into_iter()
            .map(|result| (result.as_str(), self.last_results[result as usize].load(Ordering::Relaxed)))
    }

    /// Returns the number of accounts that expire within each of [`EXPIRY_WARNINGS`], as of the
    /// last [`Verifications::report_status`].
    pub fn expiring(&self) -> impl Iterator<Item = (i16, i64)> {
        EXPIRY_WARNINGS.into_iter().zip(&self.expiring).map(|(days, count)| (days, count.load(Ordering::Relaxed)))
    }
}

/// Service that verifies the logins of registry accounts.
#[derive(Debug, Clone)]
pub struct Verifications {
    pool: PgPool,
    sealer: Arc<Sealer>,
    registries: Arc<RegistryClient>,
    audit_writer: AuditWriter,
    metrics: Arc<VerificationMetrics>,
}

impl Verifications {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, sealer: Arc<Sealer>, registries: Arc<RegistryClient>, audit_writer: AuditWriter) -> Self {
        Self { pool, sealer, registries, audit_writer, metrics: Arc::default() }
    }

    /// Returns the metrics.
    #[must_use]
    pub fn metrics(&self) -> Arc<VerificationMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Verifies the stored login of an account and stores the result, unless it is that of a named
    /// repository and not `valid`. A dry run stores nothing.
    pub(super) async fn verify(
        &self,
        caller: &Call,
        account: &Account,
        repository: Option<&str>,
    ) -> Result<Verification, ServiceError> {
        let repository = parse_repository(repository, &account.registry)?;
        self.audit(NewEvent::of(caller, Action::AccountVerify, Resource::account(&account.name))).await?;
        let check = self.check_stored(account, repository.as_ref(), Trigger::Request).await?;
        // A result for a repository is about the repository, too. Only `valid` proves the login.
        if repository.is_some() && check.result != VerificationResult::Valid {
            return Ok(unstored(check));
        }
        self.record(caller, account, check).await
    }

    /// Checks the login of a new account.
    ///
    /// # Errors
    ///
    /// [`ServiceError::VerificationFailed`] unless the registry accepts the login.
    pub(super) async fn require_valid_new(
        &self,
        new: &NewAccount,
        required: &RequiredVerification,
    ) -> Result<VerificationReport, ServiceError> {
        let repository = parse_repository(required.repository.as_deref(), &new.registry)?;
        let login = Login {
            registry: &new.registry,
            plain_http: new.plain_http,
            ca_certificate: new.ca_certificate.as_ref(),
            username: new.username.as_str(),
            password: new.password.secret(),
        };
        require_valid(self.check(&login, repository.as_ref(), Trigger::Request).await)
    }

    /// Checks the login of a changed account that is not yet stored. Without a new password, the
    /// stored one is used and its use is audited.
    ///
    /// # Errors
    ///
    /// [`ServiceError::VerificationFailed`] unless the registry accepts the login.
    pub(super) async fn require_valid_changed(
        &self,
        caller: &Call,
        stored: &Account,
        changed: &Account,
        password: Option<&Password>,
        required: &RequiredVerification,
    ) -> Result<VerificationReport, ServiceError> {
        let repository = parse_repository(required.repository.as_deref(), &changed.registry)?;
        let password = if let Some(password) = password {
            password.secret().clone()
        } else {
            let stored_password = self.stored_password(stored).await?;
            self.audit(NewEvent::of(caller, Action::AccountVerify, Resource::account(&changed.name))).await?;
            stored_password
        };
        require_valid(self.check(&login(changed, &password), repository.as_ref(), Trigger::Request).await)
    }

    /// Claims accounts with a due check and returns their names. No other replica claims them for
    /// `lease_seconds`.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn claim(&self, limit: i64, lease_seconds: i32) -> Result<Vec<Name>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let names = storage::verifications::claim(&mut conn, limit, lease_seconds).await?;
        Ok(names.iter().filter_map(|name| Name::parse(name).ok()).collect())
    }

    /// Verifies a claimed account, stores the result, and logs it if it differs from the previous
    /// one.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if the account was changed or removed since the claim.
    pub async fn verify_due(&self, name: &Name) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let found = storage::accounts::find(&mut conn, name).await?;
        drop(conn);
        let account = found.ok_or_else(|| ServiceError::not_found(KIND, name))?;
        self.audit(NewEvent::by(&worker(), Action::AccountVerify, Resource::account(name))).await?;
        let check = self.check_stored(&account, None, Trigger::Background).await?;
        let verification = self.store(&account, check).await?;
        if account.verification.as_ref().map(|previous| previous.result) != Some(verification.result) {
            log_result(&account, &verification);
        }
        Ok(())
    }

    /// Logs due expiry warnings and refreshes the gauges. Each warning of [`EXPIRY_WARNINGS`] is
    /// logged once, regardless of the number of replicas.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn report_status(&self) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let due = storage::verifications::claim_warnings(&mut conn, &EXPIRY_WARNINGS, WARNINGS_MAX).await?;
        due.iter().for_each(log_expiry);
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

    /// Stores a requested check with the account, except for a dry run.
    pub(super) async fn record(
        &self,
        caller: &Call,
        account: &Account,
        check: VerificationReport,
    ) -> Result<Verification, ServiceError> {
        if caller.dry_run {
            return Ok(unstored(check));
        }
        self.store(account, check).await
    }

    /// Stores a check with the account. Nothing is stored if the account changed since the check.
    async fn store(&self, account: &Account, check: VerificationReport) -> Result<Verification, ServiceError> {
        let VerificationReport { result, detail, .. } = check;
        let mut conn = connection(&self.pool).await?;
        let stored_at = storage::verifications::record(&mut conn, account, result, &detail).await?;
        if let (VerificationResult::Invalid, Some(mint)) = (result, &account.mint) {
            storage::mints::request_refresh(&mut conn, account.id, mint.serial, REJECTED_PAUSE).await?;
        }
        Ok(Verification { result, detail, checked_at: stored_at.unwrap_or_else(crate::clock::now) })
    }

    /// Checks the stored login of an account.
    async fn check_stored(
        &self,
        account: &Account,
        repository: Option<&RepositoryName>,
        trigger: Trigger,
    ) -> Result<VerificationReport, ServiceError> {
        let password = self.stored_password(account).await?;
        Ok(self.check(&login(account, &password), repository, trigger).await)
    }

    /// Checks a login that is not stored, without a repository.
    pub(super) async fn check_unstored(&self, login: &Login<'_>) -> VerificationReport {
        self.check(login, None, Trigger::Request).await
    }

    async fn check(
        &self,
        login: &Login<'_>,
        repository: Option<&RepositoryName>,
        trigger: Trigger,
    ) -> VerificationReport {
        let check = self.registries.verify(login, repository).await;
        self.metrics.count(trigger, check.result);
        check
    }

    /// Writes an audit event before a stored password leaves for its registry.
    async fn audit(&self, event: NewEvent) -> Result<(), ServiceError> {
        Ok(self.audit_writer.record(event).await?)
    }

    async fn stored_password(&self, account: &Account) -> Result<SecretString, ServiceError> {
        if let Some(source) = account.source() {
            let source = source.validate().map_err(|invalid| ServiceError::field("source", invalid))?;
            source.check_registry(&account.registry).map_err(|invalid| ServiceError::field("registry", invalid))?;
        }
        let mut conn = connection(&self.pool).await?;
        let sealed = storage::verifications::find_password(&mut conn, account).await?;
        // `None` if the account was changed or removed since it was read.
        let sealed = sealed.ok_or_else(|| ServiceError::not_found(KIND, &account.name))?;
        Ok(self.sealer.open(&SealedColumn::account_password(account.id, &account.destination()), &sealed)?)
    }
}

fn login<'a>(account: &'a Account, password: &'a SecretString) -> Login<'a> {
    Login {
        registry: &account.registry,
        plain_http: account.plain_http,
        ca_certificate: account.ca_certificate.as_ref(),
        username: account.username.as_str(),
        password,
    }
}

fn parse_repository(
    repository: Option<&str>,
    registry: &RegistryScope,
) -> Result<Option<RepositoryName>, ServiceError> {
    let parsed = repository.map(|repository| RepositoryName::parse(repository, registry)).transpose();
    parsed.map_err(|invalid| ServiceError::field("repository", invalid))
}

/// Accepts [`VerificationResult::Valid`] only. `Anonymous` is not sufficient: it does not confirm
/// the password.
fn require_valid(check: VerificationReport) -> Result<VerificationReport, ServiceError> {
    match check.result {
        VerificationResult::Valid => Ok(check),
        _ => Err(ServiceError::VerificationFailed(check)),
    }
}

/// Result of a check that is not stored.
fn unstored(VerificationReport { result, detail, .. }: VerificationReport) -> Verification {
    Verification { result, detail, checked_at: crate::clock::now() }
}

fn log_result(account: &Account, Verification { result, detail, .. }: &Verification) {
    let (name, registry) = (account.name.as_str(), account.registry.as_str());
    if *result == VerificationResult::Valid {
        tracing::info!(account = name, registry, %result, "registry login verified");
    } else {
        tracing::warn!(account = name, registry, %result, detail, "registry login not verified");
    }
}

fn log_expiry(Expiring { name, registry, expires_at, days }: &Expiring) {
    if *days == 0 {
        tracing::warn!(account = %name, %registry, %expires_at, "registry password expired");
    } else {
        tracing::warn!(account = %name, %registry, %expires_at, days, "registry password expires soon");
    }
}
