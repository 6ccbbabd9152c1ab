//! Explanations of the entry that each reader uses for an image.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::app::TestApp;

const EXPLAIN: &str = "/v1/docker-configs/explain";
const CONSUMERS: [&str; 5] = ["kubernetes", "k8schain", "docker", "dockerAuthConfig", "podman"];

/// The explanation for an image.
async fn explain(app: &TestApp, image: &str, subject: Value) -> Value {
    let mut body = subject;
    body["image"] = json!(image);
    app.admin().post(EXPLAIN, &body).await.expect(200)
}

/// A docker config with one valid entry under this key.
fn config(key: &str) -> Value {
    json!({"config": {"auths": {key: {"auth": BASE64_STANDARD.encode("u:p")}}}})
}

fn codes(answer: &Value) -> Vec<&str> {
    let warnings = answer["warnings"].as_array().expect("warnings");
    warnings.iter().map(|warning| warning["code"].as_str().expect("a code")).collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_spelling_of_an_image_is_understood(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("hub", "https://index.docker.io/v1/", "u", "pw").await;
    app.register_account("team-a", "registry.example.com:5000", "u", "pw").await;
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    for (written, full, account) in [
        ("nginx".to_owned(), "docker.io/library/nginx", "hub"),
        ("nginx:1.27".to_owned(), "docker.io/library/nginx", "hub"),
        (format!("nginx@{digest}"), "docker.io/library/nginx", "hub"),
        ("acme/app".to_owned(), "docker.io/acme/app", "hub"),
        ("docker.io/nginx".to_owned(), "docker.io/library/nginx", "hub"),
        ("index.docker.io/acme/app".to_owned(), "docker.io/acme/app", "hub"),
        ("registry.example.com:5000/os/alpine:3".to_owned(), "registry.example.com:5000/os/alpine", "team-a"),
        (format!("registry.example.com:5000/os/alpine:3@{digest}"), "registry.example.com:5000/os/alpine", "team-a"),
    ] {
        let explained = explain(&app, &written, json!({"accounts": ["hub", "team-a"]})).await;
        assert_eq!(explained["image"], full, "{written}");
        for consumer in CONSUMERS {
            assert_eq!(
                explained["consumers"][consumer]["accounts"],
                json!([account]),
                "{written} {consumer}: {explained}"
            );
        }
        assert_eq!(explained["warnings"], json!([]));
    }
    for written in
        ["", "Nginx", "https://docker.io/nginx", "reg.io/", "reg.io/app:", "reg.io/app@sha256:abc", " nginx", "a//b"]
    {
        let refused = app.admin().post(EXPLAIN, &json!({"accounts": ["hub"], "image": written})).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["image"], "{written:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn each_reader_has_its_own_precedence(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, scope) in
        [("all", "reg.io"), ("team", "reg.io/team"), ("app", "reg.io/team/app"), ("other", "reg.io/other")]
    {
        let account =
            json!({"name": name, "registry": scope, "username": "u", "password": "pw", "labels": {"for": "reg"}});
        app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    }
    let selector = json!({"accountSelector": {"matchLabels": {"for": "reg"}}});

    let explained = explain(&app, "reg.io/team/app:1", selector).await;

    let consumers = &explained["consumers"];
    assert_eq!(consumers["kubernetes"]["accounts"], json!(["app", "team", "all"]));
    assert_eq!(consumers["kubernetes"]["keys"], json!(["reg.io/team/app", "reg.io/team", "reg.io"]));
    assert_eq!(consumers["k8schain"]["accounts"], json!(["app"]));
    assert_eq!(consumers["podman"]["accounts"], json!(["app"]));
    for consumer in ["docker", "dockerAuthConfig"] {
        let problem = consumers[consumer]["problem"].as_str().expect("a problem");
        assert!(problem.contains("matches only hosts"), "{problem}");
    }
    // A single account for a path can be explained for the docker CLI, with a warning.
    let explained = explain(&app, "reg.io/other-team/app", json!({"accounts": ["other"]})).await;
    assert_eq!(explained["consumers"]["docker"]["accounts"], json!(["other"]));
    assert_eq!(explained["consumers"]["podman"]["nearest"][0]["mismatch"], "pathNotPrefix");
    // The kubelet compares paths as plain text.
    assert_eq!(explained["consumers"]["kubernetes"]["accounts"], json!(["other"]));
    assert_eq!(codes(&explained), ["matchesMore", "matchesMore"]);
}

/// Key, image, mismatch for kubelet, docker CLI and podman (`-` if the entry is used), and a part
/// of the first detail.
const NEAR_MISSES: [(&str, &str, [&str; 3], &str); 9] = [
    (
        "reg.example.com:6000",
        "reg.example.com:5000/app",
        ["portDiffers"; 3],
        "the entry has port 6000, the image has port 5000",
    ),
    ("reg.example.com", "reg.example.com:443/app", ["portDiffers"; 3], "the entry has no port, the image has port 443"),
    ("Reg.example.com", "reg.example.com/app", ["caseDiffers"; 3], "write `reg.example.com`"),
    (
        "reg.example.com/foo",
        "reg.example.com/bar/app",
        ["pathNotPrefix", "-", "pathNotPrefix"],
        "`bar/app` is not below the path `foo`",
    ),
    (
        "*.example.com",
        "a.b.example.com/app",
        ["globOneLabel", "noWildcards", "noWildcards"],
        "`*.example.com` has 3 labels, `a.b.example.com` has 4",
    ),
    ("*.example.com", "a.example.com/app", ["-", "noWildcards", "noWildcards"], "name the host"),
    ("registry.hub.docker.com", "nginx", ["spellingUnknown"; 3], "write `https://index.docker.io/v1/`"),
    ("reg.example.com/foo/", "reg.example.com/foo/app", ["-", "-", "spellingUnknown"], "write `reg.example.com/foo`"),
    ("mirror.example.com", "images.example.com/app", ["hostDiffers"; 3], "the image is at `images.example.com`"),
];

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_nearest_entry_explains_its_mismatch(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (key, image, mismatches, detail) in NEAR_MISSES {
        let explained = explain(&app, image, config(key)).await;
        let mut details = Vec::new();
        for (consumer, mismatch) in ["kubernetes", "docker", "podman"].into_iter().zip(mismatches) {
            let look_up = &explained["consumers"][consumer];
            if mismatch == "-" {
                assert_eq!(
                    (&look_up["keys"], &look_up["nearest"]),
                    (&json!([key]), &json!([])),
                    "{consumer}: {explained}"
                );
                continue;
            }
            let nearest = &look_up["nearest"][0];
            assert_eq!(
                (&look_up["keys"], &nearest["mismatch"]),
                (&json!([]), &json!(mismatch)),
                "{consumer}: {explained}"
            );
            assert_eq!((&nearest["key"], &nearest["account"]), (&json!(key), &Value::Null));
            details.push(nearest["detail"].as_str().expect("a text").to_owned());
        }
        assert!(details[0].contains(detail), "{details:?}");
    }
    // An unrelated entry is not near.
    let explained = explain(&app, "quay.io/app", config("reg.example.com")).await;
    assert_eq!(explained["consumers"]["kubernetes"]["nearest"], json!([]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_config_is_explained_in_any_format_without_accounts(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let document = config("reg.io")["config"].clone();
    let value = BASE64_STANDARD.encode(document.to_string());
    let legacy = document["auths"].clone();
    for (format, given) in [
        ("the object", document.clone()),
        ("its text", json!(document.to_string())),
        ("its base64", json!(value)),
        (
            "a manifest",
            json!({"kind": "Secret", "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": value}}),
        ),
        ("a manifest in YAML", json!(format!("kind: Secret\ndata:\n  .dockerconfigjson: {value}\n"))),
        ("the legacy form", legacy.clone()),
        ("its base64", json!(BASE64_STANDARD.encode(legacy.to_string()))),
    ] {
        let explained = explain(&app, "reg.io/app", json!({"config": given})).await;
        for consumer in ["kubernetes", "podman"] {
            assert_eq!(explained["consumers"][consumer]["keys"], json!(["reg.io"]), "{format}: {explained}");
            assert_eq!(explained["consumers"][consumer]["accounts"], json!([]));
        }
    }
    let explained = explain(&app, "reg.io/app", json!({"config": legacy})).await;
    let problem = explained["consumers"]["docker"]["problem"].as_str().expect("a problem");
    assert!(problem.contains("legacy form"), "{problem}");
    assert_eq!(app.rows().await[0], 0);

    for (body, field) in [
        (json!({"image": "nginx"}), "accounts"),
        (json!({"image": "nginx", "config": {}, "accounts": ["a"]}), "config"),
        (json!({"image": "nginx", "config": {}, "accountSelector": {}}), "config"),
        (json!({"image": "nginx", "config": [1]}), "config"),
        (json!({"image": "nginx", "config": "not base64!"}), "config"),
        (json!({"image": "nginx", "accounts": ["missing"]}), "accounts[0]"),
        (json!({"image": "nginx", "accountSelector": {}}), "accountSelector"),
    ] {
        let refused = app.admin().post(EXPLAIN, &body).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field], "{body}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_config_is_linted(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let auth = |login: &str| json!({"auth": BASE64_STANDARD.encode(login)});
    let auths = |key: &str, entry: Value| json!({"auths": {key: entry}});
    for (config, code, explained) in [
        (auths("registry.hub.docker.com", auth("u:p")), "neverMatches", "write `https://index.docker.io/v1/`"),
        (auths("Reg.io", auth("u:p")), "neverMatches", "write `reg.io`"),
        (auths("*.reg.io", auth("u:p")), "missedBySome", "the docker CLI and podman"),
        (auths("reg.io/foo", auth("u:p")), "matchesMore", "`reg.io/foox/app`"),
        (auths("reg .io", auth("u:p")), "invalidKey", "white space"),
        (auths("reg.io", json!({"auth": "!"})), "refused", "the complete document unusable for the kubelet"),
        (auths("reg.io", json!({})), "holdsNothing", "no credential for"),
        (
            auths("reg.io", json!({"username": "u", "password": "old", "auth": auth("u:p")["auth"]})),
            "authWins",
            "`auth`",
        ),
        (json!({"auths": {"reg.io": auth("u:p"), "https://reg.io": auth("u:q")}}), "ambiguous", "at random"),
        (json!({"auths": {"reg.io": {}}, "credsStore": "desktop"}), "helperFirst", "`credsStore`"),
        (
            json!({"kind": "Secret", "type": "Opaque", "data": {".dockerconfigjson": "e30="}}),
            "wrongSecretType",
            "`kubernetes.io/dockerconfigjson`",
        ),
    ] {
        let answer = explain(&app, "quay.io/some/app", json!({"config": config})).await;
        let warnings = answer["warnings"].as_array().expect("warnings");
        let warning =
            warnings.iter().find(|warning| warning["code"] == code).unwrap_or_else(|| panic!("{code}: {answer}"));
        assert!(warning["detail"].as_str().is_some_and(|detail| detail.contains(explained)), "{explained}: {warning}");
        // The import returns the same warning.
        let request = app.admin().request("POST", "/v1/registry-accounts:import?dryRun=true").json(&config);
        let imported = app.admin().send(request).await.expect(200);
        assert!(codes(&imported).contains(&code), "{code}: {imported}");
    }
    assert_eq!(codes(&explain(&app, "quay.io/some/app", config("reg.io")).await), [""; 0]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_new_account_is_returned_with_its_warnings(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, registry, expected) in [
        ("plain", "reg.io", None),
        ("port", "reg.io:5000", None),
        ("hub", "registry.hub.docker.com", None),
        ("case", "Reg.IO", None),
        ("path", "reg.io/foo", Some(("matchesMore", "`reg.io/foox/app`"))),
        ("ipv6", "[::1]", Some(("missedBySome", "an IPv6 address only with its port"))),
    ] {
        let created = app.register_account(name, registry, "u", "pw").await;
        assert_eq!(codes(&created), Vec::from_iter(expected.map(|(code, _)| code)), "{created}");
        if let Some((_, explained)) = expected {
            let warning = &created["warnings"][0];
            assert_eq!(warning["account"], name);
            assert!(warning["detail"].as_str().is_some_and(|detail| detail.contains(explained)), "{warning}");
        }
        let shown = app.admin().get(&format!("/v1/registry-accounts/{name}")).await.expect(200);
        assert_eq!(shown["warnings"], created["warnings"]);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_explanation_contains_no_password(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "reg.io", "u", "CANARY-1").await;
    let encoded = BASE64_STANDARD.encode("u:CANARY-2");
    let config = json!({
        "auths": {
            "reg.io": {"auth": encoded}, "https://me:CANARY-3@reg.io:80": {"auth": "CANARY-4!"},
            "quay.io": {"username": "CANARY-5", "password": "CANARY-6", "identitytoken": "CANARY-7"},
        },
        "HttpHeaders": {"Authorization": "CANARY-8"},
    });
    for subject in [json!({"accounts": ["a"]}), json!({"config": config}), json!({"config": config.to_string()})] {
        for image in ["reg.io/app", "reg.io:81/app", "quay.io/app"] {
            let explained = explain(&app, image, subject.clone()).await.to_string();
            assert!(!explained.contains("CANARY") && !explained.contains(&encoded), "{explained}");
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn host_without_a_dot_is_warned_about_everywhere(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let has_warning = |answer: &Value| {
        let warnings = answer["warnings"].as_array().expect("warnings");
        let found = warnings.iter().find(|warning| warning["code"] == "neverMatches");
        let detail = found.and_then(|warning| warning["detail"].as_str()).unwrap_or_default().to_owned();
        assert!(detail.contains("images named `harbor/…` are on Docker Hub"), "{answer}");
    };
    has_warning(&app.register_account("mine", "harbor", "u", "pw").await);
    app.register_account("other", "harbor:5000", "u", "pw").await;
    let moved = json!({"registry": "harbor", "password": "pw"});
    has_warning(&app.admin().patch("/v1/registry-accounts/other", &moved).await.expect(200));
    let document = config("harbor")["config"].clone();
    let request = app.admin().request("POST", "/v1/registry-accounts:import?dryRun=true&namePrefix=x-").json(&document);
    has_warning(&app.admin().send(request).await.expect(200));
    for subject in [json!({"accounts": ["mine"]}), config("harbor")] {
        let explained = explain(&app, "harbor/app", subject).await;
        has_warning(&explained);
        for consumer in CONSUMERS {
            let verdict = &explained["consumers"][consumer]["verdict"];
            assert_eq!(verdict["usable"], false, "{consumer}: {verdict}");
            let sentence = verdict["sentence"].as_str().expect("a sentence");
            assert!(sentence.contains("images named `harbor/…` are on Docker Hub"), "{sentence}");
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn password_with_white_space_at_its_end_is_warned_about_everywhere(pool: PgPool) {
    const CODE: &str = "passwordEndsWithWhitespace";
    let app = TestApp::spawn(pool).await;
    let created = app.register_account("a", "reg.io", "u", "CANARY\n").await;
    assert_eq!(codes(&created), [CODE]);
    assert_eq!((&created["warnings"][0]["account"], &created["warnings"][0]["key"]), (&json!("a"), &json!("reg.io")));
    let path = "/v1/registry-accounts/a";
    assert_eq!(codes(&app.admin().get(path).await.expect(200)), [CODE]);
    assert_eq!(codes(&explain(&app, "reg.io/app", json!({"accounts": ["a"]})).await), [CODE]);
    // It is stored as it was given.
    let rendered = app.admin().post("/v1/docker-configs", &json!({"accounts": ["a"]})).await.expect(200);
    assert_eq!(rendered["config"]["auths"]["reg.io"]["password"], "CANARY\n");

    // Other changes keep the warning, a rotation decides anew, and so does an import.
    let patch = async |body: Value| codes(&app.admin().patch(path, &body).await.expect(200)).join(" ");
    assert_eq!(patch(json!({"email": "a@example.com"})).await, CODE);
    assert_eq!(patch(json!({"password": "CANARY"})).await, "");
    assert_eq!(codes(&explain(&app, "reg.io/app", json!({"accounts": ["a"]})).await), [""; 0]);
    assert_eq!(patch(json!({"password": "CANARY "})).await, CODE);
    let import = async |login: &str| {
        let document = json!({"auths": {"reg.io": {"auth": BASE64_STANDARD.encode(login)}}});
        let request = app.admin().request("POST", "/v1/registry-accounts:import?namePrefix=n-").json(&document);
        codes(&app.admin().send(request).await.expect(200)).join(" ")
    };
    assert_eq!(import("u:CANARY\n").await, CODE);
    assert_eq!(codes(&app.admin().get("/v1/registry-accounts/n-reg-io").await.expect(200)), [CODE]);
    assert_eq!(import("u:CANARY").await, "");
    assert_eq!(codes(&app.admin().get("/v1/registry-accounts/n-reg-io").await.expect(200)), [""; 0]);

    let config = json!({"config": {"auths": {"reg.io": {"username": "u", "password": "CANARY\t", "auth": ""}}}});
    let explained = explain(&app, "reg.io/app", config).await;
    assert!(codes(&explained).contains(&CODE) && !explained.to_string().contains("CANARY"), "{explained}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn each_reader_has_a_verdict(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, registry) in [("team", "reg.io/team"), ("all", "reg.io"), ("port", "reg.io:5000")] {
        app.register_account(name, registry, "u", "pw").await;
    }
    let verdict = async |consumer: &str, image: &str, subject: Value| {
        explain(&app, image, subject).await["consumers"][consumer]["verdict"].clone()
    };
    let accounts = |names: &[&str]| json!({"accounts": names});
    let helper = json!({"config": {"auths": {"reg.io": {}}, "credsStore": "desktop"}});
    let broken = json!({"config": {"auths": {"reg.io": {"auth": "!"}}}});
    let random = json!({"config": {"auths": {"https://reg.io": {"auth": "dTpw"}, "http://reg.io": {"auth": "dTpx"}}}});
    for (consumer, image, subject, usable, account, sentence) in [
        (
            "kubernetes",
            "reg.io/x",
            accounts(&["all"]),
            true,
            json!("all"),
            "the kubelet logs in with the entry `reg.io` of the account `all`",
        ),
        (
            "kubernetes",
            "reg.io/team/x",
            accounts(&["all", "team"]),
            true,
            json!("team"),
            "tries the entry `reg.io/team` of the account `team` first, and then 1 more",
        ),
        ("k8schain", "reg.io/team/x", accounts(&["all", "team"]), true, json!("team"), "k8schain logs in with"),
        (
            "docker",
            "reg.io/team/x",
            accounts(&["all", "team"]),
            false,
            Value::Null,
            "the docker CLI matches only hosts",
        ),
        (
            "docker",
            "reg.io/other/x",
            accounts(&["team"]),
            false,
            json!("team"),
            "for `reg.io/other/x`, although it is for `reg.io/team`",
        ),
        (
            "podman",
            "reg.io/other/x",
            accounts(&["team"]),
            false,
            Value::Null,
            "podman uses no entry for `reg.io/other/x`; the nearest is `reg.io/team`",
        ),
        (
            "docker",
            "reg.io/x",
            accounts(&["port"]),
            false,
            Value::Null,
            "the entry has port 5000, the image has no port",
        ),
        ("podman", "quay.io/x", accounts(&["all"]), false, Value::Null, "podman uses no entry for `quay.io/x`"),
        ("docker", "reg.io/x", helper, false, Value::Null, "asks the program `docker-credential-desktop`"),
        ("kubernetes", "reg.io/x", broken, false, Value::Null, "the kubelet cannot use this document"),
        ("docker", "reg.io/x", random, true, Value::Null, "picks one of 2 entries at random"),
    ] {
        let found = verdict(consumer, image, subject).await;
        assert_eq!((&found["usable"], &found["account"]), (&json!(usable), &account), "{consumer}: {found}");
        assert!(found["sentence"].as_str().is_some_and(|text| text.contains(sentence)), "{sentence}: {found}");
    }
}

/// Pull secrets of the cluster `dev`, which is not reachable.
async fn declare_pull_secrets(app: &TestApp) {
    let cluster = json!({"name": "dev", "server": "https://127.0.0.1:1", "auth": {"type": "token", "token": "t"}});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
    for (name, registry, labels) in [
        ("a-first", "reg.io", json!({"team": "a"})),
        ("a-second", "reg.io", json!({"team": "a"})),
        ("b-one", "quay.io", json!({"team": "b"})),
    ] {
        let account = json!({"name": name, "registry": registry, "username": "u", "password": "pw", "labels": labels});
        app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    }
    let by_label = |team: &str| json!({"accountSelector": {"matchLabels": {"team": team}}});
    for (name, chosen, namespace, service_accounts) in [
        ("by-label", by_label("a"), "ns-a", json!(["default"])),
        ("by-name", json!({"accounts": ["b-one"]}), "ns-a", json!(["default", "builder"])),
        ("elsewhere", json!({"accounts": ["b-one"]}), "ns-b", json!(["default"])),
        ("unattached", json!({"accounts": ["a-second"]}), "ns-a", json!([])),
        ("empty", by_label("none"), "ns-c", json!(["default"])),
    ] {
        let mut body = chosen;
        body["secret"] = json!({"name": name});
        body["targets"] = json!([{"cluster": "dev", "namespaces": [namespace]}]);
        body["serviceAccounts"] = service_accounts;
        let request = app.admin().request("PUT", &format!("/v1/pull-secrets/{name}")).json(&body);
        app.admin().send(request).await.expect(201);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn accounts_of_pull_secrets_are_explained(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    declare_pull_secrets(&app).await;
    let accounts = |explained: &Value| explained["consumers"]["kubernetes"]["accounts"].clone();

    // Of selected accounts with one key, the oldest is delivered.
    let explained = explain(&app, "reg.io/app", json!({"pullSecret": "by-label"})).await;
    assert_eq!((accounts(&explained), &explained["pullSecrets"]), (json!(["a-first"]), &json!(["by-label"])));
    let explained = explain(&app, "reg.io/app", json!({"pullSecret": "empty"})).await;
    assert_eq!((accounts(&explained), &explained["pullSecrets"]), (json!([]), &json!(["empty"])));

    let of = |namespace: &str, name: &str| json!({"serviceAccount": {"cluster": "dev", "namespace": namespace, "name": name}});
    for (namespace, name, image, pull_secrets, expected) in [
        ("ns-a", "default", "reg.io/app", json!(["by-label", "by-name"]), json!(["a-first"])),
        ("ns-a", "default", "quay.io/app", json!(["by-label", "by-name"]), json!(["b-one"])),
        ("ns-a", "builder", "reg.io/app", json!(["by-name"]), json!([])),
        ("ns-a", "other", "reg.io/app", json!([]), json!([])),
        ("ns-b", "default", "quay.io/app", json!(["elsewhere"]), json!(["b-one"])),
    ] {
        let explained = explain(&app, image, of(namespace, name)).await;
        let found = (&explained["pullSecrets"], &accounts(&explained));
        assert_eq!(found, (&pull_secrets, &expected), "{namespace} {name} {image}");
    }
    assert_eq!(explain(&app, "reg.io/app", json!({"accounts": ["a-first"]})).await["pullSecrets"], json!([]));

    for (subject, field) in [
        (json!({"pullSecret": "unknown"}), "pullSecret"),
        (json!({"pullSecret": "Not a name"}), "pullSecret"),
        (json!({"pullSecret": "by-name", "accounts": ["b-one"]}), "pullSecret"),
        (json!({"serviceAccount": {"cluster": "nowhere", "namespace": "a", "name": "b"}}), "serviceAccount.cluster"),
        (json!({"serviceAccount": {"cluster": "dev", "namespace": "A", "name": "b"}}), "serviceAccount.namespace"),
        (json!({"serviceAccount": {"cluster": "dev", "namespace": "a"}}), "serviceAccount.name"),
    ] {
        let mut body = subject;
        body["image"] = json!("reg.io/app");
        let refused = app.admin().post(EXPLAIN, &body).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field], "{body}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pull_secrets_are_explained_within_the_grants_of_the_caller(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    declare_pull_secrets(&app).await;
    let grants =
        json!({"accounts": ["a-*", {"matchLabels": {"team": "a"}}], "clusters": ["dev"], "namespaces": ["ns-a"]});
    let viewer = app.caller("viewer", "viewer", Some(grants.clone())).await;
    let explain = async |client: &crate::support::client::Client, subject: Value| {
        let mut body = subject;
        body["image"] = json!("quay.io/app");
        client.post(EXPLAIN, &body).await
    };
    let service_account = |cluster: &str, namespace: &str| json!({"serviceAccount": {"cluster": cluster, "namespace": namespace, "name": "default"}});
    assert_eq!(
        explain(&viewer, json!({"pullSecret": "by-label"})).await.expect(200)["pullSecrets"],
        json!(["by-label"])
    );
    // A hidden pull secret reads as a missing one, and its accounts are not explained.
    let hidden = explain(&viewer, json!({"pullSecret": "by-name"})).await;
    let missing = explain(&viewer, json!({"pullSecret": "by-nine"})).await;
    hidden.problem(422, "invalid-request");
    assert_eq!(hidden.json()["errors"].to_string().replace("by-name", "by-nine"), missing.json()["errors"].to_string());
    let explained = explain(&viewer, service_account("dev", "ns-a")).await.expect(200);
    assert_eq!(explained["pullSecrets"], json!(["by-label"]));
    assert!(!explained.to_string().contains("b-one"), "{explained}");
    for (subject, field) in [
        (service_account("dev", "ns-b"), "serviceAccount.namespace"),
        (service_account("prod", "ns-a"), "serviceAccount.cluster"),
    ] {
        assert_eq!(explain(&viewer, subject).await.fields(), [field]);
    }
    // A renderer may explain accounts, but not read pull secrets.
    let renderer = app.caller("renderer", "renderer", Some(grants)).await;
    explain(&renderer, json!({"accounts": ["a-first"]})).await.expect(200);
    explain(&renderer, json!({"pullSecret": "by-label"})).await.problem(403, "forbidden");
    explain(&renderer, service_account("dev", "ns-a")).await.problem(403, "forbidden");
}
