//! Imports of lists of Secrets.

use super::*;

fn pull_secret(namespace: &str, name: &str, entries: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson",
        "metadata": {"name": name, "namespace": namespace},
        "data": {".dockerconfigjson": auth(&json!({"auths": entries}).to_string())},
    })
}

/// Returns source, key, outcome and reason of each item.
fn sourced(answer: &Answer) -> Vec<[String; 4]> {
    let items = answer.expect(200)["items"].as_array().expect("items").clone();
    let member = |item: &Value, name: &str| item[name].as_str().unwrap_or("-").to_owned();
    items.iter().map(|item| ["source", "key", "outcome", "reason"].map(|name| member(item, name))).collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_pull_secret_of_a_list_is_imported(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let login = |login: &str| json!({"auth": auth(login)});
    let broken = json!({
        "kind": "Secret", "metadata": {"name": "broken", "namespace": "b"}, "data": {".dockerconfigjson": "e30x!"},
    });
    let items = [
        pull_secret("a", "pull", &json!({"reg.io": login("u:1"), "quay.io": login("u:q")})),
        json!({"kind": "Secret", "metadata": {"name": "tls", "namespace": "a"}, "type": "kubernetes.io/tls", "data": {"tls.key": "CANARY"}}),
        json!({"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "b"}}),
        pull_secret("b", "pull", &json!({"reg.io": login("u:1")})),
        broken,
        pull_secret("c", "pull", &json!({"https://reg.io": login("u:other"), "*.io": login("u:x")})),
    ];
    let expected = rows(&[
        ["a/pull", "quay.io", "created", "-"],
        ["a/pull", "reg.io", "created", "-"],
        ["b/pull", "reg.io", "skipped", "duplicate"],
        ["c/pull", "*.io", "skipped", "invalidRegistry"],
        ["c/pull", "https://reg.io", "skipped", "conflict"],
        ["a/tls", "a/tls", "skipped", "notAPullSecret"],
        ["settings", "settings", "skipped", "notAPullSecret"],
        ["b/broken", "b/broken", "skipped", "invalidEntry"],
    ]);
    let list = json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": items});
    let imported = import(&app.admin(), "", JSON, list.to_string()).await;
    assert_eq!(sourced(&imported), expected);
    assert!(!imported.body.contains("CANARY"), "{imported:?}");
    let items = imported.json()["items"].clone();
    assert!(items[2]["detail"].as_str().is_some_and(|detail| detail.contains("of `a/pull`")), "{items}");
    let warning = imported.json()["warnings"][0].clone();
    assert!(
        warning["detail"].as_str().is_some_and(|detail| detail.starts_with("in the Secret `c/pull`: ")),
        "{warning}"
    );
    assert_eq!(rendered(&app).await["reg.io"]["password"], "1");

    // A list of the API server, whose items have no kind.
    let mut bare = list.clone();
    bare["kind"] = json!("SecretList");
    bare["items"] = json!([list["items"][0], list["items"][1]]);
    for item in bare["items"].as_array_mut().expect("items") {
        item.as_object_mut().expect("an object").remove("kind");
    }
    let again = import(&app.admin(), "", JSON, bare.to_string()).await;
    assert_eq!(outcome_list(&again), ["unchanged", "unchanged", "skipped"]);
    assert_eq!(outcome_list(&import(&app.admin(), "", JSON, r#"{"kind":"List","items":[]}"#).await), [""; 0]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn secrets_of_a_cluster_are_imported_as_kubectl_prints_them(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    for (name, server) in [("one", "one.example.com"), ("two", "two.example.com:5000")] {
        let server = format!("--docker-server={server}");
        let create = ["create", "secret", "docker-registry", name, "-n", &namespace, &server];
        kubectl(&[&create[..], &["--docker-username=martin", "--docker-password=xxx1"]].concat(), "");
    }
    kubectl(&["create", "secret", "generic", "other", "-n", &namespace, "--from-literal=password=CANARY"], "");
    for (format, media_type) in [("yaml", YAML), ("json", JSON)] {
        let printed = kubectl(&["get", "secrets", "-n", &namespace, "-o", format], "");
        let imported = import(&app.admin(), "", media_type, printed).await;
        let found = sourced(&imported);
        let source = |name: &str| format!("{namespace}/{name}");
        let outcome = if format == "yaml" { "created" } else { "unchanged" };
        for row in [
            [source("one"), "one.example.com".to_owned(), outcome.to_owned(), "-".to_owned()],
            [source("two"), "two.example.com:5000".to_owned(), outcome.to_owned(), "-".to_owned()],
            [source("other"), source("other"), "skipped".to_owned(), "notAPullSecret".to_owned()],
        ] {
            assert!(found.contains(&row), "{row:?}: {found:?}");
        }
        assert!(!imported.body.contains("CANARY"), "{imported:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn malformed_or_too_large_list_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let entries = |from: usize, count: usize| {
        let entries = (from..from + count).map(|at| (format!("r{at}.example.com"), json!({"auth": auth("u:p")})));
        Value::Object(entries.collect())
    };
    let many = [pull_secret("a", "one", &entries(0, 600)), pull_secret("a", "two", &entries(600, 401))];
    let large = json!({"kind": "List", "items": [{"kind": "Secret", "data": {"a": "x".repeat(1024 * 1024)}}]});
    for (document, detail) in [
        (json!({"kind": "List", "items": {}}), "`items`"),
        (json!({"kind": "List", "items": "x"}), "`items`"),
        (json!({"kind": "Pod"}), "`kind`"),
        (json!({"kind": "List", "items": vec![0; 10_001]}), "more than 10000 items"),
        (json!({"kind": "List", "items": many}), "more than 1000 entries"),
        (large, "longer than 1 MiB"),
    ] {
        let refused = import(&app.admin(), "", JSON, document.to_string()).await;
        let problem = refused.problem(422, "invalid-request");
        assert!(problem["detail"].as_str().is_some_and(|text| text.contains(detail)), "{detail}: {problem}");
    }
    assert_eq!(app.rows().await[0], 0);
    // An explanation is about one Secret.
    let body = json!({"image": "reg.io/app", "config": {"kind": "List", "items": []}});
    assert_eq!(app.admin().post("/v1/docker-configs/explain", &body).await.fields(), ["config"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn entry_of_a_helper_says_what_to_do_next(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let document = json!({
        "auths": {"reg.example.com:5000": {}, "123.dkr.ecr.eu-central-1.amazonaws.com": {}, "store.example.com": {}},
        "credHelpers": {
            "reg.example.com:5000": "pass", "123.dkr.ecr.eu-central-1.amazonaws.com": "ecr-login", "x;$(id)": "a b",
        },
        "credsStore": "desktop",
    });
    let imported = import(&app.admin(), "", JSON, document.to_string()).await.expect(200);
    let detail = |key: &str| {
        let items = imported["items"].as_array().expect("items");
        items.iter().find(|item| item["key"] == key).expect("the entry")["detail"].as_str().expect("a text").to_owned()
    };
    let next = detail("reg.example.com:5000");
    assert!(next.contains("`echo reg.example.com:5000 | docker-credential-pass get`"), "{next}");
    let next = detail("store.example.com");
    assert!(next.contains("`echo store.example.com | docker-credential-desktop get`"), "{next}");
    assert!(detail("123.dkr.ecr.eu-central-1.amazonaws.com").contains("end after hours"));
    assert!(detail("credsStore").contains("`docker-credential-desktop list`"));
    // No command is made of text that a shell would interpret.
    assert!(!detail("x;$(id)").contains("echo"), "{}", detail("x;$(id)"));
}
