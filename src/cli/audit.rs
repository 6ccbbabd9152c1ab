//! `regcred audit`: verifies and exports the audit log. Also names the user of a command.

use std::{
    fmt::{Display, Write as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use chrono::{DateTime, SecondsFormat, Utc};
use clap::{Args, Subcommand};
use secrecy::SecretString;
use uuid::Uuid;

use crate::{
    app,
    cli::{CliError, print_line, replace_file, variable},
    config::{DatabaseConfig, Reader},
    crypto::{
        pepper::{PepperRing, Peppers},
        ring::Ring as _,
    },
    domain::{
        audit::{Action, EventFilter, Outcome, Resource},
        caller::{Actor, ActorKind},
    },
    http,
    service::audit::{
        Export, TransactionalAudit,
        legacy::{ChainAnchor, ChainFinding, adopt},
        verify::{Anchor, Finding, ProcessNumbers, Prune, Report, Scope, Watcher, verify},
    },
    storage::PgPool,
};

mod prune;

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Verify that no event was changed, removed or added. Exit code 0 if so, else 1 with the
    /// findings.
    ///
    /// Runs beside the service. Needs the database and `REGCRED_API_KEY_PEPPER`.
    Verify(Verify),
    /// Verify the chains of events that earlier releases wrote, and seal their events.
    ///
    /// Run it once after an upgrade, when no process of an earlier release runs any more. It can be
    /// repeated.
    Adopt(Adopt),
    /// Print events as JSON lines, newest first.
    Export(ExportEvents),
    /// Delete events that were sealed before a time. The seals stay, so the log can still be verified.
    ///
    /// Verifies the log first, and prunes nothing if there is a finding. Runs beside the service, with
    /// the URL of the owner of the tables. If it is interrupted, run it again.
    Prune(prune::Prune),
}

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Compare with the state of the log at an earlier verification. Finds a log that was set back.
    #[arg(long)]
    anchors: Option<PathBuf>,
    /// Verify only what was sealed after the state in `--anchors`.
    #[arg(long, requires = "anchors")]
    since_anchor: bool,
    /// Write the state of the log to this file. Keep it where database writers cannot reach it.
    #[arg(long)]
    save_anchors: Option<PathBuf>,
    #[command(flatten)]
    peppers: OlderPeppers,
}

#[derive(Debug, Args)]
pub(super) struct Adopt {
    #[command(flatten)]
    peppers: OlderPeppers,
}

#[derive(Debug, Args)]
struct OlderPeppers {
    /// File with peppers that were used before. Can be repeated. Peppers of the configured ring need
    /// none.
    #[arg(long)]
    older_pepper_file: Vec<PathBuf>,
}

impl OlderPeppers {
    /// Returns the database's configuration and all peppers, the current one first.
    fn open(&self) -> Result<(DatabaseConfig, Arc<Peppers>), CliError> {
        let mut reader = Reader::new(&variable);
        let (config, peppers) = (reader.database(), reader.peppers());
        let (config, peppers) = reader.finish(|| config.zip(peppers))?;
        let mut ring = peppers.current().as_ref().clone();
        for file in &self.older_pepper_file {
            let older = PepperRing::parse(&SecretString::from(read(file)?));
            let older = older.map_err(|error| CliError::Failed(format!("{}: {error}", file.display())))?;
            ring = ring.with_older(older);
        }
        Ok((config, Arc::new(Peppers::new(ring, None))))
    }
}

#[derive(Debug, Args)]
pub(super) struct ExportEvents {
    /// Only events of this resource, such as registry-accounts/prod or api-keys/ci.
    #[arg(long, value_parser = Resource::parse_filter)]
    resource: Option<Resource>,
    /// Only events of the actor with this name.
    #[arg(long)]
    actor: Option<String>,
    /// Only events with this action, such as dockerConfig.reveal.
    #[arg(long, value_parser = str::parse::<Action>)]
    action: Option<Action>,
    /// Only events with this outcome: success, denied, failure or attempt.
    #[arg(long, value_parser = str::parse::<Outcome>)]
    outcome: Option<Outcome>,
    /// Only events at or after this time, as in 2027-01-31T00:00:00Z.
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
            Self::Adopt(command) => command.run().await,
            Self::Export(command) => command.run().await,
            Self::Prune(command) => command.run().await,
        }
    }
}

