//! `regcred master-key`: generates, lists and rotates master keys.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use secrecy::ExposeSecret;
use sqlx::PgPool;

use super::{CliError, audit, print_line, replace_file};
use crate::{
    app,
    config::{Reader, variable},
    crypto::sealer::{Sealer, generate_ring_line},
    service::{audit::TransactionalAudit, master_keys},
};

#[derive(Debug, Subcommand)]
pub(super) enum MasterKeyCommand {
    /// Generate a key, and print its line or prepend it to a key ring file.
    ///
    /// The first key of the ring seals. Running services use a new first key within seconds;
    /// `rotate` re-seals stored values with it. Keep the older keys in the file until `list` shows
    /// that they seal no rows.
    Generate {
        /// Key ring file; created if it does not exist.
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// List the keys of the ring with the number of rows that each has sealed.
    List,
    /// Re-seal all rows with the first key of the ring. Services can keep running. Safe to
    /// interrupt and to repeat.
    Rotate,
}

impl MasterKeyCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let mut reader = Reader::new(&variable);
        let (config, keys) = (reader.database(), reader.master_keys());
        let (config, keys) = reader.finish(|| config.zip(keys))?;
        let pool = app::connect(&config).await?;
        let sealer = Sealer::new(keys.ring, keys.file);
        match self {
            Self::Generate { file } => generate(file.as_deref()),
            Self::List => list(&pool, &sealer).await,
            Self::Rotate => {
                let mut reader = Reader::new(&variable);
                let pepper = reader.pepper();
                let audit = audit::audit(&pool, &reader.finish(|| pepper)?);
                rotate(&pool, &sealer, &audit).await
            }
        }
    }
}

async fn list(pool: &PgPool, sealer: &Sealer) -> Result<(), CliError> {
    let uses = master_keys::uses(pool).await?;
    let rows = |key: &str| -> i64 { uses.iter().filter(|u| u.sample.sealed.key_id == key).map(|u| u.rows).sum() };
    let ring = sealer.ring();
    print_line(&format!("{:32}  {:9}  ROWS", "KEY", "STATE"))?;
    for (index, key) in ring.ids().enumerate() {
        let state = if index == 0 { "seals" } else { "opens" };
        print_line(&format!("{key:32}  {state:9}  {}", rows(key)))?;
    }
    for missing in uses.iter().filter(|u| !ring.ids().any(|key| key == u.sample.sealed.key_id)) {
        let key = &missing.sample.sealed.key_id;
        print_line(&format!("{key:32}  {:9}  {} in {}", "MISSING", missing.rows, missing.column))?;
    }
    Ok(())
}

async fn rotate(pool: &PgPool, sealer: &Sealer, audit: &TransactionalAudit) -> Result<(), CliError> {
    let key = sealer.sealing_key_id();
    eprintln!("Re-sealing with {key} …");
    let progress = |so_far: &master_keys::Rotation| eprintln!("  {} values re-sealed", so_far.resealed);
    let rotation = master_keys::rotate_audited(pool, sealer, audit, &audit::actor(), progress).await;
    audit::close(audit).await;
    let rotation = rotation?;
    if rotation.unreadable > 0 {
        return Err(CliError::Failed(format!(
            "{} values re-sealed, {} skipped because they did not open: see the log above for their rows",
            rotation.resealed, rotation.unreadable
        )));
    }
    eprintln!(
        "Done: {} values re-sealed with {key}. Services seal with it within 5 s after it was added to the ring file. \
         Before you remove an older key, run `regcred master-key list`; if it still has rows, rotate again.",
        rotation.resealed,
    );
    Ok(())
}

/// Prints a new key, or prepends it to a key ring file.
pub(super) fn generate(file: Option<&Path>) -> Result<(), CliError> {
    let line = generate_ring_line().map_err(|error| CliError::Failed(error.to_string()))?;
    let Some(file) = file else { return print_line(line.expose_secret()) };
    let failed = |error: std::io::Error| CliError::Failed(format!("{}: {error}", file.display()));
    let older = match std::fs::read_to_string(file) {
        Ok(older) => older,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(failed(error)),
    };
    replace_file(file, &format!("{}\n{older}", line.expose_secret())).map_err(failed)?;
    let id = line.expose_secret().split(':').next().unwrap_or_default();
    eprintln!(
        "Master key {id} is now the first key in {}. Back up the file: stored values cannot be opened without it.",
        file.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_master_key_is_prepended_and_the_file_stays_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = std::env::temp_dir().join(format!("regcred-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join("keys");
        generate(Some(&file)).unwrap();
        let first = std::fs::read_to_string(&file).unwrap();
        generate(Some(&file)).unwrap();
        let both = std::fs::read_to_string(&file).unwrap();
        assert!(both.ends_with(&first) && both.lines().count() == 2);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
