//! Behaviour under attack and failure, in figures: `make scenarios`, or
//! `make scenarios ARGS='a1 a4'` to select some.
//!
//! Each scenario runs the real executable with its default limits against the Postgres of
//! `dev/with-services`, and is bounded in time. Behaviour without figures is covered by integration
//! tests.

#[path = "../../tests/integration/support/broker.rs"]
mod broker;
mod callers;
mod clients;
mod coverage;
mod database;
mod drift;
mod fleet;
mod keys;
mod killed;
mod lists;
mod minting;
mod outage;
#[path = "../../tests/integration/support/pg_proxy.rs"]
mod pg_proxy;
mod postgres;
#[path = "../../tests/integration/support/proxy.rs"]
mod proxy;
mod replicas;
mod resealing;
mod restored;
mod rolling;
mod rotation;
mod skewed;
mod stored;
mod timing;
mod upgrade;
mod workers;

use std::cell::OnceCell;

use anyhow::ensure;
use fleet::Fleet;
use serde_json::Value;

use crate::{
    load,
    process::Server,
    report::{Goals, progress},
    sandbox::{Sandbox, register},
};

/// First argument that runs the scenarios.
pub const ARGUMENT: &str = "--scenarios";

/// Code, description and function of a scenario.
type Scenario = (&'static str, &'static str, fn(&Stage, &mut Goals) -> anyhow::Result<()>);

const ALL: [Scenario; 28] = [
    ("a1", "A1 slow clients: slow heads and bodies, and thousands of half-open connections", clients::slow),
    ("a2", "A2 oversized requests: bodies and heads beyond the limits", clients::oversized),
    ("a4", "A4 forged keys: a flood of forged API keys", keys::forged),
    ("a5", "A5 cold start: 1,000 keys on a new process", keys::cold_start),
    ("a6", "A6 large lists: any page of 100,000 accounts and 100,000 targets", lists::large_lists),
    ("a8", "A8 greedy caller: one caller floods", keys::greedy_caller),
    ("c1", "C1 coverage: 10,000 pods in 2,000 namespaces", coverage::coverage),
    ("f1", "F1 replica killed: at 20 points of a fan-out to 1,000 namespaces", killed::replica_killed),
    ("f2", "F2 rotation killed: 200 times, and retried with Idempotency-Key", rotation::rotation_killed),
    ("f3", "F3 database restart: Postgres stops at once and starts again, under load", database::restart),
    ("f4", "F4 database connections: all are ended every two seconds", database::ended_connections),
    ("f5", "F5 API server down: 1,000 targets wait, beside a healthy cluster", outage::api_server_down),
    ("f7", "F7 many replicas: two and five replicas with eight workers each", workers::many_replicas),
    ("f8", "F8 skewed clock: one replica's clock is an hour off", skewed::clocks),
    ("f9", "F9 database degraded: read-only, and without notifications", database::degraded),
    ("f10", "F10 rolling restart: three replicas under load, in fan-outs", rolling::rolling_restart),
    ("f11", "F11 database killed: after the response to a rotation", database::killed),
    ("f12", "F12 upgrade: from the previous release, under load", upgrade::upgrade),
    ("f13", "F13 re-sealing: 300,000 values under load, killed once", resealing::resealing),
    ("f14", "F14 restore: a dump on another server", restored::restored),
    ("f15", "F15 drift: 100 of 1,000 Secrets are edited or deleted", drift::drift),
    ("m1", "M1 mints due at once: 1,000 accounts and five replicas", minting::burst::due_at_once),
    ("m2", "M2 mint killed: a replica is killed at 20 points of its mints", minting::killed::replica_killed),
    ("m3", "M3 provider away: for 5/12 of a login's life", minting::away::provider_away),
    ("m5", "M5 skewed clock: of a replica that mints", minting::clocks::skewed),
    ("groups", "Mint results stored in groups, relative to bare UPDATEs", minting::groups::stored),
    ("s3", "S3 timing: response times must not reveal resources", timing::timing),
    ("s7", "S7 revocation: a key revoked through another replica", replicas::revocation),
];

