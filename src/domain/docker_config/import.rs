//! Converts an existing docker config into accounts.
//!
//! Every entry and every other field yields one [`ImportItem`], so nothing is dropped silently.

mod duplicates;
mod entry;

use secrecy::SecretString;
use serde::Serialize;
use utoipa::ToSchema;

pub(in crate::domain) use self::entry::redact_key;
use super::parse::{Config, NoConfig, Part};
use crate::domain::registry::RegistryScope;

/// Result of importing docker configs.
#[derive(Debug)]
pub struct Import {
    /// Entries in document order, then the other fields, then objects without a docker config.
    pub items: Vec<ImportItem>,
}

/// One entry or field of the document.
#[derive(Debug)]
pub struct ImportItem {
    /// `NAMESPACE/NAME` of the Secret that contains the item, if it is known.
    pub source: Option<String>,
    /// Key of the entry, name of the field, or name of an object without a docker config. A user or
    /// password in the key is redacted.
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
    /// The object of a list is not an image pull secret.
    NotAPullSecret,
    /// The request names other registries.
    NotSelected,
    /// The registry does not accept the login, or cannot be asked.
    VerificationFailed,
    /// The account has a source, from which its login comes.
    Minted,
}

impl Import {
    /// Imports every entry and field of a document.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self::of_configs(&[config])
    }

    /// Imports every entry and field of all documents, and names the objects without one.
    #[must_use]
    pub fn of_parts(parts: &[Part]) -> Self {
        let configs: Vec<&Config> = parts.iter().filter_map(Part::config).collect();
        let mut import = Self::of_configs(&configs);
        import.items.extend(parts.iter().filter_map(|part| match part {
            Part::Config(_) => None,
            Part::NoConfig { source, reason } => Some(without_config(source, reason)),
        }));
        import
    }

    fn of_configs(configs: &[&Config]) -> Self {
        let entries = configs.iter().flat_map(|config| {
            config.entries.iter().map(move |entry| entry::import_entry(entry, config).in_source(config))
        });
        let mut items: Vec<_> = entries.collect();
        duplicates::skip_duplicates(&mut items);
        items.extend(configs.iter().flat_map(|config| other_fields(config).map(|item| item.in_source(config))));
        Self { items }
    }
}

impl ImportItem {
    fn skipped(key: &str, reason: SkipReason, detail: impl Into<String>) -> Self {
        let outcome = ImportOutcome::Skipped { reason, detail: detail.into() };
        Self { source: None, key: key.to_owned(), outcome }
    }

    fn in_source(self, config: &Config) -> Self {
        Self { source: config.source.clone(), ..self }
    }
}

fn without_config(source: &str, reason: &NoConfig) -> ImportItem {
    let skip_reason = match reason {
        NoConfig::OtherObject | NoConfig::OtherSecret => SkipReason::NotAPullSecret,
        NoConfig::Invalid(_) => SkipReason::InvalidEntry,
    };
    ImportItem { source: Some(source.to_owned()), ..ImportItem::skipped(source, skip_reason, reason.to_string()) }
}

/// Whether a shell reads the text as one word.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".:/_-".contains(&byte))
}

/// Explains that a helper program stores the credential of a registry, and what to do.
///
/// Both names come from the document: the command is printed only if a shell reads it as it is
/// meant.
fn helper_detail(program: &str, registry: &str) -> String {
    /// Programs that make logins for hours, from the identity of a cloud account.
    const SHORT_LIVED: [&str; 6] = ["acr", "acr-env", "acr-login", "ecr-login", "gcloud", "gcr"];
    let stored = format!("`docker-credential-{program}` stores the credential, not this document");
    if SHORT_LIVED.contains(&program) {
        format!(
            "{stored}, and its logins end after hours: create a long-lived token at the registry, and an account with it"
        )
    } else if is_plain(program) && is_plain(registry) {
        format!(
            "{stored}: print the login with `echo {registry} | docker-credential-{program} get` on the machine of the document, \
             and create an account with it"
        )
    } else {
        format!(
            "{stored}: print the login with that program on the machine of the document, and create an account with it"
        )
    }
}

fn other_fields(config: &Config) -> impl Iterator<Item = ImportItem> {
    let helpers = config.helpers.iter().map(|helper| {
        let detail = helper_detail(&helper.name, &helper.registry);
        ImportItem::skipped(&redact_key(&helper.registry), SkipReason::CredHelpers, detail)
    });
    let store = config.store.iter().map(|name| {
        let stored =
            format!("`docker-credential-{name}` may store more credentials, which this document does not contain");
        let detail = if is_plain(name) {
            format!("{stored}: `docker-credential-{name} list` prints their registries")
        } else {
            stored
        };
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
