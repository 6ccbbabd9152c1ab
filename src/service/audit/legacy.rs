//! Chains of events, as releases before seals wrote them: their verifier, and the adoption that
//! seals their events. Goes with the release after this one.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use uuid::Uuid;

use crate::{
    crypto::{audit::AuditKey, pepper::Peppers},
    domain::audit::{StoredEvent, hex, legacy::Chain},
    service::{
        ServiceError,
        audit::{process::Process, sealer::Sealer},
    },
    storage::{self, PgConnection, PgPool},
};

/// Events that are read at a time.
const PAGE: i64 = 2_000;
/// Events in a batch of adopted events.
const BATCH: usize = 1_000;
/// Most changed events of one chain whose original place is looked for.
const MISPLACED_MAX: usize = 200;

/// Head of a chain at an earlier verification, kept outside the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainAnchor {
    /// Chain.
    pub chain_id: Uuid,
    /// Number of events.
    pub sequence: i64,
    /// Hash of the last event, in hexadecimal digits.
    pub hash: String,
}

/// Kind of a finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// The HMAC of an event is wrong.
    Changed {
        /// Event.
        id: Uuid,
    },
    /// An event was written at another place of the chain.
    Moved {
        /// Event.
        id: Uuid,
        /// Original place.
        from: i64,
    },
    /// Events or a chain are missing.
    Missing {
        /// Last missing place; the first one is that of the finding. Number of the chain in a
        /// finding without a place.
        to: i64,
    },
    /// An event is not linked to the event before it.
    Unlinked {
        /// Event.
        id: Uuid,
    },
    /// There are events beyond the head.
    BeyondHead,
    /// The head is wrong.
    Head,
    /// The opening is wrong.
    Opening,
    /// There are events of an unknown chain.
    NoChain,
    /// The key is not available.
    UnknownKey {
        /// Key.
        key_id: String,
    },
    /// The chain contradicts an anchor or a chain that replaces it.
    NotAsAnchored,
}

/// Finding in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainFinding {
    /// Number of the chain, if known.
    pub number: Option<i64>,
    /// Identifier of the chain, if known.
    pub chain_id: Option<Uuid>,
    /// Place in the chain.
    pub sequence: Option<i64>,
    /// Kind.
    pub wrong: Wrong,
}

impl fmt::Display for ChainFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.number, self.chain_id) {
            (Some(number), Some(id)) => write!(f, "chain {number} ({id})")?,
            (Some(number), None) => write!(f, "chain {number}")?,
            (None, Some(id)) => write!(f, "chain {id}")?,
            (None, None) => write!(f, "chain")?,
        }
        if let Some(sequence) = self.sequence {
            write!(f, ", event {sequence}")?;
        }
        match &self.wrong {
            Wrong::Changed { id } => write!(f, ": {id} was changed"),
            Wrong::Moved { id, from } => write!(f, ": {id} was moved here from event {from}"),
            Wrong::Missing { to } if self.sequence.is_none_or(|sequence| sequence == *to) => write!(f, ": is missing"),
            Wrong::Missing { to } => write!(f, " to {to}: are missing"),
            Wrong::Unlinked { id } => write!(f, ": {id} does not follow the event before it"),
            Wrong::BeyondHead => write!(f, ": the event is beyond the head of the chain"),
            Wrong::Head => write!(f, ": the head of the chain was changed or set back"),
            Wrong::Opening => write!(f, ": the opening of the chain was changed, or the chain before it is missing"),
            Wrong::NoChain => write!(f, ": events of an unknown chain"),
            Wrong::UnknownKey { key_id } => {
                write!(f, ": signed with another pepper (key {key_id}); pass its file with --older-pepper-file")
            }
            Wrong::NotAsAnchored => write!(f, ": the chain contradicts an earlier state of it"),
        }
    }
}

/// Result of verifying chains.
#[derive(Debug, Default)]
pub struct ChainReport {
    /// Number of verified events.
    pub events: u64,
    /// Number of chains.
    pub chains: usize,
    /// Number of findings.
    pub findings: u64,
}

