//! Mints logins: the first one in the request that names the source, later ones in the background.
//!
//! A mint runs without a transaction. All but the first one of a source are claimed under a lease, so
//! that an account has one mint in progress. The result is stored under the lease token, in one
//! transaction with the generations of the pull secrets that use the account and the audit event. A
//! failure keeps the login and every Secret as they are.

mod metrics;

use std::{collections::HashSet, sync::Arc, time::Duration};

use secrecy::SecretString;
use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};
use uuid::Uuid;

pub use self::metrics::MintMetrics;
use crate::{
    clients::{
        cluster::ClusterError,
        mint::{MintClient, MintOrder, MintTrigger},
    },
    crypto::{jwt_signer::JwtSigner, sealer::Sealer},
    domain::{
        account::Account,
        audit::{Action, Details, NewEvent, Outcome, Resource, worker},
        caller::{Call, Identity},
        cluster::CaCertificate,
        invalid::{FieldErrors, Invalid},
        mint::{IdentityType, MintError, MintReason, Minted, NewSource, Source, WebIdentity, schedule},
        names::Name,
        registry::RegistryScope,
        sealed::{RegistryDestination, SealForm, Sealed},
    },
    service::{
        ServiceError,
        accounts::KIND,
        audit::TransactionalAudit,
        clusters::Clusters,
        connection, master_keys,
        pull_secrets::{self, AccountTransition},
        row_cache::RowCache,
    },
    storage::{
        self, PgConnection, PgPool,
        changes::Change,
        mints::{ClaimedMint, FailedMint, MintLease, MintResult},
        sealed::SealedColumn,
    },
};

/// Duration of a claim: longer than a mint and the storage of its result.
const LEASE: Duration = Duration::from_mins(1);
/// Time limit for a mint, the wait for the limits of its hosts included.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for a mint that a request waits for.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Delay after which a caller may retry while another mint of the account is in progress.
const IN_PROGRESS_RETRY: Duration = Duration::from_secs(5);
/// Longest delay of a due mint that the limits of its host kept from starting.
const DEFERRAL_MAX: Duration = Duration::from_secs(30);

/// Service that mints logins.
#[derive(Debug, Clone)]
pub struct Mints {
    pool: PgPool,
    row_cache: Arc<RowCache>,
    sealer: Arc<Sealer>,
    audit: TransactionalAudit,
    clusters: Clusters,
    client: Arc<MintClient>,
    metrics: Arc<MintMetrics>,
}

/// A claimed mint and its result.
pub type MintAttempt = (ClaimedMint, Result<Minted, MintError>);

/// Mint that a caller requested. The lease ends when it is dropped, also with an abandoned request.
pub(super) struct RequestedMint {
    mints: Mints,
    claimed: ClaimedMint,
}

impl RequestedMint {
    pub(super) const fn claimed(&self) -> &ClaimedMint {
        &self.claimed
    }
}

impl Drop for RequestedMint {
    fn drop(&mut self) {
        // None after the end of the runtime: the lease then ends by its time.
        let Ok(runtime) = Handle::try_current() else { return };
        let (mints, lease) = (self.mints.clone(), self.claimed.lease());
        // Without effect after the result was stored, which ends the lease.
        runtime.spawn(async move {
            if let Err(error) = mints.release(&[(lease, Duration::ZERO)]).await {
                tracing::warn!(%error, "lease of a requested mint not released");
            }
        });
    }
}

/// First mint of a source.
#[derive(Debug)]
pub(super) struct FirstMint {
    /// The login. In a dry run none is minted.
    pub(super) minted: Option<Minted>,
    /// Cluster of a web identity.
    pub(super) cluster: Option<Uuid>,
}

/// Account that a source is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct MintTarget<'a> {
    pub(super) name: &'a Name,
    pub(super) registry: &'a RegistryScope,
    pub(super) plain_http: bool,
    pub(super) ca_certificate: Option<&'a CaCertificate>,
}

impl Mints {
    /// Creates the service.
    #[must_use]
    pub fn new(
        pool: PgPool,
        row_cache: Arc<RowCache>,
        sealer: Arc<Sealer>,
        audit: TransactionalAudit,
        clusters: Clusters,
        client: MintClient,
    ) -> Self {
        let client = Arc::new(client);
        let metrics = Arc::new(MintMetrics::new(Arc::clone(&client)));
        Self { pool, row_cache, sealer, audit, clusters, client, metrics }
    }

