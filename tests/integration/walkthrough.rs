//! The published walk-through of manual pull secrets, step by step.
//!
//! Each test compares regcred's result with the walk-through's commands, or uses it with real
//! clients and registries. The number in a test's name is the number of the walk-through's section.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    client::{Client, assert_holds},
    given,
    kubernetes::{self, kubectl, meaning},
    registry,
};

const EMAIL: &str = "hanniusshine@gmail.com";

/// Registers the two accounts of the walk-through: one user, one host, two ports, two passwords.
async fn register_martin(app: &TestApp) {
    for (name, port, password) in [("martin-5000", 5000, "xxx1"), ("martin-6000", 6000, "xxx2")] {
        let body = json!({
            "name": name, "registry": format!("registry.martin.com:{port}"), "username": "martin",
            "password": password, "email": EMAIL,
        });
        app.admin().post("/v1/registry-accounts", &body).await.expect(201);
    }
}

/// Creates a Secret through direct delivery and returns the response.
async fn deliver(app: &TestApp, cluster: &str, namespace: &str, body: &Value) -> Value {
    let path = format!("/v1/clusters/{cluster}/namespaces/{namespace}/secrets");
    app.admin().post(&path, body).await.expect(201)
}

/// Reads the docker config of a Secret back from the API server.
async fn read_back(namespace: &str, name: &str) -> String {
    kubernetes::document(&kubernetes::secret(namespace, name).await)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_2_secret_equals_kubectls(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (by_hand, by_regcred) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    app.register_cluster("dev").await;
    register_martin(&app).await;
    let arguments = ["create", "secret", "docker-registry", "registrykey-2.6.2", "--namespace", &by_hand];
    let login = ["--docker-server=registry.martin.com:5000", "--docker-username=martin", "--docker-password=xxx1"];
    let email = format!("--docker-email={EMAIL}");
    kubectl(&[&arguments[..], &login[..], &[&email]].concat(), "");

    let body = json!({"name": "registrykey-2.6.2", "accounts": ["martin-5000"]});
    deliver(&app, "dev", &by_regcred, &body).await;

    let expected = kubernetes::secret(&by_hand, "registrykey-2.6.2").await;
    let made = kubernetes::secret(&by_regcred, "registrykey-2.6.2").await;
    assert_eq!(meaning(&made), meaning(&expected));
    assert_eq!(made.type_.as_deref(), Some("kubernetes.io/dockerconfigjson"));
    assert_eq!(meaning(&made).1[".dockerconfigjson"]["auths"]["registry.martin.com:5000"]["email"], EMAIL);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_2_docker_hub_key_equals_kubectls(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (by_hand, by_regcred) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    app.register_cluster("dev").await;
    // Without `--docker-server`, kubectl uses Docker Hub.
    let login = ["--docker-username=martin", "--docker-password=p\"ä\\ss"];
    kubectl(&[&["create", "secret", "docker-registry", "hub", "--namespace", &by_hand][..], &login[..]].concat(), "");
    app.register_account("hub", "docker.io", "martin", "p\"ä\\ss").await;

    let made = deliver(&app, "dev", &by_regcred, &json!({"name": "hub", "accounts": ["hub"]})).await;

    let expected = kubernetes::secret(&by_hand, "hub").await;
    assert_eq!(meaning(&kubernetes::secret(&by_regcred, "hub").await), meaning(&expected));
    assert_eq!(made["keys"], json!(["https://index.docker.io/v1/"]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_3_two_registries_on_one_host_need_two_secrets(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    let (a, b) = (registry::a(), registry::b());
    assert_eq!((a.address.split(':').next(), &a.username), (b.address.split(':').next(), &b.username));
    app.register_cluster("dev").await;
    app.register_registries().await;

    let mut image_pull_secrets = Vec::new();
    for account in ["a", "b"] {
        let body = json!({"name": format!("registrykey-{account}"), "accounts": [account]});
        let made = deliver(&app, "dev", &namespace, &body).await;
        image_pull_secrets.extend(made["imagePullSecrets"].as_array().expect("a list").clone());
    }

    assert_eq!(image_pull_secrets, [json!({"name": "registrykey-a"}), json!({"name": "registrykey-b"})]);
    let (for_a, for_b) = (read_back(&namespace, "registrykey-a").await, read_back(&namespace, "registrykey-b").await);
    assert_eq!((a.read_image(&for_a), b.read_image(&for_b)), (Ok(()), Ok(())));
    a.assert_refuses(&for_b);
    b.assert_refuses(&for_a);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_4_kubectl_applies_a_rendered_manifest(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    register_martin(&app).await;
    let types = [("json", "kubernetes.io/dockerconfigjson"), ("cfg", "kubernetes.io/dockercfg")];
    for (short, secret_type) in types {
        for format in ["json", "yaml"] {
            let name = format!("registrykey-{short}-{format}");
            let body = json!({
                "accounts": ["martin-5000", "martin-6000"],
                "secret": {"name": name, "namespace": namespace, "type": secret_type, "labels": {"team": "a"}},
            });
            let request = app.admin().request("POST", "/v1/docker-configs").json(&body);

            let manifest = app.admin().send(request.header("Accept", format!("application/{format}"))).await;

            assert_eq!(
                (manifest.status, manifest.header("content-type"), manifest.header("cache-control")),
                (200, format!("application/{format}").as_str(), "no-store")
            );
            kubectl(&["apply", "-f", "-"], &manifest.body);
            let applied = kubernetes::secret(&namespace, &name).await;
            assert_eq!(applied.type_.as_deref(), Some(secret_type));
            let labels = applied.metadata.labels.as_ref().expect("labels");
            assert_eq!(labels["team"], "a");
            let document: Value = serde_json::from_str(&kubernetes::document(&applied)).expect("JSON");
            let entries = if short == "json" { &document["auths"] } else { &document };
            assert_eq!(entries["registry.martin.com:6000"]["password"], "xxx2");
            // Unwrapped: wrapped base64 cannot be pasted into YAML.
            let value = BASE64_STANDARD.encode(kubernetes::document(&applied));
            assert!(manifest.body.contains(&value), "{}", manifest.body);
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_5_one_secret_serves_several_registries(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.register_registries().await;

    let made = deliver(&app, "dev", &namespace, &json!({"name": "registrykey", "accounts": ["a", "b"]})).await;

    let (a, b) = (registry::a(), registry::b());
    let mut keys = [a.address.clone(), b.address.clone()];
    keys.sort();
    assert_eq!((&made["keys"], &made["imagePullSecrets"]), (&json!(keys), &json!([{"name": "registrykey"}])));
    let docker_config = read_back(&namespace, "registrykey").await;
    assert_eq!((a.read_image(&docker_config), b.read_image(&docker_config)), (Ok(()), Ok(())));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_6_direct_delivery_equals_the_curl_request(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let proxy = given("REGCRED_TEST_KUBE_HTTP");
    let edge = json!({"name": "edge", "server": proxy, "auth": {"type": "none"}, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &edge).await.expect(201);
    // The walk-through's key with a repository path.
    app.register_account("scoped", "registry.martin.com:5000/xxxx/rbd-rest-api", "martin", "xxx1").await;
    let auth = BASE64_STANDARD.encode("martin:xxx1");
    let entries = json!({
        "registry.martin.com:5000/xxxx/rbd-rest-api": {"username": "martin", "password": "xxx1", "auth": auth},
    });
    let types = [
        (".dockerconfigjson", "kubernetes.io/dockerconfigjson", json!({"auths": entries})),
        (".dockercfg", "kubernetes.io/dockercfg", entries),
    ];
    for (data_key, secret_type, document) in types {
        let (by_hand, by_regcred) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
        // Body of the walk-through's curl command.
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": secret_type,
            "metadata": {"name": "registrykey-m262-5", "namespace": by_hand},
            "data": {data_key: BASE64_STANDARD.encode(document.to_string())},
        });
        let curl = Client::new(&proxy, None);
        let answered = curl.post(&format!("/api/v1/namespaces/{by_hand}/secrets"), &secret).await.expect(201);

        let body = json!({"name": "registrykey-m262-5", "accounts": ["scoped"], "type": secret_type});
        let made = deliver(&app, "edge", &by_regcred, &body).await;

        let expected = kubernetes::secret(&by_hand, "registrykey-m262-5").await;
        let stored = kubernetes::secret(&by_regcred, "registrykey-m262-5").await;
        assert_eq!(meaning(&stored), meaning(&expected));
        for member in ["uid", "resourceVersion", "creationTimestamp"] {
            assert!(answered["metadata"][member].is_string(), "{answered}");
        }
        let stored_at = stored.metadata.creation_timestamp.expect("a time").0.as_second();
        let made_at: chrono::DateTime<chrono::Utc> =
            serde_json::from_value(made["creationTimestamp"].clone()).expect("a time");
        assert_eq!(made_at.timestamp(), stored_at);
        assert_holds(
            &made,
            &json!({
                "cluster": "edge", "namespace": by_regcred, "name": "registrykey-m262-5", "type": secret_type,
                "uid": stored.metadata.uid, "resourceVersion": stored.metadata.resource_version,
                "creationTimestamp": made["creationTimestamp"], "dryRun": false,
                "keys": ["registry.martin.com:5000/xxxx/rbd-rest-api"],
                "imagePullSecrets": [{"name": "registrykey-m262-5"}], "warnings": [],
            }),
        );
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_6_every_cluster_auth_type_writes_the_same_secret(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    register_martin(&app).await;
    let token = json!({"type": "token", "token": given("REGCRED_TEST_KUBE_ADMIN_TOKEN")});
    let (certificate, key) = (kubernetes::file("admin.crt"), kubernetes::file("admin.key"));
    let client_certificate = json!({"type": "clientCertificate", "certificate": certificate, "key": key});
    app.register_cluster_with("token", &token).await;
    app.register_cluster_with("client-certificate", &client_certificate).await;
    let edge = json!({
        "name": "plain-http", "server": given("REGCRED_TEST_KUBE_HTTP"), "auth": {"type": "none"}, "allowPlainHttp": true,
    });
    app.admin().post("/v1/clusters", &edge).await.expect(201);
    let kubeconfig = json!({"name": "kubeconfig", "kubeconfig": kubernetes::file("kubeconfig"), "context": "sandbox"});
    let imported = app.admin().post("/v1/clusters", &kubeconfig).await.expect(201);
    assert_eq!(
        (&imported["server"], &imported["auth"]),
        (&json!(kubernetes::server()), &json!({"type": "token", "expiresAt": null}))
    );

    let mut meanings = Vec::new();
    for cluster in ["token", "client-certificate", "plain-http", "kubeconfig"] {
        let body = json!({"name": format!("by-{cluster}"), "accounts": ["martin-5000", "martin-6000"]});
        let made = deliver(&app, cluster, &namespace, &body).await;
        assert_eq!(made["cluster"], cluster);
        let check = app.admin().post(&format!("/v1/clusters/{cluster}/check"), &json!({})).await.expect(200);
        assert_eq!((&check["reachable"], check.get("problem")), (&json!(true), None), "{cluster}");
        meanings.push(kubernetes::secret(&namespace, &format!("by-{cluster}")).await);
    }

    let first = meaning(&meanings[0]);
    assert_eq!(first.1[".dockerconfigjson"]["auths"].as_object().expect("entries").len(), 2);
    assert!(meanings.iter().all(|secret| meaning(secret) == first), "{meanings:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_7_stored_secret_pulls_from_both_registries(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    app.register_registries().await;
    let (a, b) = (registry::a(), registry::b());
    for registry in [&a, &b] {
        registry.assert_refuses(r#"{"auths":{}}"#);
    }

    deliver(&app, "dev", &namespace, &json!({"name": "registrykey-m262-5", "accounts": ["a", "b"]})).await;

    let docker_config = read_back(&namespace, "registrykey-m262-5").await;
    assert_eq!((a.read_image(&docker_config), b.read_image(&docker_config)), (Ok(()), Ok(())));
    // Control: a wrong password is refused, so the stored value grants access.
    app.admin().patch("/v1/registry-accounts/a", &json!({"password": "wrong"})).await.expect(200);
    deliver(&app, "dev", &namespace, &json!({"name": "wrong", "accounts": ["a", "b"]})).await;
    let docker_config = read_back(&namespace, "wrong").await;
    a.assert_refuses(&docker_config);
    assert_eq!(b.read_image(&docker_config), Ok(()));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn walkthrough_7_path_scoped_account_pulls_only_its_path(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    let a = registry::a();
    // The image's repository is os/alpine.
    for (name, path) in [("repository", "os/alpine"), ("group", "os"), ("other", "os/other")] {
        app.register_account(name, &format!("{}/{path}", a.address), &a.username, &a.password).await;
    }

    for account in ["repository", "group", "other"] {
        deliver(&app, "dev", &namespace, &json!({"name": account, "accounts": [account]})).await;
    }

    assert_eq!(a.read_image(&read_back(&namespace, "repository").await), Ok(()));
    assert_eq!(a.read_image(&read_back(&namespace, "group").await), Ok(()));
    a.assert_refuses(&read_back(&namespace, "other").await);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_is_validated_by_the_api_server_and_not_stored(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    app.register_cluster("dev").await;
    register_martin(&app).await;
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    let body = |dry_run: bool| json!({"name": "pull", "accounts": ["martin-5000"], "dryRun": dry_run});

    let tried = app.admin().post(&path, &body(true)).await.expect(200);

    assert_eq!((&tried["dryRun"], &tried["keys"]), (&json!(true), &json!(["registry.martin.com:5000"])));
    assert_eq!(kubernetes::secret_names(&namespace).await, [""; 0]);
    app.admin().post(&path, &body(false)).await.expect(201);
    app.admin().post(&path, &body(true)).await.problem(409, "secret-exists");
}