/// Verifies all chains in a snapshot. Calls `found` for each finding.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres is unavailable.
pub async fn verify_chains(
    conn: &mut PgConnection,
    keys: &[AuditKey],
    anchors: Vec<ChainAnchor>,
    found: &mut impl FnMut(&ChainFinding),
) -> Result<ChainReport, ServiceError> {
    let chains = storage::audit::legacy::list_chains(&mut *conn).await?;
    let mut check = Check::new(keys, &chains, anchors, found);
    check.openings(&chains);
    let mut after = (Uuid::nil(), i64::MIN);
    loop {
        let page = storage::audit::legacy::list_links(&mut *conn, after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = (last.chain_id, last.sequence);
        for event in page {
            check.event(event);
        }
    }
    check.end_of_chain();
    check.chains_without_events();
    check.anchored_chains(&chains);
    Ok(check.report)
}

/// Verifies all chains, then seals their events. Events that are sealed are left alone, so it can
/// be repeated. Returns the report, and how many events were sealed: none if there are findings.
///
/// # Errors
///
/// [`ServiceError::Audit`] if Postgres refuses a seal.
pub async fn adopt(
    pool: &PgPool,
    peppers: Arc<Peppers>,
    found: &mut impl FnMut(&ChainFinding),
) -> Result<(ChainReport, usize), ServiceError> {
    // One adoption at a time: an event must not be sealed twice.
    let mut tx = pool.begin().await?;
    storage::audit::legacy::lock_adoption(&mut tx).await?;
    let mut snapshot = storage::audit::snapshot(pool).await?;
    let report = verify_chains(&mut snapshot, &peppers.current().audit_keys(), Vec::new(), found).await?;
    if report.findings > 0 {
        return Ok((report, 0));
    }
    let mut events = storage::audit::list_miscounted_events(&mut snapshot).await?;
    events.retain(|event| event.key_id.is_none() && event.bindings == 0);
    snapshot.commit().await?;
    let process = Arc::new(Process::new(peppers, Arc::default()));
    let batches = events.len().div_ceil(BATCH);
    for (index, page) in events.chunks(BATCH).enumerate() {
        let bound: Vec<(Uuid, &[u8])> = page.iter().map(|event| (event.id, event.hash.as_slice())).collect();
        let sequence = i64::try_from(index + 1).unwrap_or(i64::MAX);
        let batch = process.adopt(sequence, index + 1 == batches, &bound);
        storage::audit::insert_batch_alone(&mut tx, &batch).await?;
    }
    tx.commit().await?;
    Sealer::new(process, pool.connect_options()).seal_all(Uuid::nil()).await?;
    Ok((report, events.len()))
}

/// State of the walk along a chain.
struct Walk {
    chain: Chain,
    key: Option<AuditKey>,
    /// Expected place, and the hash of the event before it if that is authentic.
    expected: i64,
    previous_hash: Option<Vec<u8>>,
    last: Option<(i64, Vec<u8>)>,
    /// Events that are not authentic at their place.
    changed: Vec<StoredEvent>,
    is_anchored: bool,
}

struct Check<'a, F> {
    keys: &'a [AuditKey],
    /// Chains that were not walked yet.
    chains: HashMap<Uuid, Chain>,
    anchors: HashMap<Uuid, ChainAnchor>,
    orphans: HashSet<Uuid>,
    walk: Option<Walk>,
    report: ChainReport,
    report_to: &'a mut F,
}

impl<'a, F: FnMut(&ChainFinding)> Check<'a, F> {
    fn new(keys: &'a [AuditKey], chains: &[Chain], anchors: Vec<ChainAnchor>, report_to: &'a mut F) -> Self {
        Self {
            keys,
            chains: chains.iter().map(|chain| (chain.opening.id, chain.clone())).collect(),
            anchors: anchors.into_iter().map(|anchor| (anchor.chain_id, anchor)).collect(),
            orphans: HashSet::new(),
            walk: None,
            report: ChainReport { chains: chains.len(), ..ChainReport::default() },
            report_to,
        }
    }

    fn found(&mut self, chain: &Chain, sequence: Option<i64>, wrong: Wrong) {
        let (number, chain_id) = (Some(chain.opening.number), Some(chain.opening.id));
        self.tell(&ChainFinding { number, chain_id, sequence, wrong });
    }

    fn tell(&mut self, finding: &ChainFinding) {
        self.report.findings += 1;
        (self.report_to)(finding);
    }

    fn key(&self, chain: &Chain) -> Option<AuditKey> {
        self.keys.iter().find(|key| key.id() == chain.key_id).cloned()
    }

    /// Verifies the openings, which form a chain themselves.
    fn openings(&mut self, chains: &[Chain]) {
        let (mut number, mut before) = (0, Some(Vec::new()));
        for chain in chains {
            let is_next = chain.opening.number == number + 1;
            if !is_next {
                let first = number + 1;
                for missing in (first..chain.opening.number).take(MISPLACED_MAX) {
                    let wrong = Wrong::Missing { to: missing };
                    self.tell(&ChainFinding { number: Some(missing), chain_id: None, sequence: None, wrong });
                }
                before = None;
            }
            match self.key(chain) {
                None => self.found(chain, None, Wrong::UnknownKey { key_id: chain.key_id.clone() }),
                // The gap before this chain was reported.
                Some(key) if before.as_ref().is_some_and(|before| !key.is_opening(chain, before)) => {
                    self.found(chain, None, Wrong::Opening);
                }
                Some(_) => {}
            }
            self.continued(chains, chain);
            number = chain.opening.number;
            before = Some(chain.opening_hash.clone());
        }
    }

    /// Verifies the length of a chain against the chain that replaced it.
    fn continued(&mut self, chains: &[Chain], chain: &Chain) {
        let Some((id, sequence)) = chain.opening.continues else { return };
        let before = chains.iter().find(|other| other.opening.id == id);
        match before {
            None => {
                let finding =
                    ChainFinding { number: None, chain_id: Some(id), sequence: None, wrong: Wrong::NotAsAnchored };
                self.tell(&finding);
            }
            Some(before) if before.head.sequence < sequence => {
                let missing = before.head.sequence + 1;
                self.found(before, Some(missing), Wrong::Missing { to: sequence });
            }
            Some(_) => {}
        }
    }

