//! Sealed values and the places that they are bound to.

use uuid::Uuid;

/// Place of a sealed value. The ciphertext opens only there.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Table of the row.
    pub table: &'static str,
    /// Column that holds the ciphertext.
    pub column: &'static str,
    /// Primary key of the row.
    pub id: Uuid,
}

/// Sealed value as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Id of the master key.
    pub key_id: String,
    /// Nonce (12 bytes), ciphertext and tag (16 bytes).
    pub bytes: Vec<u8>,
}
