//! Repositories of a registry.

use std::fmt;

use super::{RegistryScope, path};
use crate::domain::invalid::Invalid;

/// Name of a repository in the registry's API, such as `os/alpine`, without registry, tag and
/// digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryName(String);

impl RepositoryName {
    /// Parses the name of a repository within `scope`. On Docker Hub, `alpine` is `library/alpine`.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the name is malformed or not in the scope.
    pub fn parse(name: &str, scope: &RegistryScope) -> Result<Self, Invalid> {
        path::check(name)?;
        let name =
            if scope.is_docker_hub() && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
        let is_inside = scope
            .path()
            .is_none_or(|path| name.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
        if is_inside { Ok(Self(name)) } else { Err(Invalid::new("is not in the account's part of the registry")) }
    }

    /// Name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("reg.io", "os/alpine", Some("os/alpine"))]
    #[case("reg.io", "v2/alpine", Some("v2/alpine"))]
    #[case("docker.io", "alpine", Some("library/alpine"))]
    #[case("docker.io", "acme/app", Some("acme/app"))]
    #[case("reg.io/os", "os/alpine", Some("os/alpine"))]
    #[case("reg.io/os", "os", Some("os"))]
    #[case("reg.io/os", "osx/alpine", None)]
    #[case("reg.io/os", "other", None)]
    #[case("reg.io", "", None)]
    #[case("reg.io", "os/alpine:3", None)]
    #[case("reg.io", "os/alpine@sha256:abc", None)]
    #[case("reg.io", "../_catalog", None)]
    #[case("reg.io", "os//alpine", None)]
    #[case("reg.io", "os/alpine/", None)]
    #[case("reg.io", "os/alpine?x=1", None)]
    #[case("reg.io", "os/%2e%2e", None)]
    #[case("reg.io", "OS/alpine", None)]
    fn repository_must_be_in_its_scope(#[case] scope: &str, #[case] name: &str, #[case] parsed: Option<&str>) {
        let scope = RegistryScope::parse(scope).unwrap();
        assert_eq!(RepositoryName::parse(name, &scope).ok().as_ref().map(RepositoryName::as_str), parsed);
    }
}
