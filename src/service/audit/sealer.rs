//! Binds committed batches into one chain of seals. Runs in every `serve` and `worker`; the primary
//! key of the seals decides between sealers that run at the same time.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use chrono::TimeDelta;
use sqlx::postgres::PgConnectOptions;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    crypto::audit::{AuditKey, digest},
    domain::audit::{
        NewEvent, first_id_at,
        seal::{Batch, Seal, SealHead},
    },
    service::audit::{
        AuditError,
        metrics::Tampering,
        process::{Process, Write, WriteOutcome, outcome_of},
    },
    storage::{self, PgConnection, StorageError, audit::LastSeal, pool::OPERATION_MAX},
};

/// Pause after a cycle that sealed batches, and after one that did not.
const BUSY: Duration = Duration::from_millis(250);
const IDLE: Duration = Duration::from_secs(1);
/// Most batches in one seal.
const BATCHES_MAX: i64 = 100;
/// Time for which an unavailable lock is respected. It only saves work: a client that holds it must
/// not stop sealing.
const LOCK_RESPECTED: Duration = Duration::from_secs(5);
/// Interval of surveys. A survey takes batches of any age. Other cycles take recent ones alone:
/// while a long transaction keeps Postgres from removing dead rows, they do not read them again and
/// again.
const SURVEY: Duration = Duration::from_secs(5);
/// Age of batches that every cycle takes. Covers a change that waits for its commit, and clocks
/// that differ.
const RECENT: TimeDelta = TimeDelta::seconds(10);
/// Seals that are read at a time.
const PAGE: i64 = 500;
/// Longest cycle, and longest close.
const CYCLE_MAX: Duration = Duration::from_secs(20);
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// Seals batches, accounts for the numbers of its process, and watches the seals.
pub(super) struct Sealer {
    process: Arc<Process>,
    options: PgConnectOptions,
    /// Own connection: requests that exhaust the pool do not stop sealing.
    conn: Option<PgConnection>,
    /// Last seal that was seen; number 0 if there was none.
    seen: Option<SealHead>,
    /// Seal that was seen and has vanished, until a seal of this process says so.
    vanished: Option<SealHead>,
    lock_unavailable_since: Option<Instant>,
    surveyed: Option<Instant>,
}

impl Sealer {
    pub(super) fn new(process: Arc<Process>, options: PgConnectOptions) -> Self {
        Self { process, options, conn: None, seen: None, vanished: None, lock_unavailable_since: None, surveyed: None }
    }

