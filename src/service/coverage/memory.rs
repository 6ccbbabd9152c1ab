//! Memory for the values of Secrets, for all runs of a process.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of values that a process holds at the same time.
pub(super) const VALUES_TOTAL: usize = 16 * 1024 * 1024;
/// Maximum length of the values of one Secret, as the API server limits it.
pub(super) const SECRET_MAX: usize = 1024 * 1024;
/// Bytes that one permit stands for.
const UNIT: usize = 1024;

/// Memory that runs share.
#[derive(Debug, Clone)]
pub(super) struct ValueMemory {
    total: usize,
    free: Arc<Semaphore>,
}

/// A part of the memory, until it is dropped.
#[derive(Debug)]
pub(super) struct Reserved(Option<OwnedSemaphorePermit>);

impl ValueMemory {
    /// Memory of this many bytes.
    pub(super) fn new(total: usize) -> Self {
        Self { total, free: Arc::new(Semaphore::new(total / UNIT)) }
    }

    /// Waits for this many bytes, or for all if there are fewer. The first that waits gets them first. A
    /// holder does not wait for more, so no two wait for each other.
    pub(super) async fn reserve(&self, bytes: usize) -> Reserved {
        // The semaphore is never closed.
        Reserved(Arc::clone(&self.free).acquire_many_owned(units(bytes.min(self.total))).await.ok())
    }
}

impl Reserved {
    /// Returns what is beyond this many bytes.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        if let Some(held) = &mut self.0 {
            let needed = usize::try_from(units(bytes)).unwrap_or(usize::MAX);
            drop(held.split(held.num_permits().saturating_sub(needed)));
        }
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn namespaces_wait_for_the_values_of_others() {
        let memory = ValueMemory::new(10 * UNIT);
        let mut first = memory.reserve(8 * UNIT).await;
        let mut second = Box::pin(memory.reserve(5 * UNIT));
        assert!((&mut second).now_or_never().is_none());

        first.shrink_to(5 * UNIT - 1);

        let second = second.await;
        assert!(memory.reserve(1).now_or_never().is_none());
        drop(first);
        drop(memory.reserve(5 * UNIT).await);
        drop(second);
        // More than there is, is all of it.
        let all = memory.reserve(100 * UNIT).await;
        assert!(memory.reserve(1).now_or_never().is_none());
        drop(all);
        assert_eq!(memory.free.available_permits(), 10);
    }
}
