//! `regcred audit prune`: deletes old events.

use std::{
    fs::{File, OpenOptions},
    io::{BufWriter, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use chrono::{DateTime, Utc};
use clap::{ArgGroup, Args};

use super::{OlderPeppers, PROGRESS_EVERY, Terminal, actor};
use crate::{
    app,
    cli::{CliError, print_line},
    clock, http,
    service::audit::{
        prune::{self, Plan},
        verify::{Scope, verify},
    },
    storage::PgPool,
};

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("copy").required(true).args(["export", "no_export", "dry_run"]))]
pub(in crate::cli) struct Prune {
    /// Delete events that were sealed before this time, as in 2027-01-31T00:00:00Z.
    #[arg(long, value_name = "TIME")]
    before: DateTime<Utc>,
    /// Write the events to this new file first, as JSON lines, oldest first.
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,
    /// Delete the events without a copy.
    #[arg(long)]
    no_export: bool,
    /// Print what would be deleted.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    peppers: OlderPeppers,
}

impl Prune {
    pub(in crate::cli) async fn run(self) -> Result<(), CliError> {
        if self.before > clock::now() {
            return Err(CliError::Failed("--before must be in the past".to_owned()));
        }
        let (config, peppers) = self.peppers.open()?;
        let pool = app::connect(&config).await?;
        if !prune::may_prune(&pool).await? {
            let advice = "this database role does not own the audit log: use the URL that `regcred migrate` runs with";
            return Err(CliError::Failed(advice.to_owned()));
        }
        let mut terminal = Terminal { next: PROGRESS_EVERY, printed: Ok(()) };
        let report = verify(&pool, &peppers.current().audit_keys(), Scope::default(), &mut terminal).await?;
        terminal.printed?;
        if report.findings > 0 {
            let findings = report.findings;
            return Err(CliError::Failed(format!("Nothing was pruned: {findings} findings in the audit log")));
        }
        let plan = prune::plan(&pool, self.before).await?;
        let (events, through) = (plan.events, plan.through);
        if self.dry_run {
            return print_line(&format!("{events} events of the seals up to {through} would be deleted"));
        }
        if let Some(file) = self.export.as_deref().filter(|_| plan.is_new()) {
            let exported = export(&pool, &plan, file).await?;
            print_line(&format!("{exported} events were written to {}", file.display()))?;
        }
        let deleted = prune::prune(&pool, peppers, &actor(), &plan).await?;
        print_line(&format!("{deleted} events of the seals up to {through} were deleted"))
    }
}

/// Writes the events that no earlier prune declared. An interrupted prune wrote its own before.
async fn export(pool: &PgPool, plan: &Plan, file: &Path) -> Result<i64, CliError> {
    let failed = |error: std::io::Error| CliError::Failed(format!("{}: {error}", file.display()));
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).map_err(failed)?;
    let mut out = BufWriter::new(opened);
    let write = |event| out.write_all(http::json_line(event).as_bytes()).map_err(failed);
    let exported = prune::export(pool, plan, write).await?;
    let expected = plan.events - plan.pending;
    if exported != expected {
        return Err(CliError::Failed(format!(
            "Nothing was pruned: {exported} of {expected} events were read, because the log changed meanwhile"
        )));
    }
    let opened: File = out.into_inner().map_err(|error| failed(error.into_error()))?;
    opened.sync_all().map_err(failed)?;
    Ok(exported)
}
