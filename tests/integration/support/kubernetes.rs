//! The Kubernetes API server of `dev/with-services`, looked at past the code under test.

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
use serde_json::Value;

use super::given;

/// URL of the API server.
pub fn server() -> String {
    given("REGCRED_TEST_KUBE_SERVER")
}

/// Path of one of the cluster's files.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from(given("REGCRED_TEST_KUBE_DIR")).join(name)
}

/// Content of one of the cluster's files.
pub fn file(name: &str) -> String {
    fs::read_to_string(path(name)).expect("the cluster's files are there")
}

/// kube's own client, as administrator.
pub fn admin() -> Client {
    let ca = CaCertificate::parse(&file("ca.crt")).expect("a CA");
    let mut config = Config::new(server().parse().expect("a URL"));
    config.root_cert = Some(ca.as_der().map(<[u8]>::to_vec).collect());
    config.auth_info.token = Some(given("REGCRED_TEST_KUBE_ADMIN_TOKEN").into());
    Client::try_from(config).expect("a client")
}

/// Makes a namespace for one test: the API server is shared by all of them.
pub async fn new_namespace() -> String {
    let metadata = ObjectMeta { generate_name: Some("regcred-test-".to_owned()), ..ObjectMeta::default() };
    let namespaces: Api<Namespace> = Api::all(admin());
    let created = namespaces.create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() }).await;
    created.expect("a namespace").metadata.name.expect("a name")
}

/// The Secret of this name, which must be there.
pub async fn secret(namespace: &str, name: &str) -> Secret {
    Api::<Secret>::namespaced(admin(), namespace).get(name).await.expect("the Secret is there")
}

/// Names of all Secrets in a namespace.
pub async fn secret_names(namespace: &str) -> Vec<String> {
    let secrets = Api::<Secret>::namespaced(admin(), namespace).list(&ListParams::default()).await.expect("a list");
    secrets.items.into_iter().filter_map(|secret| secret.metadata.name).collect()
}

/// What a Secret means: its type, and its documents as JSON under their keys.
pub fn meaning(secret: &Secret) -> (Option<&str>, BTreeMap<&str, Value>) {
    let data = secret.data.iter().flatten();
    let documents = data.map(|(key, value)| (key.as_str(), serde_json::from_slice(&value.0).expect("JSON")));
    (secret.type_.as_deref(), documents.collect())
}

/// The docker config in a Secret of either type, as text.
pub fn document(secret: &Secret) -> String {
    let data = secret.data.as_ref().expect("data");
    let document = data.get(".dockerconfigjson").or(data.get(".dockercfg")).expect("a docker config");
    String::from_utf8(document.0.clone()).expect("UTF-8")
}

/// Runs kubectl as administrator; what it printed.
#[track_caller]
pub fn kubectl(arguments: &[&str], input: &str) -> String {
    let mut command = Command::new("kubectl");
    command.arg("--kubeconfig").arg(path("kubeconfig")).args(arguments);
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
