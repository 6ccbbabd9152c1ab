//! The recipes of `docs/ACCESS.md`, taken out of the document and run; and that no token comes out anywhere.

use std::process::{Command, Output};

use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::{ALLOW, cluster, issuer::TestIssuer, keys::TestKey};
use crate::{
    support::{app::TestApp, client::Client, files::TempDir, kubernetes, process::Installation},
    verify::listening::{answer, serve},
};

const DOCUMENT: &str = include_str!("../../../docs/ACCESS.md");

/// The first block of this language in a section of the document.
fn block(section: &str, language: &str) -> &'static str {
    let (_, rest) = DOCUMENT.split_once(&format!("\n### {section}\n")).expect("the section");
    let section = rest.split("\n### ").next().expect("a section");
    let (_, rest) = section.split_once(&format!("```{language}\n")).expect("a block");
    rest.split("```").next().expect("a block")
}

fn json_of(section: &str) -> Value {
    serde_json::from_str(block(section, "json")).expect("JSON")
}

fn yaml_of(section: &str) -> Value {
    serde_saphyr::from_str(block(section, "yaml")).expect("YAML")
}

/// What the recipes need: the cluster `dev`, the account, and a namespace in place of `a-dev`.
async fn prepare(app: &TestApp) -> String {
    app.register_cluster("dev").await;
    app.register_account("team-5000", "registry.example.com:5000", "dev", "canary").await;
    cluster::new_account("ci").await
}

fn in_namespace(text: &str, namespace: &str) -> String {
    text.replace("a-dev", namespace)
}

/// Creates the provider of a recipe, of the test's own issuer where it has one.
async fn trust(app: &TestApp, section: &str, namespace: &str, issuer: Option<&TestIssuer>) {
    let mut body: Value = serde_json::from_str(&in_namespace(&json_of(section).to_string(), namespace)).expect("JSON");
    // As it stands in the document it is taken, too.
    app.admin().post("/v1/identity-providers", &body).await.expect(201);
    let Some(issuer) = issuer else { return };
    let name = body["name"].as_str().expect("a name").to_owned();
    assert_eq!(app.admin().delete(&format!("/v1/identity-providers/{name}")).await.status, 204);
    body["issuer"] = json!(issuer.url());
    app.admin().post("/v1/identity-providers", &body).await.expect(201);
}

async fn run(script: String, variables: Vec<(&'static str, String)>) -> Output {
    let run = move || Command::new("bash").args(["-e", "-c", &script]).envs(variables).output().expect("bash");
    tokio::task::spawn_blocking(run).await.expect("it ends")
}

async fn assert_placed(output: &Output, namespace: &str) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let placed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&placed["name"], &placed["namespace"]), (&json!("pull"), &json!(namespace)));
    assert!(kubernetes::document(&kubernetes::secret(namespace, "pull").await).contains("canary"));
}

/// The claims of a job's token, as GitHub documents them ("`OpenID` Connect reference").
fn github_claims() -> Value {
    json!({
        "sub": "repo:acme/app:environment:production", "environment": "production", "repository": "acme/app",
        "repository_id": "123456", "repository_owner": "acme", "repository_owner_id": "65", "repository_visibility": "private",
        "ref": "refs/heads/main", "ref_type": "branch", "ref_protected": "true", "sha": "example-sha", "actor": "octocat",
        "actor_id": "12", "run_id": "1", "run_number": "10", "run_attempt": "2", "runner_environment": "github-hosted",
        "workflow": "deploy", "workflow_ref": "acme/app/.github/workflows/deploy.yml@refs/heads/main", "workflow_sha": "example-sha",
        "job_workflow_ref": "acme/app/.github/workflows/deploy.yml@refs/heads/main", "event_name": "push", "base_ref": "", "head_ref": "",
    })
}