    fn event(&mut self, event: StoredEvent) {
        self.report.events += 1;
        let chain_id = event.chain_id;
        if self.walk.as_ref().is_none_or(|walk| walk.chain.opening.id != chain_id) {
            self.end_of_chain();
            let Some(chain) = self.chains.remove(&chain_id) else {
                if self.orphans.insert(chain_id) {
                    let wrong = Wrong::NoChain;
                    self.tell(&ChainFinding { number: None, chain_id: Some(chain_id), sequence: None, wrong });
                }
                return;
            };
            self.begin(chain);
        }
        let Some(mut walk) = self.walk.take() else { return };
        self.follow(&mut walk, event);
        self.walk = Some(walk);
    }

    fn begin(&mut self, chain: Chain) {
        self.walk = Some(Walk {
            key: self.key(&chain),
            expected: 1,
            previous_hash: Some(chain.opening_hash.clone()),
            last: None,
            changed: Vec::new(),
            is_anchored: self.anchors.get(&chain.opening.id).is_none_or(|anchor| anchor.sequence == 0),
            chain,
        });
    }

    fn follow(&mut self, walk: &mut Walk, event: StoredEvent) {
        let Some(key) = &walk.key else { return };
        let (sequence, id, hash) = (event.sequence, event.event.id, event.hash.clone());
        if sequence > walk.expected {
            self.found(&walk.chain, Some(walk.expected), Wrong::Missing { to: sequence - 1 });
            walk.previous_hash = None;
        }
        let follows = walk.previous_hash.as_ref().is_none_or(|hash| *hash == event.previous_hash);
        let is_authentic = key.is_authentic_at(&event, walk.chain.opening.id, sequence);
        if !is_authentic {
            if walk.changed.len() < MISPLACED_MAX {
                walk.changed.push(event);
            } else {
                self.found(&walk.chain, Some(sequence), Wrong::Changed { id });
            }
        } else if !follows {
            self.found(&walk.chain, Some(sequence), Wrong::Unlinked { id });
        }
        if let Some(anchor) = self.anchors.get(&walk.chain.opening.id)
            && anchor.sequence == sequence
        {
            walk.is_anchored = anchor.hash == hex(&hash);
        }
        // The event after a changed one is not to blame.
        walk.previous_hash = is_authentic.then(|| hash.clone());
        walk.expected = sequence + 1;
        walk.last = Some((sequence, hash));
    }

    fn end_of_chain(&mut self) {
        let Some(walk) = self.walk.take() else { return };
        let Some(key) = &walk.key else { return };
        let Walk { chain, changed, .. } = &walk;
        for event in changed {
            let (id, place) = (event.event.id, event.sequence);
            let places = changed.iter().map(|other| other.sequence);
            let from = places.filter(|other| *other != place);
            let from = from.into_iter().find(|from| key.is_authentic_at(event, chain.opening.id, *from));
            let wrong = from.map_or(Wrong::Changed { id }, |from| Wrong::Moved { id, from });
            self.found(chain, Some(place), wrong);
        }
        let (sequence, hash) = walk.last.clone().unwrap_or((0, chain.opening_hash.clone()));
        self.head(key, chain, sequence, &hash);
        if !walk.is_anchored {
            self.found(chain, None, Wrong::NotAsAnchored);
        }
        self.anchors.remove(&chain.opening.id);
    }

    fn head(&mut self, key: &AuditKey, chain: &Chain, sequence: i64, hash: &[u8]) {
        if chain.head.sequence > sequence {
            self.found(chain, Some(sequence + 1), Wrong::Missing { to: chain.head.sequence });
        } else if chain.head.sequence < sequence {
            self.found(chain, Some(chain.head.sequence + 1), Wrong::BeyondHead);
        } else if chain.head.hash != hash {
            self.found(chain, None, Wrong::Head);
        }
        if !key.is_head(chain) {
            self.found(chain, None, Wrong::Head);
        }
    }

    fn chains_without_events(&mut self) {
        let mut chains: Vec<Chain> = self.chains.drain().map(|(_, chain)| chain).collect();
        chains.sort_by_key(|chain| chain.opening.number);
        for chain in chains {
            self.begin(chain);
            self.end_of_chain();
        }
    }

    /// Reports anchored chains that are gone. A chain under an unknown key was reported already.
    fn anchored_chains(&mut self, chains: &[Chain]) {
        let gone: Vec<Uuid> = self.anchors.keys().copied().collect();
        for chain_id in gone.into_iter().filter(|gone| chains.iter().all(|chain| chain.opening.id != *gone)) {
            let wrong = Wrong::NotAsAnchored;
            self.tell(&ChainFinding { number: None, chain_id: Some(chain_id), sequence: None, wrong });
        }
    }
}
