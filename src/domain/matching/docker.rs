//! Lookup of the docker CLI: `cli/config/credentials/file_store.go`.

use super::{Found, ImageName, go_url::GoUrl};
use crate::domain::docker_config::DOCKER_HUB_KEY;

/// Lookup in the file (`fileStore.Get`): the exact key, or else a random key with the image's host,
/// because Go maps are unordered. Paths are ignored.
pub(super) fn look_up(keys: &[&str], image: &ImageName) -> Found {
    let exact = look_up_exactly(keys, image);
    if !exact.order.is_empty() {
        return exact;
    }
    let server = server_address(image);
    let same_host = keys.iter().enumerate().filter(|(_, key)| host_of(key) == server);
    Found::one_of(same_host.map(|(at, _)| at).collect())
}

/// Lookup in `DOCKER_AUTH_CONFIG` (`cli/config/memorystore/store.go`, `Config.Get`): the exact key.
pub(super) fn look_up_exactly(keys: &[&str], image: &ImageName) -> Found {
    let server = server_address(image);
    Found::one_of(keys.iter().position(|key| *key == server).into_iter().collect())
}

/// The docker CLI's name of a registry (`cli/command/registry.go`, `GetAuthConfigKey`): a URL for
/// Docker Hub, the host for others.
pub(super) fn server_address(image: &ImageName) -> &str {
    if image.is_on_docker_hub() { DOCKER_HUB_KEY } else { image.registry() }
}

/// `ConvertToHostname`: the host of a URL, with an IPv6 address unbracketed if it has no port. For
/// other keys, the part before the path.
pub(super) fn host_of(key: &str) -> String {
    let url = key.split_once("://").filter(|(scheme, _)| is_scheme(scheme));
    let Some(url) = url.and_then(|(_, schemeless)| GoUrl::parse(schemeless)).filter(|url| !url.host.is_empty()) else {
        return key.split('/').next().unwrap_or_default().to_owned();
    };
    let host = url.host.strip_suffix(':').unwrap_or(&url.host);
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    bare.unwrap_or(host).to_owned()
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("reg.io", "reg.io/app", true)]
    #[case("reg.io/foo", "reg.io/bar", true)]
    #[case("https://reg.io/v2/", "reg.io/app", true)]
    #[case("http://reg.io:5000", "reg.io:5000/app", true)]
    #[case("HTTPS://reg.io", "reg.io/app", true)]
    #[case("https://reg.io:443", "reg.io/app", false)]
    #[case("reg.io:443", "reg.io/app", false)]
    #[case("Reg.io", "reg.io/app", false)]
    #[case("*.reg.io", "a.reg.io/app", false)]
    #[case("[::1]:5000", "[::1]:5000/app", true)]
    #[case("https://[::1]", "[::1]/app", false)]
    #[case("oci://reg.io", "reg.io/app", true)]
    #[case("://reg.io", "reg.io/app", false)]
    #[case("reg.io ", "reg.io/app", false)]
    fn key_matches_image(#[case] key: &str, #[case] image: &str, #[case] expected: bool) {
        let found = look_up(&[key], &ImageName::parse(image).unwrap());
        assert_eq!(!found.order.is_empty(), expected);
    }

    #[test]
    fn exact_key_wins_and_other_keys_are_random() {
        let image = ImageName::parse("reg.io/a/app").unwrap();
        assert_eq!(look_up(&["reg.io/a", "reg.io", "https://reg.io"], &image), Found::one_of(vec![1]));
        let random = look_up(&["reg.io/a", "reg.io/b", "reg.iot"], &image);
        assert_eq!(random, Found::one_of(vec![0, 1]));
        assert!(random.is_ambiguous);
    }

    #[rstest]
    #[case("reg.io", true)]
    #[case("https://reg.io", false)]
    #[case("reg.io/a", false)]
    fn docker_auth_config_matches_exact_keys_only(#[case] key: &str, #[case] expected: bool) {
        let found = look_up_exactly(&[key], &ImageName::parse("reg.io/a/app").unwrap());
        assert_eq!(!found.order.is_empty(), expected);
    }
}
