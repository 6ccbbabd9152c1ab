//! `WWW-Authenticate` headers of registries, which decide where a login is sent.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::clients::{
    outbound::{Schemes, parse_url},
    registry::{Challenge, parse_challenge},
};
use regcred_fuzz::limited;

fuzz_target!(|input: &[u8]| limited(|| {
    let headers = || input.split(|byte| *byte == b'\n');
    let Some(Challenge::Bearer { realm, service }) = parse_challenge(headers()) else { return };
    for text in [Some(&realm), service.as_ref()].into_iter().flatten() {
        assert!(text.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte)), "{text:?}");
        assert!(text.len() <= 4096);
    }
    if let Ok(url) = parse_url(&realm, Schemes::Https) {
        assert!(url.scheme() == "https" && url.username().is_empty() && url.password().is_none());
    }
}));
