//! F13 re-sealing: all sealed values get a new master key beside reads, and the command is killed
//! once.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use futures_util::future::try_join_all;

use super::{Stage, postgres::Postgres, stored};
use crate::{
    load::{self, Connection, on_this_thread},
    process::free_address,
    report::{Goals, float, progress, row, table},
    sandbox::{REGCRED, Sandbox, TEST_KEY, run},
};

/// Sealed values, or as many as `F13_ROWS` says.
const ROWS: usize = 300_000;
/// Reads per second, over these connections.
const READS_PER_SECOND: f64 = 5_000.0;
const CONNECTIONS: usize = 64;
/// Time of the reads that are the reference.
const ALONE: Duration = Duration::from_secs(10);
/// Time for replicas to load a changed ring.
const RELOAD: Duration = Duration::from_secs(6);

/// Reads of one window.
struct Reads {
    per_second: f64,
    /// Without the right password.
    wrong: usize,
    p99_ms: f64,
}

/// A database whose ring of master keys is a file.
struct Installation {
    ring: PathBuf,
    sandbox: Sandbox,
    // Last field: dropped after the database.
    _postgres: Postgres,
}

impl Installation {
    fn new() -> anyhow::Result<Self> {
        let postgres = Postgres::start_new()?;
        let sandbox = Sandbox::on(&postgres.url())?;
        let ring = std::env::temp_dir().join(format!("regcred-f13-{}.keys", std::process::id()));
        fs::write(&ring, format!("old:{TEST_KEY}\n"))?;
        Ok(Self { ring, sandbox, _postgres: postgres })
    }

    fn variables(&self) -> anyhow::Result<[(&'static str, String); 2]> {
        let ring = self.ring.to_str().context("a path in UTF-8")?.to_owned();
        // An empty variable is unset.
        Ok([("REGCRED_MASTER_KEYS", String::new()), ("REGCRED_MASTER_KEYS_FILE", ring)])
    }

    fn command(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.sandbox.regcred(REGCRED, arguments);
        command.envs(self.variables()?);
        Ok(command)
    }

    /// Re-seals until all rows are done, or kills the command after `rows` of them. Returns the
    /// number of rows and the duration.
    fn rotate(&self, rows: Option<usize>) -> anyhow::Result<(usize, Duration)> {
        let start = Instant::now();
        let mut child = self.command(&["master-key", "rotate"])?.stdin(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stderr.take().context("a pipe")?).lines();
        let mut done = 0;
        for line in lines {
            let line = line?;
            let Some((_, count)) = line.strip_suffix(" values re-sealed").and_then(|line| line.rsplit_once(' ')) else {
                continue;
            };
            done = count.parse()?;
            if rows.is_some_and(|rows| done >= rows) {
                child.kill()?;
                child.wait()?;
                return Ok((done, start.elapsed()));
            }
        }
        ensure!(child.wait()?.success(), "regcred master-key rotate failed");
        Ok((done, start.elapsed()))
    }

    /// Number of rows that the key with this id has sealed, by `master-key list`.
    fn sealed_by(&self, id: &str) -> anyhow::Result<usize> {
        let listed = run(&mut self.command(&["master-key", "list"])?)?;
        let line =
            listed.lines().find(|line| line.split_whitespace().next() == Some(id)).context("the key is listed")?;
        Ok(line.split_whitespace().nth(2).context("three columns")?.parse()?)
    }

    /// Whether a service starts with only the first key of the ring.
    fn starts_without_old_key(&self) -> anyhow::Result<bool> {
        // A file of its own: the replica under load reads the ring again.
        let ring = self.ring.with_extension("new");
        fs::write(&ring, fs::read_to_string(&self.ring)?.lines().next().context("a key")?)?;
        let mut serve = self.command(&["serve"])?;
        serve.env("REGCRED_MASTER_KEYS_FILE", &ring);
        serve.env("REGCRED_HTTP_LISTEN", free_address()?.to_string());
        serve.env("REGCRED_OPERATIONS_LISTEN", "off").env("REGCRED_LOG_FORMAT", "json");
        let mut child = serve.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        // Ends with the process, if that is refused.
        let lines = BufReader::new(child.stderr.take().context("a pipe")?).lines();
        let has_started = lines.map_while(Result::ok).any(|line| line.contains("server started"));
        let _ = child.kill();
        child.wait()?;
        fs::remove_file(&ring)?;
        Ok(has_started)
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.ring);
    }
}

