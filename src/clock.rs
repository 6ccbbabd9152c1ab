//! The wall clock of the process.
//!
//! Stored timestamps come from Postgres, so that all replicas share one clock. This one serves
//! comparisons with times that others set, such as the expiry of a token or certificate.

use chrono::{DateTime, Utc};

/// Returns the current time.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the only place that reads the wall clock")]
pub fn now() -> DateTime<Utc> {
    Utc::now()
}
