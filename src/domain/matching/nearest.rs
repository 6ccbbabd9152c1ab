//! The entries that come closest to an image, and why they are not used for it.

use serde::Serialize;
use utoipa::ToSchema;

use super::{Address, ImageName, kubelet::is_label_match};
use crate::domain::{
    docker_config::{Consumer, ScopedAccount, import::shown, key_for},
    registry::RegistryScope,
};

/// How many are shown.
const SHOWN: usize = 3;

/// An entry that is not used for an image, though it looks as if it could be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Nearest {
    /// The entry's key.
    pub key: String,
    /// The account that it comes from, if it comes from one.
    pub account: Option<String>,
    /// Why it is not used, for programs.
    pub mismatch: Mismatch,
    /// Why it is not used, for people.
    pub detail: String,
}

/// Why an entry is not used for an image. The first are the nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Mismatch {
    /// The hosts are equal but for upper and lower case.
    CaseDiffers,
    /// The key means the image's registry, in a spelling that this reader does not know.
    SpellingUnknown,
    /// The hosts are equal, the ports are not.
    PortDiffers,
    /// Host and port are equal, and the image is not under the path.
    PathNotPrefix,
    /// A `*` stands for one part of a host, between two dots, not for none or several.
    GlobOneLabel,
    /// This reader does not know `*`.
    NoWildcards,
    /// The hosts differ in their first part.
    HostDiffers,
}

/// An entry that could be used.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) key: &'a str,
    pub(super) account: Option<&'a str>,
    /// What it is meant for.
    pub(super) meant: Address<'a>,
}

impl<'a> Candidate<'a> {
    pub(super) fn of_key(key: &'a str) -> Self {
        Self { key, account: None, meant: Address::of(key) }
    }

    pub(super) fn of_account(key: &'a str, account: ScopedAccount<'a>) -> Self {
        Self { key, account: Some(account.name), meant: Address::of(account.scope.as_str()) }
    }
}

/// The nearest of the candidates, none of which this reader uses for the image.
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
    let nearest = near.into_iter().take(SHOWN);
    nearest
        .map(|((mismatch, detail), candidate)| Nearest {
            key: shown(candidate.key).into_owned(),
            account: candidate.account.map(str::to_owned),
            mismatch,
            detail,
        })
        .collect()
}

/// Why a reader does not use a key for an image, if the two are near.
pub(super) fn mismatch(consumer: Consumer, key: &str, image: &ImageName) -> Option<(Mismatch, String)> {
    let (entry, wanted) = (Address::of(key), Address::of_image(image));
    if entry.host == wanted.host || entry.is_docker_hub() && image.is_on_docker_hub() {
        return Some(behind_the_host(consumer, &entry, image));
    }
    if entry.host.eq_ignore_ascii_case(wanted.host) {
        let detail = format!("hosts are compared with their case: write `{}`", wanted.host);
        return Some((Mismatch::CaseDiffers, detail));
    }
    if is_wildcard_for(entry.host, wanted.host) {
        return Some(by_wildcard(consumer, &entry, image));
    }
    let detail = || format!("the image is at `{}`, not at `{}`", wanted.host, entry.host);
    let is_sibling = entry.parent().is_some() && entry.parent() == wanted.parent();
    is_sibling.then(|| (Mismatch::HostDiffers, detail()))
}

/// Whether somebody who writes this `*` may think of that host.
fn is_wildcard_for(glob: &str, host: &str) -> bool {
    glob.contains('*') && (is_label_match(glob, host) || glob.strip_prefix("*.") == Some(host))
}

fn by_wildcard(consumer: Consumer, entry: &Address<'_>, image: &ImageName) -> (Mismatch, String) {
    let wanted = Address::of_image(image);
    if !matches!(consumer, Consumer::Kubernetes | Consumer::K8schain) {
        // Newest sources of the docker CLI have `cli/config/internal/hostmatch`; installed ones do not.
        let detail = match consumer {
            Consumer::Docker => format!("{consumer} knows `*` only in its newest releases: name the host"),
            _ => format!("{consumer} does not know `*`: name the host"),
        };
        return (Mismatch::NoWildcards, detail);
    }
    if entry.labels() == wanted.labels() {
        return behind_the_host(consumer, entry, image);
    }
    let detail = format!(
        "`*` stands for exactly one part of a host: `{}` has {} parts, `{}` has {}",
        entry.host,
        entry.labels(),
        wanted.host,
        wanted.labels()
    );
    (Mismatch::GlobOneLabel, detail)
}

/// The hosts match; then it is the port, or the path, or the way in which it is written.
fn behind_the_host(consumer: Consumer, entry: &Address<'_>, image: &ImageName) -> (Mismatch, String) {
    let wanted = Address::of_image(image);
    if entry.port != wanted.port && !entry.is_docker_hub() {
        let detail = format!("the entry has {}, the image has {}", port(entry.port), port(wanted.port));
        return (Mismatch::PortDiffers, detail);
    }
    if !entry.has_below(wanted.path) {
        let detail = format!("`{}` is not under the path `{}`", wanted.path, entry.path);
        return (Mismatch::PathNotPrefix, detail);
    }
    (Mismatch::SpellingUnknown, not_found_so(consumer, entry, &wanted))
}

fn port(port: &str) -> String {
    if port.is_empty() { "no port".to_owned() } else { format!("port {port}") }
}

/// The reader has another key for what is meant.
fn not_found_so(consumer: Consumer, entry: &Address<'_>, wanted: &Address<'_>) -> String {
    let meant = Address { path: entry.path, ..*wanted };
    let scope = RegistryScope::parse(&meant.to_string());
    let known = match &scope {
        // `index.docker.io` is how go-containerregistry spells it.
        Ok(scope) if consumer == Consumer::K8schain && scope.is_docker_hub() && !entry.path.is_empty() => {
            format!("index.docker.io/{}", entry.path)
        }
        Ok(scope) => key_for(consumer.profile(), scope).to_owned(),
        Err(_) => return format!("{consumer} does not find an entry under this key"),
    };
    if wanted.host.starts_with('[') && wanted.port.is_empty() {
        return format!("{consumer} finds an IPv6 address only with its port");
    }
    format!("{consumer} does not find an entry under this key: write `{known}`")
}
