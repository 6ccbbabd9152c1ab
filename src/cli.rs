//! The command line.

/// Prints a line for a person to standard error. A closed pipe there is no reason to fail.
macro_rules! note {
    ($($text:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($text)*)));
    }};
}

mod api_key;
mod audit;
mod cluster;
mod doctor;
mod hardening;
mod master_key;
mod package_files;
mod pepper;
mod ring_file;
mod service_manager;
mod verify;

use std::{
    fmt::Write as _,
    fs::Permissions,
    io::{ErrorKind, Write},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand, ValueEnum};

use crate::{
    app::{self, App, AppError, Listeners, Role},
    config::{ConfigError, ExposedFile, LISTEN_DEFAULT, Reader, ServeConfig, TLS_CERTIFICATE_FILE, variable},
    domain::invalid::Invalid,
    http,
    service::ServiceError,
    shutdown::Signals,
    storage::{self, PgPool},
    telemetry,
};

/// Credential broker: turns registry accounts into Kubernetes image pull secrets.
///
/// Configured by REGCRED_… environment variables; see docs/CONFIGURATION.md.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 success, 1 failure, 2 usage error, 64 configuration error, 69 dependency unavailable, \
                  70 internal error, 141 output closed by its reader."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Version of the OpenAPI specification.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum SpecVersion {
    #[default]
    #[value(name = "3.1")]
    V3_1,
    /// For generators that do not read 3.1.
    #[value(name = "3.0")]
    V3_0,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the API and the worker.
    Serve {
        /// Apply pending schema migrations first.
        #[arg(long)]
        migrate: bool,
        /// Serve the API only; other replicas reconcile pull secrets and verify logins.
        #[arg(long)]
        no_worker: bool,
    },
    /// Run the worker only: reconcile pull secrets and verify logins.
    ///
    /// Use it together with `regcred serve --no-worker` to scale both parts separately, or to let
    /// only the worker reach the clusters. Run any number of each. All processes need the same
    /// database, master keys and pepper, and the same variables.
    ///
    /// Serves only /healthz and /readyz at `REGCRED_HTTP_LISTEN`, and /metrics too at
    /// `REGCRED_OPERATIONS_LISTEN`. The schema must be up to date: run `regcred migrate` or `regcred
    /// serve --migrate` first.
    Worker,
    /// Apply pending schema migrations.
    Migrate {
        /// Grant this database role the rights that `serve` and `worker` need. The role can add
        /// audit events, but neither change nor delete them.
        #[arg(long, value_parser = parse_role)]
        grant_to: Option<String>,
    },
    /// Print the OpenAPI document.
    Openapi {
        /// Version of the OpenAPI specification.
        #[arg(long, value_enum, default_value_t)]
        spec: SpecVersion,
    },
    /// Find out why a pod does not pull its images, and how to fix it; or which images of a cluster
    /// cannot be pulled.
    ///
    /// `regcred doctor kubeconfig` needs your kubeconfig only. Exits with 0 if every image can be
    /// pulled, with 1 if not, and with 2 if the diagnosis failed.
    Doctor(doctor::Doctor),
    /// Create, list and revoke API keys.
    #[command(subcommand)]
    ApiKey(api_key::ApiKeyCommand),
    /// Print the rights that regcred needs in a cluster.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Generate, list and rotate master keys.
    #[command(subcommand)]
    MasterKey(master_key::MasterKeyCommand),
    /// Generate and list peppers.
    #[command(subcommand)]
    Pepper(pepper::PepperCommand),
    /// Verify and export the audit log.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Verify the logins of a docker config against their registries. Needs no database.
    ///
    /// Exits with 0 if every login is valid, else with 1.
    Verify(verify::Verify),
    /// Check that a running service answers, for containers without curl.
    Healthcheck {
        /// URL to check, or HOST:PORT for /healthz there [default: /healthz at `REGCRED_HTTP_LISTEN`].
        url: Option<String>,
    },
    /// Write man pages and shell completions, for packages.
    #[command(hide = true)]
    PackageFiles {
        /// Folder for them.
        folder: PathBuf,
    },
}

