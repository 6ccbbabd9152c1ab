//! The audit record: nothing is done without its event, no event can be changed unseen, and nobody fills the disk with it.

use std::{
    collections::BTreeMap,
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::join_all, stream};
use regcred::{
    domain::{
        audit::{Action, NewEvent, Resource},
        caller::{Actor, ActorKind},
    },
    service::audit::{
        TransactionalAudit,
        verify::{Finding, Report, Watcher, verify},
        writer::AuditMetrics,
    },
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, PgConnection, PgPool};

use crate::{
    support::{
        PATIENCE,
        app::{TestApp, audit_key},
        client::{Answer, Client},
        eventually,
        files::TempDir,
        given, kubernetes,
        listener::refusing_server,
        postgres::{service_url, superuser},
        process::{Exit, Installation},
    },
    verify::listening::{answer, serve},
};

const CANARY: &str = "canary-of-a-password";

fn account(name: &str) -> Value {
    json!({"name": name, "registry": "ghcr.io", "username": "martin", "password": CANARY})
}

async fn run(conn: &mut PgConnection, sql: &str) -> sqlx::Result<u64> {
    let done = conn.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await?;
    Ok(done.rows_affected())
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("a number")
}

/// All events that a query finds, the oldest first.
async fn events(client: &Client, query: &str) -> Vec<Value> {
    let answer = client.get(&format!("/v1/audit-events?format=ndjson&{query}")).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/x-ndjson"), "{answer:?}");
    let lines = answer.body.lines().map(|line| serde_json::from_str(line).expect("JSON"));
    let mut events: Vec<Value> = lines.collect();
    events.reverse();
    events
}

/// Action, resource and outcome.
fn short(event: &Value) -> String {
    let text = |member: &str| event[member].as_str().unwrap_or("-").to_owned();
    format!("{} {} {}", text("action"), text("resource"), text("outcome"))
}

/// What a verification of a running app finds.
struct Findings(Vec<String>);

impl Watcher for Findings {
    fn found(&mut self, finding: &Finding) {
        self.0.push(finding.to_string());
    }

    fn progress(&mut self, seen: u64, all: u64) {
        assert!(seen <= all);
    }
}

async fn verified(pool: &PgPool) -> (Report, Vec<String>) {
    let mut findings = Findings(Vec::new());
    let report = verify(pool, &[audit_key()], Vec::new(), &mut findings).await.expect("verified");
    (report, findings.0)
}

pub async fn assert_whole(pool: &PgPool) -> Report {
    let (report, findings) = verified(pool).await;
    assert!(findings.is_empty(), "{findings:#?}");
    let events = number(pool, "SELECT count(*) FROM audit_events").await;
    assert_eq!(i64::try_from(report.events), Ok(events));
    report
}

