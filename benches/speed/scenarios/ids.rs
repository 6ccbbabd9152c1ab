//! Whether somebody learns of what is not his.

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

const TRIES: usize = 10_000;
/// Tries before these.
const WARM_UP: usize = 1000;
/// Few enough that none waits for another: most of the time nothing is done at all.
const CONNECTIONS: usize = 4;
/// The name of what there is none of, as long as that of what there is: an account, a cluster and a pull secret.
const MISSING: &str = "nobody-5000";

/// S3: to somebody to whom it is not granted, what is there is as what is not: in words and in time. Where rows are read, and
/// where those of accounts are remembered because somebody else uses them.
pub fn timing(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    ensure!(MISSING.len() == ACCOUNT.len(), "the names differ in length");
    let server = stage.sandbox.serve()?;
    // Nobody answers there, so the worker has hardly anything to do.
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
    for (what, path) in
        [("read", "registry-accounts"), ("read of a cluster", "clusters"), ("read of a pull secret", "pull-secrets")]
    {
        let read = |name: &str| load::request("GET", &format!("/v1/{path}/{name}"), Some(&viewer), "");
        compare(goals, what, server.address, 404, read)?;
    }
    let renderer = stranger(stage, server.address, "renderer")?;
    compare(goals, "render", server.address, 422, |name| render(name, &renderer))?;
    // The scenarios that follow know of no cluster that is away.
    stage.call(&server, "DELETE", &pull_secret, &Value::Null)?;
    stage.call(&server, "DELETE", &format!("/v1/clusters/{ACCOUNT}"), &Value::Null)?;
    Ok(())
}

/// The key of somebody to whom nothing of it is granted.
fn stranger(stage: &Stage, address: SocketAddr, role: &str) -> anyhow::Result<String> {
    let grants = r#"{"accounts":["mine-*"],"clusters":["mine-*"]}"#;
    let key = format!(r#"{{"name":"stranger-{role}","role":"{role}","grants":{grants}}}"#);
    let (status, made) = load::once(address, &load::request("POST", "/v1/api-keys", Some(&stage.key), &key))?;
    ensure!(status == 201, "the key was not made: {status} {made}");
    let made: Value = serde_json::from_str(&made)?;
    Ok(made["key"].as_str().unwrap_or_default().to_owned())
}

/// Asks for what is there and for what is not, again and again in turns.
fn compare(
    goals: &mut Goals,
    what: &str,
    address: SocketAddr,
    expected: u16,
    ask: impl Fn(&str) -> Vec<u8>,
) -> anyhow::Result<()> {
    let asks = [ACCOUNT, MISSING].map(ask);
    let ask_in_turns = async || {
        let mut connection = Connection::open(address).await?;
        let mut took = [Vec::new(), Vec::new()];
        let mut bodies = [String::new(), String::new()];
        for round in 0..(TRIES + WARM_UP) / CONNECTIONS {
            // In turns, and each first in every other round.
            for which in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let start = Instant::now();
                let status = connection.exchange(&asks[which]).await?;
                let elapsed = start.elapsed();
                ensure!(status == expected, "answered {status}");
                if round >= WARM_UP / CONNECTIONS {
                    took[which].push(elapsed.as_secs_f64());
                }
                bodies[which] = String::from_utf8_lossy(connection.body()).into_owned();
            }
        }
        let bodies = bodies.map(|body| without_names(&body));
        ensure!(bodies[0] == bodies[1], "the answers differ: {bodies:?}");
        Ok(took)
    };
    let took = on_this_thread(try_join_all((0..CONNECTIONS).map(|_| ask_in_turns())))?;
    let [foreign, missing] = [0, 1].map(|which| {
        let all = took.iter().flat_map(|took| took[which].iter().copied());
        all.collect::<Rounds>().median()
    });
    // 1 % of the median or 20 microseconds, whichever is more.
    let bound = (missing * 0.01).max(20e-6);
    goals.at_most(
        &format!("S3 {what}, foreign or missing, median {:.0} µs: they differ by, µs", missing * 1e6),
        (bound * 1e6).round(),
        (foreign - missing).abs() * 1e6,
    );
    Ok(())
}

/// A problem without what differs in any two answers.
fn without_names(body: &str) -> Value {
    let mut problem: Value = serde_json::from_str(body).unwrap_or_default();
    problem["requestId"] = Value::Null;
    let text = problem.to_string().replace(MISSING, "…").replace(ACCOUNT, "…");
    serde_json::from_str(&text).unwrap_or_default()
}
