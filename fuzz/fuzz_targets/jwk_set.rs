//! Key sets of token issuers. Every accepted key reaches the cryptography, which must refuse it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::{
    crypto::jws::verify,
    domain::jwk::{Algorithm, KeySet},
};
use regcred_fuzz::limited;

/// Candidates that are tried. One RSA key of 8192 bits takes a millisecond.
const TRIED_MAX: usize = 4;

fuzz_target!(|input: &[u8]| limited(|| {
    let Ok(keys) = KeySet::parse(input) else { return };
    for algorithm in Algorithm::ALL {
        for key in keys.candidates(None, algorithm).chain(keys.candidates(Some("a"), algorithm)).take(TRIED_MAX) {
            assert!(key.fits(algorithm) && keys.contains(None));
            for length in [0, 64, 96, 256] {
                assert!(!verify(key, algorithm, b"message", &vec![1; length]), "{key:?}");
            }
        }
    }
}));
