//! Program of the images that a node runs: sleeps for the seconds of its argument, or for ever.

use std::{env, thread, time::Duration};

fn main() {
    match env::args().nth(1).and_then(|seconds| seconds.parse().ok()) {
        Some(seconds) => thread::sleep(Duration::from_secs(seconds)),
        None => loop {
            thread::park();
        },
    }
}
