//! The examples of the OpenAPI document, from a run of every operation.
//!
//! `openapi/examples.json` has the last run that was written. `make openapi-examples` writes it.

use std::{collections::BTreeMap, env, fs, path::Path};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Map, Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    identity_providers::{issuer::TestIssuer, keys::TestKey},
    mints::token_service::TokenService,
    support::{
        app::TestApp,
        client::{Answer, Client},
        eventually, given, kubernetes, registry,
    },
    verify::listening::answer,
};

/// Set to write the file instead of comparing it.
const WRITE: &str = "REGCRED_WRITE_EXAMPLES";
const TEXT_MAX_LINES: usize = 12;

/// Runs operations and records them.
struct Recorder {
    admin: Client,
    /// Replacements of values that differ between runs.
    names: Vec<(String, &'static str)>,
    examples: BTreeMap<String, Value>,
}

impl Recorder {
    /// Runs an operation, records it under its id, and returns the body.
    async fn run(&mut self, operation: &str, method: &str, path: &str, body: Option<Value>) -> Value {
        let mut request = self.admin.request(method, path);
        if let Some(body) = &body {
            request = request.json(body);
        }
        let answer = self.admin.send(request).await;
        assert!(answer.status < 300, "{operation}: {answer:?}");
        let mut example = Map::new();
        if let Some(body) = body {
            example.insert("request".to_owned(), self.normalised(body));
        }
        let parsed = self.record_response(&mut example, &answer);
        self.examples.insert(operation.to_owned(), example.into());
        parsed
    }

    /// Records a request that was sent, and its response.
    fn record(&mut self, operation: &str, body: Value, answer: &Answer) {
        let mut example = Map::from_iter([("request".to_owned(), self.normalised(body))]);
        self.record_response(&mut example, answer);
        self.examples.insert(operation.to_owned(), example.into());
    }

    fn record_response(&self, example: &mut Map<String, Value>, answer: &Answer) -> Value {
        example.insert("status".to_owned(), answer.status.to_string().into());
        if answer.body.is_empty() {
            return Value::Null;
        }
        let media_type = answer.header("content-type").split(';').next().unwrap_or_default().to_owned();
        let body = if media_type == "application/json" {
            answer.json()
        } else {
            let lines: Vec<&str> = answer.body.lines().take(TEXT_MAX_LINES).collect();
            Value::String(lines.join("\n") + "\n")
        };
        example.insert("mediaType".to_owned(), media_type.into());
        example.insert("response".to_owned(), self.normalised(body.clone()));
        body
    }

    /// Replaces what differs between runs: identifiers, times, addresses and credentials.
    fn normalised(&self, value: Value) -> Value {
        match value {
            Value::Object(members) => members.into_iter().map(|(name, value)| (name, self.normalised(value))).collect(),
            Value::Array(items) => items.into_iter().map(|item| self.normalised(item)).collect(),
            Value::String(text) => Value::String(self.normalised_text(text)),
            value => value,
        }
    }

    fn normalised_text(&self, mut text: String) -> String {
        if Uuid::parse_str(&text).is_ok() {
            return "01939e5a-7c3e-7b7a-9d0c-5a1f0f6b2c11".to_owned();
        }
        if text.parse::<DateTime<Utc>>().is_ok_and(|at| at < Utc::now() + TimeDelta::days(1)) {
            return "2026-11-29T12:00:00Z".to_owned();
        }
        if text.starts_with("rgc_") {
            return "rgc_…".to_owned();
        }
        if text.starts_with("-----BEGIN CERTIFICATE-----") {
            return "-----BEGIN CERTIFICATE-----\n…\n-----END CERTIFICATE-----\n".to_owned();
        }
        for (name, replacement) in &self.names {
            text = text.replace(name, replacement);
        }
        text
    }
}

/// Members and types of a value, without its content. A list has the shape of its first item.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(members) => members.iter().map(|(name, value)| (name.clone(), shape(value))).collect(),
        Value::Array(items) => items.first().map(shape).into_iter().collect(),
        Value::String(_) => json!("string"),
        Value::Number(_) => json!("number"),
        Value::Bool(_) => json!("boolean"),
        Value::Null => Value::Null,
    }
}

