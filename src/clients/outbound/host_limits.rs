//! Limits for each host: a maximum of concurrent uses, an interval between them, and a pause after a
//! 429.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use http::{HeaderMap, header};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout_at},
};

/// Maximum number of hosts in the table. Further hosts are refused until some are idle.
const HOSTS_MAX: usize = 4096;
/// Pause after a response without `Retry-After`.
const PAUSE_DEFAULT: Duration = Duration::from_mins(1);
/// Maximum pause.
const PAUSE_MAX: Duration = Duration::from_hours(1);

/// Limits of recently called hosts, by `host:port`.
#[derive(Debug)]
pub(in crate::clients) struct HostLimits {
    permits_per_host: usize,
    /// Minimum time between the starts of two uses of a host.
    interval: Duration,
    hosts: Mutex<HashMap<String, Host>>,
}

#[derive(Debug)]
struct Host {
    permits: Arc<Semaphore>,
    paused_until: Option<Instant>,
    /// Earliest start of the next use.
    next_start: Instant,
}

/// Reason why a host may not be called now.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::clients) enum Unavailable {
    /// The host asked for a pause, which lasts this long.
    Paused(Duration),
    /// Too many uses of the host are in progress or due.
    Saturated,
}

impl HostLimits {
    pub(in crate::clients) fn new(permits_per_host: usize, interval: Duration) -> Self {
        Self { permits_per_host: permits_per_host.max(1), interval, hosts: Mutex::default() }
    }

    /// Waits for a permit to use a host, and for the interval since the last use to pass.
    pub(in crate::clients) async fn acquire(
        &self,
        host: &str,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, Unavailable> {
        let permits = {
            let mut hosts = self.hosts.lock();
            if hosts.len() >= HOSTS_MAX {
                let now = Instant::now();
                hosts.retain(|_, host| !host.is_idle(self.permits_per_host, now));
            }
            // A new host takes the place of the one whose pause ends first: hosts that pause for long
            // must not keep others out.
            if hosts.len() >= HOSTS_MAX && !hosts.contains_key(host) {
                let unused = |host: &&Host| host.permits.available_permits() == self.permits_per_host;
                let paused = hosts.iter().filter(|(_, host)| unused(host));
                let evicted = paused.min_by_key(|(_, host)| host.paused_until).map(|(name, _)| name.clone());
                hosts.remove(&evicted.ok_or(Unavailable::Saturated)?);
            }
            let entry = hosts.entry(host.to_owned()).or_insert_with(|| Host {
                permits: Arc::new(Semaphore::new(self.permits_per_host)),
                paused_until: None,
                next_start: Instant::now(),
            });
            Arc::clone(&entry.permits)
        };
        self.check_pause(host)?;
        let permit = timeout_at(deadline, permits.acquire_owned()).await;
        let permit = permit.map_err(|_| Unavailable::Saturated)?.map_err(|_| Unavailable::Saturated)?;
        sleep_until(self.reserve_start(host, deadline)?).await;
        // Another use may have been refused meanwhile.
        self.check_pause(host)?;
        Ok(permit)
    }

    /// Reserves the earliest start of a use.
    fn reserve_start(&self, host: &str, deadline: Instant) -> Result<Instant, Unavailable> {
        let now = Instant::now();
        let mut hosts = self.hosts.lock();
        // A host with a permit in use is not removed.
        let Some(entry) = hosts.get_mut(host) else { return Ok(now) };
        let start = entry.next_start.max(now);
        if start > deadline {
            return Err(Unavailable::Saturated);
        }
        entry.next_start = start + self.interval;
        Ok(start)
    }

    /// Fails while a host is paused.
    pub(in crate::clients) fn check_pause(&self, host: &str) -> Result<(), Unavailable> {
        let until = self.hosts.lock().get(host).and_then(|host| host.paused_until);
        match until.map(|until| until.saturating_duration_since(Instant::now())) {
            Some(left) if !left.is_zero() => Err(Unavailable::Paused(left)),
            _ => Ok(()),
        }
    }

    /// Pauses a host and returns the length of the pause.
    pub(in crate::clients) fn pause(&self, host: &str, requested: Option<Duration>) -> Duration {
        let pause = requested.unwrap_or(PAUSE_DEFAULT).clamp(Duration::from_secs(1), PAUSE_MAX);
        if let Some(entry) = self.hosts.lock().get_mut(host) {
            let until = Instant::now() + pause;
            entry.paused_until = Some(entry.paused_until.map_or(until, |current| current.max(until)));
        }
        pause
    }
}

impl Host {
    fn is_idle(&self, permits: usize, now: Instant) -> bool {
        self.permits.available_permits() == permits
            && self.paused_until.is_none_or(|until| until <= now)
            && self.next_start <= now
    }
}

/// Delay that a response requests: `Retry-After` in either form, or Docker Hub's `X-Retry-After`, a
/// Unix time.
pub(in crate::clients) fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let until = |at: DateTime<Utc>| (at - now).to_std().unwrap_or_default();
    if let Some(value) = text(header::RETRY_AFTER.as_str()) {
        let seconds = value.parse().ok().map(Duration::from_secs);
        return seconds.or_else(|| DateTime::parse_from_rfc2822(value).ok().map(|at| until(at.to_utc())));
    }
    let at = text("x-retry-after")?.parse().ok()?;
    DateTime::from_timestamp(at, 0).map(until)
}

