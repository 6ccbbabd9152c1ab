//! `regcred doctor`, through a service and with a kubeconfig.

use std::process::Command;

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::setup::{Doctor, deployment, document, login, namespace_with, pod, pull_secret};
use crate::support::{
    files::TempDir,
    given, kubernetes,
    process::{Exit, Installation, Process, Service},
    registry,
};
use crate::verify::listening::{Trap, answer, bearer, serve as serve_registry};

const CANARY: &str = "canary-password";

/// A service with the first cluster as `dev`.
async fn serve(pool: &PgPool) -> (Installation, Service, String) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8,::1/128");
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let token = json!({"type": "token", "token": given("REGCRED_TEST_KUBE_ADMIN_TOKEN")});
    let registered = kubernetes::FIRST.registration("dev", &token);
    service.client(&key).post("/v1/clusters", &registered).await.expect(201);
    (installation, service, key)
}

/// Runs `regcred` with these variables and no others.
async fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Exit {
    let mut command = Command::new(env!("CARGO_BIN_EXE_regcred"));
    command.args(arguments).env_clear().envs(variables.iter().copied()).env("PATH", "/usr/bin:/bin");
    let exit = Process::start(command).wait().await;
    assert!(!format!("{exit:?}").contains(CANARY), "{exit:?}");
    exit
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn command_diagnoses_through_a_service(pool: PgPool) {
    let (_installation, service, key) = serve(&pool).await;
    let a = registry::a();
    let image = Doctor::image_of(&a);
    let secret = pull_secret("k", &document(&a.address, &a.username, CANARY));
    let namespace = namespace_with(&[], vec![secret, pod(&[&image], &["k"]), deployment(&[&image], &["gone"])]).await;
    let url = format!("http://{}", service.address);
    let variables = [("REGCRED_URL", url.as_str()), ("REGCRED_TOKEN", key.as_str())];
    let place = ["--cluster", "dev", "-n", &namespace];

    let tree = run(&[&["doctor", "pod", "web"], &place[..]].concat(), &variables).await;

    assert_eq!(tree.code, Some(1), "{tree:?}");
    let entry = format!("✗ k, entry {}: invalid:", a.address);
    for line in
        ["✗ pod/web in namespace", "• k: ", &entry, "    credentialInvalid\n", "Fix: replace the Secret k", "$ kubectl"]
    {
        assert!(tree.stdout.contains(line), "{line}: {}", tree.stdout);
    }

    // A fix of regcred.
    let account = json!({"name": "prod", "registry": a.address, "username": a.username, "password": a.password});
    service.client(&key).post("/v1/registry-accounts", &account).await.expect(201);
    let workload = [&["doctor", "workload", "deploy/web", "-o", "json"], &place[..]].concat();
    let before = run(&workload, &variables).await;
    assert_eq!(before.code, Some(1), "{before:?}");
    let before: Value = serde_json::from_str(&before.stdout).expect("JSON");
    assert_eq!(before["images"][0]["fix"]["applicable"], true, "{before:#}");
    let applied = run(&[&workload[..], &["--apply"]].concat(), &variables).await;
    let applied: Value = serde_json::from_str(&applied.stdout).expect("JSON");
    assert_eq!(applied["images"][0]["fix"]["applied"], true, "{applied:#}");
    let after = run(&workload, &variables).await;
    assert_eq!(after.code, Some(0), "{after:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn command_without_a_diagnosis_exits_with_2(pool: PgPool) {
    let (_installation, service, key) = serve(&pool).await;
    let namespace = namespace_with(&[], Vec::new()).await;
    let url = format!("http://{}", service.address);
    let pod = ["doctor", "pod", "web", "--cluster", "dev", "-n", &namespace];
    for (url, token, arguments, said) in [
        (url.as_str(), key.as_str(), &pod[..], "`web`"),
        (&url, "rgc_wrong", &pod, "API key"),
        ("http://127.0.0.1:1", &key, &pod, "unreachable"),
        ("http://regcred.example.com", &key, &pod, "https://"),
        ("ftp://x", &key, &pod, "https://"),
        ("", &key, &pod, "REGCRED_URL"),
        (&url, "", &pod, "REGCRED_TOKEN"),
        (&url, &key, &["doctor", "workload", "web", "--cluster", "dev"], "KIND/NAME"),
        (&url, &key, &["doctor", "pod", "web"], "--cluster"),
        (&url, &key, &["doctor"], "a subcommand is missing"),
    ] {
        let exit = run(arguments, &[("REGCRED_URL", url), ("REGCRED_TOKEN", token)]).await;
        assert_eq!(exit.code, Some(2), "{said}: {exit:?}");
        assert!(exit.stderr.contains(said) && exit.stdout.is_empty(), "{said}: {exit:?}");
    }
}

/// Neither a service nor a database.
#[tokio::test]
async fn kubeconfig_is_enough_for_a_diagnosis() {
    let a = registry::a();
    let image = Doctor::image_of(&a);
    let objects = vec![login("k", &a), pod(&[&image], &["k"]), deployment(&[&image], &[])];
    let namespace = namespace_with(&[], objects).await;
    let kubeconfig = kubernetes::path("kubeconfig").display().to_string();
    let variables = [("KUBECONFIG", kubeconfig.as_str())];
    let diagnose = async |object: &str, more: &[&str]| {
        run(&[&["doctor", "kubeconfig", object, "-n", &namespace, "--local-node"], more].concat(), &variables).await
    };

    let good = diagnose("web", &[]).await;
    assert_eq!(good.code, Some(0), "{good:?}");
    assert!(good.stdout.contains("ok: ") && good.stdout.contains("✓ k, entry"), "{}", good.stdout);
    let broken = diagnose("deployment/web", &[]).await;
    assert_eq!(broken.code, Some(1), "{broken:?}");
    for line in ["noSecret: ", "Fix: create the Secret", "kubectl create secret docker-registry", "kubectl patch"] {
        assert!(broken.stdout.contains(line), "{line}: {}", broken.stdout);
    }
    let parsed = diagnose("deployment/web", &["-o", "json"]).await;
    let parsed: Value = serde_json::from_str(&parsed.stdout).expect("JSON");
    assert_eq!(parsed["images"][0]["fix"]["type"], "attachServiceAccount", "{parsed:#}");
    // The commands reach the cluster that was diagnosed.
    let named = diagnose("deployment/web", &["--kubeconfig", &kubeconfig]).await;
    let expected = format!("$ kubectl --kubeconfig='{kubeconfig}' create secret");
    assert!(named.stdout.contains(&expected), "{}", named.stdout);
    let unknown = diagnose("pod/gone", &[]).await;
    assert_eq!((unknown.code, unknown.stdout.as_str()), (Some(2), ""), "{unknown:?}");
    assert!(unknown.stderr.contains("gone"), "{unknown:?}");
    let nowhere = run(&["doctor", "kubeconfig", "-n", "there-is-no-such-namespace"], &variables).await;
    assert_eq!((nowhere.code, nowhere.stdout.as_str()), (Some(2), ""), "{nowhere:?}");
    assert!(nowhere.stderr.contains("there-is-no-such-namespace does not exist"), "{nowhere:?}");
}

/// The program is run as kubectl does; its output does not appear.
#[tokio::test]
async fn exec_plugin_of_a_kubeconfig_provides_the_credential() {
    let a = registry::a();
    let namespace = namespace_with(&["k"], vec![login("k", &a), deployment(&[&Doctor::image_of(&a)], &[])]).await;
    let folder = TempDir::new();
    let token = given("REGCRED_TEST_KUBE_ADMIN_TOKEN");
    let credential = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token},
    });
    let failing = format!("echo '{CANARY}'; exit 1");
    for (script, code) in [(format!("echo '{credential}'"), 0), (failing, 2)] {
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {
                "server": kubernetes::server(), "certificate-authority": kubernetes::path("ca.crt"),
            }}],
            "users": [{"name": "u", "user": {"exec": {
                "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", script],
                "interactiveMode": "Never",
            }}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        });
        let file = folder.write("kubeconfig", kubeconfig.to_string());
        let file = file.to_str().expect("UTF-8");
        let exit = run(&["doctor", "kubeconfig", "deploy/web", "--kubeconfig", file, "--local-node"], &[]).await;
        assert_eq!(exit.code, Some(code), "{exit:?}");
        assert!(!format!("{exit:?}").contains(&token), "{exit:?}");
    }
}

