//! Logs: JSON for machines, readable lines on a terminal, always to standard error.

use std::{io::IsTerminal, str::FromStr};

use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::domain::invalid::Invalid;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Readable on a terminal, JSON otherwise.
    Auto,
    /// A JSON object for each line.
    Json,
    /// Readable.
    Text,
}

impl FromStr for LogFormat {
    type Err = Invalid;

    fn from_str(format: &str) -> Result<Self, Invalid> {
        match format {
            "auto" => Ok(Self::Auto),
            "json" => Ok(Self::Json),
            "text" => Ok(Self::Text),
            _ => Err(Invalid::new("must be auto, json or text")),
        }
    }
}

/// `REGCRED_LOG_…`
#[derive(Debug)]
pub struct LogConfig {
    /// How lines look.
    pub format: LogFormat,
    /// What is logged, in the syntax of `tracing-subscriber`'s `EnvFilter`.
    pub filter: String,
}

/// Crates that speak the wire protocols: at DEBUG and below they print headers and frames, tokens among them.
/// No filter can make them say more than INFO.
const WIRE: [&str; 9] =
    ["h2", "hyper", "hyper_util", "reqwest", "rustls", "tower", "actix_http", "actix_server", "actix_web"];

/// What is logged if nobody says: our own story, without the server library's and Postgres' chatter. The former has a line at
/// ERROR for every malformed request: anybody could fill the log with them.
pub const FILTER_DEFAULT: &str = "info,actix_server=warn,actix_http::h1=off,sqlx::postgres::notice=warn";

/// Whether a filter can be parsed.
///
/// # Errors
///
/// [`Invalid`] says that it cannot.
pub fn check_filter(filter: &str) -> Result<(), Invalid> {
    EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|_| Invalid::new("must be a log filter such as `info` or `info,regcred=debug`"))
}

/// Starts logging, once for the process; a second call changes nothing.
pub fn start(config: &LogConfig) {
    let is_terminal = std::io::stderr().is_terminal();
    let is_json = match config.format {
        LogFormat::Auto => !is_terminal,
        LogFormat::Json => true,
        LogFormat::Text => false,
    };
    let filter = EnvFilter::try_new(&config.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(is_terminal);
    let lines = if is_json {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    } else {
        lines.with_target(false).boxed()
    };
    let wire = Targets::new()
        .with_default(tracing::Level::TRACE)
        .with_targets(WIRE.map(|name| (name, tracing::Level::INFO)))
        // It logs each failed call, which we do with what it was for.
        .with_target("kube_client", LevelFilter::OFF)
        .with_target("kube_runtime", LevelFilter::OFF);
    // A second subscriber in one process, as in tests, is no reason to fail.
    let _ = tracing_subscriber::registry().with(lines.with_filter(wire)).with(filter).try_init();
}
