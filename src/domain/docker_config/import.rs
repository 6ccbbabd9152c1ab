//! Converts an existing docker config into accounts.
//!
//! Every entry and every other field yields one [`ImportItem`], so nothing is dropped silently.

mod duplicates;
mod entry;

use secrecy::SecretString;
use serde::Serialize;
use utoipa::ToSchema;

pub(in crate::domain) use self::entry::redact_key;
use super::parse::{Config, Form};
use crate::domain::registry::RegistryScope;

/// Result of importing a docker config.
#[derive(Debug)]
pub struct Import {
    /// Format of the document.
    pub form: Form,
    /// Entries in document order, then the other fields.
    pub items: Vec<ImportItem>,
}

/// One entry or field of the document.
#[derive(Debug)]
pub struct ImportItem {
    /// Key of the entry, or name of the field. A user or password in the key is redacted.
    pub key: String,
    /// Credential, or reason for skipping.
    pub outcome: ImportOutcome,
}

/// Credential, or reason for skipping.
#[derive(Debug)]
pub enum ImportOutcome {
    /// A credential.
    Found(FoundAccount),
    /// No account can be made from the item.
    Skipped {
        /// Reason, for programs.
        reason: SkipReason,
        /// Reason and remedy, for people. Never contains a secret.
        detail: String,
    },
}

/// Credential from a docker config. `Debug` omits the password.
#[derive(Debug, Clone)]
pub struct FoundAccount {
    /// Scope of the key.
    pub scope: RegistryScope,
    /// Whether the key starts with `http://`.
    pub plain_http: bool,
    /// User name.
    pub username: String,
    /// The password or token.
    pub password: SecretString,
    /// Mail address, if present.
    pub email: Option<String>,
    /// Names of the entry's fields that an account does not store.
    pub left_out: Vec<String>,
}

/// Reason for skipping an item. Document fields keep their own names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum SkipReason {
    /// A helper program stores the credential, not the document.
    CredsStore,
    /// This registry's helper program stores the credential, not the document.
    CredHelpers,
    /// The entry holds an identity token, which the kubelet does not support.
    #[serde(rename = "identitytoken")]
    IdentityToken,
    /// The entry holds a bearer token, which neither the kubelet nor podman supports.
    #[serde(rename = "registrytoken")]
    RegistryToken,
    /// HTTP headers of the docker CLI, which belong to no registry.
    #[serde(rename = "HttpHeaders")]
    HttpHeaders,
    /// A field without credentials.
    NotACredential,
    /// The entry is empty, or lacks a user or a password.
    Empty,
    /// The entry's `auth`, or another field, is malformed.
    InvalidEntry,
    /// The key names no valid registry.
    InvalidRegistry,
    /// Another key of this document names the same registry and holds the same credential.
    Duplicate,
    /// Another key of this document names the same registry and holds a different credential.
    Conflict,
}

impl Import {
    /// Imports every entry and field of the document.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let mut items: Vec<_> = config.entries.iter().map(|entry| entry::import_entry(entry, config)).collect();
        duplicates::skip_duplicates(&mut items);
        items.extend(other_fields(config));
        Self { form: config.form, items }
    }
}

impl ImportItem {
    fn skipped(key: &str, reason: SkipReason, detail: impl Into<String>) -> Self {
        Self { key: key.to_owned(), outcome: ImportOutcome::Skipped { reason, detail: detail.into() } }
    }
}

fn other_fields(config: &Config) -> impl Iterator<Item = ImportItem> {
    let helpers = config.helpers.iter().map(|helper| {
        let detail = format!("`docker-credential-{}` stores the credential, not this document", helper.name);
        ImportItem::skipped(&redact_key(&helper.registry), SkipReason::CredHelpers, detail)
    });
    let store = config.store.iter().map(|name| {
        let detail =
            format!("`docker-credential-{name}` may store more credentials, which this document does not contain");
        ImportItem::skipped("credsStore", SkipReason::CredsStore, detail)
    });
    let others = config.others.iter().map(|name| {
        if name.eq_ignore_ascii_case("HttpHeaders") {
            ImportItem::skipped(
                name,
                SkipReason::HttpHeaders,
                "headers belong to no registry: a credential in them is not imported",
            )
        } else {
            ImportItem::skipped(name, SkipReason::NotACredential, "this field holds no registry credential")
        }
    });
    helpers.chain(store).chain(others)
}

#[cfg(test)]
mod tests;
