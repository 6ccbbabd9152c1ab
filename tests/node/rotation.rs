//! Rotations at the registry, while pods pull.

use chrono::Utc;
use serde_json::json;
use sqlx::PgPool;

use crate::{
    pods::{Pull, Setup, images, set_password},
    support::{eventually, given},
};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn new_pod_pulls_after_a_rotation(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, _] = images("os/app:3");
    set_password("rotated", "before");
    setup.app.register_account("rotated", &setup.a.address, "rotated", "before").await;
    setup.declare("registrykey", &["rotated"]).await;
    assert_eq!(setup.pull(&at_a, &["registrykey"]).await, Pull::Running);
    set_password("rotated", "after");
    assert_eq!(setup.pull(&at_a, &["registrykey"]).await, Pull::Refused);

    let admin = setup.app.admin();
    admin.patch("/v1/registry-accounts/rotated", &json!({"password": "after"})).await.expect(200);
    let wait = admin.request("GET", "/v1/pull-secrets/registrykey").header("prefer", "wait=30");
    assert_eq!(admin.send(wait).await.expect(200)["status"]["state"], "synced");

    // The kubelet's watch may deliver the Secret after the first attempt.
    let pod = setup.start(&given("REGCRED_TEST_NODE"), &["registrykey"], &[&at_a], &[]).await;
    pod.runs(&at_a).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pod_with_old_and_new_login_pulls_throughout_a_rotation(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, _] = images("os/app:3");
    set_password("overlapping", "old");
    for login in ["old", "new"] {
        setup.app.register_account(login, &setup.a.address, "overlapping", login).await;
        setup.deliver(login, &[login]).await;
    }
    // Its container ends after two seconds, and each restart pulls again.
    let restarting = setup.start(&given("REGCRED_TEST_NODE"), &["old", "new"], &[&at_a], &["2"]).await;
    restarting.runs(&at_a).await;
    assert_eq!(setup.pull(&at_a, &["old"]).await, Pull::Running);

    set_password("overlapping", "new");
    let changed = Utc::now().timestamp();

    assert_eq!(setup.pull(&at_a, &["old"]).await, Pull::Refused);
    assert_eq!(setup.pull(&at_a, &["old", "new"]).await, Pull::Running);
    eventually("the container restarted after the change", async || {
        let started = restarting.container(&at_a).await?.state?.running?.started_at?.0.as_second();
        (started > changed).then_some(())
    })
    .await;
    assert_eq!(restarting.failures(&at_a).await, [""; 0]);
}
