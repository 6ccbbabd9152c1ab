//! Hostile registries cannot make the check call internal addresses. One internal address is
//! allowed, as for a registry in a private network; all others have a trap.

use std::{
    collections::HashMap,
    future::Future,
    io::{self, Write},
    net::{IpAddr, TcpStream},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use regcred::{
    clients::{
        outbound::{Guard, Resolve},
        registry::{RegistryClient, RegistryClientConfig},
    },
    domain::verification::{VerificationReport, VerificationResult::*},
};
use rstest::rstest;

use super::{
    listening::{Requests, Trap, answer, bearer, serve},
    registries::Attempt,
};
use crate::support::listener::{listen, read_request};

const PASSWORD: &str = "canary-password";

/// Resolver with scripted answers: each lookup of a name returns the next one, and the last one
/// repeatedly.
#[derive(Default)]
pub struct Names {
    answers: HashMap<&'static str, Vec<Vec<IpAddr>>>,
    lookups: Mutex<HashMap<String, usize>>,
}

impl Names {
    fn with(mut self, name: &'static str, answers: &[&[&str]]) -> Self {
        let parse = |addresses: &&[&str]| addresses.iter().map(|address| address.parse().expect("usable")).collect();
        self.answers.insert(name, answers.iter().map(parse).collect());
        self
    }

    fn lookups(&self, name: &str) -> usize {
        self.lookups.lock().expect("usable").get(name).copied().unwrap_or_default()
    }
}

impl Resolve for Names {
    fn resolve<'a>(&'a self, host: &'a str) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>> {
        let mut lookups = self.lookups.lock().expect("usable");
        let count = lookups.entry(host.to_owned()).or_default();
        let answers = self.answers.get(host);
        let answer = answers.and_then(|answers| answers.get((*count).min(answers.len() - 1)).cloned());
        *count += 1;
        Box::pin(async { answer.ok_or_else(|| io::ErrorKind::NotFound.into()) })
    }
}

pub fn names() -> Names {
    Names::default()
        .with("inner.example", &[&["127.0.0.2"]])
        .with("inner6.example", &[&["::1"]])
        .with("localhost", &[&["127.0.0.2", "::1"]])
        .with("mixed.example", &[&["8.8.8.8", "127.0.0.2"]])
        .with("mapped.example", &[&["::ffff:127.0.0.2"]])
        .with("metadata.example", &[&["169.254.169.254"]])
        .with("metadata6.example", &[&["fd00:ec2::254"]])
        .with("outside.example", &[&["8.8.8.8"]])
        .with("registry.example", &[&["127.0.0.1"]])
        .with("ghcr.io", &[&["127.0.0.1"]])
}

fn client_with(names: Arc<Names>, timeout: Duration) -> RegistryClient {
    let guard = Guard::with_resolver("127.0.0.1".parse().expect("usable"), names);
    RegistryClient::new(
        guard,
        RegistryClientConfig { timeout, connect_timeout: timeout, ..RegistryClientConfig::default() },
    )
}

pub fn client() -> RegistryClient {
    client_with(Arc::new(names()), Duration::from_secs(10))
}

async fn verify(registry: &(impl ToString + ?Sized), client: &RegistryClient) -> VerificationReport {
    Attempt::plain(registry, "martin", PASSWORD).verify(client, None).await
}

