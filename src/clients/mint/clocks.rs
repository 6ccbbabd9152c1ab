//! Clocks of providers, relative to the clock of this host.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use parking_lot::Mutex;
use tokio::time::Instant;

/// Maximum number of remembered hosts.
const HOSTS_MAX: usize = 1_000;
/// Age from which an offset is not reported: the host may be gone, and this host's clock corrected.
const REPORTED_AGE_MAX: Duration = Duration::from_hours(24);

/// Clocks of recently called hosts, by `host:port`.
#[derive(Debug)]
pub(super) struct Clocks {
    /// Clock of this host, which tests set wrong.
    local: fn() -> DateTime<Utc>,
    hosts: Mutex<HashMap<String, Clock>>,
}

/// Clock of a host.
#[derive(Debug, Clone, Copy)]
struct Clock {
    /// Difference that its last answer showed.
    observed: TimeDelta,
    observed_at: Instant,
    /// Difference that requests to it are corrected by.
    adopted: TimeDelta,
}

impl Clocks {
    pub(super) fn new(local: fn() -> DateTime<Utc>) -> Self {
        Self { local, hosts: Mutex::default() }
    }

    /// Returns the time of this host.
    pub(super) fn local(&self) -> DateTime<Utc> {
        (self.local)()
    }

    /// Returns the time to state in requests to a host: its own if it was adopted, else the local one.
    pub(super) fn at(&self, host: &str) -> DateTime<Utc> {
        let adopted = self.hosts.lock().get(host).map(|clock| clock.adopted).unwrap_or_default();
        self.local().checked_add_signed(adopted).unwrap_or(DateTime::UNIX_EPOCH)
    }

    /// Records the time that a host stated. Requests to it are not corrected by it.
    pub(super) fn observe(&self, host: &str, date: DateTime<Utc>) {
        let (observed, observed_at) = (date - self.local(), Instant::now());
        let mut hosts = self.hosts.lock();
        if hosts.len() >= HOSTS_MAX && !hosts.contains_key(host) {
            let oldest = hosts.iter().min_by_key(|(_, clock)| clock.observed_at).map(|(host, _)| host.clone());
            hosts.remove(&oldest.unwrap_or_default());
        }
        let adopted = hosts.get(host).map(|clock| clock.adopted).unwrap_or_default();
        hosts.insert(host.to_owned(), Clock { observed, observed_at, adopted });
    }

    /// Corrects further requests to a host by the difference that its last answer showed.
    pub(super) fn adopt(&self, host: &str) {
        if let Some(clock) = self.hosts.lock().get_mut(host) {
            clock.adopted = clock.observed;
        }
    }

    /// Returns the largest difference that an answer of the last day showed.
    pub(super) fn offset_max(&self, now: Instant) -> TimeDelta {
        let hosts = self.hosts.lock();
        let recent = hosts.values().filter(|clock| now.duration_since(clock.observed_at) <= REPORTED_AGE_MAX);
        recent.map(|clock| clock.observed).max_by_key(TimeDelta::abs).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> DateTime<Utc> {
        DateTime::from_timestamp(1_767_225_600, 0).unwrap()
    }

    #[test]
    fn observed_clock_is_reported_and_only_an_adopted_one_is_used() {
        let clocks = Clocks::new(local);
        let offset = || clocks.offset_max(Instant::now());
        assert_eq!((offset(), clocks.at("a:443")), (TimeDelta::zero(), local()));
        clocks.observe("a:443", local() - TimeDelta::minutes(3));
        clocks.observe("b:443", local() + TimeDelta::minutes(2));
        assert_eq!((offset(), clocks.at("a:443")), (TimeDelta::minutes(-3), local()));
        clocks.adopt("a:443");
        clocks.observe("a:443", local());
        assert_eq!((offset(), clocks.at("a:443")), (TimeDelta::minutes(2), local() - TimeDelta::minutes(3)));
        assert_eq!(clocks.at("b:443"), local());
    }

    #[test]
    fn offset_is_not_reported_a_day_after_the_last_answer() {
        let clocks = Clocks::new(local);
        clocks.observe("a:443", local() + TimeDelta::hours(1));
        assert_eq!(clocks.offset_max(Instant::now()), TimeDelta::hours(1));
        let later = Instant::now() + REPORTED_AGE_MAX + Duration::from_secs(1);
        assert_eq!(clocks.offset_max(later), TimeDelta::zero());
    }

    #[test]
    fn number_of_hosts_is_bounded() {
        let clocks = Clocks::new(local);
        for number in 0..=HOSTS_MAX {
            clocks.observe(&format!("{number}:443"), local());
        }
        let hosts = clocks.hosts.lock();
        assert_eq!((hosts.len(), hosts.contains_key("1000:443")), (HOSTS_MAX, true));
    }
}
