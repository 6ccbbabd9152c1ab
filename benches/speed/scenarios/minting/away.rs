//! M3 provider away: for 5/12 of a login's life, after its first half. The database's clock decides
//! when a mint is due and when a login ends, so its times are moved instead of waiting for hours.

use std::time::Duration;

use anyhow::ensure;
use chrono::TimeDelta;
use serde_json::{Value, json};

use super::{Minting, names, until};
use crate::{
    process::Server,
    report::{Goals, progress, row, table},
    scenarios::Stage,
};

const ACCOUNTS: usize = 10;
/// Life of a login, in hours.
const LIFE: i64 = 12;
/// The provider is away for this many steps of ten minutes: five hours.
const STEPS: usize = 30;
const STEP_SECONDS: f64 = 600.0;
/// Longest delay between attempts while the provider is away, in seconds.
const DELAY_MAX: f64 = 300.0;

/// Takes the provider away and brings it back.
pub fn provider_away(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    let minting = Minting::start(TimeDelta::hours(LIFE), Duration::from_millis(5))?;
    let replicas = [minting.replica(&[], None)?, minting.replica(&[], None)?];
    let names = names("m3", ACCOUNTS);
    minting.create(&replicas[0], &names)?;
    let delivered = minting.deliver(fleet, &replicas[0], &names)?;
    let before = delivered.read()?;

    minting.provider.set_down(true);
    progress("M3 provider away: half of the life passes");
    minting.pass(3_600.0 * 6.0)?;
    until_tried(&minting, &[0; ACCOUNTS])?;
    let (mut expired, mut unexpected) = (0, 0);
    for step in 1..=STEPS {
        if step % 10 == 0 {
            progress(&format!("M3 provider away: {step} of {STEPS} times ten minutes"));
        }
        let failures = failures(&minting)?;
        minting.pass(STEP_SECONDS)?;
        until_tried(&minting, &failures)?;
        expired += minting.count("SELECT count(*) FROM account_mints WHERE valid_until <= now()")?;
        unexpected += states(&minting, &replicas[1], &names, "failing", &json!("unreachable"))?;
    }
    let after = delivered.read()?;
    let changed = usize::from(after.version != before.version);

    progress("M3 provider away: it returns");
    minting.provider.set_down(false);
    let late = "SELECT count(*) FROM account_mints WHERE next_attempt_at > now() + interval '5 minutes'";
    let late = minting.count(late)?;
    minting.pass(DELAY_MAX)?;
    let took = minting.until_serial(2, ACCOUNTS)?;
    minting.until_delivered(&delivered)?;
    unexpected += states(&minting, &replicas[1], &names, "valid", &Value::Null)?;
    ensure!(delivered.read()?.version != after.version, "the Secret did not change");
    let requests = minting.provider.requests();
    minting.retire(&replicas[0], &delivered)?;

    table(
        &format!("M3 provider away: {ACCOUNTS} accounts, two replicas, five of twelve hours in {STEPS} steps"),
        &[
            row(["", ""]),
            row(["requests to the provider", &requests.to_string()]),
            row(["all minted after its return and the longest delay, s", &format!("{:.2}", took.as_secs_f64())]),
        ],
    )?;
    goals.exactly("M3 provider away: logins that ended", 0, expired);
    goals.exactly("M3 provider away: Secrets changed meanwhile", 0, changed);
    goals.exactly("M3 provider away: accounts in an unexpected state", 0, unexpected);
    goals.exactly("M3 provider away: accounts tried more than 5 minutes after its return", 0, late);
    Ok(())
}

/// Failures of each account.
fn failures(minting: &Minting) -> anyhow::Result<Vec<i32>> {
    let failures = sqlx::query_scalar("SELECT failures FROM account_mints ORDER BY account_id");
    Ok(minting.runtime.block_on(failures.fetch_all(&mut *minting.conn.borrow_mut()))?)
}

/// Waits until every account was tried again.
fn until_tried(minting: &Minting, before: &[i32]) -> anyhow::Result<()> {
    until("every account is tried", || Ok(failures(minting)?.iter().zip(before).all(|(now, before)| now > before)))?;
    Ok(())
}

/// Number of accounts that are shown in another state, or with another error.
fn states(minting: &Minting, server: &Server, names: &[String], state: &str, error: &Value) -> anyhow::Result<usize> {
    let mut others = 0;
    for name in names {
        let shown = minting.call(server, "GET", &format!("/v1/registry-accounts/{name}"), &Value::Null)?;
        others += usize::from(shown["mint"]["state"] != *state || shown["mint"]["lastError"]["type"] != *error);
    }
    Ok(others)
}
