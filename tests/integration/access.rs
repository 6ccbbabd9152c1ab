//! Access control: every route with every role, for granted, foreign and missing resources; and API
//! keys.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use futures_util::future::join_all;
use regcred::http;
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

use crate::{
    pull_secrets::{declaration, put},
    support::{
        app::TestApp,
        client::{Answer, Client, assert_holds},
        eventually, kubernetes,
        postgres::superuser,
    },
};

const CANARY: &str = "canary-of-a-password";

/// Columns of [`TABLE`]. All but the anonymous client and the admin have grants `in-*` for
/// accounts, clusters and namespaces.
const CALLERS: [&str; 6] = ["anonymous", "admin", "operator", "deliverer", "renderer", "viewer"];

/// Expected statuses. The resources that a route is called for:
///
/// - `granted`: exists, with a name `in-…`. If the route creates the resource, the name is free;
/// - `foreign`: exists, with a name `out-…`;
/// - `missing`: does not exist, with a name `out-…`.
///
/// `any` is for routes without a named resource. A caller with grants must not be able to
/// distinguish foreign from missing resources, neither by the status nor by the text of the
/// response. A revoked key and an expired one have the statuses of the anonymous client.
const TABLE: &str = "
    operation                 on       anonymous admin operator deliverer renderer viewer

    create_registry_account   granted  401       201   201      403       403      403
                              foreign  401       409   403      403       403      403
                              missing  401       201   403      403       403      403
    list_registry_accounts    any      401       200   200      200       200      200
    get_registry_account      granted  401       200   200      200       200      200
                              foreign  401       200   404      404       404      404
                              missing  401       404   404      404       404      404
    update_registry_account   granted  401       200   200      403       403      403
                              foreign  401       200   404      403       403      403
                              missing  401       404   404      403       403      403
    delete_registry_account   granted  401       204   204      403       403      403
                              foreign  401       204   404      403       403      403
                              missing  401       404   404      403       403      403
    verify_registry_account   granted  401       200   200      403       403      403
                              foreign  401       200   404      403       403      403
                              missing  401       404   404      403       403      403
    mint_registry_account     granted  401       409   409      403       403      403
                              foreign  401       409   404      403       403      403
                              missing  401       404   404      403       403      403
    import_registry_accounts  granted  401       200   200      403       403      403
                              foreign  401       200   403      403       403      403
                              missing  401       200   403      403       403      403

    create_docker_config      granted  401       200   403      403       200      403
                              foreign  401       200   403      403       422      403
                              missing  401       422   403      403       422      403
    create_secret_manifest    granted  401       200   403      403       200      403
                              foreign  401       200   403      403       422      403
                              missing  401       422   403      403       422      403
    explain_docker_config     granted  401       200   200      200       200      200
                              foreign  401       200   422      422       422      422
                              missing  401       422   422      422       422      422

    create_cluster            granted  401       201   403      403       403      403
                              foreign  401       409   403      403       403      403
                              missing  401       201   403      403       403      403
    list_clusters             any      401       200   200      200       403      200
    get_cluster               granted  401       200   200      200       403      200
                              foreign  401       200   404      404       403      404
                              missing  401       404   404      404       403      404
    update_cluster            granted  401       200   403      403       403      403
                              foreign  401       200   403      403       403      403
                              missing  401       404   403      403       403      403
    delete_cluster            granted  401       204   403      403       403      403
                              foreign  401       204   403      403       403      403
                              missing  401       404   403      403       403      403
    check_cluster             granted  401       200   200      200       403      200
                              foreign  401       200   404      404       403      404
                              missing  401       404   404      404       403      404
    create_secret             granted  401       200   200      200       403      403
                              foreign  401       200   404      404       403      403
                              missing  401       404   404      404       403      403
    list_secrets              granted  401       200   200      200       403      200
                              foreign  401       200   404      404       403      404
                              missing  401       200   404      404       403      404

    list_pods                 granted  401       200   200      403       403      403
                              foreign  401       200   404      403       403      403
                              missing  401       200   404      403       403      403
    diagnose_pod              granted  401       200   200      403       403      403
                              foreign  401       200   404      403       403      403
                              missing  401       404   404      403       403      403
    diagnose_workload         granted  401       200   200      403       403      403
                              foreign  401       200   404      403       403      403
                              missing  401       404   404      403       403      403
    diagnose_spec             granted  401       200   200      403       403      403
                              foreign  401       200   404      403       403      403
                              missing  401       200   404      403       403      403

    run_coverage              granted  401       202   403      403       403      403
                              foreign  401       202   403      403       403      403
                              missing  401       404   403      403       403      403
    get_coverage              granted  401       200   403      403       403      403
                              foreign  401       200   403      403       403      403
                              missing  401       404   403      403       403      403
    list_coverage_groups      granted  401       200   403      403       403      403
                              foreign  401       200   403      403       403      403
                              missing  401       404   403      403       403      403
    list_coverage_secrets     granted  401       200   403      403       403      403
                              foreign  401       200   403      403       403      403
                              missing  401       404   403      403       403      403
    list_coverage_accounts    any      401       200   403      403       403      403

    put_pull_secret           granted  401       201   201      403       403      403
                              foreign  401       200   422      403       403      403
                              missing  401       422   422      403       403      403
    update_pull_secret        granted  401       200   200      403       403      403
                              foreign  401       200   404      403       403      403
                              missing  401       404   404      403       403      403
    list_pull_secrets         any      401       200   200      200       403      200
    get_pull_secret           granted  401       200   200      200       403      200
                              foreign  401       200   404      404       403      404
                              missing  401       404   404      404       403      404
    delete_pull_secret        granted  401       202   202      403       403      403
                              foreign  401       202   404      403       403      403
                              missing  401       404   404      403       403      403
    list_pull_secret_targets  granted  401       200   200      200       403      200
                              foreign  401       200   404      404       403      404
                              missing  401       404   404      404       403      404
    list_targets              any      401       200   200      200       403      200
    get_summary               any      401       200   200      200       403      200
    get_pull_secret_events    granted  401       200   200      200       403      200
                              foreign  401       200   404      404       403      404
                              missing  401       404   404      404       403      404
    sync_pull_secret          granted  401       202   202      403       403      403
                              foreign  401       202   404      403       403      403
                              missing  401       404   404      403       403      403

    create_session            any      401       201   201      201       201      201
    list_sessions             any      401       200   200      200       200      200
    end_session               foreign  401       204   404      404       404      404
                              missing  401       404   404      404       404      404
    end_sessions              any      401       204   204      204       204      204
    create_api_key            any      401       201   403      403       403      403
    list_api_keys             any      401       200   403      403       403      403
    get_api_key               foreign  401       200   403      403       403      403
                              missing  401       404   403      403       403      403
    revoke_api_key            foreign  401       204   403      403       403      403
                              missing  401       404   403      403       403      403
    create_identity_provider  any      401       201   403      403       403      403
    list_identity_providers   any      401       200   403      403       403      403
    get_identity_provider     foreign  401       200   403      403       403      403
                              missing  401       404   403      403       403      403
    update_identity_provider  foreign  401       200   403      403       403      403
                              missing  401       404   403      403       403      403
    delete_identity_provider  foreign  401       204   403      403       403      403
                              missing  401       404   403      403       403      403
    get_me                    any      401       200   200      200       200      200
    get_events                any      401       200   200      200       200      200
    list_audit_events         any      401       200   403      403       403      403

    list_login_providers      any      200       200   200      200       200      200
    start_login               any      403       403   403      403       403      403
    complete_login            any      403       403   403      403       403      403

    get_health                any      200       200   200      200       200      200
    get_readiness             any      200       200   200      200       200      200