/// Rotates the master key of all accounts beside reads.
pub fn resealing(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let rows = std::env::var("F13_ROWS").map_or(Ok(ROWS), |rows| rows.parse().context("F13_ROWS"))?;
    let installation = Installation::new()?;
    let key = installation.sandbox.prepare()?;
    progress(&format!("F13 re-sealing: storing {rows} accounts"));
    stored::fill(installation.sandbox.url(), &fs::read_to_string(&installation.ring)?, rows)?;
    let variables = installation.variables()?;
    let server = installation.sandbox.serve_with(&variables.each_ref().map(|(name, value)| (*name, &**value)), None)?;
    progress("F13 re-sealing: reads alone");
    let alone = read_while(server.address, &key, rows, || {
        std::thread::sleep(ALONE);
        Ok(())
    })?
    .0;
    run(&mut installation.command(&["master-key", "generate", "--file", &variables[1].1])?)?;
    std::thread::sleep(RELOAD);

    progress("F13 re-sealing: beside reads, killed after a third");
    let (beside, (killed, killed_starts, rest)) = read_while(server.address, &key, rows, || {
        let killed = installation.rotate(Some(rows / 3))?;
        let starts = installation.starts_without_old_key()?;
        Ok((killed, starts, installation.rotate(None)?))
    })?;
    let left = installation.sealed_by("old")?;
    let starts = installation.starts_without_old_key()?;
    let per_second = float(killed.0 + rest.0) / (killed.1 + rest.1).as_secs_f64();
    let shown = |what: &str, reads: &Reads| {
        row([what, &format!("{:.0}", reads.per_second), &format!("{:.1}", reads.p99_ms), &reads.wrong.to_string()])
    };
    let rows_shown =
        [row(["reads", "per second", "p99 ms", "wrong"]), shown("alone", &alone), shown("beside", &beside)];
    table(
        &format!(
            "F13 re-sealing: {rows} values, {} in {:.1} s until the kill and {} in {:.1} s after it",
            killed.0,
            killed.1.as_secs_f64(),
            rest.0,
            rest.1.as_secs_f64()
        ),
        &rows_shown,
    )?;
    goals.at_least("F13 re-sealing: values a second", 20_000.0, per_second);
    goals.at_least("F13 re-sealing: reads relative to those alone", 0.7, beside.per_second / alone.per_second);
    goals.exactly("F13 re-sealing: reads without the right password", 0, alone.wrong + beside.wrong);
    goals.at_most(
        "F13 re-sealing: values sealed again after the kill",
        1_000.0,
        float((killed.0 + rest.0).saturating_sub(rows)),
    );
    goals.exactly("F13 re-sealing: starts without the old key, while it has rows", 0, usize::from(killed_starts));
    goals.exactly("F13 re-sealing: rows of the old key at the end", 0, left);
    goals.exactly("F13 re-sealing: starts without the old key at the end", 1, usize::from(starts));
    Ok(())
}

/// Reads random accounts at the rate while `event` runs.
fn read_while<T>(
    address: SocketAddr,
    key: &str,
    rows: usize,
    event: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(Reads, T)> {
    let (start, is_over) = (Instant::now(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            on_this_thread(async {
                let reading = (0..CONNECTIONS).map(|_| read(address, key, rows, &is_over));
                Ok((try_join_all(reading).await?.concat(), start.elapsed()))
            })
        });
        let done = event();
        is_over.store(true, Ordering::Release);
        let (mut reads, took) = load.join().map_err(|_| anyhow!("a thread panicked"))??;
        reads.sort_unstable_by_key(|(latency, _)| *latency);
        let p99 = reads.get(reads.len() * 99 / 100).map_or(Duration::ZERO, |(latency, _)| *latency);
        let wrong = reads.iter().filter(|(_, is_right)| !is_right).count();
        let per_second = float(reads.len()) / took.as_secs_f64();
        Ok((Reads { per_second, wrong, p99_ms: p99.as_secs_f64() * 1e3 }, done?))
    })
}

/// Reads on one connection, each at its time or as soon as the one before is answered. Returns
/// latencies, and whether the password was right.
async fn read(
    address: SocketAddr,
    key: &str,
    rows: usize,
    is_over: &AtomicBool,
) -> anyhow::Result<Vec<(Duration, bool)>> {
    let mut connection = Connection::open(address).await?;
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(float(CONNECTIONS) / READS_PER_SECOND));
    let mut reads = Vec::new();
    while !is_over.load(Ordering::Acquire) {
        ticks.tick().await;
        let number = fastrand::usize(..rows);
        let body = format!(r#"{{"accounts":["{}"]}}"#, stored::name(number));
        let request = load::request("POST", "/v1/docker-configs", Some(key), &body);
        let asked = Instant::now();
        let status = connection.exchange(&request).await?;
        let password = format!(r#""{}""#, stored::password(number));
        let is_right = status == 200 && String::from_utf8_lossy(connection.body()).contains(&password);
        reads.push((asked.elapsed(), is_right));
    }
    Ok(reads)
}