/// Window of Docker Hub's pull limit once it is exhausted: `ratelimit-remaining: 0;w=21600`.
pub(in crate::clients) fn exhausted_pull_limit(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("ratelimit-remaining")?.to_str().ok()?;
    let mut parts = value.split(';').map(str::trim);
    if parts.next()?.parse::<u64>().ok()? > 0 {
        return None;
    }
    let window = parts.find_map(|part| part.strip_prefix("w=")?.parse().ok().map(Duration::from_secs));
    Some(window.unwrap_or(PAUSE_DEFAULT))
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use rstest::rstest;

    use super::*;

    fn headers(name: &str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name.parse::<HeaderName>().unwrap(), value.parse().unwrap())])
    }

    #[rstest]
    #[case("retry-after", "7", Some(7))]
    #[case("retry-after", "Thu, 01 Jan 1970 00:01:40 GMT", Some(60))]
    #[case("retry-after", "Thu, 01 Jan 1970 00:00:00 GMT", Some(0))]
    #[case("retry-after", "soon", None)]
    #[case("retry-after", "-1", None)]
    #[case("x-retry-after", "50", Some(10))]
    #[case("x-other", "50", None)]
    fn delay_is_parsed_in_every_form(#[case] name: &str, #[case] value: &str, #[case] seconds: Option<u64>) {
        let now = DateTime::from_timestamp(40, 0).unwrap();
        assert_eq!(retry_after(&headers(name, value), now), seconds.map(Duration::from_secs));
    }

    #[rstest]
    #[case("0;w=21600", Some(21_600))]
    #[case("0", Some(60))]
    #[case("199;w=21600", None)]
    #[case("none", None)]
    fn exhausted_pull_limit_is_recognized(#[case] value: &str, #[case] seconds: Option<u64>) {
        let spent = exhausted_pull_limit(&headers("ratelimit-remaining", value));
        assert_eq!(spent, seconds.map(Duration::from_secs));
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[tokio::test]
    async fn concurrent_checks_of_a_host_are_limited() {
        let hosts = HostLimits::new(1, Duration::ZERO);
        let first = hosts.acquire("a:443", soon()).await.unwrap();
        assert_eq!(hosts.acquire("a:443", soon()).await.unwrap_err(), Unavailable::Saturated);
        assert!(hosts.acquire("b:443", soon()).await.is_ok());
        drop(first);
        assert!(hosts.acquire("a:443", soon()).await.is_ok());
    }

    #[tokio::test]
    async fn uses_of_a_host_are_spaced() {
        let interval = Duration::from_millis(200);
        let hosts = HostLimits::new(4, interval);
        drop(hosts.acquire("a:443", soon()).await.unwrap());
        let deadline = Instant::now() + Duration::from_mins(1);
        let starts: Vec<_> = (0..4).map(|_| hosts.reserve_start("a:443", deadline).unwrap()).collect();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= interval), "{starts:?}");
        // The next start would be after the deadline, which reserves nothing.
        assert_eq!(hosts.reserve_start("a:443", starts[3]), Err(Unavailable::Saturated));
        assert!(hosts.acquire("b:443", soon()).await.is_ok());
    }

    #[tokio::test]
    async fn paused_hosts_keep_no_other_host_out() {
        let hosts = HostLimits::new(1, Duration::ZERO);
        for number in 0..HOSTS_MAX {
            let host = format!("host-{number}:443");
            drop(hosts.acquire(&host, soon()).await.unwrap());
            hosts.pause(&host, Some(if number == 7 { Duration::from_mins(1) } else { PAUSE_MAX }));
        }
        assert!(hosts.acquire("new:443", soon()).await.is_ok());
        assert!(hosts.check_pause("host-7:443").is_ok());
        assert!(matches!(hosts.check_pause("host-8:443"), Err(Unavailable::Paused(_))));
    }

    #[tokio::test]
    async fn paused_host_is_not_called() {
        let hosts = HostLimits::new(1, Duration::ZERO);
        drop(hosts.acquire("a:443", soon()).await.unwrap());
        assert_eq!(hosts.pause("a:443", Some(Duration::from_hours(100))), PAUSE_MAX);
        assert!(matches!(hosts.acquire("a:443", soon()).await, Err(Unavailable::Paused(_))));
        assert!(hosts.check_pause("b:443").is_ok());
        // A shorter pause does not end a longer one.
        hosts.pause("a:443", Some(Duration::ZERO));
        assert!(matches!(hosts.check_pause("a:443"), Err(Unavailable::Paused(left)) if left > Duration::from_mins(50)));
    }
}