async fn run_accounts(run: &mut Recorder) {
    let account = json!({
        "name": "team-a", "registry": "registry.example.com:5000", "username": "dev", "password": "correct-horse",
        "labels": {"team": "a"},
    });
    run.run("create_registry_account", "POST", "/v1/registry-accounts", Some(account)).await;
    run.run("get_registry_account", "GET", "/v1/registry-accounts/team-a", None).await;
    let rotation = json!({"password": "battery-staple"});
    run.run("update_registry_account", "PATCH", "/v1/registry-accounts/team-a", Some(rotation)).await;
    run.run("list_registry_accounts", "GET", "/v1/registry-accounts?label=team%3Da", None).await;
    let imported = json!({"auths": {"registry.example.com:6000": {"auth": "dXNlcjpwYXNzd29yZA=="}}});
    run.run("import_registry_accounts", "POST", "/v1/registry-accounts:import?namePrefix=team-b-", Some(imported))
        .await;
    let registry = registry::a();
    run.names.push((registry.address.clone(), "registry.example.com:7000"));
    let real = json!({
        "name": "team-c", "registry": registry.address, "username": registry.username, "password": registry.password,
        "plainHttp": true,
    });
    run.admin.post("/v1/registry-accounts", &real).await.expect(201);
    let repository = json!({"repository": "os/alpine"});
    run.run("verify_registry_account", "POST", "/v1/registry-accounts/team-c/verify", Some(repository)).await;
    let provider = TokenService::start();
    run.names.push((format!("http://{}", provider.address), "https://auth.example.com"));
    run.admin.post("/v1/registry-accounts", &provider.account()).await.expect(201);
    run.run("mint_registry_account", "POST", "/v1/registry-accounts/minted/mint", None).await;
    run.run("delete_registry_account", "DELETE", "/v1/registry-accounts/team-c", None).await;
}

async fn run_docker_configs(run: &mut Recorder) {
    let body = json!({"accounts": ["team-a"], "profile": "docker"});
    run.run("create_docker_config", "POST", "/v1/docker-configs", Some(body)).await;
    let body = json!({
        "accountSelector": {"matchLabels": {"team": "a"}}, "secret": {"name": "team-a-pull", "namespace": "a-dev"},
    });
    run.run("create_secret_manifest", "POST", "/v1/docker-configs/manifest", Some(body)).await;
    let body = json!({"accounts": ["team-a"], "image": "registry.example.com:5000/os/alpine:3"});
    run.run("explain_docker_config", "POST", "/v1/docker-configs/explain", Some(body)).await;
}

async fn run_clusters(run: &mut Recorder, namespace: &str) {
    let token = given("REGCRED_TEST_KUBE_ADMIN_TOKEN");
    run.names.push((token.clone(), "eyJhbGciOiJSUzI1NiIsImtpZCI6…"));
    run.names.push((kubernetes::server(), "https://10.0.0.1:6443"));
    let cluster = kubernetes::FIRST.registration("dev", &json!({"type": "token", "token": token}));
    run.run("create_cluster", "POST", "/v1/clusters", Some(cluster)).await;
    run.run("list_clusters", "GET", "/v1/clusters", None).await;
    run.run("get_cluster", "GET", "/v1/clusters/dev", None).await;
    let credential = json!({"auth": {"type": "token", "token": token}});
    run.run("update_cluster", "PATCH", "/v1/clusters/dev", Some(credential)).await;
    run.run("check_cluster", "POST", &format!("/v1/clusters/dev/check?namespace={namespace}"), None).await;
    let secret = json!({"name": "team-a-once", "accounts": ["team-a"]});
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    run.run("create_secret", "POST", &path, Some(secret)).await;
    run.run("list_secrets", "GET", &path, None).await;
    run_diagnoses(run, namespace).await;
    run_coverage(run).await;
}

