//! The walk-through's ways to give a node its logins. The number in a test's name is the number of
//! the walk-through's section.

use serde_json::json;
use sqlx::PgPool;

use crate::{
    pods::{ConfiguredNode, Pull, Setup, document, images},
    support::{given, kubernetes::kubectl},
};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_1_node_wide_config_serves_pods_without_secrets(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, at_b] = images("os/app:3");
    let config_json = document(&setup.app, &["a", "b"]).await;

    let node = ConfiguredNode::start("node-wide", &config_json).await;

    for (name, expected) in [(node.name, Pull::Running), (given("REGCRED_TEST_NODE").as_str(), Pull::Refused)] {
        let pod = setup.start(name, &[], &[&at_a, &at_b], &[]).await;
        assert_eq!([pod.pulled(&at_a).await, pod.pulled(&at_b).await], [expected; 2], "{name}");
        pod.delete().await;
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_2_one_secret_pulls(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, _] = images("os/app:3");
    assert_eq!(setup.pull(&at_a, &[]).await, Pull::Refused);

    setup.declare("registrykey-2.6.2", &["a"]).await;

    assert_eq!(setup.pull(&at_a, &["registrykey-2.6.2"]).await, Pull::Running);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_3_two_secrets_serve_one_pod(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, at_b] = images("os/app:3");

    setup.declare("registrykey-a", &["a"]).await;
    setup.declare("registrykey-b", &["b"]).await;

    let pulls = setup.pull_all(&[&at_a, &at_b], &["registrykey-a", "registrykey-b"]).await;
    assert_eq!(pulls, [Pull::Running; 2]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_4_rendered_manifest_of_the_legacy_type_pulls(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let images = images("os/app:3");
    let secret = json!({"name": "legacy", "namespace": setup.namespace, "type": "kubernetes.io/dockercfg"});
    let body = json!({"accounts": ["a", "b"], "secret": secret});
    let admin = setup.app.admin();
    let request = admin.request("POST", "/v1/docker-configs/manifest").header("accept", "application/yaml");

    let manifest = admin.send(request.json(&body)).await;
    assert_eq!(manifest.status, 200, "{manifest:?}");
    kubectl(&["apply", "-f", "-"], &manifest.body);

    let pulls = setup.pull_all(&images.each_ref().map(String::as_str), &["legacy"]).await;
    assert_eq!(pulls, [Pull::Running; 2]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_5_one_secret_serves_two_registries(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, at_b] = images("os/app:3");

    setup.declare("registrykey", &["a", "b"]).await;

    assert_eq!(setup.pull_all(&[&at_a, &at_b], &["registrykey"]).await, [Pull::Running; 2]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_6_directly_delivered_secret_pulls(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, _] = images("os/app:3");

    setup.deliver("registrykey-m262-5", &["a"]).await;

    assert_eq!(setup.pull(&at_a, &["registrykey-m262-5"]).await, Pull::Running);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_6_path_in_the_key_pulls_below_the_path_only(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let ([team, _], [os, _]) = (images("team/app:3"), images("os/app:3"));
    for (name, path) in [("repository", "team/app"), ("group", "team"), ("elsewhere", "os/other")] {
        let scope = format!("{}/{path}", setup.a.address);
        setup.app.register_account(name, &scope, &setup.a.username, &setup.a.password).await;
        setup.deliver(name, &[name]).await;
    }

    let pulls = [
        setup.pull_all(&[&team, &os], &["repository"]).await,
        setup.pull_all(&[&team, &os], &["group"]).await,
        setup.pull_all(&[&team, &os], &["elsewhere"]).await,
    ];

    let below_only = [Pull::Running, Pull::Refused];
    assert_eq!(pulls, [below_only, below_only, [Pull::Refused; 2]]);
}
