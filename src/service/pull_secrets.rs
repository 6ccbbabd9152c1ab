//! Pull secrets: declare, read, sync and delete. [`super::reconcile`] does the work in the
//! clusters.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        docker_config::{ScopedAccount, Warning, check_keys},
        grants::Grants,
        invalid::{FieldError, FieldErrors},
        listing::PullSecretState,
        names::Name,
        pull_secret::{Declaration, DeletionPolicy, LeftOut, Namespaces},
    },
    service::{
        ExpectedVersion, ServiceError,
        audit::{TransactionalAudit, recorded},
        check_version, connection, idempotency, no_such,
    },
    storage::{
        self, PgConnection, PgPool, StorageError, coverage::usage::PullSecretUsage, pull_secrets::StoredPullSecret,
        resyncs::ResyncStatus, targets::status::Counts, unmatched::Unmatched,
    },
    telemetry::traces,
};

mod accounts;
mod change;
mod holders;
mod listing;

pub use change::{Precondition, ReadOnlyFields};
pub use listing::{PullSecretQuery, TargetQuery};

pub(super) use accounts::{AccountTransition, propagate_account_changes};
pub(super) use holders::holder;

const KIND: &str = "pull secret";

/// A pull secret with its status.
#[derive(Debug)]
pub struct ShownPullSecret {
    /// The stored pull secret.
    pub stored: StoredPullSecret,
    /// Targets by state.
    pub counts: Counts,
    /// Resyncs of the clusters in which it selects namespaces.
    pub resyncs: Vec<ResyncStatus>,
    /// Selected accounts that are not in its document, as far as the caller is granted them.
    pub left_out: Vec<LeftOut>,
    /// Selectors that match nothing.
    pub unmatched: Unmatched,
    /// What uses its Secrets, by the newest snapshots; none in lists, without a snapshot, or without
    /// all grants.
    pub usage: Option<PullSecretUsage>,
}

impl ShownPullSecret {
    /// Whether every target was reconciled since the last change: synced, failed or in conflict.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.counts.pending == 0 && self.counts.removing == 0 && self.counts.uncompared == 0
    }

    /// The worst state of its targets.
    #[must_use]
    pub fn state(&self) -> PullSecretState {
        match &self.counts {
            _ if self.stored.deleted_at.is_some() => PullSecretState::Deleting,
            Counts { conflict: 1.., .. } => PullSecretState::Conflict,
            Counts { failed: 1.., .. } => PullSecretState::Failed,
            _ if !self.is_settled() => PullSecretState::Pending,
            _ => PullSecretState::Synced,
        }
    }

    /// Warnings about selectors that match nothing.
    #[must_use]
    pub fn warnings(&self) -> Vec<Warning> {
        let accounts = self.unmatched.accounts.then(Warning::selects_no_account);
        let targets = self.unmatched.targets.iter().flat_map(|(cluster, places)| {
            let places = places.iter().filter_map(|place| usize::try_from(*place).ok());
            places.map(|place| Warning::selects_no_namespace(place, cluster))
        });
        accounts.into_iter().chain(targets).collect()
    }
}

/// Effect of a declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// The pull secret is new.
    Created,
    /// The pull secret existed.
    Replaced,
}

/// First poll interval of a waiting caller. Doubles up to [`POLL_INTERVAL_MAX`].
const POLL_INTERVAL_MIN: Duration = Duration::from_millis(25);
/// Longest poll interval of up to [`POLLERS`] waiting callers. It grows with their number, so that
/// the load on Postgres does not.
const POLL_INTERVAL_MAX: Duration = Duration::from_millis(500);
/// Waiting callers that poll at [`POLL_INTERVAL_MAX`].
const POLLERS: usize = 64;

/// Pull secrets.
#[derive(Debug, Clone)]
pub struct PullSecrets {
    pool: PgPool,
    audit: TransactionalAudit,
    /// One clone per waiting caller.
    waiting: Arc<()>,
}

