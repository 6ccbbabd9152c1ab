//! Rotations in thousands of namespaces, compared with a bare loop that applies the same Secrets
//! through `kube` with the same concurrency: `make bench-fanout`, or `make bench-fanout ARGS='300
//! 1000'` for other sizes.
//!
//! Runs the real program against the kube-apiserver of `dev/with-services` and a Postgres with
//! durable commits. etcd does not sync for either side, so the disk is not measured.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt, future, stream};
use k8s_openapi::{
    api::core::v1::{Namespace, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    core::PartialObjectMeta,
    runtime::watcher,
};
use regcred::{
    domain::{
        cluster::CaCertificate,
        pull_secret::{GENERATION_ANNOTATION, ID_LABEL, TargetState},
        reconcile::{Applied, ClusterHealth, ReconcileOutcome, SecretAction},
    },
    storage::{
        PgConnection,
        targets::queue::{self, ClaimedTarget},
    },
};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, task::JoinHandle};
use uuid::Uuid;

use crate::{
    load,
    process::{Postgres, Server, cores, own_cpu_time},
    report::{Goals, Rounds, float, progress, row, table},
    sandbox::{ACCOUNT, Sandbox, register},
};

/// Selects this benchmark.
pub const ARGUMENT: &str = "--fanout";

const SIZES: [usize; 2] = [1_000, 5_000];
/// Even, since every other round reverses the order.
const ROUNDS: usize = 6;
/// regcred's own default.
const CONCURRENCY: usize = 16;
/// Time limit of a fan-out.
const PATIENCE: Duration = Duration::from_mins(5);

/// Measures fan-outs of the given sizes, or of the default ones.
pub fn run(arguments: &[String]) -> anyhow::Result<()> {
    // `cargo bench` passes `--bench`.
    let sizes = arguments.iter().filter(|argument| !argument.starts_with("--"));
    let mut sizes = sizes.map(|size| size.parse()).collect::<Result<Vec<usize>, _>>().context("a size is a number")?;
    if sizes.is_empty() {
        sizes = SIZES.to_vec();
    }
    sizes.sort_unstable();
    let mut goals = Goals::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cores()).enable_all().build()?;
    fan_outs(&runtime, &sizes, &mut goals)?;
    measure_queue(&runtime, &mut goals)?;
    goals.print()
}