    /// Seals until it is told to stop, then closes the numbering of the process.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut is_failing = false;
        loop {
            let Some(result) = stop.run_until_cancelled(timeout(CYCLE_MAX, self.cycle())).await else {
                // The cycle may have ended in the middle of a statement.
                self.conn = None;
                break;
            };
            let result = result.unwrap_or(Err(AuditError::TimedOut));
            let pause = match &result {
                Ok(true) => BUSY,
                Ok(false) => IDLE,
                Err(error) => {
                    if !is_failing {
                        let cause = std::error::Error::source(error).map(ToString::to_string);
                        tracing::error!(%error, cause, "audit sealing failed");
                    }
                    self.conn = None;
                    IDLE
                }
            };
            if is_failing && result.is_ok() {
                tracing::info!("audit sealing resumed");
            }
            is_failing = result.is_err();
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                break;
            }
        }
        if let Err(error) = self.close().await {
            tracing::warn!(process.id = %self.process.id(), %error, "audit numbering not closed");
        }
    }

    /// Seals what waits. Returns whether anything was sealed.
    pub(super) async fn cycle(&mut self) -> Result<bool, AuditError> {
        self.follow().await?;
        let surveys = self.surveyed.is_none_or(|at| at.elapsed() >= SURVEY);
        if surveys {
            self.account(false).await?;
        }
        let from = if surveys { Uuid::nil() } else { first_id_at(crate::clock::now() - RECENT) };
        let has_sealed = self.seal_all(from).await;
        // Also if sealing failed: the age of the oldest batch matters then.
        self.follow().await?;
        if surveys {
            self.survey().await?;
            self.surveyed = Some(Instant::now());
        }
        has_sealed
    }

    /// Accounts for all numbers of the process, says that it stopped, and seals that.
    pub(super) async fn close(&mut self) -> Result<(), AuditError> {
        let closing = async {
            self.resolve(true).await?;
            self.account(true).await?;
            self.seal_all(Uuid::nil()).await.map(drop)
        };
        timeout(CLOSE_MAX, closing).await.unwrap_or(Err(AuditError::TimedOut))
    }

    pub(super) async fn seal_all(&mut self, from: Uuid) -> Result<bool, AuditError> {
        let mut has_sealed = false;
        loop {
            let taken = self.seal(from).await?;
            has_sealed |= taken > 0;
            if i64::try_from(taken).unwrap_or(i64::MAX) < BATCHES_MAX {
                return Ok(has_sealed);
            }
        }
    }

    /// Makes a seal that declares the events of the seals up to `through` as pruned and contains the
    /// event that records it. Both commit, or neither.
    pub(super) async fn declare_prune(&mut self, through: i64, event: &NewEvent) -> Result<(), AuditError> {
        let deadline = Instant::now() + CYCLE_MAX;
        loop {
            // What waits is sealed first, so that one more seal takes the event.
            self.seal_all(Uuid::nil()).await?;
            if self.try_declare_prune(through, event.clone()).await? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(AuditError::SealingStalled);
            }
            tokio::time::sleep(BUSY).await;
        }
    }

    /// Returns `false` if another sealer was in the way.
    async fn try_declare_prune(&mut self, through: i64, event: NewEvent) -> Result<bool, AuditError> {
        let mut tx = self.take_connected().await?.begin().await.map_err(StorageError::from)?;
        if !storage::audit::try_lock_sealing(&mut tx).await? {
            self.conn = Some(tx.rollback_and_keep().await.map_err(StorageError::from)?);
            return Ok(false);
        }
        let write = self.process.prepare([event]);
        let inserted = self.insert_prune(&mut tx, &write, through).await;
        let committed = match inserted {
            Ok(true) => tx.commit_and_keep().await.map_err(StorageError::from),
            Ok(false) => {
                write.end(WriteOutcome::RolledBack);
                self.conn = Some(tx.rollback_and_keep().await.map_err(StorageError::from)?);
                return Ok(false);
            }
            Err(error) => {
                write.end(WriteOutcome::RolledBack);
                return Err(error);
            }
        };
        write.end(committed.as_ref().map_or_else(outcome_of, |_| WriteOutcome::Committed));
        self.conn = Some(committed?);
        Ok(true)
    }

    async fn insert_prune(&self, conn: &mut PgConnection, write: &Write, through: i64) -> Result<bool, AuditError> {
        let peppers = self.process.peppers.current();
        let keys = peppers.audit_keys();
        write.insert(&mut *conn).await?;
        let last = storage::audit::find_last_seal(&mut *conn).await?;
        let batches = storage::audit::take_batches(&mut *conn, &ids_of(&keys), Uuid::nil(), BATCHES_MAX).await?;
        let is_genuine = |batch: &Batch| keys.iter().any(|key| key.id() == batch.key_id && key.is_batch(batch));
        let is_later = last.as_ref().is_some_and(|last| last.pruned_through.is_none_or(|before| before < through));
        if !is_later || !batches.iter().all(is_genuine) || !batches.iter().any(|batch| write.is_batch(batch)) {
            return Ok(false);
        }
        let last = last.map(|last| LastSeal { pruned_through: Some(through), ..last });
        let seal = make_seal(peppers.audit_key(), last, &batches, self.seen.clone().filter(|seen| seen.number > 0));
        Ok(storage::audit::insert_seal(conn, &seal).await?)
    }

    /// Makes one seal. Returns how many batches it took.
    async fn seal(&mut self, from: Uuid) -> Result<usize, AuditError> {
        let conn = self.take_connected().await?;
        let (taken, conn) = self.seal_on(conn, from).await?;
        self.conn = Some(conn);
        Ok(taken)
    }

    async fn seal_on(&mut self, conn: PgConnection, from: Uuid) -> Result<(usize, PgConnection), AuditError> {
        let peppers = self.process.peppers.current();
        let keys = peppers.audit_keys();
        let ids = ids_of(&keys);
        let ignores_lock = self.lock_unavailable_since.is_some_and(|since| since.elapsed() >= LOCK_RESPECTED);
        let mut tx = conn.begin().await.map_err(StorageError::from)?;
        let is_free = storage::audit::try_lock_sealing(&mut tx).await?;
        if !is_free && !ignores_lock {
            self.lock_unavailable_since.get_or_insert_with(Instant::now);
            return Ok((0, tx.rollback_and_keep().await.map_err(StorageError::from)?));
        }
        let last = storage::audit::find_last_seal(&mut tx).await?;
        let batches = storage::audit::take_batches(&mut tx, &ids, from, BATCHES_MAX).await?;
        let taken = batches.len();
        let is_genuine = |batch: &Batch| keys.iter().any(|key| key.id() == batch.key_id && key.is_batch(batch));
        let (genuine, forged): (Vec<Batch>, Vec<Batch>) = batches.into_iter().partition(is_genuine);
        let carried = self.vanished.as_ref().or(self.seen.as_ref()).filter(|seen| seen.number > 0).cloned();
        let seal = (!genuine.is_empty()).then(|| make_seal(peppers.audit_key(), last, &genuine, carried));
        if let Some(seal) = &seal
            && !storage::audit::insert_seal(&mut tx, seal).await?
        {
            // Another sealer was faster. The rollback puts the batches back.
            return Ok((0, tx.rollback_and_keep().await.map_err(StorageError::from)?));
        }
        let conn = tx.commit_and_keep().await.map_err(StorageError::from)?;
        if is_free {
            self.lock_unavailable_since = None;
        }
        if seal.is_some() {
            self.process.metrics.seals.fetch_add(1, Ordering::Relaxed);
            self.vanished = None;
        }
        for batch in forged {
            self.process.metrics.count(Tampering::BatchForged, 1);
            let Batch { id, entry, event_ids, .. } = batch;
            tracing::error!(%id, process.id = %entry.process_id, entry.sequence, ?event_ids, "forged audit batch removed");
        }
        Ok((taken, conn))
    }

    /// Reads seals since the last one that was seen, which must be stored unchanged.
    async fn follow(&mut self) -> Result<(), AuditError> {
        let Some(mut seen) = self.seen.clone() else {
            self.seen = Some(self.last_seal().await?);
            return Ok(());
        };
        loop {
            let seals = storage::audit::list_seal_heads(self.connected().await?, seen.number, PAGE).await?;
            if seen.number > 0 && seals.first().is_none_or(|(first, _)| *first != seen) {
                tracing::error!(seal = seen.number, "audit seals rolled back; run `regcred audit verify`");
                self.process.metrics.count(Tampering::SealsRolledBack, 1);
                self.vanished.get_or_insert(seen);
                self.seen = Some(self.last_seal().await?);
                return Ok(());
            }
            let is_last = i64::try_from(seals.len()).unwrap_or(i64::MAX) < PAGE;
            for (head, entries) in seals {
                self.process.sealed(&entries);
                seen = head;
            }
            self.seen = Some(seen.clone());
            if is_last {
                return Ok(());
            }
        }
    }

    /// Returns the last seal; number 0 if there is none.
    async fn last_seal(&mut self) -> Result<SealHead, AuditError> {
        let last = storage::audit::find_last_seal(self.connected().await?).await?;
        Ok(last.map_or(SealHead { number: 0, hash: Vec::new() }, |last| last.head))
    }

    /// Finds out what became of transactions of unknown outcome.
    async fn resolve(&mut self, gives_up: bool) -> Result<(), AuditError> {
        for (number, ids) in self.process.unknown(gives_up) {
            let found = storage::audit::count_events(self.connected().await?, &ids).await?;
            // A commit that becomes visible later is harmless: its number is accounted for twice.
            self.process.resolve(number, found > 0);
        }
        Ok(())
    }

    /// Writes batches without events for numbers that need one.
    async fn account(&mut self, closes: bool) -> Result<(), AuditError> {
        let notices = self.process.notices(closes);
        if notices.is_empty() {
            return Ok(());
        }
        let mut tx = self.take_connected().await?.begin().await.map_err(StorageError::from)?;
        for notice in &notices {
            storage::audit::insert_batch(&mut tx, notice, &[]).await?;
        }
        self.conn = Some(tx.commit_and_keep().await.map_err(StorageError::from)?);
        self.process.noticed(&notices);
        Ok(())
    }

    /// Resolves unknown outcomes, looks for removed batches of this process, and measures the
    /// oldest unsealed batch.
    async fn survey(&mut self) -> Result<(), AuditError> {
        self.resolve(false).await?;
        let mut missing = self.process.unsealed();
        let (process_id, ids) = (self.process.id(), ids_of(&self.process.peppers.current().audit_keys()));
        // A batch that is in neither of these two reads, in this order, is gone.
        for waiting in storage::audit::list_unsealed_sequences(self.connected().await?, process_id).await? {
            missing.remove(&waiting);
        }
        self.follow().await?;
        self.process.report_removed(&missing);
        let age = storage::audit::find_oldest_unsealed_age(self.connected().await?, &ids).await?;
        self.process.metrics.measured_oldest_unsealed(Duration::try_from_secs_f64(age).unwrap_or_default());
        Ok(())
    }

    async fn connected(&mut self) -> Result<&mut PgConnection, StorageError> {
        let conn = self.take_connected().await?;
        Ok(self.conn.insert(conn))
    }

    /// Takes the connection, for a transaction. A connection on which an error occurred is not put
    /// back.
    async fn take_connected(&mut self) -> Result<PgConnection, StorageError> {
        match self.conn.take() {
            Some(conn) => Ok(conn),
            None => Ok(PgConnection::connect_with(&self.options, OPERATION_MAX).await?),
        }
    }
}

