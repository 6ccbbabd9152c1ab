//! M1 mints due at once: 1,000 accounts of one provider become due at the same time, and five
//! replicas mint.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure};
use chrono::TimeDelta;

use super::{Minting, create, minted_in, names, provider::Issued, until};
use crate::{
    process::Server,
    report::{Goals, progress, row, table},
    scenarios::Stage,
};

const ACCOUNTS: usize = 1_000;
const REPLICAS: usize = 5;
/// Window in which the requests of a replica are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Most requests that may arrive within it: 5 for each second. The first ones may be sent up to a
/// second earlier.
const WINDOW_MAX: usize = 5 * (10 + 1) + 1;

/// Figures of the run.
struct Burst {
    /// Logins that were issued, and requests.
    issued: usize,
    requests: usize,
    /// Claims of mints.
    claims: usize,
    /// Accounts with more than one login.
    repeated: usize,
    /// Logins that ended before they were replaced.
    expired: usize,
    /// Until all were replaced.
    took: Duration,
    /// Logins by replica, and the most requests of each within a window.
    shares: Vec<usize>,
    windows: Vec<usize>,
}

/// Makes all accounts due and counts the requests to the provider.
pub fn due_at_once(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let logs: Vec<PathBuf> = (0..REPLICAS)
        .map(|number| std::env::temp_dir().join(format!("regcred-m1-{}-{number}.log", std::process::id())))
        .collect();
    let burst = measure(&logs);
    for log in &logs {
        let _ = std::fs::remove_file(log);
    }
    report(&burst?, goals)
}

fn measure(logs: &[PathBuf]) -> anyhow::Result<Burst> {
    let minting = Minting::start(TimeDelta::hours(1), Duration::from_millis(20))?;
    let replicas = logs.iter().map(|log| minting.replica(&[], Some(log)));
    let replicas = replicas.collect::<anyhow::Result<Vec<Server>>>()?;
    progress(&format!("M1 mints due at once: creating {ACCOUNTS} accounts through {REPLICAS} replicas"));
    create_all(&minting, &replicas)?;
    ensure!(minting.with_serial(1)? == ACCOUNTS, "the accounts were not created");

    progress("M1 mints due at once: all are due, and their logins end in two minutes");
    let (issued, requests) = (minting.provider.issued(), minting.provider.requests());
    let claims = "SELECT sum(lease_token)::bigint FROM account_mints";
    let claimed = minting.count(claims)?;
    minting.execute(
        "CREATE TABLE due AS SELECT account_id, now() + interval '2 minutes' AS valid_until FROM account_mints",
    )?;
    minting.execute(
        "UPDATE account_mints SET next_attempt_at = now(), valid_until = due.valid_until
         FROM due WHERE due.account_id = account_mints.account_id",
    )?;
    let took = minting.until_serial(2, ACCOUNTS)?;
    let expired = minting
        .count("SELECT count(*) FROM account_mints JOIN due USING (account_id) WHERE minted_at >= due.valid_until")?;
    let issued = minting.provider.issued_since(issued);
    let requests = minting.provider.requests() - requests;
    let claims = minting.count(claims)? - claimed;
    let minted = || logs.iter().map(|log| minted_in(log)).collect::<anyhow::Result<Vec<Vec<String>>>>();
    until("the logs are complete", || Ok(minted()?.iter().map(Vec::len).sum::<usize>() >= ACCOUNTS))?;
    let minted = minted()?;
    let accounts: HashSet<&str> = issued.iter().map(|issued| issued.client.as_str()).collect();
    let windows = minted.iter().map(|accounts| busiest_window(accounts, &issued)).collect();
    Ok(Burst {
        requests,
        claims,
        repeated: issued.len() - accounts.len(),
        issued: issued.len(),
        expired,
        took,
        shares: minted.iter().map(Vec::len).collect(),
        windows,
    })
}

/// Creates a share of the accounts through each replica.
fn create_all(minting: &Minting, replicas: &[Server]) -> anyhow::Result<()> {
    let (names, key, provider) = (names("m1", ACCOUNTS), &minting.key, &minting.provider);
    std::thread::scope(|scope| {
        let shares = names.chunks(ACCOUNTS.div_ceil(replicas.len())).zip(replicas).map(|(names, replica)| {
            let address = replica.address;
            scope.spawn(move || names.iter().try_for_each(|name| create(address, key, name, &provider.oauth2(name))))
        });
        let shares: Vec<_> = shares.collect();
        shares.into_iter().try_for_each(|share| share.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}

/// Most requests for these accounts within one window.
fn busiest_window(accounts: &[String], issued: &[Issued]) -> usize {
    let requested: HashMap<&str, Instant> =
        issued.iter().map(|issued| (issued.client.as_str(), issued.requested)).collect();
    let mut arrivals: Vec<Instant> =
        accounts.iter().filter_map(|account| requested.get(account.as_str()).copied()).collect();
    arrivals.sort_unstable();
    let within = |(first, begin): (usize, &Instant)| {
        arrivals[first..].iter().take_while(|arrival| **arrival - *begin <= WINDOW).count()
    };
    arrivals.iter().enumerate().map(within).max().unwrap_or_default()
}

fn report(burst: &Burst, goals: &mut Goals) -> anyhow::Result<()> {
    let mut rows = vec![row(["replica", "logins", "most requests in 10 s"])];
    for (number, (share, window)) in burst.shares.iter().zip(&burst.windows).enumerate() {
        rows.push(row([&(number + 1).to_string(), &share.to_string(), &window.to_string()]));
    }
    let took = burst.took.as_secs_f64();
    table(
        &format!(
            "M1 mints due at once: {ACCOUNTS} accounts of one provider, {REPLICAS} replicas; {} claims, {took:.1} s",
            burst.claims
        ),
        &rows,
    )?;
    goals.exactly("M1 mints due at once: logins minted", ACCOUNTS, burst.issued);
    goals.exactly("M1 mints due at once: requests", ACCOUNTS, burst.requests);
    goals.exactly("M1 mints due at once: accounts minted more than once", 0, burst.repeated);
    goals.exactly("M1 mints due at once: logins that ended before they were replaced", 0, burst.expired);
    let hasty = burst.windows.iter().filter(|window| **window > WINDOW_MAX).count();
    goals.exactly("M1 mints due at once: replicas with more than 5 requests a second", 0, hasty);
    // 40 s by the limits, and the longest delay of a mint that waited in vain for its host.
    goals.at_most("M1 mints due at once: all replaced, s", 75.0, took);
    Ok(())
}