    /// Returns the metrics.
    #[must_use]
    pub fn metrics(&self) -> Arc<MintMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Checks a new source and mints its first login. The caller must be granted the account. Nothing
    /// is stored. In a dry run nothing is sent.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::Invalid`] if the source does not fit the registry, its key is unusable, or its
    ///   `ServiceAccount` is not available to the caller.
    /// - [`ServiceError::NotGranted`] if the source requires all grants.
    /// - [`ServiceError::Mint`] or [`ServiceError::MintTimeout`] if the mint fails.
    pub(super) async fn mint_new(
        &self,
        caller: &Call,
        target: &MintTarget<'_>,
        NewSource { source, secret }: &NewSource,
    ) -> Result<FirstMint, ServiceError> {
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        check_source(caller, target, source, secret)?;
        self.audit.check()?;
        let cluster = match source.web_identity() {
            Some(identity) => Some(self.admit_web_identity(caller, identity, deadline).await?),
            None => None,
        };
        if caller.dry_run {
            return Ok(FirstMint { minted: None, cluster });
        }
        let minted = self.mint(target, source, secret, cluster, MintTrigger::Request, deadline).await;
        Ok(FirstMint { minted: Some(minted.map_err(|error| failure(error, deadline))?), cluster })
    }

    async fn admit_web_identity(
        &self,
        caller: &Call,
        identity: &WebIdentity,
        deadline: Instant,
    ) -> Result<Uuid, ServiceError> {
        let admitted = self.clusters.admit_web_identity(caller, identity);
        let admitted = timeout_at(deadline, admitted).await.map_err(|_| failure(late(), deadline))?;
        admitted.map_err(|error| match error {
            ServiceError::Cluster(_) => failure(no_token(identity, &error), deadline),
            other => other,
        })
    }

    /// Claims the mint of an account for a caller, due or not.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::Mint`] if another mint of it is in progress, or its source was just removed.
    /// - [`ServiceError::Audit`] if a result could not be stored.
    pub(super) async fn claim_one(&self, account: &Account) -> Result<RequestedMint, ServiceError> {
        self.audit.check()?;
        let mut conn = connection(&self.pool).await?;
        if let Some(claimed) = storage::mints::claim_one(&mut conn, account.id, LEASE).await? {
            return Ok(RequestedMint { mints: self.clone(), claimed });
        }
        let error = MintError::new(MintReason::Throttled, "another mint of the account is in progress: retry");
        Err(ServiceError::Mint(MintError { retry_after: Some(IN_PROGRESS_RETRY), ..error }))
    }

    /// Mints the login of a claimed mint for a caller. It is not stored.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Mint`] or [`ServiceError::MintTimeout`] if the mint fails, which is stored.
    pub(super) async fn mint_on_request(&self, caller: &Call, claimed: &ClaimedMint) -> Result<Minted, ServiceError> {
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        let minted = self.mint_claimed(claimed, MintTrigger::Request, deadline).await;
        if let Err(error) = &minted
            && !error.is_deferral
        {
            self.record_failures(&[(claimed, error)], Some(caller)).await?;
        }
        minted.map_err(|error| failure(error, deadline))
    }

    /// Seals the secret of a source.
    pub(super) fn seal(
        &self,
        account: Uuid,
        destination: &RegistryDestination<'_>,
        NewSource { source, secret }: &NewSource,
    ) -> Result<Sealed, ServiceError> {
        let slot = SealedColumn::mint_secret(account, source.as_text(), destination);
        Ok(self.sealer.seal(SealedColumn::MintSecret.form(SealForm::Bound), &slot, secret)?)
    }

    /// Claims due mints. No other replica claims them until the lease ends.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`], and [`ServiceError::Audit`] if no result could be stored.
    pub async fn claim(&self, limit: i64) -> Result<Vec<ClaimedMint>, ServiceError> {
        self.audit.check()?;
        let mut conn = connection(&self.pool).await?;
        Ok(storage::mints::claim(&mut conn, limit, LEASE).await?)
    }

    /// Mints the login of a claimed mint. Nothing is stored.
    pub async fn attempt(&self, claimed: ClaimedMint) -> MintAttempt {
        let minted = self.mint_claimed(&claimed, MintTrigger::Schedule, Instant::now() + TIMEOUT).await;
        (claimed, minted)
    }

