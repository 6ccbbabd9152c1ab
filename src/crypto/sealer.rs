//! Seals secrets for storage with AES-256-GCM-SIV under a ring of master keys.
//!
//! The first key of the ring seals, every key opens. The key id is stored with the ciphertext, so
//! that a new key can be added while rows of older keys exist. A ciphertext is bound to its table,
//! row and column. With GCM-SIV a repeated random nonce reveals at most that two plaintexts are
//! equal; with GCM it would reveal the key stream.

use std::{fmt, path::PathBuf, sync::Arc};

use aws_lc_rs::{
    aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use parking_lot::RwLock;
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::domain::{
    invalid::Invalid,
    sealed::{Sealed, Slot},
};

const KEY_BYTES: usize = 32;

/// Returns the associated data that binds a ciphertext to its slot.
fn aad(slot: Slot) -> Aad<String> {
    Aad::from(format!("{}/{}/{}", slot.table, slot.id, slot.column))
}

/// Reason why a sealed value did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The ring does not contain the key that sealed the value.
    #[error("master key {0:?} is not in the ring: add it to the key ring")]
    UnknownKey(String),
    /// The ciphertext was not sealed for this slot with this key.
    #[error(
        "the sealed value of {table}/{id} is damaged, belongs to another row, or was sealed with a different key of the \
         same id"
    )]
    Tampered {
        /// Table of the slot.
        table: &'static str,
        /// Row of the slot.
        id: Uuid,
    },
}

/// The random generator of the system failed.
#[derive(Debug, thiserror::Error)]
#[error("the system returned no random bytes")]
pub struct SealError;

/// Master keys in order. The first one seals, all of them open.
pub struct KeyRing {
    keys: Vec<(String, LessSafeKey)>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|(id, _)| id)).finish()
    }
}

impl KeyRing {
    /// Parses a ring: one line `ID:BASE64` per key of 32 bytes. Empty lines and `#` comments are
    /// ignored.
    ///
    /// # Errors
    ///
    /// [`Invalid`] names the line, without its content.
    pub fn parse(ring: &SecretString) -> Result<Self, Invalid> {
        let mut keys: Vec<(String, LessSafeKey)> = Vec::new();
        for (number, line) in ring.expose_secret().lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (id, key) = Self::parse_line(line).map_err(|e| Invalid::new(format!("line {}: {e}", number + 1)))?;
            if keys.iter().any(|(other, _)| *other == id) {
                return Err(Invalid::new(format!("line {}: key id {id:?} is a duplicate", number + 1)));
            }
            keys.push((id, key));
        }
        if keys.is_empty() {
            return Err(Invalid::new("contains no key: generate one with `regcred master-key generate`"));
        }
        Ok(Self { keys })
    }

    fn parse_line(line: &str) -> Result<(String, LessSafeKey), Invalid> {
        let (id, key) = line.split_once(':').ok_or_else(|| Invalid::new("must be ID:BASE64"))?;
        let id_is_good =
            (1..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !id_is_good {
            return Err(Invalid::new("the id must be 1 to 32 letters, digits, '-' or '_'"));
        }
        let bytes =
            Zeroizing::new(BASE64_STANDARD.decode(key.trim()).map_err(|_| Invalid::new("the key is not base64"))?);
        let key =
            UnboundKey::new(&AES_256_GCM_SIV, &bytes).map_err(|_| Invalid::new("the key must be 32 bytes long"))?;
        Ok((id.to_owned(), LessSafeKey::new(key)))
    }

    /// Returns the key ids, the sealing key first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|(id, _)| id.as_str())
    }

    fn find(&self, id: &str) -> Option<&LessSafeKey> {
        self.keys.iter().find(|(other, _)| other == id).map(|(_, key)| key)
    }

    fn seal(&self, slot: Slot, secret: &SecretString) -> Result<Sealed, SealError> {
        // `parse` is the only constructor and rejects an empty ring.
        let (id, key) = self.keys.first().ok_or(SealError)?;
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).map_err(|_| SealError)?;
        let plain = secret.expose_secret().as_bytes();
        let mut bytes = Vec::with_capacity(NONCE_LEN + plain.len() + AES_256_GCM_SIV.tag_len());
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(plain);
        let tag = key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), aad(slot), &mut bytes[NONCE_LEN..])
            .map_err(|_| SealError)?;
        bytes.extend_from_slice(tag.as_ref());
        Ok(Sealed { key_id: id.clone(), bytes })
    }

    fn open(&self, slot: Slot, sealed: &Sealed) -> Result<SecretString, OpenError> {
        let key = self.find(&sealed.key_id).ok_or_else(|| OpenError::UnknownKey(sealed.key_id.clone()))?;
        let tampered = OpenError::Tampered { table: slot.table, id: slot.id };
        let Some((nonce, ciphertext)) = sealed.bytes.split_first_chunk::<NONCE_LEN>() else {
            return Err(tampered);
        };
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let opened = key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), aad(slot), &mut buffer)
            .ok()
            .and_then(|plain| std::str::from_utf8(plain).ok());
        opened.map(SecretString::from).ok_or(tampered)
    }
}

