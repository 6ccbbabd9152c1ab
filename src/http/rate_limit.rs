//! Rate limits of one process, with constant memory: requests per caller, and failed
//! authentications.
//!
//! The generic cell rate algorithm (GCRA) keeps one timestamp per bucket: the time at which the
//! bucket will be full again.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    net::{IpAddr, Ipv6Addr},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use uuid::Uuid;

use crate::domain::caller::Actor;

/// Buckets for callers, half a megabyte. Among 100 callers, the probability that two share one is 7
/// %.
const CALLER_BUCKETS: usize = 65_536;
/// Buckets for failed authentications, of each kind.
const FAILURE_BUCKETS: usize = 4096;
/// Failed authentications that name the same key id.
const FAILURES_PER_KEY: Rate = Rate { burst: 10, interval: Duration::from_secs(6) };
/// Failed authentications from one address, which many callers may share.
const FAILURES_PER_SOURCE: Rate = Rate { burst: 30, interval: Duration::from_secs(1) };

/// Size and refill rate of a token bucket.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Number of tokens that a full bucket holds.
    pub burst: u32,
    /// Time after which one token is added.
    pub interval: Duration,
}

/// A fixed number of token buckets. Keys with the same hash share a bucket.
///
/// Taking a token costs one hash and one atomic write.
#[derive(Debug)]
pub struct RateLimiter {
    /// Nanoseconds per token.
    interval: u64,
    /// Nanoseconds in which an empty bucket fills.
    capacity: u64,
    /// Keyed per process, so that a client cannot choose which bucket it shares.
    hasher: RandomState,
    start: Instant,
    /// For each bucket, nanoseconds after `start` at which it is full. They overflow after 580
    /// years.
    full_at: Box<[AtomicU64]>,
}

impl RateLimiter {
    /// Creates `count` full buckets.
    pub fn new(count: usize, rate: Rate) -> Self {
        let full_at = (0..count).map(|_| AtomicU64::new(0)).collect();
        let (interval, capacity) = (nanos(rate.interval), nanos(rate.interval * rate.burst));
        Self { interval, capacity, hasher: RandomState::new(), start: Instant::now(), full_at }
    }

    /// Takes a token from the bucket of `key`.
    ///
    /// # Errors
    ///
    /// The time until the next token, if the bucket is empty.
    pub fn take(&self, key: impl Hash, now: Instant) -> Result<(), Duration> {
        let now = self.since_start(now);
        let taken = self.bucket(key).fetch_update(Relaxed, Relaxed, |full_at| self.after_one(full_at, now).ok());
        taken.map(drop).map_err(|full_at| self.after_one(full_at, now).err().unwrap_or_default())
    }

    /// Time at which a bucket is full once another token is taken, or the time until the next
    /// token.
    fn after_one(&self, full_at: u64, now: u64) -> Result<u64, Duration> {
        let full_at = full_at.max(now) + self.interval;
        match (full_at - now).checked_sub(self.capacity) {
            None | Some(0) => Ok(full_at),
            Some(wait) => Err(Duration::from_nanos(wait)),
        }
    }

    fn bucket(&self, key: impl Hash) -> &AtomicU64 {
        let bits = usize::try_from(self.hasher.hash_one(key)).unwrap_or(usize::MAX);
        &self.full_at[bits % self.full_at.len()]
    }

    fn since_start(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.start))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Limits the requests of each authenticated caller.
#[derive(Debug)]
pub struct RequestLimiter(Option<RateLimiter>);

impl RequestLimiter {
    /// Creates a limiter; without a rate it admits every request.
    pub fn new(rate: Option<Rate>) -> Self {
        Self(rate.map(|rate| RateLimiter::new(CALLER_BUCKETS, rate)))
    }

    /// Counts a request of an authenticated caller.
    ///
    /// # Errors
    ///
    /// The time after which to retry.
    pub fn count(&self, actor: &Actor) -> Result<(), Duration> {
        let Some(buckets) = &self.0 else { return Ok(()) };
        match actor.id {
            Some(id) => buckets.take(id, Instant::now()),
            None => buckets.take(&actor.name, Instant::now()),
        }
    }
}

/// Network from which a request comes: an IPv4 address, or the /64 of an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source(IpAddr);

