//! README and tutorial: every command is run, and prints what the document shows.

use std::{fs, path::Path};

use sqlx::{ConnectOptions, PgPool};

use crate::support::{
    app::TestApp,
    console::{assert_prints_what_it_shows, steps},
    files::TempDir,
    given, kubernetes,
    process::Installation,
    registry,
};

/// Reads a document at run time: a change of it needs no build.
fn document(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("the document")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn commands_of_the_readme_print_what_it_shows(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let data = TempDir::new();
    data.write("admin.key", app.admin().key());
    data.write("kubeconfig", fs::read(kubernetes::path("kubeconfig")).expect("a kubeconfig"));
    // All tests share the namespace `default`.
    let namespace = kubernetes::new_namespace().await;
    let readme = document("README.md")
        .replace("namespaces/default", &format!("namespaces/{namespace}"))
        .replace("-n default", &format!("-n {namespace}"))
        .replace(r#""namespace":"default""#, &format!(r#""namespace":"{namespace}""#));
    let steps = steps(&readme);
    assert!(steps.len() >= 7, "{steps:?}");
    let variables = [
        ("PATH", given("PATH")),
        ("data", data.path().display().to_string()),
        ("api", format!("http://{}", app.address)),
    ];
    tokio::task::spawn_blocking(move || {
        let change = |printed: &str| printed.replace(&kubernetes::server(), "https://127.0.0.1:16443");
        assert_prints_what_it_shows(&steps, &variables, change);
    })
    .await
    .expect("the outputs are as shown");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn commands_of_the_tutorial_print_what_it_shows(pool: PgPool) {
    let url = pool.connect_options().to_url_lossy();
    let installation = Installation::new(url.as_str()).with("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8");
    let service = installation.serve().await;
    // As `make run` and `make registries` set them for a reader.
    let program = Path::new(env!("CARGO_BIN_EXE_regcred")).parent().expect("a folder");
    let (a, b) = (registry::a(), registry::b());
    let mut variables = vec![
        ("PATH", format!("{}:{}", program.display(), given("PATH"))),
        ("KUBECONFIG", given("KUBECONFIG")),
        ("api", format!("http://{}", service.address)),
        ("key", installation.new_key("tutorial").await),
        ("registry_a", a.address),
        ("registry_b", b.address),
        ("htpasswd_a", given("REGCRED_TEST_REGISTRY_A_HTPASSWD")),
    ];
    for name in ["REGCRED_DATABASE_URL_FILE", "REGCRED_API_KEY_PEPPER_FILE"] {
        variables.push((name, installation.variable(name)));
    }
    let steps = steps(&document("docs/TUTORIAL.md"));
    assert!(steps.len() > 60, "only {} commands were found", steps.len());
    let addresses: Vec<_> =
        variables.iter().filter(|(name, _)| ["api", "registry_a", "registry_b"].contains(name)).cloned().collect();
    let named = |printed: &str| {
        addresses.iter().fold(printed.to_owned(), |text, (name, value)| text.replace(value, &format!("${name}")))
    };
    assert_prints_what_it_shows(&steps, &variables, named);
}
