//! The document that a program reads to log in to registries, rendered for that program.
//!
//! The programs disagree about which fields they accept and under which key they look, so there is no one document for
//! all: a [`Profile`] names the reader, [`render`] writes what that reader accepts under the key that it finds, and
//! refuses, with the reason, what it could not be told. The same accounts give the same bytes, whatever their order.

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
mod wiping;

use secrecy::SecretString;

pub use self::{
    consumer::Consumer,
    key::{DOCKER_HUB_KEY, key_for},
    profile::Profile,
    warning::{Warning, WarningCode},
};
use super::registry::RegistryScope;

/// One account, opened, on its way into a document.
#[derive(Debug, Clone, Copy)]
pub struct Credential<'a> {
    /// The account's name: collisions, warnings and explanations call it by this.
    pub account: &'a str,
    /// Which registry, or part of one, it is for.
    pub scope: &'a RegistryScope,
    /// The user that the registry knows.
    pub username: &'a str,
    /// The password or token.
    pub password: &'a SecretString,
    /// An address that `kubectl` would write into the document too. No reader uses it.
    pub email: Option<&'a str>,
}

/// An account without its credential: enough to know where it goes.
#[derive(Debug, Clone, Copy)]
pub struct ScopedAccount<'a> {
    /// Its name.
    pub name: &'a str,
    /// Which registry, or part of one, it is for.
    pub scope: &'a RegistryScope,
}

/// Something that goes under the key of its scope.
pub(in crate::domain) trait Scoped<'a> {
    /// The account's name.
    fn name(&self) -> &'a str;
    /// Its scope.
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

/// A finished document. `Debug` does not show it.
#[derive(Debug)]
pub struct RenderedConfig {
    /// Compact JSON on one line, keys sorted.
    pub document: SecretString,
    /// The keys in the document, sorted.
    pub keys: Vec<String>,
    /// What the reader will do otherwise than the accounts say.
    pub warnings: Vec<Warning>,
}

/// Why no document was made. Never contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// Two accounts are for the same scope, and a document has room for one.
    #[error(
        "the accounts `{}` and `{}` both claim the key `{key}`, which a document has room for once: leave one of them out",
        accounts[0], accounts[1]
    )]
    KeyCollision {
        /// The key in the document.
        key: String,
        /// The names of the two accounts, sorted.
        accounts: [String; 2],
    },
    /// The reader cannot be told what these accounts mean.
    #[error("{detail}")]
    Unsupported {
        /// The names of the accounts, sorted.
        accounts: Vec<String>,
        /// Why, and what to do.
        detail: String,
    },
}

/// Renders the document that the profile's reader understands.
///
/// # Errors
///
/// [`RenderError::KeyCollision`] if two accounts have one scope; [`RenderError::Unsupported`] if the reader would use a
/// credential where it does not belong, or would not read it back as it is.
pub fn render(profile: Profile, credentials: &[Credential<'_>]) -> Result<RenderedConfig, RenderError> {
    for credential in credentials {
        fitness::check(profile, credential)?;
    }
    let entries = claim_keys(profile, credentials)?;
    Ok(RenderedConfig {
        document: document::write(profile, &entries)?,
        warnings: warning::about(profile, &entries),
        keys: entries.into_iter().map(|(key, _)| key.to_owned()).collect(),
    })
}

/// Puts each account under the key where the profile's reader finds it, sorted by key.
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
    if let Some(second) = key::second_for_docker_hub(profile, &entries) {
        entries.insert(0, second);
        entries.sort_by_key(|(key, _)| *key);
    }
    Ok(entries)
}

/// Two accounts under one key: equal scopes, or scopes that this reader cannot tell apart.
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
            "the accounts `{first}` and `{second}` are for different parts of `{}`, but the docker CLI knows only hosts and \
             would send one's password for the other's images: make a document for each of them, or use the profile \
             `podman` or `kubernetes`",
            one.scope().authority()
        ),
        accounts: accounts.into(),
    }
}

#[cfg(test)]
mod tests;
