//! Cache of cluster clients, which reuses TLS connections between calls.

use std::{collections::HashMap, fmt, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use super::ClusterClient;

/// Time after its last use when a client is dropped.
const IDLE: Duration = Duration::from_mins(10);

/// Cached clients of recently called clusters, at most one for each cluster.
///
/// A cached client holds its cluster's credential in memory, inside kube. This is an exception to
/// the rule that plaintext is never cached: the credential is part of every request, and a new
/// connection for each Secret would cost a TLS handshake, ten times the call itself. The cache is
/// therefore bounded, and a client is dropped ten minutes after its last use (checked whenever a
/// cluster is connected), when the cluster or its credential changes, or by [`remove`](Self::remove).
pub struct ClusterClients {
    capacity: usize,
    idle: Duration,
    cached: Mutex<HashMap<Uuid, Cached>>,
}

struct Cached {
    version: i64,
    client: ClusterClient,
    used: Instant,
}

impl ClusterClients {
    /// Creates a cache for `capacity` clients, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), idle: IDLE, cached: Mutex::new(HashMap::new()) }
    }

    /// Returns the cached client of this version of a cluster, or connects a new one and caches it.
    ///
    /// `connect` runs outside the lock, so that clusters do not wait for each other. A caller with
    /// an older version than the cached one gets a client that is not cached.
    ///
    /// # Errors
    ///
    /// The error of `connect`. Nothing is cached then.
    pub fn get_or_connect<E>(
        &self,
        id: Uuid,
        version: i64,
        connect: impl FnOnce() -> Result<ClusterClient, E>,
    ) -> Result<ClusterClient, E> {
        if let Some(client) = self.get(id, version) {
            return Ok(client);
        }
        let client = connect()?;
        Ok(self.insert(id, version, client))
    }

    /// Removes the client of a cluster.
    pub fn remove(&self, id: Uuid) {
        self.cached.lock().remove(&id);
    }

    fn get(&self, id: Uuid, version: i64) -> Option<ClusterClient> {
        let mut cached = self.cached.lock();
        let entry = cached.get_mut(&id).filter(|entry| entry.version == version)?;
        entry.used = Instant::now();
        Some(entry.client.clone())
    }

    fn insert(&self, id: Uuid, version: i64, client: ClusterClient) -> ClusterClient {
        let now = Instant::now();
        let mut cached = self.cached.lock();
        cached.retain(|_, entry| now.duration_since(entry.used) < self.idle);
        match cached.get(&id) {
            Some(entry) if entry.version == version => return entry.client.clone(),
            Some(entry) if entry.version > version => return client,
            None if cached.len() >= self.capacity => {
                let oldest = cached.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| *id);
                oldest.and_then(|id| cached.remove(&id));
            }
            Some(_) | None => {}
        }
        cached.insert(id, Cached { version, client: client.clone(), used: now });
        client
    }
}

impl fmt::Debug for ClusterClients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterClients").field("cached", &self.cached.lock().len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{
        clients::cluster::{ClusterClientConfig, ClusterError},
        domain::cluster::{ClusterAuth, ClusterConnection},
    };

    /// Counts the clients that the cache had to connect.
    struct Uses {
        clients: ClusterClients,
        connected: Cell<usize>,
    }

    impl Uses {
        fn new(clients: ClusterClients) -> Self {
            Self { clients, connected: Cell::new(0) }
        }

        /// Requests a client and returns the number of clients connected so far.
        fn get(&self, id: u128, version: i64) -> usize {
            let client: Result<ClusterClient, ClusterError> =
                self.clients.get_or_connect(Uuid::from_u128(id), version, || {
                    self.connected.set(self.connected.get() + 1);
                    Ok(client())
                });
            client.unwrap();
            self.connected.get()
        }
    }

    fn client() -> ClusterClient {
        let connection =
            ClusterConnection::new(Some("http://127.0.0.1:1"), None, None, ClusterAuth::None, true).unwrap();
        ClusterClient::connect(&connection, &ClusterClientConfig::default()).unwrap()
    }

    #[tokio::test]
    async fn client_is_reused_until_its_cluster_changes() {
        let uses = Uses::new(ClusterClients::new(8));
        assert_eq!((uses.get(1, 1), uses.get(1, 1)), (1, 1));
        assert_eq!((uses.get(1, 2), uses.get(1, 2)), (2, 2));
        // A caller with the old version does not undo the change.
        assert_eq!((uses.get(1, 1), uses.get(1, 2)), (3, 3));
        uses.clients.remove(Uuid::from_u128(1));
        assert_eq!(uses.get(1, 2), 4);
    }

    #[tokio::test]
    async fn least_recently_used_client_is_evicted() {
        let uses = Uses::new(ClusterClients::new(2));
        assert_eq!((uses.get(1, 1), uses.get(2, 1), uses.get(1, 1), uses.get(3, 1)), (1, 2, 2, 3));
        assert_eq!((uses.get(1, 1), uses.get(2, 1)), (3, 4));
        assert_eq!(format!("{:?}", uses.clients), "ClusterClients { cached: 2, .. }");
    }

    #[tokio::test]
    async fn idle_client_is_dropped() {
        let uses = Uses::new(ClusterClients { idle: Duration::ZERO, ..ClusterClients::new(8) });
        uses.get(1, 1);
        uses.get(2, 1);
        assert_eq!(uses.clients.cached.lock().len(), 1);
    }

    #[tokio::test]
    async fn failed_connection_is_not_cached() {
        let clients = ClusterClients::new(8);
        let refused = clients.get_or_connect(Uuid::nil(), 1, || Err("sealed under an unknown key"));
        assert_eq!(refused.map(|_| ()), Err("sealed under an unknown key"));
        assert!(clients.cached.lock().is_empty());
    }
}
