//! `regcred doctor cluster`.

use std::process::Command;

use serde_json::Value;
use sqlx::{ConnectOptions, PgPool};

use super::setup::{namespace_in, registration};
use crate::{
    diagnosis::setup::{deployment, login},
    pull_secrets::Broker,
    support::{
        kubernetes::{FIRST, SECOND},
        process::{Exit, Installation, Process},
        registry,
    },
};

/// Runs `regcred` with these variables and no others.
async fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Exit {
    let mut command = Command::new(env!("CARGO_BIN_EXE_regcred"));
    command.args(arguments).env_clear().envs(variables.iter().copied()).env("PATH", "/usr/bin:/bin");
    Process::start(command).wait().await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn command_runs_a_coverage_and_prints_it(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8,::1/128");
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    service.client(&key).post("/v1/clusters", &registration()).await.expect(201);
    let a = registry::a();
    let image = format!("{}/os/alpine:3", a.address);
    let namespace = namespace_in(SECOND, &[], vec![login("idle", &a), deployment(&[&image], &[])]).await;
    let url = format!("http://{}", service.address);
    let variables = [("REGCRED_URL", url.as_str()), ("REGCRED_TOKEN", key.as_str())];

    let early = run(&["doctor", "cluster", "prod", "--last"], &variables).await;
    assert_eq!(early.code, Some(2), "{early:?}");
    assert!(early.stderr.contains("no snapshot yet"), "{early:?}");

    let table = run(&["doctor", "cluster", "prod"], &variables).await;

    assert_eq!(table.code, Some(1), "{table:?}");
    let row = table.stdout.lines().find(|line| line.contains(&namespace) && line.contains("os/alpine"));
    let row = row.unwrap_or_else(|| panic!("no row: {table:?}"));
    assert!(row.starts_with("noSecret") && row.contains("1 deployment") && row.contains("newNode"), "{row}");
    assert!(table.stdout.contains("VERDICT") && table.stdout.starts_with("✗ cluster prod at"), "{table:?}");
    assert!(table.stdout.contains("Pull secrets that nothing uses: "), "{table:?}");

    let json = run(&["doctor", "--cluster", "prod", "--last", "-o", "json"], &variables).await;
    assert_eq!(json.code, Some(1), "{json:?}");
    let document: Value = serde_json::from_str(&json.stdout).expect("JSON");
    let groups = document["groups"].as_array().expect("groups");
    assert!(groups.iter().all(|group| group["verdict"] != "ok"), "{document:#}");
    assert!(groups.iter().any(|group| group["namespace"] == namespace.as_str()), "{document:#}");
    let unused = document["unusedSecrets"].as_array().expect("pull secrets");
    let is_idle = |secret: &Value| secret["namespace"] == namespace.as_str() && secret["name"] == "idle";
    assert!(unused.iter().any(is_idle), "{document:#}");

    let unknown = run(&["doctor", "cluster", "other"], &variables).await;
    assert_eq!(unknown.code, Some(2), "{unknown:?}");
    let usage = run(&["doctor"], &[]).await;
    assert_eq!(usage.code, Some(2), "{usage:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cluster_of_which_nothing_may_be_listed_is_not_ok(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8,::1/128");
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let broker = Broker::without_rights().await;
    service.client(&key).post("/v1/clusters", &FIRST.registration("prod", &broker.auth())).await.expect(201);
    let url = format!("http://{}", service.address);
    let variables = [("REGCRED_URL", url.as_str()), ("REGCRED_TOKEN", key.as_str())];

    let table = run(&["doctor", "cluster", "prod"], &variables).await;

    assert_eq!(table.code, Some(2), "{table:?}");
    assert!(table.stdout.starts_with("? cluster prod at"), "{table:?}");
    assert!(table.stderr.contains("nothing was examined"), "{table:?}");
}
