//! The audit log: no action without its event, no unnoticed change of an event, and bounded records
//! of refusals.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::join_all, stream};
use regcred::service::audit::verify::{Finding, Report, Scope, Watcher, verify};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, PgConnection, PgPool};

use crate::{
    support::{
        PATIENCE,
        app::{TestApp, audit_key},
        client::{Answer, Client},
        eventually, kubernetes,
        listener::refusing_server,
        postgres::{service_url, superuser},
        process::Installation,
    },
    verify::listening::{answer, serve},
};

mod prune;
mod sealing;
mod tampering;

const CANARY: &str = "canary-of-a-password";

fn account(name: &str) -> Value {
    json!({"name": name, "registry": "ghcr.io", "username": "dev", "password": CANARY})
}

async fn run(conn: &mut PgConnection, sql: &str) -> sqlx::Result<u64> {
    let done = conn.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await?;
    Ok(done.rows_affected())
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("a number")
}

/// All events that match a query, oldest first.
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

/// Findings of a verification.
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
    let report = verify(&pool.clone().into(), &[audit_key()], Scope::default(), &mut findings).await.expect("verified");
    (report, findings.0)
}

pub async fn assert_whole(pool: &PgPool) -> Report {
    let (report, findings) = verified(pool).await;
    assert!(findings.is_empty(), "{findings:#?}");
    report
}

/// Value of a metric of an app.
async fn metric(app: &TestApp, name: &str) -> f64 {
    let metrics = app.operations().get("/metrics").await.body;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).expect("a metric");
    line.parse().expect("a number")
}

// ---- Recorded actions ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_change_and_reveal_is_recorded_without_a_secret_value(pool: PgPool) {
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
        let other = json!({"name": "b", "registry": "quay.io", "username": "dev", "password": CANARY});
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
        let config = json!({"auths": {"https://index.docker.io/v1/": {"username": "dev", "password": CANARY}}});
        admin.post("/v1/registry-accounts:import?namePrefix=c", &config).await
    });
    done("registryAccount.import registry-accounts", {
        let config = json!({"auths": {"https://index.docker.io/v1/": {"username": "dev", "password": CANARY}}});
        let answer = admin.post("/v1/registry-accounts:import?namePrefix=c&dryRun=true", &config).await;
        assert_eq!(answer.expect(200)["items"][0]["outcome"], "unchanged");
        answer
    });
    let cluster = json!({"name": "k", "server": "https://127.0.0.1:1", "auth": {"type": "token", "token": CANARY}});
    done("cluster.create clusters/k", admin.post("/v1/clusters", &cluster).await);
    let allow = json!({"auth": {"type": "token", "token": format!("{CANARY}-2")}});
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
    // Neither is recorded: nothing changes, and an empty document compares nothing.
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
    // The caller did nothing else but read the log.
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

