//! Which registry, and which part of it, an account is for.
//!
//! A [`RegistryScope`] has one spelling for one meaning: what two people write differently for the same registry is
//! equal after [`RegistryScope::parse`], and the canonical text parses to itself.

mod host;
mod path;
mod repository;

use std::{fmt, ops::Range, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use self::repository::RepositoryName;
use super::invalid::Invalid;

/// The name that image references use for Docker Hub.
pub const DOCKER_HUB: &str = "docker.io";

/// Longer than any host, port and repository name together.
const MAX_LEN: usize = 1024;

/// `host[:port][/path]`, normalised. Docker Hub in every spelling is host `docker.io`.
///
/// The path is a repository or a parent of repositories: the scope covers it and everything below it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegistryScope {
    /// The canonical text; the other fields say where its parts are.
    text: String,
    host_end: usize,
    authority_end: usize,
    port: Option<u16>,
}

impl RegistryScope {
    /// Reads what a person or a docker config calls a registry.
    ///
    /// Dropped, because they do not change the meaning: `https://`, the case of the host, a trailing slash, the API
    /// roots `/v1/` and `/v2/` at the start of the path. The last is what the kubelet does with a key
    /// (`pkg/credentialprovider/keyring.go`, `Add`), so a repository namespace called `v1` or `v2` cannot be a scope.
    ///
    /// # Errors
    ///
    /// [`Invalid`] says what is wrong and what to write instead. It never repeats the input, which may hold a password.
    pub fn parse(s: &str) -> Result<Self, Invalid> {
        let rest = without_scheme(plain(s)?)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (spelled_host, port) = host::parse(authority)?;
        let path = path::parse(path)?;
        let (host, port) = docker_hub(spelled_host, port, &path)?;
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

    /// The canonical text, `host[:port][/path]`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The host alone, in lower case; an IPv6 address keeps its brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        self.part(0..self.host_end)
    }

    /// The port, if one was written. `reg.io:443` and `reg.io` are different scopes, because no reader treats them as
    /// one.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// `host[:port]`: the part that an image reference starts with.
    #[must_use]
    pub fn authority(&self) -> &str {
        self.part(0..self.authority_end)
    }

    /// The path without its leading slash, if the scope has one.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        (self.authority_end < self.text.len()).then(|| self.part(self.authority_end + 1..self.text.len()))
    }

    /// Whether this is Docker Hub or a part of it.
    #[must_use]
    pub fn is_docker_hub(&self) -> bool {
        self.authority() == DOCKER_HUB
    }

    fn part(&self, range: Range<usize>) -> &str {
        self.text.get(range).unwrap_or_default()
    }
}

/// Refuses what can be no registry in any reading, before anything is taken apart.
fn plain(s: &str) -> Result<&str, Invalid> {
    if s.is_empty() {
        return Err(Invalid::new("a registry is needed, for example registry.example.com:5000"));
    }
    if s.len() > MAX_LEN {
        return Err(Invalid::new("a registry has at most 1024 characters"));
    }
    if s.chars().any(char::is_whitespace) {
        return Err(Invalid::new("a registry has no white space"));
    }
    if s.chars().any(char::is_control) {
        return Err(Invalid::new("a registry has no control characters"));
    }
    let refused = [
        ("*", "wildcards are not possible: name one host, and leave off `/*`, since a path covers everything below it"),
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

/// Drops `https://`. `http://` is no part of a name: whether a registry is spoken to in the clear is a property of the
/// account.
fn without_scheme(s: &str) -> Result<&str, Invalid> {
    let Some((scheme, rest)) = s.split_once("://") else {
        return Ok(s);
    };
    if scheme.eq_ignore_ascii_case("https") {
        Ok(rest)
    } else if scheme.eq_ignore_ascii_case("http") {
        Err(Invalid::new("leave off http:// and set `plainHttp` to true: the scheme is no part of a registry's name"))
    } else {
        Err(Invalid::new("the only scheme that a registry may have is https://, and it can be left off"))
    }
}

/// Whether a host, in lower case, is a name of Docker Hub.
///
/// Image references say `docker.io` (`distribution/reference`, `normalize.go`), `docker login` writes
/// `https://index.docker.io/v1/` (`docker/cli`, `cli/command/registry.go`), the API answers at `registry-1.docker.io`,
/// and people copy `hub.docker.com` out of the browser, a name that no reader of a docker config ever finds.
pub(super) fn is_docker_hub(host: &str) -> bool {
    matches!(
        host,
        DOCKER_HUB | "index.docker.io" | "registry-1.docker.io" | "hub.docker.com" | "registry.hub.docker.com"
    )
}

/// Gives every spelling of Docker Hub its one name.
fn docker_hub(host: String, port: Option<u16>, path: &str) -> Result<(String, Option<u16>), Invalid> {
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
    #[case("registry.martin.com:5000", "registry.martin.com:5000")]
    #[case("registry.martin.com:5000/xxxx/rbd-rest-api", "registry.martin.com:5000/xxxx/rbd-rest-api")]
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
    fn one_meaning_has_one_spelling(#[case] written: &str, #[case] canonical: &str) {
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
    fn a_part_of_docker_hub_keeps_its_path(#[case] spelling: &str) {
        let scope = RegistryScope::parse(spelling).unwrap();
        assert_eq!(scope.as_str(), "docker.io/acme");
        assert_eq!(scope.path(), Some("acme"));
    }

    #[test]
    fn the_parts_can_be_asked_for() {
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
    #[case("", "a registry is needed")]
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
    fn what_is_no_registry_is_refused_with_the_reason(#[case] written: &str, #[case] reason: &str) {
        let refusal = RegistryScope::parse(written).unwrap_err().to_string();
        assert!(refusal.contains(reason), "{written:?}: {refusal}");
    }

    #[test]
    fn what_is_too_long_is_refused() {
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
        fn arbitrary_text_is_parsed_or_refused(written in ".*") {
            if let Ok(scope) = RegistryScope::parse(&written) {
                prop_assert_eq!(&RegistryScope::parse(scope.as_str()).unwrap(), &scope);
            }
        }

        #[test]
        fn the_canonical_text_parses_to_itself(
            host in "(https://)?([A-Za-z0-9]{1,5}\\.){0,3}[a-z]{2,5}(:[1-9][0-9]{0,3})?",
            path in "(/v[12])?(/[a-z0-9]{1,4}([._-][a-z0-9]{1,3})?){0,3}/?",
        ) {
            let scope = RegistryScope::parse(&format!("{host}{path}")).unwrap();
            prop_assert_eq!(&RegistryScope::parse(scope.as_str()).unwrap(), &scope);
        }
    }
}
