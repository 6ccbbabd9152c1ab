//! Limits of registries, and what a diagnosis spends of them.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{Doctor, deployment, document, namespace_with, pull_secret};
use crate::{
    support::app::TestApp,
    verify::listening::{answer, serve},
};

const WEB: &str = "workloads/deployment/web";
const PASSWORD: &str = "canary-password";

fn basic(user: &str) -> String {
    format!("basic {}", BASE64_STANDARD.encode(format!("{user}:{PASSWORD}"))).to_ascii_lowercase()
}

/// Registries lock accounts after some failed logins.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rejected_login_is_not_sent_again(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (registry, requests) = serve(|_| answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "{}"));
    let images: Vec<String> = (0..20).map(|number| format!("{registry}/app:{number}")).collect();
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let secret = pull_secret("k", &document(&registry.to_string(), "martin", PASSWORD));
    let namespace = namespace_with(&[], vec![secret, deployment(&images, &["k"])]).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    let verdicts: Vec<&Value> =
        found["images"].as_array().expect("images").iter().map(|image| &image["verdict"]).collect();
    assert!(verdicts.len() == 20 && verdicts.iter().all(|verdict| **verdict == "credentialInvalid"), "{found:#}");
    // The manifest, and the root that tells a wrong login from one without access.
    let sent = requests.text().to_ascii_lowercase().matches("authorization: basic").count();
    assert_eq!(sent, 2);
}

/// The kubelet tries the next login, and other clients have limits of their own.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn limit_of_one_login_stops_no_other(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (limited, good) = (basic("limited"), basic("good"));
    let (registry, _) = serve(move |request| {
        let request = request.to_ascii_lowercase();
        if request.contains(&limited) {
            answer("429 Too Many Requests", &[("Retry-After", "3600")], "{}")
        } else if request.contains(&good) {
            answer("200 OK", &[], "{}")
        } else {
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "{}")
        }
    });
    let address = registry.to_string();
    let secret = |name: &str| pull_secret(name, &document(&address, name, PASSWORD));
    let web = deployment(&[&format!("{address}/app:1")], &["limited", "good"]);
    let namespace = namespace_with(&[], vec![secret("limited"), secret("good"), web]).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    let attempts = &found["images"][0]["attempts"];
    assert_eq!((&found["ok"], &attempts[0]["answer"]["result"]), (&json!(true), &json!("rateLimited")), "{found:#}");
    let account = json!({
        "name": "good", "registry": address, "username": "good", "password": PASSWORD, "plainHttp": true,
    });
    doctor.admin.post("/v1/registry-accounts", &account).await.expect(201);
    let verified = doctor.admin.post("/v1/registry-accounts/good/verify", &json!({})).await.expect(200);
    assert_eq!(verified["result"], "valid", "{verified}");
}

/// `localhost` of an image is the host of a node.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn registry_on_the_node_is_not_asked(pool: PgPool) {
    let app = TestApp::configured(pool, &[]).await;
    app.register_cluster("dev").await;
    let (registry, requests) = serve(|_| answer("200 OK", &[], "{}"));
    let images = [registry.to_string(), format!("localhost:{}", registry.port())].map(|host| format!("{host}/app"));
    let secret = pull_secret("k", &document(&registry.to_string(), "martin", PASSWORD));
    let images = images.each_ref().map(String::as_str);
    let namespace = namespace_with(&[], vec![secret, deployment(&images, &["k"])]).await;

    let found = super::setup::diagnose(&app.admin(), &namespace, WEB).await;

    for image in found["images"].as_array().expect("images") {
        assert_eq!(image["verdict"], "unknown", "{found:#}");
        let sentence = image["sentence"].as_str().expect("a sentence");
        assert!(sentence.contains("the node's own host"), "{sentence}");
    }
    assert_eq!(requests.count(), 0);
}