#[tokio::test]
async fn malformed_kubeconfig_is_not_printed() {
    let folder = TempDir::new();
    let text = format!("users:\n- name: u\n  user:\n    token: {CANARY}\n   x: y\n");
    let file = folder.write("kubeconfig", text);
    let exit = run(&["doctor", "kubeconfig", "--kubeconfig", file.to_str().expect("UTF-8")], &[]).await;
    assert_eq!(exit.code, Some(2), "{exit:?}");
    assert!(exit.stderr.contains("it is no kubeconfig"), "{exit:?}");
}

/// The address is the node's own host, which is another machine.
#[tokio::test]
async fn loopback_registry_is_asked_only_on_the_node() {
    let (registry, requests) = serve_registry(|_| answer("200 OK", &[], "{}"));
    let image = format!("{registry}/app:1");
    let secret = pull_secret("k", &document(&registry.to_string(), "martin", CANARY));
    let namespace = namespace_with(&[], vec![secret, pod(&[&image], &["k"])]).await;
    let kubeconfig = kubernetes::path("kubeconfig").display().to_string();
    let variables = [("KUBECONFIG", kubeconfig.as_str())];
    let arguments = ["doctor", "kubeconfig", "web", "-n", &namespace];

    let elsewhere = run(&arguments, &variables).await;

    assert_eq!((elsewhere.code, requests.count()), (Some(1), 0), "{elsewhere:?}");
    for line in ["not tried, because the registry is at the node's own host", "the node, add --local-node"] {
        assert!(elsewhere.stdout.contains(line), "{line}: {}", elsewhere.stdout);
    }
    let on_node = run(&[&arguments[..], &["--local-node"]].concat(), &variables).await;
    assert_eq!(on_node.code, Some(0), "{on_node:?}");
}

