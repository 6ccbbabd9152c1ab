//! Registry scopes: the registry, or part of one, that an account covers.
//!
//! A [`RegistryScope`] has one canonical spelling: different spellings of one registry are equal
//! after [`RegistryScope::parse`], and the canonical text parses to itself.

mod host;
mod path;
mod repository;

use std::{fmt, ops::Range, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use self::repository::RepositoryName;
use super::invalid::Invalid;

/// Name of Docker Hub in image references.
pub const DOCKER_HUB: &str = "docker.io";

/// Maximum length, above that of host, port and repository name together.
const MAX_LEN: usize = 1024;

/// `host[:port][/path]`, normalized. Docker Hub in every spelling is host `docker.io`.
///
/// The path is a repository or a parent of repositories: the scope covers it and everything below
/// it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegistryScope {
    /// Canonical text. The other fields are positions in it.
    text: String,
    host_end: usize,
    authority_end: usize,
    port: Option<u16>,
}

impl RegistryScope {
    /// Parses a registry as written by a person or a docker config.
    ///
    /// Removes parts without meaning: `https://`, the host's case, a trailing slash, and the API
    /// roots `/v1/` and `/v2/` at the start of the path. The kubelet removes API roots from keys,
    /// too (`pkg/credentialprovider/keyring.go`, `Add`), so no scope can start with a namespace
    /// `v1` or `v2`.
    ///
    /// # Errors
    ///
    /// [`Invalid`] with the reason and a remedy. It never repeats the input, which may contain a
    /// password.
    pub fn parse(s: &str) -> Result<Self, Invalid> {
        let rest = without_scheme(check_characters(s)?)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (spelled_host, port) = host::parse(authority)?;
        let path = path::parse(path)?;
        let (host, port) = canonical_docker_hub(spelled_host, port, &path)?;
        Ok(Self::assemble(host, port, &path))
    }

    fn assemble(mut text: String, port: Option<u16>, path: &str) -> Self {
        let host_end = text.len();
        if let Some(port) = port {
            text.push(':');
            text.push_str(&port.to_string());
        }
        let authority_end = text.len();
        if !path.is_empty() {
            text.push('/');
            text.push_str(path);
        }
        Self { text, host_end, authority_end, port }
    }

    /// Canonical text, `host[:port][/path]`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Host in lower case. An IPv6 address keeps its brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        self.part(0..self.host_end)
    }

    /// Port, if given. `reg.io:443` and `reg.io` are different scopes, because every consumer
    /// distinguishes them.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// `host[:port]`, the first part of an image reference.
    #[must_use]
    pub fn authority(&self) -> &str {
        self.part(0..self.authority_end)
    }

    /// Path without leading slash, if any.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        (self.authority_end < self.text.len()).then(|| self.part(self.authority_end + 1..self.text.len()))
    }

    /// Whether the other scope is this one or a part of it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        let is_below = |path: &str| {
            let rest = other.path().and_then(|other| other.strip_prefix(path));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.authority() == other.authority() && self.path().is_none_or(is_below)
    }

    /// Whether this is Docker Hub or a part of it.
    #[must_use]
    pub fn is_docker_hub(&self) -> bool {
        self.authority() == DOCKER_HUB
    }

    /// Whether the host is `localhost` or a loopback address.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let host = self.host().trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
    }

    fn part(&self, range: Range<usize>) -> &str {
        self.text.get(range).unwrap_or_default()
    }
}

/// Rejects characters that no registry contains, before parsing.
fn check_characters(s: &str) -> Result<&str, Invalid> {
    if s.is_empty() {
        return Err(Invalid::new("a registry is required, for example registry.example.com:5000"));
    }
    if s.len() > MAX_LEN {
        return Err(Invalid::new("a registry has at most 1024 characters"));
    }
    if s.chars().any(char::is_whitespace) {
        return Err(Invalid::new("a registry must not contain white space"));
    }
    if s.chars().any(char::is_control) {
        return Err(Invalid::new("a registry must not contain control characters"));
    }
    let refused = [
        ("*", "wildcards are not supported: name one host, and omit `/*`, because a path covers everything below it"),
        ("?", "a query (`?`) does not belong in a registry: write host[:port][/path]"),
        ("#", "a fragment (`#`) does not belong in a registry: write host[:port][/path]"),
        ("%", "percent encoding does not belong in a registry: write host[:port][/path]"),
        ("\\", "a backslash does not belong in a registry: write host[:port][/path]"),
        ("..", "`..` does not belong in a registry: write host[:port][/path]"),
    ];
    match refused.iter().find(|(part, _)| s.contains(part)) {
        Some((_, reason)) => Err(Invalid::new(*reason)),
        None => Ok(s),
    }
}