    async fn mint_claimed(
        &self,
        claimed: &ClaimedMint,
        trigger: MintTrigger,
        deadline: Instant,
    ) -> Result<Minted, MintError> {
        let source = claimed.source.validate().map_err(|invalid| {
            let detail = format!("set `source` again, this release does not accept the stored one: {invalid}");
            MintError::new(MintReason::Misconfigured, detail)
        })?;
        let secret = self.sealer.open(&claimed.slot(), &claimed.secret).map_err(|error| {
            tracing::error!(account = claimed.name.as_str(), %error, "sealed value not opened");
            MintError::new(
                MintReason::Misconfigured,
                "the stored secret does not open: set `source` with its secret again",
            )
        })?;
        let target = MintTarget {
            name: &claimed.name,
            registry: &claimed.registry,
            plain_http: claimed.plain_http,
            ca_certificate: claimed.ca_certificate.as_ref(),
        };
        self.mint(&target, &source, &secret, claimed.cluster_id, trigger, deadline).await
    }

    async fn mint(
        &self,
        target: &MintTarget<'_>,
        source: &Source,
        secret: &SecretString,
        cluster: Option<Uuid>,
        trigger: MintTrigger,
        deadline: Instant,
    ) -> Result<Minted, MintError> {
        let start = Instant::now();
        let minted = async {
            let web_identity = match source.web_identity() {
                Some(identity) => Some(self.service_account_token(cluster, identity).await?),
                None => None,
            };
            let order = MintOrder {
                source,
                secret,
                web_identity: web_identity.as_ref(),
                registry: target.registry,
                plain_http: target.plain_http,
                ca_certificate: target.ca_certificate,
            };
            self.client.mint_until(&order, trigger, deadline).await
        };
        let minted = timeout_at(deadline, Box::pin(minted)).await.unwrap_or_else(|_| Err(late()));
        if !minted.as_ref().is_err_and(|error| error.is_deferral) {
            let reason = minted.as_ref().err().map(|error| error.reason);
            self.metrics.count(source.source_type(), reason, start.elapsed());
        }
        minted
    }

    async fn service_account_token(
        &self,
        cluster: Option<Uuid>,
        identity: &WebIdentity,
    ) -> Result<SecretString, MintError> {
        let Some(cluster) = cluster else {
            let detail = format!("the cluster `{}` was removed: set `source` with another one", identity.cluster);
            return Err(MintError::new(MintReason::Misconfigured, detail));
        };
        self.clusters.issue_token(cluster, identity).await.map_err(|error| no_token(identity, &error))
    }

    /// Stores results of claimed mints. Results whose lease was lost are dropped, so that storing them
    /// twice has no effect.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] or [`ServiceError::Audit`]: no result of the failed transaction is
    /// stored. Unless they are stored later, its accounts are minted again when their leases end.
    pub async fn record(&self, attempts: &[MintAttempt]) -> Result<(), ServiceError> {
        let (mut minted, mut failed, mut deferred) = (Vec::new(), Vec::new(), Vec::new());
        for (claimed, result) in attempts {
            match result {
                Ok(login) => minted.push((claimed, login)),
                // Others first: the limits of its host keep it from starting.
                Err(error) if error.is_deferral => {
                    deferred.push((claimed.lease(), DEFERRAL_MAX.mul_f64(fastrand::f64())));
                }
                Err(error) => failed.push((claimed, error)),
            }
        }
        let recorded = self.record_minted(&minted).await;
        let recorded = recorded.and(self.record_failures(&failed, None).await);
        recorded.and(self.release(&deferred).await)
    }

