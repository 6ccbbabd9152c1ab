//! Lookup of the kubelet and go-containerregistry: `pkg/credentialprovider/keyring.go`.

use super::{Found, ImageName, go_url::GoUrl};

/// Lookup of the kubelet (`BasicDockerKeyring.Lookup`): tries all matching keys in reverse
/// lexicographic order until a pull succeeds. Two keys in one slot are in the random order of a Go
/// map (`BasicDockerKeyring.Add`).
///
/// Falls back to `index.docker.io` if no key matches and the image is on Docker Hub, or on a host
/// without dot or colon such as `localhost` (`isDefaultRegistryMatch`).
pub(super) fn look_up(keys: &[&str], image: &ImageName) -> Found {
    let mut found = matching(keys, &image.to_string());
    if found.is_empty() && is_default_registry(image.registry()) {
        found = slots(keys).filter(|(slot, _)| slot == "index.docker.io").collect();
        found.sort_by_key(|(_, at)| keys[*at]);
    }
    let is_ambiguous = found.windows(2).any(|pair| pair[0].0 == pair[1].0);
    Found { order: found.into_iter().map(|(_, at)| at).collect(), is_ambiguous }
}

/// Lookup of go-containerregistry (`pkg/authn/kubernetes/keyring.go`): the same rules with Docker
/// Hub spelled `index.docker.io`, without a fallback, and only the first slot. Two keys in one slot
/// are in the random order of a Go map.
pub(super) fn look_up_k8schain(keys: &[&str], image: &ImageName) -> Found {
    let registry = if image.is_on_docker_hub() { "index.docker.io" } else { image.registry() };
    let found = matching(keys, &ImageName::assume(registry, image.repository()).to_string());
    let Some((first_slot, _)) = found.first().cloned() else {
        return Found::none();
    };
    let first = found.into_iter().take_while(|(slot, _)| *slot == first_slot);
    Found::one_of(first.map(|(_, at)| at).collect())
}

fn is_default_registry(registry: &str) -> bool {
    registry == "docker.io" || registry == "index.docker.io" || !registry.contains(['.', ':'])
}

/// Matching slots in the order of attempts. Keys of one slot are sorted alphabetically.
fn matching(keys: &[&str], image: &str) -> Vec<(String, usize)> {
    let Some(target) = GoUrl::parse(image) else {
        return Vec::new();
    };
    let mut found: Vec<_> = slots(keys).filter(|(slot, _)| is_match(slot, &target)).collect();
    found.sort_by(|(one, at), (other, other_at)| other.cmp(one).then_with(|| keys[*at].cmp(keys[*other_at])));
    found
}

fn slots<'a>(keys: &'a [&str]) -> impl Iterator<Item = (String, usize)> + 'a {
    keys.iter().enumerate().filter_map(|(at, key)| Some((slot(key)?, at)))
}

/// Normalized form under which the kubelet stores a key (`BasicDockerKeyring.Add`): without scheme
/// and API root. Keys that are not URLs are skipped.
pub(super) fn slot(key: &str) -> Option<String> {
    let schemeless = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let url = GoUrl::parse(schemeless)?;
    let path = match url.path.get(..4) {
        Some("/v1/" | "/v2/") => &url.path[3..],
        _ => &url.path,
    };
    Some(if path == "/" { url.host } else { url.host + path })
}

/// `urlsMatch`: equal ports, equal number of labels with each matching its glob, and the path as a
/// plain string prefix.
fn is_match(slot: &str, target: &GoUrl) -> bool {
    let Some(glob) = GoUrl::parse(slot) else {
        return false;
    };
    let (host, port) = glob.host_and_port();
    let (target_host, target_port) = target.host_and_port();
    port == target_port
        && host.split('.').count() == target_host.split('.').count()
        && target.path.starts_with(&glob.path)
        && host.split('.').zip(target_host.split('.')).all(|(glob, label)| is_label_match(glob, label))
}

