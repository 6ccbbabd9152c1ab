//! Statistics of the audit log.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::service::audit::AuditError;

/// Age of the oldest unsealed batch from which changes and reveals are refused.
const UNSEALED_MAX: Duration = Duration::from_mins(1);
/// Time without a measurement after which the oldest batch counts as unsealed and older.
const MEASUREMENT_MAX: Duration = Duration::from_secs(10);

/// Change of the audit log that no process made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tampering {
    /// The database stored fewer rows than were sent.
    WriteAltered,
    /// A committed batch vanished before it was sealed.
    BatchRemoved,
    /// A batch without a valid HMAC was waiting to be sealed.
    BatchForged,
    /// Seals vanished or changed while the process ran.
    SealsRolledBack,
}

impl Tampering {
    const ALL: [(Self, &str); 4] = [
        (Self::WriteAltered, "write-altered"),
        (Self::BatchRemoved, "batch-removed"),
        (Self::BatchForged, "batch-forged"),
        (Self::SealsRolledBack, "seals-rolled-back"),
    ];
}

/// Statistics of the audit log.
#[derive(Debug, Default)]
pub struct AuditMetrics {
    pub(super) written: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) groups: AtomicU64,
    pub(super) seals: AtomicU64,
    tampering: [AtomicU64; 4],
    oldest_unsealed: Mutex<Option<(Instant, Duration)>>,
}

impl AuditMetrics {
    /// Returns how many events were written in groups, and how many were not.
    pub fn events(&self) -> [(&'static str, u64); 2] {
        [("written", self.written.load(Ordering::Relaxed)), ("failed", self.failed.load(Ordering::Relaxed))]
    }

    /// Returns how many groups were written.
    pub fn groups(&self) -> u64 {
        self.groups.load(Ordering::Relaxed)
    }

    /// Returns how many seals this process made.
    pub fn seals(&self) -> u64 {
        self.seals.load(Ordering::Relaxed)
    }

    /// Returns how often this process found each kind of tampering.
    pub fn tampering(&self) -> [(&'static str, u64); 4] {
        Tampering::ALL.map(|(kind, name)| (name, self.tampering[kind as usize].load(Ordering::Relaxed)))
    }

    pub(super) fn count(&self, kind: Tampering, times: usize) {
        self.tampering[kind as usize].fetch_add(times as u64, Ordering::Relaxed);
    }

    pub(super) fn measured_oldest_unsealed(&self, age: Duration) {
        *self.oldest_unsealed.lock() = Some((Instant::now(), age));
    }

    /// Returns the age of the oldest unsealed batch, an upper bound while it cannot be measured.
    /// Zero in a process without a sealer.
    pub fn oldest_unsealed(&self) -> Duration {
        self.oldest_unsealed.lock().map_or(Duration::ZERO, |(at, age)| {
            let elapsed = at.elapsed();
            if elapsed > MEASUREMENT_MAX { age + elapsed } else { age }
        })
    }

    /// Fails while batches wait too long for a seal.
    pub(super) fn check_sealing(&self) -> Result<(), AuditError> {
        if self.oldest_unsealed() > UNSEALED_MAX { Err(AuditError::SealingStalled) } else { Ok(()) }
    }
}
