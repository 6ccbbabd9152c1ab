//! Events of pods.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{Doctor, namespace_with, pod};
use crate::support::kubernetes::kubectl;

/// Event about the pull of the pod `web` with this uid.
fn event(namespace: &str, uid: &str, number: usize, message: &str) -> Value {
    let time = format!("2026-01-01T00:00:0{number}Z");
    json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": format!("event-{number}")},
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": "web", "namespace": namespace, "uid": uid,
            "fieldPath": "spec.containers{c0}"},
        "reason": "Failed", "message": format!("Failed to pull image \"x\": {message}"), "type": "Warning",
        "firstTimestamp": time, "lastTimestamp": time})
}

/// An earlier pod of the name, or an earlier pull, says nothing about this one.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn newest_event_of_the_pod_itself_is_reported(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let namespace = namespace_with(&[], vec![pod(&[&Doctor::image_of(&doctor.a)], &[])]).await;
    let uid = kubectl(&["get", "pod", "web", "-n", &namespace, "-o", "jsonpath={.metadata.uid}"], "");
    let events = [
        event(&namespace, "other", 4, "x509: unknown authority"),
        event(&namespace, &uid, 2, "not found"),
        event(&namespace, &uid, 1, "401 Unauthorized"),
        event(&namespace, &uid, 3, "unexpected end"),
    ];
    let list = json!({"apiVersion": "v1", "kind": "List", "items": events});
    kubectl(&["create", "-n", &namespace, "-f", "-"], &list.to_string());

    let found = doctor.diagnose(&namespace, "pods/web").await;

    assert_eq!(found["images"][0]["event"], "notFound", "{found:#}");
}
