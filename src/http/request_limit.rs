//! How many requests one caller may send: a token bucket for each, so that a flood of one leaves the others theirs.

use std::time::{Duration, Instant};

use crate::{
    domain::caller::Actor,
    http::rate_limit::{Rate, RateLimiter},
};

/// Half a megabyte. Two callers share a bucket by chance alone; of a hundred, one pair in ten processes.
const BUCKETS: usize = 65_536;

/// The limit of one process; `None` where there is none.
#[derive(Debug)]
pub struct RequestLimit(Option<RateLimiter>);

impl RequestLimit {
    /// Makes a limit of so many requests each second and so many at once.
    pub fn new(rate: Option<Rate>) -> Self {
        Self(rate.map(|rate| RateLimiter::new(BUCKETS, rate)))
    }

    /// Counts a request of a caller whose key was found good; an error says when to try again.
    pub fn count(&self, actor: &Actor) -> Result<(), Duration> {
        let Some(buckets) = &self.0 else { return Ok(()) };
        match actor.id {
            Some(id) => buckets.take(id, Instant::now()),
            None => buckets.take(&actor.name, Instant::now()),
        }
    }
}
