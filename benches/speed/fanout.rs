//! How soon a rotation is in thousands of namespaces, beside a bare loop that applies the same Secrets through `kube` with the
//! same concurrency: `make bench-fanout`, or `make bench-fanout ARGS='300 1000'` for other sizes.
//!
//! The real program against the real kube-apiserver of `dev/with-services`, and a Postgres that makes its commits durable. etcd does
//! not sync, for both sides alike, so that the disk of this machine is not what is measured.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::{
    api::core::v1::{Namespace, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
};
use regcred::{
    domain::{
        cluster::CaCertificate,
        pull_secret::{GENERATION_ANNOTATION, ID_LABEL, TargetState},
    },
    storage::targets::{self, ClaimedTarget, Settlement},
};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::{
    load,
    process::{Postgres, Server, cores, own_cpu_time},
    report::{Goals, Rounds, float, progress, row, table},
    sandbox::{ACCOUNT, Sandbox, register},
};

/// With this argument the bench is this one.
pub const ARGUMENT: &str = "--fanout";

const SIZES: [usize; 2] = [1_000, 5_000];
/// An even number, because every other round goes the other way round.
const ROUNDS: usize = 6;
/// regcred's own default.
const CONCURRENCY: usize = 16;
/// How long a fan-out may take.
const PATIENCE: Duration = Duration::from_mins(5);

/// Measures fan-outs of these sizes, or of the usual ones.
pub fn run(arguments: &[String]) -> anyhow::Result<()> {
    // `cargo bench` says `--bench`.
    let sizes = arguments.iter().filter(|argument| !argument.starts_with("--"));
    let mut sizes = sizes.map(|size| size.parse()).collect::<Result<Vec<usize>, _>>().context("a size is a number")?;
    if sizes.is_empty() {
        sizes = SIZES.to_vec();
    }
    sizes.sort_unstable();
    let mut goals = Goals::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cores()).enable_all().build()?;
    fan_outs(&runtime, &sizes, &mut goals)?;
    queue(&runtime, &mut goals)?;
    Ok(goals.print()?)
}

fn fan_outs(runtime: &Runtime, sizes: &[usize], goals: &mut Goals) -> anyhow::Result<()> {
    let cluster = Cluster::of_services(runtime)?;
    let largest = sizes.last().copied().unwrap_or_default();
    progress(&format!("making {largest} namespaces"));
    let namespaces: Vec<String> = (0..largest).map(|number| format!("fanout-{number:06}")).collect();
    runtime.block_on(cluster.make_namespaces(&namespaces))?;

    let mut rows = vec![row([
        "",
        "seconds",
        "a second",
        "of bare",
        "spread",
        "µs CPU",
        "bare µs CPU",
        "Postgres µs CPU",
        "MiB",
        "peak MiB",
    ])];
    let mut memory = Vec::new();
    let mut durable = String::new();
    for &size in sizes {
        let fan_out = FanOut::begin(runtime, &cluster, &namespaces[..size])?;
        durable = fan_out.durability()?;
        let mut rounds = Vec::new();
        for number in 0..ROUNDS {
            progress(&format!("{size} namespaces, round {} of {ROUNDS}", number + 1));
            let round = fan_out.round(number)?;
            let (took, bare) = (round.rotation.seconds, round.bare.seconds);
            progress(&format!("  {took:.2} s, the bare loop {bare:.2} s"));
            rounds.push(round);
        }
        let of = |figure: fn(&Round) -> f64| rounds.iter().map(figure).collect::<Rounds>();
        let [ratio, spread] = of(|round| round.bare.seconds / round.rotation.seconds).spread(2);
        let median = |figure: fn(&Round) -> f64, digits: usize| format!("{:.digits$}", of(figure).median());
        let (resident, peak) = (fan_out.server.resident_mib()?, fan_out.server.peak_mib()?);
        rows.push(vec![
            format!("a rotation in {size} namespaces"),
            median(|round| round.rotation.seconds, 2),
            format!("{:.0}", float(size) / of(|round| round.rotation.seconds).median()),
            ratio,
            spread,
            median(|round| round.rotation.cpu, 0),
            median(|round| round.bare.cpu, 0),
            median(|round| round.rotation.postgres_cpu, 0),
            format!("{resident:.1}"),
            format!("{peak:.1}"),
        ]);
        let [ratio, spread] = of(|round| round.bare_looks.seconds / round.looks.seconds).spread(2);
        rows.push(vec![
            format!("a look at each of {size} that is in order"),
            median(|round| round.looks.seconds, 2),
            format!("{:.0}", float(size) / of(|round| round.looks.seconds).median()),
            ratio,
            spread,
            median(|round| round.looks.cpu, 0),
            median(|round| round.bare_looks.cpu, 0),
            median(|round| round.looks.postgres_cpu, 0),
        ]);
        let name = format!("a rotation in {size} namespaces");
        goals.at_least(
            &format!("{name}: of the bare loop's rate"),
            0.9,
            of(|round| round.bare.seconds / round.rotation.seconds).median(),
        );
        goals.at_most(&format!("{name}: µs of regcred's CPU for each"), 300.0, of(|round| round.rotation.cpu).median());
        memory.push(peak);
    }
    table(
        &format!(
            "A rotation, from the call to the last target in order, beside a bare loop that applies the same Secrets, {CONCURRENCY} at a \
             time; then a look at all that is in order, beside a bare loop of GETs. CPU is for each Secret. {durable}"
        ),
        &rows,
    )?;
    if let [first, .., last] = memory[..] {
        goals.at_most("memory: MiB of peak more for the most namespaces than for the fewest", 8.0, last - first);
    }
    Ok(())
}