impl PullSecrets {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, audit: TransactionalAudit) -> Self {
        Self { pool, audit, waiting: Arc::default() }
    }

    /// Stores a declaration and makes its targets due. An equal declaration changes nothing.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::UnknownAccounts`] names every account, cluster and namespace that is
    ///   unknown or not granted.
    /// - [`ServiceError::Render`] if two named accounts do not fit into one document.
    /// - [`ServiceError::NameTaken`] if the name belongs to a pull secret that is hidden from the
    ///   caller.
    /// - [`ServiceError::Stale`] if the stored version is not the expected one, and
    ///   [`ServiceError::Invalid`] if a read-only field differs.
    /// - [`ServiceError::Deleting`] if the pull secret is being deleted.
    pub async fn declare(
        &self,
        caller: &Call,
        name: &Name,
        declaration: &Declaration,
        condition: &Precondition,
    ) -> Result<(Declared, ShownPullSecret), ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        if declaration.account_selector().is_some() {
            storage::pull_secrets::lock_selectors(&mut tx).await?;
        }
        // Accounts before pull secrets: the lock order of a rotation.
        let (accounts, clusters) = references(&mut tx, caller, declaration).await?;
        let existing = match lock_declarable(&mut tx, caller, name, declaration, condition).await {
            Ok(existing) => existing,
            Err(error) => {
                // At once: a further attempt claims the same idempotency key.
                tx.rollback_and_keep().await?;
                return Err(error);
            }
        };
        let before = existing.as_ref().map(|existing| recorded::pull_secret(&existing.declaration));
        let (declared, stored) = match existing {
            Some(existing) if existing.declaration == *declaration => {
                let shown = shown(&mut tx, caller, existing).await?;
                self.audit.commit(tx, []).await?;
                return Ok((Declared::Replaced, shown));
            }
            Some(existing) => {
                (Declared::Replaced, storage::pull_secrets::update(&mut tx, existing.id, declaration).await?)
            }
            None => {
                let inserted = storage::pull_secrets::insert(&mut tx, Uuid::now_v7(), name, declaration).await;
                (Declared::Created, inserted.map_err(|error| on_name_taken(error, name))?)
            }
        };
        record_trace(&mut tx, &[stored.id]).await?;
        storage::pull_secrets::replace_accounts(&mut tx, stored.id, &accounts).await?;
        record_selection(&mut tx, &stored).await?;
        declare_targets(&mut tx, &stored, &clusters).await?;
        storage::wakeups::wake_workers(&mut tx).await?;
        let shown = shown(&mut tx, caller, stored).await?;
        let details = Details::default().version(shown.stored.version);
        let details = details.changes(before.as_ref(), Some(&recorded::pull_secret(declaration)));
        let event = NewEvent::of(caller, Action::PullSecretDeclare, Resource::pull_secret(name)).details(details);
        self.audit.commit(tx, [event.related(accounts_of(declaration))]).await?;
        Ok((declared, shown))
    }

    /// Validates a declaration as [`declare`](Self::declare) does, without changes. Returns the
    /// stored pull secret of this name.
    ///
    /// # Errors
    ///
    /// As [`declare`](Self::declare).
    pub async fn validate(
        &self,
        caller: &Identity,
        name: &Name,
        declaration: &Declaration,
        condition: &Precondition,
    ) -> Result<Option<StoredPullSecret>, ServiceError> {
        let mut tx = self.pool.begin().await?;
        references(&mut tx, caller, declaration).await?;
        lock_declarable(&mut tx, caller, name, declaration, condition).await
    }

    /// Finds a pull secret.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if it does not exist.
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<ShownPullSecret, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let stored = granted(&mut conn, caller, name).await?;
        shown(&mut conn, caller, stored).await
    }

    /// Makes every target due.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if it does not exist.
    pub async fn sync(&self, caller: &Call, name: &Name) -> Result<ShownPullSecret, ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        // Pull secrets before targets: the lock order.
        storage::pull_secrets::lock(&mut tx, name).await?;
        let stored = granted(&mut tx, caller, name).await?;
        storage::targets::due::mark_due(&mut tx, stored.id).await?;
        storage::wakeups::wake_workers(&mut tx).await?;
        let shown = shown(&mut tx, caller, stored).await?;
        let event = NewEvent::of(caller, Action::PullSecretSync, Resource::pull_secret(name));
        self.audit.commit(tx, [event]).await?;
        Ok(shown)
    }

    /// Deletes a pull secret. `policy` overrides the declared deletion policy.
    ///
    /// With [`DeletionPolicy::Delete`] it remains until its Secrets are removed. With
    /// [`DeletionPolicy::Retain`] the Secrets stay, and it is gone at once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if it does not exist, [`ServiceError::Stale`] if the stored
    /// version differs from `expected`.
    pub async fn remove(
        &self,
        caller: &Call,
        name: &Name,
        expected: ExpectedVersion,
        policy: Option<DeletionPolicy>,
    ) -> Result<(), ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        storage::pull_secrets::lock(&mut tx, name).await?;
        let stored = granted(&mut tx, caller, name).await?;
        check_version(expected, stored.version)?;
        storage::pull_secrets::retire(&mut tx, stored.id).await?;
        let policy = policy.unwrap_or(stored.declaration.deletion_policy);
        storage::targets::declare(&mut tx, stored.id, stored.generation + 1, (&[], &[]), &[], policy).await?;
        storage::pull_secrets::delete_empty(&mut tx, stored.id).await?;
        storage::wakeups::wake_workers(&mut tx).await?;
        let details = Details::default().version(stored.version);
        let details = details.changes(Some(&recorded::pull_secret(&stored.declaration)), None);
        let event = NewEvent::of(caller, Action::PullSecretDelete, Resource::pull_secret(name)).details(details);
        self.audit.commit(tx, [event]).await?;
        Ok(())
    }

    /// Waits until every target is settled, at most for `time`, and returns the status.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if it was deleted meanwhile.
    pub async fn wait(&self, caller: &Identity, name: &Name, time: Duration) -> Result<ShownPullSecret, ServiceError> {
        let deadline = Instant::now() + time;
        let mut pause = POLL_INTERVAL_MIN;
        let waiting = Arc::clone(&self.waiting);
        loop {
            let mut conn = connection(&self.pool).await?;
            let stored = granted(&mut conn, caller, name).await?;
            let is_over = Instant::now() >= deadline;
            // Cheap while thousands of targets are pending. They are counted once, at the end.
            if is_over || storage::targets::status::is_settled(&mut conn, stored.id, stored.version).await? {
                return shown(&mut conn, caller, stored).await;
            }
            drop(conn);
            tokio::time::sleep_until(deadline.min(Instant::now() + pause)).await;
            let crowd = u32::try_from(Arc::strong_count(&waiting).div_ceil(POLLERS)).unwrap_or(u32::MAX);
            pause = (pause * 2).min(POLL_INTERVAL_MAX.saturating_mul(crowd));
        }
    }
}

