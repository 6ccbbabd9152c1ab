//! Attempts to sign in through an identity provider, as a short-lived cookie of the browser holds
//! them.
//!
//! The cookie is `<provider>_<end>_<state>_<verifier>_<HMAC>`: the provider's UUID, the end of the
//! attempt in seconds since 1970, and 128 and 256 random bits, in hexadecimal digits. The HMAC, under
//! a key that is derived from a pepper, covers all of it, so that only a genuine cookie causes a
//! call to a provider. Nothing is stored in the database.
//!
//! - `state` returns with the browser, and ties the return to the cookie.
//! - `verifier` proves to the provider that the code is redeemed by the one that asked for it (RFC
//!   7636).
//! - The nonce, a digest of the verifier, ties the ID token to the cookie.

use std::sync::Arc;

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest, rand};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, TimeDelta, Utc};
use secrecy::SecretString;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::crypto::{
    api_key::CryptoError,
    keyed_digest::{Digest, Digester},
    pepper::Peppers,
    session::push_hex,
};

const PURPOSE: &str = "regcred login 1";
const STATE_BYTES: usize = 16;
const VERIFIER_BYTES: usize = 32;
/// Time for a person to sign in at the provider.
pub const LIFETIME: TimeDelta = TimeDelta::minutes(10);

/// New attempt.
#[derive(Debug)]
pub struct NewAttempt {
    /// Value of the cookie.
    pub cookie: SecretString,
    /// `state` of the request to the provider.
    pub state: String,
    /// `code_challenge`, for the method `S256`.
    pub challenge: String,
    /// `nonce` of the ID token.
    pub nonce: String,
}

/// Genuine attempt that has not ended.
#[derive(Debug)]
pub struct Attempt {
    /// Id of the provider.
    pub provider_id: Uuid,
    /// `code_verifier`.
    pub verifier: SecretString,
    nonce: String,
}

impl Attempt {
    /// Whether an ID token has the nonce of the attempt.
    #[must_use]
    pub fn is_nonce(&self, presented: &str) -> bool {
        verify_slices_are_equal(self.nonce.as_bytes(), presented.as_bytes()).is_ok()
    }
}

/// Makes and verifies attempts.
#[derive(Debug, Clone)]
pub struct LoginAttempts {
    peppers: Arc<Peppers>,
}

impl LoginAttempts {
    /// Creates the maker. Processes with a common pepper accept each other's attempts.
    #[must_use]
    pub const fn new(peppers: Arc<Peppers>) -> Self {
        Self { peppers }
    }

    /// Starts an attempt.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes.
    pub fn start(&self, provider_id: Uuid, now: DateTime<Utc>) -> Result<NewAttempt, CryptoError> {
        let mut random = Zeroizing::new([0_u8; STATE_BYTES + VERIFIER_BYTES]);
        rand::fill(random.as_mut()).map_err(|_| CryptoError::no_random_bytes())?;
        let (state, verifier) = random.split_at(STATE_BYTES);
        let (state, verifier) = (hex(state), hex(verifier));
        let end = (now + LIFETIME).timestamp();
        let mut cookie = Zeroizing::new(format!("{}_{end}_{}_{}", provider_id.simple(), *state, *verifier));
        let mac = Digester::of(self.peppers.current().first(), PURPOSE).digest(&[cookie.as_bytes()]);
        cookie.push('_');
        push_hex(&mut cookie, &mac);
        Ok(NewAttempt {
            cookie: SecretString::from(cookie.as_str()),
            state: state.as_str().to_owned(),
            challenge: BASE64_URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, verifier.as_bytes())),
            nonce: nonce(&verifier),
        })
    }

    /// Opens the cookie of an attempt. `None` if it is not genuine, has ended, or belongs to another
    /// state.
    #[must_use]
    pub fn open(&self, cookie: &str, state: &str, now: DateTime<Utc>) -> Option<Attempt> {
        let (signed, mac) = cookie.rsplit_once('_')?;
        let mut parts = signed.split('_');
        let (provider, end, expected, verifier) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_genuine = parts.next().is_none() && self.verify(signed, mac);
        let is_state = verify_slices_are_equal(expected.as_bytes(), state.as_bytes()).is_ok();
        if !is_genuine || !is_state || now.timestamp() >= end.parse().ok()? {
            return None;
        }
        let provider_id = Uuid::try_parse(provider).ok()?;
        Some(Attempt { provider_id, verifier: SecretString::from(verifier), nonce: nonce(verifier) })
    }

    fn verify(&self, signed: &str, mac: &str) -> bool {
        let is_mac = |digest: Digest| verify_slices_are_equal(hex(&digest).as_bytes(), mac.as_bytes()).is_ok();
        let ring = self.peppers.current();
        let digesters = ring.digesters(PURPOSE);
        digesters.fold(false, |found, digester| is_mac(digester.digest(&[signed.as_bytes()])) | found)
    }
}

