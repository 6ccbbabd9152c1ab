//! Unavailable clusters: the state and error of their targets, isolation of other clusters, and
//! recovery.

use chrono::{TimeDelta, Utc};
use k8s_openapi::{
    api::core::v1::{ResourceQuota, ResourceQuotaSpec, ResourceQuotaStatus, Secret, ServiceAccount},
    apimachinery::pkg::api::resource::Quantity,
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{Broker, app_with_broker, declaration, password, put, settled, sync, target, target_becomes};
use crate::{
    identity_providers::keys::TestKey,
    support::{
        app::TestApp,
        client::{Client, assert_holds},
        eventually,
        kubernetes::{self, Cluster, FIRST, SECOND},
        proxy::{Health, Proxy},
    },
};

/// One response to every request.
macro_rules! always {
    ($answer:literal) => {
        Health::Answers(|_| Some($answer))
    };
}

const BROKEN: Health = always!("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
const OVERLOADED: Health =
    always!("HTTP/1.1 429 Too Many Requests\r\nretry-after: 2\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");

/// Registers the second cluster behind a proxy that injects faults, with exactly the required
/// rules.
async fn second_behind_proxy(app: &TestApp, name: &str) -> (Proxy, Broker) {
    let (proxy, broker) = (Proxy::before(&SECOND.server(), &SECOND.path("")), Broker::of(SECOND).await);
    let mut registration = SECOND.registration(name, &broker.auth());
    registration["server"] = json!(proxy.server());
    app.admin().post("/v1/clusters", &registration).await.expect(201);
    (proxy, broker)
}

async fn rotate(client: &Client, account: &str, password: &str) {
    client.patch(&format!("/v1/registry-accounts/{account}"), &json!({"password": password})).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn each_cluster_fault_is_reported_and_recovers(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_CLUSTER_TIMEOUT_SECONDS", "2")]).await;
    let (admin, namespace) = (app.admin(), SECOND.new_namespace().await);
    let (proxy, _broker) = second_behind_proxy(&app, "dev").await;
    app.register_account("dev-user", "registry.example.com:5000", "dev-user", "first").await;
    put(&admin, "team-a", &declaration(&["dev-user"], "dev", &[&namespace])).await.expect(201);
    target_becomes(&admin, "team-a", "synced", "").await;
    let uid = SECOND.secret(&namespace, "team-a-pull").await.metadata.uid;

    let other = FIRST.server().trim_start_matches("https://").parse().expect("an address");
    let faults: [(&str, Health, &str, &str); 7] = [
        // Closed or reset, depending on timing.
        ("down", Health::Down, "cluster-unreachable", "the connection"),
        ("hangs", Health::Hangs, "cluster-timeout", ""),
        ("broken", BROKEN, "cluster-unreachable", "(status 500)"),
        ("overloaded", OVERLOADED, "cluster-unreachable", "overloaded (429)"),
        ("another", Health::LeadsTo(other), "cluster-unreachable", "certificate"),
        (
            "broken off",
            always!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{\"metadata\":{"),
            "cluster-unreachable",
            "cannot be read",
        ),
        // Every update conflicts.
        (
            "changed",
            Health::Answers(|head| {
                head.starts_with("PATCH ").then_some(
                    "HTTP/1.1 409 Conflict\r\ncontent-type: application/json\r\ncontent-length: 76\r\nconnection: close\r\n\r\n\
                     {\"kind\":\"Status\",\"apiVersion\":\"v1\",\"status\":\"Failure\",\"reason\":\"Conflict\"}  ",
                )
            }),
            "secret-changed",
            "at the same time",
        ),
    ];
    let mut last = "first";
    for (name, health, slug, words) in faults {
        proxy.becomes(health);
        rotate(&admin, "dev-user", name).await;
        let failed = target_becomes(&admin, "team-a", "failed", slug).await;
        let detail = failed["lastError"]["detail"].as_str().expect("a sentence");
        assert!(detail.contains(words), "{name}: {detail}");
        assert!(failed["nextAttemptAt"].is_string(), "{name}: {failed}");
        let secret = SECOND.secret(&namespace, "team-a-pull").await;
        assert_eq!(password(&secret), last, "{name}: the last good Secret stays");
        proxy.heals();
        target_becomes(&admin, "team-a", "synced", "").await;
        let secret = SECOND.secret(&namespace, "team-a-pull").await;
        assert_eq!((password(&secret).as_str(), &secret.metadata.uid), (name, &uid));
        last = name;
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn quota_is_distinguished_from_a_missing_right(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let (admin, namespace) = (app.admin(), kubernetes::new_namespace().await);
    let none = || Some([("secrets".to_owned(), Quantity("0".to_owned()))].into());
    let quotas = Api::<ResourceQuota>::namespaced(kubernetes::admin(), &namespace);
    let quota = ResourceQuota {
        metadata: super::named("none"),
        spec: Some(ResourceQuotaSpec { hard: none(), ..ResourceQuotaSpec::default() }),
        ..ResourceQuota::default()
    };
    quotas.create(&PostParams::default(), &quota).await.expect("a quota");
    // Without a controller the status is set here.
    let status = ResourceQuotaStatus { hard: none(), used: none() };
    let patch = Patch::Merge(json!({"status": status}));
    quotas.patch_status("none", &PatchParams::default(), &patch).await.expect("a status");
    eventually("the API server enforces the quota", async || {
        let secret = Secret { metadata: super::named("probe"), ..Secret::default() };
        let dry_run = PostParams { dry_run: true, ..PostParams::default() };
        let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &namespace);
        secrets.create(&dry_run, &secret).await.is_err().then_some(())
    })
    .await;

    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&namespace])).await.expect(201);
    let failed = target_becomes(&admin, "team-a", "failed", "secret-refused").await;
    assert!(failed["lastError"]["detail"].as_str().is_some_and(|detail| detail.contains("quota")), "{failed}");

    quotas.delete("none", &kube::api::DeleteParams::default()).await.expect("deleted");
    eventually("the Secret exists once the quota is gone", async || {
        sync(&admin, "team-a").await;
        (target(&admin, "team-a").await["state"] == "synced").then_some(())
    })
    .await;
}

/// Asserts the passwords of Secrets by registry.
async fn all_have(cluster: Cluster, namespaces: &[String], expected: &Value) {
    for namespace in namespaces {
        let secret = cluster.secret(namespace, "team-a-pull").await;
        let document: Value = serde_json::from_str(&kubernetes::document(&secret)).expect("JSON");
        for (registry, password) in expected.as_object().expect("an object") {
            assert_eq!(document["auths"][registry]["password"], *password, "{registry} in {namespace}");
        }
    }
}

async fn namespaces(cluster: Cluster) -> Vec<String> {
    let mut namespaces = Vec::new();
    for _ in 0..5 {
        namespaces.push(cluster.new_namespace().await);
    }
    namespaces
}

fn over_both(accounts: &[&str], here: &[String], there: &[String]) -> Value {
    let mut body = declaration(accounts, "dev", &[]);
    body["targets"] = json!([{"cluster": "dev", "namespaces": here}, {"cluster": "edge", "namespaces": there}]);
    body
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unavailable_cluster_delays_no_other_and_recovers(pool: PgPool) {
    let (app, here_broker) = app_with_broker(pool, &[("REGCRED_CLUSTER_TIMEOUT_SECONDS", "2")]).await;
    let (admin, here, there) = (app.admin(), namespaces(FIRST).await, namespaces(SECOND).await);
    let (proxy, there_broker) = second_behind_proxy(&app, "edge").await;
    let shown = put(&admin, "team-a", &over_both(&["account-5000"], &here, &there)).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 10, "synced": 10}));

    let mut last = "xxx1";
    let faults = [("down", Health::Down), ("hangs", Health::Hangs), ("broken", BROKEN), ("overloaded", OVERLOADED)];
    let rotations = faults.len();
    for (name, health) in faults {
        let before = proxy.connections();
        proxy.becomes(health);
        rotate(&admin, "account-5000", name).await;
        eventually(&format!("the healthy cluster is synced: {name}"), async || {
            let shown = admin.get("/v1/pull-secrets/team-a").await.expect(200);
            (shown["status"]["synced"] == 5 && shown["status"]["failed"] == 5).then_some(())
        })
        .await;
        all_have(FIRST, &here, &json!({"registry.example.com:5000": name})).await;
        all_have(SECOND, &there, &json!({"registry.example.com:5000": last})).await;
        assert!(proxy.connections() > before, "{name}: the cluster was not called");
        let failed = admin.get("/v1/pull-secrets/team-a/targets?state=failed").await.expect(200);
        assert!(
            failed["items"].as_array().expect("items").iter().all(|target| target["cluster"] == "edge"),
            "{failed}"
        );

        proxy.heals();
        eventually(&format!("the unavailable cluster has recovered: {name}"), async || {
            (settled(&admin, "team-a").await["status"]["synced"] == 10).then_some(())
        })
        .await;
        all_have(SECOND, &there, &json!({"registry.example.com:5000": name})).await;
        last = name;
    }

    // Each cluster was written by its own ServiceAccount, once per generation.
    for (cluster, broker, namespaces) in [(FIRST, &here_broker, &here), (SECOND, &there_broker, &there)] {
        let user = format!("system:serviceaccount:{}:{}", broker.namespace, broker.name);
        let mut expected = vec![("create".to_owned(), user.clone(), 201)];
        expected.resize(1 + rotations, ("patch".to_owned(), user, 200));
        for namespace in namespaces {
            assert_eq!(cluster.writes(namespace).await, expected);
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn concurrent_rotations_of_two_accounts_reach_both_clusters(pool: PgPool) {
    let (app, _broker) = app_with_broker(pool, &[]).await;
    let (admin, here, there) = (app.admin(), namespaces(FIRST).await, namespaces(SECOND).await);
    let broker = Broker::of(SECOND).await;
    admin.post("/v1/clusters", &SECOND.registration("edge", &broker.auth())).await.expect(201);
    let body = over_both(&["account-5000", "account-6000"], &here, &there);
    assert_holds(&put(&admin, "team-a", &body).await.expect(201)["status"], &json!({"desired": 10, "synced": 10}));

    for round in 0..6 {
        let (one, other) = (format!("one-{round}"), format!("other-{round}"));
        // In both orders.
        if round % 2 == 0 {
            futures_util::join!(rotate(&admin, "account-5000", &one), rotate(&admin, "account-6000", &other));
        } else {
            futures_util::join!(rotate(&admin, "account-6000", &other), rotate(&admin, "account-5000", &one));
        }
        assert_holds(&settled(&admin, "team-a").await["status"], &json!({"desired": 10, "synced": 10}));
        let expected = json!({"registry.example.com:5000": one, "registry.example.com:6000": other});
        all_have(FIRST, &here, &expected).await;
        all_have(SECOND, &there, &expected).await;
    }
}

/// Signs a token of a `ServiceAccount` with the cluster's key. The API server issues none with a
/// lifetime under ten minutes, and accepts one for a minute after its expiry.
async fn token_for(broker: &Broker, still: TimeDelta) -> String {
    let accounts = Api::<ServiceAccount>::namespaced(FIRST.admin(), &broker.namespace);
    let uid = accounts.get(&broker.name).await.expect("a ServiceAccount").metadata.uid;
    let end = (Utc::now() + still - TimeDelta::minutes(1)).timestamp();
    let issuer = "https://kubernetes.default.svc";
    let claims = json!({
        "iss": issuer, "aud": [issuer], "iat": end - 86_400, "nbf": end - 86_400, "exp": end,
        "sub": format!("system:serviceaccount:{}:{}", broker.namespace, broker.name),
        "kubernetes.io": {"namespace": broker.namespace, "serviceaccount": {"name": broker.name, "uid": uid}},
    });
    let key = match PrivateKeyDer::from_pem_file(FIRST.path("sa.key")).expect("a key") {
        PrivateKeyDer::Pkcs8(key) => TestKey::rsa_from("", key.secret_pkcs8_der()),
        PrivateKeyDer::Pkcs1(key) => TestKey::rsa_from_pkcs1("", key.secret_pkcs1_der()),
        _ => panic!("an RSA key"),
    };
    key.sign(&json!({"alg": "RS256"}), &claims)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn expired_token_is_reported_and_replaced(pool: PgPool) {
    let (app, broker) = app_with_broker(pool, &[]).await;
    let (admin, namespace) = (app.admin(), kubernetes::new_namespace().await);
    let with = |token: String| json!({"auth": {"type": "token", "token": token}});
    let short = token_for(&broker, TimeDelta::seconds(30)).await;
    admin.patch("/v1/clusters/dev", &with(short)).await.expect(200);
    put(&admin, "team-a", &declaration(&["account-5000"], "dev", &[&namespace])).await.expect(201);
    assert_holds(&target(&admin, "team-a").await, &json!({"state": "synced", "generation": 1}));

    eventually("the token is refused", async || {
        sync(&admin, "team-a").await;
        (target(&admin, "team-a").await["lastError"]["type"] == "cluster-unauthorized").then_some(())
    })
    .await;
    rotate(&admin, "account-5000", "rotated").await;
    let failed = target_becomes(&admin, "team-a", "failed", "cluster-unauthorized").await;
    assert!(failed["lastError"]["detail"].as_str().is_some_and(|detail| detail.contains("expired")), "{failed}");
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "xxx1", "the last good Secret stays");

    admin.patch("/v1/clusters/dev", &with(token_for(&broker, TimeDelta::hours(1)).await)).await.expect(200);
    target_becomes(&admin, "team-a", "synced", "").await;
    assert_eq!(password(&kubernetes::secret(&namespace, "team-a-pull").await), "rotated");
}
