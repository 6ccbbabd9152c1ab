//! M2 mint killed: a replica is killed while it mints, and another one takes over when its leases
//! end.

use std::time::{Duration, Instant};

use chrono::TimeDelta;

use super::{Delivered, Minting, names, until};
use crate::{
    process::Server,
    report::{Goals, float, progress, row, table},
    scenarios::Stage,
};

const KILLS: usize = 20;
const ACCOUNTS: usize = 4;
/// Duration of a lease, in seconds.
const LEASE: f64 = 60.0;
/// Seconds until the leases of a killed replica end here.
const LEASE_LEFT: f64 = 3.0;
/// Time after an answer in which every second kill comes: until after its result is stored.
const AFTER_ANSWER: Duration = Duration::from_millis(20);

/// Result of one kill.
struct Kill {
    /// From the moment when all accounts were due.
    at: Duration,
    /// Logins issued and stored by then.
    issued: usize,
    stored: usize,
    /// Logins issued in all.
    issued_in_all: usize,
    /// Until all accounts had a new login, in seconds.
    valid: f64,
    /// Until their Secret had it.
    delivered: f64,
    /// Accounts whose serial did not increase by one, or whose Secret has another login.
    wrong: usize,
}

/// Kills replicas at points spread over their mints.
pub fn replica_killed(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    let minting = Minting::start(TimeDelta::hours(12), Duration::from_millis(50))?;
    let mut replicas = vec![minting.replica(&[], None)?, minting.replica(&[], None)?];
    let names = names("m2", ACCOUNTS);
    minting.create(&replicas[0], &names)?;
    let delivered = minting.deliver(fleet, &replicas[0], &names)?;
    minting.make_due()?;
    let typical = minting.until_serial(2, ACCOUNTS)?;
    minting.until_delivered(&delivered)?;

    let mut kills = Vec::new();
    for number in 0..KILLS {
        progress(&format!("M2 mint killed: kill {} of {KILLS}", number + 1));
        let victim = replicas.remove(0);
        let serial = 3 + i64::try_from(number)?;
        kills.push(kill(&minting, &delivered, victim, &replicas[0], (number, serial, typical))?);
        replicas.push(minting.replica(&[], None)?);
    }
    minting.retire(&replicas[0], &delivered)?;
    report(&kills, goals)
}

/// Kills a replica during its mints, and waits for the other one.
fn kill(
    minting: &Minting,
    delivered: &Delivered<'_>,
    victim: Server,
    survivor: &Server,
    (number, serial, typical): (usize, i64, Duration),
) -> anyhow::Result<Kill> {
    // The victim claims all mints.
    survivor.signal("STOP")?;
    let before = minting.provider.issued();
    let begin = Instant::now();
    minting.make_due()?;
    if number % 2 == 0 {
        // A random point of each tenth of the time that all mints take.
        let share = (float(number / 2) + fastrand::f64()) / float(KILLS / 2);
        std::thread::sleep(typical.mul_f64(share).saturating_sub(begin.elapsed()));
    } else {
        let answers = 1 + number / 2 % ACCOUNTS;
        until("the provider answers", || Ok(minting.provider.issued() - before >= answers))?;
        std::thread::sleep(AFTER_ANSWER.mul_f64(fastrand::f64()));
    }
    // Sends SIGKILL.
    drop(victim);
    let (killed, at) = (Instant::now(), begin.elapsed());
    let (issued, stored) = (minting.provider.issued() - before, minting.with_serial(serial)?);
    // Time passes for the leases, which are those of the victim.
    minting.until_idle()?;
    minting.shorten_leases(LEASE - LEASE_LEFT)?;
    survivor.signal("CONT")?;
    minting.until_serial(serial, ACCOUNTS)?;
    let valid = killed.elapsed().as_secs_f64();
    minting.until_delivered(delivered)?;
    let delivered_after = killed.elapsed().as_secs_f64();
    let wrong = ACCOUNTS - minting.with_serial(serial)? + minting.outdated(delivered)?;
    let issued_in_all = minting.provider.issued() - before;
    Ok(Kill { at, issued, stored, issued_in_all, valid, delivered: delivered_after, wrong })
}

fn report(kills: &[Kill], goals: &mut Goals) -> anyhow::Result<()> {
    let mut rows = vec![row(["killed after s", "issued", "stored", "issued again", "all valid s", "in the Secret s"])];
    for kill in kills {
        rows.push(vec![
            format!("{:.2}", kill.at.as_secs_f64()),
            kill.issued.to_string(),
            kill.stored.to_string(),
            (kill.issued_in_all - ACCOUNTS).to_string(),
            format!("{:.2}", kill.valid),
            format!("{:.2}", kill.delivered),
        ]);
    }
    table(&format!("M2 mint killed: {ACCOUNTS} accounts due, leases that end after {LEASE_LEFT} s"), &rows)?;
    let wrong = kills.iter().map(|kill| kill.wrong).sum();
    goals.exactly("M2 mint killed: accounts whose serial or Secret is wrong", 0, wrong);
    // As if the leases had not been shortened.
    let late = kills.iter().filter(|kill| kill.valid + LEASE - LEASE_LEFT > 2.0 * LEASE).count();
    goals.exactly("M2 mint killed: kills after which an account was not valid within two leases", 0, late);
    let lost = kills.iter().filter(|kill| kill.issued > kill.stored).count();
    goals.at_least("M2 mint killed: kills between a mint and its storage", 1.0, float(lost));
    Ok(())
}
