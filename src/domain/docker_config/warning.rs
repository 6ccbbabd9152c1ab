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
    /// A reader uses the entry for more images than it says.
    MatchesMore,
    /// A reader never uses the entry.
    NeverMatches,
}

/// Warns about entries that the profile's reader will not use exactly as their accounts say.
pub(super) fn about(profile: Profile, entries: &[(&str, Credential<'_>)]) -> Vec<Warning> {
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
fn paths_cut(entries: &[(&str, Credential<'_>)]) -> Vec<Warning> {
    let cut = entries.iter().filter(|(_, credential)| credential.scope.path().is_some());
    cut.map(|(key, credential)| {
        warn(WarningCode::MatchesMore, key, credential.account, format!(
            "the docker CLI knows only hosts: it will send this password for every image of `{}`, not only for `{}`",
            credential.scope.authority(),
            credential.scope,
        ))
    })
    .collect()
}

/// The kubelet compares hosts with `filepath.Match`, which reads the brackets of an IPv6 address as a set of characters. With a port
/// they are taken off before (`pkg/credentialprovider/keyring.go`, `splitURL`).
fn unreachable_addresses(entries: &[(&str, Credential<'_>)]) -> Vec<Warning> {
    let bare = entries.iter().filter(|(_, credential)| is_bare_ipv6(credential.scope));
    bare.map(|(key, credential)| {
        warn(
            WarningCode::NeverMatches,
            key,
            credential.account,
            "the kubelet never finds an IPv6 address without a port: name the registry by a host name, or with its port".to_owned(),
        )
    })
    .collect()
}

fn is_bare_ipv6(scope: &RegistryScope) -> bool {
    scope.host().starts_with('[') && scope.port().is_none()
}

/// The kubelet compares paths as plain strings (`pkg/credentialprovider/keyring.go`, `urlsMatch`). That is worth a word only where
/// another account is for what is matched too much: the kubelet then tries both, the longer key first.
fn overlapping_prefixes(entries: &[(&str, Credential<'_>)]) -> Vec<Warning> {
    let mut warnings = Vec::new();
    for (at, (key, credential)) in entries.iter().enumerate() {
        // Sorted keys: whatever starts with this one follows it at once.
        let longer = entries[at + 1..].iter().take_while(|(other, _)| other.starts_with(key));
        let is_caught = |other: &str| credential.scope.path().is_some() && !other[key.len()..].starts_with('/');
        if let Some((other, _)) = longer.clone().find(|(other, _)| is_caught(other)) {
            warnings.push(warn(WarningCode::MatchesMore, key, credential.account, format!(
                "the kubelet compares paths as plain text: after the entry `{other}` it will try this one too for the same images",
            )));
        }
    }
    warnings
}

fn warn(code: WarningCode, key: &str, account: &str, detail: String) -> Warning {
    Warning { code, account: Some(account.to_owned()), key: Some(key.to_owned()), detail }
}
