//! Process-local cache of API key rows and sealed account rows, invalidated by Postgres `NOTIFY`.
//!
//! Most requests need one API key and a few accounts. The cache serves both without a query.
//! Passwords stay sealed: cached rows contain what the tables contain.
//!
//! # Invalidation
//!
//! A trigger on each cached table sends a `NOTIFY` with the row's key when a change commits
//! ([`storage::changes`](crate::storage::changes)). [`RowCache::follow_changes`] listens on a
//! dedicated connection and removes the named row. A missed notification would leave a stale row,
//! so three rules bound that risk:
//!
//! 1. **Trust ends without a heartbeat.** Every second, a notification with a nonce is sent to the
//!    listening connection. Its arrival proves that earlier notifications have arrived, and cached
//!    rows may be used until [`TRUST_DURATION`] after it was sent. If the connection hangs, or a
//!    pooler swallows notifications, the cache stops answering within that time.
//! 2. **A lost connection clears the cache**, and so does a new one: changes in between were not
//!    received.
//! 3. **A read that overlaps an invalidation is not cached.** Each table has an [`Epoch`],
//!    incremented by every invalidation. A reader notes the epoch before its query and inserts the
//!    row only if the epoch is still the same.
//!
//! Without trust, every request reads from Postgres, which is slower and always correct. A process
//! that changes a row itself also calls [`RowCache::invalidate`] after its commit, so that its next
//! request sees the change.
//!
//! # Reads of keys
//!
//! Lookups of uncached keys are batched: at most [`KEY_READS`] queries run at a time, each for all
//! lookups that were waiting when it started. A flood of unknown keys therefore costs a few batched
//! reads and does not exhaust the pool.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use quick_cache::sync::Cache;
use tokio::sync::{Mutex, mpsc, oneshot};
use uuid::Uuid;

use crate::{
    domain::caller::{Identity, KeyVerifier},
    service::{ServiceError, connection},
    storage::{
        self, PgPool, StorageError,
        accounts::SealedCredential,
        api_keys::StoredKey,
        changes::{Change, Listener},
    },
};

/// Time after a successful ping during which cached rows are used.
const TRUST_DURATION: Duration = Duration::from_secs(4);
/// Interval of the pings.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Timeout of a ping, and of connecting.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// Delay before a reconnection.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// Delay before a reconnection if notifications do not arrive. Every attempt leaves a channel
/// behind on a connection of the pooler.
const DEAF_INTERVAL: Duration = Duration::from_secs(30);
/// Maximum number of cached rows per table. A row has at most about one kilobyte.
const ROWS_MAX: usize = 10_000;
/// Maximum number of concurrent reads of keys.
const KEY_READS: usize = 2;
/// Maximum number of keys per read.
const KEYS_PER_READ: usize = 256;
/// Maximum number of waiting lookups.
const PENDING_LOOKUPS_MAX: usize = 10_000;
/// Timeout of a read of keys, for which all new callers wait.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Row of an API key, as of the time of the read.
#[derive(Debug)]
pub struct CachedKey {
    /// Caller that the key authenticates.
    pub identity: Arc<Identity>,
    /// Verifiers of the key's secret.
    pub verifier: KeyVerifier,
    is_revoked: bool,
    /// Expiry, derived from the remaining lifetime by the database's clock.
    expires_at: Option<Instant>,
}

