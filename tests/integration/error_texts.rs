//! Texts of errors: each names the remedy.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    client::{Answer, Client},
};

/// A request, its status, and parts of the text that it gets.
struct Case<'a> {
    caller: &'a Client,
    method: &'a str,
    path: &'a str,
    body: Value,
    status: u16,
    parts: &'a [&'a str],
}

async fn send(client: &Client, method: &str, path: &str, body: &Value) -> Answer {
    let request = client.request(method, path);
    client.send(if body.is_null() { request } else { request.json(body) }).await
}

async fn check(cases: &[Case<'_>]) {
    for Case { caller, method, path, body, status, parts } in cases {
        let answer = send(caller, method, path, body).await;
        let detail = answer.expect(*status)["detail"].as_str().expect("a detail").to_owned();
        for part in *parts {
            assert!(detail.contains(part), "{method} {path}: {part:?} is not in {detail:?}");
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_error_names_its_remedy(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (admin, viewer) = (app.admin(), app.caller("viewer", "viewer", None).await);
    let grants = json!({"accounts": ["a-*"], "clusters": ["a"], "namespaces": ["a"]});
    let narrow = app.caller("narrow", "operator", Some(grants)).await;
    let account = json!({"name": "a", "registry": "ghcr.io", "username": "u", "password": "p"});
    let with = |field: &str, value: Value| {
        let mut account = account.clone();
        account[field] = value;
        account
    };
    let case = |caller, method, path, body, status, parts| Case { caller, method, path, body, status, parts };
    let accounts = "/v1/registry-accounts";
    check(&[
        case(
            &viewer,
            "POST",
            accounts,
            account.clone(),
            403,
            &["`viewer`", "`writeAccounts`", "`admin` or `operator`"],
        ),
        case(&viewer, "GET", "/v1/api-keys", Value::Null, 403, &["`readApiKeys`", "use a key with the role `admin`"]),
        case(&narrow, "DELETE", "/v1/clusters/a", Value::Null, 403, &["`writeClusters`", "see `GET /v1/me`"]),
        case(&admin, "POST", accounts, json!({}), 422, &["`name`", "`registry`"]),
        case(
            &admin,
            "POST",
            accounts,
            json!({"name": "a", "registry": "https://"}),
            422,
            &["`registry`", "`username`: is required unless `source` is given", "`password`"],
        ),
        case(&admin, "POST", accounts, with("expiresAt", json!("31.1.2027")), 422, &["such as 2027-01-31T00:00:00Z"]),
        case(&admin, "POST", accounts, with("labels", json!(["a"])), 422, &["`labels`: must be an object"]),
        case(
            &admin,
            "POST",
            "/v1/docker-configs",
            json!({"accounts": "a"}),
            422,
            &["must be a list, such as [\"prod\"]"],
        ),
        case(
            &admin,
            "POST",
            "/v1/api-keys",
            json!({"name": "k", "role": "viewer", "expiresAt": "2020-01-01T00:00:00Z"}),
            422,
            &["must be in the future, such as 2027-01-31T00:00:00Z"],
        ),
        case(&admin, "GET", "/v1/registry-accounts/", Value::Null, 404, &["leave out the slash at its end"]),
        case(&admin, "GET", "/v1/registry-accounts/x/", Value::Null, 404, &["leave out the slash at its end"]),
        case(&admin, "GET", "/v1/registry-account", Value::Null, 404, &["/openapi.json"]),
    ])
    .await;

    let request = admin.request("POST", accounts).header("Content-Type", "text/plain").body(account.to_string());
    let detail = admin.send(request).await.problem(415, "unsupported-media-type")["detail"].clone();
    assert!(detail.as_str().is_some_and(|text| text.contains("`Content-Type: application/json`")), "{detail}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn missing_and_ungranted_resources_have_one_text_that_names_the_grants(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("hidden", "ghcr.io", "u", "p").await;
    let auth = json!({"type": "none"});
    let cluster = json!({"name": "a", "server": "https://127.0.0.1:1", "auth": auth});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
    let hint = "or it is not granted to this key: see `GET /v1/me`";
    let grants = json!({"accounts": ["a-*"], "clusters": ["a"], "namespaces": ["a"]});
    let narrow = app.caller("narrow", "operator", Some(grants)).await;
    let ask = async |caller: &Client, name: &str| {
        let declaration = json!({"accounts": [name], "secret": {"name": "pull"},
            "targets": [{"cluster": name, "namespaces": ["a"]}]});
        let secret = json!({"name": "pull", "accounts": ["a-1"]});
        let answers = [
            send(caller, "GET", &format!("/v1/registry-accounts/{name}"), &Value::Null).await,
            send(caller, "PUT", "/v1/pull-secrets/p", &declaration).await,
            send(caller, "POST", &format!("/v1/clusters/a/namespaces/{name}/secrets"), &secret).await,
        ];
        answers.map(|answer| {
            let detail = answer.json()["detail"].as_str().expect("a detail").replace(name, "NAME");
            (answer.status, detail)
        })
    };

    let [hidden, missing] = [ask(&narrow, "hidden").await, ask(&narrow, "absent").await];

    assert_eq!(hidden, missing);
    for (status, detail) in &hidden {
        assert!(detail.contains(hint), "{status}: {detail}");
    }
    assert_eq!(hidden[1].1.matches(hint).count(), 2, "account and cluster: {}", hidden[1].1);
    // For a caller with all grants, a missing resource is missing.
    for (status, detail) in &ask(&app.admin(), "absent").await[..2] {
        assert!([404, 422].contains(status) && !detail.contains("granted"), "{status}: {detail}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn account_whose_expiry_has_passed_has_a_warning(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let body = |name: &str, expires_at: &str| json!({"name": name, "registry": "ghcr.io", "username": "u", "password": "p", "expiresAt": expires_at});
    let codes = |account: &Value| {
        let warnings = account["warnings"].as_array().expect("warnings").iter();
        warnings.map(|warning| warning["code"].as_str().expect("a code").to_owned()).collect::<Vec<_>>()
    };
    let ended = app.admin().post("/v1/registry-accounts", &body("ended", "2020-01-01T00:00:00Z")).await.expect(201);
    assert_eq!(codes(&ended), ["expired"]);
    let good = app.admin().post("/v1/registry-accounts", &body("good", "2120-01-01T00:00:00Z")).await.expect(201);
    assert_eq!(codes(&good), Vec::<String>::new());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn root_has_links_for_programs_and_for_browsers(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let anonymous = app.anonymous();
    let links = anonymous.get("/").await.expect(200);
    let links = links.as_object().expect("links");
    assert_eq!((&links["documentation"], &links["openapi"]), (&json!("/docs/"), &json!("/openapi.json")));
    for path in links.values() {
        assert_eq!(anonymous.get(path.as_str().expect("a path")).await.status, 200, "{path}");
    }
    let page = anonymous.send(anonymous.request("GET", "/").header("Accept", "text/html,*/*;q=0.8")).await;
    // Browsers are sent to the console.
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").contains("script-src 'self'"), "{page:?}");
}
