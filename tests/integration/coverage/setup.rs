//! Objects of the tests.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    broker,
    client::Client,
    eventually,
    kubernetes::{Cluster, SECOND},
    registry::{self, Registry},
};

/// An app with the second cluster as `prod`, and the registries.
pub struct Survey {
    pub app: TestApp,
    pub admin: Client,
    pub a: Registry,
    pub b: Registry,
}

impl Survey {
    pub async fn new(pool: PgPool) -> Self {
        let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8,::1/128")]).await;
        let admin = app.admin();
        admin.post("/v1/clusters", &registration()).await.expect(201);
        Self { admin, app, a: registry::a(), b: registry::b() }
    }

    /// Gives regcred a `ServiceAccount` of its own in `prod`, and returns its user name.
    pub async fn use_own_user(&self) -> String {
        let (namespace, name) = (SECOND.new_namespace().await, "broker");
        let admin = SECOND.admin();
        let token = broker::create_service_account(&admin, &namespace, name, 3600).await.expect("a token");
        let user = format!("system:serviceaccount:{namespace}:{name}");
        let binding = format!("{namespace}-broker");
        let bind = ["create", "clusterrolebinding", &binding, "--clusterrole=cluster-admin"];
        SECOND.kubectl(&[&bind[..], &[&format!("--serviceaccount={namespace}:{name}")]].concat(), "");
        let auth = json!({"auth": {"type": "token", "token": token}});
        self.admin.patch("/v1/clusters/prod", &auth).await.expect(200);
        user
    }

    /// Runs a coverage of `prod`, which must succeed.
    pub async fn run(&self) -> Value {
        run(&self.admin, "prod").await
    }

    /// Groups of a namespace, in all pages.
    pub async fn groups(&self, namespace: &str) -> Vec<Value> {
        items(&self.admin, &format!("/v1/clusters/prod/coverage/groups?namespace={namespace}")).await
    }

    /// Pull secrets of a namespace.
    pub async fn secrets(&self, namespace: &str) -> Vec<Value> {
        items(&self.admin, &format!("/v1/clusters/prod/coverage/secrets?namespace={namespace}")).await
    }
}

/// Registration of the second cluster with its administrator's token.
pub fn registration() -> Value {
    SECOND.registration("prod", &json!({"type": "token", "token": SECOND.given("ADMIN_TOKEN")}))
}

/// Requests a run and waits for its end.
pub async fn run(client: &Client, cluster: &str) -> Value {
    let path = format!("/v1/clusters/{cluster}/coverage");
    let requested = client.send(client.request("POST", &path).header("Prefer", "wait=1")).await.expect(202);
    let id = requested["run"]["id"].clone();
    let ended = eventually("the run has ended", async || {
        let shown = client.send(client.request("GET", &path).header("Prefer", "wait=10")).await.expect(200);
        assert_eq!(shown["run"]["id"], id, "{shown:#}");
        shown["run"]["finishedAt"].is_string().then_some(shown)
    })
    .await;
    assert_eq!(ended["run"]["state"], "succeeded", "{ended:#}");
    ended
}

/// Items of a list, page by page.
pub async fn items(client: &Client, path: &str) -> Vec<Value> {
    let (mut items, mut cursor) = (Vec::new(), String::new());
    let separator = if path.contains('?') { '&' } else { '?' };
    loop {
        let page = client.get(&format!("{path}{separator}limit=2{cursor}")).await.expect(200);
        items.extend(page["items"].as_array().expect("items").iter().cloned());
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return items,
        }
    }
}

/// Creates a namespace of a cluster with a `ServiceAccount` `default` that lists these pull secrets,
/// and objects.
pub async fn namespace_in(cluster: Cluster, pull_secrets: &[&str], mut objects: Vec<Value>) -> String {
    let namespace = cluster.new_namespace().await;
    let names: Vec<Value> = pull_secrets.iter().map(|name| json!({"name": name})).collect();
    objects.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"},
        "imagePullSecrets": names}));
    apply(cluster, &namespace, &objects);
    namespace
}

pub fn apply(cluster: Cluster, namespace: &str, objects: &[Value]) {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    cluster.kubectl(&["apply", "-n", namespace, "-f", "-"], &list.to_string());
}

/// The same object with another name.
pub fn named(mut object: Value, name: &str) -> Value {
    object["metadata"]["name"] = json!(name);
    object
}

/// The group of a repository.
pub fn group<'a>(groups: &'a [Value], repository: &str, pull_secrets: &[&str]) -> &'a Value {
    let is_it = |group: &&Value| group["repository"] == repository && group["pullSecrets"] == json!(pull_secrets);
    groups.iter().find(is_it).unwrap_or_else(|| panic!("no group {repository} {pull_secrets:?} in {groups:#?}"))
}
