//! Whether a cluster is called at all: after some failures in a row of the cluster as a whole, of several targets, only one try at a
//! time goes through, and those are further and further apart.

use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use uuid::Uuid;

use crate::domain::names::NamespaceName;

/// Failures in a row, with nothing between them that worked, after which a cluster is left alone.
const TOLERATED: u32 = 3;
/// The first pause, which doubles.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause: a cluster that is back is noticed within this.
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// What is known of one cluster.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

/// A target of the cluster: the pull secret, and its namespace.
pub type Place = (Uuid, NamespaceName);

#[derive(Debug, Default)]
struct State {
    /// Failures in a row, each of another target than the one before: what is wrong with one target alone is no fault of the cluster.
    failures: u32,
    /// Where the last one was.
    failed_at: Option<Place>,
    /// Pauses in a row.
    pauses: u32,
    /// Not before.
    until: Option<Instant>,
}

/// How much may be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// Whatever is due.
    All,
    /// One target, to see whether the cluster is back.
    One,
    /// Nothing yet.
    Nothing,
}

impl Breaker {
    /// How much may be tried.
    pub fn allowance(&self, now: Instant) -> Allowance {
        let state = self.lock();
        match state.until {
            None => Allowance::All,
            Some(until) if until <= now => Allowance::One,
            Some(_) => Allowance::Nothing,
        }
    }

    /// The cluster did what was asked. While it is left alone this is something that was under way before, and changes nothing.
    pub fn succeeded(&self, now: Instant) {
        let mut state = self.lock();
        if state.until.is_none_or(|until| until <= now) {
            *state = State::default();
        }
    }

    /// The cluster as a whole failed, when this target was tried or any; whether it is left alone from now on. One that says when to come
    /// back is taken at its word, at once.
    pub fn failed(&self, now: Instant, at: Option<Place>, is_certain: bool, asked: Option<Duration>) -> bool {
        let mut state = self.lock();
        if at.is_none() || at != state.failed_at {
            state.failures = state.failures.saturating_add(1);
        }
        state.failed_at = at;
        let is_probe = state.until.is_some_and(|until| until <= now);
        if state.until.is_some() && !is_probe {
            // Others were under way when it was noticed.
            return false;
        }
        if !is_probe && !is_certain && asked.is_none() && state.failures < TOLERATED {
            return false;
        }
        let pause = (PAUSE * 2_u32.saturating_pow(state.pauses)).min(PAUSE_MAX);
        state.pauses = (state.pauses + 1).min(10);
        state.until = Some(now + jittered(pause).max(asked.unwrap_or_default()));
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here can panic halfway through a change.
        self.0.lock()
    }
}

/// A tenth more or less, so that replicas do not come back in step.
fn jittered(pause: Duration) -> Duration {
    let random = uuid::Uuid::now_v7().as_bytes()[15];
    pause.mul_f64(0.9 + 0.2 * f64::from(random) / 255.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Targets, each another one.
    fn target(number: u128) -> Place {
        (Uuid::from_u128(number), NamespaceName::parse("team-a").unwrap())
    }

    #[test]
    fn a_cluster_that_fails_is_left_alone_longer_and_longer_until_it_works() {
        let (breaker, mut now) = (Breaker::default(), Instant::now());
        assert!(
            !breaker.failed(now, Some(target(1)), false, None) && !breaker.failed(now, Some(target(2)), false, None)
        );
        assert_eq!(breaker.allowance(now), Allowance::All);
        assert!(breaker.failed(now, Some(target(3)), false, None));
        // Those that were under way change nothing.
        assert!(!breaker.failed(now, Some(target(4)), false, None));
        breaker.succeeded(now);
        for expected in [1, 2, 4, 8, 15, 15, 15].map(Duration::from_secs) {
            assert_eq!(breaker.allowance(now + expected.mul_f64(0.89)), Allowance::Nothing, "{expected:?}");
            now += expected.mul_f64(1.11);
            assert_eq!(breaker.allowance(now), Allowance::One, "{expected:?}");
            assert!(breaker.failed(now, Some(target(1)), false, None));
        }
        now += Duration::from_secs(17);
        breaker.succeeded(now);
        assert_eq!(breaker.allowance(now), Allowance::All);
    }

    #[test]
    fn what_the_cluster_asks_for_is_obeyed_whatever_else_is_under_way() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        assert!(breaker.failed(now, Some(target(1)), false, Some(Duration::from_mins(1))));
        breaker.succeeded(now);
        assert_eq!(breaker.allowance(now + Duration::from_secs(59)), Allowance::Nothing);
        assert_eq!(breaker.allowance(now + Duration::from_secs(61)), Allowance::One);
    }

    #[test]
    fn a_single_failure_between_successes_pauses_nothing() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for number in 0..10 {
            assert!(!breaker.failed(now, Some(target(number)), false, None));
            breaker.succeeded(now);
        }
        assert!(breaker.failed(now, None, true, None));
    }

    #[test]
    fn one_target_that_always_fails_pauses_no_other_one() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..10 {
            assert!(!breaker.failed(now, Some(target(1)), false, None));
        }
    }
}
