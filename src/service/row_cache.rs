//! Reads rows of API keys and sealed rows of registry accounts, and remembers them, so that most requests need not ask
//! Postgres. Passwords stay sealed: what is remembered is what stands in the row.
//!
//! What is remembered is right because Postgres announces every change of these rows at its commit
//! ([`storage::changes`](crate::storage::changes)), and because of three rules:
//!
//! - It counts only while the connection on which changes are announced is known to live: for [`TRUSTED_FOR`] after the
//!   last question that was answered on it. So a connection that hangs bounds what can be missed, whatever TCP believes.
//! - When that connection is lost, all is dropped, and again when there is a new one.
//! - A read that began before a change was heard of is not remembered after it.
//!
//! While there is no such connection, every request asks Postgres, which is always right.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use quick_cache::sync::Cache;
use sqlx::PgPool;
use tokio::sync::{Mutex, mpsc, oneshot};
use uuid::Uuid;

use crate::{
    domain::caller::{Identity, KeyVerifier},
    service::{ServiceError, connection},
    storage::{
        self, StorageError,
        accounts::SealedCredential,
        api_keys::StoredKey,
        changes::{Change, Listener},
        pool::STATEMENT_MAX,
    },
};

/// How long after a sign of life of the announcing connection what is remembered counts.
const TRUSTED_FOR: Duration = Duration::from_secs(4);
/// How often a sign of life is asked for.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// How long it may take, and how long connecting may.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// How long to wait before connecting again.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// The most rows of a kind, a kilobyte or less each.
const ROWS_MAX: usize = 10_000;
/// How many reads of keys are under way at a time. Who asks meanwhile waits for the next one, which is for all who wait: so a flood of
/// keys that there are not is a few reads, and keeps nobody waiting for much longer than two of them take.
const KEY_READS: usize = 2;
/// How many keys a read is for.
const KEYS_AT_A_TIME: usize = 256;
/// How many may wait for a read.
const WAITING_MAX: usize = 10_000;
/// How long a read may take: longer than Postgres lets a statement take, so that this ends only what gets no answer at all.
const READ_MAX: Duration = Duration::from_secs(STATEMENT_MAX.as_secs() + 5);

/// A key's row, as it was when it was read.
#[derive(Debug)]
pub struct KnownKey {
    /// Whom the key stands for.
    pub identity: Arc<Identity>,
    /// What a shown key is checked against.
    pub verifier: KeyVerifier,
    is_revoked: bool,
    /// By the database's clock: the time that was left when the row was read.
    ends_at: Option<Instant>,
}

impl KnownKey {
    fn new(stored: StoredKey, asked_at: Instant) -> Self {
        let StoredKey { identity, verifier, is_revoked, expires_in_seconds } = stored;
        // What is too far away to be counted is never.
        let ends_at = expires_in_seconds.and_then(|seconds| {
            asked_at.checked_add(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
        });
        Self { identity: Arc::new(identity), verifier, is_revoked, ends_at }
    }

    /// Neither revoked nor expired.
    #[must_use]
    pub fn is_active(&self) -> bool {
        !self.is_revoked && self.ends_at.is_none_or(|end| Instant::now() < end)
    }
}

/// Somebody who waits for the row of a key. A read is for those alone who asked before it began: what is revoked before somebody asks
/// is revoked for him.
#[derive(Debug)]
struct WaitingKey {
    id: Uuid,
    tell: oneshot::Sender<LookedUp>,
}

/// What he is told.
type LookedUp = Result<Option<Arc<KnownKey>>, StorageError>;

/// The rows of one kind.
#[derive(Debug)]
struct Rows<K, V> {
    cache: Cache<K, Arc<V>>,
    /// How many changes were heard of.
    changes: AtomicU64,
}

/// The state of the rows when a read began.
#[derive(Debug, Clone, Copy)]
struct Ticket(u64);

impl<K: Eq + Hash + Clone, V> Rows<K, V> {
    fn new() -> Self {
        Self { cache: Cache::new(ROWS_MAX), changes: AtomicU64::new(0) }
    }

    /// To be taken before a read.
    fn ticket(&self) -> Ticket {
        Ticket(self.changes.load(Ordering::SeqCst))
    }

    fn remember(&self, Ticket(before): Ticket, key: &K, row: &Arc<V>) {
        if self.changes.load(Ordering::SeqCst) != before {
            return;
        }
        self.cache.insert(key.clone(), Arc::clone(row));
        // A change between the look and the insertion has found nothing to drop.
        if self.changes.load(Ordering::SeqCst) != before {
            self.cache.remove(key);
        }
    }

    fn forget<Q>(&self, key: &Q)
    where
        Q: Hash + Eq + ?Sized,
        K: std::borrow::Borrow<Q>,
    {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.cache.remove(key);
    }

    fn forget_all(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.cache.clear();
    }
}

/// Until when what is remembered counts.
#[derive(Debug)]
struct Trust {
    start: Instant,
    /// Milliseconds after the start.
    until: AtomicU64,
}

impl Trust {
    fn new() -> Self {
        Self { start: Instant::now(), until: AtomicU64::new(0) }
    }

