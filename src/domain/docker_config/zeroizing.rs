//! A buffer that leaves no copies of its content in memory.

use std::io::{self, Write};

use secrecy::SecretString;
use zeroize::Zeroize;

/// Collects bytes of secrets. Zeroes its memory when it grows and when it is dropped.
pub(super) struct ZeroizingBuffer(Vec<u8>);

impl ZeroizingBuffer {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// Returns the content as text, or `None` if it is not UTF-8.
    pub(super) fn to_secret(&self) -> Option<SecretString> {
        // Copies into an allocation of the exact size. Shrinking in place could leave a copy
        // behind.
        str::from_utf8(&self.0).ok().map(SecretString::from)
    }

    fn grow(&mut self, needed: usize) {
        let mut grown = Vec::with_capacity(needed.max(self.0.capacity() * 2));
        grown.extend_from_slice(&self.0);
        self.0.zeroize();
        self.0 = grown;
    }
}

impl Write for ZeroizingBuffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let needed = self.0.len() + bytes.len();
        if needed > self.0.capacity() {
            self.grow(needed);
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ZeroizingBuffer {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}