fn fan_outs(runtime: &Runtime, sizes: &[usize], goals: &mut Goals) -> anyhow::Result<()> {
    let cluster = Cluster::of_services(runtime)?;
    let largest = sizes.last().copied().unwrap_or_default();
    progress(&format!("creating {largest} namespaces"));
    let namespaces: Vec<String> = (0..largest).map(|number| format!("fanout-{number:06}")).collect();
    runtime.block_on(cluster.make_namespaces(&namespaces))?;

    let mut rows = vec![row([
        "",
        "seconds",
        "a second",
        "of bare",
        "spread",
        "of watched",
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
            let [took, bare, watched] = [&round.rotation, &round.bare, &round.watched].map(|pass| pass.seconds);
            progress(&format!("  {took:.2} s, the bare loop {bare:.2} s, and with a watch {watched:.2} s"));
            rounds.push(round);
        }
        let of = |figure: fn(&Round) -> f64| rounds.iter().map(figure).collect::<Rounds>();
        let bare_ratios = of(|round| round.bare.seconds / round.rotation.seconds);
        let watched_ratios = of(|round| round.watched.seconds / round.rotation.seconds);
        let ([ratio, spread], [of_watched, watched_spread]) = (bare_ratios.spread(2), watched_ratios.spread(2));
        let median = |figure: fn(&Round) -> f64, digits: usize| format!("{:.digits$}", of(figure).median());
        let (resident, peak) = (fan_out.server.resident_mib()?, fan_out.server.peak_mib()?);
        rows.push(vec![
            format!("a rotation in {size} namespaces"),
            median(|round| round.rotation.seconds, 2),
            format!("{:.0}", float(size) / of(|round| round.rotation.seconds).median()),
            ratio,
            spread,
            of_watched,
            watched_spread,
            median(|round| round.rotation.cpu, 0),
            median(|round| round.bare.cpu, 0),
            median(|round| round.rotation.postgres_cpu, 0),
            format!("{resident:.1}"),
            format!("{peak:.1}"),
        ]);
        let [ratio, spread] = of(|round| round.bare_reads.seconds / round.recheck.seconds).spread(2);
        rows.push(vec![
            format!("a recheck of {size} synced Secrets"),
            median(|round| round.recheck.seconds, 2),
            format!("{:.0}", float(size) / of(|round| round.recheck.seconds).median()),
            ratio,
            spread,
            String::new(),
            String::new(),
            median(|round| round.recheck.cpu, 0),
            median(|round| round.bare_reads.cpu, 0),
            median(|round| round.recheck.postgres_cpu, 0),
        ]);
        let name = format!("a rotation in {size} namespaces");
        goals.at_least(&format!("{name}: of the bare loop's rate"), 0.75, bare_ratios.median());
        goals.at_least(&format!("{name}: of the rate of a bare loop that is watched"), 0.9, watched_ratios.median());
        goals.at_most(&format!("{name}: µs of regcred's CPU for each"), 300.0, of(|round| round.rotation.cpu).median());
        memory.push(peak);
    }
    table(
        &format!(
            "A rotation, from the call to the last synced target, compared with a bare loop that applies the same Secrets, \
             {CONCURRENCY} at a time, and with one whose Secrets are watched, as regcred's are; then a recheck of all synced \
             Secrets, compared with a bare loop of GETs. CPU per Secret. {durable}"
        ),
        &rows,
    )?;
    if let [first, .., last] = memory[..] {
        goals.at_most("memory: additional MiB of peak for the most namespaces", 8.0, last - first);
    }
    Ok(())
}

/// Cost of one pass over all namespaces.
struct Pass {
    seconds: f64,
    /// CPU time per Secret in microseconds, of regcred or of the bare loop.
    cpu: f64,
    postgres_cpu: f64,
}

/// A rotation and a recheck by regcred, each with its bare loop.
struct Round {
    rotation: Pass,
    bare: Pass,
    /// A bare loop while its Secrets are watched.
    watched: Pass,
    recheck: Pass,
    bare_reads: Pass,
}

/// A regcred with one pull secret in all namespaces, and the Secrets of the bare loop next to its
/// own.
struct FanOut<'a> {
    runtime: &'a Runtime,
    cluster: &'a Cluster,
    namespaces: &'a [String],
    // Dropped before the database.
    server: Server,
    sandbox: Sandbox,
    key: String,
    name: String,
    /// Durations of the last bare loops.
    bare_took: Cell<Duration>,
    bare_reads_took: Cell<Duration>,
}

impl<'a> FanOut<'a> {
    fn begin(runtime: &'a Runtime, cluster: &'a Cluster, namespaces: &'a [String]) -> anyhow::Result<Self> {
        progress(&format!("declaring a pull secret in {} namespaces", namespaces.len()));
        let sandbox = Sandbox::new()?;
        let key = sandbox.prepare()?;
        let server = sandbox.serve()?;
        register(&server, &key)?;
        let name = format!("pull-{}", namespaces.len());
        let (bare_took, bare_reads_took) = (Cell::default(), Cell::default());
        let fan_out = Self { runtime, cluster, namespaces, server, sandbox, key, name, bare_took, bare_reads_took };
        fan_out.call("POST", "/v1/clusters", &cluster.registration())?;
        let declaration = json!({
            "accounts": [ACCOUNT],
            "secret": {"name": fan_out.name, "type": "kubernetes.io/dockerconfigjson"},
            "targets": [{"cluster": "dev", "namespaces": namespaces}],
            "serviceAccounts": [], "deletionPolicy": "retain", "adopt": false,
        });
        fan_out.call("PUT", &format!("/v1/pull-secrets/{}", fan_out.name), &declaration)?;
        fan_out.wait(Duration::ZERO, SYNCED, fan_out.clock()?)?;
        fan_out.bare(0)?;
        // Warm-up.
        fan_out.rotation(0)?;
        Ok(fan_out)
    }

    /// Durability settings of Postgres.
    fn durability(&self) -> anyhow::Result<String> {
        let mut conn = self.runtime.block_on(self.sandbox.connect())?;
        let settings = "SELECT format('Postgres: fsync %s, synchronous_commit %s.', current_setting('fsync'), \
                        current_setting('synchronous_commit'))";
        Ok(self.runtime.block_on(sqlx::query_scalar(settings).fetch_one(&mut conn))?)
    }