";

/// A row of the table.
struct Row {
    operation: &'static str,
    on: &'static str,
    statuses: Vec<u16>,
}

fn rows() -> Vec<Row> {
    let mut lines = TABLE.lines().map(str::trim).filter(|line| !line.is_empty());
    let header: Vec<&str> = lines.next().expect("a header").split_whitespace().collect();
    assert_eq!(header[2..], CALLERS);
    let mut operation = "";
    let parse = |line: &'static str| {
        let mut cells: Vec<&str> = line.split_whitespace().collect();
        if cells.len() == CALLERS.len() + 2 {
            operation = cells.remove(0);
        }
        let statuses = cells[1..].iter().map(|cell| cell.parse().expect("a status")).collect();
        Row { operation, on: cells[0], statuses }
    };
    lines.map(parse).collect()
}

/// Operations of the OpenAPI document with their methods and paths.
fn operations() -> BTreeMap<String, (String, String)> {
    let document = serde_json::to_value(http::document()).expect("JSON");
    let mut operations = BTreeMap::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            if let Some(id) = operation["operationId"].as_str() {
                let at = (method.to_uppercase(), path.clone());
                assert!(operations.insert(id.to_owned(), at).is_none(), "two operations are named {id}");
            }
        }
    }
    operations
}

/// Resource that a row is about.
struct Resource {
    /// Name of the resource.
    name: String,
    id: Uuid,
    namespace: String,
}

fn account(name: &str) -> Value {
    json!({"name": name, "registry": format!("{name}.example.com"), "username": "dev", "password": CANARY})
}

fn cluster(name: &str) -> Value {
    json!({"name": name, "server": "https://127.0.0.1:1", "auth": {"type": "none"}})
}

/// A declaration with an account and a cluster of this name, and the namespace that all callers are
/// granted.
fn pull_secret(name: &str) -> Value {
    json!({"accounts": [name], "secret": {"name": "pull"}, "deletionPolicy": "retain",
        "targets": [{"cluster": name, "namespaces": ["in-namespace"]}]})
}

fn identity_provider(name: &str) -> Value {
    let rules = json!([{"claims": {"sub": "ci"}, "role": "viewer"}]);
    json!({"name": name, "type": "oidc", "issuer": "https://issuer.example.com", "audience": name, "rules": rules})
}

/// Query and body for an operation.
fn request(operation: &str, resource: &Resource) -> (&'static str, Option<Value>) {
    let Resource { name, .. } = resource;
    match operation {
        "create_registry_account" => ("", Some(account(name))),
        "update_registry_account" => ("", Some(json!({"username": "ops"}))),
        "import_registry_accounts" => {
            let auths = json!({format!("{name}.example.com"): {"username": "dev", "password": CANARY}});
            ("?dryRun=true", Some(json!({"auths": auths})))
        }
        "create_docker_config" => ("", Some(json!({"accounts": [name]}))),
        "create_secret_manifest" => ("", Some(json!({"accounts": [name], "secret": {"name": "pull"}}))),
        "explain_docker_config" => ("", Some(json!({"accounts": [name], "image": "in.example.com/os/alpine:3"}))),
        "create_cluster" => ("", Some(cluster(name))),
        "update_cluster" => ("", Some(json!({"server": "https://127.0.0.1:2"}))),
        "create_secret" => ("", Some(json!({"name": "pull", "accounts": ["in-always"], "dryRun": true}))),
        "diagnose_spec" => ("", Some(json!({"images": ["127.0.0.1:1/app"]}))),
        "create_api_key" => ("", Some(json!({"name": name, "role": "admin"}))),
        "put_pull_secret" => ("", Some(pull_secret(name))),
        "update_pull_secret" => ("", Some(json!({"adopt": true}))),
        "create_identity_provider" => ("", Some(identity_provider(name))),
        "update_identity_provider" => ("", Some(json!({"audience": format!("{name}-2")}))),
        // Only pages of regcred sign in.
        "start_login" => ("", Some(json!({"provider": name}))),
        "complete_login" => ("", Some(json!({"provider": "x", "code": "x", "state": "x"}))),
        _ => ("", None),
    }
}

/// Whether an operation creates its resource.
fn creates(operation: &str) -> bool {
    ["create_registry_account", "create_cluster", "import_registry_accounts", "put_pull_secret"].contains(&operation)
}

/// Whether the rows of an operation are about the namespace of their resource.
fn is_about_namespace(operation: &str) -> bool {
    ["create_secret", "list_secrets", "list_pods", "diagnose_pod", "diagnose_workload", "diagnose_spec"]
        .contains(&operation)
}

/// Creates a pod and a deployment, which are not run.
fn create_workloads(Resource { name, namespace, .. }: &Resource) {
    let spec = json!({"containers": [{"name": "app", "image": "127.0.0.1:1/app"}]});
    let labels = json!({"app": name});
    let template = json!({"metadata": {"labels": labels}, "spec": spec});
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
            "spec": {"selector": {"matchLabels": labels}, "template": template}},
    ]});
    kubernetes::kubectl(&["apply", "-n", namespace, "-f", "-"], &objects.to_string());
}

/// Creates the resource of a row, if it must exist.
async fn prepare(app: &TestApp, row: &Row, resource: &mut Resource) {
    let exists = row.on == "foreign" || row.on == "granted" && !creates(row.operation);
    if is_about_namespace(row.operation) {
        // The row is about the namespace: the cluster always exists and is granted.
        if app.admin().get(&format!("/v1/clusters/{}", resource.name)).await.status == 404 {
            app.register_cluster(&resource.name).await;
        }
        if exists && row.operation.starts_with("diagnose_") {
            create_workloads(resource);
        }
        return;
    }
    let is_about_pull_secret = row.operation.contains("pull_secret") && row.on != "any";
    if is_about_pull_secret && (exists || row.on == "granted") {
        app.admin().post("/v1/registry-accounts", &account(&resource.name)).await.expect(201);
        app.admin().post("/v1/clusters", &cluster(&resource.name)).await.expect(201);
    }
    if !exists {
        return;
    }
    if is_about_pull_secret {
        let request = app.admin().request("PUT", &format!("/v1/pull-secrets/{}", resource.name));
        app.admin().send(request.json(&pull_secret(&resource.name))).await.expect(201);
        return;
    }
    if row.operation.ends_with("api_key") {
        let body = json!({"name": resource.name, "role": "viewer"});
        let made = app.admin().post("/v1/api-keys", &body).await.expect(201);
        resource.id = serde_json::from_value(made["id"].clone()).expect("a UUID");
    } else if row.operation.ends_with("session") {
        let made = app.admin().send(app.admin().request("POST", "/v1/sessions")).await.expect(201);
        resource.id = serde_json::from_value(made["id"].clone()).expect("a UUID");
    } else if row.operation.ends_with("identity_provider") {
        app.admin().post("/v1/identity-providers", &identity_provider(&resource.name)).await.expect(201);
    } else if row.operation.ends_with("cluster") || row.operation.contains("coverage") {
        app.admin().post("/v1/clusters", &cluster(&resource.name)).await.expect(201);
    } else {
        // An import names accounts after their registries.
        let name = match row.operation {
            "import_registry_accounts" => format!("{}-example-com", resource.name),
            _ => resource.name.clone(),
        };
        let body = json!({
            "name": name, "registry": format!("{}.example.com", resource.name), "username": "dev", "password": CANARY,
        });
        app.admin().post("/v1/registry-accounts", &body).await.expect(201);
    }
}

