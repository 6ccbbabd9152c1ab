//! Seals secrets for storage with AES-256-GCM-SIV under a ring of master keys.
//!
//! The first key of the ring seals, every key opens. The key id is stored with the ciphertext, so
//! that a new key can be added while rows of older keys exist. With GCM-SIV a repeated random nonce
//! reveals at most that two plaintexts are equal; with GCM it would reveal the key stream.
//!
//! A ciphertext is bound to its table, row and column, and in the form [`SealForm::Bound`] also to
//! its destination. Both forms open until the process requires bound values, which it does once
//! every value of the database is bound.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aws_lc_rs::{
    aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    digest, rand,
};
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    crypto::{
        api_key::CryptoError,
        ring::{self, Line, ReloadableRing, Ring},
    },
    domain::{
        invalid::Invalid,
        sealed::{Field, SealForm, Sealed, Slot},
    },
};

/// Start of the additional data of bound values. That of unbound ones starts with a table's name.
const BOUND_DOMAIN: &[u8] = b"regcred sealed value 2\0";

/// Returns the additional data that binds a ciphertext to its slot.
fn aad(slot: &Slot, form: SealForm) -> Aad<Vec<u8>> {
    let Slot { table, column, id, destination } = slot;
    Aad::from(match form {
        SealForm::Unbound => format!("{table}/{id}/{column}").into_bytes(),
        SealForm::Bound => {
            let mut bytes = BOUND_DOMAIN.to_vec();
            append(&mut bytes, table.as_bytes());
            append(&mut bytes, column.as_bytes());
            append(&mut bytes, id.as_bytes());
            for field in destination {
                append_field(&mut bytes, field);
            }
            bytes
        }
    })
}

/// Appends a value with its length in front.
fn append(bytes: &mut Vec<u8>, value: &[u8]) {
    bytes.extend_from_slice(&u64::try_from(value.len()).unwrap_or(u64::MAX).to_be_bytes());
    bytes.extend_from_slice(value);
}

/// Appends a field of a destination with its kind in front, so that different destinations differ.
fn append_field(bytes: &mut Vec<u8>, field: &Field) {
    match field {
        Field::Absent => bytes.push(0),
        Field::Value(value) => {
            bytes.push(1);
            append(bytes, value);
        }
        Field::Long(value) => {
            bytes.push(2);
            append(bytes, digest::digest(&digest::SHA256, value).as_ref());
        }
        Field::Digest(digest) => {
            bytes.push(2);
            append(bytes, digest);
        }
    }
}

/// Reason why a sealed value did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The ring does not contain the key that sealed the value.
    #[error("master key {0:?} is not in the ring: add it to the key ring")]
    UnknownKey(String),
    /// The ciphertext was not sealed for this slot with this key.
    #[error(
        "the sealed value of {table}/{id} is damaged, belongs to another row or destination, or was sealed with a \
         different key of the same id"
    )]
    Tampered {
        /// Table of the slot.
        table: &'static str,
        /// Row of the slot.
        id: Uuid,
    },
    /// The value is not bound to its destination, and all values of the database were.
    #[error(
        "the sealed value of {table}/{id} is not bound to its destination, so it is from before `regcred master-key \
         rotate --bind`: set the secret again"
    )]
    Unbound {
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
        f.debug_list().entries(self.ids()).finish()
    }
}

impl Ring for KeyRing {
    const NAME: &'static str = "master key ring";

    /// Parses a ring: one line `ID:BASE64` per key of 32 bytes. Empty lines and `#` comments are
    /// ignored.
    fn parse(text: &SecretString) -> Result<Self, Invalid> {
        let keys = ring::parse_lines(text, |Line { id, bytes }| {
            let id = id.ok_or_else(|| Invalid::new("must be ID:BASE64"))?;
            let key =
                UnboundKey::new(&AES_256_GCM_SIV, &bytes).map_err(|_| Invalid::new("the key must be 32 bytes long"))?;
            Ok((id, LessSafeKey::new(key)))
        })?;
        if keys.is_empty() {
            return Err(Invalid::new("contains no key: generate one with `regcred master-key generate`"));
        }
        Ok(Self { keys })
    }