#[rstest]
#[case::metadata("http://169.254.169.254/latest/meta-data/iam/")]
#[case::metadata_of_containers("http://169.254.170.2/v2/credentials")]
#[case::metadata_v6("http://[fd00:ec2::254]/latest/")]
#[case::metadata_of_alibaba("http://100.100.100.200/")]
#[case::metadata_of_azure("http://168.63.129.16/")]
#[case::metadata_by_name("http://metadata.example/computeMetadata/v1/")]
#[case::metadata_v6_by_name("http://metadata6.example/")]
#[case::loopback("http://127.0.0.2:{trap}/token")]
#[case::other_loopback("http://127.0.0.3:{trap}/token")]
#[case::loopback_v6("http://[::1]:{trap}/token")]
#[case::loopback_by_name("http://inner.example:{trap}/token")]
#[case::loopback_v6_by_name("http://inner6.example:{trap}/token")]
#[case::localhost("http://localhost:{trap}/token")]
#[case::localhost_dot("http://localhost.:{trap}/token")]
#[case::one_good_address_of_two("http://mixed.example:{trap}/token")]
#[case::decimal("http://2130706434:{trap}/token")]
#[case::octal("http://0177.0.0.2:{trap}/token")]
#[case::hexadecimal("http://0x7f000002:{trap}/token")]
#[case::hexadecimal_parts("http://0x7f.0.0.2:{trap}/token")]
#[case::short("http://127.2:{trap}/token")]
#[case::overflowing("http://4294967298:{trap}/token")]
#[case::leading_zeros("http://127.0.0.002:{trap}/token")]
#[case::percent_encoded("http://127.0.0.%32:{trap}/token")]
#[case::mapped("http://[::ffff:127.0.0.2]:{trap}/token")]
#[case::mapped_hexadecimal("http://[::ffff:7f00:2]:{trap}/token")]
#[case::mapped_and_allowed("http://[::ffff:7f00:1]:{trap}/token")]
#[case::mapped_by_name("http://mapped.example:{trap}/token")]
#[case::compatible("http://[::7f00:2]:{trap}/token")]
#[case::nat64("http://[64:ff9b::7f00:2]:{trap}/token")]
#[case::six_to_four("http://[2002:7f00:2::]:{trap}/token")]
#[case::teredo("http://[2001::1]:{trap}/token")]
#[case::long_v6("http://[0:0:0:0:0:0:0:1]:{trap}/token")]
#[case::link_local_v6("http://[fe80::1]:{trap}/token")]
#[case::zone("http://[fe80::1%25lo]:{trap}/token")]
#[case::unique_local("http://[fd12:3456::1]:{trap}/token")]
#[case::multicast_v6("http://[ff02::1]:{trap}/token")]
#[case::unspecified("http://0.0.0.0:{trap}/token")]
#[case::unspecified_v6("http://[::]:{trap}/token")]
#[case::private_10("http://10.0.0.1/token")]
#[case::private_172("http://172.16.0.1/token")]
#[case::private_192("http://192.168.0.1/token")]
#[case::carrier("http://100.64.0.1/token")]
#[case::multicast("http://224.0.0.1/token")]
#[case::broadcast("http://255.255.255.255/token")]
#[case::benchmark("http://198.18.0.1/token")]
#[case::user("http://martin@127.0.0.1:{front}/token")]
#[case::user_and_password("http://martin:secret@127.0.0.1:{front}/token")]
#[case::host_as_user("http://registry.example@127.0.0.2:{trap}/token")]
#[case::host_as_user_with_backslash("http://registry.example\\\\@127.0.0.2:{trap}/token")]
#[case::fragment("http://127.0.0.1:{front}/token#@127.0.0.2:{trap}")]
#[case::file("file:///etc/passwd")]
#[case::ftp("ftp://127.0.0.1:{front}/token")]
#[case::gopher("gopher://127.0.0.2:{trap}/_GET%20/")]
#[case::data("data:application/json,%7B%22token%22:%22x%22%7D")]
#[case::unix_socket("unix:///var/run/docker.sock")]
#[case::script("javascript:alert(1)")]
#[case::relative("/token")]
#[case::without_scheme("//127.0.0.2:{trap}/token")]
#[case::without_slashes("http:127.0.0.2:{trap}/token")]
#[case::space("http://127.0.0.1:{front}/to ken")]
#[case::empty_host("http:///token")]
#[case::port_zero("http://127.0.0.1:0/token")]
#[case::port_of_ssh("http://outside.example:22/token")]
#[case::port_of_redis("http://outside.example:6379/token")]
#[case::port_of_the_kubelet("http://outside.example:10250/token")]
#[tokio::test]
async fn realm_at_a_forbidden_address_is_not_called(#[case] realm: &str) {
    let trap = Trap::set();
    let realm = realm.replace("{trap}", &trap.port.to_string());
    let requested = realm.clone();
    let (registry, requests) = serve(move |request| {
        // `{front}` is this server, whose address is allowed. The URL itself must be refused.
        let host = request.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or_default();
        bearer(&realm.replace("{front}", host.rsplit(':').next().unwrap_or_default()))
    });
    let start = Instant::now();
    let found = verify(&registry, &client()).await;
    assert_eq!(found.result, Refused, "{requested}: {found:?}");
    assert!(start.elapsed() < Duration::from_secs(5), "a connection was attempted");
    assert_eq!((trap.caught(), requests.count()), (0, 1), "{requested}");
    assert_reveals_nothing(&found, &requests, &requested);
}