/// Prints findings as they come, and the progress now and then.
struct Terminal {
    next: u64,
    printed: Result<(), CliError>,
}

const PROGRESS_EVERY: u64 = 100_000;

impl Terminal {
    fn print(&mut self, finding: &impl Display) {
        if self.printed.is_ok() {
            self.printed = print_line(&finding.to_string());
        }
    }
}

impl Watcher for Terminal {
    fn found(&mut self, finding: &Finding) {
        self.print(finding);
    }

    fn progress(&mut self, seen: u64, all: u64) {
        if seen >= self.next {
            note!("  {seen} of {all} events");
            self.next = seen + PROGRESS_EVERY;
        }
    }
}

impl Verify {
    async fn run(self) -> Result<(), CliError> {
        let scope = self.anchors.as_deref().map(read_anchors).transpose()?.unwrap_or_default();
        let scope = Scope { since_anchor: self.since_anchor, ..scope };
        let (config, peppers) = self.peppers.open()?;
        let pool = app::connect(&config).await?;
        let mut terminal = Terminal { next: PROGRESS_EVERY, printed: Ok(()) };
        let report = verify(&pool, &peppers.current().audit_keys(), scope, &mut terminal).await?;
        terminal.printed?;
        print_open_processes(&report.anchor);
        print_prunes(&report)?;
        if report.unadopted > 0 {
            note!("{} events of earlier releases are not sealed: run `regcred audit adopt`", report.unadopted);
        }
        let (events, seals) = (report.events, report.anchor.number);
        if report.findings > 0 {
            let findings = report.findings;
            return Err(CliError::Failed(format!(
                "The audit log is not what was written: {findings} findings in {events} events and {seals} seals"
            )));
        }
        if let Some(file) = &self.save_anchors {
            replace_file(file, &format_anchor(&report.anchor), None)
                .map_err(|error| CliError::Failed(format!("{}: {error}", file.display())))?;
        }
        print_line(&format!("The audit log is intact: {events} events in {seals} seals"))
    }
}

/// A process that has not stopped runs, or died. Batches that were in flight when it died cannot be
/// told from removed ones.
fn print_open_processes(anchor: &Anchor) {
    for (id, numbers) in anchor.processes.iter().filter(|(_, numbers)| !numbers.is_closed) {
        let in_flight: Vec<String> = numbers.in_flight().iter().map(|(from, to)| format!("{from}-{to}")).collect();
        let in_flight =
            if in_flight.is_empty() { String::new() } else { format!(", in flight {}", in_flight.join(", ")) };
        note!("process {id} runs or died: last batch {}{in_flight}", numbers.last());
    }
}

fn print_prunes(report: &Report) -> Result<(), CliError> {
    for Prune { seal, through, at, actor } in &report.prunes {
        let at = at.to_rfc3339_opts(SecondsFormat::Secs, true);
        print_line(&format!("seal {seal}: {actor} pruned the events of the seals up to {through}, at {at}"))?;
    }
    if report.prunes.is_empty() { Ok(()) } else { print_line(&format!("{} events were pruned", report.pruned)) }
}

impl Adopt {
    async fn run(self) -> Result<(), CliError> {
        let (config, peppers) = self.peppers.open()?;
        let pool = app::connect(&config).await?;
        let mut terminal = Terminal { next: PROGRESS_EVERY, printed: Ok(()) };
        let (report, sealed) = adopt(&pool, peppers, &mut |finding: &ChainFinding| terminal.print(finding)).await?;
        terminal.printed?;
        if report.findings > 0 {
            let findings = report.findings;
            return Err(CliError::Failed(format!("Nothing was sealed: {findings} findings in the chains")));
        }
        let (events, chains) = (report.events, report.chains);
        print_line(&format!("{events} events in {chains} chains are intact; {sealed} of them were sealed now"))
    }
}

