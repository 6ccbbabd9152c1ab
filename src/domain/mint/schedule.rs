//! Times of the next mint.
//!
//! A login is replaced after half of its life, so that a provider may be away for the other half.
//! All durations are relative: the database adds them to its own time.

use std::time::Duration;

use chrono::TimeDelta;

use super::{MintError, MintReason};

/// Shortest acceptable validity of a login at its arrival.
pub const LIFETIME_MIN: Duration = Duration::from_mins(5);
/// Longest validity that is believed. A login with a later end is replaced as if it had this one.
pub const LIFETIME_MAX: Duration = Duration::from_hours(30 * 24);
/// Part of the delay until the next mint that is jitter, so that accounts drift apart.
const JITTER: f64 = 0.1;
/// Delay before the second attempt. Doubles with each failure.
const BACKOFF: Duration = Duration::from_secs(5);
/// Shortest delay after a failure.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Longest delay after a failure that ends by itself.
const BACKOFF_MAX_TRANSIENT: Duration = Duration::from_mins(5);
/// Longest delay after a failure that needs a change.
const BACKOFF_MAX: Duration = Duration::from_mins(30);
/// Longest delay that a provider can request.
pub const RETRY_AFTER_MAX: Duration = Duration::from_hours(1);

/// Checks the validity that is left at the arrival of a login.
///
/// # Errors
///
/// [`MintReason::ExpiredOnArrival`] or [`MintReason::TooShortLived`].
pub fn check_lifetime(remaining: TimeDelta) -> Result<Duration, MintError> {
    let Ok(lifetime) = remaining.to_std() else {
        let detail = "the login had expired when it arrived: check the clock of the provider";
        return Err(MintError::new(MintReason::ExpiredOnArrival, detail));
    };
    if lifetime.is_zero() {
        let detail = "the login expired when it arrived: check the clock of the provider";
        return Err(MintError::new(MintReason::ExpiredOnArrival, detail));
    }
    if lifetime < LIFETIME_MIN {
        let detail = format!(
            "the login is valid for {} s only: have the provider issue logins that are valid for {} s at least",
            lifetime.as_secs(),
            LIFETIME_MIN.as_secs()
        );
        return Err(MintError::new(MintReason::TooShortLived, detail));
    }
    Ok(lifetime.min(LIFETIME_MAX))
}

/// Returns the delay until the next mint: half of the lifetime, less up to 10 % of that.
///
/// `random` is from 0 to 1.
#[must_use]
pub fn refresh_after(lifetime: Duration, random: f64) -> Duration {
    (lifetime / 2).mul_f64(1.0 - JITTER * random.clamp(0.0, 1.0))
}

/// Returns the delay after the given number of consecutive failures: exponential, with full jitter,
/// and at least as long as the provider requests.
///
/// `random` is from 0 to 1.
#[must_use]
pub fn backoff(error: &MintError, failures: u32, random: f64) -> Duration {
    let most = if error.reason.is_transient() { BACKOFF_MAX_TRANSIENT } else { BACKOFF_MAX };
    let delay = BACKOFF.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(most);
    let delay = delay.mul_f64(random.clamp(0.0, 1.0)).max(BACKOFF_MIN);
    let requested = error.retry_after.unwrap_or_default().min(RETRY_AFTER_MAX);
    // Accounts that a provider throttled together are not due together.
    delay.max(requested.mul_f64(1.0 + JITTER * random.clamp(0.0, 1.0)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(-1, Err(MintReason::ExpiredOnArrival))]
    #[case(0, Err(MintReason::ExpiredOnArrival))]
    #[case(1, Err(MintReason::TooShortLived))]
    #[case(299, Err(MintReason::TooShortLived))]
    #[case(300, Ok(300))]
    #[case(43_200, Ok(43_200))]
    #[case(i64::MAX / 1_000, Ok(2_592_000))]
    #[case(i64::MIN / 1_000, Err(MintReason::ExpiredOnArrival))]
    fn lifetime_is_checked_at_the_arrival(#[case] seconds: i64, #[case] expected: Result<u64, MintReason>) {
        let checked = check_lifetime(TimeDelta::seconds(seconds));
        assert_eq!(checked.map(|lifetime| lifetime.as_secs()).map_err(|error| error.reason), expected);
    }

    #[rstest]
    #[case(MintReason::Unreachable, 1, None, 5)]
    #[case(MintReason::Unreachable, 3, None, 20)]
    #[case(MintReason::Unreachable, 100, None, 300)]
    #[case(MintReason::Throttled, u32::MAX, None, 300)]
    #[case(MintReason::Denied, 100, None, 1_800)]
    #[case(MintReason::Throttled, 1, Some(900), 990)]
    #[case(MintReason::Throttled, 1, Some(1_000_000_000), 3_960)]
    fn backoff_has_a_maximum_by_reason(
        #[case] reason: MintReason,
        #[case] failures: u32,
        #[case] retry_after: Option<u64>,
        #[case] seconds: u64,
    ) {
        let retry_after = retry_after.map(Duration::from_secs);
        let error = MintError { retry_after, ..MintError::new(reason, "") };
        assert_eq!(backoff(&error, failures, 1.0), Duration::from_secs(seconds));
        assert!(backoff(&error, failures, 0.0) >= BACKOFF_MIN);
    }

    proptest! {
        #[test]
        fn next_mint_is_before_half_of_the_life(seconds in 300_u64..2_592_000, random in 0.0..=1.0_f64) {
            let lifetime = Duration::from_secs(seconds);
            let delay = refresh_after(lifetime, random);
            prop_assert!(delay <= lifetime / 2 && delay >= lifetime.mul_f64(0.45));
        }
    }
}
