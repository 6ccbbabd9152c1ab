//! What a reader will do otherwise than an account says.

use serde::Serialize;
use utoipa::ToSchema;

use super::{Credential, Profile};
use crate::domain::registry::RegistryScope;

/// Something that works otherwise than it looks. Never contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Warning {
    /// What it is, for programs.
    pub code: WarningCode,
    /// The account that it is about, where there is one.
    pub account: Option<String>,
    /// The key in the document that it is about, where there is one.
    pub key: Option<String>,
    /// What it is and what can be done, for people.
    pub detail: String,
}

/// The kinds of warnings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum WarningCode {
    /// Because of this entry a reader cannot use the whole document.
    Refused,
    /// The key names no registry that an image can be in.
    InvalidKey,
    /// No reader ever uses the entry, or not the one that the document is for.
    NeverMatches,
    /// Some readers never use the entry.
    MissedBySome,
    /// A reader uses the entry for more images than it says.
    MatchesMore,
    /// Several entries are for one registry, and chance decides which one a reader uses.
    Ambiguous,
    /// The entry holds nothing that a reader can log in with.
    HoldsNothing,
    /// The entry's `auth` says something else than its `username` and `password`.
    AuthWins,
    /// A helper program, not the document, holds the credential.
    HelperFirst,
    /// The Secret's type is not that of an image pull secret.
    WrongSecretType,
}

impl Warning {
    /// About one key, of one account if there is one.
    pub(in crate::domain) fn new(
        code: WarningCode,
        account: Option<&str>,
        key: &str,
        detail: impl Into<String>,
    ) -> Self {
        Self { code, account: account.map(str::to_owned), key: Some(key.to_owned()), detail: detail.into() }
    }

    /// About the document.
    pub(in crate::domain) fn of_all(code: WarningCode, detail: impl Into<String>) -> Self {
        Self { code, account: None, key: None, detail: detail.into() }
    }
}

/// Warns about entries that the profile's reader will not use exactly as their accounts say.
pub(super) fn about(profile: Profile, entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
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

/// The docker CLI has one credential for a host (`cli/config/credentials/file_store.go`).
fn paths_cut(entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
    let cut = entries.iter().filter(|(_, credential)| credential.scope.path().is_some());
    cut.map(|(key, credential)| {
        Warning::new(WarningCode::MatchesMore, Some(credential.account), key, format!(
            "the docker CLI knows only hosts: it will send this password for every image of `{}`, not only for `{}`",
            credential.scope.authority(),
            credential.scope,
        ))
    })
    .collect()
}

/// The kubelet compares hosts with `filepath.Match`, which reads the brackets of an IPv6 address as a set of
/// characters. With a port they are taken off before (`pkg/credentialprovider/keyring.go`, `splitURL`).
fn unreachable_addresses(entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
    let bare = entries.iter().filter(|(_, credential)| is_bare_ipv6(credential.scope));
    bare.map(|(key, credential)| {
        Warning::new(
            WarningCode::NeverMatches,
            Some(credential.account),
            key,
            "the kubelet never finds an IPv6 address without a port: name the registry by host name or with a port",
        )
    })
    .collect()
}

fn is_bare_ipv6(scope: &RegistryScope) -> bool {
    scope.host().starts_with('[') && scope.port().is_none()
}

/// The kubelet compares paths as plain strings (`pkg/credentialprovider/keyring.go`, `urlsMatch`). That is worth a word
/// only where another account is for what is matched too much: the kubelet then tries both, the longer key first.
fn overlapping_prefixes(entries: &[(&str, &Credential<'_>)]) -> Vec<Warning> {
    let mut warnings = Vec::new();
    for (at, (key, credential)) in entries.iter().enumerate() {
        if credential.scope.path().is_none() {
            continue;
        }
        // Sorted keys: whatever starts with this one follows it at once.
        let mut longer = entries[at + 1..].iter().take_while(|(other, _)| other.starts_with(key));
        if let Some((other, _)) = longer.find(|(other, _)| !other[key.len()..].starts_with('/')) {
            warnings.push(Warning::new(WarningCode::MatchesMore, Some(credential.account), key, format!(
                "the kubelet compares paths as plain text: after the entry `{other}` it tries this one too for the same images",
            )));
        }
    }
    warnings
}
