//! Parses the command line, runs the command, and says how it went.

use std::process::ExitCode;

use clap::Parser;
use regcred::cli::Cli;

fn main() -> ExitCode {
    // One TLS provider for all: kube, reqwest and sqlx take the process's default. It is only ever set here.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("regcred: {error}");
            error.exit_code()
        }
    }
}
