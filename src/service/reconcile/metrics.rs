//! What the worker counts of its work on pull secrets.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use prometheus_client::metrics::histogram::Histogram;

use crate::storage::targets::Survey;

/// From a tenth of a second, as one Secret takes, to an hour, as a cluster that is away does.
const SECONDS: [f64; 12] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];

/// What is counted.
#[derive(Clone)]
pub struct ReconcileMetrics {
    /// Seconds from a change to its being in order, for each target.
    pub sync_durations: Histogram,
    survey: Arc<Mutex<Option<Survey>>>,
}

impl Default for ReconcileMetrics {
    fn default() -> Self {
        Self { sync_durations: Histogram::new(SECONDS), survey: Arc::default() }
    }
}

impl fmt::Debug for ReconcileMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tally").field("survey", &self.survey()).finish_non_exhaustive()
    }
}

impl ReconcileMetrics {
    /// How all targets are doing, when the worker looked last; none where it does not look.
    #[must_use]
    pub fn survey(&self) -> Option<Survey> {
        *self.survey.lock()
    }

    pub(super) fn note_survey(&self, survey: Option<Survey>) {
        *self.survey.lock() = survey;
    }
}
