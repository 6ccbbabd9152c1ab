//! Two processes on one Postgres: when the other one knows.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};

use super::Stage;
use crate::{
    load::{self, Connection, on_this_thread},
    process::Server,
    report::{Goals, progress},
};

/// Keys that are revoked while changes are announced, and while they are not.
const HEARD: usize = 100;
const CUT: usize = 3;
/// Numbers of keys that no other scenario makes.
const FIRST: usize = 10_000;
/// Later than anything that is still a measurement.
const GIVEN_UP: Duration = Duration::from_mins(1);

/// S7: a key that one replica revokes is refused by the other, with the announcements of Postgres and without.
pub fn revocation(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let keys = stage.sandbox.make_keys(FIRST..FIRST + HEARD + CUT)?;
    let (first, second) = (stage.sandbox.serve()?, stage.sandbox.serve()?);
    until_remembering(&second)?;
    let (heard, cut) = keys.split_at(HEARD);

    let mut took = heard.iter().map(|key| revoke(stage, &first, &second, key)).collect::<anyhow::Result<Vec<f64>>>()?;
    took.sort_by(f64::total_cmp);
    let most = took.last().copied().context("no key")?;
    // Of a hundred, the last but one.
    let p99 = took.get(HEARD - 2).copied().context("no key")?;
    goals.at_most("S7 revoked here, refused there: p99, ms", 100.0, p99 * 1e3);
    goals.at_most("S7 revoked here, refused there: most, ms", 1000.0, most * 1e3);

    let mut most: f64 = 0.0;
    for key in cut {
        progress("s7: with the announcements cut off");
        until_remembering(&second)?;
        open_the_door(&second, key)?;
        // The connection stays open and nothing comes through.
        let hung = Hung::stop(stage.sandbox.announcers()?)?;
        most = most.max(revoke(stage, &first, &second, key)?);
        drop(hung);
    }
    goals.at_most("S7 the same with the announcements cut off: most, s", 5.0, most);
    Ok(())
}

/// Revokes a key through one replica; for how long after the answer the other one still takes it, in seconds.
fn revoke(stage: &Stage, here: &Server, there: &Server, key: &str) -> anyhow::Result<f64> {
    open_the_door(there, key)?;
    let id = key.split('_').nth(1).context("no id")?;
    let revoke = load::request("DELETE", &format!("/v1/api-keys/{id}"), Some(&stage.key), "");
    let me = load::request("GET", "/v1/me", Some(key), "");
    on_this_thread(async {
        let mut here = Connection::open(here.address).await?;
        let mut there = Connection::open(there.address).await?;
        let status = here.exchange(&revoke).await?;
        ensure!(status == 204, "the key was not revoked: {status}");
        let revoked = Instant::now();
        let mut taken = Duration::ZERO;
        loop {
            let asked = revoked.elapsed();
            match there.exchange(&me).await? {
                200 => taken = asked,
                401 => return Ok(taken.as_secs_f64()),
                status => return Err(anyhow!("answered {status}")),
            }
            ensure!(asked < GIVEN_UP, "the key is still taken");
        }
    })
}

/// Shows a key twice, so that its row is remembered.
fn open_the_door(server: &Server, key: &str) -> anyhow::Result<()> {
    let me = load::request("GET", "/v1/me", Some(key), "");
    for _ in 0..2 {
        let (status, body) = load::once(server.address, &me)?;
        ensure!(status == 200, "the key was not taken: {status} {body}");
    }
    Ok(())
}

fn until_remembering(server: &Server) -> anyhow::Result<()> {
    let start = Instant::now();
    let metrics = load::request("GET", "/metrics", None, "");
    while !load::once(server.address, &metrics)?.1.contains("\nregcred_row_cache_active 1\n") {
        ensure!(start.elapsed() < GIVEN_UP, "rows are not remembered");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Server processes of Postgres that stand still until this is dropped.
struct Hung(Vec<i32>);

impl Hung {
    fn stop(pids: Vec<i32>) -> anyhow::Result<Self> {
        ensure!(!pids.is_empty(), "nobody announces changes");
        let hung = Self(pids);
        ensure!(hung.signal("STOP"), "Postgres runs as somebody else: only he or root can cut it off");
        Ok(hung)
    }

    fn signal(&self, signal: &str) -> bool {
        let pids = self.0.iter().map(ToString::to_string);
        Command::new("kill").args(["-s", signal]).args(pids).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // One that has ended meanwhile has nothing to go on with.
        let _ = self.signal("CONT");
    }
}
