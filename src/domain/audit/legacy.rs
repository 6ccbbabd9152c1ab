//! Chains of audit events, as releases before seals wrote them. Read by the chain verifier alone.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{put, put_option};

/// Beginning of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// Identifier of the chain.
    pub id: Uuid,
    /// Place among all chains: 1, 2, 3, …
    pub number: i64,
    /// When the chain was opened.
    pub opened_at: DateTime<Utc>,
    /// Chain that this one replaces, and the number of events that it had.
    pub continues: Option<(Uuid, i64)>,
}

impl Opening {
    /// Returns the input of the opening's HMAC. `before` is the HMAC of the previous opening.
    #[must_use]
    pub fn bytes(&self, before: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(128);
        put(&mut bytes, before);
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.number.to_be_bytes());
        bytes.extend(self.opened_at.timestamp_micros().to_be_bytes());
        let continues = self.continues.map(|(id, sequence)| [&id.as_bytes()[..], &sequence.to_be_bytes()].concat());
        put_option(&mut bytes, continues.as_deref());
        bytes
    }
}

/// Length of a chain and hash of its last event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Number of events.
    pub sequence: i64,
    /// Hash of the last event; the opening's HMAC if there are no events.
    pub hash: Vec<u8>,
}

/// Stored chain.
#[derive(Debug, Clone)]
pub struct Chain {
    /// Beginning of the chain.
    pub opening: Opening,
    /// HMAC of the opening.
    pub opening_hash: Vec<u8>,
    /// Key of the chain's HMACs.
    pub key_id: String,
    /// Current head.
    pub head: Head,
    /// HMAC of the head.
    pub seal: Vec<u8>,
}