    /// Ends the leases of mints that were not carried out. Each is due again after its delay.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn release(&self, leases: &[(MintLease, Duration)]) -> Result<(), ServiceError> {
        if leases.is_empty() {
            return Ok(());
        }
        let mut conn = connection(&self.pool).await?;
        Ok(storage::mints::release(&mut conn, leases).await?)
    }

    async fn record_minted(&self, minted: &[(&ClaimedMint, &Minted)]) -> Result<(), ServiceError> {
        if minted.is_empty() {
            return Ok(());
        }
        let mut tx = self.pool.begin().await?;
        let form = master_keys::seal_form(&mut tx, &self.sealer).await?;
        storage::pull_secrets::lock_selectors_shared(&mut tx).await?;
        let changed = self.store(&mut tx, form, minted).await?;
        let transitions: Vec<AccountTransition<'_>> = changed
            .iter()
            .map(|account| AccountTransition::Changed { before: account, after: account, has_new_password: true })
            .collect();
        pull_secrets::propagate_account_changes(&mut tx, &transitions).await?;
        let stored: HashSet<Uuid> = changed.iter().map(|account| account.id).collect();
        let stored: Vec<_> = minted.iter().filter(|(claimed, _)| stored.contains(&claimed.account_id)).collect();
        let events = stored.iter().map(|(claimed, _)| mint_event(None, claimed));
        self.audit.commit(tx, events.collect::<Vec<_>>()).await?;
        for (claimed, minted) in stored {
            self.row_cache.invalidate(&Change::RegistryAccount(claimed.name.to_string()));
            log_minted(claimed, minted);
        }
        Ok(())
    }

    /// Stores logins, and ends the leases of their mints. Returns the accounts whose login was replaced,
    /// as they were before. One whose lease was lost is left out.
    pub(super) async fn store(
        &self,
        conn: &mut PgConnection,
        form: SealForm,
        minted: &[(&ClaimedMint, &Minted)],
    ) -> Result<Vec<Account>, ServiceError> {
        let ids: Vec<_> = minted.iter().map(|(claimed, _)| claimed.account_id).collect();
        let mut accounts = storage::accounts::lock_ids(conn, &ids).await?;
        let results: Vec<MintResult<'_>> =
            minted.iter().map(|(claimed, minted)| self.result(form, claimed, minted)).collect::<Result<_, _>>()?;
        let stored: HashSet<Uuid> = storage::mints::record_results(conn, &results).await?.into_iter().collect();
        accounts.retain(|account| stored.contains(&account.id));
        Ok(accounts)
    }

    fn result<'a>(
        &self,
        form: SealForm,
        claimed: &'a ClaimedMint,
        minted: &'a Minted,
    ) -> Result<MintResult<'a>, ServiceError> {
        let slot = SealedColumn::account_password(claimed.account_id, &claimed.destination());
        Ok(MintResult {
            mint: claimed,
            username: &minted.username,
            password: self.sealer.seal(form, &slot, minted.password.secret())?,
            ends_with_whitespace: minted.password.ends_with_whitespace(),
            lifetime: minted.validity.remaining(),
            refresh_after: minted.validity.refresh_after(),
        })
    }

    /// Stores failures of mints, those of a request under its caller. Audits changes of the reason.
    async fn record_failures(
        &self,
        failed: &[(&ClaimedMint, &MintError)],
        caller: Option<&Call>,
    ) -> Result<(), ServiceError> {
        if failed.is_empty() {
            return Ok(());
        }
        let backoff = |(mint, error): &(&'_ ClaimedMint, &'_ MintError)| {
            schedule::backoff(error, mint.failures.saturating_add(1), fastrand::f64())
        };
        let failed: Vec<FailedMint<'_>> =
            failed.iter().map(|pair| FailedMint { mint: pair.0, error: pair.1, retry_after: backoff(pair) }).collect();
        let mut tx = self.pool.begin().await?;
        let stored: HashSet<Uuid> = storage::mints::record_failures(&mut tx, &failed).await?.into_iter().collect();
        let is_new = |failed: &&FailedMint<'_>| {
            stored.contains(&failed.mint.account_id) && failed.mint.last_reason != Some(failed.error.reason)
        };
        let new: Vec<_> = failed.iter().filter(is_new).collect();
        let events = new.iter().map(|failed| {
            let details = Details::default().reason(failed.error.reason.as_str());
            let event = event(caller, Action::AccountMintFailed, &failed.mint.name);
            event.details(details).outcome(Outcome::Failure)
        });
        self.audit.commit(tx, events.collect::<Vec<_>>()).await?;
        for FailedMint { mint, error, retry_after } in new {
            let (account, source) = (mint.name.as_str(), mint.source.source_type());
            let (reason, detail, retry_s) = (error.reason, error.detail.as_str(), retry_after.as_secs());
            tracing::warn!(account, %source, %reason, detail, retry_s, "login not minted");
        }
        Ok(())
    }

    /// Refreshes the gauges.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn report_status(&self) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        self.metrics.set_counts(storage::mints::count(&mut conn).await?);
        Ok(())
    }
}

/// Starts an event of a caller, or of the worker.
fn event(caller: Option<&Call>, action: Action, account: &Name) -> NewEvent {
    let resource = Resource::account(account);
    match caller {
        Some(call) => NewEvent::of(call, action, resource),
        None => NewEvent::by(&worker(), action, resource),
    }
}

