//! Cursors that hide the name of a row from the client.
//!
//! A page that ends at a row which is hidden from the caller must not name it. AES-256-GCM-SIV under
//! a key that is derived from the pepper seals the name, padded to one length. The nonce is
//! constant: with GCM-SIV that reveals only whether two cursors name the same row.

use std::sync::Arc;

use aws_lc_rs::{
    aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hmac,
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

use crate::{
    crypto::{api_key::CryptoError, pepper::Pepper},
    domain::names::Name,
};

/// Length of a padded name: more than that of any name.
const PADDED: usize = 64;

/// Seals and opens cursors.
#[derive(Debug, Clone)]
pub struct CursorKey(Arc<LessSafeKey>);

impl CursorKey {
    /// Derives the key. Processes with the same pepper open each other's cursors.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the cipher refuses the key.
    pub fn of(pepper: &Pepper) -> Result<Self, CryptoError> {
        let key = hmac::sign(&pepper.subkey("regcred cursor 1"), b"key");
        let key = UnboundKey::new(&AES_256_GCM_SIV, key.as_ref());
        Ok(Self(Arc::new(LessSafeKey::new(key.map_err(|_| CryptoError::cipher_failed())?))))
    }

    /// Seals a name.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the cipher fails.
    pub fn seal(&self, name: &Name) -> Result<String, CryptoError> {
        let mut bytes = name.as_str().as_bytes().to_vec();
        bytes.resize(PADDED, 0);
        let sealed = self.0.seal_in_place_append_tag(nonce(), Aad::empty(), &mut bytes);
        sealed.map_err(|_| CryptoError::cipher_failed())?;
        Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }

    /// Opens a cursor. Returns `None` for text that no process with this pepper sealed.
    #[must_use]
    pub fn open(&self, cursor: &str) -> Option<Name> {
        let mut bytes = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?;
        let opened = self.0.open_in_place(nonce(), Aad::empty(), &mut bytes).ok()?;
        Name::parse(str::from_utf8(opened).ok()?.trim_end_matches('\0')).ok()
    }
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use base64::prelude::BASE64_STANDARD;
    use secrecy::SecretString;

    use super::*;

    fn key(byte: u8) -> CursorKey {
        let pepper = Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([byte; 32]))).unwrap();
        CursorKey::of(&pepper).unwrap()
    }

    #[test]
    fn sealed_name_opens_under_its_key_alone_and_has_one_length() {
        let (short, long) = (Name::parse("a").unwrap(), Name::parse(&"a".repeat(63)).unwrap());
        let [sealed, other] = [&short, &long].map(|name| key(1).seal(name).unwrap());
        assert_eq!(key(1).open(&sealed), Some(short));
        assert_eq!(key(1).open(&other), Some(long));
        assert_eq!(key(2).open(&sealed), None);
        assert_eq!(sealed.len(), other.len());
    }

    #[test]
    fn forged_cursor_does_not_open() {
        let sealed = key(1).seal(&Name::parse("team-a").unwrap()).unwrap();
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(&sealed).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut forged = bytes.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key(1).open(&BASE64_URL_SAFE_NO_PAD.encode(forged)), None, "bit {bit}");
        }
        for forged in ["", "team-a", "~", &sealed[1..], &BASE64_URL_SAFE_NO_PAD.encode("team-a")] {
            assert_eq!(key(1).open(forged), None, "{forged}");
        }
    }
}
