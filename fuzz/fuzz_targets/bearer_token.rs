//! Bearer tokens: the `Authorization` header, and the form and dates of a JSON Web Token.

#![no_main]

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::DateTime;
use libfuzzer_sys::fuzz_target;
use regcred::{
    domain::token::{PresentedToken, TOKEN_MAX},
    http::fuzzing::bearer,
};
use regcred_fuzz::{first_line, limited};

fuzz_target!(|input: &[u8]| limited(|| {
    if let Some(credential) = bearer(input) {
        assert!(credential.len() < input.len());
        check(&credential);
    }
    if let Ok(text) = str::from_utf8(input) {
        check(text);
    }
    // Header and claims in plain text: the fuzzer need not find base64.
    let (header, claims) = first_line(input);
    let part = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
    check(&format!("{}.{}.{}", part(header), part(claims), part(b"signature")));
}));

fn check(text: &str) {
    let Some(token) = PresentedToken::parse(text) else { return };
    assert!(text.len() <= TOKEN_MAX);
    let signed = str::from_utf8(token.signed_part()).expect("a part of the text");
    assert_eq!(text, format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(&token.signature)));
    for now in [0, 1_800_000_000] {
        let now = DateTime::from_timestamp(now, 0).expect("a time");
        if let Ok(expiry) = token.expiry(now) {
            assert!(expiry > now);
        }
    }
    for audience in token.claims.audiences() {
        assert!(token.claims.has("aud", audience));
    }
    let subject = token.claims.display_subject();
    assert!(!subject.chars().any(char::is_control), "{subject:?}");
    assert!(!format!("{token:?}").contains(text), "Debug prints the token");
}
