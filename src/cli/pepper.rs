//! `regcred pepper`: generates and lists peppers.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::{CliError, print_table, ring_file};
use crate::{
    app,
    config::{Reader, variable},
    crypto::ring::generate_line,
    service::keys,
};

/// Name of a pepper without an id.
const UNNAMED: &str = "unnamed";

#[derive(Debug, Subcommand)]
pub(super) enum PepperCommand {
    /// Generate a pepper, and print its line or prepend it to a pepper file.
    ///
    /// The first pepper makes the HMACs of new API keys, Secret hashes and audit events. Running
    /// services use a new first pepper within seconds. The HMAC of an existing API key is renewed
    /// when the key is used. Keep the older peppers in the file until `list` shows that no active
    /// key needs them.
    Generate {
        /// Pepper file; created if it does not exist.
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// List the peppers with the number of active API keys that need each of them.
    List,
}

impl PepperCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        match self {
            Self::Generate { file } => generate(file.as_deref()),
            Self::List => list().await,
        }
    }
}

/// Prints a new pepper, or prepends it to a file.
pub(super) fn generate(file: Option<&Path>) -> Result<(), CliError> {
    let line = generate_line("p-").map_err(|error| CliError::Failed(error.to_string()))?;
    ring_file::add(&line, file, |id, file| {
        format!("Pepper {id} is now the first one in {file}. Back up the file: no API key works without it.")
    })
}

async fn list() -> Result<(), CliError> {
    let mut reader = Reader::new(&variable);
    let (config, peppers) = (reader.database(), reader.peppers());
    let (config, peppers) = reader.finish(|| config.zip(peppers))?;
    let uses = keys::count_by_pepper(&app::connect(&config).await?).await?;
    let ring = peppers.current();
    let mut rows = Vec::new();
    for (index, pepper) in ring.ids().enumerate() {
        let state = if index == 0 { "makes" } else { "verifies" };
        let keys = uses.iter().find(|(id, _)| id.as_deref() == pepper).map_or(0, |(_, keys)| *keys);
        rows.push([pepper.unwrap_or(UNNAMED).to_owned(), state.to_owned(), keys.to_string()]);
    }
    for (id, keys) in uses.iter().filter(|(id, _)| !ring.ids().any(|known| known == id.as_deref())) {
        rows.push([id.as_deref().unwrap_or(UNNAMED).to_owned(), "MISSING".to_owned(), keys.to_string()]);
    }
    print_table(["PEPPER", "STATE", "ACTIVE KEYS"], &rows)
}
