//! Pull secrets: declare, look at, remove; and what follows for them when an account changes. The work itself is in
//! [`super::reconcile`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use sqlx::{PgConnection, PgPool};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    domain::{
        account::Account,
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        grants::Grants,
        invalid::{FieldError, FieldErrors},
        names::Name,
        pull_secret::{Declaration, DeletionPolicy, Namespaces, TargetState},
        selector::{AccountSelection, LabelSelector},
    },
    service::{ExpectedVersion, ServiceError, audit::TransactionalAudit, check_version, connection},
    storage::{
        self, PageRequest, StorageError,
        pull_secrets::StoredPullSecret,
        targets::{Comparison, Counts, ShownTarget},
    },
};

const KIND: &str = "pull secret";

/// A pull secret and how it is doing.
#[derive(Debug)]
pub struct ShownPullSecret {
    /// What is stored.
    pub stored: StoredPullSecret,
    /// How many targets are in which state.
    pub counts: Counts,
    /// The clusters in which it selects namespaces by label.
    pub comparisons: Vec<Comparison>,
}

impl ShownPullSecret {
    /// Whether every target came to something since the last change: in order, failed or in conflict.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.counts.pending == 0 && self.counts.removing == 0 && self.counts.uncompared == 0
    }
}

/// What a declaration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// There was none of that name.
    Created,
    /// It replaced another one.
    Replaced,
}

/// How often somebody who waits alone looks, once he has waited for a moment.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// So many look at that interval. The more there are beyond these the less often each looks, so that Postgres has no more to do.
const LOOKING: usize = 64;

/// The pull secrets.
#[derive(Debug, Clone)]
pub struct PullSecrets {
    pool: PgPool,
    audit: TransactionalAudit,
    /// One for each who waits.
    waiting: Arc<()>,
}

