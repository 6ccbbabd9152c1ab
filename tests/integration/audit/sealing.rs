//! Sealing of committed batches, and the numbers that expose removed ones.

use std::process::Command;

use regcred::{
    domain::{
        audit::{Action, NewEvent, Resource, seal::BatchEntry},
        caller::{Actor, ActorKind},
    },
    service::audit::{TransactionalAudit, verify::ProcessNumbers},
    storage,
};
use uuid::Uuid;

use super::*;
use crate::support::{app::peppers, given, postgres::Postgres};

fn event() -> NewEvent {
    let actor = Actor { kind: ActorKind::CommandLine, id: None, name: "dev".to_owned() };
    NewEvent::by(&actor, Action::MasterKeyRotate, Resource::master_keys())
}

/// Inserts a batch of a process as the service does, with one event or none.
async fn insert_batch(
    conn: &mut storage::PgConnection,
    process_id: Uuid,
    sequence: i64,
    settled_through: i64,
    has_event: bool,
) {
    let event = event().stamp(Uuid::now_v7());
    let events = [audit_key().sign_event(event, process_id, sequence)];
    let events = if has_event { &events[..] } else { &[] };
    let entry = BatchEntry { process_id, sequence, settled_through, events: 0 };
    let batch = audit_key().sign_batch(entry, events.iter().map(regcred::domain::audit::StoredEvent::binding));
    let inserted = storage::audit::insert_batch(conn, &batch, events).await.expect("inserted");
    assert_eq!((inserted.events, inserted.batches), (i64::from(has_event), 1));
}

async fn register(app: &TestApp, name: &str) {
    app.admin().post("/v1/registry-accounts", &account(name)).await.expect(201);
}

async fn everything_is_sealed(pool: &PgPool) {
    eventually("everything is sealed", async || {
        (number(pool, "SELECT count(*) FROM audit_unsealed").await == 0).then_some(())
    })
    .await;
}

async fn tampering(app: &TestApp, kind: &str) -> f64 {
    metric(app, &format!("regcred_audit_tampering_total{{kind=\"{kind}\"}}")).await
}

async fn becomes_visible(app: &TestApp, kind: &str) {
    eventually("tampering is counted", async || (tampering(app, kind).await > 0.0).then_some(())).await;
}

