//! F14 restore: a dump is restored on another server, beside the backup of the key files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::json;

use super::{
    Stage,
    callers::{self, Balancer, Caller, ROTATING},
    fleet::{COUNT, DEADLINE, Declared, Fleet, given},
    postgres::Postgres,
    stored,
};
use crate::{
    load,
    process::Server,
    report::{Goals, float, progress, row, table},
    sandbox::{REGCRED, Sandbox, TEST_KEY, run},
};

/// Accounts in the dump.
const STORED: usize = 50_000;
/// Rotations and reads before it.
const LOAD: Duration = Duration::from_secs(5);

/// Folder for the dump and the anchors, removed on drop.
struct Backup(PathBuf);

impl Backup {
    fn new() -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("regcred-f14-{}", uuid::Uuid::now_v7()));
        fs::create_dir(&folder)?;
        Ok(Self(folder))
    }

    fn file(&self, name: &str) -> anyhow::Result<String> {
        Ok(self.0.join(name).to_str().context("a path in UTF-8")?.to_owned())
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Restores a dump on a new server.
pub fn restored(outer: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let (fleet, backup) = (outer.fleet()?, Backup::new()?);
    let (dump, anchors) = (backup.file("regcred.dump")?, backup.file("anchors")?);
    progress(&format!("F14 restore: an installation with {STORED} accounts"));
    let (key, callers, dumped) = lost_installation(fleet, &dump, &anchors)?;

    progress("F14 restore: on another server");
    let postgres = Postgres::start_new()?;
    let sandbox = Sandbox::on(&postgres.url())?;
    let stage = Stage { sandbox, key, fleets: Default::default() };
    let begun = Instant::now();
    let mut restore = program("pg_restore")?;
    run(restore.args(["--no-owner", "--exit-on-error", "--dbname", libpq(stage.sandbox.url()), &dump]))?;
    let restored = begun.elapsed().as_secs_f64();
    let listed = run(&mut stage.sandbox.regcred(REGCRED, &["master-key", "list"]))?;
    ensure!(!listed.contains("MISSING"), "a master key is missing: {listed}");
    // Also finds a log that was set back.
    let verifying = Instant::now();
    run(&mut stage.sandbox.regcred(REGCRED, &["audit", "verify", "--anchors", &anchors]))?;
    let verified = verifying.elapsed().as_secs_f64();
    let server = stage.sandbox.serve()?;

    let size = float(usize::try_from(fs::metadata(Path::new(&dump))?.len())?) / 1_048_576.0;
    let rows = [
        row(["step", "figure"]),
        row(["size of the dump, MiB", &format!("{size:.1}")]),
        row(["pg_dump, s", &format!("{dumped:.1}")]),
        row(["pg_restore, s", &format!("{restored:.1}")]),
        row(["audit verify, s", &format!("{verified:.1}")]),
        row(["start until ready, s", &format!("{:.2}", server.ready_after.as_secs_f64())]),
    ];
    table(&format!("F14 restore: {STORED} accounts, {COUNT} targets"), &rows)?;
    goals.exactly(
        "F14 restore: accounts without their password",
        0,
        stored::wrong(server.address, &stage.key, STORED)?,
    );
    goals.exactly("F14 restore: acknowledged rotations lost", 0, lost(&server, &stage.key, &callers)?);
    goals.exactly("F14 restore: outdated Secrets after a rotation", 0, outdated(&stage, fleet, &server)?);
    run(&mut stage.sandbox.regcred(REGCRED, &["audit", "verify", "--anchors", &anchors]))?;
    Ok(())
}

/// Runs an installation, dumps its database, and removes it. Returns its API key, its callers and
/// the duration of the dump in seconds.
fn lost_installation(fleet: &Fleet, dump: &str, anchors: &str) -> anyhow::Result<(String, Vec<Caller>, f64)> {
    let postgres = Postgres::start_new()?;
    let sandbox = Sandbox::on(&postgres.url())?;
    let key = sandbox.prepare()?;
    let stage = Stage { sandbox, key, fleets: Default::default() };
    stored::fill(stage.sandbox.url(), &format!("bench:{TEST_KEY}"), STORED)?;
    let server = stage.sandbox.serve()?;
    callers::register(&server, &stage.key)?;
    let declared = Declared::everywhere(&stage, fleet, &server, "f14", None)?;
    let balancer = Balancer::of([server.address]);
    let (callers, ()) = callers::under_load(&balancer, &stage.key, || {
        declared.until_done(COUNT)?;
        std::thread::sleep(LOAD);
        Ok(())
    })?;
    server.terminate()?;
    run(&mut stage.sandbox.regcred(REGCRED, &["audit", "verify", "--save-anchors", anchors]))?;
    let begun = Instant::now();
    run(program("pg_dump")?.args(["--format=custom", "--file", dump, libpq(stage.sandbox.url())]))?;
    Ok((stage.key.clone(), callers, begun.elapsed().as_secs_f64()))
}

/// The URL without the parameters of sqlx, which libpq refuses.
fn libpq(url: &str) -> &str {
    url.split_once('?').map_or(url, |(url, _)| url)
}

/// A program of Postgres.
fn program(name: &str) -> anyhow::Result<Command> {
    Ok(Command::new(PathBuf::from(given("REGCRED_TEST_PG_BIN")?).join(name)))
}

/// Number of rotations that were acknowledged and are not stored.
fn lost(server: &Server, key: &str, callers: &[Caller]) -> anyhow::Result<usize> {
    let mut lost = 0;
    for (number, caller) in callers.iter().take(ROTATING).enumerate() {
        let (status, answer) = load::once(server.address, &callers::reading(number, key))?;
        ensure!(status == 200, "{status} {answer}");
        let stored = callers::password_in(answer.as_bytes()).context("no password")?;
        lost += caller.acknowledged.saturating_sub(stored);
    }
    Ok(lost)
}

/// Rotates the account of the pull secret, and returns the number of Secrets that do not follow.
fn outdated(stage: &Stage, fleet: &Fleet, server: &Server) -> anyhow::Result<usize> {
    let password = "after-the-restore";
    stage.call(server, "PATCH", "/v1/registry-accounts/f14", &json!({"password": password}))?;
    let begun = Instant::now();
    loop {
        let secrets = fleet.secrets("f14-pull")?;
        let synced = secrets.values().filter(|secret| secret.password.as_deref() == Some(password)).count();
        if synced == COUNT || begun.elapsed() > DEADLINE {
            return Ok(COUNT.saturating_sub(synced));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
