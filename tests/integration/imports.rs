//! Imports of docker configs.

mod lists;
mod minted;
mod options;
mod untrusted_input;

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Secret;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    client::{Answer, Client},
    kubernetes::{self, kubectl},
    registry,
};

const IMPORT: &str = "/v1/registry-accounts:import";
const JSON: &str = "application/json";
const YAML: &str = "application/yaml";
const TEXT: &str = "text/plain";

/// Docker config of a node in the walk-through, as `docker login` wrote it.
const W1: &str = r#"{"auths":{"daocloud.io":{"auth":"bWFydGluOnB3MQ=="},"https://index.docker.io/v1/":{"auth":"bWFydGluOnB3Mg=="},"registry.martin.com:5000":{"auth":"bWFydGluOmlieGcxUTVB"}},
 "HttpHeaders":{"User-Agent":"Docker-Client/17.09.0-ce (linux)"}}"#;

/// Imports a document. `query` starts with `?` or is empty.
async fn import(client: &Client, query: &str, media_type: &str, document: impl Into<reqwest::Body>) -> Answer {
    let request = client.request("POST", &format!("{IMPORT}{query}"));
    client.send(request.header("Content-Type", media_type).body(document)).await
}

/// Returns key, name, outcome and reason of each item.
fn outcomes(answer: &Answer) -> Vec<[String; 4]> {
    let items = answer.expect(200)["items"].as_array().expect("items").clone();
    let member = |item: &Value, name: &str| item[name].as_str().unwrap_or("-").to_owned();
    items.iter().map(|item| ["key", "name", "outcome", "reason"].map(|name| member(item, name))).collect()
}

/// Returns the outcome of each item.
fn outcome_list(answer: &Answer) -> Vec<String> {
    outcomes(answer).into_iter().map(|[_, _, outcome, _]| outcome).collect()
}

fn rows(expected: &[[&str; 4]]) -> Vec<[String; 4]> {
    expected.iter().map(|row| row.map(str::to_owned)).collect()
}

/// Returns the rendered logins of all accounts.
async fn rendered(app: &TestApp) -> Value {
    app.admin().post("/v1/docker-configs", &json!({"accountSelector": {}})).await.expect(200)["config"]["auths"].clone()
}

