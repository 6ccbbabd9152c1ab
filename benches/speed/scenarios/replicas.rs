//! Two replicas on one database: propagation of changes.

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

/// Keys revoked with notifications, and without.
const NOTIFIED: usize = 100;
const CUT: usize = 3;
/// First number of the keys; no other scenario uses it.
const FIRST: usize = 10_000;
/// Deadline for each wait.
const DEADLINE: Duration = Duration::from_mins(1);

/// S7 revocation: time until one replica refuses a key that the other revoked, with and without
/// Postgres notifications.
pub fn revocation(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let keys = stage.sandbox.make_keys(FIRST..FIRST + NOTIFIED + CUT)?;
    let (first, second) = (stage.sandbox.serve()?, stage.sandbox.serve()?);
    until_caching(&second)?;
    let (notified, cut) = keys.split_at(NOTIFIED);

    let mut took =
        notified.iter().map(|key| revoke(stage, &first, &second, key)).collect::<anyhow::Result<Vec<f64>>>()?;
    took.sort_by(f64::total_cmp);
    let most = took.last().copied().context("no key")?;
    // Of a hundred, the last but one.
    let p99 = took.get(NOTIFIED - 2).copied().context("no key")?;
    goals.at_most("S7 revocation: until another replica refuses the key, p99, ms", 100.0, p99 * 1e3);
    goals.at_most("S7 revocation: until another replica refuses the key, maximum, ms", 1000.0, most * 1e3);

    let mut most: f64 = 0.0;
    for key in cut {
        progress("S7 revocation: with notifications cut off");
        until_caching(&second)?;
        cache_key(&second, key)?;
        // The connection stays open but delivers nothing.
        let suspended = Suspended::stop(stage.sandbox.listener_backends()?)?;
        most = most.max(revoke(stage, &first, &second, key)?);
        drop(suspended);
    }
    goals.at_most("S7 revocation: the same without notifications, maximum, s", 5.0, most);
    Ok(())
}

/// Revokes a key through one replica. Returns for how long after that the other one accepts it, in
/// seconds.
fn revoke(stage: &Stage, here: &Server, there: &Server, key: &str) -> anyhow::Result<f64> {
    cache_key(there, key)?;
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
                status => return Err(anyhow!("got status {status}")),
            }
            ensure!(asked < DEADLINE, "the key is still accepted");
        }
    })
}

/// Presents a key twice, so that its row is cached.
fn cache_key(server: &Server, key: &str) -> anyhow::Result<()> {
    let me = load::request("GET", "/v1/me", Some(key), "");
    for _ in 0..2 {
        let (status, body) = load::once(server.address, &me)?;
        ensure!(status == 200, "the key was refused: {status} {body}");
    }
    Ok(())
}

fn until_caching(server: &Server) -> anyhow::Result<()> {
    let start = Instant::now();
    let ready = load::request("GET", "/readyz", None, "");
    while !load::once(server.address, &ready)?.1.contains(r#""rowCache":"on""#) {
        ensure!(start.elapsed() < DEADLINE, "rows are not cached");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Postgres backends, suspended until this is dropped.
struct Suspended(Vec<i32>);

impl Suspended {
    fn stop(pids: Vec<i32>) -> anyhow::Result<Self> {
        ensure!(!pids.is_empty(), "no backend delivers notifications");
        let suspended = Self(pids);
        ensure!(suspended.signal("STOP"), "cannot suspend Postgres: run as its user or as root");
        Ok(suspended)
    }

    fn signal(&self, signal: &str) -> bool {
        let pids = self.0.iter().map(ToString::to_string);
        Command::new("kill").args(["-s", signal]).args(pids).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Suspended {
    fn drop(&mut self) {
        // The backend may have ended meanwhile.
        let _ = self.signal("CONT");
    }
}
