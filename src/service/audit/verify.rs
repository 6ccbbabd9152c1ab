//! Verifies that the audit log is as it was written: no event changed, removed or added, no seal
//! changed or removed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    crypto::audit::{AuditKey, digest},
    domain::audit::{
        StoredEvent, hex,
        seal::{Batch, BatchEntry, Seal},
    },
    service::{
        ServiceError,
        audit::legacy::{ChainAnchor, ChainFinding, verify_chains},
    },
    storage::{self, PgConnection, PgPool},
};

/// Seals that are read at a time.
const SEALS: i64 = 100;
/// Events that are read at a time.
const EVENTS: usize = 5_000;

/// Numbers of the batches of one process.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ProcessNumbers {
    /// All numbers up to this one are present.
    pub through: i64,
    /// Present numbers after `through`.
    pub beyond: BTreeSet<i64>,
    /// The process said that all numbers up to this one are settled.
    pub settled: i64,
    /// The process said that it stopped.
    pub is_closed: bool,
}

impl ProcessNumbers {
    fn add(&mut self, entry: &BatchEntry) {
        self.beyond.insert(entry.sequence);
        while self.beyond.remove(&(self.through + 1)) {
            self.through += 1;
        }
        let through = self.through;
        self.beyond.retain(|number| *number > through);
        self.settled = self.settled.max(entry.settled_through);
        self.is_closed |= entry.settled_through == entry.sequence;
    }

    /// Returns the largest number.
    #[must_use]
    pub fn last(&self) -> i64 {
        self.beyond.last().copied().unwrap_or(self.through)
    }

    /// Returns the numbers up to `end` that are absent, as ranges.
    fn absent(&self, end: i64) -> Vec<(i64, i64)> {
        let mut ranges = Vec::new();
        let mut from = self.through + 1;
        for present in self.beyond.range(..=end).copied().chain([end + 1]) {
            if from < present {
                ranges.push((from, present - 1));
            }
            from = present + 1;
        }
        ranges
    }

    /// Returns numbers that are absent and may have been in flight, as ranges.
    #[must_use]
    pub fn in_flight(&self) -> Vec<(i64, i64)> {
        let mut ranges = self.absent(self.last());
        ranges.retain(|(_, to)| *to > self.settled);
        ranges
    }
}

/// State of the log at a verification, kept outside the database.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Anchor {
    /// Number of the last seal.
    pub number: i64,
    /// Its hash, in hexadecimal digits.
    pub hash: String,
    /// Number of events in all seals.
    pub events: i64,
    /// Processes that may still write or have batches to seal.
    pub processes: BTreeMap<Uuid, ProcessNumbers>,
}

/// Scope of a verification.
#[derive(Debug, Default)]
pub struct Scope {
    /// State at an earlier verification.
    pub anchor: Option<Anchor>,
    /// Verify only what was sealed after the anchor.
    pub since_anchor: bool,
    /// Heads of chains at an earlier verification.
    pub chains: Vec<ChainAnchor>,
}

/// Difference between the log and what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    /// Seals are missing.
    #[error("seal {0}: missing")]
    SealMissing(i64),
    /// The HMAC of a seal is wrong.
    #[error("seal {0}: changed or forged")]
    SealChanged(i64),
    /// A seal does not continue the seal before it.
    #[error("seal {0}: does not continue the seal before it")]
    SealUnlinked(i64),
    /// A process had seen a seal that is gone.
    #[error("seal {0}: its process had seen another seal {1}, so seals were rolled back")]
    SealsRolledBack(i64, i64),
    /// The events of a seal have other HMACs than it sealed.
    #[error("seal {0}: its events are not the ones that were sealed")]
    DigestWrong(i64),
    /// An event is missing.
    #[error("{1}: event {0} is missing")]
    EventMissing(Uuid, Binding),
    /// The HMAC of an event is wrong.
    #[error("{1}: event {0} was changed")]
    EventChanged(Uuid, Binding),
    /// No seal and no batch contains an event.
    #[error("event {0} was added, or its batch was removed before it was sealed")]
    EventAdded(Uuid),
    /// Several seals or batches contain an event.
    #[error("event {0} is bound more than once: its batch was copied")]
    EventCopied(Uuid),
    /// The HMAC of an unsealed batch is wrong.
    #[error("{0}: changed or forged")]
    BatchForged(Binding),
    /// Settled batches of a process are missing.
    #[error("process {0}: batches {1} to {2} are missing")]
    BatchesMissing(Uuid, i64, i64),
    /// The log was signed with a key that is not available.
    #[error("signed with another pepper (key {0}); pass its file with --older-pepper-file")]
    UnknownKey(String),
    /// The log contradicts the anchor.
    #[error("seal {0}: contradicts the anchor, so the log was set back or replaced")]
    NotAsAnchored(i64),
    /// The total number of events is wrong.
    #[error("{0} events are stored, but {1} are bound; verify without --since-anchor")]
    CountWrong(i64, i64),
    /// A seal declares events as pruned without the event of a prune.
    #[error("seal {0}: declares events as pruned, but contains no record of that prune")]
    PruneForged(i64),
    /// Finding in a chain of an earlier release.
    #[error("{0}")]
    Chain(String),
}