/// Records the trace of the current request with pull secrets whose generation it made, if it is
/// exported.
async fn record_trace(conn: &mut PgConnection, ids: &[Uuid]) -> Result<(), ServiceError> {
    if let Some(traceparent) = traces::current().filter(|_| !ids.is_empty()) {
        storage::traces::record(conn, ids, &traceparent).await?;
    }
    Ok(())
}

/// Records whether the account selector of the stored declaration matches an account. Requires
/// [`storage::pull_secrets::lock_selectors`] in the same transaction.
async fn record_selection(conn: &mut PgConnection, stored: &StoredPullSecret) -> Result<(), ServiceError> {
    let selects = match stored.declaration.account_selector() {
        Some(selector) => Some(storage::accounts::selects_any(conn, selector).await?),
        None => None,
    };
    Ok(storage::unmatched::record_accounts(conn, stored.id, selects).await?)
}

/// Replaces clusters, resyncs and targets by those of the stored declaration. `clusters` holds the
/// ids of its clusters by name.
async fn declare_targets(
    conn: &mut PgConnection,
    stored: &StoredPullSecret,
    clusters: &BTreeMap<String, Uuid>,
) -> Result<(), ServiceError> {
    let StoredPullSecret { id, generation, declaration, .. } = stored;
    let (ids, selects): (Vec<Uuid>, Vec<bool>) =
        declaration.clusters().into_iter().map(|(cluster, selects)| (clusters[cluster.as_str()], selects)).unzip();
    storage::pull_secret_clusters::replace(conn, *id, &ids, &selects).await?;
    storage::resyncs::schedule(conn, *id).await?;
    let selecting: Vec<Uuid> = ids.iter().zip(&selects).filter(|(_, selects)| **selects).map(|(id, _)| *id).collect();
    let (listed, namespaces): (Vec<Uuid>, Vec<String>) = declaration
        .listed()
        .into_iter()
        .map(|(cluster, namespace)| (clusters[cluster.as_str()], namespace.to_string()))
        .unzip();
    let policy = declaration.deletion_policy;
    Ok(storage::targets::declare(conn, *id, *generation, (&listed, &namespaces), &selecting, policy).await?)
}

