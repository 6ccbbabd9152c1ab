//! Copies of secrets in the memory of a service, found by a scan of all its writable pages.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Read, Seek, SeekFrom},
    net::TcpListener,
};

use memchr::memmem::Finder;
use regcred::{
    app::{App, Listeners, Role},
    config::{Reader, variable},
    shutdown::Signals,
};
use serde_json::json;
use sqlx::{ConnectOptions, PgPool};

use crate::{
    leaks::Canary,
    pull_secrets::{Broker, declaration, put},
    support::{
        client::Client,
        eventually, kubernetes,
        process::{Installation, Service},
        registry,
    },
};

/// Variable that makes [`service_to_scan`] run.
const SCANNED: &str = "REGCRED_TEST_SCANNED";

/// Runs the service in a process that another test scans. The program itself makes its memory
/// unreadable for other processes of its user.
#[test]
#[ignore = "another test runs it"]
fn service_to_scan() {
    if variable(SCANNED).is_none() {
        return;
    }
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = Reader::new(&variable).serve().expect("a good configuration");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let signals = Signals::listen().expect("signals");
        let api = TcpListener::bind("127.0.0.1:0").expect("a port");
        let app = App::build(config, Listeners { api, operations: None }, Role::All).await.expect("the app builds");
        eprintln!("{}", json!({"message": "server started", "address": app.address}));
        app.run(signals).await.expect("the app runs");
    });
}

async fn serve(installation: &Installation) -> Service {
    let program = env::current_exe().expect("this program");
    let arguments = ["memory::service_to_scan", "--exact", "--ignored", "--nocapture"];
    Service::of(installation.spawn_program(program, &arguments)).await
}

/// Counts the copies of a canary in the writable memory of a process, by encoding.
fn copies(process: u32, canary: &Canary) -> BTreeMap<&'static str, usize> {
    let needles = canary.needles.iter();
    let finders: Vec<_> = needles.map(|(encoding, needle)| (*encoding, Finder::new(needle.as_bytes()))).collect();
    let mut memory = fs::File::open(format!("/proc/{process}/mem")).expect("readable memory");
    let mut found = BTreeMap::new();
    for mapping in fs::read_to_string(format!("/proc/{process}/maps")).expect("the process lives").lines() {
        let words: Vec<&str> = mapping.split_whitespace().collect();
        if !words[1].starts_with("rw") {
            continue;
        }
        let (start, end) = words[0].split_once('-').expect("a range");
        let [start, end] = [start, end].map(|address| u64::from_str_radix(address, 16).expect("an address"));
        let mut bytes = Vec::new();
        memory.seek(SeekFrom::Start(start)).expect("an address");
        // Ends early at memory that was unmapped meanwhile.
        let _ = memory.by_ref().take(end - start).read_to_end(&mut bytes);
        for (encoding, finder) in &finders {
            let count = finder.find_iter(&bytes).count();
            if count > 0 {
                *found.entry(*encoding).or_default() += count;
            }
        }
    }
    found
}

/// Sends the password by every route that takes or delivers one.
async fn use_password(client: &Client, password: &str, broker: &Broker) {
    let namespace = kubernetes::new_namespace().await;
    let registry = registry::a();
    client.post("/v1/clusters", &kubernetes::FIRST.registration("dev", &broker.auth())).await.expect(201);
    for number in 0..20 {
        let name = format!("a{number}");
        let body =
            json!({"name": name, "registry": format!("r{number}.example.com"), "username": "u", "password": "old"});
        client.post("/v1/registry-accounts", &body).await.expect(201);
        let path = format!("/v1/registry-accounts/{name}");
        client.patch(&path, &json!({"password": password})).await.expect(200);
        let body = json!({"name": format!("b{number}"), "registry": registry.address, "username": "u", "password": password, "plainHttp": true});
        client.post("/v1/registry-accounts", &body).await.expect(201);
        let verified = client.post(&format!("/v1/registry-accounts/b{number}/verify"), &json!({})).await.expect(200);
        assert_eq!(verified["result"], "invalid", "{verified}");
        for format in ["json", "base64", "document"] {
            let body = json!({"accounts": [name], "format": format});
            assert_eq!(client.post("/v1/docker-configs", &body).await.status, 200);
        }
        let document = json!({"auths": {format!("i{number}.example.com"): {"username": "u", "password": password}}});
        client.post("/v1/registry-accounts:import", &document).await.expect(200);
        let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
        client.post(&path, &json!({"name": format!("s{number}"), "accounts": [name]})).await.expect(201);
    }
    put(client, "team-a", &declaration(&["a1"], "dev", &[&namespace])).await.expect(201);
}

/// The exceptions are in docs/THREAT-MODEL.md. The longest-lived one, rendered documents, ends within
/// seconds.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn password_is_in_memory_only_while_it_is_used(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let installation = installation.with(SCANNED, "1").with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8");
    let service = serve(&installation).await;
    let client = service.client(&installation.new_key("admin").await);
    let broker = Broker::new().await;
    let (_, canary) = Canary::random("password");
    let password = canary.needles[0].1.clone();

    use_password(&client, &password, &broker).await;

    let process = service.process.id();
    // The cached client of the cluster has its token: the scan finds what is there.
    let signature = broker.token.rsplit('.').next().expect("a signature");
    assert!(!copies(process, &Canary::new("token", signature)).is_empty());
    eventually("no copy of the password is left", async || copies(process, &canary).is_empty().then_some(())).await;
}