    fn round(&self, number: usize) -> anyhow::Result<Round> {
        if number.is_multiple_of(2) {
            let (bare, watched, bare_reads) = self.bare_passes(number)?;
            let (rotation, recheck) = (self.rotation(number + 1)?, self.recheck()?);
            Ok(Round { rotation, bare, watched, recheck, bare_reads })
        } else {
            let (rotation, recheck) = (self.rotation(number + 1)?, self.recheck()?);
            let (bare, watched, bare_reads) = self.bare_passes(number)?;
            Ok(Round { rotation, bare, watched, recheck, bare_reads })
        }
    }

    fn bare_passes(&self, number: usize) -> anyhow::Result<(Pass, Pass, Pass)> {
        let bare = self.bare(2 * number + 1)?;
        let watch = self.watch()?;
        let watched = self.bare(2 * number + 2)?;
        watch.abort();
        Ok((bare, watched, self.bare_reads()?))
    }

    /// Watches the Secrets of the bare loop as regcred watches its own. Returns once the first list
    /// is read.
    fn watch(&self) -> anyhow::Result<JoinHandle<()>> {
        let secrets = Api::<PartialObjectMeta<Secret>>::all(self.cluster.client.clone());
        let config = watcher::Config::default().labels(&bare_label());
        let mut events = watcher(secrets, config).boxed();
        self.runtime.block_on(async {
            while let Some(event) = events.next().await {
                if matches!(event?, watcher::Event::InitDone) {
                    break;
                }
            }
            anyhow::Ok(())
        })?;
        Ok(self.runtime.spawn(events.for_each(|_| future::ready(()))))
    }

    /// Rotates the account and waits until every Secret is synced.
    fn rotation(&self, number: usize) -> anyhow::Result<Pass> {
        let soon = self.bare_took.get();
        self.pass(|| {
            // Of constant length.
            let rotation = json!({"password": format!("password-{number:06}")});
            let since = self.clock()?;
            self.call("PATCH", &format!("/v1/registry-accounts/{ACCOUNT}"), &rotation)?;
            self.wait(soon, SYNCED, since)
        })
    }