/// One image names a host, and the registry of another one names it as its token service.
#[tokio::test]
async fn host_of_an_image_is_no_token_service_of_another() {
    let trap = Trap::set();
    let realm = format!("https://127.0.0.2:{}/token", trap.port);
    let (evil, requests) = serve_registry(move |_| bearer(&realm));
    let images = [format!("{evil}/app:1"), "127.0.0.2:1/app:1".to_owned()];
    let images = images.each_ref().map(String::as_str);
    let secret = pull_secret("k", &document(&evil.to_string(), "martin", CANARY));
    let namespace = namespace_with(&[], vec![secret, pod(&images, &["k"])]).await;
    let kubeconfig = kubernetes::path("kubeconfig").display().to_string();
    let arguments = ["doctor", "kubeconfig", "web", "-n", &namespace, "--local-node"];

    let exit = run(&arguments, &[("KUBECONFIG", kubeconfig.as_str())]).await;

    assert_eq!((exit.code, trap.caught()), (Some(1), 0), "{exit:?}");
    assert!(requests.count() > 0);
}

/// Gives a pod a status.
async fn let_be(namespace: &str, pod: &str, status: Value) {
    let pods: Api<Pod> = Api::namespaced(kubernetes::admin(), namespace);
    let status = Patch::Merge(json!({"status": status}));
    pods.patch_status(pod, &PatchParams::default(), &status).await.expect("a status");
}

/// Gives a pod the status of one whose image is not pulled.
async fn let_wait(namespace: &str, pod: &str, image: &str) {
    let waiting = json!({"name": "c0", "image": image, "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": "ImagePullBackOff", "message": CANARY}}});
    let_be(namespace, pod, json!({"containerStatuses": [waiting]})).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn command_without_a_pod_diagnoses_those_that_wait(pool: PgPool) {
    let (_installation, service, key) = serve(&pool).await;
    let image = Doctor::image_of(&registry::a());
    let mut other = pod(&[&image], &["gone"]);
    other["metadata"]["name"] = json!("other");
    let namespace = namespace_with(&[], vec![pod(&[&image], &[]), other]).await;
    let url = format!("http://{}", service.address);
    let variables = [("REGCRED_URL", url.as_str()), ("REGCRED_TOKEN", key.as_str())];
    let arguments = ["doctor", "pod", "--cluster", "dev", "-n", &namespace];
    for pod in ["web", "other"] {
        let_be(&namespace, pod, json!({"phase": "Running"})).await;
    }
    let none = run(&arguments, &variables).await;
    let nothing = format!("No pod of the namespace {namespace} waits for an image. Name an object");
    assert!(none.code == Some(0) && none.stdout.starts_with(&nothing), "{none:?}");

    let_wait(&namespace, "web", &image).await;
    let found = run(&[&arguments[..], &["-o", "json"]].concat(), &variables).await;
    assert_eq!(found.code, Some(1), "{found:?}");
    let found: Value = serde_json::from_str(&found.stdout).expect("JSON");
    let names: Vec<&Value> = found["items"].as_array().expect("a list").iter().map(|one| &one["pod"]).collect();
    assert_eq!((names, &found["ok"]), (vec![&json!("web")], &json!(false)), "{found:#}");
    assert_eq!(found["items"][0]["diagnosis"]["images"][0]["verdict"], "noSecret");
    let applied = run(&[&arguments[..], &["--apply"]].concat(), &variables).await;
    assert!(applied.code == Some(2) && applied.stderr.contains("name the pod"), "{applied:?}");
}

