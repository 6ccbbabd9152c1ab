//! Docker configs of the accounts for an image or a registry.

use regcred::{
    domain::caller::Role,
    domain::grants::{Grants, GrantsDocument},
    storage::{self, accounts::match_credentials},
};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    client::{Answer, Client},
};

const RENDER: &str = "/v1/docker-configs";
const PROFILES: [&str; 5] = ["kubernetes", "dockercfg", "docker", "dockerAuthConfig", "podman"];

async fn render(client: &Client, profile: &str, matching: Value) -> Answer {
    client.post(RENDER, &json!({"match": matching, "profile": profile})).await
}

/// Names and keys of the rendered accounts.
fn rendered(answer: &Answer) -> (Vec<String>, Vec<String>) {
    let body = answer.expect(200);
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().expect("a list").iter().map(|text| text.as_str().expect("a text").to_owned()).collect()
    };
    let entries = body["config"].get("auths").unwrap_or(&body["config"]).as_object().expect("entries");
    (texts(&body["accounts"]), entries.keys().cloned().collect())
}

fn codes(answer: &Answer) -> Vec<String> {
    let warnings = answer.expect(200)["warnings"].as_array().expect("warnings").clone();
    warnings.iter().map(|warning| warning["code"].as_str().expect("a code").to_owned()).collect()
}

