//! Turns a docker config that somebody has into accounts.
//!
//! Every entry, and every field beside the entries, comes out as one [`ImportItem`] that says what became of it:
//! nothing is lost silently.

mod entry;
mod rivals;

use secrecy::SecretString;
use serde::Serialize;
use utoipa::ToSchema;

pub(in crate::domain) use self::entry::shown;
use super::parse::{Config, Form};
use crate::domain::registry::RegistryScope;

/// What a docker config holds.
#[derive(Debug)]
pub struct Import {
    /// The form of the document.
    pub form: Form,
    /// The entries in the document's order, then the fields beside them.
    pub items: Vec<ImportItem>,
}

/// One entry or field of the document.
#[derive(Debug)]
pub struct ImportItem {
    /// The entry's key, or the name of the field. A user or password in it is not shown.
    pub key: String,
    /// What it holds, or why it is passed over.
    pub outcome: ImportOutcome,
}

/// What an item holds, or why it is passed over.
#[derive(Debug)]
pub enum ImportOutcome {
    /// A credential.
    Found(FoundAccount),
    /// Nothing that can become an account.
    Skipped {
        /// Why, for programs.
        reason: SkipReason,
        /// Why and what can be done, for people. Never contains a secret.
        detail: String,
    },
}

/// A credential out of a docker config. `Debug` does not show the password.
#[derive(Debug, Clone)]
pub struct FoundAccount {
    /// What it is for.
    pub scope: RegistryScope,
    /// Whether the key says `http://`.
    pub plain_http: bool,
    /// The user.
    pub username: String,
    /// The password or token.
    pub password: SecretString,
    /// The address, if there is one.
    pub email: Option<String>,
    /// The names of the entry's fields that an account has no place for.
    pub left_out: Vec<String>,
}

/// Why an item is passed over. Fields of the document are called by their own names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum SkipReason {
    /// The credential is in the store of a helper program, not in the document.
    CredsStore,
    /// The credential is with this registry's helper program, not in the document.
    CredHelpers,
    /// The entry holds a token that is to be exchanged for others, which the kubelet cannot use.
    #[serde(rename = "identitytoken")]
    IdentityToken,
    /// The entry holds a bearer token, which neither the kubelet nor podman can use.
    #[serde(rename = "registrytoken")]
    RegistryToken,
    /// Headers that the docker CLI sends; they belong to no registry.
    #[serde(rename = "HttpHeaders")]
    HttpHeaders,
    /// A field that holds nothing to log in with.
    NotACredential,
    /// The entry is empty, or lacks the user or the password.
    Empty,
    /// The entry's `auth`, or another of its fields, cannot be read.
    InvalidEntry,
    /// The key names no registry that an account can be for.
    InvalidRegistry,
    /// Another key of this document means the same registry and holds the same.
    Duplicate,
    /// Another key of this document means the same registry and holds something else.
    Conflict,
}

impl Import {
    /// Judges everything in the document.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let mut items: Vec<_> = config.entries.iter().map(|entry| entry::judge(entry, config)).collect();
        rivals::settle(&mut items);
        items.extend(beside_the_entries(config));
        Self { form: config.form, items }
    }
}

impl ImportItem {
    fn skipped(key: &str, reason: SkipReason, detail: impl Into<String>) -> Self {
        Self { key: key.to_owned(), outcome: ImportOutcome::Skipped { reason, detail: detail.into() } }
    }
}

fn beside_the_entries(config: &Config) -> impl Iterator<Item = ImportItem> {
    let helpers = config.helpers.iter().map(|helper| {
        let detail = format!("the credential is with `docker-credential-{}`, not in this document", helper.name);
        ImportItem::skipped(&shown(&helper.registry), SkipReason::CredHelpers, detail)
    });
    let store = config.store.iter().map(|name| {
        let detail =
            format!("credentials may be in the store of `docker-credential-{name}`, which this document does not hold");
        ImportItem::skipped("credsStore", SkipReason::CredsStore, detail)
    });
    let others = config.others.iter().map(|name| {
        if name.eq_ignore_ascii_case("HttpHeaders") {
            ImportItem::skipped(
                name,
                SkipReason::HttpHeaders,
                "headers belong to no registry; a credential in them is not imported",
            )
        } else {
            ImportItem::skipped(
                name,
                SkipReason::NotACredential,
                "this field holds nothing to log in to a registry with",
            )
        }
    });
    helpers.chain(store).chain(others)
}

#[cfg(test)]
mod tests;