fn on_name_taken(error: StorageError, name: &Name) -> ServiceError {
    match error {
        StorageError::NameTaken => ServiceError::NameTaken(name.to_string()),
        other => other.into(),
    }
}

/// Accounts that a declaration names, as resources of an audit event.
fn accounts_of(declaration: &Declaration) -> Vec<Resource> {
    declaration.named_accounts().iter().map(Resource::account).collect()
}

async fn shown(
    conn: &mut PgConnection,
    caller: &Identity,
    stored: StoredPullSecret,
) -> Result<ShownPullSecret, ServiceError> {
    let counts = storage::targets::status::count(conn, &[stored.id]).await?.pop().unwrap_or_default();
    let resyncs = storage::resyncs::list(conn, stored.id).await?;
    let left_out = granted_left_out(conn, caller, &[stored.id]).await?.remove(&stored.id).unwrap_or_default();
    let unmatched = storage::unmatched::list(conn, &[stored.id]).await?.remove(&stored.id).unwrap_or_default();
    let usage = if caller.grants.include_everything() {
        storage::coverage::usage::find_pull_secret(conn, stored.id).await?
    } else {
        None
    };
    Ok(ShownPullSecret { stored, counts, resyncs, left_out, unmatched, usage })
}

/// Lists the accounts that pull secrets leave out, without those that are not granted.
async fn granted_left_out(
    conn: &mut PgConnection,
    caller: &Identity,
    ids: &[Uuid],
) -> Result<HashMap<Uuid, Vec<LeftOut>>, ServiceError> {
    let left_out = storage::left_out::list(conn, ids).await?.into_iter();
    let granted = left_out.map(|(id, accounts)| {
        let granted = accounts.into_iter().filter(|one| caller.grants.include_account(&one.name, &one.labels));
        (id, granted.map(|one| LeftOut::key_collision(one.name)).collect())
    });
    Ok(granted.collect())
}

/// Finds a pull secret that is visible to the caller.
pub(super) async fn granted(
    conn: &mut PgConnection,
    caller: &Identity,
    name: &Name,
) -> Result<StoredPullSecret, ServiceError> {
    let found = storage::pull_secrets::find(conn, name).await?;
    let is_there = found.is_some();
    // Grants are checked even without a row, so that the latency does not reveal whether it exists.
    match visible(conn, caller, found.into_iter().collect()).await?.pop() {
        Some(stored) => Ok(stored),
        None if is_there => Err(ServiceError::Hidden { kind: KIND, name: name.to_string() }),
        None => Err(ServiceError::not_found(KIND, name)),
    }
}

/// Locks the pull secret of this name and checks that it can take a declaration.
async fn lock_declarable(
    conn: &mut PgConnection,
    caller: &Identity,
    name: &Name,
    declaration: &Declaration,
    condition: &Precondition,
) -> Result<Option<StoredPullSecret>, ServiceError> {
    let Some(existing) = storage::pull_secrets::lock(conn, name).await? else {
        return condition.check(None).map(|()| None);
    };
    let existing = visible(conn, caller, vec![existing]).await?.pop();
    let existing = existing.ok_or_else(|| ServiceError::NameTaken(name.to_string()))?;
    condition.check(Some(&existing))?;
    if existing.deleted_at.is_some() {
        return Err(ServiceError::Deleting(name.to_string()));
    }
    if existing.declaration.secret_name != declaration.secret_name {
        let detail = "cannot be changed: declare another pull secret with that Secret name, and delete this one";
        return Err(vec![FieldError::new("secret.name", detail)].into());
    }
    Ok(Some(existing))
}

/// Retains the pull secrets that the caller may see: all that they name is granted.
pub(super) async fn visible(
    conn: &mut PgConnection,
    caller: &Identity,
    found: Vec<StoredPullSecret>,
) -> Result<Vec<StoredPullSecret>, ServiceError> {
    let grants = &caller.grants;
    let mut found: Vec<StoredPullSecret> = found.into_iter().filter(|one| one.declaration.is_within(grants)).collect();
    if grants.include_accounts_with(&BTreeMap::new()) {
        return Ok(found);
    }
    let labels = account_labels(conn, found.iter().map(|one| &one.declaration)).await?;
    found.retain(|one| one.declaration.is_visible(grants, |name| labels.get(name)));
    Ok(found)
}