/// What one pass over all namespaces took.
struct Pass {
    seconds: f64,
    /// CPU time for each Secret, in microseconds: of regcred, or of the bare loop.
    cpu: f64,
    postgres_cpu: f64,
}

/// A rotation and a look by regcred, and each beside its bare loop.
struct Round {
    rotation: Pass,
    bare: Pass,
    looks: Pass,
    bare_looks: Pass,
}

/// A regcred of its own with one pull secret in so many namespaces, and the Secrets of the bare loop beside its own.
struct FanOut<'a> {
    runtime: &'a Runtime,
    cluster: &'a Cluster,
    namespaces: &'a [String],
    // Ends before the database goes.
    server: Server,
    sandbox: Sandbox,
    key: String,
    name: String,
    /// What the bare loops took last.
    bare_took: Cell<Duration>,
    bare_looks_took: Cell<Duration>,
}

impl<'a> FanOut<'a> {
    fn begin(runtime: &'a Runtime, cluster: &'a Cluster, namespaces: &'a [String]) -> anyhow::Result<Self> {
        progress(&format!("declaring a pull secret in {} namespaces", namespaces.len()));
        let sandbox = Sandbox::new()?;
        let key = sandbox.prepare()?;
        let server = sandbox.serve()?;
        register(&server, &key)?;
        let name = format!("pull-{}", namespaces.len());
        let (bare_took, bare_looks_took) = (Cell::default(), Cell::default());
        let fan_out = Self { runtime, cluster, namespaces, server, sandbox, key, name, bare_took, bare_looks_took };
        fan_out.call("POST", "/v1/clusters", &cluster.registration())?;
        let declaration = json!({
            "accounts": [ACCOUNT],
            "secret": {"name": fan_out.name, "type": "kubernetes.io/dockerconfigjson"},
            "targets": [{"cluster": "dev", "namespaces": namespaces}],
            "serviceAccounts": [], "deletionPolicy": "retain", "adopt": false,
        });
        fan_out.call("PUT", &format!("/v1/pull-secrets/{}", fan_out.name), &declaration)?;
        fan_out.wait(Duration::ZERO, IN_ORDER, fan_out.clock()?)?;
        fan_out.bare(0)?;
        // The first rotation is the first of this server in every respect.
        fan_out.rotation(0)?;
        Ok(fan_out)
    }

    /// What Postgres says of its commits.
    fn durability(&self) -> anyhow::Result<String> {
        let mut conn = self.runtime.block_on(self.sandbox.connect())?;
        let settings = "SELECT format('Postgres: fsync %s, synchronous_commit %s.', current_setting('fsync'), \
                        current_setting('synchronous_commit'))";
        Ok(self.runtime.block_on(sqlx::query_scalar(settings).fetch_one(&mut conn))?)
    }

    fn round(&self, number: usize) -> anyhow::Result<Round> {
        if number.is_multiple_of(2) {
            let (bare, bare_looks) = (self.bare(number + 1)?, self.bare_looks()?);
            Ok(Round { rotation: self.rotation(number + 1)?, looks: self.looks()?, bare, bare_looks })
        } else {
            let (rotation, looks) = (self.rotation(number + 1)?, self.looks()?);
            Ok(Round { rotation, looks, bare: self.bare(number + 1)?, bare_looks: self.bare_looks()? })
        }
    }

