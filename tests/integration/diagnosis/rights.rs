//! Rights of regcred's credential, and of callers.

use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::setup::{deployment, login, namespace_with};
use crate::{
    pull_secrets::Broker,
    support::{app::TestApp, eventually, kubernetes, process::Installation, registry},
};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn printed_rules_permit_a_diagnosis_in_one_namespace(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let broker = Broker::without_rights().await;
    // Part of the names of the printed roles, so unique per test.
    let cluster = broker.namespace.clone();
    app.register_cluster_with(&cluster, &broker.auth()).await;
    let a = registry::a();
    let image = format!("{}/os/alpine:3", a.address);
    let namespace = namespace_with(&["k"], vec![login("k", &a), deployment(&[&image], &[])]).await;
    let other = namespace_with(&[], Vec::new()).await;
    let place = |namespace: &str| format!("/v1/clusters/{cluster}/namespaces/{namespace}");
    let path = format!("{}/workloads/deployment/web/diagnose", place(&namespace));
    let refused = app.admin().post(&path, &Value::Null).await.problem(502, "cluster-forbidden");
    let detail = refused["detail"].as_str().expect("a text");
    assert!(detail.contains(&format!("may not get deployments in namespace {namespace}")), "{detail}");
    let pods = format!("{}/pods", place(&namespace));
    let refused = app.admin().get(&pods).await.problem(502, "cluster-forbidden");
    let detail = refused["detail"].as_str().expect("a text");
    assert!(detail.contains(&format!("may not list pods in namespace {namespace}")), "{detail}");
    // Without the right to read Secrets, the answer says what is missing.
    let spec = json!({"images": [image], "imagePullSecrets": [{"name": "k"}]});
    let partly = app.admin().post(&format!("{}/diagnose", place(&namespace)), &spec).await.expect(200);
    let missing: Vec<&str> = partly["missingRights"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| one["resource"].as_str().expect("a resource"))
        .collect();
    assert_eq!(missing, ["serviceaccounts", "nodes", "secrets"], "{partly:#}");
    let found = &partly["images"][0];
    assert_eq!((&found["verdict"], &found["fix"]["type"]), (&json!("unknown"), &json!("grantRights")), "{partly:#}");
    assert_eq!(partly["pullSecrets"][0]["state"], "forbidden");
    let command = found["fix"]["steps"][0]["command"].as_str().expect("a line");
    assert!(command.contains("--service-account \"$REGCRED_SERVICE_ACCOUNT\" "), "{command}");

    let subject = format!("{}/{}", broker.namespace, broker.name);
    let doctor = format!("--doctor={namespace}");
    let rbac = ["cluster", "rbac", "--cluster", &cluster, "--service-account", &subject, &doctor];
    let printed = installation.run(&rbac).await;
    assert_eq!(printed.code, Some(0), "{printed:?}");
    assert!(printed.stderr.contains("permits the subject to read every Secret"), "{printed:?}");
    // Of the whole cluster, only nodes.
    let manifests: Vec<Value> = serde_saphyr::from_multiple(&printed.stdout).expect("YAML");
    let of_cluster: Vec<&Value> = manifests.iter().filter(|one| one["kind"] == "ClusterRole").collect();
    assert_eq!(of_cluster.len(), 1, "{printed:?}");
    let names: Vec<&str> = manifests.iter().filter_map(|one| one["metadata"]["name"].as_str()).collect();
    // Others keep their rights.
    assert!(names.iter().all(|name| name.starts_with(&format!("regcred-{cluster}-doctor"))), "{names:?}");
    let nodes = json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]);
    assert_eq!(of_cluster[0]["rules"], nodes);
    assert!(printed.stdout.contains("kind: Role\n"), "{printed:?}");
    kubernetes::kubectl(&["apply", "-f", "-"], &printed.stdout);

    // The API server enforces new rules with a delay.
    let found = eventually("the diagnosis is permitted", async || {
        let answer = app.admin().post(&path, &Value::Null).await;
        let found = (answer.status == 200).then(|| answer.json())?;
        (found["missingRights"] == json!([])).then_some(found)
    })
    .await;
    assert_eq!(found["ok"], true, "{found:#}");
    app.admin().get(&pods).await.expect(200);
    app.admin().get(&format!("{}/pods", place(&other))).await.problem(502, "cluster-forbidden");
    let elsewhere = format!("{}/workloads/deployment/web/diagnose", place(&other));
    app.admin().post(&elsewhere, &Value::Null).await.problem(502, "cluster-forbidden");

    let without = installation.run(&["cluster", "rbac", "--cluster", &cluster, "--doctor"]).await;
    assert!(without.code != Some(0) && without.stderr.contains("--doctor=NAMESPACE"), "{without:?}");
    let everywhere = installation.must_run(&["cluster", "rbac", "--cluster", &cluster, "--doctor=*"]).await;
    assert!(everywhere.contains("kind: ClusterRole\n") && !everywhere.contains("kind: Role\n"), "{everywhere}");
}