/// Asserts that the result contains no text of the attacker, and that the attacker received no
/// login.
fn assert_reveals_nothing(found: &VerificationReport, requests: &Requests, written: &str) {
    let host = written.split("://").nth(1).and_then(|rest| rest.split(['/', ':']).next()).unwrap_or_default();
    assert!(host.len() < 4 || !found.detail.contains(host), "{found:?}");
    assert!(!found.detail.contains("canary"), "{found:?}");
    assert!(!requests.text().to_ascii_lowercase().contains("authorization"), "{}", requests.text());
}

#[rstest]
#[case::loopback("127.0.0.2:{trap}")]
#[case::loopback_v6("[::1]:{trap}")]
#[case::by_name("inner.example:{trap}")]
#[case::by_name_v6("inner6.example:{trap}")]
#[case::localhost("localhost:{trap}")]
#[case::mixed("mixed.example:{trap}")]
#[case::hexadecimal("0x7f000002:{trap}")]
#[case::mapped("[::ffff:7f00:2]:{trap}")]
#[case::metadata("169.254.169.254")]
#[case::metadata_by_name("metadata.example")]
#[case::private("10.1.2.3:5000")]
#[case::ssh("outside.example:22")]
#[tokio::test]
async fn registry_at_a_forbidden_address_is_not_called(#[case] registry: &str) {
    let trap = Trap::set();
    let found = verify(&registry.replace("{trap}", &trap.port.to_string()), &client()).await;
    assert_eq!((found.result, trap.caught()), (Refused, 0), "{found:?}");
}

#[tokio::test]
async fn registry_name_cannot_be_rebound_after_the_guard() {
    let trap = Trap::set();
    let (registry, requests) = serve(|request| {
        if request.contains("authorization: Basic") {
            answer("200 OK", &[("Connection", "close")], "{}")
        } else {
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "")
        }
    });
    // First an admitted address, then a forbidden one with the same port.
    let names = Arc::new(names().with("rebind.example", &[&["127.0.0.1"], &["127.0.0.2"]]));
    let client = client_with(Arc::clone(&names), Duration::from_secs(10));
    let found = verify(&format!("rebind.example:{}", registry.port()), &client).await;
    assert_eq!((found.result, requests.count(), names.lookups("rebind.example")), (Valid, 2, 1), "{found:?}");

    // The next check uses the new address.
    let found = verify(&format!("rebind.example:{}", trap.port), &client).await;
    assert_eq!((found.result, trap.caught()), (Refused, 0), "{found:?}");
}

#[tokio::test]
async fn realm_name_cannot_be_rebound_after_the_guard() {
    let trap = Trap::set();
    let (tokens, asked) = serve(|_| answer("401 Unauthorized", &[], ""));
    let realm = format!("http://rebind.example:{}/token", tokens.port());
    let (registry, _) = serve(move |_| bearer(&realm));
    let names = Arc::new(names().with("rebind.example", &[&["127.0.0.1"], &["127.0.0.2"]]));
    let found = verify(&registry, &client_with(Arc::clone(&names), Duration::from_secs(10))).await;
    assert_eq!((found.result, names.lookups("rebind.example"), trap.caught()), (Invalid, 1, 0), "{found:?}");
    assert!(asked.count() > 0);
}

#[rstest]
#[case::moved("301 Moved Permanently")]
#[case::found("302 Found")]
#[case::other("303 See Other")]
#[case::temporary("307 Temporary Redirect")]
#[case::permanent("308 Permanent Redirect")]
#[tokio::test]
async fn redirect_is_not_followed(#[case] status: &'static str) {
    let trap = Trap::set();
    let location = format!("http://127.0.0.2:{}/latest/meta-data", trap.port);
    let there = location.clone();
    let (registry, _) = serve(move |_| answer(status, &[("Location", &there)], ""));
    let found = verify(&registry, &client()).await;
    assert_eq!((found.result, trap.caught()), (NotARegistry, 0), "{found:?}");

    // A redirect in response to a login, from the registry and from its token service.
    let there = location.clone();
    let (registry, _) = serve(move |request| {
        if request.contains("authorization") {
            answer(status, &[("Location", &there)], "")
        } else {
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "")
        }
    });
    let found = verify(&registry, &client()).await;
    assert_eq!((found.result, trap.caught()), (NotARegistry, 0), "{found:?}");

    let (tokens, _) = serve(move |_| answer(status, &[("Location", &location)], ""));
    let (registry, _) = serve(move |_| bearer(&format!("http://{tokens}/token")));
    let found = verify(&registry, &client()).await;
    assert_eq!((found.result, trap.caught()), (NotARegistry, 0), "{found:?}");
}

