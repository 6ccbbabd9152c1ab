//! Logins that must not run a pod, and their effect on others.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    pods::{Pull, Setup, images},
    support::kubernetes::kubectl,
};

/// Registers an account for registry A with a wrong password, and delivers it as `wrong`.
async fn deliver_wrong_password(setup: &Setup) {
    setup.app.register_account("wrong", &setup.a.address, &setup.a.username, "wrong").await;
    setup.deliver("wrong", &["wrong"]).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn wrong_password_does_not_run(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, _] = images("os/app:3");
    deliver_wrong_password(&setup).await;

    assert_eq!(setup.pull(&at_a, &["wrong"]).await, Pull::Refused);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn login_for_another_port_does_not_run(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, at_b] = images("os/app:3");
    setup.deliver("for-b", &["b"]).await;

    assert_eq!(setup.pull_all(&[&at_a, &at_b], &["for-b"]).await, [Pull::Refused, Pull::Running]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn missing_secret_does_not_block_another_one(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, at_b] = images("os/app:3");
    setup.deliver("for-a", &["a"]).await;

    let pulls = setup.pull_all(&[&at_a, &at_b], &["missing", "for-a"]).await;

    assert_eq!(pulls, [Pull::Running, Pull::Refused]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn wrong_and_right_secret_in_one_pod_run_in_either_order(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, _] = images("os/app:3");
    deliver_wrong_password(&setup).await;
    setup.deliver("right", &["a"]).await;

    for secrets in [["wrong", "right"], ["right", "wrong"]] {
        assert_eq!(setup.pull(&at_a, &secrets).await, Pull::Running, "{secrets:?}");
    }
}

/// Secrets that the API server accepts. One that the kubelet cannot read fails every pull of the pod; it
/// ignores the others.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unreadable_secret_fails_the_pod_or_is_ignored(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let [at_a, _] = images("os/app:3");
    setup.deliver("right", &["a"]).await;
    let auth = BASE64_STANDARD.encode(format!("{}:{}", setup.a.username, setup.a.password));
    let entries = |auth: &str| json!({&setup.a.address: {"auth": auth}});
    let document = |auth: &str| json!({"auths": entries(auth)});
    let typed = "kubernetes.io/dockerconfigjson";
    for (name, secret_type, value, alone, beside) in [
        ("bad-auth", typed, document("!"), Pull::Unreadable, Pull::Unreadable),
        ("wrong-type", "Opaque", document(&auth), Pull::Refused, Pull::Running),
        ("other-form", typed, entries(&auth), Pull::Refused, Pull::Running),
    ] {
        let secret: Value = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": secret_type,
            "stringData": {".dockerconfigjson": value.to_string()}});
        kubectl(&["create", "-n", &setup.namespace, "-f", "-"], &secret.to_string());
        assert_eq!(setup.pull(&at_a, &[name]).await, alone, "{name}");
        assert_eq!(setup.pull(&at_a, &[name, "right"]).await, beside, "{name} beside the right one");
    }
}
