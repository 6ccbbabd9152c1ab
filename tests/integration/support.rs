//! What the tests share: the app as it is put together for production, a client that checks what it is answered, and the
//! services that `dev/with-services` brings.

pub mod app;
pub mod client;
pub mod files;
pub mod kubernetes;
pub mod listener;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod registry;

use std::time::{Duration, Instant};

/// Longer than anything takes on a busy machine, so that only what never comes is given up.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// A variable that `dev/with-services` exports.
pub fn given(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: run the tests with dev/with-services"))
}

/// Asks again and again until the answer is there.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "this did not come about within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
