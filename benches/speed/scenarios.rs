//! What regcred withstands, as far as that has figures: `make scenarios`, or `make scenarios ARGS='a1 a4'` for some.
//!
//! The real program, its limits as they are by default, against the Postgres of `dev/with-services`, over loopback. Every scenario
//! is bounded in time. What has no figures is an integration test.

mod clients;
mod drift;
mod fleet;
mod ids;
mod keys;
mod killed;
mod outage;
#[path = "../../tests/integration/support/proxy.rs"]
mod proxy;
mod replicas;
mod skewed;
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

/// With this argument the bench is the scenarios.
pub const ARGUMENT: &str = "--scenarios";

/// A scenario: its name, what it is, and what runs it. One more is one more line.
type Scenario = (&'static str, &'static str, fn(&Stage, &mut Goals) -> anyhow::Result<()>);

const ALL: [Scenario; 12] = [
    ("a1", "slow heads, slow bodies, and thousands of half-open connections", clients::slow),
    ("a2", "bodies and heads that are too much", clients::too_much),
    ("a4", "a flood of forged keys", keys::forged),
    ("a5", "a cold start with 1,000 keys", keys::cold_start),
    ("a8", "one caller's flood", keys::one_floods),
    ("f1", "one of two replicas is killed at 20 points of a fan-out to 1,000 namespaces", killed::killed),
    ("f5", "a cluster is away, with 1,000 targets waiting for it, beside one that is not", outage::away),
    ("f7", "two and five replicas with eight workers", workers::many),
    ("f8", "the clock of one replica is an hour off", skewed::clocks),
    ("f15", "somebody edits and deletes 100 of 1,000 Secrets", drift::drift),
    ("s3", "whether an answer's time tells what exists", ids::timing),
    ("s7", "a revocation in another replica", replicas::revocation),
];

/// Scenarios without figures, and the tests that they are.
const TESTS: [(&str, &str); 1] =
    [("f6", "each sickness of an API server has a state and a message: --test integration each_cluster_fault")];

/// What all scenarios have: a database with one account, and an admin's key. Each starts a regcred of its own.
pub struct Stage {
    /// The database.
    pub sandbox: Sandbox,
    /// An admin's key.
    pub key: String,
    fleets: [OnceCell<Fleet>; 2],
}

impl Stage {
    fn set() -> anyhow::Result<Self> {
        progress("preparing a database");
        let sandbox = Sandbox::new()?;
        let key = sandbox.prepare()?;
        let stage = Self { sandbox, key, fleets: Default::default() };
        register(&stage.sandbox.serve()?, &stage.key)?;
        Ok(stage)
    }

    /// The first cluster, prepared when it is first asked for.
    fn fleet(&self) -> anyhow::Result<&Fleet> {
        self.prepared(0, "REGCRED_TEST_KUBE")
    }

    /// The other one.
    fn second_fleet(&self) -> anyhow::Result<&Fleet> {
        self.prepared(1, "REGCRED_TEST_KUBE2")
    }

    fn prepared(&self, number: usize, prefix: &'static str) -> anyhow::Result<&Fleet> {
        let cell = &self.fleets[number];
        if let Some(fleet) = cell.get() {
            return Ok(fleet);
        }
        progress(&format!("preparing {} namespaces", fleet::COUNT));
        let fleet = Fleet::prepare(prefix)?;
        Ok(cell.get_or_init(|| fleet))
    }

    /// Calls the API of a replica as admin, which must do what it is asked: its answer.
    fn call(&self, server: &Server, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = load::once(server.address, &load::request(method, path, Some(&self.key), &body))?;
        ensure!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        Ok(serde_json::from_str(&answer).unwrap_or_default())
    }
}

/// The one scenario that is a question of speed alone, and so is measured with the others of `make bench`.
pub fn forged_keys(goals: &mut Goals) -> anyhow::Result<()> {
    let stage = Stage::set()?;
    progress("a flood of forged keys");
    keys::forged(&stage, goals)
}

/// Runs the scenarios that are named, or all.
pub fn run(arguments: &[String]) -> anyhow::Result<()> {
    // `cargo bench` says `--bench`.
    let named: Vec<&str> = arguments.iter().map(String::as_str).filter(|name| !name.starts_with("--")).collect();
    for (name, what) in TESTS.iter().filter(|(name, _)| named.is_empty() || named.contains(name)) {
        progress(&format!("{name} has no figures, it is tests: {what}"));
    }
    let is_known =
        |name: &&&str| ALL.iter().any(|(known, ..)| known == *name) || TESTS.iter().any(|(known, _)| known == *name);
    if let Some(unknown) = named.iter().find(|name| !is_known(name)) {
        anyhow::bail!("there is no scenario {unknown}; there are {}", ALL.map(|(name, ..)| name).join(", "));
    }
    let stage = Stage::set()?;
    let mut goals = Goals::default();
    for (name, what, scenario) in ALL.iter().filter(|(name, ..)| named.is_empty() || named.contains(name)) {
        progress(&format!("{name}: {what}"));
        scenario(&stage, &mut goals)?;
    }
    Ok(goals.print()?)
}
