//! Rotation of the pepper: keys keep working, and move to the new pepper when they are used.

use std::fs;

use serde_json::json;
use sqlx::{ConnectOptions, PgPool};

use crate::{
    pull_secrets::{Broker, declaration, put},
    support::{
        client::Client,
        eventually, kubernetes,
        process::{Installation, Service},
    },
};

fn installation(pool: &PgPool) -> Installation {
    Installation::new(pool.connect_options().to_url_lossy().as_str())
}

fn pepper_file(installation: &Installation) -> String {
    installation.variable("REGCRED_API_KEY_PEPPER_FILE")
}

/// Puts a new pepper first and returns its id.
async fn generate(installation: &Installation) -> String {
    let file = pepper_file(installation);
    installation.must_run(&["pepper", "generate", "--file", &file]).await;
    let ring = fs::read_to_string(file).expect("a ring");
    ring.split(':').next().expect("an id").to_owned()
}

/// Returns pepper, state and active keys of `pepper list`.
async fn list(installation: &Installation) -> Vec<[String; 3]> {
    let listed = installation.must_run(&["pepper", "list"]).await;
    let lines = listed.lines().skip(1).map(|line| {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        words.try_into().expect("three columns")
    });
    lines.collect()
}

fn line(pepper: &str, state: &str, keys: &str) -> [String; 3] {
    [pepper, state, keys].map(str::to_owned)
}

async fn reloaded(service: &Service) {
    eventually("the pepper ring is reloaded", async || {
        service.process.stderr().contains("pepper ring reloaded").then_some(())
    })
    .await;
}

async fn status(client: &Client) -> u16 {
    client.get("/v1/me").await.status
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn keys_move_to_the_new_pepper_when_they_are_used(pool: PgPool) {
    let installation = installation(&pool);
    let service = installation.serve().await;
    let [used, unused] = [installation.new_key("used").await, installation.new_key("unused").await];
    assert_eq!(status(&service.client(&used)).await, 200);
    assert_eq!(list(&installation).await, [line("unnamed", "makes", "2")]);

    let pepper = generate(&installation).await;
    reloaded(&service).await;

    // The verified key is not looked at again for ten minutes, by this process.
    assert_eq!(status(&service.client(&used)).await, 200);
    let made = service.client(&used).post("/v1/api-keys", &json!({"name": "made", "role": "viewer"})).await;
    let made = made.expect(201)["key"].as_str().expect("a key").to_owned();
    assert_eq!(list(&installation).await, [line(&pepper, "makes", "1"), line("unnamed", "verifies", "2")]);
    drop(service);
    let service = installation.serve().await;
    let metric = async |service: &Service, value: u32| {
        let metrics = service.operations().get("/metrics").await.body;
        metrics.lines().any(|line| line == format!("regcred_api_keys_of_older_peppers {value}"))
    };
    eventually("keys are counted", async || metric(&service, 2).await.then_some(())).await;
    for key in [&used, &made] {
        assert_eq!(status(&service.client(key)).await, 200);
    }
    assert_eq!(list(&installation).await, [line(&pepper, "makes", "2"), line("unnamed", "verifies", "1")]);
    // The renewal did not cost another run of argon2.
    assert_eq!(status(&service.client(&used)).await, 200);
    let metrics = service.operations().get("/metrics").await.body;
    assert!(metrics.contains("regcred_api_key_argon2_runs_total 2\n"), "{metrics}");
    drop(service);

    // Without the old pepper, only keys that were not used are lost.
    let ring = fs::read_to_string(pepper_file(&installation)).expect("a ring");
    fs::write(pepper_file(&installation), ring.lines().next().expect("the new pepper")).expect("written");
    let service = installation.serve().await;
    let statuses = [&used, &made, &unused].map(|key| service.client(key));
    let statuses = [status(&statuses[0]).await, status(&statuses[1]).await, status(&statuses[2]).await];
    assert_eq!(statuses, [200, 200, 401]);
    assert_eq!(list(&installation).await, [line(&pepper, "makes", "2"), line("unnamed", "MISSING", "1")]);
}

/// A replica whose ring is older than a key asks its file before it refuses the key.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn key_of_a_new_pepper_works_in_a_replica_that_has_not_reloaded(pool: PgPool) {
    let installation = installation(&pool);
    let service = installation.serve().await;
    for name in ["one", "two", "three"] {
        generate(&installation).await;
        // Made by a process that reads the ring now.
        let key = installation.new_key(name).await;
        assert_eq!(status(&service.client(&key)).await, 200, "{name}");
    }
}