/// Starts a server that reads a request and then runs `act`. Returns its address and the number of
/// bytes sent.
fn hostile(act: impl Fn(&mut dyn FnMut(&[u8]) -> bool) + Send + Sync + 'static) -> (String, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&taken);
    let address = listen(move |stream: TcpStream| {
        read_request(&stream);
        let mut stream = stream;
        act(&mut |bytes| {
            let is_written = stream.write_all(bytes).is_ok();
            counter.fetch_add(if is_written { bytes.len() } else { 0 }, Ordering::SeqCst);
            is_written
        });
    });
    (address.to_string(), taken)
}

/// Writes `bytes` repeatedly, up to `limit`, while the client reads.
fn endless(write: &mut dyn FnMut(&[u8]) -> bool, bytes: &[u8], limit: usize) {
    for _ in 0..limit / bytes.len() {
        if !write(bytes) {
            return;
        }
    }
}

const GIGABYTE: usize = 1 << 30;

#[rstest]
#[case::announced("HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")]
#[case::chunked("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\n")]
#[case::until_the_end("HTTP/1.0 200 OK\r\n\r\n")]
#[tokio::test]
async fn response_of_a_gigabyte_is_aborted(#[case] head: &'static str) {
    let (registry, taken) = hostile(move |write| {
        write(head.as_bytes());
        endless(write, &vec![b'x'; 65_536], GIGABYTE);
    });
    let start = Instant::now();
    let found = verify(&registry, &client()).await;
    assert!(matches!(found.result, NotARegistry | Unreachable), "{found:?}");
    assert!(start.elapsed() < Duration::from_secs(5) && taken.load(Ordering::SeqCst) < 64 << 20, "{taken:?}");
}

