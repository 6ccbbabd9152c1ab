//! Lookup of podman, skopeo and buildah: `containers/image`, `pkg/docker/config/config.go`,
//! `findCredentialsInFile`.

use super::{Found, ImageName};
use crate::domain::docker_config::parse::Form;

/// The exact repository, then its parents up to the registry; or else a random key with the
/// registry's host in any spelling, because Go maps are unordered. The legacy format matches
/// registries only.
pub(super) fn look_up(keys: &[&str], image: &ImageName, form: Form) -> Found {
    let name = image.to_string();
    let mut wanted = match form {
        Form::DockerConfigJson => name.as_str(),
        Form::Dockercfg => image.registry(),
    };
    loop {
        if let Some(at) = keys.iter().position(|key| *key == wanted) {
            return Found::one_of(vec![at]);
        }
        match wanted.rsplit_once('/') {
            Some((parent, _)) => wanted = parent,
            None => break,
        }
    }
    let registry = normalize_registry(image.registry());
    let same_host = keys.iter().enumerate().filter(|(_, key)| host_of(key, form) == registry);
    Found::one_of(same_host.map(|(at, _)| at).collect())
}

/// `normalizeAuthFileKey`: removes the path after a scheme, and always in the legacy format.
pub(super) fn host_of(key: &str, form: Form) -> &str {
    let stripped = key.strip_prefix("http://").unwrap_or(key);
    let stripped = stripped.strip_prefix("https://").unwrap_or(stripped);
    let is_cut = form == Form::Dockercfg || stripped.len() < key.len();
    let host = if is_cut { stripped.split('/').next().unwrap_or_default() } else { stripped };
    normalize_registry(host)
}

/// `normalizeRegistry`.
fn normalize_registry(registry: &str) -> &str {
    match registry {
        "registry-1.docker.io" | "docker.io" => "index.docker.io",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("reg.io", "reg.io/app", true)]
    #[case("https://reg.io/v2/", "reg.io/app", true)]
    #[case("https://reg.io/anything", "reg.io/app", true)]
    #[case("reg.io/foo", "reg.io/foo", true)]
    #[case("reg.io/foo", "reg.io/foo/bar/app", true)]
    #[case("reg.io/foo", "reg.io/foobar/app", false)]
    #[case("reg.io/foo/", "reg.io/foo/app", false)]
    #[case("reg.io/", "reg.io/app", false)]
    #[case("reg.io:443", "reg.io/app", false)]
    #[case("Reg.io", "reg.io/app", false)]
    #[case("*.reg.io", "a.reg.io/app", false)]
    #[case("[::1]", "[::1]/app", true)]
    fn key_matches_image(#[case] key: &str, #[case] image: &str, #[case] expected: bool) {
        let found = look_up(&[key], &ImageName::parse(image).unwrap(), Form::DockerConfigJson);
        assert_eq!(!found.order.is_empty(), expected);
    }

    #[test]
    fn longest_parent_wins() {
        let keys = ["reg.io", "reg.io/a", "reg.io/a/b", "https://reg.io"];
        for (image, expected) in [("reg.io/a/b/c", 2), ("reg.io/a/c", 1), ("reg.io/c", 0)] {
            let found = look_up(&keys, &ImageName::parse(image).unwrap(), Form::DockerConfigJson);
            assert_eq!(found, Found::one_of(vec![expected]));
        }
    }

    #[test]
    fn other_spellings_are_picked_at_random() {
        let keys = ["https://reg.io", "http://reg.io/x"];
        let found = look_up(&keys, &ImageName::parse("reg.io/app").unwrap(), Form::DockerConfigJson);
        assert!(found.is_ambiguous);
    }

    #[test]
    fn legacy_format_matches_registries_only() {
        let image = ImageName::parse("reg.io/a/app").unwrap();
        assert_eq!(look_up(&["reg.io/a"], &image, Form::Dockercfg), Found::one_of(vec![0]));
        let found = look_up(&["reg.io/a", "reg.io/b"], &image, Form::Dockercfg);
        assert_eq!(found, Found::one_of(vec![0, 1]));
    }
}
