//! Single rotations by PATCH, against bare UPDATEs of single rows: what a group saves, and what
//! bounds a rotation.
//!
//! The processors do: no rotation waits for another one. Postgres spends about twice as long on one
//! as regcred, most of it in the UPDATE with the triggers that announce and record the change, then
//! in the audit event, in planning for the account at hand, and in the commit.

use std::time::{Duration, Instant};

use anyhow::ensure;
use futures_util::future::try_join_all;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::groups::PASSWORD;
use crate::{
    load::{self, Ask},
    process::{Postgres, Server},
    report::{Rounds, float, progress, row, table},
    sandbox::Sandbox,
};

const ACCOUNTS: usize = 512;
const CONNECTIONS: usize = 16;
const ROUNDS: usize = 4;
const ROUND: Duration = Duration::from_secs(2);

const BARE_SQL: &str = "UPDATE registry_accounts SET password = $2, login_changed_at = now() WHERE id = $1";

/// Rate, and CPU time of each rotation in microseconds: of regcred and of Postgres.
struct Sample {
    rate: f64,
    regcred: f64,
    postgres: f64,
}

/// Measures single rotations.
pub fn measure(runtime: &Runtime) -> anyhow::Result<()> {
    // A database of its own: a server does not start with passwords that its key does not open.
    let sandbox = &Sandbox::new()?;
    let key = &sandbox.prepare()?;
    let server = sandbox.serve()?;
    for number in 1..=ACCOUNTS {
        let body = format!(
            r#"{{"name":"single-{number}","registry":"registry.example.com","username":"robot","password":"p"}}"#
        );
        let (status, answer) =
            load::once(server.address, &load::request("POST", "/v1/registry-accounts", Some(key), &body))?;
        ensure!(status == 201, "no account was created: {status} {answer}");
    }
    let mut conn = runtime.block_on(sandbox.connect())?;
    let ids = sqlx::query_scalar("SELECT id FROM registry_accounts WHERE name LIKE 'single-%'");
    let ids: Vec<Uuid> = runtime.block_on(ids.fetch_all(&mut conn))?;
    let requests: Vec<Vec<u8>> = ["a", "b"]
        .iter()
        .flat_map(|letter| (1..=ACCOUNTS).map(move |number| (letter, number)))
        .map(|(letter, number)| {
            let body = format!(r#"{{"password":"{}"}}"#, letter.repeat(PASSWORD));
            load::request("PATCH", &format!("/v1/registry-accounts/single-{number}"), Some(key), &body)
        })
        .collect();
    let (mut patched, mut bare) = (Vec::new(), Vec::new());
    for number in 1..=ROUNDS {
        progress(&format!("single rotations by PATCH, round {number} of {ROUNDS}"));
        patched.push(patch(&server, sandbox.postgres.as_ref(), &requests)?);
        bare.push(update(runtime, sandbox, &ids)?);
    }
    let ratio: Rounds = patched.iter().zip(&bare).map(|(patched, bare)| patched.rate / bare.rate).collect();
    let shown = |what: &str, samples: &[Sample]| {
        let median = |figure: fn(&Sample) -> f64| samples.iter().map(figure).collect::<Rounds>().median();
        row([
            what,
            &format!("{:.0}", median(|sample| sample.rate)),
            &format!("{:.0}", median(|sample| sample.regcred)),
            &format!("{:.0}", median(|sample| sample.postgres)),
        ])
    };
    table(
        &format!("Single rotations, {CONNECTIONS} connections: {:.2} of bare UPDATEs", ratio.median()),
        &[
            row(["", "a second", "regcred µs CPU", "Postgres µs CPU"]),
            shown("PATCH", &patched),
            shown("bare UPDATE", &bare),
        ],
    )?;
    Ok(())
}

fn patch(server: &Server, postgres: Option<&Postgres>, requests: &[Vec<u8>]) -> anyhow::Result<Sample> {
    let cpu = || Ok::<_, anyhow::Error>((server.cpu_time()?, postgres_time(postgres)?));
    let before = cpu()?;
    let load = load::run_mix(&Ask { address: server.address, requests, expected: &[200] }, CONNECTIONS, ROUND)?;
    let after = cpu()?;
    let each =
        |after: Duration, before: Duration| after.saturating_sub(before).as_secs_f64() * 1e6 / float(load.requests);
    Ok(Sample { rate: load.rate, regcred: each(after.0, before.0), postgres: each(after.1, before.1) })
}

fn update(runtime: &Runtime, sandbox: &Sandbox, ids: &[Uuid]) -> anyhow::Result<Sample> {
    let before = postgres_time(sandbox.postgres.as_ref())?;
    let begin = Instant::now();
    let loops = (0..CONNECTIONS).map(async |first| {
        let mut conn = sandbox.connect().await?;
        let mut updated = 0;
        for id in ids.iter().cycle().skip(first).step_by(CONNECTIONS) {
            if begin.elapsed() >= ROUND {
                break;
            }
            let password = Uuid::now_v7().as_bytes().repeat(PASSWORD / 16 + 2);
            let done = sqlx::query(BARE_SQL).bind(id).bind(password).execute(&mut conn).await?;
            ensure!(done.rows_affected() == 1, "the row was not updated");
            updated += 1;
        }
        Ok(updated)
    });
    let updated: usize = runtime.block_on(try_join_all(loops))?.into_iter().sum();
    let rate = float(updated) / begin.elapsed().as_secs_f64();
    let postgres = postgres_time(sandbox.postgres.as_ref())?.saturating_sub(before);
    Ok(Sample { rate, regcred: 0.0, postgres: postgres.as_secs_f64() * 1e6 / float(updated) })
}

fn postgres_time(postgres: Option<&Postgres>) -> anyhow::Result<Duration> {
    postgres.map_or(Ok(Duration::ZERO), Postgres::cpu_time)
}