/// `filepath.Match` for hosts: `*` matches any characters. Brackets are a character class, so an
/// IPv6 address never matches itself.
pub(super) fn is_label_match(glob: &str, label: &str) -> bool {
    if glob.contains('[') {
        return false;
    }
    let Some((start, rest)) = glob.split_once('*') else {
        return glob == label;
    };
    let Some(mut label) = label.strip_prefix(start) else {
        return false;
    };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        match label.find(part) {
            Some(at) => label = &label[at + part.len()..],
            None => return false,
        }
    }
    label.ends_with(end)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn finds(key: &str, image: &str) -> bool {
        !look_up(&[key], &ImageName::parse(image).unwrap()).order.is_empty()
    }

    #[rstest]
    #[case("reg.io", "reg.io/app", true)]
    #[case("https://reg.io", "reg.io/app", true)]
    #[case("http://reg.io", "reg.io/app", true)]
    #[case("https://reg.io/v1/", "reg.io/app", true)]
    #[case("https://reg.io/v2/team", "reg.io/team/app", true)]
    #[case("https://reg.io/v2", "reg.io/team/app", false)]
    #[case("reg.io/", "reg.io/app", true)]
    #[case("reg.io:443", "reg.io/app", false)]
    #[case("reg.io", "reg.io:443/app", false)]
    #[case("reg.io:", "reg.io/app", true)]
    #[case("reg.io:5000", "reg.io:6000/app", false)]
    #[case("Reg.io", "reg.io/app", false)]
    #[case("HTTPS://reg.io", "reg.io/app", false)]
    #[case("reg.io/foo", "reg.io/foo", true)]
    #[case("reg.io/foo", "reg.io/foo/x", true)]
    #[case("reg.io/foo", "reg.io/foobar/x", true)]
    #[case("reg.io/foo/", "reg.io/foobar/x", false)]
    #[case("reg.io/foo/", "reg.io/foo/x", true)]
    #[case("reg.io/foo/", "reg.io/foo", false)]
    #[case("reg.io/foo", "reg.io/bar", false)]
    #[case("*.reg.io", "a.reg.io/app", true)]
    #[case("*.reg.io", "reg.io/app", false)]
    #[case("*.reg.io", "a.b.reg.io/app", false)]
    #[case("*.*.reg.io", "a.b.reg.io/app", true)]
    #[case("a*c.reg.io", "abbc.reg.io/app", true)]
    #[case("a*b*c.reg.io", "abc.reg.io/app", true)]
    #[case("a*b*c.reg.io", "acb.reg.io/app", false)]
    #[case("*a.reg.io", "aa.reg.io/app", true)]
    #[case("aa*a.reg.io", "aa.reg.io/app", false)]
    #[case("**.reg.io", "a.reg.io/app", true)]
    #[case("*.reg.io:5000", "a.reg.io:5000/app", true)]
    #[case("reg.io/te*", "reg.io/team/app", false)]
    #[case("me:pw@reg.io", "reg.io/app", true)]
    #[case("[::1]:5000", "[::1]:5000/app", true)]
    #[case("[::1]", "[::1]/app", false)]
    #[case("index.docker.io", "localhost/app", true)]
    #[case("index.docker.io", "localhost:5000/app", false)]
    #[case("docker.io", "localhost/app", false)]
    fn key_matches_image(#[case] key: &str, #[case] image: &str, #[case] expected: bool) {
        assert_eq!(finds(key, image), expected);
    }

    #[test]
    fn matches_are_tried_in_reverse_order() {
        let keys = ["reg.io", "reg.io/a", "https://reg.io", "*.io", "reg.io/a/b", "reg.io/b"];
        let image = ImageName::parse("reg.io/a/b/c").unwrap();
        assert_eq!(look_up(&keys, &image), Found { order: vec![4, 1, 2, 0, 3], is_ambiguous: true });
        assert_eq!(look_up(&keys[3..], &image), Found::all_in_order(vec![1, 0]));
        assert_eq!(look_up_k8schain(&keys, &image), Found::one_of(vec![4]));
    }

    /// The kubelet tries both keys of a slot, which allows two passwords to overlap during a
    /// rotation.
    #[test]
    fn order_of_the_keys_of_a_slot_is_random() {
        let keys = ["reg.io", "https://reg.io"];
        let image = ImageName::parse("reg.io/app").unwrap();
        assert_eq!(look_up(&keys, &image), Found { order: vec![1, 0], is_ambiguous: true });
        assert_eq!(look_up_k8schain(&keys, &image), Found::one_of(vec![1, 0]));
        assert!(look_up_k8schain(&keys, &image).is_ambiguous);
    }

    #[test]
    fn docker_hub_fallback_is_tried_only_without_a_match() {
        let image = ImageName::parse("acme/app").unwrap();
        let keys = ["https://index.docker.io/v1/", "docker.io/acme", "index.docker.io"];
        assert_eq!(look_up(&keys, &image), Found::all_in_order(vec![1]));
        assert_eq!(look_up(&[keys[0]], &image), Found::all_in_order(vec![0]));
        for keys in [[keys[0], keys[2]], ["http://index.docker.io/v2/", "index.docker.io/"]] {
            assert_eq!(look_up(&keys, &image), Found { order: vec![0, 1], is_ambiguous: true });
        }
    }
}
