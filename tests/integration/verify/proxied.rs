//! Calls through the outbound proxy.

use std::{
    io::{Write, copy},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    thread,
};

use regcred::{
    clients::{
        outbound::{Guard, OutboundProxy},
        registry::{RegistryClient, RegistryClientConfig},
    },
    domain::verification::VerificationResult::{Invalid, Refused, Unreachable, Valid},
};
use rstest::rstest;
use secrecy::SecretString;
use serde_json::json;

use super::{
    attacks::names,
    certificates::Ca,
    command::{entry, installation, verify},
    listening::{Requests, answer, bearer, serve},
    registries::{Attempt, Setup, TestRegistry},
};
use crate::support::{
    files::TempDir,
    listener::{listen, read_request, refusing_server},
};

const USERS: &[(&str, &str)] = &[("martin", "secret")];
/// `dev:canary-proxy`
const AUTHORIZATION: &str = "Proxy-Authorization: Basic ZGV2OmNhbmFyeS1wcm94eQ==";

/// Starts a proxy that leads every tunnel to `destination`, as if that had the requested address.
fn proxy(destination: SocketAddr) -> (SocketAddr, Requests) {
    let requests = Requests::default();
    let recorded = requests.clone();
    let address = listen(move |mut client| {
        let head = read_request(&client);
        recorded.push(head.clone());
        if !head.contains(AUTHORIZATION) {
            let _ = client.write_all(&answer("407 Proxy Authentication Required", &[], "<html>"));
            return;
        }
        let server = TcpStream::connect(destination).expect("the destination");
        client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").expect("written");
        let (mut from, mut to) = (server.try_clone().expect("a stream"), client.try_clone().expect("a stream"));
        let down = thread::spawn(move || {
            let _ = copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
        let (mut client, mut server) = (client, server);
        let _ = copy(&mut client, &mut server);
        let _ = server.shutdown(Shutdown::Write);
        let _ = down.join();
    });
    (address, requests)
}

/// Client with this proxy that may also call the networks.
fn client(proxy: &str, networks: &str) -> RegistryClient {
    let proxy = OutboundProxy::parse(&SecretString::from(proxy)).expect("a proxy");
    let guard = Guard::with_resolver(networks.parse().expect("a list"), Arc::new(names()));
    RegistryClient::new(guard, RegistryClientConfig { proxy: Some(proxy), ..RegistryClientConfig::default() })
}

fn with_login(address: SocketAddr) -> String {
    format!("http://dev:canary-proxy@{address}")
}

#[tokio::test]
async fn public_address_is_called_through_the_proxy_and_verified_by_name() {
    let ca = Ca::new();
    let certificate = ca.certify_for("outside.example");
    let registry = TestRegistry::start(Setup { users: USERS, tls: Some(&certificate), ..Setup::default() }).await;
    let (address, requests) = proxy(registry.address);
    let client = client(&with_login(address), "");
    let attempt = |password| Attempt::tls("outside.example", Some(&ca.pem), "martin", password);

    let valid = attempt("secret").verify(&client, None).await;
    assert_eq!(valid.result, Valid, "{valid:?}");
    let wrong = attempt("other").verify(&client, None).await;
    assert_eq!(wrong.result, Invalid, "{wrong:?}");

    // The address that the guard admitted, not the name.
    let seen = requests.text();
    assert!(seen.starts_with("CONNECT 8.8.8.8:443 HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains(AUTHORIZATION) && !seen.contains("outside.example"), "{seen}");

    // The proxy cannot lead to another server: its certificate has another name.
    let certificate = ca.certify_for("other.example");
    let other = TestRegistry::start(Setup { users: USERS, tls: Some(&certificate), ..Setup::default() }).await;
    let (address, _) = proxy(other.address);
    let refused = attempt("secret").verify(&self::client(&with_login(address), ""), None).await;
    assert!(refused.result != Valid && refused.detail.contains("not valid for"), "{refused:?}");
    assert!(!other.log().contains("/v2/"), "{}", other.log());
}

#[tokio::test]
async fn allowed_inner_address_is_called_directly() {
    let registry = TestRegistry::start(Setup { users: USERS, ..Setup::default() }).await;
    let (address, requests) = proxy(registry.address);
    let client = client(&with_login(address), "127.0.0.1");
    let named = format!("registry.example:{}", registry.address.port());
    for registry in [named, registry.address.to_string()] {
        let found = Attempt::plain(&registry, "martin", "secret").verify(&client, None).await;
        assert_eq!(found.result, Valid, "{found:?}");
    }
    assert_eq!(requests.count(), 0, "{}", requests.text());
}

#[rstest]
#[case::metadata("metadata.example")]
#[case::metadata_v6("metadata6.example")]
#[case::metadata_address("169.254.169.254")]
#[case::loopback("inner.example:5000")]
#[case::one_inner_address_of_two("mixed.example:5000")]
#[case::private_address("10.0.0.1:5000")]
#[case::embedded("mapped.example:5000")]
#[tokio::test]
async fn forbidden_destination_never_reaches_the_proxy(#[case] registry: &str) {
    let (address, requests) = proxy("127.0.0.1:1".parse().expect("an address"));
    let found = Attempt::plain(registry, "martin", "secret").verify(&client(&with_login(address), ""), None).await;
    assert_eq!(found.result, Refused, "{found:?}");
    assert_eq!(requests.count(), 0, "{}", requests.text());
}

#[tokio::test]
async fn metadata_service_in_an_allowed_network_never_reaches_the_proxy() {
    let (address, requests) = proxy("127.0.0.1:1".parse().expect("an address"));
    let client = client(&with_login(address), "0.0.0.0/0,::/0");
    for registry in ["metadata.example", "169.254.169.254", "[fd00:ec2::254]:80"] {
        let found = Attempt::plain(registry, "martin", "secret").verify(&client, None).await;
        assert_eq!(found.result, Refused, "{found:?}");
    }
    assert_eq!(requests.count(), 0, "{}", requests.text());
}

#[tokio::test]
async fn token_service_that_a_proxied_registry_names_is_guarded() {
    let (registry, _) = serve(|_| bearer("http://inner.example:5000/token"));
    let (address, requests) = proxy(registry);
    let client = client(&with_login(address), "");
    let found = Attempt::plain("outside.example:5000", "martin", "secret").verify(&client, None).await;
    assert_eq!(found.result, Refused, "{found:?}");
    assert!(requests.count() > 0 && !requests.text().contains("127.0.0.2"), "{}", requests.text());
}

#[rstest]
#[case::credentials("407 Proxy Authentication Required", "does not accept regcred's credentials (407)")]
#[case::policy("403 Forbidden", "refused the connection (403)")]
#[case::no_route("502 Bad Gateway", "refused the connection (502)")]
#[tokio::test]
async fn refusal_of_the_proxy_is_named(#[case] status: &'static str, #[case] expected: &str) {
    let (address, requests) = serve(move |_| answer(status, &[], "canary-upstream"));
    let client = client(&with_login(address), "");
    let found = Attempt::plain("outside.example:5000", "martin", "secret").verify(&client, None).await;
    assert_eq!(found.result, Unreachable, "{found:?}");
    assert!(found.detail.contains(expected), "{found:?}");
    assert!(!found.detail.contains("canary") && requests.count() > 0, "{found:?}");
}

#[tokio::test]
async fn proxy_that_is_none_is_named() {
    let (address, _) = serve(|_| b"220 mail.example ESMTP\r\n\r\n".to_vec());
    let (early, _) = serve(|_| b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n".to_vec());
    for (proxy, expected) in [
        (with_login(address), "did not answer as an HTTP proxy"),
        (with_login(early), "did not answer as an HTTP proxy"),
        (refusing_server(), "does not accept connections"),
        ("http://absent.example:3128".to_owned(), "the host name of the outbound proxy cannot be resolved"),
    ] {
        let client = client(&proxy, "");
        let found = Attempt::plain("outside.example:5000", "martin", "secret").verify(&client, None).await;
        assert_eq!(found.result, Unreachable, "{found:?}");
        assert!(found.detail.contains(expected), "{found:?}");
    }
}

#[tokio::test]
async fn command_reads_the_proxy_from_a_file() {
    let registry = TestRegistry::start(Setup { users: USERS, ..Setup::default() }).await;
    let (address, requests) = proxy(registry.address);
    let folder = TempDir::new();
    let file = folder.write("proxy", with_login(address) + "\n");
    let installation = installation().with("REGCRED_OUTBOUND_PROXY_FILE", file.to_str().expect("UTF-8"));
    let config = json!({"auths": {"8.8.8.8:5000": entry("martin", "secret")}});

    let exit = verify(&installation, &config, &["--plain-http", "8.8.8.8:5000"]).await;

    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(requests.text().starts_with("CONNECT 8.8.8.8:5000 HTTP/1.1\r\n"), "{}", requests.text());
    // The log is at its most verbose level.
    assert!(!format!("{exit:?}").contains("canary-proxy") && !exit.stderr.contains("ZGV2OmNh"), "{exit:?}");
}
