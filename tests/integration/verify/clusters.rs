//! The guard for clusters: private networks are allowed by default, metadata services never.

use std::{net::IpAddr, sync::Arc};

use regcred::{
    clients::{
        cluster::{AccessReviews, ClusterClient, ClusterClientConfig, ClusterError, admit},
        outbound::Guard,
    },
    domain::cluster::{ClusterAuth, ClusterConnection},
};
use serde_json::json;
use sqlx::PgPool;

use super::{
    attacks::names,
    listening::{Trap, answer, serve},
};
use crate::support::{app::TestApp, given, kubernetes};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cluster_at_a_forbidden_address_is_not_called(pool: PgPool) {
    let (trap, app) = (Trap::set(), TestApp::spawn(pool).await);
    let trapped = |host: &str| format!("http://{host}:{}", trap.port);
    for (number, (server, words)) in [
        ("http://169.254.169.254".to_owned(), "metadata"),
        ("http://169.254.1.1".to_owned(), "link-local"),
        ("http://100.100.100.200".to_owned(), "metadata"),
        ("http://224.0.0.1".to_owned(), "multicast"),
        ("http://198.18.0.1".to_owned(), "reserved"),
        ("http://8.8.8.8:22".to_owned(), "port"),
        (trapped("0.0.0.0"), "unspecified"),
        (trapped("[::ffff:127.0.0.2]"), "IPv4"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("a{number}");
        let body = json!({"name": name, "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
        app.admin().post("/v1/clusters", &body).await.expect(201);
        let found = app.admin().post(&format!("/v1/clusters/{name}/check"), &json!({})).await.expect(200);
        assert_eq!(found["reachable"], false, "{server}");
        assert!(found["problem"]["detail"].as_str().is_some_and(|detail| detail.contains(words)), "{server}: {found}");
    }
    assert_eq!(trap.caught(), 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn configuration_restricts_addresses_of_clusters(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_CLUSTER_ALLOW", "10.0.0.0/8")]).await;
    app.register_cluster("dev").await;
    let found = app.admin().post("/v1/clusters/dev/check", &json!({})).await.expect(200);
    assert_eq!(found["reachable"], false);
    assert!(found["problem"]["detail"].as_str().is_some_and(|detail| detail.contains("loopback")), "{found}");
}

#[tokio::test]
async fn cluster_is_called_at_the_admitted_address_by_its_name() {
    let (address, requests) = serve(|_| answer("200 OK", &[], r#"{"gitVersion":"v1.20.2"}"#));
    let guard = Guard::with_resolver("127.0.0.1".parse().expect("a list"), Arc::new(names()));
    let server = format!("http://registry.example:{}", address.port());
    let admitted = admit(&guard, &server).await.expect("it is admitted");
    assert_eq!(admitted, ["127.0.0.1".parse::<IpAddr>().expect("an address")]);
    // The system's resolver does not know the name.
    let connection = ClusterConnection::new(Some(&server), None, None, ClusterAuth::None, true).expect("a connection");
    let client = ClusterClient::connect_at(&connection, admitted.first().copied(), &ClusterClientConfig::default())
        .expect("a client");
    assert!(client.is_at(&admitted) && !client.is_at(&["127.0.0.2".parse().expect("an address")]));
    assert_eq!(
        client.check(&mut AccessReviews::default(), &[]).await.expect("a result").version.as_deref(),
        Some("v1.20.2")
    );
    assert!(requests.text().contains(&format!("host: registry.example:{}\r\n", address.port())), "{}", requests.text());

    let inner = admit(&guard, "http://inner.example:6443").await;
    assert!(matches!(inner, Err(ClusterError::Misconfigured { .. })), "{inner:?}");
    let nowhere = admit(&guard, "https://nowhere.example:6443").await;
    assert!(matches!(nowhere, Err(ClusterError::Unreachable { .. })), "{nowhere:?}");
    assert_eq!(admit(&guard, "https://127.0.0.1:6443").await, Ok(Vec::new()));
}

#[tokio::test]
async fn certificate_must_be_valid_for_the_name_not_the_address() {
    let port = kubernetes::server().rsplit(':').next().expect("a port").to_owned();
    let ca = kubernetes::file("ca.crt");
    let token = || ClusterAuth::Token { token: given("REGCRED_TEST_KUBE_ADMIN_TOKEN").into() };
    let address = "127.0.0.1".parse().ok();
    for (host, given_name, is_good) in
        [("localhost", None, true), ("other.example", None, false), ("other.example", Some("localhost"), true)]
    {
        let server = format!("https://{host}:{port}");
        let connection =
            ClusterConnection::new(Some(&server), Some(&ca), given_name, token(), false).expect("a connection");
        let client =
            ClusterClient::connect_at(&connection, address, &ClusterClientConfig::default()).expect("a client");
        let found = client.check(&mut AccessReviews::default(), &[]).await.expect("a result");
        assert_eq!(found.reachable, is_good, "{host}: {found:?}");
    }
}