impl PullSecrets {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, audit: TransactionalAudit) -> Self {
        Self { pool, audit, waiting: Arc::default() }
    }

    /// Stores a declaration and has its targets brought up to date. The same declaration again changes nothing.
    ///
    /// # Errors
    ///
    /// [`ServiceError::UnknownAccounts`] names every account, cluster and namespace that is unknown or not granted;
    /// [`ServiceError::NameTaken`] if the name is that of a pull secret that the caller may not see;
    /// [`ServiceError::Stale`] if it is not at the expected version; [`ServiceError::Deleting`] if it is on its way out.
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
        // Accounts before the pull secret: in the order in which a rotation locks them.
        let (accounts, clusters) = references(&mut tx, caller, declaration).await?;
        let existing = current(&mut tx, caller, name, declaration, expected).await?;
        let (declared, stored) = match existing {
            Some(existing) if existing.declaration == *declaration => {
                return Ok((Declared::Replaced, shown(&mut tx, existing).await?));
            }
            Some(existing) => {
                let updated = storage::pull_secrets::update(&mut tx, existing.id, declaration).await?;
                (Declared::Replaced, updated)
            }
            None => {
                let inserted = storage::pull_secrets::insert(&mut tx, Uuid::now_v7(), name, declaration).await;
                (
                    Declared::Created,
                    inserted.map_err(|error| match error {
                        StorageError::NameTaken => ServiceError::NameTaken(name.to_string()),
                        other => other.into(),
                    })?,
                )
            }
        };
        storage::pull_secrets::set_accounts(&mut tx, stored.id, &accounts).await?;
        let meant = declaration.clusters();
        let (ids, selects): (Vec<Uuid>, Vec<bool>) =
            meant.iter().map(|(cluster, selects)| (clusters[cluster.as_str()], *selects)).unzip();
        storage::pull_secrets::set_clusters(&mut tx, stored.id, &ids, &selects).await?;
        let selecting: Vec<Uuid> =
            ids.iter().zip(&selects).filter(|(_, selects)| **selects).map(|(id, _)| *id).collect();
        let listed = declaration.listed();
        let listed: (Vec<Uuid>, Vec<String>) =
            listed.into_iter().map(|(cluster, namespace)| (clusters[cluster.as_str()], namespace.to_string())).unzip();
        storage::targets::declare(
            &mut tx,
            stored.id,
            stored.generation,
            (&listed.0, &listed.1),
            &selecting,
            declaration.deletion_policy,
        )
        .await?;
        storage::pull_secrets::notify(&mut tx).await?;
        let shown = shown(&mut tx, stored).await?;
        let version = Details::default().version(shown.stored.version);
        let event = NewEvent::of(caller, Action::PullSecretDeclare, Resource::pull_secret(name)).details(version);
        self.audit.commit(tx, [event.related(named(declaration))]).await?;
        Ok((declared, shown))
    }

    /// Checks a declaration as [`declare`](Self::declare) does and stores nothing; what is stored under that name.
    ///
    /// # Errors
    ///
    /// As [`declare`](Self::declare).
    pub async fn examine(
        &self,
        caller: &Identity,
        name: &Name,
        declaration: &Declaration,
        expected: ExpectedVersion,
    ) -> Result<Option<StoredPullSecret>, ServiceError> {
        let mut tx = self.pool.begin().await?;
        references(&mut tx, caller, declaration).await?;
        current(&mut tx, caller, name, declaration, expected).await
    }

    /// Finds a pull secret.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name.
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<ShownPullSecret, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let stored = granted(&mut conn, caller, name).await?;
        shown(&mut conn, stored).await
    }

    /// Lists pull secrets by name: those all of whose accounts, clusters and namespaces are granted.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn list(&self, caller: &Identity, page: &PageRequest) -> Result<Vec<ShownPullSecret>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let limit = usize::try_from(page.limit).unwrap_or_default();
        let mut next = page.clone();
        let mut found: Vec<StoredPullSecret> = Vec::new();
        // Full pages, whatever is left out of them.
        loop {
            let read = storage::pull_secrets::list(&mut conn, &next).await?;
            let is_last = read.len() < limit;
            next.after = read.last().map(|last| last.name.to_string());
            found.extend(visible(&mut conn, caller, read).await?);
            if is_last || found.len() >= limit {
                break;
            }
        }
        found.truncate(limit);
        let ids: Vec<Uuid> = found.iter().map(|stored| stored.id).collect();
        let counts = storage::targets::count(&mut conn, &ids).await?;
        let mut shown = Vec::with_capacity(found.len());
        for (stored, counts) in found.into_iter().zip(counts) {
            let selects = stored.declaration.clusters().into_values().any(|selects| selects);
            let comparisons =
                if selects { storage::targets::comparisons(&mut conn, stored.id).await? } else { Vec::new() };
            shown.push(ShownPullSecret { stored, counts, comparisons });
        }
        Ok(shown)
    }

    /// Lists the targets of a pull secret by cluster and namespace.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name.
    pub async fn targets(
        &self,
        caller: &Identity,
        name: &Name,
        state: Option<TargetState>,
        page: &PageRequest,
    ) -> Result<Vec<ShownTarget>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let stored = granted(&mut conn, caller, name).await?;
        Ok(storage::targets::list(&mut conn, stored.id, state, page).await?)
    }

    /// Has every target looked at again now.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name.
    pub async fn sync(&self, caller: &Call, name: &Name) -> Result<ShownPullSecret, ServiceError> {
        let mut tx = self.pool.begin().await?;
        // As whoever changes it does: two who lock its targets do not wait for each other in a circle.
        storage::pull_secrets::lock(&mut tx, name).await?;
        let stored = granted(&mut tx, caller, name).await?;
        storage::targets::mark_due(&mut tx, stored.id).await?;
        storage::pull_secrets::notify(&mut tx).await?;
        let shown = shown(&mut tx, stored).await?;
        let event = NewEvent::of(caller, Action::PullSecretSync, Resource::pull_secret(name));
        self.audit.commit(tx, [event]).await?;
        Ok(shown)
    }

    /// Removes a pull secret. With [`DeletionPolicy::Delete`] its Secrets are removed first, and it is there until they have
    /// gone; with [`DeletionPolicy::Retain`] they stay, and it goes at once. `policy` counts in place of the declared one.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the expected
    /// version.
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
        storage::pull_secrets::notify(&mut tx).await?;
        let version = Details::default().version(stored.version);
        let event = NewEvent::of(caller, Action::PullSecretDelete, Resource::pull_secret(name)).details(version);
        self.audit.commit(tx, [event]).await?;
        Ok(())
    }

    /// Waits until every target has settled, or the time is over; how it is doing then.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if it has gone meanwhile.
    pub async fn wait(&self, caller: &Identity, name: &Name, time: Duration) -> Result<ShownPullSecret, ServiceError> {
        let deadline = Instant::now() + time;
        let mut pause = Duration::from_millis(25);
        let waiting = Arc::clone(&self.waiting);
        loop {
            let mut conn = connection(&self.pool).await?;
            let stored = granted(&mut conn, caller, name).await?;
            let is_over = Instant::now() >= deadline;
            // Asked again and again while thousands of targets may be worked on: they are counted once, at the end.
            if is_over || storage::targets::is_settled(&mut conn, stored.id, stored.version).await? {
                return shown(&mut conn, stored).await;
            }
            drop(conn);
            tokio::time::sleep_until(deadline.min(Instant::now() + pause)).await;
            let crowd = u32::try_from(Arc::strong_count(&waiting).div_ceil(LOOKING)).unwrap_or(u32::MAX);
            pause = (pause * 2).min(LOOK_INTERVAL.saturating_mul(crowd));
        }
    }
}

