//! M5 skewed clock: one replica's clock is minutes or an hour off. It signs requests, and computes
//! the lifetimes of logins.

use std::{path::Path, time::Duration};

use anyhow::{Context, ensure};
use chrono::{DateTime, TimeDelta, Utc};

use super::{Minting, create, minted_in, names, until};
use crate::{
    report::{Goals, progress, row, table},
    scenarios::{Stage, fleet::given, skewed::offset},
};

/// Accounts of each of two sources.
const ACCOUNTS: usize = 5;
/// Life of a login, in seconds.
const LIFE: f64 = 12.0 * 3600.0;
/// Largest difference from a correct time, in seconds.
const OFF_MAX: f64 = 5.0;
const MINUTE: f64 = 60.0;

/// Figures of one clock.
struct Clock {
    name: &'static str,
    /// Requests that the provider refused because of their time.
    refused: usize,
    /// Mints that failed.
    failed: usize,
    /// Logins that the skewed replica minted in the background.
    minted: usize,
    /// Largest differences of `validUntil` and `refreshAt` from the right time, in seconds.
    valid_off: f64,
    refresh_off: f64,
}

/// Mints with each skew.
pub fn skewed(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    // Debian's libfaketime.
    let library = given("REGCRED_TEST_FAKETIME")?;
    let skews = [("+10 min", "+600"), ("-10 min", "-600"), ("+1 h", "+3600"), ("-1 h", "-3600")];
    let clocks = skews.map(|(name, skew)| {
        progress(&format!("M5 skewed clock: {name}"));
        let log = std::env::temp_dir().join(format!("regcred-m5-{}.log", std::process::id()));
        let clock = measure(name, skew, &library, &log);
        let _ = std::fs::remove_file(&log);
        clock
    });
    let mut rows = vec![row(["clock", "requests refused for their time", "validUntil off s", "refreshAt off s"])];
    for clock in clocks {
        let Clock { name, refused, failed, minted, valid_off, refresh_off } = clock?;
        rows.push(row([name, &refused.to_string(), &format!("{valid_off:.2}"), &format!("{refresh_off:.2}")]));
        let goal = |what: &str| format!("M5 skewed clock, {name}: {what}");
        goals.exactly(&goal("mints that failed"), 0, failed);
        goals.exactly(&goal("logins replaced by that replica"), 2 * ACCOUNTS, minted);
        goals.at_most(&goal("validUntil off, s"), OFF_MAX, valid_off);
        goals.at_most(&goal("refreshAt off, s"), OFF_MAX, refresh_off);
    }
    table("M5 skewed clock: one of two replicas, two sources, logins of 12 h", &rows)?;
    Ok(())
}

fn measure(name: &'static str, skew: &str, library: &str, log: &Path) -> anyhow::Result<Clock> {
    let minting = Minting::start(TimeDelta::hours(12), Duration::from_millis(5))?;
    let correct = minting.replica(&[], None)?;
    // Shifts the wall clock only. The monotonic clock stays correct.
    let variables = [("LD_PRELOAD", library), ("FAKETIME", skew), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    let skewed = minting.replica(&variables, Some(log))?;
    let expected: f64 = skew.parse()?;
    let off = offset(log)?;
    ensure!((off - expected).abs() < MINUTE, "the clock offset is {off} s");

    let names = names("m5", 2 * ACCOUNTS);
    let (oauth2, ecr) = names.split_at(ACCOUNTS);
    minting.create(&skewed, oauth2)?;
    for name in ecr {
        create(skewed.address, &minting.key, name, &minting.provider.ecr(name))?;
    }
    let (mut valid_off, mut refresh_off) = off_by(&minting)?;
    let mut failed = 0;
    // First by the skewed replica alone, then by either.
    correct.signal("STOP")?;
    let minted = minting.make_due().and_then(|()| minting.until_serial(2, names.len()));
    correct.signal("CONT")?;
    minted?;
    until("the log is complete", || Ok(minted_in(log)?.len() >= names.len()))?;
    let minted = minted_in(log)?.len();
    for serial in [2, 3] {
        if serial == 3 {
            minting.make_due()?;
            minting.until_serial(3, names.len())?;
        }
        failed += minting.count("SELECT count(*) FROM account_mints WHERE error_reason IS NOT NULL OR failures > 0")?;
        let (valid, refresh) = off_by(&minting)?;
        (valid_off, refresh_off) = (valid_off.max(valid), refresh_off.max(refresh));
    }
    failed += minting.count("SELECT count(*) FROM audit_events WHERE action = 'registryAccount.mintFailed'")?;
    Ok(Clock { name, refused: minting.provider.skewed(), failed, minted, valid_off, refresh_off })
}

/// Largest differences of `valid_until` and `refresh_at` from what the provider's answers require.
fn off_by(minting: &Minting) -> anyhow::Result<(f64, f64)> {
    let rows = sqlx::query_as(
        "SELECT name, valid_until, refresh_at FROM account_mints JOIN registry_accounts ON id = account_id",
    );
    let rows: Vec<(String, DateTime<Utc>, DateTime<Utc>)> =
        minting.runtime.block_on(rows.fetch_all(&mut *minting.conn.borrow_mut()))?;
    let issued = minting.provider.last();
    let (mut valid_off, mut refresh_off): (f64, f64) = (0.0, 0.0);
    for (name, valid_until, refresh_at) in rows {
        let expires_at = issued.get(&name).context("a login that was not issued")?.expires_at;
        valid_off = valid_off.max((valid_until - expires_at).as_seconds_f64().abs());
        // At half of the life, less up to 10 %.
        let left = (expires_at - refresh_at).as_seconds_f64();
        refresh_off = refresh_off.max(LIFE * 0.5 - left).max(left - LIFE * 0.55);
    }
    Ok((valid_off, refresh_off))
}
