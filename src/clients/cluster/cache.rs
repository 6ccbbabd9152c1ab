//! Clients that are kept between calls, so that TLS connections are used again.

use std::{collections::HashMap, fmt, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use uuid::Uuid;

use super::ClusterClient;

/// How long a client stays after its last use.
const IDLE: Duration = Duration::from_mins(10);

/// The clients of clusters that were called lately, at most one for each cluster.
///
/// A kept client holds its cluster's credential in memory, inside kube. This is the one exception to the rule that plaintext is
/// never cached: the credential is part of every request on a connection, and a new connection for each Secret would cost a TLS
/// handshake, ten times the call itself. The exception is kept small: bounded in number, gone ten minutes after its last use (looked
/// at whenever a cluster is connected), and gone at once when the cluster's version changes or [`remove`](Self::remove) is called.
pub struct ClusterClients {
    capacity: usize,
    idle: Duration,
    kept: Mutex<HashMap<Uuid, Kept>>,
}

struct Kept {
    version: i64,
    client: ClusterClient,
    used: Instant,
}

impl ClusterClients {
    /// Makes room for so many clients, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), idle: IDLE, kept: Mutex::new(HashMap::new()) }
    }

    /// Gives the kept client of this version of a cluster, or connects and keeps a new one in place of an older version's.
    ///
    /// `connect` runs outside the lock, so that clusters do not wait for each other. A caller who comes with an older version than the
    /// kept one gets a client of its own, which is not kept.
    ///
    /// # Errors
    ///
    /// What `connect` returns; nothing is kept then.
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
        Ok(self.keep(id, version, client))
    }

    /// Forgets the client of a cluster, as after its deletion.
    pub fn remove(&self, id: Uuid) {
        self.lock().remove(&id);
    }

    fn get(&self, id: Uuid, version: i64) -> Option<ClusterClient> {
        let mut kept = self.lock();
        let entry = kept.get_mut(&id).filter(|entry| entry.version == version)?;
        entry.used = Instant::now();
        Some(entry.client.clone())
    }

    fn keep(&self, id: Uuid, version: i64, client: ClusterClient) -> ClusterClient {
        let now = Instant::now();
        let mut kept = self.lock();
        kept.retain(|_, entry| now.duration_since(entry.used) < self.idle);
        match kept.get(&id) {
            Some(entry) if entry.version == version => return entry.client.clone(),
            Some(entry) if entry.version > version => return client,
            None if kept.len() >= self.capacity => {
                let oldest = kept.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| *id);
                oldest.and_then(|id| kept.remove(&id));
            }
            Some(_) | None => {}
        }
        kept.insert(id, Kept { version, client: client.clone(), used: now });
        client
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Kept>> {
        // Nothing in here can panic halfway through a change.
        self.kept.lock()
    }
}

impl fmt::Debug for ClusterClients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterClients").field("kept", &self.lock().len()).finish_non_exhaustive()
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

    /// Counts how often a client had to be made.
    struct Uses {
        clients: ClusterClients,
        made: Cell<usize>,
    }

    impl Uses {
        fn new(clients: ClusterClients) -> Self {
            Self { clients, made: Cell::new(0) }
        }

        /// Asks for a client and tells how many were made so far.
        fn ask(&self, id: u128, version: i64) -> usize {
            let made: Result<ClusterClient, ClusterError> =
                self.clients.get_or_connect(Uuid::from_u128(id), version, || {
                    self.made.set(self.made.get() + 1);
                    Ok(client())
                });
            made.unwrap();
            self.made.get()
        }
    }

    fn client() -> ClusterClient {
        let connection =
            ClusterConnection::new(Some("http://127.0.0.1:1"), None, None, ClusterAuth::None, true).unwrap();
        ClusterClient::connect(&connection, &ClusterClientConfig::default()).unwrap()
    }

    #[tokio::test]
    async fn a_client_is_used_again_until_its_cluster_changes() {
        let uses = Uses::new(ClusterClients::new(8));
        assert_eq!((uses.ask(1, 1), uses.ask(1, 1)), (1, 1));
        assert_eq!((uses.ask(1, 2), uses.ask(1, 2)), (2, 2));
        // One who still knows the old version does not undo the change.
        assert_eq!((uses.ask(1, 1), uses.ask(1, 2)), (3, 3));
        uses.clients.remove(Uuid::from_u128(1));
        assert_eq!(uses.ask(1, 2), 4);
    }

    #[tokio::test]
    async fn the_one_not_used_for_longest_makes_room() {
        let uses = Uses::new(ClusterClients::new(2));
        assert_eq!((uses.ask(1, 1), uses.ask(2, 1), uses.ask(1, 1), uses.ask(3, 1)), (1, 2, 2, 3));
        assert_eq!((uses.ask(1, 1), uses.ask(2, 1)), (3, 4));
        assert_eq!(format!("{:?}", uses.clients), "ClusterClients { kept: 2, .. }");
    }

    #[tokio::test]
    async fn idle_clients_go() {
        let uses = Uses::new(ClusterClients { idle: Duration::ZERO, ..ClusterClients::new(8) });
        uses.ask(1, 1);
        uses.ask(2, 1);
        assert_eq!(uses.clients.lock().len(), 1);
    }

    #[tokio::test]
    async fn what_cannot_be_connected_is_not_kept() {
        let clients = ClusterClients::new(8);
        let refused = clients.get_or_connect(Uuid::nil(), 1, || Err("sealed under an unknown key"));
        assert_eq!(refused.map(|_| ()), Err("sealed under an unknown key"));
        assert!(clients.lock().is_empty());
    }
}
