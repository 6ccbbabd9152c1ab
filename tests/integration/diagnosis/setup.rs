//! Objects of the tests, and a client that applies fixes literally.

use std::process::Command;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    client::Client,
    kubernetes::{self, kubectl},
    registry::{self, Registry},
};

pub const IMAGE: &str = "os/alpine:3";
const JSON_TYPE: &str = "kubernetes.io/dockerconfigjson";

/// An app with the first cluster as `dev`, and the registries.
pub struct Doctor {
    pub app: TestApp,
    pub admin: Client,
    pub a: Registry,
    pub b: Registry,
}

impl Doctor {
    pub async fn new(pool: PgPool) -> Self {
        let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8,::1/128")]).await;
        app.register_cluster("dev").await;
        Self { admin: app.admin(), app, a: registry::a(), b: registry::b() }
    }

    /// Reference of the image that both registries hold.
    pub fn image_of(registry: &Registry) -> String {
        format!("{}/{IMAGE}", registry.address)
    }

    /// Diagnoses an object of a namespace, such as `pods/web`.
    pub async fn diagnose(&self, namespace: &str, object: &str) -> Value {
        diagnose(&self.admin, namespace, object).await
    }

    pub async fn diagnose_spec(&self, namespace: &str, spec: &Value) -> Value {
        self.admin.post(&format!("/v1/clusters/dev/namespaces/{namespace}/diagnose"), spec).await.expect(200)
    }

    /// Carries out the steps of a fix as they are.
    pub async fn apply(&self, fix: &Value, login: (&str, &str)) {
        let steps = fix["steps"].as_array().expect("steps");
        assert!(!steps.is_empty(), "{fix}");
        for step in steps {
            if step["type"] == "command" {
                shell(step["command"].as_str().expect("a line"), login);
                continue;
            }
            let method = step["method"].as_str().expect("a method");
            let request = self.admin.request(method, step["path"].as_str().expect("a path"));
            // Returns once pull secrets are delivered.
            let request = request.header("prefer", "wait=30");
            let headers = step["headers"].as_object().into_iter().flatten();
            let request = headers.fold(request, |request, (name, value)| {
                request.header(name.as_str(), value.as_str().expect("a header"))
            });
            let request = if step["body"].is_null() { request } else { request.json(&step["body"]) };
            let answer = self.admin.send(request).await;
            assert!(answer.status < 300, "{step}: {answer:?}");
        }
    }
}

pub async fn diagnose(client: &Client, namespace: &str, object: &str) -> Value {
    client.post(&format!("/v1/clusters/dev/namespaces/{namespace}/{object}/diagnose"), &Value::Null).await.expect(200)
}

/// Runs a command line with the administrator's kubeconfig and a login.
fn shell(line: &str, (username, password): (&str, &str)) {
    let mut command = Command::new("sh");
    command.args(["-ec", line]).env("KUBECONFIG", kubernetes::path("kubeconfig"));
    let output = command.env("REGISTRY_USERNAME", username).env("REGISTRY_PASSWORD", password).output();
    let output = output.expect("a shell");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Creates a namespace with a `ServiceAccount` `default` that lists these pull secrets, and objects.
pub async fn namespace_with(pull_secrets: &[&str], mut objects: Vec<Value>) -> String {
    let namespace = kubernetes::new_namespace().await;
    objects.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"},
        "imagePullSecrets": references(pull_secrets)}));
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    kubectl(&["apply", "-n", &namespace, "-f", "-"], &list.to_string());
    namespace
}

pub fn references(names: &[&str]) -> Value {
    names.iter().map(|name| json!({"name": name})).collect()
}

/// A Secret of any type with one data key.
pub fn secret(name: &str, secret_type: &str, key: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": secret_type,
        "data": {key: BASE64_STANDARD.encode(value)}})
}

/// A pull secret with this document.
pub fn pull_secret(name: &str, document: &Value) -> Value {
    secret(name, JSON_TYPE, ".dockerconfigjson", &document.to_string())
}

/// Document with one entry.
pub fn document(key: &str, username: &str, password: &str) -> Value {
    json!({"auths": {key: {"auth": BASE64_STANDARD.encode(format!("{username}:{password}"))}}})
}

/// A pull secret with the right login of a registry.
pub fn login(name: &str, registry: &Registry) -> Value {
    pull_secret(name, &document(&registry.address, &registry.username, &registry.password))
}

fn pod_spec(images: &[&str], pull_secrets: &[&str]) -> Value {
    let containers: Vec<Value> =
        images.iter().enumerate().map(|(index, image)| json!({"name": format!("c{index}"), "image": image})).collect();
    json!({"containers": containers, "imagePullSecrets": references(pull_secrets)})
}

pub fn pod(images: &[&str], pull_secrets: &[&str]) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": pod_spec(images, pull_secrets)})
}

pub fn deployment(images: &[&str], pull_secrets: &[&str]) -> Value {
    let labels = json!({"app": "web"});
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod_spec(images, pull_secrets)}}})
}

/// A workload of another kind with the template of a deployment.
pub fn workload(kind: &str, images: &[&str], pull_secrets: &[&str]) -> Value {
    let mut workload = deployment(images, pull_secrets);
    workload["kind"] = json!(kind);
    let mut job_template = json!({"spec": {"template": {"spec": pod_spec(images, pull_secrets)}}});
    job_template["spec"]["template"]["spec"]["restartPolicy"] = json!("Never");
    match kind {
        "StatefulSet" => workload["spec"]["serviceName"] = json!("web"),
        "Job" => {
            workload["apiVersion"] = json!("batch/v1");
            workload["spec"] = job_template["spec"].clone();
        }
        "CronJob" => {
            workload["apiVersion"] = json!("batch/v1beta1");
            workload["spec"] = json!({"schedule": "0 0 1 1 *", "jobTemplate": job_template});
        }
        _ => {}
    }
    workload
}