/// A pod and a deployment whose images need a login, of which the pod has a wrong one.
async fn run_diagnoses(run: &mut Recorder, namespace: &str) {
    let image = format!("{}/os/alpine:3", registry::a().address);
    run.names.push((namespace.to_owned(), "a-dev"));
    let spec = |pull_secret: &str| json!({"containers": [{"name": "web", "image": image}], "imagePullSecrets": [{"name": pull_secret}]});
    let labels = json!({"app": "web"});
    let template = json!({"metadata": {"labels": labels}, "spec": spec("missing")});
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": spec("team-a-once")},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"selector": {"matchLabels": labels}, "template": template}},
    ]});
    kubernetes::kubectl(&["apply", "-n", namespace, "-f", "-"], &objects.to_string());
    let place = format!("/v1/clusters/dev/namespaces/{namespace}");
    run.run("list_pods", "GET", &format!("{place}/pods"), None).await;
    run.run("diagnose_pod", "POST", &format!("{place}/pods/web/diagnose"), None).await;
    run.run("diagnose_workload", "POST", &format!("{place}/workloads/deployment/web/diagnose"), None).await;
    let body = json!({"images": [image], "imagePullSecrets": [{"name": "missing"}]});
    run.run("diagnose_spec", "POST", &format!("{place}/diagnose"), Some(body)).await;
}

/// A workload with a Secret of direct delivery, in the second cluster: no other test has pods there.
async fn run_coverage(run: &mut Recorder) {
    let cluster = kubernetes::SECOND;
    let token = cluster.given("ADMIN_TOKEN");
    run.names.push((cluster.server(), "https://10.0.1.1:6443"));
    let registration = cluster.registration("prod", &json!({"type": "token", "token": token}));
    run.admin.post("/v1/clusters", &registration).await.expect(201);
    let namespace = cluster.new_namespace().await;
    run.names.push((namespace.clone(), "a-prod"));
    let secret = json!({"name": "team-a-once", "accounts": ["team-a"]});
    run.admin.post(&format!("/v1/clusters/prod/namespaces/{namespace}/secrets"), &secret).await.expect(201);
    let labels = json!({"app": "web"});
    let spec = json!({"containers": [{"name": "web", "image": "registry.example.com:5000/os/alpine:3"}],
        "imagePullSecrets": [{"name": "team-a-once"}]});
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": spec}}});
    cluster.kubectl(&["apply", "-n", &namespace, "-f", "-"], &deployment.to_string());
    let path = "/v1/clusters/prod/coverage";
    run.run("run_coverage", "POST", path, None).await;
    let admin = run.admin.clone();
    eventually("the run has ended", async || {
        let shown = admin.send(admin.request("GET", path).header("Prefer", "wait=30")).await.expect(200);
        (shown["run"]["state"] == "succeeded").then_some(())
    })
    .await;
    run.run("get_coverage", "GET", path, None).await;
    run.run("list_coverage_groups", "GET", &format!("{path}/groups?namespace={namespace}"), None).await;
    run.run("list_coverage_secrets", "GET", &format!("{path}/secrets?namespace={namespace}"), None).await;
    run.run("list_coverage_accounts", "GET", "/v1/coverage/accounts", None).await;
}

