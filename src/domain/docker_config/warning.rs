//! Warnings about consumers that deviate from an account.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Credential, Profile};
use crate::domain::registry::RegistryScope;

/// A consumer's deviation from what a document or account says. Never contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Warning {
    /// Kind of warning, for programs.
    pub code: WarningCode,
    /// Account concerned, if any.
    pub account: Option<String>,
    /// Key concerned, if any.
    pub key: Option<String>,
    /// Description and remedy, for people.
    pub detail: String,
}

/// Kinds of warnings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum WarningCode {
    /// The entry makes the complete document unusable for a consumer.
    Refused,
    /// The key names no valid registry.
    InvalidKey,
    /// No consumer uses the entry, or not the document's consumer.
    NeverMatches,
    /// Some consumers do not use the entry.
    MissedBySome,
    /// A consumer uses the entry for more images than intended.
    MatchesMore,
    /// Several entries match one registry, and the consumer's choice is random.
    Ambiguous,
    /// Secrets of direct delivery contain an earlier login of the account.
    DirectCopies,
    /// A consumer finds no credential in the entry.
    HoldsNothing,
    /// The entry's `auth` differs from its `username` and `password`.
    AuthWins,
    /// A helper program stores the credential, not the document.
    HelperFirst,
    /// The Secret does not have the type of an image pull secret.
    WrongSecretType,
    /// The stated expiry of the password has passed.
    Expired,
    /// The password ends with white space.
    PasswordEndsWithWhitespace,
    /// An older account has the same key, so this one is not in the document.
    KeyCollision,
    /// No granted account is for the image.
    NothingMatches,
    /// The account selector of a pull secret matches no registry account.
    SelectsNoAccount,
    /// A namespace selector of a pull secret matches no namespace of the cluster.
    SelectsNoNamespace,
    /// The credential of a cluster ends within 30 days.
    CredentialExpires,
    /// The credential of a cluster, or the minted login of an account, has ended.
    CredentialExpired,
    /// The minted login of an account ends, and this copy of it is not replaced.
    CredentialShortLived,
    /// The token of a cluster could not be renewed.
    RenewalFailing,
}

impl Warning {
    /// Creates a warning about a key.
    pub(in crate::domain) fn new(
        code: WarningCode,
        account: Option<&str>,
        key: &str,
        detail: impl Into<String>,
    ) -> Self {
        Self { code, account: account.map(str::to_owned), key: Some(key.to_owned()), detail: detail.into() }
    }

    /// Creates a warning about an account whose stated expiry has passed.
    #[must_use]
    pub fn expired(account: &str) -> Self {
        let detail = "`expiresAt` is in the past: rotate the password, and set the expiry of the new one, or null if it \
                      does not expire";
        Self::of_login(WarningCode::Expired, account, detail)
    }

    /// Warns about a password that ends with white space.
    #[must_use]
    pub fn of_whitespace(account: Option<&str>, key: &str) -> Self {
        let detail = "the password ends with white space, such as the newline that `echo` adds: unless that is part of it, store \
                      it again without (`printf %s`)";
        Self::new(WarningCode::PasswordEndsWithWhitespace, account, key, detail)
    }

    /// Warns about a minted login that has ended.
    #[must_use]
    pub fn of_expired_login(account: &str) -> Self {
        let detail = "the minted login has expired and could not be replaced: see `mint.lastError` of the account";
        Self::of_login(WarningCode::CredentialExpired, account, detail)
    }

    /// Warns about a copy of a minted login, which is not replaced when the login ends.
    #[must_use]
    pub fn of_short_lived_login(account: &str, valid_until: DateTime<Utc>) -> Self {
        let end = valid_until.to_rfc3339_opts(SecondsFormat::Secs, true);
        let detail = format!(
            "the minted login ends at {end}, and this copy of it is not replaced: request it again before, or declare a \
             pull secret, which follows"
        );
        Self::of_login(WarningCode::CredentialShortLived, account, detail)
    }