/// Seal or batch that contains an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// Seal with this number.
    Seal(i64),
    /// Unsealed batch with this id.
    Batch(Uuid),
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seal(number) => write!(f, "seal {number}"),
            Self::Batch(id) => write!(f, "unsealed batch {id}"),
        }
    }
}

/// Deletion of old events that a seal declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prune {
    /// Number of the seal that declares it.
    pub seal: i64,
    /// Events of the seals up to this number may be gone.
    pub through: i64,
    /// Time of the declaration.
    pub at: DateTime<Utc>,
    /// User of the command.
    pub actor: String,
}

/// Result of a verification.
#[derive(Debug, Default)]
pub struct Report {
    /// Number of stored events.
    pub events: u64,
    /// Number of findings.
    pub findings: u64,
    /// Events of chains that no seal binds yet.
    pub unadopted: u64,
    /// Prunes, in order.
    pub prunes: Vec<Prune>,
    /// Number of events that these prunes deleted.
    pub pruned: i64,
    /// State to keep outside the database.
    pub anchor: Anchor,
}

impl Report {
    /// Last seal whose events may be gone; 0 if there was no prune.
    fn pruned_through(&self) -> i64 {
        self.prunes.last().map_or(0, |prune| prune.through)
    }
}

/// Receives the progress of a verification.
pub trait Watcher {
    /// Receives a finding.
    fn found(&mut self, finding: &Finding);
    /// Receives the number of verified events, of all events.
    fn progress(&mut self, seen: u64, all: u64);
}

/// Verifies the log in one snapshot, page by page. Neither disturbs a running service nor is
/// disturbed by one.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable. Findings are not errors.
pub async fn verify(
    pool: &PgPool,
    keys: &[AuditKey],
    scope: Scope,
    watcher: &mut impl Watcher,
) -> Result<Report, ServiceError> {
    let mut tx = storage::audit::snapshot(pool).await?;
    let stored = storage::audit::count_all_events(&mut tx).await?;
    let mut check = Check { keys, unknown_keys: BTreeSet::new(), report: Report::default(), seen: 0, stored, watcher };
    check.report.events = u64::try_from(stored).unwrap_or_default();
    let is_partial = scope.since_anchor && scope.anchor.is_some();
    if is_partial {
        check.report.anchor = scope.anchor.clone().unwrap_or_default();
    }
    check.prunes(&mut tx).await?;
    check.seals(&mut tx, scope.anchor.as_ref()).await?;
    for (number, seen) in storage::audit::list_contradicted_seals(&mut tx).await? {
        check.found(&Finding::SealsRolledBack(number, seen));
    }
    let sealed_processes = check.report.anchor.processes.clone();
    let waiting = check.unsealed(&mut tx).await?;
    check.counts(&mut tx, waiting).await?;
    check.numbers();
    if !is_partial {
        let mut found = |finding: &ChainFinding| check.found(&Finding::Chain(finding.to_string()));
        verify_chains(&mut tx, keys, scope.chains, &mut found).await?;
    }
    // Batches that wait are sealed after the anchor.
    let processes = &mut check.report.anchor.processes;
    processes.retain(|id, numbers| !numbers.is_closed || sealed_processes.get(id) != Some(numbers));
    Ok(check.report)
}

struct Check<'a, W> {
    keys: &'a [AuditKey],
    unknown_keys: BTreeSet<String>,
    report: Report,
    seen: u64,
    stored: i64,
    watcher: &'a mut W,
}

