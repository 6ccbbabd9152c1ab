//! Lists of pods to choose from.

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{Doctor, namespace_with, pod};
use crate::support::kubernetes;

/// Pods with these names. Those of a deployment have a `ReplicaSet` as their owner.
fn named(names: &[&str]) -> Vec<Value> {
    let pods = names.iter().map(|name| {
        let mut pod = pod(&["127.0.0.1:1/app"], &[]);
        pod["metadata"]["name"] = json!(name);
        if name.starts_with("web-") {
            pod["metadata"]["labels"] = json!({"pod-template-hash": "7d9"});
            pod["metadata"]["ownerReferences"] = json!([{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-7d9", "controller": true,
                "uid": "00000000-0000-0000-0000-000000000001",
            }]);
        }
        pod
    });
    pods.collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pods_are_listed_in_pages_with_their_workload_and_why_they_wait(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let namespace = namespace_with(&[], named(&["a", "b", "web-7d9-x"])).await;
    let waiting = json!({"name": "c0", "image": "app", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "canary of a message"}}});
    let status = Patch::Merge(json!({"status": {"phase": "Pending", "containerStatuses": [waiting]}}));
    let pods: Api<Pod> = Api::namespaced(kubernetes::admin(), &namespace);
    pods.patch_status("web-7d9-x", &PatchParams::default(), &status).await.expect("a status");

    let path = format!("/v1/clusters/dev/namespaces/{namespace}/pods");
    let first = doctor.admin.get(&format!("{path}?limit=2")).await.expect(200);
    let plain = |name: &str| json!({"name": name, "owner": null, "phase": "pending", "waiting": null});
    assert_eq!(first["items"], json!([plain("a"), plain("b")]));
    let cursor = first["next"].as_str().expect("a further page").to_owned();
    let second = doctor.admin.get(&format!("{path}?limit=2&cursor={cursor}")).await.expect(200);
    let web = json!({"name": "web-7d9-x", "owner": {"kind": "deployment", "name": "web"}, "phase": "pending",
        "waiting": "imagePullBackOff"});
    assert_eq!(second, json!({"items": [web], "next": null}));
    // No kubelet has reported about the others yet.
    let new = doctor.admin.get(&format!("{path}?failing=true")).await.expect(200);
    assert_eq!(new["items"].as_array().map(Vec::len), Some(3), "{new:#}");
    for pod in ["a", "b"] {
        let running = Patch::Merge(json!({"status": {"phase": "Running"}}));
        pods.patch_status(pod, &PatchParams::default(), &running).await.expect("a status");
    }
    let failing = doctor.admin.get(&format!("{path}?failing=true")).await.expect(200);
    assert_eq!(failing, json!({"items": [web], "next": null}));
    // A page of others is empty, and continues.
    let empty = doctor.admin.get(&format!("{path}?failing=true&limit=1")).await.expect(200);
    assert_eq!((&empty["items"], empty["next"].is_string()), (&json!([]), true));

    // A place in the list of one namespace names none of another.
    let other = namespace_with(&[], named(&["c"])).await;
    let elsewhere = doctor.admin.get(&format!("/v1/clusters/dev/namespaces/{other}/pods?cursor={cursor}")).await;
    assert!(!elsewhere.body.contains("web-7d9"), "{elsewhere:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn place_that_the_api_server_does_not_know_is_refused(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let namespace = namespace_with(&[], Vec::new()).await;
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/pods");
    // `invented`, `{"v":"meta.k8s.io/v1","rv":1,"start":"../secrets"}` as the API server encodes it, and a space.
    let invented = [
        "aW52ZW50ZWQ",
        "ZXlKMklqb2liV1YwWVM1ck9ITXVhVzh2ZGpFaUxDSnlkaUk2TVN3aWMzUmhjblFpT2lJdUxpOXpaV055WlhSekluMA",
        "IA",
    ];
    for cursor in invented {
        let refused = doctor.admin.get(&format!("{path}?cursor={cursor}")).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["cursor"], "{refused:?}");
    }
    for limit in ["0", "501"] {
        doctor.admin.get(&format!("{path}?limit={limit}")).await.problem(422, "invalid-request");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pods_of_a_namespace_that_is_not_granted_are_not_found(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (own, foreign) = (namespace_with(&[], named(&["a"])).await, namespace_with(&[], named(&["b"])).await);
    let grants = json!({"accounts": [], "clusters": ["dev"], "namespaces": [own]});
    let operator = doctor.app.caller("narrow", "operator", Some(grants)).await;
    let path = |namespace: &str| format!("/v1/clusters/dev/namespaces/{namespace}/pods");
    assert_eq!(operator.get(&path(&own)).await.expect(200)["items"][0]["name"], "a");
    operator.get(&path(&foreign)).await.problem(404, "namespace-not-found");
    operator.get(&path("there-is-none")).await.problem(404, "namespace-not-found");
}
