//! Metrics of the newest snapshots.

use parking_lot::Mutex;

use crate::storage::coverage::usage::ClusterNumbers;

/// Numbers of the newest snapshots, as of the last report of the worker.
#[derive(Debug, Default)]
pub struct CoverageMetrics(Mutex<Vec<ClusterNumbers>>);

impl CoverageMetrics {
    pub(super) fn set(&self, numbers: Vec<ClusterNumbers>) {
        *self.0.lock() = numbers;
    }

    /// Numbers of each cluster with a snapshot.
    #[must_use]
    pub fn clusters(&self) -> Vec<ClusterNumbers> {
        self.0.lock().clone()
    }
}