async fn run_pull_secrets(run: &mut Recorder, namespace: &str) {
    let declaration = json!({
        "accountSelector": {"matchLabels": {"team": "a"}},
        "secret": {"name": "team-a-pull"},
        "targets": [{"cluster": "dev", "namespaces": [namespace]}],
        "serviceAccounts": ["default"],
    });
    let path = "/v1/pull-secrets/team-a";
    run.run("put_pull_secret", "PUT", path, Some(declaration)).await;
    let admin = run.admin.clone();
    let settled = async || admin.send(admin.request("GET", path).header("Prefer", "wait=30")).await.expect(200);
    settled().await;
    run.run("get_pull_secret", "GET", path, None).await;
    run.run("update_pull_secret", "PATCH", path, Some(json!({"deletionPolicy": "retain"}))).await;
    settled().await;
    run.run("list_pull_secrets", "GET", "/v1/pull-secrets", None).await;
    run.run("list_pull_secret_targets", "GET", "/v1/pull-secrets/team-a/targets", None).await;
    run.run("list_targets", "GET", "/v1/targets?cluster=dev&state=synced", None).await;
    run.run("get_summary", "GET", "/v1/summary", None).await;
    run.run("get_pull_secret_events", "GET", "/v1/pull-secrets/team-a/events", None).await;
    run.run("get_events", "GET", "/v1/events?kind=target", None).await;
    let synced =
        run.admin.send(run.admin.request("POST", "/v1/pull-secrets/team-a/sync").header("Prefer", "wait=30")).await;
    synced.expect(202);
    run.run("sync_pull_secret", "POST", "/v1/pull-secrets/team-a/sync", None).await;
    run.run("delete_pull_secret", "DELETE", path, None).await;
    eventually("the pull secret is removed", async || (run.admin.get(path).await.status == 404).then_some(())).await;
    run.run("delete_cluster", "DELETE", "/v1/clusters/dev", None).await;
}

async fn run_callers(run: &mut Recorder) {
    let grants = json!({"accounts": ["team-a"], "clusters": ["dev"], "namespaces": ["a-*"]});
    let key = json!({"name": "ci-team-a", "role": "deliverer", "grants": grants, "expiresAt": "2030-01-01T00:00:00Z"});
    let created = run.run("create_api_key", "POST", "/v1/api-keys", Some(key)).await;
    let path = format!("/v1/api-keys/{}", created["id"].as_str().expect("an id"));
    run.run("list_api_keys", "GET", "/v1/api-keys", None).await;
    run.run("get_api_key", "GET", &path, None).await;
    run.run("revoke_api_key", "DELETE", &path, None).await;
    run.run("get_me", "GET", "/v1/me", None).await;
    let created = run.run("create_session", "POST", "/v1/sessions", None).await;
    let path = format!("/v1/sessions/{}", created["id"].as_str().expect("an id"));
    run.run("list_sessions", "GET", "/v1/sessions", None).await;
    run.run("end_session", "DELETE", &path, None).await;
    run.run("end_sessions", "DELETE", "/v1/sessions", None).await;
    let rule = json!({
        "claims": {"project_id": "42", "ref_protected": "true"}, "role": "deliverer", "grants": grants,
    });
    let provider = json!({
        "name": "gitlab", "type": "oidc", "issuer": "https://gitlab.example.com", "audience": "regcred", "rules": [rule],
    });
    let path = "/v1/identity-providers/gitlab";
    run.run("create_identity_provider", "POST", "/v1/identity-providers", Some(provider)).await;
    run.run("list_identity_providers", "GET", "/v1/identity-providers", None).await;
    run.run("get_identity_provider", "GET", path, None).await;
    let rules = json!({"rules": [rule]});
    run.run("update_identity_provider", "PATCH", path, Some(rules)).await;
    run.run("delete_identity_provider", "DELETE", path, None).await;
}

