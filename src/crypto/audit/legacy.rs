//! HMACs of event chains, as releases before seals wrote them.

use uuid::Uuid;

use super::AuditKey;
use crate::domain::audit::{
    Event, StoredEvent,
    legacy::{Chain, Head, Opening},
};

impl AuditKey {
    /// Makes the next event of a chain and moves the head there. Tests write chains with it.
    #[must_use]
    pub fn link(&self, chain_id: Uuid, head: &mut Head, event: Event) -> StoredEvent {
        let sequence = head.sequence + 1;
        let hash = self.sign(b"event", &event.bytes(chain_id, sequence, &head.hash));
        let previous_hash = std::mem::replace(&mut head.hash, hash.clone());
        head.sequence = sequence;
        StoredEvent { event, key_id: None, chain_id, sequence, previous_hash, hash }
    }

    /// Whether an event was written at this place of this chain.
    #[must_use]
    pub fn is_authentic_at(&self, stored: &StoredEvent, chain_id: Uuid, sequence: i64) -> bool {
        self.verify(b"event", &stored.event.bytes(chain_id, sequence, &stored.previous_hash), &stored.hash)
    }

    /// Signs the head of a chain.
    #[must_use]
    pub fn sign_head(&self, chain_id: Uuid, head: &Head) -> Vec<u8> {
        self.sign(b"head", &head_bytes(chain_id, head))
    }

    /// Whether a process once left the chain at its head.
    #[must_use]
    pub fn is_head(&self, chain: &Chain) -> bool {
        self.verify(b"head", &head_bytes(chain.opening.id, &chain.head), &chain.seal)
    }

    /// Signs the beginning of a chain. `before` is the HMAC of the previous opening.
    #[must_use]
    pub fn sign_opening(&self, opening: &Opening, before: &[u8]) -> Vec<u8> {
        self.sign(b"opening", &opening.bytes(before))
    }

    /// Whether a chain began so.
    #[must_use]
    pub fn is_opening(&self, chain: &Chain, before: &[u8]) -> bool {
        self.verify(b"opening", &chain.opening.bytes(before), &chain.opening_hash)
    }
}

fn head_bytes(chain_id: Uuid, head: &Head) -> Vec<u8> {
    [&chain_id.as_bytes()[..], &head.sequence.to_be_bytes(), &head.hash].concat()
}