/// A response without the values that differ between requests.
fn without_names(answer: &Answer, resource: &Resource) -> String {
    let mut body = answer.body.replace(&resource.name, "NAME").replace(&resource.id.to_string(), "ID");
    body = body.replace(&resource.namespace, "NAMESPACE");
    body.replace(answer.header("x-request-id"), "REQUEST")
}

/// Asserts that every route has a row, for each kind of resource that it names.
fn assert_complete(rows: &[Row], operations: &BTreeMap<String, (String, String)>) {
    let in_table: BTreeSet<&str> = rows.iter().map(|row| row.operation).collect();
    let in_document: BTreeSet<&str> = operations.keys().map(String::as_str).collect();
    assert_eq!(in_table, in_document, "every route must have a row");
    // A route with a named resource must have a row for each kind of resource.
    for (operation, _) in operations.iter().filter(|(_, (_, path))| path.contains('{')) {
        let tested: Vec<&str> = rows.iter().filter(|row| row.operation == operation).map(|row| row.on).collect();
        // These cannot be granted: API keys and identity providers are foreign to all but admins, sessions to all but
        // their API key.
        let is_granted = !["api_key", "identity_provider", "session"].iter().any(|kind| operation.ends_with(kind));
        let needed: &[&str] = if is_granted { &["granted", "foreign", "missing"] } else { &["foreign", "missing"] };
        assert_eq!(tested, needed, "{operation}");
    }
}