/// A person signs in through a provider of the tests.
async fn run_logins(run: &mut Recorder, origin: &str) {
    let key = TestKey::p256("one");
    let issuer = TestIssuer::start(&[&key]);
    let provider = json!({
        "name": "corp", "type": "oidc", "issuer": issuer.url(), "audience": "regcred",
        "rules": [{"claims": {"groups": "dev"}, "role": "viewer"}],
        "login": {"clientId": "regcred", "clientSecret": "correct-horse"},
    });
    run.admin.post("/v1/identity-providers", &provider).await.expect(201);
    run.run("list_login_providers", "GET", "/login", None).await;
    let of_page =
        |request: reqwest::RequestBuilder| request.header("Sec-Fetch-Site", "same-origin").header("Origin", origin);
    let body = json!({"provider": "corp"});
    let started = run.admin.send(of_page(run.admin.request("POST", "/login")).json(&body)).await;
    let url = started.expect(201)["authorizationUrl"].as_str().expect("a URL").to_owned();
    let query: BTreeMap<String, String> = url::Url::parse(&url).expect("a URL").query_pairs().into_owned().collect();
    for (name, shown) in [
        ("state", "af0ifjsldkj"),
        ("nonce", "n-0S6_WzA2Mj"),
        ("code_challenge", "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"),
    ] {
        run.names.push((query[name].clone(), shown));
    }
    let encoded = |text: &str| url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    run.names.push((encoded(origin), "https%3A%2F%2Fregcred.example.com"));
    run.names.push((issuer.url(), "https://issuer.example.com"));
    run.record("start_login", body, &started);
    let claims = json!({"aud": "regcred", "sub": "lena", "nonce": query["nonce"], "groups": ["dev"]});
    let token = json!({"id_token": issuer.token(&key, claims)});
    issuer.answer("/token", answer("200 OK", &[("Content-Type", "application/json")], &token.to_string()));
    let body = json!({"provider": "corp", "code": "SplxlOBeZQQYbYS6WxSbIA", "state": query["state"]});
    let request = of_page(run.admin.request("POST", "/login/complete"));
    let completed = run.admin.send(request.header("Cookie", started.header("set-cookie")).json(&body)).await;
    completed.expect(201);
    run.record("complete_login", body, &completed);
}

async fn run_operations(run: &mut Recorder) {
    run.run("list_audit_events", "GET", "/v1/audit-events?action=registryAccount.rotate&limit=1", None).await;
    run.run("get_health", "GET", "/healthz", None).await;
    run.run("get_readiness", "GET", "/readyz", None).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_operation_has_an_example_from_a_run(pool: PgPool) {
    let allowed = ["REGCRED_OUTBOUND_ALLOW", "REGCRED_MINT_ALLOW", "REGCRED_ISSUER_ALLOW"];
    let app = TestApp::configured(pool, &allowed.map(|variable| (variable, "127.0.0.0/8"))).await;
    let namespace = kubernetes::new_namespace().await;
    kubernetes::kubectl(&["create", "serviceaccount", "default", "-n", &namespace], "");
    let names = vec![(namespace.clone(), "a-dev")];
    let mut run = Recorder { admin: app.admin(), names, examples: BTreeMap::new() };

    run_accounts(&mut run).await;
    run_docker_configs(&mut run).await;
    run_clusters(&mut run, &namespace).await;
    run_pull_secrets(&mut run, &namespace).await;
    run_callers(&mut run).await;
    run_logins(&mut run, &format!("http://{}", app.address)).await;
    run_operations(&mut run).await;

    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/examples.json");
    if env::var_os(WRITE).is_some() {
        fs::write(&file, format!("{:#}\n", json!(run.examples))).expect("a writable file");
    }
    let written: BTreeMap<String, Value> =
        serde_json::from_str(&fs::read_to_string(&file).expect("the file")).expect("JSON");
    for (operation, example) in &run.examples {
        let written = written.get(operation).unwrap_or(&Value::Null);
        assert_eq!(shape(written), shape(example), "{operation} has changed: run `make openapi-examples`");
    }
    assert_eq!(written.len(), run.examples.len());
    let document = regcred::http::document();
    let items = document["paths"].as_object().expect("paths").values();
    let ids = items.flat_map(|item| item.as_object().expect("operations").values());
    for id in ids.filter_map(|operation| operation["operationId"].as_str()) {
        assert!(written.contains_key(id), "{id} has no example: add it to tests/integration/examples.rs");
    }
}
