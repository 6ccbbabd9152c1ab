//! HTTP throughput: an authenticated render of one account against a bare select of one row, and
//! `GET /v1/me` against a bare hello.

use std::{net::SocketAddr, time::Duration};

use crate::{
    load,
    process::{Postgres, Server, cores},
    report::{Goals, Rounds, float, progress, row, table},
    sandbox::{ACCOUNT, Sandbox, register},
};

/// Connections of the load generator, and of each server to Postgres.
const CONNECTIONS: usize = 32;
/// Even, because every second round runs in reverse order.
const ROUNDS: usize = 8;
const WARM_UP: Duration = Duration::from_millis(300);
const WINDOW: Duration = Duration::from_secs(3);
/// Number of start-up measurements.
const STARTS: usize = 5;

/// Executables of other builds to measure as well, from `BENCH_AGAINST=PATH[:PATH…]`.
fn others() -> impl Iterator<Item = String> {
    let paths = std::env::var("BENCH_AGAINST").unwrap_or_default();
    let paths: Vec<String> = paths.split(':').filter(|path| !path.is_empty()).map(str::to_owned).collect();
    paths.into_iter()
}

/// Server and request under comparison.
struct Subject<'a> {
    name: String,
    server: &'a Server,
    request: Vec<u8>,
    samples: Vec<Sample>,
}

/// Results of one round.
struct Sample {
    rate: f64,
    /// CPU time per request, in microseconds.
    cpu: f64,
    /// Postgres CPU time per request, if Postgres runs on this machine.
    postgres_cpu: Option<f64>,
    /// Latency in milliseconds.
    p50: f64,
    p99: f64,
    resident_mib: f64,
}

/// Measures throughput, CPU time, memory and start-up time.
pub fn measure(goals: &mut Goals) -> anyhow::Result<()> {
    progress("preparing a database");
    let sandbox = Sandbox::new()?;
    let key = sandbox.prepare()?;

    progress("starting regcred, several times");
    let starts = (0..STARTS).map(|_| Ok(sandbox.serve()?.ready_after.as_secs_f64()));
    let starts: Rounds = starts.collect::<anyhow::Result<Vec<f64>>>()?.into_iter().collect();

    let (regcred, bare) = (sandbox.serve()?, sandbox.serve_bare(CONNECTIONS)?);
    let others = others().map(|other| Ok((sandbox.serve_program(&other)?, other)));
    let others = others.collect::<anyhow::Result<Vec<(Server, String)>>>()?;
    register(&regcred, &key)?;
    let at_rest = [regcred.resident_mib()?, bare.resident_mib()?];

    let body = format!(r#"{{"accounts":["{ACCOUNT}"]}}"#);
    let render = load::request("POST", "/v1/docker-configs", Some(&key), &body);
    let me = load::request("GET", "/v1/me", Some(&key), "");
    let mut subjects = vec![
        Subject::new("bare hello", &bare, load::request("GET", "/hello", None, "")),
        Subject::new("logged hello", &bare, load::request("GET", "/logged/hello", None, "")),
        Subject::new("bare select", &bare, load::request("GET", &format!("/select/{ACCOUNT}"), None, "")),
        Subject::new("regcred render", &regcred, render.clone()),
        Subject::new("regcred me", &regcred, me.clone()),
    ];
    for (server, name) in &others {
        subjects.push(Subject::new(&format!("{name} render"), server, render.clone()));
        subjects.push(Subject::new(&format!("{name} me"), server, me.clone()));
    }
    for round in 0..ROUNDS {
        progress(&format!("round {} of {ROUNDS}", round + 1));
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            subjects[index].sample(sandbox.postgres.as_ref())?;
        }
    }
    report_rates(&subjects)?;
    let [hello, logged, select, ours @ ..] = subjects.as_slice() else { unreachable!("three baselines") };
    for pair in ours.chunks_exact(2) {
        let [render, me] = pair else { unreachable!("chunks of two") };
        goals.at_least(&rate_of(render, select), 1.0, report_ratios(render, select)?);
        goals.at_least(&rate_of(me, hello), 0.8, report_ratios(me, hello)?);
        report_ratios(me, logged)?;
    }
    // Cost of one log line per request, which every service pays.
    report_ratios(logged, hello)?;
    let render = &ours[0];
    report_process(goals, select, render, at_rest, &starts)
}

impl<'a> Subject<'a> {
    fn new(name: &str, server: &'a Server, request: Vec<u8>) -> Self {
        Self { name: name.to_owned(), server, request, samples: Vec::new() }
    }

