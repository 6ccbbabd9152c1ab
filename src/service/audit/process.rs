//! Numbers of the batches that this process writes. A number that is neither committed nor
//! accounted for exposes a removed batch.
//!
//! A number is *settled* once its transaction is known to have committed, or once a batch without
//! events accounts for it. Each batch carries the number up to which all were settled when it was
//! written. So every batch that is missing up to there was removed; one that is missing after that
//! may have been in flight when the process died.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::{
    crypto::pepper::Peppers,
    domain::audit::{
        NewEvent, StoredEvent,
        seal::{Batch, BatchEntry},
    },
    service::audit::{
        AuditError,
        metrics::{AuditMetrics, Tampering},
    },
    storage::{self, PgConnection, StorageError},
};

/// Most batches without events that are written at a time.
const NOTICES_MAX: usize = 500;

/// Signs the events of this process and numbers its batches.
#[derive(Debug)]
pub(super) struct Process {
    id: Uuid,
    /// The first pepper signs, whichever that is at the time.
    pub(super) peppers: Arc<Peppers>,
    pub(super) metrics: Arc<AuditMetrics>,
    numbers: Mutex<Numbers>,
}

#[derive(Debug, Default)]
struct Numbers {
    /// Last number of a batch, and last place of an event.
    last: i64,
    last_event: i64,
    /// Transactions that have not ended, with the ids of their events.
    in_flight: BTreeMap<i64, Vec<Uuid>>,
    /// Transactions whose outcome is unknown.
    unknown: BTreeMap<i64, Vec<Uuid>>,
    /// Numbers under which nothing is committed, until a batch without events accounts for them.
    unaccounted: BTreeSet<i64>,
    /// Committed batches that were not seen in a seal yet.
    unsealed: BTreeSet<i64>,
    /// Batches that were seen in a seal before their commit was noticed.
    sealed_early: BTreeSet<i64>,
    /// Last committed batch with events.
    last_committed: i64,
    /// Largest `settled_through` of a committed batch.
    announced: i64,
}

impl Numbers {
    fn next(&mut self) -> i64 {
        self.last += 1;
        self.last
    }

    fn settled_through(&self) -> i64 {
        let (in_flight, unknown) = (self.in_flight.first_key_value(), self.unknown.first_key_value());
        let pending = [in_flight, unknown].into_iter().flatten().map(|(number, _)| *number);
        pending.chain(self.unaccounted.first().copied()).min().map_or(self.last, |first| first - 1)
    }

    fn committed(&mut self, entry: &BatchEntry) {
        self.in_flight.remove(&entry.sequence);
        self.unaccounted.remove(&entry.sequence);
        if !self.sealed_early.remove(&entry.sequence) {
            self.unsealed.insert(entry.sequence);
        }
        self.announced = self.announced.max(entry.settled_through);
        if entry.events > 0 {
            self.last_committed = self.last_committed.max(entry.sequence);
        }
    }
}

impl Process {
    pub(super) fn new(peppers: Arc<Peppers>, metrics: Arc<AuditMetrics>) -> Self {
        Self { id: Uuid::now_v7(), peppers, metrics, numbers: Mutex::default() }
    }

    pub(super) fn id(&self) -> Uuid {
        self.id
    }

    /// Numbers and signs events. The returned write must be told its outcome.
    pub(super) fn prepare(self: &Arc<Self>, events: impl IntoIterator<Item = NewEvent>) -> Write {
        let events: Vec<_> = events.into_iter().map(|event| event.stamp(Uuid::now_v7())).collect();
        let (sequence, settled_through, first) = {
            let mut numbers = self.numbers.lock();
            let settled_through = numbers.settled_through();
            let first = numbers.last_event + 1;
            numbers.last_event += i64::try_from(events.len()).unwrap_or(i64::MAX);
            let sequence = numbers.next();
            numbers.in_flight.insert(sequence, events.iter().map(|event| event.id).collect());
            (sequence, settled_through, first)
        };
        let peppers = self.peppers.current();
        let key = peppers.audit_key();
        let events: Vec<StoredEvent> =
            (first..).zip(events).map(|(place, event)| key.sign_event(event, self.id, place)).collect();
        let batch = key.sign_batch(self.entry(sequence, settled_through), events.iter().map(StoredEvent::binding));
        Write { process: Arc::clone(self), batch, events, is_decided: false }
    }

    fn entry(&self, sequence: i64, settled_through: i64) -> BatchEntry {
        BatchEntry { process_id: self.id, sequence, settled_through, events: 0 }
    }