    /// Rotates the account, and waits until every Secret has followed.
    fn rotation(&self, number: usize) -> anyhow::Result<Pass> {
        let soon = self.bare_took.get();
        self.pass(|| {
            // Always of the same length.
            let rotation = json!({"password": format!("password-{number:06}")});
            let since = self.clock()?;
            self.call("PATCH", &format!("/v1/registry-accounts/{ACCOUNT}"), &rotation)?;
            self.wait(soon, IN_ORDER, since)
        })
    }

    /// Has every Secret looked at, none of which needs anything.
    fn looks(&self) -> anyhow::Result<Pass> {
        let soon = self.bare_looks_took.get();
        self.pass(|| {
            let since = self.clock()?;
            let poked = self.call("POST", &format!("/v1/pull-secrets/{}/sync", self.name), &Value::Null)?;
            ensure!(poked["status"]["desired"] == self.namespaces.len(), "{poked}");
            self.wait(soon, LOOKED_AT, since)
        })
    }

    fn pass(&self, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Pass> {
        let postgres = || self.sandbox.postgres.as_ref().map_or(Ok(Duration::ZERO), Postgres::cpu_time);
        let (cpu, of_postgres, begin) = (self.server.cpu_time()?, postgres()?, Instant::now());
        work()?;
        let seconds = begin.elapsed().as_secs_f64();
        let each = |spent: Duration| spent.as_secs_f64() * 1e6 / float(self.namespaces.len());
        let cpu = each(self.server.cpu_time()?.saturating_sub(cpu));
        Ok(Pass { seconds, cpu, postgres_cpu: each(postgres()?.saturating_sub(of_postgres)) })
    }

    /// The clock of the database.
    fn clock(&self) -> anyhow::Result<DateTime<Utc>> {
        self.runtime.block_on(async {
            let mut conn = self.sandbox.connect().await?;
            Ok(sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&mut conn).await?)
        })
    }

