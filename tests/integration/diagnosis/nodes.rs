//! Platforms of nodes.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    broken::arm64_image,
    setup::{Doctor, deployment, namespace_with},
};
use crate::support::kubernetes::{kubectl, new_namespace};

/// Nodes that only pods with the label `pool` select. Dropping it deletes them.
struct Nodes {
    pool: String,
}

impl Nodes {
    fn create(pool: &str, architectures: &[&str]) -> Self {
        let nodes: Vec<Value> = architectures.iter().map(|architecture| node(pool, architecture)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": nodes});
        kubectl(&["create", "-f", "-"], &list.to_string());
        Self { pool: pool.to_owned() }
    }
}

fn node(pool: &str, architecture: &str) -> Value {
    let labels = json!({"pool": pool, "kubernetes.io/os": "linux", "kubernetes.io/arch": architecture});
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("{pool}-{architecture}"), "labels": labels}})
}

impl Drop for Nodes {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            kubectl(&["delete", "nodes", "-l", &format!("pool={}", self.pool)], "");
        }
    }
}

/// A deployment whose image has a manifest for arm64 only.
fn web(pool: &str) -> Value {
    let mut web = deployment(&[&format!("{}/app:1", arm64_image())], &[]);
    web["spec"]["template"]["spec"]["nodeSelector"] = json!({"pool": pool});
    web
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn platform_of_the_nodes_decides(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    // A name that no other test uses.
    let label = new_namespace().await;
    for (architectures, verdict, sentence) in [
        (&[][..], "ok", "it needs no login"),
        (&["arm64"], "ok", "it needs no login"),
        (&["amd64"], "architectureMismatch", "no manifest for linux/amd64"),
        (&["amd64", "arm64"], "ok", "not by nodes with linux/amd64"),
    ] {
        let _nodes = (!architectures.is_empty()).then(|| Nodes::create(&label, architectures));
        let namespace = namespace_with(&[], vec![web(&label)]).await;

        let found = doctor.diagnose(&namespace, "workloads/deployment/web").await;

        let image = &found["images"][0];
        assert_eq!(image["verdict"], verdict, "{architectures:?}: {found:#}");
        let said = image["sentence"].as_str().expect("a sentence");
        assert!(said.contains(sentence), "{architectures:?}: {said}");
        let platforms = if architectures.is_empty() { json!([]) } else { json!(["linux/arm64"]) };
        assert_eq!(image["platforms"], platforms, "{architectures:?}");
    }
}

/// A pod that was scheduled has one node.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn scheduled_pod_has_the_platform_of_its_node(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let label = new_namespace().await;
    let _nodes = Nodes::create(&label, &["amd64", "arm64"]);
    for (architecture, verdict) in [("arm64", "ok"), ("amd64", "architectureMismatch")] {
        let mut pod = super::setup::pod(&[&format!("{}/app:1", arm64_image())], &[]);
        pod["spec"]["nodeName"] = json!(format!("{label}-{architecture}"));
        let namespace = namespace_with(&[], vec![pod]).await;
        let found = doctor.diagnose(&namespace, "pods/web").await;
        assert_eq!(found["images"][0]["verdict"], verdict, "{found:#}");
    }
}
