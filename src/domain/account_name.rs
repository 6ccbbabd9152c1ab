//! Generated account names, for imports.

use crate::domain::{invalid::Invalid, names::Name, registry::RegistryScope};

const NAME_MAX: usize = 63;

/// Text that generated names start with. May be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamePrefix(String);

impl NamePrefix {
    /// Maximum length in characters.
    pub const MAX: usize = 32;

    /// Parses a prefix.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the prefix is too long, or no valid name starts with it.
    pub fn parse(prefix: &str) -> Result<Self, Invalid> {
        if prefix.len() > Self::MAX {
            return Err(Invalid::new("must be at most 32 characters long"));
        }
        let prefix = prefix.to_ascii_lowercase();
        // A name may not end in `-`, a prefix may.
        Name::parse(&format!("{prefix}x")).map_err(|_| {
            Invalid::new("must start with a letter or digit and contain only letters, digits and `-`, such as `ci-`")
        })?;
        Ok(Self(prefix))
    }
}

/// Derives an account name from a registry: `registry.example.com:5000/os` becomes
/// `registry-example-com-5000-os`.
///
/// A name that is too long or taken (`is_taken`) ends in a digest of the registry instead. The
/// result depends only on the arguments.
///
/// # Errors
///
/// Never: a valid prefix starts a valid name.
pub fn derive(prefix: &NamePrefix, scope: &RegistryScope, is_taken: impl Fn(&Name) -> bool) -> Result<Name, Invalid> {
    let plain = slug(&prefix.0, &scope.to_string());
    if plain.len() <= NAME_MAX {
        let name = Name::parse(&plain)?;
        if !is_taken(&name) {
            return Ok(name);
        }
    }
    let mut short = plain;
    short.truncate(NAME_MAX - 9);
    Name::parse(&format!("{}-{:08x}", short.trim_end_matches('-'), digest(scope)))
}

/// Replaces each run of characters that are not allowed in a name by one `-`.
fn slug(prefix: &str, scope: &str) -> String {
    let mut slug = prefix.to_owned();
    let mut parts = scope.split(|c: char| !c.is_ascii_alphanumeric()).filter(|part| !part.is_empty());
    slug.push_str(parts.next().unwrap_or_default());
    for part in parts {
        slug.push('-');
        slug.push_str(part);
    }
    slug.to_ascii_lowercase()
}

/// Stable across builds, so that a repeated import derives the same name. Collision resistance is
/// not needed.
fn digest(scope: &RegistryScope) -> u32 {
    crc32fast::hash(scope.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("", "registry.example.com:5000/os", "registry-example-com-5000-os")]
    #[case("node-1-", "https://index.docker.io/v1/", "node-1-docker-io")]
    #[case("", "[::1]:5000", "1-5000")]
    fn name_is_derived_from_the_registry(#[case] prefix: &str, #[case] registry: &str, #[case] name: &str) {
        let scope = RegistryScope::parse(registry).unwrap();
        assert_eq!(derive(&NamePrefix::parse(prefix).unwrap(), &scope, |_| false).unwrap().as_str(), name);
    }

    #[test]
    fn taken_or_long_name_ends_in_a_digest() {
        let scope = RegistryScope::parse("reg.io/a-b").unwrap();
        let name = derive(&NamePrefix::default(), &scope, |name| name.as_str() == "reg-io-a-b").unwrap();
        assert!(name.as_str().starts_with("reg-io-a-b-"), "{name}");
        let long = RegistryScope::parse(&format!("reg.io/{}", "abc/".repeat(30).trim_end_matches('/'))).unwrap();
        assert!(derive(&NamePrefix::default(), &long, |_| false).unwrap().as_str().len() <= 63);
    }

    #[rstest]
    #[case("-a")]
    #[case("A_")]
    #[case("abcdefghijklmnopqrstuvwxyz-123456")]
    fn prefix_that_cannot_start_a_name_is_rejected(#[case] prefix: &str) {
        assert!(NamePrefix::parse(prefix).is_err());
    }
}
