//! Limit of the concurrent calls to providers.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

/// Maximum number of concurrent calls, to all providers and to each one. A provider that answers slowly
/// leaves calls to the others.
const CALLS: usize = 8;
const CALLS_PER_PROVIDER: usize = 4;

/// Permits for calls to providers.
pub struct CallPermits {
    all: Arc<Semaphore>,
    /// By the id of the provider, while it is called.
    providers: Mutex<HashMap<Uuid, Arc<Semaphore>>>,
}

impl Default for CallPermits {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(CALLS)), providers: Mutex::default() }
    }
}

impl CallPermits {
    /// Waits for the permits of a call. `None` if a semaphore is closed, which none is.
    pub async fn acquire(&self, provider: Uuid) -> Option<[OwnedSemaphorePermit; 2]> {
        // The provider first: a call that waits for it takes no permit from other providers.
        let own = self.of_provider(provider).acquire_owned().await.ok()?;
        let all = Arc::clone(&self.all).acquire_owned().await.ok()?;
        Some([own, all])
    }

    fn of_provider(&self, provider: Uuid) -> Arc<Semaphore> {
        let mut providers = self.providers.lock();
        // Each permit and each waiter holds its semaphore.
        providers.retain(|_, permits| Arc::strong_count(permits) > 1);
        Arc::clone(providers.entry(provider).or_insert_with(|| Arc::new(Semaphore::new(CALLS_PER_PROVIDER))))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn slow_provider_leaves_calls_to_the_others() {
        let (permits, [slow, one, two]) = (CallPermits::default(), [1, 2, 3].map(Uuid::from_u128));
        let acquire = |provider| permits.acquire(provider).now_or_never().flatten();
        let mut held: Vec<_> = (0..CALLS_PER_PROVIDER).map(|_| acquire(slow).unwrap()).collect();
        assert!(acquire(slow).is_none());
        let others: Vec<_> = (CALLS_PER_PROVIDER..CALLS).map(|_| acquire(one).unwrap()).collect();
        assert!(acquire(two).is_none(), "all calls are in use");

        drop(held.pop());
        assert!(acquire(slow).is_some(), "a permit returns");
        drop((held, others));
        let _last = acquire(two).unwrap();
        assert_eq!(permits.providers.lock().len(), 1, "semaphores without a call are removed");
    }
}
