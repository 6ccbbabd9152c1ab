//! Checks that the audit record is what was written: no event changed, removed, added or moved.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    crypto::audit::AuditKey,
    domain::audit::{Chain, LinkedEvent, hex},
    service::ServiceError,
    storage,
};

/// Events that are read at a time.
const PAGE: i64 = 2_000;
/// How many events of one chain that are not what they were are looked at for where they belong.
const MISPLACED_MAX: usize = 200;

/// Where a chain was when somebody looked before, kept where nobody who writes to the database reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor {
    /// Which chain.
    pub chain_id: Uuid,
    /// How many events it had.
    pub sequence: i64,
    /// The hash of the last one, in hexadecimal digits.
    pub hash: String,
}

impl Anchor {
    fn of(chain: &Chain) -> Self {
        Self { chain_id: chain.opening.id, sequence: chain.head.sequence, hash: hex(&chain.head.hash) }
    }
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// An event is not what was written, or was written at another place that is not known.
    Changed {
        /// Its id.
        id: Uuid,
    },
    /// An event was written at another place.
    Moved {
        /// Its id.
        id: Uuid,
        /// Where it was written.
        from: i64,
    },
    /// Events are not there.
    Missing {
        /// The last one of them; the first one is where this was found. Without a place: the whole chain with this number.
        to: i64,
    },
    /// An event follows another one than the one before it.
    Unlinked {
        /// Its id.
        id: Uuid,
    },
    /// There are events that the chain's head does not know.
    BeyondHead,
    /// The head names another last event, or is none that was ever written.
    Head,
    /// The chain did not begin so, or does not follow the one before it.
    Opening,
    /// Events belong to a chain that is not there.
    NoChain,
    /// Its HMACs are made with a key that is not at hand.
    UnknownKey {
        /// Which one.
        key_id: String,
    },
    /// It is shorter than it was once, or another one.
    NotAsAnchored,
}

/// Something that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The number of the chain, where it has one.
    pub number: Option<i64>,
    /// The chain, where it is there.
    pub chain_id: Option<Uuid>,
    /// Where in it.
    pub sequence: Option<i64>,
    /// What.
    pub wrong: Wrong,
}

impl fmt::Display for Finding {
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
            Wrong::Moved { id, from } => write!(f, ": {id} was swapped in; it was written as event {from}"),
            Wrong::Missing { to } if self.sequence.is_none_or(|sequence| sequence == *to) => write!(f, ": is missing"),
            Wrong::Missing { to } => write!(f, " to {to}: are missing"),
            Wrong::Unlinked { id } => write!(f, ": {id} does not follow the event before it"),
            Wrong::BeyondHead => write!(f, ": the chain's head does not know this event"),
            Wrong::Head => write!(f, ": the head of the chain was changed or set back"),
            Wrong::Opening => write!(f, ": the opening of the chain was changed, or it follows a chain that is gone"),
            Wrong::NoChain => write!(f, ": there are events of a chain that is not there"),
            Wrong::UnknownKey { key_id } => {
                write!(f, ": written under another pepper (key {key_id}); name its file with --older-pepper-file")
            }
            Wrong::NotAsAnchored => write!(f, ": the chain is not what it was when it was verified before"),
        }
    }
}

/// What was looked at, and what was found.
#[derive(Debug, Default)]
pub struct Report {
    /// How many events were looked at.
    pub events: u64,
    /// Where each chain is, to be kept for the next time.
    pub anchors: Vec<Anchor>,
    /// How much is wrong.
    pub findings: u64,
}

/// Whom a verification tells what it does.
pub trait Watcher {
    /// Something is wrong.
    fn found(&mut self, finding: &Finding);
    /// So many of so many events were looked at.
    fn progress(&mut self, seen: u64, all: u64);
}

/// Checks all chains, as they are at one moment: a service that runs meanwhile is not disturbed and does not disturb.
/// Events are read page by page.
///
/// # Errors
///
/// [`ServiceError::Storage`] if Postgres cannot be asked. What is wrong with the record is no error but what was found.
pub async fn verify(
    pool: &PgPool,
    keys: &[AuditKey],
    anchors: Vec<Anchor>,
    watcher: &mut impl Watcher,
) -> Result<Report, ServiceError> {
    let mut tx = storage::audit::snapshot(pool).await?;
    let chains = storage::audit::list_chains(&mut tx).await?;
    let all = u64::try_from(storage::audit::count(&mut tx).await?).unwrap_or_default();
    let mut check = Check::new(keys, &chains, anchors, watcher);
    check.openings(&chains);
    let mut after = (Uuid::nil(), i64::MIN);
    loop {
        let page = storage::audit::list_links(&mut tx, after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = (last.link.chain_id, last.link.sequence);
        for event in page {
            check.event(event);
        }
        check.watcher.progress(check.report.events, all.max(check.report.events));
    }
    check.end_of_chain();
    check.chains_without_events();
    check.chains_that_were_anchored();
    Ok(check.report)
}

/// Where the walk along a chain is.
struct Walk {
    chain: Chain,
    key: Option<AuditKey>,
    /// The event that should come next, and the hash of the one before it, where that one is what it was.
    expected: i64,
    previous_hash: Option<Vec<u8>>,
    last: Option<(i64, Vec<u8>)>,
    /// Events that are not what was written at their place.
    changed: Vec<LinkedEvent>,
    is_anchored: bool,
}

struct Check<'a, W> {
    keys: &'a [AuditKey],
    /// Those to which the walk has not come.
    chains: HashMap<Uuid, Chain>,
    anchors: HashMap<Uuid, Anchor>,
    orphans: HashSet<Uuid>,
    walk: Option<Walk>,
    report: Report,
    watcher: &'a mut W,
}