impl<W: Watcher> Check<'_, W> {
    fn found(&mut self, finding: &Finding) {
        self.report.findings += 1;
        self.watcher.found(finding);
    }

    /// Returns the key with this id. Reports each unknown key once.
    fn key(&mut self, id: &str) -> Option<AuditKey> {
        let key = self.keys.iter().find(|key| key.id() == id).cloned();
        if key.is_none() && self.unknown_keys.insert(id.to_owned()) {
            self.found(&Finding::UnknownKey(id.to_owned()));
        }
        key
    }

    /// Finds the prunes. A seal that declares one contains its event: without it, a seal that was
    /// changed for a moment could have passed its declaration on to the seals after it.
    async fn prunes(&mut self, conn: &mut PgConnection) -> Result<(), ServiceError> {
        for number in storage::audit::prune::list_prunes(&mut *conn).await? {
            let seals = storage::audit::list_seals(&mut *conn, number - 1, 1).await?;
            let found = match seals.into_iter().next() {
                Some(seal) => self.prune(&mut *conn, &seal).await?,
                None => None,
            };
            match found {
                Some(prune) => self.report.prunes.push(prune),
                None => self.found(&Finding::PruneForged(number)),
            }
        }
        let through = self.report.pruned_through();
        if through > 0 {
            (self.report.pruned, _) = storage::audit::prune::count_pruned(conn, through).await?;
        }
        Ok(())
    }

    async fn prune(&mut self, conn: &mut PgConnection, seal: &Seal) -> Result<Option<Prune>, ServiceError> {
        let Some(through) = seal.pruned_through else { return Ok(None) };
        let is_next = (self.report.pruned_through() + 1..seal.head.number).contains(&through);
        if !is_next || !self.key(&seal.key_id).is_some_and(|key| key.is_seal(seal)) {
            return Ok(None);
        }
        let events = storage::audit::find_events(conn, &seal.event_ids).await?;
        let record = events.into_iter().find(|stored| stored.pruned_through() == Some(through));
        let Some(record) = record else { return Ok(None) };
        let is_authentic = self.is_authentic(&record) == Some(true);
        let (number, at) = (seal.head.number, seal.sealed_at);
        let actor = record.event.actor_name.unwrap_or_default();
        Ok(is_authentic.then_some(Prune { seal: number, through, at, actor }))
    }

    async fn seals(&mut self, conn: &mut PgConnection, anchor: Option<&Anchor>) -> Result<(), ServiceError> {
        let mut previous: Option<Vec<u8>> = None;
        let is_partial = self.report.anchor.number > 0;
        // The anchored seal itself is read again, to be compared.
        let mut after = if is_partial { self.report.anchor.number - 1 } else { 0 };
        let mut is_anchored = anchor.is_none_or(|anchor| anchor.number == 0);
        loop {
            let page = storage::audit::list_seals(&mut *conn, after, SEALS).await?;
            let Some(last) = page.last() else { break };
            let next = last.head.number;
            let mut verified = Vec::with_capacity(page.len());
            for seal in page {
                for missing in (after + 1..seal.head.number).take(EVENTS) {
                    self.found(&Finding::SealMissing(missing));
                    previous = None;
                }
                after = seal.head.number;
                if anchor.is_some_and(|anchor| anchor.number == after) {
                    is_anchored = anchor.is_some_and(|anchor| anchor.hash == hex(&seal.head.hash));
                }
                let expected = previous.replace(seal.head.hash.clone());
                if is_partial && anchor.is_some_and(|anchor| anchor.number == after) {
                    continue;
                }
                if self.seal(&seal, expected) {
                    verified.push(seal);
                }
            }
            after = next;
            self.events_of(conn, &verified).await?;
        }
        if let Some(anchor) = anchor.filter(|_| !is_anchored) {
            self.found(&Finding::NotAsAnchored(anchor.number));
        }
        Ok(())
    }

    /// Verifies a seal without its events. Returns whether it is authentic.
    fn seal(&mut self, seal: &Seal, previous: Option<Vec<u8>>) -> bool {
        let number = seal.head.number;
        for entry in &seal.batches {
            self.report.anchor.processes.entry(entry.process_id).or_default().add(entry);
        }
        let Some(key) = self.key(&seal.key_id) else { return false };
        if !key.is_seal(seal) {
            self.found(&Finding::SealChanged(number));
            return false;
        }
        let previous = if number == 1 { Some(Vec::new()) } else { previous };
        if previous.is_some_and(|previous| previous != seal.previous_hash) {
            self.found(&Finding::SealUnlinked(number));
        }
        let anchor = &mut self.report.anchor;
        (anchor.number, anchor.hash, anchor.events) = (number, hex(&seal.head.hash), seal.events);
        true
    }

    /// Verifies the events of authentic seals, many at a time.
    async fn events_of(&mut self, conn: &mut PgConnection, seals: &[Seal]) -> Result<(), ServiceError> {
        let mut events = HashMap::new();
        let mut wanted = seals.iter().flat_map(|seal| seal.event_ids.iter().copied()).peekable();
        while wanted.peek().is_some() {
            let ids: Vec<Uuid> = wanted.by_ref().take(EVENTS).collect();
            let found = storage::audit::find_events(&mut *conn, &ids).await?;
            events.extend(found.into_iter().map(|stored| (stored.event.id, stored)));
        }
        for seal in seals {
            let binding = Binding::Seal(seal.head.number);
            if self.events(&seal.event_ids, &events, binding) {
                let hashes = seal.event_ids.iter().filter_map(|id| events.get(id)).map(|stored| stored.hash.as_slice());
                if digest(hashes) != seal.digest {
                    self.found(&Finding::DigestWrong(seal.head.number));
                }
            }
        }
        self.watcher.progress(self.seen, self.report.events.max(self.seen));
        Ok(())
    }

    /// Verifies events. Returns whether all are present and authentic.
    fn events(&mut self, ids: &[Uuid], events: &HashMap<Uuid, StoredEvent>, binding: Binding) -> bool {
        let mut is_intact = true;
        for id in ids {
            self.seen += 1;
            let is_authentic = events.get(id).map(|stored| self.is_authentic(stored));
            is_intact &= is_authentic == Some(Some(true));
            match is_authentic {
                None if matches!(binding, Binding::Seal(number) if number <= self.report.pruned_through()) => {}
                None => self.found(&Finding::EventMissing(*id, binding)),
                Some(Some(false)) => self.found(&Finding::EventChanged(*id, binding)),
                Some(_) => {}
            }
        }
        is_intact
    }

    /// Returns `None` if the key is unknown. An event of a chain does not name its key, so all keys
    /// are tried.
    fn is_authentic(&mut self, stored: &StoredEvent) -> Option<bool> {
        match &stored.key_id {
            Some(id) => self.key(id).map(|key| key.is_authentic(stored)),
            None => Some(self.keys.iter().any(|key| key.is_authentic(stored))),
        }
    }

    /// Verifies batches that wait for a seal. Returns the number of their events.
    async fn unsealed(&mut self, conn: &mut PgConnection) -> Result<i64, ServiceError> {
        let mut waiting = 0;
        for batch in storage::audit::list_unsealed(&mut *conn).await? {
            let Some(key) = self.key(&batch.key_id) else { continue };
            let Batch { id, entry, event_ids, .. } = &batch;
            let binding = Binding::Batch(*id);
            if !key.is_batch(&batch) {
                self.found(&Finding::BatchForged(binding));
                continue;
            }
            self.report.anchor.processes.entry(entry.process_id).or_default().add(entry);
            waiting += i64::from(entry.events);
            let found = storage::audit::find_events(&mut *conn, event_ids).await?;
            let found = found.into_iter().map(|stored| (stored.event.id, stored)).collect();
            self.events(event_ids, &found, binding);
        }
        Ok(waiting)
    }

    /// Compares the number of events with the number of bound ones, and lists the difference if
    /// there is one.
    async fn counts(&mut self, conn: &mut PgConnection, waiting: i64) -> Result<(), ServiceError> {
        let bound = self.report.anchor.events + waiting - self.report.pruned;
        if self.stored == bound && self.report.findings == 0 {
            return Ok(());
        }
        let before = self.report.findings;
        let mut difference = self.stored - bound;
        for event in storage::audit::list_miscounted_events(conn).await? {
            difference += event.bindings - 1;
            match (event.bindings, event.key_id) {
                (0, None) => self.report.unadopted += 1,
                (0, Some(_)) => self.found(&Finding::EventAdded(event.id)),
                _ => self.found(&Finding::EventCopied(event.id)),
            }
        }
        if difference != 0 && before == 0 {
            self.found(&Finding::CountWrong(self.stored, bound));
        }
        Ok(())
    }

    /// Reports settled batches that are absent.
    fn numbers(&mut self) {
        let processes = self.report.anchor.processes.iter();
        let missing: Vec<Finding> = processes
            .flat_map(|(id, numbers)| {
                let absent = numbers.absent(numbers.settled);
                absent.into_iter().map(|(from, to)| Finding::BatchesMissing(*id, from, to))
            })
            .collect();
        for finding in &missing {
            self.found(finding);
        }
    }
}
