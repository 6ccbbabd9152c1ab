//! `POST /v1/clusters/{name}/check`: what callers can make the API server do.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::join_all;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    support::{app::TestApp, client::Client},
    verify::listening::{Requests, answer, serve},
};

/// Registers an API server that answers access reviews with `review`.
async fn register(app: &TestApp, review: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Requests {
    let (address, requests) = serve(move |request| {
        if request.starts_with("GET /version ") {
            return answer("200 OK", &[], r#"{"gitVersion":"v1.36.0"}"#);
        }
        review()
    });
    let server = format!("http://{address}");
    let body = json!({"name": "dev", "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &body).await.expect(201);
    requests
}

fn allowed() -> Vec<u8> {
    let body = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {}, "spec": {},
        "status": {"allowed": true},
    });
    answer("201 Created", &[("Content-Type", "application/json")], &body.to_string())
}

async fn check(client: &Client) -> Value {
    client.post("/v1/clusters/dev/check", &json!({})).await.expect(200)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn concurrent_checks_of_a_cluster_share_their_reviews(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let requests = register(&app, allowed).await;
    let viewer = app.caller("dashboard", "viewer", None).await;

    let one = check(&viewer).await;
    assert_eq!((&one["reachable"], one["permissions"].as_array().map(Vec::len)), (&json!(true), Some(8)), "{one}");
    let of_one = requests.count();
    let all = join_all((0..60).map(|_| check(&viewer))).await;

    assert!(all.iter().all(|check| check["permissions"] == one["permissions"]));
    // Results are remembered for three seconds, and the test may take longer.
    assert!(requests.count() <= 5 * of_one, "{} requests instead of {of_one}", requests.count());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn reviews_of_a_cluster_are_limited_whatever_is_asked(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let requests = register(&app, allowed).await;
    let viewer = app.caller("dashboard", "viewer", None).await;

    // Each check asks for other namespaces, so none finds remembered results.
    let mut refused = None;
    for number in 0..40 {
        let namespaces: Vec<String> = (0..20).map(|one| format!("namespace=n-{number}-{one}")).collect();
        let path = format!("/v1/clusters/dev/check?{}", namespaces.join("&"));
        let answer = viewer.post(&path, &json!({})).await;
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
    }

    let refused = refused.expect("a refusal");
    let problem = refused.problem(429, "too-many-requests");
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("access reviews")), "{problem}");
    assert!(refused.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds >= 1), "{refused:?}");
    let before = requests.count();
    assert!(before > 600, "{before}");
    // Another cluster has a limit of its own.
    app.register_cluster("other").await;
    let other = viewer.post("/v1/clusters/other/check", &json!({})).await.expect(200);
    assert_eq!(other["reachable"], true, "{other}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn overloaded_cluster_is_not_asked_again_until_it_may_be(pool: PgPool) {
    static OVERLOADED: AtomicBool = AtomicBool::new(true);
    let app = TestApp::spawn(pool).await;
    let review = || {
        let overloaded = || answer("429 Too Many Requests", &[("Retry-After", "60")], "{}");
        if OVERLOADED.load(Ordering::SeqCst) { overloaded() } else { allowed() }
    };
    let requests = register(&app, review).await;
    let admin = app.admin();

    let first = check(&admin).await;
    assert_eq!(first["problem"]["type"], "cluster-unreachable", "{first}");
    for _ in 0..10 {
        assert_eq!(check(&admin).await, first);
    }
    // The version and one set of reviews, of which some may arrive late.
    assert!(requests.count() <= 9, "{}", requests.text());

    // A changed cluster may be another server.
    OVERLOADED.store(false, Ordering::SeqCst);
    admin.patch("/v1/clusters/dev", &json!({"auth": {"type": "token", "token": "one"}})).await.expect(200);
    assert_eq!(check(&admin).await.get("problem"), None);
}