/// The accounts that a declaration names.
fn named(declaration: &Declaration) -> Vec<Resource> {
    match &declaration.accounts {
        AccountSelection::Names(names) => names.iter().map(Resource::account).collect(),
        AccountSelection::Selector(_) => Vec::new(),
    }
}

async fn shown(conn: &mut PgConnection, stored: StoredPullSecret) -> Result<ShownPullSecret, ServiceError> {
    let counts = storage::targets::count(conn, &[stored.id]).await?.pop().unwrap_or_default();
    let comparisons = storage::targets::comparisons(conn, stored.id).await?;
    Ok(ShownPullSecret { stored, counts, comparisons })
}

fn not_found(name: &Name) -> ServiceError {
    ServiceError::NotFound { kind: KIND, name: name.to_string() }
}

/// The pull secret, if it is there for this caller.
async fn granted(conn: &mut PgConnection, caller: &Identity, name: &Name) -> Result<StoredPullSecret, ServiceError> {
    let found = storage::pull_secrets::find(conn, name).await?;
    let is_there = found.is_some();
    // Looked at as if there were one where there is none, so that nobody can tell by the time.
    match visible(conn, caller, found.into_iter().collect()).await?.pop() {
        Some(stored) => Ok(stored),
        None if is_there => Err(ServiceError::Hidden { kind: KIND, name: name.to_string() }),
        None => Err(not_found(name)),
    }
}

/// What is there under a name that is to be declared, locked; refused where it cannot become that.
async fn current(
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
        let detail = "cannot be changed: declare another pull secret of that name, and delete this one";
        return Err(vec![FieldError::new("secret.name", detail)].into());
    }
    Ok(Some(existing))
}

/// Those of them that the caller may see: all that they name is granted to him.
pub(super) async fn visible(
    conn: &mut PgConnection,
    caller: &Identity,
    found: Vec<StoredPullSecret>,
) -> Result<Vec<StoredPullSecret>, ServiceError> {
    let grants = &caller.grants;
    let mut found: Vec<StoredPullSecret> =
        found.into_iter().filter(|one| one.declaration.places_within(grants)).collect();
    if grants.include_accounts_with(&BTreeMap::new()) {
        return Ok(found);
    }
    let used: BTreeSet<&str> = found.iter().flat_map(|one| account_names(&one.declaration)).collect();
    let used: Vec<&str> = used.into_iter().collect();
    let accounts = storage::pull_secrets::look_at_accounts(conn, &used).await?;
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

/// The ids of the accounts and clusters that a declaration names. To the caller, one that is not granted is one that does not
/// exist.
async fn references(
    conn: &mut PgConnection,
    caller: &Identity,
    declaration: &Declaration,
) -> Result<(Vec<Uuid>, BTreeMap<String, Uuid>), ServiceError> {
    let grants = &caller.grants;
    let mut errors = FieldErrors::default();
    let mut unknown = Vec::new();
    let names = account_names(declaration);
    let found = storage::pull_secrets::find_accounts(conn, &names).await?;
    let found: BTreeMap<String, Uuid> = found
        .into_iter()
        .filter(|account| grants.include_account(&account.name, &account.labels))
        .map(|account| (account.name, account.id))
        .collect();
    for (index, name) in names.iter().enumerate() {
        if !found.contains_key(*name) {
            errors.refuse(&format!("accounts[{index}]"), format!("there is no registry account named `{name}`"));
            unknown.extend(Name::parse(name));
        }
    }
    if let Some(selector) = declaration.account_selector()
        && !grants.include_accounts_with(selector.match_labels().as_map())
    {
        let detail = "selects more than is granted to you: `matchLabels` must hold all labels of one of your grants";
        errors.refuse("accountSelector", detail);
    }
    let clusters: Vec<&str> = declaration.clusters().into_keys().map(Name::as_str).collect();
    let clusters = storage::pull_secrets::find_clusters(conn, &clusters).await?;
    refuse_targets(&mut errors, grants, declaration, &clusters);
    errors
        .finish(|| Some((found.into_values().collect(), clusters)))
        .map_err(|errors| ServiceError::UnknownAccounts { errors, names: unknown })
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
                let detail = "needs a grant of all namespaces: whoever edits a namespace decides its labels";
                errors.refuse(&format!("targets[{index}].namespaceSelector"), detail);
            }
            Namespaces::Selected { .. } => {}
        }
    }
}

