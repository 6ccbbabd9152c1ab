//! No secret leaks: canaries enter through every route in valid and invalid requests, with trace
//! logging, and no output may contain them in any common encoding.

use std::{collections::BTreeMap, fs, io::Write, path::PathBuf, process::Command};

use base64::{
    Engine, alphabet,
    engine::{GeneralPurpose, general_purpose::NO_PAD},
    prelude::BASE64_STANDARD,
};
use regcred::{
    clients::cluster::{ClusterClient, ClusterClientConfig},
    config::Reader,
    crypto::{
        api_key::{self, PresentedKey},
        pepper::Pepper,
        ring::Ring as _,
        sealer::{KeyRing, Sealer, generate_ring_line},
    },
    domain::{
        account::Password,
        cluster::{ClusterAuth, ClusterConnection},
        docker_config::{Credential, Profile, render},
        registry::RegistryScope,
        secret::{SecretContent, SecretType},
    },
    service::clusters::ConnectionInput,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::support::{
    client::{Answer, Client},
    eventually, given, kubernetes,
    listener::{listen, read_request},
    process::{Installation, Service},
};

// ---- Canaries ----

/// A secret and the encodings to search for.
pub struct Canary {
    name: &'static str,
    pub needles: Vec<(&'static str, String)>,
}

impl Canary {
    /// `core` is the part to search for: unique, and unchanged by JSON and URL encoding.
    pub fn new(name: &'static str, core: &str) -> Self {
        assert!(core.len() >= 16 && core.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)));
        let hex = hex(core.as_bytes());
        let numbers = |separator: &str| core.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(separator);
        let mut needles = vec![
            ("raw", core.to_owned()),
            ("hex", hex.to_uppercase()),
            ("hex", hex),
            // As `Debug` and JSON print bytes.
            ("numbers", numbers(", ")),
            ("numbers", numbers(",")),
        ];
        for alphabet in [alphabet::STANDARD, alphabet::URL_SAFE] {
            let engine = GeneralPurpose::new(&alphabet, NO_PAD);
            needles.extend((0..3).map(|offset| ("base64", in_base64(&engine, core, offset))));
        }
        Self { name, needles }
    }

    /// Generates a secret and its canary.
    pub fn random(name: &'static str) -> (String, Self) {
        let line = generate_ring_line().expect("random bytes");
        let (_, key) = line.expose_secret().split_once(':').expect("a key");
        let core: String = key.chars().filter(char::is_ascii_alphanumeric).take(24).collect();
        // Adds characters that encodings change. The core is unique without them.
        (format!("+/{core}=\""), Self::new(name, &core))
    }

    fn find_in(&self, text: &str) -> Vec<&'static str> {
        self.needles.iter().filter(|(_, needle)| text.contains(needle)).map(|(encoding, _)| *encoding).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// The part of a longer text's base64 that `text` determines alone, if it starts at this offset.
fn in_base64(engine: &GeneralPurpose, text: &str, offset: usize) -> String {
    let encoded = engine.encode([&vec![b'x'; offset][..], text.as_bytes()].concat());
    encoded[(offset * 8).div_ceil(6)..(offset + text.len()) * 8 / 6].to_owned()
}

/// Collected outputs with their sources.
#[derive(Default)]
struct Outputs(Vec<(String, String)>);

impl Outputs {
    fn take(&mut self, place: impl Into<String>, text: impl Into<String>) {
        self.0.push((place.into(), text.into()));
    }

    fn take_answer(&mut self, place: impl Into<String>, answer: &Answer) {
        self.take(place, format!("{:?}\n{}", answer.headers, answer.body));
    }

    #[track_caller]
    fn assert_free_of<'a>(&self, canaries: impl IntoIterator<Item = &'a Canary>) {
        let mut leaks = Vec::new();
        for canary in canaries {
            for (place, text) in &self.0 {
                for encoding in canary.find_in(text) {
                    leaks.push(format!("{} ({encoding}) in {place}", canary.name));
                }
            }
        }
        assert!(leaks.is_empty(), "{leaks:#?}");
    }
}

