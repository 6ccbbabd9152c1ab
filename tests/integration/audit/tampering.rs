//! Changes of the audit log that a superuser makes, and where a verification finds them.

use regcred::{
    crypto::audit::AuditKey,
    domain::{
        audit::{
            Action, NewEvent, Resource,
            legacy::{Head, Opening},
        },
        caller::{Actor, ActorKind},
    },
};
use uuid::Uuid;

use super::*;
use crate::support::{files::TempDir, process::Exit};

/// Log of two processes that have stopped, and a superuser who changes it.
pub(super) struct Tampering {
    pub(super) installation: Installation,
    superuser: PgConnection,
}

impl Tampering {
    pub(super) async fn new(pool: PgPool) -> Self {
        let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
        let key = installation.new_key("admin").await;
        let superuser = superuser(&pool).await;
        let tampering = Self { installation, superuser };
        for round in 0..2 {
            tampering.use_service(&key, &format!("r{round}")).await;
        }
        tampering
    }

    /// Serves some changes and reveals, and stops.
    pub(super) async fn use_service(&self, key: &str, prefix: &str) {
        let service = self.installation.serve().await;
        let client = service.client(key);
        for number in 0..4 {
            let name = format!("{prefix}-{number}");
            client.post("/v1/registry-accounts", &account(&name)).await.expect(201);
            client.post("/v1/docker-configs", &json!({"accounts": [name]})).await.expect(200);
        }
        service.process.signal("TERM");
        service.process.wait().await;
    }

