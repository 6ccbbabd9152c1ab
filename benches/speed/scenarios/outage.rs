//! F5 API server down: one cluster is down, hangs or answers errors while a thousand targets wait
//! for it. A second cluster stays healthy.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{
    Stage,
    fleet::{COUNT, Declared},
    proxy::{Health, Proxy},
};
use crate::{
    process::Server,
    report::{Goals, Rounds, progress, row, table},
};

/// Rotations in the healthy cluster: before, during and after each fault.
const ROUNDS: usize = 6;
/// Duration of the outage in seconds, unless `F5_SECONDS` sets it.
const DOWN_SECONDS: u64 = 60;
/// Duration of the other faults.
const FAULT_DURATION: Duration = Duration::from_secs(30);
/// Calls in flight at the start of a fault are not retries.
const BACKED_OFF: Duration = Duration::from_secs(5);

/// The healthy cluster and the faulty one.
struct Pair<'a> {
    server: Server,
    healthy: Declared<'a>,
    faulty: Declared<'a>,
    proxy: Proxy,
}

/// A rotation in the healthy cluster, in seconds.
struct Round {
    p99: f64,
    all: f64,
}

/// Effects of a fault.
struct Fault {
    name: &'static str,
    /// Connections before the backoff took effect.
    first: usize,
    /// Connections per second after that.
    rate: f64,
    /// From the end of the fault to the last synced target, in seconds.
    drained: f64,
    /// Rotations in the healthy cluster meanwhile.
    beside: Vec<Round>,
}

/// Measures each fault's effects on retries and on the healthy cluster.
pub fn api_server_down(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let seconds = std::env::var("F5_SECONDS").map_or(Ok(DOWN_SECONDS), |text| text.parse().context("F5_SECONDS"))?;
    let (here, there) = (stage.fleet()?, stage.second_fleet()?);
    let proxy = Proxy::before(&there.server()?, &there.folder()?);
    let server = stage.sandbox.serve_with(&[], None)?;
    let healthy = Declared::everywhere(stage, here, &server, "f5-healthy", None)?;
    let registration = there.registration("f5-faulty", &proxy.server())?;
    let faulty = Declared::everywhere(stage, there, &server, "f5-faulty", Some(registration))?;
    healthy.until_done(COUNT)?;
    faulty.until_done(COUNT)?;
    let pair = Pair { server, healthy, faulty, proxy };

    let kinds = [
        ("down", Health::Down, Duration::from_secs(seconds)),
        ("hanging", Health::Hangs, FAULT_DURATION),
        (
            "answering 500",
            Health::Answers(|_| {
                Some("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            }),
            FAULT_DURATION,
        ),
        (
            "answering 429",
            Health::Answers(|_| {
                Some(
                    "HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                )
            }),
            FAULT_DURATION,
        ),
    ];
    let mut alone = vec![pair.alone()?];
    let mut seen = Vec::new();
    for (name, health, time) in kinds {
        progress(&format!("F5 API server down: one of two clusters is {name} for {} s", time.as_secs()));
        seen.push(pair.inject(name, health, time)?);
        alone.push(pair.alone()?);
    }
    let Pair { server, healthy, faulty, proxy } = pair;
    healthy.retire(&server)?;
    faulty.retire(&server)?;
    drop(proxy);
    report(&alone, &seen, goals)
}

impl Pair<'_> {
    fn round(&self) -> anyhow::Result<Round> {
        let since = self.healthy.rotate(&self.server)?;
        self.healthy.until_done(COUNT)?;
        let latencies = self.healthy.latencies(since)?;
        let last = latencies.len() - 1;
        Ok(Round { p99: latencies[last - last / 100], all: latencies[last] })
    }

    fn alone(&self) -> anyhow::Result<Vec<Round>> {
        (0..ROUNDS).map(|_| self.round()).collect()
    }

    fn inject(&self, name: &'static str, health: Health, time: Duration) -> anyhow::Result<Fault> {
        let before = self.proxy.connections();
        self.proxy.becomes(health);
        let begin = Instant::now();
        self.faulty.rotate(&self.server)?;
        let (mut beside, mut backed_off) = (Vec::new(), None);
        for number in 1..=ROUNDS {
            beside.push(self.round()?);
            let until = time * u32::try_from(number)? / u32::try_from(ROUNDS)?;
            for stop in [BACKED_OFF.min(until), until] {
                std::thread::sleep(stop.saturating_sub(begin.elapsed()));
                if begin.elapsed() >= BACKED_OFF {
                    backed_off.get_or_insert((self.proxy.connections(), begin.elapsed()));
                }
            }
        }
        let (by_then, at) = backed_off.context("the fault was too short")?;
        let retries = u32::try_from(self.proxy.connections() - by_then)?;
        let rate = f64::from(retries) / begin.elapsed().saturating_sub(at).as_secs_f64();
        ensure!(self.faulty.stale()? == COUNT, "a target was synced despite the fault");
        self.proxy.heals();
        let drained = self.faulty.until_done(COUNT)?.as_secs_f64();
        ensure!(self.faulty.stale()? == 0, "a Secret is outdated");
        Ok(Fault { name, first: by_then - before, rate, drained, beside })
    }
}

fn report(alone: &[Vec<Round>], seen: &[Fault], goals: &mut Goals) -> anyhow::Result<()> {
    let mut rows = vec![row([
        "",
        "initial connections",
        "then per second",
        "drained s",
        "p99 healthy s",
        "relative to alone",
        "all healthy s",
        "relative to alone",
    ])];
    let median = |rounds: &[&Round], figure: fn(&Round) -> f64| -> f64 {
        rounds.iter().map(|round| figure(round)).collect::<Rounds>().median()
    };
    for (number, fault) in seen.iter().enumerate() {
        // Undisturbed rounds before and after the fault.
        let around: Vec<&Round> = alone[number..number + 2].iter().flatten().collect();
        let beside: Vec<&Round> = fault.beside.iter().collect();
        let p99 = (median(&beside, |round| round.p99), median(&around, |round| round.p99));
        let all = (median(&beside, |round| round.all), median(&around, |round| round.all));
        rows.push(vec![
            fault.name.to_owned(),
            fault.first.to_string(),
            format!("{:.2}", fault.rate),
            format!("{:.2}", fault.drained),
            format!("{:.3}", p99.0),
            format!("{:.2}", p99.0 / p99.1),
            format!("{:.3}", all.0),
            format!("{:.2}", all.0 / all.1),
        ]);
        let name = |what: &str| format!("F5 API server down, {}: {what}", fault.name);
        goals.at_most(&name("connections per second to it"), 1.0, fault.rate);
        goals.at_most(&name("1,000 targets synced, s after it"), 60.0, fault.drained);
        goals.at_most(&name("p99 until synced elsewhere, relative to alone"), 1.1, p99.0 / p99.1);
        goals.at_least(&name("speed elsewhere, relative to alone"), 0.95, all.1 / all.0);
    }
    table(
        "F5 API server down: one of two clusters is faulty, 1,000 targets in each; rotations in the other one",
        &rows,
    )?;
    Ok(())
}