#[test]
fn canary_is_found_in_every_encoding() {
    let (secret, canary) = Canary::random("canary");
    let url: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
    let hex = hex(secret.as_bytes());
    let bytes = [format!("{:?}", secret.as_bytes()), json!(secret.as_bytes()).to_string()];
    let mut texts = vec![secret.clone(), url, hex.to_uppercase(), hex, json!(secret).to_string()];
    texts.extend(bytes);
    for user in ["", "m", "ma", "mar", "martin"] {
        let pair = BASE64_STANDARD.encode(format!("{user}:{secret}"));
        texts.extend([BASE64_STANDARD.encode(format!("{{\"auths\":{{\"x\":\"{secret}\"}}}}")), pair]);
    }
    for text in texts {
        assert!(!canary.find_in(&text).is_empty(), "{text}");
    }
    assert_eq!(Canary::random("other").1.find_in(&secret), [""; 0]);
}

// ---- Inputs ----

/// An API server that echoes the request in its response, as some proxies and admission webhooks
/// do. The namespace sets the response status.
fn echoing_cluster() -> String {
    let address = listen(|mut stream| {
        let request = read_request(&stream);
        let status = request.split("/namespaces/s").nth(1).and_then(|rest| rest.get(..3)).unwrap_or("200");
        let body = json!({
            "kind": "Status", "reason": "Invalid", "message": request, "metadata": {"name": request},
            "details": {"kind": "secrets", "causes": [{"reason": request, "message": request, "field": "data"}]},
        })
        .to_string();
        let (echo, length) = (request.len(), body.len());
        // One request per connection. Without this header the client would reuse it.
        let head =
            format!("HTTP/1.1 {status} X\r\nX-Echo: {echo}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        // regcred may have closed the connection.
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
    });
    format!("http://{address}")
}

/// Bodies that no route accepts, with the secret in a wrong place.
fn bad_bodies(secret: &str) -> Vec<Vec<u8>> {
    let bodies = [
        json!(secret),
        json!([secret]),
        json!({"password": [secret]}),
        json!({"password": {"value": secret}}),
        json!({"password": format!("{secret}\u{0}")}),
        json!({"name": secret, "password": secret}),
        json!({"name": [secret]}),
        json!({"registry": format!("https://martin:{secret}@registry.example.com")}),
        json!({"registry": {"host": secret}}),
        json!({"username": format!("martin:{secret}")}),
        json!({"email": format!("{secret} x")}),
        json!({"labels": secret}),
        json!({"labels": {"team": format!("{secret} x")}}),
        json!({"plainHttp": secret}),
        json!({"expiresAt": secret}),
        json!({"unknown": secret}),
        json!({"accounts": secret}),
        json!({"accounts": [format!("{secret} x")]}),
        json!({"accounts": [{"password": secret}]}),
        json!({"accountSelector": {"matchLabels": {"team": format!("{secret} x")}}}),
        json!({"accountSelector": {"matchExpressions": [{"key": "team", "operator": secret}]}}),
        json!({"profile": secret}),
        json!({"profile": [secret]}),
        json!({"format": secret}),
        json!({"accounts": ["good"], "secret": secret}),
        json!({"accounts": ["good"], "secret": {"name": secret, "namespace": secret, "type": secret}}),
        json!({"type": secret, "name": "pull", "accounts": ["good"]}),
        json!({"dryRun": secret}),
        json!({"server": format!("https://admin:{secret}@127.0.0.1:6443"), "name": "x", "auth": {"type": "none"}}),
        json!({"server": "https://k", "name": "x", "auth": {"type": "token", "token": [secret]}}),
        json!({"server": "https://k", "name": "x", "auth": {"type": "token", "token": format!("{secret}\r\nX: y")}}),
        json!({"server": "https://k", "name": "x", "auth": {"type": secret}}),
        json!({"server": "https://k", "name": "x",
            "auth": {"type": "serviceAccount", "token": secret, "namespace": secret, "name": secret}}),
        json!({"server": "https://k", "name": "x", "auth": {"type": "none", "token": secret}}),
        json!({"server": "https://k", "name": "x", "auth": secret}),
        json!({"server": "https://k", "name": "x", "auth": {"type": "clientCertificate", "certificate": secret, "key": secret}}),
        json!({"server": "https://k", "name": "x", "auth": {"type": "none"}, "caCertificate": secret}),
        json!({"server": "https://k", "name": "x", "auth": {"type": "none"}, "tlsServerName": secret}),
        json!({"name": "x", "kubeconfig": secret}),
        json!({"name": "x", "kubeconfig": [secret]}),
        json!({"name": "x", "kubeconfig": format!("kind: Config\nusers: {{{secret}: [")}),
        json!({"name": "x", "kubeconfig": format!(
            "kind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nclusters: [{{name: c, cluster: \
             {{server: 'https://k'}}}}]\nusers: [{{name: u, user: {{token: '{}', password: '{}', exec: {{command: '{}'}}}}}}]",
            secret.replace('\'', ""), secret.replace('\'', ""), secret.replace('\'', ""),
        )}),
        json!({"image": secret, "accounts": ["good"]}),
        json!({"image": "a", "config": secret}),
        json!({"image": "a", "config": {"auths": {"ghcr.io": {"auth": secret, "password": [secret]}}}}),
        json!({"image": "a", "config": {"auths": {"ghcr.io": {"username": "m", "password": secret, "auth": BASE64_STANDARD.encode(secret)}}}}),
        json!({"auths": {"ghcr.io": {"auth": BASE64_STANDARD.encode(secret)}}}),
        json!({"auths": {"ghcr.io": {"username": format!("a:{secret}"), "password": "x"}}}),
        json!({"auths": secret}),
        json!({"auths": {"ghcr.io": secret}}),
    ];
    let mut bodies: Vec<Vec<u8>> = bodies.iter().map(|body| body.to_string().into_bytes()).collect();
    let quoted = json!(secret).to_string();
    bodies.extend([
        format!("{{\"password\":{quoted}").into_bytes(),
        format!("{{\"password\":{quoted},}}").into_bytes(),
        format!("{{\"password\":{secret}}}").into_bytes(),
        format!("{{\"password\":\"{secret}\n\"}}").into_bytes(),
        format!("{{\"password\":{quoted}}} {secret}").into_bytes(),
        [quoted.as_bytes(), &[0xff]].concat(),
        secret.as_bytes().to_vec(),
        secret.repeat(100_000).into_bytes(),
    ]);
    bodies
}

/// Every operation under `/v1` of the OpenAPI document, with existing names in its path.
fn operations() -> Vec<(String, String, bool)> {
    let document = serde_json::to_value(regcred::http::document()).expect("JSON");
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        let name = if path.contains("/clusters/") { "echo" } else { "good" };
        let filled = path.replace("{name}", name).replace("{cluster}", "echo").replace("{namespace}", "s422");
        let filled = filled.replace("{pod}", "good").replace("{kind}", "deployment");
        let filled = filled.replace("{id}", "0198a0b1-7000-7000-8000-000000000001");
        for (method, operation) in item.as_object().expect("operations") {
            operations.push((method.to_uppercase(), filled.clone(), operation.get("requestBody").is_some()));
        }
    }
    operations
}

