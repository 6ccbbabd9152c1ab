//! Scenarios of minted accounts: many due at once, replicas that are killed, a provider that is away,
//! wrong clocks, and the storage of results.

pub mod away;
pub mod burst;
pub mod clocks;
pub mod groups;
pub mod killed;
mod provider;
mod single;

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use chrono::TimeDelta;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::runtime::Runtime;

use self::provider::Provider;
use super::fleet::Fleet;
use crate::{load, process::Server, sandbox::Sandbox};

/// Deadline for each wait.
const DEADLINE: Duration = Duration::from_mins(2);
/// Lease of deliveries in seconds, so that a survivor soon takes over those of a killed replica.
const DELIVERY_LEASE: &str = "5";

/// A database of its own, and a provider.
struct Minting {
    conn: RefCell<PgConnection>,
    runtime: Runtime,
    provider: Provider,
    key: String,
    sandbox: Sandbox,
}

impl Minting {
    /// Prepares the database, and starts a provider whose logins have this lifetime.
    fn start(lifetime: TimeDelta, latency: Duration) -> anyhow::Result<Self> {
        let sandbox = Sandbox::new()?;
        let key = sandbox.prepare()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let conn = RefCell::new(runtime.block_on(PgConnection::connect(sandbox.url()))?);
        Ok(Self { conn, runtime, provider: Provider::start(lifetime, latency)?, key, sandbox })
    }

    /// Starts a replica that may call the provider.
    fn replica(&self, variables: &[(&str, &str)], log: Option<&Path>) -> anyhow::Result<Server> {
        let usual = [
            ("REGCRED_MINT_ALLOW", "127.0.0.1"),
            ("REGCRED_PULL_SECRETS_LEASE_SECONDS", DELIVERY_LEASE),
            ("REGCRED_CLUSTER_TIMEOUT_SECONDS", "2"),
        ];
        self.sandbox.serve_with(&[&usual, variables].concat(), log)
    }

    /// Creates accounts with a client of the token service each.
    fn create(&self, server: &Server, names: &[String]) -> anyhow::Result<()> {
        for name in names {
            create(server.address, &self.key, name, &self.provider.oauth2(name))?;
        }
        Ok(())
    }

    fn call(&self, server: &Server, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        call(server.address, &self.key, (method, path), body)
    }

    fn execute(&self, sql: &'static str) -> anyhow::Result<()> {
        self.runtime.block_on(sqlx::query(sql).execute(&mut *self.conn.borrow_mut()))?;
        Ok(())
    }

    /// Executes a query with a count.
    fn count(&self, sql: &'static str) -> anyhow::Result<usize> {
        let count: i64 = self.runtime.block_on(sqlx::query_scalar(sql).fetch_one(&mut *self.conn.borrow_mut()))?;
        Ok(usize::try_from(count)?)
    }

    /// Makes the mints of all accounts due.
    fn make_due(&self) -> anyhow::Result<()> {
        self.execute("UPDATE account_mints SET next_attempt_at = now()")
    }

    /// Lets time pass for all mints, as far as the database's clock matters.
    fn pass(&self, seconds: f64) -> anyhow::Result<()> {
        let shift = sqlx::query(
            "UPDATE account_mints SET minted_at = minted_at - $1 * interval '1 second',
                 valid_until = valid_until - $1 * interval '1 second', refresh_at = refresh_at - $1 * interval '1 second',
                 next_attempt_at = next_attempt_at - $1 * interval '1 second'",
        );
        self.runtime.block_on(shift.bind(seconds).execute(&mut *self.conn.borrow_mut()))?;
        Ok(())
    }

    /// Ends all leases earlier.
    fn shorten_leases(&self, seconds: f64) -> anyhow::Result<()> {
        let shift = sqlx::query("UPDATE account_mints SET lease_until = lease_until - $1 * interval '1 second'");
        self.runtime.block_on(shift.bind(seconds).execute(&mut *self.conn.borrow_mut()))?;
        Ok(())
    }

    /// Number of accounts whose last mint has this serial and is stored.
    fn with_serial(&self, serial: i64) -> anyhow::Result<usize> {
        let count = sqlx::query_scalar(
            "SELECT count(*) FROM account_mints WHERE serial = $1 AND valid_until > now() AND lease_until IS NULL",
        );
        let count: i64 = self.runtime.block_on(count.bind(serial).fetch_one(&mut *self.conn.borrow_mut()))?;
        Ok(usize::try_from(count)?)
    }

    /// Waits until this many accounts have a valid login with this serial, and returns the duration.
    fn until_serial(&self, serial: i64, accounts: usize) -> anyhow::Result<Duration> {
        until("mints are stored", || Ok(self.with_serial(serial)? == accounts))
    }

