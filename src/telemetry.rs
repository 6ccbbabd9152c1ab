//! Logs: JSON for machines, readable lines on a terminal, always to standard error.

mod json;
mod lines;

use std::{
    io::{IsTerminal, Stderr},
    str::FromStr,
    sync::Arc,
};

use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{LevelFilter, Targets},
    fmt::{self, writer::BoxMakeWriter},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use self::{
    json::{JsonLine, Members},
    lines::Lines,
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

/// When lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Each before its maker goes on.
    AtOnce,
    /// Many together, milliseconds later: for a service, which makes thousands a second.
    Gathered,
}

/// The log of the process. When this ends, every line is written.
#[derive(Debug)]
#[must_use]
pub struct Log(Option<Arc<Lines<Stderr>>>);

impl Drop for Log {
    fn drop(&mut self) {
        if let Some(lines) = &self.0 {
            lines.write_out();
        }
    }
}

/// Starts logging, once for the process; a second call changes nothing.
///
/// # Errors
///
/// What the operating system says of a thread for gathered lines.
pub fn start(config: &LogConfig, delivery: Delivery) -> std::io::Result<Log> {
    let is_terminal = std::io::stderr().is_terminal();
    let is_json = match config.format {
        LogFormat::Auto => !is_terminal,
        LogFormat::Json => true,
        LogFormat::Text => false,
    };
    let gathered = match delivery {
        Delivery::AtOnce => None,
        Delivery::Gathered => Some(Lines::start(std::io::stderr())?),
    };
    let writer = match gathered.clone() {
        None => BoxMakeWriter::new(std::io::stderr),
        Some(lines) => BoxMakeWriter::new(lines),
    };
    let lines = fmt::layer().with_writer(writer).with_ansi(is_terminal);
    let lines = if is_json {
        lines.fmt_fields(Members).event_format(JsonLine).boxed()
    } else {
        lines.with_target(false).boxed()
    };
    let wire = Targets::new()
        .with_default(tracing::Level::TRACE)
        .with_targets(WIRE.map(|name| (name, tracing::Level::INFO)))
        // It logs each failed call, which we do with what it was for.
        .with_target("kube_client", LevelFilter::OFF)
        .with_target("kube_runtime", LevelFilter::OFF);
    let filter = EnvFilter::try_new(&config.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    // A second subscriber in one process, as in tests, is no reason to fail.
    let _ = tracing_subscriber::registry().with(lines).with(wire).with(filter).try_init();
    if let Some(lines) = gathered.clone() {
        // What a panic says goes straight to standard error, after what came before it.
        let say = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            lines.write_out();
            say(panic);
        }));
    }
    Ok(Log(gathered))
}
