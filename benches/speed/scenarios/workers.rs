//! F7: several replicas with eight workers each.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};

use super::{
    Stage,
    fleet::{COUNT, Declared, Fleet, Version},
    killed::{lease, replica},
};
use crate::{
    process::Server,
    report::{Goals, Rounds, float, progress, row, table},
};

const ROTATIONS: usize = 5;
/// Rotations in the midst of which one replica stands still for longer than its leases.
const STILL: usize = 3;
/// Rotations that follow each other meanwhile.
const BURST: usize = 5;
const BETWEEN: Duration = Duration::from_millis(150);

/// What several replicas did.
#[derive(Default)]
struct Seen {
    /// Writes of the same Secret for the same generation, beyond the first.
    repeated: usize,
    /// Writes that met another one.
    refused: usize,
    /// Versions of Secrets with an older generation than the one before.
    older: usize,
    /// Writes that made no version.
    without_version: usize,
    /// Versions that nobody is known to have written.
    unwritten: usize,
    /// Secrets that are old in the end.
    stale: usize,
}

/// F7.
pub fn many(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    let mut rows = vec![row([
        "replicas",
        "a rotation s",
        "share of the busiest",
        "claims of a target",
        "late writes refused",
        "late writes that changed nothing",
    ])];
    for count in [2, 5] {
        let logs: Vec<PathBuf> = (0..count)
            .map(|number| std::env::temp_dir().join(format!("regcred-f7-{}-{number}.log", std::process::id())))
            .collect();
        let many = with_replicas(stage, fleet, &logs, &mut rows);
        for log in &logs {
            let _ = std::fs::remove_file(log);
        }
        let (steady, still) = many?;
        let name = |what: &str| format!("F7 {count} replicas: {what}");
        goals.at_most(&name("Secrets written twice for a generation"), 0.0, float(steady.repeated));
        goals.at_most(&name("writes that met another one's"), 0.0, float(steady.refused));
        goals.at_most(
            &name("older generations after newer ones, one standing still"),
            0.0,
            float(steady.older + still.older),
        );
        goals.at_most(
            &name("versions without a write in the audit log"),
            0.0,
            float(steady.unwritten + still.unwritten),
        );
        goals.at_most(&name("writes that changed nothing"), 0.0, float(steady.without_version));
        goals.at_most(&name("Secrets that are old in the end"), 0.0, float(steady.stale + still.stale));
    }
    table(&format!("F7: rotations in {COUNT} namespaces, 8 workers each"), &rows)?;
    Ok(())
}

/// What was seen of rotations one after the other, and of those in which one replica stands still.
fn with_replicas(
    stage: &Stage,
    fleet: &Fleet,
    logs: &[PathBuf],
    rows: &mut Vec<Vec<String>>,
) -> anyhow::Result<(Seen, Seen)> {
    let workers = [("REGCRED_PULL_SECRETS_CONCURRENCY", "8")];
    let replicas = logs.iter().map(|log| stage.sandbox.serve_with(&workers, Some(log)));
    let replicas = replicas.collect::<anyhow::Result<Vec<Server>>>()?;
    let declared = Declared::everywhere(stage, fleet, &replicas[0], &format!("f7-{}", replicas.len()), None)?;
    declared.until_done(COUNT)?;

    progress(&format!("f7: {} replicas, rotations one after the other", replicas.len()));
    let (mut steady, mut took, claims) = (Seen::default(), Vec::new(), declared.claims()?);
    let begun = done_of(logs)?;
    let (whole, followed) = (fleet.audit_mark()?, fleet.follow(&declared.secret)?);
    for _ in 0..ROTATIONS {
        let mark = fleet.audit_mark()?;
        declared.rotate(&replicas[0])?;
        took.push(declared.until_done(COUNT)?.as_secs_f64());
        steady.repeated += declared.repeated(mark)?;
        steady.stale += declared.stale()?;
    }
    steady.add(&declared, whole, &followed.end(fleet)?)?;
    let done: Vec<usize> = done_of(logs)?.iter().zip(begun).map(|(after, before)| after - before).collect();
    let busiest = done.iter().copied().max().unwrap_or_default();
    let claimed: i64 =
        declared.claims()?.iter().map(|(namespace, after)| after - claims.get(namespace).unwrap_or(&0)).sum();

    progress(&format!("f7: {} replicas, one of which stands still for longer than its leases", replicas.len()));
    drop(replicas);
    // With leases that are over soon.
    let replicas = logs.iter().map(|log| replica(stage, &workers, Some(log)));
    let replicas = replicas.collect::<anyhow::Result<Vec<Server>>>()?;
    let mut still = Seen::default();
    let (whole, followed) = (fleet.audit_mark()?, fleet.follow(&declared.secret)?);
    for number in 0..STILL {
        declared.rotate(&replicas[0])?;
        declared.until_done(COUNT * (number + 1) / (STILL + 2))?;
        let slow = replicas.last().context("no replica")?;
        slow.signal("STOP")?;
        for _ in 0..BURST {
            declared.rotate(&replicas[0])?;
            std::thread::sleep(BETWEEN);
        }
        let done = declared.until_done(COUNT);
        slow.signal("CONT")?;
        done?;
        // What it still does it does within the time of a call, which is less than a lease.
        std::thread::sleep(Duration::from_secs(u64::from(lease()?)));
        declared.until_done(COUNT)?;
        still.stale += declared.stale()?;
    }
    still.add(&declared, whole, &followed.end(fleet)?)?;

    rows.push(vec![
        replicas.len().to_string(),
        format!("{:.2}", took.into_iter().collect::<Rounds>().median()),
        format!("{:.2}", float(busiest) / float(done.iter().sum::<usize>().max(1))),
        format!("{:.3}", float(usize::try_from(claimed)?) / float(COUNT * ROTATIONS)),
        still.refused.to_string(),
        still.without_version.to_string(),
    ]);
    declared.retire(&replicas[0])?;
    Ok((steady, still))
}

impl Seen {
    /// Compares the versions that Secrets had with what the audit log says was written.
    fn add(&mut self, declared: &Declared<'_>, mark: u64, versions: &[Version]) -> anyhow::Result<()> {
        let writes = declared.fleet.writes_since(mark, &declared.secret)?;
        let mut written: BTreeMap<&str, usize> = BTreeMap::new();
        for write in &writes {
            if write.status < 300 {
                *written.entry(&write.namespace).or_default() += 1;
            } else {
                self.refused += 1;
            }
        }
        ensure!(!written.is_empty(), "the audit log has no writes");
        let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
        let mut stored: BTreeMap<&str, usize> = BTreeMap::new();
        for version in versions {
            *stored.entry(&version.namespace).or_default() += 1;
            let generation = version.generation.unwrap_or_default();
            let before = newest.insert(&version.namespace, generation);
            if before.is_some_and(|before| before > generation) {
                self.older += 1;
            }
        }
        for (namespace, written) in &written {
            let stored = stored.get(namespace).copied().unwrap_or_default();
            self.without_version += written.saturating_sub(stored);
        }
        for (namespace, stored) in &stored {
            let written = written.get(namespace).copied().unwrap_or_default();
            self.unwritten += stored.saturating_sub(written);
        }
        Ok(())
    }
}

/// How many targets each replica says it brought in order.
fn done_of(logs: &[PathBuf]) -> anyhow::Result<Vec<usize>> {
    let lines = |log: &PathBuf| Ok(std::fs::read_to_string(log)?.matches("target reconciled").count());
    logs.iter().map(lines).collect()
}
