//! HMACs of the audit log. Their key is derived from the pepper, which the database does not hold:
//! write access to the database alone is not enough to make a valid event, batch or seal.

use aws_lc_rs::{digest, hmac};
use uuid::Uuid;

use crate::{
    crypto::pepper::Pepper,
    domain::audit::{
        Event, StoredEvent, hex,
        seal::{Batch, BatchEntry, Seal},
    },
};

mod legacy;

/// Key of all HMACs in the audit log.
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
    /// Derives the key. Processes that share a pepper verify each other's events.
    #[must_use]
    pub fn of(pepper: &Pepper) -> Self {
        let key = pepper.subkey("regcred audit chain 1");
        let digest = hmac::sign(&key, b"id");
        let id = hex(digest.as_ref().get(..8).unwrap_or_default());
        Self { key, id }
    }

    /// Identifies the key and reveals nothing of it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Signs an event at its place among the events of a process.
    #[must_use]
    pub fn sign_event(&self, event: Event, process_id: Uuid, sequence: i64) -> StoredEvent {
        let hash = self.sign(b"sealed event", &event.bytes(process_id, sequence, &[]));
        let key_id = Some(self.id.clone());
        StoredEvent { event, key_id, chain_id: process_id, sequence, previous_hash: Vec::new(), hash }
    }

    /// Whether an event is as a process wrote it.
    #[must_use]
    pub fn is_authentic(&self, stored: &StoredEvent) -> bool {
        let purpose: &[u8] = if stored.key_id.is_some() { b"sealed event" } else { b"event" };
        let bytes = stored.event.bytes(stored.chain_id, stored.sequence, &stored.previous_hash);
        self.verify(purpose, &bytes, &stored.hash)
    }

    /// Makes a batch of events, of which it binds ids and HMACs.
    #[must_use]
    pub fn sign_batch<'a>(&self, mut entry: BatchEntry, events: impl IntoIterator<Item = (Uuid, &'a [u8])>) -> Batch {
        let (event_ids, hashes): (Vec<Uuid>, Vec<Vec<u8>>) =
            events.into_iter().map(|(id, hash)| (id, hash.to_vec())).unzip();
        entry.events = i32::try_from(event_ids.len()).unwrap_or(i32::MAX);
        let mut batch =
            Batch { id: Uuid::now_v7(), key_id: self.id.clone(), entry, event_ids, hashes, mac: Vec::new() };
        batch.mac = self.sign(b"batch", &batch.bytes());
        batch
    }

    /// Whether a batch is as a process wrote it.
    #[must_use]
    pub fn is_batch(&self, batch: &Batch) -> bool {
        self.verify(b"batch", &batch.bytes(), &batch.mac)
    }

    /// Signs a seal.
    #[must_use]
    pub fn sign_seal(&self, mut seal: Seal) -> Seal {
        seal.key_id.clone_from(&self.id);
        seal.head.hash = self.sign(b"seal", &seal.bytes());
        seal
    }

    /// Whether a seal is as a process wrote it.
    #[must_use]
    pub fn is_seal(&self, seal: &Seal) -> bool {
        self.verify(b"seal", &seal.bytes(), &seal.head.hash)
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

/// Digests the HMACs of the events of a seal, in order.
pub fn digest<'a>(hashes: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut context = digest::Context::new(&digest::SHA256);
    hashes.into_iter().for_each(|hash| context.update(hash));
    context.finish().as_ref().to_vec()
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use chrono::TimeDelta;
    use secrecy::SecretString;

    use super::*;
    use crate::domain::{
        audit::{Action, NewEvent, Resource, seal::SealHead},
        caller::{Actor, ActorKind},
    };

    fn key(byte: u8) -> AuditKey {
        AuditKey::of(&Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([byte; 32]))).unwrap())
    }

    fn event() -> Event {
        let actor = Actor { kind: ActorKind::CommandLine, id: None, name: "dev".to_owned() };
        NewEvent::by(&actor, Action::MasterKeyRotate, Resource::master_keys()).stamp(Uuid::now_v7())
    }

    #[test]
    fn event_is_authentic_at_its_place_under_its_key_alone() {
        let stored = key(1).sign_event(event(), Uuid::now_v7(), 7);
        assert!(key(1).is_authentic(&stored));
        assert!(!key(2).is_authentic(&stored));
        assert!(!key(1).is_authentic(&StoredEvent { sequence: 8, ..stored.clone() }));
        assert!(!key(1).is_authentic(&StoredEvent { chain_id: Uuid::now_v7(), ..stored.clone() }));
        assert!(!key(1).is_authentic(&StoredEvent { key_id: None, ..stored }));
        assert_ne!(key(1).id(), key(2).id());
    }

    #[test]
    fn every_field_of_a_batch_is_signed() {
        let process_id = Uuid::now_v7();
        let events = [key(1).sign_event(event(), process_id, 1)];
        let entry = BatchEntry { process_id, sequence: 3, settled_through: 2, events: 0 };
        let batch = key(1).sign_batch(entry, events.iter().map(StoredEvent::binding));
        assert!(key(1).is_batch(&batch) && !key(2).is_batch(&batch));
        let edits: [fn(&mut Batch); 8] = [
            |b| b.id = Uuid::nil(),
            |b| b.key_id.push('x'),
            |b| b.entry.process_id = Uuid::nil(),
            |b| b.entry.sequence = 4,
            |b| b.entry.settled_through = 3,
            |b| b.entry.events = 0,
            |b| b.event_ids.clear(),
            |b| b.hashes[0].push(0),
        ];
        for (index, edit) in edits.iter().enumerate() {
            let mut changed = batch.clone();
            edit(&mut changed);
            assert!(!key(1).is_batch(&changed), "edit {index}");
        }
    }

    #[test]
    fn every_field_of_a_seal_is_signed() {
        let entry = BatchEntry { process_id: Uuid::now_v7(), sequence: 1, settled_through: 0, events: 1 };
        let seal = key(1).sign_seal(Seal {
            head: SealHead { number: 2, hash: Vec::new() },
            sealed_at: crate::clock::now(),
            key_id: String::new(),
            batches: vec![entry],
            event_ids: vec![Uuid::now_v7()],
            events: 5,
            digest: digest([&[1][..]]),
            previous_hash: vec![1],
            seen: None,
            pruned_through: None,
        });
        assert!(key(1).is_seal(&seal) && !key(2).is_seal(&seal));
        let edits: [fn(&mut Seal); 9] = [
            |s| s.head.number = 3,
            |s| s.sealed_at += TimeDelta::microseconds(1),
            |s| s.batches.clear(),
            |s| s.event_ids.clear(),
            |s| s.events = 6,
            |s| s.digest = digest([]),
            |s| s.previous_hash.clear(),
            |s| s.seen = Some(SealHead { number: 1, hash: Vec::new() }),
            |s| s.pruned_through = Some(0),
        ];
        for (index, edit) in edits.iter().enumerate() {
            let mut changed = seal.clone();
            edit(&mut changed);
            assert!(!key(1).is_seal(&changed), "edit {index}");
        }
    }
}
