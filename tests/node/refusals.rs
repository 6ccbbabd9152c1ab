//! Logins that must not run a pod, and their effect on others.

use sqlx::PgPool;

use crate::pods::{Pull, Setup, images};

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
