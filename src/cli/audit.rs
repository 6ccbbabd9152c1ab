//! `regcred audit`: check the audit record, and take it along; and who it is that runs a command.

use std::{
    fmt::Write as _,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use secrecy::SecretString;
use uuid::Uuid;

use crate::{
    app,
    cli::{CliError, argument, print_line, replace_file, variable},
    config::Reader,
    crypto::{api_key::Pepper, audit::AuditKey},
    domain::{
        audit::{EventFilter, Resource},
        caller::{Actor, ActorKind},
    },
    http,
    service::audit::{
        Export, TransactionalAudit,
        verify::{Anchor, Finding, Watcher, verify},
    },
};

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Check that no event was changed, removed, added or moved: exit code 0 if so, else 1, with what is wrong.
    ///
    /// It can run beside the service. It needs the database and `REGCRED_API_KEY_PEPPER`.
    Verify(Verify),
    /// Print events as JSON lines, the newest first.
    Export(ExportEvents),
}

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Compare with where the chains were when this file was written: what is gone since then is found, too.
    #[arg(long)]
    anchors: Option<PathBuf>,
    /// Write to this file where the chains are now. Keep it where nobody who writes to the database reaches it.
    #[arg(long)]
    save_anchors: Option<PathBuf>,
    /// A file with a pepper that was in use before; can be given several times.
    #[arg(long)]
    older_pepper_file: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ExportEvents {
    /// Only events about this resource, such as registry-accounts/martin-5000.
    #[arg(long)]
    resource: Option<String>,
    /// Only events of the actor with this name.
    #[arg(long)]
    actor: Option<String>,
    /// Only events with this action, such as dockerConfig.reveal.
    #[arg(long)]
    action: Option<String>,
    /// Only events with this outcome: success, denied, failure or attempt.
    #[arg(long)]
    outcome: Option<String>,
    /// Only events from this time on, as in 2027-01-31T00:00:00Z.
    #[arg(long)]
    from: Option<DateTime<Utc>>,
    /// Only events before this time.
    #[arg(long)]
    to: Option<DateTime<Utc>>,
}

impl AuditCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        match self {
            Self::Verify(command) => command.run().await,
            Self::Export(command) => command.run().await,
        }
    }
}

/// Says what is found as it is found, and now and then how far it is.
struct Terminal {
    /// The next tenth of a million at which to say so.
    next: u64,
    printed: Result<(), CliError>,
}

const PROGRESS_EVERY: u64 = 100_000;

impl Watcher for Terminal {
    fn found(&mut self, finding: &Finding) {
        if self.printed.is_ok() {
            self.printed = print_line(&finding.to_string());
        }
    }

    fn progress(&mut self, seen: u64, all: u64) {
        if seen >= self.next {
            eprintln!("  {seen} of {all} events");
            self.next = seen + PROGRESS_EVERY;
        }
    }
}

impl Verify {
    async fn run(self) -> Result<(), CliError> {
        let anchors = self.anchors.as_deref().map(read_anchors).transpose()?.unwrap_or_default();
        let mut reader = Reader::new(&variable);
        let (config, pepper) = (reader.database(), reader.pepper());
        let (config, pepper) = reader.finish(|| config.zip(pepper))?;
        let mut keys = vec![AuditKey::of(&pepper)];
        for file in &self.older_pepper_file {
            let text = read(file)?;
            let pepper = Pepper::parse(&SecretString::from(text));
            keys.push(AuditKey::of(&argument(&format!("--older-pepper-file {}:", file.display()), pepper)?));
        }
        let pool = app::connect(&config).await?;
        let mut terminal = Terminal { next: PROGRESS_EVERY, printed: Ok(()) };
        let report = verify(&pool, &keys, anchors, &mut terminal).await?;
        terminal.printed?;
        if report.findings > 0 {
            return Err(CliError::Failed(format!(
                "The audit record is not what was written: {} findings in {} events of {} chains",
                report.findings,
                report.events,
                report.anchors.len()
            )));
        }
        if let Some(file) = &self.save_anchors {
            let lines = report.anchors.iter().fold(String::new(), |mut lines, Anchor { chain_id, sequence, hash }| {
                let _ = writeln!(lines, "{chain_id} {sequence} {hash}");
                lines
            });
            replace_file(file, &lines).map_err(|error| CliError::Failed(format!("{}: {error}", file.display())))?;
        }
        print_line(&format!("The audit record is whole: {} events in {} chains", report.events, report.anchors.len()))
    }
}

fn read(file: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(file).map_err(|error| CliError::Failed(format!("{}: {error}", file.display())))
}

fn read_anchors(file: &Path) -> Result<Vec<Anchor>, CliError> {
    let parse = |line: &str| {
        let mut parts = line.split_whitespace();
        let chain_id = Uuid::try_parse(parts.next()?).ok()?;
        let sequence = parts.next()?.parse().ok()?;
        Some(Anchor { chain_id, sequence, hash: parts.next()?.to_owned() })
    };
    let anchors = read(file)?.lines().map(parse).collect::<Option<Vec<_>>>();
    anchors.ok_or_else(|| CliError::Failed(format!("{} was not written by --save-anchors", file.display())))
}

impl ExportEvents {
    async fn run(self) -> Result<(), CliError> {
        let filter = EventFilter {
            resource: self.resource.map(|text| argument("--resource", Resource::parse(&text))).transpose()?,
            actor: self.actor,
            action: self.action.map(|text| argument("--action", text.parse())).transpose()?,
            outcome: self.outcome.map(|text| argument("--outcome", text.parse())).transpose()?,
            from: self.from,
            to: self.to,
        };
        let mut export = Export::new(super::database().await?, filter);
        while let Some(page) = export.next().await? {
            for event in page {
                print_line(http::json_line(event).trim_end())?;
            }
        }
        Ok(())
    }
}

/// Opens the one chain of the events of this command.
pub(super) async fn audit(pool: &sqlx::PgPool, pepper: &Pepper) -> Result<TransactionalAudit, CliError> {
    Ok(app::open_audit(pool, Arc::new(AuditKey::of(pepper)), 1).await?)
}

/// Who runs this command, by what the kernel says and not by a variable that anybody can set.
pub(super) fn actor() -> Actor {
    let uid = std::fs::metadata("/proc/self").map(|process| process.uid());
    let name = uid.map(|uid| user_name(uid).unwrap_or_else(|| format!("uid-{uid}")));
    Actor { kind: ActorKind::CommandLine, id: None, name: name.unwrap_or_else(|_| "unknown".to_owned()) }
}

fn user_name(uid: u32) -> Option<String> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    let uid = uid.to_string();
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_runs_a_command_has_a_name() {
        let actor = actor();
        assert_eq!(actor.kind, ActorKind::CommandLine);
        assert!(!actor.name.is_empty() && actor.name != "unknown");
        assert_eq!(user_name(0).as_deref(), Some("root"));
    }
}