    fn is_same(&self, other: &Self) -> bool {
        self.ids().eq(other.ids())
    }
}

impl KeyRing {
    /// Returns the key ids, the sealing key first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|(id, _)| id.as_str())
    }

    fn find(&self, id: &str) -> Option<&LessSafeKey> {
        self.keys.iter().find(|(other, _)| other == id).map(|(_, key)| key)
    }

    fn seal(&self, form: SealForm, slot: &Slot, secret: &SecretString) -> Result<Sealed, SealError> {
        // `parse` is the only constructor and rejects an empty ring.
        let (id, key) = self.keys.first().ok_or(SealError)?;
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).map_err(|_| SealError)?;
        let plain = secret.expose_secret().as_bytes();
        let mut bytes = Vec::with_capacity(NONCE_LEN + plain.len() + AES_256_GCM_SIV.tag_len());
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(plain);
        let tag = key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), aad(slot, form), &mut bytes[NONCE_LEN..])
            .map_err(|_| SealError)?;
        bytes.extend_from_slice(tag.as_ref());
        Ok(Sealed { key_id: form.stored_key_id(id), bytes })
    }

    /// Opens a value of either form that was sealed for this slot.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the key is unknown or the ciphertext does not belong to the slot.
    pub fn open(&self, slot: &Slot, sealed: &Sealed) -> Result<SecretString, OpenError> {
        let (id, form) = SealForm::split(&sealed.key_id);
        let key = self.find(id).ok_or_else(|| OpenError::UnknownKey(id.to_owned()))?;
        let tampered = OpenError::Tampered { table: slot.table, id: slot.id };
        let Some((nonce, ciphertext)) = sealed.bytes.split_first_chunk::<NONCE_LEN>() else {
            return Err(tampered);
        };
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let opened = key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), aad(slot, form), &mut buffer)
            .ok()
            .and_then(|plain| std::str::from_utf8(plain).ok());
        opened.map(SecretString::from).ok_or(tampered)
    }
}

/// Generates a master key and returns its line for the key ring file.
///
/// # Errors
///
/// [`CryptoError`] if the system returns no random bytes.
pub fn generate_ring_line() -> Result<SecretString, CryptoError> {
    ring::generate_line("k-")
}

/// Seals and opens with the current ring, which can be reloaded.
#[derive(Debug)]
pub struct Sealer {
    ring: ReloadableRing<KeyRing>,
    /// Whether new values are known to be sealed bound. Never goes back.
    seals_bound: AtomicBool,
    /// Whether unbound values are refused. Never goes back: the mark in the database could have
    /// been removed to make an old value open.
    requires_bound: AtomicBool,
}

impl Sealer {
    /// Creates a sealer. [`reload`](Self::reload) reads a newer ring from `file`.
    #[must_use]
    pub fn new(ring: KeyRing, file: Option<PathBuf>) -> Self {
        let ring = ReloadableRing::new(ring, file);
        Self { ring, seals_bound: AtomicBool::new(false), requires_bound: AtomicBool::new(false) }
    }

    /// Reads the key ring file again. Does nothing without a file.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the file cannot be read or parsed; the current ring stays in use.
    pub fn reload(&self) -> Result<(), Invalid> {
        self.ring.reload()
    }

    /// Returns the current ring.
    #[must_use]
    pub fn ring(&self) -> Arc<KeyRing> {
        self.ring.current()
    }

    /// Returns the id of the key that seals.
    #[must_use]
    pub fn sealing_key_id(&self) -> String {
        self.ring().ids().next().unwrap_or_default().to_owned()
    }

    /// Whether new values are known to be sealed bound.
    #[must_use]
    pub fn seals_bound(&self) -> bool {
        self.seals_bound.load(Ordering::SeqCst)
    }

