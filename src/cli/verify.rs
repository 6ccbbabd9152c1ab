//! `regcred verify`: verifies every login of a docker config. Needs neither database nor service,
//! and stores nothing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use futures_util::{StreamExt, stream};
use secrecy::ExposeSecret;
use serde::Serialize;

use super::{CliError, print_line};
use crate::{
    clients::{
        outbound::{AllowList, Guard},
        registry::{Login, RegistryClient},
    },
    config::{Reader, VerifyConfig, variable},
    domain::{
        account::ends_with_whitespace,
        cluster::CaCertificate,
        docker_config::{
            Warning,
            import::{FoundAccount, Import, ImportItem, ImportOutcome, SkipReason},
            parse::Part,
        },
        registry::RegistryScope,
        verification::{VerificationReport, VerificationResult},
    },
};

/// Number of concurrent checks.
const CONCURRENCY: usize = 8;

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Docker config: a config.json, a .dockercfg, or a Secret or list of Secrets that holds them
    /// [default: ~/.docker/config.json].
    #[arg(long)]
    config: Option<PathBuf>,
    /// Output format.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Registry without TLS, as HOST or HOST:PORT. Can be repeated. On loopback addresses, plain
    /// HTTP is tried automatically if TLS fails, as docker does.
    #[arg(long, value_name = "REGISTRY", value_parser = RegistryScope::parse)]
    plain_http: Vec<RegistryScope>,
    /// PEM file with the CA of private registries, trusted in addition to the CAs of this host.
    #[arg(long, value_name = "FILE")]
    ca_certificate: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// Table for terminals.
    Table,
    /// JSON for programs.
    Json,
}

/// One line of the report.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    /// Key of the entry, or name of another field of the document.
    key: String,
    registry: Option<String>,
    username: Option<String>,
    /// Null if the entry was not verified.
    result: Option<VerificationResult>,
    detail: String,
    advice: Option<String>,
    /// Warnings about the entry.
    warnings: Vec<Warning>,
    /// Whether the entry needs no attention.
    ok: bool,
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    items: Vec<Line>,
}

impl Report {
    fn new(items: Vec<Line>) -> Self {
        let has_login = items.iter().any(|line| line.registry.is_some() || !line.ok);
        Self { ok: has_login && items.iter().all(|line| line.ok), items }
    }

    fn result(&self, path: &Path) -> Result<(), CliError> {
        let bad = self.items.iter().filter(|line| !line.ok).count();
        match (self.ok, bad) {
            (true, _) => Ok(()),
            (false, 0) => Err(CliError::Failed(format!(
                "{} contains no login: run `docker login`, or pass another file with --config",
                path.display()
            ))),
            (false, bad) => Err(CliError::Failed(format!("{bad} of {} entries failed verification", self.items.len()))),
        }
    }
}

impl Verify {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let mut reader = Reader::new(&variable);
        let proxy = reader.outbound_proxy();
        let config = reader.verify(proxy.flatten());
        let config = reader.finish(|| config)?;
        let path = self.config_path()?;
        let document = fs::read(&path).map_err(|error| failed(&path, error))?;
        let document = Part::parse_all(&document).map_err(|error| failed(&path, error))?;
        let ca = self.ca_certificate.as_deref().map(read_ca).transpose()?;
        let mut items = Import::of_parts(&document).items;
        for item in &mut items {
            if let ImportOutcome::Found(account) = &mut item.outcome {
                account.plain_http |=
                    self.plain_http.iter().any(|registry| registry.authority() == account.scope.authority());
            }
        }
        let report = verify_items(config, &items, ca.as_ref()).await;
        match self.output {
            Output::Table => print_lines(&report.items)?,
            Output::Json => print_line(&serde_json::to_string_pretty(&report).unwrap_or_default())?,
        }
        report.result(&path)
    }

    fn config_path(&self) -> Result<PathBuf, CliError> {
        let default = || Some(Path::new(&variable("HOME")?).join(".docker/config.json"));
        let path = self.config.clone().or_else(default);
        path.ok_or_else(|| CliError::Failed("HOME is not set: pass the docker config with --config".to_owned()))
    }
}

async fn verify_items(config: VerifyConfig, items: &[ImportItem], ca: Option<&CaCertificate>) -> Report {
    let accounts = items.iter().filter_map(|item| match &item.outcome {
        ImportOutcome::Found(account) => Some(account),
        ImportOutcome::Skipped { .. } => None,
    });
    let registries = registries(config, accounts.clone().map(|account| &account.scope));
    let mut findings = check_all(&registries, &accounts.collect::<Vec<_>>(), ca).await.into_iter();
    let lines = items.iter().filter_map(|item| match &item.outcome {
        ImportOutcome::Found(account) => Some(checked(&item.key, account, findings.next()?)),
        ImportOutcome::Skipped { reason, detail } => Some(skipped(&item.key, *reason, detail)),
    });
    Report::new(lines.collect())
}

/// Creates the client. The registries of the document are allowed at any address, because the caller
/// chose them; the token services that they name are not.
fn registries<'a>(config: VerifyConfig, scopes: impl Iterator<Item = &'a RegistryScope>) -> RegistryClient {
    let mut allowed: AllowList = config.allowed;
    scopes.for_each(|scope| allowed.allow_host(scope.host()));
    RegistryClient::new(Guard::new(allowed), config.registries)
}

