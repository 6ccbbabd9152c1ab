//! Comparison of secrets in a time that does not depend on where they differ.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use secrecy::{ExposeSecret, SecretString};

/// Whether two secrets are equal. The time reveals at most whether their lengths are.
#[must_use]
pub fn is_equal(one: &SecretString, other: &SecretString) -> bool {
    verify_slices_are_equal(one.expose_secret().as_bytes(), other.expose_secret().as_bytes()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_text_is_equal() {
        let secret = |text: &str| SecretString::from(text);
        assert!(is_equal(&secret("correct-horse"), &secret("correct-horse")));
        for other in ["", "correct-hors", "correct-horse ", "Correct-horse", "correct-horsf"] {
            assert!(!is_equal(&secret("correct-horse"), &secret(other)), "{other}");
        }
    }
}