impl CachedKey {
    fn new(stored: StoredKey, read_at: Instant) -> Self {
        let StoredKey { identity, verifier, is_revoked, expires_in_seconds } = stored;
        // An expiry that `Instant` cannot represent is too far away to matter.
        let expires_at = expires_in_seconds.and_then(|seconds| {
            read_at.checked_add(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
        });
        Self { identity: Arc::new(identity), verifier, is_revoked, expires_at }
    }

    /// Whether the key is neither revoked nor expired.
    #[must_use]
    pub fn is_active(&self) -> bool {
        !self.is_revoked && self.expires_at.is_none_or(|expiry| Instant::now() < expiry)
    }
}

/// Pending lookup of a key.
///
/// A read serves only the lookups that were pending when it started, so a lookup sees every
/// revocation that committed before it.
#[derive(Debug)]
struct KeyLookup {
    id: Uuid,
    reply: oneshot::Sender<KeyLookupResult>,
}

type KeyLookupResult = Result<Option<Arc<CachedKey>>, StorageError>;

/// Cached rows of one table.
#[derive(Debug)]
struct Rows<K, V> {
    cache: Cache<K, Arc<V>>,
    /// Number of invalidations.
    epoch: AtomicU64,
}

/// Number of invalidations at the start of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Epoch(u64);

impl<K: Eq + Hash + Clone, V> Rows<K, V> {
    fn new() -> Self {
        Self { cache: Cache::new(ROWS_MAX), epoch: AtomicU64::new(0) }
    }

    /// Returns the current epoch. Call before the read whose row is inserted.
    fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }

    /// Inserts a row that was read since `read_epoch`, unless an invalidation has happened
    /// meanwhile.
    fn insert(&self, read_epoch: Epoch, key: &K, row: &Arc<V>) {
        if self.epoch() != read_epoch {
            return;
        }
        self.cache.insert(key.clone(), Arc::clone(row));
        // An invalidation between the check and the insertion found no row to remove.
        if self.epoch() != read_epoch {
            self.cache.remove(key);
        }
    }

    fn invalidate<Q>(&self, key: &Q)
    where
        Q: Hash + Eq + ?Sized,
        K: std::borrow::Borrow<Q>,
    {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.cache.remove(key);
    }

    fn invalidate_all(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.cache.clear();
    }
}

/// Deadline until which cached rows may be used.
#[derive(Debug)]
struct Trust {
    start: Instant,
    /// Milliseconds after `start`.
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

/// Row cache of one process. See the [module documentation](self).
#[derive(Debug)]
pub struct RowCache {
    pool: PgPool,
    api_keys: Rows<Uuid, CachedKey>,
    lookups: mpsc::Sender<KeyLookup>,
    pending_lookups: Mutex<mpsc::Receiver<KeyLookup>>,
    accounts: Rows<String, SealedCredential>,
    trust: Trust,
    /// State that was logged last.
    logged: parking_lot::Mutex<Option<bool>>,
}

impl RowCache {
    /// Creates an empty cache.
    ///
    /// Uncached keys are only found while [`RowCache::read_keys`] runs, and rows are only cached
    /// while [`RowCache::follow_changes`] runs.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        let (lookups, pending_lookups) = mpsc::channel(PENDING_LOOKUPS_MAX);
        Self {
            pool,
            api_keys: Rows::new(),
            lookups,
            pending_lookups: Mutex::new(pending_lookups),
            accounts: Rows::new(),
            trust: Trust::new(),
            logged: parking_lot::Mutex::default(),
        }
    }

    /// Finds an API key, in the cache or by a batched read.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`], also if too many lookups are pending or the read takes too long.
    pub async fn api_key(&self, id: Uuid) -> Result<Option<Arc<CachedKey>>, ServiceError> {
        if let Some(key) = self.cached_api_key(id) {
            return Ok(Some(key));
        }
        let (reply, answer) = oneshot::channel();
        let unavailable = || StorageError::from(sqlx::Error::PoolTimedOut);
        self.lookups.try_send(KeyLookup { id, reply }).map_err(|_| unavailable())?;
        match tokio::time::timeout(self.pool.acquire_timeout(), answer).await {
            Ok(Ok(found)) => Ok(found?),
            Ok(Err(_)) | Err(_) => Err(unavailable().into()),
        }
    }

    /// Returns the row of an API key if it is cached and may be used.
    #[must_use]
    pub fn cached_api_key(&self, id: Uuid) -> Option<Arc<CachedKey>> {
        self.get(&self.api_keys, &id)
    }

