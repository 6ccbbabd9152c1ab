//! Sealed values: bytes that were not sealed for a slot do not open there.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use regcred::{
    crypto::sealer::{KeyRing, Sealer},
    domain::sealed::Sealed,
    storage::sealed::SealedColumn,
};
use regcred_fuzz::limited;
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

static SEALER: LazyLock<Sealer> = LazyLock::new(|| {
    let ring = "new:AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\nold:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    Sealer::new(KeyRing::parse(&SecretString::from(ring)).expect("a ring"), None)
});

fuzz_target!(|input: &[u8]| limited(|| {
    let _ = KeyRing::parse(&SecretString::from(String::from_utf8_lossy(input).into_owned()));
    let slot = SealedColumn::AccountPassword.slot(Uuid::nil());
    for key_id in ["new", "old", "unknown"] {
        let sealed = Sealed { key_id: key_id.to_owned(), bytes: input.to_vec() };
        assert!(SEALER.open(slot, &sealed).is_err());
    }
    let [at, bit, secret @ ..] = input else { return };
    let secret = SecretString::from(String::from_utf8_lossy(secret).into_owned());
    let mut sealed = SEALER.seal(slot, &secret).expect("random bytes");
    let opened = SEALER.open(slot, &sealed).expect("the slot of the value");
    assert_eq!(opened.expose_secret(), secret.expose_secret());
    assert!(SEALER.open(SealedColumn::ClusterCredential.slot(Uuid::nil()), &sealed).is_err());
    let at = usize::from(*at) % sealed.bytes.len();
    sealed.bytes[at] ^= 1 << (bit % 8);
    assert!(SEALER.open(slot, &sealed).is_err());
}));
