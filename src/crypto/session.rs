//! Tokens of sessions, as the cookie of the web console holds them.
//!
//! A token is `<id>_<secret>`: the row's UUID and 256 random bits, in hexadecimal digits. The row
//! holds an HMAC over the id, the API key's id and the secret, under a key that is derived from a
//! pepper. Without the pepper, neither a reader nor a writer of the database can use or make a
//! session. The secret has full entropy, so no slow hash is necessary.

use std::sync::Arc;

use aws_lc_rs::{constant_time::verify_slices_are_equal, rand};
use secrecy::SecretString;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::crypto::{
    api_key::CryptoError,
    keyed_digest::{Digest, Digester},
    pepper::Peppers,
};

const PURPOSE: &str = "regcred session 1";
const SECRET_BYTES: usize = 32;
/// 32 digits of the id + `_` + 64 digits of the secret.
const TOKEN_CHARS: usize = 32 + 1 + 64;

/// New session. The text is returned once; only the HMAC is stored.
#[derive(Debug)]
pub struct NewSession {
    /// Id of the session's row.
    pub id: Uuid,
    /// Text of the token.
    pub text: SecretString,
    /// Stored HMAC.
    pub mac: Digest,
}

/// Token from a request: well-formed, but not verified.
#[derive(Clone, Copy)]
pub struct PresentedSession<'a> {
    /// Id of the session's row.
    pub id: Uuid,
    text: &'a str,
}

impl std::fmt::Debug for PresentedSession<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PresentedSession").field("id", &self.id).finish_non_exhaustive()
    }
}

impl<'a> PresentedSession<'a> {
    /// Parses a token, without I/O or cryptography.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let (id, secret) = text.split_once('_')?;
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if text.len() != TOKEN_CHARS || id.len() != 32 || !digits(id) || !digits(secret) {
            return None;
        }
        Some(Self { id: Uuid::try_parse(id).ok()?, text })
    }
}

/// Makes and verifies tokens.
#[derive(Debug, Clone)]
pub struct SessionTokens {
    peppers: Arc<Peppers>,
}

impl SessionTokens {
    /// Creates the maker. Processes with a common pepper accept each other's tokens.
    #[must_use]
    pub const fn new(peppers: Arc<Peppers>) -> Self {
        Self { peppers }
    }

    /// Generates a token for an API key.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes.
    pub fn generate(&self, api_key_id: Uuid) -> Result<NewSession, CryptoError> {
        let id = Uuid::now_v7();
        let mut secret = Zeroizing::new([0_u8; SECRET_BYTES]);
        rand::fill(secret.as_mut()).map_err(|_| CryptoError::no_random_bytes())?;
        let mut text = Zeroizing::new(String::with_capacity(TOKEN_CHARS));
        text.push_str(&id.simple().to_string());
        text.push('_');
        for byte in secret.iter() {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(u32::from(digit), 16).unwrap_or_default());
            }
        }
        let digester = Digester::of(self.peppers.current().first(), PURPOSE);
        let mac = digester.digest(&[api_key_id.as_bytes(), text.as_bytes()]);
        Ok(NewSession { id, text: SecretString::from(text.as_str()), mac })
    }

    /// Whether the HMAC is that of the token for this API key, under one of the peppers. If it is
    /// not, the ring is read again: another replica may have made the token under a new pepper.
    #[must_use]
    pub fn is_valid(&self, presented: PresentedSession<'_>, api_key_id: Uuid, mac: &[u8]) -> bool {
        if self.verify(presented, api_key_id, mac) {
            return true;
        }
        let before = self.peppers.current();
        if let Err(error) = self.peppers.reload_on_demand() {
            tracing::warn!(%error, "pepper ring not reloaded");
        }
        !Arc::ptr_eq(&before, &self.peppers.current()) && self.verify(presented, api_key_id, mac)
    }

    fn verify(&self, presented: PresentedSession<'_>, api_key_id: Uuid, mac: &[u8]) -> bool {
        let ring = self.peppers.current();
        let parts: [&[u8]; 2] = [api_key_id.as_bytes(), presented.text.as_bytes()];
        let is_valid = |digester: Digester| verify_slices_are_equal(&digester.digest(&parts), mac).is_ok();
        ring.digesters(PURPOSE).fold(false, |found, digester| is_valid(digester) | found)
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use secrecy::ExposeSecret;

    use super::*;
    use crate::crypto::{pepper::PepperRing, ring::Ring};

    fn tokens(bytes: &[u8]) -> SessionTokens {
        let lines: Vec<String> =
            bytes.iter().map(|byte| format!("p-{byte}:{}", BASE64_STANDARD.encode([*byte; 32]))).collect();
        let ring = PepperRing::parse(&SecretString::from(lines.join("\n"))).unwrap();
        SessionTokens::new(Arc::new(Peppers::new(ring, None)))
    }

    #[test]
    fn token_is_valid_for_its_key_under_every_pepper_of_the_ring() {
        let key = Uuid::now_v7();
        let made = tokens(&[1]).generate(key).unwrap();
        let presented = PresentedSession::parse(made.text.expose_secret()).unwrap();
        assert_eq!(presented.id, made.id);
        assert!(tokens(&[1]).is_valid(presented, key, &made.mac));
        assert!(tokens(&[2, 1]).is_valid(presented, key, &made.mac));
        assert!(!tokens(&[2]).is_valid(presented, key, &made.mac));
        assert!(!tokens(&[1]).is_valid(presented, Uuid::now_v7(), &made.mac), "a row that names another key");
        assert!(!tokens(&[1]).is_valid(presented, key, &[]));
    }

    #[test]
    fn malformed_token_is_refused() {
        let made = tokens(&[1]).generate(Uuid::now_v7()).unwrap();
        let text = made.text.expose_secret();
        for bad in ["", "_", &text[1..], &text.to_uppercase(), &text.replace('_', "-"), &format!("{text}0")] {
            assert!(PresentedSession::parse(bad).is_none(), "{bad}");
        }
    }
}
