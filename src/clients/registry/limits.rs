//! How often one host is called: few checks at a time, and none while it asks to be left alone.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use http::{HeaderMap, header};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

/// Hosts that are remembered at a time; more are refused until some are idle.
const HOSTS_MAX: usize = 4096;
/// How long a host is left alone that does not say how long it wants to be.
const PAUSE_DEFAULT: Duration = Duration::from_mins(1);
/// The longest that a host is left alone, whatever it says.
const PAUSE_MAX: Duration = Duration::from_hours(1);

/// The hosts that were called lately, each as `host:port`.
#[derive(Debug)]
pub(super) struct Hosts {
    at_a_time: usize,
    known: Mutex<HashMap<String, Host>>,
}

#[derive(Debug)]
struct Host {
    permits: Arc<Semaphore>,
    paused_until: Option<Instant>,
}

/// Why a host is not called now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Busy {
    /// It asked to be left alone for so long.
    Paused(Duration),
    /// Too many checks of it are under way.
    Crowded,
}

impl Hosts {
    pub(super) fn new(at_a_time: usize) -> Self {
        Self { at_a_time: at_a_time.max(1), known: Mutex::default() }
    }

    /// Waits for a place among the checks of a host.
    pub(super) async fn enter(&self, host: &str, deadline: Instant) -> Result<OwnedSemaphorePermit, Busy> {
        let permits = {
            let mut known = self.lock();
            if known.len() >= HOSTS_MAX {
                let now = Instant::now();
                known.retain(|_, host| !host.is_idle(self.at_a_time, now));
            }
            if known.len() >= HOSTS_MAX && !known.contains_key(host) {
                return Err(Busy::Crowded);
            }
            let entry = known
                .entry(host.to_owned())
                .or_insert_with(|| Host { permits: Arc::new(Semaphore::new(self.at_a_time)), paused_until: None });
            Arc::clone(&entry.permits)
        };
        self.look(host)?;
        let permit = timeout_at(deadline, permits.acquire_owned()).await;
        permit.map_err(|_| Busy::Crowded)?.map_err(|_| Busy::Crowded)
    }

    /// Says whether a host wants to be left alone.
    pub(super) fn look(&self, host: &str) -> Result<(), Busy> {
        let until = self.lock().get(host).and_then(|host| host.paused_until);
        match until.map(|until| until.saturating_duration_since(Instant::now())) {
            Some(left) if !left.is_zero() => Err(Busy::Paused(left)),
            _ => Ok(()),
        }
    }

    /// Leaves a host alone for a while.
    pub(super) fn pause(&self, host: &str, asked: Option<Duration>) -> Duration {
        let pause = asked.unwrap_or(PAUSE_DEFAULT).clamp(Duration::from_secs(1), PAUSE_MAX);
        if let Some(entry) = self.lock().get_mut(host) {
            let until = Instant::now() + pause;
            entry.paused_until = Some(entry.paused_until.map_or(until, |known| known.max(until)));
        }
        pause
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Host>> {
        // Nothing in here can panic halfway through a change.
        self.known.lock()
    }
}

impl Host {
    fn is_idle(&self, at_a_time: usize, now: Instant) -> bool {
        self.permits.available_permits() == at_a_time && self.paused_until.is_none_or(|until| until <= now)
    }
}

/// How long an answer asks to wait: `Retry-After` in either form, or Docker Hub's `X-Retry-After`, a Unix time.
pub(super) fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let until = |at: DateTime<Utc>| (at - now).to_std().unwrap_or_default();
    if let Some(value) = text(header::RETRY_AFTER.as_str()) {
        let seconds = value.parse().ok().map(Duration::from_secs);
        return seconds.or_else(|| DateTime::parse_from_rfc2822(value).ok().map(|at| until(at.to_utc())));
    }
    let at = text("x-retry-after")?.parse().ok()?;
    DateTime::from_timestamp(at, 0).map(until)
}

/// Docker Hub's budget of pulls, when nothing of it is left: `ratelimit-remaining: 0;w=21600`. How long to wait.
pub(super) fn budget_is_spent(headers: &HeaderMap) -> Option<Duration> {
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
    fn a_wait_is_read_in_every_form(#[case] name: &str, #[case] value: &str, #[case] seconds: Option<u64>) {
        let now = DateTime::from_timestamp(40, 0).unwrap();
        assert_eq!(retry_after(&headers(name, value), now), seconds.map(Duration::from_secs));
    }

    #[rstest]
    #[case("0;w=21600", Some(21_600))]
    #[case("0", Some(60))]
    #[case("199;w=21600", None)]
    #[case("none", None)]
    fn a_spent_budget_is_seen(#[case] value: &str, #[case] seconds: Option<u64>) {
        let spent = budget_is_spent(&headers("ratelimit-remaining", value));
        assert_eq!(spent, seconds.map(Duration::from_secs));
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[tokio::test]
    async fn a_host_is_called_by_few_at_a_time() {
        let hosts = Hosts::new(1);
        let first = hosts.enter("a:443", soon()).await.unwrap();
        assert_eq!(hosts.enter("a:443", soon()).await.unwrap_err(), Busy::Crowded);
        assert!(hosts.enter("b:443", soon()).await.is_ok());
        drop(first);
        assert!(hosts.enter("a:443", soon()).await.is_ok());
    }

    #[tokio::test]
    async fn a_host_that_asks_for_it_is_left_alone() {
        let hosts = Hosts::new(1);
        drop(hosts.enter("a:443", soon()).await.unwrap());
        assert_eq!(hosts.pause("a:443", Some(Duration::from_hours(100))), PAUSE_MAX);
        assert!(matches!(hosts.enter("a:443", soon()).await, Err(Busy::Paused(_))));
        assert!(hosts.look("b:443").is_ok());
        // A shorter wait does not end a longer one.
        hosts.pause("a:443", Some(Duration::ZERO));
        assert!(matches!(hosts.look("a:443"), Err(Busy::Paused(left)) if left > Duration::from_mins(50)));
    }
}