/// Removes `https://`. Rejects `http://`: plain HTTP is a property of the account, not of the
/// registry's name.
fn without_scheme(s: &str) -> Result<&str, Invalid> {
    let Some((scheme, rest)) = s.split_once("://") else {
        return Ok(s);
    };
    if scheme.eq_ignore_ascii_case("https") {
        Ok(rest)
    } else if scheme.eq_ignore_ascii_case("http") {
        Err(Invalid::new("omit http:// and set `plainHttp` to true: the scheme is not part of a registry's name"))
    } else {
        Err(Invalid::new("the only scheme that a registry may have is https://, which can be omitted"))
    }
}

/// Whether a host, in lower case, is a name of Docker Hub.
///
/// - `docker.io`: image references (`distribution/reference`, `normalize.go`).
/// - `index.docker.io`: `docker login` (`docker/cli`, `cli/command/registry.go`).
/// - `registry-1.docker.io`: the API.
/// - `hub.docker.com`: the web site. No consumer of a docker config finds it.
pub(super) fn is_docker_hub(host: &str) -> bool {
    matches!(
        host,
        DOCKER_HUB | "index.docker.io" | "registry-1.docker.io" | "hub.docker.com" | "registry.hub.docker.com"
    )
}

/// Replaces every spelling of Docker Hub by the canonical one.
fn canonical_docker_hub(host: String, port: Option<u16>, path: &str) -> Result<(String, Option<u16>), Invalid> {
    if !is_docker_hub(&host) {
        return Ok((host, port));
    }
    if port.is_some_and(|port| port != 443) {
        return Err(Invalid::new("Docker Hub has no other port than 443: write docker.io"));
    }
    let first = path.split('/').next().unwrap_or_default();
    if host == "hub.docker.com" && ["r", "u", "orgs", "repository"].contains(&first) {
        return Err(Invalid::new(
            "this is a page of the Docker Hub web site: write docker.io, or docker.io/ORG for one organisation",
        ));
    }
    Ok((DOCKER_HUB.to_owned(), None))
}

impl fmt::Display for RegistryScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for RegistryScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RegistryScope").field(&self.text).finish()
    }
}

impl FromStr for RegistryScope {
    type Err = Invalid;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::parse(s)
    }
}