fn auth(login: &str) -> String {
    BASE64_STANDARD.encode(login)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn docker_config_of_a_node_is_imported_and_rendered_for_its_runtime(pool: PgPool) {
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

    // The container runtime of the node accepts the rendered document.
    let body = json!({"accounts": [of_a, of_b, "node-docker-io"], "profile": "podman", "format": "document"});
    let rendered = app.admin().post("/v1/docker-configs", &body).await;
    assert_eq!(serde_json::from_str::<Value>(&rendered.body).expect("JSON")["auths"], on_the_node["auths"]);
    assert_eq!((a.read_image(&rendered.body), b.read_image(&rendered.body)), (Ok(()), Ok(())));

    // Explanations for the original file and for the imported accounts.
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
async fn every_form_of_a_document_is_imported(pool: PgPool) {
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
        // Later forms find the accounts of the first one.
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
async fn secret_is_imported_as_the_api_server_returns_it(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    let login = ["--docker-server=registry.example.com:5000", "--docker-username=martin", "--docker-password=xxx1"];
    kubectl(
        &[&["create", "secret", "docker-registry", "pull", "--namespace", &namespace][..], &login[..]].concat(),
        "",
    );
    // The legacy type, with the three logins of the walk-through.
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
        let name = format!("{format}-registry-example-com-5000");
        assert_eq!(outcomes(&imported), rows(&[["registry.example.com:5000", &name, "created", "-"]]));
        // The annotation of `kubectl apply` contains the manifest a second time.
        let given = kubectl(&["get", "secret", "legacy", "-n", &namespace, "-o", format], "");
        let imported = import(&app.admin(), &format!("?namePrefix=legacy-{format}-"), media_type, given).await;
        assert_eq!(outcome_list(&imported), ["created"; 3]);
    }
    // With managed fields.
    let raw = kubectl(&["get", "--raw", &format!("/api/v1/namespaces/{namespace}/secrets/legacy")], "");
    assert!(raw.contains("managedFields"), "{raw}");
    let imported = import(&app.admin(), "?namePrefix=raw-", JSON, raw).await;
    assert_eq!(outcome_list(&imported), ["created"; 3]);
    // The base64 value alone, as `jsonpath` prints it.
    let jsonpath = "jsonpath={.data.\\.dockerconfigjson}";
    let value = kubectl(&["get", "secret", "pull", "-n", &namespace, "-o", jsonpath], "");
    assert_eq!(outcome_list(&import(&app.admin(), "?namePrefix=json-", TEXT, value).await), ["unchanged"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn dry_run_reports_the_outcome_and_stores_nothing(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let dry = import(&app.admin(), "?dryRun=true", JSON, W1).await;
    assert_eq!(outcome_list(&dry), ["wouldCreate", "wouldCreate", "wouldCreate", "skipped"]);
    assert_eq!(app.rows().await[0], 0);

    let wet = import(&app.admin(), "?dryRun=false", JSON, W1).await;
    assert_eq!(outcome_list(&wet), ["created", "created", "created", "skipped"]);
    assert_eq!((wet.body.replace("created", "wouldCreate"), app.rows().await[0]), (dry.body, 3));

    let changed = W1.replace("bWFydGluOnB3MQ==", &auth("martin:new"));
    let dry = import(&app.admin(), "?dryRun=true", JSON, changed).await;
    assert_eq!(outcome_list(&dry), ["wouldUpdate", "unchanged", "unchanged", "skipped"]);
    assert_eq!(rendered(&app).await["daocloud.io"]["password"], "pw1");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn repeated_import_changes_nothing_and_a_new_password_is_a_rotation(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    import(&app.admin(), "", JSON, W1).await.expect(200);
    let path = "/v1/registry-accounts/daocloud-io";
    let before = app.admin().patch(path, &json!({"labels": {"team": "a"}, "email": "m@example.com"})).await.expect(200);

    // Order and formatting of the document do not matter.
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
async fn name_of_an_account_of_another_registry_is_rejected(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("daocloud-io", "quay.io", "u", "pw").await;

    let refused = import(&app.admin(), "", JSON, W1).await;

    let problem = refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["namePrefix"]);
    let detail = problem["detail"].as_str().expect("a text");
    for part in ["daocloud.io", "`daocloud-io`", "quay.io", "another prefix"] {
        assert!(detail.contains(part), "{part}: {detail}");
    }
    assert_eq!(app.rows().await[0], 1, "no other account is stored");
    let imported = import(&app.admin(), "?namePrefix=x-", JSON, W1).await;
    assert_eq!(outcome_list(&imported), ["created", "created", "created", "skipped"]);

    for (query, field) in [
        ("?namePrefix=-", "namePrefix"),
        ("?namePrefix=a_b", "namePrefix"),
        (concat!("?namePrefix=", "abcdefghijklmnopqrstuvwxyz-1234567"), "namePrefix"),
        ("?dryRun=yes", "dryRun"),
        ("?nameprefix=x", "nameprefix"),
    ] {
        // Also for a document without entries, which needs no name.
        for document in [W1, r#"{"auths":{}}"#] {
            let refused = import(&app.admin(), query, JSON, document).await;
            refused.problem(422, "invalid-request");
            assert_eq!(refused.fields(), [field], "{query}");
            if field == "namePrefix" {
                assert!(!refused.body.contains("end with"), "a prefix may end in `-`: {refused:?}");
            }
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn similar_registries_keep_their_accounts_in_any_order(pool: PgPool) {
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
async fn failed_import_stores_nothing(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    import(&app.admin(), "", JSON, W1).await.expect(200);
    // The second of three writes fails.
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
async fn number_of_entries_is_limited(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let document = |count: usize| {
        let entries: Vec<_> = (0..count).map(|at| format!("\"r{at}.example.com\":{{\"auth\":\"\"}}")).collect();
        format!("{{\"auths\":{{{}}}}}", entries.join(","))
    };
    let most = import(&app.admin(), "", JSON, document(1_000)).await;
    assert_eq!(outcome_list(&most), vec!["skipped"; 1_000]);
    let refused = import(&app.admin(), "", JSON, document(1_001)).await;
    let problem = refused.problem(422, "invalid-request");
    assert!(problem["detail"].as_str().expect("text").contains("more than 1000 entries"), "{problem}");
    assert_eq!(app.rows().await[0], 0);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn concurrent_imports_do_not_deadlock(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let many: Vec<_> = (0..50).map(|at| format!("\"r{at}.example.com\":{{\"auth\":\"{}\"}}", auth("u:p"))).collect();
    let (mut backwards, forwards) = (many.clone(), many.join(","));
    backwards.reverse();
    let documents = [forwards, backwards.join(",")].map(|entries| format!("{{\"auths\":{{{entries}}}}}"));
    let client = app.admin();

    let answers = join_all((0..8).map(|at| import(&client, "", JSON, documents[at % 2].clone()))).await;

    // A concurrent import either finds the account or fails with `name-taken`.
    for answer in &answers {
        assert!(answer.status == 200 || answer.slug() == "name-taken", "{answer:?}");
    }
    assert!(answers.iter().any(|answer| answer.status == 200));
    assert_eq!(app.rows().await[0], 50);
    assert_eq!(outcome_list(&import(&client, "", JSON, documents[0].clone()).await), ["unchanged"; 50]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_part_of_a_document_is_reported(pool: PgPool) {
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
    // Warnings cover the unusable parts, and no response contains a secret.
    let codes: Vec<_> =
        result["warnings"].as_array().expect("warnings").iter().map(|warning| &warning["code"]).collect();
    for code in ["helperFirst", "refused", "holdsNothing"] {
        assert!(codes.contains(&&json!(code)), "{code}: {result}");
    }
    assert!(!imported.body.contains("CANARY"), "{result}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stray_character_is_rejected_with_its_position_and_a_remedy(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let pretty = serde_json::to_string_pretty(&serde_json::from_str::<Value>(W1).expect("JSON")).expect("JSON");
    for (document, stray, place) in [
        (W1, "#", "line 2, column 66"),
        (W1, "\n#", "line 3, column 1"),
        (pretty.as_str(), "#\n", "line 16, column 2"),
        (W1, "%", "line 2, column 66"),
    ] {
        let spoilt = format!("{document}{stray}");
        // As in the walk-through: `base64 -w 0` of the file, pasted into the YAML of a Secret.
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
            // An explanation reports the same error.
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
async fn stray_character_in_a_stored_secret_is_rejected(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = kubernetes::new_namespace().await;
    // The API server validates only the two Secret types for pulls, and this one has another type.
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
async fn conflicting_logins_for_one_registry_are_reported(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    // Two logins for one registry in one file, under different spellings of its key.
    let document = json!({"auths": {
        "registry.example.com:5000": {"auth": auth("martin:xxx1")},
        "https://registry.example.com:5000/v2/": {"auth": auth("lena:yyy1")},
        "http://registry.example.com:6000": {"auth": auth("martin:xxx2")},
    }});
    let imported = import(&app.admin(), "", JSON, document.to_string()).await;
    let mut found = outcomes(&imported);
    found.sort();
    let mut expected = rows(&[
        ["registry.example.com:5000", "registry-example-com-5000", "created", "-"],
        ["https://registry.example.com:5000/v2/", "-", "skipped", "conflict"],
        ["http://registry.example.com:6000", "registry-example-com-6000", "created", "-"],
    ]);
    expected.sort();
    assert_eq!(found, expected);
    let conflict =
        imported.json()["items"].as_array().expect("items").iter().find(|item| item["reason"] == "conflict").cloned();
    let detail = conflict.expect("a conflict")["detail"].to_string();
    assert!(detail.contains("`registry.example.com:5000`") && detail.contains("another `namePrefix`"), "{detail}");

    // The remedy works: the other login is imported under another prefix. Rendering both is a
    // conflict.
    let other = json!({"auths": {"https://registry.example.com:5000/v2/": {"auth": auth("lena:yyy1")}}});
    assert_eq!(outcome_list(&import(&app.admin(), "?namePrefix=lena-", JSON, other.to_string()).await), ["created"]);
    for profile in ["kubernetes", "docker", "dockerAuthConfig", "podman", "dockercfg"] {
        let body = json!({"accounts": ["registry-example-com-5000", "lena-registry-example-com-5000", "registry-example-com-6000"], "profile": profile});
        let refused = app.admin().post("/v1/docker-configs", &body).await;
        let problem = refused.problem(409, "key-collision");
        for part in ["`registry-example-com-5000`", "`lena-registry-example-com-5000`", "`registry.example.com:5000`"] {
            assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains(part)), "{part}: {problem}");
        }
        // One of them can be rendered together with another port.
        let body =
            json!({"accounts": ["lena-registry-example-com-5000", "registry-example-com-6000"], "profile": profile});
        app.admin().post("/v1/docker-configs", &body).await.expect(200);
    }
}