// ---- What is recorded ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_change_and_every_reveal_says_who_did_what_to_what_and_when_and_no_value(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    let before = chrono::Utc::now() - chrono::TimeDelta::seconds(1);
    let mut expected: Vec<(&str, String, Answer)> = Vec::new();
    let mut done = |what: &'static str, answer: Answer| {
        assert!(answer.status < 300, "{what}: {answer:?}");
        expected.push((what, answer.header("x-request-id").to_owned(), answer));
    };

    done("registryAccount.create registry-accounts/a", admin.post("/v1/registry-accounts", &account("a")).await);
    done("registryAccount.create registry-accounts/b", {
        let other = json!({"name": "b", "registry": "quay.io", "username": "martin", "password": CANARY});
        admin.post("/v1/registry-accounts", &other).await
    });
    let change = async |body: Value| admin.patch("/v1/registry-accounts/a", &body).await;
    done("registryAccount.update registry-accounts/a", change(json!({"username": "lena"})).await);
    done("registryAccount.rotate registry-accounts/a", change(json!({"password": format!("{CANARY}-2")})).await);
    done("dockerConfig.reveal registry-accounts/a", {
        admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await
    });
    done("dockerConfig.reveal docker-configs", {
        let manifest = json!({"accounts": ["a", "b"], "secret": {"name": "pull"}});
        admin.post("/v1/docker-configs", &manifest).await
    });
    done("secret.deliver clusters/dev", {
        let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
        admin.post(&path, &json!({"name": "pull", "accounts": ["a"]})).await
    });
    done("registryAccount.create registry-accounts/cdocker-io", {
        let config = json!({"auths": {"https://index.docker.io/v1/": {"username": "martin", "password": CANARY}}});
        admin.post("/v1/registry-accounts:import?namePrefix=c", &config).await
    });
    done("registryAccount.import registry-accounts", {
        let config = json!({"auths": {"https://index.docker.io/v1/": {"username": "martin", "password": CANARY}}});
        let answer = admin.post("/v1/registry-accounts:import?namePrefix=c&dryRun=true", &config).await;
        assert_eq!(answer.expect(200)["items"][0]["outcome"], "unchanged");
        answer
    });
    let cluster = json!({"name": "k", "server": "https://127.0.0.1:1", "auth": {"type": "token", "token": CANARY}});
    done("cluster.create clusters/k", admin.post("/v1/clusters", &cluster).await);
    let allow = json!({"auth": {"type": "token", "token": CANARY}});
    done("cluster.update clusters/k", admin.patch("/v1/clusters/k", &allow).await);
    done("cluster.delete clusters/k", admin.delete("/v1/clusters/k").await);
    done("registryAccount.verify registry-accounts/b", admin.post("/v1/registry-accounts/b/verify", &json!({})).await);
    done("registryAccount.delete registry-accounts/b", admin.delete("/v1/registry-accounts/b").await);
    let provider = json!({"name": "p", "type": "oidc", "issuer": "https://issuer.example.com", "audience": "regcred",
        "rules": [{"claims": {"sub": "ci"}, "role": "viewer"}]});
    let providers = "/v1/identity-providers";
    done("identityProvider.create identity-providers/p", admin.post(providers, &provider).await);
    let change = json!({"audience": "another"});
    done("identityProvider.update identity-providers/p", admin.patch(&format!("{providers}/p"), &change).await);
    done("identityProvider.delete identity-providers/p", admin.delete(&format!("{providers}/p")).await);
    let declaration = json!({"accounts": ["a"], "secret": {"name": "declared"}, "deletionPolicy": "retain",
        "targets": [{"cluster": "dev", "namespaces": [namespace]}]});
    let declared = admin.request("PUT", "/v1/pull-secrets/t").json(&declaration);
    done("pullSecret.declare pull-secrets/t", admin.send(declared).await);
    done("pullSecret.sync pull-secrets/t", admin.post("/v1/pull-secrets/t/sync", &json!({})).await);
    done("pullSecret.delete pull-secrets/t", admin.delete("/v1/pull-secrets/t").await);
    let key = json!({"name": "ci", "role": "viewer"});
    done("apiKey.create api-keys/", admin.post("/v1/api-keys", &key).await);
    let id = admin.get("/v1/api-keys").await.expect(200)["items"][1]["id"].as_str().expect("an id").to_owned();
    done("apiKey.revoke api-keys/", admin.delete(&format!("/v1/api-keys/{id}")).await);
    // Not again: nothing was done. Nor where there is nothing to compare with.
    assert_eq!(admin.delete(&format!("/v1/api-keys/{id}")).await.status, 204);
    assert_eq!(admin.post("/v1/registry-accounts:import?dryRun=true", &json!({"auths": {}})).await.status, 200);

    let me = admin.get("/v1/me").await.expect(200);
    let found = events(&admin, "").await;
    for (what, request_id, _) in &expected {
        let of_request: Vec<&Value> = found.iter().filter(|event| event["requestId"] == **request_id).collect();
        let outcomes: Vec<&str> = of_request.iter().map(|event| event["outcome"].as_str().expect("a word")).collect();
        let is_delivery = what.starts_with("secret.deliver");
        assert_eq!(outcomes, if is_delivery { vec!["attempt", "success"] } else { vec!["success"] }, "{what}");
        for event in of_request {
            assert!(short(event).starts_with(what), "{what}: {event}");
            assert_eq!(event["actor"], json!({"type": "apiKey", "id": me["id"], "name": "admin"}), "{event}");
            assert_eq!(event["sourceIp"], "127.0.0.1", "{event}");
            let at: chrono::DateTime<chrono::Utc> = event["at"].as_str().expect("a time").parse().expect("a time");
            assert!(at >= before && at <= chrono::Utc::now(), "{event}");
        }
    }
    // And nothing else by this caller, but that he reads this.
    let by_admin = found.iter().filter(|event| event["actor"]["type"] == "apiKey");
    let known: BTreeSet<&String> = expected.iter().map(|(_, id, _)| id).collect();
    let others: Vec<String> =
        by_admin.filter(|e| !known.contains(&e["requestId"].as_str().unwrap().to_owned())).map(short).collect();
    assert_eq!(others, ["cluster.create clusters/dev success", "audit.export audit-events success"]);

    let compared = found.iter().find(|event| event["action"] == "registryAccount.import").expect("an event");
    assert_eq!(compared["details"], json!({"dryRun": true}));
    assert_eq!(compared["related"], json!(["registry-accounts/cdocker-io"]));
    let of = |action: &str| found.iter().find(|event| event["action"] == action).expect("an event");
    assert_eq!(of("registryAccount.rotate")["details"], json!({"fields": ["password"], "version": 3}));
    let several = found.iter().find(|event| event["resource"] == "docker-configs").expect("an event");
    assert_eq!(several["related"], json!(["registry-accounts/a", "registry-accounts/b"]));
    let delivery = of("secret.deliver");
    assert_eq!(delivery["resource"], format!("clusters/dev/namespaces/{namespace}/secrets/pull"));
    assert_eq!(delivery["related"], json!(["clusters/dev", "registry-accounts/a"]));
    let all = json!(found).to_string();
    assert!(!all.contains(CANARY) && !all.contains("Y2FuYXJ5LW9mLWEtcGFzc3dvcmQ"), "{all}");
    assert_whole(&app.pool).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn events_are_found_by_resource_actor_action_outcome_and_time_page_by_page(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for name in ["a", "b"] {
        let registry = format!("{name}.example.com");
        app.register_account(name, &registry, "martin", CANARY).await;
    }
    let ci = app.caller("ci", "renderer", Some(json!({"accounts": ["a", "b"]}))).await;
    for accounts in [json!(["a"]), json!(["b"]), json!(["a", "b"]), json!(["a"])] {
        ci.post("/v1/docker-configs", &json!({"accounts": accounts})).await.expect(200);
    }
    let admin = app.admin();
    let count = async |query: &str| events(&admin, query).await.len();

    assert_eq!(count("resource=registry-accounts/a").await, 4);
    assert_eq!(count("resource=registry-accounts/a&action=dockerConfig.reveal").await, 3);
    assert_eq!(count("resource=registry-accounts/b&actor=ci").await, 2);
    assert_eq!(count("resource=docker-configs").await, 1);
    assert_eq!(count("actor=ci").await, 4);
    assert_eq!(count("actor=nobody").await, 0);
    assert_eq!(count("action=apiKey.create&actor=somebody").await, 1);
    assert_eq!(count("outcome=denied").await, 0);

    // Newest first, every event once, whatever the size of a page.
    let mut ids = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = admin.get(&format!("/v1/audit-events?limit=3{cursor}")).await.expect(200);
        ids.extend(page["items"].as_array().expect("items").iter().map(|e| e["id"].as_str().unwrap().to_owned()));
        let Some(next) = page["next"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert!(ids.is_sorted_by(|one, next| one > next), "{ids:?}");
    assert_eq!(ids.len(), BTreeSet::from_iter(&ids).len());

    // `from` is part of it, `to` is not.
    let reveals = events(&admin, "action=dockerConfig.reveal").await;
    let at = reveals[2]["at"].as_str().expect("a time");
    let earlier = reveals.iter().filter(|event| event["at"].as_str() < Some(at)).count();
    assert_eq!(count(&format!("action=dockerConfig.reveal&to={at}")).await, earlier);
    assert_eq!(count(&format!("action=dockerConfig.reveal&from={at}")).await, 4 - earlier);

    for (query, field) in [
        ("resource=registry-accounts/A", "resource"),
        ("action=nothing", "action"),
        ("outcome=perhaps", "outcome"),
        ("from=yesterday", "from"),
        ("limit=0", "limit"),
        ("cursor=x", "cursor"),
        ("format=xml", "format"),
        ("password=x", "password"),
    ] {
        let refused = admin.get(&format!("/v1/audit-events?{query}")).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field]);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_is_done_at_the_command_line_is_on_record_with_the_user_of_the_system(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    installation.must_run(&["api-key", "create", "--name", "one"]).await;
    installation.must_run(&["api-key", "create", "--name", "two", "--role", "viewer"]).await;
    installation.must_run(&["api-key", "revoke", "--name", "two"]).await;
    installation.must_run(&["api-key", "revoke", "--name", "one", "--even-last-admin"]).await;
    installation.must_run(&["master-key", "rotate"]).await;

    let lines = installation.must_run(&["audit", "export"]).await;
    let mut found: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    found.reverse();

    let did: Vec<String> = found
        .iter()
        .map(|e| format!("{} {} {}", e["action"].as_str().unwrap(), e["outcome"].as_str().unwrap(), e["details"]))
        .collect();
    assert_eq!(
        did,
        [
            r#"apiKey.create success {"name":"one","role":"admin"}"#,
            r#"apiKey.create success {"name":"two","role":"viewer"}"#,
            r#"apiKey.revoke success {"name":"two","role":"viewer"}"#,
            r#"apiKey.revoke success {"name":"one","role":"admin"}"#,
            "masterKey.rotate attempt {}",
            r#"masterKey.rotate success {"count":0}"#,
        ]
    );
    let user = fs::read_to_string("/etc/passwd").expect("users");
    for event in &found {
        let actor = &event["actor"];
        assert_eq!((&actor["type"], &actor["id"]), (&json!("commandLine"), &Value::Null));
        let name = actor["name"].as_str().expect("a name");
        assert!(user.lines().any(|line| line.starts_with(&format!("{name}:"))) || name.starts_with("uid-"), "{name}");
    }
    let only = installation.must_run(&["audit", "export", "--action", "masterKey.rotate"]).await;
    assert_eq!(only.lines().count(), 2);
    assert!(
        installation
            .must_run(&["audit", "verify"])
            .await
            .starts_with("The audit record is whole: 6 events in 5 chains")
    );
}

// ---- What was refused ----

/// A key that is well-formed and nobody's.
fn forged(number: u128) -> String {
    let body = format!("rgc_{number:032x}_{}", "7".repeat(64));
    format!("{body}{:08x}", crc32fast::hash(body.as_bytes()))
}

async fn denied(app: &TestApp, query: &str, count: usize) -> Vec<Value> {
    eventually("refusals are written", async || {
        let found = events(&app.admin(), &format!("outcome=denied&{query}")).await;
        (found.len() >= count).then_some(found)
    })
    .await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_is_refused_is_on_record_whether_for_want_of_a_key_a_role_or_a_grant(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("mine", "ghcr.io", "martin", CANARY).await;
    app.register_account("foreign", "quay.io", "martin", CANARY).await;
    app.admin()
        .post("/v1/clusters", &json!({"name": "foreign", "server": "https://127.0.0.1:1", "auth": {"type": "none"}}))
        .await
        .expect(201);
    app.admin()
        .post("/v1/clusters", &json!({"name": "mine", "server": "https://127.0.0.1:1", "auth": {"type": "none"}}))
        .await
        .expect(201);
    let grants = json!({"accounts": ["mine"], "clusters": ["mine"], "namespaces": ["mine"]});
    let renderer = app.caller("renderer", "renderer", Some(grants.clone())).await;
    let deliverer = app.caller("deliverer", "deliverer", Some(grants.clone())).await;
    let operator = app.caller("operator", "operator", Some(grants)).await;
    let ended = app.new_key("ended", None).await;
    app.revoke_key("ended", false).await.expect("revoked");

    app.anonymous().with_key("rgc_wrong").get("/v1/me").await.problem(401, "unauthenticated");
    app.anonymous().with_key(&forged(7)).get("/v1/me").await.problem(401, "unauthenticated");
    app.anonymous().with_key(&ended).get("/v1/me").await.problem(401, "unauthenticated");
    deliverer.post("/v1/docker-configs", &json!({"accounts": ["mine"]})).await.problem(403, "forbidden");
    renderer
        .post("/v1/docker-configs", &json!({"accounts": ["mine", "foreign"]}))
        .await
        .problem(422, "invalid-request");
    renderer.get("/v1/registry-accounts/foreign").await.problem(404, "not-found");
    operator.delete("/v1/clusters/foreign").await.problem(404, "not-found");
    operator.post("/v1/registry-accounts", &account("new")).await.problem(403, "forbidden");
    let path = "/v1/clusters/mine/namespaces/kube-system/secrets";
    deliverer.post(path, &json!({"name": "pull", "accounts": ["mine"]})).await.problem(404, "namespace-not-found");
    operator.get("/v1/audit-events").await.problem(403, "forbidden");
    let own = json!({"name": "mine", "auth": {"type": "inCluster"}});
    operator.post("/v1/clusters", &own).await.problem(403, "forbidden");
    let pods = json!({"name": "pods", "type": "tokenReview", "cluster": "mine", "audience": "regcred-mine",
        "rules": [{"claims": {"namespace": "mine", "serviceAccount": "ci"}, "role": "viewer"}]});
    app.admin().post("/v1/identity-providers", &pods).await.expect(201);
    operator.patch("/v1/clusters/mine", &json!({"server": "https://127.0.0.1:2"})).await.problem(403, "forbidden");
    let declare = async |client: &Client, name: &str, cluster: &str| {
        let declaration = json!({"accounts": ["foreign"], "secret": {"name": "pull"}, "deletionPolicy": "retain",
            "targets": [{"cluster": cluster, "namespaces": ["mine"]}]});
        client.send(client.request("PUT", &format!("/v1/pull-secrets/{name}")).json(&declaration)).await
    };
    declare(&app.admin(), "hidden", "foreign").await.expect(201);
    operator.get("/v1/pull-secrets/hidden").await.problem(404, "not-found");
    declare(&operator, "new", "mine").await.problem(422, "invalid-request");
    // Not refused, but not there, or not well-formed.
    operator.get("/v1/pull-secrets/nothing").await.problem(404, "not-found");
    renderer.get("/v1/registry-accounts/nothing").await.problem(404, "not-found");
    renderer.post("/v1/docker-configs", &json!({"accounts": []})).await.problem(422, "invalid-request");
    app.admin().post("/v1/docker-configs", &json!({"accounts": ["nothing"]})).await.problem(422, "invalid-request");
    app.anonymous().get("/v1/me").await.problem(401, "unauthenticated");

    let found = denied(&app, "", 14).await;

    let mut short: Vec<String> = found
        .iter()
        .map(|e| {
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let Value::Object(details) = &e["details"] else { panic!("{e}") };
            assert_eq!((&details["count"], &e["sourceIp"]), (&json!(1), &json!("127.0.0.1")), "{e}");
            let (actor, action, resource) = (text(&e["actor"]["name"]), text(&e["action"]), text(&e["resource"]));
            format!("{actor} {action} {resource} {}", text(&details["reason"]))
        })
        .collect();
    short.sort();
    assert_eq!(
        short,
        [
            "- caller.authenticate - malformed-key",
            "- caller.authenticate - wrong-key",
            "deliverer dockerConfig.reveal docker-configs role",
            "deliverer secret.deliver clusters/mine/namespaces/kube-system/secrets/pull not-granted",
            "ended caller.authenticate - ended-key",
            "operator audit.read audit-events role",
            "operator cluster.create clusters/mine not-granted",
            "operator cluster.delete clusters/foreign not-granted",
            "operator cluster.update clusters/mine trusted",
            "operator pullSecret.declare registry-accounts/foreign not-granted",
            "operator pullSecret.read pull-secrets/hidden not-granted",
            "operator registryAccount.create registry-accounts/new not-granted",
            "renderer dockerConfig.reveal registry-accounts/foreign not-granted",
            "renderer registryAccount.read registry-accounts/foreign not-granted",
        ]
    );
    assert_whole(&app.pool).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_flood_of_what_is_refused_makes_few_events_and_none_of_it_is_lost(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let key = installation.new_key("admin").await;
    let service = installation.serve().await;
    let admin = service.client(&key);
    admin.post("/v1/registry-accounts", &account("a")).await.expect(201);
    let made = admin.post("/v1/api-keys", &json!({"name": "viewer", "role": "viewer"})).await.expect(201);
    let viewer = admin.with_key(made["key"].as_str().expect("a key"));
    let knock = async |index: u128| {
        let answer = if index.is_multiple_of(2) {
            admin.with_key(&forged(index)).get("/v1/me").await
        } else {
            viewer.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await
        };
        assert!([401, 403, 429].contains(&answer.status), "{answer:?}");
    };
    stream::iter(0..1_000).for_each_concurrent(16, knock).await;

    // Right keys are served.
    admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    // What is still being counted is written at the end.
    service.process.signal("TERM");
    assert_eq!(service.process.wait().await.code, Some(0));
    let denied: Vec<Option<i64>> =
        sqlx::query_scalar("SELECT (details->>'count')::bigint FROM audit_events WHERE outcome = 'denied'")
            .fetch_all(&pool)
            .await
            .expect("counts");
    assert_eq!(denied.iter().flatten().sum::<i64>(), 1_000, "{denied:?}");
    assert!(denied.len() <= 4, "{denied:?}");
    installation.must_run(&["audit", "verify"]).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_sealed_value_that_is_not_its_own_is_not_handed_out_and_that_is_on_record(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "martin", CANARY).await;
    app.register_account("b", "quay.io", "martin", "another").await;
    let swap = "UPDATE registry_accounts SET password = other.password FROM registry_accounts AS other
                WHERE registry_accounts.id <> other.id";
    run(&mut superuser(&app.pool).await, swap).await.expect("swapped");

    let answer = app.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await;

    answer.problem(500, "internal");
    let found = events(&app.admin(), "action=dockerConfig.reveal").await;
    assert_eq!(found.iter().map(short).collect::<Vec<_>>(), ["dockerConfig.reveal docker-configs failure"]);
    assert_eq!(found[0]["details"], json!({"profile": "kubernetes", "reason": "does-not-open"}));
    assert_eq!(found[0]["requestId"], answer.header("x-request-id"));
}

// ---- No deed without its event ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_cannot_be_recorded_is_not_done(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    app.register_account("a", "ghcr.io", "martin", CANARY).await;
    let cluster = json!({"name": "k", "server": refusing_server(), "auth": {"type": "none"}, "allowPlainHttp": true});
    admin.post("/v1/clusters", &cluster).await.expect(201);
    let mut superuser = superuser(&app.pool).await;
    let before = admin.get("/v1/registry-accounts/a").await.expect(200);
    let role = "regcred_service";
    let breaks = [
        (
            "ALTER TABLE audit_events RENAME TO elsewhere".to_owned(),
            "ALTER TABLE elsewhere RENAME TO audit_events".to_owned(),
        ),
        (format!("REVOKE INSERT ON audit_events FROM {role}"), format!("GRANT INSERT ON audit_events TO {role}")),
        (format!("REVOKE UPDATE ON audit_chains FROM {role}"), format!("GRANT UPDATE ON audit_chains TO {role}")),
        (
            "ALTER TABLE audit_events ADD CONSTRAINT full_disk CHECK (false) NOT VALID".to_owned(),
            "ALTER TABLE audit_events DROP CONSTRAINT full_disk".to_owned(),
        ),
    ];
    for (break_it, mend) in breaks {
        run(&mut superuser, &break_it).await.expect("broken");
        let rows = app.rows().await;

        let refused = [
            admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await,
            admin.post("/v1/docker-configs", &json!({"accounts": ["a"], "secret": {"name": "pull"}})).await,
            // Where it was called, it would be 502: nobody listens there.
            admin.post("/v1/clusters/k/namespaces/default/secrets", &json!({"name": "p", "accounts": ["a"]})).await,
            admin.post("/v1/registry-accounts/a/verify", &json!({})).await,
            admin.post("/v1/registry-accounts", &account("b")).await,
            admin.patch("/v1/registry-accounts/a", &json!({"password": "another"})).await,
            admin.delete("/v1/registry-accounts/a").await,
            admin
                .post(
                    "/v1/registry-accounts:import",
                    &json!({"auths": {"quay.io": {"username": "m", "password": "x"}}}),
                )
                .await,
            admin
                .post("/v1/clusters", &json!({"name": "l", "server": "https://127.0.0.1:1", "auth": {"type": "none"}}))
                .await,
            admin.patch("/v1/clusters/k", &json!({"server": "https://127.0.0.1:2"})).await,
            admin.delete("/v1/clusters/k").await,
            admin.post("/v1/api-keys", &json!({"name": "new", "role": "admin"})).await,
            admin.get("/v1/audit-events?format=ndjson").await,
            admin
                .post(
                    "/v1/identity-providers",
                    &json!({"name": "p", "type": "oidc", "issuer": "https://issuer.example.com", "audience": "regcred",
                        "rules": [{"claims": {"sub": "ci"}, "role": "viewer"}]}),
                )
                .await,
            admin
                .send(admin.request("PUT", "/v1/pull-secrets/t").json(&json!({
                    "accounts": ["a"], "secret": {"name": "declared"}, "deletionPolicy": "retain",
                    "targets": [{"cluster": "k", "namespaces": ["default"]}],
                })))
                .await,
        ];
        for answer in refused {
            answer.problem(503, "audit-unavailable");
            assert!(!answer.body.contains(CANARY) && answer.header("retry-after") == "1", "{answer:?}");
        }
        assert_eq!(app.rows().await, rows, "{break_it}");
        assert_eq!(admin.get("/v1/registry-accounts/a").await.expect(200), before, "{break_it}");
        // Reading is not held up.
        admin.get("/v1/registry-accounts").await.expect(200);

        run(&mut superuser, &mend).await.expect("mended");
        admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    }
    admin.patch("/v1/registry-accounts/a", &json!({"password": "another"})).await.expect(200);
    assert_whole(&app.pool).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_stored_password_is_shown_to_its_registry_only_once_that_is_on_record(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let (registry, requests) = serve(|_| answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], ""));
    let body = json!({"name": "a", "registry": registry.to_string(), "username": "martin", "password": CANARY,
        "plainHttp": true});
    app.admin().post("/v1/registry-accounts", &body).await.expect(201);
    let change = async |body: Value| app.admin().patch("/v1/registry-accounts/a?verify=true", &body).await;
    let mut superuser = superuser(&app.pool).await;

    run(&mut superuser, "ALTER TABLE audit_events RENAME TO elsewhere").await.expect("broken");
    change(json!({"username": "lena"})).await.problem(503, "audit-unavailable");
    assert_eq!(requests.count(), 0);
    run(&mut superuser, "ALTER TABLE elsewhere RENAME TO audit_events").await.expect("mended");

    let shown = change(json!({"username": "lena"})).await;
    shown.problem(422, "verification-failed");
    assert!(requests.count() > 0);
    // A password that the caller says himself is not the stored one.
    change(json!({"password": "another"})).await.problem(422, "verification-failed");
    let found = events(&app.admin(), "action=registryAccount.verify").await;
    let found: Vec<(String, &Value)> = found.iter().map(|event| (short(event), &event["requestId"])).collect();
    let expected = "registryAccount.verify registry-accounts/a success".to_owned();
    assert_eq!(found, [(expected, &json!(shown.header("x-request-id")))]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_viewer_reads_the_record_and_identity_providers_if_he_reaches_everything(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let everything = json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]});
    let viewers = [app.caller("unbounded", "viewer", None).await, app.caller("wide", "viewer", Some(everything)).await];
    for viewer in viewers {
        for path in ["/v1/audit-events", "/v1/audit-events?format=ndjson", "/v1/identity-providers"] {
            assert_eq!(viewer.get(path).await.status, 200, "{path}");
        }
        assert_eq!(viewer.get("/v1/api-keys").await.status, 403);
        assert_eq!(viewer.post("/v1/identity-providers", &json!({})).await.status, 403);
    }
    for kind in ["accounts", "clusters", "namespaces"] {
        let mut grants = json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]});
        grants[kind] = json!(["a-*"]);
        let viewer = app.caller(kind, "viewer", Some(grants)).await;
        for path in ["/v1/audit-events", "/v1/audit-events?format=ndjson", "/v1/identity-providers"] {
            let refused = viewer.get(path).await;
            refused.problem(403, "forbidden");
            assert!(refused.body.contains("requires grants of all accounts, clusters and namespaces"), "{refused:?}");
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_process_that_is_killed_leaves_no_account_without_its_event_and_no_event_without_its_account(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let key = installation.new_key("admin").await;
    for round in 0..4 {
        let service = installation.serve().await;
        let client = service.client(&key);
        let before = number(&pool, "SELECT count(*) FROM registry_accounts").await;
        let writers = (0..8).map(async |writer| {
            let mut number = 0;
            loop {
                let name = format!("r{round}-w{writer}-{number}");
                let request = client.request("POST", "/v1/registry-accounts").json(&account(&name));
                match client.try_send(request).await {
                    Ok(answer) => assert_eq!(answer.status, 201, "{answer:?}"),
                    Err(_) => return number,
                }
                number += 1;
            }
        });
        let kill = async {
            eventually("accounts are written", async || {
                let now = number(&pool, "SELECT count(*) FROM registry_accounts").await;
                (now >= before + 40).then_some(())
            })
            .await;
            service.process.signal("KILL");
        };
        let (written, ()) = tokio::join!(join_all(writers), kill);
        assert!(written.iter().sum::<u32>() > 0);
        drop(service);
    }

    // What the killed processes had begun has ended by now, one way or the other.
    eventually("no transaction is left", async || {
        let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL
                    AND pid <> pg_backend_pid()";
        (number(&pool, open).await == 0).then_some(())
    })
    .await;
    let accounts: Vec<String> =
        sqlx::query_scalar("SELECT 'registry-accounts/' || name FROM registry_accounts ORDER BY 1")
            .fetch_all(&pool)
            .await
            .expect("accounts");
    let recorded: Vec<String> =
        sqlx::query_scalar("SELECT resource FROM audit_events WHERE action = 'registryAccount.create' ORDER BY 1")
            .fetch_all(&pool)
            .await
            .expect("events");
    assert!(accounts.len() >= 160);
    assert_eq!(accounts.iter().collect::<BTreeSet<_>>(), recorded.iter().collect::<BTreeSet<_>>());
    assert_eq!(accounts.len(), recorded.len());
    installation.must_run(&["audit", "verify"]).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_reveal_that_is_answered_has_exactly_one_event_also_while_connections_break(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "martin", CANARY).await;
    let ci = app.caller("ci", "renderer", Some(json!({"accounts": ["a"]}))).await;
    let body = json!({"accounts": ["a"]});

    let answers: Vec<Answer> =
        stream::iter(0..600).map(|_| ci.post("/v1/docker-configs", &body)).buffer_unordered(64).collect().await;

    assert!(answers.iter().all(|answer| answer.status == 200 && answer.body.contains(CANARY)));
    let recorded = async || -> BTreeMap<String, i64> {
        let rows: Vec<(String, i64)> = sqlx::query_as(
            "SELECT request_id::text, count(*) FROM audit_events WHERE action = 'dockerConfig.reveal' GROUP BY 1",
        )
        .fetch_all(&app.pool)
        .await
        .expect("events");
        rows.into_iter().collect()
    };
    let found = recorded().await;
    assert_eq!(found.len(), 600);
    assert!(answers.iter().all(|answer| found.get(answer.header("x-request-id")) == Some(&1)));
    // Far fewer transactions than events.
    let metrics = app.anonymous().get("/metrics").await.body;
    let metric = |name: &str| -> u64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).expect("a metric");
        line.parse().expect("a number")
    };
    let (events, groups) =
        (metric("regcred_audit_events_total{result=\"written\"}"), metric("regcred_audit_groups_total"));
    assert!(events >= 600 && groups < events, "{groups} groups of {events} events");

    // The writer's connection is cut again and again.
    let mut superuser = superuser(&app.pool).await;
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let cut = async {
        let mut cuts = 0;
        while !is_over.load(std::sync::atomic::Ordering::SeqCst) {
            let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE datname = current_database() AND query LIKE '%INSERT INTO audit_events%'
                           AND pid <> pg_backend_pid()";
            cuts += run(&mut superuser, sql).await.expect("cut");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cuts
    };
    let ask = async {
        let answers: Vec<Answer> =
            stream::iter(0..600).map(|_| ci.post("/v1/docker-configs", &body)).buffer_unordered(16).collect().await;
        is_over.store(true, std::sync::atomic::Ordering::SeqCst);
        answers
    };
    let (cuts, answers) = tokio::join!(cut, ask);
    assert!(cuts > 0);
    let found = recorded().await;
    assert!(found.values().all(|count| *count == 1), "{found:?}");
    let given = answers.iter().filter(|answer| answer.status == 200).collect::<Vec<_>>();
    assert!(!given.is_empty());
    assert!(given.iter().all(|answer| found.contains_key(answer.header("x-request-id"))));
    assert!(answers.iter().all(|answer| answer.status == 200 || !answer.body.contains(CANARY)));
    let report = assert_whole(&app.pool).await;
    // The app's and that of its first key: a connection that is cut breaks no chain.
    assert_eq!(report.anchors.len(), 6);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn each_process_has_chains_of_its_own(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let key = installation.new_key("admin").await;
    let (one, other) = (installation.serve().await, installation.serve().await);
    let clients = [one.client(&key), other.client(&key)];
    clients[0].post("/v1/registry-accounts", &account("a")).await.expect(201);
    let work = async |(process, client): (usize, &Client)| {
        for number in 0..30 {
            client.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
            client.post("/v1/registry-accounts", &account(&format!("p{process}-{number}"))).await.expect(201);
        }
    };
    join_all(clients.iter().enumerate().map(work)).await;

    // The command line's, and of each process four for changes and one for the rest.
    let per_chain: Vec<i64> = sqlx::query_scalar(
        "SELECT count(e.id) FROM audit_chains c LEFT JOIN audit_events e ON e.chain_id = c.id
         GROUP BY c.number ORDER BY c.number",
    )
    .fetch_all(&pool)
    .await
    .expect("chains");
    let (changes, reveals): (Vec<i64>, Vec<i64>) = per_chain.iter().partition(|count| **count < 30);
    assert_eq!(
        (reveals.as_slice(), changes.len(), changes.iter().sum::<i64>()),
        (&[30, 30][..], 9, 62),
        "{per_chain:?}"
    );
    let said = installation.must_run(&["audit", "verify"]).await;
    assert!(said.starts_with("The audit record is whole: 122 events in 11 chains"), "{said}");
}

// ---- Who may change the record ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn neither_the_role_of_the_service_nor_the_owner_can_change_or_remove_an_event(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    installation.new_key("one").await;
    let service = sqlx::postgres::PgPoolOptions::new().connect(&service_url(&pool).await).await.expect("a pool");
    let owner_of =
        |table: &'static str| format!("SELECT tableowner = current_user FROM pg_tables WHERE tablename = '{table}'");
    for (pool, owns) in [(&service, false), (&pool, true)] {
        let is_owner: bool =
            sqlx::query_scalar(AssertSqlSafe(owner_of("audit_events"))).fetch_one(pool).await.expect("a row");
        assert_eq!(is_owner, owns);
        let is_super: bool = sqlx::query_scalar("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
            .fetch_one(pool)
            .await
            .expect("a role");
        assert!(!is_super);
        for sql in [
            "UPDATE audit_events SET actor_name = 'somebody else'",
            "UPDATE audit_events SET outcome = 'success' WHERE false",
            "DELETE FROM audit_events",
            "DELETE FROM audit_events WHERE false",
            "TRUNCATE audit_events",
            "TRUNCATE audit_events, audit_chains",
            "DELETE FROM audit_chains",
            "TRUNCATE audit_chains",
            "INSERT INTO audit_events SELECT * FROM audit_events ON CONFLICT (id) DO UPDATE SET actor_name = 'x'",
        ] {
            let error = pool.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await.expect_err(sql);
            let code =
                error.as_database_error().and_then(sqlx::error::DatabaseError::code).expect("a code").into_owned();
            assert_eq!(code, "42501", "{sql}: {error}");
        }
    }
    for sql in [
        "DROP TABLE audit_events",
        "ALTER TABLE audit_events DISABLE TRIGGER ALL",
        "DROP TRIGGER audit_events_are_kept ON audit_events",
        "DELETE FROM _sqlx_migrations",
    ] {
        service.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await.expect_err(sql);
    }
    service.close().await;
    installation.must_run(&["audit", "verify"]).await;
    let refused = installation.run(&["migrate", "--grant-to", "a\"; DROP TABLE audit_events; --"]).await;
    assert_eq!(refused.code, Some(64), "{refused:?}");
}

// ---- What is found ----

/// An audit record of two processes that have ended, and a superuser who tampers with it.
struct Tampering {
    installation: Installation,
    superuser: PgConnection,
    pool: PgPool,
}

impl Tampering {
    async fn new(pool: PgPool) -> Self {
        let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
        let key = installation.new_key("admin").await;
        for round in 0..2 {
            let service = installation.serve().await;
            let client = service.client(&key);
            for number in 0..4 {
                let name = format!("r{round}-{number}");
                client.post("/v1/registry-accounts", &account(&name)).await.expect(201);
                client.post("/v1/docker-configs", &json!({"accounts": [name]})).await.expect(200);
            }
            service.process.signal("TERM");
            service.process.wait().await;
        }
        let superuser = superuser(&pool).await;
        Self { installation, superuser, pool }
    }

    async fn sql(&mut self, sql: &str) -> u64 {
        run(&mut self.superuser, sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    async fn verify(&self, arguments: &[&str]) -> Exit {
        self.installation.run(&[&["audit", "verify"], arguments].concat()).await
    }

    async fn keep(&mut self) {
        self.sql("CREATE TABLE kept_events AS SELECT * FROM audit_events; CREATE TABLE kept_chains AS SELECT * FROM audit_chains").await;
    }

    async fn put_back(&mut self) {
        self.sql(
            "TRUNCATE audit_events, audit_chains; INSERT INTO audit_chains SELECT * FROM kept_chains;
             INSERT INTO audit_events SELECT * FROM kept_events",
        )
        .await;
    }
}

/// The chain of the reveals of the first process; it has 4 events.
const CHAIN: &str = "(SELECT chain_id FROM audit_events WHERE action = 'dockerConfig.reveal' ORDER BY id LIMIT 1)";

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_changed_a_removed_a_swapped_and_an_added_event_are_found_where_they_are(pool: PgPool) {
    let mut record = Tampering::new(pool).await;
    let whole = record.verify(&[]).await;
    assert_eq!(whole.code, Some(0), "{whole:?}");
    record.keep().await;
    let at = |sequence: u32| format!("chain_id = {CHAIN} AND sequence = {sequence}");
    // Everything of an event but its place.
    let columns = "id, at, actor_type, actor_id, actor_name, action, resource, related, outcome, request_id, source_ip, details, previous_hash, hash";
    let cases: Vec<(String, Vec<&str>)> = vec![
        (format!("UPDATE audit_events SET actor_name = 'lena' WHERE {}", at(2)), vec!["event 2: ", "was changed"]),
        (format!("UPDATE audit_events SET at = at - interval '1 hour' WHERE {}", at(4)), vec!["event 4: ", "was changed"]),
        (format!("UPDATE audit_events SET details = '{{\"profile\": \"kubernetes\"}}' WHERE {}", at(1)), vec!["event 1: ", "was changed"]),
        (format!("UPDATE audit_events SET resource = NULL, hash = previous_hash WHERE {}", at(3)), vec!["event 3: ", "was changed"]),
        (format!("DELETE FROM audit_events WHERE {}", at(1)), vec!["event 1: is missing"]),
        (format!("DELETE FROM audit_events WHERE {}", at(2)), vec!["event 2: is missing"]),
        (format!("DELETE FROM audit_events WHERE {}", at(4)), vec!["event 4: is missing"]),
        (format!("DELETE FROM audit_events WHERE chain_id = {CHAIN}"), vec!["event 1 to 4: are missing"]),
        // The places of two are exchanged.
        (
            format!(
                "WITH c AS (SELECT {CHAIN} AS id) UPDATE audit_events SET sequence = -sequence FROM c WHERE chain_id = c.id AND sequence IN (2, 3);
                 UPDATE audit_events SET sequence = 5 + sequence WHERE sequence < 0"
            ),
            vec!["event 2: ", "it was written as event 3", "event 3: ", "it was written as event 2"],
        ),
        // A copy of an event in the place of another.
        (
            format!(
                "WITH c AS (SELECT {CHAIN} AS id), gone AS (DELETE FROM audit_events USING c WHERE chain_id = c.id AND sequence = 4 RETURNING 1)
                 INSERT INTO audit_events (chain_id, sequence, {columns})
                 SELECT chain_id, 4, gen_random_uuid(), at, actor_type, actor_id, actor_name, action, resource, related, outcome, request_id, source_ip, details, previous_hash, hash
                 FROM audit_events, c, gone WHERE chain_id = c.id AND sequence = 1"
            ),
            vec!["event 4: ", "was changed"],
        ),
        // The last one is removed and the head says so.
        (
            format!(
                "WITH c AS (SELECT {CHAIN} AS id), last AS (DELETE FROM audit_events USING c WHERE chain_id = c.id AND sequence = 4 RETURNING previous_hash, c.id)
                 UPDATE audit_chains SET sequence = 3, hash = last.previous_hash FROM last WHERE audit_chains.id = last.id"
            ),
            vec!["the head of the chain was changed or set back"],
        ),
        // One is added.
        (
            format!(
                "INSERT INTO audit_events (chain_id, sequence, {columns})
                 SELECT chain_id, 5, gen_random_uuid(), at, actor_type, actor_id, actor_name, action, resource, related, outcome, request_id, source_ip, details, hash, hash
                 FROM audit_events WHERE {}", at(4)
            ),
            vec!["event 5: ", "was changed", "the chain's head does not know this event"],
        ),
        // A chain is removed, with its head and without.
        (
            format!("WITH c AS (SELECT {CHAIN} AS id), gone AS (DELETE FROM audit_events USING c WHERE chain_id = c.id) DELETE FROM audit_chains USING c WHERE audit_chains.id = c.id"),
            vec!["chain 6: is missing"],
        ),
        ("DELETE FROM audit_chains WHERE number = 2".to_owned(), vec!["chain 2: is missing", "there are events of a chain that is not there"]),
        (
            "DELETE FROM audit_chains WHERE number = 2; UPDATE audit_chains SET number = -number WHERE number > 2;
             UPDATE audit_chains SET number = -number - 1 WHERE number < 0".to_owned(),
            vec!["the opening of the chain was changed"],
        ),
        ("UPDATE audit_chains SET opened_at = now() WHERE number = 4".to_owned(), vec!["chain 4 ", "the opening of the chain was changed"]),
    ];
    for (sql, expected) in cases {
        assert!(record.sql(&sql).await > 0, "{sql} did nothing");

        let exit = record.verify(&[]).await;

        assert_eq!(exit.code, Some(1), "{sql}: {exit:?}");
        for words in expected {
            assert!(exit.stdout.contains(words), "{words:?} is missing: {sql}\n{}", exit.stdout);
        }
        // And hardly more than that is said; what was renumbered is wrong from there on.
        let most = if sql.contains("-number") { 10 } else { 3 };
        assert!((1..=most).contains(&exit.stdout.lines().count()), "{sql}\n{}", exit.stdout);
        assert!(exit.stderr.contains("The audit record is not what was written"), "{exit:?}");
        record.put_back().await;
    }
    assert_eq!(record.verify(&[]).await.code, Some(0));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_leaves_no_trace_in_the_database_is_found_by_an_anchor_outside(pool: PgPool) {
    let mut record = Tampering::new(pool).await;
    record.keep().await;
    let folder = TempDir::new();
    let anchors = folder.path().join("anchors").display().to_string();
    // A copy of the heads as they are now, as an attacker has who saw the database then.
    let service = record.installation.serve().await;
    let key = record.installation.new_key("second").await;
    service.client(&key).post("/v1/docker-configs", &json!({"accounts": ["r0-0"]})).await.expect(200);
    service.process.signal("TERM");
    service.process.wait().await;
    let saved = record.verify(&["--save-anchors", &anchors]).await;
    assert_eq!(saved.code, Some(0), "{saved:?}");
    assert_eq!(record.verify(&["--anchors", &anchors]).await.code, Some(0));

    // The database as it was before: consistent in itself.
    record.put_back().await;
    assert_eq!(record.verify(&[]).await.code, Some(0));
    let exit = record.verify(&["--anchors", &anchors]).await;
    assert_eq!(exit.code, Some(1), "{exit:?}");
    assert!(exit.stdout.contains("the chain is not what it was when it was verified before"), "{exit:?}");

    // More events since then are no finding.
    let before = record.verify(&["--save-anchors", &anchors]).await;
    assert_eq!(before.code, Some(0), "{before:?}");
    let service = record.installation.serve().await;
    service.process.signal("TERM");
    service.process.wait().await;
    record.installation.new_key("third").await;
    assert_eq!(record.verify(&["--anchors", &anchors]).await.code, Some(0));
    fs::write(&anchors, "nonsense").expect("written");
    assert_eq!(record.verify(&["--anchors", &anchors]).await.code, Some(1));
    assert!(number(&record.pool, "SELECT count(*) FROM audit_events").await > 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_record_of_an_older_pepper_is_checked_with_that(pool: PgPool) {
    let url = pool.connect_options().to_url_lossy().to_string();
    let (old, new) = (Installation::new(&url), Installation::new(&url));
    old.new_key("one").await;
    new.new_key("two").await;

    let exit = new.run(&["audit", "verify"]).await;
    assert_eq!(exit.code, Some(1), "{exit:?}");
    assert!(exit.stdout.contains("chain 1 ") && exit.stdout.contains("under another pepper"), "{exit:?}");
    new.must_run(&["audit", "verify", "--older-pepper-file", &old.variable("REGCRED_API_KEY_PEPPER_FILE")]).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_process_notices_that_its_chain_was_changed_behind_its_back(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "martin", CANARY).await;
    let body = json!({"accounts": ["a"]});
    for _ in 0..3 {
        app.admin().post("/v1/docker-configs", &body).await.expect(200);
    }
    let mut superuser = superuser(&app.pool).await;
    let sql = format!(
        "WITH c AS (SELECT {CHAIN} AS id), last AS (DELETE FROM audit_events USING c WHERE chain_id = c.id AND sequence = 3 RETURNING previous_hash, c.id)
         UPDATE audit_chains SET sequence = 2, hash = last.previous_hash FROM last WHERE audit_chains.id = last.id"
    );
    assert_eq!(run(&mut superuser, &sql).await.expect("removed"), 1);

    // It goes on, on a chain that says how long the other one was.
    app.admin().post("/v1/docker-configs", &body).await.expect(200);

    let metrics = app.anonymous().get("/metrics").await.body;
    assert!(metrics.lines().any(|line| line == "regcred_audit_chain_breaks_total 1"), "{metrics}");
    let (_, findings) = verified(&app.pool).await;
    assert!(findings.iter().any(|finding| finding.ends_with("event 3: is missing")), "{findings:#?}");
    let reveals = events(&app.admin(), "action=dockerConfig.reveal").await;
    assert_eq!(reveals.len(), 3);
    assert!(!given("REGCRED_TEST_PG_SERVICE_URL").is_empty());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_process_notices_that_a_chain_for_changes_was_set_back(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let register = async |number: u32| {
        app.admin().post("/v1/registry-accounts", &account(&format!("a-{number}"))).await.expect(201);
    };
    for number in 0..8 {
        register(number).await;
    }
    let set_back = "WITH last AS (DELETE FROM audit_events WHERE resource = 'registry-accounts/a-7' RETURNING chain_id, previous_hash)
        UPDATE audit_chains SET sequence = sequence - 1, hash = last.previous_hash FROM last WHERE audit_chains.id = last.chain_id";
    assert_eq!(run(&mut superuser(&app.pool).await, set_back).await.expect("set back"), 1);

    // Each chain in its turn.
    for number in 8..16 {
        register(number).await;
    }

    let metrics = app.anonymous().get("/metrics").await.body;
    assert!(metrics.lines().any(|line| line == "regcred_audit_chain_breaks_total 1"), "{metrics}");
    let (_, findings) = verified(&app.pool).await;
    assert!(findings.iter().any(|finding| finding.ends_with("event 2: is missing")), "{findings:#?}");
    assert_eq!(events(&app.admin(), "action=registryAccount.create").await.len(), 15);
}

/// A trail of one chain, and where it counts.
async fn audit(pool: &PgPool) -> (TransactionalAudit, Arc<AuditMetrics>) {
    let metrics = Arc::new(AuditMetrics::default());
    let audit = TransactionalAudit::open(pool, Arc::new(audit_key()), 1).await.expect("a chain");
    (audit.counted_in(Arc::clone(&metrics)), metrics)
}

fn rotation() -> NewEvent {
    let actor = Actor { kind: ActorKind::CommandLine, id: None, name: "somebody".to_owned() };
    NewEvent::by(&actor, Action::MasterKeyRotate, Resource::master_keys())
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_chain_for_changes_that_was_set_back_is_not_gone_on_with(pool: PgPool) {
    let mut superuser = superuser(&pool).await;
    let copied = "(SELECT seal FROM kept_chains WHERE kept_chains.id = last.id)";
    for (round, seal) in ["seal", "'\\x00'::bytea", copied].into_iter().enumerate() {
        let (audit, metrics) = audit(&pool).await;
        let record = async || audit.record_alone(&pool, rotation()).await.expect("recorded");
        record().await;
        let keep = "DROP TABLE IF EXISTS kept_chains; CREATE TABLE kept_chains AS SELECT * FROM audit_chains";
        run(&mut superuser, keep).await.expect("kept");
        record().await;
        let set_back = "WITH c AS (SELECT id, sequence FROM audit_chains ORDER BY number DESC LIMIT 1),
                 last AS (DELETE FROM audit_events USING c WHERE chain_id = c.id AND audit_events.sequence = c.sequence
                          RETURNING previous_hash, c.id)
             UPDATE audit_chains SET sequence = sequence - 1, hash = last.previous_hash, seal = {seal}
             FROM last WHERE audit_chains.id = last.id";
        assert_eq!(run(&mut superuser, &set_back.replace("{seal}", seal)).await.expect("set back"), 1);

        record().await;
        assert_eq!(metrics.breaks(), 1, "{seal}");
        record().await;
        assert_eq!(metrics.breaks(), 1, "{seal}");

        let (_, findings) = verified(&pool).await;
        let missing = findings.iter().filter(|finding| finding.ends_with("event 2: is missing")).count();
        assert_eq!(missing, round + 1, "{seal}: {findings:#?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_chain_for_changes_that_is_gone_is_gone_on_for(pool: PgPool) {
    let mut superuser = superuser(&pool).await;
    let (audit, metrics) = audit(&pool).await;
    audit.record_alone(&pool, rotation()).await.expect("recorded");
    assert_eq!(run(&mut superuser, "DELETE FROM audit_chains").await.expect("deleted"), 1);
    audit.record_alone(&pool, rotation()).await.expect("recorded");
    assert_eq!(metrics.breaks(), 1);
    let (_, findings) = verified(&pool).await;
    assert!(!findings.is_empty());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_change_that_is_rolled_back_or_cut_off_breaks_no_chain(pool: PgPool) {
    let mut superuser = superuser(&pool).await;
    let (audit, metrics) = audit(&pool).await;
    for round in 0..3 {
        audit.record_alone(&pool, rotation()).await.expect("recorded");
        let mut tx = pool.begin().await.expect("a transaction");
        // Twice, as nobody does yet.
        audit.record(&mut tx, [rotation()]).await.expect("written");
        audit.record(&mut tx, [rotation(), rotation()]).await.expect("written");
        match round {
            0 => tx.commit().await.expect("committed"),
            1 => tx.rollback().await.expect("rolled back"),
            _ => {
                let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.expect("a pid");
                run(&mut superuser, &format!("SELECT pg_terminate_backend({pid})")).await.expect("cut off");
                // Whether it was committed is not to be known here.
                let _ = tx.commit().await;
            }
        }
    }
    audit.record_alone(&pool, rotation()).await.expect("recorded");

    assert_eq!(metrics.breaks(), 0);
    let report = assert_whole(&pool).await;
    assert_eq!(report.anchors.len(), 1);
}

// ---- Who takes the record with him ----

/// Reads an answer slowly for this time, and then the rest of it.
fn read_slowly(mut stream: TcpStream, slow_for: Duration) -> String {
    const PIECE: usize = 512 * 1024;
    let (start, mut read) = (Instant::now(), Vec::new());
    while start.elapsed() < slow_for {
        let mut piece = vec![0; PIECE];
        let count = stream.read(&mut piece).expect("the connection is open");
        assert!(count > 0, "closed after {} bytes and {:?}", read.len(), start.elapsed());
        read.extend_from_slice(&piece[..count]);
        std::thread::sleep(Duration::from_millis(500));
    }
    stream.read_to_end(&mut read).expect("the rest");
    String::from_utf8(read).expect("UTF-8")
}

/// More than the buffers of a system hold, and for longer than a client may take for an answer that is ready.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_export_may_take_as_long_as_somebody_takes_it(pool: PgPool) {
    const COUNT: usize = 40_000;
    let app = TestApp::spawn(pool).await;
    let many = format!(
        "INSERT INTO audit_events (chain_id, sequence, id, at, actor_type, action, outcome, details, previous_hash, hash)
         SELECT gen_random_uuid(), n, gen_random_uuid(), now(), 'worker', 'pullSecret.apply', 'success',
             json_build_object('padding', repeat('x', 600)), '', '' FROM generate_series(1, {COUNT}) AS n"
    );
    run(&mut superuser(&app.pool).await, &many).await.expect("inserted");
    let mut stream = TcpStream::connect(app.address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let (path, key) = ("/v1/audit-events?format=ndjson", app.admin().key().to_owned());
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sent");

    let answer = read_slowly(stream, Duration::from_secs(14));

    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"));
    assert_eq!(answer.matches(r#""action":"pullSecret.apply""#).count(), COUNT);
    assert!(answer.ends_with("\r\n0\r\n\r\n"), "it was cut off");
}
