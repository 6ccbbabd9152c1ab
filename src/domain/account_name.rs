//! Names for accounts that come without one, as from an import.

use crate::domain::{invalid::Invalid, names::Name, registry::RegistryScope};

const NAME_MAX: usize = 63;

/// Names an account after its registry: `registry.martin.com:5000/os` becomes `registry-martin-com-5000-os`.
///
/// A name that is too long, or that `is_taken` says stands for another registry of the same document, gets a
/// digest of the registry at its end; the same registry always gets the same one.
///
/// # Errors
///
/// [`Invalid`] if no name can begin with `prefix`.
pub fn of(prefix: &str, scope: &RegistryScope, is_taken: impl Fn(&Name) -> bool) -> Result<Name, Invalid> {
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

/// The scope with one `-` for each run of characters that a name cannot have.
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

/// Not secret and not stored: it only has to be the same for the same scope, in every build of regcred.
fn digest(scope: &RegistryScope) -> u32 {
    crc32fast::hash(scope.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("", "registry.martin.com:5000/os", "registry-martin-com-5000-os")]
    #[case("node-1-", "https://index.docker.io/v1/", "node-1-docker-io")]
    #[case("", "[::1]:5000", "1-5000")]
    fn an_account_is_named_after_its_registry(#[case] prefix: &str, #[case] registry: &str, #[case] name: &str) {
        let scope = RegistryScope::parse(registry).unwrap();
        assert_eq!(of(prefix, &scope, |_| false).unwrap().as_str(), name);
    }

    #[test]
    fn a_taken_or_long_name_gets_a_digest() {
        let scope = RegistryScope::parse("reg.io/a-b").unwrap();
        let name = of("", &scope, |name| name.as_str() == "reg-io-a-b").unwrap();
        assert!(name.as_str().starts_with("reg-io-a-b-"), "{name}");
        let long = RegistryScope::parse(&format!("reg.io/{}", "abc/".repeat(30).trim_end_matches('/'))).unwrap();
        assert!(of("", &long, |_| false).unwrap().as_str().len() <= 63);
    }

    #[rstest]
    #[case("-a")]
    #[case("A_")]
    fn a_prefix_that_no_name_can_begin_with_is_refused(#[case] prefix: &str) {
        assert!(of(prefix, &RegistryScope::parse("reg.io").unwrap(), |_| false).is_err());
    }
}
