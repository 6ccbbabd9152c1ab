//! API keys: a key is accepted only with the checksum of its text.

#![no_main]

use std::fmt::Write as _;

use libfuzzer_sys::fuzz_target;
use regcred::crypto::api_key::PresentedKey;
use regcred_fuzz::limited;

const ID_BYTES: usize = 16;
const SECRET_BYTES: usize = 32;

fuzz_target!(|input: &[u8]| limited(|| {
    if let Ok(text) = str::from_utf8(input)
        && let Some(key) = PresentedKey::parse(text)
    {
        assert_eq!(text, format!("rgc_{}{}", key.id.simple(), &text[36..]));
    }
    // A key with these digits: the fuzzer need not find a checksum.
    let Some((parts, rest)) = input.split_at_checked(ID_BYTES + SECRET_BYTES) else { return };
    let (id, secret) = parts.split_at(ID_BYTES);
    let body = format!("rgc_{}_{}", hex(id), hex(secret));
    let text = format!("{body}{:08x}", crc32fast::hash(body.as_bytes()));
    let key = PresentedKey::parse(&text).expect("a well-formed key");
    assert_eq!(key.id.as_bytes(), id);
    assert!(!format!("{key:?}").contains(&text[37..]), "Debug prints the secret");
    // One other character.
    if let [at, with, ..] = rest {
        let mut changed = text.clone().into_bytes();
        let at = usize::from(*at) % changed.len();
        changed[at] = *with;
        if let Ok(changed) = str::from_utf8(&changed)
            && changed != text
        {
            assert!(PresentedKey::parse(changed).is_none(), "{changed}");
        }
    }
}));

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut digits, byte| {
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}
