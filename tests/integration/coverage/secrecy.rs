//! Values of foreign Secrets appear in no answer, log, row or event.

use serde_json::json;
use sqlx::{ConnectOptions, PgPool};

use super::setup::{items, namespace_in, registration, run};
use crate::{
    diagnosis::setup::{deployment, document, pull_secret, secret},
    leaks::{Canary, dump},
    support::{kubernetes::SECOND, process::Installation, registry},
    verify::listening::{answer, serve},
};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn values_of_foreign_secrets_appear_nowhere(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_LOG_FILTER", "trace")
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8");
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let client = service.client(&key);
    client.post("/v1/clusters", &registration()).await.expect(201);
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
    let odd = json!({"auths": {
        format!("u:{password}@quay.io"): {"username": password, "password": password, "email": password},
        password.clone(): {"identitytoken": password},
    }});
    let objects = vec![
        pull_secret("k", &document(&a.address, &a.username, &password)),
        pull_secret("l", &document(&echo.to_string(), "martin", &password)),
        pull_secret("m", &odd),
        secret("n", "Opaque", ".dockerconfigjson", &format!("{odd}#{password}")),
        deployment(&[&format!("{}/os/alpine:3", a.address), &format!("{echo}/app:1")], &["k", "l", "m", "n"]),
    ];
    let namespace = namespace_in(SECOND, &[], objects).await;

    let coverage = run(&client, "prod").await;

    let mut outputs = vec![("the coverage", coverage.to_string())];
    for (what, list) in [("groups", "groups"), ("pull secrets", "secrets")] {
        let found = items(&client, &format!("/v1/clusters/prod/coverage/{list}?namespace={namespace}")).await;
        assert!(!found.is_empty(), "{what}");
        outputs.push((what, json!(found).to_string()));
    }
    // The login was used: the scan could find it.
    let sent = requests.text();
    assert!(canary.needles.iter().any(|(_, needle)| sent.contains(needle)), "{sent}");
    outputs.push(("the audit log", client.get("/v1/audit-events?limit=500").await.body));
    outputs.push(("/metrics", service.operations().get("/metrics").await.body));
    outputs.push(("a dump of the database", dump(&pool)));
    service.process.signal("TERM");
    let exit = service.process.wait().await;
    assert!(exit.stderr.contains("\"level\":\"TRACE\"") && exit.stderr.contains("registry.pull"));
    outputs.push(("the log", exit.stderr));
    for (place, text) in outputs {
        for (encoding, needle) in &canary.needles {
            assert!(!text.contains(needle), "{encoding} in {place}");
        }
    }
}
