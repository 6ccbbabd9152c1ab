//! The command line.

mod audit;
mod cluster;
mod verify;

use std::{
    io::Write,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use chrono::{DateTime, Utc};
use clap::{Args, Parser, Subcommand};
use secrecy::ExposeSecret;

use crate::{
    app::{self, App, AppError},
    config::{ConfigError, LISTEN_DEFAULT, Reader, ServeConfig, TLS_CERTIFICATE_FILE},
    crypto::sealer::{Sealer, generate_ring_line},
    domain::{
        caller::NewApiKey,
        grants::{AccountGrant, Grants, GrantsDocument, LabelGrant},
        invalid::{FieldError, Invalid},
        names::Name,
    },
    http,
    service::{ServiceError, api_keys, audit::TransactionalAudit, master_keys},
    shutdown::Signals,
    storage::api_keys::ApiKey,
    telemetry::{self, Delivery, Log},
};

/// A credential broker: registry accounts go in, Kubernetes image pull secrets come out.
///
/// Configuration comes from REGCRED_… variables; the README has the table.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 64 configuration, 69 a dependency is away, 70 internal error."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service.
    Serve {
        /// Bring the database's schema up to date first.
        #[arg(long)]
        migrate: bool,
        /// Serve the API alone: other replicas keep pull secrets right and verify logins.
        #[arg(long)]
        no_worker: bool,
    },
    /// Run the worker alone: keep pull secrets right, verify logins, serve no API.
    ///
    /// For running both apart: some processes with `regcred serve --no-worker`, which answer callers, and some with this, which
    /// need a way to the clusters. Any number of each may run; they need the same database, master keys and pepper, and find each
    /// other in the database. It reads the same variables as `serve`, and stops like it: what is under way may end.
    ///
    /// /healthz, /readyz and /metrics are served at `REGCRED_HTTP_LISTEN`, and nothing else. The schema must be up to date:
    /// `regcred migrate`, or `regcred serve --migrate`.
    Worker,
    /// Bring the database's schema up to date.
    Migrate {
        /// Give this role of the database what a service needs, and no more: it can add audit events, and neither change nor
        /// remove them. Run `serve` with it.
        #[arg(long)]
        grant_to: Option<String>,
    },
    /// Print the OpenAPI document.
    Openapi,
    /// Make, list and revoke API keys.
    #[command(subcommand)]
    ApiKey(ApiKeyCommand),
    /// Say what regcred needs in a cluster.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Make master keys, and re-seal what is stored under a new one.
    #[command(subcommand)]
    MasterKey(MasterKeyCommand),
    /// Verify and export the audit log.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Ask the registries of a docker config whether its logins work. Needs no database.
    ///
    /// Exit code 0 if all of them are shown to work, else 1.
    Verify(verify::Verify),
    /// Ask a running service whether it lives, for containers without curl.
    Healthcheck {
        /// Its address; from `REGCRED_HTTP_LISTEN` if not said.
        url: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum ApiKeyCommand {
    /// Make a key and print it: the only time that it is shown.
    Create(CreateApiKey),
    /// List all keys.
    List,
    /// Revoke a key, at once.
    Revoke {
        /// Name of the key.
        #[arg(long)]
        name: String,
        /// Revoke it even if nobody can make keys through the API after that; this command still can.
        #[arg(long)]
        even_last_admin: bool,
    },
}

#[derive(Debug, Args)]
struct CreateApiKey {
    /// Name of the key, a DNS-1123 label.
    #[arg(long)]
    name: String,
    /// What it may do: admin, operator, deliverer, renderer or viewer.
    #[arg(long, default_value = "admin")]
    role: String,
    /// Registry accounts that it reaches: names, and beginnings of names with `*`, with commas between them.
    ///
    /// What is left out, here and with clusters and namespaces, is everything for an operator or a viewer, and nothing
    /// for a deliverer or a renderer.
    #[arg(long, value_delimiter = ',')]
    accounts: Option<Vec<String>>,
    /// Registry accounts that it reaches by their labels, as in team=a,tier=prod for accounts with both; can be given
    /// several times.
    #[arg(long)]
    account_labels: Vec<String>,
    /// Clusters that it reaches.
    #[arg(long, value_delimiter = ',')]
    clusters: Option<Vec<String>>,
    /// Namespaces that it reaches, in each of the clusters.
    #[arg(long, value_delimiter = ',')]
    namespaces: Option<Vec<String>>,
    /// When it ends, as in 2027-01-31T00:00:00Z; never if not said.
    #[arg(long)]
    expires_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Subcommand)]
enum MasterKeyCommand {
    /// Make a key, and print its line or put it in front of a ring's file.
    ///
    /// The first key of the ring seals from then on, within seconds in every running service; `rotate` re-seals
    /// what is stored. Keep the older keys in the file until `list` shows no row of theirs.
    Generate {
        /// Ring file to put the key in front of; it is made if it is not there.
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// Show which keys are in the ring and how many rows each has sealed.
    List,
    /// Re-seal every row under the first key of the ring, while the service runs; can be interrupted and repeated.
    Rotate,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The service did not start, or did not end well.
    #[error(transparent)]
    App(#[from] AppError),
    /// A use case failed.
    #[error("{}", with_details(.0))]
    Service(#[from] ServiceError),
    /// Everything was done, and the answer is no.
    #[error("{0}")]
    Failed(String),
    /// The operating system refused.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

fn with_details(error: &ServiceError) -> String {
    match error {
        ServiceError::LastAdmin => format!("{error}; or say --even-last-admin"),
        ServiceError::Storage(storage) => match std::error::Error::source(storage) {
            Some(cause) => format!("{storage}: {cause}"),
            None => storage.to_string(),
        },
        other => other.to_string(),
    }
}

impl CliError {
    /// The exit code, after `sysexits.h`.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Config(_) | Self::App(AppError::Config(_)) => 64,
            Self::App(AppError::Dependency(_)) | Self::Service(ServiceError::Storage(_)) => 69,
            Self::App(AppError::Internal(_)) => 70,
            Self::Service(_) | Self::Failed(_) | Self::Io(_) => 1,
        })
    }
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// [`CliError`] says what a person at the terminal should read, and the exit code.
    pub fn run(self) -> Result<(), CliError> {
        if matches!(self.command, Command::Openapi) {
            return print_openapi();
        }
        if let Command::MasterKey(MasterKeyCommand::Generate { file }) = &self.command {
            return generate_master_key(file.as_deref());
        }
        let _log = start_log(&self.command)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let result = runtime.block_on(self.command.run());
        // Whatever still waits, such as a call to a cluster that hangs, is not worth waiting for.
        runtime.shutdown_background();
        result
    }
}

impl Command {
    async fn run(self) -> Result<(), CliError> {
        match self {
            Self::Serve { migrate, no_worker } => serve(migrate, no_worker).await,
            Self::Worker => work().await,
            Self::Migrate { grant_to } => migrate(grant_to.as_deref()).await,
            Self::Audit(command) => command.run().await,
            Self::ApiKey(command) => command.run().await,
            Self::Cluster(command) => command.run().await,
            Self::MasterKey(command) => command.run().await,
            Self::Verify(verify) => verify.run().await,
            Self::Healthcheck { url } => healthcheck(url).await,
            Self::Openapi => print_openapi(),
        }
    }
}

/// The environment, the only one that is read.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn start_log(command: &Command) -> Result<Option<Log>, CliError> {
    let mut reader = Reader::new(&variable);
    let log = reader.log();
    let serves = matches!(command, Command::Serve { .. } | Command::Worker);
    if log.is_none() && serves {
        // With everything else that is wrong.
        reader.serve()?;
        return Ok(None);
    }
    let delivery = if serves { Delivery::Gathered } else { Delivery::AtOnce };
    Ok(Some(telemetry::start(&reader.finish(|| log)?, delivery)?))
}

async fn serve(migrate: bool, no_worker: bool) -> Result<(), CliError> {
    let build = async |config, listener| {
        let app = App::build(config, listener, migrate).await?;
        Ok(if no_worker { app.without_worker() } else { app })
    };
    run_service(build, "serving").await
}

async fn work() -> Result<(), CliError> {
    run_service(App::build_worker, "working").await
}

/// Runs until a signal comes.
async fn run_service(
    build: impl AsyncFnOnce(ServeConfig, TcpListener) -> Result<App, AppError>,
    doing: &'static str,
) -> Result<(), CliError> {
    let config = Reader::new(&variable).serve()?;
    let mut signals = Signals::listen()?;
    let listener = bind(config.http.listen)?;
    let app = tokio::select! {
        app = build(config, listener) => app?,
        signal = signals.next() => {
            tracing::info!(signal, "stopped before the start was over");
            return Ok(());
        }
    };
    tracing::info!(address = %app.address, version = env!("CARGO_PKG_VERSION"), "{doing}");
    Ok(app.run(signals).await?)
}

async fn migrate(grant_to: Option<&str>) -> Result<(), CliError> {
    let pool = database().await?;
    app::migrate(&pool).await?;
    eprintln!("The schema is up to date.");
    if let Some(role) = grant_to {
        app::grant(&pool, role).await?;
        eprintln!("The role {role} has what a service needs.");
    }
    Ok(())
}

fn bind(listen: SocketAddr) -> Result<TcpListener, AppError> {
    TcpListener::bind(listen).map_err(|error| {
        AppError::Dependency(format!("cannot listen on {listen}: {error}. REGCRED_HTTP_LISTEN names another address"))
    })
}

async fn database() -> Result<sqlx::PgPool, CliError> {
    let mut reader = Reader::new(&variable);
    let database = reader.database();
    Ok(app::connect(&reader.finish(|| database)?).await?)
}

fn print_openapi() -> Result<(), CliError> {
    let document = http::document().to_pretty_json().map_err(|error| CliError::Failed(error.to_string()))?;
    print_line(&document)
}

/// The one way to standard output, which is for results alone.
fn print_line(line: &str) -> Result<(), CliError> {
    print_text(&format!("{line}\n"))
}

fn print_text(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

impl ApiKeyCommand {
    async fn run(self) -> Result<(), CliError> {
        match self {
            Self::Create(create) => create.run().await,
            Self::List => list_api_keys().await,
            Self::Revoke { name, even_last_admin } => {
                let name = argument("--name", Name::parse(&name))?;
                let mut reader = Reader::new(&variable);
                let (config, pepper) = (reader.database(), reader.pepper());
                let (config, pepper) = reader.finish(|| config.zip(pepper))?;
                let pool = app::connect(&config).await?;
                let (audit, actor) = (audit::audit(&pool, &pepper), audit::actor());
                let revoked = if even_last_admin {
                    api_keys::revoke_even_last_admin(&pool, &audit, &actor, &name).await
                } else {
                    api_keys::revoke(&pool, &audit, &actor, &name).await
                };
                audit::close(&audit).await;
                revoked?;
                eprintln!("The API key `{name}` is revoked.");
                Ok(())
            }
        }
    }
}

impl CreateApiKey {
    async fn run(self) -> Result<(), CliError> {
        let grants = GrantsDocument {
            accounts: account_grants(self.accounts, &self.account_labels)?,
            clusters: self.clusters,
            namespaces: self.namespaces,
        };
        let new = NewApiKey::parse(&self.name, &self.role, Some(grants), self.expires_at, Utc::now());
        let new = new.map_err(|errors| CliError::Failed(refusals(&errors)))?;
        let mut reader = Reader::new(&variable);
        let (config, pepper) = (reader.database(), reader.pepper());
        let (config, pepper) = reader.finish(|| config.zip(pepper))?;
        let pool = app::connect(&config).await?;
        let (audit, actor) = (audit::audit(&pool, &pepper), audit::actor());
        let created = api_keys::create(&pool, &audit, &actor, &pepper, &new).await;
        audit::close(&audit).await;
        let (stored, key) = created?;
        eprintln!("The API key `{}`, {}; it is shown this once:", stored.name, rights(&stored));
        print_line(key.text.expose_secret())
    }
}

async fn list_api_keys() -> Result<(), CliError> {
    const PAGE: i64 = 500;
    let pool = database().await?;
    let mut keys = api_keys::list(&pool, None, PAGE).await?;
    print_line(&format!("{:36}  {:20}  {:8}  {:25}  RIGHTS", "ID", "NAME", "STATE", "EXPIRES"))?;
    while let Some(last) = keys.last().map(|key| key.id) {
        for key in &keys {
            let is_expired = key.expires_at.is_some_and(|at| at <= Utc::now());
            let state = match (key.revoked_at, is_expired) {
                (Some(_), _) => "revoked",
                (None, true) => "expired",
                (None, false) => "active",
            };
            let expires = key.expires_at.map_or_else(|| "never".to_owned(), |at| at.to_rfc3339());
            print_line(&format!("{:36}  {:20}  {state:8}  {expires:25}  {}", key.id, key.name, rights(key)))?;
        }
        keys = api_keys::list(&pool, Some(last), PAGE).await?;
    }
    Ok(())
}

/// Role and grants on one line.
fn rights(key: &ApiKey) -> String {
    let role = key.role.as_str();
    if !key.role.takes_grants() {
        return role.to_owned();
    }
    let Grants { accounts, clusters, namespaces } = &key.grants;
    let listed = |rules: Vec<String>| if rules.is_empty() { "none".to_owned() } else { rules.join(",") };
    format!(
        "{role} (accounts {}; clusters {}; namespaces {})",
        listed(accounts.iter().map(ToString::to_string).collect()),
        listed(clusters.iter().map(ToString::to_string).collect()),
        listed(namespaces.iter().map(ToString::to_string).collect()),
    )
}

/// Names and labels together; nothing if neither was given.
fn account_grants(names: Option<Vec<String>>, labels: &[String]) -> Result<Option<Vec<AccountGrant>>, CliError> {
    if names.is_none() && labels.is_empty() {
        return Ok(None);
    }
    let mut rules: Vec<AccountGrant> = names.unwrap_or_default().into_iter().map(AccountGrant::Names).collect();
    for rule in labels {
        let pairs = rule.split(',').map(|pair| {
            let (key, value) = pair.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        let match_labels = pairs.collect::<Option<_>>();
        let match_labels =
            match_labels.ok_or_else(|| CliError::Failed("--account-labels must be key=value,key=value".to_owned()))?;
        rules.push(AccountGrant::Labels(LabelGrant { match_labels }));
    }
    Ok(Some(rules))
}

/// What was refused, under the names of the command's arguments.
fn refusals(errors: &[FieldError]) -> String {
    let all = errors.iter().map(|FieldError { field, detail }| match field.as_str() {
        "expiresAt" => format!("--expires-at {detail}"),
        "grants" => format!("--accounts, --account-labels, --clusters and --namespaces {detail}"),
        other => format!("--{} {detail}", other.trim_start_matches("grants.")),
    });
    all.collect::<Vec<_>>().join("; ")
}

fn argument<T>(name: &str, parsed: Result<T, Invalid>) -> Result<T, CliError> {
    parsed.map_err(|error| CliError::Failed(format!("{name} {error}")))
}

impl MasterKeyCommand {
    async fn run(self) -> Result<(), CliError> {
        let mut reader = Reader::new(&variable);
        let (config, keys) = (reader.database(), reader.master_keys());
        let (config, keys) = reader.finish(|| config.zip(keys))?;
        let pool = app::connect(&config).await?;
        let sealer = Sealer::new(keys.ring, keys.file);
        match self {
            Self::Generate { file } => generate_master_key(file.as_deref()),
            Self::List => list_master_keys(&pool, &sealer).await,
            Self::Rotate => {
                let mut reader = Reader::new(&variable);
                let pepper = reader.pepper();
                let audit = audit::audit(&pool, &reader.finish(|| pepper)?);
                rotate_master_key(&pool, &sealer, &audit).await
            }
        }
    }
}

async fn list_master_keys(pool: &sqlx::PgPool, sealer: &Sealer) -> Result<(), CliError> {
    let uses = master_keys::uses(pool).await?;
    let rows = |key: &str| -> i64 { uses.iter().filter(|u| u.sample.sealed.key_id == key).map(|u| u.rows).sum() };
    let ring = sealer.ring();
    print_line(&format!("{:32}  {:9}  ROWS", "KEY", "STATE"))?;
    for (index, key) in ring.ids().enumerate() {
        let state = if index == 0 { "seals" } else { "opens" };
        print_line(&format!("{key:32}  {state:9}  {}", rows(key)))?;
    }
    for lost in uses.iter().filter(|u| !ring.ids().any(|key| key == u.sample.sealed.key_id)) {
        print_line(&format!("{:32}  {:9}  {} in {}", lost.sample.sealed.key_id, "MISSING", lost.rows, lost.column))?;
    }
    Ok(())
}

async fn rotate_master_key(pool: &sqlx::PgPool, sealer: &Sealer, audit: &TransactionalAudit) -> Result<(), CliError> {
    eprintln!("Re-sealing under {} …", sealer.sealing_key_id());
    let progress = |so_far: &master_keys::Rotation| eprintln!("  {} values re-sealed", so_far.resealed);
    let rotation = master_keys::rotate_on_record(pool, sealer, audit, &audit::actor(), progress).await;
    audit::close(audit).await;
    let rotation = rotation?;
    if rotation.unreadable > 0 {
        return Err(CliError::Failed(format!(
            "{} values re-sealed; {} did not open and were left as they are: see the log above",
            rotation.resealed, rotation.unreadable
        )));
    }
    eprintln!(
        "Done: {} values re-sealed under {}. A running service seals under it within 5 s of its being in the ring's file: \
         before an older key goes, look with `regcred master-key list` whether it has rows left, and rotate again if so.",
        rotation.resealed,
        sealer.sealing_key_id()
    );
    Ok(())
}

fn generate_master_key(file: Option<&Path>) -> Result<(), CliError> {
    let line = generate_ring_line().map_err(|error| CliError::Failed(error.to_string()))?;
    let Some(file) = file else { return print_line(line.expose_secret()) };
    let older = match std::fs::read_to_string(file) {
        Ok(older) => older,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(CliError::Failed(format!("{}: {error}", file.display()))),
    };
    replace_file(file, &format!("{}\n{older}", line.expose_secret()))
        .map_err(|error| CliError::Failed(format!("{}: {error}", file.display())))?;
    let id = line.expose_secret().split(':').next().unwrap_or_default();
    eprintln!(
        "The master key {id} is now the first one in {}. Back the file up: without it nothing opens.",
        file.display()
    );
    Ok(())
}

/// Writes a file that only its owner can read, whole or not at all, with the owner that it had.
fn replace_file(file: &Path, content: &str) -> std::io::Result<()> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = file.with_file_name(name);
    let mut out = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = (|| {
        if let Ok(old) = std::fs::metadata(file) {
            out.set_permissions(old.permissions())?;
            chown(&temporary, Some(old.uid()), Some(old.gid()))?;
        }
        out.write_all(content.as_bytes())?;
        out.sync_all()?;
        std::fs::rename(&temporary, file)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

async fn healthcheck(url: Option<String>) -> Result<(), CliError> {
    // The service beside us is called by its address, which its certificate need not name, and is told nothing. So its certificate
    // is not looked at, as a kubelet does not. That of a URL that somebody gave is.
    let is_own = url.is_none();
    let has_tls = variable(TLS_CERTIFICATE_FILE).is_some_and(|file| !file.is_empty());
    let scheme = if has_tls { "https" } else { "http" };
    let url = url.unwrap_or_else(|| {
        let listen = variable("REGCRED_HTTP_LISTEN").unwrap_or_else(|| LISTEN_DEFAULT.to_owned());
        format!("{scheme}://{}/healthz", listen.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]"))
    });
    let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).no_proxy();
    let client = client.tls_danger_accept_invalid_certs(is_own && has_tls).build();
    let answer = match client {
        Ok(client) => client.get(&url).send().await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(CliError::Failed(format!("{url} answered {}", answer.status().as_u16()))),
        Err(error) => Err(CliError::Failed(format!("{url} does not answer: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_new_master_key_goes_in_front_and_the_file_stays_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = std::env::temp_dir().join(format!("regcred-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join("keys");
        generate_master_key(Some(&file)).unwrap();
        let first = std::fs::read_to_string(&file).unwrap();
        generate_master_key(Some(&file)).unwrap();
        let both = std::fs::read_to_string(&file).unwrap();
        assert!(both.ends_with(&first) && both.lines().count() == 2);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
