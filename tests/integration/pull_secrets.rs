//! Pull secrets against a real API server, with a `ServiceAccount` that has no more rights than they need.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString,
    api::{
        core::v1::{LocalObjectReference, Namespace, Secret, ServiceAccount},
        rbac::v1::PolicyRule,
    },
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use regcred::domain::pull_secret::GENERATION_ANNOTATION;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    broker::{self, named, rule, rules},
    client::{Answer, Client, assert_holds},
    eventually,
    kubernetes::{self, Cluster},
};

mod events;
mod faults;
mod queue;
mod record;
mod rights;
mod sick;
mod watches;

/// A `ServiceAccount` with the rights of [`rules`], everywhere.
pub struct Broker {
    cluster: Cluster,
    pub name: String,
    pub namespace: String,
    pub token: String,
}

impl Broker {
    pub async fn new() -> Self {
        Self::of(kubernetes::FIRST).await
    }

    pub async fn of(cluster: Cluster) -> Self {
        let broker = Self::without_rights_in(cluster).await;
        broker::grant(&cluster.admin(), &broker.namespace, &broker.name).await.expect("granted");
        broker
    }

    /// One that may do nothing yet.
    pub async fn without_rights() -> Self {
        Self::without_rights_in(kubernetes::FIRST).await
    }

    async fn without_rights_in(cluster: Cluster) -> Self {
        let namespace = cluster.new_namespace().await;
        let name = format!("{namespace}-broker");
        let created = broker::create_service_account(&cluster.admin(), &namespace, &name, 3600).await;
        Self { cluster, name, namespace, token: created.expect("a token") }
    }

    /// Gives it other rights.
    pub async fn set_rules(&self, rules: Vec<PolicyRule>) {
        broker::set_rules(&self.cluster.admin(), &self.name, &rules).await.expect("patched");
    }

    /// Takes it away, and with it everything that its token was good for.
    pub async fn delete(&self) {
        let accounts = Api::<ServiceAccount>::namespaced(self.cluster.admin(), &self.namespace);
        accounts.delete(&self.name, &DeleteParams::default()).await.expect("deleted");
    }

    pub fn auth(&self) -> Value {
        json!({"type": "token", "token": self.token})
    }
}

pub async fn service_account(namespace: &str, name: &str, entries: &[&str]) {
    let entries: Vec<LocalObjectReference> =
        entries.iter().map(|name| LocalObjectReference { name: (*name).to_owned() }).collect();
    let account = ServiceAccount {
        metadata: named(name),
        image_pull_secrets: (!entries.is_empty()).then_some(entries),
        ..ServiceAccount::default()
    };
    let accounts = Api::<ServiceAccount>::namespaced(kubernetes::admin(), namespace);
    accounts.create(&PostParams::default(), &account).await.expect("a ServiceAccount");
}

async fn entries(namespace: &str, name: &str) -> Vec<String> {
    let accounts = Api::<ServiceAccount>::namespaced(kubernetes::admin(), namespace);
    let account = accounts.get(name).await.expect("a ServiceAccount");
    account.image_pull_secrets.into_iter().flatten().map(|entry| entry.name).collect()
}

pub async fn labelled_namespace(labels: &[(&str, &str)]) -> String {
    let namespace = kubernetes::new_namespace().await;
    label(&namespace, &labels.iter().map(|(key, value)| (*key, Some(*value))).collect::<Vec<_>>()).await;
    namespace
}

async fn label(namespace: &str, labels: &[(&str, Option<&str>)]) {
    let labels: BTreeMap<&str, Option<&str>> = labels.iter().copied().collect();
    let namespaces = Api::<Namespace>::all(kubernetes::admin());
    let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
    namespaces.patch(namespace, &PatchParams::default(), &patch).await.expect("labelled");
}

pub async fn find_secret(namespace: &str, name: &str) -> Option<Secret> {
    Api::<Secret>::namespaced(kubernetes::admin(), namespace).get_opt(name).await.expect("an answer")
}

async fn secret_patched(namespace: &str, name: &str, patch: Value) {
    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), namespace);
    secrets.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.expect("patched");
}

/// The password of the one registry in a Secret.
pub fn password(secret: &Secret) -> String {
    let document: Value = serde_json::from_str(&kubernetes::document(secret)).expect("JSON");
    let auths = document["auths"].as_object().expect("auths");
    auths.values().next().expect("an entry")["password"].as_str().expect("a password").to_owned()
}

pub fn declaration(accounts: &[&str], cluster: &str, namespaces: &[&str]) -> Value {
    json!({
        "accounts": accounts,
        "secret": {"name": "team-a-pull", "type": "kubernetes.io/dockerconfigjson"},
        "targets": [{"cluster": cluster, "namespaces": namespaces}],
        "serviceAccounts": [], "deletionPolicy": "delete", "adopt": false,
    })
}

pub async fn put(client: &Client, name: &str, body: &Value) -> Answer {
    client.send(client.request("PUT", &format!("/v1/pull-secrets/{name}")).header("prefer", "wait=30").json(body)).await
}

async fn sync(client: &Client, name: &str) -> Value {
    let request = client.request("POST", &format!("/v1/pull-secrets/{name}/sync")).header("prefer", "wait=30");
    client.send(request).await.expect(202)
}

