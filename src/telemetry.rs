//! Logs: JSON for machines, text for terminals, always on standard error.

mod json;
mod repeats;
pub mod traces;

use std::{io::IsTerminal, str::FromStr, sync::LazyLock};

use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use self::{
    json::{JsonLine, SpanFields},
    repeats::Repeats,
};
use crate::domain::invalid::Invalid;

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    /// One JSON object per line.
    Json,
    /// Text.
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
    /// Format of log lines.
    pub format: LogFormat,
    /// Filter in the syntax of `tracing-subscriber`'s `EnvFilter`.
    pub filter: String,
}

/// Crates that implement wire protocols. Below INFO they log headers and frames, which include
/// tokens, so no filter can lower their level.
const WIRE: [&str; 9] =
    ["h2", "hyper", "hyper_util", "reqwest", "rustls", "tower", "actix_http", "actix_server", "actix_web"];

/// Default filter. Omits details of the server library and of Postgres. `actix_http::h1` logs an
/// ERROR for each malformed request, so that any client could fill the log.
pub const FILTER_DEFAULT: &str = "info,actix_server=warn,actix_http::h1=off,sqlx::postgres::notice=warn";

/// Checks the syntax of a filter.
///
/// # Errors
///
/// [`Invalid`] if the filter cannot be parsed.
pub fn check_filter(filter: &str) -> Result<(), Invalid> {
    EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|_| Invalid::new("must be a log filter such as `info` or `info,regcred=debug`"))
}

/// Repeated lines of the process. There is one log, as there is one subscriber.
static REPEATS: LazyLock<Repeats> = LazyLock::new(Repeats::default);

/// Logs how often warnings were repeated. Repetitions are left out of the log from the first call on,
/// so it must be called regularly.
pub fn report_repeats() {
    REPEATS.report();
}

/// Starts logging, and the recording of spans if [`traces::start`] was called. Only the first call in
/// a process has an effect.
pub fn start(config: &LogConfig) {
    let is_terminal = std::io::stderr().is_terminal();
    let is_json = match config.format {
        LogFormat::Auto => !is_terminal,
        LogFormat::Json => true,
        LogFormat::Text => false,
    };
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(is_terminal);
    let lines = if is_json {
        lines.fmt_fields(SpanFields).event_format(JsonLine).boxed()
    } else {
        lines.with_target(false).boxed()
    };
    let wire = Targets::new()
        .with_default(tracing::Level::TRACE)
        .with_targets(WIRE.map(|name| (name, tracing::Level::INFO)))
        // Logs each failed call, as regcred does with more context.
        .with_target("kube_client", LevelFilter::OFF)
        .with_target("kube_runtime", LevelFilter::OFF);
    let filter = EnvFilter::try_new(&config.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    // Of this layer, not of the subscriber: traces have their own.
    let lines = tracing_subscriber::registry().with(lines.with_filter(filter.and(wire).and(&*REPEATS)));
    // Fails only if a subscriber exists, as in tests.
    let _ = match traces::layer() {
        Some(traces) => lines.with(traces).try_init(),
        // An absent layer would keep callsites from being disabled for good.
        None => lines.try_init(),
    };
}