#[tokio::test]
async fn kubeconfig_without_an_object_finds_the_pods_that_wait() {
    let a = registry::a();
    let image = Doctor::image_of(&a);
    let named = |name: &str| {
        let mut pod = pod(&[&image], &["gone"]);
        pod["metadata"]["name"] = json!(name);
        pod
    };
    let namespace = namespace_with(&[], vec![pod(&[&image], &[]), named("other")]).await;
    let kubeconfig = kubernetes::path("kubeconfig").display().to_string();
    let variables = [("KUBECONFIG", kubeconfig.as_str())];
    let arguments = ["doctor", "kubeconfig", "-n", &namespace, "--local-node"];
    for pod in ["web", "other"] {
        let_be(&namespace, pod, json!({"phase": "Running"})).await;
    }
    let none = run(&arguments, &variables).await;
    assert_eq!(none.code, Some(0), "{none:?}");
    let nothing = format!("No pod of the namespace {namespace} waits for an image");
    for part in [nothing.as_str(), "2 pods", "deployment/NAME"] {
        assert!(none.stdout.contains(part), "{part}: {}", none.stdout);
    }

    let_wait(&namespace, "web", &image).await;
    let found = run(&arguments, &variables).await;
    assert_eq!(found.code, Some(1), "{found:?}");
    let is_shown = |name: &str| found.stdout.contains(&format!("pod/{name} in namespace"));
    assert!(is_shown("web") && !is_shown("other"), "{}", found.stdout);
    for line in ["noSecret: ", "the kubelet reports: imagePullBackOff"] {
        assert!(found.stdout.contains(line), "{line}: {}", found.stdout);
    }
    let listed = run(&[&arguments[..], &["-o", "json"]].concat(), &variables).await;
    let listed: Value = serde_json::from_str(&listed.stdout).expect("JSON");
    assert_eq!((&listed["ok"], &listed["items"][0]["pod"]), (&json!(false), &json!("web")), "{listed:#}");

    // A pod that no kubelet reports about yet, and a workload without a pod. Their Secret is one.
    let new = [named("new"), deployment(&[&image], &["gone"])];
    let list = json!({"apiVersion": "v1", "kind": "List", "items": new});
    kubernetes::kubectl(&["create", "-n", &namespace, "-f", "-"], &list.to_string());
    let found = run(&arguments, &variables).await;
    let shared = "Several fixes share the Secret gone: create it once";
    for line in ["pod/web in", "pod/new in", "deployment/web in", "Pull secrets of the pod template", shared] {
        assert!(found.stdout.contains(line), "{line}: {}", found.stdout);
    }
    assert!(!found.stdout.contains("pod/other in"), "{}", found.stdout);
    let listed = run(&[&arguments[..], &["-o", "json"]].concat(), &variables).await;
    let listed: Value = serde_json::from_str(&listed.stdout).expect("JSON");
    let of_workload = (&listed["items"][2]["object"], &listed["items"][2]["pod"]);
    assert_eq!(of_workload, (&json!("deployment/web"), &Value::Null), "{listed:#}");
}

/// Pods of a page that together exceed the maximum of a response.
#[tokio::test]
async fn large_pods_are_listed_in_smaller_pages() {
    let image = Doctor::image_of(&registry::a());
    let namespace = namespace_with(&[], Vec::new()).await;
    let pods: Vec<Value> = (0..20)
        .map(|number| {
            let mut pod = pod(&[&image], &[]);
            pod["metadata"] = json!({"name": format!("web-{number}"), "annotations": {"x": "x".repeat(240_000)}});
            pod
        })
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": pods});
    // `apply` would store the object in a further annotation.
    kubernetes::kubectl(&["create", "-n", &namespace, "-f", "-"], &list.to_string());
    let kubeconfig = kubernetes::path("kubeconfig").display().to_string();

    let listed = run(&["doctor", "kubeconfig", "-n", &namespace], &[("KUBECONFIG", kubeconfig.as_str())]).await;

    assert_eq!(listed.code, Some(1), "{listed:?}");
    for number in 0..20 {
        assert!(listed.stdout.contains(&format!("pod/web-{number} in namespace")), "{}", listed.stdout);
    }
}
