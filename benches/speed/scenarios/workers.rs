//! F7 many replicas: two and five replicas with eight workers each.

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
/// Rotations during which one replica is suspended for longer than its leases.
const SUSPENSIONS: usize = 3;
/// Rotations in quick succession meanwhile.
const BURST: usize = 5;
const BETWEEN: Duration = Duration::from_millis(150);

/// Anomalies counted across replicas.
#[derive(Default)]
struct Anomalies {
    /// Writes beyond the first to a Secret for one generation.
    repeated: usize,
    /// Writes refused because of a conflict.
    refused: usize,
    /// Versions of Secrets with an older generation than their predecessor.
    older: usize,
    /// Writes without a new version.
    without_effect: usize,
    /// Versions without a write in the audit log.
    unwritten: usize,
    /// Secrets that are outdated at the end.
    stale: usize,
}

/// Compares rotations of undisturbed replicas with rotations during which one replica is suspended.
pub fn many_replicas(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    let mut rows = vec![row([
        "replicas",
        "rotation s",
        "busiest replica's share",
        "claims per target",
        "late writes refused",
        "late writes without effect",
    ])];
    for count in [2, 5] {
        let logs: Vec<PathBuf> = (0..count)
            .map(|number| std::env::temp_dir().join(format!("regcred-f7-{}-{number}.log", std::process::id())))
            .collect();
        let anomalies = with_replicas(stage, fleet, &logs, &mut rows);
        for log in &logs {
            let _ = std::fs::remove_file(log);
        }
        let (steady, suspended) = anomalies?;
        let name = |what: &str| format!("F7 many replicas, {count}: {what}");
        goals.at_most(&name("Secrets written twice for a generation"), 0.0, float(steady.repeated));
        goals.at_most(&name("conflicting writes"), 0.0, float(steady.refused));
        goals.at_most(
            &name("older generation after a newer one, one suspended"),
            0.0,
            float(steady.older + suspended.older),
        );
        goals.at_most(
            &name("versions without a write in the audit log"),
            0.0,
            float(steady.unwritten + suspended.unwritten),
        );
        goals.at_most(&name("writes without effect"), 0.0, float(steady.without_effect));
        goals.at_most(&name("outdated Secrets"), 0.0, float(steady.stale + suspended.stale));
    }
    table(&format!("F7 many replicas: rotations in {COUNT} namespaces, 8 workers each"), &rows)?;
    Ok(())
}

/// Counts anomalies of consecutive rotations, and of rotations with one replica suspended.
fn with_replicas(
    stage: &Stage,
    fleet: &Fleet,
    logs: &[PathBuf],
    rows: &mut Vec<Vec<String>>,
) -> anyhow::Result<(Anomalies, Anomalies)> {
    let workers = [("REGCRED_PULL_SECRETS_CONCURRENCY", "8")];
    let replicas = logs.iter().map(|log| stage.sandbox.serve_with(&workers, Some(log)));
    let replicas = replicas.collect::<anyhow::Result<Vec<Server>>>()?;
    let declared = Declared::everywhere(stage, fleet, &replicas[0], &format!("f7-{}", replicas.len()), None)?;
    declared.until_done(COUNT)?;

    progress(&format!("F7 many replicas: {}, consecutive rotations", replicas.len()));
    let (mut steady, mut took, claims) = (Anomalies::default(), Vec::new(), declared.claims()?);
    let begun = synced_by(logs)?;
    let (since, followed) = (fleet.audit_mark()?, fleet.follow(&declared.secret)?);
    for _ in 0..ROTATIONS {
        let mark = fleet.audit_mark()?;
        declared.rotate(&replicas[0])?;
        took.push(declared.until_done(COUNT)?.as_secs_f64());
        steady.repeated += declared.repeated(mark)?;
        steady.stale += declared.stale()?;
    }
    steady.add(&declared, since, &followed.end(fleet)?)?;
    let done: Vec<usize> = synced_by(logs)?.iter().zip(begun).map(|(after, before)| after - before).collect();
    let busiest = done.iter().copied().max().unwrap_or_default();
    let claimed: i64 =
        declared.claims()?.iter().map(|(namespace, after)| after - claims.get(namespace).unwrap_or(&0)).sum();

    progress(&format!("F7 many replicas: {}, one suspended for longer than its leases", replicas.len()));
    drop(replicas);
    // Restarted with shorter leases.
    let replicas = logs.iter().map(|log| replica(stage, &workers, Some(log)));
    let replicas = replicas.collect::<anyhow::Result<Vec<Server>>>()?;
    let mut suspended = Anomalies::default();
    let (since, followed) = (fleet.audit_mark()?, fleet.follow(&declared.secret)?);
    for number in 0..SUSPENSIONS {
        declared.rotate(&replicas[0])?;
        declared.until_done(COUNT * (number + 1) / (SUSPENSIONS + 2))?;
        let slow = replicas.last().context("no replica")?;
        slow.signal("STOP")?;
        for _ in 0..BURST {
            declared.rotate(&replicas[0])?;
            std::thread::sleep(BETWEEN);
        }
        let done = declared.until_done(COUNT);
        slow.signal("CONT")?;
        done?;
        // Its remaining calls end within the call timeout, which is less than a lease.
        std::thread::sleep(Duration::from_secs(u64::from(lease()?)));
        declared.until_done(COUNT)?;
        suspended.stale += declared.stale()?;
    }
    suspended.add(&declared, since, &followed.end(fleet)?)?;

    rows.push(vec![
        replicas.len().to_string(),
        format!("{:.2}", took.into_iter().collect::<Rounds>().median()),
        format!("{:.2}", float(busiest) / float(done.iter().sum::<usize>().max(1))),
        format!("{:.3}", float(usize::try_from(claimed)?) / float(COUNT * ROTATIONS)),
        suspended.refused.to_string(),
        suspended.without_effect.to_string(),
    ]);
    declared.retire(&replicas[0])?;
    Ok((steady, suspended))
}

impl Anomalies {
    /// Compares versions of Secrets with the writes in the audit log.
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
            self.without_effect += written.saturating_sub(stored);
        }
        for (namespace, stored) in &stored {
            let written = written.get(namespace).copied().unwrap_or_default();
            self.unwritten += stored.saturating_sub(written);
        }
        Ok(())
    }
}

/// Number of targets that each replica reports as synced.
fn synced_by(logs: &[PathBuf]) -> anyhow::Result<Vec<usize>> {
    let lines = |log: &PathBuf| Ok(std::fs::read_to_string(log)?.matches("target reconciled").count());
    logs.iter().map(lines).collect()
}
