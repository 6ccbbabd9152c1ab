//! Image names.

use std::fmt;

use oci_spec::distribution::{ParseError, Reference};

use crate::domain::{invalid::Invalid, registry::DOCKER_HUB};

/// Maximum length, above that of host, name, tag and digest together.
const MAX_LEN: usize = 1024;

/// Registry and repository of an image, without tag and digest.
///
/// Short names are expanded as all consumers do (`distribution/reference`, `normalize.go`): `nginx`
/// is `docker.io/library/nginx`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageName {
    registry: String,
    repository: String,
}

impl ImageName {
    /// Parses an image reference as in a pod or on a command line.
    ///
    /// # Errors
    ///
    /// [`Invalid`] with the reason and a remedy.
    pub fn parse(image: &str) -> Result<Self, Invalid> {
        ImageReference::parse(image).map(|image| image.name)
    }

    /// Treats an upper case first component as a host: repositories are in lower case
    /// (`distribution/reference`, `splitDockerDomain`).
    fn of(reference: &Reference) -> Self {
        let (registry, repository) = match reference.repository().split_once('/') {
            Some((host, rest)) if host.bytes().any(|byte| byte.is_ascii_uppercase()) => (host, rest),
            _ => (reference.registry(), reference.repository()),
        };
        Self { registry: registry.to_owned(), repository: repository.to_owned() }
    }

    /// Assembles a name without parsing.
    pub(super) fn assume(registry: &str, repository: &str) -> Self {
        Self { registry: registry.to_owned(), repository: repository.to_owned() }
    }

    /// `host[:port]`; `docker.io` for Docker Hub.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Repository within the registry.
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

/// Image with its tag or digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageReference {
    /// Registry and repository.
    pub name: ImageName,
    /// Digest if there is one, else the tag. Without either it is `latest`.
    version: String,
}

impl ImageReference {
    /// Parses an image reference as in a pod or on a command line.
    ///
    /// # Errors
    ///
    /// [`Invalid`] with the reason and a remedy.
    pub fn parse(image: &str) -> Result<Self, Invalid> {
        if image.len() > MAX_LEN {
            return Err(Invalid::new("an image reference has at most 1024 characters"));
        }
        if image.contains("://") {
            return Err(Invalid::new(
                "an image reference has no scheme: write host[:port]/repository[:tag], or a Docker Hub name",
            ));
        }
        let (address, rest) = without_ipv6(image);
        let stand_in = address.map(|_| format!("localhost{rest}"));
        let reference: Reference = stand_in.as_deref().unwrap_or(image).parse().map_err(|error| refusal(&error))?;
        let name = match address {
            Some(address) => ImageName {
                registry: reference.registry().replacen("localhost", address, 1),
                repository: reference.repository().to_owned(),
            },
            None => ImageName::of(&reference),
        };
        let version = reference.digest().or(reference.tag()).unwrap_or("latest").to_owned();
        Ok(Self { name, version })
    }

    /// Digest or tag.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if self.version.contains(':') { '@' } else { ':' };
        write!(f, "{}{separator}{}", self.name, self.version)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)
    }
}

/// Replaces an IPv6 address, which `oci_spec` does not support but `distribution/reference` does.
fn without_ipv6(image: &str) -> (Option<&str>, &str) {
    let address = image.find(']').and_then(|end| image.split_at_checked(end + 1));
    match address {
        Some((address, rest)) if is_ipv6(address) && rest.starts_with([':', '/']) && rest.contains('/') => {
            (Some(address), rest)
        }
        _ => (None, image),
    }
}

fn is_ipv6(bracketed: &str) -> bool {
    let address = bracketed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    address.is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok())
}

fn refusal(error: &ParseError) -> Invalid {
    Invalid::new(match error {
        ParseError::NameEmpty => "an image is required, for example registry.example.com/team/app:1.0",
        ParseError::NameContainsUppercase => "a repository's name is in lower case",
        ParseError::NameTooLong => "a repository's name has at most 255 characters",
        ParseError::TagInvalidFormat => "a tag has at most 128 letters, digits, dots, underscores and hyphens",
        ParseError::DigestInvalidFormat | ParseError::DigestInvalidLength | ParseError::DigestUnsupported => {
            "a digest is sha256: and 64 hexadecimal digits"
        }
        ParseError::ReferenceInvalidFormat => {
            "invalid image reference: write [host[:port]/]repository[:tag][@digest], the repository in lower case"
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
    #[case("registry.example.com:5000/os/alpine:3", "registry.example.com:5000/os/alpine")]
    #[case("localhost/app", "localhost/app")]
    #[case("localhost:5000/app", "localhost:5000/app")]
    #[case("10.0.0.1:5000/app", "10.0.0.1:5000/app")]
    #[case("[::1]:5000/team/app:1", "[::1]:5000/team/app")]
    #[case("[2001:db8::1]/app", "[2001:db8::1]/app")]
    #[case("Reg.io/app", "Reg.io/app")]
    #[case("REG/app", "REG/app")]
    #[case("reg.io/app:1@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "reg.io/app")]
    fn image_name_is_expanded(#[case] written: &str, #[case] name: &str) {
        assert_eq!(ImageName::parse(written).unwrap().to_string(), name);
    }

    #[rstest]
    #[case("nginx", "docker.io/library/nginx:latest")]
    #[case("reg.io:5000/app:1.0", "reg.io:5000/app:1.0")]
    #[case("[::1]:5000/app:1", "[::1]:5000/app:1")]
    #[case(
        "reg.io/app:1@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "reg.io/app@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    )]
    fn digest_takes_precedence_over_the_tag(#[case] written: &str, #[case] reference: &str) {
        assert_eq!(ImageReference::parse(written).unwrap().to_string(), reference);
    }

    #[rstest]
    #[case("", "is required")]
    #[case("https://reg.io/app", "no scheme")]
    #[case("reg.io/App", "lower case")]
    #[case("reg.io/", "invalid image reference")]
    #[case("[::1/app", "invalid image reference")]
    #[case("[::g]/app", "invalid image reference")]
    #[case("[::1]", "invalid image reference")]
    #[case("[::1]x/app", "invalid image reference")]
    #[case("a b", "invalid image reference")]
    #[case("app@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "64 hexadecimal")]
    fn invalid_image_is_rejected_with_reason(#[case] written: &str, #[case] reason: &str) {
        let refusal = ImageName::parse(written).unwrap_err().to_string();
        assert!(refusal.contains(reason), "{refusal}");
    }
}
