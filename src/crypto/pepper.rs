//! Peppers: keys that the database does not hold. Each one is the key of the HMAC over API keys,
//! and the root of the keys of the audit log and of the hashes of Secrets.
//!
//! A ring allows to rotate them. The first pepper makes new values, and all verify existing ones.
//! What depends on an older pepper is renewed when it is used: an API key when it authenticates,
//! the hash of a Secret when its target is reconciled. Audit events keep the key that signed them.

use aws_lc_rs::hmac;
use secrecy::SecretString;

use crate::{
    crypto::{
        audit::AuditKey,
        keyed_digest::{Digester, mac_of_parts},
        ring::{self, Line, ReloadableRing, Ring},
    },
    domain::{invalid::Invalid, pull_secret::ContentMac},
};

const BYTES_MIN: usize = 32;

/// Peppers of a process, which can be reloaded.
pub type Peppers = ReloadableRing<PepperRing>;

/// Key of the HMAC over API keys. Stored with the master keys, never in the database.
#[derive(Clone)]
pub struct Pepper {
    id: Option<String>,
    key: hmac::Key,
}

impl std::fmt::Debug for Pepper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pepper").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Pepper {
    /// Parses the only pepper of a ring.
    ///
    /// # Errors
    ///
    /// [`Invalid`] describes the problem without the value.
    pub fn parse(text: &SecretString) -> Result<Self, Invalid> {
        let PepperRing { first, older } = PepperRing::parse(text)?;
        if older.is_empty() { Ok(first.pepper) } else { Err(Invalid::new("must be one pepper")) }
    }

    fn from_line(Line { id, bytes }: Line) -> Result<Self, Invalid> {
        if bytes.len() < BYTES_MIN {
            return Err(Invalid::new(
                "the pepper must be 32 bytes or more: generate it with `regcred pepper generate`",
            ));
        }
        Ok(Self { id, key: hmac::Key::new(hmac::HMAC_SHA256, &bytes) })
    }

    /// Id, stored with each HMAC; `None` for a pepper without one.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    pub(super) fn mac(&self, key: &str) -> Vec<u8> {
        hmac::sign(&self.key, key.as_bytes()).as_ref().to_vec()
    }

    /// Derives a key for another purpose. It does not reveal the pepper, and no API key starts like
    /// a purpose.
    pub(super) fn subkey(&self, purpose: &str) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&self.key, purpose.as_bytes()).as_ref())
    }
}

/// Pepper with the keys that are derived from it.
#[derive(Clone)]
struct Entry {
    pepper: Pepper,
    audit_key: AuditKey,
    content_key: hmac::Key,
}

impl From<Pepper> for Entry {
    fn from(pepper: Pepper) -> Self {
        Self { audit_key: AuditKey::of(&pepper), content_key: pepper.subkey("regcred content key"), pepper }
    }
}

/// Peppers in order.
#[derive(Clone)]
pub struct PepperRing {
    first: Entry,
    older: Vec<Entry>,
}

impl std::fmt::Debug for PepperRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ids().map(|id| id.unwrap_or("unnamed"))).finish()
    }
}

impl From<Pepper> for PepperRing {
    fn from(pepper: Pepper) -> Self {
        Self { first: pepper.into(), older: Vec::new() }
    }
}

impl Ring for PepperRing {
    const NAME: &'static str = "pepper ring";

    /// Parses a ring: one line `ID:BASE64` per pepper of 32 bytes or more, or a line `BASE64` for a
    /// pepper of releases without rings. Empty lines and `#` comments are ignored.
    fn parse(text: &SecretString) -> Result<Self, Invalid> {
        let mut peppers = ring::parse_lines(text, Pepper::from_line)?.into_iter().map(Entry::from);
        let first = peppers
            .next()
            .ok_or_else(|| Invalid::new("contains no pepper: generate one with `regcred pepper generate`"))?;
        Ok(Self { first, older: peppers.collect() })
    }

    /// Also compares derived ids: a pepper without an id can be replaced by another one without an
    /// id.
    fn is_same(&self, other: &Self) -> bool {
        let keys = |ring: &Self| ring.entries().map(|entry| entry.audit_key.id().to_owned()).collect::<Vec<_>>();
        self.ids().eq(other.ids()) && keys(self) == keys(other)
    }
}