    /// Rechecks every Secret. All are synced.
    fn recheck(&self) -> anyhow::Result<Pass> {
        let soon = self.bare_reads_took.get();
        self.pass(|| {
            let since = self.clock()?;
            let synced = self.call("POST", &format!("/v1/pull-secrets/{}/sync", self.name), &Value::Null)?;
            ensure!(synced["status"]["desired"] == self.namespaces.len(), "{synced}");
            self.wait(soon, RECHECKED, since)
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

    /// Reads the clock of the database.
    fn clock(&self) -> anyhow::Result<DateTime<Utc>> {
        self.runtime.block_on(async {
            let mut conn = self.sandbox.connect().await?;
            Ok(sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&mut conn).await?)
        })
    }

    /// Polls the database until `is_done`. Starts after most of the minimum duration `soon`, since
    /// polling costs what is measured.
    fn wait(&self, soon: Duration, is_done: &'static str, since: DateTime<Utc>) -> anyhow::Result<()> {
        self.runtime.block_on(async {
            let mut conn = self.sandbox.connect().await?;
            let started = Instant::now();
            tokio::time::sleep(soon.mul_f64(0.8)).await;
            while !is_it(&mut conn, is_done, since).await? {
                if started.elapsed() > PATIENCE {
                    bail!("the fan-out timed out");
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        })
    }

    /// Applies the same Secrets under another name in a bare loop.
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

    fn bare_reads(&self) -> anyhow::Result<Pass> {
        let pass = self.bare_pass(&async |secrets: Api<Secret>, _: &str| {
            secrets.get_metadata(&self.bare_name()).await?;
            Ok(())
        })?;
        self.bare_reads_took.set(Duration::from_secs_f64(pass.seconds));
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

/// Whether all targets are synced. Ignores the time.
const SYNCED: &str = "SELECT $1::timestamptz IS NOT NULL AND NOT EXISTS \
                        (SELECT FROM pull_secret_targets WHERE state <> 'synced')";
/// Whether every target was reconciled since then.
const RECHECKED: &str = "SELECT NOT EXISTS (SELECT FROM pull_secret_targets WHERE last_synced_at < $1)";

async fn is_it(conn: &mut PgConnection, query: &'static str, since: DateTime<Utc>) -> anyhow::Result<bool> {
    Ok(sqlx::query_scalar(query).bind(since).fetch_one(conn).await?)
}

fn bare_name(name: &str) -> String {
    // As long as regcred's name.
    name.replacen("pull", "bare", 1)
}

/// Label of the bare loop's Secrets, as long as regcred's.
fn bare_label() -> String {
    ID_LABEL.replace("-id", "-no")
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
        // As the program does. An earlier installation is fine.
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

    /// Builds the Secret of the bare loop: regcred's content, with a label of equal length that
    /// regcred does not watch.
    async fn template(&self, namespace: &str, name: &str, number: usize) -> anyhow::Result<Secret> {
        let written = Api::<Secret>::namespaced(self.client.clone(), namespace).get(name).await?;
        let labels = written.metadata.labels.context("no labels")?;
        let labels = labels.into_iter().map(|(key, value)| (key.replace(ID_LABEL, &bare_label()), value));
        let metadata = ObjectMeta {
            name: Some(bare_name(name)),
            labels: Some(labels.collect()),
            // Changes each time, as with regcred.
            annotations: Some(BTreeMap::from([(GENERATION_ANNOTATION.to_owned(), number.to_string())])),
            ..ObjectMeta::default()
        };
        Ok(Secret { metadata, data: written.data, type_: written.type_, ..Secret::default() })
    }
}

/// Targets of [`measure_queue`]: synced, in 10 clusters, of 1,000 pull secrets.
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
/// Targets per claim.
const BATCH: usize = 50;
/// Concurrent connections, each with its own clusters.
const LANES: usize = 5;
const LEASE: Duration = Duration::from_secs(30);
const POLLING: Duration = Duration::from_secs(3);

/// Measures the queue alone, with 100,000 synced targets: polls that find nothing due, then a pass
/// that claims and records all of them in batches, as the worker does without the calls to the
/// cluster.
fn measure_queue(runtime: &Runtime, goals: &mut Goals) -> anyhow::Result<()> {
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
    progress("polling a queue with nothing due");
    let (mut polls, begin) = (0, Instant::now());
    while begin.elapsed() < POLLING {
        let due = runtime.block_on(queue::due_clusters(&mut conn))?;
        ensure!(due.is_empty(), "a target is due");
        polls += 1;
    }
    let polls = float(polls) / begin.elapsed().as_secs_f64();
    let mut passes = Vec::new();
    for number in 0..3 {
        progress(&format!("claiming and recording 100,000 targets, pass {} of 3", number + 1));
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
        "The queue alone, with 100,000 synced targets",
        &[
            row(["", "a second", "spread"]),
            row(["polls that find nothing due, on one connection", &format!("{polls:.0}"), ""]),
            row([
                &format!("targets claimed and recorded, {BATCH} at a time, on {LANES} connections"),
                &median,
                &spread,
            ]),
        ],
    )?;
    goals.at_least("the queue: targets claimed and recorded per second", 20_000.0, passes.median());
    Ok(())
}

/// Claims and records all due targets of clusters. Returns their number.
async fn pass(sandbox: &Sandbox, clusters: &[Uuid]) -> anyhow::Result<usize> {
    let mut conn = sandbox.connect().await?;
    let mut done = 0;
    for cluster in clusters {
        loop {
            let claimed = queue::claim(&mut conn, *cluster, i64::try_from(BATCH)?, LEASE).await?;
            if claimed.is_empty() {
                break;
            }
            let outcomes: Vec<ReconcileOutcome> = claimed.iter().map(synced).collect();
            let results: Vec<(&ClaimedTarget, &ReconcileOutcome)> = claimed.iter().zip(&outcomes).collect();
            done += queue::record_results(&mut conn, &results).await?.len();
        }
    }
    Ok(done)
}

fn synced(target: &ClaimedTarget) -> ReconcileOutcome {
    ReconcileOutcome {
        action: SecretAction::Rotated,
        state: TargetState::Synced,
        applied: Some(Applied { generation: target.generation, version: 1 }),
        written: target.written.clone(),
        attached: Vec::new(),
        error: None,
        requeue_after: Duration::from_mins(10),
        cluster: ClusterHealth::Reachable,
    }
}