    /// Notes that new values are sealed bound.
    pub fn set_seals_bound(&self) {
        self.seals_bound.store(true, Ordering::SeqCst);
    }

    /// Whether unbound values are refused.
    #[must_use]
    pub fn requires_bound(&self) -> bool {
        self.requires_bound.load(Ordering::SeqCst)
    }

    /// Refuses unbound values from now on, and seals bound ones.
    pub fn require_bound(&self) {
        self.set_seals_bound();
        self.requires_bound.store(true, Ordering::SeqCst);
    }

    /// Seals a secret for a slot. `service::master_keys::seal_form` returns the form.
    ///
    /// # Errors
    ///
    /// [`SealError`] if the system returns no random bytes.
    pub fn seal(&self, form: SealForm, slot: &Slot, secret: &SecretString) -> Result<Sealed, SealError> {
        self.ring().seal(form, slot, secret)
    }

    /// Opens a value that was sealed for this slot. Reloads the ring if the key is unknown, because
    /// another replica or `master-key rotate` may already use a newer ring.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the key is unknown, the ciphertext does not belong to the slot, or it is not
    /// bound although it must be.
    pub fn open(&self, slot: &Slot, sealed: &Sealed) -> Result<SecretString, OpenError> {
        if self.requires_bound() && SealForm::split(&sealed.key_id).1 == SealForm::Unbound {
            return Err(OpenError::Unbound { table: slot.table, id: slot.id });
        }
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

    use base64::{Engine, prelude::BASE64_STANDARD};
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;
    use crate::domain::sealed::{Ca, ClusterDestination, RegistryDestination};

    fn ring(ids: &[&str]) -> KeyRing {
        let lines: Vec<String> = ids
            .iter()
            .map(|id| {
                let key = [u8::try_from(id.len()).unwrap(); 32];
                format!("{id}:{}", BASE64_STANDARD.encode(key))
            })
            .collect();
        KeyRing::parse(&SecretString::from(lines.join("\n"))).unwrap()
    }

    fn slot(table: &'static str, column: &'static str, id: u128) -> Slot {
        Slot { table, column, id: Uuid::from_u128(id), destination: vec![Field::Value(b"there".to_vec())] }
    }

    proptest! {
        #[test]
        fn sealed_value_opens_only_in_its_own_slot(
            secret in any::<String>(), id in any::<u128>(), other in any::<u128>(), is_bound: bool,
        ) {
            let ring = ring(&["a"]);
            let form = if is_bound { SealForm::Bound } else { SealForm::Unbound };
            let own = slot("registry_accounts", "password", id);
            let sealed = ring.seal(form, &own, &SecretString::from(secret.clone())).unwrap();

            let opened = ring.open(&own, &sealed).unwrap();
            prop_assert_eq!(opened.expose_secret(), &secret);
            prop_assert!(ring.open(&slot("clusters", "password", id), &sealed).is_err());
            prop_assert!(ring.open(&slot("registry_accounts", "username", id), &sealed).is_err());
            if other != id {
                prop_assert!(ring.open(&slot("registry_accounts", "password", other), &sealed).is_err());
            }
        }

        #[test]
        fn different_destinations_have_different_additional_data(
            one: Vec<Option<Vec<u8>>>, other: Vec<Option<Vec<u8>>>, id: u128,
        ) {
            let fields = |destination: &[Option<Vec<u8>>]| -> Vec<Field> {
                destination.iter().map(|field| field.clone().map_or(Field::Absent, Field::Value)).collect()
            };
            let bytes = |destination: &[Option<Vec<u8>>]| {
                let slot = Slot { destination: fields(destination), ..slot("t", "c", id) };
                aad(&slot, SealForm::Bound).as_ref().to_vec()
            };
            prop_assert_eq!(one == other, bytes(&one) == bytes(&other));
            prop_assert!(!bytes(&one).starts_with(aad(&slot("t", "c", id), SealForm::Unbound).as_ref()));
        }
    }

    #[test]
    fn boundaries_of_fields_are_part_of_the_additional_data() {
        let bytes = |server, tls_server_name| {
            let destination = ClusterDestination { server, ca: None, tls_server_name }.fields();
            aad(&Slot { destination, ..slot("t", "c", 1) }, SealForm::Bound).as_ref().to_vec()
        };
        let distinct = HashSet::from([
            bytes(Some("https://a"), Some("b")),
            bytes(Some("https://ab"), Some("")),
            bytes(Some("https://ab"), None),
            bytes(None, Some("https://ab")),
            bytes(None, None),
        ]);
        assert_eq!(distinct.len(), 5);
    }

    /// A change of either encoding would make stored values unreadable.
    #[test]
    fn additional_data_never_changes() {
        let destination = RegistryDestination { authority: "reg.io", plain_http: false, ca: None }.fields();
        let slot = Slot { destination, ..slot("registry_accounts", "password", 7) };
        let unbound = "registry_accounts/00000000-0000-0000-0000-000000000007/password";
        assert_eq!(aad(&slot, SealForm::Unbound).as_ref(), unbound.as_bytes());
        let bound = [
            &b"regcred sealed value 2\0"[..],
            b"\0\0\0\0\0\0\0\x11registry_accounts",
            b"\0\0\0\0\0\0\0\x08password",
            b"\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x07",
            b"\x01\0\0\0\0\0\0\0\x06reg.io",
            b"\x01\0\0\0\0\0\0\0\x01\0",
            b"\0",
        ];
        assert_eq!(aad(&slot, SealForm::Bound).as_ref(), bound.concat());
    }

    #[test]
    fn digest_stands_for_its_value() {
        let digest = digest::digest(&digest::SHA256, b"pem").as_ref().try_into().unwrap();
        let ca = |ca| {
            let destination = RegistryDestination { authority: "reg.io", plain_http: false, ca: Some(ca) }.fields();
            aad(&Slot { destination, ..slot("t", "c", 1) }, SealForm::Bound).as_ref().to_vec()
        };
        assert_eq!(ca(Ca::Pem("pem")), ca(Ca::Digest(digest)));
        assert_ne!(ca(Ca::Pem("pem")), ca(Ca::Pem("PEM")));
    }

    #[test]
    fn bound_value_opens_only_for_its_destination() {
        let ring = ring(&["a"]);
        let secret = SecretString::from("s");
        let own = RegistryDestination { authority: "reg.io", plain_http: false, ca: None };
        let ca = Some(Ca::Pem("-----BEGIN CERTIFICATE-----"));
        let elsewhere = [
            RegistryDestination { authority: "reg.io:443", ..own },
            RegistryDestination { plain_http: true, ..own },
            RegistryDestination { ca, ..own },
        ];
        let at = |destination: Vec<Field>| Slot { destination, ..slot("t", "c", 1) };
        let (bound, unbound) = (
            ring.seal(SealForm::Bound, &at(own.fields()), &secret).unwrap(),
            ring.seal(SealForm::Unbound, &at(own.fields()), &secret).unwrap(),
        );
        assert_eq!(ring.open(&at(own.fields()), &bound).unwrap().expose_secret(), "s");
        for other in &elsewhere {
            let other = at(other.fields());
            assert!(matches!(ring.open(&other, &bound), Err(OpenError::Tampered { .. })), "{other:?}");
            assert_eq!(ring.open(&other, &unbound).unwrap().expose_secret(), "s");
        }
        let own = ClusterDestination { server: Some("https://k"), ca, tls_server_name: None };
        let elsewhere = [
            ClusterDestination { server: Some("https://l"), ..own },
            ClusterDestination { ca: None, ..own },
            ClusterDestination { tls_server_name: Some("k"), ..own },
        ];
        let bound = ring.seal(SealForm::Bound, &at(own.fields()), &secret).unwrap();
        assert!(ring.open(&at(own.fields()), &bound).is_ok());
        assert!(elsewhere.iter().all(|other| ring.open(&at(other.fields()), &bound).is_err()));
    }

    #[test]
    fn edited_form_makes_a_value_unreadable() {
        let ring = ring(&["a"]);
        let own = slot("t", "c", 1);
        for (form, edited) in [(SealForm::Bound, "a"), (SealForm::Unbound, "a+bound")] {
            let sealed = ring.seal(form, &own, &SecretString::from("s")).unwrap();
            let sealed = Sealed { key_id: edited.to_owned(), ..sealed };
            assert!(matches!(ring.open(&own, &sealed), Err(OpenError::Tampered { .. })), "{form:?}");
        }
    }

    #[test]
    fn unbound_value_is_refused_once_bound_values_are_required() {
        let sealer = Sealer::new(ring(&["a"]), None);
        let own = slot("t", "c", 1);
        let seal = |form| sealer.seal(form, &own, &SecretString::from("s")).unwrap();
        let (unbound, bound) = (seal(SealForm::Unbound), seal(SealForm::Bound));
        assert!(sealer.open(&own, &unbound).is_ok() && sealer.open(&own, &bound).is_ok());
        sealer.require_bound();
        assert!(sealer.seals_bound() && sealer.open(&own, &bound).is_ok());
        assert!(matches!(sealer.open(&own, &unbound), Err(OpenError::Unbound { .. })));
    }

    #[rstest]
    #[case(SealForm::Unbound)]
    #[case(SealForm::Bound)]
    fn any_flipped_bit_is_detected(#[case] form: SealForm) {
        let ring = ring(&["a"]);
        let own = slot("t", "c", 1);
        let sealed = ring.seal(form, &own, &SecretString::from("secret")).unwrap();
        for bit in 0..sealed.bytes.len() * 8 {
            let mut damaged = sealed.clone();
            damaged.bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(ring.open(&own, &damaged).is_err(), "bit {bit}");
        }
        for length in 0..sealed.bytes.len() {
            let cut = Sealed { bytes: sealed.bytes[..length].to_vec(), ..sealed.clone() };
            assert!(ring.open(&own, &cut).is_err(), "length {length}");
        }
    }

    #[test]
    fn nonces_do_not_repeat() {
        let (ring, own) = (ring(&["a"]), slot("t", "c", 1));
        let secret = SecretString::from("");
        let nonces: HashSet<Vec<u8>> = (0..100_000)
            .map(|_| ring.seal(SealForm::Bound, &own, &secret).unwrap().bytes[..NONCE_LEN].to_vec())
            .collect();
        assert_eq!(nonces.len(), 100_000);
    }

    #[test]
    fn first_key_seals_and_every_key_opens() {
        let own = slot("t", "c", 1);
        let secret = SecretString::from("s");
        for form in [SealForm::Unbound, SealForm::Bound] {
            let old = ring(&["a"]).seal(form, &own, &secret).unwrap();
            let both = ring(&["bb", "a"]);
            assert_eq!(both.open(&own, &old).unwrap().expose_secret(), "s");
            assert_eq!(both.seal(form, &own, &secret).unwrap().key_id, form.stored_key_id("bb"));
            assert!(matches!(ring(&["bb"]).open(&own, &old), Err(OpenError::UnknownKey(id)) if id == "a"));
        }
    }

    #[test]
    fn invalid_ring_line_is_rejected_without_its_content() {
        for bad in ["", "# only a comment", "canary", "a:canary", "a:Y2FuYXJ5", "a b:AAAA", ":AAAA", "a+bound:AAAA"] {
            let refused = KeyRing::parse(&SecretString::from(bad)).unwrap_err().to_string();
            assert!(!refused.contains("canary") && !refused.contains("Y2FuYXJ5"), "{refused}");
        }
        let line = generate_ring_line().unwrap();
        let twice = format!("{0}\n{0}", line.expose_secret());
        assert!(KeyRing::parse(&SecretString::from(twice)).is_err());
        assert!(KeyRing::parse(&line).is_ok());
    }
}
