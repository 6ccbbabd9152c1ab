//! Invalid requests: each is refused with a problem that names the field, and stores nothing.

use std::{
    collections::BTreeSet,
    fmt::Display,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use chrono::{TimeDelta, Utc};
use reqwest::RequestBuilder;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    PATIENCE,
    app::TestApp,
    client::{Answer, Client},
    files::TempDir,
    kubernetes,
};

/// Secret in these requests, which no response may contain.
const CANARY: &str = "canary-7f3a";

/// A valid account with some members replaced; `null` removes a member.
fn account_with(members: Value) -> Value {
    let good = json!({"name": "good", "registry": "registry.example.com:5000", "username": "dev", "password": CANARY});
    replaced(good, members)
}

/// A valid cluster with some members replaced.
fn cluster_with(members: Value) -> Value {
    let auth = json!({"type": "token", "token": CANARY});
    replaced(json!({"name": "good", "server": "https://127.0.0.1:6443", "auth": auth}), members)
}

fn replaced(mut good: Value, members: Value) -> Value {
    let Value::Object(members) = members else { panic!("not an object: {members}") };
    for (name, value) in members {
        let object = good.as_object_mut().expect("an object");
        if value.is_null() {
            object.remove(&name)
        } else {
            object.insert(name, value)
        };
    }
    good
}

/// A request with an unchecked JSON body.
fn raw(client: &Client, method: &str, path: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
    client.request(method, path).header("Content-Type", "application/json").body(body)
}

/// Collects the cases of a table with an unexpected response.
#[derive(Default)]
struct Refusals {
    cases: usize,
    wrong: Vec<String>,
}

impl Refusals {
    /// Expects 422 that names the field, and no secret in the response.
    fn take(&mut self, field: &str, case: impl Display, answer: &Answer) {
        self.cases += 1;
        let refused = (answer.status, answer.slug().as_str()) == (422, "invalid-request");
        if !refused || !answer.fields().iter().any(|named| named == field) || answer.body.contains(CANARY) {
            self.wrong.push(format!("{field}: {case:.300}: {answer:?}"));
        }
    }

    #[track_caller]
    fn finish(self) {
        assert!(self.wrong.is_empty(), "{} of {} cases: {:#?}", self.wrong.len(), self.cases, self.wrong);
    }
}

