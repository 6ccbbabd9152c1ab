//! Publishes the progress of pull secrets to event streams.
//!
//! A notification per recorded result would slow down every commit, so ids are batched for a
//! quarter of a second. One connection per process listens for all of its streams. Streams also
//! poll, so a lost notification delays an event but loses none.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    domain::{
        caller::{Actor, Identity},
        names::Name,
    },
    service::{
        ServiceError, connection,
        pull_secrets::{PullSecrets, ShownPullSecret},
    },
    storage::{
        self, PgPool,
        wakeups::{Progress, ProgressListener},
    },
};

/// Time that progress is batched before it is published.
const BATCH_WINDOW: Duration = Duration::from_millis(250);
/// Time limit of a connect to Postgres.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a failed connect.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which the listener checks whether a stream is left.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// Open streams per caller.
const STREAMS_PER_CALLER: usize = 16;
/// Open streams per process.
const STREAMS_PER_PROCESS: usize = 256;
/// Concurrent reads of all streams. The remaining database connections serve requests.
const READS_CONCURRENCY: usize = 4;

/// Publishes which pull secrets made progress.
#[derive(Clone, Default)]
pub struct ProgressPublisher(Arc<Pending>);

#[derive(Default)]
struct Pending {
    ids: Mutex<BTreeSet<Uuid>>,
    added: Notify,
}

impl ProgressPublisher {
    /// Adds a pull secret to the next notification.
    pub fn add(&self, id: Uuid) {
        if self.0.ids.lock().insert(id) {
            self.0.added.notify_one();
        }
    }

    /// Publishes notifications while it is polled.
    pub async fn run(&self, pool: &PgPool) {
        loop {
            self.0.added.notified().await;
            tokio::time::sleep(BATCH_WINDOW).await;
            let ids: Vec<Uuid> = std::mem::take(&mut *self.0.ids.lock()).into_iter().collect();
            if ids.is_empty() {
                continue;
            }
            if let Err(error) = announce(pool, &ids).await {
                tracing::debug!(%error, "progress not published");
            }
        }
    }
}

async fn announce(pool: &PgPool, ids: &[Uuid]) -> Result<(), ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(storage::wakeups::announce_progress(&mut conn, ids).await?)
}

/// Caller of a stream: id and name.
type StreamCaller = (Option<Uuid>, String);

/// Event streams of the process.
pub struct Streams {
    pool: PgPool,
    pull_secrets: PullSecrets,
    open: Mutex<HashMap<StreamCaller, usize>>,
    /// Subscriptions by pull secret.
    subscriptions: Mutex<HashMap<Uuid, watch::Sender<()>>>,
    subscribed: Notify,
    reads: Semaphore,
    stopping: CancellationToken,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("open", &self.open()).finish_non_exhaustive()
    }
}

/// Permit of an open stream. Dropping it frees the slot.
pub struct StreamPermit {
    streams: Arc<Streams>,
    caller: StreamCaller,
}

/// Subscription of a stream to the progress of its pull secret.
pub struct Subscription {
    streams: Arc<Streams>,
    id: Uuid,
    receiver: watch::Receiver<()>,
}

impl Streams {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, pull_secrets: PullSecrets) -> Self {
        Self {
            pool,
            pull_secrets,
            open: Mutex::default(),
            subscriptions: Mutex::default(),
            subscribed: Notify::new(),
            reads: Semaphore::new(READS_CONCURRENCY),
            stopping: CancellationToken::new(),
        }
    }

    /// Number of open streams.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.lock().values().sum()
    }

    /// Takes a permit for a stream of this caller.
    ///
    /// # Errors
    ///
    /// [`ServiceError::TooManyStreams`] if the caller has too many,
    /// [`ServiceError::StreamsExhausted`] if the process has.
    pub fn admit(self: &Arc<Self>, actor: &Actor) -> Result<StreamPermit, ServiceError> {
        let caller = (actor.id, actor.name.clone());
        let mut open = self.open.lock();
        if open.values().sum::<usize>() >= STREAMS_PER_PROCESS {
            return Err(ServiceError::StreamsExhausted);
        }
        let count = open.entry(caller.clone()).or_default();
        if *count >= STREAMS_PER_CALLER {
            return Err(ServiceError::TooManyStreams { most: STREAMS_PER_CALLER });
        }
        *count += 1;
        drop(open);
        Ok(StreamPermit { streams: Arc::clone(self), caller })
    }

    /// Subscribes to the progress of a pull secret.
    #[must_use]
    pub fn subscribe(self: &Arc<Self>, id: Uuid) -> Subscription {
        let receiver = self.subscriptions.lock().entry(id).or_insert_with(|| watch::channel(()).0).subscribe();
        self.subscribed.notify_one();
        Subscription { streams: Arc::clone(self), id, receiver }
    }

    /// Reads a pull secret for a stream.
    ///
    /// # Errors
    ///
    /// As [`PullSecrets::find`].
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<ShownPullSecret, ServiceError> {
        // The semaphore is never closed.
        let _permit = self.reads.acquire().await.ok();
        self.pull_secrets.find(caller, name).await
    }

    /// Ends all streams.
    pub fn stop(&self) {
        self.stopping.cancel();
    }

    /// Waits for [`stop`](Self::stop).
    pub async fn stopped(&self) {
        self.stopping.cancelled().await;
    }

    /// Listens for progress while it is polled and streams are open.
    pub async fn follow(&self) {
        loop {
            self.subscribed.notified().await;
            while self.has_subscriptions() {
                match ProgressListener::connect(&self.pool, CONNECT_TIMEOUT).await {
                    Ok(listener) => {
                        // Earlier progress was missed.
                        self.dispatch(&Progress::OfAny);
                        self.listen(listener).await;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "progress listener interrupted");
                        tokio::time::sleep(RECONNECT_INTERVAL).await;
                    }
                }
            }
        }
    }

    async fn listen(&self, mut listener: ProgressListener) {
        while self.has_subscriptions() {
            match listener.next(IDLE_INTERVAL).await {
                Ok(Some(progress)) => self.dispatch(&progress),
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }

    fn has_subscriptions(&self) -> bool {
        !self.subscriptions.lock().is_empty()
    }

    fn dispatch(&self, progress: &Progress) {
        let subscriptions = self.subscriptions.lock();
        match progress {
            Progress::Of(ids) => {
                ids.iter().filter_map(|id| subscriptions.get(id)).for_each(|one| one.send_modify(|()| {}));
            }
            Progress::OfAny => subscriptions.values().for_each(|one| one.send_modify(|()| {})),
        }
    }
}

impl StreamPermit {
    /// The streams that this one belongs to.
    #[must_use]
    pub fn streams(&self) -> &Arc<Streams> {
        &self.streams
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut open = self.streams.open.lock();
        if let Some(count) = open.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.caller);
            }
        }
    }
}

impl Subscription {
    /// Waits for progress since the last call.
    pub async fn next(&mut self) {
        if self.receiver.changed().await.is_err() {
            // Unreachable: the sender lives as long as a subscription.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut subscriptions = self.streams.subscriptions.lock();
        if subscriptions.get(&self.id).is_some_and(|sender| sender.receiver_count() <= 1) {
            subscriptions.remove(&self.id);
        }
    }
}