    /// Delivers accounts in one Secret, and waits for it.
    fn deliver<'a>(&self, fleet: &'a Fleet, server: &Server, names: &[String]) -> anyhow::Result<Delivered<'a>> {
        self.call(server, "POST", "/v1/clusters", &fleet.registration("fleet", &fleet.server()?)?)?;
        let namespace = fleet.namespaces.first().context("no namespace")?.clone();
        let name = format!("{}-pull", names.first().context("no account")?);
        let body = json!({
            "accounts": names, "secret": {"name": name, "type": "kubernetes.io/dockerconfigjson"},
            "targets": [{"cluster": "fleet", "namespaces": [namespace]}],
        });
        self.call(server, "PUT", "/v1/pull-secrets/minted", &body)?;
        let delivered = Delivered { fleet, namespace, name };
        self.until_delivered(&delivered)?;
        Ok(delivered)
    }

    /// Number of accounts whose login in the Secret is not the last one that the provider issued.
    fn outdated(&self, delivered: &Delivered<'_>) -> anyhow::Result<usize> {
        let (issued, found) = (self.provider.last(), delivered.read()?.passwords);
        Ok(issued.values().filter(|issued| found.get(&issued.client) != Some(&issued.password)).count())
    }

    fn until_delivered(&self, delivered: &Delivered<'_>) -> anyhow::Result<Duration> {
        until("the Secret has the last logins", || Ok(self.outdated(delivered)? == 0))
    }

    /// Deletes the Secret with its pull secret.
    fn retire(&self, server: &Server, delivered: &Delivered<'_>) -> anyhow::Result<()> {
        self.call(server, "DELETE", "/v1/pull-secrets/minted", &Value::Null)?;
        until("the Secret is deleted", || Ok(delivered.read()?.version.is_empty()))?;
        Ok(())
    }

    /// Waits until no statement of a replica runs, such as one of a killed replica.
    fn until_idle(&self) -> anyhow::Result<()> {
        let active = "SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()";
        until("Postgres is idle", || Ok(self.count(active)? == 0))?;
        Ok(())
    }
}

/// A Secret with the logins of accounts.
struct Delivered<'a> {
    fleet: &'a Fleet,
    namespace: String,
    name: String,
}

/// Content of the Secret.
#[derive(Default)]
struct Found {
    /// Passwords by account.
    passwords: HashMap<String, String>,
    /// `resourceVersion`.
    version: String,
}

impl Delivered<'_> {
    fn read(&self) -> anyhow::Result<Found> {
        let secrets = Api::<Secret>::namespaced(self.fleet.admin.clone(), &self.namespace);
        let Some(secret) = self.fleet.runtime.block_on(secrets.get_opt(&self.name))? else {
            return Ok(Found::default());
        };
        let data = secret.data.unwrap_or_default();
        let document = data.get(".dockerconfigjson").context("the Secret has no document")?;
        let document: Value = serde_json::from_slice(&document.0)?;
        let auths = document["auths"].as_object().into_iter().flatten();
        let passwords = auths.filter_map(|(registry, auth)| {
            let account = registry.strip_suffix(".example.com")?;
            Some((account.to_owned(), auth["password"].as_str()?.to_owned()))
        });
        Ok(Found { passwords: passwords.collect(), version: secret.metadata.resource_version.unwrap_or_default() })
    }
}

/// Creates an account whose registry has its name.
fn create(address: SocketAddr, key: &str, name: &str, source: &Value) -> anyhow::Result<()> {
    let account = json!({"name": name, "registry": format!("{name}.example.com"), "plainHttp": true, "source": source});
    call(address, key, ("POST", "/v1/registry-accounts"), &account)?;
    Ok(())
}

/// Calls the API and returns the response, which must be a success.
fn call(address: SocketAddr, key: &str, (method, path): (&str, &str), body: &Value) -> anyhow::Result<Value> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let (status, answer) = load::once(address, &load::request(method, path, Some(key), &body))?;
    ensure!((200..300).contains(&status), "{method} {path}: {status} {answer}");
    Ok(serde_json::from_str(&answer).unwrap_or_default())
}

/// Names of accounts, which are also names of hosts and of clients.
fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix}n{number}")).collect()
}

/// Waits for a condition, and returns the duration.
fn until(what: &str, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    while !holds()? {
        ensure!(begin.elapsed() < DEADLINE, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(begin.elapsed())
}

/// Accounts whose logins a replica reports as minted in the background, in order.
fn minted_in(log: &Path) -> anyhow::Result<Vec<String>> {
    let log = std::fs::read_to_string(log)?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let minted = lines.filter(|line| line["message"] == "login minted");
    Ok(minted.filter_map(|line| Some(line["account"].as_str()?.to_owned())).collect())
}