fn hex(bytes: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(2 * bytes.len()));
    push_hex(&mut text, bytes);
    text
}

/// A digest that does not tell the verifier.
fn nonce(verifier: &str) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"regcred nonce ");
    context.update(verifier.as_bytes());
    BASE64_URL_SAFE_NO_PAD.encode(context.finish())
}

#[cfg(test)]
mod tests {
    use base64::prelude::BASE64_STANDARD;
    use secrecy::ExposeSecret;

    use super::*;
    use crate::crypto::{pepper::PepperRing, ring::Ring};

    fn attempts(byte: u8) -> LoginAttempts {
        let line = format!("p-{byte}:{}", BASE64_STANDARD.encode([byte; 32]));
        LoginAttempts::new(Arc::new(Peppers::new(PepperRing::parse(&SecretString::from(line)).unwrap(), None)))
    }

    #[test]
    fn cookie_opens_with_its_state_until_its_end() {
        let (provider, now) = (Uuid::now_v7(), DateTime::from_timestamp(1_800_000_000, 0).unwrap());
        let made = attempts(1).start(provider, now).unwrap();
        let open = |state: &str, now| attempts(1).open(made.cookie.expose_secret(), state, now);
        let opened = open(&made.state, now + LIFETIME - TimeDelta::seconds(1)).unwrap();
        assert_eq!(opened.provider_id, provider);
        assert!(opened.is_nonce(&made.nonce) && !opened.is_nonce("") && !opened.is_nonce(&made.challenge));
        assert!(open(&made.state, now + LIFETIME).is_none(), "it has ended");
        assert!(open("", now).is_none() && open(&made.state[1..], now).is_none());
        assert!(attempts(2).open(made.cookie.expose_secret(), &made.state, now).is_none(), "another pepper");
    }

    #[test]
    fn challenge_is_the_digest_of_the_verifier() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let made = attempts(1).start(Uuid::now_v7(), now).unwrap();
        let opened = attempts(1).open(made.cookie.expose_secret(), &made.state, now).unwrap();
        let verifier = opened.verifier.expose_secret();
        assert!((43..=128).contains(&verifier.len()), "RFC 7636, section 4.1");
        let digest = digest::digest(&digest::SHA256, verifier.as_bytes());
        assert_eq!(made.challenge, BASE64_URL_SAFE_NO_PAD.encode(digest));
    }

    #[test]
    fn changed_cookie_is_refused() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let made = attempts(1).start(Uuid::now_v7(), now).unwrap();
        let cookie = made.cookie.expose_secret();
        let parts: Vec<&str> = cookie.split('_').collect();
        assert_eq!(parts.len(), 5);
        for part in 0..5 {
            let mut changed: Vec<String> = parts.iter().map(|&part| part.to_owned()).collect();
            let last = changed[part].pop().unwrap();
            changed[part].push(if last == '0' { '1' } else { '0' });
            let state = changed[2].clone();
            assert!(attempts(1).open(&changed.join("_"), &state, now).is_none(), "part {part}");
        }
        for bad in ["", "_", "____", &cookie[1..], &format!("{cookie}_"), &format!("0_{cookie}")] {
            assert!(attempts(1).open(bad, &made.state, now).is_none(), "{bad}");
        }
    }
}
