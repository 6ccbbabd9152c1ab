//! What regcred costs, each figure beside what it is compared with in the same run: `make bench`. And what it withstands, as
//! far as that has figures: `make scenarios`. How fast a rotation is everywhere: `make bench-fanout`.
//!
//! Everything is on loopback: the load, the servers, each a process of its own, and Postgres share the machine's cores. So
//! no figure stands alone. Rounds alternate between what is compared, and what counts is the median of the rounds' ratios.

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
        // `cargo bench` says `--bench`.
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
    Ok(goals.print()?)
}
