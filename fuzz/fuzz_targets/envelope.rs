//! Sealed values: bytes that were not sealed for a slot do not open there, nor for another
//! destination.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use regcred::{
    crypto::{
        ring::Ring,
        sealer::{KeyRing, Sealer},
    },
    domain::sealed::{ClusterDestination, RegistryDestination, SealForm, Sealed, Slot},
    storage::sealed::SealedColumn,
};
use regcred_fuzz::limited;
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

static SEALER: LazyLock<Sealer> = LazyLock::new(|| {
    let ring = "new:AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\nold:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    Sealer::new(KeyRing::parse(&SecretString::from(ring)).expect("a ring"), None)
});

fn slot_at(authority: &str) -> Slot {
    let destination = RegistryDestination { authority, plain_http: false, ca: None };
    SealedColumn::account_password(Uuid::nil(), &destination)
}

fuzz_target!(|input: &[u8]| limited(|| {
    let _ = KeyRing::parse(&SecretString::from(String::from_utf8_lossy(input).into_owned()));
    let slot = slot_at("registry.example.com:5000");
    for key_id in ["new", "old", "unknown", "new+bound", "old+bound"] {
        let sealed = Sealed { key_id: key_id.to_owned(), bytes: input.to_vec() };
        assert!(SEALER.open(&slot, &sealed).is_err());
    }
    let [at, bit, secret @ ..] = input else { return };
    let secret = SecretString::from(String::from_utf8_lossy(secret).into_owned());
    for form in [SealForm::Unbound, SealForm::Bound] {
        let mut sealed = SEALER.seal(form, &slot, &secret).expect("random bytes");
        let opened = SEALER.open(&slot, &sealed).expect("the slot of the value");
        assert_eq!(opened.expose_secret(), secret.expose_secret());
        let elsewhere = SEALER.open(&slot_at("registry.example.com:6000"), &sealed);
        assert_eq!(elsewhere.is_err(), form == SealForm::Bound);
        let server = ClusterDestination { server: None, ca: None, tls_server_name: None };
        assert!(SEALER.open(&SealedColumn::cluster_credential(Uuid::nil(), &server), &sealed).is_err());
        let at = usize::from(*at) % sealed.bytes.len();
        sealed.bytes[at] ^= 1 << (bit % 8);
        assert!(SEALER.open(&slot, &sealed).is_err());
    }
}));
