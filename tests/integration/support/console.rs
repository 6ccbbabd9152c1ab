//! Commands of documents, and the output that the documents show.

use std::{fmt::Write, fs, process::Command};

use super::files::TempDir;

/// Longest time for all commands of a document, in seconds.
const DEADLINE: &str = "300";

/// A command of a document and the output that follows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// Line number in the document.
    line: usize,
    command: String,
    /// `…` stands for any text.
    shown: String,
}

/// Reads the ```` ```console ```` blocks. A command begins with `$ ` and continues on lines that
/// begin with `> `.
pub fn steps(document: &str) -> Vec<Step> {
    let (mut steps, mut is_console): (Vec<Step>, bool) = (Vec::new(), false);
    for (number, line) in document.lines().enumerate() {
        if line.starts_with("```") {
            is_console = line == "```console";
        } else if is_console && let Some(command) = line.strip_prefix("$ ") {
            steps.push(Step { line: number + 1, command: command.to_owned(), shown: String::new() });
        } else if is_console && let Some(step) = steps.last_mut() {
            match line.strip_prefix("> ") {
                Some(continued) if step.shown.is_empty() => step.command.extend(["\n", continued]),
                _ => step.shown.extend([line, "\n"]),
            }
        }
    }
    steps
}

/// Runs the commands in one shell with these variables and no others, and compares each output.
///
/// `change` adapts what was printed before the comparison.
///
/// # Panics
///
/// If an output is not as shown, with all differences.
pub fn assert_prints_what_it_shows(steps: &[Step], variables: &[(&str, String)], change: impl Fn(&str) -> String) {
    let mut differences = String::new();
    for (Step { line, command, shown }, printed) in steps.iter().zip(run(steps, variables)) {
        let printed = change(&printed);
        if !is_shown(shown, &printed) {
            let _ = write!(differences, "line {line}: $ {command}\n--- shown\n{shown}--- printed\n{printed}\n");
        }
    }
    assert!(differences.is_empty(), "the document differs:\n{differences}");
}

/// Returns the output of each command.
fn run(steps: &[Step], variables: &[(&str, String)]) -> Vec<String> {
    let folder = TempDir::new();
    let output = |number: usize| folder.path().join(format!("{number}.out"));
    let mut script = "exec </dev/null\n".to_owned();
    for (number, step) in steps.iter().enumerate() {
        let _ = write!(script, "{{\n{}\n}} >{} 2>&1\n", step.command, output(number).display());
    }
    let script = folder.write("commands.sh", script);
    // Files of the commands are kept apart from their outputs.
    let work = folder.path().join("work");
    fs::create_dir(&work).expect("a folder");
    let mut shell = Command::new("timeout");
    shell.args([DEADLINE, "bash"]).arg(script).current_dir(&work).env_clear();
    shell.env("HOME", &work).envs(variables.iter().map(|(name, value)| (name, value)));
    let ended = shell.output().expect("bash runs");
    assert!(ended.stderr.is_empty(), "{}", String::from_utf8_lossy(&ended.stderr));
    (0..steps.len()).map(|number| fs::read_to_string(output(number)).unwrap_or_default()).collect()
}

/// Whether `printed` is `shown`, with any text for each `…`.
fn is_shown(shown: &str, printed: &str) -> bool {
    let (shown, printed) = (shown.trim_end(), printed.trim_end());
    let Some((first, shown)) = shown.split_once('…') else { return shown == printed };
    let Some(printed) = printed.strip_prefix(first) else { return false };
    let Some((middle, last)) = shown.rsplit_once('…') else { return printed.ends_with(shown) };
    let Some(mut printed) = printed.strip_suffix(last) else { return false };
    middle.split('…').all(|piece| match printed.split_once(piece) {
        Some((_, rest)) => {
            printed = rest;
            true
        }
        None => false,
    })
}

#[test]
fn commands_are_read_from_console_blocks() {
    let document = "```sh\n$ no\n```\n```console\n$ a \\\n> b\nshown\n> more\n$ c\n```\n$ no\n";
    let step = |line, command: &str, shown: &str| Step { line, command: command.into(), shown: shown.into() };
    assert_eq!(steps(document), [step(5, "a \\\nb", "shown\n> more\n"), step(9, "c", "")]);
}

#[test]
fn an_ellipsis_stands_for_any_text() {
    let cases = [
        ("", "", true),
        ("a", "a\n", true),
        ("a", "ab", false),
        ("…", "anything\nelse", true),
        ("a…z", "a to z", true),
        ("a…z", "a to y", false),
        ("a…z", "az", true),
        ("ab…b", "ab", false),
        ("…m…", "a m z", true),
        ("…m…", "a z", false),
        ("a…m…n…z", "a n m z", false),
    ];
    for (shown, printed, expected) in cases {
        assert_eq!(is_shown(shown, printed), expected, "{shown:?} {printed:?}");
    }
}
