//! Floods of API keys, valid and forged.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use futures_util::future::try_join_all;
use uuid::Uuid;

use super::Stage;
use crate::{
    load::{self, Ask, Connection, Load, on_this_thread},
    process::cores,
    report::{Goals, Rounds, float},
};

const WARM_UP: Duration = Duration::from_secs(1);
const WINDOW: Duration = Duration::from_secs(3);
/// Rounds of good requests, alone and beside a flood.
const ROUNDS: usize = 4;
/// Connections with good requests.
const GOOD: usize = 16;
/// Connections of a flood.
const FLOOD: usize = 256;
/// Forged keys with distinct ids: more than a round sends, so that none repeats early.
const FORGED: usize = 60_000;
/// Valid keys that the process has not seen when the flood starts.
const COLD: usize = 8;

/// A4 forged keys: more connections present forged keys than valid ones, from one address and from
/// distinct addresses, which no limit on attempts covers.
pub fn forged(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let keys = stage.sandbox.make_keys(0..GOOD)?;
    let mut cold = stage.sandbox.make_keys(4000..4000 + 2 * COLD)?;
    let good: Vec<Vec<u8>> = keys.iter().map(|key| load::request("GET", "/v1/me", Some(key), "")).collect();
    // Ids of existing callers, then unknown ids.
    let ids = keys.iter().filter_map(|key| key.split('_').nth(1)).map(str::to_owned);
    let ids: Vec<String> =
        ids.chain(std::iter::repeat_with(|| Uuid::now_v7().simple().to_string())).take(FORGED).collect();
    let keys: Vec<String> = ids.iter().enumerate().map(|(number, id)| forged_key(id, number)).collect();
    for from in ["one address", "everywhere"] {
        // The server trusts the flood's `X-Forwarded-For`.
        let server = stage.sandbox.serve_with(&[("REGCRED_HTTP_TRUSTED_PROXIES", "127.0.0.1")], None)?;
        let good = Ask { address: server.address, requests: &good, expected: &[200] };
        let address = |number: usize| if from == "everywhere" { number } else { 0 };
        let bad: Vec<Vec<u8>> =
            keys.iter().enumerate().map(|(number, key)| request_from(address(number), key)).collect();
        let bad = Ask { address: server.address, requests: &bad, expected: &[401, 429] };
        load::run_mix(&good, GOOD, WARM_UP)?;
        // Opens as many connections as the flood, to exclude their memory from the growth.
        load::run(server.address, &load::request("GET", "/healthz", None, ""), FLOOD, WARM_UP)?;
        let (before, runs) = (server.resident_mib()?, argon2_runs(server.operations)?);

        let (flood, left) = share_beside((&good, GOOD), (&bad, FLOOD))?;

        let grown = server.resident_mib()? - before;
        let about = format!("A4 forged keys, {flood:.0}/s from {from}");
        goals.at_most(&format!("{about}: argon2 runs"), 0.0, float(argon2_runs(server.operations)? - runs));
        goals.at_least(&format!("{about}: good requests relative to those alone"), 0.7, left);
        goals.at_most(&format!("{about}: memory growth, MiB"), 10.0, grown);
        let slowest = slowest_unseen_key(&cold.split_off(cold.len() - COLD), &bad)?;
        goals.at_most(&format!("{about}: latency of an unseen valid key, ms"), 1000.0, slowest);
    }
    // Every good request got 200, so no caller was locked out; otherwise the run had failed.
    Ok(())
}

/// Latency in milliseconds of the slowest valid key that is new to the process, during a flood.
fn slowest_unseen_key(keys: &[String], flood: &Ask<'_>) -> anyhow::Result<f64> {
    let show = |key: &String| {
        let start = Instant::now();
        let (status, body) = load::once(flood.address, &load::request("GET", "/v1/me", Some(key), ""))?;
        ensure!(status == 200, "a valid key got {status}: {body}");
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| load::run_mix(flood, FLOOD, WINDOW));
        std::thread::sleep(WINDOW / 4);
        let waits: Vec<f64> = keys.iter().map(show).collect::<anyhow::Result<_>>()?;
        flooding.join().map_err(|_| anyhow!("a thread panicked"))??;
        Ok(waits.into_iter().fold(0.0, f64::max))
    })
}

/// Request with this key from a private address.
fn request_from(address: usize, key: &str) -> Vec<u8> {
    let [.., a, b, c] = address.to_be_bytes();
    format!(
        "GET /v1/me HTTP/1.1\r\nHost: bench\r\nX-Forwarded-For: 10.{a}.{b}.{c}\r\nAuthorization: Bearer {key}\r\n\r\n"
    )
    .into_bytes()
}

