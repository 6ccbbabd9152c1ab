//! Events of resources for event streams: one reader per process, and a history to resume from.
//!
//! While streams are open, [`EventFeed::follow`] reads the changes that committed since its last
//! read ([`storage::resource_changes`]), twice a second and once for all streams. The last
//! [`EVENTS_MAX`] events are kept; a stream has a place among them and no buffer of its own.
//!
//! The history begins anew if changes may be missing from it: after a restart of Postgres, after
//! [`HISTORY_MAX`] without a read, and after more changes than it takes at once. Then every place is
//! unknown, and each stream tells its client to load again.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use uuid::Uuid;

use self::{
    audience::{Audience, Scope},
    ring::{EVENTS_MAX, Ring},
};
use crate::{
    domain::resource_event::{EventId, ResourceChange, ResourceKind},
    service::{ServiceError, pull_secrets::account_labels},
    storage::{
        self, PgConnection, PgPool,
        resource_changes::{LabelMap, RecordedChange, Snapshot},
    },
};

mod audience;
mod ring;

pub use audience::ResourceEvent;

/// Interval of reads while streams are open.
const READ_INTERVAL: Duration = Duration::from_millis(500);
/// Longest time between two reads of one history. The table keeps changes for longer.
const HISTORY_MAX: Duration = Duration::from_mins(2);
/// Maximum number of changed targets of a pull secret in one read that have an event each.
const TARGETS_MAX: usize = 100;
/// Maximum number of pull secrets whose declarations one read takes into memory.
const PULL_SECRETS_MAX: usize = 1_000;
/// Maximum number of events that a stream takes at a time.
const TAKEN_MAX: usize = 256;

/// Events of resources.
#[derive(Debug)]
pub struct EventFeed {
    pool: PgPool,
    last_read: tokio::sync::Mutex<Option<LastRead>>,
    history: Mutex<Ring<ResourceEvent>>,
    /// Id of the last event.
    end: watch::Sender<EventId>,
    subscribed: Notify,
}

#[derive(Debug)]
struct LastRead {
    snapshot: Snapshot,
    at: Instant,
}

impl EventFeed {
    /// Creates a feed with an empty history.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        let history = Ring::new();
        let end = watch::channel(history.end()).0;
        Self {
            pool,
            last_read: tokio::sync::Mutex::default(),
            history: Mutex::new(history),
            end,
            subscribed: Notify::new(),
        }
    }

    /// Subscribes to the events after `last`, or to all that follow from now on.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn subscribe(self: &Arc<Self>, last: Option<EventId>) -> Result<EventSubscription, ServiceError> {
        // Changes before this read are in the history or visible to its client's next request.
        self.read().await?;
        let end = self.end.subscribe();
        self.subscribed.notify_one();
        let place = last.filter(|id| self.history.lock().continues(*id));
        Ok(EventSubscription { feed: Arc::clone(self), end, place })
    }

    /// Reads changes while streams are open. Runs until it is dropped.
    pub async fn follow(&self) {
        loop {
            self.subscribed.notified().await;
            while self.end.receiver_count() > 0 {
                tokio::time::sleep(READ_INTERVAL).await;
                if let Err(error) = self.read().await {
                    tracing::debug!(%error, "resource changes not read");
                }
            }
        }
    }

    /// Appends the changes since the last read to the history, or begins it anew.
    async fn read(&self) -> Result<(), ServiceError> {
        let mut last_read = self.last_read.lock().await;
        let at = Instant::now();
        let mut tx = storage::resource_changes::begin(&self.pool).await?;
        let snapshot = storage::resource_changes::snapshot(&mut tx).await?;
        let last =
            last_read.as_ref().filter(|last| last.at.elapsed() < HISTORY_MAX && last.snapshot.precedes(&snapshot));
        let limit = i64::try_from(EVENTS_MAX + 1).unwrap_or(i64::MAX);
        let changes = match last {
            Some(last) => storage::resource_changes::since(&mut tx, &last.snapshot, limit).await?,
            None => Vec::new(),
        };
        let events = match last {
            Some(_) if changes.len() <= EVENTS_MAX && pull_secrets(&changes).len() <= PULL_SECRETS_MAX => {
                Some(events_of(&mut tx, changes).await?)
            }
            _ => None,
        };
        // Ends the transaction, which has changed nothing.
        drop(tx);
        *last_read = Some(LastRead { snapshot, at });
        let mut history = self.history.lock();
        match events {
            Some(events) => events.into_iter().for_each(|(event, size)| history.push(event, size)),
            None => *history = Ring::new(),
        }
        let end = history.end();
        self.end.send_if_modified(|known| std::mem::replace(known, end) != end);
        Ok(())
    }
}

/// Creates the events of changes, each with its size in bytes. Reads what decides who may see them.
async fn events_of(
    conn: &mut PgConnection,
    changes: Vec<RecordedChange>,
) -> Result<Vec<(ResourceEvent, usize)>, ServiceError> {
    let mut scopes = Scopes::read(conn, &changes).await?;
    let many = pull_secrets_with_many_targets(&changes);
    let mut announced = HashSet::new();
    let mut events = Vec::with_capacity(changes.len());
    for change in changes {
        let (audience, size) = scopes.audience_of(&change);
        let RecordedChange { kind, resource_id, name, version, generation, targets, .. } = change;
        let event = |change, target| {
            let (name, audience) = (name.clone(), audience.clone());
            ResourceEvent { kind, change, name, version, generation: generation.unwrap_or_default(), target, audience }
        };
        let first = events.len();
        if kind != ResourceKind::Target {
            events.push((event(change.change, None), 0));
        } else if !many.contains(&resource_id) {
            let targets = targets.into_iter().flatten();
            events.extend(targets.map(|target| (event(change.change, Some(target)), 0)));
        } else if announced.insert(resource_id) {
            events.push((event(ResourceChange::Changed, None), 0));
        }
        let added = events.iter_mut().skip(first);
        added.for_each(|(event, size)| *size = event.size());
        if let Some((_, total)) = events.get_mut(first) {
            *total += size;
        }
    }
    Ok(events)
}

