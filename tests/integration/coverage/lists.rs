//! Lists of an API server that fails, is overloaded, or has objects that are too long.

use std::sync::atomic::{AtomicUsize, Ordering};

use regcred::{
    clients::cluster::{ClusterClient, ClusterClientConfig, ClusterError, Pace, Place},
    domain::cluster::{ClusterAuth, ClusterConnection},
};
use rstest::rstest;
use serde_json::{Value, json};

use crate::verify::listening::{Requests, answer, serve};

/// Fast enough for tests.
const CALLS_PER_SECOND: u32 = 10_000;
/// Longer than a page may be.
const TOO_LONG: usize = 4 * 1024 * 1024 + 1;

fn ok(body: &Value) -> Vec<u8> {
    answer("200 OK", &[("Content-Type", "application/json")], &body.to_string())
}

fn failure(status: &str, token: &str) -> Vec<u8> {
    let status_object = json!({"kind": "Status", "status": "Failure", "metadata": {"continue": token}});
    answer(status, &[("Content-Type", "application/json")], &status_object.to_string())
}

/// A page with `ServiceAccount`s of these names.
fn page(names: &[&str], token: &str) -> Value {
    let items: Vec<Value> =
        names.iter().map(|name| json!({"metadata": {"name": name, "namespace": "team-a"}})).collect();
    json!({"metadata": {"continue": token}, "items": items})
}

/// Parameter of a request.
fn parameter<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let path = request.split(' ').nth(1)?;
    let (_, query) = path.split_once('?')?;
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Lists the `ServiceAccount`s of a server. Returns the names, the number of those that are too long, and
/// the requests.
async fn list(
    answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
) -> (Result<(Vec<String>, u32), ClusterError>, Requests) {
    let (server, requests) = serve(answer);
    let connection = ClusterConnection::new(Some(&format!("http://{server}")), None, None, ClusterAuth::None, true);
    let client = ClusterClient::connect(&connection.expect("a connection"), &ClusterClientConfig::default());
    let mut names = Vec::new();
    let pace = Pace::new(CALLS_PER_SECOND);
    let listed = client
        .expect("a client")
        .survey_service_accounts(Place::Cluster, &pace, |(_, name), _| names.push(name.to_string()))
        .await;
    (listed.map(|too_long| (names, too_long)), requests)
}

#[tokio::test]
async fn expired_list_is_continued_where_it_was() {
    let (listed, requests) = list(|request| match parameter(request, "continue") {
        None => ok(&page(&["a"], "old")),
        Some("old") => failure("410 Gone", "new"),
        Some("new") => ok(&page(&["b"], "")),
        Some(other) => panic!("continued at {other}"),
    })
    .await;

    assert_eq!(listed.expect("a list"), (vec!["a".to_owned(), "b".to_owned()], 0));
    assert_eq!(requests.count(), 3);
}

/// Without a new place, a part of the list would be missing.
#[tokio::test]
async fn expired_list_that_cannot_be_continued_is_an_error() {
    let (listed, _) = list(|request| match parameter(request, "continue") {
        None => ok(&page(&["a"], "old")),
        Some(_) => failure("410 Gone", ""),
    })
    .await;

    assert!(listed.is_err(), "{listed:?}");
}

#[rstest]
#[case::overloaded("429 Too Many Requests")]
#[case::broken("500 Internal Server Error")]
#[tokio::test]
async fn page_is_requested_again_after_a_failure(#[case] status: &'static str) {
    let failures = AtomicUsize::new(0);
    let (listed, requests) = list(move |request| match parameter(request, "continue") {
        None => ok(&page(&["a"], "next")),
        Some(_) if failures.fetch_add(1, Ordering::SeqCst) == 0 => failure(status, ""),
        Some(_) => ok(&page(&["b"], "")),
    })
    .await;

    assert_eq!(listed.expect("a list"), (vec!["a".to_owned(), "b".to_owned()], 0));
    assert_eq!(requests.count(), 3);
}

#[tokio::test]
async fn page_that_always_fails_ends_the_list() {
    let (listed, requests) = list(|_| failure("503 Service Unavailable", "")).await;

    assert!(listed.is_err_and(|error| error.is_transient()));
    assert_eq!(requests.count(), 3);
}

/// The page becomes shorter until it has one object, and then only the place of this object is asked
/// for.
#[tokio::test]
async fn object_that_is_longer_than_a_page_is_left_out() {
    let (listed, requests) = list(|request| {
        let limit: usize = parameter(request, "limit").and_then(|limit| limit.parse().ok()).expect("a limit");
        let is_metadata = request.to_ascii_lowercase().contains("as=partialobjectmetadatalist");
        match parameter(request, "continue") {
            None if limit > 1 => ok(&json!({"metadata": {}, "items": [], "padding": "x".repeat(TOO_LONG)})),
            None => ok(&page(&["a"], "long")),
            Some("long") if !is_metadata => ok(&json!({"metadata": {}, "items": [], "padding": "x".repeat(TOO_LONG)})),
            Some("long") => {
                assert_eq!(limit, 1);
                ok(&page(&["long"], "rest"))
            }
            Some(_) => {
                assert!(!is_metadata && limit > 1, "{request}");
                ok(&page(&["b", "c"], ""))
            }
        }
    })
    .await;

    assert_eq!(listed.expect("a list"), (vec!["a".to_owned(), "b".to_owned(), "c".to_owned()], 1));
    let limits: Vec<String> = requests
        .text()
        .lines()
        .filter(|line| line.starts_with("GET "))
        .filter_map(|line| parameter(line, "limit").map(str::to_owned))
        .collect();
    assert_eq!(limits, ["250", "62", "15", "3", "1", "2", "1", "1", "2"]);
}