/// What happened to an account.
pub(super) enum AccountTransition<'a> {
    Made(&'a Account),
    Changed { before: &'a Account, after: &'a Account, has_new_password: bool },
    Removed(&'a Account),
}

impl<'a> AccountTransition<'a> {
    fn before(&self) -> Option<&'a Account> {
        match self {
            Self::Made(_) => None,
            Self::Changed { before, .. } | Self::Removed(before) => Some(before),
        }
    }

    fn after(&self) -> Option<&'a Account> {
        match self {
            Self::Made(after) | Self::Changed { after, .. } => Some(after),
            Self::Removed(_) => None,
        }
    }

    /// Whether a docker config with the account looks different.
    fn shows(&self) -> bool {
        match self {
            Self::Made(_) | Self::Removed(_) => true,
            Self::Changed { before, after, has_new_password } => {
                *has_new_password
                    || before.registry != after.registry
                    || before.username != after.username
                    || before.email != after.email
            }
        }
    }

    /// The account whose users by name get another docker config. Nothing names one that is made or removed.
    fn named(&self) -> Option<Uuid> {
        match self {
            Self::Changed { after, .. } if self.shows() => Some(after.id),
            _ => None,
        }
    }

    /// Whether what somebody selects by label may give another docker config.
    fn may_concern_selectors(&self) -> bool {
        self.shows() || self.before().map(|account| &account.labels) != self.after().map(|account| &account.labels)
    }

    /// Whether what this selector selects gives another docker config.
    fn concerns(&self, selector: &LabelSelector) -> bool {
        let selects =
            |account: Option<&Account>| account.is_some_and(|account| selector.matches(account.labels.as_map()));
        let (was, is) = (selects(self.before()), selects(self.after()));
        was != is || (is && self.shows())
    }
}

/// Raises the generation of everything that uses accounts to which something happened: once, and all at a time, so that two who
/// do so never wait for each other in a circle. Within the transaction of that change; whoever calls has taken
/// [`storage::pull_secrets::lock_selectors_shared`] before.
pub(super) async fn follow_accounts(
    conn: &mut PgConnection,
    transitions: &[AccountTransition<'_>],
) -> Result<(), ServiceError> {
    let named: Vec<Uuid> = transitions.iter().filter_map(AccountTransition::named).collect();
    let mut ids = BTreeSet::new();
    if !named.is_empty() {
        ids.extend(storage::pull_secrets::ids_naming(conn, &named).await?);
    }
    let transitions: Vec<_> = transitions.iter().filter(|one| one.may_concern_selectors()).collect();
    let accounts = transitions.iter().flat_map(|one| [one.before(), one.after()]).flatten();
    let labels: BTreeSet<_> = accounts.map(|account| account.labels.as_map()).collect();
    if !labels.is_empty() {
        let labels: Vec<_> = labels.into_iter().collect();
        let selecting = storage::pull_secrets::selecting(conn, &labels).await?.into_iter();
        let concerned = selecting.filter(|(_, selector)| transitions.iter().any(|one| one.concerns(selector)));
        ids.extend(concerned.map(|(id, _)| id));
    }
    let ids: Vec<Uuid> = ids.into_iter().collect();
    Ok(storage::pull_secrets::bump_generation(conn, &ids).await?)
}

/// Refuses to delete what pull secrets use, and says which; of those that the caller may not see, how many.
pub(super) async fn refuse_used(
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