/// Sends the secret in every wrong place of every operation.
async fn misuse(service: &Service, key: &str, secret: &str, outputs: &mut Outputs) {
    let header = secret.replace('"', "");
    let client = service.client(key);
    for (method, path, takes_body) in operations() {
        let place = format!("{method} {path}");
        for authorization in [
            format!("Bearer {header}"),
            format!("Bearer rgc_{header}"),
            format!("Basic {}", BASE64_STANDARD.encode(format!("martin:{secret}"))),
            header.clone(),
        ] {
            let request = service.anonymous().request(&method, &path).header("Authorization", authorization);
            outputs.take_answer(format!("{place}, unauthenticated"), &client.send(request).await);
        }
        if method == "DELETE" {
            continue;
        }
        for name in ["X-Request-Id", "If-Match", "Accept", "Cookie", "X-Api-Key", "Content-Type"] {
            let request = client.request(&method, &path).header(name, &header);
            outputs.take_answer(format!("{place}, {name}"), &client.send(request).await);
        }
        let value: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
        for parameter in ["limit", "cursor", "label=team", "namespace", "namePrefix", "dryRun", "password", "token"] {
            let request = client.request(&method, &format!("{path}?{parameter}={value}"));
            outputs.take_answer(format!("{place}, ?{parameter}"), &client.send(request).await);
        }
        if takes_body {
            for body in bad_bodies(secret) {
                for media_type in ["application/json", "text/plain"] {
                    let request = client.request(&method, &path).header("Content-Type", media_type).body(body.clone());
                    let shown = String::from_utf8_lossy(&body).chars().take(80).collect::<String>();
                    outputs.take_answer(format!("{place}, {shown}"), &client.send(request).await);
                }
            }
        }
    }
}