    fn sample(&mut self, postgres: Option<&Postgres>) -> anyhow::Result<()> {
        let address: SocketAddr = self.server.address;
        load::run(address, &self.request, CONNECTIONS, WARM_UP)?;
        let before = (self.server.cpu_time()?, postgres.map(Postgres::cpu_time).transpose()?);
        let load = load::run(address, &self.request, CONNECTIONS, WINDOW)?;
        let after = (self.server.cpu_time()?, postgres.map(Postgres::cpu_time).transpose()?);
        let per_request =
            |after: Duration, before: Duration| after.saturating_sub(before).as_secs_f64() * 1e6 / float(load.requests);
        self.samples.push(Sample {
            rate: load.rate,
            cpu: per_request(after.0, before.0),
            postgres_cpu: after.1.zip(before.1).map(|(after, before)| per_request(after, before)),
            p50: load.quantile(0.5).as_secs_f64() * 1e3,
            p99: load.quantile(0.99).as_secs_f64() * 1e3,
            resident_mib: self.server.resident_mib()?,
        });
        Ok(())
    }

    fn median(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        self.samples.iter().map(figure).collect::<Rounds>().median()
    }

    /// Ratios to another subject, round by round.
    fn against(&self, other: &Self, figure: impl Fn(&Sample) -> f64) -> Rounds {
        self.samples.iter().zip(&other.samples).map(|(this, that)| figure(this) / figure(that)).collect()
    }
}

fn report_rates(subjects: &[Subject<'_>]) -> anyhow::Result<()> {
    let mut rows = vec![row(["", "requests/s", "CPU µs", "Postgres CPU µs", "p50 ms", "p99 ms"])];
    for subject in subjects {
        let postgres = subject.median(|sample| sample.postgres_cpu.unwrap_or(f64::NAN));
        rows.push(vec![
            subject.name.clone(),
            format!("{:.0}", subject.median(|sample| sample.rate)),
            format!("{:.1}", subject.median(|sample| sample.cpu)),
            format!("{postgres:.1}"),
            format!("{:.2}", subject.median(|sample| sample.p50)),
            format!("{:.2}", subject.median(|sample| sample.p99)),
        ]);
    }
    let title = format!(
        "HTTP throughput: {CONNECTIONS} connections, {} cores shared by load, server and Postgres; medians of {ROUNDS} rounds of {} s",
        cores(),
        WINDOW.as_secs()
    );
    Ok(table(&title, &rows)?)
}

fn rate_of(subject: &Subject<'_>, other: &Subject<'_>) -> String {
    format!("{}: requests/s relative to {}", subject.name, other.name)
}

/// Prints a subject's ratios to another and returns that of the request rate.
fn report_ratios(subject: &Subject<'_>, other: &Subject<'_>) -> anyhow::Result<f64> {
    let rate = subject.against(other, |sample| sample.rate);
    let ratios = [
        ("requests/s", &rate),
        ("CPU time", &subject.against(other, |sample| sample.cpu)),
        ("p99", &subject.against(other, |sample| sample.p99)),
    ];
    let mut rows = vec![row(["", "median", "spread"])];
    for (figure, ratio) in ratios {
        let [median, spread] = ratio.spread(2);
        rows.push(vec![figure.to_owned(), median, spread]);
    }
    table(&format!("{} relative to {}", subject.name, other.name), &rows)?;
    Ok(rate.median())
}

fn report_process(
    goals: &mut Goals,
    select: &Subject<'_>,
    render: &Subject<'_>,
    at_rest: [f64; 2],
    starts: &Rounds,
) -> anyhow::Result<()> {
    let most = |subject: &Subject<'_>| subject.samples.iter().map(|sample| sample.resident_mib).fold(0.0, f64::max);
    let (regcred, bare) = (most(render), most(select));
    let memory = |name: &str, [regcred, bare]: [f64; 2]| {
        row([name, &format!("{regcred:.1}"), &format!("{bare:.1}"), &format!("{:.2}", regcred / bare)])
    };
    let head = row(["MiB", "regcred", "bare", "ratio"]);
    table("Resident memory", &[head, memory("at rest", at_rest), memory("under load", [regcred, bare])])?;
    let [median, spread] = starts.spread(3);
    table("Time from start to ready", &[vec!["seconds".to_owned(), median, spread]])?;
    goals.at_most("Resident memory under load, MiB", 64.0, regcred);
    goals.at_most("Time from start to ready, s", 1.0, starts.median());
    Ok(())
}
