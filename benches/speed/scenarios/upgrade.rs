//! F12 upgrade: the new release starts beside the previous one, migrates under load, and replaces
//! it.

use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::{
    Stage,
    callers::{self, Answer, Balancer},
    fleet::{COUNT, Declared},
    postgres::Postgres,
    stored,
};
use crate::{
    process::Server,
    report::{Goals, float, progress, row, table},
    sandbox::{REGCRED, Sandbox, TEST_KEY, run},
};

/// Variable with the path of the previous release, which `dev/upgrade-test` builds.
const PREVIOUS: &str = "REGCRED_BENCH_PREVIOUS";
/// Accounts that the migrations find.
const STORED: usize = 50_000;
/// Replicas of the previous release, and of the new one. All new ones migrate at once.
const OLD: usize = 2;
const NEW: usize = 5;
/// Load before the migration, and in each phase after it.
const STEADY: Duration = Duration::from_secs(5);
/// Time between the removal of a replica and SIGTERM.
const DRAIN: Duration = Duration::from_secs(1);

/// Ends of the phases.
struct Phases {
    begun: Instant,
    /// All new replicas are ready.
    migrated: Instant,
    /// Both releases served, an old process started on the new schema, and both rotated.
    mixed: Instant,
    /// The last process of the previous release is gone.
    replaced: Instant,
    /// Secrets that were outdated after the rotations.
    outdated: usize,
}

/// Upgrades a database with accounts and pull secrets.
pub fn upgrade(outer: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let Ok(previous) = std::env::var(PREVIOUS) else {
        progress("F12 upgrade: left out. `make upgrade-test` builds the previous release and runs it");
        return Ok(());
    };
    let fleet = outer.fleet()?;
    // Durable, unlike that of the tests.
    let postgres = Postgres::start_new()?;
    let sandbox = Sandbox::on(&postgres.url())?;
    let key = sandbox.prepare_with(&previous)?;
    let stage = Stage { sandbox, key, fleets: Default::default() };
    stored::fill(stage.sandbox.url(), &format!("bench:{TEST_KEY}"), STORED)?;
    let old = (0..OLD).map(|_| stage.sandbox.serve_program(&previous)).collect::<anyhow::Result<Vec<_>>>()?;
    callers::register(&old[0], &stage.key)?;
    let declared = Declared::everywhere(&stage, fleet, &old[0], "f12", None)?;
    declared.until_done(COUNT)?;
    let balancer = Balancer::of(old.iter().map(|replica| replica.address));
    let (callers, (phases, new)) =
        callers::under_load(&balancer, &stage.key, || replace(&stage, &previous, &declared, &balancer, old))?;
    report(&callers, &phases, goals)?;
    goals.exactly("F12 upgrade: outdated Secrets", 0, phases.outdated);
    goals.at_most(
        "F12 upgrade: reads of a replaced password, s after the rotation, maximum",
        5.0,
        callers::staleness(&callers),
    );
    progress("F12 upgrade: verifying audit log and sealed values");
    // Each fails the scenario. The last one opens every value.
    for arguments in [&["audit", "adopt"][..], &["audit", "verify"], &["master-key", "rotate", "--bind"]] {
        run(&mut stage.sandbox.regcred(REGCRED, arguments))?;
    }
    let address = new.first().ok_or_else(|| anyhow!("no replica"))?.address;
    goals.exactly("F12 upgrade: accounts without their password", 0, stored::wrong(address, &stage.key, STORED)?);
    Ok(())
}

/// Replaces the previous release, under load.
fn replace(
    stage: &Stage,
    previous: &str,
    declared: &Declared<'_>,
    balancer: &Balancer,
    mut old: Vec<Server>,
) -> anyhow::Result<(Phases, Vec<Server>)> {
    std::thread::sleep(STEADY);
    progress("F12 upgrade: five replicas of the new release migrate at once");
    let begun = Instant::now();
    let new = start_all(&stage.sandbox)?;
    let migrated = Instant::now();

    progress("F12 upgrade: both releases serve");
    for replica in &new {
        balancer.add(replica.address);
    }
    // As after a rollback, or a node that restarts.
    old.push(stage.sandbox.serve_program(previous)?);
    balancer.add(old[OLD].address);
    let mut outdated = 0;
    for by in [&new[0], &old[OLD]] {
        declared.rotate(by)?;
        declared.until_done(COUNT)?;
        outdated += declared.stale()?;
    }
    std::thread::sleep(STEADY);
    let mixed = Instant::now();

    progress("F12 upgrade: the previous release stops");
    for replica in old {
        balancer.remove(replica.address);
        std::thread::sleep(DRAIN);
        replica.terminate()?;
    }
    let replaced = Instant::now();
    declared.rotate(&new[0])?;
    declared.until_done(COUNT)?;
    outdated += declared.stale()?;
    std::thread::sleep(STEADY);
    Ok((Phases { begun, migrated, mixed, replaced, outdated }, new))
}

/// Starts all new replicas at once, each of which migrates.
fn start_all(sandbox: &Sandbox) -> anyhow::Result<Vec<Server>> {
    std::thread::scope(|scope| {
        let starting: Vec<_> = (0..NEW).map(|_| scope.spawn(|| sandbox.serve_migrating())).collect();
        starting.into_iter().map(|one| one.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
    })
}

fn report(callers: &[callers::Caller], phases: &Phases, goals: &mut Goals) -> anyhow::Result<()> {
    let Phases { begun, migrated, mixed, replaced, .. } = *phases;
    // By the time of the response: a request may wait for a lock of the migration.
    let windows: [(&str, Vec<Answer>); 5] = [
        ("previous release", callers::answers(callers, |one| one.answered < begun)),
        ("migration", callers::answers(callers, |one| (begun..migrated).contains(&one.answered))),
        ("both releases", callers::answers(callers, |one| (migrated..mixed).contains(&one.answered))),
        ("previous release stops", callers::answers(callers, |one| (mixed..replaced).contains(&one.answered))),
        ("new release", callers::answers(callers, |one| one.answered >= replaced)),
    ];
    let mut rows = vec![row(["phase", "requests", "failed", "slowest s", "statuses"])];
    for (name, answers) in &windows {
        rows.push(vec![
            (*name).to_owned(),
            answers.len().to_string(),
            callers::failed(answers).to_string(),
            format!("{:.2}", callers::slowest(answers)),
            format!("{:?}", callers::statuses(answers)),
        ]);
    }
    table(&format!("F12 upgrade: {OLD} old and {NEW} new replicas, {STORED} accounts, {COUNT} targets"), &rows)?;
    let all = callers::answers(callers, |_| true);
    goals.exactly("F12 upgrade: failed requests", 0, callers::failed(&all));
    goals.at_most("F12 upgrade: slowest request, s", 5.0, callers::slowest(&all));
    let migration = (migrated - begun).as_secs_f64();
    goals.at_most("F12 upgrade: five replicas migrate and are ready, s", 30.0, migration);
    goals.at_least("F12 upgrade: requests during the migration", 100.0, float(windows[1].1.len()));
    Ok(())
}
