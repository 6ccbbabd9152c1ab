//! Direct delivery again and again: replacement of a Secret, the list of Secrets, and the accounts
//! that name Secrets with an earlier login.

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::{
    pull_secrets::{Broker, declaration, password, put},
    support::{app::TestApp, client::Client, eventually, kubernetes, process::Installation},
};

struct Setup {
    app: TestApp,
    admin: Client,
    namespace: String,
    path: String,
}

impl Setup {
    async fn new(pool: PgPool) -> Self {
        let app = TestApp::spawn(pool).await;
        let (admin, namespace) = (app.admin(), kubernetes::new_namespace().await);
        app.register_cluster("dev").await;
        app.register_account("a", "a.example.com", "dev", "one").await;
        app.register_account("b", "b.example.com", "dev", "two").await;
        let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
        Self { app, admin, namespace, path }
    }

    async fn list(&self, client: &Client) -> Vec<Value> {
        client.get(&self.path).await.expect(200)["items"].as_array().expect("items").clone()
    }
}

fn delivery(name: &str, accounts: &[&str]) -> Value {
    json!({"name": name, "accounts": accounts, "ifExists": "replace"})
}

/// The text of the warning `directCopies` of an account.
fn copies(account: &Value) -> Option<&str> {
    let warnings = account["warnings"].as_array().expect("warnings");
    warnings
        .iter()
        .find(|warning| warning["code"] == "directCopies")
        .map(|warning| warning["detail"].as_str().expect("a text"))
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn delivery_can_be_repeated(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let admin = &setup.admin;
    let created = admin.post(&setup.path, &delivery("pull", &["a"])).await.expect(201);
    assert_eq!(created["replaced"], false);
    let first = kubernetes::secret(&setup.namespace, "pull").await;

    // Without the field, and with its default, an existing Secret is kept.
    for body in
        [json!({"name": "pull", "accounts": ["b"]}), json!({"name": "pull", "accounts": ["b"], "ifExists": "refuse"})]
    {
        admin.post(&setup.path, &body).await.problem(409, "secret-exists");
    }
    assert_eq!(kubernetes::secret(&setup.namespace, "pull").await, first);
    let tried = admin.post(&format!("{}?dryRun=true", setup.path), &delivery("pull", &["b"])).await.expect(200);
    assert_eq!((&tried["replaced"], &tried["dryRun"]), (&json!(true), &json!(true)));
    assert_eq!(kubernetes::secret(&setup.namespace, "pull").await, first);

    let replaced = admin.post(&setup.path, &delivery("pull", &["b"])).await.expect(200);

    assert_eq!((&replaced["replaced"], &replaced["keys"]), (&json!(true), &json!(["b.example.com"])));
    let second = kubernetes::secret(&setup.namespace, "pull").await;
    assert_eq!((&second.metadata.uid, password(&second).as_str()), (&first.metadata.uid, "two"));
    assert_eq!(json!(second.metadata.resource_version), replaced["resourceVersion"]);
    let events = admin.get("/v1/audit-events?action=secret.deliver&limit=2").await.expect(200);
    let [result, attempt] = &events["items"].as_array().expect("events")[..] else { panic!("{events}") };
    assert_eq!((&result["outcome"], &result["details"]), (&json!("success"), &json!({"did": "replaced"})));
    assert_eq!(attempt["outcome"], "attempt");
    let wrong = json!({"name": "pull", "accounts": ["b"], "ifExists": "canary"});
    assert_eq!(admin.post(&setup.path, &wrong).await.fields(), ["ifExists"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn only_secrets_of_direct_delivery_are_replaced(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let (admin, namespace) = (&setup.admin, &setup.namespace);
    let login = ["--docker-server=own.example.com", "--docker-username=me", "--docker-password=mine"];
    let create = ["-n", namespace, "create", "secret", "docker-registry", "foreign"];
    kubernetes::kubectl(&[&create[..], &login[..]].concat(), "");
    let mut declared = declaration(&["a"], "dev", &[namespace]);
    declared["deletionPolicy"] = json!("retain");
    put(admin, "team-a", &declared).await.expect(201);
    let before = kubernetes::secret(namespace, "team-a-pull").await;

    let detail = async |client: &Client, name: &str| {
        let refused = client.post(&setup.path, &delivery(name, &["b"])).await;
        refused.problem(409, "secret-exists")["detail"].as_str().expect("a text").to_owned()
    };
    assert!(detail(admin, "foreign").await.contains("was not made by direct delivery"));
    assert!(detail(admin, "team-a-pull").await.contains("belongs to the pull secret `team-a`"));
    // The name is for callers who may see the pull secret.
    let grants = json!({"accounts": ["b"], "clusters": ["dev"], "namespaces": [namespace]});
    let narrow = setup.app.caller("narrow", "deliverer", Some(grants)).await;
    let text = detail(&narrow, "team-a-pull").await;
    assert!(text.contains("belongs to a pull secret") && !text.contains("team-a`"), "{text}");
    // A Secret that a deleted pull secret left is no direct delivery either.
    admin.delete("/v1/pull-secrets/team-a").await;
    assert!(detail(admin, "team-a-pull").await.contains("was not made by direct delivery"));
    assert_eq!(kubernetes::secret(namespace, "team-a-pull").await, before);
    assert_eq!(kubernetes::secret_names(namespace).await, ["foreign", "team-a-pull"]);

    // Nor is one that was relabelled.
    admin.post(&setup.path, &delivery("direct", &["a"])).await.expect(201);
    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), namespace);
    let patch = Patch::Merge(json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": "other"}}}));
    secrets.patch("direct", &PatchParams::default(), &patch).await.expect("relabelled");
    assert!(detail(admin, "direct").await.contains("was not made by direct delivery"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn printed_rules_permit_a_replacement(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let app = TestApp::spawn(pool).await;
    let broker = Broker::without_rights().await;
    // Part of the names of the printed roles, so unique per test.
    let cluster = broker.namespace.clone();
    app.register_cluster_with(&cluster, &broker.auth()).await;
    app.register_account("a", "a.example.com", "dev", "one").await;
    let namespace = kubernetes::new_namespace().await;
    let path = format!("/v1/clusters/{cluster}/namespaces/{namespace}/secrets");
    app.admin().post(&path, &delivery("pull", &["a"])).await.problem(502, "cluster-forbidden");
    let refused = app.admin().get(&path).await.problem(502, "cluster-forbidden");
    let detail = refused["detail"].as_str().expect("a text");
    assert!(detail.contains(&format!("may not list Secrets in namespace {namespace}")), "{detail}");

    let subject = format!("{}/{}", broker.namespace, broker.name);
    let secret = format!("{namespace}/pull");
    let rbac = ["cluster", "rbac", "--cluster", &cluster, "--service-account", &subject, "--direct-secret", &secret];
    let printed = installation.must_run(&rbac).await;
    assert!(printed.contains("resourceNames: [\"pull\"]\n  verbs: [\"get\", \"patch\"]"), "{printed}");
    kubernetes::kubectl(&["apply", "-f", "-"], &printed);

    // The API server enforces new rules with a delay.
    eventually("the delivery is permitted", async || {
        (app.admin().post(&path, &delivery("pull", &["a"])).await.status == 201).then_some(())
    })
    .await;
    app.admin().post(&path, &delivery("pull", &["a"])).await.expect(200);
    app.admin().post(&path, &delivery("other", &["a"])).await.expect(201);
    app.admin().post(&path, &delivery("other", &["a"])).await.problem(502, "cluster-forbidden");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn secrets_of_direct_delivery_are_listed(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let admin = &setup.admin;
    assert_eq!(setup.list(admin).await, [Value::Null; 0]);
    put(admin, "team-a", &declaration(&["a"], "dev", &[&setup.namespace])).await.expect(201);
    for (name, accounts) in [("two", &["b"][..]), ("one", &["a", "b"])] {
        admin.post(&setup.path, &delivery(name, accounts)).await.expect(201);
    }

    let listed = setup.list(admin).await;

    let shown = |listed: &[Value]| {
        let shown = listed.iter().map(|one| json!([one["name"], one["accounts"], one["outdated"]]));
        shown.collect::<Vec<_>>()
    };
    assert_eq!(shown(&listed), [json!(["one", ["a", "b"], false]), json!(["two", ["b"], false])]);
    let stored = kubernetes::secret(&setup.namespace, "one").await;
    assert_eq!(listed[0]["uid"], json!(stored.metadata.uid));
    assert_eq!(listed[0]["resourceVersion"], json!(stored.metadata.resource_version));
    assert!(listed[0]["deliveredAt"].is_string() && listed[0]["creationTimestamp"].is_string(), "{listed:?}");
    assert!(!json!(listed).to_string().contains("dockerconfigjson"), "metadata only");
    let first = admin.get(&format!("{}?limit=1", setup.path)).await.expect(200);
    let next = format!("{}?limit=1&cursor={}", setup.path, first["next"].as_str().expect("a cursor"));
    let second = admin.get(&next).await.expect(200);
    assert_eq!((&first["items"][0]["name"], &second["items"][0]["name"]), (&json!("one"), &json!("two")));
    assert_eq!(second["next"], Value::Null);

    // Rotated, and delivered again.
    admin.patch("/v1/registry-accounts/a", &json!({"password": "new"})).await.expect(200);
    assert_eq!(shown(&setup.list(admin).await)[0], json!(["one", ["a", "b"], true]));
    let grants = json!({"accounts": ["b"], "clusters": ["dev"], "namespaces": [setup.namespace]});
    let narrow = setup.app.caller("narrow", "viewer", Some(grants)).await;
    assert_eq!(shown(&setup.list(&narrow).await)[0], json!(["one", ["b"], false]));
    admin.post(&setup.path, &delivery("one", &["a"])).await.expect(200);
    assert_eq!(shown(&setup.list(admin).await)[0], json!(["one", ["a"], false]));

    // Without a record, as after a delivery by an earlier release.
    sqlx::query("DELETE FROM direct_secrets").execute(&setup.app.pool).await.expect("deleted");
    assert_eq!(shown(&setup.list(admin).await)[1], json!(["two", null, null]));
    let elsewhere = json!({"accounts": ["*"], "clusters": ["dev"], "namespaces": ["other"]});
    let elsewhere = setup.app.caller("elsewhere", "viewer", Some(elsewhere)).await;
    elsewhere.get(&setup.path).await.problem(404, "namespace-not-found");
    let renderer = setup.app.caller("renderer", "renderer", None).await;
    renderer.get(&setup.path).await.problem(403, "forbidden");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rotation_names_the_secrets_that_do_not_follow(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let admin = &setup.admin;
    for (name, accounts) in [("one", &["a", "b"][..]), ("two", &["a"]), ("three", &["b"])] {
        admin.post(&setup.path, &delivery(name, accounts)).await.expect(201);
    }
    let path = "/v1/registry-accounts/a";
    assert_eq!(copies(&admin.get(path).await.expect(200)), None);
    // A change that no docker config shows outdates nothing.
    let changed = admin.patch(path, &json!({"verifyIntervalSeconds": 3600})).await.expect(200);
    assert_eq!(copies(&changed), None);

    let tried = admin.patch(&format!("{path}?dryRun=true"), &json!({"password": "new"})).await.expect(200);
    assert!(copies(&tried).is_some_and(|detail| detail.contains("/two.")), "{tried}");
    assert_eq!(copies(&admin.get(path).await.expect(200)), None);
    let rotated = admin.patch(path, &json!({"password": "new"})).await.expect(200);

    let namespace = &setup.namespace;
    let expected = format!("dev/{namespace}/one, dev/{namespace}/two.");
    assert!(copies(&rotated).is_some_and(|detail| detail.contains(&expected)), "{rotated}");
    assert_eq!(copies(&admin.get(path).await.expect(200)), copies(&rotated));
    assert_eq!(copies(&admin.get("/v1/registry-accounts/b").await.expect(200)), None);
    // A caller learns the number of Secrets in other namespaces only.
    let elsewhere = json!({"accounts": ["a"], "clusters": ["dev"], "namespaces": ["other"]});
    let elsewhere = setup.app.caller("elsewhere", "viewer", Some(elsewhere)).await;
    let shown = elsewhere.get(path).await.expect(200);
    let detail = copies(&shown).expect("a warning");
    assert!(detail.contains("2 that you may not see") && !detail.contains(namespace.as_str()), "{detail}");

    admin.post(&setup.path, &delivery("one", &["a", "b"])).await.expect(200);
    let shown = admin.get(path).await.expect(200);
    assert!(copies(&shown).is_some_and(|detail| detail.contains("/two.") && !detail.contains("/one")), "{shown}");
    // Replaced by a Secret without the account.
    admin.post(&setup.path, &delivery("two", &["b"])).await.expect(200);
    assert_eq!(copies(&admin.get(path).await.expect(200)), None);
    // A deleted cluster takes its records with it.
    admin.delete("/v1/clusters/dev").await;
    let left = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM direct_secrets").fetch_one(&setup.app.pool).await;
    assert_eq!(left.expect("a number"), 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn number_of_recorded_secrets_is_bounded(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let fill = "INSERT INTO direct_secrets (account_id, cluster_id, namespace, name, delivered_at)
        SELECT registry_accounts.id, clusters.id, 'old', 'pull-' || number, now() - number * interval '1 hour'
        FROM registry_accounts, clusters, generate_series(1, 150) AS number";
    sqlx::query(fill).execute(&setup.app.pool).await.expect("filled");

    setup.admin.post(&setup.path, &delivery("new", &["a"])).await.expect(201);

    let counted = async |account: &str| -> (i64, bool) {
        let sql = "SELECT count(*), bool_or(direct.name = 'new') AND bool_or(direct.name = 'pull-1')
            FROM direct_secrets AS direct JOIN registry_accounts ON id = account_id WHERE registry_accounts.name = $1";
        sqlx::query_as(sql).bind(account).fetch_one(&setup.app.pool).await.expect("numbers")
    };
    assert_eq!(counted("a").await, (101, true));
    assert_eq!(counted("b").await.0, 150);
    // The warning names a part of them.
    let rotated = setup.admin.patch("/v1/registry-accounts/a", &json!({"password": "new"})).await.expect(200);
    assert!(copies(&rotated).is_some_and(|detail| detail.contains("81 more")), "{rotated}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn concurrent_deliveries_are_all_recorded(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let bodies: Vec<Value> = (0..8).map(|number| delivery(&format!("pull-{number}"), &["a", "b"])).collect();
    for status in [201, 200] {
        for answer in join_all(bodies.iter().map(|body| setup.admin.post(&setup.path, body))).await {
            answer.expect(status);
        }
    }
    let listed = setup.list(&setup.admin).await;
    assert_eq!(listed.len(), bodies.len());
    assert!(listed.iter().all(|secret| secret["accounts"] == json!(["a", "b"])), "{listed:?}");
}