/// Reason why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The service did not start, or failed.
    #[error(transparent)]
    App(#[from] AppError),
    /// A use case failed.
    #[error("{}", with_details(.0))]
    Service(#[from] ServiceError),
    /// The command completed with a negative result.
    #[error("{0}")]
    Failed(String),
    /// There is no diagnosis, as opposed to a bad one.
    #[error("{0}")]
    NotDiagnosed(String),
    /// An argument has an invalid value.
    #[error("{0}")]
    Usage(String),
    /// The reader of the output closed the pipe.
    #[error("the output was closed")]
    OutputClosed,
    /// The operating system returned an error.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

fn with_details(error: &ServiceError) -> String {
    match error {
        ServiceError::LastAdmin => format!("{error}, or pass --even-last-admin"),
        ServiceError::Storage(storage) => match std::error::Error::source(storage) {
            Some(cause) => format!("{storage}: {cause}"),
            None => storage.to_string(),
        },
        other => other.to_string(),
    }
}

impl CliError {
    /// Returns the exit code, as defined by `sysexits.h` and, for a closed pipe, by shells.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Config(_) | Self::App(AppError::Config(_)) => 64,
            Self::App(AppError::Dependency(_)) | Self::Service(ServiceError::Storage(_)) => 69,
            Self::App(AppError::Internal(_)) => 70,
            Self::Service(_) | Self::Failed(_) | Self::Io(_) => 1,
            Self::Usage(_) | Self::NotDiagnosed(_) => 2,
            // As a shell reports a program that SIGPIPE ended.
            Self::OutputClosed => 141,
        })
    }
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// [`CliError`] holds the message for the terminal and the exit code.
    pub fn run(self) -> Result<(), CliError> {
        // None of these needs configuration.
        if let Command::Openapi { spec } = self.command {
            return print_openapi(spec);
        }
        if let Command::MasterKey(master_key::MasterKeyCommand::Generate { file }) = &self.command {
            return master_key::generate(file.as_deref());
        }
        if let Command::Pepper(pepper::PepperCommand::Generate { file }) = &self.command {
            return pepper::generate(file.as_deref());
        }
        if let Command::PackageFiles { folder } = &self.command {
            return package_files::write(folder);
        }
        start_log(&self.command)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let result = runtime.block_on(self.command.run());
        // Does not wait for blocking calls that are still running.
        runtime.shutdown_background();
        telemetry::traces::stop();
        result
    }
}

impl Command {
    async fn run(self) -> Result<(), CliError> {
        match self {
            Self::Serve { migrate, no_worker } => {
                Box::pin(serve(if no_worker { Role::Api } else { Role::All }, migrate)).await
            }
            Self::Worker => Box::pin(serve(Role::Worker, false)).await,
            Self::Migrate { grant_to } => migrate(grant_to.as_deref()).await,
            Self::Audit(command) => command.run().await,
            Self::ApiKey(command) => command.run().await,
            Self::Cluster(command) => command.run().await,
            Self::MasterKey(command) => command.run().await,
            Self::Pepper(command) => command.run().await,
            Self::Verify(verify) => verify.run().await,
            Self::Doctor(doctor) => Box::pin(doctor.run()).await,
            Self::Healthcheck { url } => healthcheck(url).await,
            Self::Openapi { spec } => print_openapi(spec),
            Self::PackageFiles { folder } => package_files::write(&folder),
        }
    }
}

fn start_log(command: &Command) -> Result<(), CliError> {
    let is_service = matches!(command, Command::Serve { .. } | Command::Worker);
    let mut reader = Reader::new(&variable);
    let log = reader.log();
    let traces = if is_service { reader.traces() } else { Some(None) };
    if is_service && (log.is_none() || traces.is_none()) {
        // Reports the problems of all sections.
        reader.serve()?;
        return Ok(());
    }
    let (log, traces) = reader.finish(|| log.zip(traces))?;
    if let Some(traces) = traces {
        telemetry::traces::start(traces)
            .map_err(|error| AppError::Config(format!("traces cannot be exported: {error}")))?;
    }
    telemetry::start(&log);
    Ok(())
}

/// Runs a long-lived process until a signal.
async fn serve(role: Role, migrate: bool) -> Result<(), CliError> {
    hardening::protect_memory();
    let config = Reader::new(&variable).serve()?;
    for ExposedFile { variable, file, mode } in &config.exposed_files {
        let (file, mode) = (file.display(), format!("{mode:04o}"));
        tracing::warn!(variable, %file, mode, "secret file readable by other users");
    }
    let mut signals = Signals::listen()?;
    let operations = config.http.operations_listen.map(|listen| bind(listen, "REGCRED_OPERATIONS_LISTEN"));
    let listeners =
        Listeners { api: bind(config.http.listen, "REGCRED_HTTP_LISTEN")?, operations: operations.transpose()? };
    let app = tokio::select! {
        app = build(config, listeners, role, migrate) => app?,
        signal = signals.next() => {
            tracing::info!(signal, "startup aborted");
            return Ok(());
        }
    };
    let message = if role == Role::Worker { "worker started" } else { "server started" };
    let operations_address = app.operations_address.map(tracing::field::display);
    tracing::info!(address = %app.address, operations_address, version = env!("CARGO_PKG_VERSION"), "{message}");
    if let Some(socket) = variable("NOTIFY_SOCKET")
        && let Err(error) = service_manager::notify_ready(&socket)
    {
        tracing::warn!(%error, "service manager not notified");
    }
    Ok(app.run(signals).await?)
}

