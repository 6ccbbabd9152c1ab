//! What an image reference names.

use std::fmt;

use oci_spec::distribution::{ParseError, Reference};

use crate::domain::{invalid::Invalid, registry::DOCKER_HUB};

/// Longer than any host, name, tag and digest together.
const MAX_LEN: usize = 1024;

/// A repository with its registry, without tag and digest: what credentials are looked up for.
///
/// Short names are filled in as all readers do (`distribution/reference`, `normalize.go`): `nginx` is
/// `docker.io/library/nginx`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageName {
    registry: String,
    repository: String,
}

impl ImageName {
    /// Reads an image reference as it stands in a pod or on a command line.
    ///
    /// # Errors
    ///
    /// [`Invalid`] says what is wrong.
    pub fn parse(image: &str) -> Result<Self, Invalid> {
        if image.len() > MAX_LEN {
            return Err(Invalid::new("an image reference has at most 1024 characters"));
        }
        if image.contains("://") {
            return Err(Invalid::new(
                "an image reference has no scheme: write host[:port]/repository[:tag], or a name of Docker Hub",
            ));
        }
        let (address, rest) = without_ipv6(image);
        let stand_in = address.map(|_| format!("localhost{rest}"));
        let reference: Reference = stand_in.as_deref().unwrap_or(image).parse().map_err(|error| refusal(&error))?;
        Ok(match address {
            Some(address) => Self {
                registry: reference.registry().replacen("localhost", address, 1),
                repository: reference.repository().to_owned(),
            },
            None => Self::of(&reference),
        })
    }

    /// A first part in upper case is a host, since no repository has one (`distribution/reference`,
    /// `splitDockerDomain`).
    fn of(reference: &Reference) -> Self {
        let (registry, repository) = match reference.repository().split_once('/') {
            Some((host, rest)) if host.bytes().any(|byte| byte.is_ascii_uppercase()) => (host, rest),
            _ => (reference.registry(), reference.repository()),
        };
        Self { registry: registry.to_owned(), repository: repository.to_owned() }
    }

    /// A name that is put together, not parsed.
    pub(super) fn assume(registry: &str, repository: &str) -> Self {
        Self { registry: registry.to_owned(), repository: repository.to_owned() }
    }

    /// `host[:port]`, `docker.io` for Docker Hub.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository below the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Whether the image is on Docker Hub.
    #[must_use]
    pub fn is_on_docker_hub(&self) -> bool {
        self.registry == DOCKER_HUB
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)
    }
}

/// `oci_spec` knows no IPv6 addresses, `distribution/reference` does.
fn without_ipv6(image: &str) -> (Option<&str>, &str) {
    let address = image.find(']').and_then(|end| image.split_at_checked(end + 1));
    match address {
        Some((address, rest)) if is_ipv6(address) && rest.contains('/') => (Some(address), rest),
        _ => (None, image),
    }
}

fn is_ipv6(bracketed: &str) -> bool {
    let address = bracketed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    address.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok())
}

fn refusal(error: &ParseError) -> Invalid {
    Invalid::new(match error {
        ParseError::NameEmpty => "an image is needed, for example registry.example.com/team/app:1.0",
        ParseError::NameContainsUppercase => "a repository's name is in lower case",
        ParseError::NameTooLong => "a repository's name has at most 255 characters",
        ParseError::TagInvalidFormat => "a tag has at most 128 letters, digits, dots, underscores and hyphens",
        ParseError::DigestInvalidFormat | ParseError::DigestInvalidLength | ParseError::DigestUnsupported => {
            "a digest is sha256: and 64 hexadecimal digits"
        }
        ParseError::ReferenceInvalidFormat => {
            "this is no image reference: write [host[:port]/]repository[:tag][@digest], the repository in lower case"
        }
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("nginx", "docker.io/library/nginx")]
    #[case("nginx:1.27", "docker.io/library/nginx")]
    #[case("acme/app", "docker.io/acme/app")]
    #[case("docker.io/nginx", "docker.io/library/nginx")]
    #[case("index.docker.io/acme/app", "docker.io/acme/app")]
    #[case("registry.martin.com:5000/os/alpine:3", "registry.martin.com:5000/os/alpine")]
    #[case("localhost/app", "localhost/app")]
    #[case("localhost:5000/app", "localhost:5000/app")]
    #[case("10.0.0.1:5000/app", "10.0.0.1:5000/app")]
    #[case("[::1]:5000/team/app:1", "[::1]:5000/team/app")]
    #[case("[2001:db8::1]/app", "[2001:db8::1]/app")]
    #[case("Reg.io/app", "Reg.io/app")]
    #[case("REG/app", "REG/app")]
    #[case("reg.io/app:1@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "reg.io/app")]
    fn an_image_is_named_in_full(#[case] written: &str, #[case] name: &str) {
        assert_eq!(ImageName::parse(written).unwrap().to_string(), name);
    }

    #[rstest]
    #[case("", "is needed")]
    #[case("https://reg.io/app", "no scheme")]
    #[case("reg.io/App", "lower case")]
    #[case("reg.io/", "no image reference")]
    #[case("[::1/app", "no image reference")]
    #[case("[::g]/app", "no image reference")]
    #[case("[::1]", "no image reference")]
    #[case("a b", "no image reference")]
    #[case("app@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "64 hexadecimal")]
    fn what_is_no_image_is_refused_with_the_reason(#[case] written: &str, #[case] reason: &str) {
        let refusal = ImageName::parse(written).unwrap_err().to_string();
        assert!(refusal.contains(reason), "{refusal}");
    }
}
