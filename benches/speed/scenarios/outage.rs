//! F5: a cluster is away, hangs, or answers that it cannot, while a thousand targets wait for it. And another cluster, which is
//! well all the time.

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

/// Rotations in the cluster that is well: alone before each sickness and after the last, and beside each.
const ROUNDS: usize = 6;
/// How long the other one is away, unless `F5_SECONDS` says it.
const AWAY: u64 = 60;
/// How long any other sickness lasts.
const SICK: Duration = Duration::from_secs(30);
/// What is under way when a cluster goes away is no retry.
const NOTICED: Duration = Duration::from_secs(5);

/// The cluster that is well, and the one that is not.
struct Pair<'a> {
    server: Server,
    well: Declared<'a>,
    sick: Declared<'a>,
    proxy: Proxy,
}

/// A rotation in the cluster that is well, in seconds.
struct Round {
    p99: f64,
    all: f64,
}

/// What a sickness did.
struct Sickness {
    name: &'static str,
    /// Connections before it was noticed, and in a second after that.
    first: usize,
    rate: f64,
    /// From its end to the last target in order, in seconds.
    drained: f64,
    /// Rotations elsewhere meanwhile.
    beside: Vec<Round>,
}

/// F5.
pub fn away(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let seconds = std::env::var("F5_SECONDS").map_or(Ok(AWAY), |text| text.parse().context("F5_SECONDS"))?;
    let (here, there) = (stage.fleet()?, stage.second_fleet()?);
    let proxy = Proxy::before(&there.server()?, &there.folder()?);
    let server = stage.sandbox.serve_with(&[], None)?;
    let well = Declared::everywhere(stage, here, &server, "f5-well", None)?;
    let registration = there.registration("f5-sick", &proxy.server())?;
    let sick = Declared::everywhere(stage, there, &server, "f5-sick", Some(registration))?;
    well.until_done(COUNT)?;
    sick.until_done(COUNT)?;
    let pair = Pair { server, well, sick, proxy };

    let sicknesses = [
        ("away", Health::Down, Duration::from_secs(seconds)),
        ("hanging", Health::Hangs, SICK),
        (
            "answering 500",
            Health::Answers(|_| {
                Some("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            }),
            SICK,
        ),
        (
            "answering 429",
            Health::Answers(|_| {
                Some(
                    "HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                )
            }),
            SICK,
        ),
    ];
    let mut alone = vec![pair.alone()?];
    let mut seen = Vec::new();
    for (name, health, time) in sicknesses {
        progress(&format!("f5: one of two clusters is {name} for {} s", time.as_secs()));
        seen.push(pair.sicken(name, health, time)?);
        alone.push(pair.alone()?);
    }
    let Pair { server, well, sick, proxy } = pair;
    well.retire(&server)?;
    sick.retire(&server)?;
    drop(proxy);
    report(&alone, &seen, goals)
}

impl Pair<'_> {
    fn round(&self) -> anyhow::Result<Round> {
        let since = self.well.rotate(&self.server)?;
        self.well.until_done(COUNT)?;
        let latencies = self.well.latencies(since)?;
        let last = latencies.len() - 1;
        Ok(Round { p99: latencies[last - last / 100], all: latencies[last] })
    }

    fn alone(&self) -> anyhow::Result<Vec<Round>> {
        (0..ROUNDS).map(|_| self.round()).collect()
    }

    fn sicken(&self, name: &'static str, health: Health, time: Duration) -> anyhow::Result<Sickness> {
        let before = self.proxy.connections();
        self.proxy.becomes(health);
        let begin = Instant::now();
        self.sick.rotate(&self.server)?;
        let (mut beside, mut noticed) = (Vec::new(), None);
        for number in 1..=ROUNDS {
            beside.push(self.round()?);
            let until = time * u32::try_from(number)? / u32::try_from(ROUNDS)?;
            for stop in [NOTICED.min(until), until] {
                std::thread::sleep(stop.saturating_sub(begin.elapsed()));
                if begin.elapsed() >= NOTICED {
                    noticed.get_or_insert((self.proxy.connections(), begin.elapsed()));
                }
            }
        }
        let (by_then, at) = noticed.context("it did not last")?;
        let retries = u32::try_from(self.proxy.connections() - by_then)?;
        let rate = f64::from(retries) / begin.elapsed().saturating_sub(at).as_secs_f64();
        ensure!(self.sick.stale()? == COUNT, "it was not sick");
        self.proxy.heals();
        let drained = self.sick.until_done(COUNT)?.as_secs_f64();
        ensure!(self.sick.stale()? == 0, "a Secret is old");
        Ok(Sickness { name, first: by_then - before, rate, drained, beside })
    }
}

fn report(alone: &[Vec<Round>], seen: &[Sickness], goals: &mut Goals) -> anyhow::Result<()> {
    let mut rows = vec![row([
        "",
        "connections at first",
        "a second then",
        "drained s",
        "p99 elsewhere s",
        "of that alone",
        "all s",
        "of that alone",
    ])];
    let median = |rounds: &[&Round], figure: fn(&Round) -> f64| -> f64 {
        rounds.iter().map(|round| figure(round)).collect::<Rounds>().median()
    };
    for (number, sickness) in seen.iter().enumerate() {
        // Alone before it and after it.
        let around: Vec<&Round> = alone[number..number + 2].iter().flatten().collect();
        let beside: Vec<&Round> = sickness.beside.iter().collect();
        let p99 = (median(&beside, |round| round.p99), median(&around, |round| round.p99));
        let all = (median(&beside, |round| round.all), median(&around, |round| round.all));
        rows.push(vec![
            sickness.name.to_owned(),
            sickness.first.to_string(),
            format!("{:.2}", sickness.rate),
            format!("{:.2}", sickness.drained),
            format!("{:.3}", p99.0),
            format!("{:.2}", p99.0 / p99.1),
            format!("{:.3}", all.0),
            format!("{:.2}", all.0 / all.1),
        ]);
        let name = |what: &str| format!("F5 {}: {what}", sickness.name);
        goals.at_most(&name("connections a second to it"), 1.0, sickness.rate);
        goals.at_most(&name("1,000 targets in order, s after it"), 60.0, sickness.drained);
        goals.at_most(&name("p99 from change to in order elsewhere, of that alone"), 1.1, p99.0 / p99.1);
        goals.at_least(&name("speed elsewhere, of that alone"), 0.95, all.1 / all.0);
    }
    table("F5: one of two clusters is sick, 1,000 targets in each; rotations in the other one", &rows)?;
    Ok(())
}