/// Generates a master key and returns its line for the key ring file.
///
/// # Errors
///
/// [`SealError`] if the system returns no random bytes.
pub fn generate_ring_line() -> Result<SecretString, SealError> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    rand::fill(key.as_mut()).map_err(|_| SealError)?;
    let mut id = [0; 4];
    rand::fill(&mut id).map_err(|_| SealError)?;
    let encoded = Zeroizing::new(BASE64_STANDARD.encode(*key));
    Ok(SecretString::from(format!("k-{:08x}:{}", u32::from_be_bytes(id), *encoded)))
}

/// Seals and opens with the current ring, which can be reloaded.
#[derive(Debug)]
pub struct Sealer {
    ring: RwLock<Arc<KeyRing>>,
    /// File of the ring, if it came from one.
    file: Option<PathBuf>,
}

impl Sealer {
    /// Creates a sealer. [`reload`](Self::reload) reads a newer ring from `file`.
    #[must_use]
    pub fn new(ring: KeyRing, file: Option<PathBuf>) -> Self {
        Self { ring: RwLock::new(Arc::new(ring)), file }
    }

    /// Reads the key ring file again. Does nothing without a file.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the file cannot be read or parsed; the current ring stays in use.
    pub fn reload(&self) -> Result<(), Invalid> {
        let Some(file) = &self.file else { return Ok(()) };
        let text = std::fs::read_to_string(file).map_err(|e| Invalid::new(format!("{}: {e}", file.display())))?;
        let ring =
            KeyRing::parse(&SecretString::from(text)).map_err(|e| Invalid::new(format!("{}: {e}", file.display())))?;
        if !ring.ids().eq(self.ring().ids()) {
            tracing::info!(keys = ?ring, "master key ring reloaded");
            *self.ring.write() = Arc::new(ring);
        }
        Ok(())
    }

    /// Returns the current ring.
    #[must_use]
    pub fn ring(&self) -> Arc<KeyRing> {
        Arc::clone(&self.ring.read())
    }

    /// Returns the id of the key that seals.
    #[must_use]
    pub fn sealing_key_id(&self) -> String {
        self.ring().ids().next().unwrap_or_default().to_owned()
    }

    /// Seals a secret for a slot.
    ///
    /// # Errors
    ///
    /// [`SealError`] if the system returns no random bytes.
    pub fn seal(&self, slot: Slot, secret: &SecretString) -> Result<Sealed, SealError> {
        self.ring().seal(slot, secret)
    }

