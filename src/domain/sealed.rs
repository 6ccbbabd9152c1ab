//! Sealed values: what is stored of a secret, and where.

use uuid::Uuid;

/// Where a sealed value lives: the ciphertext opens only there.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Table of the row.
    pub table: &'static str,
    /// Column that holds the ciphertext.
    pub column: &'static str,
    /// Primary key of the row.
    pub id: Uuid,
}

/// A sealed value as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Id of the master key.
    pub key_id: String,
    /// 12 bytes of nonce, the ciphertext, 16 bytes of tag.
    pub bytes: Vec<u8>,
}
