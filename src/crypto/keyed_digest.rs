//! Keyed digests in place of secret values.
//!
//! Caches use them in place of tokens, under a key of the process, so that their content is
//! worthless outside the process. Rows use them under a key that is derived from the pepper: without
//! it, guesses cannot be tested.

use aws_lc_rs::{hmac, rand};
use zeroize::{Zeroize, Zeroizing};

use crate::crypto::{api_key::CryptoError, pepper::Pepper};

/// HMAC-SHA-256 of the parts.
pub type Digest = [u8; 32];

/// Computes digests. The key never leaves the process.
#[derive(Debug, Clone)]
pub struct Digester(hmac::Key);

impl Digester {
    /// Creates a digester with a random key.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes.
    pub fn new() -> Result<Self, CryptoError> {
        let mut key = Zeroizing::new([0_u8; 32]);
        rand::fill(key.as_mut()).map_err(|_| CryptoError::no_random_bytes())?;
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())))
    }

    /// Creates a digester for a purpose. Processes with the same pepper compute the same digests.
    #[must_use]
    pub fn of(pepper: &Pepper, purpose: &str) -> Self {
        Self(pepper.subkey(purpose))
    }

    /// Computes the digest of parts, each prefixed with its length.
    #[must_use]
    pub fn digest(&self, parts: &[&[u8]]) -> Digest {
        let mut digest = Digest::default();
        digest.copy_from_slice(mac_of_parts(&self.0, parts).as_ref());
        digest
    }
}

/// Computes the HMAC of secret parts, each prefixed with its length.
pub(super) fn mac_of_parts(key: &hmac::Key, parts: &[&[u8]]) -> hmac::Tag {
    let tag = compute(key, parts);
    // A context is copied when it signs. Its buffer has the end of the last part, and the copies stay
    // on the stack of a thread until other calls reach as deep.
    wipe_stack();
    tag
}

#[inline(never)]
fn compute(key: &hmac::Key, parts: &[&[u8]]) -> hmac::Tag {
    let mut context = hmac::Context::with_key(key);
    for part in parts {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
    context.sign()
}

/// Overwrites the 16 KiB of the stack below the caller.
#[inline(never)]
fn wipe_stack() {
    let mut below = [0_u64; 2_048];
    below.zeroize();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_keys_change_the_digest() {
        let digester = Digester::new().unwrap();
        assert_eq!(digester.digest(&[b"a", b"b"]), digester.digest(&[b"a", b"b"]));
        assert_ne!(digester.digest(&[b"a", b"b"]), digester.digest(&[b"ab"]));
        assert_ne!(digester.digest(&[b"a"]), Digester::new().unwrap().digest(&[b"a"]));
    }
}
