//! Warnings about entries that behave differently from their appearance.
//!
//! Applies the consumers' lookups to images that a key seems to cover, and to others.

mod documents;
mod entries;
mod probes;

pub use self::documents::lint_config;
pub(super) use self::{documents::lint_document, entries::lint_entry, probes::lint_host_without_dot};
use crate::domain::docker_config::{Profile, ScopedAccount, Warning, key_for};

/// Warns a new account's owner about consumers that deviate from it.
#[must_use]
pub fn lint_account(account: ScopedAccount<'_>) -> Vec<Warning> {
    let key = key_for(Profile::Kubernetes, account.scope);
    let with_account = |warning: Warning| Warning { account: Some(account.name.to_owned()), ..warning };
    probes::lint_key(key).into_iter().map(with_account).collect()
}

#[cfg(test)]
mod tests;