    /// Waits until the database says that it is so: asked often, but not before most of the time is over that it takes at least, because
    /// to ask costs what is measured.
    fn wait(&self, soon: Duration, is_done: &'static str, since: DateTime<Utc>) -> anyhow::Result<()> {
        self.runtime.block_on(async {
            let mut conn = self.sandbox.connect().await?;
            let started = Instant::now();
            tokio::time::sleep(soon.mul_f64(0.8)).await;
            while !is_it(&mut conn, is_done, since).await? {
                if started.elapsed() > PATIENCE {
                    bail!("the fan-out does not come to an end");
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        })
    }

    /// The bare loop: the same Secret, with a name of its own.
    fn bare(&self, number: usize) -> anyhow::Result<Pass> {
        let secret = self.runtime.block_on(self.cluster.template(&self.namespaces[0], &self.name, number))?;
        let params = PatchParams::apply("regcred").force();
        let pass = self.bare_pass(&async |secrets: Api<Secret>, namespace: &str| {
            let mut secret = secret.clone();
            secret.metadata.namespace = Some(namespace.to_owned());
            secrets.patch(&self.bare_name(), &params, &Patch::Apply(&secret)).await?;
            Ok(())
        })?;
        self.bare_took.set(Duration::from_secs_f64(pass.seconds));
        Ok(pass)
    }

    fn bare_looks(&self) -> anyhow::Result<Pass> {
        let pass = self.bare_pass(&async |secrets: Api<Secret>, _: &str| {
            secrets.get_metadata(&self.bare_name()).await?;
            Ok(())
        })?;
        self.bare_looks_took.set(Duration::from_secs_f64(pass.seconds));
        Ok(pass)
    }

    fn bare_name(&self) -> String {
        bare_name(&self.name)
    }

    fn bare_pass(&self, one: &impl AsyncFn(Api<Secret>, &str) -> anyhow::Result<()>) -> anyhow::Result<Pass> {
        let (cpu, begin) = (own_cpu_time()?, Instant::now());
        self.runtime.block_on(
            stream::iter(self.namespaces)
                .map(|namespace| one(Api::namespaced(self.cluster.client.clone(), namespace), namespace.as_str()))
                .buffer_unordered(CONCURRENCY)
                .try_collect::<()>(),
        )?;
        let seconds = begin.elapsed().as_secs_f64();
        let cpu = own_cpu_time()?.saturating_sub(cpu).as_secs_f64() * 1e6 / float(self.namespaces.len());
        Ok(Pass { seconds, cpu, postgres_cpu: 0.0 })
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = load::request(method, path, Some(&self.key), &body);
        let (status, answer) = load::once(self.server.address, &request)?;
        ensure!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        Ok(serde_json::from_str(&answer)?)
    }
}

/// Nothing is to be done any more. The time counts for nothing here.
const IN_ORDER: &str = "SELECT $1::timestamptz IS NOT NULL AND NOT EXISTS \
                        (SELECT FROM pull_secret_targets WHERE state <> 'synced')";
/// Every target was looked at since then.
const LOOKED_AT: &str = "SELECT NOT EXISTS (SELECT FROM pull_secret_targets WHERE last_synced_at < $1)";

async fn is_it(conn: &mut PgConnection, query: &'static str, since: DateTime<Utc>) -> anyhow::Result<bool> {
    Ok(sqlx::query_scalar(query).bind(since).fetch_one(conn).await?)
}

fn bare_name(name: &str) -> String {
    // As long as that of regcred's.
    name.replacen("pull", "bare", 1)
}

/// The API server of `dev/with-services`.
struct Cluster {
    client: Client,
    server: String,
    ca: String,
    token: String,
}

impl Cluster {
    fn of_services(runtime: &Runtime) -> anyhow::Result<Self> {
        let given = |name: &str| {
            std::env::var(name).with_context(|| format!("{name} is not set: run this with dev/with-services"))
        };
        // As the program does it; who was first does not matter.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (server, token) = (given("REGCRED_TEST_KUBE_SERVER")?, given("REGCRED_TEST_KUBE_ADMIN_TOKEN")?);
        let ca = fs::read_to_string(PathBuf::from(given("REGCRED_TEST_KUBE_DIR")?).join("ca.crt"))?;
        let mut config = Config::new(server.parse()?);
        let certificate = CaCertificate::parse(&ca).map_err(|invalid| anyhow::anyhow!("the CA {invalid}"))?;
        config.root_cert = Some(certificate.as_der().map(<[u8]>::to_vec).collect());
        config.auth_info.token = Some(token.as_str().into());
        config.default_retry = false;
        let _runtime = runtime.enter();
        Ok(Self { client: Client::try_from(config)?, server, ca, token })
    }

    fn registration(&self) -> Value {
        let auth = json!({"type": "token", "token": self.token});
        json!({"name": "dev", "server": self.server, "caCertificate": self.ca, "auth": auth})
    }

    async fn make_namespaces(&self, names: &[String]) -> anyhow::Result<()> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let namespaces = &namespaces;
        stream::iter(names)
            .map(|name| async move {
                let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
                let namespace = Namespace { metadata, ..Namespace::default() };
                namespaces.create(&PostParams::default(), &namespace).await.map(|_| ())
            })
            .buffer_unordered(CONCURRENCY)
            .try_collect::<()>()
            .await?;
        Ok(())
    }

    /// What the bare loop applies: what regcred wrote, and a label as long as regcred's, which no watch of regcred's looks at.
    async fn template(&self, namespace: &str, name: &str, number: usize) -> anyhow::Result<Secret> {
        let written = Api::<Secret>::namespaced(self.client.clone(), namespace).get(name).await?;
        let labels = written.metadata.labels.context("no labels")?;
        let labels =
            labels.into_iter().map(|(key, value)| (key.replace(ID_LABEL, &ID_LABEL.replace("-id", "-no")), value));
        let metadata = ObjectMeta {
            name: Some(bare_name(name)),
            labels: Some(labels.collect()),
            // Other than before each time, as it is with regcred.
            annotations: Some(BTreeMap::from([(GENERATION_ANNOTATION.to_owned(), number.to_string())])),
            ..ObjectMeta::default()
        };
        Ok(Secret { metadata, data: written.data, type_: written.type_, ..Secret::default() })
    }
}

/// Targets in the database of [`queue`]: in order, in 10 clusters, of 1,000 pull secrets.
const QUEUED: usize = 100_000;
const FILL: [&str; 4] = [
    "INSERT INTO clusters (id, name, auth_type)
     SELECT gen_random_uuid(), 'cluster-' || number, 'inCluster' FROM generate_series(0, 9) AS number",
    "INSERT INTO pull_secrets (id, name, declaration)
     SELECT gen_random_uuid(), 'pull-' || number, '{}' FROM generate_series(1, 1000) AS number",
    "INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation, applied_generation, state,
         last_synced_at, pending_since, next_attempt_at, uid, resource_version, content_mac)
     SELECT pull_secrets.id, clusters.id, 'namespace-' || number, 1, 1, 'synced', now(), NULL,
         now() + random() * interval '600 seconds' + interval '1 hour', gen_random_uuid()::text, number::text,
         decode(repeat('00', 32), 'hex')
     FROM pull_secrets
     JOIN clusters ON clusters.name = 'cluster-' || split_part(pull_secrets.name, '-', 2)::integer % 10,
     generate_series(1, 100) AS number",
    "VACUUM ANALYZE pull_secret_targets",
];
/// What is claimed and stored at a time.
const BATCH: usize = 50;
/// Connections that claim and store beside each other, each for clusters of its own.
const LANES: usize = 5;
const LEASE: Duration = Duration::from_secs(30);
const LOOKING: Duration = Duration::from_secs(3);

