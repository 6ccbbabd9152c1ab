//! Docker configs that somebody has, made into accounts, and given back as they were.

use std::{
    fs,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Secret;
use proptest::{
    prelude::any,
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::support::{
    app::TestApp,
    client::{Answer, Client},
    kubernetes::{self, kubectl},
    process::Installation,
    registry,
};

const IMPORT: &str = "/v1/registry-accounts:import";
const JSON: &str = "application/json";
const YAML: &str = "application/yaml";
const TEXT: &str = "text/plain";

/// What `docker login` left on a node of the walk-through.
const W1: &str = r#"{"auths":{"daocloud.io":{"auth":"bWFydGluOnB3MQ=="},"https://index.docker.io/v1/":{"auth":"bWFydGluOnB3Mg=="},"registry.martin.com:5000":{"auth":"bWFydGluOmlieGcxUTVB"}},
 "HttpHeaders":{"User-Agent":"Docker-Client/17.09.0-ce (linux)"}}"#;

/// Sends a document to be imported; `query` with its question mark.
async fn import(client: &Client, query: &str, media_type: &str, document: impl Into<reqwest::Body>) -> Answer {
    let request = client.request("POST", &format!("{IMPORT}{query}"));
    client.send(request.header("Content-Type", media_type).body(document)).await
}

/// What became of the items: key, name, outcome, reason.
fn outcomes(answer: &Answer) -> Vec<[String; 4]> {
    let items = answer.expect(200)["items"].as_array().expect("items").clone();
    let member = |item: &Value, name: &str| item[name].as_str().unwrap_or("-").to_owned();
    items.iter().map(|item| ["key", "name", "outcome", "reason"].map(|name| member(item, name))).collect()
}

/// The outcomes alone, in order.
fn outcome_list(answer: &Answer) -> Vec<String> {
    outcomes(answer).into_iter().map(|[_, _, outcome, _]| outcome).collect()
}

fn rows(expected: &[[&str; 4]]) -> Vec<[String; 4]> {
    expected.iter().map(|row| row.map(str::to_owned)).collect()
}

/// The logins that the kubelet would be given, all of them.
async fn rendered(app: &TestApp) -> Value {
    app.admin().post("/v1/docker-configs", &json!({"accountSelector": {}})).await.expect(200)["config"]["auths"].clone()
}

fn auth(login: &str) -> String {
    BASE64_STANDARD.encode(login)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn w1_what_docker_login_left_is_imported_and_rendered_for_a_reader_that_reads_it(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (a, b) = (registry::a(), registry::b());
    let login =
        |registry: &registry::Registry| json!({"auth": auth(&format!("{}:{}", registry.username, registry.password))});
    let on_the_node = json!({
        "auths": {&a.address: login(&a), "https://index.docker.io/v1/": {"auth": auth("martin:pw2")}, &b.address: login(&b)},
        "HttpHeaders": {"User-Agent": "Docker-Client/17.09.0-ce (linux)"},
    });
    let document = serde_json::to_string_pretty(&on_the_node).expect("JSON");

    let imported = import(&app.admin(), "?namePrefix=node-", JSON, document.clone()).await;

    let name = |address: &str| format!("node-{}", address.replace(['.', ':'], "-"));
    let (of_a, of_b) = (name(&a.address), name(&b.address));
    let mut expected = rows(&[
        [&a.address, &of_a, "created", "-"],
        ["https://index.docker.io/v1/", "node-docker-io", "created", "-"],
        [&b.address, &of_b, "created", "-"],
        ["HttpHeaders", "-", "skipped", "HttpHeaders"],
    ]);
    let mut found = outcomes(&imported);
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    let headers = &imported.json()["items"].as_array().expect("items").last().expect("an item").clone();
    assert!(headers["detail"].as_str().is_some_and(|detail| detail.contains("belong to no registry")), "{headers}");
    let accounts = app.admin().get("/v1/registry-accounts").await.expect(200);
    assert!(!accounts.to_string().contains("pw2"), "{accounts}");

    // The node's reader reads what is rendered of it.
    let body = json!({"accounts": [of_a, of_b, "node-docker-io"], "profile": "podman", "format": "document"});
    let rendered = app.admin().post("/v1/docker-configs", &body).await;
    assert_eq!(serde_json::from_str::<Value>(&rendered.body).expect("JSON")["auths"], on_the_node["auths"]);
    assert_eq!((a.read_image(&rendered.body), b.read_image(&rendered.body)), (Ok(()), Ok(())));

    // Which entry an image would use, or why none: of the file as it is, and of the accounts.
    let app_image = format!("{}/team/app:1", a.address);
    for subject in [json!({"config": on_the_node}), json!({"accounts": [of_a, of_b]})] {
        let ask = |image: &str| {
            let mut body = subject.clone();
            body["image"] = json!(image);
            let client = app.admin();
            async move {
                client.post("/v1/docker-configs/explain", &body).await.expect(200)["consumers"]["kubernetes"].clone()
            }
        };
        assert_eq!(ask(&app_image).await["keys"], json!([a.address]));
        let host = a.address.split(':').next().expect("a host");
        let none = ask(&format!("{host}:1/team/app")).await;
        assert_eq!((&none["keys"], &none["nearest"][0]["mismatch"]), (&json!([]), &json!("portDiffers")));
        let detail = none["nearest"][0]["detail"].as_str().expect("a text");
        assert!(detail.contains("the image has port 1"), "{detail}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_document_is_imported_in_whatever_form_it_comes(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let legacy = serde_json::from_str::<Value>(W1).expect("JSON")["auths"].to_string();
    let secret = |secret_type: &str, data_key: &str, document: &str| {
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": secret_type, "metadata": {"name": "pull"},
            "data": {data_key: auth(document)},
        })
    };
    let of_json = secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", W1);
    let of_cfg = secret("kubernetes.io/dockercfg", ".dockercfg", &legacy);
    let encoded = auth(W1);
    let wrapped = encoded.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).expect("ASCII").to_owned() + "\n");
    let yaml = |secret: &Value| kubectl(&["create", "--dry-run=client", "-o", "yaml", "-f", "-"], &secret.to_string());
    let forms = [
        ("config-json", JSON, W1.to_owned()),
        ("config-json-as-text", TEXT, format!("\n\t{W1}\r\n")),
        ("dockercfg", JSON, legacy.clone()),
        ("base64", TEXT, auth(W1)),
        ("base64-of-the-legacy-type", TEXT, auth(&legacy)),
        ("base64-in-lines", TEXT, wrapped.collect()),
        ("base64-without-padding", TEXT, auth(W1).trim_end_matches('=').to_owned()),
        ("manifest-json", JSON, of_json.to_string()),
        ("manifest-json-legacy", JSON, of_cfg.to_string()),
        ("manifest-yaml", YAML, yaml(&of_json)),
        ("manifest-yaml-legacy", YAML, yaml(&of_cfg)),
        ("manifest-yaml-as-text", TEXT, yaml(&of_json)),
    ];
    for (at, (form, media_type, document)) in forms.into_iter().enumerate() {
        let imported = import(&app.admin(), "", media_type, document).await;
        let found = outcomes(&imported);
        let accounts: Vec<_> = found.iter().filter(|[_, name, ..]| name != "-").map(|[key, ..]| key.as_str()).collect();
        assert_eq!(accounts, ["daocloud.io", "https://index.docker.io/v1/", "registry.martin.com:5000"], "{form}");
        // Whatever the form, they are the accounts of the first one.
        let expected = if at == 0 { "created" } else { "unchanged" };
        assert!(
            found.iter().all(|[_, _, outcome, _]| [expected, "skipped"].contains(&outcome.as_str())),
            "{form}: {found:?}"
        );
    }
    assert_eq!(app.rows().await[0], 3);
    let passwords = rendered(&app).await;
    assert_eq!(passwords["registry.martin.com:5000"]["password"], "ibxg1Q5A");
    assert_eq!(passwords["https://index.docker.io/v1/"]["auth"], "bWFydGluOnB3Mg==");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_secret_is_imported_as_the_api_server_gives_it_back(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    let login = ["--docker-server=registry.martin.com:5000", "--docker-username=martin", "--docker-password=xxx1"];
    kubectl(
        &[&["create", "secret", "docker-registry", "pull", "--namespace", &namespace][..], &login[..]].concat(),
        "",
    );
    // The legacy type, with the walk-through's three logins.
    let legacy = auth(&serde_json::from_str::<Value>(W1).expect("JSON")["auths"].to_string());
    let manifest = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockercfg",
        "metadata": {"name": "legacy", "namespace": namespace}, "data": {".dockercfg": legacy},
    });
    kubectl(&["apply", "-f", "-"], &manifest.to_string());

    for format in ["json", "yaml"] {
        let given = kubectl(&["get", "secret", "pull", "-n", &namespace, "-o", format], "");
        let media_type = if format == "json" { JSON } else { YAML };
        let imported = import(&app.admin(), &format!("?namePrefix={format}-"), media_type, given).await;
        let name = format!("{format}-registry-martin-com-5000");
        assert_eq!(outcomes(&imported), rows(&[["registry.martin.com:5000", &name, "created", "-"]]));
        // With the annotation that `kubectl apply` leaves, which holds the manifest once more.
        let given = kubectl(&["get", "secret", "legacy", "-n", &namespace, "-o", format, "--show-managed-fields"], "");
        let imported = import(&app.admin(), &format!("?namePrefix=legacy-{format}-"), media_type, given).await;
        assert_eq!(outcome_list(&imported), ["created"; 3]);
    }
    // The value alone, as `jsonpath` prints it.
    let jsonpath = "jsonpath={.data.\\.dockerconfigjson}";
    let value = kubectl(&["get", "secret", "pull", "-n", &namespace, "-o", jsonpath], "");
    assert_eq!(outcome_list(&import(&app.admin(), "?namePrefix=json-", TEXT, value).await), ["unchanged"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_dry_run_says_what_would_be_and_stores_nothing(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let dry = import(&app.admin(), "?dryRun=true", JSON, W1).await;
    assert_eq!(outcome_list(&dry), ["created", "created", "created", "skipped"]);
    assert_eq!(app.rows().await[0], 0);

    let wet = import(&app.admin(), "?dryRun=false", JSON, W1).await;
    assert_eq!((wet.json(), app.rows().await[0]), (dry.json(), 3));

    let changed = W1.replace("bWFydGluOnB3MQ==", &auth("martin:new"));
    let dry = import(&app.admin(), "?dryRun=true", JSON, changed).await;
    assert_eq!(outcome_list(&dry), ["updated", "unchanged", "unchanged", "skipped"]);
    assert_eq!(rendered(&app).await["daocloud.io"]["password"], "pw1");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_same_again_changes_nothing_and_a_new_password_is_a_rotation(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    import(&app.admin(), "", JSON, W1).await.expect(200);
    let path = "/v1/registry-accounts/daocloud-io";
    let before = app.admin().patch(path, &json!({"labels": {"team": "a"}, "email": "m@example.com"})).await.expect(200);

    // The order and the look of the document do not count.
    let mut shuffled = serde_json::from_str::<Value>(W1).expect("JSON");
    shuffled["auths"]["daocloud.io"] = json!({"username": "martin", "password": "pw1"});
    for document in [W1.to_owned(), serde_json::to_string_pretty(&shuffled).expect("JSON")] {
        let again = import(&app.admin(), "", JSON, document).await;
        assert_eq!(outcome_list(&again), ["unchanged", "unchanged", "unchanged", "skipped"]);
    }
    assert_eq!(app.admin().get(path).await.expect(200), before);

    shuffled["auths"]["daocloud.io"] = json!({"username": "martin", "password": "new"});
    let changed = import(&app.admin(), "", JSON, shuffled.to_string()).await;
    assert_eq!(outcome_list(&changed), ["updated", "unchanged", "unchanged", "skipped"]);
    let after = app.admin().get(path).await.expect(200);
    assert_eq!((&after["version"], &after["labels"]), (&json!(3), &json!({"team": "a"})));
    assert_eq!((&after["email"], &after["id"]), (&json!("m@example.com"), &before["id"]));
    assert_eq!(rendered(&app).await["daocloud.io"]["password"], "new");

    shuffled["auths"]["daocloud.io"] = json!({"auth": auth("lena:new")});
    assert_eq!(outcome_list(&import(&app.admin(), "", JSON, shuffled.to_string()).await)[0], "updated");
    assert_eq!(rendered(&app).await["daocloud.io"]["username"], "lena");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_name_that_stands_for_another_registry_is_refused_and_another_prefix_helps(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("daocloud-io", "quay.io", "u", "pw").await;

    let refused = import(&app.admin(), "", JSON, W1).await;

    let problem = refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["namePrefix"]);
    let detail = problem["detail"].as_str().expect("a text");
    for part in ["daocloud.io", "`daocloud-io`", "quay.io", "another prefix"] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    assert_eq!(app.rows().await[0], 1, "none of the others is stored either");
    let imported = import(&app.admin(), "?namePrefix=x-", JSON, W1).await;
    assert_eq!(outcome_list(&imported), ["created", "created", "created", "skipped"]);

    for (query, field) in [
        ("?namePrefix=-", "namePrefix"),
        ("?namePrefix=a_b", "namePrefix"),
        (concat!("?namePrefix=", "abcdefghijklmnopqrstuvwxyz-1234567"), "namePrefix"),
        ("?dryRun=yes", "dryRun"),
        ("?nameprefix=x", "nameprefix"),
    ] {
        let refused = import(&app.admin(), query, JSON, W1).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field], "{query}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn registries_with_alike_names_keep_their_accounts_in_any_order(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let entries = [("reg.io/a-b", "u:1"), ("reg.io/a/b", "u:2"), ("reg.io:80/a", "u:3"), ("reg.io/80/a", "u:4")];
    let document = |entries: &[(&str, &str)]| {
        let entries: Vec<_> =
            entries.iter().map(|(key, login)| format!("\"{key}\":{{\"auth\":\"{}\"}}", auth(login))).collect();
        format!("{{\"auths\":{{{}}}}}", entries.join(","))
    };
    let first = outcomes(&import(&app.admin(), "", JSON, document(&entries)).await);
    assert_eq!(app.rows().await[0], 4);
    let mut reversed = entries;
    reversed.reverse();

    let again = import(&app.admin(), "", JSON, document(&reversed)).await;

    assert_eq!(outcome_list(&again), ["unchanged"; 4]);
    let names = |found: Vec<[String; 4]>| {
        let mut names: Vec<_> = found.into_iter().map(|[key, name, ..]| (key, name)).collect();
        names.sort();
        names
    };
    assert_eq!(names(outcomes(&again)), names(first));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_failure_in_the_middle_stores_nothing(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    import(&app.admin(), "", JSON, W1).await.expect(200);
    // The database fails at the second of three changes.
    sqlx::raw_sql(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.name = 'docker-io' THEN RAISE 'no'; END IF; RETURN NEW; END $$;
         CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON registry_accounts FOR EACH ROW EXECUTE FUNCTION fail();",
    )
    .execute(&app.pool)
    .await
    .expect("a trigger");
    let all_new = json!({"auths": {
        "daocloud.io": {"auth": auth("martin:n1")}, "docker.io": {"auth": auth("martin:n2")}, "quay.io": {"auth": auth("martin:n3")},
    }});

    import(&app.admin(), "", JSON, all_new.to_string()).await.problem(500, "internal");

    assert_eq!(app.rows().await[0], 3);
    assert_eq!(rendered(&app).await["daocloud.io"]["password"], "pw1");
    sqlx::raw_sql("DROP TRIGGER fail ON registry_accounts").execute(&app.pool).await.expect("dropped");
    let imported = import(&app.admin(), "", JSON, all_new.to_string()).await;
    assert_eq!(outcome_list(&imported), ["updated", "updated", "created"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn imports_at_the_same_time_do_not_break_each_other(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let many: Vec<_> = (0..50).map(|at| format!("\"r{at}.example.com\":{{\"auth\":\"{}\"}}", auth("u:p"))).collect();
    let (mut backwards, forwards) = (many.clone(), many.join(","));
    backwards.reverse();
    let documents = [forwards, backwards.join(",")].map(|entries| format!("{{\"auths\":{{{entries}}}}}"));
    let client = app.admin();

    let answers = join_all((0..8).map(|at| import(&client, "", JSON, documents[at % 2].clone()))).await;

    // Whoever comes second to a name is told so, or finds the account there.
    for answer in &answers {
        assert!(answer.status == 200 || answer.slug() == "name-taken", "{answer:?}");
    }
    assert!(answers.iter().any(|answer| answer.status == 200));
    assert_eq!(app.rows().await[0], 50);
    assert_eq!(outcome_list(&import(&client, "", JSON, documents[0].clone()).await), ["unchanged"; 50]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn nothing_of_a_document_is_lost_silently(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let document = json!({
        "auths": {
            "reg.io": {"auth": auth("u:p"), "identitytoken": "CANARY", "serveraddress": "reg.io"},
            "http://plain.example.com:5000": {"username": "u", "password": "p:q", "email": "no address"},
            "desk.example.com": {},
            "gcr.io": {},
            "azure.example.com": {"auth": auth("00000000-0000-0000-0000-000000000000:"), "identitytoken": "CANARY"},
            "bearer.example.com": {"registrytoken": "CANARY"},
            "*.example.com": {"auth": auth("u:CANARY")},
            "bad.example.com": {"auth": "CANARY!"},
            "no-colon.example.com": {"auth": auth("CANARY")},
            "https://me:CANARY@reg.example.com": {"auth": auth("u:p")},
        },
        "credsStore": "desktop", "credHelpers": {"gcr.io": "gcloud", "eu.gcr.io": "gcloud"},
        "HttpHeaders": {"Authorization": "Bearer CANARY"}, "psFormat": "table",
    });

    let imported = import(&app.admin(), "", JSON, document.to_string()).await;

    let mut found = outcomes(&imported);
    found.sort();
    let mut expected = rows(&[
        ["reg.io", "reg-io", "created", "-"],
        ["http://plain.example.com:5000", "plain-example-com-5000", "created", "-"],
        ["desk.example.com", "-", "skipped", "credsStore"],
        ["gcr.io", "-", "skipped", "credHelpers"],
        ["azure.example.com", "-", "skipped", "identitytoken"],
        ["bearer.example.com", "-", "skipped", "registrytoken"],
        ["*.example.com", "-", "skipped", "invalidRegistry"],
        ["bad.example.com", "-", "skipped", "invalidEntry"],
        ["no-colon.example.com", "-", "skipped", "invalidEntry"],
        ["…@reg.example.com", "-", "skipped", "invalidRegistry"],
        ["gcr.io", "-", "skipped", "credHelpers"],
        ["eu.gcr.io", "-", "skipped", "credHelpers"],
        ["credsStore", "-", "skipped", "credsStore"],
        ["HttpHeaders", "-", "skipped", "HttpHeaders"],
        ["psFormat", "-", "skipped", "notACredential"],
    ]);
    expected.sort();
    assert_eq!(found, expected);
    let result = imported.json();
    let items = result["items"].as_array().expect("items");
    let detail = |key: &str| {
        let item = items.iter().find(|item| item["key"] == key).unwrap_or_else(|| panic!("no {key}"));
        item["detail"].as_str().unwrap_or_else(|| panic!("no detail of {key}"))
    };
    for part in ["`identitytoken`", "`serveraddress`"] {
        assert!(detail("reg.io").contains(part), "{}", detail("reg.io"));
    }
    assert!(detail("http://plain.example.com:5000").contains("`email`"));
    assert!(items.iter().all(|item| item["outcome"] != "skipped" || item["detail"].is_string()), "{result}");
    let plain = app.admin().get("/v1/registry-accounts/plain-example-com-5000").await.expect(200);
    assert_eq!((&plain["plainHttp"], &plain["email"]), (&json!(true), &Value::Null));
    // What cannot be used is said of the whole document too, and no secret is in any of it.
    let codes: Vec<_> =
        result["warnings"].as_array().expect("warnings").iter().map(|warning| &warning["code"]).collect();
    for code in ["helperFirst", "refused", "holdsNothing"] {
        assert!(codes.contains(&&json!(code)), "{code}: {result}");
    }
    assert!(!imported.body.contains("CANARY"), "{result}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn w4_a_stray_hash_is_refused_with_its_place_and_a_sentence_that_helps(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let pretty = serde_json::to_string_pretty(&serde_json::from_str::<Value>(W1).expect("JSON")).expect("JSON");
    for (document, stray, place) in [
        (W1, "#", "line 2, column 66"),
        (W1, "\n#", "line 3, column 1"),
        (pretty.as_str(), "#\n", "line 16, column 2"),
        (W1, "%", "line 2, column 66"),
    ] {
        let spoilt = format!("{document}{stray}");
        // What the walk-through did: `base64 -w 0` of the file, pasted into a Secret's YAML.
        let manifest = format!(
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: registrykey\ndata:\n  .dockerconfigjson: {}\ntype: kubernetes.io/dockerconfigjson\n",
            auth(&spoilt)
        );
        let sign = stray.trim();
        for (media_type, document, inside) in [
            (JSON, spoilt.clone(), ""),
            (TEXT, auth(&spoilt), "inside the base64"),
            (YAML, manifest, "inside `.dockerconfigjson`"),
        ] {
            let refused = import(&app.admin(), "", media_type, document.clone()).await;
            let problem = refused.problem(422, "invalid-request");
            let detail = problem["errors"][0]["detail"].as_str().expect("a text");
            assert_eq!(problem["detail"], detail);
            for part in
                [place, inside, &format!("a stray `{sign}` follows the document's last brace: delete it"), "zsh"]
            {
                assert!(detail.contains(part), "{part}: {detail}");
            }
            // Who pastes it to ask about an image is told the same.
            let body = json!({"image": "nginx", "config": document});
            let refused = app.admin().post("/v1/docker-configs/explain", &body).await;
            refused.problem(422, "invalid-request");
            assert_eq!(
                (refused.fields(), &refused.json()["errors"][0]["detail"]),
                (vec!["config".to_owned()], &json!(detail))
            );
        }
    }
    assert_eq!(app.rows().await[0], 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn w4_a_stray_hash_that_the_api_server_stored_unread_is_found(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    // It looks only into Secrets of the two types for pulls, and this one says to be another.
    let manifest = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "pull", "namespace": namespace}, "type": "Opaque",
        "data": {".dockerconfigjson": auth(&format!("{W1}#"))},
    });
    kubectl(&["apply", "-f", "-"], &manifest.to_string());
    let stored: Secret = kubernetes::secret(&namespace, "pull").await;
    assert!(stored.data.is_some());
    let given = kubectl(&["get", "secret", "pull", "-n", &namespace, "-o", "yaml"], "");
    let refused = import(&app.admin(), "", YAML, given).await;
    let detail = refused.problem(422, "invalid-request")["detail"].to_string();
    assert!(detail.contains("line 2, column 66: inside `.dockerconfigjson`: a stray `#`"), "{detail}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn w5_two_claims_to_one_key_are_an_error_and_no_silent_choice(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    // Two logins of one registry in one file, under keys that readers take for the same or not.
    let document = json!({"auths": {
        "registry.martin.com:5000": {"auth": auth("martin:xxx1")},
        "https://registry.martin.com:5000/v2/": {"auth": auth("lena:yyy1")},
        "http://registry.martin.com:6000": {"auth": auth("martin:xxx2")},
    }});
    let imported = import(&app.admin(), "", JSON, document.to_string()).await;
    let mut found = outcomes(&imported);
    found.sort();
    let mut expected = rows(&[
        ["registry.martin.com:5000", "registry-martin-com-5000", "created", "-"],
        ["https://registry.martin.com:5000/v2/", "-", "skipped", "conflict"],
        ["http://registry.martin.com:6000", "registry-martin-com-6000", "created", "-"],
    ]);
    expected.sort();
    assert_eq!(found, expected);
    let conflict =
        imported.json()["items"].as_array().expect("items").iter().find(|item| item["reason"] == "conflict").cloned();
    let detail = conflict.expect("a conflict")["detail"].to_string();
    assert!(detail.contains("`registry.martin.com:5000`") && detail.contains("another `namePrefix`"), "{detail}");

    // What the sentence says helps: the other login by another name; and then both at once are refused by name.
    let other = json!({"auths": {"https://registry.martin.com:5000/v2/": {"auth": auth("lena:yyy1")}}});
    assert_eq!(outcome_list(&import(&app.admin(), "?namePrefix=lena-", JSON, other.to_string()).await), ["created"]);
    for profile in ["kubernetes", "docker", "dockerAuthConfig", "podman", "dockercfg"] {
        let body = json!({"accounts": ["registry-martin-com-5000", "lena-registry-martin-com-5000", "registry-martin-com-6000"], "profile": profile});
        let refused = app.admin().post("/v1/docker-configs", &body).await;
        let problem = refused.problem(409, "key-collision");
        for part in ["`registry-martin-com-5000`", "`lena-registry-martin-com-5000`", "`registry.martin.com:5000`"] {
            assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains(part)), "{part}: {problem}");
        }
        // One of them and the other port go together.
        let body =
            json!({"accounts": ["lena-registry-martin-com-5000", "registry-martin-com-6000"], "profile": profile});
        app.admin().post("/v1/docker-configs", &body).await.expect(200);
    }
}

/// Some logins as JSON, with any characters in them, and in some form.
fn some_document() -> impl Strategy<Value = (Value, String, &'static str)> {
    let scope = "(docker\\.io|reg[a-c]\\.example\\.com(:[1-9][0-9]{3})?)(/[a-z0-9]{1,3}){0,2}";
    let username = any::<String>().prop_map(|text| {
        let text: String = text.chars().filter(|c| *c != ':' && !c.is_control()).take(20).collect();
        format!("u{text}")
    });
    let password = any::<String>().prop_map(|text| {
        let text: String = text.chars().filter(|c| *c != '\0').take(40).collect();
        format!("p{text}")
    });
    let entries = proptest::collection::btree_map(scope, (username, password, 0..3), 1..6);
    (entries, 0..6).prop_map(|(entries, form)| {
        let mut expected = json!({});
        let mut auths = json!({});
        for (scope, (username, password, look)) in entries {
            let login = auth(&format!("{username}:{password}"));
            let key = if scope == "docker.io" { "https://index.docker.io/v1/" } else { &scope };
            expected[key] = json!({"username": username, "password": password, "auth": login});
            auths[&scope] = match look {
                0 => json!({"auth": login}),
                1 => json!({"username": username, "password": password}),
                _ => json!({"auth": login.trim_end_matches('=')}),
            };
        }
        let document = json!({"auths": auths});
        let secret = |key: &str, value: &Value| json!({"kind": "Secret", "data": {key: auth(&value.to_string())}});
        let (text, media_type) = match form {
            0 => (document.to_string(), JSON),
            1 => (serde_json::to_string_pretty(&document).expect("JSON"), TEXT),
            2 => (auths.to_string(), JSON),
            3 => (auth(&document.to_string()), TEXT),
            4 => (secret(".dockerconfigjson", &document).to_string(), YAML),
            _ => (secret(".dockercfg", &auths).to_string(), JSON),
        };
        (expected, text, media_type)
    })
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn import_then_render_gives_back_the_same_logins_whatever_the_form(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (documents, mut runner) = (some_document(), TestRunner::deterministic());
    for _ in 0..64 {
        let (expected, document, media_type) = documents.new_tree(&mut runner).expect("a document").current();

        let imported = import(&app.admin(), "", media_type, document.clone()).await;

        let found = outcomes(&imported);
        assert!(found.iter().all(|[_, _, outcome, _]| outcome == "created"), "{found:?}: {document}");
        let given_back = rendered(&app).await;
        // Beside a part of Docker Hub, the account for all of it has a second key for the kubelet.
        let mut expected = expected;
        let hub = expected["https://index.docker.io/v1/"].clone();
        let has_part = expected.as_object().expect("an object").keys().any(|key| key.starts_with("docker.io/"));
        if has_part && hub.is_object() {
            expected["docker.io"] = hub;
        }
        expected.as_object_mut().expect("an object").retain(|_, entry| !entry.is_null());
        assert_eq!(given_back, expected, "{document}");
        sqlx::query("DELETE FROM registry_accounts").execute(&app.pool).await.expect("deleted");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn arbitrary_bytes_are_imported_or_refused_and_nothing_breaks(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut runner = TestRunner::deterministic();
    let bytes = proptest::collection::vec(any::<u8>(), 0..300);
    let alike = "[{}\\[\\]\":,.# \na-zA-Z0-9+/=&*!|>-]{0,120}".prop_map(String::into_bytes);
    let spoilt = (any::<u8>(), 0..W1.len()).prop_map(|(byte, at)| {
        let mut document = W1.as_bytes().to_vec();
        document[at] = byte;
        document
    });
    let client = app.admin();
    for round in 0..300 {
        let input = match round % 3 {
            0 => bytes.new_tree(&mut runner).expect("bytes").current(),
            1 => alike.new_tree(&mut runner).expect("text").current(),
            _ => spoilt.new_tree(&mut runner).expect("a document").current(),
        };
        let media_type = [JSON, YAML, TEXT][round / 3 % 3];
        let shown = String::from_utf8_lossy(&input).into_owned();
        let imported = import(&client, "?dryRun=true", media_type, input).await;
        assert!(matches!(imported.status, 200 | 422), "{imported:?}: {shown:?}");
        assert!(imported.status == 200 || imported.slug() == "invalid-request", "{imported:?}");
        let body = json!({"image": "reg.example.com/team/app", "config": shown});
        let explained = client.post("/v1/docker-configs/explain", &body).await;
        assert!(matches!(explained.status, 200 | 422), "{explained:?}: {shown:?}");
    }
    assert_eq!(app.rows().await[0], 0);
}

/// RowCache of a process and the most that it ever had, in KiB.
fn memory_kib(process: u32) -> [u64; 2] {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("the process lives");
    ["VmRSS:", "VmHWM:"].map(|field| {
        let line = status.lines().find(|line| line.starts_with(field)).expect("the field");
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
    })
}

/// In the real binary, so that the memory is its own.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_mebibyte_of_nesting_is_refused_at_once_and_in_bounded_memory(pool: PgPool) {
    const MIB: usize = 1024 * 1024;
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let repeated = |part: &str| part.repeat(MIB / part.len());
    let rung = |at: usize| format!("a{at}: &a{at} [{}]\n", vec![format!("*a{}", at - 1); 10].join(","));
    let ladder = (1..40).map(rung).collect::<Vec<_>>().concat();
    let inputs = [
        (JSON, repeated("{\"a\":")),
        (JSON, format!("{{\"auths\":{{\"reg.io\":{{\"auth\":{}", "[".repeat(MIB - 40))),
        (JSON, format!("{{\"auths\":{}{}}}", "[".repeat(MIB / 2 - 10), "]".repeat(MIB / 2 - 10))),
        (JSON, repeated("[")),
        (TEXT, auth(&"{\"a\":".repeat(MIB / 8))),
        (YAML, repeated("- ")),
        (YAML, repeated("a: ")),
        (YAML, repeated("? ")),
        (YAML, repeated("{")),
        (YAML, format!("a0: &a0 x\n{ladder}")),
        (YAML, format!("a: &a \"{}\"\nb: [{}]\n", "x".repeat(100_000), vec!["*a"; 100_000].join(","))),
    ];
    // Once, so that what is loaded at the first request is not counted.
    import(&client, "?dryRun=true", JSON, W1).await.expect(200);
    let [before, _] = memory_kib(service.process.id());

    let begin = Instant::now();
    for (media_type, input) in &inputs {
        let refused = import(&client, "", media_type, input.clone()).await;
        refused.problem(422, "invalid-request");
        let explained = client.post("/v1/docker-configs/explain", &json!({"image": "nginx", "config": input})).await;
        explained.problem(422, "invalid-request");
    }
    let took = begin.elapsed();
    // In parallel too, as one who means harm would.
    let all = inputs.iter().cycle().take(64).map(|(media_type, input)| import(&client, "", media_type, input.clone()));
    for answer in join_all(all).await {
        answer.problem(422, "invalid-request");
    }

    // 22 requests of a mebibyte take a third of a second on an idle machine; quadratic work would take minutes.
    assert!(took < Duration::from_secs(30), "{took:?}");
    let [_, most] = memory_kib(service.process.id());
    assert!(most.saturating_sub(before) < 256 * 1024, "from {before} KiB to {most} KiB");
    // Longer than a document may be: refused unread.
    let long = import(&client, "", JSON, " ".repeat(2 * MIB + 1)).await;
    long.problem(413, "body-too-large");
    let longer_than_a_secret = import(&client, "", JSON, format!("{{}}{}", " ".repeat(MIB))).await;
    longer_than_a_secret.problem(422, "invalid-request");
    import(&client, "?dryRun=true", JSON, W1).await.expect(200);
}