fn read(file: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(file).map_err(|error| CliError::Failed(format!("{}: {error}", file.display())))
}

/// One line for the last seal, and one for each process that may still write.
fn format_anchor(anchor: &Anchor) -> String {
    let hash = if anchor.hash.is_empty() { "-" } else { &anchor.hash };
    let mut text = format!("seal {} {hash} {}\n", anchor.number, anchor.events);
    for (id, ProcessNumbers { through, settled, is_closed, beyond }) in &anchor.processes {
        let _ = write!(text, "process {id} {through} {settled} {}", u8::from(*is_closed));
        for number in beyond {
            let _ = write!(text, " {number}");
        }
        text.push('\n');
    }
    text
}

/// Also reads the lines `CHAIN SEQUENCE HASH` of earlier releases.
fn parse_anchor(text: &str) -> Option<Scope> {
    let mut scope = Scope::default();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["seal", number, hash, events] => {
                let hash = if *hash == "-" { String::new() } else { (*hash).to_owned() };
                let (number, events) = (number.parse().ok()?, events.parse().ok()?);
                scope.anchor = Some(Anchor { number, hash, events, ..Anchor::default() });
            }
            ["process", id, through, settled, is_closed, beyond @ ..] => {
                let numbers = ProcessNumbers {
                    through: through.parse().ok()?,
                    settled: settled.parse().ok()?,
                    is_closed: *is_closed == "1",
                    beyond: beyond.iter().map(|number| number.parse().ok()).collect::<Option<_>>()?,
                };
                scope.anchor.as_mut()?.processes.insert(Uuid::try_parse(id).ok()?, numbers);
            }
            [chain_id, sequence, hash] => {
                let (chain_id, sequence) = (Uuid::try_parse(chain_id).ok()?, sequence.parse().ok()?);
                scope.chains.push(ChainAnchor { chain_id, sequence, hash: (*hash).to_owned() });
            }
            _ => return None,
        }
    }
    Some(scope)
}

fn read_anchors(file: &Path) -> Result<Scope, CliError> {
    let scope = parse_anchor(&read(file)?);
    scope.ok_or_else(|| CliError::Failed(format!("{} was not written by --save-anchors", file.display())))
}

impl ExportEvents {
    async fn run(self) -> Result<(), CliError> {
        let filter = EventFilter {
            resource: self.resource,
            actor: self.actor,
            action: self.action,
            outcome: self.outcome,
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

/// Opens the audit log for the events of this command, which closes it in the end.
pub(super) fn audit(pool: &PgPool, peppers: &Arc<Peppers>) -> TransactionalAudit {
    TransactionalAudit::open(pool, Arc::clone(peppers))
}

/// Seals the events of this command. They are durable even if that fails: then a service seals
/// them.
pub(super) async fn close(audit: &TransactionalAudit) {
    if let Err(error) = audit.close().await {
        tracing::warn!(%error, "audit numbering not closed");
    }
}

/// Returns the user of this command, from the kernel: an environment variable could be forged.
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
    fn anchor_parses_as_it_is_formatted() {
        let numbers = ProcessNumbers { through: 3, beyond: [5, 7].into(), settled: 2, is_closed: false };
        let anchor =
            Anchor { number: 4, hash: "ab".to_owned(), events: 9, processes: [(Uuid::now_v7(), numbers)].into() };
        let chain = format!("{} 17 cd\n", Uuid::nil());
        let scope = parse_anchor(&(format_anchor(&anchor) + &chain)).unwrap();
        assert_eq!((scope.anchor, scope.chains.len()), (Some(anchor), 1));
        let empty = parse_anchor(&format_anchor(&Anchor::default())).unwrap();
        assert_eq!(empty.anchor, Some(Anchor::default()));
        assert!(parse_anchor("nonsense").is_none());
    }

    #[test]
    fn user_of_a_command_has_a_name() {
        let actor = actor();
        assert_eq!(actor.kind, ActorKind::CommandLine);
        assert!(!actor.name.is_empty() && actor.name != "unknown");
        assert_eq!(user_name(0).as_deref(), Some("root"));
    }
}
