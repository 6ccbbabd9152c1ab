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
        sleep_until(self.reserve(Instant::now())).await;
    }

    /// Reserves the earliest start of a call. Time that passed without calls is not made up for.
    fn reserve(&self, now: Instant) -> Instant {
        let mut next = self.next.lock();
        let start = next.map_or(now, |next| next.max(now));
        *next = Some(start + self.interval);
        start
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

    #[test]
    fn calls_start_at_intervals_and_a_pause_saves_none() {
        let (pace, now) = (Pace::new(50), Instant::now());
        let starts: Vec<u128> = (0..3).map(|_| pace.reserve(now).duration_since(now).as_millis()).collect();
        assert_eq!(starts, [0, 20, 40]);
        let later = now + Duration::from_secs(10);
        let starts: Vec<u128> = (0..3).map(|_| pace.reserve(later).duration_since(later).as_millis()).collect();
        assert_eq!(starts, [0, 20, 40]);
    }

    #[tokio::test]
    async fn calls_are_counted() {
        let pace = Pace::new(1_000);
        pace.wait().await;
        pace.wait().await;
        assert_eq!(pace.calls(), 2);
    }
}