/// The claims of a job's token, as GitLab documents them ("ID token payload").
fn gitlab_claims() -> Value {
    json!({
        "sub": "project_path:acme/app:ref_type:branch:ref:main", "namespace_id": "72", "namespace_path": "acme", "project_id": "42",
        "project_path": "acme/app", "user_id": "1", "user_login": "martin", "user_email": "martin@example.com", "user_access_level": "owner",
        "pipeline_id": "574", "pipeline_source": "push", "job_id": "302", "ref": "main", "ref_type": "branch",
        "ref_path": "refs/heads/main", "ref_protected": "true", "groups_direct": ["acme"], "runner_id": 1,
        "runner_environment": "gitlab-hosted", "sha": "example-sha", "project_visibility": "private",
        "ci_config_ref_uri": "gitlab.example.com/acme/app//.gitlab-ci.yml@refs/heads/main", "ci_config_sha": "example-sha",
    })
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_recipe_for_github_actions_works(pool: PgPool) {
    let app = TestApp::configured(pool, &[ALLOW]).await;
    let namespace = prepare(&app).await;
    let key = TestKey::rsa("38826b17-6a30-5f9b-b169-8beb8202f723");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "GitHub Actions", &namespace, Some(&issuer)).await;
    let workflow = yaml_of("GitHub Actions");
    let job = &workflow["jobs"]["pull-secret"];
    assert_eq!((&job["permissions"]["id-token"], &job["environment"]), (&json!("write"), &json!("production")));
    let script = in_namespace(job["steps"][0]["run"].as_str().expect("a script"), &namespace);
    // What a runner calls for a token: the audience is in the query, the runner's own token in the header.
    let token = issuer.token(&key, github_claims());
    let (runner, requests) = serve(move |request| {
        let is_right =
            request.contains("/token?api-version=2.0&audience=regcred ") && request.contains("Bearer runner-token");
        if is_right {
            answer("200 OK", &[], &json!({"value": token}).to_string())
        } else {
            answer("403 Forbidden", &[], "{}")
        }
    });
    let variables = |request_token: &str| {
        vec![
            ("REGCRED", format!("http://{}", app.address)),
            ("ACTIONS_ID_TOKEN_REQUEST_URL", format!("http://{runner}/token?api-version=2.0")),
            ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", request_token.to_owned()),
        ]
    };

    let output = run(script.clone(), variables("runner-token")).await;

    assert_placed(&output, &namespace).await;
    assert_eq!(requests.count(), 1);
    assert!(!run(script, variables("other-token")).await.status.success());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_recipe_for_gitlab_works(pool: PgPool) {
    let app = TestApp::configured(pool, &[ALLOW]).await;
    let namespace = prepare(&app).await;
    let key = TestKey::rsa("4i3sFE7sxqNPOT7FdvcGA1ZVGGI_r-tsDXnEuYT4ZqE");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "GitLab CI", &namespace, Some(&issuer)).await;
    let job = &yaml_of("GitLab CI")["pull-secret"];
    let script = in_namespace(job["script"][0].as_str().expect("a script"), &namespace);
    let variables = |more: Value| {
        let mut claims = gitlab_claims();
        claims["aud"] = job["id_tokens"]["REGCRED_TOKEN"]["aud"].clone();
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        vec![("REGCRED", format!("http://{}", app.address)), ("REGCRED_TOKEN", issuer.token(&key, claims))]
    };
    // Not from a branch that is not protected.
    assert!(!run(script.clone(), variables(json!({"ref": "mine", "ref_protected": "false"}))).await.status.success());

    let output = run(script, variables(json!({}))).await;

    assert_placed(&output, &namespace).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_recipe_for_a_job_in_a_cluster_works(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let namespace = prepare(&app).await;
    trust(&app, "A job in a cluster", &namespace, None).await;
    let manifest = in_namespace(block("A job in a cluster", "yaml"), &namespace);
    kubernetes::kubectl(&["apply", "-f", "-"], &manifest);
    // What the kubelet would do with what the API server has stored.
    let stored = kubernetes::kubectl(&["-n", &namespace, "get", "job", "pull-secret", "-o", "json"], "");
    let stored: Value = serde_json::from_str(&stored).expect("JSON");
    let pod = &stored["spec"]["template"]["spec"];
    let source = &pod["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"];
    let audience = source["audience"].as_str().expect("an audience");
    let seconds = source["expirationSeconds"].as_i64().expect("a time");
    let account = pod["serviceAccountName"].as_str().expect("an account");
    let token = cluster::token(&namespace, account, audience, seconds).await;
    let container = &pod["containers"][0];
    let folder = TempDir::new();
    folder.write(source["path"].as_str().expect("a path"), token);
    let mount = container["volumeMounts"][0]["mountPath"].as_str().expect("a path");
    let script =
        container["args"][0].as_str().expect("a script").replace(mount, folder.path().to_str().expect("UTF-8"));
    assert_eq!(container["command"], json!(["sh", "-ec"]));

    let output = run(script, vec![("REGCRED", format!("http://{}", app.address))]).await;

    assert_placed(&output, &namespace).await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn no_token_comes_out_anywhere(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_LOG_FILTER", "trace")
        .with(ALLOW.0, ALLOW.1);
    let key = installation.new_key("admin").await;
    let service = installation.serve().await;
    let admin = service.client(&key);
    let namespace = cluster::new_account("ci").await;
    let auth = json!({"type": "token", "token": crate::support::given("REGCRED_TEST_KUBE_ADMIN_TOKEN")});
    let dev = json!({"name": "dev", "server": kubernetes::server(), "caCertificate": kubernetes::file("ca.crt"), "auth": auth});
    admin.post("/v1/clusters", &dev).await.expect(201);
    let pods = json!({
        "name": "pods", "type": "tokenReview", "cluster": "dev", "audience": "regcred-dev",
        "rules": [{"claims": {"namespace": namespace}, "role": "viewer"}],
    });
    admin.post("/v1/identity-providers", &pods).await.expect(201);
    let signer = TestKey::rsa("a");
    let issuer = TestIssuer::start(&[&signer]);
    let oidc = json!({
        "name": "oidc", "type": "oidc", "issuer": issuer.url(), "audience": "regcred",
        "rules": [{"claims": {"sub": "ci"}, "role": "viewer"}],
    });
    admin.post("/v1/identity-providers", &oidc).await.expect(201);

    let account = cluster::token(&namespace, "ci", "regcred-dev", 600).await;
    let forged = TestKey::rsa("a");
    let tokens = [
        (issuer.token(&signer, json!({})), 200),
        (issuer.token(&signer, json!({"sub": "other"})), 403),
        (issuer.token(&signer, json!({"aud": "vault"})), 401),
        (issuer.token(&signer, json!({"exp": 1})), 401),
        (issuer.token(&forged, json!({})), 401),
        (account.clone(), 200),
        (format!("{}AAAA", &account[..account.len() - 4]), 401),
    ];
    let mut answers = String::new();
    for (token, status) in &tokens {
        let client: Client = service.client(token);
        let answer = client.get("/v1/clusters").await;
        assert_eq!(answer.status, *status, "{answer:?}");
        answers += &answer.body;
    }
    issuer.set_down(true);
    answers += &admin.get("/v1/identity-providers").await.body;
    answers += &service.operations().get("/metrics").await.body;
    service.process.signal("TERM");
    let exit = service.process.wait().await;

    assert!(exit.stderr.contains("\"level\":\"TRACE\"") && exit.stderr.contains("cluster.call"), "the log is verbose");
    assert!(exit.stderr.contains("token rejected"), "rejections are logged");
    for (token, _) in &tokens {
        // Header and claims are the same for many; only the signature is secret.
        let (start, signature) = token.rsplit_once('.').expect("a token");
        let (_, claims) = start.split_once('.').expect("a token");
        for (place, text) in [("the log", &exit.stderr), ("standard output", &exit.stdout), ("an answer", &answers)] {
            assert!(!text.contains(&signature[..40]) && !text.contains(&claims[..60]), "a token is in {place}");
        }
    }
}
