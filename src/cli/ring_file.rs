//! Files of key rings, which commands write.

use std::{io::ErrorKind, os::unix::fs::PermissionsExt, path::Path};

use secrecy::{ExposeSecret, SecretString};

use super::{CliError, print_line, replace_file};

/// Permissions of a ring file.
const PRIVATE: u32 = 0o600;

/// Prints a new line of a ring, or puts it first in a file, which only its owner can read then.
/// `describe` makes the message from the id and the file.
pub(super) fn add(
    line: &SecretString,
    file: Option<&Path>,
    describe: impl FnOnce(&str, &str) -> String,
) -> Result<(), CliError> {
    let Some(file) = file else { return print_line(line.expose_secret()) };
    let failed = |error: std::io::Error| CliError::Failed(format!("{}: {error}", file.display()));
    let older = match std::fs::read_to_string(file) {
        Ok(older) => SecretString::from(older),
        Err(error) if error.kind() == ErrorKind::NotFound => SecretString::default(),
        Err(error) => return Err(failed(error)),
    };
    let mode = std::fs::metadata(file).map(|metadata| metadata.permissions().mode() & 0o777).ok();
    let ring = SecretString::from(format!("{}\n{}", line.expose_secret(), older.expose_secret()));
    replace_file(file, ring.expose_secret(), Some(PRIVATE)).map_err(failed)?;
    let id = line.expose_secret().split(':').next().unwrap_or_default();
    note!("{}", describe(id, &file.display().to_string()));
    if let Some(mode) = mode.filter(|mode| mode & !PRIVATE != 0) {
        note!("Its permissions were {mode:04o} and are 0600 now: only its owner can read it.");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_line_is_put_first_and_the_file_becomes_private() {
        let folder = std::env::temp_dir().join(format!("regcred-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join("keys");
        let add = |line: &str| add(&SecretString::from(line), Some(&file), |_, _| String::new()).unwrap();
        let mode = || std::fs::metadata(&file).unwrap().permissions().mode() & 0o777;
        add("a:1");
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        add("b:2");
        assert_eq!(mode(), 0o600);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "b:2\na:1\n");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