async fn register_many(app: &TestApp, accounts: &[(&str, &str)]) {
    for (name, registry) in accounts {
        app.register_account(name, registry, "u", &format!("pw-{name}")).await;
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn only_the_accounts_that_the_reader_uses_are_rendered(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let accounts = [
        ("all", "reg.example.com:5000"),
        ("os", "reg.example.com:5000/os"),
        ("other-path", "reg.example.com:5000/other"),
        ("other-port", "reg.example.com"),
        ("hub", "https://index.docker.io/v1/"),
        ("acme", "docker.io/acme"),
    ];
    register_many(&app, &accounts).await;
    let admin = app.admin();
    let image = json!({"image": "reg.example.com:5000/os/alpine:3"});
    for profile in ["kubernetes", "dockercfg"] {
        let answer = render(&admin, profile, image.clone()).await;
        assert_eq!(rendered(&answer).0, ["os", "all"], "{profile}");
        assert!(!answer.body.contains("pw-other"), "{answer:?}");
    }
    let answer = render(&admin, "podman", image.clone()).await;
    assert_eq!(rendered(&answer), (vec!["os".to_owned()], vec!["reg.example.com:5000/os".to_owned()]));
    for profile in ["docker", "dockerAuthConfig"] {
        let answer = render(&admin, profile, image.clone()).await;
        assert_eq!(rendered(&answer), (vec!["os".to_owned()], vec!["reg.example.com:5000".to_owned()]), "{profile}");
    }
    // Every spelling of Docker Hub.
    for registry in ["docker.io", "index.docker.io", "registry-1.docker.io", "https://index.docker.io/v1/"] {
        let answer = render(&admin, "docker", json!({"registry": registry})).await;
        assert_eq!(rendered(&answer).0, ["hub"], "{registry}");
    }
    for (image, expected) in [("nginx", "hub"), ("acme/app:1", "acme"), ("index.docker.io/acme/app", "acme")] {
        let answer = render(&admin, "podman", json!({"image": image})).await;
        assert_eq!(rendered(&answer).0, [expected], "{image}");
    }
    let answer = render(&admin, "podman", json!({"registry": "reg.example.com:5000/os"})).await;
    assert_eq!(rendered(&answer).0, ["os"]);

    // The explanation of all accounts agrees, where the reader can have all of them.
    let names: Vec<_> = accounts.iter().map(|(name, _)| *name).collect();
    let body = json!({"accounts": names, "image": "reg.example.com:5000/os/alpine:3"});
    let explained = admin.post("/v1/docker-configs/explain", &body).await.expect(200);
    assert_eq!(explained["consumers"]["kubernetes"]["accounts"], json!(["os", "all"]));
    assert_eq!(explained["consumers"]["podman"]["accounts"], json!(["os"]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn manifest_has_the_accounts_for_an_image(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register_many(&app, &[("a", "reg.example.com"), ("b", "other.example.com")]).await;
    let body = json!({"match": {"image": "reg.example.com/app"}, "secret": {"name": "pull"}});
    let manifest = app.admin().post("/v1/docker-configs/manifest", &body).await.expect(200);
    let data = manifest["data"][".dockerconfigjson"].as_str().expect("data");
    let decoded = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, data).expect("base64");
    let document: Value = serde_json::from_slice(&decoded).expect("JSON");
    assert_eq!(document["auths"].as_object().expect("entries").keys().collect::<Vec<_>>(), ["reg.example.com"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn image_without_an_account_has_an_empty_document_and_an_event(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register_many(&app, &[("a", "reg.example.com/team"), ("b", "reg.example.com")]).await;
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    for profile in PROFILES {
        let image = format!("quay.io/team/app:1.0@{digest}");
        let answer = render(&app.admin(), profile, json!({"image": image})).await;
        assert_eq!(rendered(&answer), (Vec::new(), Vec::new()), "{profile}");
        assert_eq!(codes(&answer), ["nothingMatches"]);
    }
    let event = async || {
        let events = app.admin().get("/v1/audit-events?action=dockerConfig.reveal&limit=1").await.expect(200);
        events["items"][0].clone()
    };
    let found = event().await;
    // Neither tag nor digest.
    assert_eq!(found["details"], json!({"profile": "podman", "image": "quay.io/team/app"}));
    assert_eq!((&found["resource"], &found["related"]), (&json!("docker-configs"), &json!([])));

    render(&app.admin(), "docker", json!({"registry": "https://reg.example.com/"})).await.expect(200);
    let found = event().await;
    assert_eq!(found["details"], json!({"profile": "docker", "registry": "reg.example.com"}));
    assert_eq!(found["resource"], "registry-accounts/b");
    render(&app.admin(), "kubernetes", json!({"image": "reg.example.com/team/app"})).await.expect(200);
    assert_eq!(event().await["related"], json!(["registry-accounts/a", "registry-accounts/b"]));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn only_matching_accounts_are_opened(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register_many(&app, &[("all", "reg.example.com"), ("os", "reg.example.com/os"), ("damaged", "reg.example.com/x")])
        .await;
    // Neither is used, so their passwords need not open.
    sqlx::query("UPDATE registry_accounts SET password = '\\x00' WHERE name IN ('damaged', 'all')")
        .execute(&app.pool)
        .await
        .expect("damaged");
    let answer = render(&app.admin(), "podman", json!({"image": "reg.example.com/os/app"})).await;
    assert_eq!(rendered(&answer).0, ["os"]);
    render(&app.admin(), "kubernetes", json!({"image": "reg.example.com/os/app"})).await.problem(500, "internal");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn accounts_that_are_not_granted_do_not_match(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, labels) in [("b-one", json!({})), ("a-one", json!({})), ("c-one", json!({"team": "c"}))] {
        let account = json!({
            "name": name, "registry": "reg.example.com", "username": "u", "password": "pw", "labels": labels,
        });
        app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    }
    let image = || json!({"image": "reg.example.com/app"});
    for (caller, rules, expected) in [
        ("by-name", json!(["a-*"]), vec!["a-one"]),
        ("by-label", json!([{"matchLabels": {"team": "c"}}]), vec!["c-one"]),
        ("both", json!(["a-*", {"matchLabels": {"team": "c"}}]), vec!["a-one"]),
        // The oldest one.
        ("all", json!(["*"]), vec!["b-one"]),
        ("none", json!(["d-*"]), vec![]),
    ] {
        let client = app.caller(caller, "renderer", Some(json!({"accounts": rules}))).await;
        let answer = render(&client, "docker", image()).await;
        assert_eq!(rendered(&answer).0, expected, "{caller}");
    }
    let collisions = render(&app.admin(), "podman", image()).await;
    assert_eq!(codes(&collisions), ["keyCollision"; 2]);
    // The role decides as for named accounts.
    let deliverer = app.caller("deliverer", "deliverer", Some(json!({"accounts": ["*"]}))).await;
    render(&deliverer, "docker", image()).await.problem(403, "forbidden");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn invalid_match_is_refused_and_named(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register_many(&app, &[("a", "reg.example.com")]).await;
    let image = json!({"image": "reg.example.com/app"});
    for (body, field) in [
        (json!({}), "accounts"),
        (json!({"match": null}), "accounts"),
        (json!({"match": image, "accounts": ["a"]}), "match"),
        (json!({"match": image, "accountSelector": {}}), "match"),
        (json!({"match": {}}), "match"),
        (json!({"match": {"image": "reg.example.com/app", "registry": "reg.example.com"}}), "match"),
        (json!({"match": {"image": "https://reg.example.com/app"}}), "match.image"),
        (json!({"match": {"image": ""}}), "match.image"),
        (json!({"match": {"image": 7}}), "match.image"),
        (json!({"match": {"registry": "*.example.com"}}), "match.registry"),
        (json!({"match": {"host": "reg.example.com"}}), "match.host"),
        (json!({"match": "reg.example.com"}), "match"),
    ] {
        let mut manifest = body.clone();
        manifest["secret"] = json!({"name": "pull"});
        for (path, body) in [(RENDER, &body), ("/v1/docker-configs/manifest", &manifest)] {
            let refused = app.admin().post(path, body).await;
            refused.problem(422, "invalid-request");
            assert_eq!(refused.fields(), [field], "{body}");
        }
    }
}

/// Rows and index entries of accounts that this session has read.
async fn rows_read(conn: &mut storage::PgConnection) -> i64 {
    sqlx::query("SELECT pg_stat_force_next_flush()").execute(&mut *conn).await.expect("flushed");
    let query = "SELECT (seq_tup_read + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes AS i WHERE i.relid = t.relid))::bigint
                 FROM pg_stat_user_tables AS t WHERE relname = 'registry_accounts'";
    sqlx::query_scalar(query).fetch_one(conn).await.expect("a sum")
}

/// 100,000 accounts: half of them for one registry, half for a registry each.
async fn fill(pool: &PgPool) {
    let accounts = "INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id, labels)
        SELECT gen_random_uuid(), 'a-' || lpad(number::text, 6, '0'),
            CASE WHEN number % 2 = 0 THEN 'shared.example.com' ELSE 'r' || number || '.example.com' END, 'u', '', '',
            jsonb_build_object('team', 't' || number % 1000)
        FROM generate_series(1, 100000) AS number";
    sqlx::query(accounts).execute(pool).await.expect("inserted");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn match_among_many_accounts_reads_few_rows(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    fill(&app.pool).await;
    let grants = |accounts: Value| -> Grants {
        let document: GrantsDocument = serde_json::from_value(json!({"accounts": accounts})).expect("grants");
        Grants::parse(Role::Renderer, document).expect("grants")
    };
    let scopes = |registry: &str| [registry.to_owned(), format!("{registry}/os"), format!("{registry}/os/app")];
    let mut conn: storage::PgConnection = app.pool.acquire().await.expect("a connection").detach().into();
    // Without and with statistics.
    for _ in 0..2 {
        for (rules, registry, expected) in [
            (json!(["*"]), "r50001.example.com", 1),
            (json!(["*"]), "shared.example.com", 101),
            (json!(["*"]), "nowhere.example.com", 0),
            (json!(["a-0500*", "a-0600*"]), "shared.example.com", 100),
            (json!(["b-*"]), "shared.example.com", 0),
            (json!([{"matchLabels": {"team": "t1"}}]), "r50001.example.com", 1),
        ] {
            let before = rows_read(&mut conn).await;
            let found =
                match_credentials(&mut conn, &grants(rules.clone()), &scopes(registry), 101).await.expect("found");
            let read = rows_read(&mut conn).await - before;
            assert_eq!(found.len(), expected, "{rules} {registry}");
            assert!(read <= 1_000, "{rules} {registry}: {read} rows");
        }
        sqlx::query("ANALYZE registry_accounts").execute(&mut conn).await.expect("analyzed");
    }
    let answer = render(&app.admin(), "docker", json!({"image": "shared.example.com/os/app"})).await;
    answer.problem(422, "invalid-request");
    assert_eq!(answer.fields(), ["match"]);
}