/// What the queue costs by itself, with 100,000 targets that are in order: a look that finds nothing due, and then a pass over all of
/// them, claimed and stored in batches, as the worker does it but for the calls to the cluster.
fn queue(runtime: &Runtime, goals: &mut Goals) -> anyhow::Result<()> {
    progress("filling a queue with 100,000 targets");
    let sandbox = Sandbox::new()?;
    sandbox.prepare()?;
    let mut conn = runtime.block_on(sandbox.connect())?;
    let clusters: Vec<Uuid> = runtime.block_on(async {
        for statement in FILL {
            sqlx::query(statement).execute(&mut conn).await?;
        }
        sqlx::query_scalar("SELECT id FROM clusters ORDER BY id").fetch_all(&mut conn).await
    })?;
    progress("looking at a queue with nothing due");
    let (mut looks, begin) = (0, Instant::now());
    while begin.elapsed() < LOOKING {
        let due = runtime.block_on(targets::due_clusters(&mut conn))?;
        ensure!(due.is_empty(), "something is due");
        looks += 1;
    }
    let looks = float(looks) / begin.elapsed().as_secs_f64();
    let mut passes = Vec::new();
    for number in 0..3 {
        progress(&format!("claiming and storing 100,000 targets, pass {} of 3", number + 1));
        runtime.block_on(sqlx::query("UPDATE pull_secret_targets SET next_attempt_at = now()").execute(&mut conn))?;
        let begin = Instant::now();
        let lanes = clusters.chunks(clusters.len().div_ceil(LANES)).map(|clusters| pass(&sandbox, clusters));
        let done: usize = runtime.block_on(futures_util::future::try_join_all(lanes))?.into_iter().sum();
        ensure!(done == QUEUED, "only {done} were claimed");
        passes.push(float(done) / begin.elapsed().as_secs_f64());
    }
    let passes: Rounds = passes.into_iter().collect();
    let [median, spread] = passes.spread(0);
    table(
        "The queue by itself, with 100,000 targets that are in order",
        &[
            row(["", "a second", "spread"]),
            row(["looks that find nothing due, on one connection", &format!("{looks:.0}"), ""]),
            row([&format!("targets claimed and stored, {BATCH} at a time, on {LANES} connections"), &median, &spread]),
        ],
    )?;
    goals.at_least("the queue: targets claimed and stored a second", 20_000.0, passes.median());
    Ok(())
}

/// Claims and stores all that is due in these clusters; how many.
async fn pass(sandbox: &Sandbox, clusters: &[Uuid]) -> anyhow::Result<usize> {
    let mut conn = sandbox.connect().await?;
    let mut done = 0;
    for cluster in clusters {
        loop {
            let claimed = targets::claim(&mut conn, *cluster, i64::try_from(BATCH)?, LEASE).await?;
            if claimed.is_empty() {
                break;
            }
            let in_order: Vec<Settlement> = claimed.iter().map(in_order).collect();
            let results: Vec<(&ClaimedTarget, &Settlement)> = claimed.iter().zip(&in_order).collect();
            done += targets::settle(&mut conn, *cluster, &results).await?.len();
        }
    }
    Ok(done)
}

fn in_order(target: &ClaimedTarget) -> Settlement {
    Settlement {
        state: TargetState::Synced,
        applied: Some((target.generation, 1)),
        written: target.written.clone(),
        attached: Vec::new(),
        error: None,
        again_after: Duration::from_mins(10),
    }
}
