//! Rendered documents, read by real programs (kubectl, skopeo, the docker CLI) from real
//! registries.
//!
//! Both registries have a user `martin` with different passwords; the first also has `lena`. Both
//! refuse anonymous clients.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    process::{Command, Output},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use regcred::domain::{
    docker_config::parse::Config,
    matching::{Consumers, ImageName, explain_config},
};
use rstest::rstest;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    app::TestApp,
    client::Answer,
    files::TempDir,
    given,
    kubernetes::kubectl,
    registry::{self, Registry, assert_refused, skopeo, skopeo_reads},
};

const RENDER: &str = "/v1/docker-configs";
const MANIFEST: &str = "/v1/docker-configs/manifest";
const EXPLAIN: &str = "/v1/docker-configs/explain";
const PROFILES: [&str; 5] = ["kubernetes", "docker", "dockerAuthConfig", "podman", "dockercfg"];

/// Renders the bare document for a profile, as stored in its file.
async fn document(app: &TestApp, profile: &str, accounts: &[&str]) -> String {
    let answer = render(app, &json!({"accounts": accounts, "profile": profile, "format": "document"}), "*/*").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

/// Renders with this `Accept` header.
async fn render(app: &TestApp, body: &Value, accept: &str) -> Answer {
    app.admin().send(app.admin().request("POST", RENDER).header("Accept", accept).json(body)).await
}

/// Reference of the image that both registries hold.
fn image(registry: &Registry) -> String {
    format!("{}/{}", registry.address, given("REGCRED_TEST_REGISTRY_IMAGE"))
}

/// Copies that image to another path of the registry and returns its reference.
fn image_of_team(registry: &Registry) -> String {
    let Registry { address, username, password } = registry;
    let image = format!("{address}/team/app:1");
    let login = format!("{username}:{password}");
    let copy = ["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"];
    let as_user = ["--src-creds", &login, "--dest-creds", &login];
    let images = [format!("docker://{}", self::image(registry)), format!("docker://{image}")];
    let output = Command::new("skopeo").args(copy).args(as_user).args(images).output().expect("skopeo is on PATH");
    assert!(output.status.success(), "{}", text(&output.stderr));
    image
}

/// The user that skopeo selects for a repository or registry.
fn skopeo_user(authfile: &str, repository: &str) -> Option<String> {
    let folder = TempDir::new();
    let output =
        skopeo("login", &folder, authfile).arg("--get-login").arg(repository).output().expect("skopeo is on PATH");
    let said = text(&output.stderr);
    assert!(output.status.success() || said.contains("not logged into"), "{said}");
    output.status.success().then(|| text(&output.stdout).trim().to_owned())
}

/// Reads an image with the docker CLI and this `config.json` alone.
fn docker_reads(config_json: &str, image: &str) -> Result<(), String> {
    let folder = TempDir::new();
    folder.write("config.json", config_json);
    outcome(&docker(folder.path()).args(["manifest", "inspect", "--insecure", image]).output().expect("docker runs"))
}

fn docker(config: &Path) -> Command {
    let mut docker = Command::new(given("REGCRED_TEST_DOCKER"));
    docker.arg("--config").arg(config).env("HOME", config).env_remove("DOCKER_AUTH_CONFIG");
    docker
}

fn outcome(output: &Output) -> Result<(), String> {
    if output.status.success() { Ok(()) } else { Err(text(&output.stderr)) }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn kubernetes_profile_equals_kubectls_document(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let logins = [
        ("plain", "registry.example.com:5000", "martin", "xxx1", Some("dev@example.com")),
        ("without-email", "registry.example.com:6000", "martin", "xxx2", None),
        // Without `--docker-server`, kubectl uses Docker Hub.
        ("hub", "docker.io", "bot", "p\"ä\\ <ss>&:", None),
    ];
    for (name, registry, username, password, email) in logins {
        let account =
            json!({"name": name, "registry": registry, "username": username, "password": password, "email": email});
        app.admin().post("/v1/registry-accounts", &account).await.expect(201);
        let mut arguments = vec!["create", "secret", "docker-registry", "pull", "--dry-run=client", "-o", "json"];
        let (server, email) =
            (format!("--docker-server={registry}"), email.map(|email| format!("--docker-email={email}")));
        let login = [format!("--docker-username={username}"), format!("--docker-password={password}")];
        arguments.extend(login.iter().chain(&email).map(String::as_str));
        if registry != "docker.io" {
            arguments.push(&server);
        }

        let expected: Value = serde_json::from_str(&kubectl(&arguments, "")).expect("JSON");
        let manifest =
            app.admin().post(RENDER, &json!({"accounts": [name], "secret": {"name": "pull"}})).await.expect(200);

        for member in ["apiVersion", "kind", "type"] {
            assert_eq!(manifest[member], expected[member], "{name}");
        }
        assert_eq!(manifest["metadata"]["name"], expected["metadata"]["name"], "{name}");
        let decoded = |secret: &Value| -> Value {
            let value = secret["data"][".dockerconfigjson"].as_str().expect("a value");
            serde_json::from_slice(&BASE64_STANDARD.decode(value).expect("base64")).expect("JSON")
        };
        assert_eq!(decoded(&manifest), decoded(&expected), "{name}");
        let bare: Value = serde_json::from_str(&document(&app, "kubernetes", &[name]).await).expect("JSON");
        assert_eq!(bare, decoded(&expected), "{name}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn skopeo_pulls_with_every_document_that_has_auths(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (a, b) = app.register_registries().await;
    assert_refused(skopeo_reads(r#"{"auths":{}}"#, &image(&a)));
    // podman reads `auth` in every document that has `auths`.
    for profile in ["podman", "kubernetes", "docker", "dockerAuthConfig"] {
        let both = document(&app, profile, &["a", "b"]).await;
        assert_eq!(skopeo_reads(&both, &image(&a)), Ok(()), "{profile}");
        assert_eq!(skopeo_reads(&both, &image(&b)), Ok(()), "{profile}");
        let one = document(&app, profile, &["a"]).await;
        assert_eq!(skopeo_reads(&one, &image(&a)), Ok(()), "{profile}");
        assert_refused(skopeo_reads(&one, &image(&b)));
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn docker_cli_pulls_with_every_document_that_has_auths(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (a, b) = app.register_registries().await;
    assert_refused(docker_reads("{}", &image(&a)));
    for profile in ["docker", "kubernetes", "dockerAuthConfig", "podman"] {
        let both = document(&app, profile, &["a", "b"]).await;
        assert_eq!(docker_reads(&both, &image(&a)), Ok(()), "{profile}");
        assert_eq!(docker_reads(&both, &image(&b)), Ok(()), "{profile}");
        let one = document(&app, profile, &["a"]).await;
        assert_eq!(docker_reads(&one, &image(&a)), Ok(()), "{profile}");
        assert_refused(docker_reads(&one, &image(&b)));
    }
    // Only the kubelet reads the legacy format.
    let legacy = document(&app, "dockercfg", &["a"]).await;
    docker_reads(&legacy, &image(&a)).expect_err("the docker CLI does not read the legacy format");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn changed_password_is_in_the_next_document(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let a = registry::a();
    app.register_account("a", &a.address, &a.username, "old").await;
    let before = document(&app, "podman", &["a"]).await;
    assert_refused(skopeo_reads(&before, &image(&a)));

    app.admin().patch("/v1/registry-accounts/a", &json!({"password": a.password})).await.expect(200);

    assert_eq!(skopeo_reads(&document(&app, "podman", &["a"]).await, &image(&a)), Ok(()));
    assert_eq!(docker_reads(&document(&app, "docker", &["a"]).await, &image(&a)), Ok(()));
}

/// Cases of entry fields, each checked with the real programs and with `explain`, which must agree.
/// The columns say whether skopeo and the docker CLI log in.
#[rstest]
#[case::auth_alone(r#"{"auth":"AUTH"}"#, true, true)]
#[case::as_kubectl_writes_it(
    r#"{"username":"martin","password":"xxx1","email":"e@example.com","auth":"AUTH"}"#,
    true,
    true
)]
#[case::user_and_password_alone(r#"{"username":"martin","password":"xxx1"}"#, false, true)]
#[case::auth_wins(r#"{"username":"other","password":"wrong","auth":"AUTH"}"#, true, true)]
#[case::padding_is_needed(r#"{"auth":"UNPADDED"}"#, false, false)]
#[case::nothing("{}", false, false)]
fn explain_agrees_with_skopeo_and_docker_on_an_entry(
    #[case] entry: &str,
    #[case] by_skopeo: bool,
    #[case] by_docker: bool,
) {
    let a = registry::a();
    assert_eq!((a.username.as_str(), a.password.as_str()), ("martin", "xxx1"));
    let auth = BASE64_STANDARD.encode("martin:xxx1");
    let entry = entry.replace("AUTH", &auth).replace("UNPADDED", auth.trim_end_matches('='));
    let config = format!("{{\"auths\":{{\"{}\":{entry}}}}}", a.address);

    let (skopeo, docker) = (skopeo_reads(&config, &image(&a)), docker_reads(&config, &image(&a)));

    assert_eq!((skopeo.is_ok(), docker.is_ok()), (by_skopeo, by_docker), "{skopeo:?} {docker:?}");
    let said = explain(&config, &image(&a));
    assert_eq!((said.podman.problem.is_none(), said.docker.problem.is_none()), (by_skopeo, by_docker), "{said:?}");
}

/// podman skips an invalid `auth`. The docker CLI warns and continues with the entries read so far,
/// in random order, so this repeats until both results occurred.
#[test]
fn invalid_entry_makes_the_docker_cli_random_and_not_podman() {
    let a = registry::a();
    let auth = BASE64_STANDARD.encode(format!("{}:{}", a.username, a.password));
    let config = json!({"auths": {a.address.as_str(): {"auth": auth}, "other.example.com": {"auth": "!"}}}).to_string();

    assert_eq!(skopeo_reads(&config, &image(&a)), Ok(()));
    assert_both_occur(|| docker_reads(&config, &image(&a)).is_ok());

    let said = explain(&config, &image(&a));
    assert_eq!((said.podman.keys.as_slice(), said.podman.problem), ([a.address].as_slice(), None));
    let problem = said.docker.problem.expect("a problem");
    assert!(problem.contains("only by chance") && problem.contains("`other.example.com`"), "{problem}");
}

/// Repeats until both results occurred, at most 2,000 times: the rarer one is about one in 60 with
/// docker 28, and one in eight with docker 20.
#[track_caller]
fn assert_both_occur(mut ask: impl FnMut() -> bool) {
    let first = ask();
    assert!((0..2_000).any(|_| ask() != first), "always {first}");
}

/// Explains how each consumer reads this config for an image.
fn explain(config: &str, image: &str) -> Consumers {
    let config = Config::parse(config.as_bytes()).expect("a docker config");
    explain_config(&config, &ImageName::parse(image).expect("an image")).consumers
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn podman_uses_the_account_of_the_longest_path(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let a = registry::a();
    let (os, team) = (image(&a), image_of_team(&a));
    let (lena, password) = (given("REGCRED_TEST_REGISTRY_USER2"), given("REGCRED_TEST_REGISTRY_PASSWORD2"));
    app.register_account("martin-os", &format!("{}/os", a.address), &a.username, &a.password).await;
    app.register_account("lena-team", &format!("{}/team", a.address), &lena, &password).await;

    let both = document(&app, "podman", &["martin-os", "lena-team"]).await;
    assert_eq!((skopeo_reads(&both, &os), skopeo_reads(&both, &team)), (Ok(()), Ok(())));
    let [martins, lenas, elsewhere] =
        ["os/alpine", "team/app", "other/app"].map(|path| format!("{}/{path}", a.address));
    assert_eq!((skopeo_user(&both, &martins), skopeo_user(&both, &lenas)), (Some(a.username.clone()), Some(lena)));
    assert_eq!((skopeo_user(&both, &elsewhere), skopeo_user(&both, &a.address)), (None, None));
    assert_refused(skopeo_reads(&document(&app, "podman", &["martin-os"]).await, &team));

    // A wrong password shows which entry was used: the other one's is still right.
    app.admin().patch("/v1/registry-accounts/lena-team", &json!({"password": "wrong"})).await.expect(200);
    let one_wrong = document(&app, "podman", &["martin-os", "lena-team"]).await;
    assert_eq!(skopeo_reads(&one_wrong, &os), Ok(()));
    assert_refused(skopeo_reads(&one_wrong, &team));

    // An account for the registry does not help: podman uses the narrowest scope only.
    app.register_account("martin", &a.address, &a.username, &a.password).await;
    let all = document(&app, "podman", &["martin", "martin-os", "lena-team"]).await;
    assert_refused(skopeo_reads(&all, &team));
    assert_eq!(skopeo_user(&all, &elsewhere), Some(a.username));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn explain_names_the_account_that_skopeo_uses(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let scopes = [
        ("hub", "docker.io"),
        ("hub-acme", "docker.io/acme"),
        ("all", "reg.example.com"),
        ("team", "reg.example.com/team"),
        ("app", "reg.example.com/team/app"),
        ("port", "reg.example.com:5000"),
        ("port-a", "reg.example.com:5000/a"),
        ("local", "localhost:5000/a/b"),
    ];
    for (name, scope) in scopes {
        // Each user is named as its account.
        app.register_account(name, scope, name, "pw").await;
    }
    let accounts = scopes.map(|(name, _)| name);
    let authfile = document(&app, "podman", &accounts).await;
    let mut taken = BTreeMap::new();
    for image in [
        "nginx",
        "library/nginx",
        "acme/app",
        "acmeworks/app",
        "docker.io/acme/app/tool",
        "reg.example.com/x",
        "reg.example.com/team",
        "reg.example.com/team/other",
        "reg.example.com/teams/app",
        "reg.example.com/team/app",
        "reg.example.com/team/app/tool",
        "reg.example.com:5000/a",
        "reg.example.com:5000/b",
        "reg.example.com:443/a",
        "localhost:5000/a",
        "localhost:5000/a/b/c",
        "quay.io/x",
    ] {
        let said = app.admin().post(EXPLAIN, &json!({"accounts": accounts, "image": image})).await.expect(200);
        let full = said["image"].as_str().expect("a name");

        let user = skopeo_user(&authfile, full);

        assert_eq!(said["consumers"]["podman"]["accounts"], json!(Vec::from_iter(&user)), "{image}: {said}");
        taken.insert(image, user.unwrap_or_default());
    }
    assert_eq!(
        (taken["nginx"].as_str(), taken["acme/app"].as_str(), taken["acmeworks/app"].as_str()),
        ("hub", "hub-acme", "hub")
    );
    assert_eq!((taken["reg.example.com/teams/app"].as_str(), taken["quay.io/x"].as_str()), ("all", ""));
}

/// Reason for the `docker` profile's refusal of two scopes on one host: the docker CLI strips the
/// path and uses either entry. The choice is random, so this repeats until both occurred.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn docker_profile_refuses_two_paths_of_one_host(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let a = registry::a();
    app.register_account("os", &format!("{}/os", a.address), &a.username, &a.password).await;
    app.register_account("team", &format!("{}/team", a.address), &a.username, "wrong").await;
    let for_podman = document(&app, "podman", &["os", "team"]).await;
    assert_both_occur(|| docker_reads(&for_podman, &image(&a)).is_ok());

    for profile in ["docker", "dockerAuthConfig"] {
        let refused = app.admin().post(RENDER, &json!({"accounts": ["os", "team"], "profile": profile})).await;
        let problem = refused.problem(422, "profile-unsupported");
        let detail = problem["detail"].as_str().expect("a text");
        for part in ["`os`", "`team`", &a.address, "matches only hosts", "`podman`", "`kubernetes`"] {
            assert!(detail.contains(part), "{part}: {detail}");
        }
    }

    // A single scope renders with a warning that the reader sends it to more repositories.
    let one = app.admin().post(RENDER, &json!({"accounts": ["os"], "profile": "docker"})).await.expect(200);
    assert_eq!(one["warnings"][0]["code"], "matchesMore");
    assert_eq!(docker_reads(&one["config"].to_string(), &image_of_team(&a)), Ok(()));
}

/// Parses `DOCKER_AUTH_CONFIG` as the docker CLI does since 28.3 (`cli/config/configfile/file.go`,
/// `parseEnvConfig`): only `auths`, entries with only `auth`, padded base64, a colon. The CLI
/// ignores the variable if it has any other field.
fn parse_docker_auth_config(variable: &str) -> Result<BTreeMap<String, String>, String> {
    let fields: BTreeMap<String, Value> = serde_json::from_str(variable).map_err(|error| error.to_string())?;
    if fields.keys().ne(["auths"]) {
        return Err(format!("fields besides auths: {:?}", fields.keys()));
    }
    let entries = fields["auths"].as_object().ok_or("auths is not an object")?;
    let login = |entry: &Value| {
        let fields = entry.as_object().ok_or("an entry is not an object")?;
        if fields.keys().ne(["auth"]) {
            return Err("fields besides auth".to_owned());
        }
        let auth = BASE64_STANDARD
            .decode(entry["auth"].as_str().ok_or("auth is not a string")?)
            .map_err(|error| error.to_string())?;
        let login = String::from_utf8(auth).map_err(|error| error.to_string())?;
        if login.split_once(':').is_none_or(|(user, _)| user.is_empty()) {
            Err("no user".to_owned())
        } else {
            Ok(login)
        }
    };
    entries.iter().map(|(key, entry)| Ok((key.clone(), login(entry)?))).collect()
}

/// Runs the installed docker CLI if it is 28.3 or newer. Older versions ignore the variable for
/// `manifest inspect`; there, only [`parse_docker_auth_config`] checks it.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn docker_auth_config_line_is_accepted_by_the_docker_cli(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (a, b) = app.register_registries().await;
    app.register_account("hub", "docker.io", "bot", "p:w").await;
    let body = json!({"accounts": ["a", "b", "hub"], "profile": "dockerAuthConfig"});

    let line = render(&app, &body, "text/plain").await;

    assert_eq!(
        (line.status, line.header("content-type"), line.header("cache-control")),
        (200, "text/plain", "no-store")
    );
    let variable =
        line.body.strip_prefix("DOCKER_AUTH_CONFIG=").and_then(|line| line.strip_suffix('\n')).expect("a line");
    assert!(!variable.contains(['\n', '\'']), "it must stay one line, and between quotes: {variable}");
    let expected = [
        (a.address.clone(), format!("{}:{}", a.username, a.password)),
        (b.address.clone(), format!("{}:{}", b.username, b.password)),
        ("https://index.docker.io/v1/".to_owned(), "bot:p:w".to_owned()),
    ];
    assert_eq!(parse_docker_auth_config(variable), Ok(BTreeMap::from(expected)));
    // Documents of other profiles have fields that the CLI does not accept here.
    parse_docker_auth_config(&document(&app, "kubernetes", &["a"]).await).expect_err("it has fields beside auth");

    let folder = TempDir::new();
    folder.write("config.json", "{}");
    if docker_version() >= (28, 3) {
        for registry in [&a, &b] {
            let mut inspect = docker(folder.path());
            inspect.args(["manifest", "inspect", "--insecure", &image(registry)]).env("DOCKER_AUTH_CONFIG", variable);
            assert_eq!(outcome(&inspect.output().expect("docker runs")), Ok(()));
        }
    }
    // A shell, `docker run --env-file` and CI runners accept the line unchanged.
    let script = r#"export "$1" && printf %s "$DOCKER_AUTH_CONFIG""#;
    let exported = Command::new("sh").args(["-c", script, "sh", line.body.trim_end()]).output().expect("sh runs");
    assert_eq!(text(&exported.stdout), variable);
}

/// Returns the docker CLI's major and minor version.
fn docker_version() -> (u32, u32) {
    let folder = TempDir::new();
    let output = docker(folder.path()).arg("--version").output().expect("docker runs");
    let said = text(&output.stdout);
    let mut numbers = said.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => panic!("no version: {said}"),
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_format_of_a_profile_holds_the_same_document(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_registries().await;
    for profile in PROFILES {
        let as_json = render(&app, &json!({"accounts": ["a", "b"], "profile": profile}), "application/json").await;
        let whole = as_json.expect(200);
        assert_eq!((&whole["profile"], &whole["warnings"]), (&json!(profile), &json!([])));
        assert_eq!((as_json.header("cache-control"), as_json.header("vary")), ("no-store", "Accept"));
        let bare = document(&app, profile, &["b", "a"]).await;
        assert_eq!(serde_json::from_str::<Value>(&bare).expect("JSON"), whole["config"], "{profile}");
        let base64 = whole["base64"].as_str().expect("base64");
        assert_eq!(text(&BASE64_STANDARD.decode(base64).expect("base64")), bare, "{profile}");

        // The `format` field overrides `Accept`: format, content type, body.
        let forms = [
            ("json", "application/json", None),
            ("document", "text/plain", Some(bare.clone())),
            ("base64", "text/plain", Some(format!("{base64}\n"))),
            ("env", "text/plain", (profile == "dockerAuthConfig").then(|| format!("DOCKER_AUTH_CONFIG={bare}\n"))),
        ];
        for (format, content_type, expected) in forms {
            let body = json!({"accounts": ["a", "b"], "profile": profile, "format": format});
            let answer = render(&app, &body, "image/png").await;
            if format == "env" && profile != "dockerAuthConfig" {
                answer.problem(422, "invalid-request");
                assert_eq!(answer.fields(), ["format"]);
                continue;
            }
            assert_eq!((answer.status, answer.header("content-type")), (200, content_type), "{profile} {answer:?}");
            assert_eq!((answer.header("cache-control"), answer.header("vary")), ("no-store", "Accept"));
            assert_eq!(answer.body, expected.unwrap_or_else(|| as_json.body.clone()), "{profile} {format}");
        }
        let yaml = render(&app, &json!({"accounts": ["a"], "profile": profile, "format": "yaml"}), "*/*").await;
        yaml.problem(422, "invalid-request");
        assert_eq!(yaml.fields(), ["format"]);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn manifest_has_the_requested_format(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_registries().await;
    let types = [
        ("kubernetes.io/dockerconfigjson", ".dockerconfigjson", "kubernetes"),
        ("kubernetes.io/dockercfg", ".dockercfg", "dockercfg"),
    ];
    for (secret_type, data_key, profile) in types {
        let secret = json!({"name": "pull", "namespace": "default", "type": secret_type});
        let manifest = |more: Value| {
            let mut body = json!({"accounts": ["a", "b"], "secret": secret});
            body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            body
        };
        let as_json = render(&app, &manifest(json!({})), "application/json").await.expect(200);
        let value = BASE64_STANDARD.encode(document(&app, profile, &["a", "b"]).await);
        assert_eq!(as_json["data"], json!({data_key: value}));
        assert_eq!((&as_json["type"], &as_json["metadata"]["namespace"]), (&json!(secret_type), &json!("default")));

        for (more, accept, content_type) in [
            (json!({}), "application/yaml", "application/yaml"),
            (json!({"format": "yaml"}), "application/json", "application/yaml"),
            (json!({"format": "json"}), "application/yaml", "application/json"),
            (json!({"profile": profile}), "application/json;q=0.1, application/yaml", "application/yaml"),
        ] {
            let answer = render(&app, &manifest(more), accept).await;
            let headers = ["content-type", "cache-control", "vary"].map(|name| answer.header(name).to_owned());
            assert_eq!(headers, [content_type, "no-store", "Accept"], "{accept}: {answer:?}");
            // kubectl reads both formats to the same Secret.
            let read = kubectl(&["create", "--dry-run=client", "-o", "json", "-f", "-"], &answer.body);
            let read: Value = serde_json::from_str(&read).expect("JSON");
            assert_eq!((&read["data"], &read["type"]), (&as_json["data"], &as_json["type"]));
        }
        render(&app, &manifest(json!({})), "text/plain").await.problem(406, "not-acceptable");
        for (accept, content_type) in [("*/*", "application/json"), ("application/yaml", "application/yaml")] {
            let body = manifest(json!({}));
            let request = app.admin().request("POST", MANIFEST).header("Accept", accept).json(&body);
            let answer = app.admin().send(request).await;
            let older = render(&app, &body, accept).await;
            assert_eq!((answer.status, answer.header("content-type")), (200, content_type));
            assert_eq!(answer.body, older.body);
        }
        for format in ["env", "document", "base64"] {
            let refused = render(&app, &manifest(json!({"format": format})), "*/*").await;
            refused.problem(422, "invalid-request");
            assert_eq!(refused.fields(), ["format"]);
        }
        // Without a type, the profile determines it.
        let of_profile = json!({"accounts": ["a", "b"], "profile": profile, "secret": {"name": "pull"}});
        let of_profile = render(&app, &of_profile, "application/json").await.expect(200);
        assert_eq!((&of_profile["data"], &of_profile["type"]), (&as_json["data"], &as_json["type"]));
        let refused = render(&app, &manifest(json!({"profile": "podman"})), "*/*").await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["profile"]);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn formats_without_a_warnings_field_use_warning_headers(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_account("team", "reg.example.com/team", "u", "pw").await;
    let body = |format: &str| json!({"accounts": ["team"], "profile": "docker", "format": format});
    let as_json = render(&app, &body("json"), "*/*").await;
    assert_eq!(as_json.header("warning"), "");
    let detail = as_json.json()["warnings"][0]["detail"].as_str().expect("a text").to_owned();
    assert!(detail.contains("`reg.example.com/team`"), "{detail}");

    for format in ["document", "base64"] {
        let answer = render(&app, &body(format), "*/*").await;
        assert_eq!(answer.header("warning"), format!("299 regcred \"team: {detail}\""));
    }

    let mut selected = json!({"profile": "docker", "format": "document", "accountSelector": {}});
    for number in 0..15 {
        app.register_account(&format!("n{number}"), &format!("n{number}.example.com/x"), "u", "pw").await;
    }
    let many = render(&app, &selected, "*/*").await;
    let warnings: Vec<_> = many.headers.get_all("warning").iter().map(|value| value.to_str().expect("ASCII")).collect();
    assert_eq!(warnings.len(), 11);
    assert!(warnings[10].contains("6 more warnings"), "{warnings:?}");
    selected["profile"] = json!("podman");
    assert_eq!(render(&app, &selected, "*/*").await.header("warning"), "", "podman knows paths");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn label_selector_selects_accounts(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, labels) in [("a", json!({"team": "a", "stage": "dev"})), ("b", json!({"team": "b"})), ("c", json!({}))] {
        let account = json!({"name": name, "registry": format!("{name}.example.com"), "username": "u", "password": "pw", "labels": labels});
        app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    }
    let expression = |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
    for (selector, expected) in [
        (json!({"matchLabels": {"team": "a"}}), "a"),
        (json!({"matchLabels": {"team": "a", "stage": "dev"}}), "a"),
        (expression("team", "In", &["a", "b"]), "ab"),
        (expression("team", "NotIn", &["a"]), "bc"),
        (expression("team", "Exists", &[]), "ab"),
        (expression("stage", "DoesNotExist", &[]), "bc"),
        (json!({"matchLabels": {"team": "a"}, "matchExpressions": [{"key": "stage", "operator": "Exists"}]}), "a"),
        (json!({}), "abc"),
    ] {
        let rendered = app.admin().post(RENDER, &json!({"accountSelector": selector})).await.expect(200);
        let keys = rendered["config"]["auths"].as_object().expect("entries").keys();
        let mut names = String::new();
        for key in keys {
            write!(names, "{}", key.trim_end_matches(".example.com")).expect("a text");
        }
        assert_eq!(names, expected, "{selector}");
    }
    for (body, field) in [
        (json!({"accountSelector": {"matchLabels": {"team": "z"}}}), "accountSelector"),
        (json!({"accountSelector": {}, "accounts": ["a"]}), "accountSelector"),
        (json!({"accountSelector": {"matchLabels": {"team": "!"}}}), "accountSelector.matchLabels"),
        (json!({"accountSelector": expression("team", "in", &["a"])}), "accountSelector.matchExpressions[0]"),
        (json!({"accountSelector": expression("team", "In", &[])}), "accountSelector.matchExpressions[0]"),
        (json!({"accounts": []}), "accounts"),
        (json!({}), "accounts"),
    ] {
        let refused = app.admin().post(RENDER, &body).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field], "{body}");
    }
}
