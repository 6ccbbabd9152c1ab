//! Values that are loaded once for each key.

use std::{collections::HashMap, fmt, hash::Hash, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::OnceCell;

/// Loaded values. Concurrent callers of one key wait for one load; a failed load is not kept.
pub(super) struct Memo<K, V> {
    cells: Mutex<HashMap<K, Arc<OnceCell<V>>>>,
}

impl<K, V> Default for Memo<K, V> {
    fn default() -> Self {
        Self { cells: Mutex::default() }
    }
}

impl<K, V> fmt::Debug for Memo<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memo").field("keys", &self.cells.lock().len()).finish_non_exhaustive()
    }
}

impl<K: Eq + Hash, V: Clone> Memo<K, V> {
    /// Returns the value of a key, loaded by `load` if it is the first one.
    ///
    /// # Errors
    ///
    /// The error of `load`.
    pub(super) async fn get<E>(&self, key: K, load: impl Future<Output = Result<V, E>>) -> Result<V, E> {
        let cell = Arc::clone(self.cells.lock().entry(key).or_default());
        cell.get_or_try_init(|| load).await.cloned()
    }

    /// Returns the value of a key, if it was loaded.
    pub(super) fn known(&self, key: &K) -> Option<V> {
        let cell = self.cells.lock().get(key).map(Arc::clone)?;
        cell.get().cloned()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn value_is_loaded_once_and_an_error_is_not_kept() {
        let (memo, loads) = (Memo::default(), Cell::new(0));
        let load = |result: Result<u8, ()>| {
            let loads = &loads;
            async move {
                loads.set(loads.get() + 1);
                result
            }
        };
        assert_eq!(memo.get("a", load(Err(()))).await, Err(()));
        assert_eq!(memo.get("a", load(Ok(1))).await, Ok(1));
        assert_eq!(memo.get("a", load(Ok(2))).await, Ok(1));
        assert_eq!(memo.get("b", load(Ok(3))).await, Ok(3));
        assert_eq!(loads.get(), 3);
        assert_eq!((memo.known(&"a"), memo.known(&"c")), (Some(1), None));
    }
}
