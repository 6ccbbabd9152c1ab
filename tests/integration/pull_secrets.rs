//! Pull secrets with a real API server, under a `ServiceAccount` with exactly the required rules.

use std::collections::BTreeMap;

use k8s_openapi::api::{
    core::v1::{LocalObjectReference, Namespace, Secret, ServiceAccount},
    rbac::v1::PolicyRule,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use regcred::{
    clients::cluster::{ClusterClient, ClusterClientConfig},
    domain::cluster::{ClusterAuth, ClusterConnection},
};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    broker::{self, named, rule},
    client::{Answer, Client},
    eventually,
    kubernetes::{self, Cluster},
};

mod attachment;
mod audit;
mod changes;
mod counts;
mod events;
mod faults;
mod fencing;
mod lifecycle;
mod listing;
mod ownership;
mod queue;
mod rbac;
mod repair;
mod selection;
mod unavailable;
mod watches;

/// Rules as `regcred cluster rbac` prints them for the declarations of these tests.
fn rules() -> Vec<PolicyRule> {
    let of = |resource, verbs: &[&str], names: &[&str]| PolicyRule {
        resource_names: Some(names.iter().map(|name| (*name).to_owned()).collect()),
        ..rule(resource, verbs)
    };
    vec![
        rule("secrets", &["create"]),
        of("secrets", &["get", "patch", "delete"], &["team-a-pull", "another", "second"]),
        of("serviceaccounts", &["get", "patch"], &["default", "builder"]),
        rule("namespaces", &["list", "watch"]),
    ]
}

/// `ServiceAccount` with a `ClusterRole` of [`rules`].
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
        broker::grant(&cluster.admin(), &broker.namespace, &broker.name, rules()).await.expect("granted");
        broker
    }

    /// Creates one without a role.
    pub async fn without_rights() -> Self {
        Self::without_rights_in(kubernetes::FIRST).await
    }

    async fn without_rights_in(cluster: Cluster) -> Self {
        let namespace = cluster.new_namespace().await;
        let name = format!("{namespace}-broker");
        let created = broker::create_service_account(&cluster.admin(), &namespace, &name, 3600).await;
        Self { cluster, name, namespace, token: created.expect("a token") }
    }

    /// Replaces its rules.
    pub async fn set_rules(&self, rules: Vec<PolicyRule>) {
        broker::set_rules(&self.cluster.admin(), &self.name, &rules).await.expect("patched");
    }

    /// Deletes it, which revokes its token.
    pub async fn delete(&self) {
        let accounts = Api::<ServiceAccount>::namespaced(self.cluster.admin(), &self.namespace);
        accounts.delete(&self.name, &DeleteParams::default()).await.expect("deleted");
    }

    pub fn auth(&self) -> Value {
        json!({"type": "token", "token": self.token})
    }

    /// Client with its token, as regcred uses it.
    fn client(&self) -> ClusterClient {
        let (server, ca) = (self.cluster.server(), self.cluster.file("ca.crt"));
        let auth = ClusterAuth::Token { token: self.token.clone().into() };
        let connection = ClusterConnection::new(Some(&server), Some(&ca), None, auth, false).expect("a connection");
        ClusterClient::connect(&connection, &ClusterClientConfig::default()).expect("a client")
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

/// Returns the password of the only registry in a Secret.
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

/// Returns the pull secret once it is settled.
pub async fn settled(client: &Client, name: &str) -> Value {
    let request = client.request("GET", &format!("/v1/pull-secrets/{name}")).header("prefer", "wait=30");
    client.send(request).await.expect(200)
}

/// Returns the only target of a pull secret.
async fn target(client: &Client, name: &str) -> Value {
    let targets = client.get(&format!("/v1/pull-secrets/{name}/targets")).await.expect(200);
    let items = targets["items"].as_array().expect("items");
    assert_eq!(items.len(), 1, "{targets}");
    items[0].clone()
}

/// Waits until the only target of a pull secret has this state and error.
async fn target_becomes(client: &Client, name: &str, state: &str, error: &str) -> Value {
    eventually(&format!("the target becomes {state} {error}"), async || {
        let target = target(client, name).await;
        let is_error = target["lastError"]["type"].as_str().unwrap_or_default() == error;
        (target["state"] == state && is_error).then_some(target)
    })
    .await
}

/// Starts an app with two accounts and a cluster, registered with the broker's token.
async fn app_with_broker(pool: PgPool, variables: &[(&str, &str)]) -> (TestApp, Broker) {
    let app = TestApp::configured(pool, variables).await;
    let broker = Broker::new().await;
    app.register_cluster_with("dev", &broker.auth()).await;
    app.register_account("account-5000", "registry.example.com:5000", "dev-user", "xxx1").await;
    app.register_account("account-6000", "registry.example.com:6000", "dev-user", "xxx2").await;
    (app, broker)
}
