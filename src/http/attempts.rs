//! How many wrong API keys and tokens somebody may show before he is told to wait.
//!
//! Counted are keys that have the form of one and fail the HMAC, by the id that they name and by the address that they
//! come from. Right keys are not looked at here, so a flood of wrong ones locks out nobody: neither other callers behind
//! the same address nor the owner of the id that the flood names.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use uuid::Uuid;

use crate::http::rate_limit::{Rate, RateLimiter};

/// How many buckets each kind has, whoever comes: two that share one share its tokens.
const BUCKETS: usize = 4096;
/// Wrong keys of one id: as many at once, then one more each so often.
const PER_KEY: Rate = Rate { burst: 10, interval: Duration::from_secs(6) };
/// Wrong keys from one address, behind which there may be many callers.
const PER_SOURCE: Rate = Rate { burst: 30, interval: Duration::from_secs(1) };

/// Where an attempt comes from. Of an IPv6 address, the network that one customer has to himself.
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

/// The attempts of one process.
#[derive(Debug)]
pub struct Attempts {
    keys: RateLimiter,
    sources: RateLimiter,
}

impl Default for Attempts {
    fn default() -> Self {
        Self { keys: RateLimiter::new(BUCKETS, PER_KEY), sources: RateLimiter::new(BUCKETS, PER_SOURCE) }
    }
}

impl Attempts {
    /// Counts a wrong key of this id; an error says when to try again.
    pub fn count(&self, id: Uuid, source: Option<Source>) -> Result<(), Duration> {
        self.count_at(id, source, Instant::now())
    }

    /// Counts something wrong that names no key, such as a token; an error says when to try again.
    pub fn count_source(&self, source: Option<Source>) -> Result<(), Duration> {
        source.map_or(Ok(()), |source| self.sources.take(source, Instant::now()))
    }

    fn count_at(&self, id: Uuid, source: Option<Source>, now: Instant) -> Result<(), Duration> {
        let by_source = source.map_or(Ok(()), |source| self.sources.take(source, now));
        by_source.and_then(|()| self.keys.take(id, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(address: &str) -> Source {
        Source::of(address.parse().unwrap())
    }

    #[test]
    fn a_key_has_its_burst_and_then_its_rate() {
        let attempts = Attempts::default();
        let (id, start) = (Uuid::now_v7(), Instant::now());
        let at = |seconds| attempts.count_at(id, None, start + Duration::from_secs(seconds));
        for _ in 0..10 {
            assert_eq!(at(0), Ok(()));
        }
        assert_eq!(at(0), Err(Duration::from_secs(6)));
        assert_eq!(at(6), Ok(()));
        assert_eq!(at(6), Err(Duration::from_secs(6)));
    }

    #[test]
    fn an_address_has_its_rate_over_all_keys() {
        let attempts = Attempts::default();
        let now = Instant::now();
        let count = |address: &str| attempts.count_at(Uuid::now_v7(), Some(source(address)), now);
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
