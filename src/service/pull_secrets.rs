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
    crypto::cursor::CursorKey,
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        docker_config::{ScopedAccount, check_keys},
        grants::Grants,
        invalid::{FieldError, FieldErrors, Invalid},
        names::Name,
        pull_secret::{Declaration, DeletionPolicy, LeftOut, Namespaces, TargetState},
        selector::AccountSelection,
    },
    service::{
        ExpectedVersion, ServiceError,
        audit::{TransactionalAudit, recorded},
        check_version, connection, idempotency,
    },
    storage::{
        self, PageRequest, PgConnection, PgPool, StorageError,
        pull_secrets::StoredPullSecret,
        resyncs::ResyncStatus,
        targets::status::{Counts, ShownTarget},
    },
};

mod accounts;

pub(super) use accounts::{AccountTransition, propagate_account_changes};

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
}

impl ShownPullSecret {
    /// Whether every target was reconciled since the last change: synced, failed or in conflict.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.counts.pending == 0 && self.counts.removing == 0 && self.counts.uncompared == 0
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

/// Page of pull secrets.
#[derive(Debug)]
pub struct PullSecretPage {
    /// Pull secrets, by name.
    pub items: Vec<ShownPullSecret>,
    /// Cursor after the last row that was read, if the page is short although rows follow.
    pub resume: Option<String>,
}

/// Maximum number of rows that a page reads for a caller who may not see all of them. A caller with
/// few pull secrets among many pages through all of them; no page costs the whole table.
const WINDOW: i64 = 1_000;
/// Sorts after every name, in byte order.
const LAST_NAME: &str = "~";
/// First character of a cursor that hides a name. No name starts with it.
const SEALED_CURSOR: char = '~';

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
    cursor_key: CursorKey,
    /// One clone per waiting caller.
    waiting: Arc<()>,
}

