//! F2 rotation killed: the server is killed during a rotation, and the client retries with the same
//! `Idempotency-Key`.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Stage;
use crate::{
    load,
    report::{Goals, Rounds, float, progress, row, table},
    sandbox::ACCOUNT,
};

/// Number of kills.
const KILLS: usize = 200;
/// Rotations that measure the cost of the header, with and without it in turn.
const MEASURED: usize = 200;
/// New servers whose first rotation is measured.
const FIRST_ROTATIONS: usize = 10;
/// Kills that must come before the commit, and after it.
const KILLS_EACH_SIDE: f64 = 20.0;

/// What a client saw of a request: the status and whether it was performed before.
struct Answered {
    status: u16,
    is_replayed: bool,
    body: String,
}

/// Kills servers at points spread over a rotation, and retries.
pub fn rotation_killed(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let mut server = stage.sandbox.serve()?;
    cost(stage, server.address)?;
    let typical = first_rotation(stage)?;
    let (mut answered, mut replayed, mut wrong) = (0, 0, 0);
    for number in 0..KILLS {
        if number % 20 == 0 {
            progress(&format!("F2 rotation killed: kill {} of {KILLS}", number + 1));
        }
        let before = version(stage, server.address)?;
        let request = rotation(stage, &format!("password-{number}"), Some(&format!("f2-{number}-{before}")));
        let mut stream = TcpStream::connect(server.address)?;
        stream.write_all(&request)?;
        // From before the request is read until after a typical answer.
        std::thread::sleep(typical.mul_f64(fastrand::f64() * 1.5));
        // Sends SIGKILL.
        drop(server);
        // The client acts as if no answer had arrived.
        answered += usize::from(read(stream).is_ok_and(|answer| answer.status == 200));
        server = stage.sandbox.serve()?;

        let retried = send(server.address, &request)?;
        ensure!(retried.status == 200, "the retry was refused: {} {}", retried.status, retried.body);
        replayed += usize::from(retried.is_replayed);
        wrong += usize::from(version(stage, server.address)? != before + 1);
    }
    table(
        &format!("F2 rotation killed: {KILLS} kills within {:.1} ms of the request", typical.as_secs_f64() * 1.5e3),
        &[
            row(["rotations", "number"]),
            row(["answered before the kill", &answered.to_string()]),
            row(["committed before the kill, so not repeated", &replayed.to_string()]),
            row(["performed by the retry", &(KILLS - replayed).to_string()]),
        ],
    )?;
    goals.at_most("F2 rotation killed: rotations without exactly one new version", 0.0, float(wrong));
    goals.at_least("F2 rotation killed: kills after the commit", KILLS_EACH_SIDE, float(replayed));
    goals.at_least("F2 rotation killed: kills before the commit", KILLS_EACH_SIDE, float(KILLS - replayed));
    Ok(())
}

/// Returns the median duration of the first rotation of a new server, which prepares its
/// statements.
fn first_rotation(stage: &Stage) -> anyhow::Result<Duration> {
    let durations = (0..FIRST_ROTATIONS).map(|number| {
        let server = stage.sandbox.serve()?;
        version(stage, server.address)?;
        let request = rotation(stage, &format!("first-{number}"), Some(&format!("f2-first-{number}")));
        let start = Instant::now();
        let answer = send(server.address, &request)?;
        ensure!(answer.status == 200, "not rotated: {} {}", answer.status, answer.body);
        Ok(start.elapsed().as_secs_f64())
    });
    let durations: Vec<f64> = durations.collect::<anyhow::Result<_>>()?;
    Ok(Duration::from_secs_f64(Rounds::from_iter(durations).median()))
}

/// Compares rotations with and without the header.
fn cost(stage: &Stage, address: SocketAddr) -> anyhow::Result<()> {
    let mut figures = [Vec::new(), Vec::new()];
    for number in 0..MEASURED {
        let key = format!("f2-cost-{number}");
        let is_keyed = number % 2 == 0;
        let request = rotation(stage, &key, is_keyed.then_some(&key));
        let start = Instant::now();
        let answer = send(address, &request)?;
        ensure!(answer.status == 200, "not rotated: {} {}", answer.status, answer.body);
        figures[usize::from(is_keyed)].push(start.elapsed().as_secs_f64() * 1e3);
    }
    let [plain, keyed] = figures.map(Rounds::from_iter);
    let shown = |what: &str, rounds: &Rounds| {
        let [median, range] = rounds.spread(2);
        row([what, &median, &range])
    };
    let rows = [
        row(["rotation, ms", "median", "range"]),
        shown("without Idempotency-Key", &plain),
        shown("with Idempotency-Key: two more statements", &keyed),
    ];
    Ok(table("F2 cost of Idempotency-Key, a new connection each", &rows)?)
}

fn rotation(stage: &Stage, password: &str, key: Option<&str>) -> Vec<u8> {
    let body = format!(r#"{{"password":"{password}"}}"#);
    let request = load::request("PATCH", &format!("/v1/registry-accounts/{ACCOUNT}"), Some(&stage.key), &body);
    let header = key.map(|key| format!("Idempotency-Key: {key}\r\n")).unwrap_or_default();
    let request = String::from_utf8_lossy(&request);
    request.replacen("\r\n", &format!("\r\nConnection: close\r\n{header}"), 1).into_bytes()
}

fn version(stage: &Stage, address: SocketAddr) -> anyhow::Result<i64> {
    let request = load::request("GET", &format!("/v1/registry-accounts/{ACCOUNT}"), Some(&stage.key), "");
    let (status, body) = load::once(address, &request)?;
    ensure!(status == 200, "not read: {status} {body}");
    serde_json::from_str::<Value>(&body)?["version"].as_i64().context("no version")
}

fn send(address: SocketAddr, request: &[u8]) -> anyhow::Result<Answered> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(request)?;
    read(stream)
}

/// Reads a response whose connection is closed after it.
fn read(mut stream: TcpStream) -> anyhow::Result<Answered> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no complete head")?;
    let status = head.get(9..12).context("no status")?.parse()?;
    let is_replayed = head.to_ascii_lowercase().contains("\r\nidempotency-replayed: true");
    Ok(Answered { status, is_replayed, body: body.to_owned() })
}