/// Changes of the events of an action about a resource, oldest first: field, old and new value.
fn changes(events: &[Value], action: &str, resource: &str) -> Vec<Vec<(String, Value, Value)>> {
    let wanted = events.iter().filter(|event| event["action"] == action);
    let wanted = wanted.filter(|event| event["resource"].as_str().is_some_and(|one| one.starts_with(resource)));
    let list = |event: &Value| event["details"]["changes"].as_array().cloned().unwrap_or_default();
    let tuple = |change: &Value| {
        let field = change["field"].as_str().expect("a field").to_owned();
        (field, change["old"].clone(), change["new"].clone())
    };
    wanted.map(|event| list(event).iter().map(tuple).collect()).collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn old_and_new_values_tell_where_secrets_go_and_who_may_do_what(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let ca = kubernetes::file("ca.crt");
    let token = json!({"type": "token", "token": CANARY});
    let cluster = json!({"name": "k", "server": "https://10.0.0.1:6443", "auth": token, "caCertificate": ca});
    admin.post("/v1/clusters", &cluster).await.expect(201);
    let elsewhere = json!({"server": "http://127.0.0.1:18999", "caCertificate": null, "allowPlainHttp": true,
        "auth": {"type": "none"}});
    admin.patch("/v1/clusters/k", &elsewhere).await.expect(200);
    assert_eq!(admin.delete("/v1/clusters/k").await.status, 204);

    let mut body = account("a");
    body["labels"] = json!({"team": "a", "tier": "1"});
    admin.post("/v1/registry-accounts", &body).await.expect(201);
    let moved = json!({"registry": "quay.io", "password": format!("{CANARY}-2"), "labels": {"team": "b", "new": "1"},
        "caCertificate": ca, "username": "lena"});
    admin.patch("/v1/registry-accounts/a", &moved).await.expect(200);
    let config = json!({"auths": {"http://c.example.com": {"username": "dev", "password": CANARY}}});
    admin.post("/v1/registry-accounts:import", &config).await.expect(200);

    let grants = json!({"accounts": ["a", {"matchLabels": {"team": "a"}}], "clusters": ["dev"], "namespaces": []});
    app.caller("ci", "deliverer", Some(grants.clone())).await;
    let rule = |sub: &str| json!({"claims": {"sub": sub}, "role": "deliverer", "grants": grants});
    let provider = json!({"name": "p", "type": "oidc", "issuer": "https://issuer.example.com", "audience": "regcred",
        "rules": [rule("one")]});
    admin.post("/v1/identity-providers", &provider).await.expect(201);
    let widened = json!({"rules": [rule("one"), rule("two")], "issuer": "https://evil.example.com"});
    admin.patch("/v1/identity-providers/p", &widened).await.expect(200);

    app.register_cluster("dev").await;
    let declare = async |namespace: &str| {
        let declaration = json!({"accounts": ["a"], "secret": {"name": "declared"}, "deletionPolicy": "retain",
            "targets": [{"cluster": "dev", "namespaces": [namespace]}]});
        admin.send(admin.request("PUT", "/v1/pull-secrets/t").json(&declaration)).await
    };
    declare("one").await.expect(201);
    declare("two").await.expect(200);

    let found = events(&admin, "").await;
    let of = |action: &str, resource: &str| changes(&found, action, resource);
    let change = |field: &str, old: Value, new: Value| (field.to_owned(), old, new);
    let created = of("cluster.create", "clusters/k").remove(0);
    let fingerprints = created.iter().find(|(field, ..)| field == "caCertificate").expect("a CA").2.clone();
    let fingerprint = fingerprints[0].as_str().expect("a fingerprint");
    assert!(fingerprint.len() == 64 && fingerprint.bytes().all(|byte| byte.is_ascii_hexdigit()), "{fingerprint}");
    let moved_cluster = [
        change("allowPlainHttp", json!(false), json!(true)),
        change("auth.type", json!("token"), json!("none")),
        change("caCertificate", fingerprints.clone(), json!(null)),
        change("server", json!("https://10.0.0.1:6443"), json!("http://127.0.0.1:18999")),
    ];
    assert_eq!(of("cluster.update", "clusters/k"), [moved_cluster]);
    let removed = [
        change("allowPlainHttp", json!(true), json!(null)),
        change("auth.type", json!("none"), json!(null)),
        change("server", json!("http://127.0.0.1:18999"), json!(null)),
    ];
    assert_eq!(of("cluster.delete", "clusters/k"), [removed]);

    let created_account = [
        change("labels.team", json!(null), json!("a")),
        change("labels.tier", json!(null), json!("1")),
        change("plainHttp", json!(null), json!(false)),
        change("registry", json!(null), json!("ghcr.io")),
    ];
    assert_eq!(of("registryAccount.create", "registry-accounts/a"), [created_account]);
    let moved_account = [
        change("caCertificate", json!(null), fingerprints),
        change("labels.new", json!(null), json!("1")),
        change("labels.team", json!("a"), json!("b")),
        change("registry", json!("ghcr.io"), json!("quay.io")),
    ];
    assert_eq!(of("registryAccount.rotate", "registry-accounts/a"), [moved_account]);
    let imported =
        [change("plainHttp", json!(null), json!(true)), change("registry", json!(null), json!("c.example.com"))];
    assert_eq!(of("registryAccount.create", "registry-accounts/c-example-com"), [imported]);

    let key = [change("grants", json!(null), grants.clone()), change("role", json!(null), json!("deliverer"))];
    assert_eq!(of("apiKey.create", "api-keys/").last().expect("an event"), &key);
    let widened = [
        change("issuer", json!("https://issuer.example.com"), json!("https://evil.example.com")),
        change("rules", json!([rule("one")]), json!([rule("one"), rule("two")])),
    ];
    assert_eq!(of("identityProvider.update", "identity-providers/p"), [widened]);
    let targets = |namespace: &str| json!([{"cluster": "dev", "namespaces": [namespace]}]);
    let redeclared = vec![change("targets", targets("one"), targets("two"))];
    assert_eq!(of("pullSecret.declare", "pull-secrets/t")[1], redeclared);

    // Neither secrets nor user names, and the values are signed.
    let all = json!(found).to_string();
    for absent in [CANARY, "Y2FuYXJ5LW9mLWEtcGFzc3dvcmQ", "lena", "BEGIN CERTIFICATE"] {
        assert!(!all.contains(absent), "{absent} is in {all}");
    }
    assert_whole(&app.pool).await;
    let mut superuser = superuser(&app.pool).await;
    let edit = "UPDATE audit_events SET details = replace(details::text, '18999', '18998')::json
                WHERE action = 'cluster.update'";
    run(&mut superuser, edit).await.expect("edited");
    let (_, findings) = verified(&app.pool).await;
    assert_eq!(findings.len(), 1, "{findings:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn events_are_filtered_and_paged(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for name in ["a", "b"] {
        let registry = format!("{name}.example.com");
        app.register_account(name, &registry, "dev", CANARY).await;
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
    assert_eq!(count("actor=unknown").await, 0);
    assert_eq!(count("action=apiKey.create&actor=admin").await, 1);
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
async fn commands_are_recorded_with_the_system_user(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    installation.must_run(&["api-key", "create", "--name", "one", "--role", "admin"]).await;
    installation.must_run(&["api-key", "create", "--name", "two", "--role", "viewer"]).await;
    installation.must_run(&["api-key", "revoke", "--name", "two"]).await;
    installation.must_run(&["api-key", "revoke", "--name", "one", "--even-last-admin"]).await;
    installation.must_run(&["master-key", "rotate"]).await;

    let lines = installation.must_run(&["audit", "export"]).await;
    let mut found: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    found.reverse();

    let all = json!(["*"]);
    let created = |name: &str, role: &str| {
        let grants = json!({"accounts": all, "clusters": all, "namespaces": all});
        let changes =
            json!([{"field": "grants", "old": null, "new": grants}, {"field": "role", "old": null, "new": role}]);
        format!("apiKey.create success {}", json!({"name": name, "role": role, "changes": changes}))
    };
    let did: Vec<String> = found
        .iter()
        .map(|e| format!("{} {} {}", e["action"].as_str().unwrap(), e["outcome"].as_str().unwrap(), e["details"]))
        .collect();
    assert_eq!(
        did,
        [
            &created("one", "admin"),
            &created("two", "viewer"),
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
        installation.must_run(&["audit", "verify"]).await.starts_with("The audit log is intact: 6 events in 5 seals")
    );
}

// ---- Refusals ----

/// Well-formed key that does not exist.
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
async fn refusals_for_a_key_a_role_or_a_grant_are_recorded(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("mine", "ghcr.io", "dev", CANARY).await;
    app.register_account("foreign", "quay.io", "dev", CANARY).await;
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
    let wide = app.caller("wide", "operator", None).await;
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
    operator.delete("/v1/clusters/foreign").await.problem(403, "forbidden");
    operator.post("/v1/registry-accounts", &account("new")).await.problem(403, "forbidden");
    let label = json!({"labels": {"team": "b"}});
    operator.patch("/v1/registry-accounts/mine", &label).await.problem(403, "forbidden");
    let path = "/v1/clusters/mine/namespaces/kube-system/secrets";
    deliverer.post(path, &json!({"name": "pull", "accounts": ["mine"]})).await.problem(404, "namespace-not-found");
    operator.get("/v1/audit-events").await.problem(403, "forbidden");
    let own = json!({"name": "mine", "auth": {"type": "inCluster"}});
    operator.post("/v1/clusters", &own).await.problem(403, "forbidden");
    let pods = json!({"name": "pods", "type": "tokenReview", "cluster": "mine", "audience": "regcred-mine",
        "rules": [{"claims": {"namespace": "mine", "serviceAccount": "ci"}, "role": "viewer"}]});
    app.admin().post("/v1/identity-providers", &pods).await.expect(201);
    wide.patch("/v1/clusters/mine", &json!({"server": "https://127.0.0.1:2"})).await.problem(403, "forbidden");
    let declare = async |client: &Client, name: &str, cluster: &str| {
        let declaration = json!({"accounts": ["foreign"], "secret": {"name": "pull"}, "deletionPolicy": "retain",
            "targets": [{"cluster": cluster, "namespaces": ["mine"]}]});
        client.send(client.request("PUT", &format!("/v1/pull-secrets/{name}")).json(&declaration)).await
    };
    declare(&app.admin(), "hidden", "foreign").await.expect(201);
    operator.get("/v1/pull-secrets/hidden").await.problem(404, "not-found");
    declare(&operator, "new", "mine").await.problem(422, "invalid-request");
    // Not refusals: missing or malformed.
    operator.get("/v1/pull-secrets/nothing").await.problem(404, "not-found");
    renderer.get("/v1/registry-accounts/nothing").await.problem(404, "not-found");
    renderer.post("/v1/docker-configs", &json!({"accounts": []})).await.problem(422, "invalid-request");
    app.admin().post("/v1/docker-configs", &json!({"accounts": ["nothing"]})).await.problem(422, "invalid-request");
    app.anonymous().get("/v1/me").await.problem(401, "unauthenticated");

    let found = denied(&app, "", 15).await;

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
            "operator cluster.create clusters not-granted",
            "operator cluster.delete clusters/foreign not-granted",
            "operator pullSecret.declare registry-accounts/foreign not-granted",
            "operator pullSecret.read pull-secrets/hidden not-granted",
            "operator registryAccount.create registry-accounts/new not-granted",
            "operator registryAccount.update registry-accounts/mine not-granted",
            "renderer dockerConfig.reveal registry-accounts/foreign not-granted",
            "renderer registryAccount.read registry-accounts/foreign not-granted",
            "wide cluster.update clusters/mine trusted",
        ]
    );
    assert_whole(&app.pool).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn flood_of_refusals_makes_few_events_and_loses_no_count(pool: PgPool) {
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

    // Valid keys are served.
    admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    // Pending counts are written at the end.
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
async fn swapped_sealed_value_is_not_revealed_and_recorded(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "dev", CANARY).await;
    app.register_account("b", "quay.io", "dev", "another").await;
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

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn event_holds_the_clients_request_id_if_it_is_a_uuid(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let given = uuid::Uuid::now_v7().to_string();
    for (id, name) in [(given.as_str(), "a"), ("canary", "b")] {
        let create = admin.request("POST", "/v1/registry-accounts").header("X-Request-Id", id).json(&account(name));
        admin.send(create).await.expect(201);
        let reveal = admin.request("POST", "/v1/docker-configs").header("X-Request-Id", id);
        admin.send(reveal.json(&json!({"accounts": [name]}))).await.expect(200);
    }

    let found = events(&admin, "resource=registry-accounts/a").await;
    assert_eq!(found.len(), 2, "{found:?}");
    for event in found {
        assert_eq!(event["details"]["clientRequestId"], given.as_str(), "{event}");
        assert_ne!(event["requestId"], given.as_str(), "{event}");
    }
    for event in events(&admin, "resource=registry-accounts/b").await {
        assert!(event["details"].get("clientRequestId").is_none() && !event.to_string().contains("canary"), "{event}");
    }
    assert_whole(&app.pool).await;
}

// ---- No action without its event ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn action_that_cannot_be_recorded_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    app.register_account("a", "ghcr.io", "dev", CANARY).await;
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
        (format!("REVOKE INSERT ON audit_unsealed FROM {role}"), format!("GRANT INSERT ON audit_unsealed TO {role}")),
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
            // A call of the cluster would be 502: its port is closed.
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
        // Reads are served.
        admin.get("/v1/registry-accounts").await.expect(200);

        run(&mut superuser, &mend).await.expect("mended");
        admin.post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    }
    admin.patch("/v1/registry-accounts/a", &json!({"password": "another"})).await.expect(200);
    assert_whole(&app.pool).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stored_password_is_presented_only_after_it_is_recorded(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let (registry, requests) = serve(|_| answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], ""));
    let body = json!({"name": "a", "registry": registry.to_string(), "username": "dev", "password": CANARY,
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
    // A password in the request is not the stored one.
    change(json!({"password": "another"})).await.problem(422, "verification-failed");
    let found = events(&app.admin(), "action=registryAccount.verify").await;
    let found: Vec<(String, &Value)> = found.iter().map(|event| (short(event), &event["requestId"])).collect();
    let expected = "registryAccount.verify registry-accounts/a success".to_owned();
    assert_eq!(found, [(expected, &json!(shown.header("x-request-id")))]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn viewer_reads_the_log_only_with_grants_of_everything(pool: PgPool) {
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
async fn killed_process_leaves_no_account_without_event_and_no_event_without_account(pool: PgPool) {
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

    // Transactions of killed processes must end first.
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
async fn every_answered_reveal_has_one_event_while_connections_break(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "dev", CANARY).await;
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
    let events = metric(&app, "regcred_audit_events_total{result=\"written\"}").await;
    let groups = metric(&app, "regcred_audit_groups_total").await;
    assert!(events >= 600.0 && groups < events, "{groups} groups of {events} events");

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
    assert_whole(&app.pool).await;
}

// ---- Who may change the log ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn neither_service_role_nor_owner_can_change_or_remove_events(pool: PgPool) {
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
            "UPDATE audit_events SET actor_name = 'other'",
            "UPDATE audit_events SET outcome = 'success' WHERE false",
            "DELETE FROM audit_events",
            "DELETE FROM audit_events WHERE false",
            "SET LOCAL regcred.audit_prune = 'on'; TRUNCATE audit_events",
            "SET LOCAL regcred.audit_prune = 'on'; UPDATE audit_events SET actor_name = 'other'",
            "SET LOCAL regcred.audit_prune = 'on'; DELETE FROM audit_seals",
            "TRUNCATE audit_events",
            "TRUNCATE audit_events, audit_seals",
            "UPDATE audit_seals SET events = 0 WHERE false",
            "DELETE FROM audit_seals WHERE false",
            "TRUNCATE audit_seals",
            "UPDATE audit_unsealed SET written_at = now() WHERE false",
            "TRUNCATE audit_unsealed",
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
        "SET LOCAL regcred.audit_prune = 'on'; DELETE FROM audit_events",
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
    assert_eq!(refused.code, Some(2), "{refused:?}");
}

// ---- Export ----

/// Reads a response slowly for a time, then the rest.
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

/// The export exceeds socket buffers, and the reader takes longer than a client may take for a
/// finished response.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn export_lasts_as_long_as_the_client_reads(pool: PgPool) {
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
