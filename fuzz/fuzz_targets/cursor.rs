//! Query strings of lists: limits and cursors.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::{
    domain::names::Name,
    http::fuzzing::{TargetKey, page_after},
};
use regcred_fuzz::limited;
use uuid::Uuid;

fuzz_target!(|input: &[u8]| limited(|| {
    let Ok(query) = str::from_utf8(input) else { return };
    // A cursor leads to itself: the key in it is canonical.
    let names = page_after::<Name>(query);
    assert!(names.is_none_or(|key| Name::parse(&key).is_ok()));
    let targets = page_after::<TargetKey>(query);
    assert!(targets.is_none_or(|key| key.parse::<TargetKey>().is_ok_and(|parsed| parsed.to_string() == key)));
    let ids = page_after::<Uuid>(query);
    assert!(ids.is_none_or(|key| Uuid::try_parse(&key).is_ok()));
}));
