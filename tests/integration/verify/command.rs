//! `regcred verify`, and output at the most verbose log level.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::{
    certificates::Ca,
    listening::{Trap, answer, bearer, serve},
    registries::{Setup, TestRegistry},
    token_service::{Deviations, TokenService},
};
use crate::support::{
    files::TempDir,
    process::{Exit, Installation},
    registry,
};

/// Environment without a database and without the variables that the command does not need.
pub fn installation() -> Installation {
    Installation::new("postgres://unused@127.0.0.1:1/none")
        .with("REGCRED_DATABASE_URL_FILE", "")
        .with("REGCRED_MASTER_KEYS_FILE", "")
        .with("REGCRED_API_KEY_PEPPER_FILE", "")
        .with("REGCRED_LOG_FILTER", "trace")
}

pub fn entry(username: &str, password: &str) -> Value {
    json!({"auth": BASE64_STANDARD.encode(format!("{username}:{password}"))})
}

pub async fn verify(installation: &Installation, config: &Value, arguments: &[&str]) -> Exit {
    let folder = TempDir::new();
    let path = folder.write("config.json", config.to_string());
    let path = path.to_str().expect("UTF-8");
    installation.run(&[&["verify", "--config", path], arguments].concat()).await
}

#[tokio::test]
async fn white_space_at_the_end_of_a_password_is_warned_about() {
    let a = registry::a();
    let padded = json!({"auths": {&a.address: entry(&a.username, &format!("{}\n", a.password))}});
    let exit = verify(&installation(), &padded, &[]).await;
    assert_eq!(exit.code, Some(1), "{exit:?}");
    let warning = format!("{}: warning: the password ends with white space", a.address);
    for text in [warning.as_str(), "the likely cause is the white space at the end of the password"] {
        assert!(exit.stdout.contains(text), "{text}: {exit:?}");
    }
    let exit = verify(&installation(), &padded, &["--output", "json"]).await;
    let report: Value = serde_json::from_str(&exit.stdout).expect("JSON");
    assert_eq!(report["items"][0]["warnings"][0]["code"], "passwordEndsWithWhitespace");

    // Secrets as kubectl prints them.
    let document = json!({"auths": {&a.address: entry(&a.username, &a.password)}}).to_string();
    let secret = json!({
        "kind": "Secret", "metadata": {"namespace": "a", "name": "pull"},
        "data": {".dockerconfigjson": BASE64_STANDARD.encode(document)},
    });
    let other = json!({"kind": "Secret", "metadata": {"namespace": "a", "name": "tls"}, "data": {}});
    let exit = verify(&installation(), &json!({"kind": "List", "items": [secret, other]}), &[]).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
}

#[tokio::test]
async fn every_entry_has_a_line_and_failures_set_the_exit_code() {
    let (a, b) = (registry::a(), registry::b());
    let (right_a, right_b) = (entry(&a.username, &a.password), entry(&b.username, &b.password));
    let good = json!({"auths": {&a.address: right_a, &b.address: right_b}, "HttpHeaders": {"X": "y"}});
    let exit = verify(&installation(), &good, &[]).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    let lines: Vec<Vec<&str>> = exit.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ENTRY", "USER", "RESULT", "ADVICE"]);
    for address in [a.address.as_str(), b.address.as_str()] {
        assert!(lines.contains(&vec![address, "martin", "valid", "-"]), "{exit:?}");
    }
    assert!(exit.stderr.contains("checked 2 of 2"), "{exit:?}");

    let bad = json!({
        "auths": {
            &a.address: right_a, &b.address: entry("martin", "canary-password"), "127.0.0.1:1": entry("martin", "canary-password"),
            "registry.invalid": entry("martin", "canary-password"), "store.example": {},
        },
        "credsStore": "desktop",
    });
    let exit = verify(&installation(), &bad, &[]).await;
    assert_eq!(exit.code, Some(1), "{exit:?}");
    for words in ["valid", "invalid", "unreachable", "docker login", "docker-credential-desktop", "5 of 6 entries"] {
        assert!(exit.stdout.contains(words) || exit.stderr.contains(words), "{words}: {exit:?}");
    }
    let exit = verify(&installation(), &bad, &["--output", "json"]).await;
    let report: Value = serde_json::from_str(&exit.stdout).expect("JSON and nothing else");
    assert_eq!((exit.code, &report["ok"]), (Some(1), &json!(false)));
    let result_of = |key: &str| {
        let items = report["items"].as_array().expect("items");
        items.iter().find(|item| item["key"] == key).expect("the entry")["result"].clone()
    };
    for (key, result) in [
        (a.address.as_str(), json!("valid")),
        (b.address.as_str(), json!("invalid")),
        ("127.0.0.1:1", json!("unreachable")),
        ("registry.invalid", json!("unreachable")),
        ("store.example", Value::Null),
        ("credsStore", Value::Null),
    ] {
        assert_eq!(result_of(key), result, "{key}: {report}");
    }

    for exit in
        [verify(&installation(), &json!({"auths": {}}), &[]).await, verify(&installation(), &json!([1]), &[]).await]
    {
        assert_eq!(exit.code, Some(1), "{exit:?}");
    }
}