/// Numbers of the process that wrote the event of an account.
async fn process_of(report: &Report, pool: &PgPool, resource: &str) -> Option<ProcessNumbers> {
    let id: Uuid = sqlx::query_scalar("SELECT chain_id FROM audit_events WHERE resource = $1")
        .bind(resource)
        .fetch_one(pool)
        .await
        .expect("an event");
    report.anchor.processes.get(&id).cloned()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn late_commit_is_sealed_after_later_batches(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let process_id = Uuid::now_v7();
    let mut late = app.storage().begin().await.expect("a transaction");
    insert_batch(&mut late, process_id, 1, 0, true).await;
    for number in 0..3 {
        register(&app, &format!("a-{number}")).await;
    }
    everything_is_sealed(&app.pool).await;
    let seals = number(&app.pool, "SELECT max(number) FROM audit_seals").await;

    late.commit().await.expect("committed");

    everything_is_sealed(&app.pool).await;
    let report = assert_whole(&app.pool).await;
    assert!(report.anchor.number > seals);
    assert_eq!(report.anchor.processes[&process_id].through, 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn sealer_that_dies_loses_and_repeats_no_batch(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let key = installation.new_key("admin").await;
    let mut superuser = superuser(&pool).await;
    for round in 0..3 {
        let service = installation.serve().await;
        // The sealer waits in the middle of its transaction.
        run(&mut superuser, "BEGIN; LOCK TABLE audit_seals IN EXCLUSIVE MODE").await.expect("locked");
        let client = service.client(&key);
        client.post("/v1/registry-accounts", &account(&format!("a-{round}"))).await.expect(201);
        eventually("the sealer waits", async || {
            let waiting = "SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%INTO audit_seals%'";
            (number(&pool, waiting).await > 0).then_some(())
        })
        .await;
        service.process.signal("KILL");
        drop(service);
        run(&mut superuser, "ROLLBACK").await.expect("released");
    }
    let service = installation.serve().await;
    everything_is_sealed(&pool).await;
    service.process.signal("TERM");
    service.process.wait().await;

    let exit = installation.run(&["audit", "verify"]).await;

    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(exit.stdout.starts_with("The audit log is intact: 4 events"), "{exit:?}");
    assert_eq!(exit.stderr.matches("runs or died").count(), 3, "{exit:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn two_sealers_make_one_chain_even_if_their_lock_is_held(pool: PgPool) {
    let one = TestApp::spawn(pool).await;
    let other = TestApp::beside(&one).await;
    let mut superuser = superuser(&one.pool).await;
    for lock in ["SELECT 1", "SELECT pg_advisory_lock(20261129000002)"] {
        run(&mut superuser, lock).await.expect("locked");
        let work = async |(index, app): (usize, &TestApp)| {
            for number in 0..20 {
                let name = format!("p{index}-{number}-{}", lock.len());
                app.admin().post("/v1/registry-accounts", &account(&name)).await.expect(201);
                app.admin().post("/v1/docker-configs", &json!({"accounts": [name]})).await.expect(200);
            }
        };
        join_all([&one, &other].into_iter().enumerate().map(work)).await;
        everything_is_sealed(&one.pool).await;
        assert_whole(&one.pool).await;
    }
    for app in [&one, &other] {
        assert!(metric(app, "regcred_audit_seals_total").await > 0.0);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn forged_batch_is_removed_and_counted(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register(&app, "a").await;
    let forge = "INSERT INTO audit_unsealed (id, key_id, process_id, sequence, settled_through, event_ids, hashes, mac)
         SELECT gen_random_uuid(), key_id, chain_id, 1000, 1000, '{}', '{}', '\\x00' FROM audit_events
         WHERE resource = 'registry-accounts/a'";
    assert_eq!(run(&mut superuser(&app.pool).await, forge).await.expect("inserted"), 1);

    becomes_visible(&app, "batch-forged").await;

    everything_is_sealed(&app.pool).await;
    let report = assert_whole(&app.pool).await;
    let numbers = process_of(&report, &app.pool, "registry-accounts/a").await.expect("a process");
    assert!(!numbers.is_closed && numbers.last() < 10, "{numbers:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn copied_batch_is_found(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut tx = app.storage().begin().await.expect("a transaction");
    insert_batch(&mut tx, Uuid::now_v7(), 1, 1, true).await;
    let copy = "CREATE TABLE copied AS SELECT * FROM audit_unsealed";
    sqlx::query(copy).execute(&mut *tx).await.expect("copied");
    tx.commit().await.expect("committed");
    everything_is_sealed(&app.pool).await;

    run(&mut superuser(&app.pool).await, "INSERT INTO audit_unsealed SELECT * FROM copied").await.expect("inserted");

    everything_is_sealed(&app.pool).await;
    let (_, findings) = verified(&app.pool).await;
    assert!(!findings.is_empty(), "the copy is not found");
    assert!(findings.iter().all(|finding| finding.contains("its batch was copied")), "{findings:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rollback_of_seals_under_a_running_process_is_found(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for number in 0..3 {
        register(&app, &format!("a-{number}")).await;
        everything_is_sealed(&app.pool).await;
    }
    // The events of the last seals go too: what remains is consistent in itself.
    let roll_back = "WITH gone AS (DELETE FROM audit_seals WHERE number > (SELECT max(number) - 2 FROM audit_seals) RETURNING event_ids)
         DELETE FROM audit_events USING gone WHERE id = ANY (event_ids)";
    assert!(run(&mut superuser(&app.pool).await, roll_back).await.expect("removed") > 0);

    becomes_visible(&app, "seals-rolled-back").await;
    register(&app, "b").await;

    everything_is_sealed(&app.pool).await;
    let (_, findings) = verified(&app.pool).await;
    assert!(findings.iter().any(|finding| finding.contains("seals were rolled back")), "{findings:?}");
    assert!(findings.iter().any(|finding| finding.contains("are missing")), "{findings:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn restored_dump_is_sealed_on_another_server(pool: PgPool) {
    let url = pool.connect_options().to_url_lossy().to_string();
    let installation = Installation::new(&url);
    let key = installation.new_key("admin").await;
    let service = installation.serve().await;
    service.client(&key).post("/v1/registry-accounts", &account("a")).await.expect(201);
    service.process.signal("KILL");
    drop(service);
    let mut other = Postgres::prepare();
    other.start().await;
    let bin = given("REGCRED_TEST_PG_BIN");
    // libpq refuses the parameters that only sqlx knows.
    let (source, _) = url.split_once('?').unwrap_or((&url, ""));
    let restore = format!(
        "'{bin}/pg_dump' --no-owner --no-privileges '{source}' | '{bin}/psql' -q -v ON_ERROR_STOP=1 '{}'",
        other.url()
    );
    let restored = Command::new("bash").args(["-o", "pipefail", "-c", &restore]).output().expect("a shell");
    assert!(restored.status.success(), "{restored:?}");

    let moved = installation.with("REGCRED_DATABASE_URL_FILE", "").with("REGCRED_DATABASE_URL", &other.url());
    let service = moved.serve().await;
    service.client(&key).post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    service.process.signal("TERM");
    service.process.wait().await;

    let exit = moved.run(&["audit", "verify"]).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(exit.stdout.starts_with("The audit log is intact: 3 events"), "{exit:?}");
}

/// Rows that an open transaction keeps from being removed must not slow down sealing, and are
/// removed once it has ended.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn long_transaction_neither_stops_sealing_nor_leaves_bloat(pool: PgPool) {
    const BATCHES: i64 = 3_000;
    let app = TestApp::spawn(pool).await;
    let mut reader = storage::audit::snapshot(&app.storage()).await.expect("a snapshot");
    sqlx::query("SELECT count(*) FROM audit_seals").execute(&mut *reader).await.expect("a snapshot");
    let process_id = Uuid::now_v7();
    let start = Instant::now();
    for page in 0..BATCHES / 100 {
        let mut tx = app.storage().begin().await.expect("a transaction");
        for index in 1..=100 {
            insert_batch(&mut tx, process_id, page * 100 + index, 0, true).await;
        }
        tx.commit().await.expect("committed");
    }
    everything_is_sealed(&app.pool).await;
    let took = start.elapsed();
    assert!(metric(&app, "regcred_audit_oldest_unsealed_seconds").await < 10.0);
    assert!(number(&app.pool, "SELECT max(number) FROM audit_seals").await >= BATCHES / 100);
    assert!(took < Duration::from_mins(1), "{took:?}");

    reader.commit().await.expect("ended");

    let mut superuser = superuser(&app.pool).await;
    run(&mut superuser, "VACUUM audit_unsealed").await.expect("vacuumed");
    assert!(number(&app.pool, "SELECT pg_relation_size('audit_unsealed')").await < 1 << 20);
    assert_eq!(assert_whole(&app.pool).await.anchor.processes[&process_id].through, BATCHES);
}

/// Installs a superuser's trigger on the insert of events.
async fn install(pool: &PgPool, timing: &str, body: &str) {
    let sql = format!(
        "CREATE FUNCTION tamper() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN {body} END $$;
         CREATE {timing} ON audit_events {} FOR EACH ROW EXECUTE FUNCTION tamper()",
        if timing.starts_with("CONSTRAINT") { "DEFERRABLE INITIALLY DEFERRED" } else { "" }
    );
    run(&mut superuser(pool).await, &sql).await.expect("installed");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn action_whose_event_a_trigger_drops_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register(&app, "a").await;
    install(&app.pool, "TRIGGER tamper BEFORE INSERT", "RETURN NULL;").await;

    let admin = app.admin();
    admin.post("/v1/registry-accounts", &account("b")).await.problem(503, "audit-unavailable");
    admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.problem(503, "audit-unavailable");

    assert!(tampering(&app, "write-altered").await >= 2.0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn batches_that_a_trigger_removes_at_the_commit_are_found(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register(&app, "a").await;
    let remove = "DELETE FROM audit_unsealed WHERE NEW.id = ANY (event_ids); DELETE FROM audit_events WHERE id = NEW.id; RETURN NULL;";
    install(&app.pool, "CONSTRAINT TRIGGER tamper AFTER INSERT", remove).await;
    let events = number(&app.pool, "SELECT count(*) FROM audit_events").await;

    register(&app, "b").await;
    register(&app, "c").await;
    app.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    assert_eq!(number(&app.pool, "SELECT count(*) FROM audit_events").await, events);

    // The process itself notices, and its next batch proves it.
    becomes_visible(&app, "batch-removed").await;
    eventually("a verification finds it", async || {
        let (_, findings) = verified(&app.pool).await;
        findings.iter().any(|finding| finding.contains("are missing")).then_some(())
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn event_that_a_trigger_alters_is_found(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    install(&app.pool, "TRIGGER tamper BEFORE INSERT", "NEW.actor_name = 'other'; RETURN NEW;").await;
    register(&app, "a").await;
    let (_, findings) = verified(&app.pool).await;
    assert!(findings.iter().any(|finding| finding.ends_with("was changed")), "{findings:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn killed_process_is_listed_with_its_last_batch(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let key = installation.new_key("admin").await;
    let service = installation.serve().await;
    service.client(&key).post("/v1/registry-accounts", &account("a")).await.expect(201);
    service.process.signal("KILL");
    drop(service);

    let exit = installation.run(&["audit", "verify"]).await;

    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(exit.stderr.starts_with("process ") && exit.stderr.contains("runs or died: last batch 2"), "{exit:?}");
}

/// Rolled-back and cut-off transactions are accounted for.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn change_that_is_rolled_back_or_cut_off_leaves_no_gap(pool: PgPool) {
    let storage = storage::PgPool::from(pool.clone());
    let audit = TransactionalAudit::open(&storage, peppers());
    let mut superuser = superuser(&pool).await;
    audit.record_alone(&storage, event()).await.expect("recorded");
    for body in ["RAISE EXCEPTION 'refused';", "PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL;"] {
        install(&pool, "CONSTRAINT TRIGGER tamper AFTER INSERT", body).await;
        audit.record_alone(&storage, event()).await.expect_err("not committed");
        run(&mut superuser, "DROP FUNCTION tamper CASCADE").await.expect("removed");
        audit.record_alone(&storage, event()).await.expect("recorded");
    }
    let report = assert_whole(&pool).await;
    let numbers = report.anchor.processes.values().next().expect("a process").clone();
    assert_eq!(numbers.in_flight(), [(2, 2), (4, 4)], "{numbers:?}");

    audit.close().await.expect("closed");

    let report = assert_whole(&pool).await;
    assert_eq!(report.events, 3);
    assert!(report.anchor.processes.is_empty(), "{report:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn write_that_commits_after_it_was_voided_is_no_finding(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let process_id = Uuid::now_v7();
    let mut late = app.storage().begin().await.expect("a transaction");
    insert_batch(&mut late, process_id, 1, 0, true).await;
    let mut conn = app.storage().acquire().await.expect("a connection");
    insert_batch(&mut conn, process_id, 1, 0, false).await;
    insert_batch(&mut conn, process_id, 2, 2, false).await;
    everything_is_sealed(&app.pool).await;
    late.commit().await.expect("committed");
    everything_is_sealed(&app.pool).await;
    assert_whole(&app.pool).await;
    assert!(tampering(&app, "batch-forged").await + tampering(&app, "batch-removed").await < 0.5);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn changes_and_reveals_are_refused_while_sealing_is_stalled(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register(&app, "a").await;
    everything_is_sealed(&app.pool).await;
    let mut superuser = superuser(&app.pool).await;
    let (revoke, grant) =
        ("REVOKE INSERT ON audit_seals FROM regcred_service", "GRANT INSERT ON audit_seals TO regcred_service");
    run(&mut superuser, revoke).await.expect("revoked");
    register(&app, "b").await;
    let age = "UPDATE audit_unsealed SET written_at = written_at - interval '2 minutes'";
    assert!(run(&mut superuser, age).await.expect("aged") > 0);

    let admin = app.admin();
    let reveal = async || admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await;
    eventually("reveals are refused", async || (reveal().await.status == 503).then_some(())).await;
    reveal().await.problem(503, "audit-unavailable");
    admin.post("/v1/registry-accounts", &account("c")).await.problem(503, "audit-unavailable");
    admin.get("/v1/registry-accounts").await.expect(200);
    assert!(metric(&app, "regcred_audit_oldest_unsealed_seconds").await > 60.0);

    run(&mut superuser, grant).await.expect("granted");
    eventually("reveals are served", async || (reveal().await.status == 200).then_some(())).await;
    assert_whole(&app.pool).await;
}
