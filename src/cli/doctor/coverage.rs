//! Coverage of a cluster through a running service.

use reqwest::Method;
use secrecy::SecretString;
use serde_json::{Value, json};

use super::{
    Coverage, CoverageOutput, not_ok, server,
    table::{Report, is_unexamined},
    undiagnosed,
};
use crate::{
    cli::{CliError, print_line, print_text},
    config::{Reader, variable},
};

/// Seconds that one request waits for the run.
const WAIT: u32 = 2;
/// Items of a page.
const PAGE: usize = 500;
/// Pages of a list that are printed.
const PAGES_MAX: usize = 200;
/// Verdicts of groups that are printed without `--all`.
const NOT_OK: &str = "noSecret secretMissing secretUnreadable noMatchingEntry credentialInvalid noAccess imageNotFound \
                      registryUnreachable rateLimited tlsError architectureMismatch unknown";

/// Service with the caller's token.
struct Service<'a> {
    url: &'a str,
    token: &'a SecretString,
    cluster: String,
}

impl Service<'_> {
    async fn call(&self, method: Method, path: &str, wait: Option<u32>) -> Result<Value, CliError> {
        let url = server::resource(self.url, &format!("/v1/clusters/{}/coverage{path}", self.cluster))?;
        let (status, body) = server::call(method, url, self.token, wait).await?;
        body.ok_or_else(|| CliError::Failed(format!("the service answered {status}, and no coverage")))
    }

    /// Reads all pages of a list.
    async fn list(&self, path: &str, filter: &str) -> Result<Vec<Value>, CliError> {
        let mut items = Vec::new();
        let mut cursor = String::new();
        for _ in 0..PAGES_MAX {
            let mut page = self.call(Method::GET, &format!("{path}?limit={PAGE}{filter}{cursor}"), None).await?;
            if let Value::Array(found) = page["items"].take() {
                items.extend(found);
            }
            match page["next"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return Ok(items),
            }
        }
        note!("the list is longer: it ends after {} items", items.len());
        Ok(items)
    }

    /// Requests a run and waits for its end.
    async fn run(&self) -> Result<Value, CliError> {
        let mut coverage = self.call(Method::POST, "", Some(WAIT)).await?;
        let mut shown = String::new();
        while matches!(coverage["run"]["state"].as_str(), Some("pending" | "running")) {
            let progress = progress(&coverage["run"]);
            if progress != shown {
                note!("{progress}");
                shown = progress;
            }
            coverage = self.call(Method::GET, "", Some(WAIT)).await?;
        }
        if coverage["run"]["state"] == "failed" {
            let text =
                |field: &str| coverage["run"]["error"][field].as_str().map(super::tree::plain).unwrap_or_default();
            return Err(CliError::Failed(format!("the run failed: {}: {}", text("type"), text("detail"))));
        }
        Ok(coverage)
    }
}

fn progress(run: &Value) -> String {
    let (progress, done) = (&run["progress"], run["progress"]["done"].as_i64().unwrap_or_default());
    match (progress["stage"].as_str(), progress["total"].as_i64()) {
        (Some("listing"), _) => format!("listing: {done} workloads and pods"),
        (Some("examining"), Some(total)) => format!("examining: {done} of {total} groups"),
        (Some("storing"), _) => "storing".to_owned(),
        _ => "waiting for a worker".to_owned(),
    }
}

impl Coverage {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let document = self.read().await.map_err(undiagnosed)?;
        match self.options.output {
            CoverageOutput::Json => print_line(&format!("{document:#}"))?,
            CoverageOutput::Table => print_text(&Report::of(&document).to_string())?,
        }
        if is_unexamined(&document) {
            let detail = "nothing was examined: lists of pods, workloads or ServiceAccounts are missing".to_owned();
            return Err(CliError::NotDiagnosed(detail));
        }
        let summary = &document["snapshot"]["summary"];
        let number = |field: &str| usize::try_from(summary[field].as_u64().unwrap_or_default()).unwrap_or_default();
        let (groups, good) = (number("groups"), number("groupsOk"));
        if groups == good {
            return Ok(());
        }
        let nouns = ["group of images", "groups of images"];
        Err(CliError::Failed(not_ok(groups.saturating_sub(good), groups, nouns)))
    }

    async fn read(&self) -> Result<Value, CliError> {
        let mut reader = Reader::new(&variable);
        let service = reader.service(self.options.url.clone());
        let (url, token) = reader.finish(|| service)?;
        let service = Service { url: &url, token: &token, cluster: self.cluster.to_string() };
        let mut coverage =
            if self.options.last { service.call(Method::GET, "", None).await? } else { service.run().await? };
        if coverage["snapshot"].is_null() {
            return Err(CliError::Failed("there is no snapshot yet: run the command without --last".to_owned()));
        }
        let verdicts =
            NOT_OK.split_whitespace().map(|verdict| format!("&verdict={verdict}")).collect::<Vec<_>>().concat();
        let groups = service.list("/groups", if self.options.all { "" } else { &verdicts }).await?;
        let unused = service.list("/secrets", "&used=false").await?;
        let adoptable = service.list("/secrets", "&adoptable=true&used=true").await?;
        coverage["groups"] = json!(groups);
        coverage["unusedSecrets"] = json!(unused);
        coverage["adoptableSecrets"] = json!(adoptable);
        Ok(coverage)
    }
}