    /// Serves pending lookups of keys. Runs until it is dropped.
    pub async fn read_keys(&self) {
        join_all((0..KEY_READS).map(|_| self.serve_lookups())).await;
    }

    async fn serve_lookups(&self) {
        loop {
            let mut lookups = Vec::new();
            self.pending_lookups.lock().await.recv_many(&mut lookups, KEYS_PER_READ).await;
            lookups.retain(|lookup| !lookup.reply.is_closed());
            if !lookups.is_empty() {
                self.serve_batch(lookups).await;
            }
        }
    }

    /// Reads the keys of all lookups in one query, caches them and replies.
    async fn serve_batch(&self, lookups: Vec<KeyLookup>) {
        let epoch = self.api_keys.epoch();
        let ids: Vec<Uuid> = lookups.iter().map(|lookup| lookup.id).collect::<HashSet<_>>().into_iter().collect();
        let found = self.fetch_api_keys(&ids).await;
        for (id, key) in found.iter().flatten() {
            if let Ok(key) = key {
                self.api_keys.insert(epoch, id, key);
            }
        }
        for KeyLookup { id, reply } in lookups {
            let key = match &found {
                Ok(found) => found.get(&id).map(|key| key.as_ref().map(Arc::clone)).transpose(),
                Err(error) => Err(error),
            };
            // Fails only if the lookup timed out.
            let _ = reply.send(key.map_err(StorageError::duplicate));
        }
    }

    async fn fetch_api_keys(
        &self,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Result<Arc<CachedKey>, StorageError>>, StorageError> {
        let mut conn = connection(&self.pool).await?;
        let read_at = Instant::now();
        let reading = tokio::time::timeout(READ_TIMEOUT, storage::api_keys::find_many(&mut conn, ids));
        let found = reading.await.map_err(|_| StorageError::from(sqlx::Error::PoolTimedOut))?;
        let cached = |stored| Arc::new(CachedKey::new(stored, read_at));
        Ok(found?.into_iter().map(|(id, stored)| (id, stored.map(cached))).collect())
    }

    /// Finds the credentials of accounts, in the cache or in Postgres, in any order. Unknown
    /// accounts and those that are not `is_granted` are omitted.
    ///
    /// An account that is not granted costs the same read as an unknown one, so the response time
    /// does not disclose it.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn credentials(
        &self,
        names: &[&str],
        is_granted: impl Fn(&SealedCredential) -> bool,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        let mut found = Vec::with_capacity(names.len());
        let mut missing = Vec::new();
        for name in names {
            match self.get(&self.accounts, *name).filter(|account| is_granted(account)) {
                Some(account) => found.push(account),
                None => missing.push(*name),
            }
        }
        if !missing.is_empty() {
            found.extend(self.fresh_credentials(&missing, is_granted).await?);
        }
        Ok(found)
    }

