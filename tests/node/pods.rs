//! Pods on a real node, and what the kubelet does for them.

use std::{fs, io::Write, process::Command, thread, time::Duration};

use k8s_openapi::api::core::v1::{ContainerStatus, Event, Node, Pod};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use parking_lot::Mutex;
use regcred::domain::{
    docker_config::parse::Config,
    matching::{ImageName, explain_config},
};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    eventually,
    files::TempDir,
    given, kubernetes,
    process::Process,
    registry::{self, Registry},
};

/// Result of the first pull of a container's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pull {
    /// The container is running.
    Running,
    /// The registry answered 401: to every login that the kubelet has for the image, or to none.
    Refused,
    /// The kubelet cannot read a Secret of the pod, so it asked no registry.
    Unreadable,
}

impl Pull {
    /// Reads the message of containerd or the kubelet, as the kubelet reports it. Other failures prove
    /// nothing.
    fn of_failure(message: &str) -> Self {
        if message.contains("illegal base64 data") {
            return Self::Unreadable;
        }
        assert!(message.contains("401 Unauthorized"), "the pull failed for another reason: {message}");
        Self::Refused
    }
}

/// A regcred with the cluster `dev` and the accounts `a` and `b` of both registries, and a
/// namespace.
pub struct Setup {
    pub app: TestApp,
    pub namespace: String,
    pub a: Registry,
}

impl Setup {
    pub async fn new(pool: PgPool) -> Self {
        // A diagnosis asks the registries of the machine.
        let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8,::1/128")]).await;
        app.register_cluster("dev").await;
        let (a, _) = app.register_registries().await;
        Self { app, namespace: kubernetes::new_namespace().await, a }
    }

    /// Creates a Secret through direct delivery.
    pub async fn deliver(&self, name: &str, accounts: &[&str]) {
        let path = format!("/v1/clusters/dev/namespaces/{}/secrets", self.namespace);
        self.app.admin().post(&path, &json!({"name": name, "accounts": accounts})).await.expect(201);
    }

    /// Declares a pull secret and waits until its Secret is in the namespace.
    pub async fn declare(&self, name: &str, accounts: &[&str]) {
        let body = json!({
            "accounts": accounts, "secret": {"name": name, "type": "kubernetes.io/dockerconfigjson"},
            "targets": [{"cluster": "dev", "namespaces": [self.namespace]}],
            "serviceAccounts": [], "deletionPolicy": "delete", "adopt": false,
        });
        let path = format!("/v1/pull-secrets/{}", name.replace('.', "-"));
        let request = self.app.admin().request("PUT", &path).header("prefer", "wait=30").json(&body);
        let declared = self.app.admin().send(request).await.expect(201);
        assert_eq!(declared["status"]["synced"], 1, "{declared}");
    }

    /// Pulls an image in a pod of its own with these Secrets.
    pub async fn pull(&self, image: &str, secrets: &[&str]) -> Pull {
        let [pull] = self.pull_all(&[image], secrets).await[..] else { panic!("one container") };
        pull
    }

    /// Pulls images in one pod, which has a container for each, with these Secrets.
    ///
    /// Asserts that no image runs for which regcred's lookup finds no login, and that exactly those
    /// run whose diagnosis is `ok`.
    pub async fn pull_all(&self, images: &[&str], secrets: &[&str]) -> Vec<Pull> {
        let pod = self.start(&given("REGCRED_TEST_NODE"), secrets, images, &[]).await;
        let diagnose = format!("/v1/clusters/dev/namespaces/{}/pods/{}/diagnose", self.namespace, pod.name);
        let diagnosis = self.app.admin().post(&diagnose, &Value::Null).await.expect(200);
        let mut documents = Vec::new();
        for name in secrets {
            let secret = Api::namespaced(kubernetes::admin(), &self.namespace).get_opt(name).await.expect("an answer");
            documents.extend(secret.as_ref().map(kubernetes::document));
        }
        let mut pulls = Vec::new();
        for (index, image) in images.iter().enumerate() {
            let pull = pod.pulled(image).await;
            let diagnosed = &diagnosis["images"][index];
            assert_eq!(diagnosed["image"], *image, "{diagnosed:#}");
            assert_eq!(diagnosed["verdict"] == "ok", pull == Pull::Running, "{image} with {secrets:?}: {diagnosed:#}");
            let is_matched = documents.iter().any(|document| has_login(document, image));
            assert!(is_matched || pull != Pull::Running, "{image} runs with {secrets:?}, against the lookup");
            pulls.push(pull);
        }
        pod.delete().await;
        pulls
    }

    /// Starts a pod on a node, with a container for each image.
    pub async fn start(&self, node: &str, secrets: &[&str], images: &[&str], arguments: &[&str]) -> TestPod {
        let containers = images.iter().enumerate().map(|(index, image)| {
            json!({"name": format!("container-{index}"), "image": image, "imagePullPolicy": "Always", "args": arguments})
        });
        let pod: Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "pod-"},
            "spec": {
                // No scheduler runs, and the node has no network of its own for pods.
                "nodeName": node, "hostNetwork": true, "tolerations": [{"operator": "Exists"}],
                "automountServiceAccountToken": false, "enableServiceLinks": false,
                "terminationGracePeriodSeconds": 0,
                "imagePullSecrets": secrets.iter().map(|name| json!({"name": name})).collect::<Vec<_>>(),
                "containers": containers.collect::<Vec<_>>(),
            },
        }))
        .expect("a pod");
        let pods = Api::<Pod>::namespaced(kubernetes::admin(), &self.namespace);
        let created = pods.create(&PostParams::default(), &pod).await.expect("a pod");
        TestPod { namespace: self.namespace.clone(), name: created.metadata.name.expect("a name") }
    }
}