impl Serialize for RegistryScope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for RegistryScope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("reg.io", "reg.io/a/b", true)]
    #[case("reg.io/a", "reg.io/a", true)]
    #[case("reg.io/a", "reg.io/ab", false)]
    #[case("reg.io/a", "reg.io", false)]
    #[case("reg.io", "reg.io:443", false)]
    #[case("docker.io", "https://index.docker.io/v1/", true)]
    fn scope_contains_its_parts(#[case] one: &str, #[case] other: &str, #[case] expected: bool) {
        assert_eq!(RegistryScope::parse(one).unwrap().contains(&RegistryScope::parse(other).unwrap()), expected);
    }

    #[rstest]
    #[case("registry.example.com:5000", "registry.example.com:5000")]
    #[case("registry.example.com:5000/xxxx/rbd-rest-api", "registry.example.com:5000/xxxx/rbd-rest-api")]
    #[case("daocloud.io", "daocloud.io")]
    #[case("localhost", "localhost")]
    #[case("registry", "registry")]
    #[case("localhost:5000/a", "localhost:5000/a")]
    #[case("Reg.IO", "reg.io")]
    #[case("https://reg.io", "reg.io")]
    #[case("HTTPS://reg.io/", "reg.io")]
    #[case("https://reg.io/v1/", "reg.io")]
    #[case("https://reg.io/v2", "reg.io")]
    #[case("https://reg.io/v2/team", "reg.io/team")]
    #[case("reg.io/v2/v2/team", "reg.io/team")]
    #[case("reg.io/team/v2", "reg.io/team/v2")]
    #[case("reg.io/foo/", "reg.io/foo")]
    #[case("reg.io:443", "reg.io:443")]
    #[case("reg.io:05000", "reg.io:5000")]
    #[case("10.0.0.1:5000", "10.0.0.1:5000")]
    #[case("[::1]", "[::1]")]
    #[case("[2001:DB8:0::1]:5000/a", "[2001:db8::1]:5000/a")]
    #[case("reg.io/a_b/c__d/e--f/g.h", "reg.io/a_b/c__d/e--f/g.h")]
    fn spelling_is_canonical(#[case] written: &str, #[case] canonical: &str) {
        assert_eq!(RegistryScope::parse(written).unwrap().as_str(), canonical);
    }

    #[rstest]
    fn every_spelling_of_docker_hub_is_docker_io(
        #[values(
            "docker.io",
            "https://docker.io",
            "index.docker.io",
            "https://index.docker.io/v1/",
            "https://index.docker.io/v1",
            "https://index.docker.io/v2/",
            "index.docker.io/v1",
            "registry-1.docker.io",
            "https://registry-1.docker.io/v2/",
            "hub.docker.com",
            "registry.hub.docker.com",
            "Docker.IO:443"
        )]
        spelling: &str,
    ) {
        let scope = RegistryScope::parse(spelling).unwrap();
        assert_eq!(scope.as_str(), "docker.io");
        assert!(scope.is_docker_hub());
    }

    #[rstest]
    #[case("docker.io/acme")]
    #[case("https://index.docker.io/v1/acme")]
    #[case("registry.hub.docker.com/acme/")]
    fn part_of_docker_hub_keeps_its_path(#[case] spelling: &str) {
        let scope = RegistryScope::parse(spelling).unwrap();
        assert_eq!(scope.as_str(), "docker.io/acme");
        assert_eq!(scope.path(), Some("acme"));
    }

    #[test]
    fn scope_splits_into_parts() {
        let scope = RegistryScope::parse("[::1]:5000/a/b").unwrap();
        assert_eq!(
            (scope.host(), scope.port(), scope.authority(), scope.path()),
            ("[::1]", Some(5000), "[::1]:5000", Some("a/b"))
        );
        let scope = RegistryScope::parse("reg.io").unwrap();
        assert_eq!((scope.host(), scope.port(), scope.authority(), scope.path()), ("reg.io", None, "reg.io", None));
        assert!(!scope.is_docker_hub());
    }

    #[rstest]
    #[case("", "a registry is required")]
    #[case("http://reg.io", "`plainHttp`")]
    #[case("HTTP://reg.io", "`plainHttp`")]
    #[case("oci://reg.io", "the only scheme")]
    #[case("https://", "host is missing")]
    #[case("/team", "host is missing")]
    #[case(":5000", "host is missing")]
    #[case("reg .io", "white space")]
    #[case("reg.io\u{0}", "control characters")]
    #[case("*.reg.io", "wildcards")]
    #[case("reg.io/team/*", "wildcards")]
    #[case("reg.io?x=1", "query")]
    #[case("reg.io#x", "fragment")]
    #[case("reg.io/%2e", "percent")]
    #[case("reg.io/../etc", "`..`")]
    #[case("reg.io\\team", "backslash")]
    #[case("user:pass@reg.io", "user or password")]
    #[case("reg.io:0", "between 1 and 65535")]
    #[case("reg.io:65536", "between 1 and 65535")]
    #[case("reg.io:", "between 1 and 65535")]
    #[case("reg.io:http", "between 1 and 65535")]
    #[case("reg.io:+80", "between 1 and 65535")]
    #[case("-reg.io", "hyphen")]
    #[case("reg-.io", "hyphen")]
    #[case("reg_1.io", "letters, digits and hyphens")]
    #[case("reg.io.", "empty part")]
    #[case(".reg.io", "empty part")]
    #[case("münchen.example", "xn--")]
    #[case("10.0.0.256", "IPv4")]
    #[case("::1", "brackets")]
    #[case("[::1", "IPv6")]
    #[case("[::g]", "IPv6")]
    #[case("[::1]x", "IPv6")]
    #[case("reg.io/Team", "lower case")]
    #[case("reg.io//team", "empty part")]
    #[case("reg.io/team//", "empty part")]
    #[case("reg.io/-team", "separated")]
    #[case("reg.io/team_", "separated")]
    #[case("reg.io/te___am", "separated")]
    #[case("reg.io/te.-am", "separated")]
    #[case("reg.io/team:1.0", "tag")]
    #[case("reg.io/team@sha256:abc", "digest")]
    #[case("reg.io/te+am", "lower case")]
    #[case("docker.io:5000", "no other port")]
    #[case("https://hub.docker.com/r/acme/app", "web site")]
    fn invalid_registry_is_rejected_with_reason(#[case] written: &str, #[case] reason: &str) {
        let refusal = RegistryScope::parse(written).unwrap_err().to_string();
        assert!(refusal.contains(reason), "{written:?}: {refusal}");
    }

    #[test]
    fn too_long_registry_is_rejected() {
        let label = "a".repeat(64);
        let host = ["a"; 128].join(".");
        let path = format!("reg.io/{}", "a".repeat(256));
        let all = "a".repeat(1025);
        for written in [label, host, path, all] {
            RegistryScope::parse(&written).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_is_parsed_or_rejected(written in ".*") {
            if let Ok(scope) = RegistryScope::parse(&written) {
                prop_assert_eq!(&RegistryScope::parse(scope.as_str()).unwrap(), &scope);
            }
        }

        #[test]
        fn canonical_text_parses_to_itself(
            host in "(https://)?([A-Za-z0-9]{1,5}\\.){0,3}[a-z]{2,5}(:[1-9][0-9]{0,3})?",
            path in "(/v[12])?(/[a-z0-9]{1,4}([._-][a-z0-9]{1,3})?){0,3}/?",
        ) {
            let scope = RegistryScope::parse(&format!("{host}{path}")).unwrap();
            prop_assert_eq!(&RegistryScope::parse(scope.as_str()).unwrap(), &scope);
        }
    }
}