impl PullSecrets {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, audit: TransactionalAudit, cursor_key: CursorKey) -> Self {
        Self { pool, audit, cursor_key, waiting: Arc::default() }
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
    /// - [`ServiceError::Stale`] if the stored version differs from `expected`.
    /// - [`ServiceError::Deleting`] if the pull secret is being deleted.
    pub async fn declare(
        &self,
        caller: &Call,
        name: &Name,
        declaration: &Declaration,
        expected: ExpectedVersion,
    ) -> Result<(Declared, ShownPullSecret), ServiceError> {
        let mut tx = self.pool.begin().await?;
        if declaration.account_selector().is_some() {
            storage::pull_secrets::lock_selectors(&mut tx).await?;
        }
        // Accounts before pull secrets: the lock order of a rotation.
        let (accounts, clusters) = references(&mut tx, caller, declaration).await?;
        let existing = lock_declarable(&mut tx, caller, name, declaration, expected).await?;
        let before = existing.as_ref().map(|existing| recorded::pull_secret(&existing.declaration));
        let (declared, stored) = match existing {
            Some(existing) if existing.declaration == *declaration => {
                return Ok((Declared::Replaced, shown(&mut tx, caller, existing).await?));
            }
            Some(existing) => {
                (Declared::Replaced, storage::pull_secrets::update(&mut tx, existing.id, declaration).await?)
            }
            None => {
                let inserted = storage::pull_secrets::insert(&mut tx, Uuid::now_v7(), name, declaration).await;
                (Declared::Created, inserted.map_err(|error| on_name_taken(error, name))?)
            }
        };
        storage::pull_secrets::replace_accounts(&mut tx, stored.id, &accounts).await?;
        declare_targets(&mut tx, &stored, &clusters).await?;
        storage::wakeups::wake_workers(&mut tx).await?;
        let shown = shown(&mut tx, caller, stored).await?;
        let details = Details::default().version(shown.stored.version);
        let details = details.changes(before.as_ref(), Some(&recorded::pull_secret(declaration)));
        let event = NewEvent::of(caller, Action::PullSecretDeclare, Resource::pull_secret(name)).details(details);
        self.audit.commit(tx, [event.related(named_accounts(declaration))]).await?;
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
        expected: ExpectedVersion,
    ) -> Result<Option<StoredPullSecret>, ServiceError> {
        let mut tx = self.pool.begin().await?;
        references(&mut tx, caller, declaration).await?;
        lock_declarable(&mut tx, caller, name, declaration, expected).await
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

    /// Lists the pull secrets by name whose accounts, clusters and namespaces are all granted.
    ///
    /// Reads at most [`WINDOW`] rows that are hidden from the caller, so a page may be short.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] if `page.after` is no cursor of this list.
    pub async fn list(&self, caller: &Identity, page: &PageRequest) -> Result<PullSecretPage, ServiceError> {
        let after = self.position(page.after.as_deref())?;
        let mut conn = connection(&self.pool).await?;
        let (found, end) = list_visible(&mut conn, caller, &after, page.limit).await?;
        let is_short = i64::try_from(found.len()).unwrap_or(i64::MAX) < page.limit;
        let resume = match end.filter(|_| is_short) {
            Some(end) => Some(format!("{SEALED_CURSOR}{}", self.cursor_key.seal(&end)?)),
            None => None,
        };
        let ids: Vec<Uuid> = found.iter().map(|stored| stored.id).collect();
        let counts = storage::targets::status::count(&mut conn, &ids).await?;
        let mut left_out = granted_left_out(&mut conn, caller, &ids).await?;
        let mut items = Vec::with_capacity(found.len());
        for (stored, counts) in found.into_iter().zip(counts) {
            let selects = stored.declaration.clusters().into_values().any(|selects| selects);
            let resyncs = if selects { storage::resyncs::list(&mut conn, stored.id).await? } else { Vec::new() };
            let left_out = left_out.remove(&stored.id).unwrap_or_default();
            items.push(ShownPullSecret { stored, counts, resyncs, left_out });
        }
        Ok(PullSecretPage { items, resume })
    }

    /// Returns the name after which a page starts; empty for the first page.
    fn position(&self, cursor: Option<&str>) -> Result<String, ServiceError> {
        let Some(cursor) = cursor else { return Ok(String::new()) };
        let name = match cursor.strip_prefix(SEALED_CURSOR) {
            Some(sealed) => self.cursor_key.open(sealed),
            None => Name::parse(cursor).ok(),
        };
        let refused = || ServiceError::field("cursor", Invalid::new("must be the `next` of an earlier page"));
        name.map(|name| name.to_string()).ok_or_else(refused)
    }

    /// Lists the targets of a pull secret by cluster and namespace.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if it does not exist.
    pub async fn targets(
        &self,
        caller: &Identity,
        name: &Name,
        state: Option<TargetState>,
        page: &PageRequest,
    ) -> Result<Vec<ShownTarget>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let stored = granted(&mut conn, caller, name).await?;
        Ok(storage::targets::status::list(&mut conn, stored.id, state, page).await?)
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
        let mut tx = self.pool.begin().await?;
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

/// Accounts that a declaration names.
fn named_accounts(declaration: &Declaration) -> Vec<Resource> {
    match &declaration.accounts {
        AccountSelection::Names(names) => names.iter().map(Resource::account).collect(),
        AccountSelection::Selector(_) => Vec::new(),
    }
}

async fn shown(
    conn: &mut PgConnection,
    caller: &Identity,
    stored: StoredPullSecret,
) -> Result<ShownPullSecret, ServiceError> {
    let counts = storage::targets::status::count(conn, &[stored.id]).await?.pop().unwrap_or_default();
    let resyncs = storage::resyncs::list(conn, stored.id).await?;
    let left_out = granted_left_out(conn, caller, &[stored.id]).await?.remove(&stored.id).unwrap_or_default();
    Ok(ShownPullSecret { stored, counts, resyncs, left_out })
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
async fn granted(conn: &mut PgConnection, caller: &Identity, name: &Name) -> Result<StoredPullSecret, ServiceError> {
    let found = storage::pull_secrets::find(conn, name).await?;
    let is_there = found.is_some();
    // Grants are checked even without a row, so that the latency does not reveal whether it exists.
    match visible(conn, caller, found.into_iter().collect()).await?.pop() {
        Some(stored) => Ok(stored),
        None if is_there => Err(ServiceError::Hidden { kind: KIND, name: name.to_string() }),
        None => Err(ServiceError::not_found(KIND, name)),
    }
}

/// Lists visible pull secrets after a name. Also returns the name at which the search ended, if rows
/// follow it.
async fn list_visible(
    conn: &mut PgConnection,
    caller: &Identity,
    after: &str,
    limit: i64,
) -> Result<(Vec<StoredPullSecret>, Option<Name>), ServiceError> {
    if caller.grants.include_everything() {
        return Ok((storage::pull_secrets::list(conn, after, limit).await?, None));
    }
    let end = storage::pull_secrets::find_window_end(conn, after, WINDOW).await?;
    let through = end.as_deref().unwrap_or(LAST_NAME);
    let found = storage::pull_secrets::list_granted(conn, &caller.grants, (after, through), limit).await?;
    // Decides as for a single pull secret, should the query ever include more.
    let found = visible(conn, caller, found).await?;
    Ok((found, end.as_deref().and_then(|end| Name::parse(end).ok())))
}

/// Locks the pull secret of this name and checks that it can take a declaration.
async fn lock_declarable(
    conn: &mut PgConnection,
    caller: &Identity,
    name: &Name,
    declaration: &Declaration,
    expected: ExpectedVersion,
) -> Result<Option<StoredPullSecret>, ServiceError> {
    let Some(existing) = storage::pull_secrets::lock(conn, name).await? else {
        return match expected {
            Some(_) => Err(ServiceError::Stale { current: 0 }),
            None => Ok(None),
        };
    };
    let existing = visible(conn, caller, vec![existing]).await?.pop();
    let existing = existing.ok_or_else(|| ServiceError::NameTaken(name.to_string()))?;
    check_version(expected, existing.version)?;
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
    let used: BTreeSet<&str> = found.iter().flat_map(|one| account_names(&one.declaration)).collect();
    let used: Vec<&str> = used.into_iter().collect();
    let accounts = storage::pull_secrets::find_accounts(conn, &used).await?;
    let granted: BTreeSet<String> = accounts
        .into_iter()
        .filter(|account| grants.include_account(&account.name, &account.labels))
        .map(|account| account.name)
        .collect();
    found.retain(|one| match &one.declaration.accounts {
        AccountSelection::Names(names) => names.iter().all(|name| granted.contains(name.as_str())),
        AccountSelection::Selector(selector) => grants.include_accounts_with(selector.match_labels().as_map()),
    });
    Ok(found)
}

fn account_names(declaration: &Declaration) -> Vec<&str> {
    match &declaration.accounts {
        AccountSelection::Names(names) => names.iter().map(Name::as_str).collect(),
        AccountSelection::Selector(_) => Vec::new(),
    }
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
    let names = account_names(declaration);
    let mut locked = storage::pull_secrets::lock_accounts(conn, &names).await?;
    locked.retain(|(account, _)| grants.include_account(&account.name, &account.labels));
    let found: BTreeMap<&str, Uuid> = locked.iter().map(|(account, _)| (account.name.as_str(), account.id)).collect();
    for (index, name) in names.iter().enumerate() {
        if !found.contains_key(*name) {
            errors.refuse(&format!("accounts[{index}]"), format!("there is no registry account named `{name}`"));
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
            errors.refuse(&format!("targets[{index}].cluster"), format!("there is no cluster named `{cluster}`"));
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
