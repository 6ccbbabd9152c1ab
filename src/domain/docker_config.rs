//! Docker configs: documents from which programs read registry credentials.
//!
//! Consumers disagree about accepted fields and about the keys they look up, so no single document
//! fits all. [`render`] writes the document for a [`Profile`], under the keys that its consumer
//! finds, and refuses accounts that the document cannot express.
//!
//! Rendering is deterministic: the order of the accounts does not matter.

pub(in crate::domain) mod auth;
mod consumer;
mod document;
mod fitness;
pub mod import;
mod key;
pub mod parse;
mod profile;
pub mod reading;
mod warning;
mod zeroizing;

use std::collections::HashSet;

use secrecy::SecretString;

pub use self::{
    consumer::Consumer,
    key::{DOCKER_HUB_KEY, key_for},
    profile::Profile,
    warning::{Warning, WarningCode},
};
use super::registry::RegistryScope;

/// An account with its password in plain text, ready to render.
#[derive(Debug, Clone, Copy)]
pub struct Credential<'a> {
    /// Name of the account, for errors and warnings.
    pub account: &'a str,
    /// Registry, or part of one, that the account covers.
    pub scope: &'a RegistryScope,
    /// User name at the registry.
    pub username: &'a str,
    /// The password or token.
    pub password: &'a SecretString,
    /// Address that `kubectl` also writes into the document. No consumer uses it.
    pub email: Option<&'a str>,
}

/// An account without its credential, to look up keys.
#[derive(Debug, Clone, Copy)]
pub struct ScopedAccount<'a> {
    /// Name of the account.
    pub name: &'a str,
    /// Registry, or part of one, that the account covers.
    pub scope: &'a RegistryScope,
}

/// A value that belongs under the key of a scope.
pub(in crate::domain) trait Scoped<'a> {
    /// Name of the account.
    fn name(&self) -> &'a str;
    /// Scope of the account.
    fn scope(&self) -> &'a RegistryScope;
}

impl<'a> Scoped<'a> for Credential<'a> {
    fn name(&self) -> &'a str {
        self.account
    }

    fn scope(&self) -> &'a RegistryScope {
        self.scope
    }
}

impl<'a> Scoped<'a> for ScopedAccount<'a> {
    fn name(&self) -> &'a str {
        self.name
    }

    fn scope(&self) -> &'a RegistryScope {
        self.scope
    }
}

/// A rendered document. `Debug` omits the document.
#[derive(Debug)]
pub struct RenderedConfig {
    /// Compact JSON on one line, keys sorted.
    pub document: SecretString,
    /// Keys in the document, sorted.
    pub keys: Vec<String>,
    /// Ways in which the consumer deviates from the accounts.
    pub warnings: Vec<Warning>,
}

/// Reason for refusing to render. Never contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// Two accounts have the same scope, and a document holds each key once.
    #[error(
        "the accounts `{}` and `{}` use the same key `{key}`, and a document holds each key once: leave one of them out",
        accounts[0], accounts[1]
    )]
    KeyCollision {
        /// Key in the document.
        key: String,
        /// Names of the two accounts, sorted.
        accounts: [String; 2],
    },
    /// The consumer cannot express these accounts.
    #[error("{detail}")]
    Unsupported {
        /// Names of the accounts, sorted.
        accounts: Vec<String>,
        /// Reason and remedy.
        detail: String,
    },
}

/// Renders the document for a profile.
///
/// # Errors
///
/// [`RenderError::KeyCollision`] if two accounts have the same scope; [`RenderError::Unsupported`]
/// if the consumer would use a credential for other images, or would read back a different one.
pub fn render(profile: Profile, credentials: &[Credential<'_>]) -> Result<RenderedConfig, RenderError> {
    for credential in credentials {
        fitness::check(profile, credential)?;
    }
    let entries = claim_keys(profile, credentials)?;
    Ok(RenderedConfig {
        document: document::write(profile, &entries)?,
        warnings: warning::warnings_for(profile, &entries),
        keys: entries.into_iter().map(|(key, _)| key.to_owned()).collect(),
    })
}

/// Refuses accounts of which two have the same key.
///
/// # Errors
///
/// As [`render`].
pub fn check_keys(profile: Profile, accounts: &[ScopedAccount<'_>]) -> Result<(), RenderError> {
    claim_keys(profile, accounts).map(drop)
}

/// Splits accounts into those that fit into one document, and those whose key an earlier account
/// has.
#[must_use]
pub fn split_collisions<T>(
    profile: Profile,
    accounts: Vec<T>,
    scope: impl Fn(&T) -> &RegistryScope,
) -> (Vec<T>, Vec<T>) {
    let mut keys = HashSet::new();
    accounts.into_iter().partition(|account| keys.insert(key_for(profile, scope(account)).to_owned()))
}

/// Assigns each account the key where the profile's consumer finds it. Sorted by key.
pub(in crate::domain) fn claim_keys<'a, 'b, T: Scoped<'a>>(
    profile: Profile,
    accounts: &'b [T],
) -> Result<Vec<(&'a str, &'b T)>, RenderError> {
    let claims = accounts.iter().map(|account| (key_for(profile, account.scope()), account));
    let mut entries: Vec<_> = claims.collect();
    entries.sort_by_key(|(key, _)| *key);
    for pair in entries.windows(2) {
        if let [(key, one), (same, other)] = pair
            && key == same
        {
            return Err(collision(profile, *one, *other));
        }
    }
    if let Some(second) = key::second_docker_hub_key(profile, &entries) {
        entries.insert(0, second);
        entries.sort_by_key(|(key, _)| *key);
    }
    Ok(entries)
}

/// Two accounts under one key: equal scopes, or scopes that this consumer cannot distinguish.
fn collision<'a, T: Scoped<'a>>(profile: Profile, one: &T, other: &T) -> RenderError {
    let mut accounts = [one.name().to_owned(), other.name().to_owned()];
    accounts.sort_unstable();
    if one.scope() == other.scope() {
        let key = key_for(profile, one.scope()).to_owned();
        return RenderError::KeyCollision { key, accounts };
    }
    let [first, second] = &accounts;
    RenderError::Unsupported {
        detail: format!(
            "the accounts `{first}` and `{second}` are for different parts of `{}`, but the docker CLI matches only hosts and \
             would send one's password for the other's images: make a document for each of them, or use the profile \
             `podman` or `kubernetes`",
            one.scope().authority()
        ),
        accounts: accounts.into(),
    }
}

#[cfg(test)]
mod tests;