/// The status once everything has settled.
pub async fn settled(client: &Client, name: &str) -> Value {
    let request = client.request("GET", &format!("/v1/pull-secrets/{name}")).header("prefer", "wait=30");
    client.send(request).await.expect(200)
}

/// The one target of a pull secret.
async fn target(client: &Client, name: &str) -> Value {
    let targets = client.get(&format!("/v1/pull-secrets/{name}/targets")).await.expect(200);
    let items = targets["items"].as_array().expect("items");
    assert_eq!(items.len(), 1, "{targets}");
    items[0].clone()
}

/// Waits until the one target of a pull secret has this state and error.
async fn target_becomes(client: &Client, name: &str, state: &str, error: &str) -> Value {
    eventually(&format!("the target becomes {state} {error}"), async || {
        let target = target(client, name).await;
        let is_error = target["lastError"]["type"].as_str().unwrap_or_default() == error;
        (target["state"] == state && is_error).then_some(target)
    })
    .await
}

/// An app with two accounts and the cluster, which it may use as the broker may.
async fn app_with_broker(pool: PgPool, variables: &[(&str, &str)]) -> (TestApp, Broker) {
    let app = TestApp::configured(pool, variables).await;
    let broker = Broker::new().await;
    app.register_cluster_with("dev", &broker.auth()).await;
    app.register_account("martin-5000", "registry.martin.com:5000", "martin", "xxx1").await;
    app.register_account("martin-6000", "registry.martin.com:6000", "martin", "xxx2").await;
    (app, broker)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_declaration_arrives_everywhere_and_a_rotation_follows(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let (one, two) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    service_account(&one, "default", &["other"]).await;
    service_account(&two, "default", &[]).await;
    let mut body = declaration(&["martin-5000", "martin-6000"], "dev", &[&one, &two]);
    body["serviceAccounts"] = json!(["default"]);

    let made = put(&admin, "team-a", &body).await;
    let shown = made.expect(201);
    assert_eq!(made.header("location"), "/v1/pull-secrets/team-a");
    assert_eq!((made.header("etag"), made.header("preference-applied")), ("\"1\"", "wait=30"));
    assert_holds(&shown, &body);
    assert_holds(&shown, &json!({"name": "team-a", "generation": 1, "observedGeneration": 1}));
    assert_holds(&shown["status"], &json!({"desired": 2, "synced": 2, "pending": 0, "failed": 0, "conflict": 0}));

    let mut uids = Vec::new();
    for namespace in [&one, &two] {
        let secret = kubernetes::secret(namespace, "team-a-pull").await;
        let (secret_type, documents) = kubernetes::meaning(&secret);
        assert_eq!(secret_type, Some("kubernetes.io/dockerconfigjson"));
        let auths = &documents[".dockerconfigjson"]["auths"];
        assert_eq!(auths["registry.martin.com:5000"]["password"], "xxx1");
        assert_eq!(auths["registry.martin.com:6000"]["auth"], "bWFydGluOnh4eDI=");
        let labels = secret.metadata.labels.expect("labels");
        assert_eq!(labels["app.kubernetes.io/managed-by"], "regcred");
        assert_eq!(labels["regcred.dev/pull-secret-id"], shown["id"].as_str().unwrap());
        uids.push(secret.metadata.uid);
    }
    assert_eq!(entries(&one, "default").await, ["other", "team-a-pull"]);
    assert_eq!(entries(&two, "default").await, ["team-a-pull"]);

    // The same declaration again changes nothing.
    let again = put(&admin, "team-a", &body).await;
    assert_holds(&again.expect(200), &json!({"version": 1, "generation": 1}));

    admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": "rotated"})).await.expect(200);
    let shown = settled(&admin, "team-a").await;
    assert_holds(&shown, &json!({"version": 1, "generation": 2, "observedGeneration": 2}));
    for (namespace, uid) in [&one, &two].into_iter().zip(uids) {
        let secret = kubernetes::secret(namespace, "team-a-pull").await;
        assert_eq!(secret.metadata.uid, uid, "the Secret survives a rotation");
        let (_, documents) = kubernetes::meaning(&secret);
        assert_eq!(documents[".dockerconfigjson"]["auths"]["registry.martin.com:5000"]["password"], "rotated");
        assert_eq!(documents[".dockerconfigjson"]["auths"]["registry.martin.com:6000"]["password"], "xxx2");
    }

    // What is no part of the document is no reason to write.
    let versions = async || {
        let secret = kubernetes::secret(&one, "team-a-pull").await;
        secret.metadata.resource_version
    };
    let before = versions().await;
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"labels": {"team": "b"}})).await.expect(200);
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": "rotated"})).await.expect(200);
    let shown = settled(&admin, "team-a").await;
    assert_holds(&shown, &json!({"generation": 3, "observedGeneration": 3}));
    assert_eq!(versions().await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn targets_are_shown_page_by_page_and_by_state(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let good = kubernetes::new_namespace().await;
    let body = declaration(&["martin-5000"], "dev", &["regcred-test-nobody-has-this", &good]);
    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 2, "synced": 1, "failed": 1}));
    assert_holds(&shown, &json!({"generation": 1, "observedGeneration": 0}));

    let failed = admin.get("/v1/pull-secrets/team-a/targets?state=failed").await.expect(200);
    assert_eq!(failed["items"].as_array().map(Vec::len), Some(1), "{failed}");
    let target = &failed["items"][0];
    assert_holds(
        target,
        &json!({"cluster": "dev", "namespace": "regcred-test-nobody-has-this", "state": "failed", "appliedGeneration": 0, "uid": null}),
    );
    assert_eq!(target["lastError"]["type"], "namespace-not-found");
    let synced = admin.get("/v1/pull-secrets/team-a/targets?state=synced").await.expect(200);
    let secret = kubernetes::secret(&good, "team-a-pull").await;
    assert_eq!(synced["items"][0]["uid"], json!(secret.metadata.uid));
    assert_eq!(synced["items"][0]["resourceVersion"], json!(secret.metadata.resource_version));

    let first = admin.get("/v1/pull-secrets/team-a/targets?limit=1").await.expect(200);
    let next = first["next"].as_str().expect("a next page");
    let second = admin.get(&format!("/v1/pull-secrets/team-a/targets?limit=1&cursor={next}")).await.expect(200);
    assert_eq!(second["next"], Value::Null);
    assert_ne!(first["items"][0]["namespace"], second["items"][0]["namespace"]);
    admin.get("/v1/pull-secrets/team-a/targets?state=broken").await.problem(422, "invalid-request");

    let listed = admin.get("/v1/pull-secrets").await.expect(200);
    assert_eq!(listed["items"][0]["name"], "team-a");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn namespaces_are_selected_by_their_labels(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let team = format!("t{}", uuid::Uuid::now_v7().simple());
    let (one, two) = (labelled_namespace(&[("team", &team)]).await, labelled_namespace(&[("team", &team)]).await);
    let other = labelled_namespace(&[("team", "other")]).await;
    let mut body = declaration(&["martin-5000"], "dev", &[]);
    body["targets"] = json!([{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": team}},
        "excludeNamespaces": [two]}]);
    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1}));
    assert!(shown["selections"][0]["comparedAt"].is_string() && shown["selections"][0]["lastError"].is_null());
    assert!(find_secret(&one, "team-a-pull").await.is_some());
    assert!(find_secret(&two, "team-a-pull").await.is_none() && find_secret(&other, "team-a-pull").await.is_none());

    // One more matches, one does not any more.
    label(&other, &[("team", Some(&team))]).await;
    label(&one, &[("team", None)]).await;
    sync(&admin, "team-a").await;
    eventually("the Secrets follow the labels", async || {
        let (moved, gone) = (find_secret(&other, "team-a-pull").await, find_secret(&one, "team-a-pull").await);
        (moved.is_some() && gone.is_none()).then_some(())
    })
    .await;
    assert_holds(&settled(&admin, "team-a").await["status"], &json!({"desired": 1, "synced": 1, "removing": 0}));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_somebody_edits_or_deletes_is_repaired_without_any_event(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[("REGCRED_PULL_SECRETS_RESYNC_SECONDS", "1")]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    service_account(&namespace, "builder", &[]).await;
    let mut body = declaration(&["martin-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["builder"]);
    put(&admin, "team-a", &body).await.expect(201);
    let uid = kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid;

    let edit = json!({"data": {".dockerconfigjson": ByteString(b"{\"auths\":{}}".to_vec())},
        "metadata": {"labels": {"regcred.dev/pull-secret-id": null, "mine": "too"}}});
    secret_patched(&namespace, "team-a-pull", edit).await;
    let secret = eventually("the edit is undone", async || {
        let secret = kubernetes::secret(&namespace, "team-a-pull").await;
        let labels = secret.metadata.labels.clone().unwrap_or_default();
        (kubernetes::document(&secret).contains("xxx1") && labels.contains_key("regcred.dev/pull-secret-id"))
            .then_some(secret)
    })
    .await;
    assert_eq!(secret.metadata.uid, uid);
    assert_eq!(secret.metadata.labels.expect("labels")["mine"], "too", "what is not ours stays");

    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
    secrets.delete("team-a-pull", &DeleteParams::default()).await.expect("deleted");
    let secret = eventually("it is made again", async || find_secret(&namespace, "team-a-pull").await).await;
    assert_ne!(secret.metadata.uid, uid);

    let accounts = Api::<ServiceAccount>::namespaced(kubernetes::admin(), &namespace);
    let patch = Patch::Merge(json!({"imagePullSecrets": [{"name": "mine"}]}));
    accounts.patch("builder", &PatchParams::default(), &patch).await.expect("patched");
    eventually("it is attached again", async || {
        (entries(&namespace, "builder").await == ["mine", "team-a-pull"]).then_some(())
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_changes_in_a_cluster_is_followed_at_once(pool: PgPool) {
    // Nothing is found by looking around.
    let never = [("REGCRED_PULL_SECRETS_RESYNC_SECONDS", "86400"), ("REGCRED_PULL_SECRETS_COMPARE_SECONDS", "86400")];
    let (app, broker) = app_with_broker(pool.clone(), &never).await;
    let mut rights = rules();
    rights.push(rule("secrets", &["list", "watch"]));
    broker.set_rules(rights).await;
    let admin = app.admin();
    let team = format!("t{}", uuid::Uuid::now_v7().simple());
    let mut body = declaration(&["martin-5000"], "dev", &[]);
    body["targets"] = json!([{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": team}}}]);
    put(&admin, "team-a", &body).await.expect(201);

    let namespace = labelled_namespace(&[("team", &team)]).await;
    let made = eventually("it is there", async || find_secret(&namespace, "team-a-pull").await).await;
    settled(&admin, "team-a").await;
    let edit = json!({"data": {".dockerconfigjson": ByteString(b"{\"auths\":{}}".to_vec())}});
    secret_patched(&namespace, "team-a-pull", edit).await;
    eventually("the edit is undone", async || {
        let secret = kubernetes::secret(&namespace, "team-a-pull").await;
        kubernetes::document(&secret).contains("xxx1").then_some(())
    })
    .await;
    settled(&admin, "team-a").await;
    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
    secrets.delete("team-a-pull", &DeleteParams::default()).await.expect("deleted");
    let again = eventually("it is made again", async || find_secret(&namespace, "team-a-pull").await).await;
    assert_ne!(again.metadata.uid, made.metadata.uid);

    settled(&admin, "team-a").await;
    label(&namespace, &[("team", None)]).await;
    eventually("it is taken away", async || find_secret(&namespace, "team-a-pull").await.is_none().then_some(())).await;
    let epochs: Vec<i64> =
        sqlx::query_scalar("SELECT epoch FROM cluster_watches").fetch_all(&pool).await.expect("rows");
    assert_eq!(epochs, [1], "it was watched all the time, and once");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn somebody_elses_secret_stays_until_it_shall_be_adopted(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let arguments = ["-n", &namespace, "create", "secret", "docker-registry", "team-a-pull"];
    let login = ["--docker-server=own.example.com", "--docker-username=me", "--docker-password=mine"];
    kubernetes::kubectl(&[&arguments[..], &login[..]].concat(), "");
    let before = kubernetes::secret(&namespace, "team-a-pull").await;

    let mut body = declaration(&["martin-5000"], "dev", &[&namespace]);
    let shown = put(&admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 1, "conflict": 1}));
    let conflict = target(&admin, "team-a").await;
    assert_eq!((&conflict["state"], &conflict["lastError"]["type"]), (&json!("conflict"), &json!("secret-exists")));
    assert_eq!(kubernetes::secret(&namespace, "team-a-pull").await, before);

    // A dry run says what adopting would do, and does not do it.
    body["adopt"] = json!(true);
    body["dryRun"] = json!(true);
    let preview = put(&admin, "team-a", &body).await.expect(200);
    assert_eq!(
        preview["targets"],
        json!([{"cluster": "dev", "namespace": namespace, "action": "adopt", "error": null}])
    );
    assert_eq!(kubernetes::secret(&namespace, "team-a-pull").await, before);

    body["dryRun"] = json!(false);
    let shown = put(&admin, "team-a", &body).await.expect(200);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1}));
    let adopted = kubernetes::secret(&namespace, "team-a-pull").await;
    assert_eq!((&adopted.metadata.uid, password(&adopted).as_str()), (&before.metadata.uid, "xxx1"));

    // Another pull secret of the same Secret does not take it, adopt or not.
    put(&admin, "team-b", &body).await.expect(201);
    let conflict = target(&admin, "team-b").await;
    assert_eq!(conflict["state"], "conflict", "{conflict}");
    // Nor does it remove it when it goes.
    admin.delete("/v1/pull-secrets/team-b").await;
    eventually("it is gone", async || (admin.get("/v1/pull-secrets/team-b").await.status == 404).then_some(())).await;
    assert_eq!(kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid, before.metadata.uid);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_cannot_be_changed_is_said_and_never_deleted(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let mut body = declaration(&["martin-5000"], "dev", &[&namespace]);
    put(&admin, "team-a", &body).await.expect(201);
    let uid = kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid;

    body["secret"]["type"] = json!("kubernetes.io/dockercfg");
    put(&admin, "team-a", &body).await.expect(200);
    let failed = target(&admin, "team-a").await;
    assert_eq!((&failed["state"], &failed["lastError"]["type"]), (&json!("failed"), &json!("secret-type-fixed")));
    body["secret"]["type"] = json!("kubernetes.io/dockerconfigjson");
    assert_holds(&put(&admin, "team-a", &body).await.expect(200)["status"], &json!({"synced": 1}));

    secret_patched(&namespace, "team-a-pull", json!({"immutable": true})).await;
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": "rotated"})).await.expect(200);
    target_becomes(&admin, "team-a", "failed", "secret-immutable").await;
    let secret = kubernetes::secret(&namespace, "team-a-pull").await;
    assert_eq!((secret.metadata.uid.clone(), password(&secret)), (uid, "xxx1".to_owned()));

    body["secret"]["name"] = json!("another");
    assert_eq!(put(&admin, "team-a", &body).await.fields(), ["secret.name"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn deletion_removes_or_leaves_as_it_was_declared(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let (one, two) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    service_account(&one, "default", &["other"]).await;
    service_account(&two, "default", &[]).await;
    let mut body = declaration(&["martin-5000"], "dev", &[&one, &two]);
    body["serviceAccounts"] = json!(["default"]);
    put(&admin, "team-a", &body).await.expect(201);

    // A namespace that is not declared any more loses it.
    body["targets"][0]["namespaces"] = json!([one]);
    let shown = put(&admin, "team-a", &body).await.expect(200);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1, "removing": 0}));
    assert!(find_secret(&two, "team-a-pull").await.is_none());
    assert_eq!(entries(&two, "default").await, [""; 0]);

    // What is used is not deleted.
    let used = admin.delete("/v1/registry-accounts/martin-5000").await.problem(409, "in-use");
    assert!(used["detail"].as_str().unwrap().contains("`pull-secrets/team-a`"), "{used}");
    admin.delete("/v1/clusters/dev").await.problem(409, "in-use");
    admin.delete("/v1/registry-accounts/martin-6000").await;

    let stale = admin.request("DELETE", "/v1/pull-secrets/team-a").header("if-match", "\"1\"");
    admin.send(stale).await.problem(412, "stale-version");
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("it is gone", async || (admin.get("/v1/pull-secrets/team-a").await.status == 404).then_some(())).await;
    assert!(find_secret(&one, "team-a-pull").await.is_none());
    assert_eq!(entries(&one, "default").await, ["other"]);

    body["deletionPolicy"] = json!("retain");
    put(&admin, "team-b", &body).await.expect(201);
    assert_eq!(admin.delete("/v1/pull-secrets/team-b").await.status, 202);
    admin.get("/v1/pull-secrets/team-b").await.problem(404, "not-found");
    assert_eq!(password(&kubernetes::secret(&one, "team-a-pull").await), "xxx1");
    assert_eq!(entries(&one, "default").await, ["other", "team-a-pull"]);
    assert_eq!(admin.delete("/v1/clusters/dev").await.status, 204);
    assert_eq!(admin.delete("/v1/registry-accounts/martin-5000").await.status, 204);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_service_account_that_does_not_exist_yet_is_waited_for(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let mut body = declaration(&["martin-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["builder"]);
    admin.send(admin.request("PUT", "/v1/pull-secrets/team-a").json(&body)).await.expect(201);
    let waiting = target_becomes(&admin, "team-a", "pending", "service-account-not-found").await;
    assert!(waiting["lastError"]["detail"].as_str().unwrap().contains("builder"), "{waiting}");
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "xxx1");
    service_account(&namespace, "builder", &[]).await;
    target_becomes(&admin, "team-a", "synced", "").await;
    assert_eq!(entries(&namespace, "builder").await, ["team-a-pull"]);

    body["serviceAccounts"] = json!([]);
    put(&admin, "team-a", &body).await.expect(200);
    assert_eq!(entries(&namespace, "builder").await, [""; 0]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_missing_right_is_named_and_a_lost_token_too(pool: PgPool) {
    let (app, broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    service_account(&namespace, "default", &[]).await;
    let mut body = declaration(&["martin-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["default"]);
    put(&admin, "team-a", &body).await.expect(201);

    let said = async |words: &str| {
        let target = target_becomes(&admin, "team-a", "failed", "cluster-forbidden").await;
        let detail = target["lastError"]["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(words), "{words:?} is not in {detail:?}");
        assert!(detail.contains(&namespace), "{detail}");
    };
    broker.set_rules(vec![rule("secrets", &["get"]), rule("serviceaccounts", &["get", "patch"])]).await;
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": "rotated-1"})).await.expect(200);
    said("may not patch Secrets").await;
    broker.set_rules(vec![rule("serviceaccounts", &["get", "patch"])]).await;
    sync(&admin, "team-a").await;
    eventually("the other right is named", async || {
        let target = target(&admin, "team-a").await;
        let detail = target["lastError"]["detail"].as_str().unwrap_or_default().to_owned();
        (detail.contains("Secrets in namespace")).then_some(())
    })
    .await;
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "xxx1", "the last good Secret stays");
    broker.set_rules(rules()).await;
    sync(&admin, "team-a").await;
    target_becomes(&admin, "team-a", "synced", "").await;
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "rotated-1");

    broker.set_rules(vec![rule("secrets", &["create", "get", "patch", "delete"])]).await;
    sync(&admin, "team-a").await;
    said("may not get ServiceAccounts").await;
    broker.set_rules(rules()).await;
    sync(&admin, "team-a").await;
    target_becomes(&admin, "team-a", "synced", "").await;

    // A token that is good no more, as one that has expired.
    broker.delete().await;
    eventually("the token is refused", async || {
        // The API server remembers for some seconds that it was good.
        sync(&admin, "team-a").await;
        let target = target(&admin, "team-a").await;
        (target["lastError"]["type"] == "cluster-unauthorized").then_some(())
    })
    .await;
    let fresh = Broker::new().await;
    admin.patch("/v1/clusters/dev", &json!({"auth": fresh.auth()})).await.expect(200);
    target_becomes(&admin, "team-a", "synced", "").await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_namespace_on_its_way_out_takes_nothing_new(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    // Nobody finalises it here, so it stays as it is.
    let namespaces = Api::<Namespace>::all(kubernetes::admin());
    namespaces.delete(&namespace, &DeleteParams::default()).await.expect("deleted");
    put(&admin, "team-a", &declaration(&["martin-5000"], "dev", &[&namespace])).await.expect(201);
    let failed = target(&admin, "team-a").await;
    assert_eq!((&failed["state"], &failed["lastError"]["type"]), (&json!("failed"), &json!("namespace-terminating")));
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("it is gone", async || (admin.get("/v1/pull-secrets/team-a").await.status == 404).then_some(())).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn accounts_selected_by_label_follow_and_a_document_is_whole_or_not_written(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let mut body = declaration(&[], "dev", &[&namespace]);
    body.as_object_mut().unwrap().remove("accounts");
    body["accountSelector"] = json!({"matchLabels": {"team": "a"}});
    put(&admin, "team-a", &body).await.expect(201);
    let failed = target(&admin, "team-a").await;
    assert_eq!(failed["lastError"]["type"], "accounts-unusable", "{failed}");

    let keys = async || {
        let secret = find_secret(&namespace, "team-a-pull").await?;
        let document: Value = serde_json::from_str(&kubernetes::document(&secret)).expect("JSON");
        Some(document["auths"].as_object().expect("auths").keys().cloned().collect::<Vec<_>>())
    };
    let becomes = async |expected: &[&str]| {
        let what = format!("the Secret has the keys {expected:?}");
        eventually(&what, async || (keys().await? == expected).then_some(())).await;
    };
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"labels": {"team": "a"}})).await.expect(200);
    becomes(&["registry.martin.com:5000"]).await;
    let new = json!({"name": "new", "registry": "new.example.com", "username": "n", "password": "p", "labels": {"team": "a"}});
    admin.post("/v1/registry-accounts", &new).await.expect(201);
    becomes(&["new.example.com", "registry.martin.com:5000"]).await;
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"labels": {"team": null}})).await.expect(200);
    becomes(&["new.example.com"]).await;
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"labels": {"team": "a"}})).await.expect(200);
    becomes(&["new.example.com", "registry.martin.com:5000"]).await;

    // Two accounts for one registry cannot be in one document: it stays whole as it was.
    let mut double = new.clone();
    double["name"] = json!("double");
    admin.post("/v1/registry-accounts", &double).await.expect(201);
    target_becomes(&admin, "team-a", "failed", "key-collision").await;
    becomes(&["new.example.com", "registry.martin.com:5000"]).await;
    assert_eq!(admin.delete("/v1/registry-accounts/double").await.status, 204);
    target_becomes(&admin, "team-a", "synced", "").await;

    // A row that cannot be read.
    sqlx::query("UPDATE registry_accounts SET password = '\\x00' WHERE name = 'new'")
        .execute(&pool)
        .await
        .expect("done");
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": "rotated"})).await.expect(200);
    target_becomes(&admin, "team-a", "failed", "stored-value-unreadable").await;
    becomes(&["new.example.com", "registry.martin.com:5000"]).await;
    admin.patch("/v1/registry-accounts/new", &json!({"password": "p2"})).await.expect(200);
    target_becomes(&admin, "team-a", "synced", "").await;

    // Without any account the last good one stays, too.
    assert_eq!(admin.delete("/v1/registry-accounts/new").await.status, 204);
    becomes(&["registry.martin.com:5000"]).await;
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"labels": {"team": null}})).await.expect(200);
    target_becomes(&admin, "team-a", "failed", "accounts-unusable").await;
    becomes(&["registry.martin.com:5000"]).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_dry_run_says_what_would_change_and_changes_nothing(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let [kept, lost, new] =
        [kubernetes::new_namespace().await, kubernetes::new_namespace().await, kubernetes::new_namespace().await];
    put(&admin, "team-a", &declaration(&["martin-5000"], "dev", &[&kept, &lost])).await.expect(201);

    let actions = async |body: &Value| {
        let mut body = body.clone();
        body["dryRun"] = json!(true);
        let preview = put(&admin, "team-a", &body).await.expect(200);
        let targets = preview["targets"].as_array().expect("targets").clone();
        let actions = targets.into_iter().map(|target| {
            (target["namespace"].as_str().unwrap().to_owned(), target["action"].as_str().unwrap().to_owned())
        });
        actions.collect::<BTreeMap<_, _>>()
    };
    let expected = |pairs: &[(&String, &str)]| {
        pairs.iter().map(|(namespace, action)| ((*namespace).clone(), (*action).to_owned())).collect::<BTreeMap<_, _>>()
    };
    let body = declaration(&["martin-5000"], "dev", &[&kept, &new]);
    assert_eq!(actions(&body).await, expected(&[(&kept, "unchanged"), (&lost, "remove"), (&new, "create")]));
    let mut body = declaration(&["martin-6000"], "dev", &[&kept]);
    body["deletionPolicy"] = json!("retain");
    assert_eq!(actions(&body).await, expected(&[(&kept, "update"), (&lost, "forget")]));
    assert_holds(&admin.get("/v1/pull-secrets/team-a").await.expect(200), &json!({"version": 1}));
    assert!(find_secret(&new, "team-a-pull").await.is_none());

    body["accounts"] = json!(["nobody"]);
    body["dryRun"] = json!(true);
    assert_eq!(put(&admin, "team-a", &body).await.fields(), ["accounts[0]"]);
    let fresh = admin.request("PUT", "/v1/pull-secrets/fresh").header("if-match", "\"1\"").json(&body);
    assert_eq!(admin.send(fresh).await.status, 422);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn lost_updates_are_refused(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let body = declaration(&["martin-5000"], "dev", &[&namespace]);
    let put_at = async |version: &str, accounts: &[&str]| {
        let mut body = body.clone();
        body["accounts"] = json!(accounts);
        admin.send(admin.request("PUT", "/v1/pull-secrets/team-a").header("if-match", version).json(&body)).await
    };
    put_at("\"1\"", &["martin-5000"]).await.problem(412, "stale-version");
    put(&admin, "team-a", &body).await.expect(201);
    assert_eq!(put_at("\"1\"", &["martin-6000"]).await.header("etag"), "\"2\"");
    put_at("\"1\"", &["martin-5000"]).await.problem(412, "stale-version");
    assert_holds(&admin.get("/v1/pull-secrets/team-a").await.expect(200), &json!({"accounts": ["martin-6000"]}));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn grants_bound_what_is_declared_and_seen(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let grants = json!({"accounts": ["martin-5*", {"matchLabels": {"team": "a"}}], "clusters": ["dev"], "namespaces": [namespace]});
    let operator = app.caller("op", "operator", Some(grants)).await;
    let body = declaration(&["martin-5000"], "dev", &[&namespace]);

    let refused = async |change: &dyn Fn(&mut Value), field: &str| {
        let mut body = body.clone();
        change(&mut body);
        let answer = put(&operator, "team-a", &body).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), [field]);
    };
    refused(&|body| body["accounts"] = json!(["martin-5000", "martin-6000"]), "accounts[1]").await;
    refused(&|body| body["targets"][0]["cluster"] = json!("prod"), "targets[0].cluster").await;
    refused(&|body| body["targets"][0]["namespaces"] = json!(["kube-system"]), "targets[0].namespaces[0]").await;
    let by_label = json!([{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}}]);
    refused(&|body| body["targets"] = by_label.clone(), "targets[0].namespaceSelector").await;
    let select = |labels: Value| {
        move |body: &mut Value| {
            body.as_object_mut().unwrap().remove("accounts");
            body["accountSelector"] = json!({"matchLabels": labels});
        }
    };
    refused(&select(json!({"tier": "x"})), "accountSelector").await;

    put(&operator, "team-a", &body).await.expect(201);
    let mut selected = body.clone();
    select(json!({"team": "a", "tier": "x"}))(&mut selected);
    put(&operator, "team-s", &selected).await.expect(201);

    // What names anything beyond is not there for him; of what it uses he learns that somebody uses it.
    put(&admin, "wide", &declaration(&["martin-5000", "martin-6000"], "dev", &[&namespace])).await.expect(201);
    operator.get("/v1/pull-secrets/wide").await.problem(404, "not-found");
    operator.get("/v1/pull-secrets/wide/targets").await.problem(404, "not-found");
    put(&operator, "wide", &body).await.problem(409, "name-taken");
    let listed = operator.get("/v1/pull-secrets?limit=2").await.expect(200);
    let names: Vec<&str> =
        listed["items"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["team-a", "team-s"]);
    let used = operator.delete("/v1/registry-accounts/martin-5000").await.problem(409, "in-use");
    let detail = used["detail"].as_str().unwrap();
    assert!(detail.contains("`pull-secrets/team-a` and 1 more") && !detail.contains("wide"), "{detail}");

    let deliverer =
        app.caller("ci", "deliverer", Some(json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]}))).await;
    deliverer.get("/v1/pull-secrets/wide").await.expect(200);
    put(&deliverer, "mine", &body).await.problem(403, "forbidden");
    let renderer = app.caller("r", "renderer", Some(json!({"accounts": ["*"]}))).await;
    renderer.get("/v1/pull-secrets").await.problem(403, "forbidden");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn of_rotations_at_once_the_newest_wins_everywhere(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let mut namespaces = Vec::new();
    for _ in 0..20 {
        namespaces.push(kubernetes::new_namespace().await);
    }
    let names: Vec<&str> = namespaces.iter().map(String::as_str).collect();
    put(&admin, "team-a", &declaration(&["martin-5000"], "dev", &names)).await.expect(201);
    for round in 0..5 {
        let rotate = async |name: &'static str| {
            let patch = json!({"password": format!("{name}-{round}")});
            admin.patch("/v1/registry-accounts/martin-5000", &patch).await.expect(200)["version"].as_i64().unwrap()
        };
        // In both orders, and while the one before is still on its way.
        let (one, two) = if round % 2 == 0 {
            futures_util::join!(rotate("one"), rotate("two"))
        } else {
            let (two, one) = futures_util::join!(rotate("two"), rotate("one"));
            (one, two)
        };
        let newest = if one > two { format!("one-{round}") } else { format!("two-{round}") };
        let shown = settled(&admin, "team-a").await;
        assert_holds(&shown["status"], &json!({"desired": 20, "synced": 20}));
        for namespace in &namespaces {
            assert_eq!(password(&kubernetes::secret(namespace, "team-a-pull").await), newest);
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_database_that_is_older_than_the_cluster_catches_up(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    put(&admin, "team-a", &declaration(&["martin-5000"], "dev", &[&namespace])).await.expect(201);
    for password in ["two", "three"] {
        admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": password})).await.expect(200);
        settled(&admin, "team-a").await;
    }
    // As after a restore of a backup.
    let restore = "UPDATE pull_secret_targets SET generation = 1, applied_generation = 1, resource_version = '1', content_mac = '\\x00'";
    sqlx::query(restore).execute(&pool).await.expect("done");
    sqlx::query("UPDATE pull_secrets SET generation = 1").execute(&pool).await.expect("done");
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": "restored"})).await.expect(200);
    eventually("the Secret has what the database says", async || {
        (password(&kubernetes::secret(&namespace, "team-a-pull").await) == "restored").then_some(())
    })
    .await;
    settled(&admin, "team-a").await;
    target_becomes(&admin, "team-a", "synced", "").await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_import_is_one_change_however_many_accounts_it_rotates(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let import = async |password: &str| {
        let login = json!({"username": "martin", "password": password});
        let document = json!({"auths": {"registry.martin.com:7000": login, "registry.martin.com:8000": login}});
        let request = admin.request("POST", "/v1/registry-accounts:import");
        let answer = admin.send(request.header("Content-Type", "application/json").body(document.to_string())).await;
        answer.expect(200)["items"].clone()
    };
    let items = import("first").await;
    let names = [0, 1].map(|item| items[item]["name"].as_str().expect("a name").to_owned());
    put(&admin, "team-a", &declaration(&names.each_ref().map(String::as_str), "dev", &[&namespace])).await.expect(201);

    let items = import("second").await;

    assert_eq!([&items[0]["outcome"], &items[1]["outcome"]], ["updated", "updated"]);
    let shown = settled(&admin, "team-a").await;
    assert_holds(&shown, &json!({"generation": 2, "observedGeneration": 2}));
    let secret = kubernetes::secret(&namespace, "team-a-pull").await;
    let (_, documents) = kubernetes::meaning(&secret);
    for port in [7000, 8000] {
        let auth = &documents[".dockerconfigjson"]["auths"][format!("registry.martin.com:{port}")];
        assert_eq!(auth["password"], "second");
    }
    // The same logins again are no change.
    import("second").await;
    assert_eq!(settled(&admin, "team-a").await["generation"], 2);
}

/// Whoever may edit a Secret in his namespace may write any generation on it.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_generation_that_somebody_made_up_keeps_nobody_from_rotating(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let (theirs, ours) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    let body = declaration(&["martin-5000"], "dev", &[&theirs, &ours]);
    put(&admin, "team-a", &body).await.expect(201);
    let numbers = ["9223372036854775806", "9223372036854775807", "-9223372036854775808", "none"];
    for number in numbers {
        let edit = json!({"metadata": {"annotations": {GENERATION_ANNOTATION: number}}});
        secret_patched(&theirs, "team-a-pull", edit).await;
        sync(&admin, "team-a").await;
        let password_now = format!("after{number}");
        admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": password_now})).await.expect(200);
        let shown = settled(&admin, "team-a").await;
        assert_holds(&shown["status"], &json!({"synced": 2}));
        for namespace in [&theirs, &ours] {
            assert_eq!(password(&kubernetes::secret(namespace, "team-a-pull").await), password_now);
        }
    }
    assert_eq!(settled(&admin, "team-a").await["generation"], 1 + numbers.len());
    put(&admin, "team-a", &declaration(&["martin-6000"], "dev", &[&theirs, &ours])).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_sync_that_is_waited_for_is_over_when_everything_was_looked_at(pool: PgPool) {
    // It may not watch Secrets.
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    put(&admin, "team-a", &declaration(&["martin-5000"], "dev", &[&namespace])).await.expect(201);
    for _ in 0..3 {
        let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
        secrets.delete("team-a-pull", &DeleteParams::default()).await.expect("deleted");
        let shown = sync(&admin, "team-a").await;
        assert_holds(&shown["status"], &json!({"synced": 1, "pending": 0}));
        assert!(find_secret(&namespace, "team-a-pull").await.is_some(), "{shown}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn what_was_written_is_known_where_it_could_not_be_attached(pool: PgPool) {
    let (app, broker) = app_with_broker(pool, &[]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    for name in ["default", "builder"] {
        service_account(&namespace, name, &[]).await;
    }
    let only =
        PolicyRule { resource_names: Some(vec!["default".to_owned()]), ..rule("serviceaccounts", &["get", "patch"]) };
    broker.set_rules(vec![rule("secrets", &["create", "get", "patch", "delete"]), only]).await;
    let mut body = declaration(&["martin-5000"], "dev", &[&namespace]);
    body["serviceAccounts"] = json!(["default", "builder"]);
    put(&admin, "team-a", &body).await.expect(201);

    let target = target_becomes(&admin, "team-a", "failed", "cluster-forbidden").await;

    let uid = kubernetes::secret(&namespace, "team-a-pull").await.metadata.uid;
    assert_eq!((&target["appliedGeneration"], target["uid"].as_str()), (&json!(1), uid.as_deref()), "{target}");
    assert_eq!(entries(&namespace, "default").await, ["team-a-pull"]);
    admin.patch("/v1/registry-accounts/martin-5000", &json!({"password": "rotated"})).await.expect(200);
    eventually("the Secret follows all the same", async || {
        (password(&kubernetes::secret(&namespace, "team-a-pull").await) == "rotated").then_some(())
    })
    .await;
    // What it was attached to is known, too.
    broker.set_rules(rules()).await;
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("it is detached", async || entries(&namespace, "default").await.is_empty().then_some(())).await;
}
