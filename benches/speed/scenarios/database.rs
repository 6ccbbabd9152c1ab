//! F3, F4, F9 and F11: a private Postgres restarts, ends connections, is read-only, loses
//! notifications, or is killed, while callers rotate and read passwords.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};

use super::{
    Stage,
    callers::{self, Balancer, Caller, REQUEST_MAX, ROTATING},
    pg_proxy::{PgProxy, Wire},
    postgres::Postgres,
};
use crate::{
    load,
    process::Server,
    report::{Goals, float, progress, row, table},
    sandbox::Sandbox,
};

/// A fault of the connection to Postgres, and how it begins.
type Fault = (&'static str, fn(&PgProxy));

/// Restarts of Postgres.
const RESTARTS: usize = 3;
/// Load before and after each restart.
const AROUND_RESTART: Duration = Duration::from_secs(6);
/// Duration and interval of ended connections.
const ENDED_FOR: Duration = Duration::from_mins(1);
const ENDED_EVERY: Duration = Duration::from_secs(2);
/// Kills of Postgres.
const KILLS: usize = 20;
/// Time after a revocation in which the key is presented.
const REVOCATION_OBSERVED: Duration = Duration::from_secs(10);

/// A service on a private Postgres, with an account for each rotating caller.
struct Installation {
    server: Server,
    key: String,
    sandbox: Sandbox,
    // Last field: dropped after the database.
    postgres: Postgres,
}

impl Installation {
    fn new() -> anyhow::Result<Self> {
        let postgres = Postgres::start_new()?;
        let sandbox = Sandbox::on(&postgres.url())?;
        let key = sandbox.prepare()?;
        let server = sandbox.serve()?;
        callers::register(&server, &key)?;
        Ok(Self { server, key, sandbox, postgres })
    }

    /// Runs the load while `fault` runs.
    fn under_load(&mut self, fault: impl FnOnce(&mut Postgres) -> anyhow::Result<()>) -> anyhow::Result<Vec<Caller>> {
        let balancer = Balancer::of([self.server.address]);
        Ok(callers::under_load(&balancer, &self.key, || fault(&mut self.postgres))?.0)
    }

    /// Number of rotations that were acknowledged and are not stored.
    fn lost(&self, callers: &[Caller]) -> anyhow::Result<usize> {
        let mut lost = 0;
        for (number, caller) in callers.iter().take(ROTATING).enumerate() {
            let stored = self.stored(number)?;
            ensure!(stored <= caller.sent, "the stored password was never sent");
            lost += caller.acknowledged.saturating_sub(stored);
        }
        Ok(lost)
    }

    fn stored(&self, number: usize) -> anyhow::Result<usize> {
        let (status, answer) = load::once(self.server.address, &callers::reading(number, &self.key))?;
        ensure!(status == 200, "{status} {answer}");
        callers::password_in(answer.as_bytes()).context("no password")
    }
}

fn count(counts: &BTreeMap<u16, usize>, statuses: impl Fn(u16) -> bool) -> usize {
    counts.iter().filter(|(status, _)| statuses(**status)).map(|(_, count)| count).sum()
}

/// F3: restarts Postgres at once, under load.
pub fn restart(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let mut installation = Installation::new()?;
    let mut rows = vec![row(["restart", "requests/s", "200", "503", "other", "first success s", "last 503 s", "lost"])];
    let (mut first_success, mut last_error, mut others, mut lost): (f64, f64, usize, usize) = (0.0, 0.0, 0, 0);
    for number in 1..=RESTARTS {
        let (mut began, mut ready) = (Instant::now(), Instant::now());
        let callers = installation.under_load(|postgres| {
            began = Instant::now();
            std::thread::sleep(AROUND_RESTART);
            postgres.stop_at_once()?;
            ready = postgres.start()?;
            std::thread::sleep(AROUND_RESTART);
            Ok(())
        })?;
        let answers = callers::answers(&callers, |_| true);
        let after = answers.iter().filter(|one| one.answered > ready);
        let after = after.map(|one| ((one.answered - ready).as_secs_f64(), one.status));
        let succeeded = after.clone().filter(|(_, status)| *status == 200).map(|(at, _)| at).fold(f64::MAX, f64::min);
        let failed = after.filter(|(_, status)| *status != 200).map(|(at, _)| at).fold(0.0, f64::max);
        let counts = callers::statuses(&answers);
        let other = count(&counts, |status| status != 200 && status != 503);
        let gone = installation.lost(&callers)?;
        let before = answers.iter().filter(|one| one.answered - began < AROUND_RESTART).count();
        let rate = float(before) / AROUND_RESTART.as_secs_f64();
        rows.push(vec![
            number.to_string(),
            format!("{rate:.0}"),
            count(&counts, |status| status == 200).to_string(),
            count(&counts, |status| status == 503).to_string(),
            other.to_string(),
            format!("{succeeded:.3}"),
            format!("{failed:.3}"),
            gone.to_string(),
        ]);
        (first_success, last_error) = (first_success.max(succeeded), last_error.max(failed));
        (others, lost) = (others + other, lost + gone);
    }
    table("F3 database restart: Postgres stops at once and starts again, under rotations and reveals", &rows)?;
    goals.at_most("F3 database restart: answers other than 200 and 503", 0.0, float(others));
    goals.at_most("F3 database restart: first success, s after Postgres is ready", 5.0, first_success);
    goals.at_most("F3 database restart: last 503, s after Postgres is ready", 5.0, last_error);
    goals.at_most("F3 database restart: acknowledged rotations lost", 0.0, float(lost));
    Ok(())
}

/// F4: ends all connections every two seconds.
pub fn ended_connections(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let mut installation = Installation::new()?;
    let mut ended = 0;
    let callers = installation.under_load(|postgres| {
        let begin = Instant::now();
        while begin.elapsed() < ENDED_FOR {
            ended += postgres.number(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'regcred%'",
            )?;
            // Afterwards as well: all connections have been used or were idle for more than a second.
            std::thread::sleep(ENDED_EVERY);
        }
        Ok(())
    })?;
    let counts = callers::statuses(&callers::answers(&callers, |_| true));
    let all = count(&counts, |_| true);
    let failed = count(&counts, |status| status != 200);
    progress(&format!("{ended} connections were ended during {all} requests: {counts:?}"));
    // As many callers as the pool has places, and all must be served.
    let me = load::request("GET", "/v1/registry-accounts", Some(&installation.key), "");
    let after = load::run(installation.server.address, &me, 32, Duration::from_secs(3))?;
    let open =
        installation.postgres.number("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'regcred'")?;
    progress(&format!("afterwards {:.0} requests/s by 32 callers, {open} connections", after.rate));
    goals.at_most("F4 database connections: failed requests, %", 1.0, 100.0 * float(failed) / float(all));
    let others = count(&counts, |status| status != 200 && status != 503);
    goals.at_most("F4 database connections: answers other than 200 and 503", 0.0, float(others));
    // The pool, the audit writer and the sealer have that name.
    goals.at_most("F4 database connections: open afterwards", 34.0, float(usize::try_from(open)?));
    goals.at_most("F4 database connections: acknowledged rotations lost", 0.0, float(installation.lost(&callers)?));
    Ok(())
}

/// F9: makes Postgres read-only, then takes notifications away from one of two replicas.
pub fn degraded(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let installation = Installation::new()?;
    let ask = |method: &str, path: &str, body: &str| {
        let request = load::request(method, path, Some(&installation.key), body);
        Ok::<_, anyhow::Error>(load::once(installation.server.address, &request)?.0)
    };
    // Each in a statement of its own: ALTER SYSTEM cannot run in a transaction.
    let set = |statement: &'static str| {
        installation.postgres.execute(statement)?;
        installation.postgres.execute("SELECT pg_reload_conf()")
    };
    set("ALTER SYSTEM SET default_transaction_read_only = on")?;
    let begin = Instant::now();
    let change = || ask("PATCH", "/v1/registry-accounts/rotating-0", r#"{"email":"a@example.com"}"#);
    while change()? == 200 {
        ensure!(begin.elapsed() < Duration::from_secs(30), "Postgres is not read-only");
    }
    let mut unexpected = 0;
    // Few: the audit writer tries a reveal for four seconds.
    for _ in 0..5 {
        unexpected += usize::from(change()? != 503);
        unexpected += usize::from(ask("GET", "/v1/registry-accounts", "")? != 200);
        // A reveal is not performed without its audit event.
        unexpected += usize::from(ask("POST", "/v1/docker-configs", r#"{"accounts":["rotating-0"]}"#)? != 503);
    }
    set("ALTER SYSTEM RESET default_transaction_read_only")?;
    let begin = Instant::now();
    while change()? != 200 {
        ensure!(begin.elapsed() < Duration::from_secs(30), "the service did not recover");
    }
    goals.at_most("F9 read-only database: answers other than read 200, change and reveal 503", 0.0, float(unexpected));
    goals.at_most("F9 read-only database: until changes succeed again, s", 5.0, begin.elapsed().as_secs_f64());

    let proxy = PgProxy::before(installation.postgres.port(), Wire::Whole);
    let other = installation.sandbox.with_url(&proxy.url(installation.sandbox.url()))?;
    let faults: [Fault; 4] = [
        ("none", |_| {}),
        ("notifications are lost", |proxy| proxy.becomes(Wire::WithoutNotifications)),
        ("all packets are lost", |proxy| proxy.becomes(Wire::Cut)),
        ("open connections lost their peer", PgProxy::cut_open_connections),
    ];
    let mut most: f64 = 0.0;
    for (fault, inject) in faults {
        proxy.becomes(Wire::Whole);
        let took = revoke(&installation, &other, || inject(&proxy))?;
        progress(&format!("F9 {fault}: a revoked key is accepted for {took:.2} s"));
        most = most.max(took);
    }
    goals.at_most("F9 without notifications: until a revoked key is refused, maximum, s", 5.0, most);
    Ok(())
}

/// Injects a fault before one replica, and revokes a key through the other one. Returns for how
/// long the first one accepts it, in seconds.
fn revoke(installation: &Installation, other: &Server, inject: impl FnOnce()) -> anyhow::Result<f64> {
    let [key] = &installation.sandbox.make_keys(0..1)?[..] else { return Err(anyhow!("one key")) };
    let me = load::request("GET", "/v1/me", Some(key), "");
    let begin = Instant::now();
    // Cached, which needs notifications: a connection without them is tried again after a while.
    let is_caching = || anyhow::Ok(load::once(other.address, &load::request("GET", "/readyz", None, ""))?.1);
    while !is_caching()?.contains(r#""rowCache":"on""#) {
        ensure!(begin.elapsed() < REQUEST_MAX, "rows are not cached");
        std::thread::sleep(Duration::from_millis(50));
    }
    for _ in 0..2 {
        ensure!(load::once(other.address, &me)?.0 == 200, "the key was refused");
    }
    let id = key.split('_').nth(1).context("no id")?;
    let delete = load::request("DELETE", &format!("/v1/api-keys/{id}"), Some(&installation.key), "");
    inject();
    ensure!(load::once(installation.server.address, &delete)?.0 == 204, "the key was not revoked");
    let revoked = Instant::now();
    let mut accepted = Duration::ZERO;
    while revoked.elapsed() < REVOCATION_OBSERVED {
        let asked = revoked.elapsed();
        match load::once(other.address, &me)?.0 {
            200 => accepted = asked,
            401 => break,
            // Without Postgres, no key is accepted.
            status => ensure!(status == 503, "got status {status}"),
        }
    }
    Ok(accepted.as_secs_f64())
}

/// F11: kills Postgres right after the response to a rotation.
pub fn killed(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let mut installation = Installation::new()?;
    let (mut lost, mut slowest): (usize, f64) = (0, 0.0);
    for number in 1..=KILLS {
        let body = format!(r#"{{"password":"{number}"}}"#);
        let request = load::request("PATCH", "/v1/registry-accounts/rotating-0", Some(&installation.key), &body);
        let begin = Instant::now();
        // The connections of the pool broke with the last kill.
        while load::once(installation.server.address, &request)?.0 != 200 {
            ensure!(begin.elapsed() < Duration::from_secs(30), "the service did not recover");
        }
        slowest = slowest.max(begin.elapsed().as_secs_f64());
        installation.postgres.kill()?;
        installation.postgres.start()?;
        let begin = Instant::now();
        let stored = loop {
            match installation.stored(0) {
                Ok(stored) => break stored,
                Err(error) => {
                    ensure!(begin.elapsed() < Duration::from_secs(30), "the service did not recover: {error}");
                }
            }
        };
        lost += usize::from(stored != number);
    }
    progress(&format!("{KILLS} kills; the slowest rotation succeeded after {slowest:.2} s"));
    goals.at_most("F11 database killed: acknowledged rotations lost", 0.0, float(lost));
    goals.at_most("F11 database killed: until the next rotation succeeds, s", 5.0, slowest);
    Ok(())
}
