//! Fixture of the pull secret scenarios: a cluster with a thousand namespaces, the resources
//! declared for them, and their state in the database, the Secrets and the API server's audit log.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    core::v1::{Namespace, Secret},
    rbac::v1::PolicyRule,
};
use kube::{
    Api, Client, Config,
    api::{ListParams, PostParams, WatchEvent, WatchParams},
};
use regcred::domain::{cluster::CaCertificate, pull_secret::GENERATION_ANNOTATION};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::{runtime::Runtime, task::JoinHandle};
use uuid::Uuid;

use super::{
    Stage,
    broker::{self, named, rule},
};
use crate::process::Server;

/// Namespaces per cluster.
pub const COUNT: usize = 1_000;
/// Deadline for each wait.
pub const DEADLINE: Duration = Duration::from_mins(3);
/// Concurrent calls during preparation.
const PARALLEL: usize = 16;
/// Namespace of regcred's `ServiceAccount`, and name of its objects.
const HOME: &str = "regcred";
/// Lifetime of the `ServiceAccount`'s token.
const TOKEN_SECONDS: i64 = 6 * 3600;

/// A cluster of `dev/with-services` with [`COUNT`] namespaces and a `ServiceAccount` with the
/// rights that pull secrets need.
pub struct Fleet {
    /// Prefix of the cluster's environment variables.
    prefix: &'static str,
    /// Runtime of all calls to the cluster.
    pub runtime: Runtime,
    /// Client with administrator rights.
    pub admin: Client,
    token: String,
    /// Names of the namespaces.
    pub namespaces: Vec<String>,
}

/// State of a Secret in the cluster.
pub struct Found {
    /// Password of its one account, if the document is valid.
    pub password: Option<String>,
    /// `resourceVersion`.
    pub version: String,
}

/// A write in the API server's audit log.
pub struct Write {
    /// Namespace of the Secret.
    pub namespace: String,
    /// Status code of the response.
    pub status: u64,
}

/// One version of a Secret.
pub struct Version {
    /// Namespace of the Secret.
    pub namespace: String,
    /// Value of the generation annotation.
    pub generation: Option<i64>,
    version: String,
}

/// Watch that collects all versions of Secrets in storage order.
pub struct VersionWatch {
    begin: BTreeMap<String, String>,
    seen: Arc<Mutex<Vec<Version>>>,
    task: JoinHandle<anyhow::Result<Infallible>>,
    name: String,
}