/// Checks accounts concurrently; returns the findings in the order of the accounts.
async fn check_all(
    registries: &RegistryClient,
    accounts: &[&FoundAccount],
    ca: Option<&CaCertificate>,
) -> Vec<VerificationReport> {
    let mut findings: Vec<(usize, VerificationReport)> = Vec::with_capacity(accounts.len());
    let mut checks = stream::iter(accounts.iter().enumerate())
        .map(|(index, account)| async move { (index, check(registries, account, ca).await) })
        .buffer_unordered(CONCURRENCY);
    while let Some((index, finding)) = checks.next().await {
        let registry = &accounts[index].scope;
        note!("checked {} of {}: {registry}: {}", findings.len() + 1, accounts.len(), finding.result);
        findings.push((index, finding));
    }
    findings.sort_by_key(|(index, _)| *index);
    findings.into_iter().map(|(_, finding)| finding).collect()
}

async fn check(registries: &RegistryClient, account: &FoundAccount, ca: Option<&CaCertificate>) -> VerificationReport {
    let login = Login {
        registry: &account.scope,
        plain_http: account.plain_http,
        ca_certificate: ca,
        username: &account.username,
        password: &account.password,
    };
    let finding = registries.verify(&login, None).await;
    if finding.result != VerificationResult::TlsError || login.plain_http || !account.scope.is_loopback() {
        return finding;
    }
    // A registry that expects TLS fails before the login is sent.
    match registries.verify(&Login { plain_http: true, ..login }, None).await {
        plain if plain.result == VerificationResult::TlsError => finding,
        plain => plain,
    }
}

fn read_ca(path: &Path) -> Result<CaCertificate, CliError> {
    let pem = fs::read_to_string(path).map_err(|error| failed(path, error))?;
    CaCertificate::parse(&pem).map_err(|error| failed(path, error))
}

fn failed(path: &Path, error: impl std::fmt::Display) -> CliError {
    CliError::Failed(format!("{}: {error}", path.display()))
}

fn checked(key: &str, account: &FoundAccount, finding: VerificationReport) -> Line {
    Line {
        key: key.to_owned(),
        registry: Some(account.scope.to_string()),
        username: Some(account.username.clone()),
        result: Some(finding.result),
        ok: finding.result == VerificationResult::Valid,
        advice: advice(finding.result, &account.scope),
        detail: finding.detail,
        warnings: warnings(key, account),
    }
}

fn skipped(key: &str, reason: SkipReason, detail: &str) -> Line {
    let ok = matches!(
        reason,
        SkipReason::NotACredential | SkipReason::HttpHeaders | SkipReason::Duplicate | SkipReason::NotAPullSecret
    );
    Line {
        key: key.to_owned(),
        registry: None,
        username: None,
        result: None,
        detail: detail.to_owned(),
        advice: (!ok).then(|| "not verified".to_owned()),
        warnings: Vec::new(),
        ok,
    }
}

fn warnings(key: &str, account: &FoundAccount) -> Vec<Warning> {
    let is_padded = ends_with_whitespace(account.password.expose_secret());
    is_padded.then(|| Warning::of_whitespace(None, key)).into_iter().collect()
}

/// Returns what to do about a result.
fn advice(result: VerificationResult, scope: &RegistryScope) -> Option<String> {
    use VerificationResult as R;
    Some(match result {
        R::Valid => return None,
        R::Invalid => format!("log in again: docker login {}", scope.authority()),
        R::Anonymous => "the registry requires no login: remove the entry if it is not needed".to_owned(),
        R::NoAccess => "request the right to pull".to_owned(),
        R::Unreachable => "check the name, the port and the network".to_owned(),
        R::TlsError => "pass its CA with --ca-certificate, or --plain-http if it has no TLS".to_owned(),
        R::NotARegistry => "check the name and the port".to_owned(),
        R::RateLimited => "try again later".to_owned(),
        R::Refused => "if the address is intended, allow it in REGCRED_OUTBOUND_ALLOW".to_owned(),
    })
}

fn print_lines(lines: &[Line]) -> Result<(), CliError> {
    let rows: Vec<[String; 4]> = lines
        .iter()
        .map(|line| {
            let result = line.result.map_or("-", VerificationResult::as_str);
            let text = |text: Option<&str>| plain(text.unwrap_or("-"));
            [plain(&line.key), text(line.username.as_deref()), result.to_owned(), text(line.advice.as_deref())]
        })
        .collect();
    super::print_table(["ENTRY", "USER", "RESULT", "ADVICE"], &rows)?;
    let detail = |line: &Line| (!line.ok).then(|| line.detail.clone());
    let warning = |warning: &Warning| format!("warning: {}", warning.detail);
    let remarks = lines.iter().flat_map(|line| {
        let remarks = detail(line).into_iter().chain(line.warnings.iter().map(warning));
        remarks.map(|remark| format!("{}: {}", plain(&line.key), plain(&remark)))
    });
    let mut remarks = remarks.peekable();
    if remarks.peek().is_some() {
        print_line("")?;
    }
    remarks.try_for_each(|remark| print_line(&remark))
}

/// Replaces control characters, which a terminal could interpret.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
