//! F8 skewed clock: one replica's clock is an hour off. Leases use the database's clock, so nothing
//! changes.

use std::path::Path;

use anyhow::{Context, ensure};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::{
    Stage,
    fleet::{COUNT, Declared, Fleet, given},
    killed::{Kill, kill, lease, replica},
};
use crate::{
    process::Server,
    report::{Goals, Rounds, float, progress, row, table},
};

const ROTATIONS: usize = 4;
const MINUTE: f64 = 60.0;

/// Results of two replicas.
struct Set {
    name: &'static str,
    /// Clock offset in the other replica's log, in seconds.
    off: f64,
    /// Durations of rotations, in seconds.
    took: Rounds,
    repeated: usize,
    refused: usize,
    /// The skewed replica is killed, then the other one.
    kills: Vec<Kill>,
}

/// Compares rotations with a skewed clock to those with correct clocks.
pub fn clocks(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    // Debian's libfaketime.
    let library = given("REGCRED_TEST_FAKETIME")?;
    // Measured before and after, so that a general slowdown affects both.
    let sets = [("correct", None), ("+1 h", Some("+3600")), ("-1 h", Some("-3600")), ("correct again", None)];
    let sets = sets.into_iter().enumerate().map(|(number, (name, skew))| {
        progress(&format!("F8 skewed clock: {name}"));
        let log = std::env::temp_dir().join(format!("regcred-f8-{}.log", std::process::id()));
        let set = Skew { name, off: skew.map(|skew| (skew, &*library)), log: &log, declared: &format!("f8-{number}") };
        let seen = set.measure(stage, fleet);
        let _ = std::fs::remove_file(&log);
        seen
    });
    let sets = sets.collect::<anyhow::Result<Vec<Set>>>()?;

    let mut rows = vec![row(["clock", "offset s", "rotation s", "all synced after a kill s"])];
    for set in &sets {
        let after: Vec<String> = set.kills.iter().map(|kill| format!("{:.2}", kill.converged)).collect();
        rows.push(vec![
            set.name.to_owned(),
            format!("{:.0}", set.off),
            set.took.spread(2).join(", "),
            after.join(", "),
        ]);
    }
    table(&format!("F8 skewed clock: one of two replicas, {COUNT} namespaces, leases of {} s", lease()?), &rows)?;
    let [correct, ahead, behind, again] = &sets[..] else { anyhow::bail!("four sets") };
    let usual = f64::midpoint(correct.took.median(), again.took.median());
    for set in [ahead, behind] {
        let name = |what: &str| format!("F8 skewed clock, {}: {what}", set.name);
        goals.at_most(&name("rotation time relative to correct clocks"), 1.2, set.took.median() / usual);
        goals.at_most(
            &name("Secrets written twice for a generation, and conflicting writes"),
            0.0,
            float(set.repeated + set.refused),
        );
        let most = set.kills.iter().map(|kill| kill.converged).fold(0.0, f64::max);
        goals.at_most(&name("all synced after a kill, s after a lease, maximum"), 5.0, most - f64::from(lease()?));
        let old: usize = set.kills.iter().map(|kill| kill.stale).sum();
        goals.at_most(&name("outdated Secrets"), 0.0, float(old));
    }
    Ok(())
}

/// Clock of one of two replicas.
struct Skew<'a> {
    name: &'static str,
    /// Offset in seconds, and the library that applies it.
    off: Option<(&'a str, &'a str)>,
    log: &'a Path,
    /// Name of the declared resources.
    declared: &'a str,
}

impl Skew<'_> {
    fn replica(&self, stage: &Stage) -> anyhow::Result<Server> {
        let variables = self.off.map(|(off, library)| {
            // Shifts the wall clock only. The monotonic clock stays correct.
            vec![("LD_PRELOAD", library), ("FAKETIME", off), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")]
        });
        replica(stage, &variables.unwrap_or_default(), Some(self.log))
    }

    fn measure(&self, stage: &Stage, fleet: &Fleet) -> anyhow::Result<Set> {
        let (correct, other) = (replica(stage, &[], None)?, self.replica(stage)?);
        let off = offset(self.log)?;
        let expected = self.off.map_or(0.0, |(off, _)| off.parse().unwrap_or(0.0));
        ensure!((off - expected).abs() < MINUTE, "the clock offset is {off} s");

        // Plain HTTP: to a clock that is behind, certificates made minutes ago are not yet valid.
        let plain = json!({
            "name": self.declared, "server": given("REGCRED_TEST_KUBE_HTTP")?, "auth": {"type": "none"},
            "allowPlainHttp": true,
        });
        let declared = Declared::everywhere(stage, fleet, &correct, self.declared, Some(plain))?;
        declared.until_done(COUNT)?;
        let (mut took, mut repeated, whole) = (Vec::new(), 0, fleet.audit_mark()?);
        for _ in 0..ROTATIONS {
            let mark = fleet.audit_mark()?;
            declared.rotate(&correct)?;
            took.push(declared.until_done(COUNT)?.as_secs_f64());
            repeated += declared.repeated(mark)?;
            ensure!(declared.stale()? == 0, "a Secret is outdated");
        }
        let writes = fleet.writes_since(whole, &declared.secret)?;
        let refused = writes.iter().filter(|write| write.status >= 300).count();
        let first = kill(&declared, other, &correct, COUNT / 3)?;
        let other = self.replica(stage)?;
        let second = kill(&declared, correct, &other, COUNT / 3)?;
        declared.retire(&other)?;
        let took = took.into_iter().collect();
        Ok(Set { name: self.name, off, took, repeated, refused, kills: vec![first, second] })
    }
}

/// Offset of the last timestamp in a log, in seconds.
pub fn offset(log: &Path) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(log)?;
    let line: Value = serde_json::from_str(text.lines().last().context("the log is empty")?)?;
    let at: DateTime<Utc> = line["timestamp"].as_str().context("no timestamp")?.parse()?;
    Ok((at - Utc::now()).as_seconds_f64())
}
