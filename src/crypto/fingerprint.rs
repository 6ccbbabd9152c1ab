//! Fingerprints of certificates, to name them in the audit log.

use aws_lc_rs::digest;

use crate::domain::{audit::hex, cluster::CaCertificate};

/// Returns the SHA-256 fingerprint of each certificate, as `openssl x509 -fingerprint -sha256`
/// computes it, in lower-case hexadecimal digits without colons.
#[must_use]
pub fn of(certificate: &CaCertificate) -> Vec<String> {
    certificate.as_der().map(|der| hex(digest::digest(&digest::SHA256, der).as_ref())).collect()
}