/// Sends a request, asserts the status, and collects the response.
async fn ask(
    client: &Client,
    outputs: &mut Outputs,
    (status, method, path, body): (u16, &str, &str, &Value),
) -> Answer {
    let request = client.request(method, path);
    let answer = client.send(if body.is_null() { request } else { request.json(body) }).await;
    assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
    outputs.take_answer(format!("{method} {path}"), &answer);
    answer
}

/// Collects a string member of each object.
fn member_of_each(objects: &Value, member: &str) -> Vec<String> {
    let objects = objects.as_array().expect("objects");
    objects.iter().map(|object| object[member].as_str().expect("a string").to_owned()).collect()
}

/// Delivers through the worker: to the echoing cluster, which has a Secret to adopt in namespace
/// s200 and none in s404, and to the real cluster. Collects everything that reports the results.
async fn deliver_by_pull_secret(client: &Client, namespace: &str, outputs: &mut Outputs) {
    const PATH: &str = "/v1/pull-secrets/good";
    let targets = [
        json!({"cluster": "echo", "namespaces": ["s200", "s403", "s404"]}),
        json!({"cluster": "real", "namespaces": [namespace]}),
        json!({"cluster": "echo", "namespaceSelector": {"matchLabels": {"team": "a"}}}),
    ];
    let declaration = |targets: &[Value], dry_run: bool| {
        let secret = json!({"name": "declared"});
        json!({"accounts": ["good"], "secret": secret, "targets": targets, "adopt": true, "dryRun": dry_run})
    };
    let dry_run = declaration(&targets[..2], true);
    let previewed = ask(client, outputs, (200, "PUT", PATH, &dry_run)).await.json();
    assert_eq!(
        member_of_each(&previewed["targets"], "action"),
        ["adopt", "unknown", "create", "create"],
        "{previewed}"
    );
    // The echoing cluster answers with an invalid list of namespaces.
    ask(client, outputs, (200, "PUT", PATH, &declaration(&targets, true))).await;
    ask(client, outputs, (201, "PUT", PATH, &declaration(&targets, false))).await;
    eventually("the worker has attempted every target", async || {
        let shown = client.get(PATH).await.expect(200);
        (shown["status"]["pending"] == 0 && shown["selections"][0]["lastError"].is_object()).then_some(())
    })
    .await;

    let shown = ask(client, outputs, (200, "GET", &format!("{PATH}/targets"), &Value::Null)).await.json();
    assert_eq!(member_of_each(&shown["items"], "state"), ["synced", "failed", "failed", "synced"], "{shown}");
    // A 404 on the GET means a missing Secret. The reported failure is that of the apply.
    let detail = shown["items"][2]["lastError"]["detail"].as_str().expect("a detail");
    assert!(detail.contains("(status 404)"), "{detail}");
    for (status, method, path, body) in [
        (200, "GET", PATH, Value::Null),
        (200, "GET", "/v1/pull-secrets", Value::Null),
        (200, "GET", "/v1/pull-secrets/good/events", Value::Null),
        (200, "PUT", PATH, dry_run),
        (202, "POST", "/v1/pull-secrets/good/sync", Value::Null),
    ] {
        ask(client, outputs, (status, method, path, &body)).await;
    }
}

