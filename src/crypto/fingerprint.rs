//! Fingerprints: of certificates, to name them in the audit log, and of places, in generated names.

use aws_lc_rs::digest;

use crate::domain::{audit::hex, cluster::CaCertificate};

/// Returns the SHA-256 fingerprint of each certificate, as `openssl x509 -fingerprint -sha256`
/// computes it, in lower-case hexadecimal digits without colons.
#[must_use]
pub fn of(certificate: &CaCertificate) -> Vec<String> {
    certificate.as_der().map(sha256).collect()
}

/// Returns the SHA-256 digest in lower-case hexadecimal digits.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}