    /// Makes batches without events, for one transaction. They account for numbers under which
    /// nothing is committed, and settle the last committed batch if no later one does. With
    /// `closes`, the last one says that the process stopped. A batch that is not committed is made
    /// again the next time.
    pub(super) fn notices(&self, closes: bool) -> Vec<Batch> {
        let mut numbers = self.numbers.lock();
        let numbers = &mut *numbers;
        let unaccounted: Vec<i64> = numbers.unaccounted.iter().copied().take(NOTICES_MAX).collect();
        let mut entries: Vec<BatchEntry> = unaccounted.iter().map(|number| self.entry(*number, 0)).collect();
        let is_complete = numbers.in_flight.is_empty()
            && numbers.unknown.is_empty()
            && numbers.unaccounted.len() == unaccounted.len();
        let is_unsettled = numbers.last == 0 || numbers.last_committed > numbers.announced;
        let adds_number = if closes { numbers.last > 0 } else { is_unsettled };
        if adds_number {
            let settled_through = numbers.settled_through();
            let number = numbers.next();
            numbers.unaccounted.insert(number);
            entries.push(self.entry(number, if closes && is_complete { number } else { settled_through }));
        }
        let peppers = self.peppers.current();
        entries.into_iter().map(|entry| peppers.audit_key().sign_batch(entry, [])).collect()
    }

    /// Notes that the batches of [`notices`](Self::notices) are committed.
    pub(super) fn noticed(&self, notices: &[Batch]) {
        let mut numbers = self.numbers.lock();
        for batch in notices {
            numbers.committed(&batch.entry);
        }
    }

    /// Returns the numbers of unknown outcome. With `gives_up`, transactions in flight become
    /// unknown.
    pub(super) fn unknown(&self, gives_up: bool) -> Vec<(i64, Vec<Uuid>)> {
        let mut numbers = self.numbers.lock();
        if gives_up {
            let mut in_flight = std::mem::take(&mut numbers.in_flight);
            numbers.unknown.append(&mut in_flight);
        }
        numbers.unknown.iter().map(|(number, ids)| (*number, ids.clone())).collect()
    }

    /// Takes the outcome of a number that was unknown.
    pub(super) fn resolve(&self, number: i64, is_committed: bool) {
        let mut numbers = self.numbers.lock();
        let Some(ids) = numbers.unknown.remove(&number) else { return };
        if is_committed {
            let events = i32::try_from(ids.len()).unwrap_or(i32::MAX);
            numbers.committed(&BatchEntry { events, ..self.entry(number, 0) });
        } else {
            numbers.unaccounted.insert(number);
        }
    }

    /// Notes batches of a seal.
    pub(super) fn sealed(&self, entries: &[BatchEntry]) {
        let mut numbers = self.numbers.lock();
        for number in entries.iter().filter(|entry| entry.process_id == self.id).map(|entry| entry.sequence) {
            let is_pending = numbers.in_flight.contains_key(&number)
                || numbers.unknown.contains_key(&number)
                || numbers.unaccounted.contains(&number);
            if !numbers.unsealed.remove(&number) && is_pending {
                numbers.sealed_early.insert(number);
            }
        }
    }

    /// Returns committed batches that were not seen in a seal.
    pub(super) fn unsealed(&self) -> BTreeSet<i64> {
        self.numbers.lock().unsealed.clone()
    }

    /// Reports those of `batches` that are still not sealed as removed.
    pub(super) fn report_removed(&self, batches: &BTreeSet<i64>) {
        let mut numbers = self.numbers.lock();
        let removed: Vec<i64> = batches.iter().copied().filter(|number| numbers.unsealed.remove(number)).collect();
        drop(numbers);
        if !removed.is_empty() {
            self.metrics.count(Tampering::BatchRemoved, removed.len());
            tracing::error!(process.id = %self.id, batches = ?removed, "committed audit batches removed before sealing");
        }
    }

    /// Makes a batch of events that are stored already.
    pub(super) fn adopt(&self, sequence: i64, is_last: bool, events: &[(Uuid, &[u8])]) -> Batch {
        let settled_through = if is_last { sequence } else { sequence - 1 };
        let entry = self.entry(sequence, settled_through);
        self.peppers.current().audit_key().sign_batch(entry, events.iter().copied())
    }

    fn end(&self, write: &Write, outcome: WriteOutcome) {
        let mut numbers = self.numbers.lock();
        match outcome {
            WriteOutcome::Committed => numbers.committed(&write.batch.entry),
            WriteOutcome::RolledBack => {
                numbers.in_flight.remove(&write.batch.entry.sequence);
                numbers.unaccounted.insert(write.batch.entry.sequence);
            }
            WriteOutcome::Unknown => {
                // `unknown(true)` may have moved it already.
                if let Some(ids) = numbers.in_flight.remove(&write.batch.entry.sequence) {
                    numbers.unknown.insert(write.batch.entry.sequence, ids);
                }
            }
        }
    }
}

/// Outcome of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteOutcome {
    /// It is durable.
    Committed,
    /// It will never be durable.
    RolledBack,
    /// The connection broke during the commit, or the caller stopped waiting.
    Unknown,
}

/// Numbered events on their way into the database. The outcome is unknown if it is dropped before
/// [`end`](Self::end).
#[derive(Debug)]
pub(super) struct Write {
    process: Arc<Process>,
    batch: Batch,
    events: Vec<StoredEvent>,
    is_decided: bool,
}