/// Dumps the database, including sealed values.
pub fn dump(pool: &PgPool) -> String {
    let mut url = pool.connect_options().to_url_lossy();
    // These parameters are specific to the driver.
    url.set_query(None);
    let output = Command::new(PathBuf::from(given("REGCRED_TEST_PG_BIN")).join("pg_dump"))
        .args(["--inserts", "--dbname", url.as_str()])
        .output()
        .expect("pg_dump runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Canaries for the service's own secrets.
fn own_canaries(installation: &Installation, key: &str) -> Vec<Canary> {
    let file = |name: &str| fs::read_to_string(installation.variable(name)).expect("a secret");
    let core = |text: &str| text.trim().trim_end_matches('=').replace(['+', '/'], "\n");
    let longest = |text: String| text.lines().max_by_key(|line| line.len()).expect("text").to_owned();
    let master_key = file("REGCRED_MASTER_KEYS_FILE");
    let (_, master_key) = master_key.split_once(':').expect("a ring");
    let bytes = BASE64_STANDARD.decode(master_key.trim()).expect("base64");
    let hex = hex(&bytes);
    let url: url::Url = file("REGCRED_DATABASE_URL_FILE").parse().expect("a URL");
    vec![
        // Format: `rgc_ID_SECRET` and a checksum. The id is not secret.
        Canary::new("API key", &key[37..101]),
        Canary::new("master key", &hex),
        Canary::new("password of the database", url.password().expect("a password")),
        Canary { name: "master key", needles: vec![("base64", longest(core(master_key)))] },
        Canary { name: "pepper", needles: vec![("base64", longest(core(&file("REGCRED_API_KEY_PEPPER_FILE"))))] },
    ]
}

// ---- Tests ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn secrets_appear_only_in_docker_configs(pool: PgPool) {
    let installation =
        Installation::new(pool.connect_options().to_url_lossy().as_str()).with("REGCRED_LOG_FILTER", "trace");
    let created = installation.run(&["api-key", "create", "--name", "admin", "--role", "admin"]).await;
    let key = created.stdout.trim().to_owned();
    let service = installation.serve().await;
    let client = service.client(&key);
    let (password, password_canary) = Canary::random("password");
    let (rotated, rotated_canary) = Canary::random("rotated password");
    let (imported, imported_canary) = Canary::random("imported password");
    let (token, token_canary) = Canary::random("token");
    let token = token.replace('"', "");
    let (kubeconfig_token, kubeconfig_canary) = Canary::random("token in a kubeconfig");
    let kubeconfig_token = kubeconfig_token.replace('"', "");
    let (misused, misused_canary) = Canary::random("misplaced secret");
    let client_key = kubernetes::file("admin.key");
    let key_line = client_key.lines().nth(1).expect("base64").replace(['+', '/'], "\n");
    let key_line = key_line.lines().max_by_key(|line| line.len()).expect("text");
    let client_key_canary = Canary { name: "client key", needles: vec![("PEM", key_line.to_owned())] };
    let mut outputs = Outputs::default();
    outputs.take("api-key create", created.stderr);

    // Valid requests.
    let echo = echoing_cluster();
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": echo}}],
        "users": [{"name": "u", "user": {"token": kubeconfig_token}}],
    });
    let namespace = kubernetes::new_namespace().await;
    let auth = json!({"type": "clientCertificate", "certificate": kubernetes::file("admin.crt"), "key": client_key});
    let real = json!({"name": "real", "server": kubernetes::server(), "caCertificate": kubernetes::file("ca.crt"), "auth": auth});
    let pull = json!({"name": "pull", "accounts": ["good"]});
    let import = json!({"auths": {"quay.io": {"auth": BASE64_STANDARD.encode(format!("martin:{imported}"))}}});
    let explain = json!({"image": "quay.io/a", "config": import});
    let account = json!({"name": "good", "registry": "ghcr.io", "username": "martin", "password": password});
    let token_auth = json!({"type": "token", "token": token});
    let of_token = json!({"name": "echo", "server": echo, "auth": token_auth, "allowPlainHttp": true});
    let of_kubeconfig = json!({"name": "kubeconfig", "kubeconfig": kubeconfig.to_string(), "allowPlainHttp": true});
    let secrets = format!("/v1/clusters/real/namespaces/{namespace}/secrets");
    let requests = [
        (201, "POST", "/v1/registry-accounts", account.clone()),
        (409, "POST", "/v1/registry-accounts", account),
        (200, "GET", "/v1/registry-accounts/good", Value::Null),
        (200, "GET", "/v1/registry-accounts", Value::Null),
        (200, "POST", "/v1/registry-accounts:import?dryRun=true", import.clone()),
        (200, "POST", "/v1/registry-accounts:import", import.clone()),
        (200, "POST", "/v1/registry-accounts:import", import),
        (200, "POST", "/v1/docker-configs/explain", explain),
        (200, "POST", "/v1/docker-configs/explain", json!({"image": "ghcr.io/a", "accounts": ["good"]})),
        (201, "POST", "/v1/clusters", of_token),
        (201, "POST", "/v1/clusters", of_kubeconfig),
        (201, "POST", "/v1/clusters", real),
        (200, "GET", "/v1/clusters", Value::Null),
        (200, "GET", "/v1/clusters/real", Value::Null),
        (200, "POST", "/v1/clusters/real/check", Value::Null),
        (200, "POST", "/v1/clusters/echo/check", Value::Null),
        (200, "POST", "/v1/clusters/kubeconfig/check", Value::Null),
        (200, "GET", "/v1/me", Value::Null),
        (200, "GET", "/v1/api-keys", Value::Null),
        (201, "POST", &secrets, pull.clone()),
        (409, "POST", &secrets, pull.clone()),
        (200, "PATCH", "/v1/registry-accounts/good", json!({"password": rotated})),
        (200, "PATCH", "/v1/clusters/echo", json!({"auth": token_auth})),
    ];
    let new_key = json!({"name": "ci", "role": "renderer", "grants": {"accounts": ["good"]}});
    let new_key = client.post("/v1/api-keys", &new_key).await.expect(201);
    let new_key_canary = Canary::new("new API key", &new_key["key"].as_str().expect("a key")[37..101]);
    for (status, method, path, body) in requests {
        ask(&client, &mut outputs, (status, method, path, &body)).await;
    }
    for cluster in ["echo", "kubeconfig"] {
        for status in [200, 201, 302, 400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504] {
            let path = format!("/v1/clusters/{cluster}/namespaces/s{status}/secrets");
            outputs.take_answer(path.clone(), &client.post(&path, &pull).await);
        }
    }
    deliver_by_pull_secret(&client, &namespace, &mut outputs).await;
    misuse(&service, &key, &misused, &mut outputs).await;

    // A rendered docker config must contain its own password, which proves the search, and no other
    // secret.
    let mut configs = Outputs::default();
    for body in [
        json!({"accounts": ["good"]}),
        json!({"accounts": ["good"], "profile": "docker"}),
        json!({"accounts": ["good"], "secret": {"name": "pull"}}),
    ] {
        let answer = client.post("/v1/docker-configs", &body).await;
        answer.expect(200);
        assert!(rotated_canary.find_in(&answer.body).contains(&"base64"), "{answer:?}");
        configs.take_answer("a docker config", &answer);
    }
    assert!(configs.0.iter().any(|(_, text)| rotated_canary.find_in(text).contains(&"raw")));

    outputs.take("/metrics", service.operations().get("/metrics").await.body);
    for (method, path) in [("DELETE", "/v1/clusters/kubeconfig"), ("DELETE", "/v1/registry-accounts/absent")] {
        outputs.take_answer(path, &client.send(client.request(method, path)).await);
    }
    outputs.take("a dump of the database", dump(&pool));
    service.process.signal("TERM");
    let exit = service.process.wait().await;
    // Proves that the log was captured at the most verbose level.
    for text in [
        "\"level\":\"TRACE\"",
        "\"level\":\"DEBUG\"",
        "request completed",
        "cluster.call",
        "target reconciled",
        "target failed",
        "resync failed",
    ] {
        assert!(exit.stderr.contains(text), "{text} is not in the log");
    }
    assert!(exit.stderr.lines().count() > outputs.0.len(), "{} lines", exit.stderr.lines().count());
    outputs.take("the log", exit.stderr);
    outputs.take("standard output", exit.stdout);
    for arguments in [&["master-key", "list"][..], &["master-key", "rotate"], &["api-key", "list"], &["migrate"]] {
        let exit = installation.run(arguments).await;
        assert_eq!(exit.code, Some(0), "{exit:?}");
        outputs.take(format!("regcred {arguments:?}"), exit.stderr + &exit.stdout);
    }

    let own = own_canaries(&installation, &key);
    let of_callers = [
        &password_canary,
        &rotated_canary,
        &imported_canary,
        &token_canary,
        &kubeconfig_canary,
        &client_key_canary,
        &misused_canary,
        &new_key_canary,
    ];
    outputs.assert_free_of(own.iter().chain(of_callers));
    let others = [&password_canary, &imported_canary, &token_canary, &kubeconfig_canary, &client_key_canary];
    configs.assert_free_of(own.iter().chain(others));
}

