//! Warnings about entries that do not do what they look like.
//!
//! The readers' own look-ups are asked about images that a key seems to be meant for, and about others.

mod documents;
mod entries;
mod probes;

pub use self::documents::lint_config;
pub(super) use self::{documents::lint_document, entries::lint_entry};
use crate::domain::docker_config::{Profile, ScopedAccount, Warning, key_for};

/// Warns about what readers will do otherwise than the account says, as soon as it is made.
#[must_use]
pub fn lint_account(account: ScopedAccount<'_>) -> Vec<Warning> {
    let key = key_for(Profile::Kubernetes, account.scope);
    let about_it = |warning: Warning| Warning { account: Some(account.name.to_owned()), ..warning };
    probes::lint_key(key).into_iter().map(about_it).collect()
}

#[cfg(test)]
mod tests;