    fn extend(&self, until: Instant) {
        let millis = u64::try_from((until - self.start).as_millis()).unwrap_or(0);
        self.until.store(millis, Ordering::SeqCst);
    }

    fn end(&self) {
        self.until.store(0, Ordering::SeqCst);
    }

    fn holds(&self) -> bool {
        self.start.elapsed().as_millis() < u128::from(self.until.load(Ordering::SeqCst))
    }
}

/// The memory of one process.
#[derive(Debug)]
pub struct RowCache {
    pool: PgPool,
    api_keys: Rows<Uuid, KnownKey>,
    /// Where rows of keys are asked for, and those who wait for them.
    asked_for: mpsc::Sender<WaitingKey>,
    waiting_keys: Mutex<mpsc::Receiver<WaitingKey>>,
    accounts: Rows<String, SealedCredential>,
    trust: Trust,
    is_followed: AtomicBool,
}

impl RowCache {
    /// Makes a memory that reads through this pool. It finds no key until [`RowCache::read_keys`] runs, and remembers nothing until
    /// [`RowCache::follow_changes`] does.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        let (asked_for, waiting_keys) = mpsc::channel(WAITING_MAX);
        Self {
            pool,
            api_keys: Rows::new(),
            asked_for,
            waiting_keys: Mutex::new(waiting_keys),
            accounts: Rows::new(),
            trust: Trust::new(),
            is_followed: AtomicBool::new(false),
        }
    }