/// Whether the kubelet has a login for the image in this document, by regcred's lookup.
fn has_login(document: &str, image: &str) -> bool {
    let config = Config::parse(document.as_bytes()).expect("a docker config");
    !explain_config(&config, &ImageName::parse(image).expect("an image")).consumers.kubernetes.keys.is_empty()
}

/// Pod of a test.
pub struct TestPod {
    namespace: String,
    name: String,
}

impl TestPod {
    fn api(&self) -> Api<Pod> {
        Api::namespaced(kubernetes::admin(), &self.namespace)
    }

    /// Status of the container with this image, once the kubelet has reported one.
    pub async fn container(&self, image: &str) -> Option<ContainerStatus> {
        let pod = self.api().get(&self.name).await.expect("the pod is there");
        let statuses = pod.status?.container_statuses?;
        let named = pod.spec?.containers.into_iter().find(|container| container.image.as_deref() == Some(image))?.name;
        statuses.into_iter().find(|status| status.name == named)
    }

    /// Waits for the first pull of the container with this image.
    pub async fn pulled(&self, image: &str) -> Pull {
        eventually(&format!("the kubelet pulls {image}"), async || {
            let state = self.container(image).await?.state?;
            if state.running.is_some() {
                return Some(Pull::Running);
            }
            match state.waiting?.reason?.as_str() {
                "ErrImagePull" | "ImagePullBackOff" => {
                    self.failures(image).await.first().map(|message| Pull::of_failure(message))
                }
                "ContainerCreating" => None,
                other => panic!("{other}: {:?}", self.container(image).await),
            }
        })
        .await
    }

    /// Waits until the container with this image is running, whatever failed before.
    pub async fn runs(&self, image: &str) {
        eventually(&format!("{image} is running"), async || self.container(image).await?.state?.running).await;
    }

    /// Messages of failed pulls of this image, from the pod's events.
    pub async fn failures(&self, image: &str) -> Vec<String> {
        let events = Api::<Event>::namespaced(kubernetes::admin(), &self.namespace);
        let fields = format!("involvedObject.name={},reason=Failed", self.name);
        let failed = events.list(&ListParams::default().fields(&fields)).await.expect("events");
        let pull = format!("Failed to pull image \"{image}\": ");
        let messages = failed.items.into_iter().filter_map(|event| event.message);
        messages.filter_map(|message| message.strip_prefix(&pull).map(str::to_owned)).collect()
    }

    /// Deletes the pod; the kubelet then stops its containers.
    pub async fn delete(self) {
        self.api().delete(&self.name, &DeleteParams::default().grace_period(0)).await.expect("deleted");
    }
}

/// A further node, which a test starts with registry logins in the kubelet's `config.json`. Stops
/// when dropped.
pub struct ConfiguredNode {
    pub name: &'static str,
    process: Process,
    _folder: TempDir,
}

impl ConfiguredNode {
    pub async fn start(name: &'static str, config_json: &str) -> Self {
        let folder = TempDir::new();
        let mut run = Command::new(given("REGCRED_TEST_NODE_RUN"));
        run.args(["run", name]).arg(folder.write("config.json", config_json));
        let mut node = Self { name, process: Process::start(run), _folder: folder };
        eventually("the node is registered", async || {
            if let Some(status) = node.process.ended() {
                panic!("the node ended ({status}): {}", node.process.stderr());
            }
            Api::<Node>::all(kubernetes::admin()).get_opt(name).await.expect("an answer")
        })
        .await;
        node
    }
}

impl Drop for ConfiguredNode {
    fn drop(&mut self) {
        // On TERM it removes its cgroups and files, within seconds.
        if self.process.ended().is_none() {
            self.process.signal("TERM");
        }
        for _ in 0..300 {
            if self.process.ended().is_some() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Sets the password of a user of registry A, who is created if needed.
pub fn set_password(user: &str, password: &str) {
    // Of all tests: the file has the users of all of them.
    static WRITING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = WRITING.lock();
    let path = given("REGCRED_TEST_REGISTRY_A_HTPASSWD");
    let made = Command::new("htpasswd").args(["-nbB", "-C", "5", user, password]).output().expect("htpasswd");
    let users = fs::read_to_string(&path).expect("the registry's users");
    let others = users.lines().filter(|line| !line.starts_with(&format!("{user}:")));
    // Renamed, so that the registry never reads a part of the file.
    let new = format!("{path}.new");
    let mut file = fs::File::create(&new).expect("a file");
    for line in others.map(str::as_bytes).chain([made.stdout.trim_ascii()]) {
        file.write_all(&[line, b"\n"].concat()).expect("written");
    }
    drop(file);
    fs::rename(new, path).expect("replaced");
}

/// A docker config for a kubelet with these accounts, as stored in a file.
pub async fn document(app: &TestApp, accounts: &[&str]) -> String {
    let body: Value = json!({"accounts": accounts, "profile": "kubernetes", "format": "document"});
    let answer = app.admin().post("/v1/docker-configs", &body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

/// The two registries' addresses with the name of an image that the node can run.
pub fn images(name: &str) -> [String; 2] {
    [registry::a(), registry::b()].map(|registry| format!("{}/{name}", registry.address))
}
