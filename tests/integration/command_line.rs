//! What a shell meets: closed pipes, columns, and wrong values of flags.

use serde_json::json;
use sqlx::{ConnectOptions, PgPool};

use crate::support::{app::TestApp, eventually, listener::refusing_server, process::Installation};

#[tokio::test]
async fn closed_pipe_is_silent() {
    let installation = Installation::new("").with("PATH", "/usr/bin:/bin");
    let program = env!("CARGO_BIN_EXE_regcred");
    // The document is longer than a pipe's buffer.
    let script = format!("{program} openapi | head -n 1; echo \"${{PIPESTATUS[0]}}\"");
    let exit = installation.spawn_program("bash", &["-c", &script]).wait().await;
    assert_eq!((exit.stdout.as_str(), exit.stderr.as_str()), ("{\n141\n", ""), "as of a program that SIGPIPE ended");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn long_names_keep_their_columns(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let long = "x".repeat(63);
    for name in ["ci", &long] {
        installation.new_key(name).await;
    }
    let listed = installation.must_run(&["api-key", "list"]).await;
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines.len(), 3, "{listed}");
    for (column, value) in [("STATE", "active"), ("EXPIRES", "never"), ("RIGHTS", "admin")] {
        let position = lines[0].find(column).expect("the column");
        assert!(lines[1..].iter().all(|line| line[position..].starts_with(value)), "{column}: {listed}");
    }
    assert!(lines[2].contains(&format!("{long}  active")), "{listed}");
}

#[tokio::test]
async fn wrong_values_of_flags_exit_with_2_and_say_what_is_allowed() {
    let installation = Installation::new("");
    let create = ["api-key", "create", "--name", "ci", "--role"];
    let cases: [(&[&str], &str); 13] = [
        (&[&create[..], &["boss"]].concat(), "admin, operator, deliverer, renderer or viewer"),
        (&["api-key", "create", "--name", "A", "--role", "viewer"], "--name must"),
        (&[&create[..], &["viewer", "--account-labels", "team"]].concat(), "key=value"),
        (&[&create[..], &["viewer", "--expires-at", "soon"]].concat(), "--expires-at"),
        (&["api-key", "revoke", "--name", "A"], "--name must"),
        (&["audit", "export", "--outcome", "maybe"], "success"),
        (&["audit", "export", "--action", "reveal"], "dockerConfig.reveal"),
        (&["audit", "export", "--resource", "ci"], "registry-accounts/prod"),
        (&["cluster", "rbac", "--cluster", "A"], "lower-case letters"),
        (&["migrate", "--grant-to", "Bad-Role"], "lower-case letters, digits and '_'"),
        (&["openapi", "--spec", "2"], "3.1"),
        (&["verify", "--output", "xml"], "json"),
        (&["healthcheck", "ftp://127.0.0.1"], "HOST:PORT"),
    ];
    for (arguments, allowed) in cases {
        let exit = installation.run(arguments).await;
        assert_eq!(exit.code, Some(2), "{arguments:?}: {exit:?}");
        assert!(exit.stderr.contains(allowed), "{arguments:?}: {exit:?}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn health_check_takes_an_address_without_scheme(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let installation = Installation::new("");
    let address = app.address.to_string();
    for target in [address.clone(), format!("{address}/readyz"), format!("http://{address}/healthz")] {
        installation.must_run(&["healthcheck", &target]).await;
    }
    let refused = installation.run(&["healthcheck", &format!("{address}/nowhere")]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn repeated_warning_is_logged_once_with_the_name_of_its_cluster(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let away = json!({"name": "away", "server": refusing_server(), "auth": {"type": "none"}, "allowPlainHttp": true});
    client.post("/v1/clusters", &away).await.expect(201);
    let account = json!({"name": "a", "registry": "registry.example.com", "username": "u", "password": "p"});
    client.post("/v1/registry-accounts", &account).await.expect(201);
    let body = json!({
        "accounts": ["a"], "secret": {"name": "pull"},
        "targets": [{"cluster": "away", "namespaceSelector": {"matchLabels": {"team": "a"}}}],
    });
    client.send(client.request("PUT", "/v1/pull-secrets/team-a").json(&body)).await.expect(201);

    eventually("four resyncs have failed", async || {
        sqlx::query("UPDATE cluster_comparisons SET next_at = now() WHERE lease_until IS NULL")
            .execute(&pool)
            .await
            .expect("done");
        let tried: Option<i64> = sqlx::query_scalar(
            "SELECT lease_token FROM cluster_comparisons WHERE last_error_type IS NOT NULL AND lease_until IS NULL",
        )
        .fetch_optional(&pool)
        .await
        .expect("an answer");
        (tried >= Some(4)).then_some(())
    })
    .await;

    let stderr = service.process.stderr();
    let lines: Vec<&str> = stderr.lines().filter(|line| line.contains("\"resync failed\"")).collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    assert!(lines[0].contains("\"cluster\":\"away\""), "{stderr}");
}