/// A5 cold start: a process that has verified no keys gets a thousand at once.
pub fn cold_start(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    const KEYS: usize = 1000;
    let keys = stage.sandbox.make_keys(GOOD..GOOD + KEYS)?;
    let server = stage.sandbox.serve_limited()?;
    let address = server.address;
    let alive = load::request("GET", "/healthz", None, "");
    let most = AtomicBool::new(false);
    let (base, peak, others) = std::thread::scope(|scope| {
        let (connected, base) = std::sync::mpsc::channel();
        let (go, start) = tokio::sync::oneshot::channel::<()>();
        let (alive_of_key, done, server) = (&alive, &most, &server);
        let keys = &keys;
        let shower = scope.spawn(move || {
            let shown = on_this_thread(async {
                // One connection per key, each used once, so that the base includes the
                // connections' memory.
                let open = (0..keys.len()).map(|_| async {
                    let mut connection = Connection::open(address).await?;
                    connection.exchange(alive_of_key).await?;
                    anyhow::Ok(connection)
                });
                let mut connections = try_join_all(open).await.context("ulimit -n may be too low")?;
                connected.send(server.resident_mib()?)?;
                start.await?;
                let shown = connections.iter_mut().zip(keys).map(|(connection, key)| async move {
                    let status = connection.exchange(&load::request("GET", "/v1/me", Some(key), "")).await?;
                    ensure!(status == 200, "a valid key got {status}");
                    Ok(())
                });
                try_join_all(shown).await
            });
            done.store(true, Ordering::Release);
            shown.map(drop)
        });
        let base: f64 = base.recv()?;
        let _ = go.send(());
        let mut peak = base;
        let mut slowest = Vec::new();
        while !done.load(Ordering::Acquire) {
            let load = load::run(address, &alive, 2, Duration::from_millis(500))?;
            slowest.push(load);
            peak = peak.max(server.resident_mib()?);
        }
        shower.join().map_err(|_| anyhow!("a thread panicked"))??;
        anyhow::Ok((base, peak, Load::merged(slowest)))
    })?;
    let permits = (cores() / 2).max(1);
    goals.at_most("A5 cold start: argon2 runs per key", 1.0, float(argon2_runs(server.operations)?) / float(KEYS));
    goals.at_most(
        "A5 cold start: memory above that with idle connections, MiB per permit",
        20.0,
        (peak - base) / float(permits),
    );
    goals.at_most(
        "A5 cold start: p99 of another route meanwhile, ms",
        100.0,
        others.quantile(0.99).as_secs_f64() * 1e3,
    );
    Ok(())
}

/// A8 greedy caller: sixteen callers, and one that sends as fast as it can.
pub fn greedy_caller(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let keys = stage.sandbox.make_keys(2000..2000 + GOOD)?;
    let server = stage.sandbox.serve_limited()?;
    let path = format!("/v1/registry-accounts/{}", crate::sandbox::ACCOUNT);
    let good: Vec<Vec<u8>> = keys.iter().map(|key| load::request("GET", &path, Some(key), "")).collect();
    let flood = [load::request("GET", &path, Some(&stage.key), "")];
    let good = Ask { address: server.address, requests: &good, expected: &[200, 429] };
    let flood = Ask { address: server.address, requests: &flood, expected: &[200, 429] };
    load::run_mix(&good, GOOD, WARM_UP)?;
    // Uses up the flood's burst allowance.
    load::run_mix(&flood, 64, WARM_UP)?;

    let (flood, left) = share_beside((&good, GOOD), (&flood, 64))?;

    goals.at_least(
        &format!("A8 greedy caller: others beside {flood:.0}/s on 64 connections, relative to those alone"),
        0.8,
        left,
    );
    Ok(())
}

/// Rate of a flood, and rate of good requests beside it relative to those alone: medians of
/// alternating rounds.
fn share_beside(good: (&Ask<'_>, usize), flood: (&Ask<'_>, usize)) -> anyhow::Result<(f64, f64)> {
    let (mut floods, mut left) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let alone = load::run_mix(good.0, good.1, WINDOW)?;
        let (beside, flood) = together(good, flood)?;
        floods.push(flood.rate);
        left.push(beside.rate / alone.rate);
    }
    Ok((floods.into_iter().collect::<Rounds>().median(), left.into_iter().collect::<Rounds>().median()))
}

/// Runs two loads at the same time.
fn together(one: (&Ask<'_>, usize), other: (&Ask<'_>, usize)) -> anyhow::Result<(Load, Load)> {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| load::run_mix(other.0, other.1, WINDOW));
        let one = load::run_mix(one.0, one.1, WINDOW)?;
        Ok((one, other.join().map_err(|_| anyhow!("a thread panicked"))??))
    })
}

/// Forges a well-formed key for this id.
fn forged_key(id: &str, number: usize) -> String {
    let body = format!("rgc_{id}_{number:064x}");
    let checksum = crc32fast::hash(body.as_bytes());
    format!("{body}{checksum:08x}")
}

fn argon2_runs(address: SocketAddr) -> anyhow::Result<usize> {
    let (_, metrics) = load::once(address, &load::request("GET", "/metrics", None, ""))?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("regcred_api_key_argon2_runs_total "));
    Ok(line.context("no count of argon2 runs")?.parse()?)
}
