//! Entry point: parses the command line, runs the command and returns its exit code.

use std::{alloc::System, io::Write, process::ExitCode};

use clap::Parser;
use regcred::cli::{Cli, CliError};
use zeroizing_alloc::ZeroAlloc;

/// Wipes heap memory when it is freed. Bodies and buffers of HTTP, TLS and database crates hold
/// secrets that no code of this crate can wipe.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> ExitCode {
    // kube, reqwest and sqlx use the default TLS provider of the process.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, CliError::OutputClosed) {
                // Standard error may be the closed pipe.
                let _ = writeln!(std::io::stderr(), "regcred: {error}");
            }
            error.exit_code()
        }
    }
}
