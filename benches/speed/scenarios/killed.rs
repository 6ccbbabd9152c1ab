//! F1 replica killed: one of two replicas is killed during a fan-out.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::{
    Stage,
    fleet::{COUNT, DEADLINE, Declared},
};
use crate::{
    process::Server,
    report::{Goals, float, progress, row, table},
};

/// Number of kills.
const KILLS: usize = 20;
/// Time for the survivor to finish targets that it held at the kill. Later leases are the victim's.
const SETTLING: Duration = Duration::from_secs(1);

/// Result of one kill.
pub struct Kill {
    /// Targets done at the kill.
    at: usize,
    /// Targets that the victim had leased.
    left: usize,
    /// Writes to a Secret beyond the first.
    pub repeated: usize,
    /// Secrets that are missing or outdated at the end.
    pub stale: usize,
    /// From the kill to the end of the victim's last lease, in seconds, by result or takeover.
    leases_ended: f64,
    /// From the kill to the last synced target, in seconds.
    pub converged: f64,
}

/// Lease duration in seconds: `F1_LEASE_SECONDS`, or 5 to keep the run short.
pub fn lease() -> anyhow::Result<u32> {
    std::env::var("F1_LEASE_SECONDS").map_or(Ok(5), |seconds| seconds.parse().context("F1_LEASE_SECONDS"))
}

/// Starts a replica with that lease and a call timeout that fits it.
pub fn replica(stage: &Stage, variables: &[(&str, &str)], log: Option<&Path>) -> anyhow::Result<Server> {
    let lease = lease()?;
    let (lease, timeout) = (lease.to_string(), (lease / 2).clamp(1, 15).to_string());
    let usual = [("REGCRED_PULL_SECRETS_LEASE_SECONDS", &*lease), ("REGCRED_CLUSTER_TIMEOUT_SECONDS", &*timeout)];
    stage.sandbox.serve_with(&[&usual, variables].concat(), log)
}

/// Kills replicas at points spread over the fan-out.
pub fn replica_killed(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    let mut replicas = vec![replica(stage, &[], None)?, replica(stage, &[], None)?];
    let declared = Declared::everywhere(stage, fleet, &replicas[0], "f1", None)?;
    declared.until_done(COUNT)?;
    let mut kills = Vec::new();
    for number in 0..KILLS {
        progress(&format!("F1 replica killed: kill {} of {KILLS}", number + 1));
        // A random point in each twentieth of the fan-out; the replicas alternate.
        let random = usize::from(uuid::Uuid::now_v7().as_bytes()[15]);
        let at = COUNT * number / KILLS + random * COUNT / KILLS / 256;
        let victim = replicas.remove(0);
        kills.push(kill(&declared, victim, &replicas[0], at)?);
        replicas.push(replica(stage, &[], None)?);
    }
    declared.retire(&replicas[0])?;
    report(&kills, goals)
}

/// Rotates, and kills a replica once this many targets are done.
pub fn kill(declared: &Declared<'_>, victim: Server, survivor: &Server, at: usize) -> anyhow::Result<Kill> {
    let lease = f64::from(lease()?);
    let mark = declared.fleet.audit_mark()?;
    declared.rotate(survivor)?;
    let at = loop {
        let done = declared.progress(0.0)?.done;
        if done >= at {
            break done;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    // Sends SIGKILL.
    drop(victim);
    let (killed, last_lease) = (Instant::now(), declared.now()? + lease);
    let (mut left, mut leases_ended) = (None, Duration::ZERO);
    let converged = loop {
        let now = declared.progress(last_lease)?;
        let elapsed = killed.elapsed();
        if now.held > 0 {
            leases_ended = elapsed;
        }
        if elapsed >= SETTLING {
            left.get_or_insert(now.held);
        }
        if now.done == COUNT {
            break elapsed;
        }
        ensure!(elapsed < DEADLINE, "timed out: {} of {COUNT} targets are synced", now.done);
        std::thread::sleep(Duration::from_millis(10));
    };
    Ok(Kill {
        at,
        left: left.unwrap_or_default(),
        repeated: declared.repeated(mark)?,
        stale: declared.stale()?,
        leases_ended: leases_ended.as_secs_f64(),
        converged: converged.as_secs_f64(),
    })
}

fn report(kills: &[Kill], goals: &mut Goals) -> anyhow::Result<()> {
    let lease = f64::from(lease()?);
    let mut rows = vec![row(["done at the kill", "left leased", "written again", "leases ended s", "all synced s"])];
    for kill in kills {
        rows.push(vec![
            kill.at.to_string(),
            kill.left.to_string(),
            kill.repeated.to_string(),
            format!("{:.2}", kill.leases_ended),
            format!("{:.2}", kill.converged),
        ]);
    }
    table(&format!("F1 replica killed: one of two, in a fan-out to {COUNT} namespaces, leases of {lease} s"), &rows)?;
    let most = |figure: fn(&Kill) -> f64| kills.iter().map(figure).fold(0.0, f64::max);
    goals.at_most("F1 replica killed: outdated or missing Secrets, maximum", 0.0, most(|kill| float(kill.stale)));
    goals.at_most(
        "F1 replica killed: Secrets written again beyond the victim's leases, maximum",
        0.0,
        most(|kill| float(kill.repeated.saturating_sub(kill.left))),
    );
    goals.at_most(
        "F1 replica killed: victim's leases ended, s after a lease, maximum",
        1.0,
        most(|kill| kill.leases_ended) - lease,
    );
    goals.at_most("F1 replica killed: all synced, s after a lease, maximum", 5.0, most(|kill| kill.converged) - lease);
    Ok(())
}