/// Scenarios without figures, and the tests that cover them.
const TESTS: [(&str, &str); 4] = [
    ("f6", "F6 API server faults: each has a state and a message: --test integration pull_secrets::"),
    ("m6", "M6 hostile providers: --lib clients::mint:: and --test integration mints::hostile::"),
    ("m7", "M7 registries of other providers and foreign hosts: --lib clients::mint::tests::hostile::"),
    ("m8", "M8 token files that are rotated or missing: --lib clients::mint::tests::hostile::"),
];

/// Fixture of all scenarios: a database with one account, and an admin key. Each scenario starts
/// its own regcred.
pub struct Stage {
    /// The database.
    pub sandbox: Sandbox,
    /// API key with the admin role.
    pub key: String,
    fleets: [OnceCell<Fleet>; 2],
}

impl Stage {
    fn prepare() -> anyhow::Result<Self> {
        progress("preparing a database");
        let sandbox = Sandbox::new()?;
        let key = sandbox.prepare()?;
        let stage = Self { sandbox, key, fleets: Default::default() };
        register(&stage.sandbox.serve()?, &stage.key)?;
        Ok(stage)
    }

    /// The first cluster, prepared on first use.
    fn fleet(&self) -> anyhow::Result<&Fleet> {
        self.fleet_of(0, "REGCRED_TEST_KUBE")
    }

    /// The second cluster, prepared on first use.
    fn second_fleet(&self) -> anyhow::Result<&Fleet> {
        self.fleet_of(1, "REGCRED_TEST_KUBE2")
    }

    fn fleet_of(&self, number: usize, prefix: &'static str) -> anyhow::Result<&Fleet> {
        let cell = &self.fleets[number];
        if let Some(fleet) = cell.get() {
            return Ok(fleet);
        }
        progress(&format!("preparing {} namespaces", fleet::COUNT));
        let fleet = Fleet::prepare(prefix)?;
        Ok(cell.get_or_init(|| fleet))
    }

    /// Calls the API of a replica with the admin key and returns the response, which must be a
    /// success.
    fn call(&self, server: &Server, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = load::once(server.address, &load::request(method, path, Some(&self.key), &body))?;
        ensure!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        Ok(serde_json::from_str(&answer).unwrap_or_default())
    }
}

/// Runs the scenario that `make bench` includes, because it measures only speed.
pub fn forged_keys(goals: &mut Goals) -> anyhow::Result<()> {
    let stage = Stage::prepare()?;
    progress("a flood of forged keys");
    keys::forged(&stage, goals)
}

/// Runs the selected scenarios, or all.
pub fn run(arguments: &[String]) -> anyhow::Result<()> {
    // `cargo bench` passes `--bench`.
    let selected: Vec<&str> = arguments.iter().map(String::as_str).filter(|name| !name.starts_with("--")).collect();
    for (_, description) in TESTS.iter().filter(|(name, _)| selected.is_empty() || selected.contains(name)) {
        progress(&format!("{description}, covered by tests"));
    }
    let is_known =
        |name: &&&str| ALL.iter().any(|(known, ..)| known == *name) || TESTS.iter().any(|(known, _)| known == *name);
    if let Some(unknown) = selected.iter().find(|name| !is_known(name)) {
        anyhow::bail!("unknown scenario {unknown}; known scenarios are {}", ALL.map(|(name, ..)| name).join(", "));
    }
    let stage = Stage::prepare()?;
    let mut goals = Goals::default();
    for (_, description, scenario) in ALL.iter().filter(|(name, ..)| selected.is_empty() || selected.contains(name)) {
        progress(description);
        scenario(&stage, &mut goals)?;
    }
    goals.print()
}
