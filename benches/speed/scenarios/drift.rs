//! F15 drift: Secrets are edited and deleted outside regcred.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use super::{
    Stage,
    fleet::{COUNT, DEADLINE, Declared, Fleet},
};
use crate::report::{Goals, float, progress};

/// Secrets of another owner that already have the name.
const FOREIGN: usize = 20;
/// Number of edited Secrets, and of deleted ones.
const EDITED: usize = 50;
/// Resync period for the part without watches, in seconds.
const RESYNC: &str = "30";

/// Measures the time until drift is repaired, with and without the right to watch Secrets.
pub fn drift(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let fleet = stage.fleet()?;
    let secret = "f15-pull";
    let foreign = &fleet.namespaces[..FOREIGN];
    fleet.runtime.block_on(make_foreign(fleet, foreign, secret))?;
    let before = versions(fleet, secret, foreign)?;
    let mark = fleet.audit_mark()?;

    progress("F15 drift: with the right to watch Secrets");
    fleet.set_may_watch(true)?;
    let server = stage.sandbox.serve_with(&[], None)?;
    let declared = Declared::everywhere(stage, fleet, &server, "f15", None)?;
    declared.until_done(COUNT - FOREIGN)?;
    until_watched(fleet, &declared, secret)?;
    let watched = repaired(fleet, &declared, secret)?;

    progress("F15 drift: without the right to watch Secrets");
    drop(server);
    fleet.set_may_watch(false)?;
    let server = stage.sandbox.serve_with(&[("REGCRED_PULL_SECRETS_RESYNC_SECONDS", RESYNC)], None)?;
    // A sync puts every target on the new resync period.
    let since = declared.now()?;
    declared.sync(&server)?;
    let start = Instant::now();
    while declared.latencies(since)?.iter().filter(|latency| **latency > 0.0).count() < COUNT - FOREIGN {
        ensure!(start.elapsed() < DEADLINE, "the targets were not checked");
        std::thread::sleep(Duration::from_millis(20));
    }
    let unwatched = repaired(fleet, &declared, secret)?;

    let touched = fleet.writes_since(mark, secret)?.iter().filter(|write| foreign.contains(&write.namespace)).count();
    let after = versions(fleet, secret, foreign)?;
    let changed = before.iter().filter(|(namespace, version)| after.get(*namespace) != Some(version)).count();
    declared.retire(&server)?;
    fleet.set_may_watch(true)?;
    goals.at_most("F15 drift: 100 of 1,000 Secrets repaired with a watch, s", 60.0, watched.as_secs_f64());
    let period: f64 = RESYNC.parse()?;
    goals.at_most("F15 drift: the same without a watch, in resync periods", 1.0, unwatched.as_secs_f64() / period);
    goals.at_most(
        "F15 drift: writes to and changes of another owner's Secrets of the same name",
        0.0,
        float(touched + changed),
    );
    Ok(())
}

async fn make_foreign(fleet: &Fleet, namespaces: &[String], name: &str) -> anyhow::Result<()> {
    let made = stream::iter(namespaces).map(async |namespace| {
        let secret = Secret {
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            ..Secret::default()
        };
        let secrets = Api::<Secret>::namespaced(fleet.admin.clone(), namespace);
        secrets.create(&PostParams::default(), &secret).await
    });
    made.buffer_unordered(16).try_for_each(|_| async { Ok(()) }).await?;
    Ok(())
}

fn versions(fleet: &Fleet, name: &str, namespaces: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut versions: BTreeMap<String, String> =
        fleet.secrets(name)?.into_iter().map(|(namespace, found)| (namespace, found.version)).collect();
    versions.retain(|namespace, _| namespaces.contains(namespace));
    Ok(versions)
}

/// Waits until an edit is repaired, which only a watch does this early.
fn until_watched(fleet: &Fleet, declared: &Declared<'_>, name: &str) -> anyhow::Result<()> {
    let namespace = fleet.namespaces.last().context("no namespace")?;
    let secrets = Api::<Secret>::namespaced(fleet.admin.clone(), namespace);
    let edit = Patch::Merge(edit());
    fleet.runtime.block_on(secrets.patch(name, &PatchParams::default(), &edit))?;
    let start = Instant::now();
    while declared.stale()? > FOREIGN {
        ensure!(start.elapsed() < DEADLINE, "no watch is active");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The edit of a Secret.
fn edit() -> Value {
    json!({"data": {".dockerconfigjson": ByteString(b"{\"auths\":{}}".to_vec())}})
}

/// Edits and deletes Secrets, and measures the time until all are repaired.
fn repaired(fleet: &Fleet, declared: &Declared<'_>, name: &str) -> anyhow::Result<Duration> {
    // Spread over all namespaces.
    let ours = fleet.namespaces[FOREIGN..].chunks((COUNT - FOREIGN) / (2 * EDITED));
    let chosen: Vec<&String> = ours.filter_map(|chunk| chunk.first()).take(2 * EDITED).collect();
    let edit = edit();
    let damage = stream::iter(chosen.iter().enumerate()).map(async |(number, namespace)| {
        let secrets = Api::<Secret>::namespaced(fleet.admin.clone(), namespace);
        if number % 2 == 0 {
            secrets.patch(name, &PatchParams::default(), &Patch::Merge(&edit)).await?;
        } else {
            secrets.delete(name, &DeleteParams::default()).await?;
        }
        anyhow::Ok(())
    });
    let start = Instant::now();
    fleet.runtime.block_on(damage.buffer_unordered(16).try_for_each(|()| async { Ok(()) }))?;
    let damaged = declared.stale()?;
    progress(&format!("F15 drift: {} Secrets differ", damaged - FOREIGN));
    loop {
        // `stale` always counts the Secrets of the other owner.
        if declared.stale()? == FOREIGN {
            return Ok(start.elapsed());
        }
        ensure!(start.elapsed() < DEADLINE, "the Secrets are not repaired");
        std::thread::sleep(Duration::from_millis(100));
    }
}