#[rstest]
#[case::many(b"X-Canary: canary-upstream\r\n".to_vec())]
#[case::long(vec![b'x'; 65_536])]
#[tokio::test]
async fn endless_headers_are_aborted(#[case] line: Vec<u8>) {
    let (registry, taken) = hostile(move |write| {
        write(b"HTTP/1.1 401 Unauthorized\r\nX-First: ");
        endless(write, &line, GIGABYTE);
    });
    let start = Instant::now();
    let found = verify(&registry, &client()).await;
    assert_eq!(found.result, Unreachable, "{found:?}");
    assert!(start.elapsed() < Duration::from_secs(5) && taken.load(Ordering::SeqCst) < 64 << 20, "{taken:?}");
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[tokio::test]
async fn too_many_headers_are_refused() {
    let (registry, _) = serve(|_| {
        let headers = "X-Canary: canary-upstream\r\n".repeat(80);
        format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: 2\r\n\r\n{{}}").into_bytes()
    });
    assert_eq!(verify(&registry, &client()).await.result, Unreachable);
}

/// With a timeout of one second, no kind of slow response takes much longer.
#[rstest]
#[case::nothing("", "")]
#[case::slow_head("HTTP/1.1 200 OK\r\n", "X-Slow: x\r\n")]
#[case::slow_body("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", " ")]
#[case::slow_chunks("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n")]
#[case::endless_early_hints("", "HTTP/1.1 103 Early Hints\r\n\r\n")]
#[case::endless_continue("", "HTTP/1.1 100 Continue\r\n\r\n")]
#[tokio::test]
async fn slow_response_is_aborted(#[case] head: &'static str, #[case] drop: &'static str) {
    let (registry, _) = hostile(move |write| {
        write(head.as_bytes());
        for _ in 0..300 {
            if !drop.is_empty() && !write(drop.as_bytes()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let start = Instant::now();
    let found = verify(&registry, &client_with(Arc::new(names()), Duration::from_secs(1))).await;
    assert_eq!(found.result, Unreachable, "{found:?}");
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[tokio::test]
async fn check_has_one_deadline_for_all_its_requests() {
    let (tokens, _) = serve(|_| {
        std::thread::sleep(Duration::from_millis(700));
        answer("200 OK", &[], r#"{"token":"x"}"#)
    });
    let (registry, _) = serve(move |_| bearer(&format!("http://{tokens}/token")));
    let start = Instant::now();
    let found = verify(&registry, &client_with(Arc::new(names()), Duration::from_secs(1))).await;
    assert_eq!(found.result, Unreachable, "{found:?}");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[rstest]
#[case::gzip_bomb(&[("Content-Encoding", "gzip")], "\u{1f}\u{8b}canary")]
#[case::no_json(&[], "canary-upstream")]
#[case::deep_json(&[], "DEEP")]
#[case::no_token(&[], "{}")]
#[case::lines_in_a_token(&[], r#"{"token":"x\r\nX-Canary: canary-upstream"}"#)]
#[case::a_number(&[], r#"{"token":1}"#)]
#[tokio::test]
async fn invalid_token_is_not_used(
    #[case] headers: &'static [(&'static str, &'static str)],
    #[case] body: &'static str,
) {
    let body = if body == "DEEP" { "[".repeat(100_000) } else { body.to_owned() };
    let (tokens, _) = serve(move |_| answer("200 OK", headers, &body));
    let (registry, requests) = serve(move |_| bearer(&format!("http://{tokens}/token")));
    let found = verify(&registry, &client()).await;
    assert_eq!((found.result, requests.count()), (NotARegistry, 1), "{found:?}");
    assert!(!found.detail.contains("canary"), "{found:?}");
}

#[tokio::test]
async fn gzip_bomb_is_not_inflated() {
    // Compressed zeros, at a ratio of 1:1000, are counted as the bytes that arrive.
    let (registry, _) = hostile(|write| {
        write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n8000000\r\n");
        write(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]);
        endless(write, &vec![0; 65_536], 128 << 20);
    });
    assert_eq!(verify(&registry, &client()).await.result, NotARegistry);
}

#[rstest]
#[case::two_realms(r#"Bearer realm="http://127.0.0.1:1/",realm="http://127.0.0.2:{trap}/""#)]
#[case::no_end(r#"Bearer realm="http://127.0.0.2:{trap}/"#)]
#[case::no_realm("Bearer service=x")]
#[case::too_long("LONG")]
#[case::many_parameters("MANY")]
#[tokio::test]
async fn ambiguous_challenge_is_not_followed(#[case] challenge: &str) {
    let trap = Trap::set();
    let realm = format!("http://127.0.0.2:{}/", trap.port);
    let challenge = match challenge {
        "LONG" => format!(r#"Bearer realm="{realm}{}""#, "x".repeat(9000)),
        "MANY" => format!(r#"Bearer realm="{realm}"{}"#, ",x=y".repeat(100)),
        other => other.replace("{trap}", &trap.port.to_string()),
    };
    let (registry, requests) = serve(move |_| answer("401 Unauthorized", &[("WWW-Authenticate", &challenge)], ""));
    let found = verify(&registry, &client()).await;
    assert_eq!((found.result, trap.caught(), requests.count()), (NotARegistry, 0, 1), "{found:?}");
}

#[tokio::test]
async fn concurrent_checks_of_a_host_are_limited() {
    let now = Arc::new(AtomicUsize::new(0));
    let (counter, most) = (Arc::clone(&now), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&most);
    let (registry, _) = serve(move |_| {
        seen.fetch_max(counter.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(100));
        counter.fetch_sub(1, Ordering::SeqCst);
        answer("404 Not Found", &[], "")
    });
    let client = client();
    let attempts: Vec<Attempt> = (0..16).map(|_| Attempt::plain(&registry, "martin", PASSWORD)).collect();
    let found = futures_util::future::join_all(attempts.iter().map(|attempt| attempt.verify(&client, None))).await;
    assert!(found.iter().all(|found| found.result == NotARegistry), "{found:?}");
    assert_eq!(most.load(Ordering::SeqCst), RegistryClientConfig::default().checks_per_host);
}
