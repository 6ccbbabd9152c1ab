//! Audit events of the worker, each committed with the recorded result.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{app_with_broker, declaration, put, settled, sync, target};
use crate::{
    audit::assert_whole,
    support::{
        client::{Client, assert_holds},
        eventually, kubernetes,
    },
};

/// Returns action, namespace, outcome and detail of the worker's events about a resource, the
/// oldest first.
async fn worker_events(client: &Client, resource: &str) -> Vec<[String; 4]> {
    let answer = client.get(&format!("/v1/audit-events?format=ndjson&resource={resource}")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(!answer.body.contains("xxx"), "a password is in {}", answer.body);
    let events = answer.body.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let mut lines: Vec<[String; 4]> = events
        .filter(|event| event["actor"] == json!({"type": "worker", "id": null, "name": null}))
        .map(|event| {
            let details = &event["details"];
            let what = details.get("did").or(details.get("reason")).unwrap_or(&Value::Null);
            assert_eq!(details["cluster"], "dev", "{event}");
            let namespace = details["namespace"].as_str().unwrap_or_default();
            assert_eq!(event["related"], json!([format!("clusters/dev/namespaces/{namespace}/secrets/team-a-pull")]));
            [&event["action"], &details["namespace"], &event["outcome"], what]
                .map(|one| one.as_str().unwrap_or("-").to_owned())
        })
        .collect();
    lines.reverse();
    lines
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn each_change_in_a_cluster_is_audited_once(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[]).await;
    let admin = app.admin();
    let (ours, theirs) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    let gone = format!("{ours}-gone");
    let arguments = ["-n", &theirs, "create", "secret", "docker-registry", "team-a-pull"];
    let login = ["--docker-server=own.example.com", "--docker-username=me", "--docker-password=mine"];
    kubernetes::kubectl(&[&arguments[..], &login[..]].concat(), "");
    let mut body = declaration(&["account-5000"], "dev", &[&ours, &theirs, &gone]);
    let of_pull_secret = async || worker_events(&admin, "pull-secrets/team-a").await;
    let line = |action: &str, namespace: &str, outcome: &str, what: &str| {
        [format!("pullSecret.{action}"), namespace.to_owned(), outcome.to_owned(), what.to_owned()]
    };
    let sorted = |mut lines: Vec<[String; 4]>| {
        lines.sort();
        lines
    };

    put(&admin, "team-a", &body).await.expect(201);
    let first = vec![
        line("apply", &ours, "success", "created"),
        line("apply", &theirs, "failure", "secret-exists"),
        line("apply", &gone, "failure", "namespace-not-found"),
    ];
    assert_eq!(sorted(of_pull_secret().await), sorted(first.clone()));

    // A repeated result is not audited again.
    let synced = async || admin.get("/v1/pull-secrets/team-a/targets?state=synced").await.expect(200);
    let before = synced().await["items"][0]["lastSyncedAt"].clone();
    sync(&admin, "team-a").await;
    eventually("the target is reconciled again", async || {
        (synced().await["items"][0]["lastSyncedAt"] != before).then_some(())
    })
    .await;
    assert_eq!(of_pull_secret().await.len(), first.len());

    admin.patch("/v1/registry-accounts/account-5000", &json!({"password": "xxx-rotated"})).await.expect(200);
    assert_holds(&settled(&admin, "team-a").await["status"], &json!({"synced": 1, "failed": 1, "conflict": 1}));
    let events = of_pull_secret().await;
    assert_eq!(events[first.len()..], [line("apply", &ours, "success", "rotated")]);

    body["adopt"] = json!(true);
    body["targets"][0]["namespaces"] = json!([ours, theirs]);
    assert_holds(&put(&admin, "team-a", &body).await.expect(200)["status"], &json!({"desired": 2, "synced": 2}));
    let expected = vec![
        line("apply", &ours, "success", "unchanged"),
        line("apply", &theirs, "success", "adopted"),
        line("remove", &gone, "success", "absent"),
    ];
    let events = of_pull_secret().await;
    assert_eq!(sorted(events[first.len() + 1..].to_vec()), sorted(expected));

    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("the pull secret is gone", async || {
        (admin.get("/v1/pull-secrets/team-a").await.status == 404).then_some(())
    })
    .await;
    let events = of_pull_secret().await;
    let removed = vec![line("remove", &ours, "success", "removed"), line("remove", &theirs, "success", "removed")];
    assert_eq!(sorted(events[first.len() + 4..].to_vec()), sorted(removed));
    // The events of one Secret are found by its path.
    let of_secret = worker_events(&admin, &format!("clusters/dev/namespaces/{ours}/secrets/team-a-pull")).await;
    assert_eq!(of_secret, events.into_iter().filter(|event| event[1] == ours).collect::<Vec<_>>());
    assert_eq!(of_secret.len(), 4);
    assert_whole(&pool).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn result_and_audit_event_commit_together(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool.clone(), &[("REGCRED_PULL_SECRETS_LEASE_SECONDS", "5")]).await;
    let admin = app.admin();
    let namespace = kubernetes::new_namespace().await;
    let refuse = "ALTER TABLE audit_events ADD CONSTRAINT refused CHECK (action <> 'pullSecret.apply')";
    sqlx::query(refuse).execute(&pool).await.expect("altered");

    let request = admin.request("PUT", "/v1/pull-secrets/team-a").header("prefer", "wait=3");
    let shown = admin.send(request.json(&declaration(&["account-5000"], "dev", &[&namespace]))).await.expect(201);

    assert_holds(&shown["status"], &json!({"desired": 1, "pending": 1}));
    assert!(super::find_secret(&namespace, "team-a-pull").await.is_some());
    assert_eq!(target(&admin, "team-a").await["uid"], Value::Null);
    sqlx::query("ALTER TABLE audit_events DROP CONSTRAINT refused").execute(&pool).await.expect("altered");
    assert_holds(&settled(&admin, "team-a").await["status"], &json!({"desired": 1, "synced": 1}));
    let events = worker_events(&admin, "pull-secrets/team-a").await;
    assert_eq!(events, [["pullSecret.apply", &namespace, "success", "applied"].map(str::to_owned)]);
    assert_whole(&pool).await;
}
