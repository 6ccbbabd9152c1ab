//! Concealment: resources that a caller may not see look like missing ones.

use std::{net::SocketAddr, time::Instant};

use anyhow::ensure;
use futures_util::future::try_join_all;
use serde_json::{Value, json};

use super::Stage;
use crate::{
    load::{self, Connection, on_this_thread},
    report::{Goals, Rounds},
    sandbox::ACCOUNT,
};

const REQUESTS: usize = 10_000;
/// Requests before measuring.
const WARM_UP: usize = 1000;
/// Few enough that no request waits for another: the server is mostly idle.
const CONNECTIONS: usize = 4;
/// Name of a missing resource, as long as that of the existing account, cluster and pull secret.
const MISSING: &str = "absent-5000";

/// S3 timing: to a caller without a grant, an existing resource answers like a missing one, in
/// content and time. Covers rows that are read and account rows that are cached for another caller.
pub fn timing(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    ensure!(MISSING.len() == ACCOUNT.len(), "the names differ in length");
    let server = stage.sandbox.serve()?;
    // The cluster is unreachable, so the worker is idle.
    let cluster =
        json!({"name": ACCOUNT, "server": "http://127.0.0.1:1", "auth": {"type": "none"}, "allowPlainHttp": true});
    stage.call(&server, "POST", "/v1/clusters", &cluster)?;
    let declaration = json!({"accounts": [ACCOUNT], "secret": {"name": "pull"}, "deletionPolicy": "retain",
        "targets": [{"cluster": ACCOUNT, "namespaces": ["default"]}]});
    let pull_secret = format!("/v1/pull-secrets/{ACCOUNT}");
    stage.call(&server, "PUT", &pull_secret, &declaration)?;
    let render = |name: &str, key: &str| {
        load::request("POST", "/v1/docker-configs", Some(key), &format!(r#"{{"accounts":["{name}"]}}"#))
    };
    let owner = render(ACCOUNT, &stage.key);
    for _ in 0..2 {
        let (status, body) = load::once(server.address, &owner)?;
        ensure!(status == 200, "not rendered: {status} {body}");
    }

    let viewer = stranger(stage, server.address, "viewer")?;
    for (what, path) in [
        ("read of an account", "registry-accounts"),
        ("read of a cluster", "clusters"),
        ("read of a pull secret", "pull-secrets"),
    ] {
        let read = |name: &str| load::request("GET", &format!("/v1/{path}/{name}"), Some(&viewer), "");
        compare(goals, what, server.address, 404, read)?;
    }
    let renderer = stranger(stage, server.address, "renderer")?;
    compare(goals, "render", server.address, 422, |name| render(name, &renderer))?;
    // Later scenarios must not include an unreachable cluster.
    stage.call(&server, "DELETE", &pull_secret, &Value::Null)?;
    stage.call(&server, "DELETE", &format!("/v1/clusters/{ACCOUNT}"), &Value::Null)?;
    Ok(())
}

/// Creates a key without a grant on the resource.
fn stranger(stage: &Stage, address: SocketAddr, role: &str) -> anyhow::Result<String> {
    let grants = r#"{"accounts":["mine-*"],"clusters":["mine-*"],"namespaces":["mine-*"]}"#;
    let key = format!(r#"{{"name":"stranger-{role}","role":"{role}","grants":{grants}}}"#);
    let (status, made) = load::once(address, &load::request("POST", "/v1/api-keys", Some(&stage.key), &key))?;
    ensure!(status == 201, "the key was not made: {status} {made}");
    let made: Value = serde_json::from_str(&made)?;
    Ok(made["key"].as_str().unwrap_or_default().to_owned())
}

/// Requests an existing and a missing resource in alternation, and compares content and time.
fn compare(
    goals: &mut Goals,
    what: &str,
    address: SocketAddr,
    expected: u16,
    ask: impl Fn(&str) -> Vec<u8>,
) -> anyhow::Result<()> {
    let asks = [ACCOUNT, MISSING].map(ask);
    let alternate = async || {
        let mut connection = Connection::open(address).await?;
        let mut took = [Vec::new(), Vec::new()];
        let mut bodies = [String::new(), String::new()];
        for round in 0..(REQUESTS + WARM_UP) / CONNECTIONS {
            // The first of each pair alternates.
            for which in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let start = Instant::now();
                let status = connection.exchange(&asks[which]).await?;
                let elapsed = start.elapsed();
                ensure!(status == expected, "got status {status}");
                if round >= WARM_UP / CONNECTIONS {
                    took[which].push(elapsed.as_secs_f64());
                }
                bodies[which] = String::from_utf8_lossy(connection.body()).into_owned();
            }
        }
        let bodies = bodies.map(|body| without_names(&body));
        ensure!(bodies[0] == bodies[1], "the responses differ: {bodies:?}");
        Ok(took)
    };
    let took = on_this_thread(try_join_all((0..CONNECTIONS).map(|_| alternate())))?;
    let [foreign, missing] = [0, 1].map(|which| {
        let all = took.iter().flat_map(|took| took[which].iter().copied());
        all.collect::<Rounds>().median()
    });
    // 1 % of the median or 20 microseconds, whichever is more.
    let bound = (missing * 0.01).max(20e-6);
    goals.at_most(
        &format!("S3 timing: {what}, foreign against missing at {:.0} µs, difference, µs", missing * 1e6),
        (bound * 1e6).round(),
        (foreign - missing).abs() * 1e6,
    );
    Ok(())
}

/// Removes the parts of a problem that differ between any two responses.
fn without_names(body: &str) -> Value {
    let mut problem: Value = serde_json::from_str(body).unwrap_or_default();
    problem["requestId"] = Value::Null;
    let text = problem.to_string().replace(MISSING, "…").replace(ACCOUNT, "…");
    serde_json::from_str(&text).unwrap_or_default()
}
