//! Rights of regcred's credential.

use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::setup::{items, namespace_in, run};
use crate::{
    diagnosis::setup::{deployment, login},
    pull_secrets::{Broker, declaration, put},
    support::{
        app::TestApp,
        eventually,
        kubernetes::{FIRST, kubectl},
        process::Installation,
        registry,
    },
};

/// Resources of the missing parts.
fn missing(coverage: &Value) -> Vec<String> {
    let parts = coverage["snapshot"]["summary"]["missing"].as_array().expect("a list");
    parts
        .iter()
        .map(|part| {
            format!("{} {}", part["verb"].as_str().unwrap_or("-"), part["resource"].as_str().expect("a resource"))
        })
        .collect()
}

/// Without rights in the cluster, only the namespaces of pull secrets are read: this test sees no
/// objects of others.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn printed_rules_permit_the_coverage_of_one_namespace(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let broker = Broker::without_rights().await;
    // Part of the names of the printed roles, so unique per test.
    let cluster = broker.namespace.clone();
    app.register_cluster_with(&cluster, &broker.auth()).await;
    let a = registry::a();
    let image = format!("{}/os/alpine:3", a.address);
    let namespace = namespace_in(FIRST, &["k"], vec![login("k", &a), deployment(&[&image], &[])]).await;
    app.register_account("prod-a", &a.address, &a.username, &a.password).await;
    put(&app.admin(), "team-a", &declaration(&["prod-a"], &cluster, &[&namespace])).await;
    let groups = format!("/v1/clusters/{cluster}/coverage/groups");

    let without = run(&app.admin(), &cluster).await;
    let expected = [
        "list serviceaccounts",
        "list deployments",
        "list statefulsets",
        "list daemonsets",
        "list jobs",
        "list cronjobs",
        "list pods",
        "list secrets",
        "list nodes",
    ];
    assert_eq!(missing(&without), expected, "{without:#}");
    assert_eq!(items(&app.admin(), &groups).await, Vec::<Value>::new());

    let subject = format!("{}/{}", broker.namespace, broker.name);
    let doctor = format!("--doctor={namespace}");
    let rbac = ["cluster", "rbac", "--cluster", &cluster, "--service-account", &subject, &doctor];
    let printed = installation.run(&rbac).await;
    assert_eq!(printed.code, Some(0), "{printed:?}");
    kubectl(&["apply", "-f", "-"], &printed.stdout);

    // The API server enforces new rules with a delay.
    let found = eventually("the coverage is permitted", async || {
        run(&app.admin(), &cluster).await;
        Some(items(&app.admin(), &groups).await)
            .filter(|groups| groups.first().is_some_and(|one| one["verdict"] == "ok"))
    })
    .await;
    assert_eq!((found.len(), &found[0]["namespace"]), (1, &json!(namespace)), "{found:#?}");
    let coverage = app.admin().get(&format!("/v1/clusters/{cluster}/coverage")).await.expect(200);
    // The lists of the cluster are still not permitted.
    assert_eq!(missing(&coverage), expected[..8], "{coverage:#}");
    let effect = coverage["snapshot"]["summary"]["missing"][0]["effect"].as_str().expect("a text");
    assert!(effect.contains("1 namespaces of pull secrets were read"), "{effect}");

    let everywhere = installation.must_run(&["cluster", "rbac", "--cluster", &cluster, "--doctor=*"]).await;
    let manifests: Vec<Value> = serde_saphyr::from_multiple(&everywhere).expect("YAML");
    let name = format!("regcred-{cluster}-doctor");
    let is_of_cluster = |one: &&Value| one["kind"] == "ClusterRole" && one["metadata"]["name"] == name;
    let of_cluster = manifests.iter().find(is_of_cluster).expect("a ClusterRole");
    let pods = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]});
    assert!(of_cluster["rules"].as_array().expect("rules").contains(&pods), "{of_cluster:#}");
}
