//! Whether a cluster is called at all: after some failures in a row of the cluster as a whole only one try at a time goes
//! through, and those are further and further apart.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Failures in a row, with nothing between them that worked, after which a cluster is left alone.
const TOLERATED: u32 = 3;
/// The first pause, which doubles.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause: a cluster that is back is noticed within this.
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// What is known of one cluster.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Failures in a row.
    failures: u32,
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

    /// Something worked.
    pub fn succeeded(&self) {
        *self.lock() = State::default();
    }

    /// The cluster as a whole failed; whether it is left alone from now on. One that says when to come back is taken at
    /// its word, at once.
    pub fn failed(&self, now: Instant, is_certain: bool, asked: Option<Duration>) -> bool {
        let mut state = self.lock();
        state.failures += 1;
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

    #[test]
    fn a_cluster_that_fails_is_left_alone_longer_and_longer_until_it_works() {
        let (breaker, mut now) = (Breaker::default(), Instant::now());
        assert!(!breaker.failed(now, false, None) && !breaker.failed(now, false, None));
        assert_eq!(breaker.allowance(now), Allowance::All);
        assert!(breaker.failed(now, false, None));
        // Those that were under way change nothing.
        assert!(!breaker.failed(now, false, None));
        for expected in [1, 2, 4, 8, 15, 15, 15].map(Duration::from_secs) {
            assert_eq!(breaker.allowance(now + expected.mul_f64(0.89)), Allowance::Nothing, "{expected:?}");
            now += expected.mul_f64(1.11);
            assert_eq!(breaker.allowance(now), Allowance::One, "{expected:?}");
            assert!(breaker.failed(now, false, None));
        }
        breaker.succeeded();
        assert_eq!(breaker.allowance(now), Allowance::All);
    }

    #[test]
    fn what_the_cluster_asks_for_is_obeyed() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        assert!(breaker.failed(now, false, Some(Duration::from_mins(1))));
        assert_eq!(breaker.allowance(now + Duration::from_secs(59)), Allowance::Nothing);
        assert_eq!(breaker.allowance(now + Duration::from_secs(61)), Allowance::One);
    }

    #[test]
    fn a_single_failure_between_successes_pauses_nothing() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..10 {
            assert!(!breaker.failed(now, false, None));
            breaker.succeeded();
        }
        assert!(breaker.failed(now, true, None));
    }
}