/// Calls the operation of a row for a resource.
async fn call(client: &Client, (method, path): (String, String), row: &Row, resource: &Resource) -> Answer {
    let path = path
        .replace("{name}", &resource.name)
        .replace("{cluster}", &resource.name)
        .replace("{namespace}", &resource.namespace)
        .replace("{pod}", &resource.name)
        .replace("{kind}", "deployment")
        .replace("{id}", &resource.id.to_string());
    let (query, body) = request(row.operation, resource);
    let request = client.request(&method, &format!("{path}{query}"));
    client
        .send(match body {
            Some(body) => request.json(&body),
            None => request,
        })
        .await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_route_has_the_expected_status_for_every_role(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let operations = operations();
    let rows = rows();
    assert_complete(&rows, &operations);
    let granted_namespace = kubernetes::new_namespace().await;
    let foreign_namespace = kubernetes::new_namespace().await;
    app.admin().post("/v1/registry-accounts", &account("in-always")).await.expect(201);
    let grants = json!({"accounts": ["in-*"], "clusters": ["in-*"], "namespaces": [granted_namespace, "in-namespace"]});
    let mut clients: Vec<Client> = vec![app.anonymous(), app.admin()];
    for role in &CALLERS[2..] {
        clients.push(app.caller(role, role, Some(grants.clone())).await);
    }
    let ended = ended_admins(&app).await;

    let mut foreign: BTreeMap<(&str, &str), String> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut number = 0;
    for row in &rows {
        for ((client, who), expected) in clients.iter().zip(CALLERS).zip(&row.statuses) {
            number += 1;
            let inside = row.on == "granted" || is_about_namespace(row.operation);
            let namespace = match row.on {
                "granted" => granted_namespace.clone(),
                "foreign" => foreign_namespace.clone(),
                _ => format!("regcred-missing-{number}"),
            };
            let name = format!("{}-{number}x", if inside { "in" } else { "out" });
            let mut resource = Resource { name, id: Uuid::now_v7(), namespace };
            prepare(&app, row, &mut resource).await;
            let answer = call(client, operations[row.operation].clone(), row, &resource).await;
            if answer.status != *expected {
                wrong.push(format!("{} on {} as {who}: {expected} in the table, {answer:?}", row.operation, row.on));
            }
            if answer.status >= 400 {
                assert!(!answer.slug().is_empty(), "{answer:?}");
            }
            let reveals = ["create_docker_config", "create_secret_manifest"].contains(&row.operation);
            let may_reveal = ["admin", "renderer"].contains(&who) && reveals;
            let canary_base64 = "Y2FuYXJ5LW9mLWEtcGFzc3dvcmQ";
            let reveals = answer.body.contains(CANARY) || answer.body.contains(canary_base64);
            assert!(may_reveal || !reveals, "{who} received a password: {answer:?}");

            let text = without_names(&answer, &resource);
            if row.on == "foreign" {
                foreign.insert((row.operation, who), text);
            } else if row.on == "missing" && who != "admin" && foreign.get(&(row.operation, who)) != Some(&text) {
                wrong.push(format!("{} as {who}: foreign and missing differ: {text}", row.operation));
            }
        }
        wrong.extend(differences_of_ended(&ended, &operations, row).await);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Clients with the key of an admin that has ended.
async fn ended_admins(app: &TestApp) -> [(&'static str, Client); 2] {
    let expired = app.new_key("expired", Some(chrono::Utc::now() - chrono::TimeDelta::seconds(1))).await;
    let revoked = app.new_key("revoked", None).await;
    app.revoke_key("revoked", false).await.expect("revoked");
    [("an expired key", app.anonymous().with_key(&expired)), ("a revoked key", app.anonymous().with_key(&revoked))]
}

/// Calls the operation of a row with ended keys. Returns the differences from an anonymous client,
/// and from a key that does not exist.
async fn differences_of_ended(
    ended: &[(&'static str, Client)],
    operations: &BTreeMap<String, (String, String)>,
    row: &Row,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut texts = BTreeSet::new();
    let resource = Resource { name: "in-ended".to_owned(), id: Uuid::now_v7(), namespace: "in-namespace".to_owned() };
    for (who, client) in ended {
        let answer = call(client, operations[row.operation].clone(), row, &resource).await;
        if answer.status != row.statuses[0] {
            wrong.push(format!("{} on {} with {who}: {answer:?}", row.operation, row.on));
        }
        if answer.status == 401 {
            assert_eq!(answer.slug(), "unauthenticated", "{answer:?}");
            texts.insert(without_names(&answer, &resource));
        }
    }
    if texts.len() > 1 {
        wrong.push(format!("{}: expired and revoked keys differ: {texts:?}", row.operation));
    }
    wrong
}

/// Paths of the lists in the OpenAPI document: their responses are pages.
fn lists() -> Vec<String> {
    let document = serde_json::to_value(http::document()).expect("JSON");
    let paths = document["paths"].as_object().expect("paths").iter();
    let is_list = |path: &Value| {
        let schema = &path["get"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"];
        schema.as_str().is_some_and(|schema| schema.starts_with("#/components/schemas/Page_"))
    };
    // A cluster has the Secrets of a namespace: `direct_secrets` tests that list. Sessions have no names, and one page:
    // `sessions` tests their list. Coverage needs all grants.
    let is_left_out =
        |path: &str| path.contains("/namespaces/") || path.contains("/coverage/") || path == "/v1/sessions";
    let paths = paths.filter(|(path, _)| !is_left_out(path));
    paths.filter(|(_, path)| is_list(path)).map(|(path, _)| path.clone()).collect()
}

/// Text of all pages of a list.
async fn all_pages(client: &Client, path: &str) -> String {
    let (mut text, mut query) = (String::new(), "?limit=2".to_owned());
    loop {
        let answer = client.get(&format!("{path}{query}")).await;
        let page = answer.expect(200);
        text.push_str(&page["items"].to_string());
        let Some(next) = page["next"].as_str() else { return text };
        query = format!("?limit=2&cursor={next}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn no_list_contains_a_foreign_resource(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for name in ["in-1", "out-1", "in-2", "out-2", "in-3"] {
        app.admin().post("/v1/registry-accounts", &account(name)).await.expect(201);
        app.admin().post("/v1/clusters", &cluster(name)).await.expect(201);
        let request = app.admin().request("PUT", &format!("/v1/pull-secrets/{name}"));
        app.admin().send(request.json(&pull_secret(name))).await.expect(201);
        app.admin().post("/v1/identity-providers", &identity_provider(name)).await.expect(201);
        app.caller(name, "viewer", None).await;
    }
    let grants = json!({"accounts": ["in-*"], "clusters": ["in-*"], "namespaces": ["in-*"]});
    let lists = lists();
    assert!(lists.len() >= 7, "{lists:?}");

    for (number, list) in lists.iter().enumerate() {
        let (inside, outside) = (list.replace("{name}", "in-1"), list.replace("{name}", "out-1"));
        assert!(all_pages(&app.admin(), &outside).await.contains("out-"), "{list} has nothing to conceal");
        for role in &CALLERS[2..] {
            let client = app.caller(&format!("{role}-{number}"), role, Some(grants.clone())).await;
            match client.get(&inside).await.status {
                200 => {
                    let text = all_pages(&client, &inside).await;
                    assert!(text.contains("in-") && !text.contains("out-"), "{list} as {role}: {text}");
                }
                status => assert_eq!(status, 403, "{list} as {role}"),
            }
        }
    }
}

/// Names of all items of a list, read page by page.
async fn names(client: &Client, path: &str, limit: usize) -> Vec<String> {
    let mut names = Vec::new();
    let mut page_path = format!("{path}limit={limit}");
    loop {
        let page = client.get(&page_path).await.expect(200);
        let items = page["items"].as_array().expect("items");
        names.extend(items.iter().map(|item| item["name"].as_str().expect("a name").to_owned()));
        let Some(next) = page["next"].as_str() else { return names };
        assert_eq!(items.len(), limit, "every page but the last one is full");
        page_path = format!("{path}limit={limit}&cursor={next}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn lists_contain_only_granted_items_on_full_pages(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for number in 0..40 {
        let name = format!("{}-{number:02}", if number % 4 == 0 { "a" } else { "b" });
        let mut body = account(&name);
        body["labels"] =
            json!({"team": if number % 5 == 0 { "x" } else { "y" }, "even": (number % 2 == 0).to_string()});
        app.admin().post("/v1/registry-accounts", &body).await.expect(201);
        app.admin().post("/v1/clusters", &cluster(&name)).await.expect(201);
    }
    let all = names(&app.admin(), "/v1/registry-accounts?", 7).await;
    assert_eq!(all.len(), 40);

    let grants = [
        json!({}),
        json!({"accounts": [], "clusters": []}),
        json!({"accounts": ["a-*"], "clusters": ["a-*"]}),
        json!({"accounts": ["b-39", "a-00", "zz"], "clusters": ["b-39", "a-00", "zz"]}),
        // Overlapping rules list each account once.
        json!({"accounts": ["a-*", "a-0*", "a-00", {"matchLabels": {"team": "x"}}], "clusters": ["a-*", "a-0*", "a-00"]}),
        json!({"accounts": [{"matchLabels": {"team": "x", "even": "true"}}], "clusters": ["*"]}),
    ];
    let expected: [fn(usize) -> (bool, bool); 6] = [
        |_| (true, true),
        |_| (false, false),
        |n| (n % 4 == 0, n % 4 == 0),
        |n| (n == 39 || n == 0, n == 39 || n == 0),
        |n| (n % 4 == 0 || n % 5 == 0, n % 4 == 0),
        |n| (n % 10 == 0, true),
    ];
    for (index, (grants, expected)) in grants.into_iter().zip(expected).enumerate() {
        let viewer = app.caller(&format!("viewer-{index}"), "viewer", Some(completed(grants.clone()))).await;
        let number = |name: &str| -> usize { name[2..].parse().expect("a number") };
        let accounts: Vec<String> = all.iter().filter(|name| expected(number(name)).0).cloned().collect();
        let clusters: Vec<String> = all.iter().filter(|name| expected(number(name)).1).cloned().collect();
        for limit in [1, 3, 10, 500] {
            assert_eq!(names(&viewer, "/v1/registry-accounts?", limit).await, accounts, "{grants} {limit}");
            assert_eq!(names(&viewer, "/v1/clusters?", limit).await, clusters, "{grants} {limit}");
        }
        let even: Vec<String> = accounts.into_iter().filter(|name| number(name).is_multiple_of(2)).collect();
        assert_eq!(names(&viewer, "/v1/registry-accounts?label=even=true&", 2).await, even, "{grants}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn each_role_has_default_grants(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.admin().post("/v1/registry-accounts", &account("prod")).await.expect(201);
    for (role, has_access) in [("operator", true), ("viewer", true), ("deliverer", false), ("renderer", false)] {
        let caller = app.caller(role, role, None).await;
        let everything = if has_access { json!(["*"]) } else { json!([]) };
        let me = caller.get("/v1/me").await.expect(200);
        assert_eq!((&me["name"], &me["role"], &me["expiresAt"]), (&json!(role), &json!(role), &Value::Null));
        let grants = json!({"accounts": everything, "clusters": everything, "namespaces": everything});
        assert_eq!(me["grants"], grants);
        let status = if has_access { 200 } else { 404 };
        assert_eq!(caller.get("/v1/registry-accounts/prod").await.status, status, "{role}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_selector_selects_only_granted_accounts(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, team) in [("a-one", "a"), ("a-two", "b"), ("b-one", "a")] {
        let mut body = account(name);
        body["labels"] = json!({"team": team});
        app.admin().post("/v1/registry-accounts", &body).await.expect(201);
    }
    let renderer = app.caller("r", "renderer", Some(json!({"accounts": ["a-*"]}))).await;

    let by_label = |selector: Value| json!({"accountSelector": selector});
    let chosen =
        renderer.post("/v1/docker-configs", &by_label(json!({"matchLabels": {"team": "a"}}))).await.expect(200);
    let keys: Vec<&String> = chosen["config"]["auths"].as_object().expect("auths").keys().collect();
    assert_eq!(keys, ["a-one.example.com"]);
    let everything = renderer.post("/v1/docker-configs", &by_label(json!({}))).await.expect(200);
    assert_eq!(everything["config"]["auths"].as_object().expect("auths").len(), 2);

    let named = |name: &str| json!({"accounts": ["a-one", name]});
    let foreign = renderer.post("/v1/docker-configs", &named("b-one")).await;
    let missing = renderer.post("/v1/docker-configs", &named("c-one")).await;
    let problem = foreign.problem(422, "invalid-request");
    let detail = "there is no registry account named `b-one`, or it is not granted to this key: see `GET /v1/me`";
    let error = json!([{"field": "accounts[1]", "detail": detail}]);
    assert_eq!(problem["errors"], error);
    let same =
        foreign.body.replace("b-one", "c-one").replace(foreign.header("x-request-id"), missing.header("x-request-id"));
    assert_eq!(same, missing.body);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_operator_cannot_move_an_account_into_or_out_of_its_grants(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let grants = json!({"accounts": [{"matchLabels": {"team": "a"}}]});
    let operator = app.caller("o", "operator", Some(completed(grants))).await;
    let mut own = account("own");

    operator.post("/v1/registry-accounts", &own).await.problem(403, "forbidden");
    own["labels"] = json!({"team": "a"});
    operator.post("/v1/registry-accounts", &own).await.expect(201);
    let out = json!({"labels": {"team": "b"}});
    operator.patch("/v1/registry-accounts/own", &out).await.problem(403, "forbidden");
    // A label beyond the label grants, which only an admin may set. The operator may remove it.
    let tier = json!({"labels": {"tier": "1"}});
    let refused = operator.patch("/v1/registry-accounts/own", &tier).await;
    refused.problem(403, "forbidden");
    assert_eq!(refused.fields(), ["labels.tier"]);
    app.admin().patch("/v1/registry-accounts/own", &tier).await.expect(200);
    operator.patch("/v1/registry-accounts/own", &json!({"labels": {"team": "a"}, "email": null})).await.expect(200);
    let untiered = operator.patch("/v1/registry-accounts/own", &json!({"labels": {"tier": null}})).await.expect(200);
    assert_eq!(untiered["labels"], json!({"team": "a"}));

    let mut others = account("others");
    others["labels"] = json!({"team": "b"});
    app.admin().post("/v1/registry-accounts", &others).await.expect(201);
    operator.patch("/v1/registry-accounts/others", &json!({"labels": {"team": "a"}})).await.problem(404, "not-found");
    let config = json!({"auths": {"others.example.com": {"username": "x", "password": "y"}}});
    operator.post("/v1/registry-accounts:import", &config).await.problem(403, "forbidden");
}

/// Labels decide which pull secrets of others contain an account, and which callers are granted it.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn labels_are_set_within_label_grants_by_every_role_and_route(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let a = json!({"matchLabels": {"team": "a"}});
    // Grants of accounts, and whether each set of labels may be set on an account `in-…`.
    let sets = [json!({}), json!({"team": "a"}), json!({"team": "b"}), json!({"team": "a", "tier": "1"})];
    let cases = [
        (json!(["*"]), [true, true, true, true]),
        (json!(["in-*"]), [true, false, false, false]),
        (json!(["in-*", a]), [true, true, false, false]),
        (json!(["in-*", a, {"matchLabels": {"tier": "1"}}]), [true, true, false, true]),
        (json!(["in-*", {"matchLabels": {"team": "a", "tier": "1"}}]), [true, false, false, true]),
        (json!([a]), [false, true, false, false]),
    ];
    for (number, (accounts, allowed)) in cases.into_iter().enumerate() {
        let grants = json!({"accounts": accounts, "clusters": ["*"], "namespaces": ["*"]});
        for role in &CALLERS[2..] {
            let caller = app.caller(&format!("{role}-{number}"), role, Some(grants.clone())).await;
            for (index, (labels, is_allowed)) in sets.iter().zip(allowed).enumerate() {
                let is_allowed = is_allowed && *role == "operator";
                let name = format!("in-{number}-{index}-{role}");
                let mut body = account(&name);
                body["labels"] = labels.clone();
                let created = caller.post("/v1/registry-accounts", &body).await;
                assert_eq!(created.status, if is_allowed { 201 } else { 403 }, "{grants} {labels}: {created:?}");
                if !is_allowed {
                    app.admin().post("/v1/registry-accounts", &account(&name)).await.expect(201);
                    let path = format!("/v1/registry-accounts/{name}");
                    let patched = caller.patch(&path, &json!({"labels": labels})).await;
                    // A caller without a grant of the name does not see the account.
                    let is_hidden = *role == "operator" && accounts == json!([a]);
                    assert_eq!(patched.status, if is_hidden { 404 } else { 403 }, "{grants} {labels}: {patched:?}");
                    let stored = app.admin().get(&path).await.expect(200);
                    assert_eq!(stored["labels"], json!({}), "{grants} {labels}");
                }
            }
        }
    }
    // An import keeps labels, and sets none.
    let operator = app.caller("importer", "operator", Some(completed(json!({"accounts": ["in-*"]})))).await;
    let mut labelled = account("in-kept-example-com");
    labelled["registry"] = json!("kept.example.com");
    labelled["labels"] = json!({"team": "b"});
    app.admin().post("/v1/registry-accounts", &labelled).await.expect(201);
    let login = json!({"username": "dev", "password": "another"});
    let config = json!({"auths": {"kept.example.com": login, "new.example.com": login}});
    operator.post("/v1/registry-accounts:import?namePrefix=in-", &config).await.expect(200);
    for (name, labels) in [("in-kept-example-com", json!({"team": "b"})), ("in-new-example-com", json!({}))] {
        let stored = operator.get(&format!("/v1/registry-accounts/{name}")).await.expect(200);
        assert_eq!((&stored["labels"], &stored["username"]), (&labels, &json!("dev")), "{name}");
    }
}

/// Whether a text contains a canary, also base64-encoded any number of times.
fn holds(text: &str, canary: &str) -> bool {
    text.contains(canary)
        || text.split(|c: char| !(c.is_ascii_alphanumeric() || "+/=".contains(c))).any(|word| {
            let decoded = (word.len() > 12).then(|| BASE64_STANDARD.decode(word).ok()).flatten();
            decoded.and_then(|bytes| String::from_utf8(bytes).ok()).is_some_and(|text| holds(&text, canary))
        })
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_deliverer_places_secrets_but_never_receives_a_password(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.admin().post("/v1/registry-accounts", &account("in-one")).await.expect(201);
    let grants = json!({"accounts": ["in-*"], "clusters": ["dev"], "namespaces": [namespace]});
    let deliverer = app.caller("ci", "deliverer", Some(grants)).await;
    let secrets = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    let secret = |name: &str, dry_run: bool| json!({"name": name, "accounts": ["in-one"], "dryRun": dry_run});
    let mut answers = Vec::new();

    answers.push((201, deliverer.post(&secrets, &secret("pull", false)).await));
    assert!(holds(&kubernetes::document(&kubernetes::secret(&namespace, "pull").await), CANARY));
    answers.push((409, deliverer.post(&secrets, &secret("pull", false)).await));
    answers.push((200, deliverer.post(&secrets, &secret("dry", true)).await));
    answers.push((422, deliverer.post(&secrets, &secret("Not_A_Name", false)).await));
    for body in [
        json!({"accounts": ["in-one"]}),
        json!({"accounts": ["in-one"], "secret": {"name": "pull"}}),
        json!({"accounts": ["in-one"], "secret": {"name": "pull"}, "format": "yaml"}),
        json!({"accounts": ["in-one"], "profile": "dockerAuthConfig", "format": "env"}),
        json!({"accounts": ["missing"]}),
        json!({}),
    ] {
        answers.push((403, deliverer.post("/v1/docker-configs", &body).await));
    }
    let explain = json!({"accounts": ["in-one"], "image": "in-one.example.com/a"});
    answers.push((200, deliverer.post("/v1/docker-configs/explain", &explain).await));
    answers.push((200, deliverer.get("/v1/registry-accounts/in-one").await));
    answers.push((200, deliverer.get("/v1/registry-accounts").await));
    answers.push((200, deliverer.get("/v1/clusters/dev").await));
    answers.push((200, deliverer.get("/v1/me").await));
    for (status, answer) in answers {
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(!holds(&format!("{answer:?}"), CANARY), "{answer:?}");
    }

    // Resources that are not granted do not exist for the caller.
    deliverer
        .post("/v1/clusters/dev/namespaces/default/secrets", &secret("pull", false))
        .await
        .problem(404, "namespace-not-found");
    app.register_cluster("prod").await;
    let elsewhere = format!("/v1/clusters/prod/namespaces/{namespace}/secrets");
    deliverer.post(&elsewhere, &secret("pull", false)).await.problem(404, "not-found");
    app.admin().post("/v1/registry-accounts", &account("out-one")).await.expect(201);
    let foreign = json!({"name": "foreign", "accounts": ["in-one", "out-one"]});
    deliverer.post(&secrets, &foreign).await.problem(422, "invalid-request");
    let names = kubernetes::secret_names(&namespace).await;
    assert!(!names.contains(&"foreign".to_owned()) && !names.contains(&"dry".to_owned()), "{names:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pull_secret_routes_never_return_a_password(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.admin().post("/v1/registry-accounts", &account("in-one")).await.expect(201);
    let mut declared = declaration(&["in-one"], "dev", &[&namespace]);
    let shown = put(&app.admin(), "team-a", &declared).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1}));
    let grants = json!({"accounts": ["in-*"], "clusters": ["dev"], "namespaces": [namespace]});
    let deliverer = app.caller("ci", "deliverer", Some(grants.clone())).await;
    let operator = app.caller("team-a", "operator", Some(grants)).await;

    // The event stream during a rotation.
    let request = deliverer.request("GET", "/v1/pull-secrets/team-a/events");
    let mut stream = request.send().await.expect("an answer");
    let rotated = format!("{CANARY}-rotated");
    app.admin().patch("/v1/registry-accounts/in-one", &json!({"password": rotated})).await.expect(200);
    let mut events = String::new();
    while !events.contains(r#""observedGeneration":2"#) {
        let chunk = stream.chunk().await.expect("a chunk").expect("the stream goes on");
        events.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
    }
    assert!(!holds(&events, CANARY), "{events}");
    assert!(holds(&kubernetes::document(&kubernetes::secret(&namespace, "team-a-pull").await), &rotated));

    declared["dryRun"] = json!(true);
    let import = json!({"auths": {"in-two.example.com": {"username": "dev", "password": CANARY}}});
    let check = format!("/v1/clusters/dev/check?namespace={namespace}");
    // With the expected statuses for the deliverer and the operator.
    let requests = [
        ("GET", "/v1/pull-secrets", Value::Null, [200, 200]),
        ("GET", "/v1/pull-secrets/team-a", Value::Null, [200, 200]),
        ("GET", "/v1/pull-secrets/team-a/targets", Value::Null, [200, 200]),
        ("GET", "/v1/pull-secrets/team-a/events", Value::Null, [200, 200]),
        ("PUT", "/v1/pull-secrets/team-a", declared, [403, 200]),
        ("POST", "/v1/pull-secrets/team-a/sync", Value::Null, [403, 202]),
        ("POST", "/v1/clusters/dev/check", Value::Null, [200, 200]),
        ("POST", &check, Value::Null, [200, 200]),
        ("POST", "/v1/registry-accounts:import?dryRun=true", import, [403, 200]),
        ("POST", "/v1/registry-accounts/in-one/verify", Value::Null, [403, 200]),
        ("POST", "/v1/docker-configs", json!({"accounts": ["in-one"]}), [403, 403]),
    ];
    for (which, caller) in [&deliverer, &operator].into_iter().enumerate() {
        for (method, path, body, statuses) in &requests {
            let request = caller.request(method, path);
            let answer = caller.send(if body.is_null() { request } else { request.json(body) }).await;
            assert_eq!(answer.status, statuses[which], "{method} {path}: {answer:?}");
            assert!(!holds(&format!("{answer:?}"), CANARY), "{method} {path}: {answer:?}");
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_key_is_returned_once_and_revoked_immediately(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let body = json!({
        "name": "ci-team-a", "role": "deliverer", "expiresAt": "2101-06-30T00:00:00Z",
        "grants": {"accounts": ["team-*", {"matchLabels": {"team": "a"}}], "clusters": ["dev"], "namespaces": ["a-*"]},
    });

    let created = app.admin().post("/v1/api-keys", &body).await;

    let mut made = created.expect(201);
    assert_eq!(created.header("cache-control"), "no-store");
    let id = made["id"].as_str().expect("an id").to_owned();
    let path = format!("/v1/api-keys/{id}");
    assert_eq!(created.header("location"), path);
    let text = made["key"].as_str().expect("a key").to_owned();
    made.as_object_mut().expect("an object").remove("key");
    for said in ["name", "role", "grants", "expiresAt"] {
        assert_eq!(made[said], body[said]);
    }
    assert_eq!(app.admin().get(&path).await.expect(200), made);
    let list = app.admin().get("/v1/api-keys").await;
    assert_eq!(list.expect(200)["items"][1], made);
    assert!(!list.body.contains(&text) && !list.body.contains("hash"), "{list:?}");

    let caller = app.admin().with_key(&text);
    let me = caller.get("/v1/me").await.expect(200);
    assert_eq!(
        me,
        json!({
            "type": "apiKey", "id": id, "name": "ci-team-a", "role": "deliverer", "grants": body["grants"],
            "permissions": ["authenticated", "readAccounts", "readClusters", "deliverSecrets", "readPullSecrets"],
            "sourceCidrs": [], "expiresAt": body["expiresAt"], "session": null,
        })
    );
    app.admin().post("/v1/api-keys", &body).await.problem(409, "name-taken");

    assert_eq!(app.admin().delete(&path).await.status, 204);
    caller.get("/v1/me").await.problem(401, "unauthenticated");
    assert_eq!(app.admin().delete(&path).await.status, 204);
    assert!(app.admin().get(&path).await.expect(200)["revokedAt"].is_string());
    app.admin().post("/v1/api-keys", &body).await.expect(201);
    for missing in [Uuid::now_v7().to_string(), "ci-team-b".to_owned(), "%20".to_owned()] {
        app.admin().delete(&format!("/v1/api-keys/{missing}")).await.problem(404, "not-found");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn keys_are_listed_in_pages(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for number in 0..6 {
        app.caller(&format!("k-{number}"), "viewer", None).await;
    }
    let expected = ["admin", "k-0", "k-1", "k-2", "k-3", "k-4", "k-5"];
    for limit in [1, 2, 7, 500] {
        let mut listed = names(&app.admin(), "/v1/api-keys?", limit).await;
        listed.sort();
        assert_eq!(listed, expected, "{limit}");
    }
    app.admin().get("/v1/api-keys?cursor=YWJj").await.problem(422, "invalid-request");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_key_is_refused_from_its_expiry_on(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    // On a slow machine a key may expire before its first use.
    for seconds in [2, 8, 32] {
        let ends = chrono::Utc::now() + chrono::TimeDelta::seconds(seconds);
        let body = json!({"name": format!("lives-{seconds}"), "role": "viewer", "expiresAt": ends});
        let made = app.admin().post("/v1/api-keys", &body).await.expect(201);
        let caller = app.admin().with_key(made["key"].as_str().expect("a key"));
        let used = caller.get("/v1/me").await;
        if chrono::Utc::now() < ends {
            used.expect(200);
            let left = (ends - chrono::Utc::now()).to_std().unwrap_or_default();
            tokio::time::sleep(left + Duration::from_millis(5)).await;
            caller.get("/v1/me").await.problem(401, "unauthenticated");
            return;
        }
    }
    panic!("no key was used before its expiry");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_invalid_key_request_is_refused_by_field(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = |role: &str, grants: Value| json!({"name": "k", "role": role, "grants": grants});
    for (body, fields) in [
        (json!({"name": "K", "role": "root"}), vec!["name", "role"]),
        (json!({"name": "k", "role": "viewer", "expiresAt": "2020-01-01T00:00:00Z"}), vec!["expiresAt"]),
        (key("admin", json!({"accounts": ["a"]})), vec!["grants"]),
        (key("deliverer", json!({"accounts": ["a*b"]})), vec!["grants.accounts[0]"]),
        (key("deliverer", json!({"accounts": ["a", 1]})), vec!["grants.accounts[1]"]),
        (key("deliverer", json!({"accounts": [{"matchLabels": {}}]})), vec!["grants.accounts[0]"]),
        (key("deliverer", json!({"accounts": [{"matchLabels": {"a": "b"}, "more": 1}]})), vec!["grants.accounts[0]"]),
        (key("deliverer", json!({"clusters": [{"matchLabels": {"a": "b"}}]})), vec!["grants.clusters[0]"]),
        (
            key("deliverer", json!({"clusters": ["A"], "namespaces": ["-"]})),
            vec!["grants.clusters[0]", "grants.namespaces[0]"],
        ),
        (key("viewer", json!({"cluster": ["a"]})), vec!["grants.cluster"]),
        (key("viewer", json!({"accounts": ["a"]})), vec!["grants.clusters", "grants.namespaces"]),
        (key("operator", json!({"clusters": ["a"], "namespaces": []})), vec!["grants.accounts"]),
    ] {
        let answer = app.admin().post("/v1/api-keys", &body).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), fields, "{answer:?}");
    }
    // Duplicate labels are refused.
    let twice = r#"{"name":"k","role":"viewer","grants":{"accounts":[{"matchLabels":{"team":"a","team":"b"}}]}}"#;
    let request = app.admin().request("POST", "/v1/api-keys").header("content-type", "application/json").body(twice);
    let answer = app.admin().send(request).await;
    answer.problem(422, "invalid-request");
    assert_eq!(answer.fields(), ["grants.accounts[0]"]);
    assert_eq!(app.rows().await[2], 1);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_last_admin_cannot_be_revoked(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let id_of =
        async |client: &Client| client.get("/v1/me").await.expect(200)["id"].as_str().expect("an id").to_owned();
    let first = id_of(&app.admin()).await;
    let revoke = async |id: &str| app.admin().delete(&format!("/v1/api-keys/{id}")).await;
    app.caller("operator", "operator", None).await;
    revoke(&first).await.problem(409, "last-admin");

    // A key that expires does not count as the last admin key.
    let body = json!({"name": "short", "role": "admin", "expiresAt": "2101-01-01T00:00:00Z"});
    let short = app.admin().post("/v1/api-keys", &body).await.expect(201);
    let problem = revoke(&first).await.problem(409, "last-admin");
    assert!(problem["detail"].as_str().expect("a detail").contains("create another admin key first"), "{problem}");
    assert_eq!(revoke(short["id"].as_str().expect("an id")).await.status, 204);

    assert!(app.revoke_key("admin", false).await.is_err());

    // Concurrent revocations leave one key.
    let mut admins = vec![app.admin()];
    for number in 0..4 {
        admins.push(app.caller(&format!("admin-{number}"), "admin", None).await);
    }
    let ids = join_all(admins.iter().map(id_of)).await;
    join_all(admins.iter().zip(&ids).map(async |(client, id)| client.delete(&format!("/v1/api-keys/{id}")).await))
        .await;
    let left: Vec<String> = sqlx::query_scalar("SELECT name FROM api_keys WHERE role = 'admin' AND revoked_at IS NULL")
        .fetch_all(&app.pool)
        .await
        .expect("names");
    assert_eq!(left.len(), 1, "{left:?}");
    // The command line may revoke it with a flag.
    app.revoke_key(&left[0], true).await.expect("revoked");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_not_found_answer_has_a_minimum_latency_after_the_body(pool: PgPool) {
    const LATENCY: Duration = Duration::from_millis(5);
    let app = TestApp::spawn(pool).await;
    app.admin().post("/v1/registry-accounts", &account("foreign")).await.expect(201);
    let grants = completed(json!({"accounts": ["in-*"]}));
    let new_key = json!({"name": "in", "role": "operator", "grants": grants});
    let made = app.admin().post("/v1/api-keys", &new_key).await.expect(201);
    let key = made["key"].as_str().expect("a key");
    let narrow = app.anonymous().with_key(key);
    for path in ["registry-accounts/foreign", "registry-accounts/missing", "clusters/missing", "pull-secrets/missing"] {
        let start = Instant::now();
        narrow.get(&format!("/v1/{path}")).await.problem(404, "not-found");
        assert!(start.elapsed() >= LATENCY, "{path}");
    }

    // The latency starts when the body is complete.
    let body = r#"{"accounts":["foreign"],"image":"foreign.example.com/a"}"#;
    let head = format!("POST /v1/docker-configs/explain HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n");
    let head = format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    let (begin, end) = body.split_at(body.len() - 1);
    let mut stream = TcpStream::connect(app.address).await.expect("a connection");
    stream.write_all(format!("{head}{begin}").as_bytes()).await.expect("sent");
    tokio::time::sleep(4 * LATENCY).await;
    let start = Instant::now();
    stream.write_all(end.as_bytes()).await.expect("sent");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 422");
    assert!(start.elapsed() >= LATENCY);
}

/// A key with this id, a forged secret and a valid checksum.
fn forged(id: &str, number: u32) -> String {
    let body = format!("rgc_{id}_{number:064x}");
    let checksum = crc32fast::hash(body.as_bytes());
    format!("{body}{checksum:08x}")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_flood_of_forged_keys_is_limited_and_locks_out_no_caller(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let text = app.new_key("good", None).await;
    let id = text.split('_').nth(1).expect("an id").to_owned();
    let (good, other) = (app.admin().with_key(&text), app.caller("other", "viewer", None).await);
    good.get("/v1/me").await.expect(200);
    other.get("/v1/me").await.expect(200);
    let before = argon2_runs(&app).await;

    let mut statuses = BTreeMap::<u16, u32>::new();
    for number in 0..60 {
        let wrong = app.anonymous().with_key(&forged(&id, number)).get("/v1/me").await;
        *statuses.entry(wrong.status).or_default() += 1;
        if wrong.status == 429 {
            wrong.problem(429, "too-many-attempts");
            let seconds: u64 = wrong.header("retry-after").parse().expect("seconds");
            assert!((1..=10).contains(&seconds), "{wrong:?}");
        } else {
            wrong.problem(401, "unauthenticated");
        }
        // The valid key with the same id, and another caller at the same address.
        good.get("/v1/me").await.expect(200);
        other.get("/v1/me").await.expect(200);
    }
    assert!(statuses[&401] >= 10 && statuses[&429] >= 20, "{statuses:?}");

    // Unknown ids are limited by address, and malformed keys are not counted.
    // Concurrent, so that the bucket does not refill between the requests.
    let unknown = join_all((0..60).map(async |number| {
        let unknown = Uuid::now_v7().simple().to_string();
        app.anonymous().with_key(&forged(&unknown, number)).get("/v1/me").await.status
    }));
    let unknown = unknown.await;
    assert!(unknown.contains(&429), "{unknown:?}");
    app.anonymous().with_key("rgc_nonsense").get("/v1/me").await.problem(401, "unauthenticated");
    app.anonymous().get("/v1/me").await.problem(401, "unauthenticated");
    assert_eq!(argon2_runs(&app).await, before);
}

/// The metric that counts runs of argon2.
async fn argon2_runs(app: &TestApp) -> String {
    let metrics = app.operations().get("/metrics").await.body;
    let line = metrics.lines().find(|line| line.starts_with("regcred_api_key_argon2_runs_total")).map(str::to_owned);
    line.expect("a counter")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_expired_or_revoked_key_costs_no_argon2(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let made = app.admin().post("/v1/api-keys", &json!({"name": "ci", "role": "viewer"})).await.expect(201);
    let id = made["id"].as_str().expect("an id");
    assert_eq!(app.admin().delete(&format!("/v1/api-keys/{id}")).await.status, 204);
    let expired = app.new_key("expired", Some(chrono::Utc::now() - chrono::TimeDelta::minutes(1))).await;
    let before = argon2_runs(&app).await;
    for key in [made["key"].as_str().expect("a key"), &expired] {
        for _ in 0..3 {
            app.anonymous().with_key(key).get("/v1/me").await.problem(401, "unauthenticated");
        }
    }
    assert_eq!(argon2_runs(&app).await, before);
}

/// Number of connections to this database that wait for a lock with a statement of this text. Polls of
/// the process wait for the same table with others.
async fn waiting_for_locks(watcher: &mut PgConnection, text: &str) -> usize {
    let waiting = "SELECT query FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let waiting: Vec<String> = sqlx::query_scalar(waiting).fetch_all(watcher).await.expect("statements");
    waiting.iter().filter(|query| query.contains(text)).count()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_flood_of_forged_keys_costs_few_reads_and_does_not_delay_valid_keys(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_DATABASE_ACQUIRE_TIMEOUT_SECONDS", "60")]).await;
    let good = app.admin().with_key(&app.new_key("good", None).await);
    let (mut holder, mut watcher) = (superuser(&app.pool).await, superuser(&app.pool).await);
    // Key lookups wait, each on its connection.
    sqlx::raw_sql("BEGIN; LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE").execute(&mut holder).await.expect("locked");
    let mut waiting = async || waiting_for_locks(&mut watcher, "FROM api_keys WHERE id = ANY").await;
    let first = app.anonymous().with_key(&forged(&Uuid::now_v7().simple().to_string(), 0));
    let hangs_up = tokio::spawn(async move { first.get("/v1/me").await.status });
    eventually("a key is looked up", async || (waiting().await == 1).then_some(())).await;
    // Different ids, so that the limit per key id does not apply.
    let flood = join_all((1..25).map(async |number| {
        let id = Uuid::now_v7().simple().to_string();
        app.anonymous().with_key(&forged(&id, number)).get("/v1/me").await.status
    }));
    let work = async {
        eventually("the next read has begun", async || (waiting().await == 2).then_some(())).await;
        hangs_up.abort();
        for _ in 0..10 {
            assert_eq!(app.anonymous().get("/healthz").await.status, 200);
            assert_eq!(waiting().await, 2);
        }
        sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.expect("unlocked");
    };

    let (statuses, answer, ()) = tokio::join!(flood, good.get("/v1/me"), work);

    answer.expect(200);
    assert!(statuses.iter().all(|status| *status == 401), "{statuses:?}");
}

/// A well-formed token with an invalid signature.
fn forged_token(number: u32) -> String {
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let end = chrono::Utc::now().timestamp() + 600;
    let claims = json!({"iss": "https://issuer.example.com", "aud": "regcred", "exp": end, "sub": number.to_string()});
    let signature = BASE64_URL_SAFE_NO_PAD.encode("forged");
    format!("{}.{}.{signature}", part(&json!({"alg": "RS256", "kid": "1"})), part(&claims))
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_flood_of_forged_tokens_leaves_connections_for_valid_keys(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.admin().get("/v1/me").await.expect(200);
    let (mut holder, mut watcher) = (superuser(&app.pool).await, superuser(&app.pool).await);
    // Provider lookups wait, each on its connection.
    let lock = sqlx::raw_sql("BEGIN; LOCK TABLE identity_providers IN ACCESS EXCLUSIVE MODE");
    lock.execute(&mut holder).await.expect("locked");
    let mut waiting = async || waiting_for_locks(&mut watcher, "p.audience = ANY").await;
    // More than the connections of the app.
    let flood = join_all(
        (0..24).map(async |number| app.anonymous().with_key(&forged_token(number)).get("/v1/me").await.status),
    );
    let work = async {
        eventually("tokens are looked up", async || (waiting().await > 0).then_some(())).await;
        for _ in 0..10 {
            app.admin().get("/v1/registry-accounts").await.expect(200);
            assert!(waiting().await <= 4);
        }
        sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.expect("unlocked");
    };

    let (statuses, ()) = tokio::join!(flood, work);

    // A request that waited too long for a connection gets 503.
    assert!(statuses.iter().all(|status| [401, 429, 503].contains(status)), "{statuses:?}");
}

/// The attack: a caller points a cluster at its own server and receives every password that is
/// delivered there.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn narrowed_callers_cannot_decide_where_a_cluster_is(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let before = app.register_cluster("dev").await;
    let elsewhere = json!({
        "server": "http://127.0.0.1:18999", "caCertificate": null, "allowPlainHttp": true, "auth": {"type": "none"},
    });
    let mut again = elsewhere.clone();
    again["name"] = json!("dev");
    let kubeconfig = json!({"name": "dev-2", "kubeconfig": "apiVersion: v1\nkind: Config\n"});
    for narrowed in ["accounts", "clusters", "namespaces"] {
        let grants = completed(json!({narrowed: ["team-a-*", "dev"]}));
        for role in ["operator", "deliverer", "renderer", "viewer"] {
            let caller = app.caller(&format!("{role}-{narrowed}"), role, Some(grants.clone())).await;
            for (method, path, body) in [
                ("PATCH", "/v1/clusters/dev", &elsewhere),
                ("DELETE", "/v1/clusters/dev", &Value::Null),
                ("POST", "/v1/clusters", &again),
                ("POST", "/v1/clusters", &kubeconfig),
                ("POST", "/v1/clusters", &json!({"name": "here", "auth": {"type": "inCluster"}})),
            ] {
                let request = caller.request(method, path);
                let answer = caller.send(if body.is_null() { request } else { request.json(body) }).await;
                answer.problem(403, "forbidden");
            }
            let me = caller.get("/v1/me").await.expect(200);
            let permissions = me["permissions"].as_array().expect("a list");
            assert!(!permissions.contains(&json!("writeClusters")), "{role}: {me}");
        }
    }
    assert_eq!(app.admin().get("/v1/clusters/dev").await.expect(200), before);

    let operator = app.caller("operator", "operator", None).await;
    let me = operator.get("/v1/me").await.expect(200);
    assert!(me["permissions"].as_array().is_some_and(|permissions| permissions.contains(&json!("writeClusters"))));
    operator.patch("/v1/clusters/dev", &elsewhere).await.expect(200);
}

/// Completes grants with all resources of the omitted kinds.
fn completed(mut grants: Value) -> Value {
    for kind in ["accounts", "clusters", "namespaces"] {
        if grants[kind].is_null() {
            grants[kind] = json!(["*"]);
        }
    }
    grants
}
