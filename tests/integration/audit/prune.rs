//! `regcred audit prune`, and what a verification finds after it.

use super::{
    tampering::{Tampering, reveal},
    *,
};
use crate::support::{files::TempDir, process::Exit};

/// Log with events of a command and of two services, of which the last one's are recent.
struct Log {
    tampering: Tampering,
    pool: PgPool,
    folder: TempDir,
    /// Time of the first seal with recent events, as an argument.
    before: String,
    /// Last seal before that time.
    through: i64,
}

impl Log {
    async fn new(pool: PgPool) -> Self {
        let tampering = Tampering::new(pool.clone()).await;
        let recent = "SELECT number - 1, to_json(sealed_at)#>>'{}' FROM audit_seals
                      WHERE (SELECT id FROM audit_events WHERE resource = 'registry-accounts/r1-0' ORDER BY id LIMIT 1)
                          = ANY (event_ids)";
        let (through, before): (i64, String) = sqlx::query_as(recent).fetch_one(&pool).await.expect("a seal");
        assert!(through >= 2, "{through}");
        Self { tampering, pool, folder: TempDir::new(), before, through }
    }

    async fn prune(&self, arguments: &[&str]) -> Exit {
        let command = ["audit", "prune", "--before", &self.before];
        self.tampering.installation.run(&[&command[..], arguments].concat()).await
    }