    /// Finds the row of an API key.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn api_key(&self, id: Uuid) -> Result<Option<Arc<KnownKey>>, ServiceError> {
        if let Some(known) = self.recall_api_key(id) {
            return Ok(Some(known));
        }
        let (tell, told) = oneshot::channel();
        let unavailable = || StorageError::from(sqlx::Error::PoolTimedOut);
        self.asked_for.try_send(WaitingKey { id, tell }).map_err(|_| unavailable())?;
        match tokio::time::timeout(self.pool.options().get_acquire_timeout(), told).await {
            Ok(Ok(found)) => Ok(found?),
            Ok(Err(_)) | Err(_) => Err(unavailable().into()),
        }
    }

    /// Reads the rows of keys that are asked for, for as long as it is polled. Without it no key is found.
    pub async fn read_keys(&self) {
        join_all((0..KEY_READS).map(|_| self.keep_reading_keys())).await;
    }

    async fn keep_reading_keys(&self) {
        loop {
            let mut waiting = Vec::new();
            self.waiting_keys.lock().await.recv_many(&mut waiting, KEYS_AT_A_TIME).await;
            waiting.retain(|one| !one.tell.is_closed());
            if !waiting.is_empty() {
                self.read_api_keys(waiting).await;
            }
        }
    }

    /// Reads rows of keys for all who asked for them before, and tells them.
    async fn read_api_keys(&self, waiting: Vec<WaitingKey>) {
        let ticket = self.api_keys.ticket();
        let ids: Vec<Uuid> = waiting.iter().map(|one| one.id).collect::<HashSet<_>>().into_iter().collect();
        let found = self.stored_api_keys(&ids).await;
        if let Ok(found) = &found {
            for (id, known) in found {
                if let Ok(known) = known {
                    self.api_keys.remember(ticket, id, known);
                }
            }
        }
        for WaitingKey { id, tell } in waiting {
            let known = match &found {
                Ok(found) => found.get(&id).map(|known| known.as_ref().map(Arc::clone)).transpose(),
                Err(error) => Err(error),
            };
            // Who does not wait any more need not be told.
            let _ = tell.send(known.map_err(StorageError::duplicate));
        }
    }

    async fn stored_api_keys(
        &self,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Result<Arc<KnownKey>, StorageError>>, StorageError> {
        let mut conn = connection(&self.pool).await?;
        let asked_at = Instant::now();
        let Ok(found) = tokio::time::timeout(READ_MAX, storage::api_keys::find_many(&mut conn, ids)).await else {
            conn.close_on_drop();
            return Err(sqlx::Error::PoolTimedOut.into());
        };
        let known = |stored| Arc::new(KnownKey::new(stored, asked_at));
        Ok(found?.into_iter().map(|(id, stored)| (id, stored.map(known))).collect())
    }

    /// Finds the row of an API key without asking Postgres, if it is remembered.
    #[must_use]
    pub fn recall_api_key(&self, id: Uuid) -> Option<Arc<KnownKey>> {
        self.recall(&self.api_keys, &id)
    }

    /// Finds the credentials of these accounts, in no particular order, as far as there are any and they are `granted`.
    ///
    /// What is there and not granted costs the same read as what is not there, so that nobody can tell by the time.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked or a row is damaged.
    pub async fn credentials(
        &self,
        names: &[&str],
        granted: impl Fn(&SealedCredential) -> bool,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        let mut found = Vec::with_capacity(names.len());
        let mut missing = Vec::new();
        for name in names {
            match self.recall(&self.accounts, *name).filter(|account| granted(account)) {
                Some(account) => found.push(account),
                None => missing.push(*name),
            }
        }
        if !missing.is_empty() {
            found.extend(self.stored_credentials(&missing, granted).await?);
        }
        Ok(found)
    }

    /// Finds the credentials of these accounts as [`credentials`](Self::credentials) does, and as they are stored at this
    /// moment.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked or a row is damaged.
    pub async fn stored_credentials(
        &self,
        names: &[&str],
        granted: impl Fn(&SealedCredential) -> bool,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        let mut found = Vec::with_capacity(names.len());
        let ticket = self.accounts.ticket();
        let mut conn = connection(&self.pool).await?;
        for account in storage::accounts::find_credentials(&mut conn, names).await? {
            let account = Arc::new(account);
            self.accounts.remember(ticket, &account.name, &account);
            if granted(&account) {
                found.push(account);
            }
        }
        Ok(found)
    }

    fn recall<K, Q, V>(&self, rows: &Rows<K, V>, key: &Q) -> Option<Arc<V>>
    where
        Q: Hash + Eq + ?Sized,
        K: Eq + Hash + std::borrow::Borrow<Q>,
    {
        self.trust.holds().then(|| rows.cache.get(key)).flatten()
    }

    /// Forgets what a change made wrong. Whoever changes a row in this process says so after the commit, so that his
    /// next request sees it; everybody else's changes are announced.
    pub fn forget(&self, change: &Change) {
        match change {
            Change::ApiKey(id) => self.api_keys.forget(id),
            Change::RegistryAccount(name) => self.accounts.forget(name.as_str()),
            Change::Many => self.forget_all(),
        }
    }

    fn forget_all(&self) {
        self.api_keys.forget_all();
        self.accounts.forget_all();
    }

    /// Whether what is remembered counts.
    pub fn is_trusted(&self) -> bool {
        self.trust.holds()
    }

    /// Listens for changes for as long as it is polled, over connections of its own.
    pub async fn follow_changes(&self) {
        loop {
            let lost = match Listener::connect(&self.pool, PING_TIMEOUT).await {
                Ok(listener) => {
                    // What was read before may have changed unheard.
                    self.forget_all();
                    self.follow(listener).await
                }
                Err(error) => error,
            };
            self.trust.end();
            self.forget_all();
            self.note(false, Some(&lost));
            tokio::time::sleep(RECONNECT_INTERVAL).await;
        }
    }

    /// Follows one connection until it is lost.
    async fn follow(&self, mut listener: Listener) -> StorageError {
        loop {
            let asked_at = Instant::now();
            if let Err(lost) = listener.ping(PING_TIMEOUT).await {
                return lost;
            }
            while let Some(change) = listener.next_arrived() {
                self.forget(&change);
            }
            self.trust.extend(asked_at + TRUSTED_FOR);
            self.note(true, None);
            while let Some(patience) = PING_INTERVAL.checked_sub(asked_at.elapsed()) {
                match listener.next(patience).await {
                    Ok(Some(change)) => self.forget(&change),
                    Ok(None) => break,
                    Err(lost) => return lost,
                }
            }
        }
    }

    /// Logs the turns, not each try.
    fn note(&self, is_followed: bool, error: Option<&StorageError>) {
        if self.is_followed.swap(is_followed, Ordering::SeqCst) == is_followed {
            return;
        }
        let error = error.map(tracing::field::display);
        if is_followed {
            tracing::info!("changes of rows are heard: rows are remembered");
        } else {
            tracing::warn!(error, "changes of rows are not heard any more: every request asks Postgres");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Rows<String, u8> {
        Rows::new()
    }

    #[test]
    fn what_was_read_before_a_change_is_not_remembered_after_it() {
        let rows = rows();
        let ticket = rows.ticket();
        rows.forget("a");
        rows.remember(ticket, &"a".to_owned(), &Arc::new(1));
        assert_eq!(rows.cache.get("a"), None);
        rows.remember(rows.ticket(), &"a".to_owned(), &Arc::new(2));
        assert_eq!(rows.cache.get("a").as_deref(), Some(&2));
    }

    #[test]
    fn what_is_forgotten_is_gone() {
        let rows = rows();
        for key in ["a", "b"] {
            rows.remember(rows.ticket(), &key.to_owned(), &Arc::new(0));
        }
        rows.forget("a");
        assert!(rows.cache.get("a").is_none() && rows.cache.get("b").is_some());
        rows.forget_all();
        assert!(rows.cache.get("b").is_none());
    }

    #[test]
    fn trust_begins_with_a_sign_of_life_and_ends() {
        let trust = Trust::new();
        assert!(!trust.holds());
        trust.extend(Instant::now() + Duration::from_mins(1));
        assert!(trust.holds());
        trust.end();
        assert!(!trust.holds());
    }
}