#[tokio::test]
async fn commands_do_not_print_their_configured_secrets() {
    let (secret, canary) = Canary::random("secret");
    let mut outputs = Outputs::default();
    // Each value is invalid in a way that produces a message.
    let wrong = [
        ("REGCRED_DATABASE_URL", format!("postgres://regcred:{secret}@[/x")),
        ("REGCRED_DATABASE_URL", format!("mysql://{secret}")),
        ("REGCRED_DATABASE_URL", format!("postgres://regcred:{}@127.0.0.1:1/x", secret.replace(['/', '"'], ""))),
        ("REGCRED_MASTER_KEYS", secret.clone()),
        ("REGCRED_MASTER_KEYS", format!("k1:{secret}")),
        ("REGCRED_MASTER_KEYS", format!("{secret}:AAAA")),
        ("REGCRED_API_KEY_PEPPER", secret.clone()),
        ("REGCRED_API_KEY_PEPPER", BASE64_STANDARD.encode(&secret)),
    ];
    for (variable, value) in wrong {
        let installation = Installation::new("postgres://regcred@127.0.0.1:1/x")
            .with(&format!("{variable}_FILE"), "")
            .with(variable, &value)
            .with("REGCRED_DATABASE_START_TIMEOUT_SECONDS", "1")
            .with("REGCRED_LOG_FILTER", "trace");
        for arguments in [
            &["serve"][..],
            &["api-key", "create", "--name", "x", "--role", "admin"],
            &["master-key", "rotate"],
            &["--help"],
        ] {
            let exit = installation.run(arguments).await;
            assert_eq!(exit.code == Some(0), arguments == ["--help"], "{exit:?}");
            outputs.take(format!("regcred {arguments:?} with {variable}"), exit.stderr + &exit.stdout);
        }
    }
    outputs.assert_free_of([&canary]);
}