/// A retry is answered as before, also where the retry and the first attempt meet different rings.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn retry_after_a_rotation_of_the_pepper_is_recognised(pool: PgPool) {
    let installation = installation(&pool);
    let first = installation.serve().await;
    let key = installation.new_key("admin").await;
    let create = async |service: &Service, name: &str| {
        let body = json!({"name": name, "registry": "ghcr.io", "username": "u", "password": "p"});
        let client = service.client(&key);
        let request = client.request("POST", "/v1/registry-accounts").header("Idempotency-Key", "retry-1");
        let answer = client.send(request.json(&body)).await;
        (answer.status, answer.headers.contains_key("idempotency-replayed"))
    };
    assert_eq!(create(&first, "a").await, (201, false));
    generate(&installation).await;
    reloaded(&first).await;
    assert_eq!(create(&first, "a").await, (201, true));
    let second = installation.serve().await;
    assert_eq!(create(&second, "a").await, (201, true));
    assert_eq!(create(&second, "b").await, (422, false));

    // Another replica stores a digest under a pepper that this one has not read yet.
    sqlx::query("DELETE FROM idempotency_keys").execute(&pool).await.expect("deleted");
    generate(&installation).await;
    let third = installation.serve().await;
    assert_eq!(create(&third, "c").await, (201, false));
    assert_eq!(create(&second, "c").await, (201, true));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn audit_log_of_a_rotated_pepper_is_intact(pool: PgPool) {
    let installation = installation(&pool);
    let old_file = pepper_file(&installation);
    let old = fs::read_to_string(&old_file).expect("a pepper");
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let register = async |name: &str| {
        let body = json!({"name": name, "registry": "ghcr.io", "username": "u", "password": "p"});
        service.client(&key).post("/v1/registry-accounts", &body).await.expect(201);
    };
    register("before").await;
    generate(&installation).await;
    reloaded(&service).await;
    register("after").await;
    let keys = "SELECT count(DISTINCT key_id) FROM audit_events WHERE action = 'registryAccount.create'";
    let count: i64 = sqlx::query_scalar(keys).fetch_one(&pool).await.expect("events");
    assert_eq!(count, 2, "a running process signs with the new pepper");
    service.process.signal("TERM");
    let exit = service.process.wait().await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    installation.must_run(&["audit", "verify"]).await;

    let ring = fs::read_to_string(&old_file).expect("a ring");
    fs::write(&old_file, ring.lines().next().expect("the new pepper")).expect("written");

    let exit = installation.run(&["audit", "verify"]).await;
    assert!(exit.code == Some(1) && exit.stdout.contains("signed with another pepper"), "{exit:?}");
    let older = format!("{old_file}.older");
    fs::write(&older, old).expect("written");
    installation.must_run(&["audit", "verify", "--older-pepper-file", &older]).await;
}

/// The hashes of Secrets are keyed from the pepper, and a Secret is not written again for a new one.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unchanged_secrets_are_not_written_for_a_new_pepper(pool: PgPool) {
    let installation = installation(&pool).with("REGCRED_PULL_SECRETS_RESYNC_SECONDS", "1");
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let broker = Broker::new().await;
    client.post("/v1/clusters", &kubernetes::FIRST.registration("dev", &broker.auth())).await.expect(201);
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "u", "password": "p"});
    client.post("/v1/registry-accounts", &account).await.expect(201);
    let namespace = kubernetes::new_namespace().await;
    put(&client, "team-a", &declaration(&["a"], "dev", &[&namespace])).await.expect(201);
    let version = async || kubernetes::secret(&namespace, "team-a-pull").await.metadata.resource_version;
    let mac = async || {
        let mac: Option<Vec<u8>> = sqlx::query_scalar("SELECT content_mac FROM pull_secret_targets")
            .fetch_one(&pool)
            .await
            .expect("the target");
        mac.expect("a hash")
    };
    let (version_before, mac_before) = (version().await, mac().await);

    generate(&installation).await;

    eventually("the hash is renewed", async || (mac().await != mac_before).then_some(())).await;
    assert_eq!(version().await, version_before);
}
