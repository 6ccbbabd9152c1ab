//! Token buckets: how much somebody may have at once, and how fast he gets more.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// How fast a bucket fills, and how much it holds.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// How many tokens it holds.
    pub burst: u32,
    /// How often it gets one.
    pub interval: Duration,
}

/// Token buckets of a fixed number, in a table of fixed size: whoever share one share its tokens. To take a token is one
/// hash and one atomic write.
///
/// A bucket is the moment at which it is full again, in nanoseconds after the table was made. (They last 580 years.)
#[derive(Debug)]
pub struct RateLimiter {
    /// Nanoseconds for a token, and for as many as a bucket holds.
    interval: u64,
    capacity: u64,
    /// Keyed anew in each process, so that nobody can choose whom he shares a bucket with.
    hasher: RandomState,
    start: Instant,
    full_at: Box<[AtomicU64]>,
}

impl RateLimiter {
    /// Makes a table of so many full buckets.
    pub fn new(count: usize, rate: Rate) -> Self {
        let full_at = (0..count).map(|_| AtomicU64::new(0)).collect();
        let (interval, capacity) = (nanos(rate.interval), nanos(rate.interval * rate.burst));
        Self { interval, capacity, hasher: RandomState::new(), start: Instant::now(), full_at }
    }

    /// Takes a token; where there is none, says how long until there is.
    pub fn take(&self, whose: impl Hash, now: Instant) -> Result<(), Duration> {
        let now = self.since_start(now);
        let taken = self.bucket(whose).fetch_update(Relaxed, Relaxed, |full_at| self.after_one(full_at, now).ok());
        taken.map(drop).map_err(|full_at| self.after_one(full_at, now).err().unwrap_or_default())
    }

    /// When a bucket is full again after one more token was taken, or how long until there is one.
    fn after_one(&self, full_at: u64, now: u64) -> Result<u64, Duration> {
        let full_at = full_at.max(now) + self.interval;
        match (full_at - now).checked_sub(self.capacity) {
            None | Some(0) => Ok(full_at),
            Some(wait) => Err(Duration::from_nanos(wait)),
        }
    }

    fn bucket(&self, whose: impl Hash) -> &AtomicU64 {
        let bits = usize::try_from(self.hasher.hash_one(whose)).unwrap_or(usize::MAX);
        &self.full_at[bits % self.full_at.len()]
    }

    fn since_start(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.start))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let buckets = RateLimiter::new(16, Rate { burst: 10, interval: Duration::from_secs(6) });
        let at = |seconds| start + Duration::from_secs(seconds);
        for _ in 0..10 {
            assert_eq!(buckets.take("one", at(1)), Ok(()));
        }
        assert_eq!(buckets.take("one", at(1)), Err(Duration::from_secs(6)));
        assert_eq!(buckets.take("one", at(6)), Err(Duration::from_secs(1)));
        assert_eq!(buckets.take("one", at(7)), Ok(()));
        assert_eq!(buckets.take("one", at(7)), Err(Duration::from_secs(6)));
        for _ in 0..10 {
            assert_eq!(buckets.take("one", at(1_000)), Ok(()));
        }
        assert!(buckets.take("one", at(1_000)).is_err());
    }

    #[test]
    fn others_have_their_own() {
        let buckets = RateLimiter::new(1024, Rate { burst: 1, interval: Duration::from_secs(1) });
        let now = Instant::now();
        assert!(buckets.take(0, now).is_ok() && buckets.take(0, now).is_err());
        // One in a thousand may share the first one's.
        let passed = (1..=10).filter(|whose| buckets.take(whose, now).is_ok()).count();
        assert!(passed >= 8, "{passed}");
    }

    #[test]
    fn many_at_once_get_no_more_than_there_is() {
        let buckets = RateLimiter::new(1, Rate { burst: 100, interval: Duration::from_hours(1) });
        let now = Instant::now();
        let taken: usize = std::thread::scope(|scope| {
            let takers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| (0..1000).filter(|_| buckets.take((), now).is_ok()).count())).collect();
            takers.into_iter().map(|taker| taker.join().unwrap()).sum()
        });
        assert_eq!(taken, 100);
    }
}