#[tokio::test]
async fn debug_output_contains_no_secret() {
    let (secret, canary) = Canary::random("secret");
    let secret = secret.replace(['"', '/', '+', '='], "");
    let hidden = || SecretString::from(secret.clone());
    let line = generate_ring_line().expect("random bytes");
    let (_, ring_key) = line.expose_secret().split_once(':').expect("a key");
    let variables = BTreeMap::from([
        ("REGCRED_DATABASE_URL", format!("postgres://regcred:{secret}@127.0.0.1/x")),
        ("REGCRED_MASTER_KEYS", line.expose_secret().to_owned()),
        ("REGCRED_API_KEY_PEPPER", ring_key.to_owned()),
    ]);
    let lookup = |name: &str| variables.get(name).cloned();
    let config = Reader::new(&lookup).serve().expect("a good configuration");
    let pepper = Pepper::parse(&SecretString::from(ring_key)).expect("a pepper");
    let new_key = api_key::generate(&pepper).expect("a key");
    let shown = PresentedKey::parse(new_key.text.expose_secret()).expect("a key");
    let token = || ClusterAuth::Token { token: hidden() };
    let connection = ClusterConnection::new(Some("https://k"), Some(&kubernetes::file("ca.crt")), None, token(), false);
    let connection = connection.expect("a good connection");
    let client = ClusterClient::connect(&connection, &ClusterClientConfig::default()).expect("a client");
    let content = SecretContent::new(SecretType::DockerConfigJson, &hidden());
    let input = ConnectionInput { auth: Some(token()), kubeconfig: Some(hidden()), ..ConnectionInput::default() };
    let scope = RegistryScope::parse("ghcr.io").expect("a registry");
    let (account, username, password) = ("a", "martin", &hidden());
    let credential = Credential { account, scope: &scope, username, password, email: None };
    let sealer = Sealer::new(KeyRing::parse(&line).expect("a ring"), None);
    let mut outputs = Outputs::default();
    for (place, text) in [
        ("the configuration", format!("{config:?} {config:#?}")),
        ("a key", format!("{new_key:?} {shown:?} {pepper:?}")),
        ("a connection", format!("{connection:?} {client:?} {input:?}")),
        ("a Secret", format!("{content:?}")),
        ("a docker config", format!("{credential:?} {:?}", render(Profile::Kubernetes, &[credential]))),
        ("a password", format!("{:?}", Password::parse(hidden()))),
        ("a ring", format!("{sealer:?} {:?}", sealer.ring())),
    ] {
        outputs.take(place, text);
    }
    let ring_core = ring_key.trim_end_matches('=');
    let key_core = &new_key.text.expose_secret()[37..101];
    let own = [
        Canary { name: "master key and pepper", needles: vec![("base64", ring_core.to_owned())] },
        Canary::new("API key", key_core),
    ];
    outputs.assert_free_of(own.iter().chain([&canary]));
}
