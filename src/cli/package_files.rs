//! Files that packages of regcred contain beside the program.

use std::{fs::create_dir_all, path::Path};

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};

use super::{Cli, CliError};

/// Writes the man pages to `folder/man`, and completions for shells to `folder/completions`.
pub(super) fn write(folder: &Path) -> Result<(), CliError> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    create_dir_all(&man)?;
    create_dir_all(&completions)?;
    clap_mangen::generate_to(Cli::command(), man)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        generate_to(shell, &mut Cli::command(), "regcred", &completions)?;
    }
    Ok(())
}