/// Invalid members of an account, with the field that the error names.
fn invalid_accounts() -> Vec<(&'static str, Value)> {
    let long = |length: usize| "x".repeat(length);
    let many_labels: Value = (0..65).map(|number| (format!("label-{number}"), json!(""))).collect();
    vec![
        ("name", json!({"name": ""})),
        ("name", json!({"name": "Upper"})),
        ("name", json!({"name": "with.dot"})),
        ("name", json!({"name": "-a"})),
        ("name", json!({"name": "a\n"})),
        ("name", json!({"name": "../x"})),
        ("name", json!({"name": long(64)})),
        ("name", json!({"name": null})),
        ("name", json!({"name": 1})),
        ("registry", json!({"registry": ""})),
        ("registry", json!({"registry": "http://registry.example.com"})),
        ("registry", json!({"registry": format!("https://dev:{CANARY}@registry.example.com")})),
        ("registry", json!({"registry": "registry.example.com:99999"})),
        ("registry", json!({"registry": "registry.example.com/os/alpine:3"})),
        ("registry", json!({"registry": "registry example com"})),
        ("registry", json!({"registry": "*.example.com"})),
        ("registry", json!({"registry": long(2000)})),
        ("registry", json!({"registry": null})),
        ("registry", json!({"registry": ["registry.example.com"]})),
        ("username", json!({"username": ""})),
        ("username", json!({"username": format!("dev:{CANARY}")})),
        ("username", json!({"username": "de\nv"})),
        ("username", json!({"username": "de\u{0}v"})),
        ("username", json!({"username": "de\u{7f}v"})),
        ("username", json!({"username": long(256)})),
        ("username", json!({"username": null})),
        ("password", json!({"password": ""})),
        ("password", json!({"password": format!("{CANARY}\u{0}")})),
        ("password", json!({"password": format!("{CANARY}{}", long(32 * 1024))})),
        ("password", json!({"password": null})),
        ("password", json!({"password": 73_333_777})),
        ("password", json!({"password": true})),
        ("password", json!({"password": [CANARY]})),
        ("password", json!({"password": {"value": CANARY}})),
        ("email", json!({"email": "no-at-sign"})),
        ("email", json!({"email": "a b@example.com"})),
        ("email", json!({"email": 1})),
        ("labels", json!({"labels": {"": "a"}})),
        ("labels", json!({"labels": {"a/b/c": "a"}})),
        ("labels", json!({"labels": {"team": "not a value"}})),
        ("labels", json!({"labels": many_labels})),
        ("labels", json!({"labels": ["team"]})),
        ("labels.team", json!({"labels": {"team": 1}})),
        ("labels.team", json!({"labels": {"team": {"nested": "a"}}})),
        ("plainHttp", json!({"plainHttp": "yes"})),
        ("plainHttp", json!({"plainHttp": 1})),
        ("expiresAt", json!({"expiresAt": "tomorrow"})),
        ("expiresAt", json!({"expiresAt": 1_900_000_000})),
        ("Password", json!({"Password": CANARY})),
        ("id", json!({"id": "0198a0b1-7000-7000-8000-000000000001"})),
    ]
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_account_is_refused_by_field(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let before = app.rows().await;
    for (field, members) in invalid_accounts() {
        let body = account_with(members);
        let answer = app.admin().post("/v1/registry-accounts", &body).await;
        refusals.take(field, &body, &answer);
        assert!(!answer.body.contains("73333777"), "{answer:?}");
    }
    assert_eq!(app.rows().await, before);
    // The unchanged account is valid.
    app.admin().post("/v1/registry-accounts", &account_with(json!({}))).await.expect(201);
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn all_invalid_fields_are_reported_at_once(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let body = json!({
        "name": "A", "registry": "", "username": "a:b", "password": "", "email": "x", "labels": {"": ""},
    });
    let answer = app.admin().post("/v1/registry-accounts", &body).await;
    answer.problem(422, "invalid-request");
    assert_eq!(answer.fields(), ["name", "registry", "username", "password", "email", "labels"]);
    let bodies =
        json!({"server": "ftp://x", "auth": {"type": "token", "token": "a b"}, "name": "", "caCertificate": "x"});
    let answer = app.admin().post("/v1/clusters", &bodies).await;
    answer.problem(422, "invalid-request");
    let mut fields = answer.fields();
    fields.sort();
    assert_eq!(fields, ["auth.token", "caCertificate", "name", "server"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_account_change_changes_nothing(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let account = app.admin().post("/v1/registry-accounts", &account_with(json!({}))).await.expect(201);
    let many_labels: Value = (0..65).map(|number| (format!("label-{number}"), json!(""))).collect();
    let cases = [
        ("name", json!({"name": "other"})),
        ("version", json!({"version": 7})),
        ("registry", json!({"registry": "a b"})),
        ("username", json!({"username": "a:b"})),
        ("password", json!({"password": ""})),
        ("password", json!({"password": [CANARY]})),
        ("email", json!({"email": "x"})),
        ("labels", json!({"labels": {"team": "not a value"}})),
        ("labels", json!({"labels": many_labels})),
        ("labels.team", json!({"labels": {"team": 1}})),
        ("expiresAt", json!({"expiresAt": "x"})),
        ("plainHttp", json!({"plainHttp": "x"})),
    ];
    for (field, mut body) in cases {
        // The valid part of the change must not be applied.
        body["password"] = body.get("password").cloned().unwrap_or(json!("another"));
        let answer = app.admin().patch("/v1/registry-accounts/good", &body).await;
        refusals.take(field, &body, &answer);
    }
    assert_eq!(app.admin().get("/v1/registry-accounts/good").await.expect(200), account);
    let rendered = app.admin().post("/v1/docker-configs", &json!({"accounts": ["good"]})).await.expect(200);
    assert_eq!(rendered["config"]["auths"]["registry.example.com:5000"]["password"], CANARY);
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn removing_a_required_field_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    app.admin().post("/v1/registry-accounts", &account_with(json!({}))).await.expect(201);
    // `null` in a merge patch removes a field, and these can only be replaced.
    for field in ["registry", "username", "password", "plainHttp"] {
        let answer = app.admin().patch("/v1/registry-accounts/good", &json!({field: null})).await;
        refusals.take(field, format!("{field}: null"), &answer);
    }
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn malformed_json_is_refused_by_position(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let before = app.rows().await;
    let deep = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    let bodies = [
        String::new(),
        " ".to_owned(),
        format!("{{\"password\":\"{CANARY}\""),
        format!("{{\"password\":\"{CANARY}\",}}"),
        format!("{{'password':'{CANARY}'}}"),
        format!("{{\"password\":{CANARY}}}"),
        format!("{{\"password\":\"{CANARY}\n\"}}"),
        format!("{{\"password\":\"\\x{CANARY}\"}}"),
        format!("password={CANARY}"),
        format!("{} {CANARY}", account_with(json!({}))),
        format!("{}#", account_with(json!({}))),
        format!("\u{feff}{}", account_with(json!({}))),
    ];
    for body in bodies {
        let answer = app.admin().send(raw(&app.admin(), "POST", "/v1/registry-accounts", body.clone())).await;
        let problem = answer.problem(400, "malformed-json");
        assert!(
            problem["detail"].as_str().expect("text").contains("line 1, column ") || body.contains('\n'),
            "{answer:?}"
        );
        assert!(!answer.body.contains(CANARY), "{answer:?}");
    }
    let not_utf8 = [&b"{\"name\":\"good\",\"password\":\""[..], &[0xff, 0xfe], b"\"}"].concat();
    app.admin().send(raw(&app.admin(), "POST", "/v1/registry-accounts", not_utf8)).await.problem(400, "malformed-json");
    // JSON, but not an object.
    for body in ["[]", "null", "\"text\"", "7", &deep(100)] {
        let answer = app.admin().send(raw(&app.admin(), "POST", "/v1/registry-accounts", body.to_owned())).await;
        answer.problem(422, "invalid-request");
    }
    // Deep nesting must not overflow the stack of the parser.
    for depth in [1_000, 100_000] {
        let body = format!("{{\"labels\":{{\"a\":{}}}}}", deep(depth));
        let answer = app.admin().send(raw(&app.admin(), "POST", "/v1/registry-accounts", body)).await;
        assert!(matches!((answer.status, answer.slug().as_str()), (400, "malformed-json") | (422, "invalid-request")));
        let body = format!("{{\"auth\":{}}}", deep(depth));
        let answer = app.admin().send(raw(&app.admin(), "POST", "/v1/clusters", body)).await;
        assert!(matches!((answer.status, answer.slug().as_str()), (400, "malformed-json") | (422, "invalid-request")));
    }
    assert_eq!(app.rows().await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn duplicate_fields_are_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let before = app.rows().await;
    let account = r#""name":"good","registry":"ghcr.io","username":"m","password":"canary-7f3a""#;
    let cases = [
        ("/v1/registry-accounts", "password", format!("{{{account},\"password\":\"second\"}}")),
        ("/v1/registry-accounts", "name", format!("{{\"name\":\"other\",{account}}}")),
        // Otherwise the last value would win silently.
        ("/v1/registry-accounts", "labels.team", format!("{{{account},\"labels\":{{\"team\":\"a\",\"team\":\"b\"}}}}")),
        ("/v1/clusters", "name", r#"{"name":"a","name":"b","server":"https://k","auth":{"type":"none"}}"#.to_owned()),
        (
            "/v1/clusters",
            "auth.token",
            r#"{"name":"a","server":"https://k","auth":{"type":"token","token":"a","token":"canary-7f3a"}}"#.to_owned(),
        ),
        (
            "/v1/clusters",
            "auth.type",
            r#"{"name":"a","server":"https://k","auth":{"type":"none","type":"token","token":"a"}}"#.to_owned(),
        ),
        ("/v1/docker-configs", "accounts", r#"{"accounts":["a"],"accounts":["b"]}"#.to_owned()),
    ];
    for (path, field, body) in cases {
        let answer = app.admin().send(raw(&app.admin(), "POST", path, body.clone())).await;
        refusals.take(field, &body, &answer);
    }
    assert_eq!(app.rows().await, before);
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_cluster_is_refused_by_field(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let before = app.rows().await;
    let (certificate, key) = (kubernetes::file("admin.crt"), kubernetes::file("admin.key"));
    let other_key = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    let client = |certificate: &str, key: &str| json!({"auth": {"type": "clientCertificate", "certificate": certificate, "key": key}});
    let cases = [
        ("name", json!({"name": "A.b"})),
        ("name", json!({"name": null})),
        ("server", json!({"server": null})),
        ("server", json!({"server": "127.0.0.1:6443"})),
        ("server", json!({"server": format!("https://admin:{CANARY}@127.0.0.1:6443")})),
        ("server", json!({"server": "http://127.0.0.1:8080"})),
        ("server", json!({"server": 6443})),
        ("auth.type", json!({"server": "http://10.0.0.1:8080", "allowPlainHttp": true})),
        ("caCertificate", json!({"caCertificate": "no certificate"})),
        ("caCertificate", json!({"caCertificate": key})),
        ("tlsServerName", json!({"tlsServerName": "not a name"})),
        ("allowPlainHttp", json!({"allowPlainHttp": "yes"})),
        ("auth", json!({"auth": null})),
        ("auth", json!({"auth": "none"})),
        ("auth.type", json!({"auth": {}})),
        ("auth.type", json!({"auth": {"type": CANARY}})),
        ("auth.type", json!({"auth": {"type": 1}})),
        ("auth.token", json!({"auth": {"type": "token"}})),
        ("auth.token", json!({"auth": {"type": "token", "token": ""}})),
        ("auth.token", json!({"auth": {"type": "token", "token": format!("{CANARY}\r\nX-Injected: yes")}})),
        ("auth.token", json!({"auth": {"type": "token", "token": [CANARY]}})),
        ("auth.token", json!({"auth": {"type": "none", "token": CANARY}})),
        ("auth.tokenFile", json!({"auth": {"type": "token", "token": CANARY, "tokenFile": "/etc/shadow"}})),
        ("auth.key", client(&certificate, &other_key)),
        ("auth.key", client(&certificate, CANARY)),
        ("auth.certificate", client(CANARY, &key)),
        ("auth.certificate", json!({"auth": {"type": "clientCertificate", "key": key}})),
        ("server", json!({"auth": {"type": "inCluster"}})),
        ("context", json!({"context": "prod"})),
        ("server", json!({"kubeconfig": kubernetes::file("kubeconfig")})),
        ("credential", json!({"credential": CANARY})),
    ];
    for (field, members) in cases {
        let body = cluster_with(members);
        let answer = app.admin().post("/v1/clusters", &body).await;
        refusals.take(field, &body, &answer);
        assert!(!answer.body.contains("PRIVATE KEY"), "{answer:?}");
    }
    assert_eq!(app.rows().await, before);
    app.admin().post("/v1/clusters", &cluster_with(json!({}))).await.expect(201);
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_kubeconfig_that_is_not_self_contained_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let before = app.rows().await;
    let kubeconfig = |user: &str| {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: prod\ncontexts: [{{name: prod, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:6443'}}}}]\nusers: [{{name: u, user: {user}}}]\n"
        )
    };
    let exec = "{exec: {apiVersion: client.authentication.k8s.io/v1, command: /bin/sh, args: [-c, 'touch /tmp/x'], interactiveMode: Never}}";
    let secret = TempDir::new();
    let token_file = secret.write("token", CANARY);
    let cases = [
        ("exec", "kubeconfig", kubeconfig(exec)),
        ("auth-provider", "kubeconfig", kubeconfig("{auth-provider: {name: gcp}}")),
        ("tokenFile", "kubeconfig", kubeconfig(&format!("{{tokenFile: {}}}", token_file.display()))),
        ("client-key", "kubeconfig", kubeconfig("{client-certificate: /etc/c.crt, client-key: /etc/c.key}")),
        ("password", "kubeconfig", kubeconfig(&format!("{{username: admin, password: {CANARY}}}"))),
        (
            "insecure-skip",
            "kubeconfig",
            kubeconfig(&format!("{{token: {CANARY}}}")).replace("{server:", "{insecure-skip-tls-verify: true, server:"),
        ),
        ("is not", "kubeconfig", CANARY.to_owned()),
        ("is not", "kubeconfig", format!("{{{CANARY}: [")),
        ("prod", "context", kubeconfig(&format!("{{token: {CANARY}}}"))),
    ];
    for (words, field, kubeconfig) in cases {
        let mut body = json!({"name": "prod", "kubeconfig": kubeconfig});
        if field == "context" {
            body["context"] = json!("absent");
        }
        let answer = app.admin().post("/v1/clusters", &body).await;
        refusals.take(field, words, &answer);
        let detail = answer.json()["detail"].to_string();
        assert!(detail.contains(words), "{words}: {detail}");
    }
    assert_eq!(app.rows().await, before);
    let good = json!({"name": "prod", "kubeconfig": kubeconfig(&format!("{{token: {CANARY}}}"))});
    app.admin().post("/v1/clusters", &good).await.expect(201);
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_stored_credential_is_not_sent_to_another_server(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let cluster = app.register_cluster("dev").await;
    let other_ca = kubernetes::file("admin.crt");
    for (field, body) in [
        ("server", json!({"server": "https://127.0.0.1:1"})),
        ("caCertificate", json!({"caCertificate": null})),
        ("caCertificate", json!({"caCertificate": other_ca})),
        ("tlsServerName", json!({"tlsServerName": "localhost"})),
        ("server", json!({"server": "http://127.0.0.1:1", "allowPlainHttp": true})),
        ("unknown", json!({"unknown": 1})),
    ] {
        refusals.take(field, &body, &app.admin().patch("/v1/clusters/dev", &body).await);
    }
    assert_eq!(app.admin().get("/v1/clusters/dev").await.expect(200), cluster);
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn invalid_account_names_are_refused_by_position(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.register_account("good", "ghcr.io", "dev", CANARY).await;
    let too_many: Vec<String> = (0..1001).map(|number| format!("a-{number}")).collect();
    let cases = [
        ("accounts[1]", json!(["good", "absent"])),
        ("accounts[0]", json!(["absent"])),
        ("accounts[0]", json!(["Not a name"])),
        ("accounts[2]", json!(["absent", "good", "good"])),
        ("accounts", json!([])),
        ("accounts", json!(too_many)),
        ("accounts", json!("good")),
        ("accounts", json!(null)),
        ("accounts[0]", json!([1])),
    ];
    for (field, accounts) in cases {
        let body = json!({"accounts": accounts});
        refusals.take(field, &body, &app.admin().post("/v1/docker-configs", &body).await);
        let body = json!({"name": "pull", "accounts": accounts});
        let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
        refusals.take(field, &body, &app.admin().post(&path, &body).await);
    }
    assert_eq!(kubernetes::secret_names(&namespace).await, [""; 0]);
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_docker_config_is_refused_by_field(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    app.register_account("good", "ghcr.io", "dev", CANARY).await;
    let cases = [
        ("profile", json!({"profile": "rkt"})),
        ("profile", json!({"profile": "Kubernetes"})),
        ("profile", json!({"profile": 1})),
        ("profile", json!({"profile": "docker", "secret": {"name": "pull"}})),
        ("secret.name", json!({"secret": {}})),
        ("secret.name", json!({"secret": {"name": ""}})),
        ("secret.name", json!({"secret": {"name": "Upper"}})),
        ("secret.name", json!({"secret": {"name": "x".repeat(254)}})),
        ("secret.namespace", json!({"secret": {"name": "pull", "namespace": "a.b"}})),
        ("secret.type", json!({"secret": {"name": "pull", "type": "Opaque"}})),
        ("secret.labels", json!({"secret": {"name": "pull", "labels": {"team": "not a value"}}})),
        ("secret.labels.team", json!({"secret": {"name": "pull", "labels": {"team": 1}}})),
        ("secret.kind", json!({"secret": {"name": "pull", "kind": "ConfigMap"}})),
        ("secret", json!({"secret": "pull"})),
        ("account", json!({"account": "good"})),
    ];
    for (field, members) in cases {
        let body = replaced(json!({"accounts": ["good"]}), members);
        refusals.take(field, &body, &app.admin().post("/v1/docker-configs", &body).await);
    }
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_key_collision_names_both_accounts(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.register_account("hub-old", "https://index.docker.io/v1/", "dev", CANARY).await;
    app.register_account("hub-new", "docker.io", "ops", CANARY).await;
    app.register_account("hub-part", "docker.io/acme", "ops", CANARY).await;
    let render = json!({"accounts": ["hub-old", "hub-part", "hub-new"]});
    let manifest = json!({"accounts": ["hub-old", "hub-new"], "secret": {"name": "pull"}});
    let secret = json!({"accounts": ["hub-new", "hub-old"], "name": "pull"});

    let secrets = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    for (path, body) in [("/v1/docker-configs", &render), ("/v1/docker-configs", &manifest), (&secrets, &secret)] {
        let answer = app.admin().post(path, body).await;
        let problem = answer.problem(409, "key-collision");
        let detail = problem["detail"].as_str().expect("text");
        for part in ["`hub-new`", "`hub-old`", "`https://index.docker.io/v1/`"] {
            assert!(detail.contains(part), "{detail}");
        }
        assert_eq!(answer.fields(), ["accounts"]);
        assert!(!answer.body.contains(CANARY), "{answer:?}");
    }

    assert_eq!(kubernetes::secret_names(&namespace).await, [""; 0]);
    // An account for a part of the registry has another key.
    app.admin().post("/v1/docker-configs", &json!({"accounts": ["hub-old", "hub-part"]})).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_secret_is_not_created(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.register_account("good", "ghcr.io", "dev", CANARY).await;
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    let cases = [
        ("name", json!({"name": null})),
        ("name", json!({"name": ""})),
        ("name", json!({"name": "Upper"})),
        ("name", json!({"name": "a..b"})),
        ("name", json!({"name": "x".repeat(254)})),
        ("type", json!({"type": "Opaque"})),
        ("type", json!({"type": "kubernetes.io/tls"})),
        ("type", json!({"type": 1})),
        ("labels", json!({"labels": {"team": "not a value"}})),
        ("labels.team", json!({"labels": {"team": true}})),
        // A Secret with the label of a pull secret would pass for one of its Secrets.
        ("labels.regcred.dev/pull-secret-id", json!({"labels": {"regcred.dev/pull-secret-id": "x"}})),
        ("labels.regcred.dev/other", json!({"labels": {"regcred.dev/other": "x"}})),
        ("labels.app.kubernetes.io/managed-by", json!({"labels": {"app.kubernetes.io/managed-by": "regcred"}})),
        ("dryRun", json!({"dryRun": "yes"})),
        ("namespace", json!({"namespace": "default"})),
    ];
    for (field, members) in cases {
        let body = replaced(json!({"name": "pull", "accounts": ["good"]}), members);
        refusals.take(field, &body, &app.admin().post(&path, &body).await);
    }
    // An invalid namespace name never becomes a part of a path to the API server.
    let body = json!({"name": "pull", "accounts": ["good"]});
    for namespace in ["Default", "a.b", "-", "..%2f..%2fnodes", "a%20b", &"x".repeat(64)] {
        let answer = app.admin().post(&format!("/v1/clusters/dev/namespaces/{namespace}/secrets"), &body).await;
        refusals.take("namespace", namespace, &answer);
    }
    assert_eq!(kubernetes::secret_names(&namespace).await, [""; 0]);

    app.admin().post(&path, &body).await.expect(201);
    app.admin().post(&path, &body).await.problem(409, "secret-exists");
    let absent = app.admin().post("/v1/clusters/dev/namespaces/nowhere-at-all/secrets", &body).await;
    absent.problem(404, "namespace-not-found");
    app.admin().post("/v1/clusters/absent/namespaces/default/secrets", &body).await.problem(404, "not-found");
    refusals.finish();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_secret_over_one_mebibyte_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    // The document contains each password twice, once in base64: 16 of them exceed 1 MiB, 10 do
    // not.
    let password = CANARY.repeat(32 * 1024 / CANARY.len());
    let names: Vec<String> = (0..16).map(|number| format!("long-{number}")).collect();
    for name in &names {
        app.register_account(name, &format!("{name}.example.com"), "dev", &password).await;
    }
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");

    let answer = app.admin().post(&path, &json!({"name": "pull", "accounts": names})).await;

    answer.problem(422, "invalid-secret");
    assert_eq!(answer.fields(), ["data"]);
    assert!(!answer.body.contains(CANARY), "{answer:?}");
    assert_eq!(kubernetes::secret_names(&namespace).await, [""; 0]);
    app.admin().post(&path, &json!({"name": "pull", "accounts": names[..10]})).await.expect(201);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_query_parameter_is_refused_by_name(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut refusals = Refusals::default();
    let accounts = [
        ("limit", "limit=0"),
        ("limit", "limit=501"),
        ("limit", "limit=-1"),
        ("limit", "limit=many"),
        ("limit", "limit="),
        ("cursor", "cursor=%00"),
        ("cursor", "cursor=not-a-cursor"),
        ("cursor", "cursor=Li4vLi4"),
        ("label", "label=team"),
        ("label", "label==a"),
        ("label", "label=team=not%20a%20value"),
        ("offset", "offset=7"),
        ("limit", "limit=1&limit=2"),
        ("expiresWithin", "expiresWithin=soon"),
        ("expiresWithin", "expiresWithin=100001d"),
    ];
    for (field, query) in accounts {
        let answer = app.admin().get(&format!("/v1/registry-accounts?{query}")).await;
        refusals.take(field, query, &answer);
    }
    refusals.take("label", "clusters", &app.admin().get("/v1/clusters?label=team=a").await);
    let check = app.admin().request("POST", "/v1/clusters/dev/check?namespace=Not%20One");
    refusals.take("namespace", "check", &app.admin().send(check).await);
    refusals.finish();
}

/// Every operation under `/v1` of the OpenAPI document: method, path without variables, and query
/// parameters.
fn operations() -> Vec<(String, String, BTreeSet<String>)> {
    let document = serde_json::to_value(regcred::http::document()).expect("JSON");
    let mut operations = Vec::new();
    for (path, item) in
        document["paths"].as_object().expect("paths").iter().filter(|(path, _)| path.starts_with("/v1/"))
    {
        let path = path.replace("{id}", "0198a0b1-7000-7000-8000-000000000001").replace(['{', '}'], "");
        for (method, operation) in item.as_object().expect("operations") {
            let parameters = operation["parameters"].as_array().into_iter().flatten();
            let names = parameters.filter(|one| one["in"] == "query").filter_map(|one| one["name"].as_str());
            operations.push((method.to_uppercase(), path.clone(), names.map(str::to_owned).collect()));
        }
    }
    operations
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_route_refuses_query_parameters_that_it_does_not_document(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let before = app.rows().await;
    let operations = operations();
    let mut all: BTreeSet<String> = operations.iter().flat_map(|(.., names)| names.clone()).collect();
    all.insert("unknown".to_owned());
    let query: Vec<String> = all.iter().map(|name| format!("{name}=x")).collect();
    let mut wrong = Vec::new();
    for (method, path, documented) in &operations {
        // Parameters of other routes are unknown too, and all of them are named at once.
        let answer = app.admin().send(app.admin().request(method, &format!("{path}?{}", query.join("&")))).await;
        let is_unknown =
            |error: &&Value| error["detail"].as_str().is_some_and(|detail| detail.contains("is not a known"));
        let errors = answer.json()["errors"].as_array().cloned().unwrap_or_default();
        let refused = errors.iter().filter(is_unknown).filter_map(|error| error["field"].as_str());
        let refused: BTreeSet<String> = refused.map(str::to_owned).collect();
        let expected: BTreeSet<String> = all.difference(documented).cloned().collect();
        if (answer.status, answer.slug().as_str()) != (422, "invalid-request") || refused != expected {
            wrong.push(format!("{method} {path}: {answer:?}"));
        }
        let answer = app.admin().send(app.admin().request(method, &format!("{path}?unknown=x"))).await;
        if answer.status != 422 || answer.fields() != ["unknown"] {
            wrong.push(format!("{method} {path}: {answer:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(operations.len() >= 30 && all.len() >= 15, "{operations:?}");
    assert_eq!(app.rows().await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_unknown_query_parameter_prevents_every_write(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.register_account("good", "ghcr.io", "dev", CANARY).await;
    let before = app.rows().await;
    let account = app.admin().get("/v1/registry-accounts/good").await.expect(200);
    let secret = json!({"name": "pull", "accounts": ["good"]});
    let declared = json!({"accounts": ["good"], "secret": {"name": "pull"},
        "targets": [{"cluster": "dev", "namespaces": [namespace]}]});
    for (method, path, body) in [
        ("POST", &*format!("/v1/clusters/dev/namespaces/{namespace}/secrets"), secret),
        ("PUT", "/v1/pull-secrets/team-a", declared),
        ("POST", "/v1/registry-accounts", replaced(account_with(json!({})), json!({"name": "other"}))),
        ("PATCH", "/v1/registry-accounts/good", json!({"username": "ops"})),
        ("DELETE", "/v1/registry-accounts/good", Value::Null),
        ("POST", "/v1/api-keys", json!({"name": "other", "role": "viewer"})),
    ] {
        // A misspelt dry run.
        let request = app.admin().request(method, &format!("{path}?dryrun=true")).json(&body);
        let answer = app.admin().send(request).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), ["dryrun"], "{method} {path}");
    }
    assert_eq!(app.rows().await, before);
    assert_eq!(app.admin().get("/v1/registry-accounts/good").await.expect(200), account);
    assert_eq!(app.admin().get("/v1/pull-secrets").await.expect(200)["items"], json!([]));
    assert_eq!(kubernetes::secret_names(&namespace).await, [""; 0]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_query_is_checked_after_the_permission_and_ignored_by_probes(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let viewer = app.caller("viewer", "viewer", None).await;
    viewer.post("/v1/clusters?unknown=x", &cluster_with(json!({}))).await.problem(403, "forbidden");
    app.anonymous().get("/v1/me?unknown=x").await.problem(401, "unauthenticated");
    for path in ["/healthz", "/readyz", "/openapi.json"] {
        assert_eq!(app.anonymous().get(&format!("{path}?unknown=x")).await.status, 200, "{path}");
    }
    assert_eq!(app.operations().get("/metrics?unknown=x").await.status, 200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_key_gets_one_answer_for_every_route(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let before = app.rows().await;
    let good = app.new_key("good", None).await;
    let expired = app.new_key("expired", Some(Utc::now() - TimeDelta::seconds(1))).await;
    let revoked = app.new_key("revoked", None).await;
    let client = |key: &str| app.anonymous().with_key(key);
    assert_eq!(client(&revoked).get("/v1/me").await.expect(200)["name"], "revoked");
    app.revoke_key("revoked", false).await.expect("revoked");
    let unknown = {
        let body = format!("rgc_{}_{}", "0198a0b1700070008000000000000001", "7".repeat(64));
        format!("{body}{:08x}", crc32fast::hash(body.as_bytes()))
    };
    // The id of another key with this key's secret and a valid checksum.
    let mixed = {
        let body = format!("rgc_{}{}", &expired[4..37], &good[37..101]);
        format!("{body}{:08x}", crc32fast::hash(body.as_bytes()))
    };
    let headers = [
        None,
        Some(String::new()),
        Some("Bearer".to_owned()),
        Some("Bearer ".to_owned()),
        Some(good.clone()),
        Some(format!("Basic {good}")),
        Some(format!("Bearer {}{}", &good[..good.len() - 1], if good.ends_with('0') { '1' } else { '0' })),
        Some(format!("Bearer {}", &good[..good.len() - 1])),
        Some(format!("Bearer {}", good.to_uppercase())),
        Some(format!("Bearer {good} {good}")),
        Some(format!("Bearer {unknown}")),
        Some(format!("Bearer {mixed}")),
        Some(format!("Bearer {expired}")),
        Some(format!("Bearer {revoked}")),
    ];
    for header in &headers {
        for (method, path) in
            [("GET", "/v1/me"), ("POST", "/v1/registry-accounts"), ("GET", "/v1/registry-accounts/absent")]
        {
            let mut request = app.anonymous().request(method, path).json(&account_with(json!({})));
            if let Some(header) = header {
                request = request.header("Authorization", header);
            }
            let answer = app.anonymous().send(request).await;
            answer.problem(401, "unauthenticated");
            assert!(answer.header("www-authenticate").starts_with("Bearer"), "{answer:?}");
            assert!(!answer.body.contains(&good[37..]), "{answer:?}");
        }
    }
    let [accounts, clusters, _] = app.rows().await;
    assert_eq!([accounts, clusters], before[..2]);
    // The scheme is case-insensitive, and the valid key still works.
    let request = app.anonymous().request("GET", "/v1/me").header("Authorization", format!("bEARER {good}"));
    assert_eq!(app.anonymous().send(request).await.expect(200)["name"], "good");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_body_without_a_key_is_not_read(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    // The body is announced and never sent, so the response must not wait for it.
    let head = "POST /v1/registry-accounts HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n";
    let mut stream = connect(app.address);
    stream.write_all(head.as_bytes()).expect("sent");
    assert!(read_head(&mut stream).starts_with("HTTP/1.1 401 "));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_unsupported_method_is_answered_with_the_supported_ones(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let cases = [
        ("PUT", "/v1/registry-accounts", "GET, HEAD, POST"),
        ("DELETE", "/v1/registry-accounts", "GET, HEAD, POST"),
        ("POST", "/v1/registry-accounts/a", "DELETE, GET, HEAD, PATCH"),
        ("PUT", "/v1/clusters/a", "DELETE, GET, HEAD, PATCH"),
        ("GET", "/v1/clusters/a/check", "POST"),
        ("GET", "/v1/docker-configs", "POST"),
        ("PUT", "/v1/clusters/a/namespaces/b/secrets", "GET, HEAD, POST"),
        ("DELETE", "/v1/me", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("PROPFIND", "/v1/me", "GET, HEAD"),
    ];
    for (method, path, allowed) in cases {
        let answer = app.admin().send(app.admin().request(method, path)).await;
        answer.problem(405, "method-not-allowed");
        let mut methods: Vec<&str> = answer.header("allow").split(", ").collect();
        methods.sort_unstable();
        assert_eq!(methods.join(", "), allowed, "{method} {path}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_unknown_path_is_a_problem(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let paths = [
        "/v1",
        "/v1/",
        "/v1/nothing",
        "/v2/registry-accounts",
        "/v1/registry-accounts/",
        "/v1/registry-accounts/a/b",
        "/v1/registry-accounts/Not%20A%20Name",
        "/v1/registry-accounts/..%2F..%2Fclusters",
        "/v1/registry-accounts/%ff",
        "/v1/clusters/absent",
    ];
    for path in paths {
        let answer = app.admin().get(path).await;
        assert_eq!((answer.status, answer.slug().as_str()), (404, "not-found"), "{path}: {answer:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unsupported_media_types_are_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "ghcr.io", "dev", CANARY).await;
    let before = app.rows().await;
    let body = account_with(json!({})).to_string();
    let sent = async |method: &str, path: &str, media_type: Option<&str>| {
        let mut request = app.admin().request(method, path).body(body.clone());
        if let Some(media_type) = media_type {
            request = request.header("Content-Type", media_type);
        }
        app.admin().send(request).await
    };
    for media_type in [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
        Some("application/yaml"),
        Some("application/merge-patch+json"),
        Some("application/jsonp"),
        Some("application"),
    ] {
        sent("POST", "/v1/registry-accounts", media_type).await.problem(415, "unsupported-media-type");
        sent("POST", "/v1/clusters", media_type).await.problem(415, "unsupported-media-type");
        sent("POST", "/v1/docker-configs", media_type).await.problem(415, "unsupported-media-type");
    }
    for media_type in [None, Some("application/json-patch+json"), Some("text/json")] {
        sent("PATCH", "/v1/registry-accounts/a", media_type).await.problem(415, "unsupported-media-type");
    }
    assert_eq!(app.rows().await, before);

    let render = json!({"accounts": ["a"]});
    let manifest = json!({"accounts": ["a"], "secret": {"name": "pull"}});
    for (body, accept) in [
        (&render, "application/yaml"),
        (&render, "text/html"),
        (&render, "image/png, text/plain;q=0.5"),
        (&manifest, "text/html"),
        (&manifest, "application/xml"),
    ] {
        let request = app.admin().request("POST", "/v1/docker-configs").json(body).header("Accept", accept);
        let answer = app.admin().send(request).await;
        answer.problem(406, "not-acceptable");
        assert!(!answer.body.contains(CANARY), "{answer:?}");
    }
    sent("POST", "/v1/registry-accounts", Some("application/json; charset=utf-8")).await.expect(201);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn ten_megabytes_are_refused_unread(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("raw", None).await;
    let before = app.rows().await;
    let large = vec![b' '; 10 * 1024 * 1024];
    for path in ["/v1/registry-accounts", "/v1/clusters", "/v1/docker-configs"] {
        let announced = app.admin().send(raw(&app.admin(), "POST", path, large.clone())).await;
        announced.problem(413, "body-too-large");
        // In chunks, so that the size is not announced.
        let mut stream = connect(app.address);
        let head = head(&key, path, "Transfer-Encoding: chunked");
        let mut sender = stream.try_clone().expect("a handle");
        let sending = thread::spawn(move || {
            let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
            sender.write_all(head.as_bytes()).expect("sent");
            // The server closes the connection before all chunks are sent.
            (0..160).take_while(|_| sender.write_all(chunk.as_bytes()).is_ok()).count()
        });
        let chunked = read_head(&mut stream);
        assert!(chunked.starts_with("HTTP/1.1 413 "), "{chunked}");
        drop(stream);
        sending.join().expect("sent");
    }
    // Announced and never sent: the response must not wait for it.
    let mut stream = connect(app.address);
    stream.write_all(head(&key, "/v1/registry-accounts", "Content-Length: 10485760").as_bytes()).expect("sent");
    let answer = read_head(&mut stream);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert_eq!(app.rows().await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_slow_body_times_out(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("slow", None).await;
    let before = app.rows().await;
    let start = Instant::now();
    // A client that holds a connection open and sends a byte now and then.
    let mut slow = connect(app.address);
    slow.write_all(head(&key, "/v1/registry-accounts", "Content-Length: 1000").as_bytes()).expect("sent");
    slow.set_read_timeout(Some(Duration::from_millis(500))).expect("set");
    let mut answer = Vec::new();
    while answer.is_empty() && start.elapsed() < PATIENCE {
        // The server may have closed the connection meanwhile.
        let _ = slow.write_all(b" ");
        let mut chunk = [0; 4096];
        let count = slow.read(&mut chunk).unwrap_or(0);
        answer.extend_from_slice(&chunk[..count]);
    }
    let answer = String::from_utf8_lossy(&answer).to_lowercase();
    assert!(answer.starts_with("http/1.1 408 ") && answer.contains("application/problem+json"), "{answer}");
    assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    assert_eq!(app.rows().await, before);
    // Other clients are still served.
    app.register_account("good", "ghcr.io", "dev", CANARY).await;
}

/// Head of a POST request with this framing of the body.
fn head(key: &str, path: &str, framing: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
    )
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Reads the head of a response.
fn read_head(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    while !bytes.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut chunk).expect("an answer") {
            0 => break,
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
