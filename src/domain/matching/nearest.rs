//! Entries that come closest to an image, and why they are not used.

use serde::Serialize;
use utoipa::ToSchema;

use super::{Address, ImageName, kubelet::is_label_match};
use crate::domain::{
    docker_config::{Consumer, ScopedAccount, import::redact_key, key_for},
    registry::RegistryScope,
};

/// Maximum number of entries in a result.
const MAX_NEAREST: usize = 3;

/// An entry that is not used for an image although it nearly matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Nearest {
    /// Key of the entry.
    pub key: String,
    /// Account of the entry, if any.
    pub account: Option<String>,
    /// Reason, for programs.
    pub mismatch: Mismatch,
    /// Reason, for people.
    pub detail: String,
}

/// Reason why an entry is not used for an image. Ordered from near to far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Mismatch {
    /// The hosts differ only in case.
    CaseDiffers,
    /// The key names the image's registry in a spelling that this consumer does not match.
    SpellingUnknown,
    /// The hosts are equal, the ports differ.
    PortDiffers,
    /// Host and port are equal, but the image is not below the path.
    PathNotPrefix,
    /// A `*` matches exactly one label of a host.
    GlobOneLabel,
    /// This consumer does not support `*`.
    NoWildcards,
    /// The hosts differ in their first label.
    HostDiffers,
}

/// An entry that could match.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) key: &'a str,
    pub(super) account: Option<&'a str>,
    /// Intended meaning.
    pub(super) scope: Address<'a>,
}

impl<'a> Candidate<'a> {
    pub(super) fn of_key(key: &'a str) -> Self {
        Self { key, account: None, scope: Address::of(key) }
    }

    pub(super) fn of_account(key: &'a str, account: ScopedAccount<'a>) -> Self {
        Self { key, account: Some(account.name), scope: Address::of(account.scope.as_str()) }
    }
}

/// Returns the nearest candidates. None of them matches the image for this consumer.
pub(super) fn nearest(consumer: Consumer, candidates: &[Candidate<'_>], image: &ImageName) -> Vec<Nearest> {
    let name = image.to_string();
    let mut near: Vec<_> = candidates
        .iter()
        .filter_map(|candidate| Some((mismatch(consumer, candidate.key, image)?, candidate)))
        .collect();
    near.sort_by_cached_key(|((mismatch, _), candidate)| {
        let in_common = candidate.key.bytes().zip(name.bytes()).take_while(|(one, other)| one == other);
        (*mismatch, usize::MAX - in_common.count(), candidate.key)
    });
    let nearest = near.into_iter().take(MAX_NEAREST);
    nearest
        .map(|((mismatch, detail), candidate)| Nearest {
            key: redact_key(candidate.key).into_owned(),
            account: candidate.account.map(str::to_owned),
            mismatch,
            detail,
        })
        .collect()
}

/// Returns why a consumer does not use a key for an image, if the two are near.
pub(super) fn mismatch(consumer: Consumer, key: &str, image: &ImageName) -> Option<(Mismatch, String)> {
    let (entry, wanted) = (Address::of(key), Address::of_image(image));
    if entry.host == wanted.host || entry.is_docker_hub() && image.is_on_docker_hub() {
        return Some(mismatch_behind_host(consumer, &entry, image));
    }
    if entry.host.eq_ignore_ascii_case(wanted.host) {
        let detail = format!("hosts are compared case-sensitively: write `{}`", wanted.host);
        return Some((Mismatch::CaseDiffers, detail));
    }
    if is_wildcard_for(entry.host, wanted.host) {
        return Some(by_wildcard(consumer, &entry, image));
    }
    let detail = || format!("the image is at `{}`, not at `{}`", wanted.host, entry.host);
    let is_sibling = entry.parent().is_some() && entry.parent() == wanted.parent();
    is_sibling.then(|| (Mismatch::HostDiffers, detail()))
}

/// Whether the author of this wildcard may have had the host in mind.
fn is_wildcard_for(glob: &str, host: &str) -> bool {
    glob.contains('*') && (is_label_match(glob, host) || glob.strip_prefix("*.") == Some(host))
}

fn by_wildcard(consumer: Consumer, entry: &Address<'_>, image: &ImageName) -> (Mismatch, String) {
    let wanted = Address::of_image(image);
    if !matches!(consumer, Consumer::Kubernetes | Consumer::K8schain) {
        // Current sources of the docker CLI have `cli/config/internal/hostmatch`; installed
        // releases do not.
        let detail = match consumer {
            Consumer::Docker => format!("{consumer} supports `*` only in its newest releases: name the host"),
            _ => format!("{consumer} does not support `*`: name the host"),
        };
        return (Mismatch::NoWildcards, detail);
    }
    if entry.labels() == wanted.labels() {
        return mismatch_behind_host(consumer, entry, image);
    }
    let detail = format!(
        "`*` matches exactly one label of a host: `{}` has {} labels, `{}` has {}",
        entry.host,
        entry.labels(),
        wanted.host,
        wanted.labels()
    );
    (Mismatch::GlobOneLabel, detail)
}

/// The hosts match, so the port, the path or the spelling differs.
fn mismatch_behind_host(consumer: Consumer, entry: &Address<'_>, image: &ImageName) -> (Mismatch, String) {
    let wanted = Address::of_image(image);
    if entry.port != wanted.port && !entry.is_docker_hub() {
        let detail = format!("the entry has {}, the image has {}", port(entry.port), port(wanted.port));
        return (Mismatch::PortDiffers, detail);
    }
    if !entry.has_below(wanted.path) {
        let detail = format!("`{}` is not below the path `{}`", wanted.path, entry.path);
        return (Mismatch::PathNotPrefix, detail);
    }
    (Mismatch::SpellingUnknown, unknown_spelling(consumer, entry, &wanted))
}

fn port(port: &str) -> String {
    if port.is_empty() { "no port".to_owned() } else { format!("port {port}") }
}

/// Names the key that this consumer finds for the same scope.
fn unknown_spelling(consumer: Consumer, entry: &Address<'_>, wanted: &Address<'_>) -> String {
    let scope = Address { path: entry.path, ..*wanted };
    let scope = RegistryScope::parse(&scope.to_string());
    let expected = match &scope {
        // go-containerregistry's spelling.
        Ok(scope) if consumer == Consumer::K8schain && scope.is_docker_hub() && !entry.path.is_empty() => {
            format!("index.docker.io/{}", entry.path)
        }
        Ok(scope) => key_for(consumer.profile(), scope).to_owned(),
        Err(_) => return format!("{consumer} does not find an entry under this key"),
    };
    if wanted.host.starts_with('[') && wanted.port.is_empty() {
        return format!("{consumer} finds an IPv6 address only with its port");
    }
    format!("{consumer} does not find an entry under this key: write `{expected}`")
}
