//! Batches of events and the chain of seals over them.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{put, put_option};

/// Events that one statement inserted. Its number makes a removed batch visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Identifier, a `UUIDv7`.
    pub id: Uuid,
    /// Key of the HMACs.
    pub key_id: String,
    /// Position among the batches of its process, and its events.
    pub entry: BatchEntry,
    /// Events, in order. Empty for a batch that accounts for a number alone.
    pub event_ids: Vec<Uuid>,
    /// HMACs of the events.
    pub hashes: Vec<Vec<u8>>,
    /// HMAC of the batch.
    pub mac: Vec<u8>,
}

/// Position of a batch among the batches of its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchEntry {
    /// Process that wrote the batch.
    pub process_id: Uuid,
    /// Number of the batch: 1, 2, 3, …
    pub sequence: i64,
    /// Every number up to this one was committed or is accounted for. Equal to `sequence` in the
    /// last batch of a process.
    pub settled_through: i64,
    /// Number of events.
    pub events: i32,
}

impl Batch {
    /// Returns the input of the batch's HMAC.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(128 + self.hashes.len() * 56);
        bytes.extend(self.id.as_bytes());
        put(&mut bytes, self.key_id.as_bytes());
        put_entry(&mut bytes, &self.entry);
        put_ids(&mut bytes, &self.event_ids);
        self.hashes.iter().for_each(|hash| put(&mut bytes, hash));
        bytes
    }
}

/// Number and hash of a seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealHead {
    /// Number of the seal.
    pub number: i64,
    /// HMAC of the seal.
    pub hash: Vec<u8>,
}

/// Binds batches to all seals before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// Number and HMAC.
    pub head: SealHead,
    /// When the batches were sealed, by the clock of the replica.
    pub sealed_at: DateTime<Utc>,
    /// Key of the HMAC.
    pub key_id: String,
    /// Sealed batches.
    pub batches: Vec<BatchEntry>,
    /// Events of all batches, in order.
    pub event_ids: Vec<Uuid>,
    /// Number of events in all seals up to this one.
    pub events: i64,
    /// SHA-256 over the HMACs of the events.
    pub digest: Vec<u8>,
    /// HMAC of the seal before; empty for the first seal.
    pub previous_hash: Vec<u8>,
    /// Last seal that the sealing process had seen.
    pub seen: Option<SealHead>,
    /// Events of the seals up to this number may be gone: they were pruned.
    pub pruned_through: Option<i64>,
}

impl Seal {
    /// Returns the input of the seal's HMAC.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256 + self.batches.len() * 40 + self.event_ids.len() * 16);
        bytes.extend(self.head.number.to_be_bytes());
        bytes.extend(self.sealed_at.timestamp_micros().to_be_bytes());
        put(&mut bytes, self.key_id.as_bytes());
        bytes.extend((self.batches.len() as u64).to_be_bytes());
        self.batches.iter().for_each(|entry| put_entry(&mut bytes, entry));
        put_ids(&mut bytes, &self.event_ids);
        bytes.extend(self.events.to_be_bytes());
        put(&mut bytes, &self.digest);
        put(&mut bytes, &self.previous_hash);
        let seen = self.seen.as_ref().map(|seen| [&seen.number.to_be_bytes()[..], &seen.hash].concat());
        put_option(&mut bytes, seen.as_deref());
        put_option(&mut bytes, self.pruned_through.map(i64::to_be_bytes).as_ref().map(<[u8; 8]>::as_slice));
        bytes
    }
}

fn put_entry(bytes: &mut Vec<u8>, entry: &BatchEntry) {
    bytes.extend(entry.process_id.as_bytes());
    bytes.extend(entry.sequence.to_be_bytes());
    bytes.extend(entry.settled_through.to_be_bytes());
    bytes.extend(entry.events.to_be_bytes());
}

fn put_ids(bytes: &mut Vec<u8>, ids: &[Uuid]) {
    bytes.extend((ids.len() as u64).to_be_bytes());
    for id in ids {
        bytes.extend(id.as_bytes());
    }
}
