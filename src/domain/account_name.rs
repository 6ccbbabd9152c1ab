//! Generated account names, for imports.

use crate::domain::{invalid::Invalid, names::Name, registry::RegistryScope};

const NAME_MAX: usize = 63;

/// Derives an account name from a registry: `registry.example.com:5000/os` becomes
/// `registry-example-com-5000-os`.
///
/// A name that is too long or taken (`is_taken`) ends in a digest of the registry instead. The
/// result depends only on the arguments.
///
/// # Errors
///
/// [`Invalid`] if no valid name starts with `prefix`.
pub fn derive(prefix: &str, scope: &RegistryScope, is_taken: impl Fn(&Name) -> bool) -> Result<Name, Invalid> {
    if prefix.len() > 32 {
        return Err(Invalid::new("must be at most 32 characters long"));
    }
    let plain = slug(prefix, &scope.to_string());
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
        assert_eq!(derive(prefix, &scope, |_| false).unwrap().as_str(), name);
    }

    #[test]
    fn taken_or_long_name_ends_in_a_digest() {
        let scope = RegistryScope::parse("reg.io/a-b").unwrap();
        let name = derive("", &scope, |name| name.as_str() == "reg-io-a-b").unwrap();
        assert!(name.as_str().starts_with("reg-io-a-b-"), "{name}");
        let long = RegistryScope::parse(&format!("reg.io/{}", "abc/".repeat(30).trim_end_matches('/'))).unwrap();
        assert!(derive("", &long, |_| false).unwrap().as_str().len() <= 63);
    }

    #[rstest]
    #[case("-a")]
    #[case("A_")]
    fn prefix_that_cannot_start_a_name_is_rejected(#[case] prefix: &str) {
        assert!(derive(prefix, &RegistryScope::parse("reg.io").unwrap(), |_| false).is_err());
    }
}