impl PepperRing {
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        std::iter::once(&self.first).chain(&self.older)
    }

    /// Returns the ids, `None` for a pepper without one.
    pub fn ids(&self) -> impl Iterator<Item = Option<&str>> {
        self.entries().map(|entry| entry.pepper.id())
    }

    /// Returns the pepper of new values.
    #[must_use]
    pub fn first(&self) -> &Pepper {
        &self.first.pepper
    }

    /// Returns the peppers in order, the one of new values first.
    pub(super) fn peppers(&self) -> impl Iterator<Item = &Pepper> {
        self.entries().map(|entry| &entry.pepper)
    }

    /// Returns a digester of each pepper for a purpose, that of the first pepper first.
    pub fn digesters(&self, purpose: &str) -> impl Iterator<Item = Digester> {
        self.peppers().map(move |pepper| Digester::of(pepper, purpose))
    }

    /// Adds the peppers of another ring, as older ones.
    #[must_use]
    pub fn with_older(mut self, ring: Self) -> Self {
        self.older.push(ring.first);
        self.older.extend(ring.older);
        self
    }

    /// Whether the MAC is that of the text under one of the peppers. Takes the same time whichever
    /// that is.
    pub(super) fn verify(&self, text: &str, mac: &[u8]) -> bool {
        let is_valid = |entry: &Entry| hmac::verify(&entry.pepper.key, text.as_bytes(), mac).is_ok();
        self.entries().fold(false, |found, entry| is_valid(entry) | found)
    }

    /// Returns the key that signs audit events.
    #[must_use]
    pub fn audit_key(&self) -> &AuditKey {
        &self.first.audit_key
    }

    /// Returns the keys that verify audit events.
    #[must_use]
    pub fn audit_keys(&self) -> Vec<AuditKey> {
        self.entries().map(|entry| entry.audit_key.clone()).collect()
    }

    /// Hashes the content of a Secret, given as parts, under each pepper.
    #[must_use]
    pub fn content_mac(&self, parts: &[&[u8]]) -> ContentMac {
        ContentMac {
            current: mac_of_parts(&self.first.content_key, parts).as_ref().to_vec(),
            older: self.older.iter().map(|entry| mac_of_parts(&entry.content_key, parts).as_ref().to_vec()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};

    use super::*;

    fn line(byte: u8) -> String {
        BASE64_STANDARD.encode([byte; 32])
    }

    fn ring(text: &str) -> PepperRing {
        PepperRing::parse(&SecretString::from(text)).unwrap()
    }

    #[test]
    fn pepper_without_an_id_keeps_its_meaning_in_a_ring() {
        let (old, both) = (ring(&line(1)), ring(&format!("p-1:{}\n{}\n", line(2), line(1))));
        assert_eq!(both.ids().collect::<Vec<_>>(), [Some("p-1"), None]);
        let mac = old.first().mac("text");
        assert!(old.verify("text", &mac) && both.verify("text", &mac));
        assert!(!both.verify("other", &mac) && !ring(&line(3)).verify("text", &mac));
        assert_eq!(old.audit_key().id(), both.audit_keys()[1].id());
        let content = old.content_mac(&[b"a"]);
        let renewed = both.content_mac(&[b"a"]);
        assert!(renewed.current != content.current && renewed.is_of(Some(&content.current)));
        assert!(!both.content_mac(&[b"b"]).is_of(Some(&content.current)) && !renewed.is_of(None));
    }

    #[test]
    fn id_does_not_change_the_derived_keys() {
        let (unnamed, named) = (ring(&line(1)), ring(&format!("p-1:{}", line(1))));
        assert!(named.verify("text", &unnamed.first().mac("text")));
        assert_eq!(unnamed.audit_key().id(), named.audit_key().id());
        assert!(!unnamed.is_same(&named));
    }

    #[test]
    fn replaced_pepper_without_an_id_is_noticed() {
        assert!(ring(&line(1)).is_same(&ring(&line(1))));
        assert!(!ring(&line(1)).is_same(&ring(&line(2))));
    }

    #[test]
    fn invalid_pepper_is_refused_without_its_content() {
        let short = BASE64_STANDARD.encode("canary");
        for bad in ["", "#", "canary!", &short, &format!("p-1:{short}"), &format!("{}\n{}", line(1), line(2))] {
            let refused = PepperRing::parse(&SecretString::from(bad)).unwrap_err().to_string();
            assert!(!refused.contains("canary") && !refused.contains(&short), "{refused}");
        }
        assert!(Pepper::parse(&SecretString::from(format!("p-1:{}\n{}", line(1), line(2)))).is_err());
    }
}
