//! Pace of calls that read much of a cluster.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// Share of the time that reads of lists take: one part of reading, and these parts of rest.
const REST: u32 = 15;
/// Longest rest. An API server that is far away is not busy all the time that an answer takes.
const REST_MAX: Duration = Duration::from_secs(1);

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

    /// Delays the next call after one whose answer is long, in proportion to the time since its start.
    /// So a slow API server, and a process that is busy, spend a small part of their time on it.
    pub fn rest(&self) {
        self.rest_at(Instant::now());
    }

    fn rest_at(&self, now: Instant) {
        let mut next = self.next.lock();
        if let Some(reserved) = *next {
            let took = (now + self.interval).saturating_duration_since(reserved);
            *next = Some(reserved.max(now + (took * REST).min(REST_MAX)));
        }
    }

    /// Number of calls.
    #[must_use]
    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

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

    #[rstest]
    #[case::short(1, 20)]
    #[case::in_proportion(10, 160)]
    #[case::at_most(500, 1_500)]
    fn long_answers_are_followed_by_a_rest(#[case] took: u64, #[case] next: u64) {
        let (pace, now) = (Pace::new(50), Instant::now());
        pace.reserve(now);

        let end = now + Duration::from_millis(took);
        pace.rest_at(end);

        assert_eq!(pace.reserve(end).duration_since(now), Duration::from_millis(next));
    }

    #[tokio::test]
    async fn calls_are_counted() {
        let pace = Pace::new(1_000);
        pace.wait().await;
        pace.wait().await;
        assert_eq!(pace.calls(), 2);
    }
}
