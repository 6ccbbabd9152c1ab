//! Shared test support: the app as production composes it, an API client that checks responses, and
//! the services of `dev/with-services`.

pub mod app;
pub mod broker;
pub mod client;
pub mod console;
pub mod event_stream;
pub mod files;
pub mod kubernetes;
pub mod listener;
pub mod pg_proxy;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod registry;

use std::time::{Duration, Instant};

/// Timeout for every wait: longer than any step takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// Reads a variable that `dev/with-services` exports.
pub fn given(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: run the tests with dev/with-services"))
}

/// Polls until `ask` returns a value; panics after [`PATIENCE`].
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "timed out after {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
