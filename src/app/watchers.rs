//! Watchers of files that change while the service runs, and of repeated warnings.

use std::{
    future::pending,
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::TimeDelta;
use tokio::time::MissedTickBehavior;

use crate::{clock, crypto::certificate::ServerCertificate, service::keys::Keys, telemetry};

/// Interval at which the files are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Remaining validity below which an expiring certificate is logged.
const EXPIRY_WARNING: TimeDelta = TimeDelta::days(7);
/// Interval between two such log messages.
const EXPIRY_WARNING_INTERVAL: Duration = Duration::from_hours(12);
/// Interval of checks for repeated warnings.
const REPEATS_INTERVAL: Duration = Duration::from_secs(30);

/// Follows master keys, peppers and the binding of sealed values, so that every replica soon uses a
/// new key.
pub async fn watch_keys(keys: Arc<Keys>) {
    let mut ticks = tokio::time::interval(CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        keys.follow().await;
    }
}

/// Logs how often warnings were repeated.
pub async fn report_repeated_warnings() {
    let mut ticks = tokio::time::interval(REPEATS_INTERVAL);
    loop {
        ticks.tick().await;
        telemetry::report_repeats();
    }
}

/// Reloads the listener's certificate and warns before it expires. Waits forever without one.
pub async fn watch_certificate(certificate: Option<Arc<ServerCertificate>>) {
    let Some(certificate) = certificate else { return pending().await };
    let mut warned_at: Option<Instant> = None;
    let mut ticks = tokio::time::interval(CHECK_INTERVAL);
    loop {
        ticks.tick().await;
        match certificate.reload() {
            Ok(true) => {
                tracing::info!(not_after = %certificate.not_after(), "tls certificate reloaded");
                warned_at = None;
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(%error, "tls certificate not reloaded, previous one stays in use");
            }
        }
        let expires_soon = certificate.not_after() - clock::now() < EXPIRY_WARNING;
        if expires_soon && warned_at.is_none_or(|at| at.elapsed() >= EXPIRY_WARNING_INTERVAL) {
            tracing::warn!(not_after = %certificate.not_after(), "tls certificate expires soon");
            warned_at = Some(Instant::now());
        }
    }
}
