//! Alerts and the dashboard of the chart: their metrics exist, and each alert has a runbook.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    support::{app::TestApp, eventually, files::TempDir},
    verify::certificates::Ca,
};

fn file(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn rules() -> Vec<Value> {
    let rules: Value = serde_saphyr::from_str(&file("deploy/helm/regcred/files/rules.yaml")).expect("YAML");
    let groups = rules["groups"].as_array().expect("groups");
    groups.iter().flat_map(|group| group["rules"].as_array().expect("rules").clone()).collect()
}

/// Names of metrics in an expression. Those of recording rules have a colon.
fn metrics_in(expression: &str) -> BTreeSet<String> {
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_' || character == ':';
    let names = expression.split(|character| !is_name(character));
    names.filter(|name| name.starts_with("regcred_")).map(|name| name.trim_end_matches("_bucket").to_owned()).collect()
}

/// Expressions of all panels and variables of the dashboard.
fn dashboard_expressions() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&file("deploy/helm/regcred/files/dashboard.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let queries = variables.iter().filter_map(|variable| variable["query"]["query"].as_str().map(str::to_owned));
    targets.map(|target| target["expr"].as_str().expect("an expression").to_owned()).chain(queries).collect()
}

/// Names of samples of a scrape, without suffixes of histograms.
fn scraped(text: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let name = |(name, kind): (&str, &str)| match kind {
        "counter" => format!("{name}_total"),
        "info" => format!("{name}_info"),
        _ => name.to_owned(),
    };
    types.map(name).collect()
}

#[test]
fn each_alert_has_severity_summary_and_runbook() {
    let runbooks = file("docs/RUNBOOKS.md");
    let anchors: Vec<String> =
        runbooks.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_ascii_lowercase).collect();
    let rules = rules();
    let alerts: Vec<&Value> = rules.iter().filter(|rule| rule["alert"].is_string()).collect();

    for alert in &alerts {
        let name = alert["alert"].as_str().expect("a name");
        let severity = alert["labels"]["severity"].as_str();
        assert!(matches!(severity, Some("critical" | "warning" | "info")), "{name}: {severity:?}");
        assert!(alert["annotations"]["summary"].as_str().is_some_and(|text| !text.is_empty()), "{name}");
        let anchor = name.to_ascii_lowercase();
        let url = format!("https://regcred.dev/docs/RUNBOOKS.md#{anchor}");
        assert_eq!(alert["annotations"]["runbook_url"], url, "{name}");
        assert!(anchors.contains(&anchor), "{name} has no chapter in docs/RUNBOOKS.md");
    }
    let chapters = anchors.iter().filter(|anchor| anchor.starts_with("regcred")).count();
    assert_eq!(chapters, alerts.len(), "a chapter of docs/RUNBOOKS.md has no alert");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn metrics_of_alerts_and_dashboard_exist(pool: PgPool) {
    let folder = TempDir::new();
    let pair = Ca::new().certify();
    let (certificate, key) = (folder.write("tls.crt", pair.certificate), folder.write("tls.key", pair.key));
    let tls = [
        ("REGCRED_HTTP_TLS_CERTIFICATE_FILE", certificate.to_str().expect("UTF-8")),
        ("REGCRED_HTTP_TLS_KEY_FILE", key.to_str().expect("UTF-8")),
    ];
    let with_tls = TestApp::configured(pool, &tls).await;
    let app = TestApp::beside(&with_tls).await;
    app.register_cluster("dev").await;
    // Series with labels exist once they were counted.
    app.admin().post("/v1/clusters/dev/check", &json!({})).await.expect(200);
    let used: BTreeSet<String> = rules()
        .iter()
        .map(|rule| rule["expr"].as_str().expect("an expression").to_owned())
        .chain(dashboard_expressions())
        .flat_map(|expression| metrics_in(&expression))
        .collect();
    // The first one is counted once a watch breaks off; the others are reported once a cluster was
    // examined, and tests of coverage scrape them.
    let later = [
        "regcred_cluster_watch_restarts_total",
        "regcred_coverage_workloads",
        "regcred_coverage_snapshot_timestamp_seconds",
    ];

    // The worker and the reader of keys count beside the requests.
    eventually("every metric is scraped", async || {
        let mut names = scraped(&app.operations().get("/metrics").await.body);
        names.extend(scraped(&with_tls.operations().get("/metrics").await.body));
        names.extend(later.map(str::to_owned));
        let missing: Vec<&String> = used.difference(&names).collect();
        (missing.is_empty()).then_some(()).or_else(|| {
            eprintln!("not scraped yet: {missing:?}");
            None
        })
    })
    .await;

    let documents = ["docs/OPERATIONS.md", "docs/AUDIT.md", "docs/VERIFY.md", "docs/MINTING.md"].map(file).concat();
    let documented = metrics_in(&documents);
    assert_eq!(used.difference(&documented).collect::<Vec<_>>(), Vec::<&String>::new(), "not documented");
    let known: BTreeSet<String> =
        rules().iter().filter_map(|rule| rule["record"].as_str().map(str::to_owned)).collect();
    for rule in rules() {
        let expression = rule["expr"].as_str().expect("an expression");
        let names =
            expression.split(|character: char| !(character.is_ascii_alphanumeric() || "_:".contains(character)));
        for name in names.filter(|name| name.starts_with("regcred:")) {
            assert!(known.contains(name), "{name} is no recording rule");
        }
    }
}