impl<'a, W: Watcher> Check<'a, W> {
    fn new(keys: &'a [AuditKey], chains: &[Chain], anchors: Vec<Anchor>, watcher: &'a mut W) -> Self {
        Self {
            keys,
            chains: chains.iter().map(|chain| (chain.opening.id, chain.clone())).collect(),
            anchors: anchors.into_iter().map(|anchor| (anchor.chain_id, anchor)).collect(),
            orphans: HashSet::new(),
            walk: None,
            report: Report { anchors: chains.iter().map(Anchor::of).collect(), ..Report::default() },
            watcher,
        }
    }

    fn found(&mut self, chain: &Chain, sequence: Option<i64>, wrong: Wrong) {
        let (number, chain_id) = (Some(chain.opening.number), Some(chain.opening.id));
        self.tell(&Finding { number, chain_id, sequence, wrong });
    }

    fn tell(&mut self, finding: &Finding) {
        self.report.findings += 1;
        self.watcher.found(finding);
    }

    fn key(&self, chain: &Chain) -> Option<AuditKey> {
        self.keys.iter().find(|key| key.id() == chain.key_id).cloned()
    }

    /// The chains are a chain themselves: none is gone but perhaps the last ones.
    fn openings(&mut self, chains: &[Chain]) {
        let (mut number, mut before) = (0, Some(Vec::new()));
        for chain in chains {
            let is_next = chain.opening.number == number + 1;
            if !is_next {
                let first = number + 1;
                for missing in (first..chain.opening.number).take(MISPLACED_MAX) {
                    let wrong = Wrong::Missing { to: missing };
                    self.tell(&Finding { number: Some(missing), chain_id: None, sequence: None, wrong });
                }
                before = None;
            }
            match self.key(chain) {
                None => self.found(chain, None, Wrong::UnknownKey { key_id: chain.key_id.clone() }),
                // After a gap there is nothing to compare with; the gap was told.
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

    /// A writer that finds its chain changed says how long it was.
    fn continued(&mut self, chains: &[Chain], chain: &Chain) {
        let Some((id, sequence)) = chain.opening.continues else { return };
        let before = chains.iter().find(|other| other.opening.id == id);
        match before {
            None => {
                let finding = Finding { number: None, chain_id: Some(id), sequence: None, wrong: Wrong::NotAsAnchored };
                self.tell(&finding);
            }
            Some(before) if before.head.sequence < sequence => {
                let missing = before.head.sequence + 1;
                self.found(before, Some(missing), Wrong::Missing { to: sequence });
            }
            Some(_) => {}
        }
    }

    fn event(&mut self, event: LinkedEvent) {
        self.report.events += 1;
        let chain_id = event.link.chain_id;
        if self.walk.as_ref().is_none_or(|walk| walk.chain.opening.id != chain_id) {
            self.end_of_chain();
            let Some(chain) = self.chains.remove(&chain_id) else {
                if self.orphans.insert(chain_id) {
                    let wrong = Wrong::NoChain;
                    self.tell(&Finding { number: None, chain_id: Some(chain_id), sequence: None, wrong });
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

    fn follow(&mut self, walk: &mut Walk, event: LinkedEvent) {
        let Some(key) = &walk.key else { return };
        let (sequence, id, hash) = (event.link.sequence, event.event.id, event.link.hash.clone());
        if sequence > walk.expected {
            self.found(&walk.chain, Some(walk.expected), Wrong::Missing { to: sequence - 1 });
            walk.previous_hash = None;
        }
        let follows = walk.previous_hash.as_ref().is_none_or(|hash| *hash == event.link.previous_hash);
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
        // What follows an event that is not what it was cannot be blamed for that.
        walk.previous_hash = is_authentic.then(|| hash.clone());
        walk.expected = sequence + 1;
        walk.last = Some((sequence, hash));
    }

    fn end_of_chain(&mut self) {
        let Some(walk) = self.walk.take() else { return };
        let Some(key) = &walk.key else { return };
        let Walk { chain, changed, .. } = &walk;
        for event in changed {
            let (id, place) = (event.event.id, event.link.sequence);
            let places = changed.iter().map(|other| other.link.sequence);
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
        if !key.is_sealed(chain) {
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

    fn chains_that_were_anchored(&mut self) {
        let gone: Vec<Uuid> = self.anchors.keys().copied().collect();
        for chain_id in gone {
            // One that was written under another key was not looked at, which was told.
            let known = self.report.anchors.iter().any(|anchor| anchor.chain_id == chain_id);
            if !known {
                let finding =
                    Finding { number: None, chain_id: Some(chain_id), sequence: None, wrong: Wrong::NotAsAnchored };
                self.tell(&finding);
            }
        }
    }
}