/// Returns the event of a stored login.
pub(super) fn mint_event(caller: Option<&Call>, claimed: &ClaimedMint) -> NewEvent {
    event(caller, Action::AccountMint, &claimed.name).details(Details::default().serial(claimed.serial + 1))
}

pub(super) fn log_minted(claimed: &ClaimedMint, minted: &Minted) {
    let (account, source) = (claimed.name.as_str(), claimed.source.source_type());
    tracing::info!(account, %source, valid_for_s = minted.validity.lifetime.as_secs(), "login minted");
}

/// A mint that did not end in time.
fn late() -> MintError {
    MintError::new(MintReason::Unreachable, "the mint did not end in time: retry")
}

/// Failure of a mint that a caller waits for.
fn failure(error: MintError, deadline: Instant) -> ServiceError {
    let may_be_late = error.is_deferral || error.reason == MintReason::Unreachable;
    let is_late = may_be_late && Instant::now() >= deadline;
    if is_late { ServiceError::MintTimeout(error) } else { ServiceError::Mint(error) }
}

/// Describes why a cluster issued no token. The address of the cluster is left out: callers that are
/// granted the account may not be granted the cluster.
fn no_token(identity: &WebIdentity, error: &ServiceError) -> MintError {
    let (cluster, account) = (&identity.cluster, identity.account());
    let check = || format!("see `POST /v1/clusters/{cluster}/check`");
    let (reason, cause) = match error {
        ServiceError::Cluster(ClusterError::Forbidden { .. }) => {
            let command = format!("regcred cluster rbac --cluster {cluster} --mint-service-account {account}");
            (MintReason::Denied, format!("regcred may not create it: apply the output of `{command}`"))
        }
        ServiceError::Cluster(ClusterError::Unauthorized) => {
            (MintReason::Denied, "the cluster does not accept regcred's credential: give it a new one".to_owned())
        }
        ServiceError::Cluster(ClusterError::Overloaded { .. }) => {
            (MintReason::Throttled, "the API server is overloaded".to_owned())
        }
        ServiceError::Cluster(ClusterError::Refused { .. }) => {
            (MintReason::Misconfigured, "there is no such ServiceAccount: create it".to_owned())
        }
        ServiceError::Cluster(error @ ClusterError::Misconfigured { .. }) => {
            (MintReason::Misconfigured, format!("{}: {}", error.slug(), check()))
        }
        ServiceError::Cluster(error) => (MintReason::Unreachable, format!("{}: {}", error.slug(), check())),
        ServiceError::Invalid(errors) => (MintReason::Misconfigured, Invalid::from(errors.clone()).to_string()),
        ServiceError::NotFound { .. } => (MintReason::Misconfigured, "there is no such cluster".to_owned()),
        _ => (MintReason::Unreachable, check()),
    };
    let detail = format!("the cluster `{cluster}` issued no token of the ServiceAccount {account}: {cause}");
    MintError::new(reason, detail)
}

/// Checks a source of a request before anything is sent.
fn check_source(
    caller: &Identity,
    target: &MintTarget<'_>,
    source: &Source,
    secret: &SecretString,
) -> Result<(), ServiceError> {
    let overridden = source.overridden();
    let needs_all_grants = overridden.is_some() || source.is_ambient();
    if needs_all_grants && !caller.grants.include_everything() {
        let qualifier = " with an endpoint of its own or an ambient identity, which require all grants";
        return Err(ServiceError::NotGranted { kind: KIND, name: target.name.to_string(), qualifier });
    }
    let mut errors = FieldErrors::default();
    errors.take("registry", source.check_registry(target.registry));
    // Another host would receive tokens of regcred's own identity, not only a login.
    if let (Some(field), true) = (overridden, source.is_ambient()) {
        errors.refuse(field, "is not allowed with an ambient identity, which only its provider may see");
    }
    if target.plain_http && !source.serves_any_registry() {
        errors.refuse("plainHttp", "is not allowed for this source, whose registries use TLS");
    }
    let key = match source.identity_type() {
        IdentityType::ServiceAccountKey => Some(("source.identity.keyFile", "has a private_key that ")),
        IdentityType::ClientCertificate => Some(("source.identity.privateKey", "")),
        _ => None,
    };
    if let Some((field, prefix)) = key {
        let parsed = JwtSigner::parse(secret).map_err(|invalid| Invalid::new(format!("{prefix}{invalid}")));
        errors.take(field, parsed);
    }
    errors.finish(|| Some(())).map_err(ServiceError::from)
}
