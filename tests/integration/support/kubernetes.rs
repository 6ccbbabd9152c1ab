//! Direct access to the API servers of `dev/with-services`, bypassing the code under test.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};

use k8s_openapi::{
    api::core::v1::{Namespace, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Config,
    api::{ListParams, PostParams},
};
use regcred::domain::cluster::CaCertificate;
use serde_json::{Value, json};

use super::{eventually, given};

/// A cluster of `dev/with-services`. The clusters share neither credentials nor objects.
#[derive(Debug, Clone, Copy)]
pub struct Cluster(&'static str);

/// Cluster that the functions of this module use.
pub const FIRST: Cluster = Cluster("REGCRED_TEST_KUBE");
/// Second cluster.
pub const SECOND: Cluster = Cluster("REGCRED_TEST_KUBE2");

impl Cluster {
    /// Reads a variable that `dev/with-services` exports for this cluster.
    pub fn given(self, name: &str) -> String {
        given(&format!("{}_{name}", self.0))
    }

    /// URL of the API server.
    pub fn server(self) -> String {
        self.given("SERVER")
    }

    /// Path of one of the cluster's files.
    pub fn path(self, name: &str) -> PathBuf {
        PathBuf::from(self.given("DIR")).join(name)
    }

    /// Content of one of the cluster's files.
    pub fn file(self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("the cluster's files are there")
    }

    /// Request body that registers this cluster under `name`.
    pub fn registration(self, name: &str, auth: &Value) -> Value {
        json!({"name": name, "server": self.server(), "caCertificate": self.file("ca.crt"), "auth": auth})
    }

    /// A `kube` client with administrator rights.
    pub fn admin(self) -> Client {
        let ca = CaCertificate::parse(&self.file("ca.crt")).expect("a CA");
        let mut config = Config::new(self.server().parse().expect("a URL"));
        config.root_cert = Some(ca.as_der().map(<[u8]>::to_vec).collect());
        config.auth_info.token = Some(self.given("ADMIN_TOKEN").into());
        Client::try_from(config).expect("a client")
    }

    /// Creates a namespace for one test. All tests share the API server.
    pub async fn new_namespace(self) -> String {
        let metadata = ObjectMeta { generate_name: Some("regcred-test-".to_owned()), ..ObjectMeta::default() };
        let namespaces: Api<Namespace> = Api::all(self.admin());
        let created = namespaces.create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() }).await;
        created.expect("a namespace").metadata.name.expect("a name")
    }

    /// Runs kubectl as administrator of this cluster and returns its output.
    #[track_caller]
    pub fn kubectl(self, arguments: &[&str], input: &str) -> String {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(self.path("kubeconfig")).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl is on PATH");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(input.as_bytes()).expect("kubectl reads");
        drop(stdin);
        let output = child.wait_with_output().expect("kubectl ends");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments:?}: {errors}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Requests of a user for the Secrets of a namespace, from the API server's audit log: verb and
    /// name, in the order of completion. A name is empty for lists.
    pub async fn requests_of(self, user: &str, namespace: &str) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let events = self.requests(namespace).await.into_iter();
        events
            .filter(|event| event["user"]["username"] == user)
            .map(|event| (text(&event["verb"]), text(&event["objectRef"]["name"])))
            .collect()
    }

    /// Returns this Secret, which must exist.
    pub async fn secret(self, namespace: &str, name: &str) -> Secret {
        Api::<Secret>::namespaced(self.admin(), namespace).get(name).await.expect("the Secret is there")
    }

    /// Requests of regcred for the Secrets of a namespace, from the API server's audit log.
    ///
    /// The log is complete up to a marker request that this function sends.
    async fn requests(self, namespace: &str) -> Vec<Value> {
        let marker = uuid::Uuid::now_v7().to_string();
        let found = Api::<Secret>::namespaced(self.admin(), namespace).get_opt(&marker).await;
        assert!(found.expect("an answer").is_none());
        let log = eventually("the audit log contains the marker request", async || {
            let log = fs::read_to_string(self.given("AUDIT_LOG")).expect("an audit log");
            log.contains(&marker).then_some(log)
        });
        let log = log.await;
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let ours = events.filter(|event| {
            let object = &event["objectRef"];
            let is_ours = event["userAgent"].as_str().is_some_and(|agent| agent.starts_with("regcred/"));
            is_ours && object["resource"] == "secrets" && object["namespace"] == namespace
        });
        ours.collect()
    }

    /// Writes by regcred to Secrets of a namespace, from the API server's audit log: verb, user and
    /// status, in the order of completion.
    pub async fn writes(self, namespace: &str) -> Vec<(String, String, u64)> {
        let requests = self.requests(namespace).await.into_iter();
        let is_write =
            |event: &Value| ["create", "patch", "update", "delete"].iter().any(|verb| event["verb"] == *verb);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let writes = requests.filter(is_write).map(|event| {
            let status = event["responseStatus"]["code"].as_u64().unwrap_or_default();
            (text(&event["verb"]), text(&event["user"]["username"]), status)
        });
        writes.collect()
    }
}

/// URL of the API server.
pub fn server() -> String {
    FIRST.server()
}

/// Path of one of the cluster's files.
pub fn path(name: &str) -> PathBuf {
    FIRST.path(name)
}

/// Content of one of the cluster's files.
pub fn file(name: &str) -> String {
    FIRST.file(name)
}

/// A `kube` client with administrator rights.
pub fn admin() -> Client {
    FIRST.admin()
}

/// Creates a namespace for one test. All tests share the API server.
pub async fn new_namespace() -> String {
    FIRST.new_namespace().await
}

/// Returns this Secret, which must exist.
pub async fn secret(namespace: &str, name: &str) -> Secret {
    FIRST.secret(namespace, name).await
}

/// Names of all Secrets in a namespace.
pub async fn secret_names(namespace: &str) -> Vec<String> {
    let secrets = Api::<Secret>::namespaced(admin(), namespace).list(&ListParams::default()).await.expect("a list");
    secrets.items.into_iter().filter_map(|secret| secret.metadata.name).collect()
}

/// Content of a Secret for comparisons: its type, and its documents as JSON by data key.
pub fn meaning(secret: &Secret) -> (Option<&str>, BTreeMap<&str, Value>) {
    let data = secret.data.iter().flatten();
    let documents = data.map(|(key, value)| (key.as_str(), serde_json::from_slice(&value.0).expect("JSON")));
    (secret.type_.as_deref(), documents.collect())
}

/// Text of the docker config in a Secret of either type.
pub fn document(secret: &Secret) -> String {
    let data = secret.data.as_ref().expect("data");
    let document = data.get(".dockerconfigjson").or(data.get(".dockercfg")).expect("a docker config");
    String::from_utf8(document.0.clone()).expect("UTF-8")
}

/// Runs kubectl as administrator and returns its output.
#[track_caller]
pub fn kubectl(arguments: &[&str], input: &str) -> String {
    FIRST.kubectl(arguments, input)
}
