//! F1: one of two replicas is killed in the midst of a fan-out.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::{
    Stage,
    fleet::{COUNT, Declared, GIVEN_UP},
};
use crate::{
    process::Server,
    report::{Goals, float, progress, row, table},
};

/// How often a replica is killed.
const KILLS: usize = 20;
/// By now the one that lives has settled what it had taken before the kill; what is leased still is the killed one's.
const SORTED_OUT: Duration = Duration::from_secs(1);

/// What came after a kill.
pub struct Kill {
    /// Targets that were done by then.
    at: usize,
    /// Targets that the killed one had leased.
    left: usize,
    /// Writes beyond the first to the same Secret.
    pub repeated: usize,
    /// Secrets that are missing, or old, in the end.
    pub stale: usize,
    /// From the kill to the end of the last lease of the killed one, in seconds: by its result, or because another one took it.
    leases_gone: f64,
    /// From the kill to the last target in order, in seconds.
    pub converged: f64,
}

/// How long leases are here, in seconds: `F1_LEASE_SECONDS`, or 5, so that 20 of them take no ten minutes.
pub fn lease() -> anyhow::Result<u32> {
    std::env::var("F1_LEASE_SECONDS").map_or(Ok(5), |seconds| seconds.parse().context("F1_LEASE_SECONDS"))
}

/// A replica with that lease, and a bound on its calls that fits it.
pub fn replica(stage: &Stage, variables: &[(&str, &str)], log: Option<&Path>) -> anyhow::Result<Server> {
    let lease = lease()?;
    let (lease, timeout) = (lease.to_string(), (lease / 2).clamp(1, 15).to_string());
    let usual = [("REGCRED_PULL_SECRETS_LEASE_SECONDS", &*lease), ("REGCRED_CLUSTER_TIMEOUT_SECONDS", &*timeout)];
    stage.sandbox.serve_with(&[&usual, variables].concat(), log)
}

/// F1.
pub fn killed(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    let mut replicas = vec![replica(stage, &[], None)?, replica(stage, &[], None)?];
    let declared = Declared::everywhere(stage, fleet, &replicas[0], "f1", None)?;
    declared.until_done(COUNT)?;
    let mut kills = Vec::new();
    for number in 0..KILLS {
        progress(&format!("f1: kill {} of {KILLS}", number + 1));
        // Somewhere in each twentieth of the fan-out, and each of the two in turn.
        let random = usize::from(uuid::Uuid::now_v7().as_bytes()[15]);
        let at = COUNT * number / KILLS + random * COUNT / KILLS / 256;
        let victim = replicas.remove(0);
        kills.push(kill(&declared, victim, &replicas[0], at)?);
        replicas.push(replica(stage, &[], None)?);
    }
    declared.retire(&replicas[0])?;
    report(&kills, goals)
}

/// Rotates, and kills a replica when so many targets are done.
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
    // SIGKILL.
    drop(victim);
    let (killed, last_lease) = (Instant::now(), declared.now()? + lease);
    let (mut left, mut leases_gone) = (None, Duration::ZERO);
    let converged = loop {
        let now = declared.progress(last_lease)?;
        let elapsed = killed.elapsed();
        if now.held > 0 {
            leases_gone = elapsed;
        }
        if elapsed >= SORTED_OUT {
            left.get_or_insert(now.held);
        }
        if now.done == COUNT {
            break elapsed;
        }
        ensure!(elapsed < GIVEN_UP, "the targets are not in order: {} of {COUNT}", now.done);
        std::thread::sleep(Duration::from_millis(10));
    };
    Ok(Kill {
        at,
        left: left.unwrap_or_default(),
        repeated: declared.repeated(mark)?,
        stale: declared.stale()?,
        leases_gone: leases_gone.as_secs_f64(),
        converged: converged.as_secs_f64(),
    })
}

fn report(kills: &[Kill], goals: &mut Goals) -> anyhow::Result<()> {
    let lease = f64::from(lease()?);
    let mut rows = vec![row(["done at the kill", "left leased", "written again", "leases gone s", "all in order s"])];
    for kill in kills {
        rows.push(vec![
            kill.at.to_string(),
            kill.left.to_string(),
            kill.repeated.to_string(),
            format!("{:.2}", kill.leases_gone),
            format!("{:.2}", kill.converged),
        ]);
    }
    table(&format!("F1: one of two replicas killed in a fan-out to {COUNT} namespaces, leases of {lease} s"), &rows)?;
    let most = |figure: fn(&Kill) -> f64| kills.iter().map(figure).fold(0.0, f64::max);
    goals.at_most("F1 Secrets that are old or missing in the end: most", 0.0, most(|kill| float(kill.stale)));
    goals.at_most(
        "F1 Secrets written again, beyond those that the killed one had leased: most",
        0.0,
        most(|kill| float(kill.repeated.saturating_sub(kill.left))),
    );
    goals.at_most(
        "F1 leases of the killed one were gone, s after a lease: most",
        1.0,
        most(|kill| kill.leases_gone) - lease,
    );
    goals.at_most("F1 all in order, s after a lease: most", 5.0, most(|kill| kill.converged) - lease);
    Ok(())
}