    pub(super) async fn sql(&mut self, sql: &str) -> u64 {
        run(&mut self.superuser, sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    pub(super) async fn verify(&self, arguments: &[&str]) -> Exit {
        self.installation.run(&[&["audit", "verify"], arguments].concat()).await
    }

    pub(super) async fn keep(&mut self) {
        self.sql(
            "CREATE TABLE kept_events AS SELECT * FROM audit_events;
             CREATE TABLE kept_seals AS SELECT * FROM audit_seals",
        )
        .await;
    }

    pub(super) async fn put_back(&mut self) {
        self.sql(
            "TRUNCATE audit_events, audit_seals, audit_unsealed; INSERT INTO audit_seals SELECT * FROM kept_seals;
             INSERT INTO audit_events SELECT * FROM kept_events",
        )
        .await;
    }
}

/// Condition for the reveal with this index.
pub(super) fn reveal(index: u32) -> String {
    format!(
        "id = (SELECT id FROM audit_events WHERE action = 'dockerConfig.reveal' ORDER BY id OFFSET {index} LIMIT 1)"
    )
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn changed_removed_added_and_swapped_events_and_seals_are_found(pool: PgPool) {
    let mut log = Tampering::new(pool).await;
    let intact = log.verify(&[]).await;
    assert_eq!(intact.code, Some(0), "{intact:?}");
    assert_eq!(intact.stderr, "", "every process has closed its numbering");
    log.keep().await;
    let cases: Vec<(String, &[&str])> = vec![
        (format!("UPDATE audit_events SET actor_name = 'other' WHERE {}", reveal(2)), &["was changed"]),
        (format!("UPDATE audit_events SET at = at - interval '1 hour' WHERE {}", reveal(4)), &["was changed"]),
        (format!("UPDATE audit_events SET resource = NULL, hash = '' WHERE {}", reveal(3)), &["was changed"]),
        (format!("UPDATE audit_events SET chain_id = gen_random_uuid() WHERE {}", reveal(3)), &["was changed"]),
        (format!("DELETE FROM audit_events WHERE {}", reveal(1)), &["is missing"]),
        ("DELETE FROM audit_events WHERE action = 'dockerConfig.reveal'".to_owned(), &["is missing"]),
        // Two events swap their contents.
        (
            format!(
                "UPDATE audit_events AS e SET actor_name = o.actor_name, resource = o.resource, hash = o.hash, request_id = o.request_id
                 FROM audit_events AS o WHERE e.id IN (SELECT id FROM audit_events WHERE {0} OR {1})
                     AND o.id IN (SELECT id FROM audit_events WHERE {0} OR {1}) AND o.id <> e.id",
                reveal(1), reveal(2)
            ),
            &["was changed"],
        ),
        // A copy under another id replaces an event.
        (
            format!("UPDATE audit_events SET id = gen_random_uuid() WHERE {}", reveal(1)),
            &["is missing", "was added"],
        ),
        // An event is added.
        (
            format!(
                "INSERT INTO audit_events SELECT gen_random_uuid(), sequence, gen_random_uuid(), at, actor_type, actor_id, actor_name, action,
                     resource, related, outcome, request_id, source_ip, details, previous_hash, hash, key_id
                 FROM audit_events WHERE {}", reveal(1)
            ),
            &["was added"],
        ),
        // An event is added as if an earlier release had written it.
        (
            format!(
                "INSERT INTO audit_events SELECT gen_random_uuid(), sequence, gen_random_uuid(), at, actor_type, actor_id, actor_name, action,
                     resource, related, outcome, request_id, source_ip, details, previous_hash, hash, NULL
                 FROM audit_events WHERE {}", reveal(1)
            ),
            &["events of an unknown chain"],
        ),
        ("UPDATE audit_seals SET sealed_at = now() WHERE number = 4".to_owned(), &["seal 4: changed or forged"]),
        ("UPDATE audit_seals SET events = events - 1 WHERE number = 4".to_owned(), &["seal 4: changed or forged"]),
        ("DELETE FROM audit_seals WHERE number = 2".to_owned(), &["seal 2: missing"]),
        // Events vanish together with their seal.
        (
            "WITH seal AS (DELETE FROM audit_seals WHERE number = (
                 SELECT min(number) FROM audit_seals WHERE number > 1 AND cardinality(event_ids) > 0
             ) RETURNING event_ids)
             DELETE FROM audit_events USING seal WHERE id = ANY (event_ids)".to_owned(),
            &[": missing"],
        ),
        // A seal is replaced by the next one.
        (
            "DELETE FROM audit_seals WHERE number = 4; UPDATE audit_seals SET number = number - 1 WHERE number > 4".to_owned(),
            &["seal 4: changed or forged"],
        ),
    ];
    for (sql, expected) in cases {
        assert!(log.sql(&sql).await > 0, "{sql} did nothing");

        let exit = log.verify(&[]).await;

        assert_eq!(exit.code, Some(1), "{sql}: {exit:?}");
        for words in expected {
            assert!(exit.stdout.contains(words), "{words:?} is missing: {sql}\n{}", exit.stdout);
        }
        assert!(exit.stderr.contains("The audit log is not what was written"), "{exit:?}");
        log.put_back().await;
    }
    assert_eq!(log.verify(&[]).await.code, Some(0));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn log_that_was_set_back_is_found_by_an_anchor(pool: PgPool) {
    let mut log = Tampering::new(pool).await;
    log.keep().await;
    let folder = TempDir::new();
    let anchors = folder.path().join("anchors").display().to_string();
    let key = log.installation.new_key("second").await;
    log.use_service(&key, "s").await;
    let saved = log.verify(&["--save-anchors", &anchors]).await;
    assert_eq!(saved.code, Some(0), "{saved:?}");
    for arguments in [&["--anchors", &anchors][..], &["--anchors", &anchors, "--since-anchor"]] {
        assert_eq!(log.verify(arguments).await.code, Some(0));
    }

    // The log as it was before is consistent in itself.
    log.put_back().await;
    assert_eq!(log.verify(&[]).await.code, Some(0));
    for arguments in [&["--anchors", &anchors][..], &["--anchors", &anchors, "--since-anchor"]] {
        let exit = log.verify(arguments).await;
        assert_eq!(exit.code, Some(1), "{exit:?}");
        assert!(exit.stdout.contains("contradicts the anchor"), "{exit:?}");
    }
    fs::write(&anchors, "nonsense").expect("written");
    assert_eq!(log.verify(&["--anchors", &anchors]).await.code, Some(1));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn verification_since_an_anchor_checks_what_was_sealed_later(pool: PgPool) {
    let mut log = Tampering::new(pool).await;
    let folder = TempDir::new();
    let anchors = folder.path().join("anchors").display().to_string();
    // A process that runs across the anchor.
    let key = log.installation.new_key("second").await;
    let service = log.installation.serve().await;
    service.client(&key).post("/v1/registry-accounts", &account("before")).await.expect(201);
    assert_eq!(log.verify(&["--save-anchors", &anchors]).await.code, Some(0));
    let old = reveal(0);
    for number in 0..20 {
        service.client(&key).post("/v1/registry-accounts", &account(&format!("after-{number}"))).await.expect(201);
    }
    service.process.signal("TERM");
    service.process.wait().await;
    let since = ["--anchors", anchors.as_str(), "--since-anchor"];
    let exit = log.verify(&since).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");

    // Changes before the anchor are not read, but a removed event is missing in the count.
    log.keep().await;
    log.sql(&format!("UPDATE audit_events SET actor_name = 'other' WHERE {old}")).await;
    assert_eq!(log.verify(&since).await.code, Some(0));
    log.sql(&format!("DELETE FROM audit_events WHERE {old}")).await;
    let exit = log.verify(&since).await;
    assert!(exit.code == Some(1) && exit.stdout.contains("verify without --since-anchor"), "{exit:?}");
    log.put_back().await;
    log.sql("UPDATE audit_events SET outcome = 'failure' WHERE resource = 'registry-accounts/after-3'").await;
    let exit = log.verify(&since).await;
    assert!(exit.code == Some(1) && exit.stdout.contains("was changed"), "{exit:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn log_of_an_older_pepper_is_verified_with_that_pepper(pool: PgPool) {
    let url = pool.connect_options().to_url_lossy().to_string();
    let (old, new) = (Installation::new(&url), Installation::new(&url));
    old.new_key("one").await;
    new.new_key("two").await;

    let exit = new.run(&["audit", "verify"]).await;
    assert_eq!(exit.code, Some(1), "{exit:?}");
    assert_eq!(exit.stdout.matches("signed with another pepper").count(), 1, "{exit:?}");
    assert_eq!(exit.stdout.lines().count(), 1, "{exit:?}");
    new.must_run(&["audit", "verify", "--older-pepper-file", &old.variable("REGCRED_API_KEY_PEPPER_FILE")]).await;
}

/// Writes a chain as release 0.1.0 did.
async fn write_chain(pool: &PgPool, key: &AuditKey, events: i64) {
    let before: Option<(i64, Vec<u8>)> =
        sqlx::query_as("SELECT number, opening FROM audit_chains ORDER BY number DESC LIMIT 1")
            .fetch_optional(pool)
            .await
            .expect("chains");
    let (number, before) = before.unwrap_or_default();
    let now = chrono::Utc::now();
    let opened_at = chrono::DateTime::from_timestamp_micros(now.timestamp_micros()).expect("a time");
    let opening = Opening { id: Uuid::now_v7(), number: number + 1, opened_at, continues: None };
    let opening_hash = key.sign_opening(&opening, &before);
    let mut head = Head { sequence: 0, hash: opening_hash.clone() };
    let actor = Actor { kind: ActorKind::CommandLine, id: None, name: "dev".to_owned() };
    for _ in 0..events {
        let event = NewEvent::by(&actor, Action::MasterKeyRotate, Resource::master_keys()).stamp(Uuid::now_v7());
        let stored = key.link(opening.id, &mut head, event);
        sqlx::query(
            "INSERT INTO audit_events
                 (chain_id, sequence, id, at, actor_type, actor_name, action, resource, outcome, details, previous_hash, hash)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::json, $11, $12)",
        )
        .bind(stored.chain_id)
        .bind(stored.sequence)
        .bind(stored.event.id)
        .bind(stored.event.at)
        .bind(stored.event.actor_type)
        .bind(stored.event.actor_name)
        .bind(stored.event.action)
        .bind(stored.event.resource)
        .bind(stored.event.outcome)
        .bind(stored.event.details)
        .bind(stored.previous_hash)
        .bind(stored.hash)
        .execute(pool)
        .await
        .expect("an event of release 0.1.0");
    }
    sqlx::query("INSERT INTO audit_chains VALUES ($1, $2, $3, NULL, NULL, $4, $5, $6, $7, $8)")
        .bind(opening.id)
        .bind(opening.number)
        .bind(opening.opened_at)
        .bind(opening_hash)
        .bind(key.id())
        .bind(head.sequence)
        .bind(&head.hash)
        .bind(key.sign_head(opening.id, &head))
        .execute(pool)
        .await
        .expect("a chain of release 0.1.0");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn chains_of_an_earlier_release_are_adopted_repeatably(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let pepper = fs::read_to_string(installation.variable("REGCRED_API_KEY_PEPPER_FILE")).expect("a pepper");
    let key = AuditKey::of(&regcred::crypto::pepper::Pepper::parse(&pepper.into()).expect("a pepper"));
    write_chain(&pool, &key, 3).await;
    write_chain(&pool, &key, 1_500).await;
    installation.new_key("one").await;
    let exit = installation.run(&["audit", "verify"]).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(exit.stderr.contains("1503 events of earlier releases are not sealed"), "{exit:?}");

    let adopted = installation.must_run(&["audit", "adopt"]).await;
    assert_eq!(adopted, "1503 events in 2 chains are intact; 1503 of them were sealed now\n");
    // A process of the earlier release still ran.
    write_chain(&pool, &key, 2).await;
    let adopted = installation.must_run(&["audit", "adopt"]).await;
    assert_eq!(adopted, "1505 events in 3 chains are intact; 2 of them were sealed now\n");
    let adopted = installation.must_run(&["audit", "adopt"]).await;
    assert_eq!(adopted, "1505 events in 3 chains are intact; 0 of them were sealed now\n");
    let exit = installation.run(&["audit", "verify"]).await;
    assert_eq!((exit.code, exit.stderr.as_str()), (Some(0), ""), "{exit:?}");

    // Seals alone find a change of an adopted event, and a change stops the next adoption.
    let mut superuser = superuser(&pool).await;
    run(&mut superuser, "UPDATE audit_events SET actor_name = 'x' WHERE sequence = 2 AND key_id IS NULL")
        .await
        .expect("");
    let exit = installation.run(&["audit", "verify"]).await;
    assert!(exit.code == Some(1) && exit.stdout.contains("seal ") && exit.stdout.contains("chain "), "{exit:?}");
    assert_eq!(installation.run(&["audit", "adopt"]).await.code, Some(1));
}