    /// Finds the credentials of accounts as [`credentials`](Self::credentials) does, always in
    /// Postgres.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn fresh_credentials(
        &self,
        names: &[&str],
        is_granted: impl Fn(&SealedCredential) -> bool,
    ) -> Result<Vec<Arc<SealedCredential>>, ServiceError> {
        let mut found = Vec::with_capacity(names.len());
        let epoch = self.accounts.epoch();
        let mut conn = connection(&self.pool).await?;
        for account in storage::accounts::find_credentials(&mut conn, names).await? {
            let account = Arc::new(account);
            self.accounts.insert(epoch, &account.name, &account);
            if is_granted(&account) {
                found.push(account);
            }
        }
        Ok(found)
    }

    fn get<K, Q, V>(&self, rows: &Rows<K, V>, key: &Q) -> Option<Arc<V>>
    where
        Q: Hash + Eq + ?Sized,
        K: Eq + Hash + std::borrow::Borrow<Q>,
    {
        self.trust.holds().then(|| rows.cache.get(key)).flatten()
    }

    /// Removes the changed row. Call after the commit of a change in this process; changes of other
    /// processes arrive as notifications.
    pub fn invalidate(&self, change: &Change) {
        match change {
            Change::ApiKey(id) => self.api_keys.invalidate(id),
            Change::RegistryAccount(name) => self.accounts.invalidate(name.as_str()),
            Change::Many => self.invalidate_all(),
        }
    }

    fn invalidate_all(&self) {
        self.api_keys.invalidate_all();
        self.accounts.invalidate_all();
    }

    /// Whether cached rows may be used.
    pub fn is_trusted(&self) -> bool {
        self.trust.holds()
    }

    /// Follows the changes of cached tables and reconnects as needed. Runs until it is dropped.
    pub async fn follow_changes(&self) {
        loop {
            let end = match Box::pin(Listener::connect(&self.pool, PING_TIMEOUT)).await {
                Ok(Some(listener)) => {
                    // Changes before the connection were not received.
                    self.invalidate_all();
                    self.follow(listener).await
                }
                Ok(None) => End::Deaf,
                Err(error) => End::Lost(error),
            };
            self.trust.end();
            self.invalidate_all();
            self.log_transition(false, Some(&end));
            tokio::time::sleep(if matches!(end, End::Deaf) { DEAF_INTERVAL } else { RECONNECT_INTERVAL }).await;
        }
    }

    /// Follows one connection until it fails.
    async fn follow(&self, mut listener: Listener) -> End {
        loop {
            let pinged_at = Instant::now();
            match listener.ping(PING_TIMEOUT).await {
                Ok(true) => {}
                Ok(false) => return End::Deaf,
                Err(error) => return End::Lost(error),
            }
            while let Some(change) = listener.next_arrived() {
                self.invalidate(&change);
            }
            self.trust.extend(pinged_at + TRUST_DURATION);
            self.log_transition(true, None);
            while let Some(timeout) = PING_INTERVAL.checked_sub(pinged_at.elapsed()) {
                match listener.next(timeout).await {
                    Ok(Some(change)) => self.invalidate(&change),
                    Ok(None) => break,
                    Err(error) => return End::Lost(error),
                }
            }
        }
    }

    /// Logs when following starts or stops, and its first result, not each attempt.
    fn log_transition(&self, is_following: bool, end: Option<&End>) {
        if self.logged.lock().replace(is_following) == Some(is_following) {
            return;
        }
        if is_following {
            tracing::info!("row cache enabled");
        } else {
            let error = end.map(tracing::field::display);
            tracing::warn!(error, "row cache disabled, reading every row from the database");
        }
    }
}

/// Reason why a connection is no longer followed.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Lost(StorageError),
    #[error(
        "notifications do not arrive, as behind a transaction pooler: connect to Postgres directly or through a session \
         pooler"
    )]
    Deaf,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Rows<String, u8> {
        Rows::new()
    }

    #[test]
    fn row_read_before_an_invalidation_is_not_cached_after_it() {
        let rows = rows();
        let epoch = rows.epoch();
        rows.invalidate("a");
        rows.insert(epoch, &"a".to_owned(), &Arc::new(1));
        assert_eq!(rows.cache.get("a"), None);
        rows.insert(rows.epoch(), &"a".to_owned(), &Arc::new(2));
        assert_eq!(rows.cache.get("a").as_deref(), Some(&2));
    }

    #[test]
    fn invalidation_removes_one_row_or_all() {
        let rows = rows();
        for key in ["a", "b"] {
            rows.insert(rows.epoch(), &key.to_owned(), &Arc::new(0));
        }
        rows.invalidate("a");
        assert!(rows.cache.get("a").is_none() && rows.cache.get("b").is_some());
        rows.invalidate_all();
        assert!(rows.cache.get("b").is_none());
    }

    #[test]
    fn trust_starts_with_a_ping_and_can_end() {
        let trust = Trust::new();
        assert!(!trust.holds());
        trust.extend(Instant::now() + Duration::from_mins(1));
        assert!(trust.holds());
        trust.end();
        assert!(!trust.holds());
    }
}
