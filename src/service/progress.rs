//! Who is told how pull secrets get on, while they do: the worker says of which something was stored, and streams of events hear
//! of it.
//!
//! A notification for each row of a fan-out would hold up every commit. So what was stored is gathered, and told a few times a
//! second; and one connection of the process hears it for all of its streams. What is not heard is found by looking.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use sqlx::PgPool;
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
        self,
        pull_secrets::{Progress, ProgressListener},
    },
};

/// How long progress is gathered before it is told.
const GATHERED: Duration = Duration::from_millis(250);
/// How long it may take to connect to Postgres, and how long to wait before it is tried again.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// How soon the connection is given up that nobody needs any more.
const IDLE_FOR: Duration = Duration::from_secs(1);
/// Streams that one caller, and all callers of a process together, may have open.
const STREAMS_OF_A_CALLER: usize = 16;
const STREAMS_OF_ALL: usize = 256;
/// Looks at pull secrets for streams at a time: the other connections to Postgres are for requests.
const LOOKS: usize = 4;

/// Gathers which pull secrets got on.
#[derive(Clone, Default)]
pub struct Announcer(Arc<Gathered>);

#[derive(Default)]
struct Gathered {
    ids: Mutex<BTreeSet<Uuid>>,
    noted: Notify,
}

impl Announcer {
    /// Notes that something was stored about a pull secret.
    pub fn note(&self, id: Uuid) {
        if lock(&self.0.ids).insert(id) {
            self.0.noted.notify_one();
        }
    }

    /// Tells what is noted, for as long as it is polled.
    pub async fn run(&self, pool: &PgPool) {
        loop {
            self.0.noted.notified().await;
            tokio::time::sleep(GATHERED).await;
            let ids: Vec<Uuid> = std::mem::take(&mut *lock(&self.0.ids)).into_iter().collect();
            if ids.is_empty() {
                continue;
            }
            if let Err(error) = announce(pool, &ids).await {
                tracing::debug!(%error, "progress of pull secrets could not be told; who waits for it finds it by looking");
            }
        }
    }
}

async fn announce(pool: &PgPool, ids: &[Uuid]) -> Result<(), ServiceError> {
    let mut conn = connection(pool).await?;
    Ok(storage::pull_secrets::announce_progress(&mut conn, ids).await?)
}

/// Whose a stream is.
type Whose = (Option<Uuid>, String);

/// The streams of events of a process.
pub struct Streams {
    pool: PgPool,
    pull_secrets: PullSecrets,
    open: Mutex<HashMap<Whose, usize>>,
    news: Mutex<HashMap<Uuid, watch::Sender<()>>>,
    wanted: Notify,
    looks: Semaphore,
    stopping: CancellationToken,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("open", &self.open()).finish_non_exhaustive()
    }
}

/// The place of a stream, for as long as it lives.
pub struct Place {
    streams: Arc<Streams>,
    whose: Whose,
}

/// What a stream hears about its pull secret.
pub struct News {
    streams: Arc<Streams>,
    id: Uuid,
    receiver: watch::Receiver<()>,
}

impl Streams {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, pull_secrets: PullSecrets) -> Self {
        Self {
            pool,
            pull_secrets,
            open: Mutex::default(),
            news: Mutex::default(),
            wanted: Notify::new(),
            looks: Semaphore::new(LOOKS),
            stopping: CancellationToken::new(),
        }
    }

    /// How many are open.
    #[must_use]
    pub fn open(&self) -> usize {
        lock(&self.open).values().sum()
    }

    /// Takes a place for a stream of this caller.
    ///
    /// # Errors
    ///
    /// [`ServiceError::TooManyStreams`] if he has too many, [`ServiceError::StreamsExhausted`] if all callers have.
    pub fn admit(self: &Arc<Self>, actor: &Actor) -> Result<Place, ServiceError> {
        let whose = (actor.id, actor.name.clone());
        let mut open = lock(&self.open);
        if open.values().sum::<usize>() >= STREAMS_OF_ALL {
            return Err(ServiceError::StreamsExhausted);
        }
        let his = open.entry(whose.clone()).or_default();
        if *his >= STREAMS_OF_A_CALLER {
            return Err(ServiceError::TooManyStreams { most: STREAMS_OF_A_CALLER });
        }
        *his += 1;
        drop(open);
        Ok(Place { streams: Arc::clone(self), whose })
    }

    /// Begins to hear of a pull secret.
    #[must_use]
    pub fn hear(self: &Arc<Self>, id: Uuid) -> News {
        let receiver = lock(&self.news).entry(id).or_insert_with(|| watch::channel(()).0).subscribe();
        self.wanted.notify_one();
        News { streams: Arc::clone(self), id, receiver }
    }

    /// Looks how a pull secret is doing.
    ///
    /// # Errors
    ///
    /// As [`PullSecrets::find`].
    pub async fn look(&self, caller: &Identity, name: &Name) -> Result<ShownPullSecret, ServiceError> {
        // It is closed by nobody.
        let _permit = self.looks.acquire().await.ok();
        self.pull_secrets.find(caller, name).await
    }

    /// Ends all streams, since the process does.
    pub fn stop(&self) {
        self.stopping.cancel();
    }

    /// Waits until the process ends.
    pub async fn stopped(&self) {
        self.stopping.cancelled().await;
    }

    /// Listens for progress for as long as it is polled, while there are streams.
    pub async fn follow(&self) {
        loop {
            self.wanted.notified().await;
            while self.is_wanted() {
                match ProgressListener::connect(&self.pool, CONNECT_WITHIN).await {
                    Ok(listener) => {
                        // What was done before was not heard.
                        self.tell(&Progress::OfAny);
                        self.follow_one(listener).await;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "progress of pull secrets is not heard; streams find it by looking");
                        tokio::time::sleep(RECONNECT_INTERVAL).await;
                    }
                }
            }
        }
    }

    async fn follow_one(&self, mut listener: ProgressListener) {
        while self.is_wanted() {
            match listener.next(IDLE_FOR).await {
                Ok(Some(progress)) => self.tell(&progress),
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }

    fn is_wanted(&self) -> bool {
        !lock(&self.news).is_empty()
    }

    fn tell(&self, progress: &Progress) {
        let news = lock(&self.news);
        match progress {
            Progress::Of(ids) => ids.iter().filter_map(|id| news.get(id)).for_each(|one| one.send_modify(|()| {})),
            Progress::OfAny => news.values().for_each(|one| one.send_modify(|()| {})),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = lock(&self.streams.open);
        if let Some(his) = open.get_mut(&self.whose) {
            *his -= 1;
            if *his == 0 {
                open.remove(&self.whose);
            }
        }
    }
}

impl News {
    /// Waits for news; what came since the last ones counts.
    pub async fn next(&mut self) {
        if self.receiver.changed().await.is_err() {
            // Never: the sender is there for as long as this is.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for News {
    fn drop(&mut self) {
        let mut news = lock(&self.streams.news);
        if news.get(&self.id).is_some_and(|sender| sender.receiver_count() <= 1) {
            news.remove(&self.id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds these can panic halfway through a change.
    mutex.lock()
}
