//! Scanner of request heads and bodies: the result does not depend on the pieces in which the bytes
//! arrive, and no line of a head that reaches the parser ends with a bare line feed.

#![no_main]

use libfuzzer_sys::fuzz_target;
use regcred::http::fuzzing::scan_requests;
use regcred_fuzz::limited;

fuzz_target!(|input: &[u8]| limited(|| {
    let Some((size, bytes)) = input.split_first() else { return };
    let scanned = scan_requests(bytes, bytes.len().max(1));
    assert_eq!(scanned, scan_requests(bytes, usize::from(*size) + 1), "the pieces matter");

    let Some((seen, ends)) = scanned else { return };
    assert_eq!(seen.len(), bytes.len());
    assert!(ends.is_sorted() && ends.last().is_none_or(|end| *end <= seen.len()));
    // The parser ends at a corrupted byte.
    let corrupted = seen.iter().zip(bytes).position(|(seen, sent)| seen != sent).unwrap_or(seen.len());
    let seen = &seen[..corrupted];
    // Empty lines before a request are ignored, also by the parser.
    let start = seen.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(seen.len());
    let end = seen[start..].windows(4).position(|four| four == b"\r\n\r\n").map_or(seen.len(), |at| start + at + 4);
    let head = &seen[start..end];
    for at in (0..head.len()).filter(|at| head[*at] == b'\n') {
        assert!(at > 0 && head[at - 1] == b'\r', "a bare line feed at {at}");
    }
}));
