//! Circuit breaker per cluster: after consecutive failures of the cluster as a whole, only single
//! probes are made, at growing intervals.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use crate::domain::names::NamespaceName;

/// Consecutive failures that open the breaker.
const FAILURES_MAX: u32 = 3;
/// First pause. Doubles with each failed probe.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest pause, which bounds the time until a recovered cluster is noticed.
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// Circuit breaker of one cluster.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

/// A target within its cluster: pull secret and namespace.
pub type TargetKey = (Uuid, NamespaceName);

#[derive(Debug, Default)]
struct State {
    /// Consecutive failures, each of another target than the one before. A single failing target
    /// does not open the breaker.
    failures: u32,
    /// Target of the last failure.
    last_failed: Option<TargetKey>,
    /// Consecutive pauses.
    pauses: u32,
    /// End of the current pause. Set while the breaker is open.
    until: Option<Instant>,
}

/// Attempts that a breaker allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// Closed: all due targets.
    All,
    /// Half-open: one target.
    Probe,
    /// Open: none.
    None,
}

impl Breaker {
    /// Returns which attempts are allowed.
    pub fn allowance(&self, now: Instant) -> Allowance {
        match self.0.lock().until {
            None => Allowance::All,
            Some(until) if until <= now => Allowance::Probe,
            Some(_) => Allowance::None,
        }
    }

    /// Records a success. Ignored during a pause: the attempt started before it. Returns whether it
    /// closes the breaker.
    pub fn record_success(&self, now: Instant) -> bool {
        let mut state = self.0.lock();
        if state.until.is_some_and(|until| until > now) {
            return false;
        }
        std::mem::take(&mut *state).until.is_some()
    }

    /// Records a failure of the cluster as a whole. Returns whether a pause starts.
    ///
    /// A permanent failure and a `retry_after` start one at once, the latter of at least that
    /// duration. `target` is `None` if the cluster was not called.
    pub fn record_failure(
        &self,
        now: Instant,
        target: Option<TargetKey>,
        is_permanent: bool,
        retry_after: Option<Duration>,
    ) -> bool {
        let mut state = self.0.lock();
        if target.is_none() || target != state.last_failed {
            state.failures = state.failures.saturating_add(1);
        }
        state.last_failed = target;
        let is_probe = state.until.is_some_and(|until| until <= now);
        if state.until.is_some() && !is_probe {
            // The attempt started before the pause.
            return false;
        }
        if !is_probe && !is_permanent && retry_after.is_none() && state.failures < FAILURES_MAX {
            return false;
        }
        let pause = (PAUSE * 2_u32.saturating_pow(state.pauses)).min(PAUSE_MAX);
        state.pauses = (state.pauses + 1).min(10);
        state.until = Some(now + jittered(pause).max(retry_after.unwrap_or_default()));
        true
    }
}

/// Adds up to a tenth of jitter in either direction, so that replicas do not probe in step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.9 + 0.2 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A distinct target per number.
    fn target(number: u128) -> TargetKey {
        (Uuid::from_u128(number), NamespaceName::parse("team-a").unwrap())
    }

    #[test]
    fn pauses_grow_until_a_probe_succeeds() {
        let (breaker, mut now) = (Breaker::default(), Instant::now());
        assert!(
            !breaker.record_failure(now, Some(target(1)), false, None)
                && !breaker.record_failure(now, Some(target(2)), false, None)
        );
        assert_eq!(breaker.allowance(now), Allowance::All);
        assert!(breaker.record_failure(now, Some(target(3)), false, None));
        // Attempts in flight change nothing.
        assert!(!breaker.record_failure(now, Some(target(4)), false, None));
        breaker.record_success(now);
        for expected in [1, 2, 4, 8, 15, 15, 15].map(Duration::from_secs) {
            assert_eq!(breaker.allowance(now + expected.mul_f64(0.89)), Allowance::None, "{expected:?}");
            now += expected.mul_f64(1.11);
            assert_eq!(breaker.allowance(now), Allowance::Probe, "{expected:?}");
            assert!(breaker.record_failure(now, Some(target(1)), false, None));
        }
        now += Duration::from_secs(17);
        breaker.record_success(now);
        assert_eq!(breaker.allowance(now), Allowance::All);
    }

    #[test]
    fn retry_after_is_honoured_despite_attempts_in_flight() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        assert!(breaker.record_failure(now, Some(target(1)), false, Some(Duration::from_mins(1))));
        breaker.record_success(now);
        assert_eq!(breaker.allowance(now + Duration::from_secs(59)), Allowance::None);
        assert_eq!(breaker.allowance(now + Duration::from_secs(61)), Allowance::Probe);
    }

    #[test]
    fn single_failures_between_successes_start_no_pause() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for number in 0..10 {
            assert!(!breaker.record_failure(now, Some(target(number)), false, None));
            breaker.record_success(now);
        }
        assert!(breaker.record_failure(now, None, true, None));
    }

    #[test]
    fn a_single_failing_target_starts_no_pause() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..10 {
            assert!(!breaker.record_failure(now, Some(target(1)), false, None));
        }
    }
}