impl Source {
    /// The source that an address belongs to.
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(v4) => IpAddr::V4(v4),
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        })
    }
}

/// Limits failed authentications by address, and by the key id that they name.
///
/// Only well-formed credentials that fail verification are counted, and valid ones are never
/// limited. A flood of forged keys therefore locks out neither the owner of the key id nor other
/// callers behind the address. Signing in through a provider is the exception: an attempt counts
/// before it causes a call.
#[derive(Debug)]
pub struct FailedAuthenticationLimiter {
    keys: RateLimiter,
    sources: RateLimiter,
}

impl Default for FailedAuthenticationLimiter {
    fn default() -> Self {
        Self {
            keys: RateLimiter::new(FAILURE_BUCKETS, FAILURES_PER_KEY),
            sources: RateLimiter::new(FAILURE_BUCKETS, FAILURES_PER_SOURCE),
        }
    }
}

impl FailedAuthenticationLimiter {
    /// Counts a failure. `key_id` is the id that a forged API key names; a token names none.
    ///
    /// # Errors
    ///
    /// The time after which to retry.
    pub fn count(&self, key_id: Option<Uuid>, source: Option<Source>) -> Result<(), Duration> {
        self.count_at(key_id, source, Instant::now())
    }

    fn count_at(&self, key_id: Option<Uuid>, source: Option<Source>, now: Instant) -> Result<(), Duration> {
        source.map_or(Ok(()), |source| self.sources.take(source, now))?;
        key_id.map_or(Ok(()), |id| self.keys.take(id, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_allows_its_burst_and_then_its_rate() {
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
    fn keys_have_buckets_of_their_own() {
        let buckets = RateLimiter::new(1024, Rate { burst: 1, interval: Duration::from_secs(1) });
        let now = Instant::now();
        assert!(buckets.take(0, now).is_ok() && buckets.take(0, now).is_err());
        // One key in a thousand shares the first bucket.
        let passed = (1..=10).filter(|key| buckets.take(key, now).is_ok()).count();
        assert!(passed >= 8, "{passed}");
    }

    #[test]
    fn concurrent_takers_share_one_burst() {
        let buckets = RateLimiter::new(1, Rate { burst: 100, interval: Duration::from_hours(1) });
        let now = Instant::now();
        let taken: usize = std::thread::scope(|scope| {
            let takers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| (0..1000).filter(|_| buckets.take((), now).is_ok()).count())).collect();
            takers.into_iter().map(|taker| taker.join().unwrap()).sum()
        });
        assert_eq!(taken, 100);
    }

    fn source(address: &str) -> Source {
        Source::of(address.parse().unwrap())
    }

    #[test]
    fn failures_of_one_key_id_are_limited() {
        let limiter = FailedAuthenticationLimiter::default();
        let (id, start) = (Uuid::now_v7(), Instant::now());
        let at = |seconds| limiter.count_at(Some(id), None, start + Duration::from_secs(seconds));
        for _ in 0..10 {
            assert_eq!(at(0), Ok(()));
        }
        assert_eq!(at(0), Err(Duration::from_secs(6)));
        assert_eq!(at(6), Ok(()));
        assert_eq!(at(6), Err(Duration::from_secs(6)));
    }

    #[test]
    fn failures_of_one_address_are_limited_over_all_keys() {
        let limiter = FailedAuthenticationLimiter::default();
        let now = Instant::now();
        let count = |address: &str| limiter.count_at(Some(Uuid::now_v7()), Some(source(address)), now);
        let passed = (0..100).filter(|_| count("192.0.2.1").is_ok()).count();
        // Two of the ids may share a bucket.
        assert!((28..=30).contains(&passed), "{passed}");
        assert!((0..100).any(|last| count(&format!("198.51.100.{last}")).is_ok()));
    }

    #[test]
    fn an_ipv6_network_is_one_source() {
        assert_eq!(source("2001:db8:1:2:3::4"), source("2001:db8:1:2:ffff::1"));
        assert_ne!(source("2001:db8:1:2::1"), source("2001:db8:1:3::1"));
        assert_eq!(source("::ffff:192.0.2.1"), source("192.0.2.1"));
    }
}
