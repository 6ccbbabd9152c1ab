//! Entries of several Secrets that the kubelet uses for an image.

use super::{
    Address, Consumer, ImageName, Mismatch, kubelet,
    nearest::{Candidate, nearest},
};

/// Maximum number of nearest entries.
const NEAREST_MAX: usize = 3;

/// Entry of a Secret, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullEntry {
    /// Index of the Secret.
    pub secret: usize,
    /// Index of the entry in the Secret.
    pub entry: usize,
}

/// Whether a key names the registry of an image that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressed {
    /// It names the registry.
    Exactly,
    /// A wildcard stands for the registry.
    ByWildcard,
    /// It names Docker Hub, which the kubelet falls back to for a host without a dot.
    Elsewhere,
}

/// Returns the entries that the kubelet tries for an image, in its order
/// (`pkg/credentialprovider/secrets/secrets.go`, `MakeDockerKeyring`; `keyring.go`, `Add`): by key,
/// and for equal keys in the order of the Secrets.
///
/// `keys` has the keys of each Secret.
#[must_use]
pub fn pull_entries(keys: &[Vec<&str>], image: &ImageName) -> Vec<PullEntry> {
    let places: Vec<PullEntry> = keys
        .iter()
        .enumerate()
        .flat_map(|(secret, keys)| (0..keys.len()).map(move |entry| PullEntry { secret, entry }))
        .collect();
    let all: Vec<&str> = keys.iter().flatten().copied().collect();
    let mut order = kubelet::look_up(&all, image).order;
    for same_slot in order.chunk_by_mut(|one, other| kubelet::slot(all[*one]) == kubelet::slot(all[*other])) {
        same_slot.sort_by_key(|at| places[*at].secret);
    }
    order.into_iter().map(|at| places[at]).collect()
}

/// Normalized form under which the kubelet stores a key; `None` for a key that it skips. Keys with one
/// form are for the same images.
#[must_use]
pub fn slot(key: &str) -> Option<String> {
    kubelet::slot(key)
}

/// Returns the entries that come closest to an image which no entry matches, with the reasons.
#[must_use]
pub fn nearest_entries(keys: &[Vec<String>], image: &ImageName) -> Vec<(usize, String, Mismatch, String)> {
    let of_secret = |(secret, keys): (usize, &Vec<String>)| {
        let candidates: Vec<_> = keys.iter().map(|key| Candidate::of_key(key)).collect();
        let near = nearest(Consumer::Kubernetes, &candidates, image);
        near.into_iter().map(move |one| (secret, one.key, one.mismatch, one.detail))
    };
    let mut near: Vec<_> = keys.iter().enumerate().flat_map(of_secret).collect();
    near.sort_by_key(|(_, _, mismatch, _)| *mismatch);
    near.truncate(NEAREST_MAX);
    near
}

/// Says how a key that matches an image names its registry.
#[must_use]
pub fn addressed(key: &str, image: &ImageName) -> Addressed {
    let (entry, wanted) = (Address::of(key), Address::of_image(image));
    if image.is_on_docker_hub() && entry.is_docker_hub() || (entry.host, entry.port) == (wanted.host, wanted.port) {
        Addressed::Exactly
    } else if entry.host.contains('*') && entry.port == wanted.port {
        Addressed::ByWildcard
    } else {
        Addressed::Elsewhere
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn order(keys: &[Vec<&str>], image: &str) -> Vec<(usize, usize)> {
        let entries = pull_entries(keys, &ImageName::parse(image).unwrap());
        entries.into_iter().map(|one| (one.secret, one.entry)).collect()
    }

    #[test]
    fn equal_keys_are_tried_in_the_order_of_the_secrets() {
        let first = vec!["https://reg.io", "other.io"];
        let second = vec!["reg.io", "reg.io/team"];
        assert_eq!(order(&[first.clone(), second.clone()], "reg.io/team/app"), [(1, 1), (0, 0), (1, 0)]);
        assert_eq!(order(&[second, first], "reg.io/team/app"), [(0, 1), (0, 0), (1, 0)]);
        assert_eq!(order(&[vec![], vec!["quay.io"]], "reg.io/app"), []);
    }

    #[rstest]
    #[case("reg.io", "reg.io/app", Addressed::Exactly)]
    #[case("https://reg.io:5000/v2/", "reg.io:5000/app", Addressed::Exactly)]
    #[case("https://index.docker.io/v1/", "nginx", Addressed::Exactly)]
    #[case("docker.io", "nginx", Addressed::Exactly)]
    #[case("*.reg.io", "a.reg.io/app", Addressed::ByWildcard)]
    #[case("index.docker.io", "localhost/app", Addressed::Elsewhere)]
    #[case("https://index.docker.io/v1/", "localhost/app", Addressed::Elsewhere)]
    fn key_names_the_registry_or_does_not(#[case] key: &str, #[case] image: &str, #[case] expected: Addressed) {
        let image = ImageName::parse(image).unwrap();
        assert_eq!(order(&[vec![key]], &image.to_string()).len(), 1);
        assert_eq!(addressed(key, &image), expected);
    }
}
