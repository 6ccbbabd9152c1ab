//! Benchmarks. `make bench` measures costs against a baseline in the same run, `make scenarios`
//! measures behaviour under attack and failure, `make bench-fanout` measures rotations.
//!
//! Load, servers and Postgres are separate processes that share the machine's cores over loopback,
//! so absolute figures mean little. Rounds alternate between the subjects; the result is the median
//! of the rounds' ratios.

#![expect(clippy::disallowed_methods, reason = "benchmarks read the environment and the wall clock")]

mod bare;
mod fanout;
mod http;
mod in_process;
mod load;
mod process;
mod report;
mod sandbox;
mod scenarios;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.first().map(String::as_str) {
        Some(bare::ARGUMENT) => bare::serve(&arguments[1..]),
        Some(fanout::ARGUMENT) => fanout::run(&arguments[1..]),
        Some(scenarios::ARGUMENT) => scenarios::run(&arguments[1..]),
        // `cargo bench` passes `--bench`.
        _ => run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let mut goals = report::Goals::default();
    in_process::measure()?;
    http::measure(&mut goals)?;
    scenarios::forged_keys(&mut goals)?;
    goals.print()
}
