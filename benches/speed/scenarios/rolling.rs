//! F10 rolling restart: three replicas are restarted in turn, as by a Deployment.

use std::time::{Duration, Instant};

use super::{
    Stage,
    callers::{self, Balancer},
    fleet::{COUNT, Declared},
};
use crate::{
    process::Server,
    report::{Goals, float, progress, row, table},
};

const REPLICAS: usize = 3;
/// Restarts of each replica.
const ROUNDS: usize = 2;
/// Time between the removal of a replica and SIGTERM, as `preStop` of the chart.
const DRAIN: Duration = Duration::from_secs(1);

/// One restart, in seconds.
struct Restart {
    /// From SIGTERM to the exit.
    exited: f64,
    /// From the rotation that was in progress to its last synced target.
    converged: f64,
    /// Until the new process was ready.
    ready: f64,
}

/// Restarts replicas under rotations and reads, each during a fan-out.
pub fn rolling_restart(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let replicas = (0..REPLICAS).map(|_| stage.sandbox.serve_with(&[], None));
    let mut replicas = replicas.collect::<anyhow::Result<Vec<Server>>>()?;
    callers::register(&replicas[0], &stage.key)?;
    let declared = Declared::everywhere(stage, stage.fleet()?, &replicas[0], "f10", None)?;
    declared.until_done(COUNT)?;
    let balancer = Balancer::of(replicas.iter().map(|replica| replica.address));
    let (callers, restarts) = callers::under_load(&balancer, &stage.key, || {
        (1..=ROUNDS * REPLICAS)
            .map(|number| {
                progress(&format!("F10 rolling restart: {number} of {}", ROUNDS * REPLICAS));
                restart(stage, &declared, &balancer, &mut replicas)
            })
            .collect::<anyhow::Result<Vec<Restart>>>()
    })?;
    let outdated = declared.stale()?;
    declared.retire(&replicas[0])?;
    report(&callers::answers(&callers, |_| true), &restarts, goals)?;
    goals.at_most("F10 rolling restart: outdated Secrets", 0.0, float(outdated));
    goals.at_most(
        "F10 rolling restart: reads of a replaced password, s after the rotation, maximum",
        5.0,
        callers::staleness(&callers),
    );
    Ok(())
}

/// Replaces the oldest replica.
fn restart(
    stage: &Stage,
    declared: &Declared<'_>,
    balancer: &Balancer,
    replicas: &mut Vec<Server>,
) -> anyhow::Result<Restart> {
    let old = replicas.remove(0);
    balancer.remove(old.address);
    std::thread::sleep(DRAIN);
    declared.rotate(&replicas[0])?;
    let rotated = Instant::now();
    // The replica has leases in the middle of a fan-out.
    declared.until_done(COUNT / 4)?;
    let exited = old.terminate()?.as_secs_f64();
    declared.until_done(COUNT)?;
    let converged = rotated.elapsed().as_secs_f64();
    let new = stage.sandbox.serve_with(&[], None)?;
    balancer.add(new.address);
    let ready = new.ready_after.as_secs_f64();
    replicas.push(new);
    Ok(Restart { exited, converged, ready })
}

fn report(answers: &[callers::Answer], restarts: &[Restart], goals: &mut Goals) -> anyhow::Result<()> {
    let mut rows = vec![row(["restart", "exit s", "all synced s", "ready s"])];
    for (number, restart) in restarts.iter().enumerate() {
        let seconds = |figure: f64| format!("{figure:.2}");
        rows.push(vec![
            (number + 1).to_string(),
            seconds(restart.exited),
            seconds(restart.converged),
            seconds(restart.ready),
        ]);
    }
    table(
        &format!(
            "F10 rolling restart: {REPLICAS} replicas, each in a fan-out to {COUNT} namespaces; {} requests: {:?}, the \
             slowest took {:.2} s",
            answers.len(),
            callers::statuses(answers),
            callers::slowest(answers)
        ),
        &rows,
    )?;
    let most = |figure: fn(&Restart) -> f64| restarts.iter().map(figure).fold(0.0, f64::max);
    goals.exactly("F10 rolling restart: failed requests", 0, callers::failed(answers));
    goals.at_most("F10 rolling restart: exit after SIGTERM, s, maximum", 10.0, most(|one| one.exited));
    // A lease lasts for 60 s: leases of a stopped replica must be released.
    goals.at_most("F10 rolling restart: all synced, s after a rotation, maximum", 10.0, most(|one| one.converged));
    Ok(())
}