async fn build(config: ServeConfig, listeners: Listeners, role: Role, migrate: bool) -> Result<App, AppError> {
    if migrate {
        let pool = app::connect(&config.database).await?;
        app::migrate(&pool).await?;
        pool.close().await;
    }
    App::build(config, listeners, role).await
}

async fn migrate(grant_to: Option<&str>) -> Result<(), CliError> {
    let pool = database().await?;
    app::migrate(&pool).await?;
    note!("The schema is up to date.");
    if let Some(role) = grant_to {
        app::grant(&pool, role).await?;
        note!("The role {role} has the rights that the service needs.");
    }
    Ok(())
}

/// Binds the address of a variable.
fn bind(listen: SocketAddr, variable: &str) -> Result<TcpListener, AppError> {
    TcpListener::bind(listen).map_err(|error| {
        AppError::Dependency(format!("cannot listen on {listen}: {error}. Set {variable} to another address"))
    })
}

async fn database() -> Result<PgPool, CliError> {
    let mut reader = Reader::new(&variable);
    let database = reader.database();
    Ok(app::connect(&reader.finish(|| database)?).await?)
}

fn print_openapi(spec: SpecVersion) -> Result<(), CliError> {
    let document = match spec {
        SpecVersion::V3_1 => http::document(),
        SpecVersion::V3_0 => http::document_3_0(),
    };
    print_line(&format!("{document:#}"))
}

/// Prints a result to standard output. Everything else goes to standard error.
fn print_line(line: &str) -> Result<(), CliError> {
    print_text(&format!("{line}\n"))
}

fn print_text(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => CliError::OutputClosed,
        _ => CliError::Io(error),
    })
}

/// Prints rows in columns as wide as their longest value. The last column is not padded.
fn print_table<const COLUMNS: usize>(header: [&str; COLUMNS], rows: &[[String; COLUMNS]]) -> Result<(), CliError> {
    let width = |column: usize| {
        let values = rows.iter().map(|row| row[column].chars().count());
        values.chain([header[column].chars().count()]).max().unwrap_or_default()
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let line = |row: [&str; COLUMNS]| {
        let mut line = String::new();
        for (value, width) in row.into_iter().zip(widths) {
            let _ = write!(line, "{value:width$}  ");
        }
        print_line(line.trim_end())
    };
    line(header)?;
    rows.iter().try_for_each(|row| line(row.each_ref().map(String::as_str)))
}

fn argument<T>(name: &str, parsed: Result<T, Invalid>) -> Result<T, CliError> {
    parsed.map_err(|error| CliError::Usage(format!("{name} {error}")))
}

/// Replaces a file atomically. A new file is readable by its owner only; an existing one keeps its
/// owner and, unless a mode is given, its permissions.
fn replace_file(file: &Path, content: &str, mode: Option<u32>) -> std::io::Result<()> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = file.with_file_name(name);
    let mut out = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = (|| {
        if let Ok(old) = std::fs::metadata(file) {
            out.set_permissions(mode.map_or_else(|| old.permissions(), Permissions::from_mode))?;
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

/// Checks the syntax of a role's name before anything is migrated.
fn parse_role(role: &str) -> Result<String, Invalid> {
    storage::schema::check_role(role).map(|()| role.to_owned())
}

async fn healthcheck(url: Option<String>) -> Result<(), CliError> {
    // The certificate of the own service need not name its address, and the request holds no
    // secret. So it is not verified, as in kubelet probes; that of an explicit URL is.
    let is_own = url.as_deref().is_none_or(|url| !url.contains("://"));
    let has_tls = variable(TLS_CERTIFICATE_FILE).is_some_and(|file| !file.is_empty());
    let scheme = if has_tls { "https" } else { "http" };
    let url = match url {
        Some(url) if url.contains("://") => url,
        Some(address) if address.contains('/') => format!("{scheme}://{address}"),
        Some(address) => format!("{scheme}://{address}/healthz"),
        None => {
            let listen = variable("REGCRED_HTTP_LISTEN").unwrap_or_else(|| LISTEN_DEFAULT.to_owned());
            format!("{scheme}://{}/healthz", listen.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]"))
        }
    };
    if !reqwest::Url::parse(&url).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) {
        return Err(CliError::Usage(format!(
            "{url} must be a URL such as http://127.0.0.1:8080/healthz, or HOST:PORT"
        )));
    }
    let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).no_proxy();
    let client = client.tls_danger_accept_invalid_certs(is_own && has_tls).build();
    let response = match client {
        Ok(client) => client.get(&url).send().await,
        Err(error) => Err(error),
    };
    match response {
        Ok(response) if response.status().is_success() => Ok(()),
        Ok(response) => Err(CliError::Failed(format!("{url} answered {}", response.status().as_u16()))),
        Err(error) => Err(CliError::Failed(format!("{url} is unreachable: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
