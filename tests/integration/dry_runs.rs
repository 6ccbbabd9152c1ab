//! `?dryRun=true` of every operation that changes something: the checks and the answer of the
//! change, and no change.

use std::collections::{BTreeMap, BTreeSet};

use regcred::http;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    mints::token_service::TokenService,
    pull_secrets::{declaration, put},
    support::{app::TestApp, client::Client, eventually, kubernetes, registry},
};

/// Operations that change nothing, although their method is not `GET`.
const READS: [&str; 7] = [
    "create_docker_config",
    "create_secret_manifest",
    "explain_docker_config",
    "check_cluster",
    "diagnose_pod",
    "diagnose_workload",
    "diagnose_spec",
];

/// Operations that sign a person in: a provider gives a code that can be redeemed once.
const SIGN_INS: [&str; 2] = ["start_login", "complete_login"];

/// Tables that the worker changes without a cause: leases.
const LEASES: [&str; 2] = ["cluster_comparisons", "cluster_watches"];

/// Operations by id, with method, path and the names of their query parameters.
fn operations() -> BTreeMap<String, (String, String, BTreeSet<String>)> {
    let document = serde_json::to_value(http::document()).expect("JSON");
    let mut operations = BTreeMap::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            let parameters = operation["parameters"].as_array().into_iter().flatten();
            let in_query = parameters.filter(|parameter| parameter["in"] == "query");
            let names = in_query.filter_map(|parameter| parameter["name"].as_str().map(str::to_owned)).collect();
            let id = operation["operationId"].as_str().expect("a name").to_owned();
            operations.insert(id, (method.to_uppercase(), path.clone(), names));
        }
    }
    operations
}

/// Digest of the rows of every table, and the number of audit events. Waits until events are sealed.
async fn database(app: &TestApp) -> (BTreeMap<String, Option<String>>, i64) {
    let number = async |sql| sqlx::query_scalar::<_, i64>(sql).fetch_one(&app.pool).await.expect("a number");
    eventually("all events are sealed", async || {
        (number("SELECT count(*) FROM audit_unsealed").await == 0).then_some(())
    })
    .await;
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
            .fetch_all(&app.pool)
            .await
            .expect("tables");
    assert!(tables.len() > 10, "{tables:?}");
    let mut digests = BTreeMap::new();
    for table in tables.into_iter().filter(|table| !LEASES.contains(&table.as_str()) && !table.starts_with("audit_")) {
        let sql = format!("SELECT count(*) || md5(string_agg(md5(t::text), '' ORDER BY t::text)) FROM {table} AS t");
        let digest: Option<String> =
            sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&app.pool).await.expect("a digest");
        digests.insert(table, digest);
    }
    (digests, number("SELECT count(*) FROM audit_events").await)
}

