//! Digests under a key of this process: what a memory of tokens is kept under, so that it is worth nothing to somebody who
//! reads it.

use aws_lc_rs::{hmac, rand};
use zeroize::Zeroizing;

use crate::crypto::api_key::CryptoError;

/// A digest.
pub type Digest = [u8; 32];

/// Makes digests. The key is made anew in each process and never leaves it.
#[derive(Debug, Clone)]
pub struct Digester(hmac::Key);

impl Digester {
    /// Makes a key.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system gives no random bytes.
    pub fn new() -> Result<Self, CryptoError> {
        let mut key = Zeroizing::new([0_u8; 32]);
        rand::fill(key.as_mut()).map_err(|_| CryptoError::no_random_bytes())?;
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())))
    }

    /// The digest of some parts, none of which can be taken for the end or the begin of another.
    #[must_use]
    pub fn digest(&self, parts: &[&[u8]]) -> Digest {
        let mut context = hmac::Context::with_key(&self.0);
        for part in parts {
            context.update(&part.len().to_be_bytes());
            context.update(part);
        }
        let mut digest = Digest::default();
        digest.copy_from_slice(context.sign().as_ref());
        digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_keys_are_told_apart() {
        let digester = Digester::new().unwrap();
        assert_eq!(digester.digest(&[b"a", b"b"]), digester.digest(&[b"a", b"b"]));
        assert_ne!(digester.digest(&[b"a", b"b"]), digester.digest(&[b"ab"]));
        assert_ne!(digester.digest(&[b"a"]), Digester::new().unwrap().digest(&[b"a"]));
    }
}
