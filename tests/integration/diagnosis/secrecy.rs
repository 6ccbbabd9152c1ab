//! Values of foreign Secrets appear in no answer, log, row or event.

use std::net::SocketAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::setup::{document, namespace_with, pod, pull_secret, secret};
use crate::{
    leaks::{Canary, dump},
    support::{
        given, kubernetes,
        process::Installation,
        registry::{self, Registry},
    },
    verify::listening::{answer, serve},
};

/// Pull secrets `k`, `l` and `m` with the password in every place.
fn set_ups(password: &str, a: &Registry, echo: &SocketAddr) -> [(&'static str, Vec<Value>); 3] {
    let good = document(&a.address, &a.username, password);
    let echoed = document(&echo.to_string(), "martin", password);
    let odd = json!({"auths": {
        format!("u:{password}@quay.io"): {"username": password, "password": password, "email": password},
        password: {"identitytoken": password},
    }});
    let broken = json!({"auths": {"quay.io": {"auth": password, "password": [password]}}});
    let legacy = format!("{good}#{password}");
    [
        ("good", vec![pull_secret("k", &good), pull_secret("l", &echoed), pull_secret("m", &odd)]),
        (
            "broken",
            vec![
                pull_secret("k", &good),
                pull_secret("l", &broken),
                secret("m", "Opaque", ".dockerconfigjson", &legacy),
            ],
        ),
        (
            "twice",
            vec![
                secret("k", "Opaque", ".dockerconfigjson", &BASE64_STANDARD.encode(good.to_string())),
                secret("l", "Opaque", "password", password),
                secret("m", "kubernetes.io/dockercfg", ".dockercfg", &odd.to_string()),
            ],
        ),
    ]
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn values_of_foreign_secrets_appear_nowhere(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_LOG_FILTER", "trace")
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8");
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let client = service.client(&key);
    let token = json!({"type": "token", "token": given("REGCRED_TEST_KUBE_ADMIN_TOKEN")});
    client.post("/v1/clusters", &kubernetes::FIRST.registration("dev", &token)).await.expect(201);
    let (password, canary) = Canary::random("password of a foreign Secret");
    let a = registry::a();
    // A registry that repeats what it is sent.
    let (echo, requests) = serve(|request| {
        if request.contains("authorization") {
            answer("403 Forbidden", &[("X-Echo", "x")], request)
        } else {
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], request)
        }
    });
    let images = [format!("{}/os/alpine:3", a.address), format!("{echo}/app:1"), "127.0.0.1:1/app".to_owned()];
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let mut outputs = Vec::new();
    for (name, objects) in set_ups(&password, &a, &echo) {
        let objects = objects.into_iter().chain([pod(&images, &["k", "l", "m"])]).collect();
        let namespace = namespace_with(&["k", "l", "m"], objects).await;
        let place = format!("/v1/clusters/dev/namespaces/{namespace}");
        let spec = json!({"images": images});
        for (path, body) in [("pods/web/diagnose", Value::Null), ("diagnose", spec)] {
            let answer = client.post(&format!("{place}/{path}"), &body).await;
            answer.expect(200);
            outputs.push((format!("{name}: {path}"), format!("{:?}{}", answer.headers, answer.body)));
        }
    }
    // The login was used: the scan could find it.
    let sent = requests.text();
    assert!(canary.needles.iter().any(|(_, needle)| sent.contains(needle)), "{sent}");
    outputs.push(("the audit log".to_owned(), client.get("/v1/audit-events?limit=500").await.body));
    outputs.push(("/metrics".to_owned(), service.operations().get("/metrics").await.body));
    outputs.push(("a dump of the database".to_owned(), dump(&pool)));
    service.process.signal("TERM");
    let exit = service.process.wait().await;
    assert!(exit.stderr.contains("\"level\":\"TRACE\"") && exit.stderr.contains("registry.pull"));
    outputs.push(("the log".to_owned(), exit.stderr));
    for (place, text) in outputs {
        for (encoding, needle) in &canary.needles {
            assert!(!text.contains(needle), "{encoding} in {place}");
        }
    }
}