    /// Prunes with an export and returns the exported events.
    async fn must_prune(&self, name: &str) -> Vec<Value> {
        let file = self.folder.path().join(name);
        let file = file.to_str().expect("UTF-8");
        let exit = self.prune(&["--export", file]).await;
        assert_eq!(exit.code, Some(0), "{exit:?}");
        let lines = fs::read_to_string(file).expect("an export");
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    async fn count(&self) -> i64 {
        number(&self.pool, "SELECT count(*) FROM audit_events").await
    }

    /// Asserts that a verification with these arguments is good, and returns its output.
    async fn intact(&self, arguments: &[&str]) -> String {
        let exit = self.tampering.verify(arguments).await;
        assert_eq!(exit.code, Some(0), "{exit:?}");
        exit.stdout
    }

    async fn findings(&self, expected: &str) {
        let exit = self.tampering.verify(&[]).await;
        assert!(exit.code == Some(1) && exit.stdout.contains(expected), "{expected}: {exit:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pruned_log_is_verified_and_names_the_prune(pool: PgPool) {
    let mut log = Log::new(pool).await;
    let [old, new] = [log.file("old"), log.file("new")];
    log.intact(&["--save-anchors", &old]).await;
    let all = log.count().await;
    assert_eq!(log.prune(&[]).await.code, Some(2), "a copy, or no copy, must be chosen");
    let exit = log.prune(&["--dry-run"]).await;
    assert_eq!((exit.code, log.count().await), (Some(0), all), "{exit:?}");

    let exported = log.must_prune("events.ndjson").await;

    assert!(!exported.is_empty());
    assert!(
        exit.stdout.starts_with(&format!("{} events of the seals up to {}", exported.len(), log.through)),
        "{exit:?}"
    );
    // One event was added: that of the prune.
    assert_eq!(log.count().await, all - i64::try_from(exported.len()).expect("small") + 1);
    let stored: Vec<String> =
        sqlx::query_scalar("SELECT id::text FROM audit_events").fetch_all(&log.pool).await.expect("ids");
    assert!(exported.iter().all(|event| !stored.contains(&event["id"].as_str().expect("an id").to_owned())));
    assert!(exported.iter().all(|event| event["chain"]["hash"].as_str().is_some_and(|hash| !hash.is_empty())));
    let line = format!("pruned the events of the seals up to {}, at ", log.through);
    let runs: [&[&str]; 4] =
        [&[], &["--anchors", &old], &["--anchors", &old, "--since-anchor"], &["--save-anchors", &new]];
    for arguments in runs {
        let output = log.intact(arguments).await;
        assert!(output.contains(&line), "{arguments:?}: {output}");
        assert!(output.contains(&format!("{} events were pruned", exported.len())), "{output}");
    }
    let record = "SELECT actor_name FROM audit_events WHERE action = 'audit.prune' AND details->>'count' = $1";
    let count = exported.len().to_string();
    let actor: String = sqlx::query_scalar(record).bind(count).fetch_one(&log.pool).await.expect("the event");
    assert!(log.intact(&["--anchors", &new, "--since-anchor"]).await.contains(&format!("{actor} {line}")));

    // Sealing goes on, and nothing is pruned twice.
    let key = log.tampering.installation.new_key("after").await;
    log.tampering.use_service(&key, "after").await;
    let exit = log.prune(&["--export", &log.file("none")]).await;
    assert!(exit.code == Some(0) && exit.stdout.starts_with("0 events"), "{exit:?}");
    assert!(!fs::exists(log.file("none")).expect("a folder"));

    // A later prune keeps the record of the first one.
    log.before = chrono::Utc::now().to_rfc3339();
    let later = log.must_prune("later.ndjson").await;
    assert!(later.iter().all(|event| event["action"] != "audit.prune"), "{later:?}");
    let output = log.intact(&["--anchors", &new]).await;
    assert_eq!(output.matches("pruned the events of the seals up to").count(), 2, "{output}");
    let left: Vec<String> =
        sqlx::query_scalar("SELECT DISTINCT action FROM audit_events").fetch_all(&log.pool).await.expect("actions");
    assert_eq!(left, ["audit.prune"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn deletion_without_a_prune_is_found_after_a_prune(pool: PgPool) {
    let mut log = Log::new(pool).await;
    log.must_prune("events.ndjson").await;
    log.intact(&[]).await;
    log.tampering.keep().await;
    let last = "number = (SELECT max(number) FROM audit_seals)";
    for (sql, expected) in [
        (format!("DELETE FROM audit_events WHERE {}", reveal(0)), "is missing"),
        (format!("UPDATE audit_events SET actor_name = 'other' WHERE {}", reveal(0)), "was changed"),
        (format!("UPDATE audit_seals SET pruned_through = number - 1 WHERE {last}"), "changed or forged"),
        (
            format!(
                "UPDATE audit_seals SET pruned_through = number - 1 WHERE {last};
                 DELETE FROM audit_events WHERE {}",
                reveal(0)
            ),
            "is missing",
        ),
        ("DELETE FROM audit_events WHERE action = 'audit.prune'".to_owned(), "contains no record of that prune"),
        ("UPDATE audit_seals SET pruned_through = NULL".to_owned(), "changed or forged"),
    ] {
        log.tampering.sql(&sql).await;
        log.findings(expected).await;
        log.tampering.put_back().await;
    }
    log.intact(&[]).await;
}

/// A sealer takes `pruned_through` over from the last seal, so a change for a moment is passed on by
/// seals that are authentic.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn declaration_that_was_slipped_in_for_a_moment_is_found(pool: PgPool) {
    let mut log = Log::new(pool).await;
    let key = log.tampering.installation.new_key("before").await;
    let last: i64 = number(&log.pool, "SELECT max(number) FROM audit_seals").await;
    let set = |through: &str| format!("UPDATE audit_seals SET pruned_through = {through} WHERE number = {last}");
    log.tampering.sql(&set(&(last - 1).to_string())).await;
    log.tampering.use_service(&key, "after").await;
    log.tampering.sql(&set("NULL")).await;
    log.tampering.sql(&format!("DELETE FROM audit_events WHERE {}", reveal(0))).await;

    log.findings(&format!("seal {}: declares events as pruned", last + 1)).await;
    log.findings("is missing").await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn killed_prune_is_finished_by_the_next_one(pool: PgPool) {
    let log = Log::new(pool).await;
    let all = log.count().await;
    // The deletion waits for this row.
    let mut lock = log.pool.begin().await.expect("a transaction");
    let first = "SELECT id FROM audit_events ORDER BY id LIMIT 1 FOR UPDATE";
    sqlx::query(first).execute(&mut *lock).await.expect("locked");
    let [export, other] = [log.file("events"), log.file("other")];
    let command = ["audit", "prune", "--before", &log.before, "--export", &export];
    let process = log.tampering.installation.spawn(&command);
    eventually("the deletion waits", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
                           AND query LIKE 'DELETE FROM audit_events%' AND datname = current_database()";
        (number(&log.pool, waiting).await > 0).then_some(())
    })
    .await;
    process.signal("KILL");
    process.wait().await;
    lock.rollback().await.expect("released");

    // It was declared, and nothing was deleted.
    let output = log.intact(&[]).await;
    assert!(output.contains("0 events were pruned"), "{output}");
    assert_eq!(log.count().await, all + 1);
    let exported = fs::read_to_string(&export).expect("the export was complete").lines().count();

    let exit = log.prune(&["--export", &other]).await;

    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(exit.stdout.starts_with(&format!("{exported} events")), "{exit:?}");
    assert!(!fs::exists(&other).expect("a folder"), "the events are in the first export");
    assert_eq!(log.count().await, all + 1 - i64::try_from(exported).expect("small"));
    let output = log.intact(&[]).await;
    assert_eq!(output.matches("pruned the events of the seals up to").count(), 1, "{output}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn prune_is_refused_for_a_changed_log_or_another_role(pool: PgPool) {
    let mut log = Log::new(pool).await;
    let all = log.count().await;
    let refused = async |log: &Log, arguments: &[&str], expected: &str| {
        let exit = log.prune(arguments).await;
        assert!(exit.code == Some(1) && exit.stderr.contains(expected), "{exit:?}");
        assert_eq!(number(&log.pool, "SELECT count(*) FROM audit_seals WHERE pruned_through IS NOT NULL").await, 0);
    };
    let existing = log.folder.write("existing", "");
    refused(&log, &["--export", existing.to_str().expect("UTF-8")], "existing").await;
    let service = Installation::new(&service_url(&log.pool).await);
    let exit = service.run(&["audit", "prune", "--before", &log.before, "--no-export"]).await;
    assert!(exit.code == Some(1) && exit.stderr.contains("does not own the audit log"), "{exit:?}");
    let late = (chrono::Utc::now() + chrono::TimeDelta::hours(1)).to_rfc3339();
    let exit = log.tampering.installation.run(&["audit", "prune", "--before", &late, "--no-export"]).await;
    assert!(exit.code == Some(1) && exit.stderr.contains("must be in the past"), "{exit:?}");
    assert_eq!(log.count().await, all);

    log.tampering.sql(&format!("DELETE FROM audit_events WHERE {}", reveal(0))).await;
    refused(&log, &["--no-export"], "Nothing was pruned: 1 findings").await;
}