/// What a dry run of an operation is called with, and how it answers.
struct Case {
    /// Values of the path's parameters.
    path: Vec<(&'static str, String)>,
    query: &'static str,
    body: Option<Value>,
    status: u16,
    /// Events of a secret that leaves regcred nevertheless.
    events: i64,
}

fn case(operation: &str, setup: &Setup) -> Case {
    let named = |name: &'static str| vec![("{name}", name.to_owned())];
    let of = |path, body, status| Case { path, query: "", body, status, events: 0 };
    let provider = json!({"name": "new", "type": "oidc", "issuer": "https://issuer.example.com", "audience": "new",
        "rules": [{"claims": {"sub": "ci"}, "role": "viewer"}]});
    let account = json!({"name": "new", "registry": "new.example.com", "username": "dev", "password": "one"});
    match operation {
        "create_registry_account" => of(vec![], Some(account), 200),
        "update_registry_account" => {
            of(named("a"), Some(json!({"password": "other", "labels": {"team": "a"}, "email": "a@example.com"})), 200)
        }
        "delete_registry_account" | "delete_cluster" => of(named("spare"), None, 204),
        // The stored login is presented to its registry.
        // No login is minted.
        "mint_registry_account" => of(named("minted"), None, 200),
        "verify_registry_account" => Case { events: 1, ..of(named("a"), None, 200) },
        "import_registry_accounts" => of(vec![], Some(json!({"auths": {"new.example.com": {"auth": "YTpi"}}})), 200),
        "create_cluster" => {
            of(vec![], Some(json!({"name": "new", "server": "https://127.0.0.1:1", "auth": {"type": "none"}})), 200)
        }
        "update_cluster" => of(named("dev"), Some(json!({"auth": {"type": "token", "token": "other"}})), 200),
        // The API server validates the Secret: an attempt and its result.
        "create_secret" => {
            let path = vec![("{cluster}", "dev".to_owned()), ("{namespace}", setup.namespace.clone())];
            Case { events: 2, ..of(path, Some(json!({"name": "new", "accounts": ["a"]})), 200) }
        }
        // No run is requested.
        "run_coverage" => of(vec![("{cluster}", "dev".to_owned())], None, 202),
        "put_pull_secret" => of(named("new"), Some(declaration(&["a"], "dev", &[&setup.namespace])), 200),
        "update_pull_secret" => of(named("p"), Some(json!({"accounts": ["a", "b"]})), 200),
        "delete_pull_secret" => Case { query: "&deletionPolicy=delete", ..of(named("p"), None, 202) },
        "sync_pull_secret" => of(named("p"), None, 202),
        "create_api_key" => of(vec![], Some(json!({"name": "new", "role": "viewer"})), 200),
        "revoke_api_key" => of(vec![("{id}", setup.key.clone())], None, 204),
        "create_session" => of(vec![], None, 200),
        "end_session" => of(vec![("{id}", setup.session.clone())], None, 204),
        "end_sessions" => of(vec![], None, 204),
        "create_identity_provider" => of(vec![], Some(provider), 200),
        "update_identity_provider" => of(named("old"), Some(json!({"audience": "other"})), 200),
        "delete_identity_provider" => of(named("old"), None, 204),
        other => panic!("{other} has no case: add one"),
    }
}

struct Setup {
    app: TestApp,
    admin: Client,
    namespace: String,
    /// Id of an API key that can be revoked.
    key: String,
    /// Id of a session.
    session: String,
}

impl Setup {
    /// An app with each kind of resource. The pull secret `p` is settled.
    async fn new(pool: PgPool) -> Self {
        let variables = [("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8"), ("REGCRED_MINT_ALLOW", "127.0.0.1")];
        let app = TestApp::configured(pool, &variables).await;
        let (admin, namespace) = (app.admin(), kubernetes::new_namespace().await);
        for (name, registry) in [("a", registry::a()), ("b", registry::b())] {
            let body = json!({"name": name, "registry": registry.address, "username": registry.username,
                "password": registry.password, "plainHttp": true});
            admin.post("/v1/registry-accounts", &body).await.expect(201);
        }
        app.register_account("spare", "spare.example.com", "dev", "one").await;
        admin.post("/v1/registry-accounts", &TokenService::start().account()).await.expect(201);
        app.register_cluster("dev").await;
        let spare = json!({"name": "spare", "server": "https://127.0.0.1:1", "auth": {"type": "none"}});
        admin.post("/v1/clusters", &spare).await.expect(201);
        let provider = json!({"name": "old", "type": "oidc", "issuer": "https://issuer.example.com", "audience": "old",
            "rules": [{"claims": {"sub": "ci"}, "role": "viewer"}]});
        admin.post("/v1/identity-providers", &provider).await.expect(201);
        let key = admin.post("/v1/api-keys", &json!({"name": "old", "role": "viewer"})).await.expect(201);
        let declared = put(&admin, "p", &declaration(&["a"], "dev", &[&namespace])).await.expect(201);
        assert_eq!(declared["status"]["synced"], 1, "{declared}");
        let key = key["id"].as_str().expect("an id").to_owned();
        let session = admin.send(admin.request("POST", "/v1/sessions")).await.expect(201);
        let session = session["id"].as_str().expect("an id").to_owned();
        Self { app, admin, namespace, key, session }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_of_every_change_changes_nothing(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let mut changes = 0;
    for (operation, (method, path, parameters)) in operations() {
        if method == "GET" || READS.iter().chain(&SIGN_INS).any(|one| *one == operation) {
            assert!(!parameters.contains("dryRun"), "{operation}");
            continue;
        }
        assert!(parameters.contains("dryRun"), "{operation} has no dry run");
        changes += 1;
        let case = case(&operation, &setup);
        let path = case.path.iter().fold(path, |path, (parameter, value)| path.replace(parameter, value));
        let mut request = setup.admin.request(&method, &format!("{path}?dryRun=true{}", case.query));
        request = request.header("Idempotency-Key", operation.as_str());
        if let Some(body) = &case.body {
            request = request.json(body);
        }
        let (before, events) = database(&setup.app).await;

        let answer = setup.admin.send(request).await;

        assert_eq!(answer.status, case.status, "{operation}: {answer:?}");
        assert_eq!((answer.header("etag"), answer.header("location")), ("", ""), "{operation}");
        assert!(!answer.body.contains("rgc_"), "{operation}: {answer:?}");
        let (after, events_after) = database(&setup.app).await;
        assert_eq!(after, before, "{operation}");
        assert_eq!(events_after - events, case.events, "{operation}");
    }
    assert!(changes >= 18, "{changes}");
    // The Secret of the pull secret is the only one, and no other write reached the cluster.
    assert_eq!(kubernetes::secret_names(&setup.namespace).await, ["team-a-pull"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_is_refused_as_the_change_would_be(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let admin = &setup.admin;
    let (before, events) = database(&setup.app).await;
    let account = json!({"name": "a", "registry": "new.example.com", "username": "dev", "password": "one"});
    admin.post("/v1/registry-accounts?dryRun=true", &account).await.problem(409, "name-taken");
    let wrong = json!({"password": "wrong"});
    let verified = "/v1/registry-accounts/a?dryRun=true&verify=true";
    admin.patch(verified, &wrong).await.problem(422, "verification-failed");
    admin.delete("/v1/registry-accounts/a?dryRun=true").await.problem(409, "in-use");
    admin.delete("/v1/registry-accounts/missing?dryRun=true").await.problem(404, "not-found");
    admin.delete("/v1/clusters/dev?dryRun=true").await.problem(409, "in-use");
    let me = admin.get("/v1/me").await.expect(200);
    let own = format!("/v1/api-keys/{}?dryRun=true", me["id"].as_str().expect("an id"));
    admin.delete(&own).await.problem(409, "last-admin");
    for (method, path) in [
        ("PATCH", "/v1/registry-accounts/a"),
        ("DELETE", "/v1/registry-accounts/spare"),
        ("PATCH", "/v1/clusters/dev"),
        ("DELETE", "/v1/clusters/spare"),
        ("PATCH", "/v1/pull-secrets/p"),
        ("DELETE", "/v1/pull-secrets/p"),
        ("PATCH", "/v1/identity-providers/old"),
        ("DELETE", "/v1/identity-providers/old"),
    ] {
        let request = admin.request(method, &format!("{path}?dryRun=true")).header("If-Match", "\"7\"");
        let request = if method == "PATCH" { request.json(&json!({})) } else { request };
        admin.send(request).await.problem(412, "stale-version");
    }
    for path in ["/v1/docker-configs", "/v1/docker-configs/manifest", "/v1/docker-configs/explain"] {
        let refused = admin.post(&format!("{path}?dryRun=true"), &json!({"accounts": ["a"]})).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["dryRun"], "{path}");
    }
    assert_eq!(database(&setup.app).await, (before, events));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_does_not_tell_whether_a_secret_is_the_stored_one(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    app.register_account("a", "registry.example.com", "dev", "right").await;
    let cluster = json!({"name": "k", "server": "https://127.0.0.1:1", "auth": {"type": "token", "token": "right"}});
    admin.post("/v1/clusters", &cluster).await.expect(201);

    let mut answers = Vec::new();
    for guess in ["right", "wrong"] {
        let account = admin.patch("/v1/registry-accounts/a?dryRun=true", &json!({"password": guess})).await;
        let auth = json!({"auth": {"type": "token", "token": guess}});
        let cluster = admin.patch("/v1/clusters/k?dryRun=true", &auth).await;
        answers.push([account.expect(200)["version"].clone(), cluster.expect(200)["version"].clone()]);
    }

    assert_eq!(answers, [[json!(2), json!(2)], [json!(2), json!(2)]]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_shows_the_changed_resource(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let admin = &setup.admin;
    let changed = admin.patch("/v1/registry-accounts/a?dryRun=true", &json!({"username": "ops"})).await.expect(200);
    assert_eq!((&changed["username"], &changed["version"]), (&json!("ops"), &json!(2)));
    let key = json!({"name": "new", "role": "viewer"});
    let key = admin.post("/v1/api-keys?dryRun=true", &key).await.expect(200);
    assert_eq!((&key["name"], &key["key"]), (&json!("new"), &json!("")));
    let path = format!("/v1/clusters/dev/namespaces/{}/secrets", setup.namespace);
    let secret = json!({"name": "new", "accounts": ["a"]});
    let tried = admin.post(&format!("{path}?dryRun=true"), &secret).await.expect(200);
    assert_eq!((&tried["dryRun"], tried["keys"].as_array().map(Vec::len)), (&json!(true), Some(1)));
    // The field of the body means the same.
    let tried = admin.post(&path, &json!({"name": "new", "accounts": ["a"], "dryRun": true})).await.expect(200);
    assert_eq!(tried["dryRun"], true);
    let mut declared = declaration(&["b"], "dev", &[&setup.namespace]);
    let by_query = admin.send(admin.request("PUT", "/v1/pull-secrets/p?dryRun=true").json(&declared)).await.expect(200);
    declared["dryRun"] = json!(true);
    let by_field = admin.send(admin.request("PUT", "/v1/pull-secrets/p").json(&declared)).await.expect(200);
    assert_eq!((&by_query, &by_query["targets"][0]["action"]), (&by_field, &json!("update")));
    let by_patch = admin.patch("/v1/pull-secrets/p?dryRun=true", &json!({"accounts": ["b"]})).await.expect(200);
    assert_eq!(by_patch, by_query);
}
