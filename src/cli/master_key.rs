//! `regcred master-key`: generates, lists and rotates master keys.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Subcommand;

use super::{CliError, audit, print_table, ring_file};
use crate::{
    app,
    config::{Reader, variable},
    crypto::sealer::{Sealer, generate_ring_line},
    domain::sealed::SealForm,
    service::{
        audit::TransactionalAudit,
        master_keys::{self, Rotation, RotationKind},
    },
    storage::{PgPool, sealed::Binding},
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
    Rotate {
        /// Also bind every value to its destination, from now on: the registry of an account, the
        /// server and CA of a cluster. Releases that know no bound values cannot open them, so run
        /// it once no process of such a release is left.
        #[arg(long)]
        bind: bool,
    },
}

impl MasterKeyCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let mut reader = Reader::new(&variable);
        let (config, keys) = (reader.database(), reader.master_keys());
        let (config, keys) = reader.finish(|| config.zip(keys))?;
        let pool = app::connect(&config).await?;
        let sealer = Sealer::new(keys.ring, keys.file);
        if keys.requires_bound {
            sealer.require_bound();
        }
        match self {
            Self::Generate { file } => generate(file.as_deref()),
            Self::List => list(&pool, &sealer).await,
            Self::Rotate { bind } => {
                let mut reader = Reader::new(&variable);
                let peppers = reader.peppers();
                let audit = audit::audit(&pool, &Arc::new(reader.finish(|| peppers)?));
                rotate(&pool, &sealer, &audit, if bind { RotationKind::Bind } else { RotationKind::Rotate }).await
            }
        }
    }
}

async fn list(pool: &PgPool, sealer: &Sealer) -> Result<(), CliError> {
    let (binding, uses) = master_keys::status(pool).await?;
    let sum = |matches: &dyn Fn(&str, SealForm) -> bool| -> i64 {
        uses.iter().filter(|one| matches(one.key().0, one.key().1)).map(|one| one.rows).sum()
    };
    let ring = sealer.ring();
    let mut table = Vec::new();
    for (index, key) in ring.ids().enumerate() {
        let state = if index == 0 { "seals" } else { "opens" };
        let rows = sum(&|id, _| id == key);
        let bound = sum(&|id, form| id == key && form == SealForm::Bound);
        table.push([key.to_owned(), state.to_owned(), rows.to_string(), bound.to_string()]);
    }
    for missing in uses.iter().filter(|one| !ring.ids().any(|key| key == one.key().0)) {
        let rows = format!("{} in {}", missing.rows, missing.column);
        table.push(["MISSING".to_owned(), missing.key().0.to_owned(), rows, String::new()]);
    }
    print_table(["KEY", "STATE", "ROWS", "BOUND"], &table)?;
    let unbound = sum(&|_, form| form == SealForm::Unbound);
    note!("{}", describe_binding(binding, unbound));
    Ok(())
}

fn describe_binding(binding: Binding, unbound: i64) -> String {
    match binding {
        Binding::Unmarked => format!(
            "{unbound} values are not bound to their destination. Once no process of an earlier release is left, run \
             `regcred master-key rotate --bind`."
        ),
        Binding::Marked => format!(
            "New values are bound to their destination; {unbound} older ones are not. Run `regcred master-key rotate \
             --bind` again."
        ),
        Binding::Complete | Binding::Settled if unbound == 0 => "All values are bound to their destination.".to_owned(),
        Binding::Complete | Binding::Settled => format!(
            "{unbound} values are not bound to their destination and do not open. No process of this release wrote \
             them. Set these secrets again."
        ),
    }
}

async fn rotate(
    pool: &PgPool,
    sealer: &Sealer,
    audit: &TransactionalAudit,
    kind: RotationKind,
) -> Result<(), CliError> {
    let key = sealer.sealing_key_id();
    note!("Re-sealing with {key} …");
    let progress = |so_far: &Rotation| note!("  {} values re-sealed", so_far.resealed);
    let rotation = master_keys::rotate_audited(pool, sealer, audit, &audit::actor(), kind, progress).await;
    audit::close(audit).await;
    let rotation = rotation?;
    if rotation.unreadable > 0 {
        return Err(CliError::Failed(format!(
            "{} values re-sealed, {} skipped because they did not open: see the log above for their rows",
            rotation.resealed, rotation.unreadable
        )));
    }
    let (binding, uses) = master_keys::status(pool).await?;
    let unbound: i64 = uses.iter().filter(|one| one.key().1 == SealForm::Unbound).map(|one| one.rows).sum();
    note!(
        "Done: {} values re-sealed with {key}. Services seal with it within 5 s after it was added to the ring file. \
         Before you remove an older key, run `regcred master-key list`; if it still has rows, rotate again.\n{}",
        rotation.resealed,
        describe_binding(binding, unbound),
    );
    if kind == RotationKind::Bind && binding < Binding::Complete {
        return Err(CliError::Failed(
            "a process of an earlier release still writes: stop it and run this again".to_owned(),
        ));
    }
    Ok(())
}

/// Prints a new key, or prepends it to a key ring file.
pub(super) fn generate(file: Option<&Path>) -> Result<(), CliError> {
    let line = generate_ring_line().map_err(|error| CliError::Failed(error.to_string()))?;
    ring_file::add(&line, file, |id, file| {
        format!(
            "Master key {id} is now the first key in {file}. Back up the file: stored values cannot be opened without it."
        )
    })
}
