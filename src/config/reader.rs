//! Reads environment variables and collects problems.

use std::{
    fmt::{self, Display},
    ops::RangeInclusive,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};

/// Returns an environment variable, or `None` if it is unset or not UTF-8.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the only place that reads the environment")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// All problems of a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(Vec<String>);

impl Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid configuration:")?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
    }
}

impl std::error::Error for ConfigError {}

/// File with a secret that users other than its owner can read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExposedFile {
    /// Variable that names the file.
    pub variable: String,
    /// Path.
    pub file: PathBuf,
    /// Permission bits.
    pub mode: u32,
}

/// Reads variables and collects their problems.
pub struct Reader<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    problems: Vec<String>,
    pub(super) exposed_files: Vec<ExposedFile>,
}

impl<'a> Reader<'a> {
    /// Creates a reader on `lookup`: [`variable`], or a map in tests.
    pub fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup, problems: Vec::new(), exposed_files: Vec::new() }
    }

    /// Returns the configuration that `build` assembles from the sections.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] lists the problems of all sections.
    pub fn finish<T>(self, build: impl FnOnce() -> Option<T>) -> Result<T, ConfigError> {
        match build() {
            Some(config) if self.problems.is_empty() => Ok(config),
            _ => Err(ConfigError(self.problems)),
        }
    }

    /// Returns a variable. An empty one counts as unset, as in Compose files.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    /// Records the error of a parsed value.
    pub(super) fn keep<T, E: Display>(&mut self, name: &str, parsed: Result<T, E>) -> Option<T> {
        parsed.map_err(|error| self.problems.push(format!("{name}: {error}"))).ok()
    }

    pub(super) fn parsed<T: FromStr>(&mut self, name: &str, default: &str, form: &str) -> Option<T> {
        let value = self.get(name).unwrap_or_else(|| default.to_owned());
        self.keep(name, value.parse().map_err(|_| format!("must be {form}")))
    }

    pub(super) fn number<T>(&mut self, name: &str, default: T, range: RangeInclusive<T>) -> Option<T>
    where
        T: FromStr + PartialOrd + Display,
    {
        let Some(value) = self.get(name) else { return Some(default) };
        let refused = format!("must be a number from {} to {}", range.start(), range.end());
        self.keep(name, value.parse().ok().filter(|number| range.contains(number)).ok_or(refused))
    }

    pub(super) fn seconds(&mut self, name: &str, default: u64) -> Option<Duration> {
        self.number(name, default, 1..=3600).map(Duration::from_secs)
    }

    /// Records a problem.
    pub(super) fn refuse<T>(&mut self, problem: String) -> Option<T> {
        self.problems.push(problem);
        None
    }

    /// Returns a secret from `name`, or from the file named by its `_FILE` variant, with that file.
    pub(super) fn secret(&mut self, name: &str) -> Option<(SecretString, Option<PathBuf>)> {
        let file_variable = format!("{name}_FILE");
        match (self.get(name), self.get(&file_variable)) {
            (Some(_), Some(_)) => self.refuse(format!("{name} and {file_variable} are both set: set one of them")),
            (Some(value), None) => Some((SecretString::from(value), None)),
            (None, Some(file)) => self.secret_file(&file_variable, PathBuf::from(file)),
            (None, None) => self.refuse(format!("{name} or {file_variable} must be set")),
        }
    }

    fn secret_file(&mut self, variable: &str, file: PathBuf) -> Option<(SecretString, Option<PathBuf>)> {
        let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()));
        let text = SecretString::from(self.keep(variable, text)?);
        if text.expose_secret().trim().is_empty() {
            return self.refuse(format!("{variable}: {} is empty", file.display()));
        }
        self.note_exposed(variable, &file);
        Some((text, Some(file)))
    }

    /// Notes a secret file that other users can read.
    ///
    /// Reading by the group is a mistake only if the file belongs to the user of this process. If
    /// it does not, the group is how the process reads it: so Kubernetes mounts Secrets with
    /// `fsGroup`.
    pub(super) fn note_exposed(&mut self, variable: &str, file: &Path) {
        // Without metadata, the read of the file reports the problem.
        let Ok(metadata) = std::fs::metadata(file) else { return };
        let is_own = metadata.uid() == rustix::process::geteuid().as_raw();
        let mode = metadata.mode() & 0o7777;
        let foreign = if is_own { 0o044 } else { 0o004 };
        if mode & foreign != 0 {
            self.exposed_files.push(ExposedFile { variable: variable.to_owned(), file: file.to_owned(), mode });
        }
    }
}