impl Write {
    /// Inserts the events and their batch. Safe to repeat.
    pub(super) async fn insert(&self, conn: &mut PgConnection) -> Result<(), AuditError> {
        let inserted = storage::audit::insert_batch(&mut *conn, &self.batch, &self.events).await?;
        let expected = i64::try_from(self.events.len()).unwrap_or(i64::MAX);
        if inserted.events == expected && inserted.batches == 1 {
            return Ok(());
        }
        if inserted.events == 0 && inserted.batches == 0 {
            // An earlier attempt may have committed.
            let found = storage::audit::count_events(conn, &self.batch.event_ids).await?;
            if found == self.events.len() {
                return Ok(());
            }
        }
        self.process.metrics.count(Tampering::WriteAltered, 1);
        tracing::error!(expected, inserted.events, inserted.batches, "audit write altered by the database");
        Err(AuditError::Altered)
    }

    /// Whether this is the batch of the events.
    pub(super) fn is_batch(&self, batch: &Batch) -> bool {
        self.batch.id == batch.id
    }

    /// Takes the outcome.
    pub(super) fn end(mut self, outcome: WriteOutcome) {
        self.is_decided = true;
        self.process.end(&self, outcome);
    }
}

impl Drop for Write {
    fn drop(&mut self) {
        if !self.is_decided {
            self.process.end(self, WriteOutcome::Unknown);
        }
    }
}

/// Returns the outcome of a statement that failed: Postgres itself refused it, or the connection
/// broke.
pub(super) fn outcome_of(error: &StorageError) -> WriteOutcome {
    match error {
        StorageError::Unavailable(_) => WriteOutcome::Unknown,
        _ => WriteOutcome::RolledBack,
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use secrecy::SecretString;

    use super::*;
    use crate::{
        crypto::pepper::Pepper,
        domain::audit::{Action, Resource, worker},
    };

    fn process() -> Arc<Process> {
        let pepper = Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([1; 32]))).unwrap();
        Arc::new(Process::new(Arc::new(Peppers::new(pepper.into(), None)), Arc::default()))
    }

    fn write(process: &Arc<Process>) -> Write {
        process.prepare([NewEvent::by(&worker(), Action::MasterKeyRotate, Resource::master_keys())])
    }

    fn notices(process: &Process, closes: bool) -> Vec<(i64, i64)> {
        let notices = process.notices(closes);
        process.noticed(&notices);
        notices.iter().map(|batch| (batch.entry.sequence, batch.entry.settled_through)).collect()
    }

    #[test]
    fn batch_settles_all_before_the_first_pending_one() {
        let process = process();
        let [first, second, third] = [(); 3].map(|()| write(&process));
        second.end(WriteOutcome::Committed);
        assert_eq!(write(&process).batch.entry.settled_through, 0);
        first.end(WriteOutcome::Committed);
        let fifth = write(&process);
        assert_eq!((fifth.batch.entry.sequence, fifth.batch.entry.settled_through), (5, 2));
        assert_eq!(fifth.events[0].sequence, 5);
        drop(third);
        assert_eq!(process.unknown(false).iter().map(|(number, _)| *number).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(process.unsealed(), BTreeSet::from([1, 2]));
    }

    #[test]
    fn notices_account_for_what_was_rolled_back_and_settle_the_last_batch() {
        let process = process();
        assert_eq!(notices(&process, false), [(1, 0)]);
        write(&process).end(WriteOutcome::RolledBack);
        assert_eq!(notices(&process, false), [(2, 0)]);
        write(&process).end(WriteOutcome::Committed);
        assert_eq!(notices(&process, false), [(4, 3)]);
        assert!(notices(&process, false).is_empty());
        drop(write(&process));
        process.resolve(5, false);
        assert_eq!(notices(&process, true), [(5, 0), (6, 6)]);
    }

    #[test]
    fn batch_that_was_sealed_before_its_commit_was_noticed_is_not_missing() {
        let process = process();
        let (first, second) = (write(&process), write(&process));
        process.sealed(&[first.batch.entry]);
        first.end(WriteOutcome::Committed);
        second.end(WriteOutcome::Committed);
        assert_eq!(process.unsealed(), BTreeSet::from([2]));
        process.report_removed(&BTreeSet::from([1, 2]));
        assert_eq!(process.metrics.tampering()[1], ("batch-removed", 1));
    }

    #[test]
    fn notices_that_were_not_committed_are_made_again() {
        let process = process();
        assert_eq!(process.notices(false).len(), 1);
        assert_eq!(notices(&process, false), [(1, 0)]);
    }

    #[test]
    fn process_that_gave_up_a_transaction_closes_once_it_is_resolved() {
        let process = process();
        let pending = write(&process);
        assert_eq!(notices(&process, true), [(2, 0)]);
        assert_eq!(process.unknown(true).len(), 1);
        process.resolve(1, true);
        assert_eq!(notices(&process, true), [(3, 3)]);
        pending.end(WriteOutcome::Unknown);
        assert!(process.unknown(false).is_empty());
    }
}