impl VersionWatch {
    /// Stops the watch once it has reached the present, and returns all versions.
    pub fn end(self, fleet: &Fleet) -> anyhow::Result<Vec<Version>> {
        let now = fleet.secrets(&self.name)?;
        let start = Instant::now();
        loop {
            if self.task.is_finished() {
                return Err(fleet.runtime.block_on(self.task)?.err().context("the watch ended")?);
            }
            ensure!(start.elapsed() < DEADLINE, "the watch is late");
            let mut seen = self.seen.lock().map_err(|_| anyhow!("a thread panicked"))?;
            let mut newest = self.begin.clone();
            newest.extend(seen.iter().map(|version| (version.namespace.clone(), version.version.clone())));
            if now.iter().all(|(namespace, found)| newest.get(namespace) == Some(&found.version)) {
                self.task.abort();
                return Ok(std::mem::take(&mut *seen));
            }
            drop(seen);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Rights of the fleet's `ServiceAccount`. The scenarios choose the names of their Secrets.
fn rights(may_watch: bool) -> Vec<PolicyRule> {
    let mut rights = vec![
        rule("secrets", &["create", "get", "patch", "delete"]),
        rule("serviceaccounts", &["get", "patch"]),
        rule("namespaces", &["list", "watch"]),
    ];
    if may_watch {
        rights.push(rule("secrets", &["list", "watch"]));
    }
    rights
}

/// Reads a variable that `dev/with-services` exports.
pub fn given(variable: &str) -> anyhow::Result<String> {
    std::env::var(variable).with_context(|| format!("{variable} is not set: run this with dev/with-services"))
}

impl Fleet {
    /// Prepares the cluster whose environment variables have this prefix.
    pub fn prepare(prefix: &'static str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let variable = |name: &str| given(&format!("{prefix}_{name}"));
        let ca = std::fs::read_to_string(PathBuf::from(variable("DIR")?).join("ca.crt"))?;
        let ca = CaCertificate::parse(&ca).map_err(|refused| anyhow!("{refused:?}"))?;
        let mut config = Config::new(variable("SERVER")?.parse()?);
        config.root_cert = Some(ca.as_der().map(<[u8]>::to_vec).collect());
        config.auth_info.token = Some(variable("ADMIN_TOKEN")?.into());
        let (admin, token, namespaces) = runtime.block_on(async {
            let admin = Client::try_from(config)?;
            let names: Vec<String> = (0..COUNT).map(|number| format!("scenario-{number:04}")).collect();
            let all = Api::<Namespace>::all(admin.clone());
            let made = stream::iter(names.iter().map(String::as_str).chain([HOME])).map(async |name| {
                all.create(&PostParams::default(), &Namespace { metadata: named(name), ..Namespace::default() }).await
            });
            made.buffer_unordered(PARALLEL).try_for_each(|_| async { Ok(()) }).await?;
            let token = broker::create_service_account(&admin, HOME, HOME, TOKEN_SECONDS).await?;
            broker::grant(&admin, HOME, HOME, rights(true)).await?;
            anyhow::Ok((admin, token, names))
        })?;
        Ok(Self { prefix, runtime, admin, token, namespaces })
    }

    fn variable(&self, name: &str) -> anyhow::Result<String> {
        given(&format!("{}_{name}", self.prefix))
    }

    /// URL of the API server.
    pub fn server(&self) -> anyhow::Result<String> {
        self.variable("SERVER")
    }

    /// Directory of the cluster's files.
    pub fn folder(&self) -> anyhow::Result<PathBuf> {
        Ok(PathBuf::from(self.variable("DIR")?))
    }

    /// Request body that registers the cluster under `name` with this URL.
    pub fn registration(&self, name: &str, server: &str) -> anyhow::Result<Value> {
        let ca = std::fs::read_to_string(self.folder()?.join("ca.crt"))?;
        let auth = json!({"type": "token", "token": self.token});
        Ok(json!({"name": name, "server": server, "caCertificate": ca, "auth": auth}))
    }

    /// Grants or revokes the right to watch Secrets.
    pub fn set_may_watch(&self, may_watch: bool) -> anyhow::Result<()> {
        self.runtime.block_on(broker::set_rules(&self.admin, HOME, &rights(may_watch)))?;
        Ok(())
    }

    /// All Secrets of this name, by namespace.
    pub fn secrets(&self, name: &str) -> anyhow::Result<BTreeMap<String, Found>> {
        let all = Api::<Secret>::all(self.admin.clone());
        let params = ListParams::default().fields(&format!("metadata.name={name}"));
        let list = self.runtime.block_on(all.list(&params))?;
        Ok(list.items.into_iter().filter_map(found).collect())
    }

    /// Starts to collect the versions of all Secrets of this name.
    pub fn follow(&self, name: &str) -> anyhow::Result<VersionWatch> {
        let all = Api::<Secret>::all(self.admin.clone());
        let fields = format!("metadata.name={name}");
        let list = self.runtime.block_on(all.list_metadata(&ListParams::default().fields(&fields)))?;
        let from = list.metadata.resource_version.context("list without resourceVersion")?;
        let begin = list.items.into_iter().filter_map(|secret| {
            let metadata = secret.metadata;
            Some((metadata.namespace?, metadata.resource_version?))
        });
        let begin = begin.collect();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&seen);
        let params = WatchParams::default().fields(&fields).timeout(290);
        let task = self.runtime.spawn(async move {
            let mut from = from;
            // The API server also ends slow watches. Resuming is safe: etcd keeps all versions.
            loop {
                let mut events = all.watch_metadata(&params, &from).await?.boxed();
                while let Ok(Some(event)) = events.try_next().await {
                    let metadata = match event {
                        WatchEvent::Added(secret) | WatchEvent::Modified(secret) => secret.metadata,
                        WatchEvent::Bookmark(_) => continue,
                        WatchEvent::Deleted(_) => bail!("a Secret was deleted"),
                        WatchEvent::Error(status) => bail!("the watch failed: {}", status.reason),
                    };
                    let generation = metadata.annotations.and_then(|all| all.get(GENERATION_ANNOTATION)?.parse().ok());
                    let (namespace, version) = (metadata.namespace, metadata.resource_version);
                    let version = version.context("Secret without resourceVersion")?;
                    from.clone_from(&version);
                    let version = Version { namespace: namespace.unwrap_or_default(), generation, version };
                    noted.lock().map_err(|_| anyhow!("a thread panicked"))?.push(version);
                }
            }
        });
        Ok(VersionWatch { begin, seen, task, name: name.to_owned() })
    }

    /// Returns the current end of the audit log.
    pub fn audit_mark(&self) -> anyhow::Result<u64> {
        Ok(self.audit_until_now(0)?.1)
    }

    /// Writes by regcred to Secrets of this name since a mark, in the order of completion.
    pub fn writes_since(&self, mark: u64, name: &str) -> anyhow::Result<Vec<Write>> {
        let (log, _) = self.audit_until_now(mark)?;
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let writes = events.filter(|event| {
            let is_write = ["create", "patch", "update", "delete"].iter().any(|verb| event["verb"] == *verb);
            let is_ours = event["userAgent"].as_str().is_some_and(|agent| agent.starts_with("regcred/"));
            let object = &event["objectRef"];
            is_write && is_ours && object["resource"] == "secrets" && object["name"] == name
        });
        let writes = writes.map(|event| {
            let namespace = event["objectRef"]["namespace"].as_str().unwrap_or_default().to_owned();
            Write { namespace, status: event["responseStatus"]["code"].as_u64().unwrap_or_default() }
        });
        Ok(writes.collect())
    }

    /// Reads the audit log from an offset to the present, and returns the new end.
    ///
    /// Requests are logged after their response, so this sends a marker request and waits for it.
    fn audit_until_now(&self, from: u64) -> anyhow::Result<(String, u64)> {
        let marker = Uuid::now_v7().to_string();
        self.runtime.block_on(Api::<Secret>::namespaced(self.admin.clone(), HOME).get_opt(&marker))?;
        let mut file = File::open(self.variable("AUDIT_LOG")?)?;
        let start = Instant::now();
        loop {
            let (mut log, begin) = (String::new(), file.seek(SeekFrom::Start(from))?);
            file.read_to_string(&mut log)?;
            if let Some(at) = log.find(&marker) {
                let end = at + log[at..].find('\n').map_or(0, |length| length + 1);
                if end > at {
                    log.truncate(end);
                    return Ok((log, begin + u64::try_from(end)?));
                }
            }
            ensure!(start.elapsed() < DEADLINE, "timed out waiting for the audit log");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn found(secret: Secret) -> Option<(String, Found)> {
    let document = secret.data.as_ref().and_then(|data| data.get(".dockerconfigjson"));
    let document: Option<Value> = document.and_then(|document| serde_json::from_slice(&document.0).ok());
    let password = document
        .and_then(|document| Some(document["auths"].as_object()?.values().next()?["password"].as_str()?.to_owned()));
    let version = secret.metadata.resource_version?;
    Some((secret.metadata.namespace?, Found { password, version }))
}

/// A pull secret declared for a fleet, with its own account and cluster.
pub struct Declared<'a> {
    stage: &'a Stage,
    /// The fleet.
    pub fleet: &'a Fleet,
    /// Name of the pull secret, its account and its cluster.
    name: String,
    /// Name of its Secrets.
    pub secret: String,
    id: Uuid,
    /// Number of targets.
    pub targets: usize,
    conn: RefCell<PgConnection>,
    rotations: RefCell<usize>,
}

/// Progress of the targets.
pub struct Progress {
    /// Targets with the newest generation.
    pub done: usize,
    /// Targets with a lease that ends by the given time.
    pub held: usize,
}

impl<'a> Declared<'a> {
    /// Declares the pull secret for all namespaces through this replica. `registration` overrides
    /// the fleet's own API server.
    pub fn everywhere(
        stage: &'a Stage,
        fleet: &'a Fleet,
        server: &Server,
        name: &str,
        registration: Option<Value>,
    ) -> anyhow::Result<Self> {
        let registration = registration.map_or_else(|| fleet.registration(name, &fleet.server()?), Ok)?;
        stage.call(server, "POST", "/v1/clusters", &registration)?;
        let account = json!({
            "name": name, "registry": "registry.example.com:5000", "username": "martin", "password": format!("{name}-0"),
        });
        stage.call(server, "POST", "/v1/registry-accounts", &account)?;
        let secret = format!("{name}-pull");
        let body = json!({
            "accounts": [name], "secret": {"name": secret, "type": "kubernetes.io/dockerconfigjson"},
            "targets": [{"cluster": name, "namespaces": fleet.namespaces}],
        });
        let shown = stage.call(server, "PUT", &format!("/v1/pull-secrets/{name}"), &body)?;
        let id: Uuid = shown["id"].as_str().context("no id")?.parse()?;
        let conn = RefCell::new(fleet.runtime.block_on(PgConnection::connect(stage.sandbox.url()))?);
        let (name, targets) = (name.to_owned(), fleet.namespaces.len());
        let declared = Self { stage, fleet, name, secret, id, targets, conn, rotations: RefCell::default() };
        Ok(declared)
    }

    /// Rotates the account. Returns the database time before that, in seconds.
    pub fn rotate(&self, server: &Server) -> anyhow::Result<f64> {
        let now = self.now()?;
        *self.rotations.borrow_mut() += 1;
        let path = format!("/v1/registry-accounts/{}", self.name);
        self.stage.call(server, "PATCH", &path, &json!({"password": self.password()}))?;
        Ok(now)
    }

    /// Password of the last rotation.
    pub fn password(&self) -> String {
        format!("{}-{}", self.name, self.rotations.borrow())
    }

    /// Marks all targets due.
    pub fn sync(&self, server: &Server) -> anyhow::Result<()> {
        self.stage.call(server, "POST", &format!("/v1/pull-secrets/{}/sync", self.name), &json!({}))?;
        Ok(())
    }

    /// Database time, in seconds.
    pub fn now(&self) -> anyhow::Result<f64> {
        let clock = sqlx::query_scalar("SELECT extract(epoch FROM clock_timestamp())::double precision");
        Ok(self.fleet.runtime.block_on(clock.fetch_one(&mut *self.conn.borrow_mut()))?)
    }

    /// Counts synced targets, and leases that end by `lease_end`.
    pub fn progress(&self, lease_end: f64) -> anyhow::Result<Progress> {
        let counts = sqlx::query_as(
            "SELECT count(*) FILTER (WHERE state = 'synced' AND applied_generation = generation AND lease_until IS NULL),
                 count(*) FILTER (WHERE lease_until <= to_timestamp($2))
             FROM pull_secret_targets WHERE pull_secret_id = $1",
        );
        let mut conn = self.conn.borrow_mut();
        let counts = counts.bind(self.id).bind(lease_end).fetch_one(&mut *conn);
        let (done, held): (i64, i64) = self.fleet.runtime.block_on(counts)?;
        Ok(Progress { done: usize::try_from(done)?, held: usize::try_from(held)? })
    }

    /// Waits until this many targets have the newest generation, and returns the duration.
    pub fn until_done(&self, count: usize) -> anyhow::Result<Duration> {
        let start = Instant::now();
        while self.progress(0.0)?.done < count {
            ensure!(start.elapsed() < DEADLINE, "{}: timed out waiting for synced targets", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(start.elapsed())
    }

    /// Time of each target's last sync relative to `since`, in seconds, sorted.
    pub fn latencies(&self, since: f64) -> anyhow::Result<Vec<f64>> {
        let latencies = sqlx::query_scalar(
            "SELECT extract(epoch FROM last_synced_at)::double precision - $2 AS latency FROM pull_secret_targets
             WHERE pull_secret_id = $1 AND state = 'synced' ORDER BY latency",
        );
        let mut conn = self.conn.borrow_mut();
        let latencies = latencies.bind(self.id).bind(since).fetch_all(&mut *conn);
        Ok(self.fleet.runtime.block_on(latencies)?)
    }

    /// Claims of each target so far.
    pub fn claims(&self) -> anyhow::Result<BTreeMap<String, i64>> {
        let claims = sqlx::query_as("SELECT namespace, lease_token FROM pull_secret_targets WHERE pull_secret_id = $1");
        let mut conn = self.conn.borrow_mut();
        let claims = claims.bind(self.id).fetch_all(&mut *conn);
        let claims: Vec<(String, i64)> = self.fleet.runtime.block_on(claims)?;
        Ok(claims.into_iter().collect())
    }

    /// Number of Secrets that are missing or lack the password of the last rotation.
    pub fn stale(&self) -> anyhow::Result<usize> {
        let (secrets, password) = (self.fleet.secrets(&self.secret)?, Some(self.password()));
        let good = self
            .fleet
            .namespaces
            .iter()
            .filter(|namespace| secrets.get(*namespace).is_some_and(|secret| secret.password == password));
        Ok(self.targets - good.count())
    }

    /// Successful writes beyond the first to the same Secret.
    pub fn repeated(&self, mark: u64) -> anyhow::Result<usize> {
        let writes = self.fleet.writes_since(mark, &self.secret)?;
        let done: Vec<&str> = writes.iter().filter(|write| write.status < 300).map(|write| &*write.namespace).collect();
        let places: BTreeSet<&str> = done.iter().copied().collect();
        Ok(done.len() - places.len())
    }

    /// Deletes the pull secret, its account and its cluster. The Secrets stay.
    pub fn retire(self, server: &Server) -> anyhow::Result<()> {
        let name = &self.name;
        self.stage.call(server, "DELETE", &format!("/v1/pull-secrets/{name}?deletionPolicy=retain"), &Value::Null)?;
        self.stage.call(server, "DELETE", &format!("/v1/registry-accounts/{name}"), &Value::Null)?;
        self.stage.call(server, "DELETE", &format!("/v1/clusters/{name}"), &Value::Null)?;
        Ok(())
    }
}