/// Labels of the accounts that declarations name, by name.
pub(super) async fn account_labels<'a>(
    conn: &mut PgConnection,
    declarations: impl Iterator<Item = &'a Declaration>,
) -> Result<HashMap<String, BTreeMap<String, String>>, ServiceError> {
    let names: BTreeSet<&str> = declarations.flat_map(Declaration::named_accounts).map(Name::as_str).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let accounts = storage::pull_secrets::find_accounts(conn, &names).await?;
    Ok(accounts.into_iter().map(|account| (account.name, account.labels)).collect())
}

/// Locks the accounts and clusters that a declaration names and returns their ids. One that is not
/// granted reads as unknown. The named accounts must fit into one document.
async fn references(
    conn: &mut PgConnection,
    caller: &Identity,
    declaration: &Declaration,
) -> Result<(Vec<Uuid>, BTreeMap<String, Uuid>), ServiceError> {
    let grants = &caller.grants;
    let mut errors = FieldErrors::default();
    let mut unknown = Vec::new();
    let names: Vec<&str> = declaration.named_accounts().iter().map(Name::as_str).collect();
    let mut locked = storage::pull_secrets::lock_accounts(conn, &names).await?;
    locked.retain(|(account, _)| grants.include_account(&account.name, &account.labels));
    let found: BTreeMap<&str, Uuid> = locked.iter().map(|(account, _)| (account.name.as_str(), account.id)).collect();
    for (index, name) in names.iter().enumerate() {
        if !found.contains_key(*name) {
            errors.refuse(&format!("accounts[{index}]"), no_such(grants, "registry account", name));
            unknown.extend(Name::parse(name));
        }
    }
    if let Some(selector) = declaration.account_selector()
        && !grants.include_accounts_with(selector.match_labels().as_map())
    {
        let detail =
            "selects more than your grants include: `matchLabels` must contain all labels of one of your grants";
        errors.refuse("accountSelector", detail);
    }
    let clusters: Vec<&str> = declaration.clusters().into_keys().map(Name::as_str).collect();
    let clusters = storage::pull_secrets::lock_clusters(conn, &clusters).await?;
    refuse_targets(&mut errors, grants, declaration, &clusters);
    let ids = found.into_values().collect();
    let references = errors.finish(|| Some((ids, clusters)));
    let references = references.map_err(|errors| ServiceError::UnknownAccounts { errors, names: unknown })?;
    let scoped: Vec<ScopedAccount<'_>> =
        locked.iter().map(|(account, scope)| ScopedAccount { name: &account.name, scope }).collect();
    check_keys(declaration.secret_type.profile(), &scoped)?;
    Ok(references)
}

fn refuse_targets(
    errors: &mut FieldErrors,
    grants: &Grants,
    declaration: &Declaration,
    clusters: &BTreeMap<String, Uuid>,
) {
    for (index, target) in declaration.targets.iter().enumerate() {
        let cluster = target.cluster.as_str();
        if !clusters.contains_key(cluster) || !grants.include_cluster(cluster) {
            errors.refuse(&format!("targets[{index}].cluster"), no_such(grants, "cluster", cluster));
        }
        match &target.namespaces {
            Namespaces::Listed(namespaces) => {
                for (place, namespace) in namespaces.iter().enumerate() {
                    if !grants.include_namespace(namespace.as_str()) {
                        errors.refuse(
                            &format!("targets[{index}].namespaces[{place}]"),
                            format!("your grants do not include the namespace `{namespace}`"),
                        );
                    }
                }
            }
            Namespaces::Selected { .. } if !grants.include_all_namespaces() => {
                let detail = "requires a grant of all namespaces: the editors of a namespace decide its labels";
                errors.refuse(&format!("targets[{index}].namespaceSelector"), detail);
            }
            Namespaces::Selected { .. } => {}
        }
    }
}

/// Fails if pull secrets use a resource. Names those that the caller may see and counts the others.
pub(super) async fn ensure_unused(
    conn: &mut PgConnection,
    caller: &Identity,
    kind: &'static str,
    name: &Name,
    users: Vec<StoredPullSecret>,
) -> Result<(), ServiceError> {
    if users.is_empty() {
        return Ok(());
    }
    let all = users.len();
    let by: Vec<String> =
        visible(conn, caller, users).await?.into_iter().map(|user| format!("pull-secrets/{}", user.name)).collect();
    Err(ServiceError::InUse { kind, name: name.to_string(), hidden: all - by.len(), by })
}
