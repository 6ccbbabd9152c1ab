//! Pace of calls that read much of a cluster.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// Starts calls at regular intervals, so that they are no burden for the API server.
#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    next: Mutex<Option<Instant>>,
    calls: AtomicU32,
}

impl Pace {
    /// A pace of at most `per_second` calls.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self { interval, next: Mutex::default(), calls: AtomicU32::default() }
    }

    /// Waits for the start of the next call.
    pub async fn wait(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let start = {
            let mut next = self.next.lock();
            let start = next.map_or_else(Instant::now, |next| next.max(Instant::now()));
            *next = Some(start + self.interval);
            start
        };
        sleep_until(start).await;
    }

    /// Number of calls.
    #[must_use]
    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn calls_start_at_intervals_and_a_pause_saves_none() {
        let (pace, start) = (Pace::new(50), Instant::now());
        for _ in 0..51 {
            pace.wait().await;
        }
        assert_eq!(start.elapsed().as_millis(), 1_000);
        tokio::time::advance(Duration::from_secs(10)).await;
        let start = Instant::now();
        for _ in 0..11 {
            pace.wait().await;
        }
        assert_eq!((start.elapsed().as_millis(), pace.calls()), (200, 62));
    }
}
