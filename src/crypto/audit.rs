//! What links the events of the audit record, so that none can be changed, removed or moved by somebody who has the
//! database alone: HMAC-SHA-256 under a key that is derived from the pepper, which the database does not hold.

use aws_lc_rs::hmac;
use uuid::Uuid;

use crate::{
    crypto::api_key::Pepper,
    domain::audit::{Chain, Event, Head, Link, LinkedEvent, Opening, hex},
};

/// The key of all HMACs in the audit record.
#[derive(Clone)]
pub struct AuditKey {
    key: hmac::Key,
    id: String,
}

impl std::fmt::Debug for AuditKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuditKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl AuditKey {
    /// Derives the key. One pepper makes one key: all processes that share it check each other's chains.
    #[must_use]
    pub fn of(pepper: &Pepper) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, pepper.subkey("regcred audit chain 1").as_ref());
        let digest = hmac::sign(&key, b"id");
        let id = hex(digest.as_ref().get(..8).unwrap_or_default());
        Self { key, id }
    }

    /// Says which key it is, and nothing of it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Makes the next link of a chain, and moves its head there.
    #[must_use]
    pub fn link(&self, chain_id: Uuid, head: &mut Head, event: Event) -> LinkedEvent {
        let sequence = head.sequence + 1;
        let hash = self.sign(b"event", &event.bytes(chain_id, sequence, &head.hash));
        let previous_hash = std::mem::replace(&mut head.hash, hash.clone());
        head.sequence = sequence;
        LinkedEvent { event, link: Link { chain_id, sequence, previous_hash, hash } }
    }

    /// Whether an event is what was once written at this place of this chain.
    #[must_use]
    pub fn is_authentic_at(&self, linked: &LinkedEvent, chain_id: Uuid, sequence: i64) -> bool {
        let LinkedEvent { event, link } = linked;
        self.verify(b"event", &event.bytes(chain_id, sequence, &link.previous_hash), &link.hash)
    }

    /// Signs where a chain is.
    #[must_use]
    pub fn seal(&self, chain_id: Uuid, head: &Head) -> Vec<u8> {
        self.sign(b"head", &head_bytes(chain_id, head))
    }

    /// Whether a chain was once where its head says.
    #[must_use]
    pub fn is_sealed(&self, chain: &Chain) -> bool {
        self.verify(b"head", &head_bytes(chain.opening.id, &chain.head), &chain.seal)
    }

    /// Signs how a chain begins; `before` is what this made for the chain with the number before.
    #[must_use]
    pub fn open(&self, opening: &Opening, before: &[u8]) -> Vec<u8> {
        self.sign(b"opening", &opening.bytes(before))
    }

    /// Whether a chain began so.
    #[must_use]
    pub fn is_opening(&self, chain: &Chain, before: &[u8]) -> bool {
        self.verify(b"opening", &chain.opening.bytes(before), &chain.opening_hash)
    }

    /// `purpose` keeps one kind of HMAC from being taken for another.
    fn sign(&self, purpose: &[u8], bytes: &[u8]) -> Vec<u8> {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(purpose);
        context.update(&[0]);
        context.update(bytes);
        context.sign().as_ref().to_vec()
    }

    fn verify(&self, purpose: &[u8], bytes: &[u8], tag: &[u8]) -> bool {
        hmac::verify(&self.key, &[purpose, &[0], bytes].concat(), tag).is_ok()
    }
}

fn head_bytes(chain_id: Uuid, head: &Head) -> Vec<u8> {
    [&chain_id.as_bytes()[..], &head.sequence.to_be_bytes(), &head.hash].concat()
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use secrecy::SecretString;

    use super::*;
    use crate::domain::{
        audit::{Action, NewEvent, Resource},
        caller::{Actor, ActorKind},
    };

    fn key(byte: u8) -> AuditKey {
        AuditKey::of(&Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([byte; 32]))).unwrap())
    }

    fn event() -> Event {
        let actor = Actor { kind: ActorKind::CommandLine, id: None, name: "martin".to_owned() };
        NewEvent::by(&actor, Action::MasterKeyRotate, Resource::master_keys()).stamp(Uuid::now_v7())
    }

    #[test]
    fn a_link_holds_at_its_place_under_its_key_alone() {
        let (chain, mut head) = (Uuid::now_v7(), Head { sequence: 0, hash: b"opening".to_vec() });
        let first = key(1).link(chain, &mut head, event());
        let second = key(1).link(chain, &mut head, event());

        assert_eq!((first.link.sequence, second.link.sequence, head.sequence), (1, 2, 2));
        assert_eq!((&second.link.previous_hash, &head.hash), (&first.link.hash, &second.link.hash));
        assert!(key(1).is_authentic_at(&first, chain, 1));
        assert!(!key(1).is_authentic_at(&first, chain, 2));
        assert!(!key(1).is_authentic_at(&first, Uuid::now_v7(), 1));
        assert!(!key(2).is_authentic_at(&first, chain, 1));
        assert_ne!(key(1).id(), key(2).id());
    }

    #[test]
    fn a_seal_is_no_link() {
        let head = Head { sequence: 0, hash: Vec::new() };
        assert_ne!(key(1).seal(Uuid::nil(), &head), key(1).sign(b"event", &head_bytes(Uuid::nil(), &head)));
    }
}
