//! Idempotency keys: a client names a change, and a retry under the same name does not repeat it.

use crate::domain::invalid::Invalid;

/// Maximum length of a key in bytes.
const LENGTH_MAX: usize = 255;

/// Key that a client chose for one change. Compared byte by byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// Parses the value of a header.
    ///
    /// # Errors
    ///
    /// [`Invalid`] unless the key has 1 to 255 visible ASCII characters.
    pub fn parse(value: &[u8]) -> Result<Self, Invalid> {
        let refused = || Invalid::new("must be 1 to 255 visible ASCII characters, such as a UUID");
        if value.is_empty() || value.len() > LENGTH_MAX || !value.iter().all(u8::is_ascii_graphic) {
            return Err(refused());
        }
        String::from_utf8(value.to_vec()).map(Self).map_err(|_| refused())
    }

    /// Returns the key.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A request that is performed at most once.
#[derive(Debug, Clone)]
pub struct IdempotentRequest {
    /// Key of the client.
    pub key: IdempotencyKey,
    /// Keyed digest of caller, key, method, path, query and body, as it is stored.
    pub digest: [u8; 32],
    /// Digests under older peppers, which stored digests may equal.
    pub older_digests: Vec<[u8; 32]>,
    /// Keyed digest of caller and key, as the number of a lock.
    pub lock: i64,
}

impl IdempotentRequest {
    /// Whether a stored digest is that of this request.
    #[must_use]
    pub fn is_of(&self, stored: &[u8]) -> bool {
        std::iter::once(&self.digest).chain(&self.older_digests).any(|digest| digest == stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_has_visible_ascii_characters_and_a_limited_length() {
        for accepted in ["a", "8e03978e-40d5-43e8-bc93-6894a57f9324", "\"quoted\"", "!~", &"x".repeat(255)] {
            assert_eq!(IdempotencyKey::parse(accepted.as_bytes()).unwrap().as_str(), accepted);
        }
        let long = "x".repeat(256);
        for refused in ["", " ", "a b", "a\t", "a\n", "\u{7f}", "ä", &long] {
            assert!(IdempotencyKey::parse(refused.as_bytes()).is_err(), "{refused}");
        }
        assert!(IdempotencyKey::parse(b"\xff").is_err());
    }
}
