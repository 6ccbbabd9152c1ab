//! Limits that hold for every input of every fuzz target.
//!
//! A target parses its input and asserts what must hold of the result. libFuzzer reports panics and
//! hangs; this crate makes panics of too much time and memory.

pub mod logins;

use std::{alloc::System, time::Duration};

use cap::Cap;
use cpu_time::ThreadTime;

/// Refuses memory beyond 64 MiB, which aborts the process. libFuzzer's own memory is not counted.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 64 * 1024 * 1024);

/// Maximum CPU time of one input. Instrumented code is several times slower than a release build.
const TIME_MAX: Duration = Duration::from_millis(100);

/// Runs the code under test within its time limit.
///
/// CPU time is measured, because the machine may be busy. Only an input that is slow three times
/// counts: the first run may initialise tables or wait for pages.
///
/// # Panics
///
/// If all runs exceed the limit.
pub fn limited(run: impl Fn()) {
    for _ in 0..3 {
        let start = ThreadTime::now();
        run();
        if start.elapsed() <= TIME_MAX {
            return;
        }
    }
    panic!("the input takes more than {TIME_MAX:?} of CPU time");
}

/// Separates fields of an input that is made of several texts.
pub const UNIT_SEPARATOR: char = '\u{1f}';
/// Separates records of such fields.
pub const RECORD_SEPARATOR: char = '\u{1e}';

/// Returns the input up to the first line feed, and the rest.
#[must_use]
pub fn first_line(input: &[u8]) -> (&[u8], &[u8]) {
    let mut parts = input.splitn(2, |byte| *byte == b'\n');
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}