    fn of_login(code: WarningCode, account: &str, detail: impl Into<String>) -> Self {
        Self { code, account: Some(account.to_owned()), key: None, detail: detail.into() }
    }

    /// Creates a warning about the document.
    pub(in crate::domain) fn of_all(code: WarningCode, detail: impl Into<String>) -> Self {
        Self { code, account: None, key: None, detail: detail.into() }
    }
}

impl Warning {
    /// Warns that an account selector matches nothing.
    #[must_use]
    pub fn selects_no_account() -> Self {
        let detail = "`accountSelector` matches no registry account: compare its labels with those of the accounts. \
                      No Secret is written before an account matches";
        Self::of_all(WarningCode::SelectsNoAccount, detail)
    }

    /// Warns that the namespace selector of `targets[place]` matches nothing in a cluster.
    #[must_use]
    pub fn selects_no_namespace(place: usize, cluster: &str) -> Self {
        let detail = format!(
            "`targets[{place}].namespaceSelector` matches no namespace of the cluster `{cluster}`: compare its labels \
             with those of the namespaces"
        );
        Self::of_all(WarningCode::SelectsNoNamespace, detail)
    }
}

/// Warns about entries that the profile's consumer uses differently from their accounts.
pub(super) fn warnings_for(profile: Profile, entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
    match profile {
        Profile::Docker | Profile::DockerAuthConfig => paths_cut(entries),
        Profile::Kubernetes | Profile::Dockercfg => {
            let mut warnings = unreachable_addresses(entries);
            warnings.extend(overlapping_prefixes(entries));
            warnings
        }
        Profile::Podman => Vec::new(),
    }
}

/// The docker CLI uses one credential per host (`cli/config/credentials/file_store.go`).
fn paths_cut(entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
    let cut = entries.iter().filter(|(_, credential)| credential.scope.path().is_some());
    cut.map(|(key, credential)| {
        Warning::new(WarningCode::MatchesMore, Some(credential.account), key, format!(
            "the docker CLI matches only hosts: it will send this password for every image of `{}`, not only for `{}`",
            credential.scope.authority(),
            credential.scope,
        ))
    })
    .collect()
}

/// The kubelet compares hosts with `filepath.Match`, where the brackets of an IPv6 address are a
/// character class. With a port, it strips them first (`pkg/credentialprovider/keyring.go`,
/// `splitURL`).
fn unreachable_addresses(entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
    let bare = entries.iter().filter(|(_, credential)| is_bare_ipv6(credential.scope));
    bare.map(|(key, credential)| {
        Warning::new(
            WarningCode::NeverMatches,
            Some(credential.account),
            key,
            "the kubelet never matches an IPv6 address without a port: use a host name, or add the port",
        )
    })
    .collect()
}

fn is_bare_ipv6(scope: &RegistryScope) -> bool {
    scope.host().starts_with('[') && scope.port().is_none()
}

/// The kubelet compares paths as plain strings (`pkg/credentialprovider/keyring.go`, `urlsMatch`).
///
/// Warns only if another account covers the images matched in excess: the kubelet then tries both,
/// the longer key first.
fn overlapping_prefixes(entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
    let mut warnings = Vec::new();
    for (at, (key, credential)) in entries.iter().enumerate() {
        if credential.scope.path().is_none() {
            continue;
        }
        // Keys are sorted: those with this prefix follow directly.
        let mut longer = entries[at + 1..].iter().take_while(|(other, _)| other.starts_with(key));
        if let Some((other, _)) = longer.find(|(other, _)| !other[key.len()..].starts_with('/')) {
            warnings.push(Warning::new(WarningCode::MatchesMore, Some(credential.account), key, format!(
                "the kubelet compares paths as plain text: it also tries this entry after `{other}` for the same images",
            )));
        }
    }
    warnings
}
