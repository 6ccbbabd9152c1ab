//! Tokens of sessions, as the cookie of the web console holds them.
//!
//! A token is `<id>_<secret>`: the row's UUID and 256 random bits, in hexadecimal digits. The row
//! holds an HMAC over the id, the session's owner and the secret, under a key that is derived from a
//! pepper. Without the pepper, neither a reader nor a writer of the database can use or make a
//! session, or move one to another owner. The secret has full entropy, so no slow hash is necessary.

use std::sync::Arc;

use aws_lc_rs::{constant_time::verify_slices_are_equal, rand};
use secrecy::SecretString;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    crypto::{
        api_key::CryptoError,
        keyed_digest::{Digest, Digester},
        pepper::{PepperRing, Peppers},
    },
    domain::session::SessionOwner,
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

    /// Generates a token for an owner.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes.
    pub fn generate(&self, owner: &SessionOwner) -> Result<NewSession, CryptoError> {
        let id = Uuid::now_v7();
        let mut secret = Zeroizing::new([0_u8; SECRET_BYTES]);
        rand::fill(secret.as_mut()).map_err(|_| CryptoError::no_random_bytes())?;
        let mut text = Zeroizing::new(String::with_capacity(TOKEN_CHARS));
        text.push_str(&id.simple().to_string());
        text.push('_');
        push_hex(&mut text, secret.as_ref());
        let digester = Digester::of(self.peppers.current().first(), PURPOSE);
        let mac = digester.digest(&parts(owner, &text));
        Ok(NewSession { id, text: SecretString::from(text.as_str()), mac })
    }

    /// Whether the HMAC is that of the token for this owner, under one of the peppers. If it is not,
    /// the ring is read again: another replica may have made the token under a new pepper.
    #[must_use]
    pub fn is_valid(&self, presented: PresentedSession<'_>, owner: &SessionOwner, mac: &[u8]) -> bool {
        let parts = parts(owner, presented.text);
        let is_valid_under = |ring: &PepperRing| {
            let is_valid = |digester: Digester| verify_slices_are_equal(&digester.digest(&parts), mac).is_ok();
            ring.digesters(PURPOSE).fold(false, |found, digester| is_valid(digester) | found)
        };
        let ring = self.peppers.current();
        if is_valid_under(&ring) {
            return true;
        }
        if let Err(error) = self.peppers.reload_on_demand() {
            tracing::warn!(%error, "pepper ring not reloaded");
        }
        let newer = self.peppers.current();
        !Arc::ptr_eq(&ring, &newer) && is_valid_under(&newer)
    }
}

fn parts<'a>(owner: &'a SessionOwner, text: &'a str) -> Vec<&'a [u8]> {
    let mut parts = owner.parts();
    parts.push(text.as_bytes());
    parts
}

/// Appends bytes as hexadecimal digits.
pub(super) fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use secrecy::ExposeSecret;

    use super::*;
    use crate::{
        crypto::{pepper::PepperRing, ring::Ring},
        domain::session::Person,
    };

    fn tokens(bytes: &[u8]) -> SessionTokens {
        let lines: Vec<String> =
            bytes.iter().map(|byte| format!("p-{byte}:{}", BASE64_STANDARD.encode([*byte; 32]))).collect();
        let ring = PepperRing::parse(&SecretString::from(lines.join("\n"))).unwrap();
        SessionTokens::new(Arc::new(Peppers::new(ring, None)))
    }

    #[test]
    fn token_is_valid_for_its_owner_under_every_pepper_of_the_ring() {
        let key = SessionOwner::ApiKey(Uuid::now_v7());
        let made = tokens(&[1]).generate(&key).unwrap();
        let presented = PresentedSession::parse(made.text.expose_secret()).unwrap();
        assert_eq!(presented.id, made.id);
        assert!(tokens(&[1]).is_valid(presented, &key, &made.mac));
        assert!(tokens(&[2, 1]).is_valid(presented, &key, &made.mac));
        assert!(!tokens(&[2]).is_valid(presented, &key, &made.mac));
        let other = SessionOwner::ApiKey(Uuid::now_v7());
        assert!(!tokens(&[1]).is_valid(presented, &other, &made.mac), "a row that names another key");
        assert!(!tokens(&[1]).is_valid(presented, &key, &[]));
    }

    #[test]
    fn session_of_a_person_is_valid_for_its_claims_only() {
        let of = |provider_id: Uuid, subject: &str, claims: &str| {
            SessionOwner::Person(Person { provider_id, subject: subject.to_owned(), claims: claims.to_owned() })
        };
        let provider = Uuid::now_v7();
        let made = tokens(&[1]).generate(&of(provider, "lena", r#"{"groups":["dev"]}"#)).unwrap();
        let presented = PresentedSession::parse(made.text.expose_secret()).unwrap();
        let is_valid = |owner: &SessionOwner| tokens(&[1]).is_valid(presented, owner, &made.mac);
        assert!(is_valid(&of(provider, "lena", r#"{"groups":["dev"]}"#)));
        assert!(!is_valid(&of(provider, "lena", r#"{"groups":["ops"]}"#)));
        assert!(!is_valid(&of(provider, "mia", r#"{"groups":["dev"]}"#)));
        assert!(!is_valid(&of(Uuid::now_v7(), "lena", r#"{"groups":["dev"]}"#)));
        assert!(!is_valid(&SessionOwner::ApiKey(provider)));
    }

    #[test]
    fn malformed_token_is_refused() {
        let made = tokens(&[1]).generate(&SessionOwner::ApiKey(Uuid::now_v7())).unwrap();
        let text = made.text.expose_secret();
        for bad in ["", "_", &text[1..], &text.to_uppercase(), &text.replace('_', "-"), &format!("{text}0")] {
            assert!(PresentedSession::parse(bad).is_none(), "{bad}");
        }
    }
}
