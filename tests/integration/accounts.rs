//! Registry accounts through the API: create, read, change, delete, and the rendered docker config.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::future::join_all;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{app::TestApp, client::assert_holds, kubernetes};

const ACCOUNTS: &str = "/v1/registry-accounts";
const ACCOUNT: &str = "/v1/registry-accounts/registry-5000";

/// Body of an account with every field.
fn account_body() -> Value {
    json!({
        "name": "registry-5000", "registry": "registry.example.com:5000", "username": "robot", "password": "canary-1",
        "email": "dev@example.com", "labels": {"team": "a", "stage": "dev"}, "plainHttp": true,
        "expiresAt": "2031-01-31T00:00:00Z",
    })
}

/// Renders accounts for the kubelet and returns the response.
async fn render(app: &TestApp, accounts: &[&str]) -> Value {
    app.admin().post("/v1/docker-configs", &json!({"accounts": accounts})).await.expect(200)
}

/// Returns the password in the docker config for the kubelet.
async fn rendered_password(app: &TestApp, account: &str, registry: &str) -> Value {
    render(app, &[account]).await["config"]["auths"][registry]["password"].clone()
}

/// Returns the names of the accounts in a page.
fn names(page: &Value) -> Vec<&str> {
    page["items"].as_array().expect("a list").iter().map(|item| item["name"].as_str().expect("a name")).collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_can_be_registered_read_changed_and_deleted(pool: PgPool) {
    let app = TestApp::spawn(pool).await;

    let created = app.admin().post(ACCOUNTS, &account_body()).await;

    let account = created.expect(201);
    assert_eq!((created.header("location"), created.header("etag")), (ACCOUNT, "\"1\""));
    let id: Uuid = serde_json::from_value(account["id"].clone()).expect("a UUID");
    assert_eq!(id.get_version_num(), 7);
    let mut expected_fields = account_body();
    expected_fields.as_object_mut().expect("an object").remove("password");
    assert_holds(&account, &expected_fields);
    assert_eq!((&account["version"], &account["createdAt"]), (&json!(1), &account["updatedAt"]));

    let shown = app.admin().get(ACCOUNT).await;
    assert_eq!(shown.header("etag"), "\"1\"");
    assert_holds(&shown.expect(200), &expected_fields);

    let changed = app.admin().patch(ACCOUNT, &json!({"username": "lena"})).await;
    assert_eq!(changed.header("etag"), "\"2\"");
    let changed = changed.expect(200);
    expected_fields["username"] = json!("lena");
    expected_fields["version"] = json!(2);
    for kept in ["id", "createdAt"] {
        expected_fields[kept] = account[kept].clone();
    }
    assert_holds(&changed, &expected_fields);
    assert_ne!(changed["updatedAt"], account["updatedAt"]);
    let listed = app.admin().get(ACCOUNTS).await.expect(200);
    assert_eq!((names(&listed), &listed["next"]), (vec!["registry-5000"], &Value::Null));
    assert_holds(&listed["items"][0], &expected_fields);

    let deleted = app.admin().delete(ACCOUNT).await;
    assert_eq!((deleted.status, deleted.body.as_str()), (204, ""));
    app.admin().get(ACCOUNT).await.problem(404, "not-found");
    app.admin().delete(ACCOUNT).await.problem(404, "not-found");
    app.admin().patch(ACCOUNT, &json!({"username": "x"})).await.problem(404, "not-found");
    assert_eq!(app.rows().await[0], 0);
    // A deleted name is free again.
    app.admin().post(ACCOUNTS, &account_body()).await.expect(201);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn minimal_account_has_the_documented_defaults(pool: PgPool) {
    let app = TestApp::spawn(pool).await;

    let account = app.register_account("minimal", "registry.example.com", "robot", "x").await;

    let defaults = ["email", "labels", "plainHttp", "expiresAt", "version"].map(|field| account[field].clone());
    assert_eq!(defaults, [Value::Null, json!({}), json!(false), Value::Null, json!(1)]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn taken_name_is_a_conflict_and_changes_nothing(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("prod", "ghcr.io", "bot", "first").await;

    let body = json!({"name": "prod", "registry": "quay.io", "username": "other", "password": "second"});
    let second = app.admin().post(ACCOUNTS, &body).await;

    second.problem(409, "name-taken");
    assert_eq!(rendered_password(&app, "prod", "ghcr.io").await, "first");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pages_list_every_account_once_ordered_by_name(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut sorted = ["m", "z", "a", "b-1", "b", "b0", "0", "a-a", "aa"];
    for name in sorted {
        app.register_account(name, "registry.example.com", "robot", "x").await;
    }
    sorted.sort_unstable();

    for (limit, pages) in [(4, vec![4, 4, 1]), (3, vec![3, 3, 3]), (9, vec![9]), (500, vec![9])] {
        let (mut sizes, mut seen) = (Vec::new(), Vec::new());
        let mut path = format!("{ACCOUNTS}?limit={limit}");
        loop {
            let page = app.admin().get(&path).await.expect(200);
            sizes.push(names(&page).len());
            seen.extend(names(&page).into_iter().map(str::to_owned));
            let Some(cursor) = page["next"].as_str() else { break };
            path = format!("{ACCOUNTS}?limit={limit}&cursor={cursor}");
        }
        assert_eq!((sizes, seen), (pages, sorted.map(str::to_owned).to_vec()), "limit {limit}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cursor_keeps_its_position_while_accounts_change(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for name in ["a", "c", "e"] {
        app.register_account(name, "registry.example.com", "robot", "x").await;
    }
    let first = app.admin().get(&format!("{ACCOUNTS}?limit=2")).await.expect(200);

    app.admin().delete(&format!("{ACCOUNTS}/c")).await;
    app.register_account("b", "registry.example.com", "robot", "x").await;
    app.register_account("d", "registry.example.com", "robot", "x").await;

    let cursor = first["next"].as_str().expect("a cursor");
    let second = app.admin().get(&format!("{ACCOUNTS}?limit=2&cursor={cursor}")).await.expect(200);
    assert_eq!((names(&second), &second["next"]), (vec!["d", "e"], &Value::Null));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn list_requires_all_labels_of_the_filter(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, labels) in [
        ("a-dev", json!({"team": "a", "example.com/stage": "dev"})),
        ("a-prod", json!({"team": "a", "example.com/stage": "prod"})),
        ("b-dev", json!({"team": "b", "example.com/stage": "dev"})),
        ("bare", json!({})),
    ] {
        let body = json!({"name": name, "registry": "ghcr.io", "username": "bot", "password": "x", "labels": labels});
        app.admin().post(ACCOUNTS, &body).await.expect(201);
    }
    for (query, expected) in [
        ("label=team=a", vec!["a-dev", "a-prod"]),
        ("label=team%3Da&label=example.com%2Fstage%3Ddev", vec!["a-dev"]),
        ("label=example.com/stage=dev", vec!["a-dev", "b-dev"]),
        ("label=team=c", vec![]),
        ("label=team=", vec![]),
        ("", vec!["a-dev", "a-prod", "b-dev", "bare"]),
    ] {
        let listed = app.admin().get(&format!("{ACCOUNTS}?{query}")).await.expect(200);
        assert_eq!(names(&listed), expected, "{query}");
    }
    // The filter applies to every page.
    let first = app.admin().get(&format!("{ACCOUNTS}?label=team=a&limit=1")).await.expect(200);
    let cursor = first["next"].as_str().expect("a cursor");
    let second = app.admin().get(&format!("{ACCOUNTS}?label=team=a&limit=1&cursor={cursor}")).await.expect(200);
    assert_eq!((&first["items"][0]["name"], &second["items"][0]["name"]), (&json!("a-dev"), &json!("a-prod")));
    assert_eq!(second["next"], Value::Null);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn merge_patch_keeps_absent_fields_and_removes_null_fields(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut expected = app.admin().post(ACCOUNTS, &account_body()).await.expect(201);
    let steps = [
        (json!({}), json!({})),
        (json!({"email": null}), json!({"email": null})),
        (
            json!({"email": "new@example.com", "plainHttp": false}),
            json!({"email": "new@example.com", "plainHttp": false}),
        ),
        (json!({"expiresAt": null}), json!({"expiresAt": null})),
        (json!({"expiresAt": "2032-01-01T01:00:00+01:00"}), json!({"expiresAt": "2032-01-01T00:00:00Z"})),
        (json!({"labels": {"stage": null, "new": "1", "absent": null}}), json!({"labels": {"team": "a", "new": "1"}})),
        (json!({"labels": {}}), json!({})),
        (json!({"labels": null}), json!({"labels": {}})),
        (
            json!({"registry": "https://Registry.Example.com:6000/", "password": "canary-1"}),
            json!({"registry": "registry.example.com:6000"}),
        ),
    ];
    let mut version = 1;
    for (number, (patch, changes)) in steps.into_iter().enumerate() {
        // Alternates between the two media types of a patch.
        let media_type = if number % 2 == 0 { "application/merge-patch+json" } else { "application/json" };
        // A patch without a difference changes nothing.
        version += i32::from(changes != json!({}));
        let request = app.admin().request("PATCH", ACCOUNT).header("Content-Type", media_type).body(patch.to_string());
        let patched = app.admin().send(request).await.expect(200);

        for (field, value) in changes.as_object().expect("an object") {
            expected[field] = value.clone();
        }
        expected["version"] = json!(version);
        expected["updatedAt"] = patched["updatedAt"].clone();
        assert_eq!(patched, expected, "{patch}");
        assert_eq!(app.admin().get(ACCOUNT).await.expect(200), expected, "{patch}");
    }
    assert_eq!(rendered_password(&app, "registry-5000", "registry.example.com:6000").await, "canary-1");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn change_of_a_stale_version_is_rejected(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.admin().post(ACCOUNTS, &account_body()).await.expect(201);
    let patch = async |username: &str, etag: &str| {
        let request = app.admin().request("PATCH", ACCOUNT).header("If-Match", etag);
        app.admin().send(request.json(&json!({"username": username}))).await
    };
    let delete =
        async |etag: &str| app.admin().send(app.admin().request("DELETE", ACCOUNT).header("If-Match", etag)).await;

    let first = patch("lena", "\"1\"").await;
    assert_eq!((first.status, first.header("etag")), (200, "\"2\""));
    for stale in ["\"1\"", "\"3\"", "\"\"", "\"x\"", "\"99999999999999999999\""] {
        patch("mallory", stale).await.problem(412, "stale-version");
        delete(stale).await.problem(412, "stale-version");
    }
    for malformed in ["2", "\"2", "w"] {
        let refused = patch("mallory", malformed).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["If-Match"]);
    }
    let shown = app.admin().get(ACCOUNT).await.expect(200);
    assert_eq!((&shown["username"], &shown["version"]), (&json!("lena"), &json!(2)));

    assert_eq!(patch("robot", "*").await.status, 200);
    assert_eq!(delete("\"3\"").await.status, 204);
    patch("robot", "*").await.problem(404, "not-found");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn exactly_one_of_concurrent_changes_of_one_version_succeeds(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.admin().post(ACCOUNTS, &account_body()).await.expect(201);
    for version in 1..=5 {
        let patches = (0..8).map(async |number| {
            let request = app.admin().request("PATCH", ACCOUNT).header("If-Match", format!("\"{version}\""));
            let number = version * 10 + number;
            let body = json!({"username": format!("user-{number}"), "password": format!("password-{number}")});
            (number, app.admin().send(request.json(&body)).await)
        });

        let (won, lost): (Vec<_>, Vec<_>) =
            join_all(patches).await.into_iter().partition(|(_, answer)| answer.status == 200);

        assert_eq!((won.len(), lost.len()), (1, 7));
        for (_, answer) in lost {
            answer.problem(412, "stale-version");
        }
        // User name and password come from the same request.
        let (number, answer) = &won[0];
        assert_eq!(
            (&answer.json()["version"], answer.json()),
            (&json!(version + 1), app.admin().get(ACCOUNT).await.json())
        );
        let entry = &render(&app, &["registry-5000"]).await["config"]["auths"]["registry.example.com:5000"];
        assert_eq!(
            (&entry["username"], &entry["password"]),
            (&json!(format!("user-{number}")), &json!(format!("password-{number}")))
        );
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn responses_about_accounts_contain_no_password(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let answers = [
        app.admin().post(ACCOUNTS, &account_body()).await,
        app.admin().post(ACCOUNTS, &account_body()).await,
        app.admin().get(ACCOUNT).await,
        app.admin().get(ACCOUNTS).await,
        app.admin().patch(ACCOUNT, &json!({"password": "canary-2"})).await,
        app.admin().patch(ACCOUNT, &json!({"password": "canary-3", "username": ""})).await,
    ];
    assert_eq!(answers.each_ref().map(|answer| answer.status), [201, 409, 200, 200, 200, 422]);
    for answer in answers {
        assert!(!answer.body.contains("canary") && !answer.body.contains("password\""), "{answer:?}");
        assert!(!answer.body.contains(&BASE64_STANDARD.encode("robot:canary-1")), "{answer:?}");
    }
    // The password is stored and can be revealed.
    assert_eq!(rendered_password(&app, "registry-5000", "registry.example.com:5000").await, "canary-2");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rotation_is_visible_in_the_next_docker_config(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "registry.example.com:5000", "robot", "password-0").await;
    for number in 1..=20 {
        let password = format!("password-{number}");
        app.admin().patch("/v1/registry-accounts/a", &json!({"password": password})).await.expect(200);
        assert_eq!(rendered_password(&app, "a", "registry.example.com:5000").await, password);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn any_text_is_a_password_and_round_trips(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "registry.example.com", "rôbot$team+ci", "x").await;
    let long = "ü".repeat(16 * 1024);
    for password in
        [" ", "with:colon", "\"quotes\" \\ and\n\r\tlines", "</script>&amp;", "пароль 🔑", "\u{7f}\u{1}", &long]
    {
        app.admin().patch("/v1/registry-accounts/a", &json!({"password": password})).await.expect(200);

        let rendered = render(&app, &["a"]).await;

        let entry = &rendered["config"]["auths"]["registry.example.com"];
        let auth = BASE64_STANDARD.encode(format!("rôbot$team+ci:{password}"));
        assert_eq!((&entry["password"], &entry["auth"]), (&json!(password), &json!(auth)));
        let value = BASE64_STANDARD.decode(rendered["base64"].as_str().expect("text")).expect("base64");
        assert_eq!(serde_json::from_slice::<Value>(&value).expect("JSON"), rendered["config"]);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rendered_bytes_do_not_depend_on_the_order_of_accounts(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for name in ["c", "a", "b"] {
        app.register_account(name, &format!("{name}.example.com"), "robot", "x").await;
    }
    let first = app.admin().post("/v1/docker-configs", &json!({"accounts": ["a", "b", "c"]})).await;
    assert_eq!(first.header("cache-control"), "no-store");
    let first = first.expect(200);
    for accounts in [["c", "b", "a"], ["b", "a", "c"]] {
        let other = app.admin().post("/v1/docker-configs", &json!({"accounts": accounts})).await;
        let other = other.expect(200);
        assert_eq!((&other["base64"], &other["config"]), (&first["base64"], &first["config"]));
        assert_eq!(other["accounts"], json!(accounts));
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_spelling_of_a_registry_is_normalized(pool: PgPool) {
    const HUB: &str = "https://index.docker.io/v1/";
    let app = TestApp::spawn(pool).await;
    app.register_account("a", "placeholder.example.com", "robot", "x").await;
    let spellings = BTreeMap::from([
        (
            ("docker.io", HUB),
            vec![
                "docker.io",
                "Docker.IO",
                "https://docker.io",
                "https://docker.io/",
                "docker.io:443",
                "index.docker.io",
                "index.docker.io/v1",
                "index.docker.io/v1/",
                "https://index.docker.io",
                "https://index.docker.io/v1",
                "https://index.docker.io/v1/",
                "HTTPS://INDEX.DOCKER.IO/v1/",
                "https://index.docker.io/v2/",
                "registry-1.docker.io",
                "https://registry-1.docker.io/v2/",
                "hub.docker.com",
                "https://hub.docker.com/",
                "registry.hub.docker.com",
                "https://registry.hub.docker.com/v1/",
            ],
        ),
        (("docker.io/acme", "docker.io/acme"), vec!["docker.io/acme", "https://index.docker.io/v1/acme/"]),
        (
            ("registry.example.com:5000", "registry.example.com:5000"),
            vec![
                "registry.example.com:5000",
                "Registry.Example.COM:5000",
                "https://registry.example.com:5000/",
                "https://registry.example.com:5000/v2/",
                "registry.example.com:05000",
            ],
        ),
        (
            ("registry.example.com:5000/xxxx/rbd-rest-api", "registry.example.com:5000/xxxx/rbd-rest-api"),
            vec![
                "registry.example.com:5000/xxxx/rbd-rest-api",
                "https://registry.example.com:5000/v2/xxxx/rbd-rest-api/",
            ],
        ),
        (("[2001:db8::1]:5000", "[2001:db8::1]:5000"), vec!["[2001:DB8:0::1]:5000"]),
    ]);
    for ((registry, key), spelled) in spellings {
        for spelling in spelled {
            let changed =
                app.admin().patch("/v1/registry-accounts/a", &json!({"registry": spelling, "password": "x"})).await;
            assert_eq!(changed.expect(200)["registry"], registry, "{spelling}");
            let rendered = render(&app, &["a"]).await;
            let keys: Vec<&String> = rendered["config"]["auths"].as_object().expect("entries").keys().collect();
            assert_eq!(keys, [key], "{spelling}");
        }
    }
    // A creation normalizes as well.
    let body = json!({"name": "hub", "registry": "https://index.docker.io/v1/", "username": "m", "password": "x"});
    assert_eq!(app.admin().post(ACCOUNTS, &body).await.expect(201)["registry"], "docker.io");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn request_id_of_the_client_is_returned_beside_that_of_regcred(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let given = "0198a0b1-7000-7000-8000-000000000001";
    let ask = async |id: &str| {
        let request = app.admin().request("GET", ACCOUNT).header("X-Request-Id", id);
        let answer = app.admin().send(request).await;
        answer.problem(404, "not-found");
        let id = answer.header("x-request-id");
        assert!(id != given && Uuid::try_parse(id).is_ok(), "{answer:?}");
        answer.header("x-client-request-id").to_owned()
    };

    assert_eq!(ask(given).await, given);
    for foreign in ["canary", "0198a0b1", ""] {
        assert_eq!(ask(foreign).await, "", "not a UUID");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn stored_password_is_not_sent_to_another_registry(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut account = account_body();
    account["plainHttp"] = json!(false);
    app.admin().post(ACCOUNTS, &account).await.expect(201);
    let another_ca = kubernetes::file("ca.crt");

    for (field, change) in [
        ("registry", json!({"registry": "attacker.example.com"})),
        ("registry", json!({"registry": "registry.example.com:6000"})),
        ("plainHttp", json!({"plainHttp": true})),
        ("caCertificate", json!({"caCertificate": another_ca})),
    ] {
        let problem = app.admin().patch(ACCOUNT, &change).await.problem(422, "invalid-request");
        assert_eq!(problem["errors"][0]["field"], field, "{problem}");
    }
    assert_eq!(app.admin().get(ACCOUNT).await.expect(200)["version"], 1);

    // Another path on the same registry is allowed, and so is another registry with a new password.
    let part = json!({"registry": "registry.example.com:5000/os"});
    assert_eq!(app.admin().patch(ACCOUNT, &part).await.expect(200)["registry"], part["registry"]);
    let moved = json!({"registry": "registry.example.com:6000", "plainHttp": true, "password": "password-2"});
    assert_eq!(app.admin().patch(ACCOUNT, &moved).await.expect(200)["registry"], moved["registry"]);

    // The same CA is no change, and without it fewer certificates are trusted.
    let with_ca = json!({"caCertificate": another_ca, "password": "password-3"});
    let stored = app.admin().patch(ACCOUNT, &with_ca).await.expect(200)["caCertificate"].clone();
    app.admin().patch(ACCOUNT, &json!({"caCertificate": stored})).await.expect(200);
    assert_eq!(
        app.admin().patch(ACCOUNT, &json!({"caCertificate": null})).await.expect(200)["caCertificate"],
        json!(null)
    );
}
