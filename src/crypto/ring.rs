//! Rings of keys: several keys in one file or variable, of which the first is used for new values
//! and all for existing ones. Their text format, and their reload while the process runs.

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::rand;
use base64::{Engine, prelude::BASE64_STANDARD};
use parking_lot::{Mutex, RwLock};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{crypto::api_key::CryptoError, domain::invalid::Invalid};

const KEY_BYTES: usize = 32;

/// Keys in order.
pub trait Ring: Sized + fmt::Debug {
    /// Name in log messages.
    const NAME: &'static str;

    /// Parses the text of a ring.
    ///
    /// # Errors
    ///
    /// [`Invalid`] names the line, without its content.
    fn parse(text: &SecretString) -> Result<Self, Invalid>;

    /// Whether another ring has the same keys in the same order.
    fn is_same(&self, other: &Self) -> bool;
}

/// Line of a ring.
pub(super) struct Line {
    /// Id of the key; `None` if the line is a key alone.
    pub id: Option<String>,
    /// The key.
    pub bytes: Zeroizing<Vec<u8>>,
}

/// Parses lines `ID:BASE64`. Empty lines and `#` comments are ignored. A line `BASE64` is a key
/// without an id; `convert` decides whether that is allowed.
pub(super) fn parse_lines<T>(
    text: &SecretString,
    mut convert: impl FnMut(Line) -> Result<T, Invalid>,
) -> Result<Vec<T>, Invalid> {
    let mut ids: Vec<Option<String>> = Vec::new();
    let mut keys = Vec::new();
    for (number, line) in text.expose_secret().lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let in_line = |error: Invalid| Invalid::new(format!("line {}: {error}", number + 1));
        let line = parse_line(line).map_err(in_line)?;
        if ids.contains(&line.id) {
            return Err(in_line(match &line.id {
                Some(id) => Invalid::new(format!("key id {id:?} is a duplicate")),
                None => Invalid::new("only one key may be without an id: write ID:BASE64"),
            }));
        }
        ids.push(line.id.clone());
        keys.push(convert(line).map_err(in_line)?);
    }
    Ok(keys)
}

fn parse_line(line: &str) -> Result<Line, Invalid> {
    let (id, key) = line.split_once(':').map_or((None, line), |(id, key)| (Some(id), key));
    let is_good = |id: &str| {
        (1..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if !id.is_none_or(is_good) {
        return Err(Invalid::new("the id must be 1 to 32 letters, digits, '-' or '_'"));
    }
    let bytes = BASE64_STANDARD.decode(key.trim()).map_err(|_| Invalid::new("the key is not base64"))?;
    Ok(Line { id: id.map(str::to_owned), bytes: Zeroizing::new(bytes) })
}

/// Generates a key and returns its line, with an id that starts with `prefix`.
///
/// # Errors
///
/// [`CryptoError`] if the system returns no random bytes.
pub fn generate_line(prefix: &str) -> Result<SecretString, CryptoError> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    rand::fill(key.as_mut()).map_err(|_| CryptoError::no_random_bytes())?;
    let mut id = [0; 4];
    rand::fill(&mut id).map_err(|_| CryptoError::no_random_bytes())?;
    let encoded = Zeroizing::new(BASE64_STANDARD.encode(*key));
    Ok(SecretString::from(format!("{prefix}{:08x}:{}", u32::from_be_bytes(id), *encoded)))
}

/// Ring of a process, which can be reloaded from its file.
#[derive(Debug)]
pub struct ReloadableRing<R> {
    ring: RwLock<Arc<R>>,
    /// File of the ring, if it came from one.
    file: Option<PathBuf>,
    /// File that was read last on demand.
    demanded: Mutex<Option<FileVersion>>,
}

/// Version of a file: a replaced file has another number, a written one another time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileVersion {
    device: u64,
    number: u64,
    size: u64,
    changed: (i64, i64),
}

impl FileVersion {
    fn of(file: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(file)?;
        Ok(Self {
            device: metadata.dev(),
            number: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

fn in_file(file: &Path, error: impl fmt::Display) -> Invalid {
    Invalid::new(format!("{}: {error}", file.display()))
}

impl<R: Ring> ReloadableRing<R> {
    /// Holds a ring. [`reload`](Self::reload) reads a newer one from `file`.
    #[must_use]
    pub fn new(ring: R, file: Option<PathBuf>) -> Self {
        Self { ring: RwLock::new(Arc::new(ring)), file, demanded: Mutex::default() }
    }

    /// Returns the current ring.
    #[must_use]
    pub fn current(&self) -> Arc<R> {
        Arc::clone(&self.ring.read())
    }

    /// Reads the file again. Does nothing without a file.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the file cannot be read or parsed; the current ring stays in use.
    pub fn reload(&self) -> Result<(), Invalid> {
        let Some(file) = &self.file else { return Ok(()) };
        let text = fs::read_to_string(file).map_err(|error| in_file(file, error))?;
        let ring = R::parse(&SecretString::from(text)).map_err(|error| in_file(file, error))?;
        if !ring.is_same(&self.current()) {
            tracing::info!(keys = ?ring, "{} reloaded", R::NAME);
            *self.ring.write() = Arc::new(ring);
        }
        Ok(())
    }

    /// Reads the file again if it has changed since the last call: a caller may cause many calls.
    ///
    /// # Errors
    ///
    /// As [`reload`](Self::reload); an unreadable version of the file is an error once.
    pub fn reload_on_demand(&self) -> Result<(), Invalid> {
        let Some(file) = &self.file else { return Ok(()) };
        let version = FileVersion::of(file).map_err(|error| in_file(file, error))?;
        let mut demanded = self.demanded.lock();
        if *demanded == Some(version) {
            return Ok(());
        }
        // The version is older than what is read: a change in between causes another read.
        *demanded = Some(version);
        self.reload()
    }
}
