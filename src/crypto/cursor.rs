//! Cursors that hide a position in a list from the client.
//!
//! A page that ends at a row which is hidden from the caller must not name it. AES-256-GCM-SIV under
//! a key that is derived from the pepper seals the position, padded to one length. The nonce is
//! constant: with GCM-SIV that reveals only whether two cursors are equal. The first pepper of the
//! ring seals, and every one opens, so a list can be continued after a rotation.

use std::sync::Arc;

use aws_lc_rs::{
    aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hmac,
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

use crate::crypto::{
    api_key::CryptoError,
    pepper::{Pepper, Peppers},
};

/// Length of a padded position: more than that of any position.
const PADDED: usize = 160;

/// Seals and opens cursors.
#[derive(Debug, Clone)]
pub struct CursorKey(Arc<Peppers>);

impl CursorKey {
    /// Creates the key. Processes with the same peppers open each other's cursors.
    #[must_use]
    pub const fn of(peppers: Arc<Peppers>) -> Self {
        Self(peppers)
    }

    /// Seals the text of a position.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the cipher fails.
    pub fn seal(&self, position: &str) -> Result<String, CryptoError> {
        let mut bytes = position.as_bytes().to_vec();
        bytes.resize(PADDED.max(bytes.len()), 0);
        let sealed = key(self.0.current().first())?.seal_in_place_append_tag(nonce(), Aad::empty(), &mut bytes);
        sealed.map_err(|_| CryptoError::cipher_failed())?;
        Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }

    /// Opens a cursor. Returns `None` for text that no process with one of these peppers sealed.
    #[must_use]
    pub fn open(&self, cursor: &str) -> Option<String> {
        let sealed = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?;
        self.0.current().peppers().find_map(|pepper| {
            let mut bytes = sealed.clone();
            let opened = key(pepper).ok()?.open_in_place(nonce(), Aad::empty(), &mut bytes).ok()?;
            Some(str::from_utf8(opened).ok()?.trim_end_matches('\0').to_owned())
        })
    }
}

/// Derives the key of a pepper.
fn key(pepper: &Pepper) -> Result<LessSafeKey, CryptoError> {
    let key = hmac::sign(&pepper.subkey("regcred cursor 1"), b"key");
    let key = UnboundKey::new(&AES_256_GCM_SIV, key.as_ref());
    Ok(LessSafeKey::new(key.map_err(|_| CryptoError::cipher_failed())?))
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use base64::prelude::BASE64_STANDARD;
    use secrecy::SecretString;

    use super::*;
    use crate::crypto::{pepper::PepperRing, ring::Ring as _};

    fn ring(text: &str) -> CursorKey {
        let ring = PepperRing::parse(&SecretString::from(text)).unwrap();
        CursorKey::of(Arc::new(Peppers::new(ring, None)))
    }

    fn key(byte: u8) -> CursorKey {
        ring(&BASE64_STANDARD.encode([byte; 32]))
    }

    #[test]
    fn cursor_opens_after_a_rotation_of_the_pepper() {
        let position = "team-a";
        let sealed = key(1).seal(position).unwrap();
        let [new, old] = [2, 1].map(|byte| BASE64_STANDARD.encode([byte; 32]));
        let rotated = ring(&format!("p-2:{new}\n{old}"));
        assert_eq!(rotated.open(&sealed).as_deref(), Some(position));
        // New cursors are sealed with the first pepper.
        assert_eq!(key(2).open(&rotated.seal(position).unwrap()).as_deref(), Some(position));
    }

    #[test]
    fn sealed_position_opens_under_its_key_alone_and_has_one_length() {
        let (short, long) = ("a", "a".repeat(137));
        let [sealed, other] = [short, &long].map(|position| key(1).seal(position).unwrap());
        assert_eq!(key(1).open(&sealed).as_deref(), Some(short));
        assert_eq!(key(1).open(&other), Some(long));
        assert_eq!(key(2).open(&sealed), None);
        assert_eq!(sealed.len(), other.len());
    }

    #[test]
    fn forged_cursor_does_not_open() {
        let sealed = key(1).seal("team-a").unwrap();
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
