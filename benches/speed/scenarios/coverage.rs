//! C1 coverage: 10,000 pods in 2,000 namespaces, and a rotation beside it.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret, ServiceAccount};
use kube::{Api, Client, api::PostParams};
use serde_json::{Value, json};

use super::{
    Stage,
    fleet::{COUNT, DEADLINE, Declared, given},
};
use crate::{
    process::Server,
    report::{Goals, float, progress},
};

/// Namespaces and pods of the cluster.
const NAMESPACES: usize = 2_000;
const PODS: usize = 10_000;
/// Namespaces with a pull secret that another client made, which a run reads.
const BY_HAND: usize = 200;
/// Repositories of the pods.
const REPOSITORIES: usize = 20;
/// Concurrent calls during preparation.
const PARALLEL: usize = 32;
/// Runs with rotations beside them.
const ROUNDS: usize = 3;
/// Rotations without a run after each one.
const ROTATIONS: usize = 10;
const PATH: &str = "/v1/clusters/c1/coverage";

/// Measures time, memory and calls of a run, and the speed of the worker beside it.
pub fn coverage(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let (fleet, registry) = (stage.second_fleet()?, given("REGCRED_TEST_REGISTRY_A")?);
    progress("C1 coverage: preparing 2,000 namespaces with 10,000 pods");
    fleet.runtime.block_on(prepare(&fleet.admin, &registry))?;
    let server = stage.sandbox.serve_with(&[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")], None)?;
    let mut registration = fleet.registration("c1", &fleet.server()?)?;
    registration["auth"] = json!({"type": "token", "token": given("REGCRED_TEST_KUBE2_ADMIN_TOKEN")?});
    stage.call(&server, "POST", "/v1/clusters", &registration)?;
    declare(stage, &server, &registry)?;
    let before = server.peak_mib()?;

    progress("C1 coverage: a run");
    let (seconds, coverage) = measure(stage, &server)?;
    let peak = server.peak_mib()?;
    let summary = &coverage["snapshot"]["summary"];
    let number =
        |field: &str| summary[field].as_u64().and_then(|count| usize::try_from(count).ok()).context("no number");
    progress(&format!(
        "C1 coverage: {seconds:.1} s, {} groups, peak {peak:.0} MiB (before {before:.0})",
        number("groups")?
    ));
    goals.exactly("C1 coverage: pods that were examined", PODS, number("pods")?);
    goals.at_most("C1 coverage: 10,000 pods in 2,000 namespaces, s", 60.0, seconds);
    goals.at_most("C1 coverage: peak of resident memory, MiB", 128.0, peak);
    goals.at_most("C1 coverage: calls to the API server per second", 50.0, float(number("calls")?) / seconds);
    beside(stage, &server, goals)
}

async fn prepare(admin: &Client, registry: &str) -> anyhow::Result<()> {
    let made = stream::iter(0..NAMESPACES).map(async |number| {
        let name = format!("coverage-{number:04}");
        let namespace: Namespace = from(json!({"metadata": {"name": name, "labels": {"coverage": "yes"}}}))?;
        Api::all(admin.clone()).create(&PostParams::default(), &namespace).await?;
        let account: ServiceAccount = from(json!({"metadata": {"name": "default"}}))?;
        Api::namespaced(admin.clone(), &name).create(&PostParams::default(), &account).await?;
        let is_by_hand = number < BY_HAND;
        if is_by_hand {
            let document = json!({"auths": {registry: {"username": "martin", "password": format!("wrong-{number}")}}});
            let secret: Secret =
                from(json!({"metadata": {"name": "by-hand"}, "type": "kubernetes.io/dockerconfigjson",
                "stringData": {".dockerconfigjson": document.to_string()}}))?;
            Api::namespaced(admin.clone(), &name).create(&PostParams::default(), &secret).await?;
        }
        for pod in 0..PODS / NAMESPACES {
            let repository = (number + pod) % REPOSITORIES;
            let image = if pod == 0 {
                format!("{registry}/os/alpine:3")
            } else {
                format!("{registry}/team-{repository}/app:1")
            };
            let secret = if pod == 1 && is_by_hand { "by-hand" } else { "c1-pull" };
            let pod: Pod = from(json!({"metadata": {"name": format!("pod-{pod}")}, "spec": {
                "containers": [{"name": "app", "image": image}], "imagePullSecrets": [{"name": secret}]}}))?;
            Api::namespaced(admin.clone(), &name).create(&PostParams::default(), &pod).await?;
        }
        anyhow::Ok(())
    });
    made.buffer_unordered(PARALLEL).try_for_each(|()| async { Ok(()) }).await
}

fn from<T: serde::de::DeserializeOwned>(object: Value) -> anyhow::Result<T> {
    Ok(serde_json::from_value(object)?)
}

/// Declares the pull secret of all namespaces, and waits for its Secrets.
fn declare(stage: &Stage, server: &Server, registry: &str) -> anyhow::Result<()> {
    let account = json!({"name": "c1", "registry": registry, "username": given("REGCRED_TEST_REGISTRY_USER")?,
        "password": given("REGCRED_TEST_REGISTRY_PASSWORD_A")?});
    stage.call(server, "POST", "/v1/registry-accounts", &account)?;
    let body = json!({"accounts": ["c1"], "secret": {"name": "c1-pull"},
        "targets": [{"cluster": "c1", "namespaceSelector": {"matchLabels": {"coverage": "yes"}}}]});
    stage.call(server, "PUT", "/v1/pull-secrets/c1", &body)?;
    let start = Instant::now();
    loop {
        let shown = stage.call(server, "GET", "/v1/pull-secrets/c1", &Value::Null)?;
        if shown["status"]["synced"].as_u64() == u64::try_from(NAMESPACES).ok() {
            return Ok(());
        }
        ensure!(start.elapsed() < DEADLINE, "the Secrets are not delivered: {shown}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Runs a coverage. Returns its duration in seconds, and the coverage.
fn measure(stage: &Stage, server: &Server) -> anyhow::Result<(f64, Value)> {
    let start = Instant::now();
    stage.call(server, "POST", PATH, &Value::Null)?;
    loop {
        let coverage = stage.call(server, "GET", PATH, &Value::Null)?;
        if coverage["run"]["finishedAt"].is_string() {
            ensure!(coverage["run"]["state"] == "succeeded", "the run failed: {coverage}");
            return Ok((start.elapsed().as_secs_f64(), coverage));
        }
        ensure!(start.elapsed() < DEADLINE, "the run does not end: {coverage}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Measures rotations in another cluster, alone and beside runs.
fn beside(stage: &Stage, server: &Server, goals: &mut Goals) -> anyhow::Result<()> {
    progress("C1 coverage: rotations alone and beside a run");
    let declared = Declared::everywhere(stage, stage.fleet()?, server, "c1-fleet", None)?;
    declared.until_done(COUNT)?;
    let rotation = || {
        declared.rotate(server)?;
        anyhow::Ok(declared.until_done(COUNT)?.as_secs_f64())
    };
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        stage.call(server, "POST", PATH, &Value::Null)?;
        // From the first page to the last row: a run reads, examines and stores.
        loop {
            let seconds = rotation()?;
            let coverage = stage.call(server, "GET", PATH, &Value::Null)?;
            if coverage["run"]["finishedAt"].is_string() {
                ensure!(coverage["run"]["state"] == "succeeded", "the run failed: {coverage}");
                break;
            }
            together.push(seconds);
        }
        for _ in 0..ROTATIONS {
            alone.push(rotation()?);
        }
    }
    progress(&format!("C1 coverage: {} rotations beside runs, {} alone", together.len(), alone.len()));
    let ratio = mean(&alone) / mean(&together);
    goals.at_least("C1 coverage: speed of rotations beside runs, relative to alone", 0.95, ratio);
    declared.retire(server)
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / float(figures.len())
}
