//! Key file of a Google service account.

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::domain::invalid::Invalid;

/// Maximum length of a key file, in bytes. Google's have about 2,400.
const KEY_FILE_MAX: usize = 16 * 1024;

/// The members of a key file that are used. Its `token_uri` is not: a key must not choose where it
/// is shown.
#[derive(Debug, Deserialize)]
pub(super) struct KeyFile {
    #[serde(rename = "type")]
    file_type: String,
    pub(super) client_email: String,
    pub(super) private_key: SecretString,
    pub(super) private_key_id: Option<String>,
}

impl KeyFile {
    /// Parses a key file.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is not the key file of a service account. The text repeats nothing of it.
    pub(super) fn parse(text: &SecretString) -> Result<Self, Invalid> {
        let text = text.expose_secret();
        if text.len() > KEY_FILE_MAX {
            return Err(Invalid::new("must be at most 16384 bytes long"));
        }
        let file: Self = serde_json::from_str(text).map_err(|_| {
            Invalid::new("must be the key file of a service account: JSON with client_email and private_key")
        })?;
        if file.file_type == "service_account" {
            Ok(file)
        } else {
            Err(Invalid::new("must be the key file of a service account: its `type` is another one"))
        }
    }
}