/// Ids of the pull secrets that changed, or whose targets did.
fn pull_secrets(changes: &[RecordedChange]) -> BTreeSet<Uuid> {
    let of_pull_secrets =
        |change: &&RecordedChange| matches!(change.kind, ResourceKind::PullSecret | ResourceKind::Target);
    changes.iter().filter(of_pull_secrets).map(|change| change.resource_id).collect()
}

/// Pull secrets with so many changed targets that all of them share one event.
fn pull_secrets_with_many_targets(changes: &[RecordedChange]) -> HashSet<Uuid> {
    let mut counts: HashMap<Uuid, usize> = HashMap::new();
    for change in changes.iter().filter(|change| change.kind == ResourceKind::Target) {
        let count = change.targets.as_ref().map_or(TARGETS_MAX + 1, Vec::len);
        *counts.entry(change.resource_id).or_default() += count;
    }
    counts.into_iter().filter(|(_, count)| *count > TARGETS_MAX).map(|(id, _)| id).collect()
}

/// What the pull secrets of changes name.
struct Scopes {
    /// By id of the pull secret; of a deleted one, the last.
    scopes: HashMap<Uuid, Arc<Scope>>,
    labels: Arc<HashMap<String, LabelMap>>,
    /// Pull secrets whose scope has been counted in the size of an event.
    counted: HashSet<Uuid>,
}

impl Scopes {
    async fn read(conn: &mut PgConnection, changes: &[RecordedChange]) -> Result<Self, ServiceError> {
        let ids: Vec<Uuid> = pull_secrets(changes).into_iter().collect();
        let stored = if ids.is_empty() { Vec::new() } else { storage::pull_secrets::find_many(conn, &ids).await? };
        let past = changes.iter().filter_map(|change| change.declaration_before.as_ref());
        let declarations = || stored.iter().map(|one| &one.declaration).chain(past.clone());
        let mut labels = match declarations().next() {
            Some(_) => account_labels(conn, declarations()).await?,
            None => HashMap::new(),
        };
        let deleted = |change: &&RecordedChange| change.change == ResourceChange::Deleted;
        for change in changes.iter().filter(deleted) {
            if let Some(before) = &change.labels_before {
                labels.entry(change.name.clone()).or_insert_with(|| before.clone());
            }
        }
        let labels = Arc::new(labels);
        let present = stored.into_iter().map(|one| (one.id, Arc::new(Scope::new(one.declaration, &labels, false))));
        let mut scopes: HashMap<Uuid, Arc<Scope>> = present.collect();
        for change in changes.iter().filter(deleted) {
            if let Some(before) = &change.declaration_before {
                scopes.insert(change.resource_id, Arc::new(Scope::new(before.clone(), &labels, true)));
            }
        }
        Ok(Self { scopes, labels, counted: HashSet::new() })
    }

    /// Returns the audience of a change, and its size in bytes where earlier changes do not share
    /// it.
    fn audience_of(&mut self, change: &RecordedChange) -> (Audience, usize) {
        match change.kind {
            ResourceKind::Cluster => (Audience::Cluster, 0),
            ResourceKind::RegistryAccount => {
                let (before, after) = (change.labels_before.clone(), change.labels.clone());
                (Audience::Account { before, after }, 0)
            }
            ResourceKind::PullSecret | ResourceKind::Target => {
                let id = change.resource_id;
                let after = self.scopes.get(&id).cloned();
                let mut size = after.as_ref().filter(|_| self.counted.insert(id)).map_or(0, |scope| scope.size());
                let before = match &change.declaration_before {
                    Some(before) if change.change == ResourceChange::Changed => {
                        let before = Scope::new(before.clone(), &self.labels, true);
                        size += before.size();
                        Some(Arc::new(before))
                    }
                    _ => after.clone(),
                };
                (Audience::PullSecret { before, after }, size)
            }
        }
    }
}

/// Subscription of a stream to events.
#[derive(Debug)]
pub struct EventSubscription {
    feed: Arc<EventFeed>,
    end: watch::Receiver<EventId>,
    /// Last event that was taken; `None` if the client must load again.
    place: Option<EventId>,
}

/// Events that a stream takes.
#[derive(Debug)]
pub enum Taken {
    /// The next events, in order. Empty if there are none.
    Events(Vec<(EventId, Arc<ResourceEvent>)>),
    /// Events may be missing before this place: the client must load again.
    Reset(EventId),
}

impl EventSubscription {
    /// Waits until there is something to take.
    pub async fn changed(&mut self) {
        let place = self.place;
        if self.end.wait_for(|end| Some(*end) != place).await.is_err() {
            // Unreachable: the feed lives as long as a subscription.
            std::future::pending::<()>().await;
        }
    }

    /// Takes the next events.
    pub fn take(&mut self) -> Taken {
        let history = self.feed.history.lock();
        let Some(events) = self.place.and_then(|place| history.after(place, TAKEN_MAX)) else {
            self.place = Some(history.end());
            return Taken::Reset(history.end());
        };
        self.place = events.last().map(|(id, _)| *id).or(self.place);
        Taken::Events(events)
    }

    /// Forgets the place: the next [`take`](Self::take) is a reset.
    pub fn reset(&mut self) {
        self.place = None;
    }

    /// Id of the last event that was taken.
    #[must_use]
    pub fn place(&self) -> Option<EventId> {
        self.place
    }
}