    /// Opens a value that was sealed for this slot. Reloads the ring if the key is unknown, because
    /// another replica or `master-key rotate` may already use a newer ring.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the key is unknown or the ciphertext does not belong to the slot.
    pub fn open(&self, slot: Slot, sealed: &Sealed) -> Result<SecretString, OpenError> {
        match self.ring().open(slot, sealed) {
            Err(OpenError::UnknownKey(id)) => {
                if let Err(error) = self.reload() {
                    tracing::error!(%error, "master key ring not reloaded");
                    return Err(OpenError::UnknownKey(id));
                }
                self.ring().open(slot, sealed)
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn ring(ids: &[&str]) -> KeyRing {
        let lines: Vec<String> = ids
            .iter()
            .map(|id| {
                let key = [u8::try_from(id.len()).unwrap(); KEY_BYTES];
                format!("{id}:{}", BASE64_STANDARD.encode(key))
            })
            .collect();
        KeyRing::parse(&SecretString::from(lines.join("\n"))).unwrap()
    }

    fn slot(table: &'static str, column: &'static str, id: u128) -> Slot {
        Slot { table, column, id: Uuid::from_u128(id) }
    }

    proptest! {
        #[test]
        fn sealed_value_opens_only_in_its_own_slot(secret in any::<String>(), id in any::<u128>(), other in any::<u128>()) {
            let ring = ring(&["a"]);
            let own = slot("registry_accounts", "password", id);
            let sealed = ring.seal(own, &SecretString::from(secret.clone())).unwrap();

            let opened = ring.open(own, &sealed).unwrap();
            prop_assert_eq!(opened.expose_secret(), &secret);
            prop_assert!(ring.open(slot("clusters", "password", id), &sealed).is_err());
            prop_assert!(ring.open(slot("registry_accounts", "username", id), &sealed).is_err());
            if other != id {
                prop_assert!(ring.open(slot("registry_accounts", "password", other), &sealed).is_err());
            }
        }
    }

    #[test]
    fn any_flipped_bit_is_detected() {
        let ring = ring(&["a"]);
        let own = slot("t", "c", 1);
        let sealed = ring.seal(own, &SecretString::from("secret")).unwrap();
        for bit in 0..sealed.bytes.len() * 8 {
            let mut damaged = sealed.clone();
            damaged.bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(ring.open(own, &damaged).is_err(), "bit {bit}");
        }
        for length in 0..sealed.bytes.len() {
            let cut = Sealed { bytes: sealed.bytes[..length].to_vec(), ..sealed.clone() };
            assert!(ring.open(own, &cut).is_err(), "length {length}");
        }
    }

    #[test]
    fn nonces_do_not_repeat() {
        let ring = ring(&["a"]);
        let secret = SecretString::from("");
        let nonces: HashSet<Vec<u8>> =
            (0..100_000).map(|_| ring.seal(slot("t", "c", 1), &secret).unwrap().bytes[..NONCE_LEN].to_vec()).collect();
        assert_eq!(nonces.len(), 100_000);
    }

    #[test]
    fn first_key_seals_and_every_key_opens() {
        let own = slot("t", "c", 1);
        let old = ring(&["a"]).seal(own, &SecretString::from("s")).unwrap();
        let both = ring(&["bb", "a"]);
        assert_eq!(both.open(own, &old).unwrap().expose_secret(), "s");
        assert_eq!(both.seal(own, &SecretString::from("s")).unwrap().key_id, "bb");
        assert!(matches!(ring(&["bb"]).open(own, &old), Err(OpenError::UnknownKey(id)) if id == "a"));
    }

    #[test]
    fn invalid_ring_line_is_rejected_without_its_content() {
        for bad in ["", "# only a comment", "canary", "a:canary", "a:Y2FuYXJ5", "a b:AAAA", ":AAAA"] {
            let refused = KeyRing::parse(&SecretString::from(bad)).unwrap_err().to_string();
            assert!(!refused.contains("canary") && !refused.contains("Y2FuYXJ5"), "{refused}");
        }
        let line = generate_ring_line().unwrap();
        let twice = format!("{0}\n{0}", line.expose_secret());
        assert!(KeyRing::parse(&SecretString::from(twice)).is_err());
        assert!(KeyRing::parse(&line).is_ok());
    }
}
