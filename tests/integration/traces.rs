//! Traces over OTLP, received by a collector of the test.

use std::{
    collections::{BTreeSet, HashMap},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::any_value,
    trace::v1::{Span, span::SpanKind},
};
use parking_lot::Mutex;
use prost::Message;
use serde_json::json;
use sqlx::{ConnectOptions, PgPool};

use crate::{
    pull_secrets::{declaration, put},
    support::{
        client::Client,
        eventually,
        files::TempDir,
        kubernetes::{self, FIRST},
        listener::{listen, read_request, refusing_server},
        process::{Installation, Service},
    },
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";
const PASSWORD: &str = "canary-of-a-password";
const ROTATED: &str = "canary-of-a-rotated-password";
const QUERY: &str = "canary-of-a-query";
const HEADER: &str = "canary-of-a-header";
/// Token for the collector.
const HEADERS: &str = "canary-of-the-collector";

/// Collector that keeps the bodies of `POST /v1/traces`.
#[derive(Default)]
struct Collector {
    bodies: Mutex<Vec<Vec<u8>>>,
    authorizations: Mutex<BTreeSet<String>>,
}

impl Collector {
    fn start() -> (Arc<Self>, SocketAddr) {
        let collector = Arc::new(Self::default());
        let receiver = Arc::clone(&collector);
        (collector, listen(move |stream| receiver.receive(&stream)))
    }

    fn receive(&self, mut stream: &TcpStream) {
        let (mut request, mut chunk) = (Vec::new(), [0; 8192]);
        let end = loop {
            if let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            match stream.read(&mut chunk) {
                Ok(count @ 1..) => request.extend_from_slice(&chunk[..count]),
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
        assert!(head.starts_with("post /v1/traces "), "{head}");
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).expect("a length");
        let mut body = request.split_off(end);
        let received = body.len();
        body.resize(length, 0);
        stream.read_exact(&mut body[received..]).expect("the body");
        let authorization = head.lines().find_map(|line| line.strip_prefix("authorization: "));
        self.authorizations.lock().extend(authorization.map(str::to_owned));
        self.bodies.lock().push(body);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }

    /// Headers `Authorization`, in lower case.
    fn authorizations(&self) -> BTreeSet<String> {
        self.authorizations.lock().clone()
    }

    /// All spans so far.
    fn spans(&self) -> Vec<Span> {
        let bodies = self.bodies.lock();
        let requests = bodies.iter().map(|body| ExportTraceServiceRequest::decode(&body[..]).expect("a request"));
        let scopes = requests.flat_map(|request| request.resource_spans).flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }

    /// All spans of the caller's trace so far.
    fn traced(&self) -> Vec<Span> {
        self.spans().into_iter().filter(|span| hex(&span.trace_id) == TRACE).collect()
    }

    /// Fails if a text was exported.
    fn assert_lacks(&self, canaries: &[&str]) {
        let everything = self.bodies.lock().concat();
        for canary in canaries {
            let is_found = everything.windows(canary.len()).any(|window| window == canary.as_bytes());
            assert!(!is_found, "exported: {}…", &canary[..6]);
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

fn attribute(span: &Span, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        any_value::Value::IntValue(number) => Some(number.to_string()),
        _ => None,
    }
}

fn traceparent() -> String {
    format!("00-{TRACE}-{PARENT}-01")
}

/// An installation that exports to this address.
fn installation(pool: &PgPool, collector: &str) -> Installation {
    Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        .with("OTEL_BSP_SCHEDULE_DELAY", "100")
        // Only log lines are filtered.
        .with("REGCRED_LOG_FILTER", "warn,regcred::cli=info")
}

/// Registers the cluster `dev` and the account `ghcr`.
async fn register(client: &Client) {
    let token = FIRST.given("ADMIN_TOKEN");
    let cluster = FIRST.registration("dev", &json!({"type": "token", "token": token}));
    client.post("/v1/clusters", &cluster).await.expect(201);
    let account = json!({"name": "ghcr", "registry": "ghcr.io", "username": "robot", "password": PASSWORD});
    client.post("/v1/registry-accounts", &account).await.expect(201);
}

#[sqlx::test(migrations = false)]
async fn trace_of_a_caller_reaches_from_the_request_to_postgres_and_the_cluster(pool: PgPool) {
    let (collector, address) = Collector::start();
    let installation = installation(&pool, &format!("http://{address}"));
    let folder = TempDir::new();
    let headers = folder.write("headers", format!("Authorization=Bearer%20{HEADERS}\n"));
    let installation = installation.with("OTEL_EXPORTER_OTLP_HEADERS_FILE", headers.to_str().expect("UTF-8"));
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let client = service.client(&key);
    register(&client).await;
    let namespace = kubernetes::new_namespace().await;
    let secret = json!({"name": "pull", "accounts": ["ghcr"]});
    let account = json!({"password": ROTATED});

    let traced = |method, path: &str| client.request(method, path).header("traceparent", traceparent());
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    client.send(traced("POST", &path).json(&secret)).await.expect(201);
    client.send(traced("PATCH", "/v1/registry-accounts/ghcr").json(&account)).await.expect(200);
    let unknown = traced("GET", &format!("/v1/me?token={QUERY}")).header("x-api-token", HEADER);
    client.send(unknown).await;

    let spans = eventually("three requests are exported", async || {
        let spans = collector.traced();
        (spans.iter().filter(|span| span.name == "request").count() == 3).then_some(spans)
    })
    .await;
    let by_id: HashMap<&[u8], &Span> = spans.iter().map(|span| (&span.span_id[..], span)).collect();
    for span in &spans {
        let mut root = span;
        while let Some(parent) = by_id.get(&root.parent_span_id[..]) {
            root = parent;
        }
        assert_eq!((root.name.as_str(), hex(&root.parent_span_id)), ("request", PARENT.to_owned()), "{span:?}");
    }
    for name in ["cluster.create_secret", "cluster.call", "db.registry_accounts.update"] {
        assert!(spans.iter().any(|span| span.name == name), "{name}: {:?}", names(&spans));
    }
    for span in &spans {
        let kind = match span.name.as_str() {
            "request" => SpanKind::Server,
            name if name == "cluster.call" || name.starts_with("db.") => SpanKind::Client,
            _ => SpanKind::Internal,
        };
        assert_eq!(span.kind(), kind, "{}", span.name);
    }
    let call = spans.iter().find(|span| span.name == "cluster.call").expect("a call");
    assert_eq!(attribute(call, "server").as_deref(), Some(FIRST.server().as_str()));
    let route = Some("/v1/registry-accounts/{name}");
    let request = spans.iter().find(|span| attribute(span, "http.route").as_deref() == route).expect("a route");
    assert_eq!(attribute(request, "http.request.method").as_deref(), Some("PATCH"));
    assert_eq!(attribute(request, "http.response.status_code").as_deref(), Some("200"));
    let (_, secret_of_key) = key.rsplit_once('_').expect("parts");
    let token = FIRST.given("ADMIN_TOKEN");
    collector.assert_lacks(&[PASSWORD, ROTATED, QUERY, HEADER, HEADERS, &token, secret_of_key]);
    assert_eq!(collector.authorizations(), BTreeSet::from([format!("bearer {HEADERS}")]));
}

fn names(spans: &[Span]) -> Vec<&str> {
    spans.iter().map(|span| span.name.as_str()).collect()
}

#[sqlx::test(migrations = false)]
async fn attempts_of_another_process_are_linked_to_the_rotation(pool: PgPool) {
    let (collector, address) = Collector::start();
    let installation = installation(&pool, &format!("http://{address}"));
    let service = Service::of(installation.spawn(&["serve", "--migrate", "--no-worker"])).await;
    let _worker = Service::of(installation.spawn(&["worker"])).await;
    let client = service.client(&installation.new_key("admin").await);
    register(&client).await;
    let namespaces = [kubernetes::new_namespace().await, kubernetes::new_namespace().await];
    let declared = declaration(&["ghcr"], "dev", &namespaces.each_ref().map(String::as_str));
    put(&client, "team-a", &declared).await.expect(201);

    let rotate = client.request("PATCH", "/v1/registry-accounts/ghcr").header("traceparent", traceparent());
    client.send(rotate.json(&json!({"password": ROTATED}))).await.expect(200);

    let attempts = eventually("both attempts are exported", async || {
        let linked =
            collector.spans().into_iter().filter(|span| span.links.iter().any(|link| hex(&link.trace_id) == TRACE));
        let linked: Vec<Span> = linked.collect();
        (linked.len() == 2).then_some(linked)
    })
    .await;
    let request = eventually("the rotation is exported", async || {
        collector.traced().into_iter().find(|span| span.name == "request")
    })
    .await;
    let of = |key: &str| attempts.iter().map(|span| attribute(span, key).unwrap_or_default()).collect::<BTreeSet<_>>();
    assert_eq!(of("namespace"), namespaces.iter().cloned().collect());
    assert_eq!(of("action"), BTreeSet::from(["rotated".to_owned()]));
    for attempt in &attempts {
        assert_eq!((attempt.name.as_str(), attempt.parent_span_id.len()), ("reconcile", 0), "{attempt:?}");
        assert_ne!(hex(&attempt.trace_id), TRACE);
        assert!(attempt.links.iter().all(|link| link.span_id == request.span_id), "{attempt:?}");
    }
    let calls = collector.spans().into_iter().filter(|span| span.name == "cluster.call");
    let traces: BTreeSet<Vec<u8>> = attempts.iter().map(|span| span.trace_id.clone()).collect();
    assert_eq!(traces.len(), 2);
    assert!(calls.map(|call| call.trace_id).collect::<BTreeSet<_>>().is_superset(&traces));
    // Polls of the worker start no trace.
    let roots = collector.spans().into_iter().filter(|span| span.parent_span_id.is_empty());
    let roots: BTreeSet<String> = roots.map(|span| span.name).collect();
    assert_eq!(roots, BTreeSet::from(["reconcile".to_owned(), "request".to_owned()]));
    collector.assert_lacks(&[PASSWORD, ROTATED, &FIRST.given("ADMIN_TOKEN")]);
}

#[sqlx::test(migrations = false)]
async fn hanging_collector_delays_neither_requests_nor_shutdown(pool: PgPool) {
    let exports = Arc::new(AtomicUsize::new(0));
    let received = Arc::clone(&exports);
    let address = listen(move |stream| {
        read_request(&stream);
        received.fetch_add(1, Ordering::SeqCst);
        // Until the client closes the connection.
        read_request(&stream);
    });
    let service = installation(&pool, &format!("http://{address}")).serve().await;
    service.anonymous().get("/v1/me").await.problem(401, "unauthenticated");
    eventually("an export hangs", async || (exports.load(Ordering::SeqCst) > 0).then_some(())).await;

    let asked = Instant::now();
    for _ in 0..20 {
        service.anonymous().get("/v1/me").await.problem(401, "unauthenticated");
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    let stopped = Instant::now();
    service.process.signal("TERM");

    assert_eq!(service.process.wait().await.code, Some(0));
    assert!(stopped.elapsed() < Duration::from_secs(9), "{:?}", stopped.elapsed());
}

#[sqlx::test(migrations = false)]
async fn failed_export_is_logged_without_the_collectors_address(pool: PgPool) {
    let service = installation(&pool, &refusing_server()).serve().await;

    service.anonymous().get("/v1/me").await.problem(401, "unauthenticated");

    let warning = eventually("the failure is logged", async || {
        let stderr = service.process.stderr();
        stderr.lines().find(|line| line.contains("traces not exported")).map(str::to_owned)
    })
    .await;
    assert!(!warning.contains("127.0.0.1"), "{warning}");
    service.process.signal("TERM");
    assert_eq!(service.process.wait().await.code, Some(0));
}

#[sqlx::test(migrations = false)]
async fn invalid_address_of_a_collector_is_a_configuration_error(pool: PgPool) {
    let exit = installation(&pool, "not a URL").run(&["serve", "--migrate"]).await;

    assert_eq!(exit.code, Some(64), "{exit:?}");
    assert!(exit.stderr.contains("OTEL_EXPORTER_OTLP_ENDPOINT"), "{exit:?}");
}
