//! What regcred withstands, as far as that has figures: `make scenarios`, or `make scenarios ARGS='a1 a4'` for some.
//!
//! The real program, its limits as they are by default, against the Postgres of `dev/with-services`, over loopback. Every scenario
//! is bounded in time. What has no figures is an integration test.

mod clients;
mod ids;
mod keys;
mod replicas;

use crate::{
    report::{Goals, progress},
    sandbox::{Sandbox, register},
};

/// With this argument the bench is the scenarios.
pub const ARGUMENT: &str = "--scenarios";

/// A scenario: its name, what it is, and what runs it. One more is one more line.
type Scenario = (&'static str, &'static str, fn(&Stage, &mut Goals) -> anyhow::Result<()>);

const ALL: [Scenario; 7] = [
    ("a1", "slow heads, slow bodies, and thousands of half-open connections", clients::slow),
    ("a2", "bodies and heads that are too much", clients::too_much),
    ("a4", "a flood of forged keys", keys::forged),
    ("a5", "a cold start with 1,000 keys", keys::cold_start),
    ("a8", "one caller's flood", keys::one_floods),
    ("s3", "whether an answer's time tells what exists", ids::timing),
    ("s7", "a revocation in another replica", replicas::revocation),
];

/// What all scenarios have: a database with one account, and an admin's key. Each starts a regcred of its own.
pub struct Stage {
    /// The database.
    pub sandbox: Sandbox,
    /// An admin's key.
    pub key: String,
}

impl Stage {
    fn set() -> anyhow::Result<Self> {
        progress("preparing a database");
        let sandbox = Sandbox::new()?;
        let key = sandbox.prepare()?;
        let stage = Self { sandbox, key };
        register(&stage.sandbox.serve()?, &stage.key)?;
        Ok(stage)
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
    if let Some(unknown) = named.iter().find(|name| !ALL.iter().any(|(known, ..)| known == *name)) {
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