#[tokio::test]
async fn private_ca_and_plain_http_can_be_set() {
    let ca = Ca::new();
    let users: &[(&str, &str)] = &[("martin", "canary-password")];
    let tls = TestRegistry::start(Setup { users, tls: Some(&ca.certify()), ..Setup::default() }).await;
    let config = json!({"auths": {tls.address.to_string(): entry("martin", "canary-password")}});
    let exit = verify(&installation(), &config, &[]).await;
    assert!(exit.code == Some(1) && exit.stdout.contains("tlsError"), "{exit:?}");
    let folder = TempDir::new();
    let file = folder.write("ca.pem", &ca.pem);
    let exit = verify(&installation(), &config, &["--ca-certificate", file.to_str().unwrap()]).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");

    let a = registry::a();
    let config = json!({"auths": {&a.address: entry(&a.username, &a.password)}});
    let exit = verify(&installation(), &config, &["--plain-http", &a.address]).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
}

#[tokio::test]
async fn registry_in_the_config_cannot_redirect_the_command() {
    let trap = Trap::set();
    let realm = format!("http://127.0.0.2:{}/token", trap.port);
    let (registry, _) = serve(move |_| bearer(&realm));
    let config = json!({"auths": {registry.to_string(): entry("martin", "canary-password")}});
    let exit = verify(&installation(), &config, &["--plain-http", &registry.to_string()]).await;
    assert!(exit.code == Some(1) && exit.stdout.contains("refused") && trap.caught() == 0, "{exit:?}");
}

#[tokio::test]
async fn proxy_of_the_environment_is_not_used() {
    let (proxy, requests) = serve(|_| answer("200 OK", &[], "{}"));
    let url = format!("http://{proxy}");
    let mut installation = installation();
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        installation = installation.with(name, &url);
    }
    let a = registry::a();
    let config = json!({"auths": {&a.address: entry(&a.username, &a.password)}});
    let exit = verify(&installation, &config, &[]).await;
    assert_eq!((exit.code, requests.count()), (Some(0), 0), "{exit:?}");
}

#[tokio::test]
async fn verbose_output_of_the_command_contains_no_secret() {
    let service = TokenService::start(Deviations::default());
    let realm = service.realm();
    let (registry, _) = serve(move |request| {
        if request.contains("authorization: Bearer") {
            answer("200 OK", &[("X-Canary", "canary-upstream")], "{\"canary\":\"canary-upstream\"}")
        } else {
            bearer(&realm)
        }
    });
    for (user, code) in [("martin", 0), ("old", 1), ("harbor", 1)] {
        let config = json!({"auths": {registry.to_string(): entry(user, "canary-password")}});
        let address = registry.to_string();
        let exit = verify(&installation(), &config, &["--plain-http", &address]).await;
        assert_eq!(exit.code, Some(code), "{exit:?}");
        assert_clean(&format!("{}{}", exit.stdout, exit.stderr), user);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn verbose_log_of_the_service_contains_no_secret(pool: PgPool) {
    let service = TokenService::start(Deviations::default());
    let realm = service.realm();
    let (echo, _) = serve(move |request| {
        let login = request.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap_or("canary-upstream");
        if login.starts_with("Bearer") {
            answer("401 canary-upstream", &[("X-Canary", login), ("WWW-Authenticate", login)], login)
        } else {
            bearer(&realm)
        }
    });
    let url = pool.connect_options().to_url_lossy().to_string();
    let installation = Installation::new(&url)
        .with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")
        .with("REGCRED_VERIFY_POLL_SECONDS", "1")
        .with("REGCRED_LOG_FILTER", "trace");
    let regcred = installation.serve().await;
    let client = regcred.client(&installation.new_key("admin").await);
    for user in ["martin", "old", "harbor", "<token>"] {
        let name = user.trim_matches(['<', '>']);
        let body = json!({
            "name": name, "registry": echo.to_string(), "username": user, "password": "canary-password", "plainHttp": true,
            "verifyIntervalSeconds": 300,
        });
        client.post("/v1/registry-accounts?verify=true", &body).await.problem(422, "verification-failed");
        client.post("/v1/registry-accounts", &body).await.expect(201);
        for repository in [None, Some("os/alpine")] {
            let path = format!("/v1/registry-accounts/{name}/verify");
            client.post(&path, &json!({"repository": repository})).await.expect(200);
        }
        assert_clean(&regcred.process.stderr(), user);
    }
    let log = regcred.process.stderr();
    assert!(log.contains("\"level\":\"TRACE\"") && log.contains("login checked"), "{log}");
}

/// Asserts that `text` contains no password, token or text of a registry, in any encoding.
#[track_caller]
fn assert_clean(text: &str, user: &str) {
    let pair = BASE64_STANDARD.encode(format!("{user}:canary-password"));
    let reversed: String = "canary-password".chars().rev().collect();
    let encodings = [
        "canary-",
        &pair,
        &BASE64_STANDARD.encode("canary-password"),
        "canary%2D",
        "63616e6172792d",
        &reversed,
        "eyJ0eXAi",
    ];
    for encoding in encodings {
        if let Some(at) = text.find(encoding) {
            panic!("{encoding}: {}", &text[at.saturating_sub(300)..(at + 100).min(text.len())]);
        }
    }
}