/// Returns the ids of the keys whose batches this process seals.
fn ids_of(keys: &[AuditKey]) -> Vec<String> {
    keys.iter().map(|key| key.id().to_owned()).collect()
}

fn make_seal(key: &AuditKey, last: Option<LastSeal>, batches: &[Batch], seen: Option<SealHead>) -> Seal {
    let (before, events, pruned_through) = match last {
        Some(last) => (last.head, last.events, last.pruned_through),
        None => (SealHead { number: 0, hash: Vec::new() }, 0, None),
    };
    let event_ids: Vec<Uuid> = batches.iter().flat_map(|batch| batch.event_ids.iter().copied()).collect();
    let now = crate::clock::now();
    key.sign_seal(Seal {
        head: SealHead { number: before.number + 1, hash: Vec::new() },
        // Postgres stores microseconds.
        sealed_at: chrono::DateTime::from_timestamp_micros(now.timestamp_micros()).unwrap_or(now),
        key_id: String::new(),
        batches: batches.iter().map(|batch| batch.entry).collect(),
        events: events + i64::try_from(event_ids.len()).unwrap_or(i64::MAX),
        event_ids,
        digest: digest(batches.iter().flat_map(|batch| batch.hashes.iter().map(Vec::as_slice))),
        previous_hash: before.hash,
        seen,
        pruned_through,
    })
}
